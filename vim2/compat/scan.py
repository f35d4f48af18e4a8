"""mamba_ssm's selective scan and what is built on it, by `vim2.ops.selective_scan`.

Signatures as in mamba_ssm 2.3 (`ops/selective_scan_interface.py`, `ops/triton/selective_state_update.py`) and in Vim's
copy of mamba_ssm 1.1 (`mamba_inner_fn_no_out_proj`, `bimamba_inner_fn`). Everything is differentiable by autograd.
A must be real: a complex one (S4's) raises TypeError.
"""
from typing import Optional, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from vim2.ops import selective_scan
from .conv import causal_conv1d_fn

__all__ = ['bimamba_inner_fn', 'bimamba_inner_ref', 'mamba_inner_fn', 'mamba_inner_fn_no_out_proj', 'mamba_inner_ref',
           'selective_scan_fn', 'selective_scan_ref', 'selective_state_update', 'selective_state_update_ref']


def selective_scan_fn(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor] = None,
        z: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        delta_softplus: bool = False,
        return_last_state: Optional[bool] = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """:func:`vim2.ops.selective_scan` forward in time. The last state has a gradient, which mamba_ssm's has not."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus), bool(return_last_state))


def selective_scan_ref(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor] = None,
        z: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        delta_softplus: bool = False,
        return_last_state: Optional[bool] = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """The same in plain PyTorch."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus), bool(return_last_state),
                          backend='reference')


def _projected(
        x: Tensor, x_proj_weight: Tensor, delta_proj_weight: Tensor, A: Tensor, B: Optional[Tensor],
        C: Optional[Tensor], B_proj_bias: Optional[Tensor], C_proj_bias: Optional[Tensor],
        rms: Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]], eps: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Step sizes (B, D, L) without their bias, and B and C (B, N, L) where they are not given."""
    rank, states = delta_proj_weight.shape[1], A.shape[-1]
    rows = F.linear(x.transpose(1, 2), x_proj_weight)
    dt = rows[..., :rank]
    if rms[2] is not None:
        dt = F.rms_norm(dt, (rank,), rms[2], eps)
    if B is None:
        B = rows[..., rank:rank + states]
        B = B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)
        B = (B if rms[0] is None else F.rms_norm(B, (states,), rms[0], eps)).transpose(1, 2)
    if C is None:
        C = rows[..., -states:]
        C = C if C_proj_bias is None else C + C_proj_bias.to(C.dtype)
        C = (C if rms[1] is None else F.rms_norm(C, (states,), rms[1], eps)).transpose(1, 2)
    return F.linear(dt, delta_proj_weight).transpose(1, 2), B, C


def _real(A: Tensor, function: str) -> None:
    if A.is_complex():
        raise TypeError(f'{function}: A is complex; vim2.compat computes selective scans with a real A only')


def mamba_inner_fn_no_out_proj(
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Optional[Tensor],
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        A: Tensor,
        B: Optional[Tensor] = None,
        C: Optional[Tensor] = None,
        D: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        B_proj_bias: Optional[Tensor] = None,
        C_proj_bias: Optional[Tensor] = None,
        delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
        b_rms_weight: Optional[Tensor] = None,
        c_rms_weight: Optional[Tensor] = None,
        dt_rms_weight: Optional[Tensor] = None,
        b_c_dt_rms_eps: float = 1e-6,
        *,
        backend: Optional[str] = None,
) -> Tensor:
    """A Mamba block between its two projections: convolution, SiLU, x_proj, dt_proj, scan, gate.

    Args:
        xz: branch and gate, (B, 2 D, L).
        conv1d_weight: (D, 1, W).
        x_proj_weight: (R + 2 N, D); delta_proj_weight: (D, R); A: (D, N).
        B, C: computed from x if None.
        checkpoint_lvl: not used; what is recomputed in the backward is the scan's business.
        b_rms_weight, c_rms_weight, dt_rms_weight: (N,), (N,), (R,): RMSNorm of B, C and the low-rank step sizes.

    Returns:
        (B, D, L).
    """
    _real(A, 'mamba_inner_fn')
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation='silu')
    delta, B, C = _projected(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias,
                             (b_rms_weight, c_rms_weight, dt_rms_weight), b_c_dt_rms_eps)
    return selective_scan(x, delta.to(x.dtype), A, B, C, D, z, delta_bias, delta_softplus, backend=backend)


def mamba_inner_fn(
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Optional[Tensor],
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Optional[Tensor],
        A: Tensor,
        B: Optional[Tensor] = None,
        C: Optional[Tensor] = None,
        D: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        B_proj_bias: Optional[Tensor] = None,
        C_proj_bias: Optional[Tensor] = None,
        delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
        b_rms_weight: Optional[Tensor] = None,
        c_rms_weight: Optional[Tensor] = None,
        dt_rms_weight: Optional[Tensor] = None,
        b_c_dt_rms_eps: float = 1e-6,
        *,
        backend: Optional[str] = None,
) -> Tensor:
    """:func:`mamba_inner_fn_no_out_proj` and the output projection; (B, 2 D, L) to (B, L, d_model)."""
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
        backend=backend)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_ref(*args, **kwargs) -> Tensor:
    """:func:`mamba_inner_fn` with the scan in plain PyTorch."""
    return mamba_inner_fn(*args, **kwargs, backend='reference')


def bimamba_inner_fn(
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Optional[Tensor],
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Optional[Tensor],
        A: Tensor,
        A_b: Tensor,
        B: Optional[Tensor] = None,
        C: Optional[Tensor] = None,
        D: Optional[Tensor] = None,
        delta_bias: Optional[Tensor] = None,
        B_proj_bias: Optional[Tensor] = None,
        C_proj_bias: Optional[Tensor] = None,
        delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
        *,
        backend: Optional[str] = None,
) -> Tensor:
    """:func:`mamba_inner_fn` that scans in both directions, with A forward and A_b backward, and sums (Vim's v1)."""
    _real(A, 'bimamba_inner_fn')
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation='silu')
    delta, B, C = _projected(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias,
                             (None, None, None), 0.)
    y = sum(selective_scan(x, delta.to(x.dtype), a, B, C, D, z, delta_bias, delta_softplus, reverse=reverse,
                           backend=backend) for a, reverse in ((A, False), (A_b, True)))
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_ref(*args, **kwargs) -> Tensor:
    """:func:`bimamba_inner_fn` with the scans in plain PyTorch."""
    return bimamba_inner_fn(*args, **kwargs, backend='reference')


def selective_state_update(
        state: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor] = None,
        z: Optional[Tensor] = None,
        dt_bias: Optional[Tensor] = None,
        dt_softplus: bool = False,
        state_batch_indices: Optional[Tensor] = None,
) -> Tensor:
    """One step of the scan; the state is changed in place.

    Args:
        state: (B, D, N).
        x, dt, z: (B, D).
        A: (D, N); B, C: (B, N); D, dt_bias: (D,).

    Returns:
        (B, D), in x's dtype.

    Raises:
        NotImplementedError: a state with heads (Mamba-2), or of other sequences than the batch's.
    """
    if state.ndim != 3:
        raise NotImplementedError(f'selective_state_update: the state must be (batch, dim, states), got '
                                  f"{tuple(state.shape)}; vim2.compat has no Mamba-2, whose state has heads")
    if state_batch_indices is not None:
        raise NotImplementedError('selective_state_update: vim2.compat does not take state_batch_indices')
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    new = torch.exp(step[..., None] * A.float()) * state.float() + (step * x.float())[..., None] * B.float()[:, None]
    state.copy_(new)
    y = (new * C.float()[:, None]).sum(-1)
    y = y if D is None else y + x.float() * D.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


selective_state_update_ref = selective_state_update
