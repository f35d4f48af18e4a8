"""The compiled modules of mamba_ssm and VMamba, which some code calls without the Python around them.

`selective_scan_cuda` (mamba_ssm), `selective_scan_cuda_core` and `selective_scan_cuda_oflex` (VMamba): `fwd` and `bwd`
of an autograd.Function. What a forward hands to the backward ("x") holds only the last state here, where their readers
look for it; the backward computes the rest again.
"""
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from vim2.ops import selective_scan

__all__ = ['core_bwd', 'core_fwd', 'mamba_bwd', 'mamba_fwd', 'oflex_fwd']


def _states(last: Tensor) -> Tensor:
    """(B, D, 1, 2 N) with the last state at its odd places, as the CUDA kernels have it."""
    x = torch.full((*last.shape[:2], 1, 2 * last.shape[2]), float('nan'), dtype=last.dtype, device=last.device)
    x[:, :, 0, 1::2] = last
    return x


def mamba_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool) -> List[Tensor]:
    """`selective_scan_cuda.fwd`: [out, x], and the gated output if there is a gate."""
    out, last = selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True)
    if z is None:
        return [out, _states(last)]
    gated = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return [out, _states(last), gated]


def mamba_bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus: bool, recompute_out_z: bool):
    """`selective_scan_cuda.bwd`: gradients of u, delta, A, B, C, D, delta_bias, then of z and the gated output."""
    grads = _gradients((u, delta, A, B, C, D, z, delta_bias), dout, delta_softplus)
    result = [*grads[:6], grads[7]]
    if z is not None:
        result.append(grads[6] if dz is None else dz.copy_(grads[6]))
        if recompute_out_z:
            result.append(selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus))
    return result


def core_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus: bool, nrows: int = 1) -> List[Tensor]:
    """`selective_scan_cuda_core.fwd`: [out, x]."""
    return mamba_fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def oflex_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus: bool, nrows: int = 1, out_float: bool = True):
    """`selective_scan_cuda_oflex.fwd`: [out, x], in float32 if `out_float`, else in u's dtype."""
    return core_fwd(u.float() if out_float else u, delta, A, B, C, D, delta_bias, delta_softplus)


def core_bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus: bool, nrows: int = 1) -> Tuple:
    """`selective_scan_cuda_core.bwd` and `_oflex.bwd`: gradients of u, delta, A, B, C, D, delta_bias."""
    grads = _gradients((u, delta, A, B, C, D, None, delta_bias), dout.to(u.dtype), delta_softplus)
    return (*grads[:6], grads[7])


def _gradients(inputs: Tuple[Optional[Tensor], ...], dout: Tensor, delta_softplus: bool) -> List[Optional[Tensor]]:
    """Of each input, None of those that are absent."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        out = selective_scan(*leaves, delta_softplus)
    grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], dout))
    return [None if t is None else next(grads) for t in leaves]
