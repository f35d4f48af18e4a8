"""vim2.compat: the numbers of mamba_ssm's and causal_conv1d's own code, and standing in for them."""
import importlib
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import vim2.compat
from vim2.compat import conv, extensions, norm, scan
from vim2.compat.mamba import Block, BlockV1, InferenceParams, Mamba

BACKENDS = pytest.mark.parametrize('backend', ['cpu', 'reference'])


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def peer(shared_data):
    def read(name):
        path = shared_data('peers') / f'{name}.safetensors'
        with safe_open(path, 'pt') as f:
            return load_file(path), f.metadata()
    return read


# --- numbers of the packages' own code ------------------------------------------------------------------------------

@BACKENDS
@torch.no_grad()
def test_mamba_block(peer, backend, monkeypatch):
    monkeypatch.setenv('VIM2_SCAN_BACKEND', backend)
    t, meta = peer('mamba_block')
    block = Mamba(**json.loads(meta['args']), layer_idx=0)
    block.load_state_dict({k.removeprefix('state_dict.'): v for k, v in t.items() if k.startswith('state_dict.')})
    x = t['input']
    close(block(x), t['output'])
    states = block.allocate_inference_cache(2, 37)
    steps = [block.step(x[:, i:i + 1], *states)[0] for i in range(37)]
    close(torch.cat(steps, 1), t['step_output'])
    close(states[0], t['conv_state_after'])
    close(states[1], t['ssm_state_after'])
    params, length = InferenceParams(max_seqlen=37, max_batch_size=2), int(meta['prefill_length'])
    close(block(x[:, :length], inference_params=params), t['output'][:, :length])
    conv_state, ssm_state = params.key_value_memory_dict[0]
    close(conv_state, t['prefill_conv_state'])
    close(ssm_state, t['prefill_ssm_state'])
    params.seqlen_offset = length
    close(block(x[:, length:length + 1], inference_params=params), t['prefill_next_output'])


@BACKENDS
@pytest.mark.parametrize('function', [scan.mamba_inner_fn, scan.mamba_inner_ref, scan.mamba_inner_fn_no_out_proj])
def test_mamba_inner(peer, function, backend, monkeypatch):
    monkeypatch.setenv('VIM2_SCAN_BACKEND', backend)
    t, _ = peer('mamba_inner')
    names = ['xz', 'conv1d_weight', 'conv1d_bias', 'x_proj_weight', 'delta_proj_weight', 'out_proj_weight', 'A', 'D',
             'delta_bias']
    given = {k: t[k].clone().requires_grad_() for k in names}
    if function is scan.mamba_inner_fn_no_out_proj:
        out_proj = given.pop('out_proj_weight')
        out = F.linear(function(**given).transpose(1, 2), out_proj)
        given['out_proj_weight'] = out_proj
    else:
        out = function(**given, out_proj_bias=None)
    close(out, t['output'])
    out.backward(t['grad_output'])
    for k in names:
        close(given[k].grad, t[f'grad.{k}'], 2e-5)


@pytest.mark.parametrize('case', ['plain', 'silu', 'nobias_silu', 'initial', 'initial_plain', 'short'])
@pytest.mark.parametrize('function', [conv.causal_conv1d_fn, conv.causal_conv1d_ref])
def test_causal_conv1d(peer, function, case):
    t = {k.removeprefix(case + '.'): v for k, v in peer('causal_conv1d')[0].items() if k.startswith(case + '.')}
    given = {k: t[k].clone().requires_grad_() for k in ('x', 'weight', 'bias', 'initial_states') if k in t}
    activation = None if 'plain' in case else 'silu'
    out, final = function(**given, return_final_states=True, activation=activation)
    close(out, t['output'])
    assert torch.equal(final, t['final_states'])
    out.backward(t['grad_output'])
    for k in given:
        close(given[k].grad, t[f'grad.{k}'], 2e-5)
    kept = torch.empty_like(t['final_states'])
    assert function(**given, return_final_states=True, final_states_out=kept, activation=activation)[1] is kept
    assert torch.equal(kept, t['final_states'])


@pytest.mark.parametrize('case', ['update', 'update_long'])
def test_causal_conv1d_update(peer, case):
    t = {k.removeprefix(case + '.'): v for k, v in peer('causal_conv1d')[0].items() if k.startswith(case + '.')}
    for chunks in ([1, 1, 1], [3], [2, 1]):
        state, outputs = t['conv_state'].clone(), []
        for x in t['x'].split(chunks, dim=2):
            flat = x[:, :, 0] if x.shape[2] == 1 else x
            outputs.append(conv.causal_conv1d_update(flat, state, t['weight'], t['bias'], 'silu').reshape(x.shape))
        close(torch.cat(outputs, 2), t['output'])
        assert torch.equal(state, t['conv_state_after'])


@torch.no_grad()
def test_vims_block_is_our_vim(shared_data):
    """`Mamba(bimamba_type='v2', if_divide_out=True)` gives what the first block of Vim's own code gives."""
    t = load_file(shared_data('peers') / 'vim.safetensors')
    block = Mamba(32, bimamba_type='v2', if_divide_out=True)
    prefix = 'state_dict.layers.0.mixer.'
    block.load_state_dict({k.removeprefix(prefix): v for k, v in t.items() if k.startswith(prefix)})
    normed, residual = norm.rms_norm_fn(t['residual_first'], t['state_dict.layers.0.norm.weight'], None, eps=1e-5,
                                        prenorm=True, residual_in_fp32=True)
    close(block(normed), t['hidden_first'])
    assert torch.equal(residual, t['residual_first'])


# --- the same on data of the test -----------------------------------------------------------------------------------

def rand(*shape, scale=1.):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def plain_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False):
    """(B, D, L) step by step, B and C (B, N, L), in float64; and the last state."""
    u, delta, A, B, C = (t.double() for t in (u, delta, A, B, C))
    delta = delta if delta_bias is None else delta + delta_bias.double()[:, None]
    delta = F.softplus(delta) if softplus else delta
    state, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64), []
    for i in range(u.shape[2]):
        state = torch.exp(delta[:, :, i, None] * A) * state + (delta * u)[:, :, i, None] * B[:, None, :, i]
        ys.append((state * C[:, None, :, i]).sum(-1))
    y = torch.stack(ys, 2)
    y = y if D is None else y + D.double()[:, None] * u
    return y if z is None else y * F.silu(z.double()), state


@pytest.mark.parametrize('function', [scan.selective_scan_fn, scan.selective_scan_ref])
def test_selective_scan(function):
    """As mamba_ssm's signature has it: positions, defaults, and None where MambaVision passes it."""
    u, delta, A, B, C = rand(2, 6, 9), rand(2, 6, 9, scale=.5), -rand(6, 3).exp(), rand(2, 3, 9), rand(2, 3, 9)
    D, z, bias = rand(6), rand(2, 6, 9), rand(6)
    close(function(u, delta.abs(), A, B, C), plain_scan(u, delta.abs(), A, B, C)[0].float())
    out, last = function(u, delta, A, B, C, D, z, bias, True, True)
    want, state = plain_scan(u, delta, A, B, C, D, z, bias, True)
    close(out, want.float())
    close(last, state.float())
    assert last.dtype == torch.float32
    close(function(u, delta, A, B, C, D.float(), z=None, delta_bias=bias, delta_softplus=True, return_last_state=None),
          plain_scan(u, delta, A, B, C, D, None, bias, True)[0].float())
    half = function(u.half(), delta.half(), A, B.half(), C.half(), D, z.half(), bias, True)
    assert half.dtype == torch.float16
    with pytest.raises(TypeError, match='complex'):
        function(u, delta, torch.complex(A, A), B, C)


def test_bimamba_is_two_scans():
    torch.manual_seed(0)
    block = Mamba(10, d_state=3, bimamba_type='v1')
    with torch.no_grad():
        block.A_b_log.normal_()
        x = rand(2, 7, 10)
        xz = block.in_proj(x).transpose(1, 2)
        args = [xz, block.conv1d.weight, block.conv1d.bias, block.x_proj.weight, block.dt_proj.weight,
                block.out_proj.weight, None]
        both = dict(D=block.D, delta_bias=block.dt_proj.bias, delta_softplus=True)
        A, A_b = -block.A_log.exp(), -block.A_b_log.exp()
        out = scan.bimamba_inner_fn(*args, A, A_b, None, None, **both)
        close(out, scan.bimamba_inner_ref(*args, A, A_b, None, None, **both))
        close(block(x), out)
        u = conv.causal_conv1d_fn(xz[:, :20], block.conv1d.weight[:, 0], block.conv1d.bias, activation='silu')
        dt, B, C = F.linear(u.transpose(1, 2), block.x_proj.weight).split([1, 3, 3], -1)
        delta, B, C = F.linear(dt, block.dt_proj.weight).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
        rest = dict(D=block.D, delta_bias=block.dt_proj.bias, softplus=True)
        back = plain_scan(*(t.flip(-1) for t in (u, delta)), A_b, B.flip(-1), C.flip(-1), z=xz[:, 20:].flip(-1), **rest)
        y = plain_scan(u, delta, A, B, C, z=xz[:, 20:], **rest)[0] + back[0].flip(-1)
        close(out, F.linear(y.float().transpose(1, 2), block.out_proj.weight))
        falcon = dict(b_rms_weight=rand(3), c_rms_weight=rand(3) + 1, dt_rms_weight=rand(1), b_c_dt_rms_eps=1e-5)
        got = scan.mamba_inner_fn(*args, A, None, None, **both, **falcon)
        norms = [F.rms_norm(t, t.shape[-1:], falcon[f'{n}_rms_weight'], 1e-5) for n, t in (
            ('dt', dt), ('b', B.transpose(1, 2)), ('c', C.transpose(1, 2)))]
        y = plain_scan(u, F.linear(norms[0], block.dt_proj.weight).transpose(1, 2), A, norms[1].transpose(1, 2),
                       norms[2].transpose(1, 2), z=xz[:, 20:], **rest)[0]
        close(got, F.linear(y.float().transpose(1, 2), block.out_proj.weight))


@pytest.mark.parametrize('kwargs', [{}, dict(bimamba_type='v1'), dict(bimamba_type='v2'), dict(bias=True),
                                    dict(bimamba_type='v2', if_devide_out=True, init_layer_scale=0.1),
                                    dict(dt_init='constant', conv_bias=False, expand=1.5)])
def test_mamba_trains(kwargs):
    torch.manual_seed(0)
    block = Mamba(12, d_state=4, **kwargs)
    out = block(rand(2, 9, 12))
    out.square().sum().backward()
    assert out.shape == (2, 9, 12)
    for n, p in block.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, n
    dt = F.softplus(block.dt_proj.bias)
    assert 1e-3 * 0.99 <= dt.min() and dt.max() <= 0.101 and block.A_log._no_weight_decay
    assert torch.equal(block.A_log[0].exp().round(), torch.arange(1., 5.))
    low = Mamba(12, d_state=4, dtype=torch.bfloat16, **kwargs)
    assert low.A_log.dtype == low.D.dtype == torch.float32
    assert low(rand(2, 9, 12).bfloat16()).dtype == torch.bfloat16


def test_mamba_refuses():
    block = Mamba(8, bimamba_type='v2')
    with pytest.raises(NotImplementedError, match='bidirectional'):
        block(rand(1, 3, 8), inference_params=InferenceParams(3, 1))
    with pytest.raises(NotImplementedError, match='bidirectional'):
        block.step(rand(1, 1, 8), *block.allocate_inference_cache(1, 3))
    with pytest.raises(ValueError, match='layer_idx'):
        Mamba(8)(rand(1, 3, 8), inference_params=InferenceParams(3, 1))
    with pytest.raises(ValueError, match='one token'):
        Mamba(8).step(rand(1, 2, 8), *Mamba(8).allocate_inference_cache(1, 3))
    for kwargs in (dict(bimamba_type='v3'), dict(dt_init='zero')):
        with pytest.raises(NotImplementedError):
            Mamba(8, **kwargs)
    with pytest.raises(NotImplementedError, match='seq_idx'):
        conv.causal_conv1d_fn(rand(1, 4, 5), rand(4, 3), seq_idx=torch.zeros(1, 5))
    with pytest.raises(NotImplementedError, match='activation'):
        conv.causal_conv1d_fn(rand(1, 4, 5), rand(4, 3), activation='relu')
    with pytest.raises(NotImplementedError, match='cache_seqlens'):
        conv.causal_conv1d_update(rand(1, 4), rand(1, 4, 2), rand(4, 3), cache_seqlens=torch.zeros(1))
    with pytest.raises(ValueError, match='needs 2'):
        conv.causal_conv1d_update(rand(1, 4), rand(1, 4, 1), rand(4, 3))
    with pytest.raises(NotImplementedError, match='Mamba-2'):
        scan.selective_state_update(rand(1, 2, 3, 4), *[rand(1, 2, 3)] * 2, rand(2, 3, 4), *[rand(1, 1, 4)] * 2)
    with pytest.raises(NotImplementedError, match='rowscale'):
        norm.layer_norm_fn(rand(2, 3), torch.ones(3), None, rowscale=torch.ones(2))


def test_version_one_of_causal_conv1d_has_the_activation_fourth():
    x, weight, bias = rand(2, 4, 6), rand(4, 3), rand(4)
    assert torch.equal(conv.causal_conv1d_fn(x, weight, bias, 'silu'),
                       conv.causal_conv1d_fn(x, weight, bias, activation='silu'))


@pytest.mark.parametrize('rms', [False, True])
def test_norms(rms):
    x, residual, weight, bias = rand(2, 5, 8), rand(2, 5, 8, scale=2.), rand(8), rand(8)
    function = norm.rms_norm_fn if rms else norm.layer_norm_fn
    total = x + residual
    mean = 0 if rms else total.mean(-1, keepdim=True)
    want = (total - mean) / ((total - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    close(function(x, weight, bias, residual, eps=1e-5), want)
    y, summed = function(x, weight, bias, residual=residual, prenorm=True, eps=1e-5)
    assert torch.equal(summed, total)
    low, kept = function(x.half(), weight, bias, prenorm=True, residual_in_fp32=True, eps=1e-5)
    assert low.dtype == torch.float16 and kept.dtype == torch.float32
    assert function(x.half(), weight, bias, prenorm=True, eps=1e-5)[1].dtype == torch.float16
    layer = norm.RMSNorm(8, zero_centered_weight=True)
    close(layer(x), norm.RMSNorm(8)(x))
    torch.manual_seed(0)
    assert (norm.RMSNorm(8, dropout_p=0.5)(torch.ones(4, 8)) == 0).any()


@pytest.mark.parametrize('fused', [False, True])
def test_blocks(fused):
    torch.manual_seed(0)
    for block in (BlockV1(8, Mamba, norm.RMSNorm, fused, residual_in_fp32=True),
                  Block(8, Mamba, lambda d: nn.Linear(d, d), norm.RMSNorm, fused, residual_in_fp32=True)):
        x = rand(2, 5, 8)
        hidden, residual = block(x)
        assert torch.equal(residual, x) or block.mlp is not None
        hidden, residual = block(hidden, residual)
        want = x + block.mixer(block.norm(x))
        if block.mlp is None:
            close(residual, want)
            close(hidden, block.mixer(block.norm(want)))


# --- compiled modules -----------------------------------------------------------------------------------------------

class ScanOflex(torch.autograd.Function):
    """As VMamba calls `selective_scan_cuda_oflex`."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, module):
        ctx.module = module
        out, x, *rest = module.fwd(u, delta, A, B, C, D, delta_bias, True, 1)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        return (*ctx.module.bwd(u, delta, A, B, C, D, delta_bias, dout.contiguous(), x, True, 1)[:7], None)


class ScanMamba(torch.autograd.Function):
    """As mamba_ssm calls `selective_scan_cuda`."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, z, module):
        ctx.module = module
        out, x, out_z = module.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, x, out)
        return out_z, x[:, :, -1, 1::2]

    @staticmethod
    def backward(ctx, dout, dlast):
        u, delta, A, B, C, D, z, delta_bias, x, out = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dbias, dz, out_z = ctx.module.bwd(
            u, delta, A, B, C, D, z, delta_bias, dout, x, out, None, True, True)
        return du, ddelta, dA, dB, dC, dD, dbias, dz, None


@pytest.fixture
def installed():
    vim2.compat.install(quiet=True)
    yield
    vim2.compat.uninstall()


def leaves():
    given = [rand(2, 8, 9), rand(2, 8, 9, scale=.5), -rand(8, 3).exp(), rand(2, 4, 3, 9), rand(2, 4, 3, 9), rand(8),
             rand(8), rand(2, 8, 9)]
    return [t.clone().requires_grad_() for t in given]


@pytest.mark.parametrize('name', ['selective_scan_cuda', 'selective_scan_cuda_core', 'selective_scan_cuda_oflex'])
def test_compiled_modules(installed, name):
    module = importlib.import_module(name)
    u, delta, A, B, C, D, bias, z = expected = leaves()
    gate = name == 'selective_scan_cuda'
    want, last = scan.selective_scan_fn(u, delta, A, B, C, D, z if gate else None, bias, True, True)
    want.sum().backward()
    given = leaves()
    if gate:
        out, state = ScanMamba.apply(*given, module)
        close(state, last)
    else:
        out = ScanOflex.apply(*given[:7], module)
    close(out, want)
    out.sum().backward()
    for a, b in zip(given if gate else given[:7], expected):
        close(a.grad, b.grad)
    half = [t.detach().half() if t.ndim > 2 else t.detach() for t in given]
    if name == 'selective_scan_cuda_oflex':
        assert module.fwd(*half[:7], True, 1, True)[0].dtype == torch.float32
        assert module.fwd(*half[:7], True, 1, False)[0].dtype == torch.float16
        u, delta, A, B, C, D, bias = half[:7]
        assert module.bwd(u, delta, A, B, C, D, bias, torch.ones(2, 8, 9), None, True, 1)[0].dtype == torch.float16
    assert not extensions._states(torch.ones(1, 2, 3))[:, :, 0, 1::2].isnan().any()


# --- standing in ----------------------------------------------------------------------------------------------------

def absent(*packages):
    return all(importlib.util.find_spec(p) is None for p in packages)


without_the_packages = pytest.mark.skipif(not absent('mamba_ssm', 'causal_conv1d'),
                                          reason='mamba_ssm or causal_conv1d is installed here')


@without_the_packages
def test_install(capfd):
    names = vim2.compat.install()
    try:
        assert names[:2] == ['mamba_ssm', 'causal_conv1d'] and len(names) == 5
        assert vim2.compat.install() == names
        assert capfd.readouterr().err.count('vim2.compat stands in for mamba_ssm, causal_conv1d, selective_scan_') == 1
        import causal_conv1d
        import mamba_ssm
        from causal_conv1d.causal_conv1d_interface import causal_conv1d_update
        from mamba_ssm.modules.mamba_simple import Mamba as Simple
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.layer_norm import RMSNorm, rms_norm_fn
        from mamba_ssm.ops.triton.layernorm import layer_norm_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.utils.generation import GenerationMixin
        from mamba_ssm.utils.generation import InferenceParams as Params
        from mamba_ssm.utils.hf import load_config_hf
        assert mamba_ssm.Mamba is Simple is Mamba and Params is InferenceParams
        assert selective_scan_fn is mamba_ssm.selective_scan_fn is scan.selective_scan_fn
        assert (RMSNorm, rms_norm_fn, layer_norm_fn) == (norm.RMSNorm, norm.rms_norm_fn, norm.layer_norm_fn)
        assert causal_conv1d.causal_conv1d_fn is conv.causal_conv1d_fn and causal_conv1d_update is \
            conv.causal_conv1d_update and selective_state_update is scan.selective_state_update
        assert mamba_ssm.__version__.endswith('+vim2') and importlib.util.find_spec('mamba_ssm').origin == 'vim2.compat'
        with pytest.raises(NotImplementedError, match='no generation'):
            GenerationMixin().generate()
        with pytest.raises(NotImplementedError, match='language models'):
            load_config_hf('x')
    finally:
        vim2.compat.uninstall()
    assert absent('mamba_ssm', 'causal_conv1d', 'selective_scan_cuda') and 'mamba_ssm' not in sys.modules
    assert vim2.compat._finder not in sys.meta_path


@without_the_packages
@pytest.mark.parametrize('statement,name', [
    ('from mamba_ssm import Mamba2', r'mamba_ssm\.Mamba2 \(Mamba-2 and its SSD are not there\)'),
    ('import mamba_ssm.ops.triton.ssd_combined', r'mamba_ssm\.ops\.triton\.ssd_combined \(Mamba-2'),
    ('from mamba_ssm.ops.triton.layernorm_gated import RMSNorm', r'layernorm_gated \(Mamba-2'),
    ('from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel', r'it has no mamba_ssm\.models'),
    ('from causal_conv1d import causal_conv1d_varlen', r'for causal_conv1d, but it has no causal_conv1d\.causal')])
def test_what_is_not_there(installed, statement, name):
    with pytest.raises(ImportError, match=name):
        exec(statement, {})


@without_the_packages
def test_installed_packages_are_left_alone(tmp_path, monkeypatch, capfd):
    """Unless they are broken, or the user says otherwise."""
    (tmp_path / 'mamba_ssm').mkdir()
    (tmp_path / 'mamba_ssm' / '__init__.py').write_text('from . import inner\nreal = True\n')
    (tmp_path / 'mamba_ssm' / 'inner.py').write_text('')
    (tmp_path / 'causal_conv1d').mkdir()
    (tmp_path / 'causal_conv1d' / '__init__.py').write_text('from . import part\nimport causal_conv1d_cuda_missing\n')
    (tmp_path / 'causal_conv1d' / 'part.py').write_text('')
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    try:
        names = vim2.compat.install()
        assert 'mamba_ssm' not in names and 'causal_conv1d' in names
        assert 'mamba_ssm installed, left alone' in capfd.readouterr().err
        import causal_conv1d
        import mamba_ssm
        assert mamba_ssm.real and causal_conv1d.causal_conv1d_fn is conv.causal_conv1d_fn
        assert 'mamba_ssm' in vim2.compat.install(override=True)
        import mamba_ssm
        assert mamba_ssm.Mamba is Mamba and 'mamba_ssm.inner' not in sys.modules
    finally:
        vim2.compat.uninstall()
        for name in ('mamba_ssm', 'causal_conv1d'):
            vim2.compat._forget(name)


SCRIPT = '''
import argparse, torch
from mamba_ssm import Mamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
import helper

parser = argparse.ArgumentParser()
parser.add_argument('--dim', type=int)
args = parser.parse_args()
torch.manual_seed(0)
model = Mamba(d_model=args.dim, d_state=16, d_conv=4, expand=2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(2, 64, args.dim)
losses = []
for _ in range(3):
    loss = (model(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(helper.NAME, __name__, losses[0] > losses[-1])
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'helper.py').write_text("NAME = 'beside the script'\n")
    return tmp_path / 'script.py'


def run(root, *args, cwd=None):
    return subprocess.run([sys.executable, *map(str, args)], text=True, capture_output=True, cwd=cwd,
                          env={**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})


@without_the_packages
def test_script(script, root, tmp_path):
    """Unmodified; without the stand-ins it does not run."""
    assert "No module named 'mamba_ssm'" in run(root, script, '--dim', 16).stderr
    done = run(root, '-m', 'vim2.compat', script, '--dim', 16)
    assert done.stdout == 'beside the script __main__ True\n', done.stderr
    assert done.stderr.count('vim2.compat stands in for') == 1
    done = run(root, '-m', 'vim2.compat', '-m', 'script', '--dim', 16, cwd=tmp_path)
    assert done.stdout == 'beside the script __main__ True\n', done.stderr


@pytest.mark.parametrize('args,code,message', [
    ([], 2, 'python -m vim2.compat [--override] SCRIPT'), (['--help'], 0, '-m MODULE'), (['-m'], 2, '-m MODULE'),
    (['none.py', '--x'], 2, 'there is no script none.py')])
def test_command_line(monkeypatch, capsys, args, code, message):
    from vim2.compat.__main__ import main
    monkeypatch.setattr(sys, 'argv', ['vim2.compat', *args])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == code and message in capsys.readouterr().err
    assert vim2.compat._finder not in sys.meta_path


def test_import_of_compat_changes_nothing():
    assert isinstance(vim2.compat, types.ModuleType) and vim2.compat._finder not in sys.meta_path
