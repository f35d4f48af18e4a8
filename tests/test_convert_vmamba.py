"""What ViM2 contains: VMamba's vanilla network, with its weights as a start, and MLP-Mixer. All of it on numbers."""
import copy
import json
import re
from pathlib import Path
import shutil
import sys
import types

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torch.nn import functional as F

from vim2.layers import S6, SelectiveChannelMixer, SelectiveTokenMixer, TokenMlp
from vim2.models import VisionMambaMixer
from vim2.models.vmamba import convert_vmamba, is_vmamba, spread_blocks

DIMS = (8, 12, 16, 20)
DEPTHS = (2, 2, 9, 2)  # VMamba-T's
CHOSEN = [[0, 1], [0, 1], [0, 2, 3, 5, 6, 8], [0, 1]]  # evenly spread over vim2_tiny's 2, 2, 6, 2 token mixers


# --- VMamba, once more and as plainly as possible, on its own names ---------------------------------------------------

def vmamba(state, image, blocks, classify=True):
    """The vanilla network in float64, of each stage only these blocks."""
    w = {k: v.double() for k, v in state.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'])

    x = F.conv2d(image.double(), w['patch_embed.0.weight'], w['patch_embed.0.bias'], stride=4)
    x = norm(x.permute(0, 2, 3, 1), 'patch_embed.2')
    for i, chosen in enumerate(blocks):
        for j in chosen:
            name = f'layers.{i}.blocks.{j}'
            x = x + ss2d({k[len(name) + 4:]: v for k, v in w.items() if k.startswith(name + '.op.')},
                         norm(x, f'{name}.norm'))
        name = f'layers.{i}.downsample'
        if f'{name}.reduction.weight' in w:
            parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            x = norm(torch.cat(parts, -1), f'{name}.norm') @ w[f'{name}.reduction.weight'].T
    return classified(w, x) if classify else x


def classified(w, x):
    x = F.layer_norm(x, x.shape[-1:], w['classifier.norm.weight'], w['classifier.norm.bias']).mean((1, 2))
    return x @ w['classifier.head.weight'].T + w['classifier.head.bias']


def ss2d(w, x):
    B, H, W, _ = x.shape
    E, N = w['out_norm.weight'].shape[0], w['A_logs'].shape[1]
    R = w['dt_projs_weight'].shape[2]
    u, z = (x @ w['in_proj.weight'].T).split(E, -1)
    u = F.silu(F.conv2d(u.permute(0, 3, 1, 2), w['conv2d.weight'], w['conv2d.bias'], padding=1, groups=E))
    u = u.flatten(2).transpose(1, 2)  # (B, L, E), row-major
    place = torch.arange(H * W).reshape(H, W)
    orders = [place.flatten(), place.T.flatten(), place.flatten().flip(0), place.T.flatten().flip(0)]
    out = torch.zeros_like(u)
    for k, order in enumerate(orders):
        dt, b, c = (u @ w['x_proj_weight'][k].T).split([R, N, N], -1)
        dt = F.softplus(dt @ w['dt_projs_weight'][k].T + w['dt_projs_bias'][k])
        a, d = -w['A_logs'].reshape(4, E, N)[k].exp(), w['Ds'].reshape(4, E)[k]
        h = torch.zeros(B, E, N, dtype=u.dtype)
        for t in order.tolist():
            h = (dt[:, t, :, None] * a).exp() * h + (dt[:, t] * u[:, t])[:, :, None] * b[:, t, None]
            out[:, t] += (h * c[:, t, None]).sum(-1) + d * u[:, t]
    out = F.layer_norm(out, (E,), w['out_norm.weight'], w['out_norm.bias']).reshape(B, H, W, E) * F.silu(z)
    return out @ w['out_proj.weight'].T


def random_vmamba(depths=DEPTHS, dims=DIMS, num_classes=7, d_state=3, seed=0):
    """A state dict under the later code's names, of weights so large that every block matters."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=0.3):
        return torch.randn(*shape, generator=g) * scale

    def norm(name, dim):
        return {f'{name}.weight': 1 + rand(dim), f'{name}.bias': rand(dim)}

    state = {'patch_embed.0.weight': rand(dims[0], 3, 4, 4), 'patch_embed.0.bias': rand(dims[0]),
             **norm('patch_embed.2', dims[0])}
    for i, (depth, d) in enumerate(zip(depths, dims)):
        E, R = 2 * d, -(-d // 16)
        for j in range(depth):
            name = f'layers.{i}.blocks.{j}'
            state.update(norm(f'{name}.norm', d))
            state.update({f'{name}.op.{k}': v for k, v in {
                'x_proj_weight': rand(4, R + 2 * d_state, E), 'dt_projs_weight': rand(4, E, R),
                'dt_projs_bias': rand(4, E) - 1, 'A_logs': rand(4 * E, d_state), 'Ds': rand(4 * E),
                'in_proj.weight': rand(2 * E, d), 'conv2d.weight': rand(E, 1, 3, 3), 'conv2d.bias': rand(E),
                **norm('out_norm', E), 'out_proj.weight': rand(d, E)}.items()})
        if i < 3:
            state.update(norm(f'layers.{i}.downsample.norm', 4 * d))
            state[f'layers.{i}.downsample.reduction.weight'] = rand(dims[i + 1], 4 * d)
    return {**state, **norm('classifier.norm', dims[-1]), 'classifier.head.weight': rand(num_classes, dims[-1]),
            'classifier.head.bias': rand(num_classes)}


def as_first_release(state):
    """The same parameters under the names of January 2024."""
    renamed = {}
    for k, v in state.items():
        k = k.replace('patch_embed.0', 'patch_embed.proj').replace('patch_embed.2', 'patch_embed.norm')
        k = re.sub(r'(blocks\.\d+)\.norm', r'\1.ln_1', k).replace('.op.', '.self_attention.')
        renamed[k.replace('classifier.', '')] = v
    return renamed


def as_detector(state, prefix='backbone.'):
    """A detector's checkpoint: no classifier, a norm per output, neck and heads."""
    out = {prefix + k: v for k, v in state.items() if not k.startswith('classifier.')}
    for i, d in enumerate(DIMS):
        out[f'{prefix}outnorm{i}.weight'], out[f'{prefix}outnorm{i}.bias'] = torch.full((d,), i + 2.), torch.ones(d)
    return {**out, 'neck.lateral_convs.0.conv.weight': torch.ones(4, 8, 1, 1), 'rpn_head.rpn_cls.bias': torch.ones(3)}


KWARGS = dict(dims=DIMS, d_state=3)
VANILLA = dict(channel_depths=0, weighted_average=False)
OPTIONS = ('--model', 'vim2_tiny', '--model-kwargs', f'dims={DIMS}', 'd_state=3')


@pytest.fixture(scope='module')
def source():
    return random_vmamba()


@pytest.fixture(scope='module')
def image():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='module')
def features(source, image):
    """What VMamba's last stage gives with the blocks that are chosen by default, (B, H, W, d)."""
    return vmamba(source, image, CHOSEN, classify=False).float()


@pytest.fixture(scope='module')
def restricted(source, features):
    """The logits of that."""
    return classified(source, features)


@pytest.fixture(scope='module')
def peer(shared_data):
    """(weights, input, logits) of VMamba's own code."""
    tensors = load_file(shared_data('peers') / 'vmamba_vanilla_small.safetensors')
    weights = {k.removeprefix('state_dict.'): v for k, v in tensors.items() if k.startswith('state_dict.')}
    return weights, tensors['input'], tensors['logits']


PEER = dict(dims=(16, 32, 64, 128), token_depths=(1, 1, 2, 1))


def load(path, num_classes=10, **kwargs):
    cfg = dict(file=str(path), num_classes=num_classes)
    return timm.create_model('vim2_tiny', pretrained=True, pretrained_cfg_overlay=cfg,
                             **{'num_classes': num_classes, **kwargs}).eval()


def close(model, image, logits, atol=1e-4):
    with torch.no_grad():
        torch.testing.assert_close(model(image), logits, rtol=0, atol=atol)


# --- VMamba's own numbers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('names', [lambda s: s, as_first_release])
@pytest.mark.parametrize('kwargs', [VANILLA, {}], ids=['vanilla', 'vim2'])
def test_peer_through_pretrained(peer, tmp_path, kwargs, names):
    """VMamba's file through `create_model`, as its vanilla network and as a ViM2 with channel mixers and averages."""
    weights, image, logits = peer
    save_file(names(weights), tmp_path / 'vmamba.safetensors')
    model = load(tmp_path / 'vmamba.safetensors', **PEER, **kwargs)
    assert any(isinstance(m, SelectiveChannelMixer) for m in model.modules()) == (not kwargs)
    close(model, image, logits)


@pytest.mark.parametrize('vanilla', [True, False])
def test_peer_through_the_tool(peer, tmp_path, tool, vanilla):
    weights, image, logits = peer
    torch.save({'model': as_first_release(weights), 'epoch': 3}, tmp_path / 'vmamba.pth')
    result = tool('convert_vmamba', tmp_path / 'vmamba.pth', '--model', 'vim2_tiny', '--out', tmp_path / 'out',
                  '--model-kwargs', *(f'{k}={v}' for k, v in {**PEER, **(VANILLA if vanilla else {})}.items()))
    assert result.code == 0, result.err
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert model.num_classes == 10 and len(model.stages[2].blocks) == (2 if vanilla else 5)
    close(model, image, logits)


def test_the_plain_vmamba_of_these_tests_is_vmamba(peer):
    weights, image, logits = peer
    own = vmamba(weights, image[:1], [[0], [0], [0, 1], [0]]).float()
    torch.testing.assert_close(own, logits[:1], rtol=0, atol=1e-5)


# --- a start from fewer blocks ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('have, want, blocks', [
    (9, 6, [0, 2, 3, 5, 6, 8]), (2, 2, [0, 1]), (9, 9, list(range(9))), (5, 3, [0, 2, 4]), (3, 1, [0]), (4, 0, []),
    (27, 18, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26])])
def test_spread_blocks(have, want, blocks):
    assert spread_blocks(have, want) == blocks


def test_spread_blocks_cannot_invent():
    with pytest.raises(ValueError, match='3 of 2'):
        spread_blocks(2, 3)


@pytest.mark.parametrize('kwargs', [{}, dict(weighted_average=False), dict(channel_mixer='mlp'), VANILLA],
                         ids=['vim2', 'no averages', 'mlp', 'vanilla'])
def test_starts_as_the_restricted_network(source, image, restricted, tmp_path, kwargs):
    save_file(source, tmp_path / 'vmamba.safetensors')
    model = load(tmp_path / 'vmamba.safetensors', 7, **KWARGS, **kwargs)
    close(model, image, restricted, 2e-4)
    assert restricted.std() > 0.1


@pytest.mark.parametrize('chosen', [[[1, 0], [0, 1], [8, 7, 2, 2, 0, 4], [1, 1]], [[0, 1], [0, 1], range(6), [0, 1]]])
def test_chosen_blocks(source, image, restricted, tmp_path, tool, chosen):
    """In any order, and more than once."""
    expected = vmamba(source, image, chosen).float()
    assert (expected - restricted).abs().max() > 0.05, 'the choice must show in the numbers'
    torch.save(source, tmp_path / 'vmamba.pth')
    result = tool('convert_vmamba', tmp_path / 'vmamba.pth', *OPTIONS, '--out', tmp_path / 'out', '--json', '--blocks',
                  *(','.join(map(str, c)) for c in chosen))
    assert result.code == 0, result.err
    assert json.loads(result.out)['blocks'] == [list(c) for c in chosen]
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    close(model, image, expected, 2e-4)


def test_channel_mixers_can_leave_the_identity(source, image):
    """They start as identities and not as dead ends: what makes them so gets a gradient, and so do the averages."""
    model = VisionMambaMixer(num_classes=7, **KWARGS)
    model.load_state_dict(convert_vmamba(source, model).state_dict)
    model(image).square().sum().backward()
    mixers = [m for m in model.modules() if isinstance(m, SelectiveChannelMixer)]
    assert len(mixers) == 6
    for mixer in mixers:
        assert not mixer.out_proj.weight.any() and mixer.out_proj.weight.grad.abs().max() > 0
    for stage in model.stages:
        for average in stage.averages:
            assert average.weight.tolist() == [0.] * (average.num_inputs - 1) + [1.]
            # The latest output's weight scales all that the mixer reads while the others are 0, and LayerNorm takes a
            # scale out again: its gradient is rounding.
            assert (average.weight.grad[:-1] != 0).all() and average.weight.grad.isfinite().all()


def test_the_model_is_not_changed(source):
    model = VisionMambaMixer(num_classes=7, **KWARGS)
    before = copy.deepcopy(model.state_dict())
    weights = convert_vmamba(source, model).state_dict
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(weights['stages.0.blocks.2.mixer.out_proj.weight'],
                           before['stages.0.blocks.2.mixer.out_proj.weight'])


# --- kinds of checkpoints ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('wrap', [
    lambda s: s, lambda s: {'model': s}, lambda s: {'state_dict': s, 'meta': {'epoch': 3}},
    lambda s: {'model': {f'module.{k}': v for k, v in s.items()}},
    lambda s: {'model': {k: v * 2 for k, v in s.items()}, 'model_ema': s},
    lambda s: {'state_dict': {k: v * 2 for k, v in s.items()}, 'state_dict_ema': s}])
def test_containers(source, tmp_path, tool, wrap):
    """The same tensors come out of every kind of file, by the tool and by `create_model`."""
    model = VisionMambaMixer(num_classes=7, **KWARGS)
    conversion = convert_vmamba(source, model)
    assert convert_vmamba(as_first_release(source), model).mapped.keys() == conversion.mapped.keys()
    torch.save(wrap(as_first_release(source)), tmp_path / 'vmamba.pth')
    result = tool('convert_vmamba', tmp_path / 'vmamba.pth', *OPTIONS, '--out', tmp_path / 'out')
    assert result.code == 0, result.err
    written, loaded = load_file(tmp_path / 'out' / 'model.safetensors'), load(tmp_path / 'vmamba.pth', 7, **KWARGS)
    for key in conversion.mapped:
        assert torch.equal(written[key], conversion.state_dict[key]), key
        assert torch.equal(loaded.state_dict()[key], conversion.state_dict[key]), key


def test_no_ema(source, tmp_path, tool):
    torch.save({'model': source, 'model_ema': {k: v * 2 for k, v in source.items()}}, tmp_path / 'vmamba.pth')
    for options, factor in ((), 2), (('--no-ema',), 1):
        out = tmp_path / f'out{factor}'
        assert tool('convert_vmamba', tmp_path / 'vmamba.pth', *OPTIONS, '--out', out, *options).code == 0
        assert torch.equal(load_file(out / 'model.safetensors')['stem.conv.weight'],
                           source['patch_embed.0.weight'] * factor)


def test_configuration_of_vmambas_training_loop(source, tmp_path, tool, monkeypatch):
    """It saves a yacs CfgNode beside the weights: read as a dict, whether yacs is installed or not."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    node, inner = module.CfgNode(DATA='imagenet'), module.CfgNode(DEPTHS=[2, 2, 9, 2])
    node['MODEL'] = inner
    node.__dict__['__immutable__'] = True
    node.__dict__['__deprecated_keys__'] = set()
    torch.save({'model': source, 'config': node, 'max_accuracy': 82.2, 'epoch': 292}, tmp_path / 'vmamba.pth')
    monkeypatch.delitem(sys.modules, 'yacs.config')
    monkeypatch.delitem(sys.modules, 'yacs')
    result = tool('convert_vmamba', tmp_path / 'vmamba.pth', *OPTIONS, '--out', tmp_path / 'out')
    assert result.code == 0, result.err


@pytest.mark.parametrize('prefix', ['backbone.', ''])
def test_detector(source, image, features, tmp_path, tool, prefix):
    """The features are VMamba's; the last output's norm becomes the final one; there is no classifier."""
    state = as_detector(source, prefix)
    if not prefix:
        state = {k: v for k, v in state.items() if 'neck' not in k and 'rpn' not in k}
    torch.save({'state_dict': state, 'meta': {'epoch': 12}}, tmp_path / 'detector.pth')
    result = tool('convert_vmamba', tmp_path / 'detector.pth', *OPTIONS, '--out', tmp_path / 'out', '--json')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report['num_classes'] == 0
    assert report['mapped']['norm.weight'] == f'{prefix}outnorm3.weight'
    assert report['unused'][f'{prefix}outnorm1.bias'] == "the detector's norm of stage 2's output"
    assert ('neck.lateral_convs.0.conv.weight' in report['unused']) == bool(prefix)
    expected = F.layer_norm(features, features.shape[-1:], torch.full((20,), 5.), torch.ones(20))
    with torch.no_grad():
        converted = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
        torch.testing.assert_close(converted(image), expected.mean((1, 2)), rtol=0, atol=1e-3)
        backbone = load(tmp_path / 'detector.pth', 1000, features_only=True, **KWARGS)
        torch.testing.assert_close(backbone(image)[3].permute(0, 2, 3, 1), features, rtol=0, atol=1e-3)
        assert timm.create_model(  # a new classifier
            'vim2_tiny', pretrained=True, num_classes=3, **KWARGS,
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'detector.pth')))(image).shape == (2, 3)
    with pytest.raises(RuntimeError, match='Missing key.*head.fc'):  # an untrained classifier does not pass for one
        load(tmp_path / 'detector.pth', 1000, **KWARGS)


def test_without_any_final_norm(source, tmp_path, tool):
    """It is reported as initialised."""
    state = {k: v for k, v in as_detector(source).items() if 'outnorm' not in k}
    torch.save(state, tmp_path / 'detector.pth')
    result = tool('convert_vmamba', tmp_path / 'detector.pth', *OPTIONS, '--out', tmp_path / 'out', '--json')
    assert json.loads(result.out)['initialized'].items() >= {'norm.weight': 'random', 'norm.bias': 'random'}.items()


def test_other_classifier(source, image, tmp_path, tool):
    save_file(source, tmp_path / 'vmamba.safetensors')
    result = tool('convert_vmamba', tmp_path / 'vmamba.safetensors', *OPTIONS, '--num-classes', 3, '--out',
                  tmp_path / 'out', '--json')
    report = json.loads(result.out)
    assert report['initialized']['head.fc.weight'] == 'random' and report['num_classes'] == 3
    assert 'classifier.head.weight' in report['unused'] and 'head.fc.weight' not in report['mapped']
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    whole = load(tmp_path / 'vmamba.safetensors', 7, **KWARGS)
    with torch.no_grad():
        assert torch.equal(model.forward_features(image), whole.forward_features(image))
        assert model(image).shape == (2, 3)
    adapted = timm.create_model('vim2_tiny', pretrained=True, num_classes=4, in_chans=1, **KWARGS,
                                pretrained_cfg_overlay=dict(file=str(tmp_path / 'vmamba.safetensors'), num_classes=7))
    torch.testing.assert_close(adapted.stem.conv.weight, source['patch_embed.0.weight'].sum(1, keepdim=True))


# --- report, and what is written --------------------------------------------------------------------------------------

def test_report_accounts_for_every_key(source, tmp_path, tool):
    save_file(source, tmp_path / 'vmamba.safetensors')
    result = tool('convert_vmamba', tmp_path / 'vmamba.safetensors', *OPTIONS, '--out', tmp_path / 'out', '--json')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    assert report['mapped'].keys() | report['initialized'].keys() == weights.keys()
    assert not report['mapped'].keys() & report['initialized'].keys()
    assert set(report['mapped'].values()) | report['unused'].keys() == source.keys()
    assert not set(report['mapped'].values()) & report['unused'].keys()
    assert report['blocks'] == CHOSEN and report['source_depths'] == list(DEPTHS)
    for key, origin in report['mapped'].items():
        part = {'in': 0, 'gate': 1}.get(key.split('.')[-2].removesuffix('_proj'))  # of VMamba's in_proj, its halves
        expected = source[origin] if part is None else source[origin].chunk(2)[part]
        assert torch.equal(weights[key], expected), key
    assert {re.sub(r'\d+', '*', k) for k in report['unused']} == {
        re.sub(r'\d+', '*', k) for k in source if '.blocks.' in k}
    assert {k.split('.')[3] for k in report['unused']} == {'1', '4', '7'}
    for key, start in report['initialized'].items():
        assert start == ('chain' if '.averages.' in key else 'identity'), key


def test_table(source, tmp_path, tool):
    save_file(source, tmp_path / 'vmamba.safetensors')
    result = tool('convert_vmamba', tmp_path / 'vmamba.safetensors', *OPTIONS, '--out', tmp_path / 'out')
    rows = {row.split()[0]: row for row in result.out.splitlines()[1:] if row}
    assert 'layers.2.blocks.3' in rows['stages.2.blocks.3']  # the third token mixer, after two and a channel mixer
    assert 'identities' in rows['stages.2.blocks.2'] and 'chain' in rows['stages.0.averages']
    assert 'patch_embed.0' in rows['stem.conv'] and 'layers.0.downsample' in rows['stages.1.downsample']
    assert 'stage 3: blocks 0, 2, 3, 5, 6, 8 of the 9' in result.out
    assert 'not used: 13 tensors, block 7 of stage 3 was not chosen' in result.out
    total = sum(v.numel() for v in load_file(tmp_path / 'out' / 'model.safetensors').values())
    assert sum(int(m.replace(',', '')) for m in re.findall(r'^st\S+ .* ([\d,]+)$|^(?:norm|head) .* ([\d,]+)$',
                                                           result.out, re.M) for m in m if m) == total


def test_round_trip_is_bit_equal(source, tmp_path, tool):
    """Converted, loaded, saved, loaded: the same bits; and so is a model with every parameter at random."""
    save_file(source, tmp_path / 'vmamba.safetensors')
    assert tool('convert_vmamba', tmp_path / 'vmamba.safetensors', *OPTIONS, '--out', tmp_path / 'out').code == 0
    folder = f'local-dir:{tmp_path / "out"}'
    written = load_file(tmp_path / 'out' / 'model.safetensors')
    for change in (False, True):
        model = timm.create_model(folder, pretrained=True)
        assert all(torch.equal(v, written[k]) for k, v in model.state_dict().items())
        if change:
            for p in model.parameters():
                nn.init.normal_(p)
        save_file(model.state_dict(), tmp_path / 'again.safetensors')
        again = load(tmp_path / 'again.safetensors', 7, **KWARGS)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_folder(source, tmp_path, tool):
    save_file(source, tmp_path / 'vmamba.safetensors')
    out = tmp_path / 'new' / 'folder'
    assert tool('convert_vmamba', tmp_path / 'vmamba.safetensors', *OPTIONS, '--out', out).code == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ['folder']
    assert sorted(p.name for p in out.iterdir()) == ['config.json', 'model.safetensors']
    assert out.stat().st_mode & 0o777 == (tmp_path / 'new').stat().st_mode & 0o777
    config = json.loads((out / 'config.json').read_text())
    assert config['architecture'] == 'vim2_tiny' and config['num_classes'] == 7
    assert 'vmamba.safetensors, blocks 0,1 0,1 0,2,3,5,6,8 0,1' in config['pretrained_cfg']['notes'][0]


def test_same_bits_every_time(source, tmp_path, tool):
    save_file(source, tmp_path / 'vmamba.safetensors')
    for out, seed in (('a', 0), ('b', 0), ('c', 1)):
        tool('convert_vmamba', tmp_path / 'vmamba.safetensors', *OPTIONS, '--out', tmp_path / out, '--seed', seed)
    a, b, c = ((tmp_path / n / 'model.safetensors').read_bytes() for n in 'abc')
    assert a == b != c


# --- what is refused, and leaves nothing behind -----------------------------------------------------------------------

class Code:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def refused(tool, path, tmp_path, *options, model=OPTIONS):
    """The message, once it is certain that the tool wrote nothing."""
    before = sorted(tmp_path.rglob('*'))
    result = tool('convert_vmamba', path, *model, '--out', tmp_path / 'out', *options)
    assert result.code == 2 and result.out == '' and len(result.err.splitlines()) == 1, result
    assert sorted(tmp_path.rglob('*')) == before
    return result.err


def without(state, pattern):
    return {k: v for k, v in state.items() if not re.search(pattern, k)}


def no_gate(state):
    return {k: v[:len(v) // 2] if k.endswith('in_proj.weight') else v for k, v in state.items()}


NEWER = [
    (no_gate, 'no gate (in_proj has 16 rows, where branch and gate need 32)'),
    (lambda s: {**s, 'layers.0.blocks.0.mlp.fc1.weight': torch.ones(4, 8)}, 'its blocks have an MLP'),
    (lambda s: without(s, r'conv2d\.bias'), 'its convolution has no bias'),
    (lambda s: {**s, 'patch_embed.5.weight': torch.ones(8, 4, 3, 3)}, 'two overlapping convolutions'),
    (lambda s: {**without(s, 'downsample'), 'layers.0.downsample.1.weight': torch.ones(12, 8, 3, 3)},
     'its down-sampling is a convolution'),
    (lambda s: without(s, 'dt_projs_weight'), 'other projections'),
]


@pytest.mark.parametrize('change, why', NEWER)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_newer_vmamba_is_refused(source, tmp_path, tool, change, why, prefix):
    state = {prefix + k: v for k, v in change(source).items()}
    save_file(state, tmp_path / 'vmamba.safetensors')
    message = refused(tool, tmp_path / 'vmamba.safetensors', tmp_path)
    assert why in message and 'newer VMamba (v05 or later)' in message and 'vmamba.safetensors' in message
    with pytest.raises(RuntimeError, match='newer VMamba') as error:
        load(tmp_path / 'vmamba.safetensors', 7, **KWARGS)
    assert why in str(error.value) and 'vmamba.safetensors' in str(error.value)
    assert 'Nothing of it can start a ViM2' in str(error.value) and 'vmamba_tiny_s1l8' in str(error.value)


@pytest.mark.parametrize('change, options, why', [
    (lambda s: without(s, r'layers\.2\.blocks\.4\.'), (), 'incomplete: stage 3 has only blocks 0, 1, 2, 3, 5'),
    (lambda s: without(s, r'layers\.1\.'), (), 'incomplete: it has only stages 1, 3, 4'),
    (lambda s: without(s, r'layers\.3\.'), (), 'has 3 stages, the model 4'),
    (lambda s: without(s, r'layers\.2\.blocks\.[2-8]\.'), (), 'stage 3 of the model has 6 token mixers, the checkpoint '
                                                             'only 2'),
    (lambda s: without(s, r'layers\.2\.blocks\.2\.op\.Ds'), (), 'missing: stages.2.blocks.1.mixer.s6.Ds'),
    (lambda s: without(s, 'patch_embed.0'), (), 'missing: stem.conv.weight, stem.conv.bias'),
    (lambda s: {**s, 'pos_embed': torch.ones(3)}, (), 'does not have: pos_embed'),
    (lambda s: {**s, 'layers.0.blocks.0.op.conv2d.scale': torch.ones(3)}, (), 'layers.0.blocks.0.op.conv2d.scale'),
    (lambda s: random_vmamba(dims=(8, 12, 16, 24)), (), 'of another shape: stages.3.downsample.reduction.weight (24, '),
    (lambda s: random_vmamba(d_state=4), (), 'of another shape: stages.0.blocks.0.mixer.s6.x_proj_weight (4, 9, 16) '
                                             'instead of (4, 7, 16)'),
    (lambda s: s, ('--blocks', '0,1', '0,1', '0,1'), 'given for 3 stages, the model has 4'),
    (lambda s: s, ('--blocks', '0,1', '0,1', '0,1', '0,1'), 'stage 3 of the model has 6 token mixers, but 2 blocks'),
    (lambda s: s, ('--blocks', '0,1', '0,2', '0,1,2,3,4,5', '0,1'), 'stage 2 of the checkpoint has blocks 0 to 1, '
                                                                    'not 2'),
    (lambda s: s, ('--blocks', '0,1', '0,-1', '0,1,2,3,4,5', '0,1'), 'not -1'),
    (lambda s: s, ('--blocks', '0,1', 'a', '0', '0'), "numbers of blocks"),
    (lambda s: s, ('--num-classes', '-1'), '--num-classes must be at least 0'),
    (lambda s: s, ('--model-kwargs', 'token_scans=2', f'dims={DIMS}', 'd_state=3'), 'of another shape'),
])
def test_what_does_not_fit_is_refused(source, tmp_path, tool, change, options, why):
    save_file(change(source), tmp_path / 'vmamba.safetensors')
    assert why in refused(tool, tmp_path / 'vmamba.safetensors', tmp_path, *options)


@pytest.mark.parametrize('name', ['resnet18', 'swin_tiny_patch4_window7_224', 'test_vim2'])
def test_foreign_weights_are_refused(tmp_path, tool, name):
    state = timm.create_model(name).state_dict()
    assert not is_vmamba(state)
    torch.save(state, tmp_path / 'foreign.pth')
    assert 'is no VMamba checkpoint' in refused(tool, tmp_path / 'foreign.pth', tmp_path)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('damage', [
    lambda b: b[:len(b) // 2], lambda b: b[:-50], lambda b: b'', lambda b: b'<html>' * 99],
    ids=['half', 'end', 'empty', 'html'])
def test_damaged_files_are_refused(source, tmp_path, tool, suffix, damage):
    path = tmp_path / f'vmamba{suffix}'
    (torch.save if suffix == '.pth' else save_file)(source, path)
    path.write_bytes(damage(path.read_bytes()))
    assert 'corrupt or truncated' in refused(tool, path, tmp_path)


@pytest.mark.parametrize('legacy', [False, True])
def test_pickled_code_is_refused_and_not_run(source, tmp_path, tool, legacy):
    torch.save({'model': source, 'hook': Code(tmp_path / 'executed')}, tmp_path / 'vmamba.pth',
               _use_new_zipfile_serialization=not legacy)
    message = refused(tool, tmp_path / 'vmamba.pth', tmp_path)
    assert ('could execute code' in message and 'open' in message) or (legacy and 'older than PyTorch 1.6' in message)
    with pytest.raises(RuntimeError):
        load(tmp_path / 'vmamba.pth', 7, **KWARGS)
    assert not (tmp_path / 'executed').exists()
    torch.load(tmp_path / 'vmamba.pth', weights_only=False)
    assert (tmp_path / 'executed').exists(), 'the file does hold code'


def test_other_mistakes(source, tmp_path, tool):
    save_file(source, tmp_path / 'vmamba.safetensors')
    assert 'does not exist' in refused(tool, tmp_path / 'none.pth', tmp_path)
    assert 'no state dict' in refused(tool, empty(tmp_path), tmp_path)
    path = tmp_path / 'vmamba.safetensors'
    assert 'resnet18 is no ViM2' in refused(tool, path, tmp_path, model=('--model', 'resnet18'))
    assert 'did you mean vim2_tiny' in refused(tool, path, tmp_path, model=('--model', 'vim2_tinny'))
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'kept').write_text('kept')
    assert 'exists already' in refused(tool, path, tmp_path)
    shutil.rmtree(tmp_path / 'out')
    (tmp_path / 'file').write_text('')
    result = tool('convert_vmamba', path, *OPTIONS, '--out', tmp_path / 'file' / 'out')
    assert result.code == 2 and 'cannot write' in result.err


def empty(folder):
    torch.save({'model': {}}, folder / 'empty.pth')
    return folder / 'empty.pth'


def test_a_failure_while_writing_leaves_nothing(source, tmp_path, tool, monkeypatch):
    import timm.models._hub as hub
    written = []

    def full(model, folder, **kwargs):
        Path(folder).mkdir()
        save_file(model.state_dict(), f'{folder}/model.safetensors')
        written.append(folder)
        raise OSError(28, 'No space left on device')

    save_file(source, tmp_path / 'vmamba.safetensors')
    monkeypatch.setattr(hub, 'save_for_hf', full)
    assert 'No space left on device' in refused(tool, tmp_path / 'vmamba.safetensors', tmp_path)
    assert len(written) == 1


# --- MLP-Mixer, the other end -----------------------------------------------------------------------------------------

MIXER = dict(token_mixer='mlp', channel_mixer='mlp', weighted_average=False)


def graph_ops(model):
    """Names of the functions, operators and module types in a model's fx graph."""
    graph = torch.fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    return [type(modules[n.target]).__name__ if n.op == 'call_module' else getattr(n.target, '__name__', str(n.target))
            for n in graph.nodes if n.op.startswith('call_')]


def test_mlp_mixer_has_no_scan_and_no_convolution_but_the_stems():
    model = VisionMambaMixer(dims=(8, 16), token_depths=2, channel_depths=1, channel_expand=2., **MIXER)
    assert not [m for m in model.modules() if isinstance(m, (S6, SelectiveTokenMixer, SelectiveChannelMixer))]
    assert not [n for n, _ in model.named_parameters() if re.search(r'A_logs|Ds|dt_proj|x_proj|averages', n)]
    ops = graph_ops(model)
    assert ops.count('Conv2d') == 1 and not [op for op in ops if 'scan' in op or 'conv' in op]
    selective = graph_ops(VisionMambaMixer(dims=(8, 16), token_depths=2, channel_depths=1, channel_expand=2.))
    assert selective.count('Conv2d') > 1 and [op for op in selective if 'scan' in op]
    program = torch.export.export(model, (torch.randn(1, 3, 32, 48),)).run_decompositions()
    targets = [str(n.target) for n in program.graph.nodes if n.op == 'call_function']
    assert len([t for t in targets if 'convolution' in t]) == 1 and not [t for t in targets if 'vim2' in t]


def test_mlp_mixer_is_timms():
    """Where the map is the token grid: timm's MLP-Mixer, by renaming its parameters."""
    torch.manual_seed(0)
    mixer = MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=3, embed_dim=12, mlp_ratio=(32 / 12, 2.),
                     norm_layer=nn.LayerNorm, stem_norm=True).eval()
    for p in mixer.parameters():
        nn.init.normal_(p, std=0.5)
    ours = VisionMambaMixer(num_classes=5, patch_size=8, dims=(12,), token_depths=3, channel_depths=3, token_grid=4,
                            channel_expand=2., mlp_ratio=2., **MIXER).eval()
    weights = {}
    for k, v in mixer.state_dict().items():
        k = k.replace('stem.proj', 'stem.conv').replace('head.', 'head.fc.')
        match = re.match(r'blocks\.(\d+)\.(?:norm(\d)|(mlp_tokens)|mlp_channels)\.(.+)', k)
        if match:
            first = match[2] == '1' or match[3] is not None
            rest = match[4] if match[2] else 'mixer.mlp.' + match[4] if match[3] else 'mixer.' + match[4]
            k = f'stages.0.blocks.{2 * int(match[1]) + (not first)}.{"norm." if match[2] else ""}{rest}'
        weights[k] = v
    ours.load_state_dict(weights)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = mixer(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1 and (ours(x.flip(3)) - expected).abs().max() > 0.01


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (24, 100)])
def test_mlp_mixer_at_any_size(size):
    """One state dict, all ways to run it; sizes other than the grid's by pooling and interpolation."""
    torch.manual_seed(0)
    model = VisionMambaMixer(num_classes=5, dims=(8, 16), token_depths=2, channel_depths=1, channel_expand=2.,
                             token_grid=3, **MIXER).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 5) and out.isfinite().all()
        torch.testing.assert_close(torch.jit.script(model)(x), out)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), out)
        layer, y = model.stages[1].blocks[0].mixer, torch.randn(2, *(-(-s // 8) for s in size), 16)
        grid = layer.mlp(F.adaptive_avg_pool2d(y.permute(0, 3, 1, 2), 3).flatten(2)).unflatten(2, (3, 3))
        expected = F.interpolate(grid, y.shape[1:3], mode='bilinear').permute(0, 2, 3, 1)
        torch.testing.assert_close(layer(y), expected, rtol=1e-4, atol=1e-6)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_token_mlp_alone():
    """The two ends are independent: perceptrons over the tokens with selective channel mixers and averages."""
    model = timm.create_model('test_vim2', token_mixer='mlp')
    mixers = [block.mixer for stage in model.stages for block in stage.blocks]
    assert {type(m) for m in mixers} == {TokenMlp, SelectiveChannelMixer}
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
    with pytest.raises(ValueError, match='token_mixer'):
        timm.create_model('test_vim2', token_mixer='conv')
