"""Time series for forecasting: reading CSV files, the standard splits, scaling, windows.

A series is a pandas DataFrame with a DatetimeIndex, oldest first, and one column of floats per variate.
"""
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import pandas as pd
import torch
from torch import Tensor

__all__ = ['SeriesError', 'Scaler', 'Split', 'Windows', 'check_series', 'frequency', 'future_index', 'read_series',
           'split_series']


class SeriesError(ValueError):
    """A time series that cannot be used; the message names what is wrong and where."""


def _where(i: int, file: bool) -> str:
    """Row i (from 0), as somebody with the file or with the DataFrame in front of them counts it."""
    return f'row {i + 1} (line {i + 2} of the file)' if file else f'row {i + 1}'


def read_series(
        path: Union[str, Path],
        date_column: str = 'date',
        columns: Optional[Sequence[str]] = None,
) -> pd.DataFrame:
    """A CSV file with a header, a column of dates and numbers in all others.

    Args:
        path: .csv, or .csv.gz and the other compressions that pandas knows by their ending.
        date_column: its column of dates.
        columns: the variates to take, in this order. Default: all.

    Returns:
        The series, checked by `check_series`.

    Raises:
        SeriesError: what is wrong, with row and column.
    """
    try:
        frame = pd.read_csv(path, low_memory=False)
    except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as e:
        raise SeriesError(f'cannot read {path} as CSV: {" ".join(str(e).split()) or type(e).__name__}') from None
    if date_column not in frame.columns:
        raise SeriesError(f'{path} has no column {date_column!r} of dates; its columns are '
                          f'{", ".join(map(repr, frame.columns))}')
    text = frame.pop(date_column)
    frame.columns = frame.columns.astype(str)
    if columns is not None:
        frame = select_columns(frame, columns, str(path))
    if not len(frame.columns):
        raise SeriesError(f'{path} has no column beside {date_column!r}')
    dates = pd.to_datetime(text, errors='coerce')
    if dates.isna().any():
        i = int(dates.isna().to_numpy().argmax())
        raise SeriesError(f'{path}: {_where(i, True)}, column {date_column!r}: {text.iloc[i]!r} is no date')
    frame.index = pd.DatetimeIndex(dates, name=date_column)
    return check_series(frame, str(path), file=True)


def select_columns(frame: pd.DataFrame, columns: Sequence[str], name: str = 'the series') -> pd.DataFrame:
    """These columns in this order; unknown ones are an error that lists the known ones."""
    known = [str(c) for c in frame.columns]
    unknown = [c for c in columns if c not in known]
    if unknown:
        raise SeriesError(f'{name} has no column {", ".join(map(repr, unknown))}; its columns are '
                          f'{", ".join(map(repr, known))}')
    if len(set(columns)) < len(columns):
        raise SeriesError(f'{name}: a column is asked for twice in {", ".join(map(repr, columns))}')
    return frame[list(columns)]


def check_series(frame: pd.DataFrame, name: str = 'the series', file: bool = False) -> pd.DataFrame:
    """The series as float64, proven to be in order and finite.

    Args:
        frame: the series.
        name: what messages call it.
        file: whether row numbers are those of a file with a header.

    Raises:
        SeriesError: text, a missing or an infinite value, a date twice, or dates that do not ascend; with the row
            (counted from 1) and the column of the first such place.
    """
    if not isinstance(frame.index, pd.DatetimeIndex):
        raise SeriesError(f'{name} needs a DatetimeIndex, got a {type(frame.index).__name__}')
    if frame.columns.duplicated().any():
        raise SeriesError(f'{name} has the column {frame.columns[frame.columns.duplicated()][0]!r} twice')
    places = []
    values = np.empty(frame.shape, np.float64)
    for j, column in enumerate(frame.columns):
        raw = frame[column]
        numbers = raw if raw.dtype.kind in 'fiu' else pd.to_numeric(raw, errors='coerce')
        values[:, j] = numbers.to_numpy(np.float64, na_value=np.nan)
        bad = ~np.isfinite(values[:, j])
        if bad.any():
            places.append((int(bad.argmax()), column))
    if places:
        i, column = min(places, key=lambda place: place[0])
        value = frame[column].iloc[i]
        what = 'the value is missing (NaN)' if pd.isna(value) else f'{value!r} is no finite number'
        raise SeriesError(f'{name}: {_where(i, file)}, column {column!r}: {what}')
    dates = frame.index
    if len(dates) > 1:
        steps = np.diff(dates.to_numpy())
        wrong = steps <= np.timedelta64(0)
        if wrong.any():
            i = int(wrong.argmax()) + 1
            what = 'the date of the row before again' if steps[i - 1] == np.timedelta64(0) else \
                f'before the date of the row before ({dates[i - 1]}): sort the series'
            raise SeriesError(f'{name}: {_where(i, file)}: {dates[i]} is {what}')
    return pd.DataFrame(values, index=frame.index, columns=frame.columns)


def frequency(index: pd.DatetimeIndex) -> Optional[str]:
    """pandas' name of the step between the dates ('h', '15min', 'D', 'MS', …), None where they are not even."""
    if index.freqstr or len(index) < 3:
        return index.freqstr
    with warnings.catch_warnings():  # pandas 3.1 announces that 4 will give an offset, which the next line takes
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.simplefilter('ignore', FutureWarning)
        freq = pd.infer_freq(index)
    return getattr(freq, 'freqstr', freq)


def future_index(index: pd.DatetimeIndex, horizon: int, freq: Optional[str] = None) -> pd.DatetimeIndex:
    """The dates of the `horizon` steps after the index."""
    freq = freq or frequency(index)
    if freq is None:
        raise SeriesError('the dates are not evenly spaced, so that those of the forecast are unknown: give their '
                          "frequency, such as 'h', '15min', 'D' or 'B'")
    try:
        return pd.date_range(index[-1], periods=horizon + 1, freq=freq, name=index.name)[-horizon:]
    except ValueError as e:
        raise SeriesError(f'{freq!r} is no frequency: {e}') from None


class Split(NamedTuple):
    """First and one-past-last row of the training, validation and test parts."""
    train: Tuple[int, int]
    val: Tuple[int, int]
    test: Tuple[int, int]


_MONTH = 30 * 24  # hours, as in the benchmark's code
_ETT = {'ett-hour': _MONTH, 'ett-minute': 4 * _MONTH}


def split_series(length: int, scheme: str = '0.7/0.1/0.2') -> Split:
    """The standard splits of the long-term forecasting benchmark.

    Args:
        length: rows of the series.
        scheme: 'ett-hour' or 'ett-minute' for the first 12, 4 and 4 months of 30 days of an hourly or quarter-hourly
            series; 'A/B/C' for three parts of the length, of which the first and the last are rounded down and the
            middle takes what is left.

    Raises:
        SeriesError: a scheme that is none, or a series too short for it.
    """
    if scheme in _ETT:
        n = [12 * _ETT[scheme], 4 * _ETT[scheme], 4 * _ETT[scheme]]
        if length < sum(n):
            raise SeriesError(f'the split {scheme!r} needs {sum(n)} rows, the series has {length}')
    else:
        try:
            parts = [float(p) for p in scheme.split('/')]
        except ValueError:
            parts = []
        if len(parts) != 3 or min(parts) < 0 or abs(sum(parts) - 1) > 1e-6:
            raise SeriesError(f"{scheme!r} is no split: {', '.join(map(repr, _ETT))}, or three parts that sum to 1, "
                              "such as '0.7/0.1/0.2'")
        # 1e-9: so that 0.7 of 10 rows, 6.999… in floating point, is 7
        n = [int(length * parts[0] + 1e-9), 0, int(length * parts[2] + 1e-9)]
        n[1] = length - n[0] - n[2]
    ends = np.cumsum([0, *n]).tolist()
    return Split(*[(a, b) for a, b in zip(ends, ends[1:])])


@dataclass
class Scaler:
    """Standardisation per variate: (x - mean) / std, fitted on the training part."""
    mean: np.ndarray  # (M,)
    std: np.ndarray  # (M,)

    @classmethod
    def fit(cls, values: np.ndarray) -> 'Scaler':
        """From (rows, M); a constant variate gets a deviation of 1."""
        std = values.std(0)
        return cls(values.mean(0), np.where(std == 0, 1., std))

    @classmethod
    def from_dict(cls, state: Dict[str, List[float]]) -> 'Scaler':
        return cls(*(np.asarray(state[k], np.float64) for k in ('mean', 'std')))

    def to_dict(self) -> Dict[str, List[float]]:
        return dict(mean=self.mean.tolist(), std=self.std.tolist())

    def transform(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / self.std

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return values * self.std + self.mean


class Windows:
    """All windows of a part of a series, at stride 1: look-back and the horizon after it.

    The forecast steps lie in the part, the look-back may reach back before it: a part of n rows with enough before it
    has n - horizon + 1 windows, and the first part of a series n - lookback - horizon + 1.
    """

    def __init__(self, values: Tensor, part: Tuple[int, int], lookback: int, horizon: int, name: str = 'part'):
        """
        Args:
            values: the whole (scaled) series, (rows, M).
            part: first and one-past-last row of the part.
            lookback, horizon: steps.
            name: what messages call the part.
        """
        first, end = max(part[0] - lookback, 0), part[1]
        rows = end - first
        if rows < lookback + horizon:
            raise SeriesError(
                f'the {name} part is too short: with what precedes it, it has {max(rows, 0)} rows, a look-back of '
                f'{lookback} and a horizon of {horizon} need {lookback + horizon}')
        self.lookback, self.horizon = lookback, horizon
        self.windows = values[first:end].unfold(0, lookback + horizon, 1)  # (N, M, T + H), a view

    def __len__(self) -> int:
        return len(self.windows)

    def take(self, index: Tensor) -> Tuple[Tensor, Tensor]:
        """Look-backs (B, T, M) and horizons (B, H, M) of the windows with these numbers."""
        w = self.windows[index].transpose(1, 2)
        return w[:, :self.lookback], w[:, self.lookback:]

    def batches(self, batch_size: int, limit: Optional[int] = None) -> Iterator[Tuple[Tensor, Tensor]]:
        """All windows in order, the last batch as small as it comes; with a limit, that many, evenly spread."""
        n = len(self)
        index = torch.arange(n) if limit is None or limit >= n else torch.linspace(0, n - 1, limit).round().long()
        for part in index.split(batch_size):
            yield self.take(part)
