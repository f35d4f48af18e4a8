"""Files as people have them: the same instants, or an error that says what to do."""
import datetime
import gzip
import itertools
import logging
import zipfile

import numpy as np
import pandas as pd
import pytest

from vim2.forecasting import SeriesError, future_index, parse_dates, read_series
from vim2.forecasting.errors import SeriesError as Error

ROWS = 30


def instants(freq, seed):
    """Dates on the grid of a frequency that begin somewhere in ten years."""
    start = pd.Timestamp('2012-01-01') + pd.Timedelta(days=int(np.random.default_rng(seed).integers(0, 3650)))
    return pd.date_range(start, periods=ROWS, freq=freq)


def write(path, dates, column='date', **kwargs):
    pd.DataFrame({column: dates, 'a': np.arange(len(dates)) + 0.5}).to_csv(path, index=False, **kwargs)
    return path


# -------------------------------------------------------------------------------------------------- a property of dates

STYLES = {  # how a file may write dates: a function of the instants, and the options that read it
    'iso': (lambda d: [str(x) for x in d], {}),
    'iso date': (lambda d: [f'{x:%Y-%m-%dT%H:%M:%S}' for x in d], {}),
    'y/m/d': (lambda d: [f'{x.year}/{x.month}/{x.day} {x.hour}:{x.minute:02d}' for x in d], {}),
    'y.m.d': (lambda d: [f'{x:%Y.%m.%d %H:%M}' for x in d], {}),
    'd/m/y': (lambda d: [f'{x:%d/%m/%Y %H:%M}' for x in d], dict(day_first=True)),
    'm/d/y': (lambda d: [f'{x:%m/%d/%Y %H:%M}' for x in d], dict(day_first=False)),
    'd.m.y': (lambda d: [f'{x.day}.{x.month}.{x.year} {x:%H:%M}' for x in d], dict(day_first=True)),
    'd-m-y unsaid': (lambda d: [f'{x:%d-%m-%Y %H:%M}' for x in d], {}),
    'm-d-y unsaid': (lambda d: [f'{x:%m-%d-%Y %H:%M}' for x in d], {}),
    'two digits': (lambda d: [f'{x:%d/%m/%y %H:%M}' for x in d], dict(date_format='%d/%m/%y %H:%M')),
    'am pm': (lambda d: [f'{x:%m/%d/%Y %I:%M %p}' for x in d], dict(date_format='%m/%d/%Y %I:%M %p')),
    'month name': (lambda d: [f'{x:%d %B %Y %H:%M}' for x in d], dict(date_format='%d %B %Y %H:%M')),
    'month name unsaid': (lambda d: [f'{x:%d-%b-%Y}' for x in d], {}),
    'Z': (lambda d: [f'{x:%Y-%m-%dT%H:%M:%SZ}' for x in d], {}),
    'offset': (lambda d: [x.tz_localize('UTC').tz_convert('Asia/Kolkata').isoformat() for x in d], {}),
    'offsets across DST': (lambda d: [x.tz_localize('UTC').tz_convert('Europe/Berlin').isoformat() for x in d], {}),
    'offsets to a zone': (lambda d: [x.tz_localize('UTC').tz_convert('Europe/Berlin').isoformat() for x in d],
                          dict(timezone='America/New_York')),
    'epoch s': (lambda d: [int(x.timestamp()) for x in d], dict(integer_dates='s')),
    'epoch ms': (lambda d: [int(x.timestamp() * 1000) for x in d], dict(integer_dates='ms')),
    'epoch ns': (lambda d: [x.as_unit('ns').value for x in d], dict(integer_dates='ns')),
    'yyyymmdd': (lambda d: [f'{x:%Y%m%d}' for x in d], dict(integer_dates='yyyymmdd')),
    'yyyymm': (lambda d: [f'{x:%Y%m}' for x in d], dict(integer_dates='yyyymm')),
    'year': (lambda d: [f'{x:%Y}' for x in d], dict(integer_dates='year')),
    'excel': (lambda d: [(x - pd.Timestamp('1899-12-30')).days for x in d], dict(integer_dates='excel')),
    'epoch unsaid': (lambda d: [int(x.timestamp()) for x in d], {}),
    'yyyymmdd unsaid': (lambda d: [f'{x:%Y%m%d}' for x in d], {}),
    'year unsaid': (lambda d: [f'{x:%Y}' for x in d], {}),
}
FREQS = ('B', 'MS', 'ME', 'W', 'QS', 'h', '15min', 'D')
EXACT = {'iso', 'iso date', 'y/m/d', 'y.m.d', 'd/m/y', 'm/d/y', 'd.m.y', 'two digits', 'am pm', 'month name', 'Z',
         'offset', 'offsets across DST', 'offsets to a zone', 'epoch s', 'epoch ms', 'epoch ns'}
NEVER = {'epoch unsaid', 'yyyymmdd unsaid', 'year unsaid'}
WHOLE_DAYS = {'month name unsaid', 'yyyymmdd', 'excel'}


@pytest.mark.parametrize('style', STYLES)
def test_the_same_instants_or_an_error(tmp_path, style):
    """Whatever the style and the step; and the forecast's dates go on where the file ended."""
    text, options = STYLES[style]
    for freq, seed in itertools.product(FREQS, range(3)):
        dates = instants(freq, seed)
        path = write(tmp_path / 'x.csv', text(dates))
        exact = style in EXACT or style in WHOLE_DAYS and freq not in ('h', '15min') or \
            style == 'yyyymm' and freq in ('MS', 'QS')
        try:
            index = read_series(path, **options).index
        except SeriesError as e:
            # what cannot be known is refused; that is never so where it can
            assert not exact and 'column' in str(e), e
            assert style in NEVER or 'unsaid' in style, (style, freq, e)
            continue
        assert style not in NEVER
        naive = index if index.tz is None else index.tz_convert('UTC').tz_localize(None)
        if exact or 'unsaid' in style and style not in WHOLE_DAYS:
            assert list(naive) == list(dates), (style, freq)
            if style == 'offsets to a zone' and freq not in ('h', '15min'):
                continue  # midnights of UTC are on no grid of days in New York
            ahead = future_index(index, 7)
            assert list(ahead.tz_convert('UTC').tz_localize(None) if ahead.tz else ahead) == list(
                pd.date_range(dates[-1], periods=8, freq=freq)[1:])
        else:  # a style that cannot hold the time of day or the day: what it holds
            floor = {'year': 'Y', 'yyyymm': 'M'}.get(style, 'D')
            assert list(naive.to_period(floor)) == list(dates.to_period(floor))


@pytest.mark.parametrize('last, freq, first', [
    ('2024-05-31', 'B', '2024-06-03'), ('2024-06-01', 'B', '2024-06-03'), ('2024-05-15', 'MS', '2024-06-01'),
    ('2024-05-15', 'ME', '2024-05-31'), ('2024-05-31', 'ME', '2024-06-30'), ('2024-05-15', 'W', '2024-05-19'),
    ('2024-05-19', 'W', '2024-05-26'), ('2024-05-15', 'QS', '2024-07-01'), ('2024-01-31 23:00', 'h', '2024-02-01'),
    ('2024-02-28', 'D', '2024-02-29'), ('2024-05-15', '2MS', '2024-06-01')])
def test_first_date_of_the_future(last, freq, first):
    index = pd.DatetimeIndex([last])
    for horizon in (1, 5):
        ahead = future_index(index, horizon, freq)
        assert list(ahead) == list(pd.date_range(first, periods=horizon, freq=freq))


def test_future_across_a_change_of_clocks():
    index = pd.date_range('2024-10-26 20:00', periods=5, freq='h', tz='Europe/Berlin')
    ahead = future_index(index, 8, 'h')
    assert (np.diff(ahead.tz_convert('UTC').tz_localize(None)) == np.timedelta64(1, 'h')).all()
    days = future_index(pd.date_range('2024-10-20', periods=7, freq='D', tz='Europe/Berlin'), 3, 'D')
    assert [str(d) for d in days] == ['2024-10-27 00:00:00+02:00', '2024-10-28 00:00:00+01:00',
                                      '2024-10-29 00:00:00+01:00']


@pytest.mark.parametrize('freq', ['fortnight', '-1D', '0h', '-2MS'])
def test_no_frequency(freq):
    with pytest.raises(SeriesError, match='freq|evenly'):
        future_index(pd.DatetimeIndex(['2024-01-01', '2024-01-05', '2024-01-06']), 3, freq)


def test_local_times(tmp_path):
    """Dates without an offset in a zone: the hour that is there twice, and the one that is not."""
    utc = pd.date_range('2024-10-26 20:00', periods=12, freq='h', tz='UTC')
    local = [f'{d.tz_convert("Europe/Berlin"):%Y-%m-%d %H:%M}' for d in utc]
    assert len(set(local)) < len(local)
    path = write(tmp_path / 'x.csv', local)
    index = read_series(path, timezone='Europe/Berlin').index
    assert list(index.tz_convert('UTC')) == list(utc)
    frame = pd.concat([pd.DataFrame(dict(id=i, date=local, y=1.)) for i in 'ab'])
    frame.to_csv(path, index=False)
    index = read_series(path, id_column='id', timezone='Europe/Berlin').index
    assert list(index.tz_convert('UTC')) == [*utc, *utc]
    write(path, ['2024-03-31 01:00', '2024-03-31 02:00', '2024-03-31 03:00'])
    with pytest.raises(SeriesError, match="do not fit the time zone 'Europe/Berlin'"):
        read_series(path, timezone='Europe/Berlin')
    with pytest.raises(SeriesError, match="no time zone 'Mars/Olympus'"):
        read_series(path, timezone='Mars/Olympus')


def test_offset_is_kept_and_several_become_utc(tmp_path, caplog):
    path = write(tmp_path / 'x.csv', ['2024-01-01T00:00:00+05:30', '2024-01-01T01:00:00+05:30'])
    assert str(read_series(path).index[0]) == '2024-01-01 00:00:00+05:30'
    write(path, ['2024-03-31T01:00:00+01:00', '2024-03-31T03:00:00+02:00'])
    with caplog.at_level(logging.INFO, 'vim2.forecasting'):
        index = read_series(path).index
    assert list(index) == list(pd.date_range('2024-03-31 00:00', periods=2, freq='h', tz='UTC'))
    assert 'kept in UTC' in caplog.text
    write(path, ['2024-03-31T01:00:00+01:00', '2024-03-31T03:00:00'])
    with pytest.raises(SeriesError, match='has an offset from UTC'):
        read_series(path)


@pytest.mark.parametrize('dates, message', [
    (['01/02/2020', '03/04/2020'], r"row 1 \(line 2 of the file\), column 'date': '01/02/2020' can be day first or"),
    (['13/02/2020', '03/14/2020'], 'day and month the other way round'),
    (['01/02/20', '03/04/20'], 'year of two digits'),
    (['2020-01-01', '20200102'], r'row 2 \(line 3 of the file\).* is of another kind'),
    (['2020-01-01', '02/01/2020'], 'is no date as those before'),
    (['2020-01-01', '2020-02-30'], "'2020-02-30' is no date"),
    (['2020-01-01', ''], 'is no date'),
    (['20200101', '20200102'], 'give integer_dates=.yyyymmdd'),
    (['2019', '2020'], 'give integer_dates=.year'),
    (['1577836800', '1577836801'], 'give integer_dates=.s'),
    (['soon', 'later'], "'soon' is no date"),
    (['2020Q1', '2020Q2'], 'is no date'),
])
def test_dates_that_are_refused(tmp_path, dates, message):
    with pytest.raises(SeriesError, match=message):
        read_series(write(tmp_path / 'x.csv', dates))


@pytest.mark.parametrize('options, message', [
    (dict(integer_dates='yyyymmdd'), 'is no number, as'), (dict(integer_dates='days'), 'must be one of s, ms'),
    (dict(date_format='%d.%m.%Y'), 'does not match date_format'), (dict(date_format='%d', day_first=True), 'only one'),
    (dict(date_format='%Q'), 'date_format'), (dict(date_column='when'), "must be one of 'date', 'a'"),
    (dict(id_column='who'), "no column 'who'"), (dict(separator=';;'), 'separator must be one character'),
    (dict(decimal=',', thousands=','), 'must differ'), (dict(encoding='klingon'), 'encoding'),
    (dict(header=False), 'need names')])
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(SeriesError, match=message):
        read_series(write(tmp_path / 'x.csv', ['2020-01-01', '2020-01-02']), **options)


def test_integer_dates_out_of_range(tmp_path):
    path = write(tmp_path / 'x.csv', ['20200101', '20201301'])
    with pytest.raises(SeriesError, match=r"row 2 .*'20201301' is no date"):
        read_series(path, integer_dates='yyyymmdd')
    with pytest.raises(SeriesError, match='has not the 4 digits'):
        read_series(path, integer_dates='year')
    write(path, ['1577836800000', '1577836801000'])  # milliseconds, read as seconds, are in the year 51970
    with pytest.raises(SeriesError, match='years 1677 to 2262'):
        read_series(path, integer_dates='s')


def test_dates_of_dataframes():
    """Datetimes, Python's dates, and text, as `parse_dates` gets them from a DataFrame."""
    days = [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)]
    for values in (days, pd.to_datetime(days), ['2020-01-01', '2020-01-02']):
        index = parse_dates(pd.Series(values, name='when'))
        assert list(index) == [pd.Timestamp(d) for d in days] and index.name == 'when'


# ------------------------------------------------------------------------------------------------------------- the text

BODY = 'date,a,b\n2020-01-01,1.5,2\n2020-01-02,2.5,3\n2020-01-03,3.5,4\n'


@pytest.mark.parametrize('text, options', [
    (BODY, {}), (BODY.replace(',', ';'), dict(separator=';')), (BODY.replace(',', '\t'), dict(separator='tab')),
    (BODY.replace(',', ';').replace('.', ','), dict(separator=';', decimal=',')),
    ('\ufeff' + BODY, {}), (BODY.replace('\n', '\r\n'), {}), (BODY.replace('\n', ',\n'), {}),
    ('a report\nof 2020\n' + BODY, dict(skip_rows=2)), (BODY.partition('\n')[2], dict(names=['date', 'a', 'b'],
                                                                                     header=False)),
    (BODY.replace('date,a,b', 'x,y,z'), dict(names=['date', 'a', 'b'])), ('\n\n' + BODY, {}),
    (BODY.replace('date,a,b', ',date,a,b').replace('2020-01-01', '0,2020-01-01').replace(
        '2020-01-02', '1,2020-01-02').replace('2020-01-03', '2,2020-01-03'), {})], ids=range(12))
def test_the_same_table(tmp_path, text, options):
    path = tmp_path / 'x.csv'
    path.write_bytes(text.encode())
    frame = read_series(path, **options)
    assert list(frame.columns) == ['a', 'b'] and list(frame.index) == list(pd.date_range('2020-01-01', periods=3))
    np.testing.assert_array_equal(frame.to_numpy(float), [[1.5, 2], [2.5, 3], [3.5, 4]])


def test_encodings_and_compressions(tmp_path):
    frame = pd.DataFrame({'date': pd.date_range('2020', periods=3), 'größe': [1., 2., 3.]})
    for name, encoding in (('l1.csv', 'latin-1'), ('u16.csv', 'utf-16'), ('u8.csv.gz', 'utf-8'), ('u8.csv.xz', 'utf-8'),
                           ('u8.csv.zip', 'utf-8')):
        frame.to_csv(tmp_path / name, index=False, encoding=encoding)
        assert list(read_series(tmp_path / name, encoding=encoding).columns) == ['größe']
    with pytest.raises(SeriesError, match="encoding='latin-1'"):
        read_series(tmp_path / 'l1.csv')
    with pytest.raises(SeriesError, match="encoding='utf-16'"):
        read_series(tmp_path / 'u16.csv')


def test_values(tmp_path):
    path = tmp_path / 'x.csv'
    path.write_text('date,a,b,c\n2020-01-01,"1,234.5",-9999,x\n2020-01-02,7,,y\n')
    frame = read_series(path, thousands=',', na=['-9999'])
    assert frame['a'].tolist() == [1234.5, 7.] and frame['b'].isna().all() and frame['c'].tolist() == ['x', 'y']
    assert list(read_series(path, columns=['c', 'a']).columns) == ['c', 'a']
    with pytest.raises(SeriesError, match="no column 'd'; its columns are 'a', 'b', 'c'"):
        read_series(path, columns=['a', 'd'])
    with pytest.raises(SeriesError, match='asked for twice'):
        read_series(path, columns=['a', 'a'])


def test_parquet(tmp_path):
    pytest.importorskip('pyarrow', reason='Parquet files need pyarrow')
    frame = pd.DataFrame({'date': pd.date_range('2020', periods=3), 'a': [1., 2., 3.], 'k': list('xyx')})
    frame['k'] = frame['k'].astype('category')
    frame.to_parquet(tmp_path / 'x.parquet')
    read = read_series(tmp_path / 'x.parquet')
    assert list(read.index) == list(frame['date']) and read['a'].tolist() == [1., 2., 3.]
    (tmp_path / 'y.parquet').write_bytes(b'PAR1junk')
    with pytest.raises(SeriesError, match='cannot read .*y.parquet as Parquet'):
        read_series(tmp_path / 'y.parquet')


def bad_tables():
    """Bytes that are no table of a series, by what is wrong; each has to end in a SeriesError."""
    csv = BODY.encode()
    gz = gzip.compress(csv)
    return {
        'empty': ('x.csv', b''), 'blank': ('x.csv', b'\n\n'), 'header only': ('x.csv', b'date,a\n'),
        'zeros': ('x.csv', bytes(100)), 'noise': ('x.csv', bytes(range(256)) * 4),
        'gzip called csv': ('x.csv', gz), 'csv called gzip': ('x.csv.gz', csv), 'half a gzip': ('x.csv.gz', gz[:-12]),
        'csv called zip': ('x.csv.zip', csv), 'excel': ('x.csv', b'PK\x03\x04' + bytes(50)),
        'html': ('x.csv', b'<!DOCTYPE html><html>'), 'json': ('x.csv', b'{"date": ["2020-01-01"]}'),
        'picture': ('x.csv', b'\x89PNG\r\n\x1a\n'), 'utf-16': ('x.csv', BODY.encode('utf-16')),
        'latin-1': ('x.csv', 'date,größe\n2020-01-01,1\n'.encode('latin-1')),
        'semicolons': ('x.csv', csv.replace(b',', b';')), 'tabs': ('x.csv', csv.replace(b',', b'\t')),
        'no header': ('x.csv', csv.partition(b'\n')[2]), 'title above': ('x.csv', b'sales 2020\n\n' + csv),
        'name twice': ('x.csv', csv.replace(b'a,b', b'a,a')),
        'header one short': ('x.csv', csv.replace(b'date,a,b', b'date,a')),
        'row too long': ('x.csv', csv + b'2020-01-04,1,2,3,4\n'), 'open quote': ('x.csv', csv + b'2020-01-04,"1,2\n'),
        'no date column': ('x.csv', csv.replace(b'date', b'time')), 'dates only': ('x.csv', b'date\n2020-01-01\n'),
        'unnamed column': ('x.csv', csv.replace(b'date,a', b'date,')),
        'german numbers': ('x.csv', b'date,a\n2020-01-01,"1,5"\n2020-01-02,"2,5"\n2020-01-03,"2,7"\n'),
    }


@pytest.mark.parametrize('what', bad_tables())
def test_bad_tables(tmp_path, what):
    from vim2.forecasting import Panel
    name, content = bad_tables()[what]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Error) as e:
        Panel.from_frame(read_series(path), name=str(path), file=True)
    assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_bad_paths(tmp_path):
    for path in (tmp_path, tmp_path / 'absent.csv', tmp_path / 'absent.parquet'):
        with pytest.raises(SeriesError, match='cannot read'):
            read_series(path)
    with zipfile.ZipFile(tmp_path / 'two.csv.zip', 'w') as z:
        z.writestr('a.csv', BODY)
        z.writestr('b.csv', BODY)
    with pytest.raises(SeriesError, match='cannot read .*Multiple files'):
        read_series(tmp_path / 'two.csv.zip')
