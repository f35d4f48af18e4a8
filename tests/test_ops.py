"""The selective scan: every backend against a float64 reference, forward and all gradients.

The backend under test is the CPU's; VIM2_TEST_BACKEND names another one (tests/test_ops_triton.py does).
"""
import functools
import itertools
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from vim2.ops import available_backends, backends, cross_selective_scan, selective_scan
from vim2.ops.functional import map_scan, sequence_scan
from vim2.ops.reference import from_scan_order, scan_reference, to_scan_order

BACKEND = os.environ.get('VIM2_TEST_BACKEND', 'cpu')
DEVICE = os.environ.get('VIM2_TEST_DEVICE', 'cpu')
# Triton's interpreter: tests/interpreted.py runs long scans on fewer steps there.
INTERPRETED = BACKEND == 'triton' and DEVICE == 'cpu'
TOLERANCE = 2e-5  # relative RMSE of float32 against float64

only_cpu_backend = pytest.mark.skipif(BACKEND != 'cpu', reason='a property of the CPU backend')


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that nothing has written to holds NaN: PyTorch fills it so under its deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def relative_rmse(a, b):
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30)).item()


def sequence_inputs(batch=2, dim=24, length=63, states=16, groups=1, skip=True, gate=True, bias=True, softplus=True,
                    constant=(), seed=0):
    """Float64 inputs (u, delta, A, B, C, D, z, delta_bias) of realistic sizes: decays from 1 to nearly 0."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shape = (batch, states, length) if groups == 1 else (batch, groups, states, length)
    B, C = (randn(dim, states) if name in constant else randn(*shape) for name in 'BC')
    delta, offset = randn(batch, dim, length), 0.5 * randn(dim)
    return [randn(batch, dim, length), delta - 2 if softplus else 0.2 * delta.abs(),
            -4 * torch.rand(dim, states, generator=g, dtype=torch.float64) - 0.01, B, C,
            randn(dim) if skip else None, randn(batch, dim, length) if gate else None,
            (offset if softplus else offset.abs()) if bias else None]


def map_inputs(batch=2, dim=24, height=5, width=7, states=4, directions=4, seed=0):
    """Float64 inputs (x, delta, A, B, C, D, delta_bias) of the 2-D scan."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [randn(batch, dim, height, width), randn(batch, directions, dim, height, width) - 2,
            -4 * torch.rand(directions, dim, states, generator=g, dtype=torch.float64) - 0.01,
            randn(batch, directions, states, height, width), randn(batch, directions, states, height, width),
            randn(directions, dim), 0.5 * randn(directions, dim)]


def outputs_and_gradients(fn, inputs, dtype, device='cpu', layout=None):
    """Outputs of fn(*inputs) and the gradients of all inputs that are there, for fixed random output gradients."""
    leaves = [None if t is None else t.to(device, dtype).requires_grad_() for t in inputs]
    given = leaves if layout is None else layout(leaves)
    outs = fn(*given)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    seeds = [torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(o) for o in outs]
    grads = torch.autograd.grad(outs, [t for t in leaves if t is not None], seeds)
    return outs + list(grads)


def compare(fn, inputs, dtype=torch.float32, layout=None):
    """fn(*inputs, backend=...) against the float64 reference on the same (rounded) values."""
    inputs = [None if t is None else t.to(dtype).double() for t in inputs]
    actual = outputs_and_gradients(lambda *a: fn(*a, backend=BACKEND), inputs, dtype, DEVICE, layout)
    expected = outputs_and_gradients(lambda *a: fn(*a, backend='reference'), inputs, torch.float64)
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected)):
        assert a.shape == e.shape
        if dtype == torch.float32:
            assert relative_rmse(a, e) <= TOLERANCE, f'output or gradient {i}: {relative_rmse(a, e):.2e}'
        else:
            # mamba-ssm's published tolerances; a gradient that is a sum of many terms is held to its own scale
            rtol, atol = (3e-3, 5e-3) if dtype == torch.float16 else (3e-2, 5e-2)
            scale = max(1.0, e.abs().max().item()) if i else 1.0
            torch.testing.assert_close(a.double().cpu(), e, rtol=rtol, atol=atol * scale)
    return actual


VARIANTS = {  # name: (inputs, keywords)
    'plain': (dict(skip=False, gate=False, bias=False, softplus=False), dict()),
    'all': (dict(), dict(delta_softplus=True)),
    'reverse': (dict(gate=False), dict(delta_softplus=True, reverse=True)),
    'groups': (dict(groups=3, bias=False), dict(delta_softplus=True)),
    'softplus': (dict(skip=False, gate=False, bias=False), dict(delta_softplus=True, reverse=True)),
    'bias': (dict(skip=False, softplus=False), dict()),
}
LENGTHS, STATES = (1, 2, 63, 100, 1000), (1, 3, 4, 16, 64)
CASES = [(length, states, name) for (length, states), name in itertools.product(
    itertools.product(LENGTHS, STATES), VARIANTS)]


@pytest.mark.parametrize('length,states,variant', CASES)
def test_sequence(length, states, variant):
    sizes, keywords = VARIANTS[variant]
    inputs = sequence_inputs(length=length, states=states, dim=24 if not INTERPRETED else 6, **sizes)
    compare(lambda *a, backend: selective_scan(*a, **keywords, return_last_state=True, backend=backend), inputs)


@pytest.mark.parametrize('dim', [1, 2, 15, 16, 17, 33, 100])
def test_sequence_channels(dim):
    compare(lambda *a, backend: selective_scan(*a, delta_softplus=True, backend=backend),
            sequence_inputs(dim=dim, length=37, states=4))


@pytest.mark.parametrize('groups', [2, 20, 40])
def test_sequence_groups(groups):
    """Groups of 20, 2 and 1 channels (interpreted: 4, 2 and 1); B and C with the same and with different numbers of
    groups."""
    dim, groups = (40, groups) if not INTERPRETED else (8, max(2, groups // 5))
    inputs = sequence_inputs(dim=dim, length=35, states=3, groups=groups)
    compare(lambda *a, backend: selective_scan(*a, delta_softplus=True, backend=backend), inputs)
    inputs[4] = sequence_inputs(dim=dim, length=35, states=3, groups=1, seed=1)[4]
    compare(lambda *a, backend: selective_scan(*a, delta_softplus=True, backend=backend), inputs)


@pytest.mark.parametrize('constant', ['B', 'C', 'BC'])
def test_sequence_constant_projections(constant):
    inputs = sequence_inputs(dim=10, length=70 if not INTERPRETED else 33, states=4, constant=constant)
    compare(lambda *a, backend: selective_scan(*a, delta_softplus=True, backend=backend), inputs)


def low_rank(inputs, rank=3):
    """The inputs of a sequence or map with step sizes of low rank: delta's factor in its place, the other one last."""
    g = torch.Generator().manual_seed(5)
    delta = inputs[1]
    axis = 1 if delta.dim() == 3 else 2
    factor = torch.randn(*delta.shape[:axis], rank, *delta.shape[axis + 1:], generator=g, dtype=torch.float64)
    weight = 0.5 * torch.randn(*delta.shape[1:axis + 1], rank, generator=g, dtype=torch.float64)
    return [inputs[0], factor, *inputs[2:], weight]


def scan_low_rank(scan, *inputs, backend):
    """scan with step sizes of low rank; for the reference their product is formed here."""
    *inputs, weight = inputs
    if backend != 'reference':
        return scan(*inputs, delta_softplus=True, delta_weight=weight, backend=backend)
    equation = 'er,brl->bel' if weight.dim() == 2 else 'ker,bkrhw->bkehw'
    inputs[1] = torch.einsum(equation, weight, inputs[1])
    return scan(*inputs, delta_softplus=True, backend=backend)


def _tokens_contiguous(leaves):
    return [t.transpose(1, 2).contiguous().transpose(1, 2) if t is not None and t.dim() == 3 else t for t in leaves]


def _strided(leaves):
    """Every tensor becomes a view with gaps, and of every second element along its last dimension."""
    def spread(t):
        if t is None:
            return None
        big = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float('nan'), dtype=t.dtype, device=t.device)
        big[..., 1:2 * t.shape[-1]:2] = t
        return big[..., 1:2 * t.shape[-1]:2]
    return [spread(t) for t in leaves]


def _wide_rows(leaves):
    """Channels contiguous, but rows much longer than the channels: slices of one larger projection."""
    def embed(t):
        if t is None or t.dim() != 3:
            return t
        big = torch.full((t.shape[0], t.shape[2], 3 * t.shape[1] + 5), float('nan'), dtype=t.dtype, device=t.device)
        big[:, :, 7:7 + t.shape[1]] = t.transpose(1, 2)
        return big[:, :, 7:7 + t.shape[1]].transpose(1, 2)
    return [embed(t) for t in leaves]


@pytest.mark.parametrize('layout', [_tokens_contiguous, _strided, _wide_rows])
@pytest.mark.parametrize('reverse', [False, True])
def test_sequence_strides(layout, reverse):
    compare(lambda *a, backend: selective_scan(*a, delta_softplus=True, reverse=reverse, backend=backend),
            sequence_inputs(dim=35, length=83, states=5), layout=layout)


def test_sequence_expanded():
    """A, D, delta_bias that all channels share, as views: their gradients are sums over the channels."""
    u, delta, A, B, C, D, _, bias = sequence_inputs(dim=20, length=40, states=4)

    def fn(u, delta, A, B, C, D, bias, backend):
        return selective_scan(u, delta, A.expand(20, 4), B, C, D.expand(20), None, bias.expand(20), True,
                              backend=backend)

    compare(fn, [u, delta, A[:1], B, C, D[:1], bias[:1]])


@pytest.mark.parametrize('layout', [None, _tokens_contiguous, _strided])
@pytest.mark.parametrize('rank', [1, 3])
def test_sequence_low_rank(layout, rank):
    compare(functools.partial(scan_low_rank, selective_scan),
            low_rank(sequence_inputs(dim=20, length=70 if not INTERPRETED else 33, states=4), rank), layout=layout)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layout', [None, _tokens_contiguous])
def test_sequence_half(dtype, layout):
    compare(lambda *a, backend: selective_scan(*a, delta_softplus=True, backend=backend),
            sequence_inputs(dim=20, length=67, states=4), dtype, layout)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_map_half(dtype):
    compare(lambda *a, backend: cross_selective_scan(*a, delta_softplus=True, backend=backend),
            map_inputs(dim=18), dtype)


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (2, 2), (5, 7), (8, 8), (13, 6)])
@pytest.mark.parametrize('states', [1, 4, 16])
def test_map(shape, states):
    compare(lambda *a, backend: cross_selective_scan(*a, delta_softplus=True, backend=backend),
            map_inputs(height=shape[0], width=shape[1], states=states, dim=24 if not INTERPRETED else 5))


@pytest.mark.parametrize('directions', [1, 2, 3, 4])
def test_map_directions(directions):
    compare(lambda *a, backend: cross_selective_scan(*a, delta_softplus=True, backend=backend),
            map_inputs(directions=directions, dim=7))


def _channels_last(leaves):
    x, delta, A, B, C, D, bias = leaves
    delta, B, C = (t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for t in (delta, B, C))
    return [x.contiguous(memory_format=torch.channels_last), delta, A, B, C, D, bias]


@pytest.mark.parametrize('layout', [_channels_last, _strided])
def test_map_strides(layout):
    out = compare(lambda *a, backend: cross_selective_scan(*a, delta_softplus=True, backend=backend),
                  map_inputs(dim=40, height=9, width=6), layout=layout)[0]
    if layout is _channels_last:
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('layout', [None, lambda leaves: [*_channels_last(leaves[:-1]), leaves[-1]]])
@pytest.mark.parametrize('directions', [1, 4])
def test_map_low_rank(layout, directions):
    compare(functools.partial(scan_low_rank, cross_selective_scan), low_rank(map_inputs(dim=18, directions=directions)),
            layout=layout)


def test_low_rank_keeps_no_full_step_sizes():
    """What autograd holds between forward and backward has R rows per direction, not E."""
    leaves = [t.to(DEVICE, torch.float32).requires_grad_() for t in low_rank(map_inputs(dim=100, states=1), rank=2)]
    x, delta = leaves[:2]
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = cross_selective_scan(*leaves[:-1], True, delta_weight=leaves[-1], backend=BACKEND)
    given = {t.data_ptr() for t in leaves}
    full = x.numel() * x.element_size() * delta.shape[1]
    assert {t for t in given if t in saved} == given  # the factors and all else that is given
    assert sum(size for address, size in saved.items() if address not in given) < full
    assert out.grad_fn is not None


def test_map_is_the_sum_of_sequences():
    """The 2-D scan is, direction by direction, the 1-D scan of the permuted tokens."""
    x, delta, A, B, C, D, bias = (t.to(DEVICE, torch.float32) for t in map_inputs(height=6, width=4))
    total = torch.zeros_like(x)
    for k in range(4):
        def order(t, k=k):
            return to_scan_order(t, k)
        y = selective_scan(order(x), order(delta[:, k]), A[k], order(B[:, k]), order(C[:, k]), D[k], None, bias[k],
                           True, backend=BACKEND)
        total += from_scan_order(y, k, 6, 4)
    torch.testing.assert_close(cross_selective_scan(x, delta, A, B, C, D, bias, True, backend=BACKEND), total,
                               rtol=1e-4, atol=1e-5)


def test_reference_recurrence():
    """The reference itself, against the recurrence written with scalars."""
    u, delta, A, B, C, D, _, _ = sequence_inputs(batch=1, dim=2, length=4, states=3, softplus=False)
    out, last = selective_scan(u, delta, A, B, C, D, return_last_state=True, backend='reference')
    for d in range(2):
        h = [0.0] * 3
        for t in range(4):
            dt, x = delta[0, d, t].item(), u[0, d, t].item()
            h = [torch.tensor(dt * A[d, n].item()).exp().item() * h[n] + dt * B[0, n, t].item() * x for n in range(3)]
            y = sum(C[0, n, t].item() * h[n] for n in range(3)) + D[d].item() * x
            assert out[0, d, t].item() == pytest.approx(y, rel=1e-6)
        assert last[0, d].tolist() == pytest.approx(h, rel=1e-6)


@pytest.mark.parametrize('variant', ['plain', 'all', 'reverse', 'groups'])
def test_gradcheck(variant):
    sizes, keywords = VARIANTS[variant]
    inputs = sequence_inputs(batch=1, dim=3, length=5, states=2, **sizes)
    present = [t for t in inputs if t is not None]

    def fn(*values):
        values = iter(values)
        return selective_scan(*[None if t is None else next(values) for t in inputs], **keywords,
                              return_last_state=True, backend='reference')

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in present])


def test_gradcheck_constant_projections_and_map():
    inputs = sequence_inputs(batch=2, dim=3, length=4, states=2, gate=False, constant='BC')
    assert torch.autograd.gradcheck(
        lambda *a: selective_scan(*a[:6], delta_bias=a[6], delta_softplus=True, backend='reference'),
        [t.requires_grad_() for t in inputs if t is not None])
    assert torch.autograd.gradcheck(
        lambda *a: cross_selective_scan(*a, delta_softplus=True, backend='reference'),
        [t.requires_grad_() for t in map_inputs(batch=1, dim=2, height=3, width=2, states=2)])


def test_written_out_backward_is_autograd():
    """The reference's adjoint recurrence against autograd through its forward."""
    inputs = [t.requires_grad_() for t in map_inputs(batch=1, dim=3, height=3, width=4)]
    x, delta, A, B, C, D, bias = inputs
    out, _ = scan_reference(x, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, None, bias, True, [0, 1, 2, 3])
    weight = torch.randn_like(out)
    expected = torch.autograd.grad((out * weight).sum(), inputs)
    actual = torch.autograd.grad((cross_selective_scan(*inputs, True, backend='reference') * weight).sum(), inputs)
    torch.testing.assert_close(actual, expected)


def canonical(inputs, weight=None, dtype=torch.float32, requires_grad=True):
    """The nine tensors of torch.ops.vim2.scan for the inputs of a map, and the options up to want_last_state."""
    x, delta, A, B, C, D, bias, weight = (
        None if t is None else t.to(DEVICE, dtype).requires_grad_(requires_grad) for t in (*inputs, weight))
    return x, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, None, bias, weight, True, [0, 1, 2, 3], True


SMALL = map_inputs(batch=1, dim=5, height=3, width=4 if not INTERPRETED else 1, states=2)
OPCHECKED = [(SMALL, None), (low_rank(SMALL)[:-1], low_rank(SMALL)[-1])]


@pytest.mark.parametrize('backend', ['reference', BACKEND])
def test_opcheck(backend):
    for inputs, weight in OPCHECKED:
        torch.library.opcheck(torch.ops.vim2.scan.default, (*canonical(inputs, weight), backend))
        torch.library.opcheck(torch.ops.vim2.scan_forward.default, (*canonical(inputs, weight), True, backend))
    u, delta, A, B, C, D, z, bias = (t.to(DEVICE, torch.float32).requires_grad_()
                                     for t in sequence_inputs(batch=1, dim=5, length=6, states=2))
    torch.library.opcheck(torch.ops.vim2.scan.default, (
        u.unsqueeze(2), delta[:, None, :, None], A[None], B[:, None, None, :, None], C[:, None, None, :, None], D[None],
        z.unsqueeze(2), bias[None], None, True, [2], False, backend))


@pytest.mark.parametrize('backend', ['reference', BACKEND])
def test_opcheck_backward(backend):
    """Few steps: the gradients' gradients, which are checked too, are a graph of as many nodes."""
    inputs = map_inputs(batch=1, dim=2, height=1, width=2, states=1, directions=2)
    for weight in (None, torch.ones(2, 2, 2)):
        args = list(canonical(inputs, weight))
        args[10] = [0, 3]
        with torch.no_grad():
            out, last, states = torch.ops.vim2.scan_forward(*args, True, backend)
        torch.library.opcheck(torch.ops.vim2.scan_backward.default, (
            torch.randn_like(out), torch.randn_like(last), *args[:9], states, *args[9:11], backend))


class _Scan(torch.nn.Module):
    """Both scans in one module, as the layers call them: with step sizes of low rank, and without."""

    def forward(self, x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
                C: torch.Tensor) -> torch.Tensor:
        weight = 0.5 * A[:, :, :2]
        y = map_scan(x, delta[:, :, :2], A, B, C, None, None, True, delta_weight=weight)
        y = map_scan(y, delta, A, B, C, None, None, True)
        z, _ = sequence_scan(y.flatten(2), delta[:, 0].flatten(2), A[0], B[:, 0].flatten(2), C[:, 0].flatten(2),
                             None, None, None, True, False, True)
        z, _ = sequence_scan(z, delta[:, 0, :2].flatten(2), A[0], B[:, 0].flatten(2), C[:, 0].flatten(2),
                             None, None, None, True, delta_weight=weight[0])
        return z


@pytest.fixture
def tensors(monkeypatch):
    monkeypatch.setenv('VIM2_SCAN_BACKEND', BACKEND)
    return [t.to(DEVICE, torch.float32) for t in map_inputs(dim=6, height=4, width=5)[:5]]


def test_compile(tensors):
    expected = _Scan()(*tensors)
    # the interpreted operator is no other to Inductor than the CPU backend's, whose suite compiles it
    compiled = torch.compile(_Scan(), fullgraph=True, backend='aot_eager' if INTERPRETED else 'inductor')
    torch.testing.assert_close(compiled(*tensors), expected, rtol=0, atol=0)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(_Scan()(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('requires_grad', [False, True])
def test_export_dynamic(tensors, requires_grad):
    """Sizes from 1, also where a gradient will be due, and a program of one chunk of states for maps of many."""
    tensors[0].requires_grad_(requires_grad)
    batch, height, width = (torch.export.Dim(name, min=1, max=64) for name in ('batch', 'height', 'width'))
    dynamic = ({0: batch, 2: height, 3: width}, {0: batch, 3: height, 4: width}, None,
               {0: batch, 3: height, 4: width}, {0: batch, 3: height, 4: width})
    program = torch.export.export(_Scan(), tuple(tensors), dynamic_shapes=dynamic)
    for batch, height, width in ((3, 7, 3), (1, 1, 1)):
        other = [t.to(DEVICE, torch.float32) for t in map_inputs(batch, 6, height, width)[:5]]
        torch.testing.assert_close(program.module()(*other), _Scan()(*other), rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_torchscript(tensors):
    expected = _Scan()(*tensors)
    scripted = torch.jit.script(_Scan())
    torch.testing.assert_close(scripted(*tensors), expected, rtol=0, atol=0)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(_Scan()(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(scripted(*leaves).square().sum(), leaves)  # sums over the uses of a leaf, in any order
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_fx(tensors):
    graph = torch.fx.symbolic_trace(_Scan())
    torch.testing.assert_close(graph(*tensors), _Scan()(*tensors), rtol=0, atol=0)


def test_meta():
    inputs = [t.to('meta', torch.bfloat16) for t in map_inputs(dim=6)]
    out = cross_selective_scan(*inputs)
    assert out.shape == (2, 6, 5, 7) and out.device.type == 'meta' and out.dtype == torch.bfloat16


def test_autocast_low_rank():
    """The product of the factors has delta's dtype, as a projection under autocast would give it, in forward and
    backward alike."""
    leaves = [t.to(DEVICE, torch.float32) for t in low_rank(map_inputs(dim=6))]
    leaves[1] = leaves[1].bfloat16()
    leaves = [t.requires_grad_() for t in leaves]
    *inputs, weight = leaves
    full = torch.einsum('ker,bkrhw->bkehw', weight.bfloat16(), inputs[1])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = cross_selective_scan(*inputs, True, delta_weight=weight, backend=BACKEND)
        expected = cross_selective_scan(inputs[0], full, *inputs[2:], True, backend=BACKEND)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)  # the product may be summed in another order
    seed = torch.randn_like(out)
    for leaf, a, b in zip(leaves, torch.autograd.grad(out, leaves, seed), torch.autograd.grad(expected, leaves, seed)):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape and relative_rmse(a, b) < 1e-2


def test_autocast(tensors):
    """Autocast leaves the scan's inputs as they are: it takes mixed dtypes, and its arithmetic is float32 anyway."""
    x, delta, A, B, C = tensors
    mixed = (x.bfloat16(), delta, A, B.bfloat16(), C.bfloat16())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = cross_selective_scan(*mixed, delta_softplus=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, cross_selective_scan(*mixed, delta_softplus=True), rtol=0, atol=0)
    expected = cross_selective_scan(*(t.float() for t in mixed), delta_softplus=True)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-2)


def test_extreme_values():
    """Step sizes from 0 to huge: states neither overflow nor turn to NaN, and NaN in is NaN out."""
    u = torch.ones(1, 16, 8, device=DEVICE)
    A = -torch.logspace(-6, 6, 4, device=DEVICE).repeat(16, 1)
    B = C = torch.ones(1, 4, 8, device=DEVICE)
    for value in (-1e4, -100.0, 0.0, 100.0, 1e4):
        args = [t.requires_grad_() for t in (u.clone(), torch.full_like(u, value), A.clone())]
        out = selective_scan(*args, B, C, delta_softplus=True, backend=BACKEND)
        reference = selective_scan(*(t.double() for t in args), B.double(), C.double(), delta_softplus=True,
                                   backend='reference')
        torch.testing.assert_close(out, reference.float(), rtol=1e-5, atol=1e-30)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), args))
    for i in range(5):
        args = [u.clone(), torch.ones_like(u), A.clone(), B.clone(), C.clone()]
        args[i].view(-1)[0] = float('nan')
        assert selective_scan(*args, backend=BACKEND).isnan().any()


@pytest.mark.parametrize('states', [1, 4, 5])
def test_states_that_decay_at_once(states):
    """An A of -inf, in every state of a channel and in one of several: finite, and the gradients too."""
    inputs = sequence_inputs(dim=18, length=20, states=states)
    inputs[2][2], inputs[2][:, 0] = -float('inf'), -float('inf')
    for value in compare(lambda *a, backend: selective_scan(*a, True, True, backend=backend), inputs):
        assert value.isfinite().all()


def test_deterministic():
    inputs = [t.to(DEVICE, torch.float32) for t in map_inputs(batch=3, dim=100, height=9, width=9)]

    def run():
        return outputs_and_gradients(lambda *a: cross_selective_scan(*a, True, backend=BACKEND), inputs, torch.float32,
                                     DEVICE)

    first = run()
    for again in (run(), run()):
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@only_cpu_backend
def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    """Whatever the number of threads, and whether they are OpenMP's or a pool's."""
    from vim2.ops import cpu
    inputs = map_inputs(batch=2, dim=100, height=9, width=9)

    def run():
        return outputs_and_gradients(lambda *a: cross_selective_scan(*a, True, backend='cpu'), inputs, torch.float32)

    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run())
        monkeypatch.setattr(cpu, '_openmp', None)
        results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@only_cpu_backend
def test_concurrent_calls():
    """Scans called from several Python threads at once do not disturb each other."""
    inputs = [t.float() for t in map_inputs(dim=48, height=16, width=16)]
    expected = cross_selective_scan(*inputs, True)
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(cross_selective_scan(*inputs, True), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


MEMORY_SCRIPT = '''
import torch
from vim2.ops import selective_scan
def peak():  # ru_maxrss would start at the parent's peak
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
def make(batch, dim, length, states):
    torch.manual_seed(0)
    u, delta = torch.randn(batch, length, dim).transpose(1, 2), torch.rand(batch, length, dim).transpose(1, 2)
    A, B, C = -torch.rand(dim, states), torch.randn(batch, states, length), torch.randn(batch, states, length)
    return [t.requires_grad_() for t in (u, delta, A, B, C)]
def step(inputs):
    selective_scan(*inputs, delta_softplus=True).sum().backward()
step(make(1, 16, 8, 16))  # compile and warm up first
inputs = make(8, 768, 3136, 16)
size = sum(t.numel() * t.element_size() for t in inputs)
before = peak()
step(inputs)
print((peak() - before + size) / size)
'''


@only_cpu_backend
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='peak memory is read from /proc')
def test_peak_memory():
    """Forward and backward of one large scan take less than 6 times its inputs; (B, D, L, N) would be 8 times."""
    done = subprocess.run([sys.executable, '-c', MEMORY_SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 2 < float(done.stdout) < 6  # the results alone are as large as the inputs


def test_light_import():
    """Importing the package loads no backend, and the automatic choice on a CPU never loads Triton."""
    code = ('import sys, timm\n'  # timm alone may load triton, through torch
            'before = set(sys.modules)\n'
            'import vim2, vim2.ops\n'
            'new = set(sys.modules) - before\n'
            'assert not {"triton", "vim2.ops.cpu", "vim2.ops.triton"} & new, new\n'
            'import torch\n'
            'x = torch.ones(1, 2, 3); b = torch.ones(1, 4, 3)\n'
            'vim2.ops.selective_scan(x, x, -torch.ones(2, 4), b, b)\n'
            'new = set(sys.modules) - before\n'
            'assert "vim2.ops.cpu" in new and not {m for m in new if "triton" in m}, new\n')
    environment = {k: v for k, v in os.environ.items() if k != 'VIM2_SCAN_BACKEND'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


GOOD = dict(sequence_inputs=[t.float() for t in sequence_inputs(dim=6, length=5, states=2)],
            map_inputs=[t.float() for t in map_inputs(dim=6, height=3, width=2, states=2)])


@pytest.mark.parametrize('index,bad,message', [
    (0, lambda t: t[0], r'u must be \(batch, channels, length\), got a tensor of shape \(6, 5\)'),
    (0, lambda t: t[:, :, :0], r'u is empty \(shape \(2, 6, 0\)\)'),
    (0, lambda t: t.int(), r'u must be of a floating dtype, real and not complex, got torch.int32'),
    (0, lambda t: t.to(torch.complex64), r'u must be of a floating dtype, real and not complex, got torch.complex64'),
    (1, lambda t: t[:, :, 1:], r'delta must have shape \(2, 6, 5\), got \(2, 6, 4\)'),
    (1, lambda t: t.to('meta'), r'u is on cpu and delta on meta'),
    (2, lambda t: t[0], r'A must be \(channels, states\)'),
    (2, lambda t: t[1:], r'A must have shape \(6, 2\), got \(5, 2\)'),
    (3, lambda t: t[:, :1], r'B must have shape .*\(2, 2, 5\).*got \(2, 1, 5\)'),
    (3, lambda t: t.unsqueeze(1).expand(-1, 4, -1, -1), r'B has 4 groups, which do not divide the 6 channels'),
    (4, lambda t: t.long(), r'C must be of a floating dtype'),
    (4, lambda t: t.unsqueeze(0).unsqueeze(0), r'C must be \(channels, states\), \(batch, states, length\) or'),
    (5, lambda t: t[:5], r'D must have shape \(6,\), got \(5,\)'),
    (6, lambda t: t[:1], r'z must have shape \(2, 6, 5\), got \(1, 6, 5\)'),
    (7, lambda t: t[:, None], r'delta_bias must have shape \(6,\), got \(6, 1\)'),
    (1, lambda t: t[:, :3], r'delta must have shape \(2, 6, 5\), got \(2, 3, 5\)'),
])
def test_bad_sequence(index, bad, message):
    inputs = list(GOOD['sequence_inputs'])
    inputs[index] = bad(inputs[index])
    with pytest.raises((ValueError, TypeError), match='selective_scan: .*' + message):
        selective_scan(*inputs)


@pytest.mark.parametrize('index,bad,message', [
    (0, lambda t: t[0], r'x must be \(batch, channels, height, width\)'),
    (0, lambda t: t[:, :, :0], r'x is empty'),
    (1, lambda t: t[:, :3], r'delta must have shape \(2, 4, 6, 3, 2\), got \(2, 3, 6, 3, 2\)'),
    (2, lambda t: t[0], r'A must be \(directions, channels, states\)'),
    (2, lambda t: t.repeat(2, 1, 1), r'A has 8 directions; there are at most 4'),
    (3, lambda t: t.int(), r'B must be of a floating dtype'),
    (4, lambda t: t.flatten(3), r'C must have shape \(2, 4, 2, 3, 2\)'),
    (6, lambda t: t[0], r'delta_bias must have shape \(4, 6\)'),
])
def test_bad_map(index, bad, message):
    inputs = list(GOOD['map_inputs'])
    inputs[index] = bad(inputs[index])
    with pytest.raises((ValueError, TypeError), match='cross_selective_scan: .*' + message):
        cross_selective_scan(*inputs)


def test_bad_low_rank():
    *inputs, weight = (t.float() for t in low_rank(sequence_inputs(dim=6, length=5, states=2)))
    with pytest.raises(ValueError, match=r'delta_weight must have shape \(6, 3\), got \(5, 3\)'):
        selective_scan(*inputs, delta_weight=weight[1:])
    with pytest.raises(ValueError, match=r'delta_weight must be \(channels, rank\), got a tensor of shape \(6,\)'):
        selective_scan(*inputs, delta_weight=weight[:, 0])
    *inputs, weight = (t.float() for t in low_rank(map_inputs(dim=6, height=3, width=2, states=2)))
    with pytest.raises(ValueError, match=r'delta must have shape \(2, 4, 2, 3, 2\), got \(2, 4, 3, 3, 2\)'):
        cross_selective_scan(*inputs, delta_weight=weight[:, :, 1:])


def test_backend_by_name(monkeypatch):
    inputs = GOOD['sequence_inputs']
    with pytest.raises(ValueError, match="backend='cuda': no such backend; choose one of cpu, triton, reference"):
        selective_scan(*inputs, backend='cuda')
    monkeypatch.setenv('VIM2_SCAN_BACKEND', 'fast')
    with pytest.raises(ValueError, match='VIM2_SCAN_BACKEND=fast: no such backend'):
        selective_scan(*inputs)
    monkeypatch.delenv('VIM2_SCAN_BACKEND')
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run here: .*float64"):
        selective_scan(*(t.double() for t in inputs), backend='cpu')
    monkeypatch.setattr(backends.load('cpu'), 'missing', lambda tensors: 'nobody built it')
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run here: nobody built it"):
        selective_scan(*inputs, backend='cpu')
    assert available_backends()[-1] == 'reference' and 'cpu' not in available_backends()


def test_environment(monkeypatch):
    """It chooses where no argument does."""
    monkeypatch.delenv('VIM2_SCAN_BACKEND', raising=False)
    inputs = [t.to(DEVICE) for t in GOOD['map_inputs']]
    by_name = {name: cross_selective_scan(*inputs, True, backend=name) for name in ('reference', BACKEND)}
    assert not torch.equal(*by_name.values())  # the last bits
    for name, expected in by_name.items():
        monkeypatch.setenv('VIM2_SCAN_BACKEND', name)
        assert torch.equal(cross_selective_scan(*inputs, True), expected)
        for other, its_own in by_name.items():
            assert torch.equal(cross_selective_scan(*inputs, True, backend=other), its_own)


def test_automatic_choice_falls_back_with_one_warning(monkeypatch):
    monkeypatch.delenv('VIM2_SCAN_BACKEND', raising=False)
    monkeypatch.setattr(backends, '_warned', set())
    inputs = [t.double() for t in GOOD['sequence_inputs']]
    with pytest.warns(RuntimeWarning, match="'cpu' cannot run .*float64.*using the slow 'reference'"):
        out = selective_scan(*inputs)
    assert out.dtype == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        selective_scan(*inputs)


def test_not_differentiable_without_saved_states():
    out, _, _ = torch.ops.vim2.scan_forward(*canonical(GOOD['map_inputs']), False, BACKEND)
    with pytest.raises(RuntimeError, match='save_states=False'):
        out.sum().backward()
