"""Errors of forecasts."""
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from .data import Windows

__all__ = ['Errors', 'evaluate']


class Errors(NamedTuple):
    """Mean errors over windows, for each step of the horizon and each variate: two (H, M) tensors in float64."""
    mse: Tensor
    mae: Tensor
    windows: int


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        windows: Windows,
        batch_size: int = 256,
        limit: Optional[int] = None,
        device: Optional[torch.device] = None,
) -> Errors:
    """The errors of a model over all windows, in the units of the windows (standardised, if the series is).

    Args:
        model: (B, T, M) to (B, H, M); it is put into evaluation mode.
        windows: what to forecast.
        batch_size: windows at a time; the result does not depend on it, and no window is dropped.
        limit: take only that many windows, evenly spread. Default: all.
        device: where the model is. Default: the CPU.
    """
    model.eval()
    mse = mae = torch.zeros((), dtype=torch.float64)
    n = 0
    for x, y in windows.batches(batch_size, limit):
        error = model(x.to(device)).float() - y.to(device)
        mse = mse + error.square().sum(0).double().cpu()
        mae = mae + error.abs().sum(0).double().cpu()
        n += len(x)
    return Errors(mse / n, mae / n, n)
