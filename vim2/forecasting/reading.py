"""Reading time series from files as people have them: every guess is refused, or made by an option and reported.

What is decided here is logged to the logger `vim2.forecasting` (level INFO); tools/forecast.py prints it.
"""
import csv
import datetime
import logging
import lzma
import re
import zipfile
import zlib
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

import numpy as np
import pandas as pd

from .errors import SeriesError

__all__ = ['INTEGER_DATES', 'parse_dates', 'read_series']

log = logging.getLogger('vim2.forecasting')

# What a column of whole numbers may mean, and how pandas reads it.
INTEGER_DATES: Dict[str, dict] = dict(
    s=dict(unit='s'), ms=dict(unit='ms'), us=dict(unit='us'), ns=dict(unit='ns'),
    yyyymmdd=dict(format='%Y%m%d'), yyyymm=dict(format='%Y%m'), year=dict(format='%Y'),
    excel=dict(unit='D', origin='1899-12-30'))
_READ_ERRORS = (OSError, EOFError, ValueError, LookupError, ImportError, OverflowError, csv.Error, zlib.error,
                lzma.LZMAError, zipfile.BadZipFile)
_MAGIC = ((b'PK\x03\x04', '.zip', 'a zip or Excel file: save the sheet as CSV'),
          (b'\x1f\x8b', '.gz', 'compressed with gzip: its name must end in .gz'),
          (b'BZh', '.bz2', 'compressed with bzip2: its name must end in .bz2'),
          (b'\xfd7zXZ', '.xz', 'compressed with xz: its name must end in .xz'),
          (b'\xd0\xcf\x11\xe0', '', 'an old Excel file: save the sheet as CSV'),
          (b'\x89HDF', '', 'an HDF5 file: save the table as CSV'), (b'%PDF', '', 'a PDF file'),
          (b'\x89PNG', '', 'a picture'), (b'\xff\xd8\xff', '', 'a picture'),
          (b'\xff\xfe', '', 'text in UTF-16: give ⟨encoding=utf-16⟩'),
          (b'\xfe\xff', '', 'text in UTF-16: give ⟨encoding=utf-16⟩'))


def row_name(i: int, file: bool) -> str:
    """Row i (from 0), as somebody with the file or with the DataFrame in front of them counts it."""
    return f'row {i + 1} (line {i + 2} of the file)' if file else f'row {i + 1}'


def _listed(names: Sequence, most: int = 20) -> str:
    names = [repr(str(n)) for n in names]
    return ', '.join(names[:most]) + (f', … ({len(names)} in all)' if len(names) > most else '')


def read_series(
        path: Union[str, Path],
        date_column: str = 'date',
        columns: Optional[Sequence[str]] = None,
        *,
        id_column: Optional[str] = None,
        separator: str = ',',
        decimal: str = '.',
        thousands: Optional[str] = None,
        encoding: str = 'utf-8',
        names: Optional[Sequence[str]] = None,
        header: bool = True,
        skip_rows: int = 0,
        na: Sequence[str] = (),
        date_format: Optional[str] = None,
        day_first: Optional[bool] = None,
        integer_dates: Optional[str] = None,
        timezone: Optional[str] = None,
) -> pd.DataFrame:
    """A table of text, or a Parquet file, with a column of dates.

    Order, duplicates, gaps and missing values are left as they are: `Panel.from_frame` judges them.

    Args:
        path: .csv, .csv.gz and the other compressions that pandas knows by their ending; .parquet needs pyarrow.
        date_column: its column of dates.
        columns: the further columns to take, in this order. Default: all.
        id_column: its column of the series' names, if it holds many series.
        separator: between the fields; 'tab' for a tabulator.
        decimal, thousands: marks in numbers.
        encoding: of the text.
        names: names of all columns, in place of those in the header.
        header: whether the first line is a header; without one `names` is needed.
        skip_rows: lines before the header.
        na: texts that stand for a missing value, such as '-9999', beside the empty field and pandas' own
            (NA, NaN, null, …).
        date_format: of the dates, as `strptime` has it.
        day_first: whether 01/02/2020 is in February. Needed where the dates do not tell.
        integer_dates: what dates that are whole numbers are, one of `INTEGER_DATES`.
        timezone: name of the zone that dates without an offset are in, or that ones with an offset are brought to.

    Returns:
        A DataFrame with the dates as its index, numbers as float64, and text where a column is no numbers.

    Raises:
        SeriesError: what is wrong, with the row and the column, and the argument that mends it.
    """
    path = Path(path)
    if path.suffix.lower() in ('.parquet', '.pq'):
        frame = _read_parquet(path)
    else:
        separator = '\t' if separator in ('tab', '\\t') else separator
        frame = _read_text(path, separator, decimal, thousands, encoding, names, header, skip_rows, na,
                           [c for c in (date_column, id_column) if c])
    if names is None:
        frame = _drop_row_names(frame, path, date_column)
    for column, option in ((date_column, 'date_column'), (id_column, 'id_column')):
        if column is not None and column not in frame.columns:
            raise SeriesError(f'{path} has no column {column!r}: ⟨{option}⟩ must be one of {_listed(frame.columns)}')
    dates = frame.pop(date_column)
    if columns is not None:
        frame = select_columns(frame, [*([id_column] if id_column else []), *columns], str(path))
    if len(frame.columns) - (id_column is not None) < 1:
        raise SeriesError(f'{path} has no column beside {date_column!r}' + (f' and {id_column!r}' if id_column else ''))
    if not len(frame):
        raise SeriesError(f'{path} has a header and no row')
    groups = None
    if id_column is not None:
        bad = frame[id_column].isna().to_numpy()
        if bad.any():
            raise SeriesError(f'{path}: {row_name(int(bad.argmax()), True)}, column {id_column!r}: no name of a series')
        frame[id_column] = frame[id_column].astype(str)
        groups = frame[id_column].to_numpy()
    frame.index = parse_dates(dates, date_format, day_first, integer_dates, timezone, groups, str(path), True)
    return frame


def select_columns(frame: pd.DataFrame, columns: Sequence[str], name: str = 'the series') -> pd.DataFrame:
    """These columns in this order; unknown ones are an error that lists the known ones."""
    known = [str(c) for c in frame.columns]
    unknown = [c for c in columns if c not in known]
    if unknown:
        raise SeriesError(f'{name} has no column {", ".join(map(repr, unknown))}; its columns are {_listed(known)}')
    if len(set(columns)) < len(columns):
        raise SeriesError(f'{name}: a column is asked for twice in {", ".join(map(repr, columns))}')
    return frame[list(columns)]


# ------------------------------------------------------------------------------------------------------------- tables

def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except ImportError:
        raise SeriesError(f'cannot read {path}: Parquet files need pyarrow (pip install pyarrow)') from None
    except (OSError, ValueError) as e:  # pyarrow's errors are of both kinds
        raise SeriesError(f'cannot read {path} as Parquet: {e}') from None
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    frame.columns = frame.columns.astype(str)
    if frame.columns.duplicated().any():
        raise SeriesError(f'{path} has the column {frame.columns[frame.columns.duplicated()][0]!r} twice')
    return frame


def _check_bytes(path: Path, encoding: str) -> None:
    with open(path, 'rb') as f:
        start = f.read(4096)
    for magic, suffix, what in _MAGIC:
        if start.startswith(magic) and not (suffix and path.suffix.lower() == suffix) and \
                not (magic in (b'\xff\xfe', b'\xfe\xff') and 'utf' in encoding.lower() and '16' in encoding):
            raise SeriesError(f'cannot read {path} as CSV: it is {what}')
    text = start.lstrip(b'\xef\xbb\xbf \t\r\n')
    if text[:1] == b'<' or text[:1] in (b'{', b'['):
        kind = 'an HTML or XML page' if text[:1] == b'<' else 'JSON'
        raise SeriesError(f'cannot read {path} as CSV: it is {kind}')
    if path.suffix.lower() in ('.csv', '.txt', '.tsv') and b'\0' in start and '16' not in encoding and \
            '32' not in encoding:
        raise SeriesError(f'cannot read {path} as CSV: it holds bytes of 0, so that it is no text in {encoding} '
                          '(⟨encoding⟩)')


def _first_lines(path: Path, encoding: str, separator: str, skip: int, most: int = 2) -> List[List[str]]:
    """The fields of the first lines that are not empty."""
    from pandas.io.common import get_handle
    with get_handle(path, 'r', encoding=encoding, compression='infer') as handles:
        lines = []
        for fields in csv.reader(handles.handle, delimiter=separator):
            if skip:
                skip -= 1
            elif fields:
                lines.append(fields)
                if len(lines) == most:
                    break
        return lines


def _is_number(text: str) -> bool:
    return re.fullmatch(r'\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*', text) is not None


def _read_text(path, separator, decimal, thousands, encoding, names, header, skip_rows, na, text_columns):
    if encoding.lower().replace('_', '-') in ('utf-8', 'utf8'):
        encoding = 'utf-8-sig'  # the same, with or without a byte order mark
    for option, value in (('separator', separator), ('decimal', decimal), ('thousands', thousands)):
        if value is not None and len(value) != 1:
            raise SeriesError(f"⟨{option}⟩ must be one character{' or tab' if option == 'separator' else ''}, got "
                              f'{value!r}')
    if decimal == thousands:
        raise SeriesError(f'⟨decimal⟩ and ⟨thousands⟩ must differ, both are {decimal!r}')
    if not header and names is None:
        raise SeriesError('without a header the columns need ⟨names⟩')
    if names is not None and len(set(names)) < len(names):
        raise SeriesError(f'⟨names⟩ has a name twice: {", ".join(names)}')
    try:
        _check_bytes(path, encoding)
        lines = _first_lines(path, encoding, separator, skip_rows)
        if not lines:
            raise SeriesError(f'{path} is empty')
        _check_header(path, lines, separator, names, header, text_columns)
        frame = pd.read_csv(
            path, sep=separator, decimal=decimal, thousands=thousands, encoding=encoding, skiprows=skip_rows,
            header=0 if header else None, names=names, index_col=False, na_values=list(na), low_memory=False,
            dtype={c: str for c in text_columns}, on_bad_lines='error')
    except SeriesError:
        raise
    except UnicodeError as e:
        raise SeriesError(f'cannot read {path} as {encoding.removesuffix("-sig")}: {e}; ⟨encoding=latin-1⟩ or cp1252 '
                          'may be it') from None
    except LookupError as e:
        raise SeriesError(f'cannot read {path}: {e} (⟨encoding⟩)') from None
    except _READ_ERRORS as e:
        hint = ' (lines before the header are left out by ⟨skip_rows⟩; ⟨separator⟩ is the mark between fields)' \
            if isinstance(e, pd.errors.ParserError) else ''
        text = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        raise SeriesError(f'cannot read {path} as CSV: {text}{hint}') from None
    frame.columns = frame.columns.astype(str)
    empty = [c for c in frame.columns if c.startswith('Unnamed: ') and frame[c].isna().all()]
    if empty:
        log.info('%s: left out %d column(s) without a name and without a value', path, len(empty))
        frame = frame.drop(columns=empty)
    return frame


def _check_header(path, lines, separator, names, header, text_columns) -> None:
    """What pandas would read without a word, and wrongly."""
    first = lines[0]
    if len(first) == 1 and names is None:
        other = [s for s in (',', ';', '\t', '|') if s != separator and first[0].count(s)]
        if other:
            raise SeriesError(f'{path} has one field in its first line, {first[0][:60]!r}: the separator seems to be '
                              f'another one: ⟨separator={"tab" if other[0] == chr(9) else other[0]}⟩')
    wanted = names or first
    body = lines[1 if header else 0] if len(lines) > (1 if header else 0) else None
    if body is not None and len(body) > len(wanted):
        tail = body[len(wanted):]
        if tail != ['']:  # a separator at the end of each line is harmless
            raise SeriesError(
                f'{path}: the header has {len(wanted)} names and the first row {len(body)} fields: one is missing, '
                f'such as that of row numbers; give all ⟨names⟩ ({body[0]!r} is the first field), or see ⟨separator⟩')
    if names is not None:
        if len(first) < len(names):
            raise SeriesError(f'{path}: ⟨names⟩ has {len(names)} names, the file {len(first)} columns')
        return
    stripped = [c.strip() for c in first]
    twice = sorted({c for c in stripped if c and stripped.count(c) > 1})
    if twice:
        raise SeriesError(f'{path} has the column {twice[0]!r} twice: give other ⟨names⟩')
    if not set(text_columns) & set(first) and len(first) > 1 and all(
            _is_number(c) or re.match(r'\d{1,4}[-/.]\d', c) for c in stripped):
        raise SeriesError(f'{path}: the first line, {separator.join(first)[:60]!r}, is no header but data: give the '
                          'columns ⟨names⟩ and ⟨header=False⟩')


def _drop_row_names(frame: pd.DataFrame, path: Path, date_column: str) -> pd.DataFrame:
    """Without the column of row numbers that pandas and R write; any other column without a name is an error."""
    unnamed = [c for c in frame.columns if c.startswith('Unnamed: ')]
    for c in unnamed:
        if c == date_column:
            continue
        values = pd.to_numeric(frame[c], errors='coerce').to_numpy(np.float64, na_value=np.nan)
        if len(values) and np.array_equal(values, np.arange(len(values)) + values[0]) and values[0] in (0, 1):
            log.info('%s: left out the column without a name, which numbers the rows', path)
            frame = frame.drop(columns=c)
        else:
            raise SeriesError(f"{path}: column {int(c.split(': ')[1]) + 1} has no name (it begins with "
                              f'{str(frame[c].iloc[0]) if len(frame) else ""!r}): give all ⟨names⟩')
    return frame


# -------------------------------------------------------------------------------------------------------------- dates

_YEAR_FIRST = re.compile(r'\d{4}([-/.])\d{1,2}(\1\d{1,2}([T ].*)?)?')
_YEAR_LAST = re.compile(r'(\d{1,2})([-/.])(\d{1,2})\2(\d{4})([T ].*)?')
_OFFSET = re.compile(r'\d(Z|[+-]\d{2}(?::?\d{2})?)$')


def parse_dates(
        dates: pd.Series,
        date_format: Optional[str] = None,
        day_first: Optional[bool] = None,
        integer_dates: Optional[str] = None,
        timezone: Optional[str] = None,
        groups: Optional[np.ndarray] = None,
        name: str = 'the series',
        file: bool = False,
) -> pd.DatetimeIndex:
    """The instants that a column of dates names: text, numbers or datetimes; see `read_series`.

    Args:
        groups: the series that each row belongs to, whose local times repeat.
        name, file: what messages call the series, and whether its rows are lines of a file.

    Raises:
        SeriesError: a date that is none, that could be two, or that is of another kind than the others.
    """
    if integer_dates is not None and integer_dates not in INTEGER_DATES:
        raise SeriesError(f'⟨integer_dates⟩ must be one of {", ".join(INTEGER_DATES)}, got {integer_dates!r}')
    if sum(v is not None for v in (date_format, integer_dates, day_first)) > 1:
        raise SeriesError('of ⟨date_format⟩, ⟨integer_dates⟩ and ⟨day_first⟩ only one can hold')

    def bad(mask, what: str):
        i = int(np.asarray(mask).argmax())
        return SeriesError(f'{name}: {row_name(i, file)}, column {dates.name!r}: {dates.iloc[i]!r} {what}')

    missing = dates.isna().to_numpy()
    if missing.any():
        raise bad(missing, 'is no date')
    if isinstance(dates.dtype, pd.DatetimeTZDtype) or dates.dtype.kind == 'M':
        index = pd.DatetimeIndex(dates)
    elif dates.map(lambda v: isinstance(v, datetime.date)).all():  # of Parquet files and DataFrames
        index = pd.DatetimeIndex(pd.to_datetime(dates, errors='coerce', utc=None))
    else:
        text = dates.astype(str).str.strip()
        index = pd.DatetimeIndex(_parse_text(text, date_format, day_first, integer_dates, timezone, bad, name))
    nat = index.isna()
    if nat.any():
        raise bad(nat, 'is no date')
    index = _in_timezone(index, timezone, groups, name)
    return pd.DatetimeIndex(index, name=dates.name, freq=None)


def _to_datetime(text: pd.Series, aware: bool, **kwargs) -> pd.Series:
    try:
        return pd.to_datetime(text, errors='coerce', utc=aware, **kwargs)
    except (ValueError, OverflowError) as e:
        raise SeriesError(f'⟨date_format={kwargs.get("format")}⟩: {e}') from None


def _parse_text(text: pd.Series, date_format, day_first, integer_dates, timezone, bad, name) -> pd.Series:
    numbers = text.str.fullmatch(r'[+-]?\d+(\.\d+)?').to_numpy(bool)
    if date_format is not None:
        aware = '%z' in date_format
        result = _to_datetime(text, aware, format=date_format)
        if result.isna().any():
            raise bad(result.isna(), f'does not match ⟨date_format={date_format}⟩')
        return _same_offset(result, text, timezone, name) if aware else result
    if integer_dates is not None:
        if not numbers.all():
            raise bad(~numbers, f'is no number, as ⟨integer_dates={integer_dates}⟩ says')
        return _integer_dates(text, integer_dates, bad)
    if numbers.any():
        if not numbers.all():
            raise bad(~numbers if numbers[0] else numbers, 'is of another kind than the date in the first row')
        raise bad(numbers, f'is a number, which can be a date in several ways: give ⟨integer_dates={_guess(text)}⟩, or '
                           f'another of {", ".join(INTEGER_DATES)}')
    offset = (text.str.extract(_OFFSET.pattern)[0].notna() & text.str.contains(':', regex=False)).to_numpy(bool)
    if offset.any() and not offset.all():
        raise bad(offset != offset[0], 'has an offset from UTC and the first row has none, or the reverse: give a '
                                       '⟨date_format⟩ or mend the file' if offset[0] else
                                       'has an offset from UTC, and the first row has none: mend the file')
    aware = bool(offset.any())
    year_first = text.str.fullmatch(_YEAR_FIRST.pattern).to_numpy(bool)
    if year_first.any():
        if not year_first.all():
            raise bad(~year_first if year_first[0] else year_first,
                      'is no date as those before: give ⟨date_format⟩, or mend the file')
        iso = text.str.replace(r'^(\d{4})[/.](\d{1,2})(?:[/.](\d{1,2}))?', _iso, regex=True)
    else:
        parts = text.str.extract('^' + _YEAR_LAST.pattern + '$')
        wrong = parts[0].isna().to_numpy()
        if wrong.any():
            if (~wrong).any():
                raise bad(wrong if not wrong[0] else ~wrong, 'is no date as those before: mend the file')
            return _parse_names(text, bad)
        iso = _day_month_year(parts, day_first, bad, name)
    result = _to_datetime(iso, aware, format='ISO8601')
    if result.isna().any():
        raise bad(result.isna(), 'is no date; ⟨date_format⟩ says how it is to be read')
    return _same_offset(result, text, timezone, name) if aware else result


def _iso(m: re.Match) -> str:
    return '-'.join(p for p in m.groups() if p)


def _day_month_year(parts: pd.DataFrame, day_first: Optional[bool], bad, name: str) -> pd.Series:
    first, second = parts[0].astype(int).to_numpy(), parts[2].astype(int).to_numpy()
    if day_first is None:
        day, month = bool((first > 12).any()), bool((second > 12).any())
        if day and month:
            raise bad((first > 12) if not (second[0] > 12) else (second > 12),
                      'has its day and month the other way round than another row')
        if not day and not month:
            raise bad(np.ones(1, bool), 'can be day first or month first, and no other row tells: give '
                                        '⟨day_first=True⟩ or ⟨day_first=False⟩')
        day_first = day
        log.info('%s: dates are read as %s, which is the only way that all are dates', name,
                 'day, month, year' if day else 'month, day, year')
    d, m = (parts[0], parts[2]) if day_first else (parts[2], parts[0])
    return parts[3] + '-' + m.str.zfill(2) + '-' + d.str.zfill(2) + parts[4].fillna('')


def _parse_names(text: pd.Series, bad) -> pd.Series:
    """Dates with a month's name ('3 May 2020'), which pandas reads in one way only; anything else is refused."""
    from pandas.tseries.api import guess_datetime_format
    if re.fullmatch(r'\d{1,2}[-/.]\d{1,2}[-/.]\d{2}( .*)?', text.iloc[0]):
        raise bad(np.ones(1, bool), 'has a year of two digits: give ⟨date_format⟩, such as %d/%m/%y')
    # 'May' is the short and the long name: another month tells which
    other = text[~text.str.contains('may', case=False)]
    guess = guess_datetime_format((other if len(other) else text).iloc[0])
    if guess is None or not ('%b' in guess or '%B' in guess):
        raise bad(np.ones(1, bool), 'is no date; ⟨date_format⟩ says how it is to be read')
    result = _to_datetime(text, False, format=guess)
    if result.isna().any():
        raise bad(result.isna(), f'is no date like the first one ({guess}); ⟨date_format⟩ says how it is to be read')
    return result


def _guess(text: pd.Series) -> str:
    """The likeliest meaning of whole numbers, for a message."""
    digits = len(text.iloc[0].lstrip('+-').partition('.')[0])
    return {4: 'year', 5: 'excel', 6: 'yyyymm', 8: 'yyyymmdd', 10: 's', 13: 'ms', 16: 'us', 19: 'ns'}.get(digits, 's')


def _integer_dates(text: pd.Series, kind: str, bad) -> pd.Series:
    rule = INTEGER_DATES[kind]
    if 'format' in rule:
        digits = {'yyyymmdd': 8, 'yyyymm': 6, 'year': 4}[kind]
        whole = text.str.replace(r'\.0*$', '', regex=True)  # 20200101.0, as a column with a gap is written
        wrong = ~whole.str.fullmatch(rf'\d{{{digits}}}').to_numpy(bool)
        if wrong.any():
            raise bad(wrong, f'has not the {digits} digits of ⟨integer_dates={kind}⟩')
        return _to_datetime(whole, False, **rule)
    if not text.str.fullmatch(r'[+-]?\d+').all():
        numbers = pd.to_numeric(text)
        if rule['unit'] not in ('s', 'D') and (numbers % 1 != 0).any():
            raise bad(numbers % 1 != 0, f'is no whole number, as ⟨integer_dates={kind}⟩ says')
    else:
        numbers = text.astype('int64') if text.str.len().max() < 19 else text.map(int)
    try:
        result = pd.to_datetime(numbers, errors='coerce', **rule)
    except (ValueError, OverflowError):
        raise bad(np.ones(1, bool), f'is no date as ⟨integer_dates={kind}⟩') from None
    year = result.dt.year
    wrong = (result.isna() | (year < 1677) | (year > 2262)).to_numpy()
    if wrong.any():
        raise bad(wrong, f'is no date of the years 1677 to 2262 as ⟨integer_dates={kind}⟩')
    return result.dt.tz_localize('UTC') if rule.get('unit') != 'D' else result


def _same_offset(result: pd.Series, text: pd.Series, timezone: Optional[str], name: str) -> pd.Series:
    """Instants in UTC, shown at the offset that they were written with where it is one for all."""
    if timezone is not None:
        return result
    offsets = text.str.extract(_OFFSET.pattern)[0].unique()
    if len(offsets) > 1:
        log.info('%s: the dates have %d offsets from UTC (%s): they are kept in UTC; give ⟨timezone⟩ for local days',
                 name, len(offsets), ', '.join(map(str, offsets[:4])))
        return result
    m = re.fullmatch(r'([+-])(\d{2}):?(\d{2})?', str(offsets[0]))
    minutes = 0 if m is None else int(m[1] + '1') * (60 * int(m[2]) + int(m[3] or 0))
    return result.dt.tz_convert('UTC' if not minutes else datetime.timezone(datetime.timedelta(minutes=minutes)))


def _in_timezone(index: pd.DatetimeIndex, timezone: Optional[str], groups, name: str) -> pd.DatetimeIndex:
    if timezone is None:
        return index
    try:
        if index.tz is not None:
            return index.tz_convert(timezone)
        if groups is None:
            return index.tz_localize(timezone, ambiguous='infer')
        out = pd.Series(index)
        local = out.groupby(groups, sort=False).transform(
            lambda s: pd.DatetimeIndex(s).tz_localize(timezone, ambiguous='infer').tz_convert('UTC').tz_localize(None))
        return pd.DatetimeIndex(local).tz_localize('UTC').tz_convert(timezone)
    except (KeyError, OSError):  # zoneinfo's own error is a KeyError
        raise SeriesError(f'there is no time zone {timezone!r} (⟨timezone⟩): a name is Europe/Berlin, or UTC') from None
    except ValueError as e:
        raise SeriesError(f'{name}: the dates do not fit the time zone {timezone!r} (⟨timezone⟩): {e}') from None
