"""S6, the selective state space layer of MambaMixer, over maps and sequences."""
import math
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vim2.ops.functional import map_scan, sequence_scan

__all__ = ['S6', 'init_s6_']


@torch.no_grad()
def init_s6_(A_logs: Tensor, Ds: Tensor, dt_weight: Tensor, dt_bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1):
    """Mamba's initialisation, in place.

    A = -(1, ..., N) in each channel, D = 1, step sizes softplus(dt_bias) log-uniform in [dt_min, dt_max], and the
    up-projection of the low-rank step sizes uniform within +-rank^-0.5, which keeps the variance at initialisation.

    Args:
        A_logs: (..., N).
        Ds: any shape.
        dt_weight: (..., rank).
        dt_bias: any shape.
        dt_min, dt_max: range of the initial step sizes.
    """
    A_logs.copy_(torch.arange(1, A_logs.shape[-1] + 1, device=A_logs.device, dtype=torch.float32).log())
    Ds.fill_(1.)
    bound = dt_weight.shape[-1] ** -0.5
    dt_weight.uniform_(-bound, bound)
    dt = torch.empty(dt_bias.shape, device=dt_bias.device, dtype=torch.float32)
    dt = dt.uniform_(math.log(dt_min), math.log(dt_max)).exp()
    dt_bias.copy_(dt + (-torch.expm1(-dt)).log())  # the inverse of softplus


class S6(nn.Module):
    """K independent selective scans that read the same tokens, each in its own order.

    Every token gives its own B, C and step size by Linears, which commute with a permutation of the tokens: one GEMM
    over the unpermuted tokens serves all K directions, and the order is left to the scan. The parameters have the
    names and shapes of VMamba's vanilla SS2D.

    Over a map (`spatial=True`) the directions are, in order: row-major, column-major, reversed row-major, reversed
    column-major (VMamba's cross-scan). Over a sequence: forward, reversed.
    """
    spatial: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            dt_rank: Optional[int] = None,
            num_scans: int = 4,
            spatial: bool = True,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: number of channels, E.
            d_state: size of the state of a channel, N.
            dt_rank: rank of the step sizes' projection. Default: ceil(dim / 16).
            num_scans: number of directions, K: 1 to 4 over a map, 1 or 2 over a sequence.
            spatial: whether the tokens are a map (forward takes it) or a sequence (`scan` takes it).
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        most = 4 if spatial else 2
        if not 1 <= num_scans <= most:
            raise ValueError(f"S6: num_scans must be 1 to {most} over a {'map' if spatial else 'sequence'}, "
                             f'got {num_scans}')
        self.dim = dim
        self.d_state = d_state
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.num_scans = num_scans
        self.spatial = spatial

        self.x_proj_weight = nn.Parameter(torch.empty(num_scans, self.dt_rank + 2 * d_state, dim, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(num_scans, dim, self.dt_rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(num_scans, dim, **dd))
        self.A_logs = nn.Parameter(torch.empty(num_scans * dim, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(num_scans * dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.dim ** -0.5  # as nn.Linear, of which Mamba's x_proj is one
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_s6_(self.A_logs, self.Ds, self.dt_projs_weight, self.dt_projs_bias)

    def forward(self, x: Tensor) -> Tensor:
        """All scans of a map, summed.

        Args:
            x: (B, H, W, E).

        Returns:
            (B, H, W, E).
        """
        B, H, W, E = x.shape
        K, N, R = self.num_scans, self.d_state, self.dt_rank
        proj = F.linear(x, self.x_proj_weight.flatten(0, 1)).reshape(B, H, W, K, R + 2 * N)
        dt, Bs, Cs = proj.split([R, N, N], dim=-1)
        A = -torch.exp(self.A_logs.float())
        y = map_scan(
            x.permute(0, 3, 1, 2), dt.permute(0, 3, 4, 1, 2), A.reshape(K, E, N), Bs.permute(0, 3, 4, 1, 2),
            Cs.permute(0, 3, 4, 1, 2), self.Ds.reshape(K, E), self.dt_projs_bias, delta_softplus=True,
            delta_weight=self.dt_projs_weight)
        return y.permute(0, 2, 3, 1)

    def scan(self, x: Tensor, direction: int = 0) -> Tensor:
        """One scan of a sequence.

        Args:
            x: (B, L, E).
            direction: 0 forward, 1 reversed.

        Returns:
            (B, L, E).
        """
        N, R, E = self.d_state, self.dt_rank, self.dim
        dt, B, C = F.linear(x, self.x_proj_weight[direction]).split([R, N, N], dim=-1)
        A = -torch.exp(self.A_logs[direction * E:(direction + 1) * E].float())
        y, _ = sequence_scan(
            x.transpose(1, 2), dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2),
            D=self.Ds[direction * E:(direction + 1) * E], delta_bias=self.dt_projs_bias[direction],
            delta_softplus=True, reverse=direction == 1, delta_weight=self.dt_projs_weight[direction])
        return y.transpose(1, 2)

    def extra_repr(self) -> str:
        return (f'{self.dim}, d_state={self.d_state}, dt_rank={self.dt_rank}, num_scans={self.num_scans}, '
                f'spatial={self.spatial}')
