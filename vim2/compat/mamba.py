"""mamba_ssm's modules: `Mamba` (and Vim's bidirectional variants of it), `Block`, and what a generation keeps.

Parameters have mamba_ssm's names, so that checkpoints of either load into the other.
"""
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vim2.layers.s6 import init_s6_
from vim2.ops import selective_scan
from .conv import causal_conv1d_fn, causal_conv1d_update
from .norm import RMSNorm, layer_norm_fn
from .scan import selective_state_update

__all__ = ['Block', 'BlockV1', 'GenerationMixin', 'InferenceParams', 'Mamba', 'load_config_hf', 'load_state_dict_hf']


@dataclass
class InferenceParams:
    """What a model keeps between the calls of a generation (mamba_ssm/utils/generation.py)."""
    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Optional[Tensor] = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class GenerationMixin:
    """For code that only derives from it: there is no language model here."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError('vim2.compat has no generation of text (mamba_ssm.utils.generation)')


def load_config_hf(*args: Any, **kwargs: Any) -> Any:
    """For code that only imports it."""
    raise NotImplementedError('vim2.compat does not load language models from the Hub (mamba_ssm.utils.hf)')


load_state_dict_hf = load_config_hf


class Mamba(nn.Module):
    """Mamba's block (arXiv 2312.00752); with `bimamba_type` that of Vim (arXiv 2401.09417)."""

    def __init__(
            self,
            d_model: int,
            d_state: int = 16,
            d_conv: int = 4,
            expand: float = 2,
            dt_rank='auto',
            dt_min: float = 0.001,
            dt_max: float = 0.1,
            dt_init: str = 'random',
            dt_scale: float = 1.0,
            dt_init_floor: float = 1e-4,
            conv_bias: bool = True,
            bias: bool = False,
            use_fast_path: bool = True,
            layer_idx: Optional[int] = None,
            device=None,
            dtype=None,
            bimamba_type: str = 'none',
            if_divide_out: bool = False,
            init_layer_scale: Optional[float] = None,
            if_devide_out: bool = False,
    ):
        """
        Args:
            d_model, d_state, d_conv, expand, dt_rank, conv_bias, bias: widths, and which layers have a bias.
            dt_min, dt_max, dt_init, dt_scale, dt_init_floor: initial step sizes.
            use_fast_path: not used; there is one path.
            layer_idx: this layer's key in `InferenceParams.key_value_memory_dict`.
            bimamba_type: 'none'; 'v1' for a second scan backward with an A of its own; 'v2' for a second scan backward
                with a convolution, projections, A and D of its own.
            if_divide_out: halve the sum of the two directions of 'v2' (older code spells it `if_devide_out`).
            init_layer_scale: initial value of a scale of each output channel. Default: no scale.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if bimamba_type not in ('none', 'v1', 'v2'):
            raise NotImplementedError(f"Mamba: bimamba_type must be 'none', 'v1' or 'v2', got {bimamba_type!r}")
        if dt_init not in ('random', 'constant'):
            raise NotImplementedError(f"Mamba: dt_init must be 'random' or 'constant', got {dt_init!r}")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == 'auto' else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.bimamba_type = bimamba_type
        self.if_divide_out = self.if_devide_out = if_divide_out or if_devide_out
        self.init_layer_scale = init_layer_scale
        self.activation = 'silu'
        self.act = nn.SiLU()

        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, **dd))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **dd)
        for suffix in ('', '_b') if bimamba_type == 'v2' else ('',):
            setattr(self, f'conv1d{suffix}', nn.Conv1d(
                self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **dd))
            setattr(self, f'x_proj{suffix}', nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **dd))
            dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **dd)
            setattr(self, f'dt_proj{suffix}', dt_proj)
            # A and D stay in float32, whatever dtype is asked for
            A_log = torch.empty(self.d_inner, d_state, device=device, dtype=torch.float32)
            D = torch.empty(self.d_inner, device=device, dtype=torch.float32)
            init_s6_(A_log, D, dt_proj.weight.data, dt_proj.bias.data, dt_min, dt_max)
            with torch.no_grad():
                bound = self.dt_rank ** -0.5 * dt_scale
                if dt_init == 'constant':
                    dt_proj.weight.fill_(bound)
                else:
                    dt_proj.weight.uniform_(-bound, bound)
                dt = F.softplus(dt_proj.bias.float()).clamp(min=dt_init_floor)
                dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            dt_proj.bias._no_reinit = True
            self._register_state(f'A{suffix}_log', A_log)
            self._register_state(f'D{suffix}', D)
        if bimamba_type == 'v1':
            self._register_state('A_b_log', self.A_log.detach().clone())
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **dd)

    def _register_state(self, name: str, value: Tensor) -> None:
        parameter = nn.Parameter(value)
        parameter._no_weight_decay = True
        self.register_parameter(name, parameter)

    def _direction(
            self, x: Tensor, z: Tensor, suffix: str = '', reverse: bool = False, state: Optional[Tensor] = None,
    ) -> Tensor:
        """Convolution, projections and scan of one direction; (B, E, L) to the same. Writes the last state."""
        conv, x_proj, dt_proj = (getattr(self, name + suffix) for name in ('conv1d', 'x_proj', 'dt_proj'))
        x = x.flip(-1) if reverse else x
        x = causal_conv1d_fn(x, conv.weight.squeeze(1), conv.bias, activation=self.activation)
        x = x.flip(-1) if reverse else x
        dt, B, C = x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, B, C = F.linear(dt, dt_proj.weight).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
        A = -torch.exp(getattr(self, f'A{suffix}_log').float())
        scan = dict(D=getattr(self, f'D{suffix}').float(), z=z, delta_bias=dt_proj.bias.float(), delta_softplus=True)
        y = selective_scan(x, delta.to(x.dtype), A, B, C, return_last_state=state is not None, reverse=reverse, **scan)
        if state is not None:
            y, last = y
            state.copy_(last)
        if self.bimamba_type == 'v1':
            A = -torch.exp(self.A_b_log.float())
            y = y + selective_scan(x, delta.to(x.dtype), A, B, C, reverse=True, **scan)
        return y

    def forward(self, hidden_states: Tensor, inference_params: Optional[InferenceParams] = None) -> Tensor:
        """
        Args:
            hidden_states: (B, L, d_model).
            inference_params: of a generation: the first call (`seqlen_offset` 0) fills this layer's states, later ones
                take one token each.

        Returns:
            The shape of hidden_states.
        """
        conv_state, ssm_state = None, None
        if inference_params is not None:
            if self.bimamba_type != 'none':
                raise NotImplementedError('Mamba: a bidirectional block cannot generate')
            conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        if conv_state is not None:
            conv_state.copy_(F.pad(x, (self.d_conv - x.shape[-1], 0)))  # cut from the left if L is larger
        y = self._direction(x, z, state=ssm_state)
        if self.bimamba_type == 'v2':
            y = y + self._direction(x, z, '_b', reverse=True)
            y = y / 2 if self.if_divide_out else y
        out = self.out_proj(y.transpose(1, 2))
        return out if self.init_layer_scale is None else out * self.gamma

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """The next token, (B, 1, d_model); the states are changed in place, and returned."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f'Mamba.step takes one token at a time, got {hidden_states.shape[1]}')
        if self.bimamba_type != 'none':
            raise NotImplementedError('Mamba: a bidirectional block cannot generate')
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(
            ssm_state, x, F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log.float()), B, C, self.D, z=z,
            dt_bias=self.dt_proj.bias, dt_softplus=True)
        out = self.out_proj(y)
        out = out if self.init_layer_scale is None else out * self.gamma
        return out.unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
            self, batch_size: int, max_seqlen: int, dtype=None, **kwargs: Any,
    ) -> Tuple[Tensor, Tensor]:
        """Zero states: the last inputs of the convolution (B, E, d_conv), and the scan's (B, E, N)."""
        weight = self.conv1d.weight
        conv_state = torch.zeros(
            batch_size, self.d_inner, self.d_conv, device=weight.device, dtype=dtype or weight.dtype)
        ssm_state = torch.zeros(
            batch_size, self.d_inner, self.d_state, device=weight.device, dtype=dtype or self.dt_proj.weight.dtype)
        return conv_state, ssm_state

    def _get_states_from_cache(
            self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False,
    ) -> Tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError('Mamba: inference_params need a layer_idx, which the constructor takes')
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        states = cache[self.layer_idx]
        if initialize_states:
            for state in states:
                state.zero_()
        return states


class Block(nn.Module):
    """`residual += hidden`, the norm, the mixer; and the same for an MLP (mamba_ssm/modules/block.py)."""

    def __init__(
            self,
            dim: int,
            mixer_cls: Callable[[int], nn.Module],
            mlp_cls: Callable[[int], nn.Module],
            norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
            fused_add_norm: bool = False,
            residual_in_fp32: bool = False,
    ):
        """
        Args:
            dim: width.
            mixer_cls, norm_cls: what makes the parts, from the width.
            mlp_cls: the same; nn.Identity for none.
            fused_add_norm: sum and norm in float32 at once.
            residual_in_fp32: keep the residual in float32.
        """
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        else:
            self.mlp = None
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise TypeError('Block: fused_add_norm needs nn.LayerNorm or RMSNorm')

    def _add_norm(self, norm: nn.Module, hidden: Tensor, residual: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            return layer_norm_fn(
                hidden, norm.weight, norm.bias, residual=residual, prenorm=True, residual_in_fp32=self.residual_in_fp32,
                eps=norm.eps, is_rms_norm=isinstance(norm, RMSNorm))
        residual = hidden + residual if residual is not None else hidden
        hidden = norm(residual.to(dtype=norm.weight.dtype))
        return hidden, residual.to(torch.float32) if self.residual_in_fp32 else residual

    def forward(
            self, hidden_states: Tensor, residual: Optional[Tensor] = None, inference_params=None, **mixer_kwargs: Any,
    ) -> Tuple[Tensor, Tensor]:
        """Hidden states (B, L, D) and the residual before them; the same after this block."""
        hidden, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden = self.mixer(hidden, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden, residual = self._add_norm(self.norm2, hidden, residual)
            hidden = self.mlp(hidden)
        return hidden, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs: Any):
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class BlockV1(Block):
    """`Block` of mamba_ssm 1 (mamba_ssm/modules/mamba_simple.py), without an MLP."""

    def __init__(self, dim: int, mixer_cls, norm_cls=nn.LayerNorm, fused_add_norm: bool = False,
                 residual_in_fp32: bool = False):
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


