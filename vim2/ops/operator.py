"""The selective scan (S6, paper section 3.1) as PyTorch operators, differentiable in every way that PyTorch knows.

    u, z (B, E, H, W)   delta (B, K, E, H, W)   A (K, E, N)   B, C (B, K, G, N, H, W)   D, delta_bias (K, E)

For each of K scan directions (0 row-major, 1 column-major, 2 reversed row-major, 3 reversed column-major), with t in
that direction's order, dt = softplus(delta + delta_bias) and g the group of channel e:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_{g,t} u_t        y_t = <C_{g,t}, h_t> + D u_t        out = silu(z) * sum_k y^(k)

A sequence is a map of height 1. B and C may be constant over the scan: (B, K, G, N, 1, 1). Arithmetic and states are
float32 whatever the inputs' dtypes (float64 if the reference gets float64); out has u's dtype and layout.

Step sizes of low rank R come as two factors, delta (B, K, R, H, W) and delta_weight (K, E, R). Their product is formed
for the forward and again for the backward: what autograd keeps in between is R / E of it.

`vim2::scan` is what programs call and what graphs of torch.export, TorchScript and fx hold. Where gradients are due
it has states saved for them, and it runs `vim2::scan_forward`, the backend's kernel. That one's gradients are
`vim2::scan_backward`, another kernel, whose own gradients are the reference's. Who asks for what:

- autograd, torch.compile: the rules that torch.library.register_autograd gives to the two kernels.
- torch.func's grad, vjp, jacrev and vmap: the same rules, in the form that torch.func takes (`_transformed`).
- forward mode, in any of its guises and at any depth: the reference, whose operators PyTorch differentiates itself.
"""
from typing import Callable, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .low_rank import contract_delta, expand_delta
from .reference import arithmetic_dtype, scan_reference, scan_reference_backward

__all__ = ['scan', 'scan_backward', 'scan_forward']

_library = torch.library.Library('vim2', 'FRAGMENT')


def _define(function: Callable) -> Callable:
    """Make an operator of a function: its schema from the annotations, its kernel for every device."""
    name = function.__name__
    _library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, function, 'CompositeExplicitAutograd')
    return getattr(torch.ops.vim2, name).default


def _present(*tensors: Optional[Tensor]) -> List[Tensor]:
    return [t for t in tensors if t is not None]


# ------------------------------------------------------------------------------------------------------ the kernels

def scan_forward(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
        delta_bias: Optional[Tensor], delta_weight: Optional[Tensor], delta_softplus: bool, directions: List[int],
        want_last_state: bool, save_states: bool, backend: str,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Returns out, the last states (B, K, E, N) or an empty tensor, and the backend's saved states or an empty one.

    Args:
        backend: the name of one that can run.
    """
    kernels = backends.load(backend)
    if backend == 'cpu':
        return kernels.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, want_last_state,
                               save_states, delta_weight)
    delta = expand_delta(delta, delta_weight, u)
    return kernels.forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, want_last_state, save_states)


def scan_backward(
        grad_out: Tensor, grad_last: Optional[Tensor],
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
        delta_bias: Optional[Tensor], delta_weight: Optional[Tensor], states: Tensor, delta_softplus: bool,
        directions: List[int], backend: str,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, delta_weight; an empty tensor for each that is absent."""
    kernels = backends.load(backend)
    if backend == 'cpu':
        return kernels.backward(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus,
                                directions, delta_weight)
    grad_u, grad_delta, *others = kernels.backward(
        grad_out, grad_last, u, expand_delta(delta, delta_weight, u), A, B, C, D, z, delta_bias, states,
        delta_softplus, directions)
    if delta_weight is None:
        return (grad_u, grad_delta, *others, u.new_empty(0))
    grad_delta, grad_weight = contract_delta(grad_delta, delta, delta_weight)
    return (grad_u, torch.empty_like(delta).copy_(grad_delta), *others,
            torch.empty_like(delta_weight).copy_(grad_weight))


def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
        delta_bias: Optional[Tensor], delta_weight: Optional[Tensor], delta_softplus: bool, directions: List[int],
        want_last_state: bool, backend: str,
) -> Tuple[Tensor, Tensor]:
    """Returns out and the last states (B, K, E, N) or an empty tensor.

    Args:
        backend: a name, or 'auto', see `backends.resolve`.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, delta_weight)
    if _forward_mode(u):
        return _differentiable_scan(*tensors, delta_softplus, directions, want_last_state, backend)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _scan_forward(*tensors, delta_softplus, directions, want_last_state, needed,
                         backends.resolve(backend, _present(*tensors)))[:2]


_scan, _scan_forward, _scan_backward = _define(scan), _define(scan_forward), _define(scan_backward)
_library.impl('scan', scan, 'Autograd')


def _last_states(tensors: Tuple[Optional[Tensor], ...], want_last_state: bool) -> Tensor:
    u, _, A = tensors[:3]
    return u.new_empty((u.shape[0], A.shape[0], u.shape[1], A.shape[2]) if want_last_state else (0,),
                       dtype=arithmetic_dtype(*tensors))


def _fake_scan(*args):
    return torch.empty_like(args[0]), _last_states(args[:9], args[11])


def _fake_forward(*args):
    (u, _, A, B, C, *_), save_states, backend = args[:9], args[12], args[13]
    shape = backends.load(backend).states_shape(u, A, B, C) if save_states else (0,)
    return torch.empty_like(u), _last_states(args[:9], args[11]), u.new_empty(shape, dtype=torch.float32)


def _fake_backward(*args):
    return tuple(args[2].new_empty(0) if t is None else torch.empty_like(t) for t in args[2:11])


torch.library.register_fake('vim2::scan', _fake_scan, lib=_library)
torch.library.register_fake('vim2::scan_forward', _fake_forward, lib=_library)
torch.library.register_fake('vim2::scan_backward', _fake_backward, lib=_library)


# -------------------------------------------------------------------------------------------------- their gradients

def _keep_forward(ctx, inputs, output):
    *ctx.options, save_states, ctx.backend = inputs[9:]
    if not save_states:
        ctx.backend = None
    ctx.save_for_backward(*inputs[:9], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _forward_rule(ctx, grad_out, grad_last, _):
    *tensors, states = ctx.saved_tensors  # once: activation checkpointing allows no second reading
    delta_softplus, directions, want_last_state = ctx.options
    if ctx.backend is None:
        raise RuntimeError('vim2::scan_forward was called with save_states=False: it cannot be differentiated')
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[0])
    rule = _differentiable_backward if _forward_mode(grad_out) else _scan_backward
    grads = rule(grad_out, grad_last if want_last_state else None, *tensors, states, delta_softplus, directions,
                 ctx.backend)
    return (*(None if t is None else g for t, g in zip(tensors, grads)), None, None, None, None, None)


def _keep_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)


def _backward_rule(ctx, *cotangents):
    """The gradients' gradients: those of the reference."""
    inputs = ctx.saved_tensors
    present = [i for i, t in enumerate(inputs) if t is not None]

    def gradients(*values):
        tensors = [None] * len(inputs)
        for i, value in zip(present, values):
            tensors[i] = value
        grads = _differentiable_backward(*tensors, None, *ctx.options)
        return tuple(g for t, g in zip(tensors[2:], grads) if t is not None)

    _, pull = torch.func.vjp(gradients, *_present(*inputs))
    found = iter(pull(tuple(torch.zeros_like(t) if c is None else c
                            for t, c in zip(inputs[2:], cotangents) if t is not None)))
    return (*(None if t is None else next(found) for t in inputs), None, None, None, None)


torch.library.register_autograd('vim2::scan_forward', _forward_rule, setup_context=_keep_forward, lib=_library)
torch.library.register_autograd('vim2::scan_backward', _backward_rule, setup_context=_keep_backward, lib=_library)


def _differentiable_scan(u, delta, A, B, C, D, z, delta_bias, delta_weight, delta_softplus, directions,
                         want_last_state, *_) -> Tuple[Tensor, Tensor]:
    """`scan` by the reference, of PyTorch's own operators."""
    delta = expand_delta(delta, delta_weight, u)
    out, last = scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions)
    return out, last if want_last_state else last.new_empty(0)


def _differentiable_forward(*args) -> Tuple[Tensor, Tensor, Tensor]:
    """`scan_forward` by the reference. It saves no states: PyTorch knows what its own operators need."""
    return (*_differentiable_scan(*args), args[0].new_empty(0, dtype=torch.float32))


def _differentiable_backward(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, delta_weight, _, delta_softplus,
                             directions, *__) -> Tuple[Tensor, ...]:
    """`scan_backward` by the reference."""
    inputs = (u, expand_delta(delta, delta_weight, u), A, B, C, D, z, delta_bias)
    grads = list(scan_reference_backward(grad_out, grad_last, *inputs, delta_softplus, directions))
    grad_weight = None
    if delta_weight is not None:
        grads[1], grad_weight = contract_delta(grads[1], delta, delta_weight)
    given = (u, delta, A, B, C, D, z, delta_bias, delta_weight)
    return tuple(u.new_empty(0) if t is None else g.to(t.dtype) for t, g in zip(given, (*grads, grad_weight)))


# -------------------------------------------------------------------------------------------------------- transforms

def _forward_mode(t: Tensor) -> bool:
    """Whether forward-mode differentiation is on where no torch.func transform is.

    Outside of it `unpack_dual` returns the very tensor. A graph that is being compiled enters and leaves it below
    Python's notice; its tensors have types of their own.
    """
    return (forward_ad.unpack_dual(t).primal is not t
            or type(t) not in (Tensor, torch.nn.Parameter) and _forward_mode_at_any_depth())


def _forward_mode_at_any_depth() -> bool:
    """Whether forward-mode differentiation is on, whatever transforms are between it and here."""
    probe = torch.zeros(())
    try:
        forward_ad.make_dual(probe, probe, level=0)
    except RuntimeError:  # PyTorch knows no such level
        return False
    return True


def _one_by_one(operator: Callable) -> Callable:
    """A rule for vmap: the kernels take samples one after the other, each with gradients of its own."""
    def rule(info, in_dims, *args):
        samples = [operator(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims)))
                   for i in range(info.batch_size)]
        return tuple(torch.stack(outs) for outs in zip(*samples)), (0,) * len(samples[0])
    return rule


def _transformed(name: str, operator: Callable, keep: Callable, rule: Callable, reference: Callable) -> None:
    """What torch.func does with an operator: it hands every call within a transform to the kernel given here.

    torch.library's rules serve autograd alone. An autograd.Function has the same rules for torch.func, which takes
    off one transform after the other and calls the operator on what is left.
    """
    function = type(name, (torch.autograd.Function,), dict(
        forward=staticmethod(lambda *args: operator(*args)), setup_context=staticmethod(keep),
        backward=staticmethod(rule), vmap=staticmethod(_one_by_one(operator))))

    def call(*args):
        if _forward_mode_at_any_depth():
            return reference(*args)
        try:
            return function.apply(*args)
        except RuntimeError as e:
            if 'Functionalize' not in str(e):
                raise
            return reference(*args)  # torch.func.functionalize takes no autograd.Function

    _library.impl(name, call, 'FuncTorchDynamicLayerFrontMode')


_transformed('scan_forward', _scan_forward, _keep_forward, _forward_rule, _differentiable_forward)
_transformed('scan_backward', _scan_backward, _keep_backward, _backward_rule, _differentiable_backward)


def _scan_transformed(*args):
    *inputs, backend = args
    states = torch.is_grad_enabled()
    return _scan_forward(*inputs, states, backends.resolve(backend, _present(*inputs[:9])))[:2]


_library.impl('scan', _scan_transformed, 'FuncTorchDynamicLayerFrontMode')
