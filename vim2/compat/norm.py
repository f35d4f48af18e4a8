"""mamba_ssm's fused norms (`ops/triton/layer_norm.py`; `layernorm.py` in versions 1) in plain PyTorch."""
from typing import Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['RMSNorm', 'layer_norm_fn', 'layer_norm_ref', 'rms_norm_fn', 'rms_norm_ref']


def layer_norm_fn(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        residual: Optional[Tensor] = None,
        x1: Optional[Tensor] = None,
        weight1: Optional[Tensor] = None,
        bias1: Optional[Tensor] = None,
        eps: float = 1e-6,
        dropout_p: float = 0.0,
        rowscale: Optional[Tensor] = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        zero_centered_weight: bool = False,
        is_rms_norm: bool = False,
        return_dropout_mask: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """`norm(dropout(x) + residual)` over the last dimension, in float32.

    Args:
        x, residual: (..., D).
        weight, bias: (D,).
        prenorm: also return the sum: in residual's dtype; without one in x's, or in float32 with `residual_in_fp32`.
        zero_centered_weight: add 1 to the weight.
        is_rms_norm: RMSNorm, else LayerNorm.

    Returns:
        The norm in x's dtype, or (norm, sum).

    Raises:
        NotImplementedError: x1, weight1, bias1, rowscale, return_dropout_mask.
    """
    if isinstance(x1, float):
        raise TypeError('layer_norm_fn: pass eps and what follows by keyword; mamba_ssm 1 and 2 differ in their places')
    for name, value in dict(x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale,
                            return_dropout_mask=return_dropout_mask or None).items():
        if value is not None:
            raise NotImplementedError(f'layer_norm_fn: vim2.compat does not take {name}')
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    total = F.dropout(x, dropout_p).to(wide) if dropout_p else x.to(wide)
    if residual is not None:
        total = total + residual.to(wide)
    weight = weight.to(wide) + 1. if zero_centered_weight else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if is_rms_norm:
        y = F.rms_norm(total, weight.shape, weight, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(total, weight.shape, weight, bias, eps)
    if not prenorm:
        return y.to(dtype)
    return y.to(dtype), total.to(residual.dtype if residual is not None else wide if residual_in_fp32 else dtype)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: Optional[Tensor] = None, *args, **kwargs):
    """:func:`layer_norm_fn` with `is_rms_norm`."""
    return layer_norm_fn(x, weight, bias, residual, *args, **kwargs, is_rms_norm=True)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: Optional[Tensor] = None, *args,
                   upcast: bool = False, **kwargs):
    """:func:`layer_norm_fn`, which always computes in float32."""
    return layer_norm_fn(x, weight, bias, residual, *args, **kwargs)


def rms_norm_ref(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: Optional[Tensor] = None, *args,
                 upcast: bool = False, **kwargs):
    """:func:`rms_norm_fn`, which always computes in float32."""
    return rms_norm_fn(x, weight, bias, residual, *args, **kwargs)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, with an optional sum before it; see :func:`layer_norm_fn`."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, zero_centered_weight: bool = False,
                 device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.zero_centered_weight = zero_centered_weight
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight) if self.zero_centered_weight else nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None, prenorm: bool = False,
                residual_in_fp32: bool = False):
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.,
            zero_centered_weight=self.zero_centered_weight)
