"""The grid of dates that a series lies on: its step, its gaps, and the dates after its end."""
import warnings
from typing import List, Optional, Tuple

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from .errors import SeriesError

__all__ = ['frequency', 'future_index', 'grid_positions', 'make_grid', 'parse_frequency', 'same_step', 'season_length']

_MINUTES = dict(s=1 / 60, min=1., h=60., D=1440.)
# steps of the usual season: a day of what is finer than a day, a week of days, a year of the rest
_SEASONS = {'D': 7, 'B': 5, 'C': 5, 'W': 52, 'M': 12, 'Q': 4, 'Y': 1}


def parse_frequency(freq) -> pd.offsets.BaseOffset:
    """pandas' offset of a name such as 'h', '15min', 'D', 'B', 'MS' or 'W'; it must go forward.

    Raises:
        SeriesError: it is no frequency, or a step of nothing or backwards.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # old names ('H', 'M') that pandas still knows
            offset = to_offset(freq)
    except (ValueError, TypeError, AttributeError) as e:
        raise SeriesError(f'⟨freq⟩ {freq!r} is no frequency: {e}') from None
    if offset is None or offset.n < 1:
        raise SeriesError(f'⟨freq⟩ {freq!r} does not go forward')
    return offset


def _rule(offset) -> str:
    """'M' of MS, ME, BMS and BME, and so on: the step without the day that it is anchored to."""
    rule = offset._prefix.split('-')[0]
    if rule in ('MS', 'ME', 'BMS', 'BME', 'M', 'QS', 'QE', 'BQS', 'BQE', 'YS', 'YE', 'BYS', 'BYE'):
        return rule.strip('BSE') or rule
    return rule


def same_step(a, b) -> bool:
    """Whether two frequencies have the same step: MS and ME have, W-SUN and W-MON too, D and B have not."""
    a, b = parse_frequency(a), parse_frequency(b)
    if all(_rule(o) in _MINUTES for o in (a, b)):
        return np.isclose(a.n * _MINUTES[_rule(a)], b.n * _MINUTES[_rule(b)])
    return (_rule(a), a.n) == (_rule(b), b.n)


def season_length(freq) -> int:
    """Steps in the usual season: a day of hours and minutes, a week of days, a year of weeks, months and quarters."""
    offset = parse_frequency(freq)
    rule, n = _rule(offset), offset.n
    if rule in _MINUTES and rule != 'D':
        season = 1440 / (_MINUTES[rule] * n)
        return int(season) if season >= 1 and season == int(season) and season <= 1440 else 1
    season = _SEASONS.get(rule, 1)
    return season // n if season % n == 0 else 1


def _infer(index: pd.DatetimeIndex) -> Optional[str]:
    if len(index) < 3:
        return None
    with warnings.catch_warnings():  # pandas 3.1 announces that 4 will give an offset, which the next line takes
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.simplefilter('ignore', FutureWarning)
        try:
            freq = pd.infer_freq(index)
        except ValueError:
            return None
    return getattr(freq, 'freqstr', freq)


def frequency(index: pd.DatetimeIndex) -> Optional[str]:
    """pandas' name of the step between the dates ('h', '15min', 'D', 'MS', …), None where they lie on no grid.

    Dates with gaps lie on the grid of the fewest dates that holds all of them.
    """
    if index.freqstr:
        return index.freqstr
    index = pd.DatetimeIndex(index.unique())
    whole = _infer(index)
    if whole is not None or len(index) < 3:
        return whole
    candidates: List[Optional[str]] = []
    for n in (512, 128, 32, 12, 6, 4, 3):
        for part in (index[-n:], index[:n]):
            candidates.append(_infer(pd.DatetimeIndex(part.to_numpy() if part.tz is None else part)))
    steps = np.diff(index.tz_localize(None).to_numpy() if index.tz is None else
                    index.tz_convert('UTC').tz_localize(None).to_numpy())
    values, counts = np.unique(steps, return_counts=True)
    if values[0] > np.timedelta64(0):
        step = pd.Timedelta(values[counts.argmax()])
        days = step // pd.Timedelta(days=1)
        candidates.append(f'{days}D' if step == pd.Timedelta(days=days) else to_offset(step).freqstr)
    best = None
    for freq in dict.fromkeys(c for c in candidates if c):
        offset = parse_frequency(freq)
        if isinstance(offset, pd.offsets.Tick) and (index[-1] - index[0]) / pd.Timedelta(offset) > 50 * len(index):
            continue  # a grid that is nearly empty explains nothing
        grid = make_grid(index[0], index[-1], offset)
        if len(grid) <= 50 * len(index) and (grid.get_indexer(index) >= 0).all() and (
                best is None or len(grid) < best[0]):
            best = len(grid), freq
    return best[1] if best else None


def make_grid(first: pd.Timestamp, last: pd.Timestamp, offset) -> pd.DatetimeIndex:
    """The dates from `first` (or the last one before it that is on the grid) to `last`, without a gap."""
    offset = parse_frequency(offset)
    if not isinstance(offset, pd.offsets.Tick) and not offset.is_on_offset(first):
        first = offset.rollback(first)
    try:
        return pd.date_range(first, last, freq=offset)
    except (ValueError, OverflowError) as e:
        raise SeriesError(f'cannot step from {first} to {last} by {offset.freqstr!r} (⟨freq⟩): {e}') from None


def grid_positions(index: pd.DatetimeIndex, grid: pd.DatetimeIndex) -> Tuple[np.ndarray, np.ndarray]:
    """The place of each date on the grid (of the earlier one, between two), and whether it is a date of the grid."""
    exact = grid.get_indexer(index)
    between = grid.searchsorted(index, side='right') - 1
    return np.where(exact >= 0, exact, between), exact >= 0


def future_index(index: pd.DatetimeIndex, horizon: int, freq: Optional[str] = None) -> pd.DatetimeIndex:
    """The first `horizon` dates of the grid that are after the index: none is skipped.

    Args:
        index: the dates so far; the last one need not be on the grid.
        horizon: number of dates.
        freq: the step. Default: that of the index.

    Raises:
        SeriesError: no step is known, or it goes nowhere.
    """
    freq = freq or frequency(index)
    if freq is None:
        raise SeriesError('the dates are not evenly spaced, so that those of the forecast are unknown: give their '
                          "⟨freq⟩, such as h, 15min, D or B")
    offset = parse_frequency(freq)
    last = index[-1]
    try:
        dates = pd.date_range(last, periods=horizon + 1, freq=offset, name=index.name)
    except (ValueError, OverflowError) as e:
        raise SeriesError(f'there are no {horizon} steps of {offset.freqstr!r} after {last}: {e}') from None
    return dates[dates > last][:horizon]
