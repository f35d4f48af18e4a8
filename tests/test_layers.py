"""The layers against plain float64 implementations of the paper's equations, written with loops and no code of vim2."""
import re

import pytest
import torch
from torch import nn
from torch.func import jacfwd, jacrev
from torch.nn import functional as F

from vim2.layers import S6, SelectiveChannelMixer, SelectiveTokenMixer, WeightedAverage
from vim2.layers.channel_mixer import ChannelConv
from vim2.layers.grid import average_pool_matrix, interpolate_matrix


def rrmse(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def naive_s6(u, delta, A, B, C, D):
    """u, delta (B, L, E); A (E, N); B, C (B, L, N); D (E,); delta is the step size itself. Returns (B, L, E)."""
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    ys = []
    for t in range(u.shape[1]):
        dt = delta[:, t, :, None]
        h = torch.exp(dt * A) * h + dt * B[:, t, None, :] * u[:, t, :, None]
        ys.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1)


def naive_directional_s6(tokens, p, k):
    """Direction k of an S6 with parameters p, on tokens (B, L, E) in the order of the scan."""
    E, N, R = p['dt_projs_weight'].shape[1], p['A_logs'].shape[1], p['dt_projs_weight'].shape[2]
    dt, B, C = (tokens @ p['x_proj_weight'][k].T).split([R, N, N], -1)
    dt = F.softplus(dt @ p['dt_projs_weight'][k].T + p['dt_projs_bias'][k])
    return naive_s6(tokens, dt, -p['A_logs'][k * E:(k + 1) * E].exp(), B, C, p['Ds'][k * E:(k + 1) * E])


def map_orders(H, W):
    """Positions (row-major) in the order in which each of the four directions visits them."""
    rows = torch.arange(H * W)
    columns = torch.tensor([i * W + j for j in range(W) for i in range(H)])
    return [rows, columns, rows.flip(0), columns.flip(0)]


def scrambled(module, std=0.3):
    """Move every parameter away from its initial value, so that no term is hidden by a zero or a one."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * std * (p.abs().mean() + 0.3))
    return module


def doubled(module):
    return {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}


def assert_same(module, x, naive, tol=2e-5):
    """Output and every gradient of `module` in float32 against `naive(x, parameters)` in float64.

    The gradient of a parameter that all tokens share is a sum whose terms may nearly cancel: its bound is wider.
    """
    p, x64 = doubled(module), x.detach().double().requires_grad_()
    x = x.detach().requires_grad_()
    out, expected = module(x), naive(x64, p)
    assert out.shape == expected.shape
    assert rrmse(out, expected) < tol
    weight = torch.randn_like(expected)
    (out * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    assert rrmse(x.grad, x64.grad) < tol
    for name, parameter in module.named_parameters():
        assert p[name].grad.abs().max() > 0, f'the test does not reach {name}'
        assert rrmse(parameter.grad, p[name].grad) < 50 * tol, name


@pytest.mark.parametrize('size', [1, 2, 3, 6, 7, 8, 13, 14, 56])
@pytest.mark.parametrize('grid', [1, 2, 4, 7])
def test_grid_matrices(size, grid):
    x = torch.randn(2, 3, size, dtype=torch.float64)
    pool, up = average_pool_matrix(x, size, grid), interpolate_matrix(x, grid, size)
    assert pool.shape == (grid, size) and pool.dtype == x.dtype
    assert up.shape == (size, grid) and up.dtype == x.dtype
    torch.testing.assert_close(x @ pool.T, F.adaptive_avg_pool1d(x, grid), rtol=1e-6, atol=1e-6)
    g = torch.randn(2, 3, grid, dtype=torch.float64)
    torch.testing.assert_close(
        g @ up.T, F.interpolate(g, size, mode='linear', align_corners=False), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool.sum(1), torch.ones(grid, dtype=x.dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(up.sum(1), torch.ones(size, dtype=x.dtype), rtol=1e-6, atol=1e-6)
    if size == grid:
        assert torch.equal(pool, torch.eye(size, dtype=x.dtype))
        assert torch.equal(up, torch.eye(size, dtype=x.dtype))


def test_weighted_average_starts_as_a_chain():
    ys = [torch.randn(2, 3, 4, 5) for _ in range(3)]
    assert torch.equal(WeightedAverage(3)(ys), ys[-1])
    assert torch.equal(WeightedAverage(1)(ys[:1]), ys[0])


def test_weighted_average():
    average = scrambled(WeightedAverage(4))
    ys = [torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(4)]
    out = average(ys)
    torch.testing.assert_close(out, sum(w * y for w, y in zip(average.weight, ys)))
    grad = torch.randn_like(out)
    out.backward(grad)
    for i, y in enumerate(ys):
        torch.testing.assert_close(y.grad, average.weight[i].detach() * grad)
        torch.testing.assert_close(average.weight.grad[i], (y.detach() * grad).sum(), rtol=1e-4, atol=1e-4)


def test_weighted_average_keeps_half_precision():
    average = WeightedAverage(3)
    ys = [torch.randn(2, 5, dtype=torch.bfloat16) for _ in range(3)]
    assert average(ys).dtype == torch.bfloat16


def test_weighted_average_allocates_no_stack():
    """Two maps at a time, however many terms there are."""
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    ys = [torch.randn(10, 10) for _ in range(6)]
    with Sizes() as sizes, torch.no_grad():
        WeightedAverage(6)(ys)
    assert sizes.largest == 100


def test_weighted_average_rejects_no_inputs():
    with pytest.raises(ValueError, match='num_inputs'):
        WeightedAverage(0)


@pytest.mark.parametrize('num_scans', [1, 2, 3, 4])
def test_s6_over_a_map(num_scans):
    torch.manual_seed(0)
    s6 = scrambled(S6(12, d_state=3, dt_rank=2, num_scans=num_scans))

    def naive(x, p):
        B, H, W, E = x.shape
        y = torch.zeros_like(x).reshape(B, H * W, E)
        for k, order in enumerate(map_orders(H, W)[:num_scans]):
            y = y.index_add(1, order, naive_directional_s6(x.reshape(B, H * W, E)[:, order], p, k))
        return y.reshape(B, H, W, E)

    assert_same(s6, torch.randn(2, 3, 5, 12), naive)


def test_s6_initialisation():
    torch.manual_seed(0)
    s6 = S6(64, d_state=16, num_scans=4)
    assert s6.dt_rank == 4
    torch.testing.assert_close(s6.A_logs.exp(), torch.arange(1., 17.).expand(256, 16))
    assert torch.equal(s6.Ds, torch.ones(256))
    dt = F.softplus(s6.dt_projs_bias)
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    # Log-uniform: half of the steps below the geometric mean.
    assert abs((dt < 0.01).float().mean() - 0.5) < 0.15
    assert s6.dt_projs_weight.abs().max() <= 0.5
    assert s6.dt_projs_weight.abs().max() > 0.4


@pytest.mark.parametrize('kwargs', [dict(num_scans=5), dict(num_scans=0), dict(num_scans=3, spatial=False)])
def test_s6_rejects_unknown_directions(kwargs):
    with pytest.raises(ValueError, match='num_scans'):
        S6(8, **kwargs)


@pytest.mark.parametrize('size', [(3, 5), (4, 1), (1, 1)])
def test_token_mixer_over_a_map(size):
    torch.manual_seed(0)
    mixer = scrambled(SelectiveTokenMixer(8, expand=1.5, d_state=3, dt_rank=2))

    def naive(x, p):
        B, H, W, _ = x.shape
        branch, gate = x @ p['in_proj.weight'].T, x @ p['gate_proj.weight'].T
        E = branch.shape[-1]
        u = F.conv2d(branch.permute(0, 3, 1, 2), p['conv2d.weight'], p['conv2d.bias'], padding=1, groups=E)
        u = F.silu(u).flatten(2).transpose(1, 2)
        s6 = {n[3:]: v for n, v in p.items() if n.startswith('s6.')}
        y = torch.zeros_like(u)
        for k, order in enumerate(map_orders(H, W)):
            y = y.index_add(1, order, naive_directional_s6(u[:, order], s6, k))
        y = F.layer_norm(y, (E,), p['out_norm.weight'], p['out_norm.bias'])
        return (y.reshape(B, H, W, E) * F.silu(gate)) @ p['out_proj.weight'].T

    x = torch.randn(2, *size, 8)
    if size != (1, 1):
        assert_same(mixer, x, naive)
    else:  # off-centre taps of the convolution and A (there is no second step) get a zero gradient
        assert rrmse(mixer(x), naive(x.double(), doubled(mixer))) < 2e-5


def naive_causal_conv(x, weight, bias):
    """x (B, L, E); weight (E, 1, k): position t reads t - k + 1 to t."""
    k = weight.shape[-1]
    padded = torch.cat([x.new_zeros(x.shape[0], k - 1, x.shape[2]), x], 1)
    return sum(padded[:, i:i + x.shape[1]] * weight[:, 0, i] for i in range(k)) + bias


@pytest.mark.parametrize('num_scans', [1, 2])
@pytest.mark.parametrize('out_norm', [False, True])
def test_token_mixer_over_a_sequence(num_scans, out_norm):
    """One scan without a norm is Mamba's block; the second scan is the first on the flipped sequence."""
    torch.manual_seed(0)
    mixer = scrambled(SelectiveTokenMixer(6, d_state=3, dt_rank=2, ndim=1, num_scans=num_scans, out_norm=out_norm))

    def naive(x, p):
        branch, gate = x @ p['in_proj.weight'].T, x @ p['gate_proj.weight'].T
        s6 = {n[3:]: v for n, v in p.items() if n.startswith('s6.')}
        y = 0
        for k in range(num_scans):
            u = branch.flip(1) if k else branch
            u = F.silu(naive_causal_conv(u, p[f'conv1d.{k}.weight'], p[f'conv1d.{k}.bias']))
            y_k = naive_directional_s6(u, s6, k)
            y = y + (y_k.flip(1) if k else y_k)
        if out_norm:
            y = F.layer_norm(y, (y.shape[-1],), p['out_norm.weight'], p['out_norm.bias'])
        return (y * F.silu(gate)) @ p['out_proj.weight'].T

    assert_same(mixer, torch.randn(2, 9, 6), naive)


@pytest.mark.parametrize('num_scans,causal', [(1, True), (2, False)])
def test_token_mixer_causality(num_scans, causal):
    torch.manual_seed(0)
    mixer = scrambled(SelectiveTokenMixer(6, ndim=1, num_scans=num_scans))
    x = torch.randn(1, 9, 6)
    later = x.clone()
    later[:, 5:] += 1
    same = (mixer(x) == mixer(later)).all(-1)[0]
    assert not same[5:].any()
    assert same[:5].all() if causal else not same[:5].any()


@pytest.mark.parametrize('kwargs,match', [
    (dict(ndim=3), 'ndim'), (dict(d_conv=4), 'odd'), (dict(ndim=1, num_scans=4), 'num_scans')])
def test_token_mixer_rejects(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SelectiveTokenMixer(8, **kwargs)


def naive_channel_mixer(x, p, P, num_scans, pool, up):
    """The paper's channel mixer: x transposed, so that each of its E channels is a step whose features are the tokens.

    pool takes the tokens of a map (..., H * W) to the grid (..., P * P), up takes them back.
    """
    B, H, W, _ = x.shape
    x = x.reshape(B, H * W, -1)
    branch, gate = x @ p['in_proj.weight'].T, x @ p['gate_proj.weight'].T
    steps = branch.transpose(1, 2)  # (B, E, tokens): a sequence of channels
    tokens, (_, N) = H * W, p['A_logs'].shape
    R = p['dt_projs_weight'].shape[2]
    y = 0
    for s in range(num_scans):
        u = steps.flip(1) if s else steps
        weight = p[f'conv1d.{s}.weight'].expand(tokens, 1, -1)
        u = F.silu(naive_causal_conv(u, weight, p[f'conv1d.{s}.bias']))
        dt, b, c = (pool(u) @ p['x_proj_weight'][s].T).split([R, N, N], -1)  # Linears over the tokens
        dt = up(dt @ p['dt_projs_weight'][s].T + p['dt_projs_bias'][s]) + p['dt_projs_diag'][s] * u
        A = -p['A_logs'][s].exp().expand(tokens, N)
        y_s = naive_s6(u, F.softplus(dt), A, b, c, p['Ds'][s].expand(tokens))
        y = y + (y_s.flip(1) if s else y_s)
    y = y.transpose(1, 2)
    y = F.layer_norm(y, (y.shape[-1],), p['out_norm.weight'], p['out_norm.bias'])
    return ((y * F.silu(gate)) @ p['out_proj.weight'].T).reshape(B, H, W, -1)


@pytest.mark.parametrize('num_scans', [1, 2])
def test_channel_mixer_is_the_papers_equation_on_the_grid(num_scans):
    """Where the map has the size of the grid: Linears over all tokens, nothing pooled, nothing interpolated."""
    torch.manual_seed(0)
    mixer = scrambled(SelectiveChannelMixer(6, d_state=3, token_grid=3, dt_rank=2, num_scans=num_scans))
    assert_same(mixer, torch.randn(2, 3, 3, 6),
                lambda x, p: naive_channel_mixer(x, p, 3, num_scans, lambda t: t, lambda t: t))


@pytest.mark.parametrize('size', [(6, 6), (5, 7), (2, 8), (1, 1)])
def test_channel_mixer_on_other_sizes(size):
    torch.manual_seed(0)
    P, (H, W) = 3, size
    mixer = scrambled(SelectiveChannelMixer(6, d_state=3, token_grid=P, dt_rank=2))

    def pool(t):
        return F.adaptive_avg_pool2d(t.unflatten(-1, (H, W)), P).flatten(-2)

    def up(t):
        return F.interpolate(t.unflatten(-1, (P, P)), size, mode='bilinear', align_corners=False).flatten(-2)

    assert_same(mixer, torch.randn(2, H, W, 6), lambda x, p: naive_channel_mixer(x, p, P, 2, pool, up))


def test_channel_mixer_initialisation():
    torch.manual_seed(0)
    mixer = SelectiveChannelMixer(32, token_grid=7)
    assert mixer.dt_rank == 4 and mixer.inner_dim == 64
    torch.testing.assert_close(mixer.A_logs.exp(), torch.arange(1., 17.).expand(2, 16))
    assert torch.equal(mixer.Ds, torch.ones(2))
    dt = F.softplus(mixer.dt_projs_bias)
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert torch.equal(mixer.dt_projs_diag, torch.zeros(2))


def test_channel_mixer_rejects_unknown_directions():
    with pytest.raises(ValueError, match='num_scans'):
        SelectiveChannelMixer(8, num_scans=4)


@pytest.mark.parametrize('build', [
    lambda **dd: SelectiveTokenMixer(8, **dd), lambda **dd: SelectiveTokenMixer(8, ndim=1, num_scans=2, **dd),
    lambda **dd: SelectiveChannelMixer(8, **dd), lambda **dd: S6(8, **dd), lambda **dd: WeightedAverage(2, **dd)])
def test_factory_kwargs(build):
    assert {p.device.type for p in build(device='meta').parameters()} == {'meta'}
    assert {p.dtype for p in build(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize('norm_layer', [nn.LayerNorm, nn.RMSNorm])
def test_norm_layer(norm_layer):
    for mixer in (SelectiveTokenMixer(8, norm_layer=norm_layer), SelectiveChannelMixer(8, norm_layer=norm_layer)):
        assert isinstance(mixer.out_norm, norm_layer)
        assert mixer(torch.randn(1, 4, 4, 8)).shape == (1, 4, 4, 8)


@pytest.mark.parametrize('build', [SelectiveTokenMixer, SelectiveChannelMixer])
def test_gated_norm_is_recomputed(build, monkeypatch):
    """The mixers keep neither the normalised sum of the scans nor the activated gate; gradients stay the same."""
    torch.manual_seed(0)
    mixer, x = build(16), torch.randn(2, 9, 9, 16, requires_grad=True)
    leaves = [x, *mixer.parameters()]

    def run():
        saved = {}

        def pack(t):
            saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = mixer(x)
        held = sum(t.untyped_storage().nbytes() for t in saved.values())
        saved.clear()
        return held, torch.autograd.grad(out.square().sum(), leaves)

    held, grads = run()
    for module in ('token_mixer', 'channel_mixer'):
        monkeypatch.setattr(f'vim2.layers.{module}.recomputed', lambda fn, *args, modules: fn(*args))
    held_without, grads_without = run()
    full = 2 * 9 * 9 * mixer.inner_dim * 4  # bytes of one inner map
    assert held_without - held >= 3 * full  # the normalised map, the activated gate, their product
    for a, b in zip(grads, grads_without):
        torch.testing.assert_close(a, b)


def test_parameters_of_version_0_1_0():
    """One in_proj for branch and gate, one tensor for both directions' convolutions: the same function."""
    from vim2.layers import upgrade_state_dict
    torch.manual_seed(0)
    for kind, kwargs, size in ((SelectiveTokenMixer, {}, (2, 3, 4, 6)), (SelectiveChannelMixer, {}, (2, 3, 4, 6)),
                               (SelectiveTokenMixer, dict(ndim=1, num_scans=2), (2, 5, 6))):
        mixer, x = kind(6, **kwargs), torch.randn(size)
        new = scrambled(mixer).state_dict()
        old = {k: v for k, v in new.items() if 'gate_proj' not in k and 'conv1d' not in k}
        old['in_proj.weight'] = torch.cat([new['in_proj.weight'], new['gate_proj.weight']])
        for name in ('weight', 'bias'):
            convs = [v for k, v in new.items() if re.fullmatch(rf'conv1d\.\d\.{name}', k)]
            if isinstance(mixer, SelectiveChannelMixer):
                old[f'conv_{name}'] = torch.cat(convs)
            else:
                old.update({k: v for k, v in new.items() if k.startswith('conv1d')})
        parent = torch.nn.Sequential(kind(6, **kwargs))
        parent.load_state_dict({f'0.{k}': v for k, v in old.items()})  # strict
        assert torch.equal(parent(x), mixer(x))
        assert upgrade_state_dict(old).keys() == new.keys()
        assert all(upgrade_state_dict(new)[k] is v for k, v in new.items())


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('channels', [9, 2, 1])
def test_channel_conv_is_a_convolution(reverse, channels):
    """Values, every kind of derivative, and the same from graphs; also with fewer channels than taps."""
    torch.manual_seed(0)
    conv = ChannelConv(4, reverse=reverse).double()
    x = torch.randn(2, 5, channels, dtype=torch.float64)

    def convolved(x, weight, bias):
        rows = x.reshape(10, 1, channels)
        y = F.conv1d(F.pad(rows.flip(2) if reverse else rows, (3, 0)), weight, bias)
        return (y.flip(2) if reverse else y).reshape(2, 5, channels)

    def ours(x, weight, bias):
        return torch.func.functional_call(conv, dict(weight=weight, bias=bias), (x,))

    inputs = tuple(t.detach().requires_grad_() for t in (x, conv.weight, conv.bias))
    torch.testing.assert_close(ours(*inputs), convolved(*inputs))
    assert torch.autograd.gradcheck(ours, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, inputs, check_fwd_over_rev=True)
    jacobians = [torch.func.jacrev(f, (0, 1))(*(t.detach() for t in inputs)) for f in (ours, convolved)]
    for a, b in zip(*jacobians):
        torch.testing.assert_close(a, b)
    for twice in (lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacrev(f))):
        a, b = (twice(lambda w, f=f: f(x * w[0, 0, 0], w, w[0, 0, :1]))(conv.weight.detach())
                for f in (ours, convolved))
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.jit.script(conv)(x), convolved(*inputs))
    torch.testing.assert_close(torch.fx.symbolic_trace(conv)(x), convolved(*inputs))


@pytest.mark.parametrize('layer', [
    lambda **dd: SelectiveTokenMixer(6, **dd), lambda **dd: SelectiveChannelMixer(6, token_grid=2, **dd)])
@pytest.mark.parametrize('own', [lambda p: p.requires_grad_(), torch.nn.Parameter])
def test_what_is_computed_again_reads_the_same_parameters(layer, own):
    """torch.func.functional_call puts other parameters in place, and takes them away again before the backward."""
    layer, other = scrambled(layer(dtype=torch.float64)), scrambled(layer(dtype=torch.float64))
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    given = {name: own(p.detach() * 1.3) for name, p in other.named_parameters()}
    other.load_state_dict(given)
    actual = torch.autograd.grad(torch.func.functional_call(layer, given, (x,)).square().sum(), list(given.values()))
    expected = torch.autograd.grad(other(x).square().sum(), list(other.parameters()))
    torch.testing.assert_close(actual, expected)


class LowRank(torch.nn.Module):
    """What adapters such as LoRA put in a Linear's place."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def models_with_linears():
    import timm
    import vim2  # noqa: F401
    from vim2.models.tsm2 import TSM2
    yield timm.create_model('test_vim2', num_classes=5), torch.randn(2, 3, 64, 64)
    yield TSM2(3, lookback=32, horizon=4, patch_len=8, stride=4, d_model=8, depth=2), torch.randn(2, 32, 3)


def linears_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def test_adapters_around_every_linear():
    """Each gets a gradient, changes the output, and can be folded into the weight that it adapts."""
    torch.manual_seed(0)
    for model, x in models_with_linears():
        plain = model.eval()(x)
        names = list(linears_of(model))
        for name in names:
            model.set_submodule(name, LowRank(model.get_submodule(name)))
        adapted = model(x)
        assert (adapted - plain).abs().max() > 1e-3
        adapted.square().sum().backward()
        for name in names:
            adapter = model.get_submodule(name)
            for part in (adapter.down, adapter.up):
                assert part.weight.grad is not None and part.weight.grad.abs().max() > 0, name
            with torch.no_grad():
                adapter.base.weight += adapter.up.weight @ adapter.down.weight
            model.set_submodule(name, adapter.base)
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('training', [False, True])
def test_every_module_is_called(training):
    """Forward hooks fire on every Linear and convolution: what adapters, quantisers and FSDP need."""
    for model, x in models_with_linears():
        seen = set()
        kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)
        expected = {n for n, m in model.named_modules() if isinstance(m, kinds)}
        for name in expected:
            model.get_submodule(name).register_forward_hook(
                lambda m, i, o, name=name, seen=seen: seen.add(name))
        model.train(training)(x)
        assert seen == expected


def test_dynamic_quantization_of_every_linear():
    torch.manual_seed(0)
    for model, x in models_with_linears():
        plain = model.eval()(x)
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        assert not linears_of(small)
        assert rrmse(small(x), plain) < 0.05


def test_int8_weights_of_torchao():
    torchao = pytest.importorskip('torchao.quantization', reason='torchao is not installed')
    torch.manual_seed(0)
    for model, x in models_with_linears():
        plain = model.eval()(x)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        for name, linear in linears_of(model).items():
            assert type(linear.weight) is not torch.nn.Parameter, name
        assert rrmse(model(x), plain) < 0.02
