"""Vim as a timm family: timm's interface, and the numbers of Vim's own code."""
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm_suite import TimmModelTests, cached
from torch import nn

from vim2.models import Vim
from vim2.models.vim import RMSNorm, VimBlock, checkpoint_filter_fn, resample_position_embedding

SUFFIX = '_bimambav2_final_pool_mean_abs_pos_embed_with_mid'
PARAMETERS = {
    'vim_tiny_patch16_224': 7148008, 'vim_tiny_patch16_stride8_224': 7250344, 'vim_small_patch16_224': 25796584,
    'vim_small_patch16_stride8_224': 26001256, 'vim_base_patch16_224': 97598440}


class TestVim(TimmModelTests):
    name = 'test_vim'
    sizes = ((16, 16), (32, 48), (96, 64), (64, 208))
    reductions = (16, 16, 16)

    def test_fx_feature_extraction(self, model):
        """Of the block's outputs, which are a hidden state and a residual, the traced sums are equal."""
        extractor = timm.models.create_feature_extractor(model, return_nodes=['norm'])
        x = self.images(model)
        with torch.no_grad():
            self.close(extractor(x)['norm'], model.forward_features(x))

    def test_prune_intermediate_layers(self, model):
        model = timm.create_model(self.name).eval()
        x = self.images(model)
        with torch.no_grad():
            before = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
            assert model.prune_intermediate_layers([0, 1]) == [0, 1]
            after = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(before, after))
            assert len(model.blocks) == len(model.feature_info) == 2 and isinstance(model.head, nn.Identity)
            model.reset_classifier(5, 'token')
            assert model(x).shape == (2, 5)
            model.prune_intermediate_layers([0], prune_norm=True, prune_head=False)
            assert isinstance(model.norm, nn.Identity) and model(x).shape == (2, 5)


def test_registered():
    assert timm.list_models(module='vim') == sorted([*PARAMETERS, 'test_vim'])


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.default_cfg['license'] == 'apache-2.0' and model.default_cfg['crop_pct'] == 0.875


@pytest.mark.parametrize('name', PARAMETERS)
def test_keys_and_shapes_of_the_published_weights(name, shared_data):
    models = json.loads((shared_data('peers') / 'vim_configs.json').read_text())['models']
    config = next(v for k, v in models.items() if k.startswith(name + SUFFIX))
    assert config['parameters'] == PARAMETERS[name]
    model = timm.create_model(name, device='meta')
    assert list(model.grid_size) == config['grid']
    given = {k: torch.empty(shape, device='meta') for k, shape in config['state_dict']}
    converted = checkpoint_filter_fn(given, model)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}


# --- numbers of Vim's own code --------------------------------------------------------------------------------------

def peer(folder):
    """Vim's tensors, and our model with its weights."""
    tensors = load_file(folder / 'vim.safetensors')
    model = Vim(num_classes=10, img_size=64, embed_dim=32, depth=4).eval()
    weights = {k.removeprefix('state_dict.'): v for k, v in tensors.items() if k.startswith('state_dict.')}
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    return tensors, model


def values(model, x):
    """Every tensor that is stored."""
    results = {'patch_embed': model.patch_embed(x).flatten(2).transpose(1, 2)}
    hidden, residual = model._start(model._tokens(x)[0])
    for i, block in enumerate(model.blocks):
        hidden, residual = block(hidden, residual)
        if i == 0:
            results.update(hidden_first=hidden, residual_first=residual)
    results.update(hidden_last=hidden, residual_last=residual, tokens_last=hidden + residual)
    results['tokens_normed'] = model.norm(hidden + residual)
    results['features'] = model.pool(results['tokens_normed'])
    results['logits'] = model.forward_head(results['tokens_normed'])
    return results


def differences(results, tensors):
    """Relative to the largest value of each."""
    t = {k: v[:len(results['logits'])] for k, v in tensors.items() if not k.startswith('state_dict.') and k != 'input'}
    assert results.keys() == t.keys()
    return {k: ((v - t[k]).abs().max() / t[k].abs().max()).item() for k, v in results.items()}


@pytest.mark.parametrize('backend', ['cpu', 'reference'])
def test_numbers_of_vim(backend, shared_data, monkeypatch):
    monkeypatch.setenv('VIM2_SCAN_BACKEND', backend)
    tensors, model = peer(shared_data('peers'))
    with torch.no_grad():
        found = differences(values(model, tensors['input']), tensors)
        assert max(found.values()) < 1e-5, found
        assert (model(tensors['input']) - tensors['logits']).abs().max() < 1e-5 * tensors['logits'].abs().max()


def test_numbers_of_vim_compiled(shared_data):
    tensors, model = peer(shared_data('peers'))
    torch._dynamo.reset()
    with torch.no_grad():
        found = differences(torch.compile(values, fullgraph=True)(model, tensors['input']), tensors)
    assert max(found.values()) < 1e-4, found


def test_numbers_of_vim_in_tritons_interpreter(shared_data, root):
    pytest.importorskip('triton')
    code = f'''
import sys, torch
sys.path.insert(0, 'tests')
import interpreted
from pathlib import Path
from test_vim import differences, peer, values
tensors, model = peer(Path({str(shared_data("peers"))!r}))
with torch.no_grad():
    print(max(differences(values(model, tensors['input'][:1]), tensors).values()))
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=root, text=True, capture_output=True, env={
        **os.environ, 'TRITON_INTERPRET': '1', 'VIM2_SCAN_BACKEND': 'triton', 'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(root)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1e-4


# --- the same on small data that ships ------------------------------------------------------------------------------

def test_block_is_what_its_formula_says(monkeypatch):
    """Beside plain arithmetic in float64: flip, convolve causally, scan, gate, flip back, and average."""
    monkeypatch.setenv('VIM2_SCAN_BACKEND', 'reference')
    torch.manual_seed(0)
    block = VimBlock(12, d_state=3).double()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
        hidden, residual = torch.randn(2, 2, 7, 12, dtype=torch.float64)
        tokens = hidden + residual
        normed = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
        m = block.mixer
        E, N, R = 24, 3, 1
        x, z = normed @ m.in_proj.weight.T, normed @ m.gate_proj.weight.T
        total = 0
        for k in range(2):
            u = x.flip(1) if k else x
            u = nn.functional.pad(u, (0, 0, 3, 0))
            conv = m.conv1d[k]
            u = sum(u[:, i:i + 7] * conv.weight[:, 0, i] for i in range(4)) + conv.bias
            u = u * torch.sigmoid(u)
            rows = u @ m.s6.x_proj_weight[k].T
            dt = nn.functional.softplus(rows[..., :R] @ m.s6.dt_projs_weight[k].T + m.s6.dt_projs_bias[k])
            A, state, ys = -m.s6.A_logs[k * E:(k + 1) * E].exp(), torch.zeros(2, E, N, dtype=torch.float64), []
            for t in range(7):
                state = torch.exp(dt[:, t, :, None] * A) * state \
                    + (dt[:, t] * u[:, t])[..., None] * rows[:, t, None, R:R + N]
                ys.append((state * rows[:, t, None, R + N:]).sum(-1) + m.s6.Ds[k * E:(k + 1) * E] * u[:, t])
            y = torch.stack(ys, 1) * (z.flip(1) if k else z) * torch.sigmoid(z.flip(1) if k else z)
            total = total + (y.flip(1) if k else y)
        out, carried = block(hidden, residual)
    torch.testing.assert_close(carried, tokens)
    torch.testing.assert_close(out, (total / 2) @ m.out_proj.weight.T, rtol=1e-5, atol=1e-6)


def published_names(state_dict):
    """The model's weights as Vim names them: what `rename_vim` reverses."""
    out = {}
    for key, value in state_dict.items():
        prefix, _, rest = key.replace('blocks.', 'layers.').partition('.mixer.')
        if not rest:
            out[key.replace('blocks.', 'layers.').replace('norm.', 'norm_f.')
                if key.startswith('norm.') else key.replace('blocks.', 'layers.')] = value
            continue
        prefix += '.mixer.'
        if rest == 'in_proj.weight':
            out[prefix + rest] = torch.cat([value, state_dict[key.replace('in_proj', 'gate_proj')]])
        elif rest.startswith('conv1d.'):
            _, direction, name = rest.split('.')
            out[f'{prefix}conv1d{"_b" if direction == "1" else ""}.{name}'] = value
        elif rest.startswith('s6.'):
            first, second = {'x_proj_weight': ('x_proj.weight', 'x_proj_b.weight'), 'A_logs': ('A_log', 'A_b_log'),
                             'dt_projs_weight': ('dt_proj.weight', 'dt_proj_b.weight'), 'Ds': ('D', 'D_b'),
                             'dt_projs_bias': ('dt_proj.bias', 'dt_proj_b.bias')}[rest[3:]]
            out[prefix + first], out[prefix + second] = (v.reshape(value.shape[1:] if rest[3:] not in ('A_logs', 'Ds')
                                                                   else v.shape) for v in value.chunk(2))
        elif rest == 'out_proj.weight':
            out[prefix + rest] = value
        else:
            assert rest == 'gate_proj.weight', rest
    return out


def test_published_names():
    model = cached('test_vim')
    published = published_names(model.state_dict())
    assert {'layers.0.mixer.A_b_log', 'layers.2.norm.weight', 'norm_f.weight', 'layers.1.mixer.conv1d_b.bias'} <= \
        published.keys()
    for state in (published, model.state_dict()):
        weights = checkpoint_filter_fn(dict(state), model)
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_position_embedding_keeps_the_class_token_where_it_stands():
    torch.manual_seed(0)
    old = torch.randn(1, 17, 5)
    assert resample_position_embedding(old, (4, 4), (4, 4)) is old
    new = resample_position_embedding(old, (4, 4), (3, 6))
    assert new.shape == (1, 19, 5) and torch.equal(new[:, 9], old[:, 8])
    grid = torch.cat([old[:, :8], old[:, 9:]], 1).reshape(1, 4, 4, 5).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, (3, 6), mode='bicubic', antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(torch.cat([new[:, :9], new[:, 10:]], 1), grid)
    flat = resample_position_embedding(torch.ones(1, 17, 5), (4, 4), (7, 9))
    torch.testing.assert_close(flat, torch.ones(1, 64, 5))


def test_class_token_is_in_the_middle():
    model = cached('test_vim')
    with torch.no_grad():
        tokens, height, width = model._tokens(torch.randn(2, 3, 48, 80))
        assert (height, width) == (3, 5) and tokens.shape == (2, 16, 16)
        position = resample_position_embedding(model.pos_embed, model.grid_size, (3, 5))
        torch.testing.assert_close(tokens[:, 7], (model.cls_token[:, 0] + position[:, 7]).expand(2, -1))
        x = torch.randn(2, 3, 64, 64)
        features = model.forward_features(x)
        assert torch.equal(model.pool(features), features[:, 8])
        maps = model.forward_intermediates(x, norm=True, return_prefix_tokens=True, intermediates_only=True)
        patches = torch.cat([features[:, :8], features[:, 9:]], 1)
        assert torch.equal(maps[-1][0].flatten(2).transpose(1, 2), patches)
        assert torch.equal(maps[-1][1], features[:, 8:9])
        sequence = model.forward_intermediates(x, indices=1, norm=True, output_fmt='NLC', intermediates_only=True)[0]
        assert torch.equal(sequence, patches)
        mean = timm.create_model('test_vim', global_pool='avg').eval()
        mean.load_state_dict(model.state_dict())
        torch.testing.assert_close(mean.forward_head(features, pre_logits=True), patches.mean(1))


def test_overlapping_patches():
    model = timm.create_model('test_vim', stride=8).eval()
    assert model.grid_size == (7, 7) and model.pos_embed.shape == (1, 50, 16)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 72, 40)).shape == (1, 1000)
        assert model.forward_intermediates(torch.randn(1, 3, 72, 40))[1][0].shape == (1, 16, 8, 4)


def test_sizes_that_are_no_multiple_of_the_stride():
    for size, side in (((40, 64), 'height'), ((64, 56), 'width')):
        with pytest.raises(AssertionError, match=f'the {side} of images must be a multiple of the stride'):
            cached('test_vim')(torch.randn(1, 3, *size))


def test_position_embedding_of_a_checkpoint_is_resampled():
    """For a model that is made for another image size; but a checkpoint of other patches is named."""
    weights = published_names(cached('test_vim').state_dict())
    large = timm.create_model('test_vim', img_size=96)
    loaded = checkpoint_filter_fn(weights, large)['pos_embed']
    assert torch.equal(loaded, resample_position_embedding(cached('test_vim').pos_embed, (4, 4), (6, 6)))
    plus = timm.create_model('vim_tiny_patch16_stride8_224', device='meta')
    plain = published_names(timm.create_model('vim_tiny_patch16_224', device='meta').state_dict())
    with pytest.raises(RuntimeError, match='is no checkpoint of vim_tiny_patch16_stride8_224; it is one of '
                                           'vim_tiny_patch16_224:.*\n.*another shape: pos_embed'):
        checkpoint_filter_fn(plain, plus)


def test_checkpoints_that_do_not_fit():
    model = cached('test_vim')
    weights = published_names(model.state_dict())
    for change, match in (({'layers.0.mixer.gamma': torch.ones(1)}, 'unexpected: layers.0.mixer.gamma'),
                          ({'layers.0.mixer.A_log': torch.ones(2, 2)}, 'another shape: blocks.0.mixer.s6.A_logs'),
                          ({'layers.3.norm.weight': torch.ones(16)}, 'it looks like a Vim of embed_dim 16, depth 4')):
        with pytest.raises(RuntimeError, match=match):
            checkpoint_filter_fn({**weights, **change}, model)
    weights.pop('layers.1.mixer.D_b')
    with pytest.raises(RuntimeError, match='missing: blocks.1.mixer.s6.Ds.*\n.*unexpected: layers.1.mixer.D'):
        checkpoint_filter_fn(weights, model)


def test_residual_is_float32():
    """In low-precision parameters and under autocast, the sums of all blocks stay in float32."""
    model = timm.create_model('test_vim', dtype=torch.bfloat16)
    hidden, residual = model._start(model._tokens(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))[0])
    for block in model.blocks:
        hidden, residual = block(hidden, residual)
        assert residual.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    assert RMSNorm(4).double()(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_constructor_rejects():
    with pytest.raises(ValueError, match='global_pool'):
        timm.create_model('test_vim', global_pool='max')
    with pytest.raises(ValueError, match='global_pool'):
        timm.create_model('test_vim').reset_classifier(3, 'max')
