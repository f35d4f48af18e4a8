"""tools/inspect_model.py: what the pictures show is what the model computes, and looking changes nothing."""
import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import inspect_model
from inspect_model import Mixer
from vim2.layers import SelectiveChannelMixer, SelectiveTokenMixer
from vim2.models import VisionMambaMixer

PICTURES = ['averages', 'channel_step_sizes', 'receptive_field', 'token_step_sizes']


@pytest.fixture
def model():
    """test_vim2 with step sizes and averages that differ everywhere."""
    torch.manual_seed(0)
    model = timm.create_model('test_vim2', num_classes=5).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ('dt_proj', 'x_proj', 'averages', 'in_proj', 'gate_proj')):
                p.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.fixture
def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights(model, tmp_path):
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    return ('--model', 'test_vim2', '--num-classes', 5, '--checkpoint', tmp_path / 'model.safetensors')


def of_mixers(model, kind):
    return [Mixer(i, j) for i, stage in enumerate(model.stages) for j, block in enumerate(stage.blocks)
            if isinstance(block.mixer, kind)]


def inputs_of(model, modules, image):
    """What each of these modules is called with."""
    seen, handles = {}, []
    for key, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda m, args, key=key: seen.update({key: args[0].detach()})))
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return seen


def mixer_at(model, at):
    return model.stages[at.stage].blocks[at.block].mixer


def test_looking_changes_nothing(model, image):
    with torch.no_grad():
        expected = model(image)
        with inspect_model.recorded_steps(model) as steps:
            assert torch.equal(model(image), expected)
        assert len(steps) == len(of_mixers(model, (SelectiveTokenMixer, SelectiveChannelMixer))) == 8
        before = {n: p.clone() for n, p in model.named_parameters()}
        inspect_model.selection(model, image)
        inspect_model.receptive_fields(model, image)
        assert torch.equal(model(image), expected)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert not image.requires_grad


def test_nothing_stays_behind(model, image):
    """No hook and no dispatch mode, also after a failure."""
    with pytest.raises(ZeroDivisionError), inspect_model.recorded_steps(model) as steps:
        raise ZeroDivisionError
    model(image)
    assert not steps
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_token_steps(model, image):
    """softplus(Linear(Linear(x)) + bias), the mean over the channels, each direction's at the tokens' own places."""
    tokens = inspect_model.selection(model, image).tokens
    mixers = of_mixers(model, SelectiveTokenMixer)
    assert sorted(tokens) == mixers and len(mixers) == 5
    for at, x in inputs_of(model, {at: mixer_at(model, at).s6 for at in mixers}, image).items():
        s6 = mixer_at(model, at).s6
        maps = []
        for k in range(4):
            dt = x @ s6.x_proj_weight[k, :s6.dt_rank].T @ s6.dt_projs_weight[k].T
            maps.append(F.softplus(dt + s6.dt_projs_bias[k]).mean(-1)[0])
        np.testing.assert_allclose(tokens[at], torch.stack(maps).detach().numpy(), rtol=1e-4)
        assert tokens[at].shape == (4, 16 >> at.stage, 24 >> at.stage)


def test_channel_steps():
    """Where the map is the token grid: mean and percentiles over the tokens of softplus(W2 W1 u + b + w u)."""
    torch.manual_seed(0)
    model = VisionMambaMixer(dims=(6,), token_depths=0, channel_depths=1, channel_expand=2., token_grid=4, d_state=2)
    mixer = model.eval().stages[0].blocks[0].mixer
    for p in (mixer.dt_projs_weight, mixer.x_proj_weight, mixer.dt_projs_diag):
        nn.init.normal_(p)
    image = torch.randn(1, 3, 16, 16)
    found = inspect_model.selection(model, image)
    assert not found.tokens and list(found.channels) == [Mixer(0, 0)]
    x = inputs_of(model, {0: mixer}, image)[0].flatten(1, 2)
    for s in range(2):
        branch = F.pad(x @ mixer.in_proj.weight.T, (3, 0) if s == 0 else (0, 3))
        taps = mixer.conv1d[s].weight[0, 0] if s == 0 else mixer.conv1d[s].weight[0, 0].flip(0)
        u = F.silu(sum(branch[..., i:i + 12] * taps[i] for i in range(4)) + mixer.conv1d[s].bias)[0]
        dt = mixer.dt_projs_weight[s] @ (mixer.x_proj_weight[s, :mixer.dt_rank] @ u)
        dt = F.softplus(dt + mixer.dt_projs_bias[s][:, None] + mixer.dt_projs_diag[s] * u).detach().numpy()
        mean, low, high = found.channels[Mixer(0, 0)][s]
        np.testing.assert_allclose(mean, dt.mean(0), rtol=1e-4)
        np.testing.assert_allclose([low, high], np.percentile(dt, (10, 90), axis=0), rtol=1e-4)
        assert dt.std() > 0.01


def test_average_matrices(model):
    for stage, matrix in zip(model.stages, inspect_model.average_matrices(model)):
        n = len(stage.blocks)
        assert matrix.shape == (n, n) and np.isnan(matrix[np.triu_indices(n, 1)]).all()
        for l, average in enumerate(stage.averages):
            assert matrix[l, :l + 1].tolist() == average.weight.tolist()
    assert [m.shape for m in inspect_model.average_matrices(timm.create_model('vim2_mlp_tiny'))] == [(0, 0)] * 4


def test_receptive_field_without_mixers_is_the_patch(image):
    """Without mixers a feature sees the pixels of its own patch, and all of them."""
    torch.manual_seed(0)
    model = VisionMambaMixer(dims=(4, 6, 8, 10), token_depths=0, channel_depths=0, weighted_average=False).eval()
    for field, side in zip(inspect_model.receptive_fields(model, image), (4, 8, 16, 32)):
        y, x = 64 // side // 2 * side, 96 // side // 2 * side
        inside = np.zeros((64, 96), bool)
        inside[y:y + side, x:x + side] = True
        assert (field.norm[inside] > 0).all() and (field.norm[~inside] == 0).all()
        assert field.center == (y + side / 2, x + side / 2)
        assert side // 2 <= field.sides[0] <= field.sides[1] <= side


def test_receptive_field_is_the_norm_of_the_jacobian(model, image):
    """Exactly so where there is a direction for each channel, nearly so with half as many."""
    norms = []
    for stage, (y, x) in ((0, (8, 12)), (1, (4, 6))):  # 8 and 16 channels
        leaf = image.clone().requires_grad_()
        feature = model.forward_intermediates(leaf, intermediates_only=True)[stage][0, :, y, x]
        rows = [torch.autograd.grad(f, leaf, retain_graph=True)[0][0] for f in feature]
        norms.append(torch.stack(rows).square().sum((0, 1)).sqrt().numpy())
    fields = inspect_model.receptive_fields(model, image)
    np.testing.assert_allclose(fields[0].norm, norms[0], rtol=1e-3, atol=1e-4 * norms[0].max())
    assert fields[1].norm.sum() == pytest.approx(norms[1].sum(), rel=0.2)
    assert np.corrcoef(fields[1].norm.ravel(), norms[1].ravel())[0, 1] > 0.9
    assert fields[1].sides[1] > 8  # the scans see beyond the patch


@pytest.mark.parametrize('share, side', [(0.5, 8), (1., 10), (0.04, 2), (0.05, 4)])
def test_side_of_an_even_field(share, side):
    assert inspect_model._side(np.ones((10, 10)), (5., 5.), share) == side


def test_choose():
    measured = {Mixer(0, 0): 'a', Mixer(0, 1): 'b', Mixer(2, 1): 'c'}
    assert inspect_model.choose(measured, -1) == {Mixer(0, 1): 'b', Mixer(2, 1): 'c'}
    assert inspect_model.choose(measured, 0) == {Mixer(0, 0): 'a', Mixer(2, 1): 'c'}
    assert inspect_model.choose(measured, 1) == {Mixer(0, 1): 'b'} and inspect_model.choose(measured, 2) == {}


def test_pictures_and_json(model, weights, tool, tmp_path):
    out = tmp_path / 'out'
    result = tool('inspect_model', *weights, '--img-size', 64, 96, '--out', out, '--device', 'cpu', '--json')
    assert result.code == 0, result.err
    assert sorted(p.name for p in out.iterdir()) == [f'{n}.png' for n in PICTURES]
    for name in PICTURES:
        with Image.open(out / f'{name}.png') as picture:
            picture.load()
            assert picture.format == 'PNG' and min(picture.size) >= 200
            colors = len(picture.convert('RGB').getcolors(1 << 24))
            assert colors > 50, 'an empty picture'
    report = json.loads(result.out)
    assert sorted(report['pictures']) == [str(out / f'{n}.png') for n in PICTURES] and report['missing'] == []
    assert report['img_size'] == [64, 96] and len(report['receptive_field']) == 4
    assert report['averages'] == [[row[:l + 1] for l, row in enumerate(m.tolist())]
                                  for m in inspect_model.average_matrices(model)]
    assert [(r['stage'], r['mixer']) for r in report['token_step_sizes']] == of_mixers(model, SelectiveTokenMixer)
    assert all(len(r['mean']) == 4 and min(r['mean']) > 0 for r in report['token_step_sizes'])
    assert all(len(r['mean']) == 2 for r in report['channel_step_sizes'])


def test_what_a_model_does_not_have_is_said(tool, tmp_path):
    kwargs = ('--model', 'test_vim2', '--random-weights', '--out', tmp_path, '--model-kwargs', 'weighted_average=False')
    result = tool('inspect_model', *kwargs, 'channel_mixer=mlp')
    assert result.code == 0, result.err
    assert sorted(p.stem for p in tmp_path.iterdir()) == ['receptive_field', 'token_step_sizes']
    assert 'no picture channel_step_sizes.png: the model has no selective channel mixer' in result.out
    assert 'no picture averages.png: the model has no weighted average' in result.out
    result = tool('inspect_model', *kwargs, '--mixer', 4)
    assert 'no picture token_step_sizes.png: the model has no selective token mixer 4 in any stage' in result.out


def test_random_weights_are_a_function_of_the_seed():
    args = ['--model', 'test_vim2', '--random-weights', '--seed']
    a, b, c = (inspect_model.load(inspect_model.get_parser().parse_args([*args, seed])).stem.conv.weight
               for seed in '001')
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize('options, why', [
    (('--model', 'resnet18', '--random-weights'), 'resnet18 is no ViM2'),
    (('--model', 'test_vim2'), 'No pretrained weights are published'),
    (('--model', 'test_vim2', '--random-weights', '--checkpoint', 'x'), 'exclude each other'),
    (('none.jpg',), 'none.jpg'), (('--img-size', 0), '--img-size'), (('--device', 'abacus'), 'abacus')])
def test_mistakes(tool, tmp_path, options, why):
    result = tool('inspect_model', *options, '--out', tmp_path / 'out')
    assert result.code == 2 and why in result.err and len(result.err.splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_out_that_cannot_be_written(tool, tmp_path):
    (tmp_path / 'file').write_text('')
    result = tool('inspect_model', '--model', 'test_vim2', '--random-weights', '--out', tmp_path / 'file')
    assert result.code == 2 and 'cannot write' in result.err


def test_without_matplotlib(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'matplotlib.figure', None)
    result = tool('inspect_model', '--model', 'test_vim2', '--random-weights', '--out', tmp_path / 'out')
    assert result.code == 2 and 'pip install matplotlib' in result.err


def test_deep_stages_fit_into_the_picture():
    """27 mixers in a stage: no numbers in the cells, and no picture beyond a screen."""
    model = timm.create_model('vim2_small', device='meta')
    matrices = [np.eye(len(stage.blocks)) for stage in model.stages]
    figure = inspect_model.plot_averages('vim2_small', model, matrices)
    width, height = figure.get_size_inches()
    assert len(matrices[2]) == 27 and width < 20 and height < 12 and math.isfinite(width)
    labels = [text.get_text() for text in figure.axes[2].get_yticklabels()]
    assert labels[:4] == ['1 T', '2 T', '3 C', '4 T'] and not figure.axes[2].texts


def test_documented_pictures(root):
    """They are there, small, and shown."""
    page = (root / 'docs' / 'conversion.md').read_text(encoding='utf-8')
    for name in PICTURES:
        file = root / 'docs' / 'images' / f'{name}.png'
        assert f'(images/{name}.png)' in page and 0 < file.stat().st_size < 300_000
