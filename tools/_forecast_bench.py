"""The benchmark of forecast.py: TSM2 and DLinear on the recipe's data sets, against the paper's numbers."""
import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

import _common as common
from _common import UserError

__all__ = ['MODELS', 'RECIPE', 'bench', 'bench_options', 'bench_run', 'read_recipe']

RECIPE = Path(__file__).parent / 'recipes' / 'forecast.yaml'
# What bench can train, as changes of the model; DLinear is the baseline.
MODELS: Dict[str, Optional[Dict[str, Any]]] = dict(
    tsm2={}, tsm2_mlp=dict(variate_mixer='mlp'), tsm2_plain=dict(weighted_average=False), dlinear=None)


def read_recipe(path: str) -> Dict[str, Any]:
    recipe = common.read_recipe(path)
    unknown = set(recipe) - {'datasets', 'dlinear'}
    if unknown:
        raise UserError(f'{path}: unknown section {sorted(unknown)[0]!r} (known: datasets, dlinear)')
    for name, entry in recipe.get('datasets', {}).items():
        unknown = set(entry) - {'file', 'split', 'paper', 'dlinear'}
        if unknown:
            raise UserError(f'{path}: {name}: unknown entry {sorted(unknown)[0]!r}')
    return recipe


def bench(args, folder: Path, options: Dict[str, Any], training: Dict[str, Any], device: torch.device) -> None:
    """Train what has no result yet, and write the table.

    Args:
        args: forecast.py's, of `bench`.
        folder: of the results.
        options, training: of TSM2 and of training, as given; the rest is as ever.
        device: where to train.
    """
    from vim2.forecasting import Panel, read_series
    recipe = read_recipe(args.config)
    datasets = args.datasets or list(recipe.get('datasets', {}))
    for name in datasets:
        if name not in recipe.get('datasets', {}):
            raise UserError(f'{args.config} has no data set {name!r}: it has {", ".join(recipe.get("datasets", {}))}')
    results, panels = [], {}
    # the first seed of everything first: a bench that is stopped early has a whole table
    runs = [(seed, horizon, dataset, model) for seed in args.seeds for horizon in args.horizons for dataset in datasets
            for model in args.models]
    for seed, horizon, dataset, model in common.progress(runs, desc='bench', unit='run', disable=args.no_progress):
        entry = recipe['datasets'][dataset]
        entry = {**entry, 'dlinear': {**(recipe.get('dlinear') or {}), **(entry.get('dlinear') or {})}}
        path = folder / f'{model}-{dataset}-{horizon}-{seed}.json'
        run = bench_options(entry, model, dataset, horizon, seed, options, training, args.lookback)
        result = read_result(path, run)
        if result is None and not args.table_only:
            if dataset not in panels:
                file = str(Path(args.data_dir) / entry['file'])
                panels[dataset] = Panel.from_frame(read_series(file), name=file, file=True)
            result = dict(run, **bench_run(panels[dataset], run, device))
            common.write_text(path, json.dumps(result, indent=1) + '\n')
            print(f'{model} {dataset} {horizon} seed {seed}: test MSE {result["mse"]:.4f} (last value '
                  f'{result["last"]["mse"]:.4f}) over {result["windows"]:,} windows (best epoch {result["best_epoch"]} '
                  f'of {result["epochs"]}, {common.duration(result["seconds"])})', flush=True)
        if result is not None:
            results.append(result)
    if not results:
        raise UserError(f'{folder} holds no result of these runs')
    rows = table(results, recipe)
    common.write_text(folder / 'bench.json', json.dumps(rows, indent=1) + '\n')
    text = markdown(rows, args.models)
    common.write_text(folder / 'bench.md', text)
    print(text)


def bench_options(entry: Dict[str, Any], model: str, dataset: str, horizon: int, seed: int, options: Dict[str, Any],
                  training: Dict[str, Any], lookback: Optional[int] = None) -> Dict[str, Any]:
    """One run, as its result names it: TSM2 has one configuration, DLinear what its authors took for the data set."""
    from vim2.forecasting.training import MODEL, training_options
    if MODELS[model] is None:
        theirs = {k: v[horizon] if isinstance(v, dict) else v for k, v in entry['dlinear'].items()}
        own = theirs.pop('lookback', 336)
        lookback = lookback or own
        options, training = {}, {**theirs, **training}
    else:
        options = {**MODEL, **options, **MODELS[model]}
    # the defaults, too: a result of others is none of this run
    return dict(model=model, dataset=dataset, horizon=horizon, seed=seed, lookback=lookback or 512,
                split=entry['split'], options=options, training=training_options(training))


def read_result(path: Path, run: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    if not path.exists():
        return None
    result = common.read_object(path)
    changed = [k for k, v in json.loads(json.dumps(run)).items() if result.get(k) != v]
    if changed:
        raise UserError(f'{path} was made with another {", ".join(changed)}: remove it, or take another --output')
    odd = [n for n in ('val_mse', 'windows', 'parameters', 'seconds') if not _is_number(result.get(n))]
    for name, errors in (('', result), ('last', result.get('last')), ('seasonal', result.get('seasonal'))):
        for n in ('mse', 'mae', 'own_mse', 'own_mae', 'mase'):
            if not isinstance(errors, dict) or not _is_number(errors.get(n)) and not (
                    n == 'mase' and errors.get(n, 0) is None):  # of a series that stood still in the training part
                odd.append(f'{name}.{n}' if name else n)
    if odd:
        raise UserError(f'{path} is no result of bench: it has no number {", ".join(odd)}; remove it')
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def bench_run(panel, run: Dict[str, Any], device: torch.device) -> Dict[str, Any]:
    from vim2.forecasting import DLinear, evaluate
    from vim2.forecasting.metrics import naive_scale
    from vim2.forecasting.preparation import create_model, masked, prepare
    from vim2.forecasting.training import Trainer
    setup = prepare(panel, run['horizon'], run['lookback'], split=run['split'], model=run['options'],
                    training=run['training'])
    if MODELS[run['model']] is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run['seed'])
            network = DLinear(len(panel.variates), run['lookback'], run['horizon'])
    else:
        network = create_model(setup.options, run['seed'])
    trainer = Trainer(network, setup.windows['train'], setup.windows['val'], setup.training, run['seed'], device)
    trainer.fit()
    test = setup.windows['test']
    scale = naive_scale(masked(setup.panel, setup.parts['train']), setup.season)
    errors = {kind: evaluate(which, test, device=device, scale=scale).summary()
              for kind, which in (('model', trainer.model), ('last', 'last'), ('seasonal', 'seasonal'))}
    return dict(errors.pop('model'), **errors, windows=len(test), center=setup.options['center'],
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
            **{n: statistics.mean(r[n] for r in group) for n in ('mae', 'own_mse', 'own_mae', 'val_mse')},
            mase=None if group[0]['mase'] is None else statistics.mean(r['mase'] for r in group),
            last=group[0]['last'], seasonal=group[0]['seasonal'], windows=group[0]['windows'],
            parameters=group[0]['parameters'], seconds=statistics.mean(r['seconds'] for r in group), paper=paper,
            ratio=statistics.mean(mse) / paper if paper else None))
    order = {name: i for i, name in enumerate(recipe['datasets'])}
    return sorted(rows, key=lambda r: (order[r['dataset']], r['horizon'], list(MODELS).index(r['model'])))


def markdown(rows: List[Dict[str, Any]], models: List[str]) -> str:
    """The test MSE of each model in columns, mean ± deviation over seeds, and the first model over the paper."""
    first = models[0]
    cells = {(r['dataset'], r['horizon'], r['model']): r for r in rows}
    lines = ['| data | horizon | test windows | last value | seasonal naive | paper | ' + ' | '.join(models) +
             f' | {first} / paper |', '|---|---|---|---|---|---|' + '---|' * len(models) + '---|']
    ratios = []
    for dataset, horizon in dict.fromkeys((r['dataset'], r['horizon']) for r in rows):
        group = [cells.get((dataset, horizon, m)) for m in models]
        some = next(r for r in group if r)
        texts = ['–' if r is None else f'{r["mse"]:.4f}' + ('' if r['mse_std'] is None else f' ± {r["mse_std"]:.4f}')
                 for r in group]
        ratio = group[0]['ratio'] if group[0] else None
        if ratio is not None:
            ratios.append(ratio)
        lines.append(f'| {dataset} | {horizon} | {some["windows"]:,} | {some["last"]["mse"]:.4f} | '
                     f'{some["seasonal"]["mse"]:.4f} | {some["paper"] or "–"} | ' + ' | '.join(texts) +
                     f' | {"–" if ratio is None else f"{ratio:.3f}"} |')
    if ratios:
        lines.append(f'\nMean ratio of {first} over {len(ratios)} cells {statistics.mean(ratios):.3f}, largest '
                     f'{max(ratios):.3f}; seeds {sorted({s for r in rows for s in r["seeds"]})}.')
    lines += [f'\n{m} loses to {what} in: {", ".join(cells_)}.' for m in models
              for what, cells_ in losses(rows, m).items()]
    return '\n'.join(lines) + '\n'


def losses(rows: List[Dict[str, Any]], model: str) -> Dict[str, List[str]]:
    """The cells where a naive forecast has the smaller MSE, for each of them that wins any."""
    out = {}
    for kind, what in (('last', 'repeating the last value'), ('seasonal', 'the seasonal naive forecast')):
        cells = [f'{r["dataset"]} {r["horizon"]} ({r["mse"]:.4f} against {r[kind]["mse"]:.4f})' for r in rows
                 if r['model'] == model and r[kind]['mse'] < r['mse']]
        if cells:
            out[what] = cells
    return out
