"""tools/forecast.py: training and its exact continuation, errors, forecasts, plots, the benchmark's table."""
import json
import statistics

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import _forecasting
import forecast
from _common import UserError
from vim2.forecasting import Forecaster, read_series
from vim2.models import TSM2

SMALL = ['--lookback', '32', '--model-kwargs', 'patch_len=8', 'stride=8', 'd_model=8', 'd_state=2',
         'drop_rate=0.1', 'head_drop_rate=0', '--steps', '6', '--batch-size', '16', '--val-windows', '0',
         '--patience', '0', '--device', 'cpu']


def write_series(path, rows=400, columns=('a', 'b', 'c')):
    rng = np.random.default_rng(0)
    t = np.arange(rows)[:, None]
    values = np.sin(2 * np.pi * t / 16 + np.arange(len(columns))) * 3 + 10 + \
        0.2 * rng.standard_normal((rows, len(columns)))
    frame = pd.DataFrame(values, pd.date_range('2020-01-01', periods=rows, freq='h', name='date'), list(columns))
    frame.to_csv(path)
    return frame


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('series') / 'x.csv.gz'
    write_series(path)
    return path


@pytest.fixture(scope='module')
def run(tmp_path_factory, data):
    """A finished run of fit: its folder and what it printed."""
    import contextlib
    import io
    import sys

    import _common
    folder = tmp_path_factory.mktemp('runs') / 'run'
    out, argv = io.StringIO(), sys.argv
    sys.argv = ['forecast.py', 'fit', str(data), *SMALL, '--horizon', '8', '--epochs', '4', '--lr', '0.01', '--output',
                str(folder)]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_:
            _common.run(forecast.main)
    finally:
        sys.argv = argv
    assert exit_.value.code == 0, out.getvalue()
    return folder, out.getvalue()


def test_fit(run, data):
    folder, out = run
    assert sorted(p.name for p in folder.iterdir()) == ['args.json', 'history.csv', 'last.pth.tar', 'model']
    assert sorted(p.name for p in (folder / 'model').iterdir()) == [
        'README.md', 'config.json', 'forecaster.json', 'model.safetensors']
    history = pd.read_csv(folder / 'history.csv')
    assert list(history.epoch) == [0, 1, 2, 3]
    assert history.val_mse.iloc[-1] < 0.8 * history.val_mse.iloc[0]
    assert '241 training and 33 validation windows' in out and 'over 73 windows' in out
    forecaster = Forecaster.load(folder / 'model')
    frame = read_series(data)
    np.testing.assert_allclose(forecaster.scaler.mean, frame.to_numpy()[:280].mean(0))  # of the training part alone
    assert forecaster.columns == ['a', 'b', 'c'] and forecaster.freq == 'h'
    assert TSM2.from_pretrained(str(folder / 'model')).horizon == 8


def test_resume_is_exact(run, data, tool, tmp_path, monkeypatch):
    folder = tmp_path / 'run'
    arguments = ['fit', data, *SMALL, '--horizon', '8', '--lr', '0.01', '--output', folder, '--epochs', '4']
    train_epoch = _forecasting.Trainer.train_epoch

    def killed(self, progress):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(self, progress)

    monkeypatch.setattr(_forecasting.Trainer, 'train_epoch', killed)
    assert tool('forecast', *arguments).code == 130
    monkeypatch.undo()
    assert not (folder / 'model').exists()
    result = tool('forecast', *arguments)
    assert result.code == 2 and 'already holds a run: pass --resume' in result.err
    result = tool('forecast', *arguments, '--resume', '--seed', '1')
    assert result.code == 2 and 'seed: 0 -> 1' in result.err
    result = tool('forecast', *arguments, '--resume')
    assert result.code == 0 and 'resumed at epoch 2' in result.out
    a, b = (torch.load(f / 'last.pth.tar', weights_only=True) for f in (run[0], folder))
    assert a['history'] == b['history']
    for key in ('state_dict', 'ema', 'best'):
        assert all(torch.equal(v, b[key][k]) for k, v in a[key].items())
    assert (run[0] / 'model' / 'model.safetensors').read_bytes() == (folder / 'model/model.safetensors').read_bytes()
    (folder / 'last.pth.tar').write_bytes(b'junk')
    result = tool('forecast', *arguments, '--resume')
    assert result.code == 2 and 'cannot read the checkpoint' in result.err


def test_seed_and_early_stop(data, tool, tmp_path):
    """Another seed gives other weights; without progress the run ends, and the best weights are kept."""
    histories = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        result = tool('forecast', 'fit', data, *SMALL, '--horizon', '8', '--epochs', '9', '--steps', '1', '--lr', '0',
                      '--ema-decay', '0', '--patience', '2', '--output', folder, '--seed', seed)
        assert result.code == 0, result.err
        histories.append(pd.read_csv(folder / 'history.csv').val_mse)
        assert len(histories[-1]) == 3 and 'best epoch 0' in result.out
    assert histories[0][0] != histories[1][0]


def test_evaluate(run, data, tool, tmp_path):
    model = run[0] / 'model'
    result = tool('forecast', 'evaluate', data, '--model', model, '--json', '--errors', tmp_path / 'e.csv')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report['windows'] == 80 - 8 + 1
    assert f'test MSE {report["mse"]:.4f}, MAE {report["mae"]:.4f}' in run[1]  # as fit measured it
    errors = pd.read_csv(tmp_path / 'e.csv')
    assert len(errors) == 8 * 3 and set(errors.variate) == {'a', 'b', 'c'}
    assert errors.mse.mean() == pytest.approx(report['mse'])
    by_step = errors.groupby('step').mse.mean()
    assert [s['mse'] for s in report['steps']] == pytest.approx(list(by_step))
    assert [v['mse'] for v in report['variates']] == pytest.approx(list(errors.groupby('variate').mse.mean()))
    # the same, by hand, over every window
    forecaster, frame = Forecaster.load(model), read_series(data)
    z = forecaster.scaler.transform(frame.to_numpy())
    squares = [(forecaster.scaler.transform(forecaster.predict(frame.iloc[:i]).to_numpy()) - z[i:i + 8]) ** 2
               for i in range(320, 393)]
    assert np.mean(squares) == pytest.approx(report['mse'], rel=1e-4)
    text = tool('forecast', 'evaluate', data, '--model', model, '--part', 'all').out
    assert '361 windows' in text and 'step 8' in text and f'{"all":7}' in text


def test_predict(run, data, tool, tmp_path):
    result = tool('forecast', 'predict', data, '--model', run[0] / 'model', '--output', tmp_path / 'f.csv',
                  '--plot', tmp_path / 'f.png')
    assert result.code == 0, result.err
    table = read_series(tmp_path / 'f.csv')
    frame = read_series(data)
    assert list(table.columns) == ['a', 'b', 'c'] and len(table) == 8
    assert table.index[0] == frame.index[-1] + pd.Timedelta('1h')
    pd.testing.assert_frame_equal(table, Forecaster.load(run[0] / 'model').predict(frame), check_freq=False)
    assert 'truth' not in result.out
    image = (tmp_path / 'f.png').read_bytes()
    assert image.startswith(b'\x89PNG') and len(image) > 10_000


def test_predict_after_a_date(run, data, tool, tmp_path):
    frame = read_series(data)
    arguments = ['predict', data, '--model', run[0] / 'model', '--output', tmp_path / 'f.csv', '--after']
    result = tool('forecast', *arguments, str(frame.index[299]), '--plot', tmp_path / 'f.pdf', '--plot-columns', 'b')
    assert result.code == 0, result.err
    table = read_series(tmp_path / 'f.csv')
    assert list(table.index) == list(frame.index[300:308])
    scaler = Forecaster.load(run[0] / 'model').scaler
    mse = np.mean(((table - frame.iloc[300:308]).to_numpy() / scaler.std) ** 2)
    assert f'the truth is known for 8 of them: MSE {mse:.4f}' in result.out
    assert (tmp_path / 'f.pdf').read_bytes().startswith(b'%PDF')
    result = tool('forecast', *arguments, str(frame.index[-4]))
    assert result.code == 0 and 'known for 3 of them' in result.out


@pytest.mark.parametrize('change, message', [
    (lambda f: f.assign(b=f.b.mask(f.index == f.index[9])), r"row 10 (line 11 of the file), column 'b': the value is "
                                                            "missing (NaN)"),
    (lambda f: f.assign(a=f.a.astype(object).where(f.index != f.index[3], 'n/a?')),
     "row 4 (line 5 of the file), column 'a': 'n/a?' is no finite number"),
    (lambda f: f.iloc[[0, 1, 1, *range(2, 300)]], 'is the date of the row before again'),
    (lambda f: f.iloc[::-1], 'sort the series'),
    (lambda f: f[['a', 'c']], "has 2 variates ('a', 'c'), the forecaster was trained on 3: it lacks 'b'"),
    (lambda f: f.iloc[:31], 'the series has 31 rows, a forecast needs 32 (the look-back)'),
])
def test_bad_series(run, tool, tmp_path, change, message):
    frame = write_series(tmp_path / 'x.csv')
    change(frame).to_csv(tmp_path / 'x.csv')
    result = tool('forecast', 'predict', tmp_path / 'x.csv', '--model', run[0] / 'model', '--output',
                  tmp_path / 'f.csv')
    assert result.code == 2 and message in result.err and result.err.count('\n') == 1
    assert not (tmp_path / 'f.csv').exists()


@pytest.mark.parametrize('arguments, message', [
    (['fit', 'DATA', '--columns', 'a', 'z'], "has no column 'z'; its columns are 'a', 'b', 'c'"),
    (['fit', 'DATA', '--horizon', '300', '--output', 'OUT'], 'part is too short'),
    (['fit', 'DATA', '--split', 'ett-hour'], "the split 'ett-hour' needs 14400 rows, the series has 400"),
    (['fit', 'DATA', '--preset', 'ETTh7'], "has no data set 'ETTh7': it has ETTh1, ETTm1, exchange"),
    (['fit', 'DATA', '--lookback', '32', '--horizon', '8', '--model-kwargs', 'd_modle=3'],
     "cannot make the model: TSM2.__init__() got an unexpected keyword argument 'd_modle'"),
    (['fit', 'DATA', '--batch-size', '0'], 'batch_size must be a number of at least 1, got 0'),
    (['fit', 'DATA', '--ema-decay', '1'], 'ema_decay must be below 1'),
    (['fit', 'DATA', '--horizon', '0'], '--horizon must be at least 1, got 0'),
    (['fit', 'DATA', '--device', 'gpu9'], "device 'gpu9' cannot be used here"),
    (['fit', 'absent.csv'], 'cannot read absent.csv as CSV'),
    (['fit', 'DATA', '--date-column', 'when'], "has no column 'when' of dates"),
    (['evaluate', 'DATA', '--model', 'tsm2.nothing'], "no folder and no bundled forecaster 'tsm2.nothing'"),
    (['evaluate', 'DATA', '--model', 'OUT'], 'is no forecaster: it has no model.safetensors, config.json'),
    (['evaluate', 'DATA'], "it lacks 'HUFL', 'HULL', 'MUFL', 'MULL', 'LUFL', 'LULL', 'OT'"),
    (['evaluate', 'DATA', '--model', 'RUN', '--split', '0.5/0.5'], "'0.5/0.5' is no split"),
    (['predict', 'DATA', '--model', 'RUN', '--after', 'tomorrow?'], "--after 'tomorrow?' is no date"),
    (['predict', 'DATA', '--model', 'RUN', '--after', '1999-01-01'], 'is before the first date'),
    (['predict', 'DATA', '--model', 'RUN', '--freq', 'fortnight'], "'fortnight' is no frequency"),
    (['predict', 'DATA', '--model', 'RUN', '--plot-columns', 'z'], "--plot-columns: no column 'z'; there are a, b, c"),
    (['predict', 'DATA', '--model', 'RUN', '--output', 'absent/f.csv'], 'cannot write absent/f.csv'),
    (['predict', 'DATA', '--model', 'RUN', '--plot', 'f.xyz'], 'cannot write the plot f.xyz'),
    (['bench', '--data-dir', '.', '--datasets', 'M5'], "has no data set 'M5'"),
    (['bench', '--data-dir', 'absent', '--output', 'OUT'], 'cannot read absent/ett/ETTh1.csv.gz as CSV'),
    (['bench', '--data-dir', '.', '--output', 'OUT', '--table-only'], 'holds no result of these runs'),
    (['bench', '--data-dir', '.', '--horizons', '0'], '--horizons must be at least 1, got 0'),
])
def test_mistakes(run, data, tool, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    names = dict(DATA=data, OUT=tmp_path / 'out', RUN=run[0] / 'model')
    result = tool('forecast', *(names.get(a, a) for a in arguments))
    assert result.code == 2 and message in result.err and result.err.count('\n') == 1, result.err
    assert not result.out or arguments[0] == 'predict'


def test_recipe_sections(tmp_path):
    """One configuration for all, what differs for one data set, the baseline's, and the command line, in that order."""
    recipe = yaml.safe_load(forecast.RECIPE.read_text(encoding='utf-8'))
    parse = forecast.get_parser().parse_args
    args = parse(['bench', '--data-dir', 'x'])
    model, training = forecast.settings(args, 'ETTh1')
    assert model == {**recipe['model'], **recipe['datasets']['ETTh1'].get('model', {})} and model['lookback'] == 512
    assert training == {**recipe['training'], **recipe['datasets']['ETTh1'].get('training', {})}
    recipe['datasets']['ETTh1'].update(model=dict(d_model=7, depth=5), training=dict(lr=0.5, epochs=77),
                                       horizons={8: dict(model=dict(d_model=9))})
    recipe['dlinear'] = dict(training=dict(lr=0.25))
    path = tmp_path / 'r.yaml'
    path.write_text(yaml.safe_dump(recipe), encoding='utf-8')
    args = parse(['bench', '--data-dir', 'x', '--config', str(path), '--epochs', '3', '--model-kwargs', 'depth=6'])
    model, training = forecast.settings(args, 'ETTh1', 'tsm2_mlp')
    assert (model['d_model'], model['depth'], model['variate_mixer']) == (7, 6, 'mlp')
    assert (training['lr'], training['epochs']) == (0.5, 3)
    assert forecast.settings(args, 'ETTh1', horizon=8)[0]['d_model'] == 9
    assert forecast.settings(args, 'ETTh1', horizon=9)[0]['d_model'] == 7
    assert forecast.settings(args, 'ETTm1')[0]['d_model'] == recipe['model']['d_model']
    assert forecast.settings(args, 'ETTh1', 'dlinear')[1]['lr'] == 0.25
    for change, message in ((dict(modle={}), "unknown section 'modle'"),
                            (dict(datasets=dict(x=dict(fiel='y'))), "x: unknown entry 'fiel'"),
                            (dict(training=dict(recipe['training'], lrr=1)), "unknown option of training 'lrr'"),
                            (dict(training=dict(lr=1)), 'says nothing about epochs')):
        path.write_text(yaml.safe_dump({**recipe, **change}), encoding='utf-8')
        with pytest.raises(UserError, match=message):
            forecast.settings(parse(['bench', '--data-dir', 'x', '--config', str(path)]), None)


def test_bench(tool, tmp_path, monkeypatch):
    write_series(tmp_path / 'x.csv')
    recipe = yaml.safe_load(forecast.RECIPE.read_text(encoding='utf-8'))
    recipe['datasets'] = dict(x=dict(file='x.csv', split='0.7/0.1/0.2', paper={4: 0.5}), y=dict(
        file='x.csv', split='0.6/0.2/0.2', model=dict(d_model=4)))
    (tmp_path / 'r.yaml').write_text(yaml.safe_dump(recipe), encoding='utf-8')
    out = tmp_path / 'bench'
    arguments = ['bench', '--config', tmp_path / 'r.yaml', '--data-dir', tmp_path, '--output', out, '--seeds', '0', '1',
                 '--horizons', '4', '8', '--models', 'tsm2', 'tsm2_mlp', 'tsm2_plain', 'dlinear',
                 *SMALL, '--epochs', '1']
    bench_run, done = forecast.bench_run, []

    def killed(series, run, options, device):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run)
        return bench_run(series, run, options, device)

    monkeypatch.setattr(forecast, 'bench_run', killed)
    assert tool('forecast', *arguments).code == 130
    assert len(list(out.glob('*.json'))) == 3 and not list(out.glob('bench.*'))
    done.clear()
    monkeypatch.setattr(forecast, 'bench_run', lambda *a: done.append(a) or bench_run(*a))
    result = tool('forecast', *arguments)
    assert result.code == 0, result.err
    assert len(done) == 2 * 2 * 2 * 4 - 3  # what was finished is not done again
    rows = json.loads((out / 'bench.json').read_text(encoding='utf-8'))
    assert len(rows) == 2 * 2 * 4 and {tuple(r['seeds']) for r in rows} == {(0, 1)}
    row = next(r for r in rows if (r['dataset'], r['horizon'], r['model']) == ('x', 4, 'tsm2'))
    each = [json.loads((out / f'tsm2-x-4-{s}.json').read_text(encoding='utf-8')) for s in (0, 1)]
    assert row['mse'] == pytest.approx(statistics.mean(r['mse'] for r in each))
    assert row['ratio'] == pytest.approx(row['mse'] / 0.5) and row['windows'] == 80 - 4 + 1
    assert each[0]['mse'] != each[1]['mse'] and each[0]['options']['d_model'] == 8
    table = (out / 'bench.md').read_text(encoding='utf-8')
    assert table in result.out and table.count('\n| x |') + table.count('\n| y |') == 4
    assert f'| x | 4 | 77 | 0.5 | {row["mse"]:.4f} ± ' in table and f'| {row["ratio"]:.3f} |' in table
    assert f'Mean ratio of tsm2 over 1 cells {row["ratio"]:.3f}' in table
    again = tool('forecast', *arguments, '--table-only')
    assert again.code == 0 and table in again.out
    changed = tool('forecast', *arguments, '--lr', '0.5')
    assert changed.code == 2 and 'was made with another training' in changed.err


def test_on_real_data(tool, shared_data, tmp_path):
    """The bundled weights, on the series that they were trained for."""
    path = shared_data('ett') / 'ETTh1.csv.gz'
    result = tool('forecast', 'predict', path, '--after', '2018-01-10', '--output', tmp_path / 'f.csv', '--plot',
                  tmp_path / 'f.png')
    assert result.code == 0, result.err
    assert len(read_series(tmp_path / 'f.csv')) == 96 and 'known for 96 of them' in result.out
    with pytest.raises(SystemExit):
        forecast.get_parser().parse_args(['predict'])
