"""tools/validate.py: the figures are right, and what cannot be measured is refused."""
import json
import os

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, colored_image, jpeg, write_npz
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

import _common as common
from _common import UserError

MODEL = ('--model', 'test_vit', '--model-kwargs', 'img_size=32', 'patch_size=8')


def npz(folder):
    return ('--dataset', 'npz', '--data-dir', folder, '--split', 'test')


def make_model(num_classes=4):
    torch.manual_seed(5)
    model = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=num_classes).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'model.safetensors'
    save_file(make_model().state_dict(), path)
    return path


def by_hand(model, images, labels, size=(32, 32)):
    """Top-1, top-5 and loss, computed one image at a time."""
    config = resolve_data_config(dict(input_size=(3, *size), crop_pct=1.0), model=model)
    transform = create_transform(**config, is_training=False)
    top1, top5, loss = 0, 0, 0.
    with torch.inference_mode():
        for image, label in zip(images, labels):
            logits = model(transform(image.convert('RGB')).unsqueeze(0))[0].double()
            rank = int((logits > logits[label]).sum())
            top1, top5 = top1 + (rank == 0), top5 + (rank < 5)
            loss -= float(logits.log_softmax(0)[label])
    n = len(labels)
    return dict(top1=100 * top1 / n, top5=100 * top5 / n, loss=loss / n, count=n)


@pytest.mark.parametrize('batch, workers', [(7, 0), (50, 2), (128, 1)])
def test_json_is_what_a_plain_loop_gives(npz_dir, weights, tool, batch, workers):
    result = tool('validate', *MODEL, '--checkpoint', weights, '--num-classes', 4, *npz(npz_dir), '--crop-pct', 1.0,
                  '--img-size', 32, '-b', batch, '-j', workers, '--device', 'cpu', '--json')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    import _datasets
    dataset = _datasets.NpzImages(str(npz_dir), 'test')
    want = by_hand(make_model(), *zip(*[dataset[i] for i in range(50)]))
    assert 0 < want['top1'] < 100
    assert {k: report[k] for k in ('top1', 'top5', 'count')} == {k: want[k] for k in ('top1', 'top5', 'count')}
    assert report['loss'] == pytest.approx(want['loss'], rel=1e-4)
    assert report['images_per_second'] > 0 and report['img_size'] == [32, 32] and report['parameters'] > 2e5
    assert report['precision'] == 'float32' and report['device'] == 'cpu'


def test_image_folder_and_rectangles(folder_dir, tmp_path, tool):
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet', num_classes=4).eval()
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    result = tool('validate', '--model', 'test_efficientnet', '--checkpoint', tmp_path / 'model.safetensors',
                  '--num-classes', 4, '--data-dir', folder_dir, '--img-size', 48, 64, '--crop-pct', 1.0, '-j', 0,
                  '--json')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    files = sorted((folder_dir / 'val').rglob('*.png'))
    labels = [sorted(CLASSES).index(f.parent.name) for f in files]
    want = by_hand(model, [Image.open(f) for f in files], labels, (48, 64))
    assert report['img_size'] == [48, 64] and report['count'] == 22
    assert report['top1'] == want['top1'] and report['loss'] == pytest.approx(want['loss'], rel=1e-4)


@pytest.mark.parametrize('form', ['folder', 'safetensors', 'pth.tar'])
def test_classes_in_another_order_give_the_same_figures(npz_dir, tmp_path, tool, form):
    """A model of red, green, blue, gray, on folders, which sort otherwise: labels go by name."""
    model = make_model()
    for label, name in enumerate(CLASSES):
        (tmp_path / 'val' / name).mkdir(parents=True)
        for i in range(4):
            colored_image(label, np.random.default_rng(label * 4 + i)).save(tmp_path / 'val' / name / f'{i}.png')
    if form == 'pth.tar':
        torch.save(dict(state_dict=model.state_dict(), label_names=CLASSES), tmp_path / 'last.pth.tar')
        which = (*MODEL, '--num-classes', 4, '--checkpoint', tmp_path / 'last.pth.tar')
    else:
        timm.models._hub.save_for_hf(model, str(tmp_path / 'model'), safe_serialization=True, model_args=dict(
            img_size=32, patch_size=8), model_config=dict(label_names=list(CLASSES)))
        which = ('--model', f'local-dir:{tmp_path / "model"}') if form == 'folder' else (
            *MODEL, '--num-classes', 4, '--checkpoint', tmp_path / 'model' / 'model.safetensors')
    which = (*which, '--data-dir', tmp_path, '--img-size', 32, '--crop-pct', 1, '-j', 0, '--json')
    result = tool('validate', *which)
    assert result.code == 0, result.err
    files = [(f, label) for label, name in enumerate(CLASSES) for f in sorted((tmp_path / 'val' / name).iterdir())]
    want = by_hand(model, [Image.open(f) for f, _ in files], [label for _, label in files])
    report = json.loads(result.out)
    assert (report['top1'], report['count']) == (want['top1'], 16) and report['loss'] == pytest.approx(want['loss'])
    (tmp_path / 'val' / 'gray').rename(tmp_path / 'val' / 'violet')
    assert 'has classes that' in (error := refused(tool, *which)) and 'lacks: violet' in error
    error = refused(tool, *which, '--split', 'vall')
    assert f'{tmp_path} has no split vall; it has ' in error and 'val' in error


def test_a_data_set_of_torchvision_is_downloaded_where_that_is_asked_for(weights, tmp_path, tool, monkeypatch):
    from timm.data import dataset_factory

    class Downloaded(torch.utils.data.Dataset):
        classes = list(CLASSES)

        def __init__(self, root, train, download=False, **kwargs):
            assert not train
            if download:
                (tmp_path / 'downloaded').touch()
            elif not (tmp_path / 'downloaded').exists():
                raise RuntimeError('Dataset not found or corrupted')

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return colored_image(index % 4, np.random.default_rng(index)), index % 4

    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, 'cifar10', Downloaded)
    arguments = ('validate', *MODEL, '--checkpoint', weights, '--num-classes', 4, '--img-size', 32, '--dataset',
                 'torch/cifar10', '--data-dir', tmp_path, '--split', 'test',
                 '--device', 'cpu', '-j', 0, '--json')
    result = tool(*arguments)
    assert result.code == 2 and 'not found' in result.err
    result = tool(*arguments, '--dataset-download')
    assert result.code == 0 and json.loads(result.out)['count'] == 6, result.err


def test_table_and_precision(npz_dir, weights, tool):
    arguments = (*MODEL, '--checkpoint', weights, '--num-classes', 4, *npz(npz_dir), '-j', 0)
    plain = json.loads(tool('validate', *arguments, '--json').out)
    amp = json.loads(tool('validate', *arguments, '--json', '--amp').out)
    assert amp['precision'] == 'bfloat16' and amp['loss'] != plain['loss']
    assert amp['loss'] == pytest.approx(plain['loss'], rel=0.05)
    result = tool('validate', *arguments)
    assert f'top-1 {plain["top1"]:.2f} %' in result.out and '50 images' in result.out


def test_real_cifar10_with_any_weights(shared_data, weights, tmp_path, tool):
    save_file(make_model(10).state_dict(), tmp_path / 'model.safetensors')
    result = tool('validate', *MODEL, '--checkpoint', tmp_path / 'model.safetensors', '--num-classes', 10,
                  *npz(shared_data('cifar10')), '--split', 'test[:300]', '-j', 0, '--json')
    assert result.code == 0, result.err
    assert json.loads(result.out)['count'] == 300


# -------------------------------------------------------------------------------------------------------------- errors

def refused(tool, *arguments):
    result = tool('validate', *arguments)
    assert result.code == 2 and result.out == '', result
    assert result.err.startswith('validate.py: error: ') and len(result.err.strip().splitlines()) == 1, result.err
    return result.err


def test_checkpoints_that_do_not_fit(npz_dir, weights, tmp_path, tool):
    data = (*npz(npz_dir), '-j', 0)
    error = refused(tool, *MODEL, '--checkpoint', weights, *data)
    assert 'head.weight (4, 64) for (1000, 64)' in error and 'the checkpoint has 4 classes: --num-classes' in error
    error = refused(tool, '--model', 'test_efficientnet', '--num-classes', 4, '--checkpoint', weights, *data)
    assert 'does not fit test_efficientnet: missing keys: conv_stem.weight, bn1.weight' in error
    assert 'unexpected keys: blocks.0.attn.proj.bias' in error
    whole = weights.read_bytes()
    for name, content in (('truncated.safetensors', whole[:-1000]), ('header.safetensors', whole[:20]),
                          ('text.safetensors', b'hello'), ('text.pth', b'hello'), ('empty.pth', b'')):
        (tmp_path / name).write_bytes(content)
        error = refused(tool, *MODEL, '--num-classes', 4, '--checkpoint', tmp_path / name, *data)
        assert f'cannot read the checkpoint {tmp_path / name}: it is damaged, truncated' in error
    error = refused(tool, *MODEL, '--checkpoint', tmp_path / 'none.pth', *data)
    assert 'none.pth does not exist' in error
    error = refused(tool, *MODEL, '--checkpoint', tmp_path, *data)
    assert 'is a folder' in error
    torch.save(dict(state_dict=dict(epoch=3)), tmp_path / 'numbers.pth')
    assert 'holds no state dict of tensors' in refused(tool, *MODEL, '--checkpoint', tmp_path / 'numbers.pth', *data)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_is_not_run(npz_dir, tmp_path, tool):
    torch.save(dict(state_dict=dict(w=Malicious(str(tmp_path / 'owned')))), tmp_path / 'evil.pth')
    error = refused(tool, *MODEL, '--checkpoint', tmp_path / 'evil.pth', *npz(npz_dir))
    assert 'cannot read the checkpoint' in error
    assert not (tmp_path / 'owned').exists()
    torch.load(tmp_path / 'evil.pth', weights_only=False)  # it would have
    assert (tmp_path / 'owned').exists()


@pytest.mark.parametrize('more, message', [
    (('--data-dir', '/nowhere/at/all'), 'data path /nowhere/at/all does not exist'),
    (('--split', 'validation'), 'splits there: test, train'),
    (('--num-classes', 7), 'the checkpoint has 4 classes: --num-classes'),
    (('--device', 'warp'), "device 'warp' cannot be used"),
    (('--img-size', 1, 2, 3), '--img-size takes one or two positive numbers'),
    (('-b', 0), '--batch-size must be at least 1'),
    (('-j', -1), '--workers must be at least 0'),
    (('--mean', .1, .2), '--mean and --std need one value'),
    (('--model', 'local-dir:/nowhere'), "cannot create 'local-dir:/nowhere'"),
    (('--model', 'test_vitt'), "unknown model 'test_vitt': did you mean test_vit"),
    (('--model-kwargs', 'depht=2'), "unexpected keyword argument 'depht'"),
])
def test_mistakes_are_one_line(npz_dir, weights, tool, more, message):
    assert message in refused(tool, *MODEL, '--num-classes', 4, '--checkpoint', weights, *npz(npz_dir), *more)


@pytest.mark.parametrize('name, message', [
    ('vim2_tiny', 'No pretrained weights are published for vim2_tiny'),
    ('hf-hub:timm/does_not_exist', "cannot create 'hf-hub:timm/does_not_exist'"),
])
def test_weights_that_do_not_exist(npz_dir, tool, name, message):
    assert message in refused(tool, '--model', name, *npz(npz_dir))


def test_classes_of_another_data_set(npz_dir, tmp_path, tool):
    save_file(make_model(7).state_dict(), tmp_path / 'model.safetensors')
    error = refused(tool, *MODEL, '--num-classes', 7, '--checkpoint', tmp_path / 'model.safetensors', *npz(npz_dir))
    assert 'has 4 classes (red, green, blue, …), the model has 7 outputs' in error


@pytest.mark.parametrize('workers', [0, 2])
def test_corrupt_image_is_named_and_nothing_is_reported(weights, tmp_path, tool, workers):
    rng = np.random.default_rng(0)
    files = [jpeg(colored_image(y % 4, rng)) for y in range(8)]
    files[6] = b'no picture at all'
    write_npz(tmp_path / 'test.npz', files, np.arange(8) % 4)
    error = refused(tool, *MODEL, '--checkpoint', weights, '--num-classes', 4, *npz(tmp_path), '-b', 4, '-j', workers)
    assert 'cannot decode image 6 (blue/0006.jpg)' in error


def test_corrupt_file_in_a_folder_is_named(weights, folder_dir, tmp_path, tool):
    for name in CLASSES:
        (tmp_path / 'val' / name).mkdir(parents=True)
        colored_image(0, np.random.default_rng(0)).save(tmp_path / 'val' / name / 'good.png')
    (tmp_path / 'val' / 'blue' / 'bad.jpg').write_bytes(b'')
    error = refused(tool, *MODEL, '--checkpoint', weights, '--num-classes', 4, '--data-dir', tmp_path, '-j', 1)
    assert 'blue/bad.jpg' in error


def test_labels_beyond_the_models_outputs(weights, tmp_path, tool):
    rng = np.random.default_rng(0)
    write_npz(tmp_path / 'test.npz', [jpeg(colored_image(0, rng))] * 4, [0, 1, 2, 3],
              override=dict(classes=None, labels=np.array([0, 1, 2, 9])))
    error = refused(tool, *MODEL, '--checkpoint', weights, '--num-classes', 4, *npz(tmp_path), '-j', 0)
    assert 'labels run from 0 to 9, the model has 4 outputs' in error


def test_error_of_another_kind_is_not_hidden(monkeypatch):
    def bug():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        common.run(bug)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: (_ for _ in ()).throw(UserError('x')))
    assert stop.value.code == 2


@pytest.mark.parametrize('name', ['train', 'validate', 'predict'])
def test_help(tool, name):
    result = tool(name, '--help')
    assert result.code == 0 and result.out.startswith(f'usage: {name}.py') and '(default: ' in result.out


def test_as_a_process_in_another_folder(tool_process, tmp_path):
    result = tool_process('validate', '--data-dir', 'nothing/here', cwd=tmp_path)
    assert result == (2, '', 'validate.py: error: data path nothing/here does not exist\n')
