"""Splits, scaling, and the windows that are trained on and measured."""
import re
import warnings
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import SeriesError
from .panel import Tensors

__all__ = ['Scaler', 'Split', 'Windows', 'split_series']


class Split(NamedTuple):
    """First and one-past-last row of the training, validation and test parts."""
    train: Tuple[int, int]
    val: Tuple[int, int]
    test: Tuple[int, int]


_MONTH = 30 * 24  # hours, as in the benchmark's code
_ETT = {'ett-hour': _MONTH, 'ett-minute': 4 * _MONTH}


def split_series(length: int, scheme: str = '0.7/0.1/0.2', horizon: int = 1) -> Split:
    """The standard splits of the long-term forecasting benchmark, and one for series of any length.

    Args:
        length: rows of the series.
        scheme: 'ett-hour' or 'ett-minute' for the first 12, 4 and 4 months of 30 days of an hourly or quarter-hourly
            series; 'A/B/C' for three parts of the length, of which the first and the last are rounded down and the
            middle takes what is left; 'auto': 0.7/0.1/0.2, but twice the horizon for validation and test where that is
            more, and at least one horizon; 'no-test': 0.85/0.15/0, likewise.
        horizon: steps that are forecast.

    Raises:
        SeriesError: a scheme that is none, or a series too short for it.
    """
    if scheme in _ETT:
        n = [12 * _ETT[scheme], 4 * _ETT[scheme], 4 * _ETT[scheme]]
        if length < sum(n):
            raise SeriesError(f'the ⟨split⟩ {scheme!r} needs {sum(n)} rows, the series has {length}')
    elif scheme in ('auto', 'no-test'):
        held = max(horizon, min(2 * horizon, length // 5))
        val, test = (max(int(0.1 * length), held), max(int(0.2 * length), held)) if scheme == 'auto' else (
            max(int(0.15 * length), held), 0)
        n = [length - val - test, val, test]
        if n[0] < 2 * horizon:
            raise SeriesError(f'the series has {length} rows, of which {val} are for validation and {test} for a test '
                              f'at a ⟨horizon⟩ of {horizon}: {max(n[0], 0)} are too few to train on, which takes '
                              f'{2 * horizon}; take a shorter horizon' + (' or ⟨split=no-test⟩' if test else ''))
    else:
        parts = [float(p) for p in scheme.split('/')] if re.fullmatch(r'[0-9.]+(/[0-9.]+){2}', scheme) and all(
            re.fullmatch(r'\d*\.?\d+|\d+\.', p) for p in scheme.split('/')) else []
        if len(parts) != 3 or abs(sum(parts) - 1) > 1e-6:
            raise SeriesError(f"{scheme!r} is no ⟨split⟩: auto, no-test, {', '.join(_ETT)}, or three parts that sum to "
                              "1, such as 0.7/0.1/0.2")
        # 1e-9: so that 0.7 of 10 rows, 6.999… in floating point, is 7
        n = [int(length * parts[0] + 1e-9), 0, int(length * parts[2] + 1e-9)]
        n[1] = length - n[0] - n[2]
    ends = np.cumsum([0, *n]).tolist()
    return Split(*[(a, b) for a, b in zip(ends, ends[1:])])


class Scaler:
    """Standardisation: (x - mean) / std of each variate of each series, fitted on the training part."""

    def __init__(self, mean: np.ndarray, std: np.ndarray):
        """mean, std: (K, M)."""
        self.mean, self.std = np.asarray(mean, np.float64), np.asarray(std, np.float64)

    @classmethod
    def fit(cls, values: np.ndarray) -> 'Scaler':
        """From (K, rows, M), of which NaN are left out.

        The least deviation is a tenth of the median one of a variate's series, so that one which stood still in the
        training part, or nearly, and moves later, is not all that counts. Where all stand still it is 1. A variate
        without a value gets a mean and deviation of NaN.
        """
        known = np.isfinite(values)
        n = known.sum(1).astype(np.float64)
        filled = np.where(known, values, 0.)
        with np.errstate(invalid='ignore', divide='ignore'):
            mean = filled.sum(1) / n
            std = np.sqrt((np.where(known, values - mean[:, None], 0.) ** 2).sum(1) / n)
        with warnings.catch_warnings():  # where all stand still
            warnings.simplefilter('ignore', RuntimeWarning)
            least = 0.1 * np.nanmedian(np.where(std > 0, std, np.nan), axis=0)
        std = np.where(np.isnan(least), std, np.fmax(std, least) + 0 * std)
        return cls(mean, np.where(std == 0, 1., std))

    def rows(self, k) -> 'Scaler':
        return Scaler(self.mean[k], self.std[k])

    @classmethod
    def from_dict(cls, state: Dict[str, List]) -> 'Scaler':
        return cls(*(np.atleast_2d(np.asarray(state[k], np.float64)) for k in ('mean', 'std')))

    def to_dict(self) -> Dict[str, List]:
        return dict(mean=self.mean.tolist(), std=self.std.tolist())


class Windows:
    """All windows of a part of some series, at stride 1: look-back and the horizon after it, without a gap inside.

    The forecast steps lie in the part, the look-back may reach back before it: a part of n rows with enough before it
    has n - horizon + 1 windows a series, and the first part of a series n - lookback - horizon + 1. Windows that hold a
    missing value are left out.
    """

    def __init__(self, tensors: Union[Tensors, Tensor], part: Union[Tuple[int, int], np.ndarray], lookback: int,
                 horizon: int, name: str = 'part', season: int = 1, unit: Optional[np.ndarray] = None):
        """
        Args:
            tensors: the (scaled) series, or the values (rows, M) of one.
            part: first and one-past-last row of the part, (2,), or (S, 2) for each series.
            lookback, horizon: steps.
            name: what messages call the part.
            season: steps of the season of the seasonal naive forecast.
            unit: (S, M), what one scaled unit is in the units of the series. Default: 1.

        Raises:
            SeriesError: there is no window.
        """
        if isinstance(tensors, Tensor):
            tensors = Tensors(tensors[None], None, None, None)
        self.values, self.past, self.future, self.static = tensors
        self.lookback, self.horizon, self.name, self.season = lookback, horizon, name, season
        S, L, M = self.values.shape
        self.unit = torch.ones(S, M, dtype=torch.float64) if unit is None else torch.as_tensor(unit).double()
        part = torch.as_tensor(np.broadcast_to(np.asarray(part), (S, 2)).copy())
        known = ~self.values.isnan().any(2)
        begin = torch.where(known.any(1), known.int().argmax(1), L)
        first, stop = torch.maximum(part[:, 0] - lookback, begin), part[:, 1]
        length = lookback + horizon
        rows = int((stop - first).max())
        if rows < length:
            raise SeriesError(
                f'the {name} part is too short: with what precedes it, it has {max(rows, 0)} rows, a ⟨lookback⟩ of '
                f'{lookback} and a ⟨horizon⟩ of {horizon} need {length}')
        ahead = self.future.isnan().flatten(2).any(2) if self.future is not None else torch.zeros_like(known)
        beside = self.past.isnan().flatten(2).any(2) if self.past is not None else torch.zeros_like(known)
        n = L - length + 1  # windows that begin at the rows 0 to n - 1

        def holds(mask: Tensor, start: int, end: int) -> Tensor:
            """Whether the rows [t + start, t + end) of the window at t hold one of the mask: (S, n)."""
            total = F.pad(mask.long().cumsum(1), (1, 0))
            return total[:, end:end + n] != total[:, start:start + n]

        t = torch.arange(n)
        inside = (t >= first[:, None]) & (t + length <= stop[:, None])
        wrong = holds(~known, 0, length) | holds(beside, 0, lookback) | holds(ahead, lookback, length)
        self.starts = (inside & ~wrong).nonzero()  # (N, 2): series and first row, series after series
        self.left_out = int((inside & wrong).sum())
        if not len(self.starts):
            raise SeriesError(f'the {name} part has no window without a missing value, of {int(inside.sum())} with a '
                              f'⟨lookback⟩ of {lookback} and a ⟨horizon⟩ of {horizon}')

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, index: Tensor) -> Tuple[Dict[str, Tensor], Tensor]:
        """Inputs of a model by its arguments' names (x: (B, T, M), …), and the horizons (B, H, M)."""
        s, t = self.starts[index].unbind(1)
        T, H, M = self.lookback, self.horizon, self.values.shape[2]
        rows = t[:, None] + torch.arange(T + H)
        w = self.values[s[:, None], rows]
        inputs = dict(x=w[:, :T])
        if self.past is not None:
            inputs['past'] = self.past[s[:, None], rows[:, :T]].transpose(1, 2).expand(-1, M, -1, -1)
        if self.future is not None:
            inputs['future'] = self.future[s[:, None], rows[:, T:]].transpose(1, 2).expand(-1, M, -1, -1)
        if self.static is not None:
            inputs['static'] = self.static[s].expand(-1, M, -1)
        return inputs, w[:, T:]

    def naive(self, index: Tensor, season: int) -> Tensor:
        """(B, H, M): the values of one season before (season 1: the last value).

        They come from before the look-back where it is shorter than the season; where there is nothing, the last value.
        """
        s, t = self.starts[index].unbind(1)
        now = t + self.lookback  # row of the first step
        back = now[:, None] - season + torch.arange(self.horizon) % season
        y = self.values[s[:, None], back.clamp(min=0)]
        last = self.values[s, now - 1][:, None]
        return torch.where((back < 0)[..., None] | y.isnan(), last, y)

    def indices(self, limit: Optional[int] = None) -> Tensor:
        """Numbers of all windows in order; with a limit, that many, evenly spread."""
        n = len(self)
        return torch.arange(n) if not limit or limit >= n else torch.linspace(0, n - 1, limit).round().long()

    def batches(self, batch_size: int, limit: Optional[int] = None) -> Iterator[Tensor]:
        """`indices`, the last batch as small as it comes."""
        yield from self.indices(limit).split(batch_size)
