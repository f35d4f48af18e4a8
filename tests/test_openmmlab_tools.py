"""tools/train_openmmlab.py and tools/test_openmmlab.py: training, resuming, two processes, testing; the data sets."""
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tool_environment
from PIL import Image, ImageDraw

pytest.importorskip('mmcv.ops', exc_type=ImportError,
                    reason='OpenMMLab is not installed: python -m vim2.install_openmmlab')

from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import DATASETS, MODELS, DefaultScope  # noqa: E402

from vim2.openmmlab import load_config  # noqa: E402

SEGMENTER = 'vim2-micro_upernet_camvid'
DETECTOR = 'mask-rcnn_vim2-micro_fpn_coco-tiny'
# A small model in the config's place, and no randomness in what it is given.
TINY = ['model.backbone.model_name=test_vim2', 'model.backbone.init_cfg=None', 'model.backbone.drop_path_rate=0.']


def square(rng, size, draw):
    """A bright square at a random place: its corners."""
    side = int(rng.integers(14, 22))
    x, y = (int(rng.integers(0, s - side)) for s in size)
    draw.rectangle([x, y, x + side - 1, y + side - 1], fill=(250, 240, int(rng.integers(0, 90))))
    return x, y, side


@pytest.fixture(scope='module')
def camvid(tmp_path_factory):
    """Data in CamVid's layout: dark ground (class 3), a square (class 8), a border that is not labelled (11)."""
    folder = tmp_path_factory.mktemp('camvid')
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 4), ('test', 3)):
        for kind in ('images', 'masks'):
            (folder / split / kind).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 90, (48, 64, 3)).astype(np.uint8))
            x, y, side = square(rng, image.size, ImageDraw.Draw(image))
            mask = np.full((48, 64), 3, np.uint8)
            mask[y:y + side, x:x + side] = 8
            mask[:2] = 11
            image.save(folder / split / 'images' / f'{i}.jpg')
            Image.fromarray(mask).save(folder / split / 'masks' / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """Data in COCO's format: squares as category 18."""
    from mmdet.datasets import CocoDataset
    folder = tmp_path_factory.mktemp('coco')
    (folder / 'annotations').mkdir()
    rng = np.random.default_rng(0)
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])]
    for split in ('train2017', 'val2017'):
        (folder / 'images' / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(4):
            image = Image.fromarray(rng.integers(0, 90, (64, 64, 3)).astype(np.uint8))
            x, y, side = square(rng, image.size, ImageDraw.Draw(image))
            image.save(folder / 'images' / split / f'{i}.jpg')
            images.append(dict(id=i + 1, file_name=f'{i}.jpg', width=64, height=64))
            annotations.append(dict(
                id=i + 1, image_id=i + 1, category_id=18, bbox=[x, y, side, side], area=side * side, iscrowd=0,
                segmentation=[[x, y, x + side, y, x + side, y + side, x, y + side]]))
        file = folder / 'annotations' / f'instances_{split}.json'
        file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return folder


def segmenter_options(iters, extra=()):
    return ['--cfg-options', *TINY, 'model.decode_head.in_channels=[8,16,24]', 'model.auxiliary_head.in_channels=16',
            'model.decode_head.channels=16', 'model.auxiliary_head.channels=16', f'train_cfg.max_iters={iters}',
            f'train_cfg.val_interval={iters}', f'default_hooks.checkpoint.interval={iters}',
            'default_hooks.logger.interval=1', 'randomness.seed=0', *extra]


# The same batches for every way of making them: no cropping, flips, dropout or class weights, in the files' order. SGD,
# because AdamW's step has the size of the rate however small a gradient is, and its sign is then rounding's.
PLAIN = """
_base_ = {base!r}
model = dict(
    data_preprocessor=dict(size=(64, 96)),
    decode_head=dict(dropout_ratio=0., loss_decode=dict(class_weight=None)),
    auxiliary_head=dict(dropout_ratio=0., loss_decode=dict(class_weight=None)))
train_dataloader = dict(sampler=dict(shuffle=False), dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='Resize', scale=(96, 64)),
    dict(type='PackSegInputs')]))
optim_wrapper = dict(clip_grad=None, optimizer=dict(_delete_=True, type='SGD', lr=0.05, weight_decay=0.))
param_scheduler = None
load_from = {start!r}
"""


def losses(text):
    return [float(v) for v in re.findall(r'Iter\(train\) \[.*? loss: ([\d.]+)', text)]


def tensorboard_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(next(folder.rglob('events.out.tfevents*')).parent)).Reload()
    return set(events.Tags()['scalars'])


def weights(folder, iters):
    return torch.load(folder / f'iter_{iters}.pth', weights_only=False)['state_dict']  # written by this test


def test_segmenter_trains_tests_and_resumes(tool, tool_process, camvid, tmp_path):
    work, data = tmp_path / 'work', ('--data-root', camvid)
    options = segmenter_options(4)
    # a process of its own, which Weights & Biases' is then told the end of
    result = tool_process('train_openmmlab', SEGMENTER, *data, '--work-dir', work, '--tensorboard', '--wandb', 'tests',
                          *options, cwd=tmp_path, WANDB_MODE='offline')
    assert result.code == 0, result.err[-2000:]
    log = next(work.glob('*/*.log')).read_text()
    assert len(losses(log)) == 4 and 'mIoU' in log
    assert (work / 'iter_4.pth').is_file()
    assert {'loss', 'lr', 'mIoU'} <= tensorboard_tags(work)
    recorded = next(work.rglob('*.wandb')).read_bytes()
    assert b'decode.loss_ce' in recorded and b'mIoU' in recorded

    result = tool('train_openmmlab', SEGMENTER, *data, '--work-dir', work, '--resume', '--amp',
                  *segmenter_options(6))
    assert result.code == 0, result.err[-2000:]
    log = sorted(work.glob('*/*.log'))[-1].read_text()
    assert 'resumed epoch: 0, iter: 4' in log and len(losses(log)) == 2  # 5 and 6
    assert ('AmpOptimWrapper' if torch.accelerator.is_available() else 'BFloat16OptimWrapper') in log
    resumed = weights(work, 6)
    assert any(not torch.equal(v, resumed[k]) for k, v in weights(work, 4).items())

    # a process of its own: mmengine keeps one visualizer per process, with the folder of the first
    result = tool_process('test_openmmlab', SEGMENTER, work / 'iter_6.pth', *data, '--work-dir', tmp_path / 'test',
                          '--json', '--show-dir', 'pictures', *options, cwd=tmp_path)
    assert result.code == 0, result.err[-2000:]
    metrics = json.loads(result.out.splitlines()[-1])
    assert 0 <= metrics['mIoU'] <= 100 and 0 < metrics['aAcc'] <= 100
    assert len(list((tmp_path / 'test' / 'pictures').rglob('*.png'))) == 3 and not (tmp_path / 'pictures').exists()

    result = tool('test_openmmlab', SEGMENTER, work / 'iter_6.pth', *data, '--work-dir', tmp_path / 'tta', '--json',
                  '--tta', *options)
    assert result.code == 0, result.err[-2000:]
    assert json.loads(result.out.splitlines()[-1]).keys() == metrics.keys()
    assert 'SegTTAModel' in next((tmp_path / 'tta').glob('*/*.log')).read_text()


def test_two_processes_are_one_with_the_whole_batch(tool, root, camvid, tmp_path, monkeypatch):
    monkeypatch.setenv('CAMVID_ROOT', str(camvid))
    from mmengine.config import DictAction
    options = segmenter_options(3)
    changes = {k: DictAction._parse_iterable(v) for k, _, v in (o.partition('=') for o in options[1:])}
    with DefaultScope.overwrite_default_scope('mmseg'):
        torch.manual_seed(3)
        state = MODELS.build(load_config(SEGMENTER, changes).model).state_dict()
    start, config = tmp_path / 'start.pth', tmp_path / 'plain.py'
    torch.save(dict(state_dict=state), start)  # the same weights for both
    config.write_text(PLAIN.format(base=load_config(SEGMENTER).filename, start=str(start)))
    one, two = tmp_path / 'one', tmp_path / 'two'
    result = tool('train_openmmlab', config, '--work-dir', one, *options, 'train_dataloader.batch_size=4')
    assert result.code == 0, result.err[-2000:]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
         str(root / 'tools' / 'train_openmmlab.py'), config, '--launcher', 'pytorch', '--work-dir', two, *options,
         'train_dataloader.batch_size=2'],
        text=True, capture_output=True, cwd=tmp_path,
        env=tool_environment(PYTHONPATH=str(root)))
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = weights(one, 3), weights(two, 3)
    assert set(a) == set(b) == set(state)
    assert max((v - state[k]).abs().max() for k, v in a.items()) > 1e-2  # they did move
    for k, v in a.items():
        assert torch.allclose(v, b[k], rtol=1e-5, atol=1e-5), (k, (v - b[k]).abs().max())


def test_detector_trains_and_tests(tool, coco, tmp_path):
    options = ['--data-root', coco, '--cfg-options', *TINY, 'model.neck.in_channels=[8,16,24]',
               'train_cfg.max_iters=3', 'train_cfg.val_interval=3', 'default_hooks.checkpoint.interval=3',
               'default_hooks.logger.interval=1', 'randomness.seed=0',
               'model.test_cfg.rcnn.score_thr=0.']  # something is found after three steps
    result = tool('train_openmmlab', DETECTOR, '--work-dir', tmp_path, '--amp', '--amp-dtype', 'bfloat16',
                  '--auto-scale-lr', *options, 'auto_scale_lr.base_batch_size=1')
    assert result.code == 0, result.err[-2000:]
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'batch size of 1 and the current batch size is 2. Scaling the original LR by 2.0.' in log
    assert len(losses(log)) == 3 and all(map(math.isfinite, losses(log))) and losses(log)[-1] < losses(log)[0]
    assert 'BFloat16OptimWrapper' in log
    result = tool('test_openmmlab', DETECTOR, tmp_path / 'iter_3.pth', '--work-dir', tmp_path, '--json', *options)
    assert result.code == 0, result.err[-2000:]
    metrics = json.loads(result.out.splitlines()[-1])
    assert {'coco/bbox_mAP_50', 'coco/segm_mAP_50'} <= set(metrics)
    result = tool('test_openmmlab', DETECTOR, tmp_path / 'iter_3.pth', '--work-dir', tmp_path / 'tta', '--tta',
                  '--json', '--show-dir', 'pictures', *options)
    assert result.code == 0, result.err[-2000:]
    metrics = json.loads(result.out.splitlines()[-1])
    assert 'coco/bbox_mAP_50' in metrics and 'coco/segm_mAP_50' not in metrics  # merges boxes alone
    assert len(list((tmp_path / 'tta' / 'pictures').rglob('*.jpg'))) == 4

    # the README's lines for a backbone of another model: it starts where that one's ended
    at = options.index('model.backbone.init_cfg=None')
    options[at:at + 1] = ['model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.prefix=backbone.',
                          f'model.backbone.init_cfg.checkpoint={tmp_path / "iter_3.pth"}']
    result = tool('train_openmmlab', DETECTOR, '--work-dir', tmp_path / 'next', *options, 'train_cfg.max_iters=1',
                  'default_hooks.checkpoint.interval=1', 'optim_wrapper.optimizer.lr=0.')
    assert result.code == 0, result.err[-2000:]
    before, after = weights(tmp_path, 3), weights(tmp_path / 'next', 1)
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith('backbone.'))
    assert not torch.equal(before['rpn_head.rpn_conv.weight'], after['rpn_head.rpn_conv.weight'])


def test_multi_scale_testing(tool, camvid, tmp_path, monkeypatch):
    """--tta of an ADE20K config, on other data: six scales, each as it is and flipped."""
    monkeypatch.setenv('CAMVID_ROOT', str(camvid))
    name = 'vim2-t_upernet_8xb2-160k_ade20k-512x512'
    dataset = load_config(SEGMENTER).test_dataloader.dataset.to_dict()
    dataset.pop('pipeline')
    file = tmp_path / 'tta.py'
    file.write_text(f"""_base_ = {load_config(name).filename!r}
model = dict(
    data_preprocessor=dict(size=None),
    backbone=dict(model_name='test_vim2'),
    decode_head=dict(in_channels=[8, 16, 24, 32], channels=8, num_classes=11),
    auxiliary_head=dict(in_channels=24, channels=8, num_classes=11))
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(_delete_=True, **{dataset!r}))
test_evaluator = dict(ignore_index=11)
""")
    cfg = load_config(file)
    with DefaultScope.overwrite_default_scope('mmseg'):
        torch.save(dict(state_dict=revert_sync_batchnorm(MODELS.build(cfg.model)).state_dict()), tmp_path / 'w.pth')
    result = tool('test_openmmlab', file, tmp_path / 'w.pth', '--tta', '--work-dir', tmp_path, '--json')
    assert result.code == 0, result.err[-2000:]
    assert 'mIoU' in json.loads(result.out.splitlines()[-1])
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'SegTTAModel' in log and '[3/3]' in log


@pytest.mark.parametrize('arguments, message', [
    (['no-such-config'], "there is no config 'no-such-config'"),
    ([SEGMENTER, '--amp-dtype', 'bfloat16'], '--amp-dtype needs --amp'),
    ([SEGMENTER, '--amp', '--amp-dtype', 'float16'], '--amp-dtype float16 needs a GPU: use bfloat16'),
    ([SEGMENTER, '--cfg-options', 'model.backbone.model_name=vim2_tinny'], "write model_name='vim2_tiny'"),
    ([SEGMENTER, '--cfg-options', 'model.backbone.out_indices=(0,5)'], r'out_indices=.*from 0 to 2'),
    ([SEGMENTER, '--resume', 'none.pth'], 'there is no checkpoint none.pth'),
    ([SEGMENTER, '--auto-scale-lr'], 'no auto_scale_lr.base_batch_size'),
    ([SEGMENTER, '--launcher', 'slurm'], '--launcher slurm needs GPUs'),
    ([SEGMENTER, '--launcher', 'pytorch'], 'for processes that torchrun starts'),
    ([SEGMENTER], r'there is no .*camvid/train/images \(train data\): --data-root DIR says where.*, now .*cam'),
    (['mask-rcnn_vim2-t_fpn_1x_coco', '--data-root', '.'],
     r'there is no ./annotations/instances_train2017.json \(train data\)'),
])
def test_mistakes(tool, camvid, tmp_path, monkeypatch, arguments, message):
    if torch.accelerator.is_available() and {'--launcher', 'float16'} & set(arguments):
        pytest.skip('concerns machines without a GPU')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CAMVID_ROOT', str(tmp_path / 'camvid' if len(arguments) == 1 else camvid))
    result = tool('train_openmmlab', *arguments)
    assert result.code == 2, result.err[-1000:]
    last = result.err.strip().splitlines()[-1]
    assert last.startswith('train_openmmlab.py: error: ') and re.search(message, last), last


def test_what_is_missing_is_named_for_what_it_is(tool, coco, camvid, tmp_path):
    """Weights are no data; a file that the evaluator alone reads; an image that the annotations list."""
    options = ['--work-dir', tmp_path, '--data-root', camvid, *segmenter_options(1)]
    options[options.index('model.backbone.init_cfg=None')] = 'model.backbone.init_cfg.checkpoint=none.pth'
    result = tool('train_openmmlab', SEGMENTER, *options)
    assert result.code == 2 and 'there is no weights file none.pth' in result.err.splitlines()[-1]
    assert 'data' not in result.err.splitlines()[-1].rpartition('none.pth')[2]

    arguments = [DETECTOR, '--work-dir', tmp_path, '--data-root', coco, '--cfg-options', *TINY,
                 'model.neck.in_channels=[8,16,24]']
    result = tool('train_openmmlab', *arguments, 'val_evaluator.ann_file=none.json')
    assert result.code == 2 and 'there is no none.json (val data)' in result.err.splitlines()[-1]
    file = coco / 'images' / 'train2017' / '2.jpg'
    try:
        file.rename(tmp_path / '2.jpg')
        result = tool('train_openmmlab', *arguments)
    finally:
        (tmp_path / '2.jpg').rename(file)
    last = result.err.strip().splitlines()[-1]
    assert result.code == 2 and '2.jpg' in last and '--data-root' in last


def test_config_without_the_import(tool, tmp_path):
    file = tmp_path / 'own.py'
    file.write_text("model = dict(backbone=dict(type='ViM2'))\ntrain_dataloader = dict()\n")
    result = tool('train_openmmlab', file)
    assert result.code == 2 and "write custom_imports = dict(imports=['vim2.openmmlab']" in result.err


class Evil:
    def __reduce__(self):
        return print, ('code from a checkpoint ran',)


def test_checkpoint_that_would_run_code(tool, tmp_path):
    torch.save(dict(state_dict={}, meta=Evil()), tmp_path / 'evil.pth')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    for file, message in (('evil.pth', r'holds objects besides weights \(builtins.print\)'),
                          ('text.pth', 'cannot read the checkpoint'), ('none.pth', 'there is no checkpoint')):
        result = tool('test_openmmlab', SEGMENTER, tmp_path / file, '--work-dir', tmp_path)
        assert result.code == 2 and re.search(message, result.err), result.err[-500:]
        assert 'code from a checkpoint ran' not in result.out


class Method:
    def __call__(self):
        raise AssertionError

    def __reduce__(self):
        from mmengine.logging import HistoryBuffer
        return getattr, (HistoryBuffer, '__init__')


class Sly:
    """Only names that a checkpoint of mmengine has too, put together to call something."""

    def __reduce__(self):
        return Method(), ('self', 'log_history')


def test_checkpoint_that_would_run_code_by_allowed_names(tool, camvid, tmp_path, monkeypatch):
    monkeypatch.setenv('CAMVID_ROOT', str(camvid))
    torch.save(dict(state_dict={}, meta=Sly()), tmp_path / 'sly.pth')
    result = tool('test_openmmlab', SEGMENTER, tmp_path / 'sly.pth', '--work-dir', tmp_path)
    assert result.code == 2, result.err[-2000:]
    assert 'the checkpoint holds what cannot be read without running code' in result.err.splitlines()[-1]


# --- real data --------------------------------------------------------------------------------------------------------

def build_dataset(cfg, split='train'):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return DATASETS.build(cfg[f'{split}_dataloader'].dataset)


def test_coco_tiny(shared_data, monkeypatch):
    root = shared_data('coco_tiny')
    monkeypatch.setenv('COCO_TINY_ROOT', str(root))
    cfg = load_config(DETECTOR)
    for split, images in (('train', 68), ('val', 68)):  # of 70 images to train with two are empty
        dataset = build_dataset(cfg, split)
        annotations = json.loads((root / 'annotations' / f'instances_{split}2017.json').read_text())['annotations']
        ids = {dataset.get_data_info(i)['img_id'] for i in range(len(dataset))}
        assert len(ids) == len(dataset) == images and ids == {a['image_id'] for a in annotations}
        count = sum(len(dataset.get_data_info(i)['instances']) for i in range(len(dataset)))
        assert count == len(annotations)


def test_camvid(shared_data, monkeypatch):
    root = shared_data('camvid')
    monkeypatch.setenv('CAMVID_ROOT', str(root))
    cfg = load_config(SEGMENTER)
    dataset = build_dataset(cfg)
    assert len(dataset) == 367
    counts = np.zeros(12)
    present = np.zeros(12)
    for path in (root / 'train' / 'masks').glob('*.png'):
        found = np.bincount(np.asarray(Image.open(path)).ravel(), minlength=12)
        counts += found
        present += (found > 0) * found.sum()
    frequency = counts[:11] / present[:11]
    expected = np.sqrt(np.median(frequency) / frequency)
    assert np.abs(expected - cfg.model.decode_head.loss_decode.class_weight).max() < 0.006
