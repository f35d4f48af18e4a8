"""tools/inspect_model.py: what the pictures show is what the model computes, and looking changes nothing."""
import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

import inspect_model
from inspect_model import Mixer
from vim2.layers import SelectiveChannelMixer, SelectiveTokenMixer
from vim2.models import VisionMambaMixer

PICTURES = ['averages', 'receptive_field', 'token_attention', 'token_step_sizes']


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
        with inspect_model.recorded_scans(model) as scans:
            assert torch.equal(model(image), expected)
        assert len(scans) == len(of_mixers(model, (SelectiveTokenMixer, SelectiveChannelMixer))) == 8
        before = {n: p.clone() for n, p in model.named_parameters()}
        inspect_model.token_scans(model, image)
        inspect_model.receptive_fields(model, image)
        assert torch.equal(model(image), expected)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert not image.requires_grad


def test_nothing_stays_behind(model, image):
    """No hook and no dispatch mode, also after a failure."""
    with pytest.raises(ZeroDivisionError), inspect_model.recorded_scans(model) as scans:
        raise ZeroDivisionError
    model(image)
    assert not scans
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_token_steps(model, image):
    """softplus(Linear(Linear(x)) + bias), the mean over the channels, each direction's at the tokens' own places."""
    tokens = {m: inspect_model.mean_steps(scan) for m, scan in inspect_model.token_scans(model, image).items()}
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


def test_attention_is_what_the_output_depends_on(model, image):
    """The derivative of the scans' output at one place with respect to what they read, by direction."""
    from vim2.ops import cross_selective_scan
    at, scan = next(iter(inspect_model.token_scans(model, image).items()))
    height, width = scan.steps.shape[-2:]
    found = inspect_model.attention(scan, 3, 7)
    assert found.shape == (4, height, width) and at == Mixer(0, 0)
    for k in range(4):
        u = torch.randn(1, scan.steps.shape[2], height, width).requires_grad_()
        one = torch.zeros(4).index_fill_(0, torch.tensor(k), 1.).view(1, 4, 1, 1, 1)  # the others write nothing
        y = cross_selective_scan(u, scan.steps, scan.A, scan.B[:, :, 0] * one, scan.C[:, :, 0],
                                  backend='reference')
        gradient, = torch.autograd.grad(y[0, :, 3, 7].sum(), u)
        np.testing.assert_allclose(found[k], gradient[0].abs().mean(0).numpy(), rtol=1e-3, atol=1e-6)
        assert found[k, 3, 7] > 0


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


@pytest.mark.parametrize('kind', ['conv', 'pool'])
def test_the_middle_of_convolutions(kind):
    """What a place is computed from lies around it evenly."""
    torch.manual_seed(0)
    model = VisionMambaMixer(dims=(4, 6), token_depths=0, channel_depths=0, channel_expand=2., weighted_average=False,
                             stem=kind, downsample=kind).eval()
    for field in inspect_model.receptive_fields(model, torch.randn(1, 3, 64, 96)):
        for axis, center in enumerate(field.center):
            seen = np.flatnonzero(field.norm.any(1 - axis))
            assert (seen[0] + seen[-1] + 1) / 2 == center


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


def test_receptive_field_of_images_is_the_mean(model, image):
    images = torch.cat([image, image.flip(3)])
    one, two, both = (inspect_model.receptive_fields(model, x) for x in (image, image.flip(3), images))
    for a, b, mean in zip(one, two, both):
        np.testing.assert_allclose(mean.norm, (a.norm + b.norm) / 2, rtol=1e-4, atol=1e-6 * a.norm.max())
        assert mean.center == a.center


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
    assert all({'half', 'nine_tenths', 'random_half', 'random_nine_tenths'} <= set(r) for r in
               report['receptive_field'])


@pytest.mark.parametrize('kind, start', [('pdf', b'%PDF'), ('svg', b'<?xml')])
def test_pictures_for_papers(tool, tmp_path, kind, start):
    """As vectors, with a title of one's own, of several images."""
    sources = [tmp_path / f'{i}.png' for i in range(2)]
    for i, path in enumerate(sources):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(path)
    result = tool('inspect_model', *sources, '--model', 'test_vim2', '--random-weights', '--img-size', 32, '--device',
                  'cpu', '--out', tmp_path / 'out', '--format', kind, '--title', 'My title', '--place', 0.2, 0.9)
    assert result.code == 0, result.err
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [f'{n}.{kind}' for n in PICTURES]
    for path in (tmp_path / 'out').iterdir():
        content = path.read_bytes()
        assert content.startswith(start) and (kind == 'pdf' or b'My title' in content)


def test_what_a_model_does_not_have_is_said(tool, tmp_path):
    kwargs = ('--model', 'test_vim2', '--random-weights', '--out', tmp_path, '--model-kwargs', 'weighted_average=False')
    result = tool('inspect_model', *kwargs, 'channel_mixer=mlp')
    assert result.code == 0, result.err
    assert sorted(p.stem for p in tmp_path.iterdir()) == ['receptive_field', 'token_attention', 'token_step_sizes']
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
