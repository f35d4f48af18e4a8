"""Series on one grid of dates, with what is known beside them: a table becomes arrays, or an error that says why."""
import logging
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .errors import SeriesError
from .grid import frequency, future_index, grid_positions, make_grid, parse_frequency
from .reading import parse_dates, row_name, select_columns

__all__ = ['Columns', 'Covariates', 'Panel', 'Tensors', 'calendar']

log = logging.getLogger('vim2.forecasting')

FILLS = ('error', 'keep', 'interpolate', 'forward', 'zero')
DUPLICATES = ('error', 'first', 'last', 'mean', 'sum')
# Numbers that stand for "missing" in many files, where they lie far outside of all others.
_SENTINELS = (-99., -999., -9999., -99999., -999999., -32768., 999., 9999., 99999., 999999., -1e20, 1e20, 1e30, -1e30)


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are.

    Args:
        target: the columns that are forecast. Empty: all that have no other role.
        id: the column of the series' names, where the table holds many series below one another (long format).
        date: the column of dates, of a DataFrame whose index is none.
        past: covariates that are known up to the present.
        future: covariates that are known over the horizon as well.
        static: covariates that are the same at all times of a series; need `id`.
        categorical: those of them that are categories though they are numbers; text is a category anyway.
        calendar: the time of day, week and year as known covariates, as far as the step has them.
        multivariate: the series of a table in long format are the variates of one series that are forecast together,
            instead of many series that share a model.
    """
    target: Tuple[str, ...] = ()
    id: Optional[str] = None
    date: Optional[str] = None
    past: Tuple[str, ...] = ()
    future: Tuple[str, ...] = ()
    static: Tuple[str, ...] = ()
    categorical: Tuple[str, ...] = ()
    calendar: bool = False
    multivariate: bool = False

    def __post_init__(self):
        for name in ('target', 'past', 'future', 'static', 'categorical'):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(map(str, value)))
        roles = [*self.target, *self.past, *self.future, *self.static]
        twice = [c for c in roles if roles.count(c) > 1]
        if twice:
            raise SeriesError(f'column {twice[0]!r} has two roles (⟨target⟩, ⟨past⟩, ⟨future⟩, ⟨static⟩)')
        stray = set(self.categorical) - {*self.past, *self.future, *self.static}
        if stray:
            raise SeriesError(f'⟨categorical⟩ {sorted(stray)[0]!r} is in none of ⟨past⟩, ⟨future⟩ and ⟨static⟩')
        if self.id is None and (self.static or self.multivariate):
            raise SeriesError(f'{"⟨static⟩ covariates" if self.static else "⟨multivariate⟩"} need ⟨id_column⟩, the '
                              'column of the series\' names')
        if self.multivariate and len(self.target) > 1:
            raise SeriesError(f'⟨multivariate⟩ takes one ⟨target⟩, got {len(self.target)}')

    @property
    def covariates(self) -> Tuple[str, ...]:
        return (*self.past, *self.future, *self.static)

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)


class Tensors(NamedTuple):
    """S series of M variates in float32 on L dates; Mc is M, or 1 where covariates are the same for all variates."""
    values: Tensor  # (S, L, M), NaN where nothing is known
    past: Optional[Tensor]  # (S, L, Mc, C_P): all covariates that are known up to the present
    future: Optional[Tensor]  # (S, L, Mc, C_Z): those that are known beyond
    static: Optional[Tensor]  # (S, Mc, C_S)


def calendar(index: pd.DatetimeIndex, freq: str) -> np.ndarray:
    """Sine and cosine of the cycles that the step has: (L, 2 * cycles), of the day, the week and the year."""
    offset = parse_frequency(freq)
    step = make_grid(index[0], index[0] + pd.Timedelta(days=800), offset)
    days = 800 / max(len(step), 1)  # of a step, on average
    hours = np.asarray(index.hour + index.minute / 60 + index.second / 3600, np.float64)
    cycles = []
    if days < 0.9:
        cycles.append(hours / 24)
    if days < 6:
        cycles.append((index.day_of_week + hours / 24) / 7)
    cycles.append((index.day_of_year - 1 + hours / 24) / 365.25)
    angles = 2 * np.pi * np.stack([np.asarray(c, np.float64) for c in cycles], 1)
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


@dataclass
class Panel:
    """K series on one grid of L dates."""
    index: pd.DatetimeIndex
    freq: str
    ids: List[str]  # K names; one empty name for a table that is one series
    columns: Columns
    values: np.ndarray  # (K, L, M), NaN where nothing is known
    begin: np.ndarray  # (K,) first row with a value
    end: np.ndarray  # (K,) one past the last row with a value
    dynamic: Dict[str, np.ndarray] = field(default_factory=dict)  # (K, L), of floats, or of text where it is a category
    static: Dict[str, np.ndarray] = field(default_factory=dict)  # (K,), likewise

    @property
    def rows(self) -> int:
        """Rows up to the last value of any series; those after it have covariates only."""
        return int(self.end.max())

    @property
    def variates(self) -> List[str]:
        """Names of what is forecast together."""
        return list(self.ids) if self.columns.multivariate else list(self.columns.target)

    @classmethod
    def from_frame(
            cls,
            frame: pd.DataFrame,
            columns: Optional[Columns] = None,
            freq: Optional[str] = None,
            *,
            sort: bool = False,
            duplicates: str = 'error',
            gaps: str = 'error',
            missing: str = 'error',
            sentinels: bool = True,
            tail: Optional[int] = None,
            name: str = 'the series',
            file: bool = False,
    ) -> 'Panel':
        """A table as arrays on a grid.

        Args:
            frame: the table; its index, or the column `columns.date`, has the dates, oldest first in each series.
            columns: what its columns are.
            freq: step of the dates. Default: what the dates of the longest series say.
            sort: put the rows in order; otherwise a date before that of the row before is an error.
            duplicates: what two rows of one date are: 'error', or take the 'first', 'last', 'mean' or 'sum'.
            gaps: what a date that is missing inside a series is: 'error'; 'keep': unknown, and no window that is
                trained on or measured holds one; or 'interpolate', 'forward' (the value before), 'zero'.
            missing: what an empty value is, with the same choices.
            sentinels: refuse values such as -9999 that lie far outside of all others.
            tail: leave out what is older than so many rows before the last value of each series.
            name, file: what messages call the series, and whether its rows are lines of a file.

        Raises:
            SeriesError: what is wrong, with the row (counted from 1) and the column.
        """
        for option, value, choices in (('duplicates', duplicates, DUPLICATES), ('gaps', gaps, FILLS),
                                       ('missing', missing, FILLS)):
            if value not in choices:
                raise SeriesError(f'⟨{option}⟩ must be one of {", ".join(choices)}, got {value!r}')
        columns = columns or Columns()
        frame = frame.copy(deep=False)
        frame.columns = frame.columns.astype(str)
        if columns.date is not None and columns.date in frame.columns:
            frame.index = parse_dates(frame.pop(columns.date), groups=None if columns.id is None else
                                      frame[columns.id].to_numpy(), name=name, file=file)
        if not isinstance(frame.index, pd.DatetimeIndex):
            raise SeriesError(f'{name} needs a DatetimeIndex or ⟨date_column⟩, got a {type(frame.index).__name__}')
        if frame.columns.duplicated().any():
            raise SeriesError(f'{name} has the column {frame.columns[frame.columns.duplicated()][0]!r} twice')
        if not columns.target:
            rest = [c for c in frame.columns if c not in (columns.id, *columns.covariates)]
            columns = replace(columns, target=tuple(rest))
        if not columns.target:
            raise SeriesError(f'{name} has no column left to forecast (⟨target⟩)')
        optional = [columns.id] if columns.id is not None else []
        dynamic = [c for c in (*columns.past, *columns.future)]
        static = [c for c in columns.static if c != columns.id]
        frame = select_columns(frame, [*optional, *columns.target, *dynamic, *static], name)
        if not len(frame):
            raise SeriesError(f'{name} has no row')
        if frame.index.isna().any():
            raise SeriesError(f'{name}: {row_name(int(frame.index.isna().argmax()), file)} has no date')

        table = _Table(frame, columns, name, file)
        table.convert(sentinels)
        table.order(sort)
        table.merge(duplicates)
        if tail is not None:
            table.tail(tail)
        return table.place(freq, gaps, missing)

    def extended(self, steps: int) -> 'Panel':
        """With at least `steps` dates after the last value of every series."""
        more = self.rows + steps - len(self.index)
        if more <= 0:
            return self
        index = self.index.append(future_index(self.index, more, self.freq))

        def pad(a):
            return np.concatenate([a, np.full((len(a), more, *a.shape[2:]), np.nan, a.dtype)], 1)

        return replace(self, index=pd.DatetimeIndex(index, name=self.index.name), values=pad(self.values),
                       dynamic={k: pad(v) for k, v in self.dynamic.items()})

    def select(self, ids: Sequence[str]) -> 'Panel':
        """Only these series, in this order."""
        at = {i: k for k, i in enumerate(self.ids)}
        k = [at[i] for i in ids]
        return replace(self, ids=list(ids), values=self.values[k], begin=self.begin[k], end=self.end[k],
                       dynamic={n: v[k] for n, v in self.dynamic.items()},
                       static={n: v[k] for n, v in self.static.items()})

    def until(self, rows: np.ndarray) -> 'Panel':
        """As it was known before these (K,) rows of the grid: without later values, with later covariates."""
        values = self.values.copy()
        values[np.arange(len(self.index)) >= np.asarray(rows)[:, None]] = np.nan
        end = np.minimum(self.end, rows)
        keep = end > self.begin
        out = replace(self, values=values, end=end)
        return out if keep.all() else out.select([i for i, k in zip(self.ids, keep) if k])


class _Table:
    """The steps from a table to a panel."""

    def __init__(self, frame: pd.DataFrame, columns: Columns, name: str, file: bool):
        self.frame, self.columns, self.name, self.file = frame, columns, name, file
        if columns.id is None:
            self.codes, self.ids = np.zeros(len(frame), np.int64), ['']
        else:
            ids = frame[columns.id]
            if ids.isna().any():
                raise SeriesError(f'{name}: {row_name(int(ids.isna().to_numpy().argmax()), file)}, column '
                                  f'{columns.id!r}: no name of a series')
            self.codes, known = pd.factorize(ids.astype(str))
            self.ids = list(map(str, known))
        self.rows = np.arange(len(frame))  # where each row was, for messages
        self.dates = frame.index

    def where(self, i: int) -> str:
        series = f' of {self.ids[self.codes[i]]!r}' if self.columns.id is not None else ''
        return f'{self.name}: {row_name(int(self.rows[i]), self.file)}{series}'

    def convert(self, sentinels: bool) -> None:
        """Numbers and categories."""
        c = self.columns
        self.data: Dict[str, np.ndarray] = {}
        places = []
        for column in (*c.target, *c.past, *c.future, *c.static):
            raw = self.frame[column]
            text = raw.dtype.kind not in 'fiub'
            if column in c.categorical or column == c.id or (text and column in c.covariates and not _numeric(raw)):
                self.data[column] = np.where(raw.isna(), '', raw.astype(str)).astype(object)
                continue
            numbers = raw if not text else pd.to_numeric(raw, errors='coerce')
            values = numbers.to_numpy(np.float64, na_value=np.nan).copy()
            bad = np.isinf(values) | (np.isnan(values) & raw.notna().to_numpy())
            if bad.any():
                places.append((int(bad.argmax()), column))
            self.data[column] = values
            if sentinels:
                self._sentinel(column, values)
        if places:
            i, column = min(places, key=lambda place: place[0])
            value = self.frame[column].iloc[i]
            raise SeriesError(f'{self.where(i)}, column {column!r}: {value!r} is no finite number{_hint(value)}')

    def _sentinel(self, column: str, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)]
        for sentinel in _SENTINELS:
            hit = values == sentinel
            if not hit.any():
                continue
            rest = finite[finite != sentinel]
            others = rest[~np.isin(rest, _SENTINELS)]
            rest = others if len(others) > len(rest) / 2 else rest
            if len(rest) < 2:
                continue
            low, high = rest.min(), rest.max()
            if max(low - sentinel, sentinel - high) > 3 * max(high - low, 1e-9):
                raise SeriesError(
                    f'{self.where(int(hit.argmax()))}, column {column!r}: {sentinel:g} is far outside of all others '
                    f'({low:g} to {high:g}): if it stands for a missing value give ⟨na={sentinel:g}⟩, if it is '
                    'a value ⟨sentinels=False⟩')

    def _take(self, order: np.ndarray) -> None:
        self.codes, self.rows, self.dates = self.codes[order], self.rows[order], self.dates[order]
        self.data = {k: v[order] for k, v in self.data.items()}

    def order(self, sort: bool) -> None:
        """Series after series, each by its dates."""
        if sort:
            self._take(np.lexsort((self.dates.asi8, self.codes)))
            return
        self._take(np.argsort(self.codes, kind='stable'))
        back = (np.diff(self.dates.asi8) < 0) & (np.diff(self.codes) == 0)
        if back.any():
            i = int(back.argmax()) + 1
            raise SeriesError(f'{self.where(i)}: {self.dates[i]} is before the date of the row before '
                              f'({self.dates[i - 1]}): ⟨sort=True⟩ puts the rows in order')

    def merge(self, duplicates: str) -> None:
        """One row a date."""
        again = np.r_[False, (np.diff(self.dates.asi8) == 0) & (np.diff(self.codes) == 0)]
        if not again.any():
            return
        i = int(again.argmax())
        if duplicates == 'error':
            clock = ' (or ⟨timezone⟩, if a clock was set back)' if self.dates.tz is None else ''
            raise SeriesError(f'{self.where(i)}: {self.dates[i]} is the date of the row before again: '
                              f'⟨duplicates⟩ can be {", ".join(DUPLICATES[1:])}{clock}')
        log.info('%s: %d row(s) with a date that was there already: took the %s', self.name, again.sum(), duplicates)
        if duplicates in ('mean', 'sum'):
            group = np.cumsum(~again) - 1
            for column in self.columns.target + self.columns.past + self.columns.future:
                values = self.data[column]
                if values.dtype != object:
                    merged = getattr(pd.Series(values).groupby(group), duplicates)()
                    if duplicates == 'sum':
                        merged = pd.Series(values).groupby(group).sum(min_count=1)
                    first = np.flatnonzero(~again)
                    values[first] = merged.to_numpy()
        keep = ~np.r_[again[1:], False] if duplicates == 'last' else ~again
        self._take(np.flatnonzero(keep))

    def tail(self, rows: int) -> None:
        """Only so many rows up to the last value of each series, and what comes after."""
        known = np.zeros(len(self.codes), bool)
        for column in self.columns.target:
            known |= np.isfinite(self.data[column])
        later = pd.Series(known[::-1].astype(np.int64)).groupby(self.codes[::-1]).cumsum().to_numpy()[::-1]
        last = known & (later == 1)  # the last row with a value
        at = np.arange(len(self.codes))
        end = pd.Series(np.where(last, at, -1)).groupby(self.codes).transform('max').to_numpy()
        self._take(np.flatnonzero((end < 0) | (at > end - rows)))

    # ------------------------------------------------------------------------------------------------------ the grid

    def _grid(self, freq: Optional[str]) -> Tuple[pd.DatetimeIndex, str, np.ndarray]:
        """The grid, its step, and the place of each row on it."""
        counts = np.bincount(self.codes, minlength=len(self.ids))
        longest = pd.DatetimeIndex(self.dates[self.codes == counts.argmax()], freq=None)
        given = freq is not None
        if not given:
            freq = frequency(longest)
            if freq is None:
                more = ' with ⟨timezone⟩' if self.dates.tz is not None else ''
                raise SeriesError(f'{self.name}: the dates are not evenly spaced, {_example(longest)}: give their '
                                  f'⟨freq⟩{more}, such as h, 15min, D or B, or mend them')
        offset = parse_frequency(freq)
        grid = make_grid(self.dates.min(), self.dates.max(), offset)
        if len(grid) > 100 * counts.max() + 1000:
            raise SeriesError(f'{self.name}: a step of {freq!r} contradicts the dates, which are up to {counts.max()} '
                              f'a series and would need {len(grid)}: give another ⟨freq⟩')
        place, exact = grid_positions(self.dates, grid)
        if not exact.all() and not (given and not isinstance(offset, pd.offsets.Tick)):
            i = int((~exact).argmax())
            raise SeriesError(f'{self.where(i)}: {self.dates[i]} is not on the grid of steps of {freq!r} from '
                              f'{grid[0]}: give another ⟨freq⟩, or mend the dates')
        step, same = np.diff(place), np.diff(self.codes) == 0
        wrong = same & (step < 1)
        if wrong.any():
            i = int(wrong.argmax()) + 1
            raise SeriesError(f'{self.where(i)}: {self.dates[i - 1]} and {self.dates[i]} are within one step of '
                              f'{freq!r}: the dates contradict ⟨freq⟩')
        if given and same.any() and np.median(step[same]) > 1:
            raise SeriesError(f'{self.name}: the dates are {int(np.median(step[same]))} steps of {freq!r} apart: they '
                              'contradict ⟨freq⟩')
        if not exact.all():
            log.info('%s: %d date(s) lie between two steps of %s and count as the earlier one', self.name,
                     (~exact).sum(), freq)
            labels = grid.to_series()
            labels.iloc[place] = self.dates
            grid = pd.DatetimeIndex(labels.to_numpy() if labels.dt.tz is None else labels)
        return pd.DatetimeIndex(grid, name=self.dates.name, freq=None), offset.freqstr, place

    def place(self, freq: Optional[str], gaps: str, missing: str) -> Panel:
        """The arrays on the grid, with gaps and missing values as the options say."""
        c = self.columns
        index, freq, place = self._grid(freq)
        K, L = len(self.ids), len(index)
        there = np.zeros((K, L), bool)
        there[self.codes, place] = True
        first = np.array([place[self.codes == k].min() for k in range(K)]) if K < 50 else \
            pd.Series(place).groupby(self.codes).min().to_numpy()
        last = pd.Series(place).groupby(self.codes).max().to_numpy() + 1
        inside = (np.arange(L) >= first[:, None]) & (np.arange(L) < last[:, None])
        gap = inside & ~there
        if gap.any():
            k, t = np.argwhere(gap)[0]
            what = f'{gap.sum()} date(s) are missing on the grid of {freq!r}, the first {index[t]}' + (
                f' of {self.ids[k]!r}' if c.id is not None else '')
            if gaps == 'error':
                raise SeriesError(f'{self.name}: {what}: ⟨gaps⟩ can be {", ".join(FILLS[1:])}; or give another ⟨freq⟩')
            log.info('%s: %s: %s', self.name, what, _ACTION[gaps])

        values = np.full((K, L, len(c.target)), np.nan)
        for m, column in enumerate(c.target):
            values[self.codes, place, m] = self.data[column]
        dynamic = {}
        for column in (*c.past, *c.future):
            array = np.full((K, L), np.nan, self.data[column].dtype)
            array[self.codes, place] = self.data[column]
            dynamic[column] = array

        # rows after the last value that bring covariates of the future are no missing values
        known = np.isfinite(values).any(2)
        if not known.any(1).all():
            k = int((~known.any(1)).argmax())
            raise SeriesError(f'{self.name}: ' + (f'the series {self.ids[k]!r}' if c.id is not None else
                                                  f'{", ".join(map(repr, c.target))}') + ' has no value')
        begin, end = known.argmax(1), L - known[:, ::-1].argmax(1)
        ahead = inside & (np.arange(L) >= end[:, None]) if c.future else np.zeros_like(inside)
        if (inside & (np.arange(L) < begin[:, None])).any():
            log.info('%s: left out empty rows before the first value', self.name)
        body = there & ~ahead & (np.arange(L) >= begin[:, None])
        nan = np.isnan(values) & body[..., None]
        self._fill(values, nan, np.isnan(values) & (gap & (np.arange(L) < end[:, None]))[..., None], gaps, missing,
                   c.target, begin, end, index, freq)
        for column, array in dynamic.items():
            if array.dtype == object:
                for k in np.flatnonzero(gap.any(1)):
                    array[k] = pd.Series(array[k]).ffill().to_numpy()
                continue
            wanted = (there if column in c.future else body) & (np.arange(L) >= begin[:, None])
            view = array[..., None]
            self._fill(view, np.isnan(view) & wanted[..., None], np.isnan(view) & gap[..., None], gaps, missing,
                       (column,), begin, last, index, freq)
        known = np.isfinite(values).any(2)
        end = L - known[:, ::-1].argmax(1)
        if len(set(end.tolist())) > 1:
            log.info('%s: the series end at different dates, %s to %s; each forecast begins after its own end',
                     self.name, index[end.min() - 1], index[end.max() - 1])
        return Panel(index, freq, self.ids, c, values, begin, end, dynamic, self._static())

    def _fill(self, values, nan, gap, gaps, missing, names, begin, end, index, freq) -> None:
        """Fill in place (K, L, M) what is missing in rows that exist and in rows that do not."""
        if nan.any():
            k, t, m = np.argwhere(nan)[0]
            series = f' of {self.ids[k]!r}' if self.columns.id is not None else ''
            if missing == 'error':
                i = int(np.flatnonzero((self.codes == k) & (self.dates == index[t]))[0])
                raise SeriesError(f'{self.where(i)}, column {names[m]!r}: the value is missing (NaN): ⟨missing⟩ can be '
                                  f'{", ".join(FILLS[1:])}')
            log.info('%s: %d value(s) are missing, the first in column %r at %s%s: %s', self.name, nan.sum(), names[m],
                     index[t], series, _ACTION[missing])
        for mask, how in ((gap, gaps), (nan, missing)):
            if how in ('keep', 'error'):
                continue
            for k, m in np.argwhere(mask.any(1)):
                part = pd.Series(values[k, begin[k]:end[k], m])
                if how == 'zero':
                    filled = part.fillna(0.)
                elif how == 'forward':
                    filled = part.ffill()
                else:
                    filled = part.interpolate(limit_area='inside')
                where = mask[k, begin[k]:end[k], m]
                values[k, begin[k]:end[k], m] = np.where(where, filled, part)

    def _static(self) -> Dict[str, np.ndarray]:
        out = {}
        for column in self.columns.static:
            if column == self.columns.id:
                out[column] = np.array(self.ids, object)
                continue
            data = self.data[column]
            changes = pd.Series(data).groupby(self.codes).nunique(dropna=False).to_numpy() > 1
            if changes.any():
                k = int(changes.argmax())
                raise SeriesError(f'{self.name}: the ⟨static⟩ covariate {column!r} changes within the series '
                                  f'{self.ids[k]!r}: is it one of ⟨past⟩ or ⟨future⟩?')
            values = data[[int((self.codes == k).argmax()) for k in range(len(self.ids))]]
            if data.dtype != object and np.isnan(values).any():
                k = int(np.isnan(values).argmax())
                raise SeriesError(f'{self.name}: the ⟨static⟩ covariate {column!r} of {self.ids[k]!r} is missing')
            out[column] = values
        return out


_ACTION = dict(keep='windows with one are left out', interpolate='filled by interpolation',
               forward='filled by the value before', zero='filled by 0')


def _numeric(raw: pd.Series) -> bool:
    return bool(pd.to_numeric(raw, errors='coerce').notna().eq(raw.notna()).all())


def _hint(value) -> str:
    text = str(value).strip()
    if re.fullmatch(r'[+-]?\d{1,3}(\.\d{3})*,\d+', text) or re.fullmatch(r'[+-]?\d+,\d+', text):
        return ': ⟨decimal=,⟩ reads a decimal comma, ⟨thousands=,⟩ one of thousands'
    if re.fullmatch(r'[+-]?\d{1,3}([, \'.]\d{3})+([.,]\d+)?', text):
        return f': ⟨thousands={text.lstrip("+-0123456789")[0]}⟩ reads a mark of thousands'
    if isinstance(value, str):
        return ': ⟨na⟩ names texts that stand for a missing value, ⟨target⟩ the columns to forecast'
    return ''


def _example(index: pd.DatetimeIndex) -> str:
    steps = pd.Series(index[1:] - index[:-1]).value_counts()
    return f'steps are {", ".join(f"{s} ({n} times)" for s, n in steps.iloc[:3].items())}'


# --------------------------------------------------------------------------------------------------------- covariates

class Covariates:
    """How the covariates become numbers: standardised, or one of zeros and ones for each category.

    A category that was not seen in training is an error. A number has the mean and deviation of the training part.
    """

    def __init__(self, past: List[dict], future: List[dict], static: List[dict], calendar: bool):
        self.past, self.future, self.static, self.calendar = past, future, static, calendar

    @classmethod
    def fit(cls, panel: Panel, train_end: np.ndarray) -> 'Covariates':
        """From the rows before the (K,) `train_end`; categories from all."""
        train = np.arange(len(panel.index)) < np.asarray(train_end)[:, None]

        def rule(name: str, array: np.ndarray, part: np.ndarray) -> dict:
            if array.dtype == object:
                levels = sorted({str(v) for v in array.ravel() if isinstance(v, str)})
                return dict(name=name, levels=levels)
            part = part[np.isfinite(part)]
            if not len(part):
                raise SeriesError(f'the covariate {name!r} has no value in the training part')
            std = float(part.std())
            return dict(name=name, mean=float(part.mean()), std=std if std > 0 else 1.)

        c = panel.columns
        past, future = ([rule(n, panel.dynamic[n], panel.dynamic[n][train]) for n in names]
                        for names in (c.past, c.future))
        return cls(past, future, [rule(n, panel.static[n], panel.static[n]) for n in c.static], c.calendar)

    def to_dict(self) -> Dict[str, Any]:
        return dict(past=self.past, future=self.future, static=self.static, calendar=self.calendar)

    def dims(self, freq: str) -> Dict[str, int]:
        """Sizes of TSM2's inputs: past_dim, future_dim and static_dim."""
        def size(rules):
            return sum(len(r['levels']) if 'levels' in r else 1 for r in rules)

        times = calendar(pd.DatetimeIndex(['2020-01-01']), freq).shape[1] if self.calendar else 0
        return dict(past_dim=size(self.past) + size(self.future) + times, future_dim=size(self.future) + times,
                    static_dim=size(self.static))

    @staticmethod
    def _encode(array: np.ndarray, rule: dict, panel: Panel) -> np.ndarray:
        """(K, …) to (K, …, size)."""
        if 'levels' not in rule:
            if array.dtype == object:
                raise SeriesError(f'the covariate {rule["name"]!r} was numbers in training and is text now')
            return ((array - rule['mean']) / rule['std'])[..., None]
        absent = np.vectorize(lambda v: not isinstance(v, str), otypes=[bool])(array) if array.dtype == object else \
            np.isnan(array)
        text = np.where(absent, '', array).astype(str)
        at = {level: i for i, level in enumerate(rule['levels'])}
        codes = np.vectorize(lambda v: at.get(v, -1), otypes=[np.int64])(text)
        unknown = (codes < 0) & ~absent
        if unknown.any():
            place = tuple(np.argwhere(unknown)[0])
            date = f' at {panel.index[place[1]]}' if len(place) > 1 else ''
            raise SeriesError(f'the covariate {rule["name"]!r} has the category {str(text[place])!r}{date}, which '
                              f'training did not have (it had {len(at)}: {", ".join(list(at)[:8])}'
                              f'{", …" if len(at) > 8 else ""})')
        out = np.eye(len(at))[np.maximum(codes, 0)]
        out[absent] = np.nan
        return out

    def tensors(self, panel: Panel, mean: np.ndarray, std: np.ndarray) -> Tensors:
        """What a model reads: values standardised by the (K, M) mean and deviation, and covariates by their rules."""
        values = (panel.values - mean[:, None]) / std[:, None]
        K, L, _ = values.shape
        future = [self._encode(panel.dynamic[r['name']], r, panel) for r in self.future]
        if self.calendar:
            times = calendar(panel.index, panel.freq)
            future.append(np.broadcast_to(times, (K, *times.shape)))
        past = [self._encode(panel.dynamic[r['name']], r, panel) for r in self.past] + future
        static = [self._encode(panel.static[r['name']], r, panel) for r in self.static]

        def join(parts):
            return np.concatenate(parts, -1) if parts else None

        past, future, static = join(past), join(future), join(static)  # (K, L, C), (K, L, C), (K, C)
        if panel.columns.multivariate:  # the series become the variates of one
            values = values.transpose(2, 1, 0)
            past, future = (None if a is None else a.transpose(1, 0, 2)[None] for a in (past, future))
            static = None if static is None else static[None]
        else:
            past, future = (None if a is None else a[:, :, None] for a in (past, future))
            static = None if static is None else static[:, None]
        return Tensors(*(None if a is None else torch.as_tensor(np.ascontiguousarray(a), dtype=torch.float32)
                         for a in (values, past, future, static)))
