"""Panels, splits, windows, errors and the forecaster, against plain re-implementations."""
import json
import logging
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vim2.forecasting import (
    Columns, DLinear, Forecaster, Intervals, Panel, Scaler, SeriesError, SeriesWarning, Windows, evaluate, fit,
    frequency, read_series, split_series)
from vim2.forecasting.grid import same_step, season_length
from vim2.forecasting.metrics import naive_scale
from vim2.forecasting.panel import Covariates, calendar
from vim2.forecasting.training import TRAINING, Trainer, default_lookback, default_patch, training_options
from vim2.models import TSM2

SMALL = dict(patch_len=8, stride=8, d_model=8, d_state=2, drop_rate=0.)
QUICK = dict(epochs=3, steps=8, batch_size=32, lr=5e-3, patience=0)


def series(rows=100, columns=('a', 'b', 'c'), freq='h', seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(rows)[:, None]
    values = np.sin(t / 5 + np.arange(len(columns))) * 3 + 10 + 0.1 * rng.standard_normal((rows, len(columns)))
    return pd.DataFrame(values, pd.date_range('2020-01-01', periods=rows, freq=freq, name='date'), list(columns))


def long_frame(rows=(120, 100, 90), seed=0, freq='D'):
    """Series x, y, z that end together; each is its own price of the day, its kind and noise."""
    rng = np.random.default_rng(seed)
    frames = []
    for n, (name, length) in enumerate(zip('xyz', rows)):
        index = pd.date_range('2021-01-01', periods=max(rows), freq=freq)[-length:]
        price = rng.standard_normal(length)
        y = 5 * (n + 1) + 3 * price + np.sin(2 * np.pi * index.day_of_week / 7) + 0.1 * rng.standard_normal(length)
        frames.append(pd.DataFrame(dict(unique_id=name, ds=index, y=y, price=price, kind='ab'[n % 2],
                                        temperature=rng.standard_normal(length))))
    return pd.concat(frames, ignore_index=True)


LONG = Columns(target='y', id='unique_id', date='ds', future='price', past='temperature', static='kind', calendar=True)


# -------------------------------------------------------------------------------------------------------------- panels

def test_panel_of_a_wide_table():
    frame = series()
    panel = Panel.from_frame(frame)
    assert (panel.freq, panel.ids, panel.rows, panel.variates) == ('h', [''], 100, ['a', 'b', 'c'])
    np.testing.assert_array_equal(panel.values[0], frame.to_numpy())
    panel = Panel.from_frame(frame, Columns(target=('c', 'a')))
    np.testing.assert_array_equal(panel.values[0], frame[['c', 'a']].to_numpy())


def test_panel_of_a_long_table():
    """Ragged starts, rows in any order of the series, any names."""
    frame = long_frame()
    shuffled = frame.sort_values(['ds', 'unique_id'], ascending=[True, False])
    names = dict(unique_id='shop', ds='day', y='sales')
    columns = Columns(target='sales', id='shop', date='day', future='price', static='kind')
    panel = Panel.from_frame(shuffled.rename(columns=names), columns)
    assert sorted(panel.ids) == ['x', 'y', 'z'] and panel.freq == 'D' and len(panel.index) == 120
    for k, name in enumerate(panel.ids):
        own = frame[frame.unique_id == name]
        assert panel.end[k] - panel.begin[k] == len(own)
        np.testing.assert_array_equal(panel.values[k, panel.begin[k]:panel.end[k], 0], own.y)
        np.testing.assert_array_equal(panel.dynamic['price'][k, panel.begin[k]:], own.price)
        assert np.isnan(panel.values[k, :panel.begin[k]]).all()
    assert [panel.static['kind'][panel.ids.index(i)] for i in 'xyz'] == ['a', 'b', 'a']


@pytest.mark.parametrize('how, expected', [
    ('keep', [np.nan, np.nan]), ('interpolate', [2.5, 3.]), ('forward', [2., 2.]), ('zero', [0., 0.])])
def test_gaps_and_missing_values(how, expected, caplog):
    """A row that is not there (1 of the values) and one that is empty; each by its own option."""
    frame = pd.DataFrame({'a': [1., 2., 2.5, 3., 3.5, 4.]}, pd.date_range('2020', periods=6, freq='D'))
    gap = frame.drop(frame.index[[2, 3]])
    with pytest.raises(SeriesError, match="2 date.s. are missing on the grid of 'D', the first 2020-01-03"):
        Panel.from_frame(gap)
    with caplog.at_level(logging.INFO, 'vim2.forecasting'):
        values = Panel.from_frame(gap, gaps=how).values[0, :, 0]
    assert '2 date(s) are missing' in caplog.text
    np.testing.assert_allclose(values[[0, 1, 4, 5]], [1, 2, 3.5, 4])
    np.testing.assert_allclose(values[2:4], expected if how != 'interpolate' else [2.5, 3.])
    empty = frame.mask(np.isin(np.arange(6), [2, 3])[:, None])
    with pytest.raises(SeriesError, match=r"row 3, column 'a': the value is missing \(NaN\): missing can be keep"):
        Panel.from_frame(empty)
    np.testing.assert_allclose(Panel.from_frame(empty, missing=how).values[0, 2:4, 0], expected)
    with pytest.raises(SeriesError, match='the value is missing'):
        Panel.from_frame(empty, gaps=how)
    with pytest.raises(SeriesError, match='missing on the grid'):
        Panel.from_frame(gap, missing=how)


def test_duplicates_and_order(caplog):
    dates = pd.to_datetime(['2020-01-01', '2020-01-02', '2020-01-02', '2020-01-03'])
    frame = pd.DataFrame({'a': [1., 2., 4., 5.]}, dates)
    with pytest.raises(SeriesError, match='row 3: 2020-01-02 .* is the date of the row before again: duplicates can'):
        Panel.from_frame(frame)
    for how, value in (('first', 2.), ('last', 4.), ('mean', 3.), ('sum', 6.)):
        with caplog.at_level(logging.INFO, 'vim2.forecasting'):
            assert Panel.from_frame(frame, duplicates=how).values[0, :, 0].tolist() == [1., value, 5.]
        assert f'took the {how}' in caplog.text
    back = series().iloc[::-1]
    with pytest.raises(SeriesError, match='row 2: .* is before the date of the row before .*: sort=True puts'):
        Panel.from_frame(back)
    np.testing.assert_array_equal(Panel.from_frame(back, sort=True).values[0], series().to_numpy())


@pytest.mark.parametrize('change, message', [
    (lambda f: f.reset_index(drop=True), 'needs a DatetimeIndex or date_column, got a RangeIndex'),
    (lambda f: f.set_axis(['a', 'b', 'a'], axis=1), "has the column 'a' twice"),
    (lambda f: f.assign(b=f.b.mask(f.index == f.index[7])), r"the series: row 8, column 'b': the value is missing"),
    (lambda f: f.assign(c=f.c.where(f.index != f.index[4], np.inf)), r"row 5, column 'c': .*inf.* is no finite number"),
    (lambda f: f.assign(a=f.a.astype(object).where(f.index != f.index[2], 'oops')), "row 3, column 'a': 'oops' is no"),
    (lambda f: f.assign(a=f.a.astype(object).where(f.index != f.index[2], '1,5')), "'1,5' is no .*: decimal=','"),
    (lambda f: f.assign(a=f.a.astype(object).where(f.index != f.index[2], '1 234.5')), "thousands=' '"),
    (lambda f: f.assign(b=f.b.where(f.index != f.index[9], -9999)), r"row 10, column 'b': -9999 is far .*na='-9999'"),
    (lambda f: f.assign(b=np.nan), "value is missing"),
    (lambda f: f.iloc[[0, 1, 4, 6, 7, 20, 21, 60]].set_axis(
        pd.Timestamp('2020') + pd.to_timedelta([0, 1, 5, 1000, 12345, 12349, 54321, 99999], unit='min'), axis=0),
     'not evenly spaced'),
])
def test_bad_frames(change, message):
    with pytest.raises(SeriesError, match=message):
        Panel.from_frame(change(series()))


def test_sentinels_can_be_values():
    frame = series().assign(b=lambda f: f.b.where(f.index != f.index[9], -9999))
    assert Panel.from_frame(frame, sentinels=False).values[0, 9, 1] == -9999
    Panel.from_frame(series() - 1e4)  # where all are like that, none is one
    Panel.from_frame(series().assign(b=lambda f: f.b * 0 + 999))


@pytest.mark.parametrize('columns, message', [
    (dict(target='a', past='a'), "column 'a' has two roles"), (dict(static='a'), 'static covariates need id_column'),
    (dict(categorical='a'), "categorical 'a' is in none of"), (dict(multivariate=True), 'multivariate need id_column'),
    (dict(target=('a', 'b'), id='c', multivariate=True), 'takes one target, got 2')])
def test_bad_columns(columns, message):
    with pytest.raises(SeriesError, match=message):
        Columns(**columns)


def test_bad_panels():
    frame = long_frame()
    frame.loc[3, 'kind'] = 'c'
    with pytest.raises(SeriesError, match="static covariate 'kind' changes within the series 'x'"):
        Panel.from_frame(frame, LONG)
    frame = long_frame()
    frame.loc[frame.unique_id == 'y', 'y'] = np.nan
    with pytest.raises(SeriesError, match="the series 'y' has no value"):
        Panel.from_frame(frame, LONG)
    with pytest.raises(SeriesError, match="no column 'prize'"):
        Panel.from_frame(long_frame(), Columns(target='y', id='unique_id', date='ds', future='prize'))


@pytest.mark.parametrize('freq', ['h', '15min', 'D', 'MS', 'B', 'W-SUN', 'ME', 'QS-OCT', '2D'])
def test_frequency_with_and_without_gaps(freq):
    index = pd.date_range('2021-01-31', periods=40, freq=freq)
    known = pd.DatetimeIndex(index.to_numpy())  # as read from a file: no frequency attached
    assert same_step(frequency(known), freq)
    gappy = known.delete([5, 6, 20])
    assert same_step(frequency(gappy), freq)
    frame = pd.DataFrame({'a': np.arange(40.)}, known)
    panel = Panel.from_frame(frame.drop(frame.index[[5, 6, 20]]), gaps='interpolate')
    np.testing.assert_allclose(panel.values[0, :, 0], np.arange(40.))
    assert list(panel.index) == list(index)


def test_frequency_is_checked():
    frame = series()
    for freq, message in (('D', 'not on the grid|within one step'), ('15min', 'contradict'),
                          ('2h', 'grid|within one step')):
        with pytest.raises(SeriesError, match=message):
            Panel.from_frame(frame, freq=freq)
    mid = pd.DataFrame({'a': np.arange(12.)}, pd.date_range('2020-01-15', periods=12, freq=pd.DateOffset(months=1)))
    with pytest.raises(SeriesError, match='not on the grid|evenly'):
        Panel.from_frame(mid)
    panel = Panel.from_frame(mid, freq='MS')  # by option: one date of each month
    assert list(panel.index) == list(mid.index)
    assert list(panel.extended(2).index[-2:]) == [pd.Timestamp('2021-01-01'), pd.Timestamp('2021-02-01')]


def test_steps_and_seasons():
    assert same_step('MS', 'ME') and same_step('W-SUN', 'W-MON') and same_step('60min', 'h') and same_step('24h', 'D')
    assert not same_step('D', 'B') and not same_step('h', '2h') and not same_step('MS', 'QS')
    assert [season_length(f) for f in ('h', '15min', '2h', 'D', 'B', 'W', 'MS', 'QS', 'YS', '7min')] == [
        24, 96, 12, 7, 5, 52, 12, 4, 1, 1]


# ---------------------------------------------------------------------------------------------------------- covariates

def test_covariates_become_numbers():
    panel = Panel.from_frame(long_frame(), LONG)
    covariates = Covariates.fit(panel, np.full(3, 90))
    scaler = Scaler.fit(panel.values)
    tensors = covariates.tensors(panel, scaler.mean, scaler.std)
    assert tensors.values.shape == (3, 120, 1) and tensors.static.shape == (3, 1, 2)
    times = calendar(panel.index, 'D')
    assert times.shape == (120, 4) and tensors.future.shape == (3, 120, 1, 1 + 4) and tensors.past.shape[-1] == 2 + 4
    assert covariates.dims('D') == dict(past_dim=6, future_dim=5, static_dim=2)
    price = panel.dynamic['price']
    train = price[:, :90][np.isfinite(price[:, :90])]
    np.testing.assert_allclose(tensors.future[..., 0, 0], (price - train.mean()) / train.std(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tensors.past[0, :, 0, 2:], times, atol=1e-6)
    assert tensors.static[:, 0].tolist() == [[1, 0], [0, 1], [1, 0]]
    again = Covariates(**json.loads(json.dumps(covariates.to_dict())))
    torch.testing.assert_close(again.tensors(panel, scaler.mean, scaler.std).past, tensors.past, equal_nan=True)
    strange = Panel.from_frame(long_frame().replace(dict(kind={'b': 'q'})), LONG)
    with pytest.raises(SeriesError, match="covariate 'kind' has the category 'q'.*training did not have"):
        covariates.tensors(strange, scaler.mean, scaler.std)


def test_numbers_can_be_categories_and_empty_text_is_one():
    frame = long_frame()
    frame['code'] = np.arange(len(frame)) % 3
    frame['event'] = np.where(np.arange(len(frame)) % 5 == 0, 'fair', None)
    panel = Panel.from_frame(frame, Columns(target='y', id='unique_id', date='ds', future=('code', 'event'),
                                            categorical='code'))
    covariates = Covariates.fit(panel, np.full(3, 90))
    assert [r['levels'] for r in covariates.future] == [['0', '1', '2'], ['', 'fair']]


@pytest.mark.parametrize('freq, cycles', [('h', 3), ('D', 2), ('B', 2), ('W', 1), ('MS', 1)])
def test_calendar(freq, cycles):
    index = pd.date_range('2020-01-06', periods=50, freq=freq)
    features = calendar(index, freq)
    assert features.shape == (50, 2 * cycles)
    np.testing.assert_allclose(features[:, :cycles] ** 2 + features[:, cycles:] ** 2, 1)
    year = (index.day_of_year - 1 + index.hour / 24) / 365.25
    np.testing.assert_allclose(features[:, cycles - 1], np.sin(2 * np.pi * year), atol=1e-9)


# ---------------------------------------------------------------------------------------------------- splits, windows

def test_splits():
    assert split_series(17420, 'ett-hour') == ((0, 8640), (8640, 11520), (11520, 14400))
    assert split_series(69680, 'ett-minute') == ((0, 34560), (34560, 46080), (46080, 57600))
    assert split_series(7588) == ((0, 5311), (5311, 6071), (6071, 7588))
    assert split_series(10, '0.7/0.1/0.2') == ((0, 7), (7, 8), (8, 10))
    assert split_series(7588, 'auto', 96) == ((0, 5313), (5313, 6071), (6071, 7588))
    assert split_series(60, 'auto', 6) == ((0, 36), (36, 48), (48, 60))  # two horizons each
    assert split_series(100, 'no-test', 6) == ((0, 85), (85, 100), (100, 100))
    for length, scheme, message in (
            (14399, 'ett-hour', "'ett-hour' needs 14400 rows, the series has 14399"), (100, '0.7/0.3', 'is no split'),
            (100, '0.7/0.1/0.3', 'is no split'), (100, 'ett', 'is no split'), (100, '1.2/-0.4/0.2', 'is no split'),
            (100, '.../0/1', 'is no split')):
        with pytest.raises(SeriesError, match=message):
            split_series(length, scheme)
    with pytest.raises(SeriesError, match='the series has 30 rows, of which 12 are .* take a shorter horizon'):
        split_series(30, 'auto', 12)


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
    windows = Windows(values, (20, 40), lookback=8, horizon=3, season=4)
    assert len(windows) == 18
    inputs, y = windows.take(torch.tensor([0, 17]))
    x = inputs['x']
    assert torch.equal(x[0], values[12:20]) and torch.equal(y[0], values[20:23])  # the look-back reaches back
    assert torch.equal(x[1], values[29:37]) and torch.equal(y[1], values[37:40])  # up to the end of the part
    first = Windows(values, (0, 20), lookback=8, horizon=3)
    assert len(first) == 10 and torch.equal(first.take(torch.tensor([0]))[0]['x'][0], values[:8])
    batches = list(windows.batches(7))
    assert [len(i) for i in batches] == [7, 7, 4]
    assert torch.equal(torch.cat([windows.take(i)[1] for i in batches])[:, 0, 0], values[20:38, 0])
    some = torch.cat([windows.take(i)[1] for i in windows.batches(4, limit=5)])[:, 0, 0]
    assert len(some) == 5 and some[0] == values[20, 0] and some[-1] == values[37, 0]
    assert torch.equal(windows.naive(torch.tensor([0]), 1)[0], values[19:20].expand(3, -1))
    assert torch.equal(windows.naive(torch.tensor([0]), 2)[0], values[[18, 19, 18]])
    assert torch.equal(first.naive(torch.tensor([0]), 12)[0, 0], values[7])  # no season before: the last value
    assert torch.equal(Windows(values, (20, 40), 2, 3).naive(torch.tensor([0]), 12)[0], values[8:11])  # from before x
    with pytest.raises(SeriesError, match='the test part is too short: with what precedes it, it has 10 rows, a '
                                          'lookback of 8 and a horizon of 3 need 11'):
        Windows(values, (0, 10), 8, 3, 'test')


def test_no_window_holds_a_gap():
    values = torch.arange(60.)[:, None].clone()
    values[30] = float('nan')
    windows = Windows(values, (0, 60), 6, 2)
    starts = windows.starts[:, 1].tolist()
    assert starts == [t for t in range(53) if not t <= 30 < t + 8] and windows.left_out == 8
    x, y = windows.take(torch.arange(len(windows)))
    assert x['x'].isfinite().all() and y.isfinite().all()
    with pytest.raises(SeriesError, match='no window without a missing value'):
        Windows(values, (30, 34), 6, 2)


def test_windows_of_a_panel_with_covariates():
    """Windows stay inside their series, and each covariate is that of its steps."""
    panel = Panel.from_frame(long_frame(), LONG)
    covariates = Covariates.fit(panel, np.full(3, 120))
    scaler = Scaler.fit(panel.values)
    tensors = covariates.tensors(panel, scaler.mean, scaler.std)
    windows = Windows(tensors, np.stack([panel.begin, panel.end], 1), 10, 4)
    assert len(windows) == sum(n - 14 + 1 for n in (120, 100, 90))
    index = torch.tensor([0, 107, len(windows) - 1])
    inputs, y = windows.take(index)
    assert {k: tuple(v.shape) for k, v in inputs.items()} == dict(
        x=(3, 10, 1), past=(3, 1, 10, 6), future=(3, 1, 4, 5), static=(3, 1, 2))
    for b, (s, t) in enumerate(windows.starts[index].tolist()):
        torch.testing.assert_close(inputs['x'][b], tensors.values[s, t:t + 10])
        torch.testing.assert_close(inputs['past'][b, 0], tensors.past[s, t:t + 10, 0])
        torch.testing.assert_close(inputs['future'][b, 0], tensors.future[s, t + 10:t + 14, 0])
        torch.testing.assert_close(y[b], tensors.values[s, t + 10:t + 14])


def test_scaler_is_of_the_training_part():
    values = series().to_numpy().copy()
    values[:, 2] = 5
    values[3, 0] = np.nan
    scaler = Scaler.fit(values[None, :70])
    np.testing.assert_allclose(scaler.mean[0], np.nanmean(values[:70], 0))
    np.testing.assert_allclose(scaler.std[0, :2], np.nanstd(values[:70, :2], 0))
    assert scaler.std[0, 2] == 1  # a constant variate
    # of many series: one that stands still is measured by the others
    scaler3 = Scaler.fit(np.stack([values * 10, values * 20, values * 0, values * np.nan])[:, :70, :1])
    np.testing.assert_allclose(scaler3.std[:, 0], scaler.std[0, 0] * np.array([10, 20, 1.5, np.nan]))
    again = Scaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    np.testing.assert_array_equal(again.mean, scaler.mean)


class Repeat(nn.Module):
    def forward(self, x):
        return x[:, -1:].expand(-1, 3, -1)


def test_evaluate():
    values = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    unit = np.array([[2., 5.]])
    windows = Windows(values, (20, 60), 8, 3, season=4, unit=unit)
    scale = naive_scale(values[None, :20].numpy() * unit, 4)
    errors = evaluate(Repeat(), windows, batch_size=7, scale=scale)
    n = 60 - 20 - 3 + 1
    assert errors.windows == n == 38
    for j in range(2):
        mase = np.mean([abs(values[t, j] - values[t - 4, j]) for t in range(4, 20)]) * unit[0, j]
        for h in range(3):
            e = np.array([(values[20 + i - 1, j] - values[20 + i + h, j]).item() for i in range(n)])
            assert errors.mse[h, j].item() == pytest.approx(np.mean(np.square(e)), rel=1e-5)
            assert errors.mae[h, j].item() == pytest.approx(np.mean(np.abs(e)), rel=1e-5)
            assert errors.own_mse[h, j].item() == pytest.approx(np.mean(np.square(e * unit[0, j])), rel=1e-5)
            assert errors.mase[h, j].item() == pytest.approx(np.mean(np.abs(e)) * unit[0, j] / mase, rel=1e-5)
    whole = evaluate(Repeat(), windows, batch_size=1000, scale=scale)
    torch.testing.assert_close(whole.mse, errors.mse)
    assert evaluate(Repeat(), windows, limit=10).windows == 10
    torch.testing.assert_close(evaluate('last', windows).mse, errors.mse)
    seasonal = evaluate('seasonal', windows)
    e = np.array([(values[20 + i - 4 + 1, 0] - values[20 + i + 1, 0]).item() for i in range(n)])
    assert seasonal.mse[1, 0].item() == pytest.approx(np.mean(np.square(e)), rel=1e-5)
    assert np.isnan(naive_scale(np.ones((1, 20, 1)), 4)).all()  # a constant has no scale


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


# ------------------------------------------------------------------------------------------------------------ training

def test_defaults_fit_any_length():
    assert default_lookback(8640, 96, 24) == 512
    assert default_lookback(676, 52, 52) == 208  # a weekly series of 966 rows
    assert default_lookback(36, 6, 12) == 15
    assert default_lookback(3, 1, 7) == 1
    for lookback in (1, 2, 5, 20, 40, 100, 300, 512):
        assert 1 <= default_patch(lookback) <= max(lookback, 1)
    assert training_options({}) == TRAINING
    for options, message in ((dict(lr=-1), 'lr must be a number of at least 0'), (dict(epochs=0), 'epochs must be'),
                             (dict(loss='l3'), 'loss must be one of mse, mae, huber'),
                             (dict(lrr=1), "option of training 'lrr'"),
                             (dict(ema_decay=1), 'must be below 1'), (dict(steps=1.5), 'must be a whole number')):
        with pytest.raises(SeriesError, match=message):
            training_options(options)


def windows_of_noise(rows=200, seed=0):
    values = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed))
    return Windows(values, (0, 150), 8, 2), Windows(values, (150, 200), 8, 2)


@pytest.mark.parametrize('steps, batch_size, expected', [
    (0, 64, 10), (-1, 64, 3), (7, 64, 7), (0, 1, 23), (40, 1000, 40)])
def test_budget(steps, batch_size, expected):
    """Steps from the number of windows; every window is drawn before one is drawn again."""
    train, val = windows_of_noise()
    trainer = Trainer(nn.Linear(1, 1), train, val, training_options(dict(steps=steps, batch_size=batch_size)), 0)
    assert (trainer.steps, trainer.batch_size) == (expected, min(batch_size, 141))
    order = trainer._order()
    assert len(order) == expected * trainer.batch_size
    assert len(order[:141].unique()) == min(141, len(order))


@pytest.mark.parametrize('schedule', ['cosine', 'constant', 'halve'])
def test_schedule(schedule):
    train, val = windows_of_noise()
    options = training_options(dict(epochs=4, steps=10, lr=1., warmup_steps=5, schedule=schedule))
    trainer = Trainer(DLinear(1, 8, 2, kernel=3), train, val, options, 0)
    rates = []
    for _ in range(40):
        rates.append(trainer.optimizer.param_groups[0]['lr'])
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates[0] == pytest.approx(1 / 6) and rates[5] == pytest.approx(1.)
    if schedule == 'halve':  # epochs of 10, the warm-up of 5 before them
        assert rates[5:25] == [1.] * 20 and rates[25:] == [0.5] * 10 + [0.25] * 5
    assert rates[-1] == pytest.approx(dict(constant=1., halve=0.25, cosine=0.01).get(schedule), abs=0.01)


def test_patience_and_the_best_weights():
    train, val = windows_of_noise()
    trainer = Trainer(DLinear(1, 8, 2, kernel=3), train, val, training_options(dict(
        epochs=50, steps=3, lr=0., warmup_steps=0, patience=2, ema_decay=0.)), 0)
    trainer.fit()
    assert (trainer.epoch, trainer.best_epoch, trainer.still_falling) == (3, 0, False)
    options = training_options(dict(epochs=2, steps=3, ema_decay=0.))
    trainer = Trainer(DLinear(1, 8, 2, kernel=3), train, val, options, 0)
    trainer.fit()
    assert trainer.still_falling == (trainer.best_epoch == 1)
    with pytest.raises(SeriesError, match='training diverged; a lower lr'):
        Trainer(DLinear(1, 8, 2, kernel=3), train, val, training_options(dict(lr=1e30, clip_grad=0)), 0).fit()


def test_training_leaves_the_random_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SeriesWarning)
        fit(series(120), 4, 16, model=SMALL, training=dict(QUICK, epochs=1, steps=1))
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------------------- forecaster

@pytest.fixture(scope='module')
def forecaster():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SeriesWarning)
        return fit(series(300), 6, 24, model=SMALL, training=QUICK)


@pytest.fixture(scope='module')
def panel_forecaster():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SeriesWarning)
        return fit(long_frame(), 4, 14, columns=LONG, model=dict(SMALL, patch_len=7, stride=7), training=dict(
            QUICK, epochs=6, steps=15, lr=1e-2))


def test_fit_measures_what_it_says(forecaster):
    frame = series(300)
    info = forecaster.info
    assert info['split'] == 'auto' and info['train_end'] == [str(frame.index[209])]
    np.testing.assert_allclose(forecaster.scaler.mean[0], frame.to_numpy()[:210].mean(0))  # of the training part alone
    report = info['report']
    assert report['part'] == 'test' and report['windows'] == 60 - 6 + 1
    z = (frame.to_numpy() - forecaster.scaler.mean) / forecaster.scaler.std
    squares, own, last = [], [], []
    for i in range(240, 295):
        y = forecaster.predict(frame.iloc[:i]).to_numpy()
        own.append((y - frame.to_numpy()[i:i + 6]) ** 2)
        squares.append(own[-1] / forecaster.scaler.std ** 2)
        last.append((z[i - 1] - z[i:i + 6]) ** 2)
    errors = report['errors']
    assert errors['model']['mse'] == pytest.approx(np.mean(squares), rel=1e-4)
    assert errors['model']['own_mse'] == pytest.approx(np.mean(own), rel=1e-4)
    assert errors['last']['mse'] == pytest.approx(np.mean(last), rel=1e-4)
    assert errors['model']['mse'] < 0.2 * errors['last']['mse']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = forecaster.evaluate(frame)
    assert again['errors']['model'] == pytest.approx(errors['model'])
    assert (again['freq'], again['season'], again['split'], again['left_out']) == ('h', 24, 'auto', 0)


def test_predict(forecaster):
    frame = series(300)
    forecast = forecaster.predict(frame)
    assert list(forecast.columns) == ['a', 'b', 'c'] and len(forecast) == 6
    assert forecast.index[0] == frame.index[-1] + pd.Timedelta('1h') and forecast.index.name == 'date'
    x = (frame.to_numpy()[-24:] - forecaster.scaler.mean) / forecaster.scaler.std
    with torch.no_grad():
        y = forecaster.model(torch.tensor(x, dtype=torch.float32)[None])[0].numpy()
    np.testing.assert_allclose(forecast.to_numpy(), y * forecaster.scaler.std + forecaster.scaler.mean, rtol=1e-5)
    # order and number of other columns do not matter, nor does what is older than the look-back
    other = frame.assign(extra=1.)[['extra', 'c', 'a', 'b']]
    other.iloc[3, 1] = np.nan
    pd.testing.assert_frame_equal(forecaster.predict(other.drop(other.index[10])), forecast, check_freq=False)
    early = forecaster.predict(frame, after=frame.index[199])
    pd.testing.assert_frame_equal(early, forecaster.predict(frame.iloc[:200]), check_freq=False)


def test_predict_errors(forecaster):
    frame = series(300)
    for change, message in (
            (lambda f: f[['a', 'b']], r"has the columns 'a', 'b', the forecaster was trained on 3: it lacks 'c'"),
            (lambda f: f.iloc[-23:], r'has 23 rows, a forecast needs 24 \(the look-back\)'),
            (lambda f: f.iloc[::-1], 'sort=True puts the rows in order'),
            (lambda f: f.drop(f.index[290]), 'date.s. are missing on the grid'),
            (lambda f: f.set_axis(pd.date_range('2020', periods=300, freq='D')), "step of 'D', the forecaster was"),
            (lambda f: f.assign(a=f.a.where(f.index != f.index[290], np.inf)), "row 291, column 'a'")):
        with pytest.raises(SeriesError, match=message):
            forecaster.predict(change(frame))
    with pytest.raises(SeriesError, match='the look-back has a missing value at 2020-01-13 02:00:00: missing and gaps'):
        forecaster.predict(frame.drop(frame.index[290]), gaps='keep')
    with pytest.raises(SeriesError, match="freq 'D' is not the step 'h'"):
        forecaster.predict(frame, freq='D')
    for after, message in (('1999', 'before the first date'), ('2030', 'beyond the last date'), ('soon', 'is no date')):
        with pytest.raises(SeriesError, match=message):
            forecaster.predict(frame, after=after)


def test_old_gaps_do_not_matter_but_the_last_step_does(forecaster):
    """The step is that of the rows which are read."""
    frame = series(300)
    days = series(40, freq='D').set_axis(pd.date_range('2019-01-01', periods=40, freq='D', name='date'))
    both = pd.concat([days, frame])
    pd.testing.assert_frame_equal(forecaster.predict(both), forecaster.predict(frame), check_freq=False)
    later = series(40, freq='D').set_axis(pd.date_range('2021-01-01', periods=40, freq='D', name='date'))
    with pytest.raises(SeriesError, match="step of 'D'"):
        forecaster.predict(pd.concat([frame, later]))


def test_quantiles(forecaster):
    frame = series(300)
    forecast = forecaster.predict(frame, quantiles=[0.9, 0.5, 0.1])
    assert list(forecast.columns) == [f'{c}{q}' for q in ('', '_q0.1', '_q0.5', '_q0.9') for c in 'abc']
    for c in 'abc':
        assert (forecast[f'{c}_q0.1'] < forecast[f'{c}_q0.5']).all() and (
            forecast[f'{c}_q0.5'] < forecast[f'{c}_q0.9']).all()
    with pytest.raises(SeriesError, match='quantiles must be 0.01 to 0.99, got 0.999'):
        forecaster.predict(frame, quantiles=[0.999])
    report = forecaster.evaluate(frame, level=0.9)
    inside = []
    for i in range(240, 295):
        f = forecaster.predict(frame.iloc[:i], quantiles=[0.05, 0.95])
        truth = frame.iloc[i:i + 6]
        inside += [(truth[c] >= f[f'{c}_q0.05']) & (truth[c] <= f[f'{c}_q0.95']) for c in 'abc']
    assert report['coverage'] == dict(level=0.9, covered=pytest.approx(np.mean(inside), abs=1e-3))


def test_intervals_cover_what_they_say():
    """Noise whose deviation changes: the interval is measured on one part and covers on another."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(6000, 1, generator=g) * (1 + (torch.arange(6000) // 500 % 3)[:, None])
    calibration, test = Windows(values, (0, 3000), 48, 2), Windows(values, (3000, 6000), 48, 2)

    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2, 1)

    intervals = Intervals.fit(Zero(), [calibration])
    again = Intervals.from_dict(json.loads(json.dumps(intervals.to_dict())))
    from vim2.forecasting.intervals import spread
    for level in (0.5, 0.8, 0.9):
        low, high = again.offsets([0.5 - level / 2, 0.5 + level / 2])
        x, y = test.take(torch.arange(len(test)))
        width = spread(x['x'])
        assert ((y >= low * width) & (y <= high * width)).float().mean() == pytest.approx(level, abs=0.03)


def test_panel_forecaster(panel_forecaster):
    """Covariates tell nearly all; a subset of the series; the future as further rows or as a table of its own."""
    frame = long_frame()
    report = panel_forecaster.info['report']
    assert report['errors']['model']['mse'] < 0.5 * min(report['errors'][k]['mse'] for k in ('last', 'seasonal'))
    whole = long_frame((124, 104, 94), seed=1)  # other noise, the same kind of series
    known, ahead = whole[whole.ds < '2021-05-01'], whole[whole.ds >= '2021-05-01']
    forecast = panel_forecaster.predict(known.set_index('ds'), ahead.drop(columns='y').set_index('ds'))
    assert list(forecast.columns) == ['unique_id', 'y'] and len(forecast) == 12
    both = forecast.reset_index(names='ds').merge(ahead, on=['unique_id', 'ds'])
    assert len(both) == 12 and ((both.y_x - both.y_y) ** 2).mean() < 0.5 * ahead.groupby('unique_id').y.var().mean()
    rows = pd.concat([known, ahead.assign(y=np.nan)]).sort_values(['unique_id', 'ds'])
    pd.testing.assert_frame_equal(panel_forecaster.predict(rows), forecast, check_names=False, check_freq=False)
    only = panel_forecaster.predict(rows[rows.unique_id == 'y'])
    np.testing.assert_allclose(only.y, forecast[forecast.unique_id == 'y'].y, rtol=1e-4)
    with pytest.raises(SeriesError, match=r"covariates \(price\) of 'x' are not all known at 2021-05-01.*future_data"):
        panel_forecaster.predict(known)
    with pytest.raises(SeriesError, match="series that the forecaster was not trained on: 'w'"):
        panel_forecaster.predict(rows.replace(dict(unique_id={'x': 'w'})))
    with pytest.raises(SeriesError, match="it lacks 'temperature'"):
        panel_forecaster.predict(frame.drop(columns='temperature'))


def test_multivariate_panel():
    frame = long_frame((100, 100, 100))
    columns = Columns(target='y', id='unique_id', date='ds', future='price', static='kind', multivariate=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SeriesWarning)
        forecaster = fit(frame, 4, 14, columns=columns, model=dict(SMALL, patch_len=7, stride=7), training=QUICK)
    assert forecaster.model.num_variates == 3 and forecaster.columns == ['x', 'y', 'z']
    more = pd.concat([frame, long_frame((104,) * 3).groupby('unique_id').tail(4).assign(y=np.nan)]).sort_values(
        ['unique_id', 'ds'])
    forecast = forecaster.predict(more)
    assert len(forecast) == 12 and forecast.unique_id.unique().tolist() == ['x', 'y', 'z']
    # each series in its own units and with its own covariates
    panel = forecaster.panel(more)
    scaler = forecaster.scaler
    tensors = forecaster.covariates.tensors(panel, scaler.mean, scaler.std)
    with torch.no_grad():
        y = forecaster.model(tensors.values[:, 86:100], tensors.static, tensors.future[:, 100:104].transpose(1, 2),
                             tensors.past[:, 86:100].transpose(1, 2))[0].numpy()
    np.testing.assert_allclose(forecast.y.to_numpy().reshape(3, 4), (y * scaler.std.T + scaler.mean.T).T, rtol=1e-4)
    with pytest.raises(SeriesError, match="lacks the series 'z': the forecaster reads all 3"):
        forecaster.predict(more[more.unique_id != 'z'])
    np.testing.assert_allclose(forecaster.evaluate(frame)['errors']['model']['mse'],
                               forecaster.info['report']['errors']['model']['mse'], rtol=1e-5)


def test_warnings():
    rng = np.random.default_rng(0)
    walk = pd.DataFrame({'a': rng.standard_normal(150).cumsum()}, pd.date_range('2020', periods=150, freq='D'))
    with pytest.warns(SeriesWarning) as caught:
        forecaster = fit(walk, 5, 20, model=dict(SMALL, center='mean'), training=dict(epochs=2, steps=1, lr=1e-5))
    text = ' | '.join(str(w.message) for w in caught)
    assert 'there are few windows, 81 to train on and 11 to validate' in text
    assert 'the model loses to repeating the last value: MSE' in text
    assert [w for w in forecaster.info['warnings'] if 'loses to repeating the last value' in w]
    assert 'still falling after 2 epochs' in text
    with pytest.warns(SeriesWarning) as caught:
        forecaster.evaluate(walk.iloc[:100])
    assert any('the test part begins at' in str(w.message) and 'was trained on rows up to' in str(w.message)
               for w in caught)
    with pytest.warns(SeriesWarning, match='the model was trained on rows up to'):
        forecaster.backtest(walk, 14)


def test_center_is_chosen_on_the_training_part():
    rng = np.random.default_rng(0)
    for noise, center in ((rng.standard_normal(300), 'mean'), (rng.standard_normal(300).cumsum(), 'last')):
        from vim2.forecasting.preparation import prepare
        setup = prepare(pd.DataFrame({'a': noise}, pd.date_range('2020', periods=300, freq='D')), 5, 20)
        assert setup.options['center'] == center


def test_all_data_and_no_test():
    frame = series(200)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SeriesWarning)
        measured = fit(frame, 4, 16, model=SMALL, training=QUICK)
        deployed = fit(frame, 4, 16, model=SMALL, training=QUICK, all_data=True)
        no_test = fit(frame, 4, 16, model=SMALL, training=QUICK, split='no-test')
    assert deployed.info['report'] == measured.info['report']  # of the run that did not see the test part
    np.testing.assert_allclose(deployed.scaler.mean[0], frame.mean())
    assert deployed.info['test_end'] == [str(frame.index[-1])]
    assert (measured.intervals.windows, deployed.intervals.windows) == (2 * 17, 3 * 17)  # as many of each part
    assert (deployed.predict(frame) - measured.predict(frame)).abs().max().max() > 1e-4
    assert no_test.info['report']['part'] == 'val' and no_test.info['val_end'] == [str(frame.index[-1])]
    with pytest.raises(SeriesError, match='has no test part'):
        no_test.evaluate(frame)


def test_fine_tune(forecaster):
    other = series(300, seed=3) * 2 + 100
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SeriesWarning)
        tuned = forecaster.fine_tune(other, training=dict(epochs=1, steps=1))
        zero = forecaster.fine_tune(other, training=dict(epochs=1, steps=1, lr=0.))
    for a, b in zip(zero.model.parameters(), forecaster.model.parameters()):
        assert torch.equal(a, b)  # it starts from the weights
    assert any(not torch.equal(a, b) for a, b in zip(tuned.model.parameters(), forecaster.model.parameters()))
    np.testing.assert_allclose(tuned.scaler.mean[0], other.to_numpy()[:210].mean(0))
    assert tuned.info['report']['errors']['model']['mse'] < 0.3 * tuned.info['report']['errors']['last']['mse']


def test_backtest(forecaster, panel_forecaster):
    frame = series(300)
    table = forecaster.backtest(frame, 3, 5, quantiles=[0.1, 0.9])
    assert len(table) == 3 * 6 * 3 and {'origin', 'date', 'variate', 'y', 'forecast', 'last', 'seasonal', 'q0.1',
                                        'q0.9'} <= set(table.columns)
    for fold, row in enumerate((284, 289, 294)):
        own = table[table.fold == fold]
        assert set(own.origin) == {frame.index[row - 1]}
        expected = forecaster.predict(frame.iloc[:row])
        for c in 'abc':
            block = own[own.variate == c]
            np.testing.assert_allclose(block.forecast, expected[c], rtol=1e-5)
            np.testing.assert_array_equal(block.y, frame[c].iloc[row:row + 6])
            np.testing.assert_array_equal(block['last'], frame[c].iloc[row - 1])
            np.testing.assert_array_equal(block.seasonal, frame[c].iloc[row - 24:row - 18])
    with pytest.raises(SeriesError, match='origins 5 steps apart need'):
        forecaster.backtest(frame, 60, 5)
    long = panel_forecaster.backtest(long_frame(), 2)
    assert set(long.unique_id) == {'x', 'y', 'z'} and len(long) == 2 * 3 * 4


def test_backtest_trains_on_what_was_known(forecaster, monkeypatch):
    seen = []
    from vim2.forecasting import forecaster as module

    def spy(panel, *args, **kwargs):
        seen.append((panel.rows, np.isfinite(panel.values).any(2).sum(1).max()))
        return fit(panel, *args, **kwargs)

    monkeypatch.setattr(module, 'fit', spy)
    table = forecaster.backtest(series(300), 2, refit=True)
    assert seen == [(288, 288), (294, 294)] and len(table) == 2 * 6 * 3
    plain = forecaster.backtest(series(300), 2)
    assert (table.forecast - plain.forecast).abs().max() > 1e-4


@pytest.mark.parametrize('which', ['forecaster', 'panel_forecaster'])
def test_forecaster_folder(which, tmp_path, request):
    original = request.getfixturevalue(which)
    original.save(tmp_path / 'model')
    assert sorted(p.name for p in (tmp_path / 'model').iterdir()) == [
        'README.md', 'config.json', 'forecaster.json', 'model.safetensors']
    again = Forecaster.load(tmp_path / 'model')
    frame = series(300) if which == 'forecaster' else pd.concat([long_frame(), long_frame((124, 104, 94)).groupby(
        'unique_id').tail(4).assign(y=np.nan)]).sort_values(['unique_id', 'ds'])
    pd.testing.assert_frame_equal(again.predict(frame, quantiles=[0.1]), original.predict(frame, quantiles=[0.1]),
                                  rtol=1e-4)
    assert (again.columns, again.freq, again.info, again.roles, again.ids, again.season) == (
        original.columns, original.freq, json.loads(json.dumps(original.info)), original.roles, original.ids,
        original.season)
    np.testing.assert_array_equal(again.naive_scale, original.naive_scale)
    TSM2.from_pretrained(str(tmp_path / 'model'))
    state = json.loads((tmp_path / 'model' / 'forecaster.json').read_text())
    (tmp_path / 'model' / 'forecaster.json').write_text(json.dumps(dict(state, format=9)))
    with pytest.raises(SeriesError, match='it has format 9'):
        Forecaster.load(tmp_path / 'model')
    (tmp_path / 'model' / 'model.safetensors').write_bytes(b'12345678junk')
    with pytest.raises(SeriesError, match='cannot read the forecaster'):
        Forecaster.load(tmp_path / 'model')
    (tmp_path / 'model' / 'forecaster.json').unlink()
    with pytest.raises(SeriesError, match='is no forecaster: it has no forecaster.json'):
        Forecaster.load(tmp_path / 'model')


def test_bundled_forecaster():
    """It was saved by version 0.1.0, and is read as it was."""
    names = 'tsm2.ETTh1-96'
    with pytest.raises(SeriesError, match=f"no bundled forecaster 'tsm2.ETTh9-96': there is {names}"):
        Forecaster.bundled('tsm2.ETTh9-96')
    forecaster = Forecaster.bundled('tsm2.ETTh1-96')
    assert forecaster.columns == ['HUFL', 'HULL', 'MUFL', 'MULL', 'LUFL', 'LULL', 'OT']
    assert (forecaster.lookback, forecaster.horizon, forecaster.freq) == (512, 96, 'h')
    # what it has learned and needs no data to show: a daily rhythm goes on
    t = np.arange(600)[:, None]
    scaler = forecaster.scaler
    frame = pd.DataFrame(np.sin(2 * np.pi * t / 24) * np.ones(7) * scaler.std + scaler.mean,
                         pd.date_range('2020', periods=600, freq='h'), forecaster.columns)
    expected = np.sin(2 * np.pi * np.arange(600, 696)[:, None] / 24)
    error = (forecaster.predict(frame).to_numpy() - scaler.mean) / scaler.std - expected
    assert np.square(error).mean() < 0.25  # of a signal with a mean square of 0.5


def test_bundled_forecaster_on_etth1(shared_data):
    forecaster = Forecaster.bundled('tsm2.ETTh1-96')
    frame = read_series(shared_data('ett') / 'ETTh1.csv.gz')
    panel = forecaster.panel(frame)
    windows = forecaster.windows(panel, {'test': np.array([[11520, 14400]])})['test']
    assert len(windows) == 2785
    assert evaluate(forecaster.model, windows, limit=300).mse.mean() < 0.42
