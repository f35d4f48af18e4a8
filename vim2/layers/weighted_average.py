"""Learned weighted average of earlier features, MambaMixer (arXiv 2403.19888)."""
from typing import List

import torch
from torch import Tensor, nn

__all__ = ['WeightedAverage']


class WeightedAverage(nn.Module):
    """The input of a mixer: `sum_i w_i y_i` over the outputs `y_i` of every earlier mixer and the stage input `y_0`.

    One scalar per term, for token and channel mixers alike (alpha, beta, theta and gamma in the paper). It starts as
    the plain chain: 1 on the latest output, 0 on all others.
    """

    def __init__(self, num_inputs: int, device=None, dtype=None):
        """
        Args:
            num_inputs: number of earlier outputs, the stage input included, at least 1.
        """
        super().__init__()
        if num_inputs < 1:
            raise ValueError(f'WeightedAverage: num_inputs must be at least 1, got {num_inputs}')
        self.num_inputs = num_inputs
        self.weight = nn.Parameter(torch.empty(num_inputs, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.weight[-1] = 1.

    def forward(self, ys: List[Tensor]) -> Tensor:
        """
        Args:
            ys: the `num_inputs` earlier outputs, oldest first, all of one shape.

        Returns:
            Their weighted sum, in that shape and in the dtype of the terms.
        """
        # One fused multiply-add per term: torch.stack(ys) would copy everything that the stage has computed so far.
        # A weight is a 0-dim tensor, which takes part in no type promotion: half-precision terms stay so.
        x = ys[self.num_inputs - 1] * self.weight[self.num_inputs - 1]
        for i in range(self.num_inputs - 1):
            x = torch.addcmul(x, ys[i], self.weight[i])
        return x

    def extra_repr(self) -> str:
        return f'num_inputs={self.num_inputs}'
