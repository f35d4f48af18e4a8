#!/usr/bin/env python
"""Forecast time series with TSM2: train, measure, predict, and reproduce the benchmark's table.

    python tools/forecast.py predict ETTh1.csv --output forecast.csv --plot forecast.png
    python tools/forecast.py fit sales.csv --lookback 336 --horizon 28 --output output/forecast/sales
    python tools/forecast.py evaluate sales.csv --model output/forecast/sales/model
    python tools/forecast.py bench --data-dir DIR --output output/forecast/bench

A series is a CSV file (.csv or .csv.gz) with a header, one column of dates, oldest first, and one column of numbers per
variate. Options that are not given come from the recipe: one configuration for all data sets, and what differs for a
named one.
"""
import argparse
import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch

import _common as common
import _data as data
import _forecasting as forecasting
from _common import UserError

RECIPE = Path(__file__).parent / 'recipes' / 'forecast.yaml'
# What bench can train, as changes of the recipe's model; DLinear is the baseline.
MODELS: Dict[str, Optional[Dict[str, Any]]] = dict(
    tsm2={}, tsm2_mlp=dict(variate_mixer='mlp'), tsm2_plain=dict(weighted_average=False), dlinear=None)
_TRAINING = dict(  # options of training: type and help
    epochs=(int, 'most epochs'),
    steps=(int, 'batches in an epoch, drawn at random; 0: all windows'),
    batch_size=(int, 'windows in a batch'),
    lr=(float, 'peak learning rate'),
    weight_decay=(float, 'weight decay (AdamW)'),
    warmup_steps=(int, 'batches of linear warm-up'),
    patience=(int, 'stop after so many epochs without a better validation loss, 0: never'),
    ema_decay=(float, 'decay of the averaged weights, per batch'),
    val_windows=(int, 'validation windows, evenly spread; 0: all'),
    clip_grad=(float, 'clip the norm of the gradients at this, 0: off'),
)


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

def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group('data')
    g.add_argument('data', metavar='CSV', help='the series (.csv, .csv.gz)')
    g.add_argument('--date-column', default='date', metavar='NAME', help='its column of dates')


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group('model and training (default: the recipe)')
    g.add_argument('-c', '--config', default=str(RECIPE), metavar='YAML', help='recipe')
    g.add_argument('--lookback', type=int, metavar='T', help='steps that a forecast reads')
    g.add_argument('--model-kwargs', nargs='*', default={}, action=common.KeyValue, metavar='K=V',
                   help='arguments of vim2.models.TSM2')
    for name, (kind, text) in _TRAINING.items():
        g.add_argument(f'--{name.replace("_", "-")}', type=kind, metavar='N' if kind is int else 'X', help=text)
    g.add_argument('--loss', choices=('mse', 'mae'), help='what is minimised')
    g = parser.add_argument_group('hardware')
    g.add_argument('--device', metavar='NAME', help="cuda, cpu, … (default: the machine's accelerator, else cpu)")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], epilog=__doc__.strip().rsplit('\n\n', 1)[-1],
        formatter_class=common.HelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, formatter_class=common.HelpFormatter)

    p = command('fit', 'Train on a series. The output folder gets args.json, history.csv, last.pth.tar (newest state) '
                       'and model/, for evaluate, predict and TSM2.from_pretrained.')
    add_data_arguments(p)
    p.add_argument('--columns', nargs='+', metavar='NAME', help='variates, in order (default: all columns)')
    p.add_argument('--preset', metavar='NAME', help="take what the recipe says for this data set")
    p.add_argument('--split', metavar='NAME',
                   help="training, validation and test part: ett-hour, ett-minute, or three parts (default: the "
                        "preset's, else 0.7/0.1/0.2)")
    p.add_argument('--horizon', type=int, default=96, metavar='H', help='steps to forecast')
    p.add_argument('--seed', type=int, default=0, metavar='N', help='seed of everything random')
    p.add_argument('--output', default='output/forecast/run', metavar='DIR', help='folder of the run')
    p.add_argument('--resume', action='store_true', help='continue the run in --output; start it if there is none')
    p.add_argument('--no-progress', action='store_true', help='no progress bar on a terminal')
    add_training_arguments(p)

    p = command('evaluate', 'Mean squared and absolute error over all windows of a part, in standardised units, in all '
                            'and for each step of the horizon and each variate.')
    add_data_arguments(p)
    p.add_argument('-m', '--model', default='tsm2.ETTh1-96', metavar='DIR',
                   help='model/ folder of a run, or the name of bundled weights')
    p.add_argument('--split', metavar='NAME', help="how to split the series (default: as in training)")
    p.add_argument('--part', default='test', choices=('train', 'val', 'test', 'all'), help='part to evaluate')
    p.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='windows at a time')
    p.add_argument('--errors', metavar='CSV', help='write the errors per step and variate to this file')
    p.add_argument('--json', action='store_true', help='print JSON')
    p.add_argument('--device', metavar='NAME', help="cuda, cpu, … (default: the machine's accelerator, else cpu)")

    p = command('predict', 'Forecast what comes after the end of a series, or after a date in it.')
    add_data_arguments(p)
    p.add_argument('-m', '--model', default='tsm2.ETTh1-96', metavar='DIR',
                   help='model/ folder of a run, or the name of bundled weights')
    p.add_argument('--after', metavar='DATE', help='forecast from the step after this date (default: the last one)')
    p.add_argument('--freq', metavar='NAME', help="step between dates, as pandas names it (default: the series')")
    p.add_argument('--output', default='forecast.csv', metavar='CSV', help='where the forecast goes')
    p.add_argument('--plot', metavar='PNG', help='draw history, truth where it is known, and forecast')
    p.add_argument('--history', type=int, metavar='N', help='past steps in the plot (default: two horizons)')
    p.add_argument('--plot-columns', nargs='+', metavar='NAME', help='variates in the plot (default: the first 8)')
    p.add_argument('--device', metavar='NAME', help="cuda, cpu, … (default: the machine's accelerator, else cpu)")

    p = command('bench', "Train and test on the recipe's data sets, against the paper's numbers. Finished runs are "
                         'kept in the output folder and not repeated; bench.json and bench.md hold the table.')
    p.add_argument('--data-dir', required=True, metavar='DIR', help="folder of the recipe's files")
    p.add_argument('--output', default='output/forecast/bench', metavar='DIR', help='folder of the results')
    p.add_argument('--models', nargs='+', default=['tsm2', 'dlinear'], choices=tuple(MODELS), metavar='NAME',
                   help=f'what to train: {", ".join(MODELS)}')
    p.add_argument('--datasets', nargs='+', metavar='NAME', help="data sets (default: all of the recipe)")
    p.add_argument('--horizons', type=int, nargs='+', default=[96, 192, 336, 720], metavar='H', help='horizons')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='seeds')
    p.add_argument('--table-only', action='store_true', help='train nothing: make the table of what there is')
    p.add_argument('--no-progress', action='store_true', help='no progress bar on a terminal')
    add_training_arguments(p)
    return parser


def read_recipe(path: str) -> Dict[str, Any]:
    recipe = common.read_recipe(path)
    unknown = set(recipe) - {'model', 'training', 'datasets', 'dlinear'}
    if unknown:
        raise UserError(f'{path}: unknown section {sorted(unknown)[0]!r} (known: model, training, datasets, dlinear)')
    for name, entry in recipe.get('datasets', {}).items():
        unknown = set(entry) - {'file', 'split', 'paper', 'model', 'training', 'horizons'}
        if unknown:
            raise UserError(f'{path}: {name}: unknown entry {sorted(unknown)[0]!r}')
    return recipe


def settings(args: argparse.Namespace, dataset: Optional[str], model: str = 'tsm2',
             horizon: Optional[int] = None) -> Tuple[Dict, Dict]:
    """Arguments of the model and options of training.

    Later ones win: the recipe, its data set, that at one horizon, its baseline, the command line.
    """
    recipe = read_recipe(args.config)
    sections = [recipe]
    if dataset is not None:
        if dataset not in recipe.get('datasets', {}):
            raise UserError(f'{args.config} has no data set {dataset!r}: it has '
                            f'{", ".join(recipe.get("datasets", {})) or "none"}')
        entry = recipe['datasets'][dataset]
        sections += [entry, entry.get('horizons', {}).get(horizon, {})]
    changes = MODELS[model]
    if changes is None:
        sections.append(recipe.get(model, {}))
    options, training = {}, {}
    for section in sections:
        options.update(section.get('model', {}))
        training.update(section.get('training', {}))
    options.update(args.model_kwargs)
    if args.lookback is not None:
        options['lookback'] = args.lookback
    options.setdefault('lookback', 512)
    options.update(changes or {})
    for name in (*_TRAINING, 'loss'):
        if getattr(args, name) is not None:
            training[name] = getattr(args, name)
        if name not in training:
            raise UserError(f'{args.config} says nothing about {name}: give --{name.replace("_", "-")}')
    unknown = set(training) - {*_TRAINING, 'loss'}
    if unknown:
        raise UserError(f'{args.config}: unknown option of training {sorted(unknown)[0]!r}')
    for name in _TRAINING:
        least = 1 if name in ('epochs', 'batch_size') else 0
        if not isinstance(training[name], (int, float)) or training[name] < least:
            raise UserError(f'{name} must be a number of at least {least}, got {training[name]!r}')
    if training['ema_decay'] >= 1:
        raise UserError(f'ema_decay must be below 1, got {training["ema_decay"]}')
    return options, training


# ------------------------------------------------------------------------------------------------------------ data

class Series(NamedTuple):
    """A series, split and scaled by its training part."""
    frame: Any  # pandas.DataFrame
    split: Any  # vim2.forecasting.Split
    scaler: Any  # vim2.forecasting.Scaler
    values: torch.Tensor  # scaled, (rows, M), float32


def series_errors(function):
    """Calls a function of vim2.forecasting; what is wrong with the series becomes one line for the user."""
    def call(*args, **kwargs):
        from vim2.forecasting import SeriesError
        try:
            return function(*args, **kwargs)
        except SeriesError as e:
            raise UserError(str(e)) from None
    return call


@series_errors
def open_series(path: str, split: str, date_column: str = 'date', columns: Optional[List[str]] = None) -> Series:
    from vim2.forecasting import Scaler, read_series, split_series
    frame = read_series(path, date_column, columns)
    parts = split_series(len(frame), split)
    scaler = Scaler.fit(frame.to_numpy()[slice(*parts.train)])
    return Series(frame, parts, scaler, torch.as_tensor(scaler.transform(frame.to_numpy()), dtype=torch.float32))


@series_errors
def open_windows(series: Series, part: str, lookback: int, horizon: int):
    from vim2.forecasting import Windows
    return Windows(series.values, getattr(series.split, part), lookback, horizon, part)


@series_errors
def open_forecaster(name: str):
    """A forecaster from a folder, or by the name of bundled weights."""
    from vim2.forecasting import Forecaster
    return Forecaster.load(name) if Path(name).exists() else Forecaster.bundled(name)


def create_model(model: str, num_variates: int, horizon: int, options: Dict[str, Any]) -> torch.nn.Module:
    from vim2.forecasting import DLinear
    from vim2.models import TSM2
    if MODELS[model] is None:
        return DLinear(num_variates, options['lookback'], horizon)
    try:
        return TSM2(num_variates, horizon=horizon, **options)
    except (TypeError, ValueError) as e:
        raise UserError(f'cannot make the model: {common.one_line(e)}') from None


def create_trainer(model: str, series: Series, horizon: int, options: Dict[str, Any], training: Dict[str, Any],
                   seed: int, device: torch.device) -> forecasting.Trainer:
    windows = [open_windows(series, part, options['lookback'], horizon) for part in ('train', 'val')]
    data.seed_everything(seed, 0)
    network = create_model(model, series.values.shape[1], horizon, options)
    return forecasting.Trainer(network, *windows, training, seed, device)


def make_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot create the folder {folder}: {e.strerror}') from None
    return folder


def write_csv(path, header: List[str], rows) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(header)
    writer.writerows(rows)
    try:
        common.write_text(path, text.getvalue())
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror}') from None


# -------------------------------------------------------------------------------------------------------- commands

def fit(args: argparse.Namespace) -> None:
    from vim2.forecasting import Forecaster, evaluate, frequency
    common.at_least(args, 1, 'horizon', 'lookback')
    common.at_least(args, 0, 'seed')
    options, training = settings(args, args.preset, horizon=args.horizon)
    split = args.split
    if split is None and args.preset:
        split = read_recipe(args.config)['datasets'][args.preset].get('split')
    split = split or '0.7/0.1/0.2'
    device = common.check_device(args.device or common.default_device())
    series = open_series(args.data, split, args.date_column, args.columns)
    columns = list(series.frame.columns)
    run = dict(columns=columns, rows=len(series.frame), split=split, horizon=args.horizon, seed=args.seed,
               model=options, training=training)
    trainer = create_trainer('tsm2', series, args.horizon, options, training, args.seed, device)
    folder = make_folder(args.output)
    last = folder / 'last.pth.tar'
    if last.exists():
        if not args.resume:
            raise UserError(f'{folder} already holds a run: pass --resume to continue it, or another --output')
        saved = json.loads((folder / 'args.json').read_text(encoding='utf-8'))
        changed = [f'{k}: {saved.get(k)!r} -> {v!r}' for k, v in run.items() if saved.get(k) != v]
        if changed:
            raise UserError(f'the run in {folder} was started with other options: {"; ".join(changed)}')
        trainer.load(last)
    common.write_text(folder / 'args.json', json.dumps(run, indent=1) + '\n')
    print(f'TSM2: {common.count_parameters(trainer.model):,} parameters, {len(columns)} variates, look-back '
          f'{options["lookback"]}, horizon {args.horizon}; {len(trainer.train):,} training and {len(trainer.val):,} '
          f'validation windows, on {device}; run folder {folder}', flush=True)
    if trainer.epoch:
        print(f'resumed at epoch {trainer.epoch}', flush=True)
    trainer.fit(last, log=lambda text: print(text, flush=True), progress=not args.no_progress)
    write_csv(folder / 'history.csv', ['epoch', 'train_loss', 'val_mse'],
              [[h['epoch'], h['train_loss'], h['val_mse']] for h in trainer.history])
    info = dict(split=split, seed=args.seed, training=training, val_mse=trainer.best_loss, epoch=trainer.best_epoch)
    forecaster = Forecaster(trainer.model.cpu(), series.scaler, columns, frequency(series.frame.index), info)
    common.write_folder(folder / 'model', forecaster.save)
    test = open_windows(series, 'test', options['lookback'], args.horizon)
    errors = evaluate(trainer.model, test)
    print(f'done: best epoch {trainer.best_epoch}, validation MSE {trainer.best_loss:.4f}; test MSE '
          f'{errors.mse.mean():.4f}, MAE {errors.mae.mean():.4f} over {errors.windows:,} windows. '
          f'Model: {folder / "model"}')


def evaluate_command(args: argparse.Namespace) -> None:
    from vim2.forecasting import SeriesError, Split, Windows, evaluate, read_series, split_series
    common.at_least(args, 1, 'batch_size')
    forecaster = open_forecaster(args.model)
    device = common.check_device(args.device or common.default_device())
    try:
        frame = forecaster.select(read_series(args.data, args.date_column), args.data)
        split = split_series(len(frame), args.split or forecaster.info.get('split') or '0.7/0.1/0.2') \
            if args.part != 'all' else Split(*[(0, len(frame))] * 3)
        values = torch.as_tensor(forecaster.scaler.transform(frame.to_numpy()), dtype=torch.float32)
        part = split.test if args.part == 'all' else getattr(split, args.part)
        windows = Windows(values, part, forecaster.lookback, forecaster.horizon, args.part)
    except SeriesError as e:
        raise UserError(str(e)) from None
    errors = evaluate(forecaster.model.to(device), windows, args.batch_size, device=device)
    if args.errors:
        write_csv(args.errors, ['step', 'variate', 'mse', 'mae'], [
            [h + 1, column, errors.mse[h, j].item(), errors.mae[h, j].item()]
            for h in range(forecaster.horizon) for j, column in enumerate(forecaster.columns)])
    by_variate = [dict(variate=c, mse=errors.mse[:, j].mean().item(), mae=errors.mae[:, j].mean().item())
                  for j, c in enumerate(forecaster.columns)]
    report = dict(model=args.model, data=args.data, part=args.part, windows=errors.windows,
                  lookback=forecaster.lookback, horizon=forecaster.horizon,
                  mse=errors.mse.mean().item(), mae=errors.mae.mean().item(),
                  variates=by_variate,
                  steps=[dict(step=h + 1, mse=errors.mse[h].mean().item(), mae=errors.mae[h].mean().item())
                         for h in range(forecaster.horizon)])
    if args.json:
        common.print_json(report)
        return
    print(f'{args.data}, {args.part}: {errors.windows:,} windows, look-back {forecaster.lookback}, horizon '
          f'{forecaster.horizon}, standardised units')
    width = max(7, *(len(c) for c in forecaster.columns))
    print(f'{"":{width}}     MSE     MAE')
    for row in (*by_variate, dict(report, variate='all')):
        print(f'{row["variate"]:{width}}  {row["mse"]:6.4f}  {row["mae"]:6.4f}')
    for h in sorted({0, *(round(forecaster.horizon * k / 4) - 1 for k in range(1, 5))} - {-1}):
        print(f'{"step " + str(h + 1):{width}}  {report["steps"][h]["mse"]:6.4f}  {report["steps"][h]["mae"]:6.4f}')


@series_errors
def predict(args: argparse.Namespace) -> None:
    import pandas as pd

    from vim2.forecasting import read_series
    common.at_least(args, 1, 'history')
    forecaster = open_forecaster(args.model)
    forecaster.model.to(common.check_device(args.device or common.default_device()))
    frame = forecaster.select(read_series(args.data, args.date_column), args.data)
    past = frame
    if args.after is not None:
        try:
            after = pd.Timestamp(args.after)
        except ValueError:
            raise UserError(f'--after {args.after!r} is no date') from None
        past = frame.loc[:after]
        if not len(past):
            raise UserError(f'--after {args.after} is before the first date, {frame.index[0]}')
    columns = args.plot_columns or forecaster.columns[:8]
    unknown = [c for c in columns if c not in forecaster.columns]
    if unknown:
        raise UserError(f'--plot-columns: no column {unknown[0]!r}; there are {", ".join(forecaster.columns)}')
    forecast = forecaster.predict(past, args.freq)
    write_csv(args.output, [frame.index.name or 'date', *forecast.columns],
              [[str(date), *row] for date, row in zip(forecast.index, forecast.to_numpy().tolist())])
    print(f'{len(forecast)} steps of {len(forecast.columns)} variates, {forecast.index[0]} to {forecast.index[-1]}: '
          f'{args.output}')
    truth = frame.loc[past.index[-1]:].iloc[1:len(forecast) + 1]
    both = truth.index.intersection(forecast.index)
    if len(both):
        error = (forecast.loc[both] - truth.loc[both]) / forecaster.scaler.std
        print(f'the truth is known for {len(both)} of them: MSE {error.pow(2).to_numpy().mean():.4f}, MAE '
              f'{error.abs().to_numpy().mean():.4f} in standardised units')
    if args.plot:
        plot(past.iloc[-(args.history or 2 * forecaster.horizon):], truth, forecast, columns, args.plot)
        print(f'plot: {args.plot}' + (f' (the first {len(columns)} of {len(forecast.columns)} variates; --plot-columns)'
                                      if len(columns) < len(forecast.columns) and not args.plot_columns else ''))


def plot(history, truth, forecast, columns: List[str], path: str) -> None:
    """One panel per variate: history, truth where it is known, forecast."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rows = math.ceil(len(columns) / 2) if len(columns) > 1 else 1
    figure = Figure(figsize=(13 if len(columns) > 1 else 9, 2.3 * rows + 0.9), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2 if len(columns) > 1 else 1, squeeze=False, sharex=True).ravel()
    for axis, column in zip(axes, columns):
        axis.plot(history.index, history[column], color='0.35', linewidth=1.1, label='history')
        if len(truth):
            # joined to the history, as the forecast is
            joined = [history[column].iloc[-1], *truth[column]]
            axis.plot([history.index[-1], *truth.index], joined, color='#1f77b4', linewidth=1.1, label='truth')
        axis.plot([history.index[-1], *forecast.index], [history[column].iloc[-1], *forecast[column]],
                  color='#d62728', linewidth=1.4, label='forecast')
        axis.axvline(history.index[-1], color='0.7', linewidth=0.8, linestyle='--')
        axis.set_title(column, fontsize=10, loc='left')
        axis.margins(x=0.01)
        locator = matplotlib.dates.AutoDateLocator(minticks=3, maxticks=7)
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(matplotlib.dates.ConciseDateFormatter(locator))
    for axis in axes[len(columns):]:
        axis.set_visible(False)
    for axis in axes[max(len(columns) - 2, 0):len(columns)]:  # also above an empty place
        axis.tick_params(labelbottom=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper right', ncols=3, frameon=False)
    try:
        common.write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=110, format=Path(path).suffix[1:] or 'png'))
    except (OSError, ValueError) as e:
        raise UserError(f'cannot write the plot {path}: {common.one_line(e)}') from None


# ----------------------------------------------------------------------------------------------------------- bench

def bench(args: argparse.Namespace) -> None:
    common.at_least(args, 1, 'lookback')
    recipe = read_recipe(args.config)
    datasets = args.datasets or list(recipe.get('datasets', {}))
    common.at_least(argparse.Namespace(horizons=min(args.horizons), seeds=None), 1, 'horizons')
    common.at_least(argparse.Namespace(seeds=min(args.seeds)), 0, 'seeds')
    folder = make_folder(args.output)
    device = common.check_device(args.device or common.default_device())
    results, series = [], {}
    # the first seed of everything first: a bench that is stopped early has a whole table
    runs = [(seed, horizon, dataset, model) for seed in args.seeds for horizon in args.horizons for dataset in datasets
            for model in args.models]
    for seed, horizon, dataset, model in common.progress(runs, desc='bench', unit='run', disable=args.no_progress):
        options, training = settings(args, dataset, model, horizon)
        path = folder / f'{model}-{dataset}-{horizon}-{seed}.json'
        run = dict(model=model, dataset=dataset, horizon=horizon, seed=seed, training=training,
                   options=options if MODELS[model] is not None else dict(lookback=options['lookback']))
        result = read_result(path, run)
        if result is None and not args.table_only:
            if dataset not in series:
                entry = recipe['datasets'][dataset]
                series[dataset] = open_series(str(Path(args.data_dir) / entry['file']), entry['split'])
            result = dict(run, **bench_run(series[dataset], run, options, device))
            common.write_text(path, json.dumps(result, indent=1) + '\n')
            print(f'{model} {dataset} {horizon} seed {seed}: test MSE {result["mse"]:.4f} over {result["windows"]:,} '
                  f'windows (best epoch {result["best_epoch"]} of {result["epochs"]}, '
                  f'{common.duration(result["seconds"])})', flush=True)
        if result is not None:
            results.append(result)
    if not results:
        raise UserError(f'{folder} holds no result of these runs')
    rows = table(results, recipe)
    common.write_text(folder / 'bench.json', json.dumps(rows, indent=1) + '\n')
    text = markdown(rows, args.models)
    common.write_text(folder / 'bench.md', text)
    print(text)


def read_result(path: Path, run: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise UserError(f'cannot read the result {path}: {common.one_line(e)}') from None
    changed = [k for k, v in json.loads(json.dumps(run)).items() if result.get(k) != v]
    if changed:
        raise UserError(f'{path} was made with another {", ".join(changed)}: remove it, or take another --output')
    return result


def bench_run(series: Series, run: Dict[str, Any], options: Dict[str, Any], device: torch.device) -> Dict[str, Any]:
    from vim2.forecasting import evaluate
    trainer = create_trainer(run['model'], series, run['horizon'], options, run['training'], run['seed'], device)
    trainer.fit(log=lambda text: None)
    errors = evaluate(trainer.model, open_windows(series, 'test', options['lookback'], run['horizon']), device=device)
    return dict(mse=errors.mse.mean().item(), mae=errors.mae.mean().item(), windows=errors.windows,
                val_mse=trainer.best_loss, best_epoch=trainer.best_epoch, epochs=trainer.epoch, seconds=trainer.seconds,
                parameters=common.count_parameters(trainer.model))


def table(results: List[Dict[str, Any]], recipe: Dict[str, Any]) -> List[Dict[str, Any]]:
    """One row per model, data set and horizon: mean and deviation over seeds, and the ratio to the paper's number."""
    groups: Dict[tuple, List[dict]] = {}
    for r in results:
        groups.setdefault((r['dataset'], r['horizon'], r['model']), []).append(r)
    rows = []
    for (dataset, horizon, model), group in groups.items():
        mse = [r['mse'] for r in group]
        paper = recipe['datasets'][dataset].get('paper', {}).get(horizon)
        rows.append(dict(
            dataset=dataset, horizon=horizon, model=model, seeds=[r['seed'] for r in group],
            mse=statistics.mean(mse), mse_std=statistics.stdev(mse) if len(mse) > 1 else None,
            mae=statistics.mean(r['mae'] for r in group), val_mse=statistics.mean(r['val_mse'] for r in group),
            windows=group[0]['windows'], parameters=group[0]['parameters'],
            seconds=statistics.mean(r['seconds'] for r in group), paper=paper,
            ratio=statistics.mean(mse) / paper if paper else None))
    order = {name: i for i, name in enumerate(recipe['datasets'])}
    return sorted(rows, key=lambda r: (order[r['dataset']], r['horizon'], list(MODELS).index(r['model'])))


def markdown(rows: List[Dict[str, Any]], models: List[str]) -> str:
    """The test MSE of each model in columns, mean ± deviation over seeds, and the first model over the paper."""
    first = models[0]
    cells = {(r['dataset'], r['horizon'], r['model']): r for r in rows}
    lines = ['| data | horizon | test windows | paper | ' + ' | '.join(models) + f' | {first} / paper |',
             '|---|---|---|---|' + '---|' * len(models) + '---|']
    ratios = []
    for dataset, horizon in dict.fromkeys((r['dataset'], r['horizon']) for r in rows):
        group = [cells.get((dataset, horizon, m)) for m in models]
        some = next(r for r in group if r)
        texts = ['–' if r is None else f'{r["mse"]:.4f}' + ('' if r['mse_std'] is None else f' ± {r["mse_std"]:.4f}')
                 for r in group]
        ratio = group[0]['ratio'] if group[0] else None
        if ratio is not None:
            ratios.append(ratio)
        lines.append(f'| {dataset} | {horizon} | {some["windows"]:,} | {some["paper"] or "–"} | ' + ' | '.join(texts) +
                     f' | {"–" if ratio is None else f"{ratio:.3f}"} |')
    if ratios:
        lines.append(f'\nMean ratio of {first} over {len(ratios)} cells {statistics.mean(ratios):.3f}, largest '
                     f'{max(ratios):.3f}; seeds {sorted({s for r in rows for s in r["seeds"]})}.')
    return '\n'.join(lines) + '\n'


def main() -> None:
    args = get_parser().parse_args()
    pandas_forecasting()
    dict(fit=fit, evaluate=evaluate_command, predict=predict, bench=bench)[args.command](args)


if __name__ == '__main__':
    common.run(main)
