"""Model cards that tools/push_to_hub.py writes: metadata for the Hub, text for people."""
import argparse
import re
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import _common as common
from _sources import LOGGED, Source, is_ours

_PAPER = '[MambaMixer](https://arxiv.org/abs/2403.19888)'
_CITATION = '''@article{behrouz2024mambamixer,
  title   = {MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection},
  author  = {Behrouz, Ali and Santacatterina, Michele and Zabih, Ramin},
  journal = {arXiv preprint arXiv:2403.19888},
  year    = {2024}
}'''


def data_name(args: argparse.Namespace, source: Source) -> Optional[str]:
    """What to call the data: as the user says, or as the name of the data set says."""
    if args.data_name or source.data:
        return args.data_name or source.data
    for name in (source.training.get('dataset'), args.dataset):
        if name and '/' in name:
            return name.partition('/')[2]  # torch/cifar10, hfds/USER/NAME
    return None  # npz files and folders have no name


def make_card(args: argparse.Namespace, source: Source, folder: Path, result: Optional[Dict[str, Any]]) -> str:
    """README.md: the metadata that the Hub reads, and text for people."""
    from huggingface_hub import EvalResult, ModelCardData
    name, trained_on, ours = args.repo.partition('/')[2], data_name(args, source), is_ours(source.architecture)
    results = [EvalResult(task_type=source.task, dataset_type=_slug(trained_on), dataset_name=trained_on,
                          dataset_split=result['split'], metric_type=kind, metric_name=label,
                          metric_value=round(result[key] * scale, 6))
               for kind, label, key, scale in _METRICS[source.task]] if result else None
    library = 'timm' if source.forecaster is None else 'vim2'
    tags = [source.task, library, *(['vim2', 'mambamixer', 'state-space-model'] if ours else [])]
    metadata = ModelCardData(
        license=args.license, library_name=library, pipeline_tag=source.task, tags=list(dict.fromkeys(tags)),
        model_name=name if results else None, eval_results=results,
        base_model=source.base_model.removeprefix('hf-hub:').partition('@')[0]
        if source.base_model and source.base_model.startswith('hf-hub:') else None,
        datasets=[trained_on] if trained_on and _slug(trained_on) == trained_on else None)
    lines = [f'# {name}', '', _introduction(source, trained_on), '', '## Model', '',
             *(f'- **{k}:** {v}' for k, v in _facts(args, source)),
             '', '## Results', '', *_results(args, source, trained_on, result),
             '', '## Use', '', *_usage(args, source, ours), '', '## Training', '']
    if trained_on:
        lines.append(f'Trained on {trained_on}.')
    lines += [' '.join(source.notes)] if source.notes else []
    if source.command:
        lines += ['', '```bash', source.command, '```']
    elif not source.notes:
        lines.append('The checkpoint does not say how it was trained.')
    lines += ['', '## Files', '', '| file | bytes | SHA-256 |', '|---|---|---|']
    lines += [f'| `{f.name}` | {f.stat().st_size:,} | `{sha256(f)}` |' for f in sorted(folder.iterdir())
              if f.name != 'README.md']
    if ours:
        lines += ['', '## Citation', '', '```bibtex', _CITATION, '```']
    return f'---\n{metadata.to_yaml()}\n---\n\n' + '\n'.join(lines) + '\n'


# For the Hub: its name of a metric, how it is shown, its key in the result, and a factor.
_METRICS = {
    'image-classification': (
        ('accuracy', 'top-1 accuracy', 'top1', 0.01), ('accuracy', 'top-5 accuracy', 'top5', 0.01)),
    'time-series-forecasting': (('mse', 'mean squared error', 'mse', 1), ('mae', 'mean absolute error', 'mae', 1)),
}


def _facts(args: argparse.Namespace, source: Source) -> List[Tuple[str, str]]:
    model = source.model
    rows = [('Architecture', f'`{source.architecture}`'),
            *([('Fine-tuned from', f'`{source.base_model.removeprefix("hf-hub:")}`')] if source.base_model else []),
            ('Parameters', f'{common.count_parameters(model) / 1e6:.2f} M')]
    if source.forecaster is not None:
        columns = source.forecaster.get('columns')
        rows += [('Look-back', f'{model.lookback} steps'), ('Horizon', f'{model.horizon} steps'),
                 ('Variates', f'{model.num_variates}' + (f': {_listed(columns)}' if columns else ''))]
        if source.forecaster.get('freq'):
            rows.append(('Step', f'`{source.forecaster["freq"]}`'))
    else:
        config = model.pretrained_cfg
        channels, *size = config['input_size']
        rows.append(('Image size', f'{"x".join(map(str, size))}, {channels} channels'))
        if model.num_classes:
            names = source.label_names
            rows.append(('Classes', f'{model.num_classes}' + (f': {_listed(names)}' if names else '')))
        rows.append(('Preprocessing', f'mean {_numbers(config["mean"])}, std {_numbers(config["std"])}, '
                     f'{config["interpolation"]}, crop {config["crop_pct"]:g}'))
    return [*rows, ('Licence', args.license)]


def sha256(path: Path) -> str:
    from vim2.pretrained import sha256
    return sha256(path)


def _slug(name: str) -> str:
    """As the Hub names data sets."""
    return re.sub(r'[^\w./-]+', '-', name).lower()


def _numbers(values) -> str:
    return '(' + ', '.join(f'{v:g}' for v in values) + ')'


def _listed(names: List[str], most: int = 10) -> str:
    return ', '.join(map(str, names[:most])) + (', …' if len(names) > most else '')


def _introduction(source: Source, trained_on: Optional[str]) -> str:
    on = f', trained on {trained_on}.' if trained_on else '.'
    if source.forecaster is not None:
        return f'A TSM2 forecaster, the time series model of {_PAPER}{on}'
    what = 'image classifier' if source.task == 'image-classification' else 'image backbone'
    kind = f'A ViM2 {what}, the vision model of {_PAPER},' if is_ours(source.architecture) else \
        f'A `{source.architecture}` {what}'
    return f'{kind} for [timm](https://github.com/huggingface/pytorch-image-models){on}'


def _results(args: argparse.Namespace, source: Source, trained_on: Optional[str],
             result: Optional[Dict[str, Any]]) -> List[str]:
    if source.results:
        names, values = [LOGGED[k][0] for k in source.results], [f'{v:.2f}' for v in source.results.values()]
        return [f'| data | {" | ".join(names)} |', '|---|' + '---|' * len(names),
                f'| {trained_on or "its own"}, validation | {" | ".join(values)} |', '',
                'In percent, of the whole detector or segmenter, as its training logged them; nothing was measured '
                'when this card was written.']
    if result is None:
        return ['No metric was measured when this card was written.']
    if source.forecaster is not None:
        return ['| data | part | windows | horizon | MSE | MAE |', '|---|---|---|---|---|---|',
                f'| {trained_on} | {result["part"]} | {result["windows"]:,} | {result["horizon"]} | '
                f'{result["mse"]:.4f} | {result["mae"]:.4f} |', '', 'In standardised units. Measured with the files of '
                'this repository when the card was written, by `tools/forecast.py evaluate`.']
    height, width = result['img_size']
    words = ['python', 'tools/validate.py', '--model', f'hf-hub:{args.repo}']
    words += ['--dataset', args.dataset] if args.dataset else []
    words += ['--data-dir', 'DATA', '--split', args.split]
    words += ['--amp', '--amp-dtype', args.amp_dtype] if args.amp else []
    return ['| data | images | size | top-1 | top-5 | loss |', '|---|---|---|---|---|---|',
            f'| {trained_on}, split `{result["split"]}` | {result["count"]:,} | {height}x{width} | '
            f'{result["top1"]:.2f} % | {result["top5"]:.2f} % | {result["loss"]:.4f} |', '',
            f'Measured with the files of this repository when the card was written, in {result["precision"]}:', '',
            '```bash', shlex.join(words), '```']


def _usage(args: argparse.Namespace, source: Source, ours: bool) -> List[str]:
    """Code that runs as it stands."""
    repo = args.repo + (f'@{args.revision}' if args.revision and not args.create_pr else '')
    model = source.model
    if source.forecaster is not None:
        M = model.num_variates
        extra = ''.join(f', {name}=torch.randn({", ".join(map(str, shape))})' for name, size, shape in (
            ('static', model.static_dim, (1, M, model.static_dim)),
            ('future', model.future_dim, (1, M, model.future_len, model.future_dim)),
            ('past', model.past_dim, (1, M, model.lookback, model.past_dim))) if size)
        return ['```python', 'import torch, vim2', '', f"model = vim2.hub.load('{repo}')",
                f'x = torch.randn(1, {model.lookback}, {model.num_variates})  # (batch, look-back, variates), '
                'standardised', 'with torch.inference_mode():', f'    forecast = model(x{extra})',
                'print(tuple(forecast.shape))  # (batch, horizon, variates)', '```']
    imports = 'import timm, torch, vim2  # vim2 registers the architecture with timm' if ours else 'import timm, torch'
    if source.task != 'image-classification':
        size = ', '.join(map(str, model.pretrained_cfg['input_size']))
        return ['```python', imports, '', f"backbone = timm.create_model('hf-hub:{repo}', pretrained=True, "
                'features_only=True).eval()', f'for x in backbone(torch.randn(1, {size})):',
                '    print(tuple(x.shape))', '```']
    names = "model.pretrained_cfg['label_names'][i]" if source.label_names else 'int(i)'
    mode = {1: 'L', 3: 'RGB'}.get(model.pretrained_cfg['input_size'][0], 'RGB')
    return ['```python', imports, 'from PIL import Image', '',
            f"model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()",
            'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)',
            f"image = Image.open('photo.jpg').convert('{mode}')",
            'with torch.inference_mode():',
            '    probabilities = model(transform(image).unsqueeze(0)).softmax(-1)[0]',
            f'for p, i in zip(*probabilities.topk({min(5, model.num_classes)})):',
            f"    print({names}, f'{{p:.1%}}')", '```']
