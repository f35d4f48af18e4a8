"""tools/_device.py: batches that are made on the device, and steps replayed as CUDA graphs."""
import contextlib

import numpy as np
import pytest
import timm
import torch

import _common as common
import train
from _data import EpochBatches, seed_everything
from _device import DeviceBatches, GraphedStep

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make(images, **kwargs):
    sampler = EpochBatches(len(images), 4, seed=3)
    options = dict(seed=3, size=images.shape[1:3], mean=MEAN, std=STD, device=torch.device('cpu'), hflip=0.)
    return DeviceBatches(images, np.arange(len(images)), sampler, **{**options, **kwargs})


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 10, 8, 3)).astype(np.uint8)


def normalised(images):
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_without_augmentation_it_is_the_images(images):
    batches = make(images)
    for x, y in batches:
        torch.testing.assert_close(x, normalised(images)[y], rtol=1e-4, atol=1e-4)
    assert len(batches) == 3


def test_every_image_once_an_epoch_and_the_same_from_any_batch_on(images):
    batches = make(images, crop_mode='rrc', hflip=0.5, color_jitter=0.4)
    batches.sampler.set_position(1)
    epoch = list(batches)
    assert sorted(torch.cat([y for _, y in epoch]).tolist()) == list(range(12))
    batches.sampler.set_position(1, 2)
    (x, y), = batches
    assert torch.equal(x, epoch[2][0]) and torch.equal(y, epoch[2][1])
    batches.sampler.set_position(2)
    assert not torch.equal(next(iter(batches))[0], epoch[0][0])


def test_padded_crops_are_shifts_over_black(images):
    shifts = set()
    for x, y in make(images, crop_mode='pad', padding=2):
        for found, label in zip(x, y):
            padded = torch.nn.functional.pad(torch.from_numpy(images[label]).permute(2, 0, 1), (2, 2, 2, 2))
            candidates = {(i, j): normalised(padded[:, i:i + 10, j:j + 8].permute(1, 2, 0).numpy()[None])[0]
                          for i in range(5) for j in range(5)}
            match = [at for at, c in candidates.items() if torch.allclose(found, c, atol=1e-3)]
            assert len(match) == 1
            shifts.add(match[0])
    assert len(shifts) > 5


def test_flips(images):
    flipped = 0
    for x, y in make(images, hflip=0.5):
        for found, label in zip(x, y):
            plain = normalised(images[int(label)][None])[0]
            turned = torch.allclose(found, plain.flip(2), atol=1e-3)
            assert turned or torch.allclose(found, plain, atol=1e-3)
            flipped += turned
    assert 0 < flipped < 12


def test_boxes_stay_inside_and_have_their_area():
    images = np.zeros((400, 16, 16, 3), np.uint8)
    batches = make(images, crop_mode='rrc', scale=(0.2, 0.6), ratio=(0.5, 2.))
    theta = batches.boxes(400, (16, 16), np.random.default_rng(0))
    side, center = np.stack([theta[:, 0, 0], theta[:, 1, 1]]), theta[:, :, 2].T
    assert (np.abs(center) + side <= 1 + 1e-6).all()
    area = side.prod(0)
    assert area.min() > 0.15 and area.max() <= 0.6 + 1e-6 and abs(area.mean() - 0.4) < 0.04


def test_colors_change_and_stay_in_range(images):
    plain = {int(y): x for xs, ys in make(images) for x, y in zip(xs, ys)}
    low, high = ((torch.tensor(v) - torch.tensor(MEAN)) / torch.tensor(STD) for v in (0., 1.))
    for x, y in make(images, color_jitter=0.4):
        assert all(not torch.allclose(a, plain[int(b)], atol=0.1) for a, b in zip(x, y))
        assert (x >= low.view(3, 1, 1) - 1e-4).all() and (x <= high.view(3, 1, 1) + 1e-4).all()


def test_enlarged_but_not_shrunk(images):
    assert next(iter(make(images, size=(20, 16))))[0].shape == (4, 3, 20, 16)
    with pytest.raises(common.UserError, match='does not shrink: the images are 8x10'):
        make(images, size=(10, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='CUDA graphs need a CUDA device')
def test_graphed_step_is_the_step():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = GraphedStep(model, torch.nn.CrossEntropyLoss(), lambda: torch.autocast('cuda', enabled=False), optimizer,
                       size=(2, 2))
    for _ in range(3):
        x, y = torch.randn(4, 3, 2, 2, device='cuda'), torch.randint(5, (4,), device='cuda')
        expected = torch.nn.functional.cross_entropy(model(x), y)
        grads = torch.autograd.grad(expected, list(model.parameters()))
        torch.testing.assert_close(step(x, y), expected.detach())
        for p, g in zip(model.parameters(), grads):
            torch.testing.assert_close(p.grad, g)
        optimizer.step()


class EagerGraph(GraphedStep):
    """Without a GPU: what would be replayed is computed at every call, gradients in place as in a graph."""

    def _capture(self, images, target):
        images, target, step = images.clone(), target.clone(), self
        self._step(self.model, images, target)
        self.grads = [(p, p.grad) for group in self.optimizer.param_groups for p in group['params']]

        class Graph:
            def replay(self):
                loss.copy_(step._step(step.model, images, target))
        loss = torch.zeros(())
        return Graph(), images, target, loss


def test_gradients_are_where_the_optimizer_looks(npz_dir, tmp_path, tool, monkeypatch):
    """Across epochs too: set to None between them, every later step would have changed nothing."""
    states = []
    for graphed in (False, True):
        if graphed:
            wrap = train.Trainer.wrap_model

            def wrapped(self, wrap=wrap):
                wrap(self)
                self.graph = EagerGraph(self.model, self.criterion, self.autocast, self.optimizer, size=(32, 32))
            monkeypatch.setattr(train.Trainer, 'wrap_model', wrapped)
        result = tool('train', '--dataset', 'npz', '--data-dir', npz_dir, '--val-split', 'test', '--output', tmp_path,
                      '--experiment', str(graphed), '--model', 'test_vit', '--model-kwargs', 'img_size=32',
                      'patch_size=8', '--img-size', 32, '-b', 16, '--device', 'cpu', '--workers', 0, '--epochs', 3,
                      '--train-crop-mode', 'pad', '--data-on-device', '--clip-grad', 1)
        assert result.code == 0, result.err
        states.append(torch.load(tmp_path / str(graphed) / 'last.pth.tar', weights_only=True)['state_dict'])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name])


def test_frozen_parameters_stay_as_they_are(npz_dir, tmp_path, tool):
    arguments = ('--dataset', 'npz', '--data-dir', npz_dir, '--val-split', 'test', '--output', tmp_path, '--model',
                 'test_vit', '--model-kwargs', 'img_size=32', 'patch_size=8', '--img-size', 32, '-b', 16, '--device',
                 'cpu', '--workers', 0, '--epochs', 1, '--data-on-device', '--train-crop-mode', 'pad')
    result = tool('train', *arguments, '--experiment', 'run', '--freeze', 'patch_embed.*', 'blocks.*.norm1.weight')
    assert result.code == 0, result.err
    trained = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)['state_dict']
    seed_everything(42, 0)
    before = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4).state_dict()
    for name, value in before.items():
        frozen = name.startswith('patch_embed.') or name.endswith('norm1.weight')
        assert torch.equal(value, trained[name]) == frozen, name
    result = tool('train', *arguments, '--freeze', 'blocks.7.*')
    assert result.code == 2 and "--freeze 'blocks.7.*' matches no parameter of test_vit" in result.err
    result = tool('train', *arguments, '--freeze', '*')
    assert result.code == 2 and '--freeze leaves nothing to train' in result.err


def test_replaced_gradients_are_an_error():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = EagerGraph(model, torch.nn.CrossEntropyLoss(), contextlib.nullcontext, optimizer)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    step(x, y)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match='the optimizer would not see them'):
        step(x, y)


def test_training_on_the_device_ends_by_the_clock(npz_dir, tmp_path, tool):
    """The schedule has run out when the time has, though most of the epochs never came."""
    arguments = ('--dataset', 'npz', '--data-dir', npz_dir, '--val-split', 'test', '--output', tmp_path,
                 '--experiment', 'run', '--model', 'test_vit', '--model-kwargs', 'img_size=32', 'patch_size=8',
                 '--img-size', 32, '-b', 16, '--device', 'cpu', '--workers', 0, '--train-crop-mode', 'pad',
                 '--data-on-device', '--epochs', 100000,
                 '--warmup-epochs', 0, '--lr', '3e-3', '--min-lr', 0, '--minutes', 0.05, '--val-interval', 100000)
    result = tool('train', *arguments)
    assert result.code == 0, result.err
    state = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)
    assert 0 < state['progress']['updates'] < 10 ** 6 and state['optimizer']['param_groups'][0]['lr'] < 3e-5
    assert state['progress']['best_metric'] > 50, result.out  # four colors; it is the last epoch, cut short


@pytest.mark.parametrize('arguments, message', [
    (('--data-on-device', '--aa', 'rand-m9'), '--data-on-device works without --aa'),
    (('--minutes', 0), '--minutes must be positive'),
    (('--cuda-graph', '--grad-accum-steps', 2), '--cuda-graph works without'),
    (('--cuda-graph', '--device', 'cpu', '--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size', 32),
     '--cuda-graph needs one process on a CUDA device')])
def test_what_does_not_go_together(npz_dir, tmp_path, tool, arguments, message):
    result = tool('train', '--dataset', 'npz', '--data-dir', npz_dir, '--val-split', 'test', '--output', tmp_path,
                  '--workers', 0, *arguments)
    assert result.code == 2 and message in result.err, result.err
