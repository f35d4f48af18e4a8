"""Selective channel mixer of MambaMixer (arXiv 2403.19888), for maps of any size."""
import math
from functools import partial
from typing import Optional, Type

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vim2.ops.functional import sequence_scan
from .grid import average_pool_matrix, interpolate_matrix
from .legacy import upgrade_before_loading
from .recompute import in_forward_mode, recomputed
from .s6 import init_s6_

__all__ = ['SelectiveChannelMixer']

# Leaves for torch.fx as well, not only for timm's feature extraction (register_notrace_function).
torch.fx.wrap('average_pool_matrix')
torch.fx.wrap('interpolate_matrix')


def _taps(x: Tensor, weight: Tensor, reverse: bool) -> Tensor:
    """Causal convolution of the last dimension of x (..., E) with one filter (T,), by T shifted multiply-adds.

    Args:
        reverse: from the last channel to the first: the same as to flip the channels, convolve, and flip back.
    """
    T, E = weight.shape[0], x.shape[-1]
    taps = weight.unbind()  # 0-dim tensors take part in no type promotion
    y = x * taps[T - 1]
    for shift in range(1, min(T, E)):
        if reverse:
            y[..., :E - shift].addcmul_(x[..., shift:], taps[T - 1 - shift])
        else:
            y[..., shift:].addcmul_(x[..., :E - shift], taps[T - 1 - shift])
    return y


class _ChannelTaps(torch.autograd.Function):
    """:func:`_taps` with its gradient written out: autograd's of the shifted views takes two to four times as long.

    It has no rule for forward mode: what such a rule returns, PyTorch does not differentiate again.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, reverse: bool) -> Tensor:
        return _taps(x, weight, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.reverse = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        T, E = weight.shape[0], x.shape[-1]
        sums = []
        for shift in range(T - 1, -1, -1):
            a, b = (x, grad) if not ctx.reverse else (grad, x)
            kept = max(E - shift, 0)
            sums.append((a[..., :kept] * b[..., E - kept:]).sum(dtype=weight.dtype))
        return _ChannelTaps.apply(grad, weight, not ctx.reverse), torch.stack(sums), None


class ChannelConv(nn.Conv1d):
    """A causal convolution along the channels: one filter, shared by the tokens.

    It computes what `nn.Conv1d(1, 1, taps)` computes on each token's channels as a sequence, by shifted multiply-adds:
    eight to fifty times as fast as PyTorch's convolutions of one channel on a CPU.
    """

    def __init__(self, taps: int, reverse: bool = False, device=None, dtype=None):
        """
        Args:
            taps: number of taps.
            reverse: read from the last channel to the first: tap t of T reads channel e + (T - 1) - t instead of
                e - (T - 1) + t. The same as to flip the channels, convolve causally, and flip back.
        """
        super().__init__(1, 1, taps, device=device, dtype=dtype)
        self.taps = taps
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (..., E).

        Returns:
            (..., E).
        """
        weight = self.weight.reshape(self.taps)
        if torch.jit.is_scripting():
            y = self._padded(x, weight)
        elif (torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, Tensor)
              or in_forward_mode(x)):
            y = self._padded(x, weight)  # graphs get plain operators; torch.fx traces with proxies
        else:
            y = _ChannelTaps.apply(x, weight, self.reverse)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def _padded(self, x: Tensor, weight: Tensor) -> Tensor:
        """:func:`_taps` to the bit, without writing in place."""
        E, last = x.shape[-1], self.taps - 1
        x = F.pad(x, (0, last) if self.reverse else (last, 0))
        taps = weight.unbind()
        here = 0 if self.reverse else last  # where channel e stands in the padded row of the window of e
        y = x[..., here:here + E] * taps[last]
        for shift in range(1, self.taps):
            start = here + shift if self.reverse else here - shift
            y = torch.addcmul(y, x[..., start:start + E], taps[last - shift])
        return y


def _conv_silu(conv: nn.Module, x: Tensor) -> Tensor:
    return F.silu(conv(x))


class SelectiveChannelMixer(nn.Module):
    """The token mixer's transpose: S6 along the *channels*, with the tokens as its features.

    `linear -> conv along the channels -> silu -> S6 along the channels, both ways -> norm -> * silu(gate) -> linear`

    The paper's projections of S6 are here Linears over the tokens of a channel. Their shapes would depend on the image
    size; they act on a fixed token grid of P x P instead, to which the map is average-pooled. What is per token again,
    the step sizes, is interpolated back from the grid, and the diagonal of the Linear is kept at full resolution by
    one scalar: `dt = up(W2 W1 pool(u) + b) + w u`. Where the map *is* P x P this is the paper's equation: B and C by
    Linears over all tokens, the step sizes by a Linear of low rank plus a diagonal.

    A and D are shared by the tokens, whose number is not fixed. Direction 0 reads the channels upwards, direction 1
    downwards, each with its own convolution, B, C and step sizes.
    """

    def __init__(
            self,
            dim: int,
            expand: float = 2.0,
            d_state: int = 16,
            token_grid: int = 7,
            dt_rank: Optional[int] = None,
            d_conv: int = 4,
            num_scans: int = 2,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: number of channels in and out, d.
            expand: inner width over d, E = expand * d: the length of the scans.
            d_state: size of the state of a token, N.
            token_grid: side P of the token grid.
            dt_rank: rank of the step sizes' projection. Default: ceil(P^2 / 16).
            d_conv: taps of the causal convolution along the channels, one filter per direction, shared by the tokens.
            num_scans: 2 for both ways along the channels, 1 for upwards only.
            norm_layer: the normalisation, over the last dimension.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if num_scans not in (1, 2):
            raise ValueError(f'SelectiveChannelMixer: num_scans must be 1 or 2, got {num_scans}')
        self.inner_dim = int(expand * dim)
        self.d_state = d_state
        self.token_grid = token_grid
        self.dt_rank = dt_rank or math.ceil(token_grid ** 2 / 16)
        self.d_conv = d_conv
        self.num_scans = num_scans
        tokens = token_grid ** 2

        self.in_proj = nn.Linear(dim, self.inner_dim, bias=False, **dd)
        self.gate_proj = nn.Linear(dim, self.inner_dim, bias=False, **dd)
        self.conv1d = nn.ModuleList([ChannelConv(d_conv, reverse=s == 1, **dd) for s in range(num_scans)])
        self.x_proj_weight = nn.Parameter(torch.empty(num_scans, self.dt_rank + 2 * d_state, tokens, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(num_scans, tokens, self.dt_rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(num_scans, tokens, **dd))
        self.dt_projs_diag = nn.Parameter(torch.empty(num_scans, **dd))
        self.A_logs = nn.Parameter(torch.empty(num_scans, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(num_scans, **dd))
        self.out_norm = norm_layer(self.inner_dim, **dd)
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=False, **dd)
        self.register_load_state_dict_pre_hook(upgrade_before_loading)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / self.token_grid  # as nn.Linear
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        nn.init.zeros_(self.dt_projs_diag)
        init_s6_(self.A_logs, self.Ds, self.dt_projs_weight, self.dt_projs_bias)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, H, W, d), any H, W >= 1.

        Returns:
            (B, H, W, d).
        """
        _, H, W, _ = x.shape
        x = x.flatten(1, 2)
        y, gate = self._scans(self.in_proj(x), H, W), self.gate_proj(x)  # (B, HW, E)
        if torch.jit.is_scripting():
            return self._output(y, gate).unflatten(1, (H, W))
        return recomputed(self._output, y, gate, modules=(self.out_norm, self.out_proj)).unflatten(1, (H, W))

    def _scans(self, branch: Tensor, H: int, W: int) -> Tensor:
        """Convolution and S6, all directions summed: (B, HW, E) to the same. What it needs is free when it returns."""
        B, _, E = branch.shape
        N, R, P = self.d_state, self.dt_rank, self.token_grid
        pool_h, pool_w = average_pool_matrix(branch, H, P), average_pool_matrix(branch, W, P)
        up_h, up_w = interpolate_matrix(branch, P, H), interpolate_matrix(branch, P, W)
        A = -torch.exp(self.A_logs.float())
        ys = []
        for s, conv in enumerate(self.conv1d):
            if torch.jit.is_scripting():
                u = F.silu(conv(branch))
            else:
                u = recomputed(partial(_conv_silu, conv), branch, modules=(conv,))

            # The Linears over the tokens of each channel, on the grid. Expanded weights: the product of a 2-d and a
            # 3-d tensor would transpose the latter.
            grid = torch.matmul(pool_w, u.reshape(B * H, W, E)).reshape(B, H, P * E)
            grid = torch.matmul(pool_h, grid).reshape(B, P * P, E)
            dt, Bs, Cs = torch.bmm(self.x_proj_weight[s].expand(B, -1, -1), grid).split([R, N, N], dim=1)
            delta = torch.baddbmm(self.dt_projs_bias[s].unsqueeze(1), self.dt_projs_weight[s].expand(B, -1, -1), dt)

            delta = torch.matmul(up_h, delta.reshape(B, P, P * E))
            delta = torch.matmul(up_w, delta.reshape(B * H, P, E)).reshape(B, H * W, E)
            delta = delta + u * self.dt_projs_diag[s]
            y, _ = sequence_scan(
                u, delta, A[s].expand(H * W, N), Bs, Cs, D=self.Ds[s].expand(H * W), delta_softplus=True,
                reverse=s == 1)
            ys.append(y)
        return ys[0] if self.num_scans == 1 else ys[0] + ys[1]

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(self.out_norm(y) * F.silu(gate))

    def extra_repr(self) -> str:
        return (f'd_state={self.d_state}, token_grid={self.token_grid}, dt_rank={self.dt_rank}, '
                f'd_conv={self.d_conv}, num_scans={self.num_scans}')
