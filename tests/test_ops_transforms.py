"""Derivatives of every kind, and programs of every kind, through the scan: right numbers on every backend.

The backend under test is the CPU's, in float32; VIM2_TEST_BACKEND names another one. What is right comes from float64:
central differences, or PyTorch's own derivatives of the reference, which is made of PyTorch's operators.
"""
import os

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from vim2.ops import cross_selective_scan, selective_scan
from vim2.ops.low_rank import expand_delta
from vim2.ops.reference import scan_reference

BACKEND = os.environ.get('VIM2_TEST_BACKEND', 'cpu')
DEVICE = os.environ.get('VIM2_TEST_DEVICE', 'cpu')


_generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


def map_inputs(rank=None):
    """Float64 x, delta, A, B, C, D, delta_bias, delta_weight."""
    return [random(2, 3, 2, 3), random(2, 4, rank or 3, 2, 3), -random(4, 3, 2).abs(), random(2, 4, 2, 2, 3),
            random(2, 4, 2, 2, 3), random(4, 3), random(4, 3), random(4, 3, rank) if rank else None]


def sequence_inputs(rank=None):
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
    'map': (of_map, plain_map, map_inputs()),
    'map, low rank': (of_map, plain_map, map_inputs(rank=2)),
    'sequence': (of_sequence, plain_sequence, sequence_inputs()),
    'sequence, low rank': (of_sequence, plain_sequence, sequence_inputs(rank=2)),
}


@pytest.fixture(params=CASES)
def case(request):
    """(f, exact, inputs, directions): a curved scalar function of all inputs by the backend in float32, the same by
    PyTorch's operators in float64, the inputs, which are float64 for both, and a direction for each."""
    fn, plain, inputs = CASES[request.param]
    inputs = [t for t in inputs if t is not None]
    weight = random(plain(*inputs).numel())

    def f(*tensors):
        out = fn(*(t.to(DEVICE, torch.float32) for t in tensors)).flatten()
        return (out.square() * weight.to(out)).sum()

    def exact(*tensors):
        return (plain(*tensors).flatten().square() * weight).sum()

    return f, exact, inputs, [random(*t.shape) for t in inputs]


def close(actual, expected, tolerance=2e-4):
    actual, expected = (torch.cat([t.detach().double().cpu().flatten() for t in torch.utils._pytree.tree_leaves(x)])
                        for x in (actual, expected))
    assert expected.abs().max() > 0.1  # zeros would not tell right from missing
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
    lambda f, x, d: jvp(f, tuple(x), tuple(d))[1], dual, without_grad, lambda f, x, d: linearize(f, *x)[1](*d),
    lambda f, x, d: jacfwd(lambda s: f(*(t + s * v for t, v in zip(x, d))))(torch.tensor(0., dtype=torch.float64))])
def test_forward_mode_against_central_differences(case, mode):
    f, exact, inputs, directions = case
    close(mode(f, inputs, directions), central_difference(exact, inputs, directions))


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


def test_tangent_that_only_the_gradient_has():
    """Forward mode over a backward whose forward saw no tangent."""
    x, *others = (None if t is None else t.to(DEVICE, torch.float32) for t in map_inputs())
    x.requires_grad_()
    out, v = of_map(x, *others), torch.randn(2, 3, 2, 3, device=DEVICE)
    with forward_ad.dual_level():
        g, = torch.autograd.grad(out, x, forward_ad.make_dual(torch.ones_like(out), v), create_graph=True)
        tangent = forward_ad.unpack_dual(g).tangent
    close(tangent, torch.autograd.grad(of_map(x, *others), x, v)[0])


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
    x, delta, *others = (None if t is None else t.to(DEVICE, torch.float32) for t in map_inputs(rank=2))
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
    x, delta, A, *others = (None if t is None else t.to(DEVICE, torch.float32) for t in map_inputs())
    sizes = [torch.rand(3, device=DEVICE) + 0.5 for _ in in_dims]
    given = [t if d is None else torch.stack([t * s for s in size], d)
             for t, d, size in zip((x, delta, A), in_dims, sizes)]
    actual = vmap(lambda *a: of_map(*a, *others), in_dims)(*given)
    for i in range(3):
        each = [t if d is None else t.select(d, i) for t, d in zip(given, in_dims)]
        torch.testing.assert_close(actual[i], of_map(*each, *others), rtol=0, atol=0)


def test_functionalize(case):
    f, _, inputs, _ = case
    close(functionalize(f)(*inputs), f(*inputs), 1e-6)
    close(functionalize(grad(f))(*inputs), grad(f)(*inputs), 1e-5)


@pytest.mark.parametrize('case', ['map'], indirect=True)
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
