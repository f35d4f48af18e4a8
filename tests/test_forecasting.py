"""Series, splits, windows, errors and the forecaster, against plain re-implementations."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vim2.forecasting import (
    DLinear, Forecaster, Scaler, SeriesError, Windows, check_series, evaluate, frequency, future_index, read_series,
    split_series)
from vim2.models import TSM2


def series(rows=100, columns=('a', 'b', 'c'), freq='h', seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(rows)[:, None]
    values = np.sin(t / 5 + np.arange(len(columns))) * 3 + 10 + 0.1 * rng.standard_normal((rows, len(columns)))
    return pd.DataFrame(values, pd.date_range('2020-01-01', periods=rows, freq=freq, name='date'), list(columns))


# ------------------------------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize('name', ['x.csv', 'x.csv.gz'])
def test_read(tmp_path, name):
    frame = series()
    frame.to_csv(tmp_path / name)
    read = read_series(tmp_path / name)
    pd.testing.assert_frame_equal(read, frame, check_freq=False)
    assert list(read_series(tmp_path / name, columns=['c', 'a']).columns) == ['c', 'a']


def test_read_other_dates(tmp_path):
    (tmp_path / 'x.csv').write_text('0,when,OT\n1,1990/1/1 0:00,2\n3,1990/1/2 0:00,4\n')
    read = read_series(tmp_path / 'x.csv', date_column='when')
    assert list(read.columns) == ['0', 'OT'] and read.index[1] == pd.Timestamp(1990, 1, 2)
    assert read.to_numpy().dtype == np.float64


@pytest.mark.parametrize('lines, message', [
    ({3: '2020-01-01 02:00:00,1.0,,3.0'}, r"row 3 \(line 4 of the file\), column 'b': the value is missing \(NaN\)"),
    ({3: '2020-01-01 02:00:00,1.0,oops,3.0', 7: '2020-01-01 06:00:00,x,1,1'},
     r"row 3 \(line 4 of the file\), column 'b': 'oops' is no finite number"),
    ({5: '2020-01-01 04:00:00,1.0,2.0,inf'}, r"row 5 \(line 6 of the file\), column 'c': .*inf.* is no finite number"),
    ({4: '2020-01-01 02:00:00,1,2,3'}, r'row 4 \(line 5 of the file\): 2020-01-01 02:00:00 is the date of the row '
                                       'before again'),
    ({4: '2019-12-31 02:00:00,1,2,3'}, r'row 4 \(line 5 of the file\): 2019-12-31 02:00:00 is before the date of the '
                                       r'row before \(2020-01-01 02:00:00\): sort the series'),
    ({2: 'soon,1,2,3'}, r"row 2 \(line 3 of the file\), column 'date': 'soon' is no date"),
    ({0: 'time,a,b,c'}, "has no column 'date' of dates; its columns are 'time', 'a', 'b', 'c'"),
    ({3: '2020-01-01 02:00:00,1,2,3,4,5'}, 'cannot read .* as CSV: .*[Ee]xpected'),
])
def test_bad_files(tmp_path, lines, message):
    path = tmp_path / 'x.csv'
    series(20).to_csv(path)
    text = path.read_text().splitlines()
    for i, line in lines.items():
        text[i] = line
    path.write_text('\n'.join(text) + '\n')
    with pytest.raises(SeriesError, match=message):
        read_series(path)


def test_more_bad_files(tmp_path):
    with pytest.raises(SeriesError, match='cannot read .*absent.csv as CSV'):
        read_series(tmp_path / 'absent.csv')
    (tmp_path / 'empty.csv').write_text('')
    with pytest.raises(SeriesError, match='cannot read .*empty.csv as CSV'):
        read_series(tmp_path / 'empty.csv')
    (tmp_path / 'dates.csv').write_text('date\n2020-01-01\n')
    with pytest.raises(SeriesError, match="no column beside 'date'"):
        read_series(tmp_path / 'dates.csv')
    (tmp_path / 'no.csv.gz').write_text('date,a\n2020-01-01,1\n')
    with pytest.raises(SeriesError, match='cannot read .*no.csv.gz as CSV'):
        read_series(tmp_path / 'no.csv.gz')
    series(20).to_csv(tmp_path / 'x.csv')
    with pytest.raises(SeriesError, match="no column 'd', 'e'; its columns are 'a', 'b', 'c'"):
        read_series(tmp_path / 'x.csv', columns=['a', 'd', 'e'])
    with pytest.raises(SeriesError, match='a column is asked for twice'):
        read_series(tmp_path / 'x.csv', columns=['a', 'a'])


def test_check_frame():
    with pytest.raises(SeriesError, match='needs a DatetimeIndex, got a RangeIndex'):
        check_series(series().reset_index(drop=True))
    frame = series()
    frame.iloc[7, 1] = np.nan
    with pytest.raises(SeriesError, match=r"the series: row 8, column 'b': the value is missing"):
        check_series(frame)
    with pytest.raises(SeriesError, match="has the column 'a' twice"):
        check_series(series(columns=('a', 'b', 'a')))


@pytest.mark.parametrize('freq', ['h', '15min', 'D', 'MS', 'B', 'W-SUN'])
def test_dates_of_the_future(freq):
    index = pd.date_range('2021-01-31', periods=40, freq=freq)
    known = pd.DatetimeIndex(index[:30].to_numpy(), name='when')  # as read from a file: no frequency attached
    assert frequency(known) == freq
    future = future_index(known, 10)
    assert list(future) == list(index[30:]) and future.name == 'when'


def test_uneven_dates():
    index = pd.DatetimeIndex(['2021-01-01', '2021-01-02', '2021-01-05', '2021-01-06'])
    with pytest.raises(SeriesError, match='not evenly spaced'):
        future_index(index, 3)
    assert list(future_index(index, 2, 'D').day) == [7, 8]
    with pytest.raises(SeriesError, match="'fortnight' is no frequency"):
        future_index(index, 3, 'fortnight')


# ---------------------------------------------------------------------------------------------------- splits, windows

def test_splits():
    assert split_series(17420, 'ett-hour') == ((0, 8640), (8640, 11520), (11520, 14400))
    assert split_series(69680, 'ett-minute') == ((0, 34560), (34560, 46080), (46080, 57600))
    assert split_series(7588) == ((0, 5311), (5311, 6071), (6071, 7588))
    assert split_series(10, '0.7/0.1/0.2') == ((0, 7), (7, 8), (8, 10))
    for length, scheme, message in (
            (14399, 'ett-hour', "'ett-hour' needs 14400 rows, the series has 14399"), (100, '0.7/0.3', 'is no split'),
            (100, '0.7/0.1/0.3', 'is no split'), (100, 'ett', 'is no split'), (100, '1.2/-0.4/0.2', 'is no split')):
        with pytest.raises(SeriesError, match=message):
            split_series(length, scheme)


@pytest.mark.parametrize('name, rows, scheme, counts', [
    ('ETTh1', 17420, 'ett-hour', {96: (8033, 2785, 2785), 192: (7937, 2689, 2689), 336: (7793, 2545, 2545),
                                  720: (7409, 2161, 2161)}),
    ('ETTm1', 69680, 'ett-minute', {96: (33953, 11425, 11425), 192: (33857, 11329, 11329), 336: (33713, 11185, 11185),
                                    720: (33329, 10801, 10801)}),
    ('exchange', 7588, '0.7/0.1/0.2', {96: (4704, 665, 1422), 192: (4608, 569, 1326), 336: (4464, 425, 1182),
                                       720: (4080, 41, 798)}),
])
def test_number_of_windows(name, rows, scheme, counts):
    """Of the benchmark's data sets, at look-back 512: nothing is dropped."""
    values, split = torch.zeros(rows, 1), split_series(rows, scheme)
    for horizon, expected in counts.items():
        assert tuple(len(Windows(values, part, 512, horizon)) for part in split) == expected


def test_windows():
    values = torch.arange(100.).reshape(50, 2)
    windows = Windows(values, (20, 40), lookback=8, horizon=3)
    assert len(windows) == 18
    x, y = windows.take(torch.tensor([0, 17]))
    assert torch.equal(x[0], values[12:20]) and torch.equal(y[0], values[20:23])  # the look-back reaches back
    assert torch.equal(x[1], values[29:37]) and torch.equal(y[1], values[37:40])  # up to the end of the part
    first = Windows(values, (0, 20), lookback=8, horizon=3)
    assert len(first) == 10 and torch.equal(first.take(torch.tensor([0]))[0][0], values[:8])
    batches = list(windows.batches(7))
    assert [len(x) for x, _ in batches] == [7, 7, 4]
    assert torch.equal(torch.cat([y for _, y in batches])[:, 0, 0], values[20:38, 0])
    some = torch.cat([y for _, y in windows.batches(4, limit=5)])[:, 0, 0]
    assert len(some) == 5 and some[0] == values[20, 0] and some[-1] == values[37, 0]
    with pytest.raises(SeriesError, match='the test part is too short: with what precedes it, it has 10 rows, a '
                                          'look-back of 8 and a horizon of 3 need 11'):
        Windows(values, (0, 10), 8, 3, 'test')


def test_scaler_is_of_the_training_part():
    values = series().to_numpy().copy()
    values[:, 2] = 5
    scaler = Scaler.fit(values[:70])
    scaled = scaler.transform(values)
    np.testing.assert_allclose(scaled[:70, :2].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(scaled[:70, :2].std(0), 1)
    assert (scaled[:, 2] == 0).all()  # a constant variate
    again = Scaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    np.testing.assert_allclose(again.inverse(scaled), values)


def test_evaluate():
    class Repeat(nn.Module):
        def forward(self, x):
            return x[:, -1:].expand(-1, 3, -1)

    values = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    windows = Windows(values, (20, 60), 8, 3)
    errors = evaluate(Repeat(), windows, batch_size=7)
    n = 60 - 20 - 3 + 1
    assert errors.windows == n == 38
    for h in range(3):
        for j in range(2):
            e = [(values[20 + i - 1, j] - values[20 + i + h, j]).item() for i in range(n)]
            assert errors.mse[h, j].item() == pytest.approx(np.mean(np.square(e)), rel=1e-5)
            assert errors.mae[h, j].item() == pytest.approx(np.mean(np.abs(e)), rel=1e-5)
    whole = evaluate(Repeat(), windows, batch_size=1000)
    torch.testing.assert_close(whole.mse, errors.mse)
    assert evaluate(Repeat(), windows, limit=10).windows == 10


def test_dlinear():
    model = DLinear(2, lookback=30, horizon=4, kernel=5)
    nn.init.normal_(model.trend.weight)
    nn.init.normal_(model.seasonal.weight)
    x = torch.randn(3, 30, 2)
    y = model(x)
    assert y.shape == (3, 4, 2)
    padded = torch.cat([x[:, :1]] * 2 + [x] + [x[:, -1:]] * 2, 1)
    trend = torch.stack([padded[:, t:t + 5].mean(1) for t in range(30)], 1)
    expected = F.linear(trend.transpose(1, 2), model.trend.weight, model.trend.bias) + \
        F.linear((x - trend).transpose(1, 2), model.seasonal.weight, model.seasonal.bias)
    torch.testing.assert_close(y, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- forecaster

@pytest.fixture
def forecaster():
    torch.manual_seed(0)
    frame = series()
    model = TSM2(3, lookback=24, horizon=6, patch_len=8, stride=8, d_model=8, d_state=4)
    return Forecaster(model, Scaler.fit(frame.to_numpy()[:70]), list(frame.columns), 'h', dict(split='0.7/0.1/0.2'))


def test_predict(forecaster):
    frame = series()
    forecast = forecaster.predict(frame)
    assert list(forecast.columns) == ['a', 'b', 'c'] and len(forecast) == 6
    assert forecast.index[0] == frame.index[-1] + pd.Timedelta('1h') and forecast.index.name == 'date'
    x = torch.tensor(forecaster.scaler.transform(frame.to_numpy()[-24:]), dtype=torch.float32)
    with torch.no_grad():
        expected = forecaster.scaler.inverse(forecaster.model(x[None])[0].numpy())
    np.testing.assert_allclose(forecast.to_numpy(), expected, rtol=1e-5)
    # order and number of other columns do not matter, nor does what is older than the look-back
    other = frame.iloc[50:].assign(extra=1.)[['extra', 'c', 'a', 'b']]
    pd.testing.assert_frame_equal(forecaster.predict(other), forecast, check_freq=False)


def test_predict_errors(forecaster):
    frame = series()
    with pytest.raises(SeriesError, match=r"has 2 variates \('a', 'b'\), the forecaster was trained on 3: it lacks 'c"):
        forecaster.predict(frame[['a', 'b']])
    with pytest.raises(SeriesError, match=r'has 23 rows, a forecast needs 24 \(the look-back\)'):
        forecaster.predict(frame.iloc[-23:])
    with pytest.raises(SeriesError, match='sort the series'):
        forecaster.predict(frame.iloc[::-1])
    frame.iloc[90, 0] = np.inf
    with pytest.raises(SeriesError, match="row 91, column 'a'"):
        forecaster.predict(frame)


def test_forecaster_folder(forecaster, tmp_path):
    forecaster.save(tmp_path / 'model')
    again = Forecaster.load(tmp_path / 'model')
    frame = series()
    pd.testing.assert_frame_equal(again.predict(frame), forecaster.predict(frame))
    assert (again.columns, again.freq, again.info) == (['a', 'b', 'c'], 'h', dict(split='0.7/0.1/0.2'))
    TSM2.from_pretrained(str(tmp_path / 'model'))
    (tmp_path / 'model' / 'model.safetensors').write_bytes(b'12345678junk')
    with pytest.raises(SeriesError, match='cannot read the forecaster'):
        Forecaster.load(tmp_path / 'model')
    (tmp_path / 'model' / 'forecaster.json').unlink()
    with pytest.raises(SeriesError, match='is no forecaster: it has no forecaster.json'):
        Forecaster.load(tmp_path / 'model')


def test_bundled_forecaster():
    names = 'tsm2.ETTh1-96'
    with pytest.raises(SeriesError, match=f"no bundled forecaster 'tsm2.ETTh9-96': there is {names}"):
        Forecaster.bundled('tsm2.ETTh9-96')
    forecaster = Forecaster.bundled('tsm2.ETTh1-96')
    assert forecaster.columns == ['HUFL', 'HULL', 'MUFL', 'MULL', 'LUFL', 'LULL', 'OT']
    assert (forecaster.lookback, forecaster.horizon, forecaster.freq) == (512, 96, 'h')
    # what it has learned and needs no data to show: a daily rhythm goes on
    t = np.arange(600)[:, None]
    scaler = forecaster.scaler
    frame = pd.DataFrame(scaler.inverse(np.sin(2 * np.pi * t / 24) * np.ones(7)),
                         pd.date_range('2020', periods=600, freq='h'), forecaster.columns)
    expected = np.sin(2 * np.pi * np.arange(600, 696)[:, None] / 24)
    error = scaler.transform(forecaster.predict(frame).to_numpy()) - expected
    assert np.square(error).mean() < 0.25  # of a signal with a mean square of 0.5


def test_bundled_forecaster_on_etth1(shared_data):
    forecaster = Forecaster.bundled('tsm2.ETTh1-96')
    frame = read_series(shared_data('ett') / 'ETTh1.csv.gz')
    values = torch.as_tensor(forecaster.scaler.transform(frame.to_numpy()), dtype=torch.float32)
    windows = Windows(values, split_series(len(frame), 'ett-hour').test, 512, 96)
    assert len(windows) == 2785
    assert evaluate(forecaster.model, windows, limit=300).mse.mean() < 0.42
