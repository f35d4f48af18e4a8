"""The public functions: signatures, documentation and checks of shapes.

The environment's VIM2_SCAN_BACKEND is read here and nowhere else: wherever this module's Python runs, that is in eager
calls and while a graph is compiled, exported or traced, of which the choice is part from then on. TorchScript does not
run it.
"""
import os
from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import operator  # noqa: F401, defines torch.ops.vim2.scan
from .backends import BACKEND_ENV

__all__ = ['cross_selective_scan', 'map_scan', 'selective_scan', 'sequence_scan']


@torch.jit.ignore
def _check(function: str, tensors: List[Tuple[str, Optional[Tensor], List[List[int]]]]) -> None:
    """Raise for a tensor of a wrong rank, shape, dtype or device, naming it.

    Args:
        function: name of the public function, for the message.
        tensors: (name, tensor, accepted shapes) of each argument, the first of which sets the device.
    """
    device = next(t.device for _, t, _ in tensors if t is not None)
    for name, t, shapes in tensors:
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f'{function}: {name} must be of a floating dtype, real and not complex, got {t.dtype}')
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


def _chosen(backend: Optional[str]) -> str:
    """The operator's argument: the backend that is asked for by name, else the environment's, else 'auto'."""
    return backend or os.environ.get(BACKEND_ENV) or 'auto'


def _loop(*args) -> Tuple[Tensor, Tensor]:
    """What a graph that torch.onnx.export makes has in the operator's place."""
    if torch.jit.is_tracing():
        raise RuntimeError('torch.onnx.export(dynamo=False) cannot express the selective scan: leave dynamo at True, '
                           'which needs the packages onnx and onnxscript, or use tools/export.py')
    from .loop import scan_loop  # here: what it imports of torch takes a second
    return scan_loop(*args)


def _scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor],
        z: Optional[Tensor],
        delta_bias: Optional[Tensor],
        delta_weight: Optional[Tensor],
        delta_softplus: bool,
        directions: List[int],
        want_last_state: bool,
        backend: str,
) -> Tuple[Tensor, Tensor]:
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            return _loop(u, delta, A, B, C, D, z, delta_bias, delta_weight, delta_softplus, directions,
                         want_last_state)
    return torch.ops.vim2.scan(u, delta, A, B, C, D, z, delta_bias, delta_weight, delta_softplus, directions,
                               want_last_state, backend)


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
        backend = _chosen(backend)
    batch, backend = u.shape[0], 'auto' if backend is None else backend
    out, last = _scan(
        u.unsqueeze(2), delta.unsqueeze(1).unsqueeze(3), A.unsqueeze(0), _as_scanned(B, batch), _as_scanned(C, batch),
        None if D is None else D.unsqueeze(0), None if z is None else z.unsqueeze(2),
        None if delta_bias is None else delta_bias.unsqueeze(0),
        None if delta_weight is None else delta_weight.unsqueeze(0), delta_softplus, [2 if reverse else 0],
        return_last_state, backend)
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
        backend = _chosen(backend)
    backend = 'auto' if backend is None else backend
    out, _ = _scan(
        x, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, None, delta_bias, delta_weight, delta_softplus,
        [0, 1, 2, 3][:A.shape[0]], False, backend)
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
