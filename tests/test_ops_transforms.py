"""Derivatives of every kind, and programs of every kind, through the scan: right numbers on every backend.

The backend under test is the CPU's, in float32; VIM2_TEST_BACKEND names another one. What is right comes from float64:
central differences, or PyTorch's own derivatives of the reference, which is made of PyTorch's operators.
"""
import copy
import os
import warnings

import pytest
import timm
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from vim2.models.tsm2 import TSM2
from vim2.ops import cross_selective_scan, selective_scan
from vim2.ops.low_rank import expand_delta
from vim2.ops.reference import scan_reference

BACKEND = os.environ.get('VIM2_TEST_BACKEND', 'cpu')
DEVICE = os.environ.get('VIM2_TEST_DEVICE', 'cpu')


_generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


def map_tensors(rank=None, height=2, width=3):
    """Float64 x, delta, A, B, C, D, delta_bias, delta_weight."""
    return [random(2, 3, height, width), random(2, 4, rank or 3, height, width), -random(4, 3, 2).abs(),
            random(2, 4, 2, height, width), random(2, 4, 2, height, width), random(4, 3), random(4, 3),
            random(4, 3, rank) if rank else None]


def sequence_tensors(rank=None):
    """Float64 u, delta, A, B, C, D, z, delta_bias, delta_weight; two groups of B, a C that is constant."""
    return [random(2, 4, 5), random(2, rank or 4, 5), -random(4, 2).abs(), random(2, 2, 2, 5), random(4, 2), random(4),
            random(2, 4, 5), random(4), random(4, rank) if rank else None]


def of_map(x, delta, A, B, C, D, bias, weight=None, backend=BACKEND):
    return cross_selective_scan(x, delta, A, B, C, D, bias, True, delta_weight=weight, backend=backend)


def of_sequence(u, delta, A, B, C, D, z, bias, weight=None, backend=BACKEND):
    out, last = selective_scan(u, delta, A, B, C, D, z, bias, True, True, reverse=True, delta_weight=weight,
                               backend=backend)
    return torch.cat([out.flatten(), last.flatten()])


def plain_map(x, delta, A, B, C, D, bias, weight=None):
    return scan_reference(x, expand_delta(delta, weight, x), A, B.unsqueeze(2), C.unsqueeze(2), D, None, bias, True,
                          [0, 1, 2, 3])[0]


def plain_sequence(u, delta, A, B, C, D, z, bias, weight=None):
    delta = expand_delta(delta[:, None, :, None], None if weight is None else weight[None], u.unsqueeze(2))
    C = C[None, None, :, :, None, None].expand(u.shape[0], -1, -1, -1, -1, -1)
    out, last = scan_reference(u.unsqueeze(2), delta, A[None], B[:, None, :, :, None], C, D[None], z.unsqueeze(2),
                               bias[None], True, [2])
    return torch.cat([out.flatten(), last.flatten()])


CASES = {  # name: (scan, the same of PyTorch's operators, inputs)
    'map': (of_map, plain_map, map_tensors()),
    'map, low rank': (of_map, plain_map, map_tensors(rank=2)),
    'sequence': (of_sequence, plain_sequence, sequence_tensors()),
    'sequence, low rank': (of_sequence, plain_sequence, sequence_tensors(rank=2)),
}


SMALL = {'small map': (of_map, plain_map, map_tensors(height=1, width=2))}  # where graphs have nodes for every step


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order_of_tests():
    _generator.manual_seed(1)


@pytest.fixture(params=CASES)
def case(request):
    """(f, exact, inputs, directions): a curved scalar function of all inputs by the backend in float32, the same by
    PyTorch's operators in float64, the inputs, which are float64 for both, and a direction for each."""
    fn, plain, inputs = {**CASES, **SMALL}[request.param]
    inputs = [t for t in inputs if t is not None]
    weight = random(plain(*inputs).numel())

    def f(*tensors):
        out = fn(*(t.to(DEVICE, torch.float32) for t in tensors)).flatten()
        return (out.square() * weight.to(out)).sum()

    def exact(*tensors):
        return (plain(*tensors).flatten().square() * weight).sum()

    return f, exact, inputs, [random(*t.shape) for t in inputs]


def close(actual, expected, tolerance=2e-4, least=0.1):
    actual, expected = (torch.cat([t.detach().double().cpu().flatten() for t in torch.utils._pytree.tree_leaves(x)])
                        for x in (actual, expected))
    assert expected.abs().max() > least  # zeros would not tell right from missing
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < tolerance, error


def central_difference(f, inputs, directions, h=1e-5):
    return (f(*(t + h * d for t, d in zip(inputs, directions))) -
            f(*(t - h * d for t, d in zip(inputs, directions)))) / (2 * h)


def dual(f, inputs, directions):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, inputs, directions))).tangent


def without_grad(f, inputs, directions):
    with torch.no_grad():
        return dual(f, inputs, directions)


@pytest.mark.parametrize('mode', [
    lambda f, x, d: jvp(f, tuple(x), tuple(d))[1], dual, without_grad,
    lambda f, x, d: jacfwd(lambda s: f(*(t + s * v for t, v in zip(x, d))))(torch.tensor(0., dtype=torch.float64))])
def test_forward_mode_against_central_differences(case, mode):
    f, exact, inputs, directions = case
    close(mode(f, inputs, directions), central_difference(exact, inputs, directions))


@pytest.mark.parametrize('case', SMALL, indirect=True)
def test_linearize(case):
    f, exact, inputs, directions = case
    close(linearize(f, *inputs)[1](*directions), central_difference(exact, inputs, directions))


def every_input(n):
    return tuple(range(n))


def hvp_forward_over_reverse(f, x, d):
    return jvp(grad(f, every_input(len(x))), tuple(x), tuple(d))[1]


def hvp_reverse_over_forward(f, x, d):
    return grad(lambda *x: jvp(f, x, tuple(d))[1], every_input(len(x)))(*x)


def gradient_penalty(f, x, d):
    leaves = [t.clone().requires_grad_() for t in x]
    grads = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, d)), leaves)


def forward_over_backward(f, x, d):
    """Plain forward mode through plain autograd."""
    leaves = [t.clone().requires_grad_() for t in x]
    with forward_ad.dual_level():
        grads = torch.autograd.grad(f(*map(forward_ad.make_dual, leaves, d)), leaves, create_graph=True)
        return [forward_ad.unpack_dual(g).tangent for g in grads]


@pytest.mark.parametrize('transform', [
    lambda f, x, d: grad(f, every_input(len(x)))(*x), lambda f, x, d: vjp(f, *x)[1](x[0].new_tensor(2.)),
    lambda f, x, d: jacrev(f, every_input(len(x)))(*x), lambda f, x, d: jacfwd(f, (2, 5))(*x),
    lambda f, x, d: torch.autograd.functional.jacobian(f, tuple(x))])
def test_gradients(case, transform):
    f, exact, inputs, directions = case
    close(transform(f, inputs, directions), transform(exact, inputs, directions))


@pytest.mark.parametrize('transform', [
    hvp_forward_over_reverse, hvp_reverse_over_forward, gradient_penalty, forward_over_backward,
    lambda f, x, d: hessian(f, 2)(*x), lambda f, x, d: jacrev(jacrev(f, 2), 2)(*x),
    lambda f, x, d: jacfwd(jacfwd(f, 2), 2)(*x)])
def test_second_derivatives(case, transform):
    f, exact, inputs, directions = case
    close(transform(f, inputs, directions), transform(exact, inputs, directions))


def test_third_derivative_of_mixed_modes(case):
    f, exact, inputs, _ = case

    def third(f):
        return jacfwd(jacfwd(grad(f)))(torch.tensor(0.1, dtype=torch.float64))

    def along(f):
        return lambda s: f(*(t * (1 + s * 0.1) for t in inputs))
    close(third(along(f)), third(along(exact)), 2e-3)


@pytest.mark.parametrize('output', [0, 1])
def test_one_output_alone(output):
    """The other one has no gradient: not one of zeros either."""
    inputs = sequence_tensors()

    def alone(u, backend, dtype):
        others = [None if t is None else t.to(DEVICE, dtype) for t in inputs[1:8]]
        return selective_scan(u, *others, True, True, backend=backend)[output].square().sum()

    def derivatives(*options):
        u = inputs[0].to(DEVICE, options[1]).requires_grad_()
        first, = torch.autograd.grad(alone(u, *options), u, create_graph=True)
        return first, grad(alone)(u.detach(), *options), torch.autograd.grad(first.square().sum(), u)

    close(derivatives(BACKEND, torch.float32), derivatives('reference', torch.float64))


def test_tangent_that_only_the_gradient_has():
    """Forward mode over a backward whose forward saw no tangent."""
    x, *others = (None if t is None else t.to(DEVICE, torch.float32) for t in map_tensors())
    x.requires_grad_()
    out, v = of_map(x, *others), torch.randn(2, 3, 2, 3, device=DEVICE)
    with forward_ad.dual_level():
        g, = torch.autograd.grad(out, x, forward_ad.make_dual(torch.ones_like(out), v), create_graph=True)
        tangent = forward_ad.unpack_dual(g).tangent
    close(tangent, torch.autograd.grad(of_map(x, *others), x, v)[0])


def test_forward_mode_of_the_kernels():
    """They are operators too, which a lowered program calls by themselves."""
    x, delta, A, B, C, *_ = (None if t is None else t.to(DEVICE, torch.float32) for t in map_tensors())
    given = (x, delta, A, B.unsqueeze(2), C.unsqueeze(2), None, None, None, None)
    options = True, [0, 1, 2, 3]
    t = random(*x.shape).to(x)
    out, _, states = torch.ops.vim2.scan_forward(*given, *options, False, True, BACKEND)

    def forward(x):  # linear in its first input, as the backward is
        return torch.ops.vim2.scan_forward(x, *given[1:], *options, False, True, BACKEND)[0]

    def backward(g):
        return torch.ops.vim2.scan_backward(g, None, *given, states, *options, BACKEND)[:5]

    for f, at in ((forward, x), (backward, out)):
        close(jvp(f, (at,), (t,))[1], f(t))


@pytest.mark.parametrize('case_name', CASES)
def test_gradgradcheck(case_name):
    """The reference as a backend: its first derivatives are an operator's too."""
    fn, _, inputs = CASES[case_name]
    leaves = [t.clone().requires_grad_() for t in inputs if t is not None]

    def f(*tensors):
        return fn(*tensors, *[None] * (len(inputs) - len(tensors)), backend='reference')

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_per_sample_gradients():
    """vmap(grad): the gradients of shared parameters are those of each sample alone."""
    x, delta, *others = (None if t is None else t.to(DEVICE, torch.float32) for t in map_tensors(rank=2))
    B, C = others[1:3]
    shared = [others[0], *others[3:]]

    def loss(shared, x, delta, B, C):
        A, D, bias, weight = shared
        return of_map(x[None], delta[None], A, B[None], C[None], D, bias, weight).square().sum()

    actual = vmap(grad(loss), (None, 0, 0, 0, 0))(shared, x, delta, B, C)
    for i in range(2):
        leaves = [t.clone().requires_grad_() for t in shared]
        expected = torch.autograd.grad(loss(leaves, x[i], delta[i], B[i], C[i]), leaves)
        torch.testing.assert_close([t[i] for t in actual], list(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('in_dims', [(0, None, None), (None, 0, 0), (1, None, -1)])
def test_vmap(in_dims):
    """Over any of the inputs, weights too, along any of their dimensions."""
    x, delta, A, *others = (None if t is None else t.to(DEVICE, torch.float32) for t in map_tensors())
    sizes = [torch.rand(3, device=DEVICE) + 0.5 for _ in in_dims]
    given = [t if d is None else torch.stack([t * s for s in size], d)
             for t, d, size in zip((x, delta, A), in_dims, sizes)]
    actual = vmap(lambda *a: of_map(*a, *others), in_dims)(*given)
    for i in range(3):
        each = [t if d is None else t.select(d, i) for t, d in zip(given, in_dims)]
        torch.testing.assert_close(actual[i], of_map(*each, *others), rtol=0, atol=0)


def test_functionalize(case):
    f, _, inputs, _ = case
    close(functionalize(f)(*inputs), f(*inputs), 1e-4)
    close(functionalize(grad(f))(*inputs), grad(f)(*inputs))


@pytest.mark.parametrize('case', SMALL, indirect=True)
@pytest.mark.parametrize('transform', [
    lambda f, x, d: grad(f, every_input(len(x)))(*x), lambda f, x, d: jvp(f, tuple(x), tuple(d))[1], dual,
    hvp_forward_over_reverse,  # forward mode twice fails there with PyTorch's own operators too
    lambda f, x, d: vmap(lambda s: grad(f)(x[0] * s, *x[1:]))(torch.ones(2, dtype=torch.float64))])
def test_transforms_within_compiled_programs(case, transform):
    f, exact, given, directions = case
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: transform(f, a[:len(given)], a[len(given):]), fullgraph=True,
                             backend='aot_eager')
    close(compiled(*given, *directions), transform(exact, given, directions))


# --------------------------------------------------------------------------------------------------------- programs

class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=['map', 'sequence, low rank'])
def program(request):
    """A module of one scan of its first input, that input, and the result. float32."""
    fn, _, inputs = CASES[request.param]
    x, *others = (None if t is None else t.to(DEVICE, torch.float32) for t in inputs)

    count = len(others)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, t in enumerate(others):
                self.register_buffer(f'input{i + 1}', t)

        def forward(self, x):
            return fn(x, *(getattr(self, f'input{i + 1}') for i in range(count)))

    return Module(), x, fn(x, *others)


def test_graphs_hold_the_operator(program):
    """One node a scan, differentiable where graphs are, in every way that there is."""
    module, x, expected = program
    gradient, = torch.autograd.grad(module(x.requires_grad_()).square().sum(), x)
    tangent = jvp(module, (x.detach(),), (x.detach(),))[1]
    trained = [make_fx(module, pre_dispatch=True)(x.detach()),
               torch.export.export(module, (x,), strict=False).module(),
               torch.export.export(module, (x.detach(),), strict=True).module()]
    for graph in trained:
        assert graph.code.count('torch.ops.vim2.scan.default') == 1 and 'scan_forward' not in graph.code
        torch.testing.assert_close(graph(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(graph(x).square().sum(), x)[0], gradient)
        torch.testing.assert_close(jvp(graph, (x.detach(),), (x.detach(),))[1], tangent)
    lowered = torch.export.export(module, (x,)).run_decompositions().module()
    for graph in (make_fx(module)(x.detach()), lowered):
        assert graph.code.count('torch.ops.vim2.scan_forward.default') == 1
        torch.testing.assert_close(graph(x.detach()), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_trace(program):
    """With its default arguments, in grad mode: PyTorch's own check compares a second trace, made without."""
    module, x, expected = program
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)  # the shape checks read sizes
        traced = torch.jit.trace(module, x.requires_grad_())
    assert str(traced.graph).count('vim2::scan(') == 1
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(traced(x).square().sum(), x),
                               torch.autograd.grad(module(x).square().sum(), x))


def test_modes_and_profilers_see_the_operators(program):
    module, x, expected = program
    for context in (torch.enable_grad, torch.no_grad):
        with context(), Seen() as seen:
            assert torch.equal(module(x), expected)
        assert seen.names.count('vim2::scan_forward') == 1
        with context(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            module(x)
        assert {'vim2::scan', 'vim2::scan_forward'} <= {event.key for event in profile.key_averages()}


def test_inference_mode(program):
    module, x, expected = program
    with torch.inference_mode():
        out = module(x)
        assert torch.equal(out, expected) and out.is_inference()
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = module(mode.from_tensor(x))
    assert fake.shape == expected.shape and fake.stride() == expected.stride()


def test_tensors_that_are_more_than_memory(program):
    """Subclasses, and views that are to be negated when they are read."""
    module, x, expected = program

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

        def __init__(self, inner):
            self.inner = inner

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*[a.inner if isinstance(a, cls) else a for a in args], **(kwargs or {}))

    assert torch.equal(module(Wrapped(x)), expected)
    imaginary = torch.view_as_real(torch.empty(x.shape, dtype=torch.complex64, device=DEVICE))
    imaginary[..., 1] = -x
    negative = torch.view_as_complex(imaginary).conj().imag
    assert negative.is_neg() and torch.equal(negative, x) and torch.equal(module(negative), expected)


def test_checkpointing(program):
    """It computes again what is saved when the backward reads it, and lets it be read once."""
    module, x, _ = program
    x.requires_grad_()
    expected, = torch.autograd.grad(module(x).square().sum(), x)
    loss = torch.utils.checkpoint.checkpoint(lambda: module(x).square().sum(), use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_states_are_saved_only_for_gradients(program):
    """Nor are zeros made for their gradient, which nobody has."""
    module, x, _ = program
    for leaf, context, states in ((x, torch.enable_grad, False), (x.clone().requires_grad_(), torch.no_grad, False),
                                  (x.clone().requires_grad_(), torch.enable_grad, True)):
        sizes = []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if func is torch.ops.vim2.scan_forward.default:
                    sizes.append(out[2].numel())  # noqa: B023
                return out
        with context(), Sizes():
            out = module(leaf)
        assert len(sizes) == 1 and (sizes[0] > 0) == states
    node = out.grad_fn
    while 'scan_forward' not in node.name():
        node = node.next_functions[0][0]
    received = []
    node.register_prehook(received.append)
    out.sum().backward()
    assert received[0][0] is not None and received[0][2] is None


def test_environment_in_compiled_graphs(monkeypatch, tmp_path):
    """It is read when a graph is made, and is part of it: no cache gives the graph of another choice."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    leaves = [t.to(DEVICE, torch.float32).requires_grad_() for t in CASES['map'][2] if t is not None]

    def run(fn):
        out = fn(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    by_name = {name: run(lambda *a, name=name: of_map(*a, backend=name)) for name in ('reference', BACKEND)}
    assert not torch.equal(*(outs[0] for outs in by_name.values()))  # the last bits
    for name in ('reference', BACKEND, 'reference'):
        monkeypatch.setenv('VIM2_SCAN_BACKEND', name)
        torch._dynamo.reset()  # as in a new process
        actual = run(torch.compile(lambda *a: of_map(*a, backend=None), fullgraph=True))
        assert torch.equal(actual[0], by_name[name][0])
        torch.testing.assert_close(actual, by_name[name], rtol=1e-4, atol=1e-4)
    monkeypatch.setenv('VIM2_SCAN_BACKEND', 'fast')
    torch._dynamo.reset()
    with pytest.raises(Exception, match='VIM2_SCAN_BACKEND=fast: no such backend'):
        torch.compile(lambda *a: of_map(*a, backend=None), fullgraph=True)(*leaves)


# ----------------------------------------------------------------------------------------------------------- models

def vision_model():
    return timm.create_model('test_vim2', num_classes=3), random(2, 3, 32, 40)


def forecaster():
    # The instance norm's statistics are constants to every derivative, by design, but not to differences.
    model = TSM2(3, lookback=32, horizon=8, patch_len=8, stride=8, d_model=8, depth=1, instance_norm=False)
    torch.nn.init.normal_(model.head.weight, std=0.1)  # it starts at zero, and so would every derivative
    return model, random(2, 32, 3)


@pytest.fixture(params=[vision_model, forecaster])
def model(request):
    """(model, inputs of two samples), both float32."""
    torch.manual_seed(0)
    model, x = request.param()
    return model.eval().to(DEVICE), x.to(DEVICE, torch.float32)


def test_per_sample_gradients_of_a_model(model):
    model, x = model
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).square().sum()

    actual = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        expected = torch.autograd.grad(model(x[i:i + 1]).square().sum(), list(model.parameters()))
        for name, e in zip(parameters, expected):
            assert (actual[name][i] - e).norm() <= 1e-3 * e.norm() + 1e-6, name


@pytest.mark.filterwarnings('ignore:vim2. the scan backend')  # float64 is the reference's
def test_forward_mode_of_a_model_against_central_differences(model):
    model, x = model
    direction = random(*x.shape)
    tangent = jvp(model, (x,), (direction.to(x),))[1]
    exact = copy.deepcopy(model).double()
    x = x.double()
    close(tangent, central_difference(exact, [x], [direction.to(x)]), 1e-4, least=0.01)


@pytest.mark.filterwarnings('ignore:vim2. the scan backend')
def test_gradient_penalty_of_a_model(model):
    """The derivative, along the parameters, of the norm of the gradient by the input."""
    model, x = model
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: random(*p.shape).to(p) for name, p in parameters.items()}

    def penalty(model, x, parameters):
        x = x.detach().requires_grad_()
        out = functional_call(model, parameters, (x,))
        return torch.autograd.grad(out.square().sum(), x, create_graph=True)[0].square().sum()

    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    grads = torch.autograd.grad(penalty(model, x, leaves), list(leaves.values()), allow_unused=True)
    actual = sum((g * d).sum() for g, d in zip(grads, directions.values()) if g is not None)
    exact = copy.deepcopy(model).double()
    expected = central_difference(
        lambda *p: penalty(exact, x.double(), dict(zip(parameters, p))),
        [p.double() for p in parameters.values()], [d.double() for d in directions.values()], h=1e-6)
    close(actual, expected, 1e-3, least=0.01)
