"""One set of weights at every image size, through tools/validate.py."""
import json

import numpy as np
import pytest
import torch
from conftest import colored_image, jpeg, write_npz
from safetensors.torch import save_file

from _common import create_model
from vim2.models import VisionMambaMixer


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('four')
    rng = np.random.default_rng(0)
    write_npz(folder / 'test.npz', [jpeg(colored_image(y, rng)) for y in range(4)], range(4))
    return folder


@pytest.mark.parametrize('name, sizes', [
    ('test_vim2', [(32, 32), (33, 47), (224, 224), (1024, 1024)]), ('vim2_nano_patch2_32', [(24, 24), (64, 64)])])
def test_one_set_of_weights_at_every_size(data, tmp_path, tool, name, sizes):
    """The model sees that size, and gives a loss for it: nothing falls back to the size it was made for."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=4).eval()
    with torch.no_grad():
        for p in model.head.parameters():
            p.normal_()
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    losses, shapes = [], []
    forward = VisionMambaMixer.forward_features

    def seen(self, x):
        shapes.append(tuple(x.shape[2:]))
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionMambaMixer, 'forward_features', seen)
        for size in sizes:
            result = tool('validate', '--model', name, '--checkpoint', tmp_path / 'model.safetensors', '--num-classes',
                          4, '--dataset', 'npz', '--data-dir', data, '--split', 'test', '--img-size', *size, '-b', 4,
                          '-j', 0, '--device', 'cpu', '--json')
            assert result.code == 0, result.err
            report = json.loads(result.out)
            assert report['img_size'] == list(size) and report['count'] == 4
            losses.append(report['loss'])
    assert shapes == sizes
    assert np.isfinite(losses).all() and len(set(losses)) == len(sizes)
