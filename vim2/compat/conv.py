"""causal_conv1d's functions in plain PyTorch, with the signatures of version 1.6."""
from typing import Optional, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['causal_conv1d_fn', 'causal_conv1d_ref', 'causal_conv1d_update', 'causal_conv1d_update_ref']


def _activated(x: Tensor, activation: Optional[str]) -> Tensor:
    if activation not in (None, 'silu', 'swish'):
        raise NotImplementedError(f"causal_conv1d: activation must be None, 'silu' or 'swish', got {activation!r}")
    return x if activation is None else F.silu(x)


def _missing(function: str, **options) -> None:
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f'{function}: vim2.compat does not take {name}')


def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor] = None,
        seq_idx: Optional[Tensor] = None,
        initial_states: Optional[Tensor] = None,
        return_final_states: bool = False,
        final_states_out: Optional[Tensor] = None,
        activation: Optional[str] = None,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """A depth-wise convolution that sees the present and the past.

    Args:
        x: (B, D, L).
        weight: (D, W); bias: (D,).
        seq_idx: not there. Version 1.0 had the activation in its place: a string is taken for that.
        initial_states: the W - 1 inputs before the first, (B, D, W - 1). Default: zeros.
        return_final_states: also return the last W - 1 inputs, (B, D, W - 1), the initial states among them if L is
            smaller.
        final_states_out: write them there.
        activation: None, 'silu' or 'swish'.

    Returns:
        (B, D, L) in x's dtype, or (that, final states).
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    _missing('causal_conv1d_fn', seq_idx=seq_idx)
    dtype, (dim, width) = x.dtype, weight.shape
    x = x.to(weight.dtype)
    if initial_states is None:
        padded = F.pad(x, (width - 1, 0))
    else:
        padded = torch.cat([initial_states.to(x.dtype), x], dim=-1)
    out = _activated(F.conv1d(padded, weight.unsqueeze(1), bias, groups=dim), activation).to(dtype)
    if not return_final_states:
        return out
    final = padded[..., padded.shape[-1] - (width - 1):].to(dtype)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return out, final


causal_conv1d_ref = causal_conv1d_fn


def causal_conv1d_update(
        x: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Optional[Tensor] = None,
        activation: Optional[str] = None,
        cache_seqlens: Optional[Tensor] = None,
        conv_state_indices: Optional[Tensor] = None,
) -> Tensor:
    """The convolution of the next tokens; the state is changed in place.

    Args:
        x: (B, D) or (B, D, L).
        conv_state: the inputs before, latest last, (B, D, S) with S >= W - 1.
        weight: (D, W); bias: (D,).
        activation: None, 'silu' or 'swish'.
        cache_seqlens, conv_state_indices: not there.

    Returns:
        The shape of x.
    """
    _missing('causal_conv1d_update', cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    tokens = x.unsqueeze(-1) if x.ndim == 2 else x
    width, length, kept = weight.shape[1], tokens.shape[-1], conv_state.shape[-1]
    if kept < width - 1:
        raise ValueError(f'causal_conv1d_update: conv_state holds {kept} inputs, a kernel of {width} needs {width - 1}')
    inputs = torch.cat([conv_state, tokens.to(conv_state.dtype)], dim=-1)
    conv_state.copy_(inputs[..., inputs.shape[-1] - kept:])
    inputs = inputs[..., inputs.shape[-1] - (length + width - 1):].to(weight.dtype)
    out = _activated(F.conv1d(inputs, weight.unsqueeze(1), bias, groups=weight.shape[0]), activation).to(x.dtype)
    return out.squeeze(-1) if x.ndim == 2 else out


causal_conv1d_update_ref = causal_conv1d_update
