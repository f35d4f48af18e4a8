"""The selective scan as one loop node of a graph, for programs that run without this package.

Graphs of torch.export hold the operator `vim2::scan`, which only a process with vim2 can run. Here it becomes PyTorch's
`scan` operator, whose body is six nodes, in a graph that does not grow with the scan's length: torch.onnx translates it
to ONNX's `Scan`, torch.export saves it.

The layout is what ONNX Runtime is fast with: all directions in one loop, the state (B, K G, N, E / G) with channels
innermost, the exponential inside the body (outside it would be a tensor of B·K·E·L·N), the read-out a matrix product.
"""
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from .reference import arithmetic_dtype

__all__ = ['decompositions', 'scan_loop']


def _step(h: Tensor, dt: Tensor, dtu: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tuple[Tensor, Tensor]:
    """One step of the recurrence: the next state and its read-out.

    Args:
        h: (B, K G, N, e). dt, dtu: (B, K G, 1, e). B: (B, K G, N, 1). C: (B, K G, 1, N). A: (K G, N, e).
    """
    h = torch.exp(dt * A) * h + B * dtu
    return h, torch.matmul(C, h)


def _rows(t: Tensor, directions: List[int]) -> Tensor:
    """Maps (B, K, c, H, W), each in the order of its direction: (L, B, K, c)."""
    height, width = t.shape[3:]
    rows = []
    for k, direction in enumerate(directions):
        x = t[:, k].permute(3, 2, 0, 1) if direction % 2 else t[:, k].permute(2, 3, 0, 1)
        x = x.flatten(0, 1) if height != 1 else x.squeeze(1 if direction % 2 else 0)
        rows.append(x.flip(0) if direction >= 2 else x)
    return rows[0].unsqueeze(2) if len(rows) == 1 else torch.stack(rows, 2)


def _map(rows: Tensor, direction: int, height: int, width: int) -> Tensor:
    """Inverse of :func:`_rows` for one direction: (L, B, c) to (B, c, H, W)."""
    rows = rows.flip(0) if direction >= 2 else rows
    if height == 1:
        return rows.permute(1, 2, 0).unsqueeze(2)
    if direction % 2:
        return rows.unflatten(0, (width, height)).permute(2, 3, 1, 0)
    return rows.unflatten(0, (height, width)).permute(2, 3, 0, 1)


def scan_loop(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
        delta_bias: Optional[Tensor], delta_weight: Optional[Tensor], delta_softplus: bool, directions: List[int],
        want_last_state: bool, backend: str = 'auto',
) -> Tuple[Tensor, Tensor]:
    """`vim2::scan`, see `operator`; without gradients.

    Args:
        backend: is not read. It makes the signature the operator's.
    """
    dtype = arithmetic_dtype(u, delta, A, B, C, D, z, delta_bias)
    u, delta, A, B, C = (t.detach() for t in (u, delta, A, B, C))
    D, z, delta_bias, delta_weight = (None if t is None else t.detach() for t in (D, z, delta_bias, delta_weight))
    batch, dim, height, width = u.shape
    count, _, states = A.shape
    groups = B.shape[2], C.shape[2]

    dt = _rows(delta, directions)                                                                   # (L, B, K, E or R)
    if delta_weight is not None:
        dt = torch.matmul(dt.permute(1, 2, 0, 3), delta_weight.to(dt.dtype).transpose(1, 2)).permute(2, 0, 1, 3)
    dt = dt.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)
    if delta_softplus:
        dt = F.softplus(dt)
    x = _rows(u.unsqueeze(1).expand(-1, count, -1, -1, -1), directions).to(dtype)                   # (L, B, K, E)

    # With as many groups as the finer of B and C: (L, B, K G, N)
    finer = max(groups)
    if finer % min(groups):
        raise ValueError(f'B has {groups[0]} and C {groups[1]} groups: neither number divides the other')
    Bs, Cs = (
        _rows(t.to(dtype).expand(-1, -1, -1, -1, height, width).flatten(2, 3), directions)
        .unflatten(3, (g, 1, states)).expand(-1, -1, -1, -1, finer // g, -1).flatten(2, 4)
        for t, g in ((B, groups[0]), (C, groups[1])))
    wide = dim // finer
    # -inf, which exp makes of a large parameter, decays at once: see `reference`.
    rates = A.to(dtype).clamp(min=torch.finfo(dtype).min).reshape(count * finer, wide, states).transpose(1, 2)
    dt, dtu = (t.unflatten(3, (finer, 1, wide)).flatten(2, 3) for t in (dt, dt * x))
    start = dt.new_zeros(batch, count * finer, states, wide)
    last, y = scan_op(_step, [start], [dt, dtu, Bs.unsqueeze(4), Cs.unsqueeze(3)], (rates.contiguous(),))

    y = y.squeeze(3).unflatten(2, (count, finer)).flatten(3)                                        # (L, B, K, E)
    if D is not None:
        y = y + D.to(dtype) * x
    out = _map(y[:, :, 0], directions[0], height, width)
    for k in range(1, count):
        out = out + _map(y[:, :, k], directions[k], height, width)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    if not want_last_state:
        return out.to(u.dtype), out.new_empty(0)
    return out.to(u.dtype), last.unflatten(1, (count, finer)).transpose(3, 4).flatten(2, 3)


def _forward_loop(*args) -> Tuple[Tensor, Tensor, Tensor]:
    """`vim2::scan_forward`, without saved states."""
    out, last = scan_loop(*args[:12])
    return out, last, out.new_empty(0, dtype=torch.float32)


def decompositions() -> Dict[torch._ops.OpOverload, Callable]:
    """For `ExportedProgram.run_decompositions`: the scan as a loop, and nothing else."""
    return {torch.ops.vim2.scan.default: scan_loop, torch.ops.vim2.scan_forward.default: _forward_loop}
