"""The ablation of the paper's table: each part of MambaMixer taken away, on real images, with error bars.

    python tools/ablation.py --data-dir DIR --output output/ablation

trains every variant with every seed by tools/train.py, one after the other, and writes results.json, results.md and
results.png. Every finished run is kept: started again with the same options, it goes on where it was. Options that
follow -- are train.py's, such as -- --epochs 5, or -- --cuda-graph --amp on a GPU.
"""
import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Dict, List, Optional, Tuple

from safetensors.torch import load_file

import _common as common
from _common import UserError

TOOLS = Path(__file__).resolve().parent

# name: what it is, model arguments, further options of train.py
VARIANTS: Dict[str, Tuple[str, Dict[str, Any], List[str]]] = {
    'tokens': ('token mixers only', dict(channel_depths=0, weighted_average=False), []),
    'mlp': ('+ MLP channel mixing', dict(channel_mixer='mlp', weighted_average=False), []),
    'channels': ('+ selective channel mixer', dict(weighted_average=False), []),
    'full': ('+ weighted averaging: ViM2', {}, []),
    'grid2': ('token grid of 2 x 2 instead of 4 x 4', dict(token_grid=2), []),
    'grid8': ('token grid of 8 x 8', dict(token_grid=8), []),
    'no-own-value': ("without the step sizes' own-value term", {}, ['--freeze', '*.dt_projs_diag']),
    'scan1': ('one scan along the channels instead of two', dict(channel_scans=1), []),
}
PAPER = ('tokens', 'mlp', 'channels', 'full')


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], formatter_class=common.HelpFormatter)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder of train.npz')
    parser.add_argument('--output', default='output/ablation', metavar='DIR', help='runs and results')
    parser.add_argument('--config', default=str(TOOLS / 'recipes' / 'cifar10_ablation.yaml'), metavar='YAML',
                        help='recipe of every run')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='seeds of every variant')
    parser.add_argument('--variants', nargs='+', default=list(VARIANTS), choices=list(VARIANTS), metavar='NAME',
                        help=f'some of {", ".join(VARIANTS)}')
    return parser


def main() -> Optional[int]:
    argv, options = sys.argv[1:], []
    if '--' in argv:
        split = argv.index('--')
        argv, options = argv[:split], argv[split + 1:]
    args = get_parser().parse_args(argv)
    output = Path(args.output)
    path = output / 'results.json'
    results = dict(recipe=common.read_recipe(args.config), options=options, runs=[])
    if results['recipe'].get('val_interval') == 0:
        raise UserError(f'{args.config} has val_interval: 0, so nothing would be measured: leave it out')
    if path.exists():
        before = common.read_json(path)
        if any(before.get(k) != results[k] for k in ('recipe', 'options')):
            raise UserError(f'{path} is of another recipe or other options: choose another --output')
        results = before
    output.mkdir(parents=True, exist_ok=True)
    done = {(run['variant'], run['seed']) for run in results['runs']}
    for seed in args.seeds:  # all variants of one seed first: a table of fewer seeds is a table too
        for name in args.variants:
            if (name, seed) not in done:
                results['runs'].append(train(name, seed, results['recipe'], args, options))
                common.write_text(path, json.dumps(results, indent=1) + '\n')
    rows = summarize(results['runs'])
    text = table(rows)
    common.write_text(output / 'results.md', text)
    common.write_atomic(output / 'results.png', lambda tmp: plot(rows, tmp))
    print(text, end='')
    return 0


def model_kwargs(name: str, recipe: Dict[str, Any]) -> Dict[str, Any]:
    """The recipe's model arguments with a variant's."""
    return {**recipe.get('model_kwargs', {}), **VARIANTS[name][1]}


def train(name: str, seed: int, recipe: Dict[str, Any], args: argparse.Namespace, options: List[str]) -> Dict[str, Any]:
    """Train one variant with one seed, and say what it reached."""
    folder = Path(args.output) / f'{name}-{seed}'
    log = folder.with_suffix('.log')
    command = [sys.executable, str(TOOLS / 'train.py'), '--config', args.config, '--data-dir', args.data_dir,
               '--output', args.output, '--experiment', folder.name, '--resume', 'auto', '--seed', str(seed),
               '--no-progress', *VARIANTS[name][2], *options, '--model-kwargs',
               *(f'{k}={v}' for k, v in model_kwargs(name, recipe).items())]
    start = time.perf_counter()
    with open(log, 'a', encoding='utf-8') as f:
        code = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - start
    if code:
        raise UserError(f'{folder.name} ended with exit code {code}, see {log}')
    with open(folder / 'summary.csv', newline='', encoding='utf-8') as f:
        top1 = float(list(csv.DictReader(f))[-1]['eval_top1'])
    weights = load_file(folder / 'model' / 'model.safetensors')
    print(f'{folder.name}: top-1 {top1:.2f} % in {common.duration(seconds)}', flush=True)
    return dict(variant=name, seed=seed, top1=top1, seconds=seconds,
                parameters=sum(w.numel() for k, w in weights.items() if 'running_' not in k and 'num_batches' not in k))


def summarize(runs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """One row a variant: mean and deviation over its seeds, and of its difference from the full model, seed by seed."""
    full = {run['seed']: run for run in runs if run['variant'] == 'full'}
    rows = []
    for name, (what, _, _) in VARIANTS.items():
        own = [run for run in runs if run['variant'] == name]
        if own:
            top1 = [run['top1'] for run in own]
            pairs = [(run, full[run['seed']]) for run in own if run['seed'] in full]
            differences = [run['top1'] - other['top1'] for run, other in pairs]
            rows.append(dict(
                variant=name, what=what, seeds=len(own), parameters=own[0]['parameters'], top1=mean(top1),
                deviation=stdev(top1) if len(own) > 1 else None,
                difference=mean(differences) if pairs else None,
                difference_deviation=stdev(differences) if len(pairs) > 1 else None,
                time=median(run['seconds'] / other['seconds'] for run, other in pairs) if pairs else None))
    return rows


def table(rows: List[Dict[str, Any]]) -> str:
    """The rows in Markdown."""
    def pm(value: Optional[float], deviation: Optional[float], sign: str = '') -> str:
        if value is None:
            return '-'
        return f'{value:{sign}.2f}' + ('' if deviation is None else f' ± {deviation:.2f}')

    lines = ['| variant | seeds | parameters | top-1, % | difference from ViM2 | time over ViM2\'s |',
             '|---|---|---|---|---|---|']
    for r in rows:
        difference = '' if r['variant'] == 'full' else pm(r['difference'], r['difference_deviation'], '+')
        time_ratio = '-' if r['time'] is None else f"{r['time']:.2f}"
        lines.append(f"| {r['what']} | {r['seeds']} | {r['parameters'] / 1e6:.2f} M | "
                     f"{pm(r['top1'], r['deviation'])} | {difference} | {time_ratio} |")
    return '\n'.join(lines) + '\n'


def plot(rows: List[Dict[str, Any]], path: str) -> None:
    """Top-1 of every variant with its deviation, as a picture."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 0.4 * len(rows) + 1.2), layout='constrained')
    axes = figure.subplots()
    y = range(len(rows))[::-1]
    for place, r in zip(y, rows):
        color = 'tab:blue' if r['variant'] in PAPER else 'tab:gray'
        axes.errorbar(r['top1'], place, xerr=r['deviation'] or 0, fmt='o', color=color, capsize=4)
    axes.grid(axis='x', alpha=0.3)
    axes.set_yticks(y, [r['what'] for r in rows])
    axes.set_xlabel('top-1, %: mean and standard deviation over seeds')
    figure.savefig(path, format='png', dpi=120)


if __name__ == '__main__':
    common.run(main)
