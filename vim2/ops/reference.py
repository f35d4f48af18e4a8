"""The selective scan in plain PyTorch: the oracle that every other backend is tested against.

Sequential over the scan, differentiable by autograd (twice, if need be), on any device and in any floating dtype,
float64 included. It holds tensors of B·K·E·L·N elements: for checking, not for speed.
"""
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['arithmetic_dtype', 'scan_reference', 'scan_reference_backward', 'to_scan_order', 'from_scan_order']


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


def arithmetic_dtype(*tensors: Optional[Tensor]) -> torch.dtype:
    """float32, or float64 if any of the tensors has it."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


class _Direction:
    """The inputs of one direction's scan, in its order and in the arithmetic's dtype, and its states."""

    def __init__(self, k, direction, u, delta, A, B, C, delta_bias, delta_softplus, dtype):
        height, width = u.shape[-2:]
        self.u = to_scan_order(u.to(dtype), direction)                                      # (B, E, L)
        raw = to_scan_order(delta[:, k].to(dtype), direction)
        if delta_bias is not None:
            raw = raw + delta_bias[k].to(dtype)[:, None]
        self.raw, self.dt = raw, F.softplus(raw) if delta_softplus else raw
        self.A = A[k].to(dtype)                                                             # (E, N)
        self.B, self.C = (
            to_scan_order(t[:, k].to(dtype).expand(-1, -1, -1, height, width), direction)
            .repeat_interleave(u.shape[1] // t.shape[2], dim=1) for t in (B, C))            # (B, E, N, L)
        h = self.u.new_zeros(u.shape[0], u.shape[1], A.shape[-1])
        self.h = [h]
        for t in range(height * width):
            h = self.decay(t) * h + (self.dt * self.u)[:, :, t, None] * self.B[..., t]
            self.h.append(h)
        self.y = torch.stack([(h * self.C[..., t]).sum(-1) for t, h in enumerate(self.h[1:])], dim=-1)

    def decay(self, t: int) -> Tensor:
        return torch.exp(self.dt[:, :, t, None] * self.A)


def scan_reference(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor],
        z: Optional[Tensor],
        delta_bias: Optional[Tensor],
        delta_softplus: bool,
        directions: List[int],
) -> Tuple[Tensor, Tensor]:
    """The canonical scan that both public functions are views of (see `vim2.ops.scan`).

    Args:
        u: (B, E, H, W). delta: (B, K, E, H, W). A: (K, E, N). B, C: (B, K, G, N, H, W), or (..., 1, 1) if constant
            over the scan. D, delta_bias: (K, E). z: (B, E, H, W).
        delta_softplus: apply softplus to delta (+ bias).
        directions: K scan orders.

    Returns:
        out (B, E, H, W) in u's dtype, and the last states (B, K, E, N) in the arithmetic's dtype: float32, or float64
        if any input is.
    """
    dtype = arithmetic_dtype(u, delta, A, B, C, D, z, delta_bias)
    total, states = torch.zeros_like(u, dtype=dtype), []
    for k, direction in enumerate(directions):
        scan = _Direction(k, direction, u, delta, A, B, C, delta_bias, delta_softplus, dtype)
        y = scan.y if D is None else scan.y + D[k].to(dtype)[:, None] * scan.u
        total = total + from_scan_order(y, direction, *u.shape[-2:])
        states.append(scan.h[-1])
    if z is not None:
        total = total * F.silu(z.to(dtype))
    return total.to(u.dtype), torch.stack(states, dim=1)


def scan_reference_backward(
        grad_out: Tensor,
        grad_last: Optional[Tensor],
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor],
        z: Optional[Tensor],
        delta_bias: Optional[Tensor],
        delta_softplus: bool,
        directions: List[int],
) -> Tuple[Optional[Tensor], ...]:
    """The adjoint recurrence of :func:`scan_reference`, written out: an operator's kernel runs below autograd.

    Args:
        grad_out: (B, E, H, W). grad_last: gradient of the last states, (B, K, E, N), or None. The others as there.

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
    grad_u = torch.zeros_like(u, dtype=dtype)
    grads: List[Tuple[Tensor, ...]] = []
    for k, direction in enumerate(directions):
        scan = _Direction(k, direction, u, delta, A, B, C, delta_bias, delta_softplus, dtype)
        gy = to_scan_order(grad_y, direction)
        carry = torch.zeros_like(scan.h[0]) if grad_last is None else grad_last[:, k].to(dtype)
        g_du, g_dt, g_B, g_C = [], [], [], []
        g_A = torch.zeros_like(scan.A)
        for t in range(height * width - 1, -1, -1):
            dt, ut, decay = scan.dt[:, :, t, None], scan.u[:, :, t, None], scan.decay(t)
            g_h = carry + gy[:, :, t, None] * scan.C[..., t]
            g_C.append(gy[:, :, t, None] * scan.h[t + 1])
            g_B.append(g_h * dt * ut)
            g_du.append((g_h * scan.B[..., t]).sum(-1))
            through_decay = g_h * scan.h[t] * decay
            g_dt.append((through_decay * scan.A).sum(-1))
            g_A += (through_decay * dt).sum(0)
            carry = decay * g_h
        g_du, g_dt, g_B, g_C = (torch.stack(g[::-1], dim=-1) for g in (g_du, g_dt, g_B, g_C))
        g_delta, g_u = g_dt + g_du * scan.u, g_du * scan.dt
        if delta_softplus:
            g_delta = g_delta * torch.sigmoid(scan.raw)
        g_D = (gy * scan.u).sum((0, 2))
        if D is not None:
            g_u = g_u + gy * D[k].to(dtype)[:, None]
        grad_u = grad_u + from_scan_order(g_u, direction, height, width)
        g_B, g_C = (from_scan_order(g.unflatten(1, (t.shape[2], -1)).sum(2), direction, height, width)
                    .sum_to_size(t[:, k].shape) for g, t in ((g_B, B), (g_C, C)))
        grads.append((from_scan_order(g_delta, direction, height, width), g_A, g_B, g_C, g_D, g_delta.sum((0, 2))))
    g_delta, g_A, g_B, g_C, g_D, g_bias = zip(*grads)
    return (grad_u, torch.stack(g_delta, 1), torch.stack(g_A), torch.stack(g_B, 1), torch.stack(g_C, 1),
            None if D is None else torch.stack(g_D), grad_z, None if delta_bias is None else torch.stack(g_bias))
