#!/usr/bin/env python
"""Forecast time series with TSM2: train, measure, predict, test on the past, and reproduce the benchmark's table.

    python tools/forecast.py fit sales.csv --horizon 28 --output output/forecast/sales
    python tools/forecast.py evaluate sales.csv --model output/forecast/sales/model
    python tools/forecast.py predict sales.csv --model output/forecast/sales/model --quantiles 0.1 0.9 --plot sales.png
    python tools/forecast.py backtest sales.csv --model output/forecast/sales/model --origins 4
    python tools/forecast.py bench --data-dir DIR --output output/forecast/bench

A series is a CSV file (also compressed, or Parquet) with a header, a column of dates, oldest first, and one column of
numbers per variate; or many series below one another, with a column of their names (--id-column). What is unusual in a
file is named by an option, never guessed. docs/forecasting.md is the guide.
"""
import argparse
import contextlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, Tuple

import torch

import _common as common
import _forecast_bench
from _common import UserError
from _forecast_bench import MODELS, RECIPE
from _forecast_plot import plot_backtest, plot_forecast, plot_panels

_TRAINING = dict(  # options of training: type and help
    epochs=(int, 'most epochs, each of which ends with the validation loss'),
    steps=(int, 'batches in an epoch, drawn at random; 0: from the number of windows, -1: all windows'),
    batch_size=(int, 'windows in a batch'),
    lr=(float, 'peak learning rate'),
    weight_decay=(float, 'weight decay (AdamW)'),
    warmup_steps=(int, 'batches of linear warm-up'),
    patience=(int, 'stop after so many epochs without a better validation loss, 0: never'),
    ema_decay=(float, 'decay of the averaged weights, per batch'),
    val_windows=(int, 'validation windows, evenly spread; 0: all'),
    clip_grad=(float, 'clip the norm of the gradients at this, 0: off'),
)
_CHOICES = dict(loss=('mse', 'mae', 'huber'), schedule=('cosine', 'constant', 'halve'))
_FILLS = ('error', 'keep', 'interpolate', 'forward', 'zero')
# Options of reading, by the names of `read_series` and of `Panel.from_frame`, with their defaults.
_READING = dict(date_column='date', id_column=None, separator=',', decimal='.', thousands=None, encoding='utf-8',
                names=None, header=True, skip_rows=0, na=(), date_format=None, day_first=None, integer_dates=None,
                timezone=None)
_PANEL = dict(sort=False, duplicates='error', gaps='error', missing='error', sentinels=True)


def pandas_forecasting():
    """vim2.forecasting, or an error that says how to get pandas."""
    common.register_models()
    try:
        import vim2.forecasting
    except ModuleNotFoundError as e:
        if e.name != 'pandas':
            raise
        raise UserError("forecasting needs pandas: pip install 'vim2[forecast]', or pip install pandas") from None
    return vim2.forecasting


# --------------------------------------------------------------------------------------------------------- options

def add_data_arguments(parser: argparse.ArgumentParser, model: bool) -> None:
    """The options of reading; those that are not given are as in the model's training, where there is a model."""
    as_trained = 'as in training' if model else None
    g = parser.add_argument_group('file' + (' (default: as in training)' if model else ''))
    g.add_argument('data', metavar='FILE', help='the series (.csv, .csv.gz, .parquet)')

    def add(name, *, default, text, **kwargs):
        default = '' if default is None or default == () else f' (default: {default})'
        g.add_argument(f'--{name}', default=None, help=text + ('' if as_trained else default), **kwargs)

    add('date-column', default='date', metavar='NAME', text='its column of dates')
    add('id-column', default=None, metavar='NAME', text="its column of the series' names, if it holds many series")
    add('separator', default=',', metavar='C', text="between fields; 'tab' for a tabulator")
    add('decimal', default='.', metavar='C', text='decimal mark')
    add('thousands', default=None, metavar='C', text='mark of thousands')
    add('encoding', default='utf-8', metavar='NAME', text='of the text: latin-1, cp1252, utf-16, …')
    add('names', default=None, nargs='+', metavar='NAME', text='names of all columns, in place of the header')
    add('header', default=None, action=argparse.BooleanOptionalAction, text='whether the first line is a header')
    add('skip-rows', default=None, type=int, metavar='N', text='lines before the header')
    add('na', default=None, nargs='+', metavar='TEXT', text='what stands for a missing value, such as -9999')
    add('date-format', default=None, metavar='FORMAT', text='of the dates, such as %%d.%%m.%%Y')
    add('day-first', default=None, action=argparse.BooleanOptionalAction, text='whether 01/02/2020 is in February')
    add('integer-dates', default=None, metavar='KIND',
        text='what dates that are whole numbers are: s, ms, us, ns, yyyymmdd, yyyymm, year, excel')
    add('timezone', default=None, metavar='NAME', text='zone of the dates, such as Europe/Berlin')
    g.add_argument('--freq', metavar='NAME', help="step of the dates, as pandas names it: h, 15min, D, B, W, MS, … "
                                                  "(default: the dates')")
    add('sort', default=None, action=argparse.BooleanOptionalAction, text='put the rows in order')
    add('duplicates', default='error', choices=('error', 'first', 'last', 'mean', 'sum'), text='two rows of one date')
    add('gaps', default='error', choices=_FILLS, text='missing dates; keep: windows with one are left out')
    add('missing', default='error', choices=_FILLS, text='missing values; keep: windows with one are left out')
    add('sentinels', default=None, action=argparse.BooleanOptionalAction,
        text='refuse values such as -9999 far outside of all others (the default)')


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group('model and training (default: vim2.forecasting.training, the same for all series)')
    g.add_argument('--lookback', type=int, metavar='T', help='steps that a forecast reads (default: at most 512)')
    g.add_argument('--model-kwargs', nargs='*', default={}, action=common.KeyValue, metavar='K=V',
                   help='arguments of vim2.models.TSM2')
    for name, (kind, text) in _TRAINING.items():
        g.add_argument(f'--{name.replace("_", "-")}', type=kind, metavar='N' if kind is int else 'X', help=text)
    g.add_argument('--loss', choices=_CHOICES['loss'], help='what is minimised')
    g.add_argument('--schedule', choices=_CHOICES['schedule'], help='of the learning rate')


def add_device_argument(parser) -> None:
    parser.add_argument('--device', metavar='NAME', help="cuda, cpu, … (default: the machine's accelerator, else cpu)")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], epilog=__doc__.strip().rsplit('\n\n', 1)[-1],
        formatter_class=common.HelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, formatter_class=common.HelpFormatter)

    p = command('fit', 'Train on a series. The output folder gets args.json, history.csv, last.pth.tar (newest state) '
                       'and model/, for evaluate, predict, backtest and TSM2.from_pretrained.')
    add_data_arguments(p, model=False)
    g = p.add_argument_group('columns')
    g.add_argument('--target', nargs='+', metavar='NAME', help='columns to forecast, in order (default: all others)')
    g.add_argument('--future', nargs='+', default=[], metavar='NAME', help='covariates known over the horizon as well')
    g.add_argument('--past', nargs='+', default=[], metavar='NAME', help='covariates known up to the present')
    g.add_argument('--static', nargs='+', default=[], metavar='NAME', help='covariates that are constant in a series')
    g.add_argument('--categorical', nargs='+', default=[], metavar='NAME',
                   help='covariates that are categories though they are numbers (text always is)')
    g.add_argument('--calendar', action='store_true', help='time of day, week and year as known covariates')
    g.add_argument('--multivariate', action='store_true',
                   help='forecast the series of --id-column together, each reading all others')
    g = p.add_argument_group('run')
    g.add_argument('--horizon', type=int, default=96, metavar='H', help='steps to forecast')
    g.add_argument('--split', default='auto', metavar='NAME',
                   help='training, validation and test part: auto, ett-hour, ett-minute, or three parts, 0.7/0.1/0.2')
    g.add_argument('--no-test', action='store_true', help='keep no test part: --split no-test')
    g.add_argument('--all-data', action='store_true', help='after the measured run train anew on all rows')
    g.add_argument('--season', type=int, metavar='N', help='season of the naive forecast, in steps (default: a day of '
                   'hours or minutes, a week of days, a year of weeks, months and quarters)')
    g.add_argument('--start', metavar='DIR', help='fine-tune: start from this model and keep its columns and look-back')
    g.add_argument('--seed', type=int, default=0, metavar='N', help='seed of everything random')
    g.add_argument('--output', default='output/forecast/run', metavar='DIR', help='folder of the run')
    g.add_argument('--resume', action='store_true', help='continue the run in --output; start it if there is none')
    common.add_logging_arguments(g)
    g.add_argument('--no-progress', action='store_true', help='no progress bar on a terminal')
    add_device_argument(g)
    add_training_arguments(p)

    p = command('evaluate', 'Errors over all windows of a part, beside those of the naive forecasts: in all, for each '
                            'step of the horizon and for each variate, and the coverage of the intervals.')
    add_data_arguments(p, model=True)
    p.add_argument('-m', '--model', required=True, metavar='DIR',
                   help='model/ folder of a run, or the name of bundled weights')
    p.add_argument('--split', metavar='NAME', help="how to split the series (default: as in training)")
    p.add_argument('--part', default='test', choices=('train', 'val', 'test', 'all'), help='part to evaluate')
    p.add_argument('--level', type=float, default=0.8, metavar='X', help='of the interval whose coverage is measured')
    p.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='windows at a time')
    p.add_argument('--errors', metavar='CSV', help='write the errors per step and variate to this file')
    p.add_argument('--json', action='store_true', help='print JSON')
    add_device_argument(p)

    p = command('predict', 'Forecast what comes after the end of a series, or after a date in it.')
    add_data_arguments(p, model=True)
    p.add_argument('-m', '--model', required=True, metavar='DIR',
                   help='model/ folder of a run, or the name of bundled weights')
    p.add_argument('--future-data', metavar='FILE', help='further rows with the covariates of the horizon')
    p.add_argument('--after', metavar='DATE', help='forecast from the step after this date (default: the last one)')
    p.add_argument('--quantiles', type=float, nargs='+', default=[], metavar='Q', help='such as 0.1 0.9')
    p.add_argument('--ids', nargs='+', metavar='NAME', help='series to forecast (default: all in the file)')
    p.add_argument('--output', default='forecast.csv', metavar='CSV', help='where the forecast goes')
    p.add_argument('--plot', metavar='PNG', help='draw history, truth where it is known, and forecast')
    p.add_argument('--history', type=int, metavar='N', help='past steps in the plot (default: two horizons)')
    p.add_argument('--plot-columns', nargs='+', metavar='NAME', help='variates or series in the plot (default: 8)')
    add_device_argument(p)

    p = command('backtest', 'Forecast from several dates of the past, with what was known then.')
    add_data_arguments(p, model=True)
    p.add_argument('-m', '--model', required=True, metavar='DIR',
                   help='model/ folder of a run, or the name of bundled weights')
    p.add_argument('--origins', type=int, default=5, metavar='N', help='number of dates')
    p.add_argument('--stride', type=int, metavar='N', help='steps between them (default: the horizon)')
    p.add_argument('--refit', action='store_true', help='train anew for each, on what was known then')
    p.add_argument('--quantiles', type=float, nargs='+', default=[], metavar='Q', help='such as 0.1 0.9')
    p.add_argument('--output', default='backtest.csv', metavar='CSV', help='where all forecasts go')
    p.add_argument('--plot', metavar='PNG', help='draw the forecasts over the series')
    p.add_argument('--plot-columns', nargs='+', metavar='NAME', help='variates or series in the plot (default: 8)')
    add_device_argument(p)

    p = command('bench', "Train and test on the recipe's data sets, against the paper's numbers. Finished runs are "
                         'kept in the output folder and not repeated; bench.json and bench.md hold the table.')
    p.add_argument('-c', '--config', default=str(RECIPE), metavar='YAML', help='data sets, and how DLinear is trained')
    p.add_argument('--data-dir', required=True, metavar='DIR', help="folder of the recipe's files")
    p.add_argument('--output', default='output/forecast/bench', metavar='DIR', help='folder of the results')
    p.add_argument('--models', nargs='+', default=['tsm2', 'dlinear'], choices=tuple(MODELS), metavar='NAME',
                   help=f'what to train: {", ".join(MODELS)}')
    p.add_argument('--datasets', nargs='+', metavar='NAME', help="data sets (default: all of the recipe)")
    p.add_argument('--horizons', type=int, nargs='+', default=[96, 192, 336, 720], metavar='H', help='horizons')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='seeds')
    p.add_argument('--table-only', action='store_true', help='train nothing: make the table of what there is')
    p.add_argument('--no-progress', action='store_true', help='no progress bar on a terminal')
    add_device_argument(p)
    add_training_arguments(p)
    return parser


def training_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    return {n: getattr(args, n) for n in (*_TRAINING, *_CHOICES) if getattr(args, n) is not None}


def model_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    own = {'num_variates', 'lookback', 'horizon', 'static_dim', 'future_dim', 'past_dim', 'future_len'} & set(
        args.model_kwargs)
    if own:
        raise UserError(f'--model-kwargs cannot set {sorted(own)[0]}: it follows from the data and the other options')
    return dict(args.model_kwargs)


def reading_arguments(args: argparse.Namespace, forecaster=None) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Arguments of `read_series` and of `Panel.from_frame`: the options, those of training, the defaults."""
    trained = dict(forecaster.info.get('reading') or {}) if forecaster is not None else {}
    if forecaster is not None and forecaster.roles.id is not None:
        trained.setdefault('id_column', forecaster.roles.id)
    out, taken = [], []
    for defaults in (_READING, _PANEL):
        group = {}
        for name, default in defaults.items():
            given = getattr(args, name)
            group[name] = given if given is not None else trained.get(name, default)
            if given is None and name in trained and name != 'id_column' and trained[name] not in (default, list(
                    default) if isinstance(default, tuple) else default):
                taken.append(f'{name.replace("_", "-")} {trained[name]}')
        out.append(group)
    if taken:
        note(args, f'read as in training: {", ".join(taken)}')
    return out[0], out[1]


def note(args: argparse.Namespace, text: str) -> None:
    print(f'note: {text}', file=sys.stderr if getattr(args, 'json', False) else sys.stdout, flush=True)


@contextlib.contextmanager
def reported(args: argparse.Namespace):
    """What vim2.forecasting decides becomes notes, its warnings lines on stderr, its errors a UserError."""
    from vim2.forecasting import SeriesError, SeriesWarning

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(args, record.getMessage())

    def show(message, category, filename, lineno, file=None, line=None):
        if isinstance(message, SeriesWarning):
            print(f'warning: {message.command_line()}', file=sys.stderr, flush=True)
        else:
            before(message, category, filename, lineno, file, line)

    logger, handler = logging.getLogger('vim2.forecasting'), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter('always', SeriesWarning)
        before, warnings.showwarning = warnings.showwarning, show
        try:
            yield
        except SeriesError as e:
            raise UserError(e.command_line()) from None
        except OSError as e:  # of vim2._files, which names the file
            if e.filename is None:
                raise
            raise UserError(f'cannot write {e.filename}: {e.strerror}') from None
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def open_forecaster(name: str):
    """A forecaster from a folder, or by the name of bundled weights."""
    from vim2.forecasting import Forecaster
    return Forecaster.load(name) if Path(name).exists() else Forecaster.bundled(name)


def make_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot create the folder {folder}: {e.strerror}') from None
    return folder


def write_table(path, frame, **kwargs) -> None:
    common.write_atomic(path, lambda tmp: frame.to_csv(tmp, lineterminator='\n', encoding='utf-8', **kwargs))


def device_of(args: argparse.Namespace) -> torch.device:
    return common.check_device(args.device or common.default_device())


def progress_bar(args: argparse.Namespace):
    return lambda batches: common.progress(batches, disable=args.no_progress)


def say(text: str) -> None:
    print(text, flush=True)


# -------------------------------------------------------------------------------------------------------- commands

def _state(run: Dict[str, Any]) -> Dict[str, Any]:
    return json.loads(json.dumps(run, default=list))


def fit(args: argparse.Namespace) -> None:
    import pandas as pd

    from vim2.forecasting import Columns, Panel, read_series
    common.at_least(args, 1, 'horizon', 'lookback', 'season')
    common.at_least(args, 0, 'seed', 'skip_rows')
    if args.no_test and args.split != 'auto':
        raise UserError(f'--no-test and --split {args.split} contradict each other')
    split = 'no-test' if args.no_test else args.split
    start = open_forecaster(args.start) if args.start else None
    if start is not None:
        refuse_with_start(args, start)
    reading, policy = reading_arguments(args, start)
    roles = start.roles if start is not None else Columns(
        target=tuple(args.target or ()), id=reading['id_column'], past=tuple(args.past), future=tuple(args.future),
        static=tuple(args.static), categorical=tuple(args.categorical), calendar=args.calendar,
        multivariate=args.multivariate)
    options, training = model_arguments(args), training_arguments(args)
    device = device_of(args)
    frame = read_series(args.data, **reading)
    policy = dict(policy, name=args.data, file=True)
    panel = Panel.from_frame(frame, roles, args.freq, **policy) if start is None else start.panel(
        frame, args.freq, **policy)
    horizon, lookback = (start.horizon, start.lookback) if start is not None else (args.horizon, args.lookback)
    run = _state(dict(columns=panel.columns.to_dict(), rows=panel.rows, series=len(panel.ids), freq=panel.freq,
                      split=split, horizon=horizon, lookback=lookback, seed=args.seed, season=args.season,
                      all_data=args.all_data, start=args.start, model=options, training=training))
    folder = make_folder(args.output)
    last = folder / 'last.pth.tar'
    with common.locked_folder(folder):
        if last.exists():
            if not args.resume:
                raise UserError(f'{folder} already holds a run: pass --resume to continue it, or another --output')
            check_same_run(folder / 'args.json', run)
        common.write_text(folder / 'args.json', json.dumps(run, indent=1) + '\n')
        say(f'run folder {folder}, on {device}')
        common_options = dict(split=split, seed=args.seed, device=device, checkpoint=last, resume=args.resume,
                              all_data=args.all_data, log=say, wrap=progress_bar(args))
        if start is not None:
            forecaster = start.fine_tune(panel, training=training, **common_options)
        else:
            from vim2.forecasting import fit as train
            forecaster = train(panel, horizon, lookback, season=args.season, model=options, training=training,
                               **common_options)
        kept = {k: v for k, v in {**reading, **policy}.items() if k not in ('name', 'file')}
        forecaster.info['reading'] = _state(kept)
        write_table(folder / 'history.csv', pd.DataFrame(forecaster.history), index=False)
        scalars = common.Scalars(args, folder)
        for row in forecaster.history:
            scalars.log(row['epoch'], {k: v for k, v in row.items() if k != 'epoch'})
        scalars.close()
        forecaster.save(folder / 'model')
    info, report = forecaster.info, forecaster.info['report']
    say(f'best epoch {info["epoch"]} of {info["epochs"]}, validation MSE {info["val_mse"]:.4f}')
    say(f'{args.data}, {report["part"]} part of split {split}, step {forecaster.freq}: {report["windows"]:,} windows, '
        f'look-back {forecaster.lookback}, horizon {forecaster.horizon}')
    say(errors_table(report))
    say(f'done. Model: {folder / "model"}')


def refuse_with_start(args: argparse.Namespace, start) -> None:
    given = [n for n in ('target', 'future', 'past', 'static', 'categorical', 'calendar', 'multivariate', 'lookback',
                         'model_kwargs', 'season') if getattr(args, n)]
    if given:
        raise UserError(f'--start and --{given[0].replace("_", "-")} contradict each other: it is that of the model')
    if args.horizon not in (96, start.horizon):
        raise UserError(f'--start: the model forecasts {start.horizon} steps, --horizon is {args.horizon}')


def check_same_run(path: Path, run: Dict[str, Any]) -> None:
    saved = common.read_object(path)
    changed = [f'{k}: {saved.get(k)!r} -> {v!r}' for k, v in run.items() if saved.get(k) != v]
    if changed:
        raise UserError(f'the run in {path.parent} was started with other options: {"; ".join(changed)}')


def errors_table(report: Dict[str, Any]) -> str:
    """The model beside the naive forecasts, over all steps and at the first one."""
    names = dict(model='TSM2', last='last value', seasonal='seasonal naive')
    rows = [('', 'MSE', 'MAE', 'own MSE', 'own MAE', 'MASE', 'MSE step 1')]
    for kind, name in names.items():
        e = report['errors'][kind]
        rows.append((name, f'{e["mse"]:.4f}', f'{e["mae"]:.4f}', f'{e["own_mse"]:.5g}', f'{e["own_mae"]:.5g}',
                     '–' if e['mase'] is None else f'{e["mase"]:.4f}', f'{report["first_step"][kind]["mse"]:.4f}'))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(f'{c:{w}}' if i == 0 else f'{c:>{w}}' for i, (c, w) in enumerate(zip(r, widths))) for r in rows]
    if report.get('coverage'):
        lines.append(f'the {report["coverage"]["level"]:.0%} interval covers {report["coverage"]["covered"]:.1%}')
    return '\n'.join(line.rstrip() for line in lines)


def evaluate_command(args: argparse.Namespace) -> None:
    with reported(args):
        _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
    import pandas as pd

    from vim2.forecasting import read_series
    common.at_least(args, 1, 'batch_size')
    if not 0 < args.level < 0.98:
        raise UserError(f'--level must be above 0 and below 0.98, got {args.level:g}')
    forecaster = open_forecaster(args.model)
    device = device_of(args)
    reading, policy = reading_arguments(args, forecaster)
    frame = read_series(args.data, **reading)
    found = forecaster.evaluate(frame, args.part, args.split, level=args.level, freq=args.freq, device=device,
                                batch_size=args.batch_size, name=args.data, file=True, **policy)
    errors = found.pop('raw')['model']
    names = forecaster.columns
    if args.errors:
        write_table(args.errors, pd.DataFrame([
            dict(step=h + 1, variate=c, mse=errors.mse[h, j].item(), mae=errors.mae[h, j].item(),
                 own_mse=errors.own_mse[h, j].item(), own_mae=errors.own_mae[h, j].item())
            for h in range(forecaster.horizon) for j, c in enumerate(names)]), index=False)
    by_variate = [dict(variate=c, **errors.summary(variate=slice(j, j + 1))) for j, c in enumerate(names)]
    report = dict(model=args.model, data=args.data, **found, lookback=forecaster.lookback, horizon=forecaster.horizon,
                  mse=found['errors']['model']['mse'], mae=found['errors']['model']['mae'], variates=by_variate,
                  steps=[dict(step=h + 1, **errors.summary(step=slice(h, h + 1))) for h in range(forecaster.horizon)])
    if args.json:
        common.print_json(report)
        return
    print(f'{args.data} by {args.model}, {args.part} part of split {found["split"]}, step {found["freq"]}: '
          f'{found["windows"]:,} windows' + (f' ({found["left_out"]:,} left out for a missing value)'
                                             if found['left_out'] else '') +
          f', look-back {forecaster.lookback}, horizon {forecaster.horizon}, season {found["season"]}')
    print(errors_table(found))
    width = max(7, *(len(c) for c in names))
    print(f'\n{"":{width}}     MSE     MAE   own MAE')
    steps = sorted({0, *(round(forecaster.horizon * k / 4) - 1 for k in range(1, 5))} - {-1})
    for name, row in (*((r['variate'], r) for r in by_variate[:20]), ('all', report | report['errors']['model']),
                      *((f'step {h + 1}', report['steps'][h]) for h in steps)):
        print(f'{name:{width}}  {row["mse"]:6.4f}  {row["mae"]:6.4f}  {row["own_mae"]:8.4g}')


def predict(args: argparse.Namespace) -> None:
    import pandas as pd

    from vim2.forecasting import read_series
    common.at_least(args, 1, 'history')
    forecaster = open_forecaster(args.model)
    forecaster.model.to(device_of(args))
    reading, policy = reading_arguments(args, forecaster)
    frame = read_series(args.data, **reading)
    roles, ids = forecaster.roles, forecaster.roles.id
    if args.ids:
        if ids is None or roles.multivariate:
            raise UserError('--ids: the model was not trained on series that are forecast one by one')
        known = frame[ids].astype(str)
        unknown = [i for i in args.ids if i not in set(known)]
        if unknown:
            raise UserError(f'--ids: {args.data} has no series {unknown[0]!r}')
        frame = frame[known.isin(args.ids).to_numpy()]
    future = read_series(args.future_data, **reading) if args.future_data else None
    names = forecaster.columns if ids is None else forecaster.ids if roles.multivariate else sorted(
        set(frame[ids])) if ids in frame else []
    unknown = [c for c in args.plot_columns or [] if c not in names]
    if unknown:
        raise UserError(f'--plot-columns: no {"column" if ids is None else "series"} {unknown[0]!r}; there are '
                        f'{", ".join(names[:20])}')
    forecast = forecaster.predict(frame, future, quantiles=args.quantiles, freq=args.freq, after=args.after,
                                  name=args.data, file=True, **policy)
    write_table(args.output, forecast, index_label=frame.index.name or 'date')
    count = f'{forecaster.horizon} steps of ' + (f'{len(forecaster.columns)} variates' if ids is None else
                                                 f'{forecast[ids].nunique()} series')
    print(f'{count} by {args.model}, step {forecaster.freq}, {forecast.index.min()} to {forecast.index.max()}: '
          f'{args.output}')
    keys = [None] if ids is None else list(dict.fromkeys(forecast[ids]))
    pieces, squares, inside = [], [], []
    for key in keys:
        own = frame if key is None else frame[frame[ids].astype(str).to_numpy() == key]
        ahead = forecast if key is None else forecast[forecast[ids] == key]
        numbers = own[list(roles.target)].apply(pd.to_numeric, errors='coerce').sort_index()
        numbers = numbers[~numbers.index.duplicated()]
        truth = numbers[numbers.index >= ahead.index[0]].dropna(how='all')
        pieces.append((key, numbers[numbers.index < ahead.index[0]], truth[truth.index <= ahead.index[-1]], ahead))
        both = truth.index.intersection(ahead.index)
        k = 0 if ids is None else forecaster.ids.index(key)
        error = (ahead.loc[both, list(roles.target)] - truth.loc[both]) / forecaster.scaler.std[k]
        squares.append(error.to_numpy().ravel())
        if len(args.quantiles) > 1:
            low, high = (f'_q{q:g}' for q in (min(args.quantiles), max(args.quantiles)))
            for c in roles.target:
                inside += ((truth.loc[both, c] >= ahead.loc[both, c + low]) & (
                    truth.loc[both, c] <= ahead.loc[both, c + high])).tolist()
    error = pd.Series([e for s in squares for e in s]).dropna()
    if len(error):
        steps = max(len(p[2]) for p in pieces)
        text = f'the truth is known for {steps} of them: MSE {(error ** 2).mean():.4f}, MAE {error.abs().mean():.4f} ' \
               'in standardised units'
        print(text + (f'; {sum(inside) / len(inside):.0%} are between the outer quantiles' if inside else ''))
    if args.plot:
        panels = plot_panels(pieces, roles, args.plot_columns or names[:8], ids)
        plot_forecast(panels, args.history or 2 * forecaster.horizon, args.plot,
                      f'{Path(args.data).name} by {args.model}, step {forecaster.freq}')
        shown = len(args.plot_columns or names[:8])
        print(f'plot: {args.plot}' + (f' (the first {shown} of {len(names)}; --plot-columns)'
                                      if shown < len(names) and not args.plot_columns else ''))


def backtest(args: argparse.Namespace) -> None:
    from vim2.forecasting import read_series
    common.at_least(args, 1, 'origins', 'stride')
    forecaster = open_forecaster(args.model)
    device = device_of(args)
    forecaster.model.to(device)
    reading, policy = reading_arguments(args, forecaster)
    frame = read_series(args.data, **reading)
    table = forecaster.backtest(frame, args.origins, args.stride, refit=args.refit, quantiles=args.quantiles,
                                freq=args.freq, device=device, name=args.data, file=True, log=say, **policy)
    write_table(args.output, table, index=False)
    print(f'{args.data} by {args.model}' + (', trained anew for each origin' if args.refit else '') +
          f', step {forecaster.freq}, horizon {forecaster.horizon}: {len(table):,} forecasts in {args.output}')
    print(backtest_table(table))
    if args.plot:
        ids = forecaster.roles.id
        key = 'variate' if ids is None else ids
        names = list(dict.fromkeys(table[key].astype(str)))
        unknown = [c for c in args.plot_columns or [] if c not in names]
        if unknown:
            raise UserError(f'--plot-columns: no {unknown[0]!r}; there are {", ".join(names[:20])}')
        wanted = args.plot_columns or names[:8]
        plot_backtest(table, key, wanted, args.plot, f'{Path(args.data).name} by {args.model}, step {forecaster.freq}')
        print(f'plot: {args.plot}')


def backtest_table(table) -> str:
    """Errors of each origin in the units of the series, beside the naive forecasts."""
    import pandas as pd
    known = table.dropna(subset=['y'])
    rows = {}
    for kind in ('forecast', 'last', 'seasonal'):
        error = known[kind] - known['y']
        rows[f'MSE {kind}'] = error.pow(2).groupby(known['fold']).mean()
        rows[f'MAE {kind}'] = error.abs().groupby(known['fold']).mean()
    levels = sorted(float(c[1:]) for c in table.columns if c.startswith('q') and c[1:2].isdigit())
    if len(levels) > 1:
        inside = (known['y'] >= known[f'q{levels[0]:g}']) & (known['y'] <= known[f'q{levels[-1]:g}'])
        rows[f'{levels[0]:g} to {levels[-1]:g}'] = inside.groupby(known['fold']).mean()
    out = pd.DataFrame(rows)
    origins = known.groupby('fold')['origin'].agg(['min', 'nunique'])
    out.index = [str(a) if n == 1 else f'{a} and later' for a, n in zip(origins['min'], origins['nunique'])]
    out.loc['all'] = out.mean()
    return out.to_string(float_format=lambda v: f'{v:.4g}')


def bench(args: argparse.Namespace) -> None:
    common.at_least(args, 1, 'lookback')
    common.at_least(argparse.Namespace(horizons=min(args.horizons)), 1, 'horizons')
    common.at_least(argparse.Namespace(seeds=min(args.seeds)), 0, 'seeds')
    _forecast_bench.bench(args, make_folder(args.output), model_arguments(args), training_arguments(args),
                          device_of(args))


def main() -> None:
    args = get_parser().parse_args()
    pandas_forecasting()
    with reported(args):
        dict(fit=fit, evaluate=_evaluate, predict=predict, backtest=backtest, bench=bench)[args.command](args)


if __name__ == '__main__':
    common.run(main)
