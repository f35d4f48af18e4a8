"""Errors of forecasts."""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn

from .windows import Windows

__all__ = ['Errors', 'evaluate', 'naive_scale']


def naive_scale(values: np.ndarray, season: int) -> np.ndarray:
    """MASE's denominator: mean |y(t) - y(t - season)| of each variate of (K, rows, M), NaN where there is none or 0."""
    if values.shape[1] <= season:
        return np.full((values.shape[0], values.shape[2]), np.nan)
    difference = np.abs(values[:, season:] - values[:, :-season])
    known = np.isfinite(difference)
    with np.errstate(invalid='ignore', divide='ignore'):
        scale = np.where(known, difference, 0.).sum(1) / known.sum(1)
    return np.where(scale > 0, scale, np.nan)


@dataclass
class Errors:
    """Mean errors over windows, for each step of the horizon and each variate: (H, M) tensors in float64.

    mse and mae are in the units of the windows (standardised, as a rule), own_mse and own_mae in those of the series,
    mase is in those of the seasonal naive forecast in the training part (NaN where that has no error).
    """
    mse: Tensor
    mae: Tensor
    own_mse: Tensor
    own_mae: Tensor
    mase: Tensor
    windows: int

    def summary(self, variate: Union[int, slice] = slice(None),  # noqa: B008
                step: Union[int, slice] = slice(None)) -> Dict[str, Any]:  # noqa: B008
        """Means over steps and variates."""
        out = {n: getattr(self, n)[step, variate].mean().item() for n in ('mse', 'mae', 'own_mse', 'own_mae')}
        mase = self.mase[step, variate]
        out['mase'] = mase.nanmean().item() if not mase.isnan().all() else None
        return out


@torch.inference_mode()
def evaluate(
        model: Union[nn.Module, str],
        windows: Windows,
        batch_size: int = 256,
        limit: Optional[int] = None,
        device: Optional[torch.device] = None,
        scale: Optional[np.ndarray] = None,
) -> Errors:
    """The errors of a model over all windows.

    Args:
        model: inputs of `Windows.take` to (B, H, M), put into evaluation mode; or 'last' for the last value, or
            'seasonal' for the values of a season before.
        windows: what to forecast.
        batch_size: windows at a time; the result does not depend on it, and no window is dropped.
        limit: take only that many windows, evenly spread. Default: all.
        device: where the model is. Default: the CPU.
        scale: (S, M) of `naive_scale`, in the units of the series; needed for MASE.
    """
    if isinstance(model, nn.Module):
        model.eval()
    unit = windows.unit
    scale = torch.full_like(unit, float('nan')) if scale is None else torch.as_tensor(scale).double()
    H, M = windows.horizon, windows.values.shape[2]
    total = {n: torch.zeros(H, M, dtype=torch.float64) for n in ('mse', 'mae', 'own_mse', 'own_mae', 'mase')}
    scaled = torch.zeros(M, dtype=torch.float64)
    n = 0
    for index in windows.batches(batch_size, limit):
        inputs, y = windows.take(index)
        if isinstance(model, str):
            forecast = windows.naive(index, windows.season if model == 'seasonal' else 1)
        else:
            forecast = model(**{k: v.to(device) for k, v in inputs.items()}).cpu()
        error = (forecast.float() - y).double()
        s = windows.starts[index, 0]
        own = error * unit[s][:, None]
        ratio = own.abs() / scale[s][:, None]
        for name, value in (('mse', error.square()), ('mae', error.abs()), ('own_mse', own.square()),
                            ('own_mae', own.abs()), ('mase', ratio.nan_to_num(0.))):
            total[name] += value.sum(0)
        scaled += scale[s].isfinite().sum(0)
        n += len(index)
    mase = torch.where(scaled > 0, total.pop('mase') / scaled, float('nan'))
    return Errors(**{k: v / n for k, v in total.items()}, mase=mase, windows=n)
