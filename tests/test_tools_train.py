"""tools/train.py: it learns, it resumes exactly, it says what is wrong."""
import csv
import io
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import timm
import torch
import yaml
from conftest import CLASSES, tool_environment
from timm.data.dataset import IterableImageDataset
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import _common as common
import _datasets as datasets
import train
from _common import UserError

VIT = ('--model', 'test_vit', '--model-kwargs', 'img_size=32', 'patch_size=8', '--img-size', '32')
PLAIN = ('--warmup-epochs', '0', '--train-crop-mode', 'pad', '--workers', '0', '--device', 'cpu')


def options(npz_dir, out, *more, model=VIT):
    return ['--dataset', 'npz', '--data-dir', str(npz_dir), '--val-split', 'test', '--output', str(out),
            '--experiment', 'run', *model, *PLAIN, '-b', '16', *map(str, more)]


def load(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def assert_same_state(a, b):
    """Bit-equal weights, averages, moments; whatever both checkpoints hold."""
    assert a.keys() == b.keys()
    for key in ('state_dict', 'state_dict_ema'):
        if key in a:
            assert a[key].keys() == b[key].keys()
            for name, value in a[key].items():
                assert torch.equal(value, b[key][name]), (key, name)
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    for i, moments in a['optimizer']['state'].items():
        for name, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b['optimizer']['state'][i][name])), (i, name)
    timeless = {k: v for k, v in a['progress'].items() if k != 'train_seconds'}
    assert timeless == {k: v for k, v in b['progress'].items() if k != 'train_seconds'}


# ------------------------------------------------------------------------------------------------------------ training

@pytest.fixture(scope='module')
def trained(npz_dir, tmp_path_factory):
    """A run of some epochs that learns the four colors; the folder and what the tool printed."""
    out = tmp_path_factory.mktemp('trained')
    command = [sys.executable, str(common.__file__).replace('_common', 'train'),
               *options(npz_dir, out, '--epochs', 6, '--lr', '3e-3', '--model-ema', '--model-ema-decay', 0.9)]
    done = subprocess.run(command, capture_output=True, text=True, env=tool_environment())
    assert done.returncode == 0, done.stderr
    return out / 'run', done.stdout


def test_training_learns_and_says_so(trained):
    folder, printed = trained
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    assert [int(r['epoch']) for r in rows] == list(range(6))
    assert set(rows[0]) == {'epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'}
    assert float(rows[-1]['train_loss']) < float(rows[0]['train_loss'])
    assert float(rows[-1]['eval_top1']) > 80  # chance is 25
    lines = [line for line in printed.splitlines() if line.startswith('epoch ')]
    assert len(lines) == 6 and f'top1 {float(rows[-1]["eval_top1"]):.2f}' in lines[-1]  # one plain line per epoch
    assert {p.name for p in folder.iterdir()} == {
        '.lock', 'args.yaml', 'summary.csv', 'last.pth.tar', 'previous.pth.tar', 'best.pth.tar', 'model'}
    assert yaml.safe_load((folder / 'args.yaml').read_text())['lr'] == 3e-3
    assert load(folder / 'best.pth.tar')['progress']['best_metric'] == max(float(r['eval_top1']) for r in rows)


def test_exported_model_is_what_was_evaluated_best(trained):
    """Of all epochs and both kinds of weights; the tool says which."""
    folder, printed = trained
    checkpoint = load(folder / 'best.pth.tar')
    progress = checkpoint['progress']
    kind = {'weights': 'state_dict', 'averaged weights': 'state_dict_ema'}[progress['best_kind']]
    model = timm.create_model(f'local-dir:{folder / "model"}', pretrained=True, img_size=32, patch_size=8)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in checkpoint[kind].items())
    assert printed.splitlines()[-1].endswith(
        f'the {progress["best_kind"]} of epoch {progress["best_epoch"]}, the best that were evaluated: '
        f'top1 {progress["best_metric"]:.3f}')
    cfg = model.pretrained_cfg
    assert tuple(cfg['label_names']) == CLASSES and cfg['num_classes'] == 4 and tuple(cfg['input_size']) == (3, 32, 32)


def test_numbers_go_to_tensorboard_and_wandb(npz_dir, tmp_path, tool_process):
    """What summary.csv has; a resumed run goes on in the same one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    more = ('--tensorboard', '--wandb', 'tests')
    result = tool_process('train', *options(npz_dir, tmp_path, '--epochs', 1, *more), cwd=tmp_path,
                          WANDB_MODE='offline')
    assert result.code == 0, result.err
    folder = tmp_path / 'run'
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()['scalars']) == set(rows[0]) - {'epoch'}
    for name in ('train_loss', 'eval_top1'):
        found = events.Scalars(name)
        assert [e.step for e in found] == [0] and found[0].value == pytest.approx(float(rows[0][name]), rel=1e-5)
    recorded, = folder.rglob('*.wandb')
    content = recorded.read_bytes()
    assert b'eval_top1' in content and (folder / 'wandb-id').read_text().encode() in content


@pytest.mark.parametrize('option', ['--tensorboard', '--wandb'])
def test_a_logger_that_is_not_installed(npz_dir, tmp_path, tool, monkeypatch, option):
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name in ('tensorboard', 'wandb') else
                        real(name, *a))
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 1, option))
    assert result.code == 2 and f'{option} needs the package {option[2:]}: pip install' in result.err


def test_average_warms_up(npz_dir, tmp_path, tool):
    """A run that is short beside the average's memory: its random start does not stay in the average."""
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 3, '--lr', '3e-3', '--model-ema',
                                    '--model-ema-decay', 0.9999))
    assert result.code == 0, result.err
    checkpoint, model = load(tmp_path / 'run' / 'last.pth.tar'), timm.create_model(
        'test_vit', img_size=32, patch_size=8, num_classes=4)
    train.data.seed_everything(42, 0)
    start = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4).state_dict()
    name = next(n for n, p in model.named_parameters() if p.ndim == 2)
    to_start, to_end = ((checkpoint['state_dict_ema'][name] - state[name]).norm()
                        for state in (start, checkpoint['state_dict']))
    assert to_end < to_start


def test_layer_decay_logs_the_top_rate(npz_dir, tmp_path, tool):
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 1, '--lr', '1e-3', '--layer-decay', 0.5,
                                    '--sched', 'constant'))
    assert result.code == 0, result.err
    assert 'lr 1.00e-03' in result.out


def test_train_sizes(npz_dir, tmp_path, tool, monkeypatch):
    sizes = []
    forward = timm.models.vision_transformer.VisionTransformer.forward

    def watched(self, x):
        if self.training:
            sizes.append(tuple(x.shape[-2:]))
        return forward(self, x)

    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, 'forward', watched)
    model = ('--model', 'test_vit', '--model-kwargs', 'img_size=32', 'patch_size=8', 'dynamic_img_size=True',
             '--img-size', '32')
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 2, '--train-sizes', 24, 32, 48, model=model))
    assert result.code == 0, result.err
    assert set(sizes) == {(24, 24), (32, 32), (48, 48)} and sizes != sorted(sizes)
    sizes.clear()
    result = tool('train', *options(npz_dir, tmp_path / 'growing', '--epochs', 2, '--train-sizes', 24, 32, 32, 48,
                                    '--train-sizes-order', 'growing', model=model))
    assert result.code == 0, result.err
    assert sizes == sorted(sizes) and [sizes.count((n, n)) for n in (24, 32, 48)] == [5, 10, 5]


def test_checkpoints_load_with_timm(trained):
    folder, _ = trained
    model = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4)
    timm.models.load_checkpoint(model, str(folder / 'last.pth.tar'), use_ema=False, strict=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load(folder / 'last.pth.tar')['state_dict'].items())


def test_gradient_accumulation_is_a_larger_batch(npz_dir, tmp_path, tool):
    states = []
    for name, size, accumulate in (('a', 32, 1), ('b', 8, 4)):
        result = tool('train', *options(npz_dir, tmp_path / name, '-b', size, '--grad-accum-steps', accumulate,
                                        '--epochs', 1, '--opt', 'sgd', '--lr', 0.1, '--clip-grad', 1))
        assert result.code == 0, result.err
        states.append(load(tmp_path / name / 'run' / 'last.pth.tar'))
    assert states[0]['progress']['updates'] == states[1]['progress']['updates'] == 5
    for key, value in states[0]['state_dict'].items():
        torch.testing.assert_close(states[1]['state_dict'][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_mixed_precision(npz_dir, tmp_path, tool, dtype):
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 1, '--amp', '--amp-dtype', dtype, '--clip-grad', 1))
    assert result.code == 0, result.err
    checkpoint = load(tmp_path / 'run' / 'last.pth.tar')
    assert ('amp_scaler' in checkpoint) == (dtype == 'float16')
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in checkpoint['state_dict'].values())


def test_compiled_layer_decay_and_channels_last(npz_dir, tmp_path, tool):
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 1, '--torchcompile', 'eager', '--layer-decay', 0.7,
                                    '--channels-last', '--grad-checkpointing'))
    assert result.code == 0, result.err
    checkpoint = load(tmp_path / 'run' / 'last.pth.tar')
    assert not any('_orig_mod' in k for k in checkpoint['state_dict'])
    assert len({g['lr_scale'] for g in checkpoint['optimizer']['param_groups']}) > 2


def test_training_on_class_folders(folder_dir, tmp_path, tool):
    result = tool('train', '--data-dir', folder_dir, '--output', tmp_path, '--experiment', 'run', *VIT, *PLAIN, '-b', 8,
                  '--epochs', 1, '--initial-checkpoint', tmp_path / 'none.pth')
    assert result.code == 2 and 'none.pth does not exist' in result.err
    result = tool('train', '--data-dir', folder_dir, '--output', tmp_path, '--experiment', 'run', *VIT, *PLAIN, '-b', 8,
                  '--epochs', 1)
    assert result.code == 0, result.err
    assert '40 training and 22 evaluation images' in result.out and '4 classes' in result.out


class StreamReader:
    """A reader as timm's streaming data sets have them, whose order depends on the epoch."""

    def __init__(self, npz):
        self.npz = npz
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(len(self.npz), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return (self.npz[i] for i in order)

    def __len__(self):
        return len(self.npz)


@pytest.mark.parametrize('workers', [0, 1])
def test_streaming_data_set(npz_dir, tmp_path, tool, monkeypatch, workers):
    class Streamed(IterableImageDataset):
        def set_loader_cfg(self, num_workers=None):
            pass  # its reader has no use for it

    monkeypatch.setattr(datasets, 'create_dataset', lambda name, root, split, **kwargs: Streamed(
        root, reader=StreamReader(datasets.NpzImages(root, 'train' if split == 'train' else 'test'))))
    more = ('--num-classes', 4, '--dataset', 'wds/anything', '--aa', 'rand-m9-mstd0.5-inc1', '--workers', workers)
    arguments = options(npz_dir, tmp_path / 'whole', '--epochs', 2, *more)
    result = tool('train', *arguments, '--checkpoint-interval-steps', 2)
    assert result.code == 2 and 'streaming data set cannot resume in the middle' in result.err
    result = tool('train', *arguments)
    assert result.code == 0, result.err
    whole = load(tmp_path / 'whole' / 'run' / 'last.pth.tar')
    assert whole['progress']['updates'] == 20
    last = interrupted(npz_dir, tmp_path / 'a', tool, monkeypatch, *more, interval=0, updates=17)
    assert load(last)['progress']['updates'] == 10  # the end of the first epoch
    assert tool('train', '--resume', last).code == 0
    assert_same_state(whole, load(last))


# -------------------------------------------------------------------------------------------------------------- resume

EVERYTHING_RANDOM = (
    '--aa', 'rand-m9-mstd0.5-inc1', '--reprob', 0.25, '--mixup', 0.8, '--cutmix', 1, '--model-ema',
    '--model-ema-warmup', '--drop-path', 0.2, '--grad-accum-steps', 2, '--clip-grad', 1, '--warmup-epochs', 1,
    '--epochs', 3, '--checkpoint-interval-steps', 1)


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # which waits for an init that not every container has
    except psutil.NoSuchProcess:
        return False


def test_killed_run_resumes_to_the_same_bits(npz_dir, tmp_path, tool, root):
    """SIGKILL in the middle of an epoch, then --resume, against the run that nothing disturbed; other worker counts."""
    model = ('--model', 'test_vim2', '--img-size', '32')
    command = [sys.executable, str(root / 'tools' / 'train.py')]
    arguments = options(npz_dir, tmp_path / 'killed', *EVERYTHING_RANDOM, model=model)
    last = tmp_path / 'killed' / 'run' / 'last.pth.tar'
    process = subprocess.Popen(command + arguments + ['--workers', '2'], env=tool_environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path)
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # so that it cannot move on while we look; the file is complete at any time
        if last.exists() and (stopped := load(last)['progress'])['epoch'] == 1 and 0 < stopped['batch'] < 10:
            break
        process.send_signal(signal.SIGCONT)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)):  # its loader processes end with it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(workers) >= 2
    (last.parent / '.last.pth.tar.0123.tmp').write_bytes(b'what a kill while writing leaves')

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed process had
    try:
        resumed = tool('train', '--resume', last, '--workers', 0)
        assert resumed.code == 0, resumed.err
        assert f'resumed from {last} at epoch {stopped["epoch"]}, batch {stopped["batch"]}' in resumed.out
        undisturbed = tool('train', *options(npz_dir, tmp_path / 'whole', *EVERYTHING_RANDOM, model=model))
        assert undisturbed.code == 0, undisturbed.err
    finally:
        torch.set_num_threads(threads)
    whole = tmp_path / 'whole' / 'run'
    assert_same_state(load(whole / 'last.pth.tar'), load(last))
    for file in ('summary.csv', 'model/model.safetensors', 'model/config.json'):
        assert (whole / file).read_bytes() == (last.parent / file).read_bytes(), file
    assert [p.name for p in last.parent.glob('.*')] == ['.lock']


def interrupted(npz_dir, tmp_path, tool, monkeypatch, *more, interval=1, updates=7):
    """A run that dies after some updates, in this process; its last checkpoint."""

    def die(self, loss, need_update, original=train.Trainer.backward):
        if self.progress.updates == updates:
            raise KeyboardInterrupt
        original(self, loss, need_update)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, 'backward', die)
        result = tool('train', *options(npz_dir, tmp_path, '--epochs', 2, '--checkpoint-interval-steps', interval,
                                        *more))
    assert result.code == 130 and 'interrupted' in result.err
    return tmp_path / 'run' / 'last.pth.tar'


@pytest.mark.parametrize('more', [('--amp', '--amp-dtype', 'float16', '--train-split', 'train[:96]'),
                                  # batch norm statistics and their average, dropout
                                  ('--model', 'test_efficientnet', '--model-kwargs', '--drop', 0.3, '--model-ema'),
                                  ('--sched', 'step', '--decay-epochs', 1, '--sched-on-epochs'),
                                  ('--opt', 'lion', '--sched', 'wsd', '--smoothing', 0), ('--cache-images',)],
                         ids=['fp16', 'batch-norm', 'step', 'lion-wsd', 'cache'])
def test_interrupted_run_resumes_to_the_same_bits(npz_dir, tmp_path, tool, monkeypatch, more):
    last = interrupted(npz_dir, tmp_path / 'a', tool, monkeypatch, *more)
    assert load(last)['progress']['updates'] == 7
    assert tool('train', '--resume', last).code == 0
    whole = options(npz_dir, tmp_path / 'b', '--epochs', 2, '--checkpoint-interval-steps', 1, *more)
    assert tool('train', *whole).code == 0
    assert_same_state(load(tmp_path / 'b' / 'run' / 'last.pth.tar'), load(last))


def test_resume_auto_and_moved_runs(npz_dir, tmp_path, tool, monkeypatch):
    first = interrupted(npz_dir, tmp_path / 'a', tool, monkeypatch)
    started = tool('train', *options(npz_dir, tmp_path / 'new', '--epochs', 2, '--resume', 'auto'))
    assert started.code == 0 and 'resumed' not in started.out  # nothing there: it starts
    again = tool('train', *options(npz_dir, tmp_path / 'new', '--epochs', 2, '--resume', 'auto'))
    assert again.code == 0 and 'nothing to do' in again.out
    continued = tool('train', *options(npz_dir, tmp_path / 'a', '--epochs', 2, '--resume', 'auto'))
    assert continued.code == 0 and f'resumed from {first}' in continued.out
    assert_same_state(load(first), load(tmp_path / 'new' / 'run' / 'last.pth.tar'))
    result = tool('train', '--resume', 'auto', '--data-dir', npz_dir)
    assert result.code == 2 and '--resume auto needs --experiment' in result.err

    moved = tmp_path / 'elsewhere'
    os.rename(first.parent, moved)
    result = tool('train', '--resume', moved / 'last.pth.tar')
    assert result.code == 0 and f'run folder {moved}' in result.out
    assert not first.parent.exists()


def test_resume_refuses_another_run(npz_dir, tmp_path, tool, monkeypatch):
    last = interrupted(npz_dir, tmp_path, tool, monkeypatch)
    before = last.read_bytes()
    result = tool('train', '--resume', last, '--lr', 0.5, '--mixup', 0.1)
    assert result.code == 2 and 'lr: 0.001 -> 0.5' in result.err and 'mixup: 0.0 -> 0.1' in result.err
    result = tool('train', '--resume', last, '--train-split', 'train[:100]')
    assert result.code == 2 and "train_split: 'train' -> 'train[:100]'" in result.err
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 2))
    assert result.code == 2 and 'already holds a run' in result.err
    assert last.read_bytes() == before
    result = tool('train', '--resume', last, '--lr', 0.5, '--weight-decay', 0.7, '--resume-with-changes')
    assert result.code == 0, result.err
    groups = load(last)['optimizer']['param_groups']
    assert {g['initial_lr'] for g in groups} == {0.5} and {g['weight_decay'] for g in groups} == {0., 0.7}


def test_resume_from_what_is_no_checkpoint(npz_dir, tmp_path, tool, trained):
    folder, _ = trained
    whole = (folder / 'last.pth.tar').read_bytes()
    (tmp_path / 'truncated.pth.tar').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'text.pth.tar').write_text('hello')
    torch.save(dict(weight=torch.zeros(1)), tmp_path / 'foreign.pth.tar')
    torch.save({**load(folder / 'last.pth.tar'), 'format': 99}, tmp_path / 'future.pth.tar')
    for name, message in (('none', 'no checkpoint to resume from'), ('truncated', 'damaged, truncated'),
                          ('text', 'damaged, truncated'), ('foreign', 'no training state'), ('future', 'format 99')):
        result = tool('train', '--resume', tmp_path / f'{name}.pth.tar')
        assert result.code == 2 and message in result.err and name in result.err, result.err
        assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize('sched', [s for s in train._SCHEDULES if s != 'none'])
def test_every_schedules_state_survives_a_safe_load(sched):
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), 'adamw', lr=1e-3)
    decay = {} if sched in ('wsd', 'rsqrt') else dict(decay_epochs=90)
    scheduler, _ = create_scheduler_v2(optimizer, sched, num_epochs=10, warmup_epochs=2, **decay)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state == scheduler.state_dict()
    scheduler.load_state_dict(state)
    scheduler.step(3)


# --------------------------------------------------------------------------------------------------- several processes

def test_two_processes_are_one(npz_dir, tmp_path, tool, root):
    """Two gloo processes with half the batch each, stopped and resumed, give one process's weights and metrics."""
    more = ('--epochs', 2, '--model-ema', '--model-ema-decay', 0.9, '--clip-grad', 1, '--grad-accum-steps', 2,
            '--opt', 'sgd', '--lr', 0.1, '--aa', 'rand-m9-mstd0.5-inc1', '--val-batch-size', 8)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port',
                str(29000 + os.getpid() % 2000), str(root / 'tools' / 'train.py')]
    arguments = options(npz_dir, tmp_path / 'two', '-b', 8, *more, '--checkpoint-interval-steps', 3)
    last = tmp_path / 'two' / 'run' / 'last.pth.tar'
    probe = ('import sys, train, _common\n'
             'def die(self, loss, need_update, original=train.Trainer.backward):\n'
             '    if self.progress.updates == 7:\n'
             '        sys.exit(9)\n'
             '    original(self, loss, need_update)\n'
             'train.Trainer.backward = die\n'
             '_common.run(train.main)\n')
    (tmp_path / 'dies.py').write_text(probe)
    done = subprocess.run([*torchrun[:-1], str(tmp_path / 'dies.py'), *arguments], capture_output=True, text=True,
                          env=tool_environment(PYTHONPATH=str(root / 'tools')))
    assert done.returncode != 0 and load(last)['progress']['updates'] == 6, done.stderr
    done = subprocess.run([*torchrun, '--resume', str(last)], capture_output=True, text=True, env=tool_environment())
    assert done.returncode == 0, done.stderr
    result = tool('train', *options(npz_dir, tmp_path / 'one', '-b', 16, *more))
    assert result.code == 0, result.err
    one, two = load(tmp_path / 'one' / 'run' / 'last.pth.tar'), load(last)
    assert two['world_size'] == 2 and two['progress']['updates'] == one['progress']['updates'] == 10
    for key in ('state_dict', 'state_dict_ema'):
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')
    rows = [list(csv.DictReader((tmp_path / n / 'run' / 'summary.csv').open())) for n in ('one', 'two')]
    for a, b in zip(*rows):
        assert float(b['train_loss']) == pytest.approx(float(a['train_loss']), rel=1e-5)
        assert float(b['eval_loss']) == pytest.approx(float(a['eval_loss']), rel=1e-4)
        assert b['eval_top1'] == a['eval_top1']  # 50 images over 2 x 8: the padding is not counted
    result = tool('train', '--resume', last, '--resume-with-changes', '--epochs', 3)
    assert result.code == 0, result.err  # on one process, if one insists


def test_resume_on_another_number_of_processes_is_refused(npz_dir, tmp_path, tool, monkeypatch):
    last = interrupted(npz_dir, tmp_path, tool, monkeypatch)
    state = load(last)
    torch.save({**state, 'world_size': 4}, last)
    result = tool('train', '--resume', last)
    assert result.code == 2 and 'trained with 4 processes, now there are 1' in result.err


# -------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize('more, message', [
    (('--data-dir', '/nowhere/at/all'), 'data path /nowhere/at/all does not exist'),
    (('--val-split', 'validation'), 'validation.npz does not exist; splits there: test, train'),
    (('--model', 'vim2_huge'), "unknown model 'vim2_huge'"),
    (('--model-kwargs', 'depht=3'), "unexpected keyword argument 'depht'"),
    (('--opt', 'adamx'), "cannot make the optimizer 'adamx'"),
    (('--opt-kwargs', 'frobnicate=1'), 'frobnicate'),
    (('--sched', 'wsd', '--decay-epochs', 500), "cannot make the schedule 'wsd'"),
    (('--aa', 'rand-x9'), 'augmentation options do not work'),
    (('--train-interpolation', 'psychic'), 'augmentation options do not work'),
    (('-b', 200), '160 training images make no batch of 200'),
    (('-b', 15, '--mixup', 0.5), '--batch-size must be even'),
    (('--num-classes', 7), 'has 4 classes'),
    (('--mean', 0.1, 0.2), '--mean and --std need one value'),
    (('--device', 'warp'), "device 'warp' cannot be used"),
    (('--img-size', 0), '--img-size takes one or two positive numbers'),
    (('--smoothing', 2), '--smoothing must be between 0 and 1'),
    (('--config', '/nowhere.yaml'), 'cannot read the recipe /nowhere.yaml'),
    (('--pretrained', '--model', 'vim2_tiny'), 'No pretrained weights are published for vim2_tiny'),
])
def test_mistakes_are_one_line(npz_dir, tmp_path, tool, more, message):
    result = tool('train', *options(npz_dir, tmp_path, *more))
    assert result.code == 2 and message in result.err, result.err
    assert result.err.startswith('train.py: error: ') and len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / 'run').exists()


def test_divergence_stops_and_leaves_the_last_good_checkpoint(npz_dir, tmp_path, tool, monkeypatch):
    forward = timm.models.vision_transformer.VisionTransformer.forward

    def diverge(self, x, calls=[0]):  # noqa: B006
        calls[0] += self.training
        return forward(self, x) * (float('nan') if calls[0] > 12 else 1)

    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, 'forward', diverge)
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 3, '--checkpoint-interval-steps', 1))
    assert result.code == 2 and 'the loss is nan in epoch 1 by batch 2' in result.err, result.err
    checkpoint = load(tmp_path / 'run' / 'last.pth.tar')
    assert checkpoint['progress']['updates'] == 12
    assert all(v.isfinite().all() for v in checkpoint['state_dict'].values())
    largest = max(v.abs().max().item() for v in checkpoint['state_dict'].values())
    assert 'last.pth.tar is of epoch 1, batch 2, training loss ' in result.err and (
        f'weights are finite, the largest {largest:.3g}. best.pth.tar is of epoch 0. A lower --lr' in result.err)


def test_two_runs_in_one_folder(npz_dir, tmp_path, tool):
    (tmp_path / 'run').mkdir()
    with common.locked_folder(tmp_path / 'run'):
        result = tool('train', *options(npz_dir, tmp_path, '--epochs', 1))
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert f'{tmp_path}/run is in use by process {os.getpid()} on ' in result.err
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 1))
    assert result.code == 0, result.err


def test_run_folder_that_cannot_be_made(npz_dir, tmp_path, tool):
    (tmp_path / 'file').write_text('')
    result = tool('train', *options(npz_dir, tmp_path / 'file'))
    assert result.code == 2 and 'cannot create the run folder' in result.err


def test_tools_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'vim2', None)
    with pytest.raises(ModuleNotFoundError) as error:
        import vim2  # noqa: F401
    assert error.value.name == 'vim2'
    with pytest.raises(UserError, match='the vim2 package is not installed'):
        common.register_models()


def test_real_cifar10_epoch(shared_data, tmp_path, tool, root):
    folder = shared_data('cifar10')
    result = tool('train', '--config', root / 'tools' / 'recipes' / 'cifar10_nano.yaml', '--data-dir', folder,
                  '--model', 'test_vim2', '--train-split', 'train[:2000]', '--val-split', 'test[:500]', '--epochs', 2,
                  '--output', tmp_path, '--experiment', 'run', '--device', 'cpu')
    assert result.code == 0, result.err
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert float(rows[1]['train_loss']) < float(rows[0]['train_loss']) < 2.4
    assert float(rows[1]['eval_top1']) > 15  # chance is 10
