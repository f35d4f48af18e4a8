"""Step sizes of low rank: the product of their two factors, and the factors' gradients from the product's."""
import contextlib
from typing import Optional, Tuple

import torch
from torch import Tensor

__all__ = ['contract_delta', 'expand_delta']


def _without_autocast(device: str):
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # meta tensors have none
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def expand_delta(delta: Tensor, delta_weight: Optional[Tensor], u: Tensor, memory: Optional[Tensor] = None) -> Tensor:
    """The step sizes (B, K, E, H, W) of delta (B, K, R, H, W) and delta_weight (K, E, R), in delta's dtype.

    Channels are contiguous if u's are, else positions are. Without a weight, delta is what it is.

    Args:
        memory: (n,), n >= B K E H W, where they are written. Default: new memory.
    """
    if delta_weight is None:
        return delta
    batch, directions, rank, height, width = delta.shape
    weight, dim = delta_weight.to(delta.dtype), delta_weight.shape[1]
    out = None if memory is None else memory[:batch * directions * dim * height * width]
    with _without_autocast(u.device.type):
        if u.stride(1) == 1:
            rows = delta.permute(1, 0, 3, 4, 2).reshape(directions, batch * height * width, rank)
            full = torch.bmm(rows, weight.transpose(1, 2), out=None if out is None else out.view(*rows.shape[:2], dim))
            return full.reshape(directions, batch, height, width, dim).permute(1, 0, 4, 2, 3)
        columns = delta.flatten(3)
        out = None if out is None else out.view(batch, directions, dim, height * width)
        return torch.matmul(weight, columns, out=out).unflatten(3, (height, width))


def contract_delta(grad: Tensor, delta: Tensor, delta_weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of both factors of :func:`expand_delta` from that of their product."""
    batch, directions, rank, height, width = delta.shape
    grad, weight = grad.to(delta.dtype), delta_weight.to(delta.dtype)
    with _without_autocast(delta.device.type):
        if grad.stride(2) == 1:
            rows = delta.permute(1, 0, 3, 4, 2).reshape(directions, batch * height * width, rank)
            grad = grad.permute(1, 0, 3, 4, 2).reshape(directions, batch * height * width, -1)
            grad_delta = torch.bmm(grad, weight).reshape(directions, batch, height, width, rank).permute(1, 0, 4, 2, 3)
            grad_weight = torch.bmm(grad.transpose(1, 2), rows)
        else:
            grad_delta = torch.matmul(weight.transpose(1, 2), grad.flatten(3)).unflatten(3, (height, width))
            grad_weight = torch.matmul(grad.flatten(3), delta.flatten(3).transpose(2, 3)).sum(0)
    return grad_delta, grad_weight
