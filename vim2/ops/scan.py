"""The selective scan (S6, paper section 3.1) as PyTorch operators, and the dispatch to their backends.

Both public functions are views of one canonical operator, `torch.ops.vim2.scan`:

    u, z (B, E, H, W)   delta (B, K, E, H, W)   A (K, E, N)   B, C (B, K, G, N, H, W)   D, delta_bias (K, E)

For each of K scan directions (0 row-major, 1 column-major, 2 reversed row-major, 3 reversed column-major), with t in
that direction's order, dt = softplus(delta + delta_bias) and g the group of channel e:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_{g,t} u_t        y_t = <C_{g,t}, h_t> + D u_t        out = silu(z) * sum_k y^(k)

A sequence is a map of height 1. B and C may be constant over the scan: (B, K, G, N, 1, 1). Arithmetic and states are
float32 whatever the inputs' dtypes (float64 if the reference gets float64); out has u's dtype and layout.

Step sizes of low rank R come as two factors, delta (B, K, R, H, W) and delta_weight (K, E, R). Their product is formed
for the forward and again for the backward: what autograd keeps in between is R / E of it.
"""
import importlib.util
import os
import warnings
from typing import List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.overrides import handle_torch_function, has_torch_function

from .low_rank import contract_delta, expand_delta
from .reference import arithmetic_dtype, scan_reference, scan_reference_backward

__all__ = ['available_backends', 'cross_selective_scan', 'selective_scan']

BACKENDS = ('reference', 'cpu', 'triton')
BACKEND_ENV = 'VIM2_SCAN_BACKEND'
_GPU_TYPES = ('cuda', 'xpu')  # ROCm's device type is 'cuda' too
_warned = set()


def _missing(backend: str, tensors: Sequence[Tensor]) -> Optional[str]:
    """What keeps `backend` from running on these tensors, in words; None if nothing does."""
    if backend == 'reference':
        return None
    if backend == 'triton' and importlib.util.find_spec('triton') is None:
        return 'the package triton is not installed (pip install triton)'
    return _backend_module(backend).missing(tensors)


_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)  # older than 2.7: none


@torch.compiler.assume_constant_result
def _environment() -> str:
    """The operator's argument `backend` if the environment chooses one, else 'auto'."""
    backend = os.environ.get(BACKEND_ENV)
    return f'{BACKEND_ENV}={backend}' if backend else 'auto'


def _known_to_graphs(backend: Optional[str]) -> Optional[str]:
    """In torch.compile, what the environment chooses, else `backend` as it is.

    Caches of compiled graphs know the graph, not the environment, and what a backend saves is its own. A program that
    is exported may run elsewhere.
    """
    return _environment() if backend is None and torch.compiler.is_compiling() and not _exporting() else backend


def _resolve(backend: str, tensors: Sequence[Tensor]) -> str:
    """The backend to run: the one asked for by argument or environment (or an error), else the device's own."""
    asked = f"backend='{backend}'"
    if backend == 'auto':
        backend = _environment()
    if backend.startswith(f'{BACKEND_ENV}='):
        asked, backend = backend, backend.split('=', 1)[1]
    if backend != 'auto':
        if backend not in BACKENDS:
            raise ValueError(f"{asked}: no such backend; choose one of {', '.join(BACKENDS)} or auto")
        why = _missing(backend, tensors)
        if why is not None:
            raise RuntimeError(f'{asked} cannot run here: {why}')
        return backend
    device = tensors[0].device.type
    preferred = 'cpu' if device == 'cpu' else 'triton' if device in _GPU_TYPES else 'reference'
    why = _missing(preferred, tensors)
    if why is None:
        return preferred
    if (preferred, why) not in _warned:
        _warned.add((preferred, why))
        warnings.warn(f"vim2: the scan backend '{preferred}' cannot run ({why}); using the slow 'reference' instead",
                      RuntimeWarning, stacklevel=2)
    return 'reference'


def available_backends(device: Union[str, torch.device] = 'cpu') -> List[str]:
    """Names of the backends that can run float32 tensors on `device` here, the preferred one first."""
    probe = [torch.empty(0, device=device)]
    names = [name for name in ('cpu', 'triton', 'reference') if _missing(name, probe) is None]
    return names


def _backend_module(name: str):
    if name == 'cpu':
        from . import cpu
        return cpu
    from . import triton_scan
    return triton_scan


def _present(*tensors: Optional[Tensor]) -> List[Tensor]:
    return [t for t in tensors if t is not None]


@torch.library.custom_op('vim2::scan', mutates_args=())
def _scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Optional[Tensor], z: Optional[Tensor], delta_bias: Optional[Tensor],
        delta_softplus: bool, directions: List[int], want_last_state: bool, save_states: bool, backend: str,
        delta_weight: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Returns out, the last states (B, K, E, N) or an empty tensor, and the backend's saved states or an empty one."""
    name = _resolve(backend, _present(u, delta, A, B, C, D, z, delta_bias))
    if name == 'cpu':
        return _backend_module('cpu').forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions,
                                              want_last_state, save_states, delta_weight)
    delta = expand_delta(delta, delta_weight, u)
    if name == 'reference':
        out, last = scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions)
        # The layout is u's, as for the other backends. Nothing is saved: the backward recomputes every state.
        empty = last.new_empty(0)
        return torch.empty_like(u).copy_(out), last if want_last_state else empty, u.new_empty(0, dtype=torch.float32)
    return _backend_module(name).forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, want_last_state, save_states)


@torch.library.custom_op('vim2::scan_backward', mutates_args=())
def _scan_backward(
        grad_out: Tensor, grad_last: Optional[Tensor],
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Optional[Tensor], z: Optional[Tensor], delta_bias: Optional[Tensor], states: Tensor,
        delta_softplus: bool, directions: List[int], backend: str, delta_weight: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, delta_weight; an empty tensor for each that is absent."""
    name = _resolve(backend, _present(u, delta, A, B, C, D, z, delta_bias))
    if name == 'cpu':
        return _backend_module('cpu').backward(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, states,
                                               delta_softplus, directions, delta_weight)
    inputs = [u, expand_delta(delta, delta_weight, u), A, B, C, D, z, delta_bias]
    if name == 'reference':
        grads = scan_reference_backward(grad_out, grad_last, *inputs, delta_softplus, directions)
        grads = [u.new_empty(0) if t is None else torch.empty_like(t).copy_(g) for t, g in zip(inputs, grads)]
    else:
        grads = list(_backend_module(name).backward(
            grad_out, grad_last, *inputs, states, delta_softplus, directions))
    if delta_weight is None:
        return (*grads, u.new_empty(0))
    inputs.clear()  # the product of the factors is not needed for their gradients
    grad_delta, grad_weight = contract_delta(grads[1], delta, delta_weight)
    grads[1] = torch.empty_like(delta).copy_(grad_delta)
    return (*grads, torch.empty_like(delta_weight).copy_(grad_weight))


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, want_last_state, save_states, backend,
      delta_weight=None):
    name = _resolve(backend, _present(u, delta, A, B, C, D, z, delta_bias))
    last = u.new_empty((u.shape[0], A.shape[0], u.shape[1], A.shape[2]) if want_last_state else (0,),
                       dtype=arithmetic_dtype(u, delta, A, B, C, D, z, delta_bias))
    shape = (0,)
    if save_states and name != 'reference':
        shape = _backend_module(name).states_shape(u, A, B, C)
    return torch.empty_like(u), last, u.new_empty(shape, dtype=torch.float32)


@_scan_backward.register_fake
def _(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, directions, backend,
      delta_weight=None):
    return tuple(u.new_empty(0) if t is None else torch.empty_like(t)
                 for t in (u, delta, A, B, C, D, z, delta_bias, delta_weight))


def _setup_context(ctx, inputs, output):
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, want_last_state, save_states, backend, \
        delta_weight = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, output[2], delta_weight)
    ctx.delta_softplus, ctx.directions, ctx.backend = delta_softplus, directions, backend
    ctx.want_last_state, ctx.save_states = want_last_state, save_states
    ctx.set_materialize_grads(False)  # or zeros would be made for the saved states, which nobody differentiates


def _autograd_backward(ctx, grad_out, grad_last, grad_states):
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second reading
    u, delta, A, B, C, D, z, delta_bias, states, delta_weight = saved
    if not ctx.save_states:
        raise RuntimeError('vim2::scan was called with save_states=False: it cannot be differentiated')
    if not ctx.want_last_state:
        grad_last = None
    if grad_out is None:
        grad_out = torch.zeros_like(u)
    grads = torch.ops.vim2.scan_backward(
        grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, states,
        ctx.delta_softplus, ctx.directions, ctx.backend, delta_weight)
    given = (u, delta, A, B, C, D, z, delta_bias, delta_weight)
    grads = [None if t is None else g for t, g in zip(given, grads)]
    return (*grads[:-1], None, None, None, None, None, grads[-1])


_scan.register_autograd(_autograd_backward, setup_context=_setup_context)


def _visible_to_inductor(operator) -> None:
    """Let torch.compile look into the operator where Triton runs it: `torch.library.triton_op`'s rule, for one backend.

    AOTAutograd functionalises a program under FunctionalTensorMode; there the operator turns into the backend's own
    allocations and kernel launches, which Inductor sees. The operator stays whole for the other backends, in
    torch.export, and where sizes are symbolic: how the work is cut depends on their values.
    """
    def rule(mode, op, types, args, kwargs):
        given = dict(zip((a.name for a in op._schema.arguments), args), **kwargs)
        tensors = _present(*(given.get(name) for name in ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')))
        if tensors[0].device.type in _GPU_TYPES and not any(
                isinstance(size, torch.SymInt) for t in tensors for size in (*t.shape, *t.stride())):
            from torch.export._trace import custom_triton_ops_decomposition_disabled
            if _resolve(given['backend'], tensors) == 'triton' and not custom_triton_ops_decomposition_disabled():
                with mode, _backend_module('triton').traced():
                    return operator._init_fn(*args, **kwargs)
        return mode.__torch_dispatch__(op, types, args, kwargs)

    operator.register_torch_dispatch(FunctionalTensorMode, rule)


_visible_to_inductor(_scan)
_visible_to_inductor(_scan_backward)


def _needs_grad(tensors: List[Optional[Tensor]]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


@torch.jit.ignore
def _check(function: str, tensors: List[Tuple[str, Optional[Tensor], List[List[int]]]]) -> None:
    """Raise for a tensor of a wrong rank, shape, dtype or device, naming it.

    Args:
        function: name of the public function, for the message.
        tensors: (name, tensor, accepted shapes) of each argument, the first of which sets the device.
    """
    device = tensors[0][1].device
    for name, t, shapes in tensors:
        if t is None:
            continue
        if t.is_complex():
            raise TypeError(f'{function}: {name} is complex ({t.dtype}); only real inputs are supported')
        if not t.is_floating_point():
            raise TypeError(f'{function}: {name} must be of a floating dtype, got {t.dtype}')
        if t.device != device:
            raise ValueError(f'{function}: all tensors must be on one device, but {tensors[0][0]} is on {device} '
                             f'and {name} on {t.device}')
        if list(t.shape) not in shapes:
            wanted = ' or '.join(str(tuple(want)) for want in shapes)
            raise ValueError(f'{function}: {name} must have shape {wanted}, got {tuple(t.shape)}')


def _check_rank(function: str, name: str, t: Tensor, ranks: List[int], layout: str) -> None:
    if t.dim() not in ranks:
        raise ValueError(f'{function}: {name} must be {layout}, got a tensor of shape {tuple(t.shape)}')
    if t.numel() == 0:
        raise ValueError(f'{function}: {name} is empty (shape {tuple(t.shape)}); every dimension must be at least 1')


@torch.jit.ignore
def _check_sequence(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
                    z: Optional[Tensor], delta_bias: Optional[Tensor], delta_weight: Optional[Tensor]) -> None:
    f = 'selective_scan'
    _check_rank(f, 'u', u, [3], '(batch, channels, length)')
    _check_rank(f, 'A', A, [2], '(channels, states)')
    batch, dim, length = u.shape
    states = A.shape[1]
    for name, t in (('B', B), ('C', C)):
        _check_rank(f, name, t, [2, 3, 4], '(channels, states), (batch, states, length) or '
                                           '(batch, groups, states, length)')
        if t.dim() == 4 and dim % t.shape[1]:
            raise ValueError(f'{f}: {name} has {t.shape[1]} groups, which do not divide the {dim} channels of u')

    def scanned(t: Tensor) -> List[List[int]]:
        groups = t.shape[1] if t.dim() == 4 else 1
        return [[dim, states], [batch, states, length], [batch, groups, states, length]]

    rank = dim
    if delta_weight is not None:
        _check_rank(f, 'delta_weight', delta_weight, [2], '(channels, rank)')
        rank = delta_weight.shape[1]
    _check(f, [('u', u, [[batch, dim, length]]), ('delta', delta, [[batch, rank, length]]), ('A', A, [[dim, states]]),
               ('B', B, scanned(B)), ('C', C, scanned(C)), ('D', D, [[dim]]), ('z', z, [[batch, dim, length]]),
               ('delta_bias', delta_bias, [[dim]]), ('delta_weight', delta_weight, [[dim, rank]])])


@torch.jit.ignore
def _check_map(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
               delta_bias: Optional[Tensor], delta_weight: Optional[Tensor]) -> None:
    f = 'cross_selective_scan'
    _check_rank(f, 'x', x, [4], '(batch, channels, height, width)')
    _check_rank(f, 'A', A, [3], '(directions, channels, states)')
    batch, dim, height, width = x.shape
    directions, states = A.shape[0], A.shape[2]
    if directions > 4:
        raise ValueError(f'{f}: A has {directions} directions; there are at most 4')
    scanned, rank = [[batch, directions, states, height, width]], dim
    if delta_weight is not None:
        _check_rank(f, 'delta_weight', delta_weight, [3], '(directions, channels, rank)')
        rank = delta_weight.shape[2]
    _check(f, [('x', x, [[batch, dim, height, width]]), ('delta', delta, [[batch, directions, rank, height, width]]),
               ('A', A, [[directions, dim, states]]), ('B', B, scanned), ('C', C, scanned),
               ('D', D, [[directions, dim]]), ('delta_bias', delta_bias, [[directions, dim]]),
               ('delta_weight', delta_weight, [[directions, dim, rank]])])


def _as_scanned(t: Tensor, batch: int) -> Tensor:
    """B or C of a sequence as (B, 1, G, N, 1, L); (D, N) as D groups that are constant over the scan."""
    if t.dim() == 2:
        return t[None, None, :, :, None, None].expand(batch, 1, -1, -1, 1, 1)
    if t.dim() == 3:
        t = t.unsqueeze(1)
    return t.unsqueeze(1).unsqueeze(-2)


# TorchScript compiles no keyword-only arguments: the layers call `sequence_scan` and `map_scan`, the public functions
# are these with the signature that people expect.

def sequence_scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor] = None,
        z: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        reverse: bool = False,
        backend: Optional[str] = None,
        delta_weight: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """:func:`selective_scan`, scriptable; returns (out, last state), the latter empty unless asked for."""
    if not torch.jit.is_scripting():
        tensors = (u, delta, A, B, C, D, z, delta_bias, delta_weight)
        if has_torch_function(tensors):
            return handle_torch_function(sequence_scan, tensors, *tensors[:-1], delta_softplus, return_last_state,
                                         reverse, backend, delta_weight)
        _check_sequence(u, delta, A, B, C, D, z, delta_bias, delta_weight)
        backend = _known_to_graphs(backend)
    batch, directions = u.shape[0], [2 if reverse else 0]
    scanned = (u.unsqueeze(2), delta.unsqueeze(1).unsqueeze(3), A.unsqueeze(0), _as_scanned(B, batch),
               _as_scanned(C, batch), None if D is None else D.unsqueeze(0), None if z is None else z.unsqueeze(2),
               None if delta_bias is None else delta_bias.unsqueeze(0))
    weight = None if delta_weight is None else delta_weight.unsqueeze(0)
    backend = 'auto' if backend is None else backend
    out, last, _ = torch.ops.vim2.scan(
        *scanned, delta_softplus, directions, return_last_state,
        _needs_grad([u, delta, A, B, C, D, z, delta_bias, delta_weight]), backend, weight)
    return out.squeeze(2), last.squeeze(1) if return_last_state else last


def map_scan(
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        delta_softplus: bool = False,
        backend: Optional[str] = None,
        delta_weight: Optional[Tensor] = None,
) -> Tensor:
    """:func:`cross_selective_scan`, scriptable."""
    if not torch.jit.is_scripting():
        tensors = (x, delta, A, B, C, D, delta_bias, delta_weight)
        if has_torch_function(tensors):
            return handle_torch_function(map_scan, tensors, *tensors[:-1], delta_softplus, backend, delta_weight)
        _check_map(x, delta, A, B, C, D, delta_bias, delta_weight)
        backend = _known_to_graphs(backend)
    scanned = (x, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, None, delta_bias)
    directions = [0, 1, 2, 3][:A.shape[0]]
    backend = 'auto' if backend is None else backend
    out, _, _ = torch.ops.vim2.scan(
        *scanned, delta_softplus, directions, False,
        _needs_grad([x, delta, A, B, C, D, delta_bias, delta_weight]), backend, delta_weight)
    return out


def selective_scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor] = None,
        z: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        *,
        reverse: bool = False,
        delta_weight: Optional[Tensor] = None,
        backend: Optional[str] = None,
):
    """Selective scan (S6) along a sequence: a drop-in for mamba_ssm's `selective_scan_fn` with real A.

    `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = <C_t, h_t> + D u_t`, `dt = softplus(delta + delta_bias)`,
    `out = y * silu(z)` (paper section 3.1). Arithmetic and states are float32 whatever the inputs' dtypes.

    Args:
        u: input, (B, D, L), any strides.
        delta: step sizes, (B, D, L).
        A: (D, N), negative for a stable scan.
        B, C: (B, N, L) or (B, G, N, L) with G dividing D, or (D, N) if constant over the sequence.
        D: skip connection, (D,). Default: none.
        z: gate, (B, D, L). Default: none.
        delta_bias: added to delta before the softplus, (D,). Default: none.
        delta_softplus: apply softplus to the step sizes. Default: False.
        return_last_state: also return the state after the last step, (B, D, N) in float32. It is differentiable.
        reverse: scan from the last step to the first. Default: False.
        delta_weight: (D, R). Step sizes of low rank: delta is then (B, R, L), and `delta_weight @ delta` is formed
            inside, in delta's dtype; it is not kept for the backward. Default: none.
        backend: 'reference', 'cpu' or 'triton'; default: the environment's VIM2_SCAN_BACKEND, else by device.

    Returns:
        out (B, D, L) in u's dtype and layout, or (out, last_state).

    Raises:
        ValueError, TypeError: a tensor of a wrong rank, shape, dtype or device, or an unknown backend.
        RuntimeError: the backend that was asked for by name cannot run here.
    """
    out, last = sequence_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, reverse, backend, delta_weight)
    return (out, last) if return_last_state else out


def cross_selective_scan(
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        delta_softplus: bool = False,
        *,
        delta_weight: Optional[Tensor] = None,
        backend: Optional[str] = None,
) -> Tensor:
    """Selective scans over a map in K orders at once, summed (paper section 4; VMamba's cross-scan and cross-merge).

    Direction k is index arithmetic inside the kernel: nothing is permuted or copied, and every tensor is given, and
    the sum returned, at its natural positions.

    Args:
        x: map, (B, E, H, W), any strides (NHWC memory is the fastest).
        delta: step sizes, (B, K, E, H, W), 1 <= K <= 4; the first K of: row-major, column-major, reversed row-major,
            reversed column-major.
        A: (K, E, N), negative for a stable scan.
        B, C: (B, K, N, H, W).
        D: skip connections, (K, E). Default: none.
        delta_bias: added to delta before the softplus, (K, E). Default: none.
        delta_softplus: apply softplus to the step sizes. Default: False.
        delta_weight: (K, E, R). Step sizes of low rank: delta is then (B, K, R, H, W), and `delta_weight @ delta` is
            formed inside, in delta's dtype; it is not kept for the backward. Default: none.
        backend: 'reference', 'cpu' or 'triton'; default: the environment's VIM2_SCAN_BACKEND, else by device.

    Returns:
        The sum over the K scans, (B, E, H, W), in x's dtype and layout.

    Raises:
        ValueError, TypeError: a tensor of a wrong rank, shape, dtype or device, or an unknown backend.
        RuntimeError: the backend that was asked for by name cannot run here.
    """
    return map_scan(x, delta, A, B, C, D, delta_bias, delta_softplus, backend, delta_weight)
