"""tools/forecast.py: training and its exact continuation, errors, forecasts, plots, bad files, the table."""
import contextlib
import io
import json
import re
import shlex
import shutil
import statistics
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from test_forecasting_reading import bad_tables

import _forecast_bench
import forecast
from vim2 import _files
from vim2.forecasting import Forecaster, SeriesWarning, read_series, storage
from vim2.forecasting.training import MODEL, TRAINING, Trainer
from vim2.models import TSM2

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

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


def command(*arguments):
    """A finished command of a fixture: what it printed."""
    import _common
    out, argv = io.StringIO(), sys.argv
    sys.argv = ['forecast.py', *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_:
            _common.run(forecast.main)
    finally:
        sys.argv = argv
    assert exit_.value.code == 0, out.getvalue()
    return out.getvalue()


@pytest.fixture(scope='module')
def run(tmp_path_factory, data):
    """A finished run of fit: its folder and what it printed."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    return folder, command('fit', data, *SMALL, '--horizon', 8, '--epochs', 4, '--lr', 0.01, '--output', folder)


@pytest.fixture(scope='module')
def shops(tmp_path_factory):
    """A table of two shops with a promotion that tells the sales, its future, and a run trained on it."""
    folder = tmp_path_factory.mktemp('shops')
    rng = np.random.default_rng(0)
    frames = []
    for n, name in enumerate(('north', 'south')):
        promo = rng.integers(0, 2, 168)
        frames.append(pd.DataFrame(dict(shop=name, day=pd.date_range('2023-01-01', periods=168).strftime('%d.%m.%Y'),
                                        sales=10 * (n + 1) + 5 * promo + 0.2 * rng.standard_normal(168), promo=promo,
                                        region='NS'[n])))
    whole = pd.concat(frames)
    last = whole.groupby('shop').cumcount() >= 160
    whole[~last].to_csv(folder / 'sales.csv', index=False, sep=';', decimal=',')
    whole[last].drop(columns='sales').to_csv(folder / 'plan.csv', index=False, sep=';', decimal=',')
    out = command('fit', folder / 'sales.csv', '--id-column', 'shop', '--date-column', 'day', '--target', 'sales',
                  '--future', 'promo', '--static', 'region', '--calendar', '--separator', ';', '--decimal', ',',
                  '--horizon', 8, *SMALL, '--lookback', 16, '--epochs', 8, '--steps', 12, '--lr', 0.01, '--output',
                  folder / 'run')
    return folder, whole, last, out


def test_numbers_go_to_tensorboard(data, tool, tmp_path):
    """What history.csv has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    result = tool('forecast', 'fit', data, *SMALL, '--horizon', 8, '--epochs', 2, '--output', tmp_path, '--tensorboard')
    assert result.code == 0, result.err
    events, history = EventAccumulator(str(tmp_path)).Reload(), pd.read_csv(tmp_path / 'history.csv')
    for name in ('train_loss', 'val_mse'):
        assert [e.value for e in events.Scalars(name)] == pytest.approx(history[name].tolist(), rel=1e-5)


def test_fit(run, data):
    folder, out = run
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')) == [
        'args.json', 'history.csv', 'last.pth.tar', 'model']
    history = pd.read_csv(folder / 'history.csv')
    assert list(history.columns) == ['epoch', 'train_loss', 'val_mse'] and len(history) == 4
    assert history.val_mse.iloc[-1] < 0.8 * history.val_mse.iloc[0]
    # what it is, what it is of, and what it is worth
    for text in ('241 training and 33 validation windows', 'test part of split auto, step h: 73 windows',
                 'look-back 32', 'last value', 'seasonal naive', 'MASE', 'the 80% interval covers'):
        assert text in out, text
    forecaster = Forecaster.load(folder / 'model')
    frame = read_series(data)
    np.testing.assert_allclose(forecaster.scaler.mean[0], frame.to_numpy()[:280].mean(0))  # of the training part alone
    assert forecaster.columns == ['a', 'b', 'c'] and forecaster.freq == 'h'
    assert TSM2.from_pretrained(str(folder / 'model')).horizon == 8


def test_resume_is_exact(run, data, tool, tmp_path, monkeypatch):
    folder = tmp_path / 'run'
    arguments = ['fit', data, *SMALL, '--horizon', '8', '--lr', '0.01', '--output', folder, '--epochs', '4']
    train_epoch = Trainer.train_epoch

    def killed(self, wrap):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(self, wrap)

    monkeypatch.setattr(Trainer, 'train_epoch', killed)
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
    whole = (folder / 'last.pth.tar').read_bytes()
    for at in (len(whole) // 3, len(whole) // 2, len(whole) - 1):  # one bit of weights or optimizer, or of the sum
        (folder / 'last.pth.tar').write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        result = tool('forecast', *arguments, '--resume')
        assert result.code == 2 and 'cannot continue from' in result.err and result.err.count('\n') == 1
    assert 'SHA-256' in result.err or 'sum' in result.err
    for content, message in ((b'junk', 'cannot continue from'), (b'', 'cannot continue from')):
        (folder / 'last.pth.tar').write_bytes(content)
        result = tool('forecast', *arguments, '--resume')
        assert result.code == 2 and message in result.err
    (folder / 'args.json').write_text('[]')
    result = tool('forecast', *arguments, '--resume')
    assert result.code == 2 and 'args.json must hold an object, it holds a list' in result.err


@pytest.mark.skipif(resource is None, reason='limits on file sizes are of POSIX')
def test_full_disk(run, data, tool, tmp_path, monkeypatch):
    """While a state is written, or the model: one line, no temporary, and what was there before is whole."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ['fit', data, *SMALL, '--horizon', '8', '--lr', '0.01', '--output', tmp_path / 'run', '--epochs', '4']

    def limited(function):
        def with_limit(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
            try:
                return function(*args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)
        return with_limit

    def files():
        return sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*') if not p.name.startswith('.lock'))

    for what, patched in (('last.pth.tar', (_files, 'write_torch')), ('model', (storage, 'write_folder'))):
        monkeypatch.setattr(*patched, limited(getattr(*patched)))
        result = tool('forecast', *arguments, '--resume')
        lines = [line for line in result.err.splitlines() if not line.startswith('warning: ')]
        assert result.code == 2 and len(lines) == 1, result.err
        assert f'cannot write {tmp_path / "run" / what}' in lines[0] and 'File too large' in lines[0], lines
        expected = ['run', 'run/args.json'] + (['run/history.csv', 'run/last.pth.tar'] if what == 'model' else [])
        assert files() == expected
        monkeypatch.undo()
    result = tool('forecast', *arguments, '--resume')  # when there is room again
    assert result.code == 0 and (tmp_path / 'run/model/model.safetensors').read_bytes() == (
        run[0] / 'model/model.safetensors').read_bytes()


@pytest.mark.parametrize('field, value, message', [
    (None, '{', 'forecaster.json: Expecting'), ('scaler', None, 'scaler must be an object, not null'),
    ('ids', ['a', 'b'], 'it names 2 series'), ('season', 'x', 'season must be a whole number, not text'),
    ('freq', 'fortnight', "'fortnight'"), ('info', dict(reading=dict(decimal=1)), 'info.reading.decimal must be text')])
def test_odd_forecaster(run, data, tool, tmp_path, field, value, message):
    """Exit code 2 and one line, by each command that reads one (tests/test_forecasting_storage.py has all fields)."""
    shutil.copytree(run[0] / 'model', tmp_path / 'model')
    path = tmp_path / 'model/forecaster.json'
    state = json.loads(path.read_text())
    path.write_text(value if field is None else json.dumps({**state, field: value}))
    for name in ('evaluate', 'predict', 'backtest'):
        result = tool('forecast', name, data, '--model', tmp_path / 'model')
        assert result.code == 2 and message in result.err and result.err.count('\n') == 1, result.err


def test_evaluate(run, data, tool, tmp_path):
    model = run[0] / 'model'
    result = tool('forecast', 'evaluate', data, '--model', model, '--json', '--errors', tmp_path / 'e.csv')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report['windows'] == 80 - 8 + 1
    assert (report['split'], report['part'], report['freq']) == ('auto', 'test', 'h')
    assert f'{report["mse"]:.4f}  {report["mae"]:.4f}' in run[1]  # as fit measured it
    errors = pd.read_csv(tmp_path / 'e.csv')
    assert len(errors) == 8 * 3 and set(errors.variate) == {'a', 'b', 'c'}
    assert errors.mse.mean() == pytest.approx(report['mse'])
    by_step = errors.groupby('step').mse.mean()
    assert [s['mse'] for s in report['steps']] == pytest.approx(list(by_step))
    assert [v['own_mse'] for v in report['variates']] == pytest.approx(list(errors.groupby('variate').own_mse.mean()))
    assert report['errors']['last']['mse'] > report['mse'] and 0 < report['coverage']['covered'] <= 1
    result = tool('forecast', 'evaluate', data, '--model', model, '--part', 'all')
    assert '361 windows' in result.out and 'step 8' in result.out and 'split auto, step h' in result.out
    assert str(model) in result.out and 'last value' in result.out and 'seasonal naive' in result.out


def test_predict(run, data, tool, tmp_path):
    result = tool('forecast', 'predict', data, '--model', run[0] / 'model', '--output', tmp_path / 'f.csv',
                  '--plot', tmp_path / 'f.png', '--quantiles', 0.1, 0.9)
    assert result.code == 0, result.err
    table = read_series(tmp_path / 'f.csv')
    frame = read_series(data)
    assert list(table.columns) == [*'abc', *(f'{c}_q{q}' for q in (0.1, 0.9) for c in 'abc')] and len(table) == 8
    assert table.index[0] == frame.index[-1] + pd.Timedelta('1h')
    pd.testing.assert_frame_equal(table, Forecaster.load(run[0] / 'model').predict(frame, quantiles=[0.1, 0.9]),
                                  check_freq=False)
    assert 'truth' not in result.out and 'step h' in result.out and str(run[0] / 'model') in result.out
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


def test_panel_with_covariates(shops, tool, tmp_path):
    """What was said about the file in training need not be said again."""
    folder, whole, last, out = shops
    assert '2 series, 1 variates, step D' in out
    assert 'which is the only way that all are dates' in out  # 13.01.2023
    arguments = ['--model', folder / 'run/model', '--output', tmp_path / 'f.csv']
    result = tool('forecast', 'predict', folder / 'sales.csv', *arguments, '--future-data', folder / 'plan.csv',
                  '--quantiles', 0.1, 0.9, '--plot', tmp_path / 'f.png')
    assert result.code == 0, result.err
    assert "note: read as in training: date-column day, separator ;, decimal ," in result.out
    table = pd.read_csv(tmp_path / 'f.csv')
    assert list(table.columns) == ['day', 'shop', 'sales', 'sales_q0.1', 'sales_q0.9'] and len(table) == 16
    truth = whole[last].reset_index(drop=True)
    assert table.day.tolist() == [f'2023-06-{d:02d}' for d in range(10, 18)] * 2
    assert ((table.sales - truth.sales) ** 2).mean() < 2  # of 6.25 that the promotion brings
    result = tool('forecast', 'predict', folder / 'sales.csv', *arguments)
    assert result.code == 2 and '(promo) of \'north\' are not all known at 2023-06-10 00:00:00' in result.err
    assert '--future-data' in result.err
    result = tool('forecast', 'predict', folder / 'sales.csv', *arguments, '--after', '2023-05-20', '--ids', 'south')
    assert result.code == 0 and 'of 1 series' in result.out and 'known for 8 of them' in result.out
    result = tool('forecast', 'evaluate', folder / 'sales.csv', '--model', folder / 'run/model', '--json')
    report = json.loads(result.out)
    assert report['mse'] < 0.5 * report['errors']['seasonal']['mse'] and 'read as in training' in result.err


def test_backtest(shops, run, data, tool, tmp_path):
    result = tool('forecast', 'backtest', data, '--model', run[0] / 'model', '--origins', 3, '--quantiles', 0.1, 0.9,
                  '--output', tmp_path / 'b.csv', '--plot', tmp_path / 'b.png')
    assert result.code == 0, result.err
    table = pd.read_csv(tmp_path / 'b.csv')
    assert len(table) == 3 * 8 * 3 and 'MSE seasonal' in result.out and '0.1 to 0.9' in result.out
    mse = ((table.forecast - table.y) ** 2).mean()
    assert f'{mse:.4g}' in result.out.splitlines()[-2]
    assert (tmp_path / 'b.png').read_bytes().startswith(b'\x89PNG')
    folder = shops[0]
    result = tool('forecast', 'backtest', folder / 'sales.csv', '--model', folder / 'run/model', '--origins', 2,
                  '--output', tmp_path / 'b.csv', '--plot', tmp_path / 'b.png')
    assert result.code == 0 and set(pd.read_csv(tmp_path / 'b.csv').shop) == {'north', 'south'}, result.err


def test_fine_tune(run, data, tool, tmp_path):
    result = tool('forecast', 'fit', data, '--start', run[0] / 'model', '--epochs', 1, '--steps', 2, '--output',
                  tmp_path / 'run', '--device', 'cpu')
    assert result.code == 0, result.err
    history = pd.read_csv(tmp_path / 'run/history.csv')
    assert history.val_mse.iloc[0] < 1.1 * pd.read_csv(run[0] / 'history.csv').val_mse.min()
    for option in (['--calendar'], ['--lookback', 64], ['--horizon', 24]):
        result = tool('forecast', 'fit', data, '--start', run[0] / 'model', *option, '--output', tmp_path / 'other')
        assert result.code == 2 and '--start' in result.err


def test_warnings_are_lines(data, tool, tmp_path):
    rng = np.random.default_rng(0)
    pd.DataFrame({'a': rng.standard_normal(150).cumsum()}, pd.date_range('2020', periods=150, name='date')).to_csv(
        tmp_path / 'walk.csv')
    result = tool('forecast', 'fit', tmp_path / 'walk.csv', '--horizon', 5, *SMALL, '--lookback', 20, '--epochs', 1,
                  '--steps', 1, '--lr', 1e-5, '--output', tmp_path / 'run')
    assert result.code == 0
    lines = result.err.splitlines()
    assert all(line.startswith('warning: ') for line in lines)
    assert any('--lookback or --horizon' in line for line in lines) and any('loses to' in line for line in lines)
    assert SeriesWarning('more ⟨epochs⟩').command_line() == 'more --epochs'


# ----------------------------------------------------------------------------------------------------------- bad files

def change(lines):
    """BODY of a file of 100 hours with other lines: a function of the lines of the good one."""
    frame = pd.DataFrame({'a': np.arange(100.), 'b': np.sin(np.arange(100.))},
                         pd.date_range('2020-01-01', periods=100, freq='h', name='date'))
    text = frame.to_csv().splitlines()
    return ('\n'.join(lines(text)) + '\n').encode()


def with_line(i, line):
    return lambda text: [*text[:i], line, *text[i + 1:]]


BAD = {
    **{name: (*content, None) for name, content in bad_tables().items()},
    'empty value': ('x.csv', change(with_line(3, '2020-01-01 02:00:00,,1')), '--missing'),
    'text': ('x.csv', change(with_line(3, '2020-01-01 02:00:00,oops,1')), '--na'),
    'infinite': ('x.csv', change(with_line(3, '2020-01-01 02:00:00,inf,1')), 'row 3 (line 4 of the file)'),
    'too large': ('x.csv', change(with_line(3, '2020-01-01 02:00:00,1e999,1')), 'row 3'),
    'sentinel': ('x.csv', change(with_line(3, '2020-01-01 02:00:00,-9999,1')), '--na -9999'),
    'comma': ('x.csv', change(with_line(3, '2020-01-01 02:00:00,"1,5",1')), "--decimal ','"),
    'thousands': ('x.csv', change(with_line(3, '2020-01-01 02:00:00,"1,234.5",1')), "--thousands ','"),
    'gap': ('x.csv', change(lambda t: t[:20] + t[21:]), '--gaps'),
    'duplicate': ('x.csv', change(lambda t: t[:20] + t[19:]), '--duplicates'),
    'descending': ('x.csv', change(lambda t: [t[0], *t[:0:-1]]), '--sort'),
    'one out of order': ('x.csv', change(lambda t: [*t[:10], t[11], t[10], *t[12:]]), '--sort'),
    'no date': ('x.csv', change(with_line(5, 'total,1,2')), 'column \'date\''),
    'empty date': ('x.csv', change(with_line(5, ',1,2')), 'is no date'),
    'ambiguous dates': ('x.csv', b'date,a\n01/02/2020,1\n02/02/2020,2\n', '--day-first'),
    'two digits': ('x.csv', b'date,a\n01/02/20,1\n02/02/20,2\n', '--date-format'),
    'both orders': ('x.csv', b'date,a\n13/02/2020,1\n02/14/2020,2\n', 'other way round'),
    'yyyymmdd': ('x.csv', b'date,a\n20200101,1\n20200102,2\n', '--integer-dates yyyymmdd'),
    'epoch': ('x.csv', b'date,a\n1577836800,1\n1577840400,2\n', '--integer-dates s'),
    'years': ('x.csv', b'date,a\n2019,1\n2020,2\n', '--integer-dates year'),
    'offset in one row': ('x.csv', change(with_line(3, '2020-01-01 02:00:00Z,1,1')), 'offset'),
    'impossible day': ('x.csv', change(with_line(3, '2020-02-30 02:00:00,1,1')), 'is no date'),
    'uneven': ('x.csv', b'date,a\n' + b''.join(
        b'2020-01-01 00:%02d:%02d,1\n' % (i * i // 2, i * 7 % 60) for i in range(10)), '--freq'),
    'one row': ('x.csv', b'date,a\n2020-01-01,1\n', '--freq'),
    'few rows': ('x.csv', b'date,a\n' + b''.join(b'2020-01-%02d,1\n' % (i + 1) for i in range(20)), '--horizon'),
    'unknown zone': ('x.csv', change(list), '--timezone', '--timezone', 'Mars'),
    'hour that is not': ('x.csv', b'date,a\n2024-03-31 02:30,1\n', '--timezone', '--timezone', 'Europe/Berlin'),
    'wrong freq': ('x.csv', change(list), '--freq', '--freq', 'D'),
    'no freq': ('x.csv', change(list), '--freq', '--freq', 'fortnight'),
    'backwards': ('x.csv', change(list), '--freq', '--freq=-1h'),
    'unknown target': ('x.csv', change(list), "no column 'z'", '--target', 'z'),
    'no id column': ('x.csv', change(list), '--id-column', '--id-column', 'shop'),
    'static without id': ('x.csv', change(list), '--id-column', '--static', 'a'),
    'two roles': ('x.csv', change(list), "'a' has two roles", '--target', 'a', '--past', 'a'),
}


def test_there_are_enough_bad_files():
    assert len(BAD) >= 40


@pytest.mark.parametrize('what', BAD)
def test_bad_files_end_in_one_line(tool, tmp_path, what):
    """Exit code 2 and a line that names the option, never a traceback; nothing is left behind."""
    name, content, message, *options = BAD[what]
    path = tmp_path / name
    path.write_bytes(content)
    result = tool('forecast', 'fit', path, '--horizon', '8', '--output', tmp_path / 'run', '--device', 'cpu', *options)
    assert result.code == 2 and result.err.startswith('forecast.py: error: '), result.err
    assert result.err.count('\n') == 1
    if message is not None:
        assert message in result.err, result.err
    assert '⟨' not in result.err and not (tmp_path / 'run/model').exists()


@pytest.mark.parametrize('change_, message', [
    (lambda f: f.assign(b=f.b.mask(f.index == f.index[390])), "row 391 (line 392 of the file), column 'b': the value"),
    (lambda f: f.iloc[[0, 1, 1, *range(2, 300)]], 'is the date of the row before again: --duplicates'),
    (lambda f: f[['a', 'c']], "has the columns 'a', 'c', the forecaster was trained on 3: it lacks 'b'"),
    (lambda f: f.iloc[:31], 'the series has 31 rows, a forecast needs 32 (the look-back)'),
    (lambda f: f.set_axis(pd.date_range('2020', periods=400, name='date')), "a step of 'D', the forecaster was"),
])
def test_bad_series_for_a_model(run, tool, tmp_path, change_, message):
    frame = write_series(tmp_path / 'x.csv')
    change_(frame).to_csv(tmp_path / 'x.csv')
    result = tool('forecast', 'predict', tmp_path / 'x.csv', '--model', run[0] / 'model', '--output',
                  tmp_path / 'f.csv')
    assert result.code == 2 and message in result.err and result.err.count('\n') == 1, result.err
    assert not (tmp_path / 'f.csv').exists()


@pytest.mark.parametrize('arguments, message', [
    (['fit', 'DATA', '--horizon', '300', '--output', 'OUT'], 'too few to train on'),
    (['fit', 'DATA', '--split', 'ett-hour', '--output', 'OUT'], "the --split 'ett-hour' needs 14400 rows"),
    (['fit', 'DATA', '--lookback', '32', '--horizon', '8', '--model-kwargs', 'd_modle=3', '--output', 'OUT'],
     "cannot make the model: TSM2.__init__() got an unexpected keyword argument 'd_modle'"),
    (['fit', 'DATA', '--model-kwargs', 'horizon=3'], '--model-kwargs cannot set horizon'),
    (['fit', 'DATA', '--batch-size', '0', '--output', 'OUT'], '--batch-size must be a number of at least 1, got 0'),
    (['fit', 'DATA', '--ema-decay', '1', '--output', 'OUT'], '--ema-decay must be below 1'),
    (['fit', 'DATA', '--horizon', '0'], '--horizon must be at least 1, got 0'),
    (['fit', 'DATA', '--no-test', '--split', 'ett-hour'], '--no-test and --split ett-hour contradict'),
    (['fit', 'DATA', '--device', 'gpu9'], "device 'gpu9' cannot be used here"),
    (['fit', 'absent.csv'], 'cannot read absent.csv as CSV'),
    (['fit', 'DATA', '--date-column', 'when'], "no column 'when'"),
    (['fit', 'DATA', '--start', 'tsm2.nothing'], "no bundled forecaster 'tsm2.nothing'"),
    (['evaluate', 'DATA', '--model', 'tsm2.nothing'], "no folder and no bundled forecaster 'tsm2.nothing'"),
    (['evaluate', 'DATA', '--model', 'OUT'], 'is no forecaster: it has no model.safetensors, config.json'),
    (['evaluate', 'DATA', '--model', 'tsm2.ETTh1-96'], "it lacks 'HUFL', 'HULL', 'MUFL', 'MULL', 'LUFL', 'LULL', 'OT'"),
    (['evaluate', 'DATA', '--model', 'RUN', '--split', '0.5/0.5'], "'0.5/0.5' is no --split"),
    (['evaluate', 'DATA', '--model', 'RUN', '--level', '1'], '--level must be'),
    (['predict', 'DATA', '--model', 'RUN', '--after', 'tomorrow?'], "--after 'tomorrow?' is no date"),
    (['predict', 'DATA', '--model', 'RUN', '--after', '1999-01-01'], 'is before the first date'),
    (['predict', 'DATA', '--model', 'RUN', '--after', '2999-01-01'], 'is beyond the last date'),
    (['predict', 'DATA', '--model', 'RUN', '--freq', 'D'], "--freq 'D' is not the step 'h'"),
    (['predict', 'DATA', '--model', 'RUN', '--ids', 'x'], '--ids: the model was not trained on series'),
    (['predict', 'DATA', '--model', 'RUN', '--quantiles', '0'], '--quantiles must be 0.01 to 0.99'),
    (['predict', 'DATA', '--model', 'RUN', '--future-data', 'DATA'], '--future-data was given, but the'),
    (['predict', 'DATA', '--model', 'RUN', '--plot-columns', 'z'], "--plot-columns: no column 'z'; there are a, b, c"),
    (['predict', 'DATA', '--model', 'RUN', '--output', 'absent/f.csv'], 'cannot write absent/f.csv'),
    (['predict', 'DATA', '--model', 'RUN', '--plot', 'f.xyz'], 'cannot write the plot f.xyz'),
    (['backtest', 'DATA', '--model', 'RUN', '--origins', '99'], '99 --origins 8 steps apart need'),
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


def test_a_model_must_be_named(data, tool):
    for name in ('evaluate', 'predict', 'backtest'):
        result = tool('forecast', name, data)
        assert result.code == 2 and '--model' in result.err


# --------------------------------------------------------------------------------------------------------------- bench

def test_bench(tool, tmp_path, monkeypatch):
    write_series(tmp_path / 'x.csv')
    recipe = dict(datasets=dict(
        x=dict(file='x.csv', split='0.7/0.1/0.2', paper={4: 0.5}, dlinear=dict(lookback=48, lr=0.02)),
        y=dict(file='x.csv', split='0.6/0.2/0.2')))
    (tmp_path / 'r.yaml').write_text(yaml.safe_dump(recipe), encoding='utf-8')
    out = tmp_path / 'bench'
    arguments = ['bench', '--config', tmp_path / 'r.yaml', '--data-dir', tmp_path, '--output', out, '--seeds', '0', '1',
                 '--horizons', '4', '--models', 'tsm2', 'tsm2_mlp', 'dlinear',
                 *SMALL, '--epochs', '1']
    bench_run, done = _forecast_bench.bench_run, []

    def killed(panel, run, device):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run)
        return bench_run(panel, run, device)

    monkeypatch.setattr(_forecast_bench, 'bench_run', killed)
    assert tool('forecast', *arguments).code == 130
    assert len(list(out.glob('*.json'))) == 3 and not list(out.glob('bench.*'))
    done.clear()
    monkeypatch.setattr(_forecast_bench, 'bench_run', lambda *a: done.append(a) or bench_run(*a))
    result = tool('forecast', *arguments)
    assert result.code == 0, result.err
    assert len(done) == 2 * 2 * 3 - 3  # what was finished is not done again
    rows = json.loads((out / 'bench.json').read_text(encoding='utf-8'))
    assert len(rows) == 2 * 3 and {tuple(r['seeds']) for r in rows} == {(0, 1)}
    row = next(r for r in rows if (r['dataset'], r['model']) == ('x', 'tsm2'))
    each = [json.loads((out / f'tsm2-x-4-{s}.json').read_text(encoding='utf-8')) for s in (0, 1)]
    assert row['mse'] == pytest.approx(statistics.mean(r['mse'] for r in each))
    assert row['ratio'] == pytest.approx(row['mse'] / 0.5) and row['windows'] == 80 - 4 + 1
    assert each[0]['mse'] != each[1]['mse'] and each[0]['options']['d_model'] == 8
    assert row['last'] == each[0]['last'] and row['last']['mse'] > row['mse']
    assert set(row['last']) == {'mse', 'mae', 'own_mse', 'own_mae', 'mase'} <= set(row) and row['mase'] > 0
    dlinear = json.loads((out / 'dlinear-x-4-0.json').read_text(encoding='utf-8'))
    assert dlinear['training']['lr'] == 0.02 and dlinear['options'] == {} and dlinear['parameters'] == 2 * 33 * 4
    table = (out / 'bench.md').read_text(encoding='utf-8')
    assert table in result.out and table.count('\n| x |') + table.count('\n| y |') == 2
    naive = ' | '.join(f'{row[k]["mse"]:.4f}' for k in ('last', 'seasonal'))
    assert f'| x | 4 | 77 | {naive} | 0.5 | {row["mse"]:.4f} ± ' in table
    lost = _forecast_bench.losses(rows, 'tsm2')
    better = [r['dataset'] for r in rows if r['model'] == 'tsm2' and r['seasonal']['mse'] < r['mse']]
    assert len(lost.get('the seasonal naive forecast', [])) == len(better) and table.count('tsm2 loses to') == len(lost)
    row['last']['mse'] = row['mse'] / 2
    assert _forecast_bench.losses([row], 'tsm2') == {'repeating the last value': [
        f'x 4 ({row["mse"]:.4f} against {row["mse"] / 2:.4f})']} | ({} if 'x' not in better else lost)
    assert f'Mean ratio of tsm2 over 1 cells {row["ratio"]:.3f}' in table
    again = tool('forecast', *arguments, '--table-only')
    assert again.code == 0 and table in again.out
    path, whole = out / 'tsm2-x-4-0.json', each[0]
    for text, message in (('[]', 'must hold an object'), ('{', 'is no JSON'),
                          (json.dumps(dict(whole, last=None, mae='x')), 'has no number mae, last.mse')):
        path.write_text(text)
        odd = tool('forecast', *arguments, '--table-only')
        assert odd.code == 2 and message in odd.err and odd.err.count('\n') == 1, odd.err
    path.write_text(json.dumps(whole))
    changed = tool('forecast', *arguments, '--lr', '0.5')
    assert changed.code == 2 and 'was made with another training' in changed.err


def test_recipe(tmp_path):
    """One configuration for all data sets; DLinear as its authors train it."""
    recipe = _forecast_bench.read_recipe(str(_forecast_bench.RECIPE))
    assert all({'file', 'split', 'paper'} <= set(e) <= {'file', 'split', 'paper', 'dlinear'}
               for e in recipe['datasets'].values())
    bench_options = _forecast_bench.bench_options
    options = [bench_options(e, 'tsm2', n, 96, 0, {}, {}) for n, e in recipe['datasets'].items()]
    # what the defaults were stands in the result: other ones are another run
    assert all((o['options'], o['training'], o['lookback']) == (MODEL, TRAINING, 512) for o in options)
    entry = dict(recipe['datasets']['ETTm1'], dlinear={**recipe['dlinear'], **recipe['datasets']['ETTm1']['dlinear']})
    theirs = bench_options(entry, 'dlinear', 'ETTm1', 96, 0, {}, {})
    assert (theirs['lookback'], theirs['training']['lr'], theirs['training']['steps']) == (336, 1e-4, -1)
    exchange = dict(entry, dlinear={**recipe['dlinear'], **recipe['datasets']['exchange']['dlinear']})
    sizes = [bench_options(exchange, 'dlinear', 'exchange', h, 0, {}, {})['training']['batch_size']
             for h in (96, 192, 336, 720)]
    assert sizes == [8, 8, 32, 32]
    for text, message in (('model: {}', "unknown section 'model'"),
                          ('datasets: {x: {fiel: y}}', "unknown entry 'fiel'")):
        (tmp_path / 'r.yaml').write_text(text)
        with pytest.raises(forecast.UserError, match=message):
            _forecast_bench.read_recipe(str(tmp_path / 'r.yaml'))


def test_on_real_data(tool, shared_data, tmp_path):
    """The bundled weights, on the series that they were trained for."""
    path = shared_data('ett') / 'ETTh1.csv.gz'
    result = tool('forecast', 'predict', path, '--model', 'tsm2.ETTh1-96', '--after', '2018-01-10', '--output',
                  tmp_path / 'f.csv', '--plot', tmp_path / 'f.png')
    assert result.code == 0, result.err
    assert len(read_series(tmp_path / 'f.csv')) == 96 and 'known for 96 of them' in result.out


def test_guide(tool, root, tmp_path, monkeypatch):
    """docs/forecasting.md from an empty folder to a plot with intervals: the commands as they stand, of two updates."""
    text = (root / 'docs/forecasting.md').read_text(encoding='utf-8')
    blocks = re.findall(r'^```bash\n(.*?)^```$', text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    series = re.fullmatch(r"python - <<'END'\n(.*?)END\n", blocks[0], re.S)
    exec(series[1], {})  # noqa: S102
    lines = [line for line in blocks[1].splitlines() if not line.startswith('#')]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ['python', 'tools/forecast.py']
        short = ['--epochs', '1', '--steps', '2'] if words[2] == 'fit' else []
        result = tool('forecast', *words[2:], *short, '--device', 'cpu')
        assert result.code == 0, (line, result.err)
    assert (tmp_path / 'past.png').stat().st_size > 10_000 and (tmp_path / 'ahead.png').stat().st_size > 10_000
    forecast_ = pd.read_csv(tmp_path / 'forecast.csv')
    assert list(forecast_.columns) == ['date', 'sales', 'sales_q0.1', 'sales_q0.9']
    assert (forecast_.date.iloc[0], len(forecast_)) == ('2025-01-01', 28)
    assert (forecast_['sales_q0.1'] < forecast_['sales_q0.9']).all()
