"""The selective scan in plain PyTorch: the oracle of the other backends, and what derivatives without a kernel use.

It runs on any device, in any floating dtype, float64 included, and is differentiable to any order in any mode. It goes
step by step and holds tensors of B·E·L·N elements: for checking and for derivatives, not for speed.

Shapes and arithmetic are those of `vim2.ops.operator`; step sizes of low rank are to be multiplied out before.
"""
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['arithmetic_dtype', 'backward', 'forward', 'from_scan_order', 'missing', 'scan_reference',
           'scan_reference_backward', 'states_shape', 'to_scan_order']


def arithmetic_dtype(*tensors: Optional[Tensor]) -> torch.dtype:
    """float32, or float64 if any of the tensors has it."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def to_scan_order(x: Tensor, direction: int) -> Tensor:
    """Read a map (..., H, W) in the order of one scan direction: (..., H·W).

    Args:
        x: map at natural positions.
        direction: 0 row-major, 1 column-major, 2 reversed row-major, 3 reversed column-major.
    """
    x = (x.transpose(-1, -2) if direction % 2 else x).flatten(-2)
    return x.flip(-1) if direction >= 2 else x


def from_scan_order(x: Tensor, direction: int, height: int, width: int) -> Tensor:
    """Inverse of :func:`to_scan_order`: (..., H·W) back to (..., H, W)."""
    x = x.flip(-1) if direction >= 2 else x
    if direction % 2:
        return x.unflatten(-1, (width, height)).transpose(-1, -2)
    return x.unflatten(-1, (height, width))


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The recurrence of one direction, h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t from h_0 = 0.

    Args:
        u, dt: (B, E, L), in scan order. A: (E, N). B: (B, E, N, L).

    Returns:
        h_1 to h_L, (B, E, N, L).
    """
    h = torch.zeros_like(B[..., 0])
    states = []
    for dt_t, dtu_t, B_t in zip(dt.unbind(-1), (dt * u).unbind(-1), B.unbind(-1)):
        h = torch.exp(dt_t.unsqueeze(-1) * A) * h + dtu_t.unsqueeze(-1) * B_t
        states.append(h)
    return torch.stack(states, -1)


class _Direction:
    """The inputs of one direction's scan, in its order and in the arithmetic's dtype."""

    def __init__(self, k: int, direction: int, u, delta, A, B, C, delta_bias, delta_softplus, dtype):
        height, width = u.shape[-2:]
        self.u = to_scan_order(u.to(dtype), direction)                                                   # (B, E, L)
        raw = to_scan_order(delta[:, k].to(dtype), direction)
        self.raw = raw if delta_bias is None else raw + delta_bias[k].to(dtype)[:, None]
        self.dt = F.softplus(self.raw) if delta_softplus else self.raw
        # -inf, which exp makes of a large parameter, decays at once; the product with a gradient of 0 would be NaN.
        self.A = A[k].to(dtype).clamp(min=torch.finfo(dtype).min)                                        # (E, N)
        self.B, self.C = (                                                                               # (B, E, N, L)
            to_scan_order(t[:, k].to(dtype).expand(-1, -1, -1, height, width), direction)
            .unsqueeze(2).expand(-1, -1, u.shape[1] // t.shape[2], -1, -1).flatten(1, 2) for t in (B, C))


def scan_reference(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
        delta_bias: Optional[Tensor], delta_softplus: bool, directions: List[int],
) -> Tuple[Tensor, Tensor]:
    """The scan.

    Returns:
        out (B, E, H, W) in u's dtype, and the last states (B, K, E, N) in the arithmetic's.
    """
    dtype = arithmetic_dtype(u, delta, A, B, C, D, z, delta_bias)
    maps, last = [], []
    for k, direction in enumerate(directions):
        scan = _Direction(k, direction, u, delta, A, B, C, delta_bias, delta_softplus, dtype)
        states = _states(scan.u, scan.dt, scan.A, scan.B)
        y = (states * scan.C).sum(2)
        if D is not None:
            y = y + D[k].to(dtype)[:, None] * scan.u
        maps.append(from_scan_order(y, direction, *u.shape[-2:]))
        last.append(states[..., -1])
    out = sum(maps)
    if z is not None:
        zf = z.to(dtype)
        out = out * zf * torch.sigmoid(zf)  # F.silu has no second derivatives in forward mode alone
    return out.to(u.dtype), torch.stack(last, 1)


def scan_reference_backward(
        grad_out: Tensor, grad_last: Optional[Tensor], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Optional[Tensor], z: Optional[Tensor], delta_bias: Optional[Tensor], delta_softplus: bool,
        directions: List[int],
) -> Tuple[Optional[Tensor], ...]:
    """The adjoint recurrence of :func:`scan_reference`, written out: an operator's kernel runs below autograd.

    Args:
        grad_out: (B, E, H, W). grad_last: gradient of the last states, (B, K, E, N), or None.

    Returns:
        Gradients of u, delta, A, B, C, D, z, delta_bias in the arithmetic's dtype, None for each that is absent.
    """
    height, width = u.shape[-2:]
    dtype = arithmetic_dtype(u, delta, A, B, C, D, z, delta_bias)
    grad_y, grad_z = grad_out.to(dtype), None
    if z is not None:
        zf, gate = z.to(dtype), torch.sigmoid(z.to(dtype))
        ungated, _ = scan_reference(u.to(dtype), delta, A, B, C, D, None, delta_bias, delta_softplus, directions)
        grad_z = grad_y * ungated * gate * (1 + zf * (1 - gate))
        grad_y = grad_y * zf * gate
    grads = []
    for k, direction in enumerate(directions):
        scan = _Direction(k, direction, u, delta, A, B, C, delta_bias, delta_softplus, dtype)
        states = _states(scan.u, scan.dt, scan.A, scan.B)
        before = F.pad(states, (1, 0))[..., :-1]
        decay = torch.exp(scan.dt.unsqueeze(2) * scan.A.unsqueeze(-1))
        gy = to_scan_order(grad_y, direction)

        g = torch.zeros_like(states[..., 0]) if grad_last is None else grad_last[:, k].to(dtype)
        adjoint = []  # of h_t, all of its uses together
        for gyC_t, decay_t in zip((gy.unsqueeze(2) * scan.C).unbind(-1)[::-1], decay.unbind(-1)[::-1]):
            adjoint.append(g + gyC_t)
            g = decay_t * adjoint[-1]
        g_h = torch.stack(adjoint[::-1], -1)                                                             # (B, E, N, L)

        g_exponent = g_h * before * decay
        g_dtu = (g_h * scan.B).sum(2)
        g_u = g_dtu * scan.dt if D is None else g_dtu * scan.dt + gy * D[k].to(dtype)[:, None]
        g_dt = g_dtu * scan.u + (g_exponent * scan.A.unsqueeze(-1)).sum(2)
        if delta_softplus:
            g_dt = g_dt * torch.sigmoid(scan.raw)
        g_B, g_C = (
            from_scan_order(g.unflatten(1, (t.shape[2], -1)).sum(2), direction, height, width)
            .sum_to_size(t[:, k].shape)
            for g, t in ((g_h * (scan.dt * scan.u).unsqueeze(2), B), (gy.unsqueeze(2) * states, C)))
        grads.append((from_scan_order(g_u, direction, height, width), from_scan_order(g_dt, direction, height, width),
                      (g_exponent * scan.dt.unsqueeze(2)).sum((0, 3)), g_B, g_C, (gy * scan.u).sum((0, 2)),
                      g_dt.sum((0, 2))))
    g_u, g_delta, g_A, g_B, g_C, g_D, g_bias = zip(*grads)
    return (sum(g_u), torch.stack(g_delta, 1), torch.stack(g_A), torch.stack(g_B, 1), torch.stack(g_C, 1),
            None if D is None else torch.stack(g_D), grad_z, None if delta_bias is None else torch.stack(g_bias))


# The interface of a backend, see `backends`.

def missing(tensors: Sequence[Tensor]) -> Optional[str]:
    return None


def states_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tuple[int]:
    return (0,)


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
            delta_bias: Optional[Tensor], delta_softplus: bool, directions: List[int], want_last_state: bool,
            save_states: bool) -> Tuple[Tensor, Tensor, Tensor]:
    out, last = scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions)
    return (torch.empty_like(u).copy_(out), last if want_last_state else last.new_empty(0),
            u.new_empty(0, dtype=torch.float32))


def backward(grad_out: Tensor, grad_last: Optional[Tensor], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
             D: Optional[Tensor], z: Optional[Tensor], delta_bias: Optional[Tensor], states: Tensor,
             delta_softplus: bool, directions: List[int]) -> Tuple[Tensor, ...]:
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    grads = scan_reference_backward(grad_out, grad_last, *inputs, delta_softplus, directions)
    return tuple(u.new_empty(0) if t is None else torch.empty_like(t).copy_(g) for t, g in zip(inputs, grads))
