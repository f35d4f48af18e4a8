"""TSM2 in other people's libraries: neuralforecast, darts, and the Time-Series-Library's calling convention."""
import logging
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from vim2.models import TSM2 as Network

NETWORK = dict(patch_len=8, stride=8, d_model=8, d_state=2)
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
             accelerator='cpu', devices=1)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # Lightning and darts write into the current folder
    for name in ('pytorch_lightning', 'lightning.pytorch', 'darts'):
        monkeypatch.setattr(logging.getLogger(name), 'level', logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


@pytest.fixture(scope='module')
def TSM2():
    pytest.importorskip('neuralforecast', reason='needs neuralforecast (extra forecast)')
    from vim2.forecasting.neuralforecast import TSM2
    return TSM2


def long_frame(rows=160, future=False):
    """Three series in neuralforecast's long format; with a future input, each is that input of its step and noise."""
    rng = np.random.default_rng(0)
    frames = []
    for i, name in enumerate(('x', 'y', 'z')):
        t = np.arange(rows)
        known = rng.standard_normal(rows)
        y = 3 * known if future else np.sin(2 * np.pi * t / 12 + i) * 2
        frames.append(pd.DataFrame(dict(
            unique_id=name, ds=pd.date_range('2020', periods=rows, freq='h'),
            y=y + 5 + 0.05 * rng.standard_normal(rows), known=known)))
    frame = pd.concat(frames, ignore_index=True)
    return frame if future else frame.drop(columns='known')


def test_neuralforecast_learns_and_predicts(TSM2):
    from neuralforecast import NeuralForecast
    frame = long_frame()
    train = frame[frame.groupby('unique_id').cumcount() < 148]
    model = TSM2(h=12, input_size=24, n_series=3, max_steps=60, learning_rate=1e-2, windows_batch_size=16,
                 **NETWORK, **QUIET)
    assert isinstance(model.network, Network) and (TSM2.MULTIVARIATE, TSM2.EXOGENOUS_FUTR, TSM2.EXOGENOUS_STAT,
                                                   TSM2.EXOGENOUS_HIST) == (True, True, True, True)
    nf = NeuralForecast([model], freq='h')
    nf.fit(train)
    forecast = nf.predict()
    assert len(forecast) == 36 and list(forecast.columns) == ['unique_id', 'ds', 'TSM2']
    both = forecast.merge(frame, on=['unique_id', 'ds'])
    assert len(both) == 36
    assert ((both.TSM2 - both.y) ** 2).mean() < 0.5  # the series have a variance of 2


def test_neuralforecast_saves_and_loads_with_exogenous_inputs(TSM2, tmp_path):
    from neuralforecast import NeuralForecast
    frame = long_frame(future=True)
    train = frame[frame.groupby('unique_id').cumcount() < 150]
    ahead = frame[frame.groupby('unique_id').cumcount() >= 150]
    train = train.assign(seen=np.random.default_rng(1).standard_normal(len(train)))
    static = pd.DataFrame(dict(unique_id=['x', 'y', 'z'], size=[0.1, -0.2, 0.3], kind=[1., 0., 1.]))
    model = TSM2(h=10, input_size=16, n_series=3, futr_exog_list=['known'], stat_exog_list=['size', 'kind'],
                 hist_exog_list=['seen'], max_steps=80, learning_rate=2e-2, windows_batch_size=32, dropout=0.,
                 **NETWORK, **QUIET)
    network = model.network
    assert (network.static_dim, network.future_dim, network.future_len, network.past_dim) == (2, 1, 10, 2)
    nf = NeuralForecast([model], freq='h')
    nf.fit(train, static_df=static)
    futr = ahead.drop(columns='y')
    forecast = nf.predict(futr_df=futr)
    other = nf.predict(train.assign(seen=train.seen + 5), static_df=static, futr_df=futr)
    assert (other.TSM2 - forecast.TSM2).abs().max() > 1e-4  # what is known up to the present is read
    error = ((forecast.merge(ahead, on=['unique_id', 'ds']).eval('TSM2 - y')) ** 2).mean()
    assert error < 0.5 * ahead.y.var()  # only the future input tells

    nf.save(str(tmp_path / 'nf'), overwrite=True, save_dataset=True)
    again = NeuralForecast.load(str(tmp_path / 'nf'))
    assert type(again.models[0]) is TSM2
    np.testing.assert_allclose(again.predict(futr_df=futr).TSM2, forecast.TSM2, rtol=1e-5)


def test_neuralforecast_quantiles(TSM2):
    """A loss with several outputs per step: each keeps to its series and its quantile."""
    from neuralforecast.losses.pytorch import MQLoss
    model = TSM2(h=4, input_size=16, n_series=3, loss=MQLoss(quantiles=[0.1, 0.5, 0.9]), **NETWORK, **QUIET).eval()
    x = torch.randn(2, 16, 3)
    y = model(dict(insample_y=x, stat_exog=None, futr_exog=None, hist_exog=None))
    assert y.shape == (2, 4, 9)
    inner = model.network(x).reshape(2, 4, 3, 3)  # step, output, series
    torch.testing.assert_close(y.reshape(2, 4, 3, 3), inner.transpose(2, 3))


def test_neuralforecast_inputs_reach_the_network(TSM2):
    """Look-back and horizon of what is known ahead, and what is known up to the present, each in its place."""
    model = TSM2(h=4, input_size=16, n_series=3, futr_exog_list=['a'], hist_exog_list=['b', 'c'], **NETWORK,
                 **QUIET).eval()
    x, futr, hist = torch.randn(2, 16, 3), torch.randn(2, 1, 20, 3), torch.randn(2, 2, 16, 3)
    y = model(dict(insample_y=x, stat_exog=None, futr_exog=futr, hist_exog=hist))
    past = torch.stack([futr[:, 0, :16], hist[:, 0], hist[:, 1]], -1).transpose(1, 2)
    expected = model.network(x, None, futr[:, 0, 16:].transpose(1, 2)[..., None], past)
    torch.testing.assert_close(y, expected)


def test_neuralforecast_defaults_are_those_of_fit(TSM2):
    import inspect

    from vim2.forecasting.training import MODEL, TRAINING
    defaults = {n: p.default for n, p in inspect.signature(TSM2.__init__).parameters.items()}
    names = dict(drop_rate='dropout', head_drop_rate='head_dropout')
    assert {n: defaults[names.get(n, n)] for n in MODEL} == MODEL
    assert (defaults['learning_rate'], defaults['windows_batch_size']) == (TRAINING['lr'], TRAINING['batch_size'])
    assert TSM2(h=4, input_size=40, n_series=2, **QUIET).network.patch_len == 8


def test_neuralforecast_says_which_number_of_series_it_has(TSM2):
    from neuralforecast import NeuralForecast
    frame = long_frame()
    model = TSM2(h=4, input_size=16, n_series=3, max_steps=1, **NETWORK, **QUIET)
    nf = NeuralForecast([model], freq='h')
    with pytest.raises(ValueError, match=r'forecasts 3 series together \(n_series\), the data has 2'):
        nf.fit(frame[frame.unique_id != 'z'])
    nf.fit(frame)
    with pytest.raises(ValueError, match='the data has 1'):
        nf.predict(frame[frame.unique_id == 'x'])


def test_auto_tsm2(TSM2):
    from vim2.forecasting.neuralforecast import AutoTSM2
    space = AutoTSM2.get_default_config(h=12, backend='ray', n_series=3)
    assert set(space['input_size'].categories) == {24, 48, 96, 192} and 'input_size_multiplier' not in space
    from neuralforecast import NeuralForecast
    config = dict(input_size=16, max_steps=2, learning_rate=1e-2, random_seed=1, **NETWORK, **QUIET)
    auto = AutoTSM2(h=4, n_series=3, config=lambda trial: dict(config, n_series=3), backend='optuna', num_samples=1)
    nf = NeuralForecast([auto], freq='h')
    nf.fit(long_frame(), val_size=8)
    assert type(nf.models[0].model) is TSM2 and len(nf.predict()) == 12  # nf works on a copy of auto
    with pytest.raises(ValueError, match="config needs 'n_series': 3"):
        AutoTSM2(h=4, n_series=3, config=lambda trial: dict(config, n_series=2), backend='optuna')


def test_darts(TSM2):
    darts = pytest.importorskip('darts', reason='needs darts')
    models = pytest.importorskip('darts.models.forecasting.nf_model', reason='needs darts with NeuralForecastModel')
    frame = long_frame().pivot(index='ds', columns='unique_id', values='y').astype(np.float32)
    series = darts.TimeSeries.from_dataframe(frame)
    train, test = series[:148], series[148:]
    model = models.NeuralForecastModel(
        24, 12, model=TSM2, model_kwargs=dict(NETWORK), n_epochs=12, batch_size=32, random_state=0,
        optimizer_kwargs=dict(lr=1e-2), pl_trainer_kwargs={k: v for k, v in QUIET.items() if k != 'logger'})
    model.fit(train)
    forecast = model.predict(12)
    assert list(forecast.components) == ['x', 'y', 'z'] and forecast.start_time() == test.start_time()
    assert ((forecast.values() - test.values()[:12]) ** 2).mean() < 0.7


def configs(**kwargs):
    """The options that the Time-Series-Library's run.py always passes (its defaults where we do not care)."""
    return SimpleNamespace(**{**dict(
        task_name='long_term_forecast', seq_len=48, label_len=24, pred_len=12, enc_in=3, dec_in=3, c_out=3, d_model=16,
        n_heads=8, e_layers=2, d_layers=1, d_ff=32, expand=2, d_conv=4, factor=1, embed='timeF', freq='h', dropout=0.1,
        activation='gelu', moving_avg=25, use_norm=1, patch_len=16, features='M'), **kwargs})


def test_time_series_library():
    from vim2.forecasting.time_series_library import Model
    torch.manual_seed(0)
    model = Model(configs()).float()
    network = model.network
    assert (network.lookback, network.horizon, network.patch_len, len(network.blocks)) == (48, 12, 16, 4)
    assert network.blocks[0].drop.p == 0.1 and network.instance_norm is not None
    # a training step as exp_long_term_forecasting.py does it
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = torch.arange(200.)[:, None]
    values = torch.sin(t / 4 + torch.arange(3))
    losses = []
    for _ in range(40):
        starts = torch.randint(0, 140, (16,))
        batch_x = torch.stack([values[s:s + 48] for s in starts])
        batch_y = torch.stack([values[s + 24:s + 60] for s in starts])
        x_mark, y_mark = torch.zeros(16, 48, 4), torch.zeros(16, 36, 4)
        dec_inp = torch.cat([batch_y[:, :24], torch.zeros_like(batch_y[:, -12:])], dim=1)
        outputs = model(batch_x, x_mark, dec_inp, y_mark)[:, -12:, 0:]
        assert outputs.shape == (16, 12, 3)
        loss = torch.nn.functional.mse_loss(outputs, batch_y[:, -12:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert Model(configs(use_norm=0)).network.instance_norm is None
    with pytest.raises(ValueError, match="task_name must be one of long_term_forecast, short_term_forecast, got 'impu"):
        Model(configs(task_name='imputation'))
