"""Selective token mixer of MambaMixer (arXiv 2403.19888)."""
import math
from typing import Optional, Type

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .legacy import upgrade_before_loading
from .recompute import recomputed
from .s6 import S6

__all__ = ['SelectiveTokenMixer']


class SequenceConv(nn.Conv1d):
    """A causal depth-wise convolution along a sequence whose channels are last in memory."""

    def __init__(self, dim: int, taps: int, reverse: bool = False, device=None, dtype=None):
        """
        Args:
            dim: number of channels, E.
            taps: number of taps.
            reverse: read the sequence from its end: the same as to flip it, convolve causally, and flip back.
        """
        super().__init__(dim, dim, taps, groups=dim, device=device, dtype=dtype)
        self.taps = taps
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, L, E).

        Returns:
            (B, L, E).
        """
        weight, last = self.weight, self.taps - 1
        x = F.pad(x, (0, 0, 0, last) if self.reverse else (0, 0, last, 0)).transpose(1, 2)
        if self.reverse:
            weight = weight.flip(2)
        # As a 2-d convolution of height 1 the channels stay last in memory: two to four times faster on a CPU.
        y = F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), self.bias, groups=self.groups)
        return y.squeeze(2).transpose(1, 2)


class SelectiveTokenMixer(nn.Module):
    """A branch `silu(conv(linear(x)))` goes through S6, is normalised, and is gated by `silu(linear(x))`.

    - `ndim=2`: over an image's map. 3x3 depth-wise convolution, four scans. This is VMamba's vanilla SS2D.
    - `ndim=1`: over a sequence. Causal depth-wise convolution of 4 taps; one scan for causal data (with
      `out_norm=False` this is Mamba's block), or two, the second of which reads the sequence reversed through its own
      anti-causal convolution: a sequence that has no order of its own, such as the variates of a time series.

    The gate is the same for every scan, so gating each and summing is gating the sum.
    """
    spatial: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            expand: float = 2.0,
            d_state: int = 16,
            dt_rank: Optional[int] = None,
            d_conv: Optional[int] = None,
            ndim: int = 2,
            num_scans: Optional[int] = None,
            out_norm: bool = True,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: number of channels in and out, d.
            expand: inner width over d, E = expand * d.
            d_state: size of the state of a channel, N.
            dt_rank: rank of the step sizes' projection. Default: ceil(dim / 16).
            d_conv: kernel of the convolution, odd for a map. Default: 3 (by 3) for a map, 4 for a sequence.
            ndim: 2 for a map, 1 for a sequence.
            num_scans: number of scan directions. Default: 4 for a map, 1 for a sequence.
            out_norm: normalise the scans' sum before the gate.
            norm_layer: the normalisation, over the last dimension.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if ndim not in (1, 2):
            raise ValueError(f'SelectiveTokenMixer: ndim must be 1 (sequence) or 2 (map), got {ndim}')
        self.spatial = ndim == 2
        self.inner_dim = int(expand * dim)
        self.d_conv = d_conv or (3 if self.spatial else 4)
        if self.spatial and self.d_conv % 2 == 0:
            raise ValueError(f'SelectiveTokenMixer: d_conv must be odd over a map, got {self.d_conv}')
        num_scans = num_scans or (4 if self.spatial else 1)

        self.in_proj = nn.Linear(dim, self.inner_dim, bias=False, **dd)
        self.gate_proj = nn.Linear(dim, self.inner_dim, bias=False, **dd)
        if self.spatial:
            self.conv2d = nn.Conv2d(
                self.inner_dim, self.inner_dim, self.d_conv, padding=self.d_conv // 2, groups=self.inner_dim, **dd)
        else:
            self.conv1d = nn.ModuleList([
                SequenceConv(self.inner_dim, self.d_conv, reverse=s == 1, **dd) for s in range(num_scans)])
        self.s6 = S6(
            self.inner_dim, d_state=d_state, dt_rank=dt_rank or math.ceil(dim / 16), num_scans=num_scans,
            spatial=self.spatial, **dd)
        self.out_norm = norm_layer(self.inner_dim, **dd) if out_norm else nn.Identity()
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=False, **dd)
        self.register_load_state_dict_pre_hook(upgrade_before_loading)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, H, W, d) if `ndim` is 2, (B, L, d) if it is 1.

        Returns:
            The shape of x.
        """
        branch, gate = self.in_proj(x), self.gate_proj(x)
        if self.spatial:
            branch = self.conv2d(branch.permute(0, 3, 1, 2))  # a view: the layout stays channels-last
            y = self.s6(F.silu(branch).permute(0, 2, 3, 1))
        else:
            y = torch.zeros_like(gate)
            for i, conv in enumerate(self.conv1d):
                u = F.silu(conv(branch))
                y = y + self.s6.scan(u, i)
        if torch.jit.is_scripting():
            return self._output(y, gate)
        return recomputed(self._output, y, gate, modules=(self.out_norm, self.out_proj))

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(self.out_norm(y) * F.silu(gate))
