"""Intervals around forecasts: quantiles of a model's errors, as in conformal prediction."""
from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .errors import SeriesError
from .windows import Windows

__all__ = ['Intervals', 'spread']

LEVELS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
_SHARED_FROM = 64  # variates: from there on a table is kept for all of them, not for each


def spread(x: Tensor) -> Tensor:
    """(B, 1, M): the deviation of look-backs (B, T, M), in which errors are counted.

    What moves more is harder to forecast, and the network itself works in this unit. A tenth of the deviation of the
    training part is added (in squares), so that a series that stands still has an interval. Chosen on validation parts
    (docs/forecasting.md, Intervals).
    """
    return (x.var(1, keepdim=True, unbiased=False) + 0.01).sqrt()


class Intervals:
    """Quantiles of a model's errors for each step and variate, in units of the look-back's deviation.

    The quantile of a forecast is the forecast plus that of the errors on as many training as validation windows, of all
    series. Those on the validation part alone are of unseen data, as split conformal prediction wants them, but of one
    short time: next to a training part that stops early, errors of a longer time tell more (docs/forecasting.md).
    Where errors later are like those it covers what it says; `Forecaster.evaluate` measures what it covers.
    """

    def __init__(self, table: np.ndarray, windows: int):
        """
        Args:
            table: (levels, H, M), or (levels, H, 1) for all variates, in units of `spread`.
            windows: number that the table is from.
        """
        self.table, self.windows = np.asarray(table, np.float64), windows

    @classmethod
    @torch.inference_mode()
    def fit(cls, model: nn.Module, parts: Sequence[Windows], batch_size: int = 256, limit: int = 1500,
            device: Optional[torch.device] = None) -> 'Intervals':
        """From the errors of a model on windows of some parts, evenly spread, as many of each, at most `limit`."""
        model.eval()
        limit = min(limit, *map(len, parts))
        batches = []
        for part in parts:
            for index in part.batches(batch_size, limit):
                inputs, y = part.take(index)
                forecast = model(**{k: v.to(device) for k, v in inputs.items()}).float().cpu()
                batches.append((y - forecast) / spread(inputs['x']))
        errors = torch.cat(batches).double().numpy()
        windows = len(errors)
        if errors.shape[2] >= _SHARED_FROM:
            errors = errors.transpose(0, 2, 1).reshape(-1, errors.shape[1], 1)
        n = len(errors)
        table = []
        for level in LEVELS:  # as in conformal prediction: the (n + 1)th error is the one to come
            rank = np.ceil((n + 1) * level) if level > 0.5 else np.floor((n + 1) * level)
            k = int(np.clip(rank, 1, n)) - 1
            table.append(np.partition(errors, k, axis=0)[k] if level != 0.5 else np.median(errors, axis=0))
        return cls(np.stack(table), windows)

    @classmethod
    def from_dict(cls, state: Dict[str, Any]) -> 'Intervals':
        if tuple(state['levels']) != LEVELS:
            raise ValueError('the intervals have other levels than this version')
        return cls(np.asarray(state['table']), state['windows'])

    def to_dict(self) -> Dict[str, Any]:
        return dict(levels=LEVELS, windows=self.windows, table=[
            [[float(f'{v:.5g}') for v in row] for row in level] for level in self.table])

    def offsets(self, quantiles: Sequence[float]) -> Tensor:
        """(Q, H, M or 1): what is added to a forecast, in units of `spread`."""
        for q in quantiles:
            if not LEVELS[0] <= q <= LEVELS[-1]:
                raise SeriesError(f'⟨quantiles⟩ must be {LEVELS[0]} to {LEVELS[-1]}, got {q:g}')
        flat = self.table.reshape(len(LEVELS), -1)
        out = np.stack([np.interp(quantiles, LEVELS, column) for column in flat.T], 1)
        return torch.as_tensor(out.reshape(-1, *self.table.shape[1:]))
