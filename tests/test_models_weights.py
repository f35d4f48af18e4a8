"""Weights of ViM2: the package's own, none published, a user's files, damaged and foreign ones."""
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_models import MICRO, MODELS, NANO, images
from timm.data import resolve_data_config

from vim2.layers import upgrade_state_dict

WITHOUT_WEIGHTS = [n for n in MODELS if n not in (MICRO, NANO)]


@pytest.mark.parametrize('name', WITHOUT_WEIGHTS)
@pytest.mark.parametrize('kwargs', [{}, dict(features_only=True), dict(num_classes=5)])
def test_pretrained_says_that_no_weights_are_published(name, kwargs):
    with pytest.raises(RuntimeError, match='No pretrained weights are published') as error:
        timm.create_model(name, pretrained=True, **kwargs)
    for what in (name, 'pretrained=False', 'pretrained_cfg_overlay=dict(file=', 'checkpoint_path='):
        assert what in str(error.value)


@pytest.mark.parametrize('name, tag, classes, first, shown, size', [
    (NANO, 'cifar10', 10, 'airplane', None, 32),
    (MICRO, 'tiny_imagenet', 200, 'n01443537', 'goldfish, Carassius auratus', 64)])
def test_bundled_weights(name, tag, classes, first, shown, size):
    model = timm.create_model(f'{name}.{tag}', pretrained=True).eval()
    again = timm.create_model(name, pretrained=True).eval()
    weights = upgrade_state_dict(load_file(model.pretrained_cfg['file']))
    for (n, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b) and torch.equal(a, weights[n].to(a.dtype))
    assert model.num_classes == classes
    names = model.pretrained_cfg['label_names']
    assert names[0] == first and len(names) == classes
    assert shown is None or model.pretrained_cfg['label_descriptions'][first] == shown
    assert resolve_data_config(model=model)['input_size'] == (3, size, size)
    with torch.no_grad():
        assert model(images(model)).isfinite().all()


@pytest.fixture
def checkpoint(tmp_path):
    """A file of test_vim2 with random weights, and the model that they are of."""
    torch.manual_seed(1)
    model = timm.create_model('test_vim2').eval()
    path = tmp_path / 'weights.safetensors'
    save_file(model.state_dict(), path)
    return path, model


def load(path, name='test_vim2', **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


def test_own_file(checkpoint):
    path, model = checkpoint
    x = images(model)
    with torch.no_grad():
        assert torch.equal(load(path)(x), model(x))
        adapted = load(path, num_classes=5, in_chans=1)
        assert adapted(x[:, :1]).shape == (1, 5)
        torch.testing.assert_close(
            adapted.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
        assert torch.equal(adapted.stages[0].blocks[0].norm.weight, model.stages[0].blocks[0].norm.weight)
        features = load(path, features_only=True)
        assert all(torch.equal(a, b) for a, b in zip(
            features(x), model.forward_intermediates(x, intermediates_only=True)))
        assert torch.equal(load(path, num_classes=0)(x), model.forward_head(model.forward_features(x), pre_logits=True))
        assert torch.equal(timm.create_model('test_vim2', checkpoint_path=str(path)).eval()(x), model(x))


def test_own_file_of_other_kinds(checkpoint, tmp_path):
    """Half precision, and a training checkpoint of timm's."""
    path, model = checkpoint
    save_file({n: v.half() for n, v in model.state_dict().items()}, tmp_path / 'half.safetensors')
    half = load(tmp_path / 'half.safetensors')
    for (n, v), loaded in zip(model.state_dict().items(), half.state_dict().values()):
        assert loaded.dtype == torch.float32 and torch.equal(loaded, v.half().float()), n
    torch.save({'state_dict': model.state_dict(), 'epoch': 3}, tmp_path / 'checkpoint.pth.tar')
    trained = load(tmp_path / 'checkpoint.pth.tar')
    assert all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize('kind', ['truncated', 'header', 'empty', 'no safetensors'])
@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=5), dict(features_only=True)])
def test_corrupt_safetensors(checkpoint, kind, kwargs):
    path, _ = checkpoint
    data = path.read_bytes()
    path.write_bytes({'truncated': data[:-100], 'header': data[:4] + b'\xff' * 4 + data[8:], 'empty': b'',
                      'no safetensors': b'<!DOCTYPE html><html>' * 50}[kind])
    with pytest.raises(RuntimeError, match='corrupt or truncated') as error:
        load(path, **kwargs)
    assert str(path) in str(error.value)


def test_corrupt_pth(checkpoint, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(checkpoint[1].state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match='corrupt or truncated') as error:
        load(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='no_such.safetensors'):
        load(tmp_path / 'no_such.safetensors')


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=5), dict(features_only=True)])
def test_checkpoint_of_another_architecture(checkpoint, tmp_path, kwargs):
    """Also where timm loads with strict=False, because the classifier is another."""
    path, model = checkpoint
    weights = model.state_dict()
    for change, expected in (
            (lambda w: dict(timm.create_model('resnet18').state_dict()),
             ('missing: stem.conv.weight', 'unexpected: ', 'bn1.', ' more')),
            (lambda w: {k: v for k, v in w.items() if k != 'norm.bias'}, ('missing: norm.bias',)),
            (lambda w: {k: v for k, v in w.items() if k != 'stem.conv.weight'}, ('missing: stem.conv.weight',)),
            (lambda w: {**w, 'norm.scale': torch.ones(3)}, ('unexpected: norm.scale',)),
            (lambda w: {**w, 'norm.bias': torch.ones(3)}, ('another shape: norm.bias (3,) instead of (32,)',)),
            (lambda w: {**w, 'stem.conv.weight': torch.ones(8, 3, 2, 2)}, ('another shape: stem.conv.weight',))):
        save_file(change(weights), path)
        with pytest.raises(RuntimeError, match='is no checkpoint of test_vim2') as error:
            load(path, **kwargs)
        for what in (str(path), *expected):
            assert what in str(error.value)


def test_checkpoint_path_of_another_architecture(checkpoint):
    path, _ = checkpoint
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model('test_vim2', token_depths=(2, 1, 2, 1), checkpoint_path=str(path))
