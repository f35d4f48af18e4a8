"""VMamba as a timm family: timm's interface, and the numbers of VMamba's own code."""
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm_suite import TimmModelTests

from vim2.models import VMamba
from vim2.models.vmamba import SS2D, checkpoint_filter_fn, describe_vmamba, rename_vmamba
from vim2.ops import cross_selective_scan

# Ours, the file of VMamba's configuration, depths, width, expansion
PUBLISHED = {
    'vmamba_tiny_s1l8': 'vmambav2v_tiny_224', 'vmamba_tiny_s2l5': 'vmambav2_tiny_224',
    'vmamba_small_s2l15': 'vmambav2_small_224', 'vmamba_small_s1l20': 'vmambav2v_small_224',
    'vmamba_base_s2l15': 'vmambav2_base_224', 'vmamba_base_s1l20': 'vmambav2v_base_224',
    'vmamba_tiny_v0': 'vmambav0_tiny_224', 'vmamba_small_v0': 'vmambav0_small_224',
    'vmamba_base_v0': 'vmambav0_base_224'}
PARAMETERS = {
    'vmamba_tiny_s1l8': 30249064, 'vmamba_tiny_s2l5': 30705832, 'vmamba_small_s2l15': 50147752,
    'vmamba_small_s1l20': 49012840, 'vmamba_base_s2l15': 88557800, 'vmamba_base_s1l20': 86614504,
    'vmamba_tiny_v0': 22893448, 'vmamba_small_v0': 44417416, 'vmamba_base_v0': 76254056}
PEERS = {
    'vmamba_v2_ratio1': dict(version='v2', expand=1., d_state=1, mlp_ratio=4.),
    'vmamba_v2_ratio2': dict(version='v2', expand=2., d_state=1, mlp_ratio=4.),
    'vmamba_v0': dict(version='v0', expand=2., d_state=16, mlp_ratio=0.)}


class TestVMamba(TimmModelTests):
    name = 'test_vmamba'


class TestVMambaV0(TimmModelTests):
    name = 'test_vmamba_v0'


def test_registered():
    assert timm.list_models(module='vmamba') == sorted([*PUBLISHED, 'test_vmamba', 'test_vmamba_v0'])


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters(name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.default_cfg['license'] == 'mit' and model.default_cfg['crop_pct'] == 0.875
    assert model.default_cfg['interpolation'] == 'bicubic' and model.default_cfg['input_size'] == (3, 224, 224)


@pytest.mark.parametrize('name', PUBLISHED)
def test_keys_and_shapes_of_the_published_weights(name, shared_data):
    """Every key and shape that VMamba's full-size network has becomes one of ours, to the last."""
    config = json.loads((shared_data('peers') / 'vmamba_v2_configs.json').read_text())['configs'][PUBLISHED[name]]
    assert config['parameters'] == PARAMETERS[name]
    model = timm.create_model(name, device='meta')
    given = {k: torch.empty(shape, device='meta') for k, shape in config['state_dict']}
    converted = checkpoint_filter_fn(given, model)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    rates = [getattr(b.drop_path, 'drop_prob', 0.) for stage in timm.create_model(
        name, device='meta', drop_path_rate=config['drop_path_rate']).stages for b in stage.blocks]
    assert rates == pytest.approx(config['drop_path_per_block'], abs=1e-6)
    mean, std = config['evaluation']['mean'], config['evaluation']['std']
    assert model.default_cfg['mean'] == tuple(mean) and model.default_cfg['std'] == tuple(std)
    assert model.default_cfg['crop_pct'] == config['evaluation']['crop_pct']


# --- numbers of VMamba's own code -----------------------------------------------------------------------------------

def peer(folder, name):
    """VMamba's tensors, and our model with its weights."""
    tensors = load_file(folder / f'{name}.safetensors')
    model = VMamba(num_classes=10, dims=(12, 24, 48, 96), depths=(1, 1, 2, 1), **PEERS[name]).eval()
    weights = {k.removeprefix('state_dict.'): v for k, v in tensors.items() if k.startswith('state_dict.')}
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    return tensors, model


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize('backend', ['cpu', 'reference'])
@pytest.mark.parametrize('name', PEERS)
def test_numbers_of_vmamba(name, backend, shared_data, monkeypatch):
    monkeypatch.setenv('VIM2_SCAN_BACKEND', backend)
    tensors, model = peer(shared_data('peers'), name)
    with torch.no_grad():
        assert difference(model.stem(tensors['input']), tensors['patch_embed']) < 1e-5
        _, stages = model.forward_intermediates(tensors['input'])
        for i, stage in enumerate(stages):
            assert difference(stage, tensors[f'stage{i}']) < 1e-5, i
        assert difference(model(tensors['input']), tensors['logits']) < 1e-5


@pytest.mark.parametrize('name', PEERS)
def test_numbers_of_vmamba_compiled(name, shared_data):
    tensors, model = peer(shared_data('peers'), name)
    torch._dynamo.reset()
    with torch.no_grad():
        features, stages = torch.compile(model.forward_intermediates, fullgraph=True)(tensors['input'])
        for i, stage in enumerate(stages):
            assert difference(stage, tensors[f'stage{i}']) < 1e-4, i
        assert difference(model.forward_head(features), tensors['logits']) < 1e-4


def test_numbers_of_vmamba_in_tritons_interpreter(shared_data, root):
    pytest.importorskip('triton')
    code = f'''
import sys, torch
sys.path.insert(0, 'tests')
import interpreted
from pathlib import Path
from test_vmamba import PEERS, difference, peer
for name in PEERS:
    tensors, model = peer(Path({str(shared_data("peers"))!r}), name)
    with torch.no_grad():
        # Each stage from the stored map before it; the first one, of most steps, of one network only.
        for i in range(0 if name == 'vmamba_v2_ratio1' else 1, 4):
            x = tensors[f'stage{{i - 1}}' if i else 'patch_embed'][:1]
            x = model.stages[i](x)
            print(difference(x, tensors[f'stage{{i}}'][:1]))
        print(difference(model.forward_head(model._final_norm(x)), tensors['logits'][:1]))
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=root, text=True, capture_output=True, env={
        **os.environ, 'TRITON_INTERPRET': '1', 'VIM2_SCAN_BACKEND': 'triton', 'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(root)})
    assert done.returncode == 0, done.stderr[-2000:]
    values = [float(v) for v in done.stdout.split()]
    assert len(values) == 13 and max(values) < 1e-4, values


# --- the same on small data that ships ------------------------------------------------------------------------------

@pytest.mark.parametrize('expand,d_state', [(1., 1), (2., 1), (1.5, 3)])
def test_mixer_is_what_its_formula_says(expand, d_state, monkeypatch):
    """SS2D beside plain arithmetic in float64 on sequences in explicit orders."""
    monkeypatch.setenv('VIM2_SCAN_BACKEND', 'reference')
    torch.manual_seed(0)
    mixer = SS2D(20, expand=expand, d_state=d_state).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        x = torch.randn(2, 3, 4, 20, dtype=torch.float64)
        E, N, R = int(expand * 20), d_state, 2
        assert mixer.s6.x_proj_weight.shape == (4, R + 2 * N, E)
        u = torch.nn.functional.conv2d((x @ mixer.in_proj.weight.T).permute(0, 3, 1, 2), mixer.conv2d.weight, padding=1,
                                       groups=E)
        u = u * torch.sigmoid(u)
        total = torch.zeros_like(u)
        for k in range(4):
            places = [(i, j) for i in range(3) for j in range(4)]
            if k % 2:
                places = [(i, j) for j in range(4) for i in range(3)]
            if k >= 2:
                places = places[::-1]
            state = torch.zeros(2, E, N, dtype=torch.float64)
            A = -torch.exp(mixer.s6.A_logs[k * E:(k + 1) * E])
            for i, j in places:
                token = u[:, :, i, j]
                rows = token @ mixer.s6.x_proj_weight[k].T
                dt = rows[:, :R] @ mixer.s6.dt_projs_weight[k].T + mixer.s6.dt_projs_bias[k]
                dt = torch.nn.functional.softplus(dt)
                state = torch.exp(dt[:, :, None] * A) * state + (dt * token)[:, :, None] * rows[:, None, R:R + N]
                total[:, :, i, j] += (state * rows[:, None, R + N:]).sum(2) + mixer.s6.Ds[k * E:(k + 1) * E] * token
        y = torch.nn.functional.layer_norm(total.permute(0, 2, 3, 1), (E,), mixer.out_norm.weight, mixer.out_norm.bias)
        torch.testing.assert_close(mixer(x), y @ mixer.out_proj.weight.T, rtol=1e-5, atol=1e-6)


def published_names(state_dict):
    """The model's weights as VMamba names them: what `rename_vmamba` reverses."""
    out = {}
    for key, value in state_dict.items():
        parts = key.split('.')
        if parts[0] == 'stem':
            place = {'conv': 0, 'norm': 2, 'conv1': 0, 'norm1': 2, 'conv2': 5, 'norm2': 7}[parts[1]]
            out[f'patch_embed.{place}.{parts[2]}'] = value
        elif parts[0] == 'stages' and parts[2] == 'downsample':
            name = {'conv': '1', 'norm': '3'}[parts[3]] if 'stem.conv1.weight' in state_dict else parts[3]
            out[f'layers.{int(parts[1]) - 1}.downsample.{name}.{parts[4]}'] = value
        elif parts[0] == 'stages':
            rest = '.'.join(parts[4:]).replace('mixer.s6.', 'op.').replace('mixer.', 'op.')
            if rest == 'op.gate_proj.weight':
                continue
            gate = key.replace('in_proj', 'gate_proj')
            if rest == 'op.in_proj.weight' and gate in state_dict:
                value = torch.cat([value, state_dict[gate]])
            out[f'layers.{parts[1]}.blocks.{parts[3]}.{rest}'] = value
        else:
            out['classifier.' + key.replace('head.fc', 'head')] = value
    return out


@pytest.fixture(params=['test_vmamba', 'test_vmamba_v0'])
def own(request):
    torch.manual_seed(1)
    return timm.create_model(request.param).eval()


def assert_same_weights(state_dict, model):
    assert state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(state_dict[k], v) for k, v in model.state_dict().items())


def test_published_names(own):
    published = published_names(own.state_dict())
    assert 'layers.0.blocks.0.op.in_proj.weight' in published and 'layers.2.blocks.1.norm.bias' in published
    assert_same_weights(checkpoint_filter_fn(published, own), own)
    assert_same_weights(checkpoint_filter_fn(dict(own.state_dict()), own), own)  # its own names


def test_names_of_the_first_release(own):
    old = {}
    for key, value in published_names(own.state_dict()).items():
        key = key.replace('.op.', '.self_attention.').replace('classifier.', '')
        key = key.replace('patch_embed.0.', 'patch_embed.proj.').replace('patch_embed.2.', 'patch_embed.norm.')
        old[key.replace('.norm.', '.ln_1.') if '.blocks.' in key else key] = value
    assert_same_weights(checkpoint_filter_fn(old, own), own)


def test_linears_saved_as_convolutions(own):
    shaped = {k: v[:, :, None, None] if k.endswith(('in_proj.weight', 'out_proj.weight', 'fc1.weight', 'fc2.weight'))
              else v for k, v in published_names(own.state_dict()).items()}
    assert_same_weights(checkpoint_filter_fn(shaped, own), own)


def test_weights_of_a_detector(own):
    """The backbone alone, with the last level's norm as the final norm."""
    published = published_names(own.state_dict())
    detector = {f'backbone.{k}': v for k, v in published.items() if not k.startswith('classifier.')}
    for i, dim in enumerate((8, 16, 24, 32)):
        detector.update({f'backbone.outnorm{i}.{n}': torch.full((dim,), i + 1.) for n in ('weight', 'bias')})
    detector['neck.lateral_convs.0.conv.weight'] = torch.ones(3)
    weights = checkpoint_filter_fn(detector, own)
    assert torch.equal(weights.pop('norm.weight'), torch.full((32,), 4.)) and weights.pop('norm.bias')[0] == 4
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in weights.items())
    assert own.state_dict().keys() - weights.keys() == {'norm.weight', 'norm.bias', 'head.fc.weight', 'head.fc.bias'}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_checkpoint_says_what_it_is_of(name):
    model = timm.create_model(name, device='meta')
    other = timm.create_model('vmamba_tiny_s1l8' if name != 'vmamba_tiny_s1l8' else 'vmamba_tiny_s2l5', device='meta')
    weights = published_names(model.state_dict())
    assert describe_vmamba(rename_vmamba(weights)) == describe_vmamba(model.state_dict())
    asked = other.default_cfg['architecture']
    with pytest.raises(RuntimeError, match=f'is no checkpoint of {asked}; it is one of {name}:'):
        checkpoint_filter_fn(weights, other)


def test_checkpoints_that_do_not_fit(own):
    weights = published_names(own.state_dict())
    for change, match in (
            ({'layers.0.blocks.0.op.extra': torch.ones(1)}, 'keys do not match.\n  unexpected: layers.0.blocks.0.op.e'),
            ({'layers.0.blocks.0.op.Ds': torch.ones(1)}, r'of another shape: stages.0.blocks.0.mixer.s6.Ds \(1,\)'),
            ({'layers.0.blocks.1.norm.weight': torch.ones(8)}, r'it looks like VMamba\(.*depths=\(2, 1, 2, 1\)')):
        with pytest.raises(RuntimeError, match=match):
            checkpoint_filter_fn({**weights, **change}, own)
    weights.pop('layers.3.blocks.0.op.A_logs')
    with pytest.raises(RuntimeError, match='missing: stages.3.blocks.0.mixer.s6.A_logs'):
        checkpoint_filter_fn(weights, own)


@pytest.mark.parametrize('kwargs,match', [(dict(version='v1'), 'version'), (dict(depths=(1, 2)), 'depths')])
def test_constructor_rejects(kwargs, match):
    with pytest.raises(ValueError, match=match):
        timm.create_model('test_vmamba', device='meta', **kwargs)


def test_features_are_channels_last(own):
    """No transposition is paid for: the features are views of what the blocks work on."""
    with torch.no_grad():
        features, stages = own.forward_intermediates(torch.randn(2, 3, 64, 64))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in [features, *stages])


def test_one_state_uses_the_public_scan():
    """N = 1 without a gate through `cross_selective_scan`, as the mixer does."""
    torch.manual_seed(0)
    mixer = SS2D(16, expand=1.)
    x = torch.randn(1, 5, 7, 16)
    s6 = mixer.s6
    rows = torch.einsum('bhwe,kre->bkrhw', x, s6.x_proj_weight)
    delta = torch.einsum('bkrhw,ker->bkehw', rows[:, :, :1], s6.dt_projs_weight)
    y = cross_selective_scan(x.permute(0, 3, 1, 2), delta, -s6.A_logs.exp().reshape(4, 16, 1), rows[:, :, 1:2],
                             rows[:, :, 2:3], s6.Ds.reshape(4, 16), s6.dt_projs_bias, True)
    torch.testing.assert_close(s6(x), y.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
