#!/usr/bin/env python
"""Publish a trained model on the Hugging Face Hub: safetensors, config.json and a model card with measured results.

    python tools/push_to_hub.py output/train/RUN --repo ORG/NAME --dry-run
    python tools/push_to_hub.py output/train/RUN --repo ORG/NAME --dataset npz --data-dir DIR --split test
    python tools/push_to_hub.py RUN/best.pth.tar --repo ORG/NAME --private --create-pr
    python tools/push_to_hub.py output/forecast/RUN --repo ORG/NAME --series ETTh1.csv --data-name ETTh1
    python tools/push_to_hub.py work_dirs/RUN/epoch_12.pth --repo ORG/NAME

CHECKPOINT is a run folder or a .pth.tar file of tools/train.py, a run folder of tools/forecast.py, a checkpoint of
MMDetection or MMSegmentation (the backbone is taken out of it), a folder with config.json and
model.safetensors, or, with --model, any file of a timm model's weights. Results in the card are measured when it is
written, by the code of tools/validate.py or tools/forecast.py on the data that the options name; without data the card
says that nothing was measured. Nothing is pushed unless the written folder gives, loaded anew, bit for bit what the
checkpoint gives.
"""
import argparse
import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch

import _common as common
import _data as data
import _datasets as datasets
import train as training
import validate as validation
from _common import UserError

_PAPER = '[MambaMixer](https://arxiv.org/abs/2403.19888)'
_CITATION = '''@article{behrouz2024mambamixer,
  title   = {MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection},
  author  = {Behrouz, Ali and Santacatterina, Michele and Zabih, Ramin},
  journal = {arXiv preprint arXiv:2403.19888},
  year    = {2024}
}'''
# Options of training that say where something is, or how fast, but not what is computed.
_NOT_IN_COMMAND = {'config', 'resume', 'resume_with_changes', 'output', 'experiment', 'workers', 'pin_memory', 'device',
                   'cache_images', 'log_interval', 'no_progress', 'dist_backend', 'dist_url',
                   'checkpoint_interval_steps', 'val_batch_size', 'dataset_download', 'torchcompile', 'tensorboard',
                   'wandb'}


@dataclass
class Source:
    """A model with a checkpoint's weights, and what is known about them."""
    model: torch.nn.Module
    label_names: Optional[List[str]] = None
    command: Optional[str] = None  # what trained it
    training: Dict[str, Any] = field(default_factory=dict)  # its options
    notes: List[str] = field(default_factory=list)  # sentences for the card
    forecaster: Optional[Dict[str, Any]] = None  # of a TSM2: forecaster.json, {} without one
    data: Optional[str] = None  # the name of the data, where the checkpoint tells it
    base_model: Optional[str] = None  # what it was fine-tuned from: of the Hub, or a name of timm
    results: Dict[str, float] = field(default_factory=dict)  # what its own evaluation measured, in percent

    @property
    def architecture(self) -> str:
        return 'tsm2' if self.forecaster is not None else self.model.pretrained_cfg['architecture']

    @property
    def task(self) -> str:
        """The Hub's name of what the model does."""
        if self.forecaster is not None:
            return 'time-series-forecasting'
        return 'image-classification' if self.model.num_classes > 0 else 'image-feature-extraction'


# -------------------------------------------------------------------------------------------------- reading checkpoints

def read_source(args: argparse.Namespace) -> Source:
    """The model that CHECKPOINT holds, whatever wrote it."""
    path = Path(args.checkpoint)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f'checkpoint {path} does not exist')
    if path.suffix != '.safetensors':
        checkpoint = read_pickle(path)
        if 'progress' in checkpoint and 'args' in checkpoint and 'arch' in checkpoint:
            return _read_training(path, checkpoint, use_ema=not args.no_ema)
        state = checkpoint.get('state_dict')
        if isinstance(state, dict) and all(isinstance(k, str) for k in state) and any(
                k.startswith('backbone.net.') for k in state):
            return _read_openmmlab(path, checkpoint, args)
    if not args.model:
        raise UserError(f'{path} does not say of which model its weights are: pass --model NAME')
    state = common.read_checkpoint(str(path), use_ema=not args.no_ema)
    model = _model_for(args.model, state, path, **args.model_kwargs)
    return Source(model)


def read_pickle(path: Path) -> dict:
    """A checkpoint, read with weights_only=True: nothing in the file is executed."""
    from vim2 import pretrained
    try:
        checkpoint = pretrained.read_torch(path)
    except (RuntimeError, OSError) as e:
        raise UserError(f'cannot read the checkpoint: {common.one_line(e)}') from None
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} holds a {type(checkpoint).__name__}, no checkpoint')
    return checkpoint


def _model_for(name: str, state: Dict[str, torch.Tensor], path: Path, **kwargs) -> torch.nn.Module:
    """The model `name` with these weights; as many classes as they have."""
    probe = common.create_model(name, **kwargs)
    head = probe.pretrained_cfg.get('classifier')
    weight = state.get(f'{head}.weight') if isinstance(head, str) else None
    num_classes = 0 if weight is None else len(weight)
    model = probe if num_classes == probe.num_classes else common.create_model(
        name, **{**kwargs, 'num_classes': num_classes})
    common.load_state(model, state, str(path), name)
    # the names of the architecture's published classes are not those of these weights
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in ('label_names', 'file', 'tag')}
    return model.eval()


def _read_training(path: Path, checkpoint: dict, use_ema: bool) -> Source:
    """A .pth.tar of tools/train.py."""
    training.check_training_state(checkpoint, str(path))
    options = training.checked_options(checkpoint['args'], str(path))
    averaged = use_ema and 'state_dict_ema' in checkpoint
    state = checkpoint['state_dict_ema' if averaged else 'state_dict']
    kwargs = dict(options.get('model_kwargs') or {})
    if options.get('in_chans') is not None:
        kwargs['in_chans'] = options['in_chans']
    model = _model_for(checkpoint['arch'], state, path, **kwargs)
    config = common.data_config(argparse.Namespace(**options), model)
    kept = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
    model.pretrained_cfg.update({k: config[k] for k in kept}, num_classes=model.num_classes)
    names = checkpoint.get('label_names')
    epochs = checkpoint['progress']['epoch']
    notes = [f'{epochs} of {options["epochs"]} epochs' + (', moving average of the weights.' if averaged else '.')]
    return Source(model, names if names and len(names) == model.num_classes else None, training_command(options),
                  options, notes)


def _read_folder(folder: Path) -> Source:
    """A run folder of tools/train.py, or a folder that timm loads."""
    if (folder / 'model' / 'config.json').is_file():
        folder = folder / 'model'
    if not (folder / 'config.json').is_file():
        states = [f.name for f in (folder / 'last.pth.tar', folder / 'best.pth.tar') if f.is_file()]
        raise UserError(f'{folder} has no config.json' + (f': the run has not ended; pass {folder / states[0]}'
                                                          if states else ', and no model/ with one'))
    model = load_folder(folder)
    if not hasattr(model, 'pretrained_cfg'):
        return _read_forecaster(folder, model)
    options = {}
    if folder.name == 'model' and (folder.parent / 'args.yaml').is_file():
        path = str(folder.parent / 'args.yaml')
        options = training.checked_options(common.read_recipe(path), path)
    notes = []
    if options:
        notes = [f'{options["epochs"]} epochs' + (', moving average of the weights.' if options.get('model_ema')
                                                   else '.')]
    common.data_config(argparse.Namespace(img_size=None), model)  # which the card shows
    names = common.class_names(model)
    notes += [f'{n[0].upper()}{n[1:].rstrip(".")}.' for n in model.pretrained_cfg.get('notes') or ()]
    return Source(model, names, training_command(options) if options else None, options, notes)


def _read_forecaster(folder: Path, model: torch.nn.Module) -> Source:
    """A TSM2, with what tools/forecast.py knows about its series."""
    path = folder / 'forecaster.json'
    state = common.read_json(path) if path.is_file() else {}
    notes = []
    try:
        info = state.get('info') or {}
        if info.get('training'):
            notes = ['Trained by `tools/forecast.py fit` with split `{split}`, seed {seed}; best epoch {epoch} by the '
                     'validation loss.'.format(**info),
                     'Options: ' + ', '.join(f'{k} {v}' for k, v in info['training'].items()) + '.']
        columns = state.get('columns')
        if columns is not None:
            common.check_names(columns, f'{path}: columns')
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f'{path} is not as tools/forecast.py writes it: {type(e).__name__}: '
                        f'{common.one_line(e)}') from None
    return Source(model, notes=notes, forecaster=state)


def load_folder(folder: Path) -> torch.nn.Module:
    """The model of a folder, in evaluation mode, as users load it."""
    import vim2
    config = common.read_json(folder / 'config.json')
    try:
        if _is_other_timm(config):
            return common.create_model(f'local-dir:{folder}', pretrained=True).eval()
        with contextlib.redirect_stdout(sys.stderr):  # huggingface_hub prints
            return vim2.hub.load(folder)
    except (RuntimeError, ValueError, OSError, TypeError, KeyError, AttributeError, AssertionError) as e:
        raise UserError(f'{folder} cannot be loaded: {common.one_line(e)}') from None


def _is_other_timm(config: dict) -> bool:
    """A model of timm's own, which tools/train.py trains as well."""
    import timm

    from vim2.models import model_names
    name = config.get('architecture', '') if isinstance(config, dict) else ''
    return timm.is_model(name) and name not in model_names()


def _read_openmmlab(path: Path, checkpoint: dict, args: argparse.Namespace) -> Source:
    """The backbone of a detector or segmenter, as a model without classifier."""
    prefix = 'backbone.net.'
    state = {k[len(prefix):]: v for k, v in checkpoint['state_dict'].items() if k.startswith(prefix)}
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    text = meta['cfg'] if isinstance(meta.get('cfg'), str) else ''
    config = read_config(text)
    name, kwargs = backbone_of(config)
    if args.model and name and args.model.partition('.')[0] != name:
        raise UserError(f'{path} was trained with {name}, not {args.model}')
    name = args.model or name
    if not name:
        raise UserError(f'{path} does not say which model its backbone is: pass --model NAME')
    name = name.partition('.')[0]
    kwargs = {**kwargs, **args.model_kwargs, 'num_classes': 0}
    model = common.create_model(name, **kwargs)
    part = 'blocks' if hasattr(model, 'blocks') else 'stages'
    if not _is_ours(name):
        raise UserError(f'{path} holds the backbone of an OpenMMLab model, which {name} is not')
    given = {k.split('.')[1] for k in state if k.startswith(f'{part}.')}
    if len(given) < len(getattr(model, part)):
        raise UserError(f'{path} holds {len(given)} of the {len(getattr(model, part))} {part} of {name}: its '
                        'out_indices left out the last ones, so it is no whole backbone')
    common.load_state(model, state, str(path), name)
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in ('label_names', 'file', 'tag')}
    model.pretrained_cfg.update(preprocessing_of(config, model.pretrained_cfg['input_size'], path))
    common.data_config(argparse.Namespace(img_size=None), model)  # refuses what is none
    how = f'The backbone of a model trained with {framework_of(config)}'
    length = [(meta[key], unit) for key, unit in (('epoch', 'epochs'), ('iter', 'iterations'))
              if type(meta.get(key)) is int and meta[key] > 0]
    how += f', {length[0][0]:,} {length[0][1]}' if length else ''
    base = _get(config, 'model', 'backbone', 'init_cfg', 'checkpoint')
    local = isinstance(base, str) and not base.startswith(('hf-hub:', 'hf_hub:')) and (
        base.startswith('local-dir:') or os.sep in base or _get(config, 'model', 'backbone', 'init_cfg', 'prefix'))
    if isinstance(base, str):
        shown = os.path.basename(base.removeprefix('local-dir:').rstrip('/')) if local else base
        how += f', from `{shown.removeprefix("hf-hub:")}`'
    notes = [how + '.', 'It has no classifier; the final norm after the last stage was not trained (detectors and '
             'segmenters have norms of their own).']
    return Source(model.eval(), notes=notes, data=data_of(config), base_model=None if local else base,
                  results=logged_results(path, [n for n, _ in length]))


def read_config(text: str) -> Dict[str, Any]:
    """The assignments of an OpenMMLab configuration, as mmengine writes it; it is parsed, never run."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return {node.targets[0].id: _value(node.value) for node in body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}


def _value(node: ast.AST) -> Any:
    """The value of an expression of literals, lists and `dict(a=1)`; None for everything else."""
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
        return {k.arg: _value(k.value) for k in node.keywords if k.arg}
    if isinstance(node, ast.Dict):
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values)
                if isinstance(k, ast.Constant)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(v) for v in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return None


def _get(config: Any, *keys: str) -> Any:
    """A value in nested dicts, None where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def backbone_of(config: Dict[str, Any]) -> Tuple[Optional[str], Dict[str, Any]]:
    """Name and arguments of the backbone of this package in an OpenMMLab configuration."""
    backbone = _get(config, 'model', 'backbone')
    if str(_get(backbone, 'type')).rpartition('.')[2] not in ('ViM2', 'MambaBackbone'):
        return None, {}
    kwargs = dict(_get(backbone, 'model_kwargs') or {})
    if backbone.get('in_channels', 3) != 3:
        kwargs['in_chans'] = backbone['in_channels']
    return str(backbone.get('model_name') or 'vim2_tiny').partition('.')[0], kwargs


def preprocessing_of(config: Dict[str, Any], input_size: Any, path: Path) -> Dict[str, Any]:
    """timm's mean, std, size of what the network was trained on: the configuration's data_preprocessor."""
    found = _get(config, 'model', 'data_preprocessor') or _get(config, 'data_preprocessor')
    if not isinstance(found, dict):
        if config:
            raise UserError(f'{path}: its configuration has no data_preprocessor, which says what the images are')
        return {}
    channels, size = input_size[0], found.get('size')
    if channels == 3 and not found.get('bgr_to_rgb') and not found.get('rgb_to_bgr'):
        raise UserError(f'{path}: its network reads images as BGR (data_preprocessor.bgr_to_rgb is off), which '
                        'timm has no word for')
    out: Dict[str, Any] = dict(interpolation='bilinear', crop_pct=1.)
    for key, default in (('mean', 0.), ('std', 1.)):
        values = found.get(key) or [default] * channels
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) for v in values):
            raise UserError(f'{path}: data_preprocessor.{key} is {common.one_line(repr(values), 80)}')
        out[key] = tuple(round(v / 255, 6) for v in values)
    if isinstance(size, list) and len(size) == 2 and all(type(v) is int for v in size):
        out['input_size'] = (channels, *size)
    return out


# Data sets of mmdet and mmseg by their types, and their names.
_DATA = {'CocoDataset': 'COCO 2017', 'LVISV1Dataset': 'LVIS v1', 'ADE20KDataset': 'ADE20K',
         'CityscapesDataset': 'Cityscapes', 'CityScapesDataset': 'Cityscapes'}
# Those of data, under terms that do not allow every use: the weights' licence is for whoever publishes them to choose.
_RESTRICTED = ('ade20k', 'camvid', 'cityscapes', 'coco', 'imagenet', 'lvis', 'tiny-imagenet', 'tiny_imagenet')


def data_of(config: Dict[str, Any]) -> Optional[str]:
    """The name of the data that a configuration trains on, where it is known by its type and folder."""
    dataset = _get(config, 'train_dataloader', 'dataset')
    while isinstance(_get(dataset, 'dataset'), dict):
        dataset = dataset['dataset']
    root = str(_get(dataset, 'data_root') or '').rstrip('/')
    folder = os.path.basename(root)
    if 'camvid' in folder.lower():
        return 'CamVid'
    if _get(dataset, 'type') == 'CocoDataset' and folder != 'coco':
        return None  # COCO's format, anybody's images
    return _DATA.get(str(_get(dataset, 'type')))


def logged_results(path: Path, lengths: List[int]) -> Dict[str, float]:
    """What the run's evaluation logged for a checkpoint, in percent: mIoU or AP; none where there is no log of it."""
    out: Dict[str, float] = {}
    for log in sorted(path.parent.glob('*/vis_data/scalars.json')):
        try:
            rows = [json.loads(line) for line in log.read_text(encoding='utf-8').splitlines()]
        except (OSError, ValueError):
            continue
        for row in rows:
            if isinstance(row, dict) and row.get('step') in lengths:
                for key, (_, scale) in _LOGGED.items():
                    if isinstance(row.get(key), (int, float)):
                        out[key] = round(row[key] * scale, 2)
    return out


# mmengine's names of metrics: how they are shown, and a factor that makes them percent
_LOGGED = {'mIoU': ('mIoU', 1), 'coco/bbox_mAP': ('box AP', 100), 'coco/segm_mAP': ('mask AP', 100)}


def framework_of(config: Dict[str, Any]) -> str:
    return {'mmdet': 'MMDetection', 'mmseg': 'MMSegmentation'}.get(config.get('default_scope'), 'OpenMMLab')


def training_command(options: Dict[str, Any]) -> str:
    """The command line of tools/train.py that these options are, without what is of one machine."""
    parser = training.get_parser()
    words = ['python', 'tools/train.py']
    recipe = Path(__file__).parent / 'recipes' / os.path.basename(options.get('config') or '-')
    if recipe.is_file():
        common.apply_defaults(parser, common.read_recipe(str(recipe)), str(recipe))
        words += ['--config', f'tools/recipes/{recipe.name}']
    for action in parser._actions:
        value = options.get(action.dest)
        if action.dest in _NOT_IN_COMMAND or action.dest not in options or value == action.default:
            continue
        flag = action.option_strings[-1]
        if action.dest == 'data_dir':
            value = 'DATA'
        elif isinstance(value, str) and os.path.isabs(value.removeprefix('local-dir:')):
            value = os.path.basename(value)  # of somebody's machine
        if value is True or value is False:
            flags = [s for s in action.option_strings if s.startswith('--no-') != value]
            words.append(flags[-1] if flags else flag)  # --no-aug is the only way to say it
        elif isinstance(value, dict):
            words += [flag, *(f'{k}={v}' for k, v in value.items())]
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [flag, str(value)]
    return ' '.join(shlex.quote(w) for w in words)


# ----------------------------------------------------------------------------------------------------- the folder

def write_model(source: Source, folder: Path, license: str) -> None:
    """model.safetensors and config.json, as timm or huggingface_hub's mixin writes them."""
    from timm.models._hub import save_for_hf
    if source.forecaster is not None:
        source.model.save_pretrained(folder)
        if source.forecaster:
            common.write_text(folder / 'forecaster.json', json.dumps(source.forecaster, indent=1) + '\n')
        return
    model_config = dict(pretrained_cfg=dict(license=license))
    if source.label_names:
        model_config['label_names'] = source.label_names
    save_for_hf(source.model, str(folder), model_config=model_config, safe_serialization=True)


def example_inputs(source: Source) -> List[Optional[torch.Tensor]]:
    """Random numbers of the shapes that the model reads."""
    model = source.model
    if source.forecaster is None:
        shapes = [tuple(model.pretrained_cfg['input_size'])]
    else:
        shapes = [(model.lookback, model.num_variates),
                  (model.num_variates, model.static_dim) if model.static_dim else None,
                  (model.num_variates, model.future_len, model.future_dim) if model.future_dim else None,
                  (model.num_variates, model.lookback, model.past_dim) if model.past_dim else None]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *shape, generator=generator) if shape else None for shape in shapes]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@torch.no_grad()
def check_reload(source: Source, folder: Path) -> torch.nn.Module:
    """The model loaded from the folder; an error unless it gives bit for bit what the checkpoint's gives."""
    model = load_folder(folder)
    ours, theirs = source.model.state_dict(), model.state_dict()
    if list(ours) != list(theirs):
        raise UserError(f'the reloaded model has other parameters: {sorted(set(ours) ^ set(theirs))[:4]}; not pushed')
    different = [k for k, v in ours.items() if not _same_bits(v, theirs[k])]
    if different:
        raise UserError(f'the reloaded weights differ in {common._some(different)}; not pushed')
    inputs = example_inputs(source)
    expected, got = source.model(*inputs), model(*inputs)
    if not expected.isfinite().all():
        raise UserError('the model gives values that are not finite; not pushed')
    if not _same_bits(expected, got):
        raise UserError(f'the reloaded model gives other outputs, by up to {(expected - got).abs().max():.3g}; not '
                        'pushed. Its config.json does not hold all that the model was made with')
    return model


def measure(model: torch.nn.Module, args: argparse.Namespace, dataset) -> Dict[str, Any]:
    """What tools/validate.py measures."""
    device = common.check_device(args.device or common.default_device())
    config = common.data_config(argparse.Namespace(img_size=None), model)
    loader = data.eval_loader(dataset, config, batch_size=args.batch_size, device=device, workers=args.workers)
    result = validation.evaluate(model.to(device), loader, device, common.autocast(device, args.amp, args.amp_dtype))
    model.to('cpu')
    return dict(result, img_size=list(config['input_size'][-2:]), precision=args.amp_dtype if args.amp else 'float32',
                split=args.split)


def measure_forecaster(folder: Path, args: argparse.Namespace) -> Dict[str, Any]:
    """What `tools/forecast.py evaluate` measures with the written folder."""
    import forecast
    forecast.pandas_forecasting()
    words = ['evaluate', args.series, '--model', str(folder), '--part', args.part, '--json']
    if args.device:
        words += ['--device', args.device]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        forecast.evaluate_command(forecast.get_parser().parse_args(words))
    return dict(json.loads(out.getvalue()), split=args.part)


def open_data(args: argparse.Namespace, source: Source):
    """The data set of images to measure with, if there is one; and a check that the options fit the model."""
    images = bool(args.data_dir or args.dataset)
    if (images or args.series) and not data_name(args, source):
        raise UserError('the card needs a name for the data that is measured: pass --data-name')
    if args.series and not source.forecaster:
        raise UserError(f'{args.checkpoint} ' + (
            'has no forecaster.json, which holds the scale of the series: --series cannot be measured'
            if source.forecaster is not None else 'is no forecaster: --series is for those of tools/forecast.py'))
    if not images:
        return None
    if source.task != 'image-classification':
        raise UserError(f'{args.checkpoint} is no image classifier, so tools/validate.py cannot measure it: leave out '
                        '--data-dir and --dataset')
    dataset = datasets.open_dataset(
        args.dataset, args.data_dir, args.split, strict=True, class_map=args.class_map, download=args.dataset_download,
        cache_images=args.cache_images, input_key=args.input_key, target_key=args.target_key,
        num_samples=args.num_samples, batch_size=args.batch_size)
    datasets.match_classes(dataset, source.model.num_classes, f'{args.data_dir or args.dataset} ({args.split})',
                           source.label_names, of=args.checkpoint)
    names = datasets.class_names(dataset)
    if source.label_names is None and names and len(names) == source.model.num_classes:
        source.label_names = names
    return dataset


# ------------------------------------------------------------------------------------------------------------- card

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
    name, trained_on, ours = args.repo.partition('/')[2], data_name(args, source), _is_ours(source.architecture)
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
    lines += [f'| `{f.name}` | {f.stat().st_size:,} | `{_sha256(f)}` |' for f in sorted(folder.iterdir())
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


def _is_ours(architecture: str) -> bool:
    from vim2.models import model_names
    return architecture == 'tsm2' or architecture in model_names()


def _sha256(path: Path) -> str:
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
    kind = f'A ViM2 {what}, the vision model of {_PAPER},' if _is_ours(source.architecture) else \
        f'A `{source.architecture}` {what}'
    return f'{kind} for [timm](https://github.com/huggingface/pytorch-image-models){on}'


def _results(args: argparse.Namespace, source: Source, trained_on: Optional[str],
             result: Optional[Dict[str, Any]]) -> List[str]:
    if source.results:
        names, values = [_LOGGED[k][0] for k in source.results], [f'{v:.2f}' for v in source.results.values()]
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


# ---------------------------------------------------------------------------------------------------------- the Hub

def push(args: argparse.Namespace, folder: Path) -> Dict[str, Any]:
    """Upload the folder as one commit; what the Hub says about it."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError
    api = HfApi(token=args.token, library_name='vim2')
    try:
        repo = api.create_repo(args.repo, private=args.private or None, exist_ok=True).repo_id
        if args.revision and not args.create_pr:
            api.create_branch(repo, branch=args.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=args.revision, create_pr=args.create_pr or None,
            commit_message=args.message, ignore_patterns=['README.md'] if args.keep_card else None)
        weights, = api.get_paths_info(repo, ['model.safetensors'], revision=commit.oid)
    except HFValidationError as e:
        raise UserError(f'--repo {args.repo}: {common.one_line(e)}') from None
    except HfHubHTTPError as e:
        status = getattr(e.response, 'status_code', None)
        hint = ': check --token (or `hf auth login`), and that it may write to the repository' \
            if status in (401, 403) else ''
        raise UserError(f'the Hub refused to take {args.repo} ({common.one_line(e, 300)}){hint}') from None
    except (OSError, RuntimeError, ValueError) as e:
        hint = ''
        if 'xet' in str(e).lower():
            hint = '. A server without Xet storage (HF_ENDPOINT) takes files with HF_HUB_DISABLE_XET=1'
        raise UserError(f'cannot push to {args.repo}: {common.one_line(e, 300)}{hint}') from None
    sha256 = _sha256(folder / 'model.safetensors')
    if weights.lfs is None or weights.lfs.sha256 != sha256:
        raise UserError(f'{commit.commit_url}: the Hub holds other bytes of model.safetensors than were sent')
    return dict(repo=repo, commit=commit.oid, url=commit.commit_url, pull_request=commit.pr_url)


def manifest_entry(args, source: Source, folder: Path, result, pushed: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """What vim2/weights/manifest.json needs to list these weights; the keys to be written by hand are missing."""
    if result is None or not _is_ours(source.architecture) or pushed['pull_request']:
        return None
    weights, trained_on, config = folder / 'model.safetensors', data_name(args, source), {}
    if source.forecaster is None:
        config = {k: source.model.pretrained_cfg[k] for k in ('num_classes', 'input_size', 'crop_pct', 'mean', 'std')}
        if source.label_names:
            config['label_names'] = source.label_names
        metric = dict(name='top-1', value=round(result['top1'], 2), unit='%',
                      on=f'{trained_on}, {args.split}, {result["count"]:,} images')
    else:
        metric = dict(name='MSE', value=round(result['mse'], 4),
                      on=f'{trained_on}, {args.part}, {result["windows"]:,} windows')
    return dict(
        repo=pushed['repo'], revision=pushed['commit'], file=weights.name, size=weights.stat().st_size,
        sha256=_sha256(weights), license=args.license, data=trained_on, command=source.command or '',
        metric=metric, config=config)


def get_parser() -> argparse.ArgumentParser:
    description, epilog = __doc__.split('\n\n')[0], __doc__.strip().rsplit('\n\n', 1)[-1]
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=common.HelpFormatter)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='folder or file, see below')
    g = parser.add_argument_group('repository')
    g.add_argument('--repo', required=True, metavar='ORG/NAME', help='repository; made if there is none')
    g.add_argument('--revision', metavar='BRANCH', help='branch; made if there is none (default: main)')
    g.add_argument('--private', action='store_true', help='make a new repository private')
    g.add_argument('--create-pr', action='store_true', help='propose the commit as a pull request')
    g.add_argument('--token', metavar='TOKEN', help='access token (default: HF_TOKEN, or that of `hf auth login`)')
    g.add_argument('--message', default='Upload model with tools/push_to_hub.py', metavar='TEXT', help='of the commit')
    g.add_argument('--keep-card', action='store_true', help='leave the README.md that the repository has')
    g.add_argument('--dry-run', action='store_true', help='write the folder and print the card; nothing is sent')
    g.add_argument('--out', metavar='DIR', help='folder to write, must not exist (default: a temporary one; with '
                                                '--dry-run output/hub/NAME)')
    g = parser.add_argument_group('model')
    g.add_argument('-m', '--model', metavar='NAME', help='timm model name, where the checkpoint does not tell it')
    g.add_argument('--model-kwargs', nargs='*', default={}, action=common.KeyValue, metavar='K=V',
                   help='further model arguments, where the checkpoint does not tell them')
    g.add_argument('--no-ema', action='store_true',
                   help='take the plain weights where the checkpoint has averaged ones too')
    g = parser.add_argument_group('card')
    g.add_argument('--license', metavar='ID', help="licence of the weights, such as apache-2.0 (default: the model's)")
    g.add_argument('--data-name', metavar='NAME',
                   help='what the model was trained on, such as imagenet-1k (default: as --dataset of the training '
                        'says)')
    g = parser.add_argument_group('measurement (of image classifiers; needs --data-dir or --dataset)')
    datasets.add_dataset_arguments(g, train=False)
    g.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images per batch')
    g.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='loader processes')
    common.add_precision_arguments(g)
    g = parser.add_argument_group('measurement (of forecasters)')
    g.add_argument('--series', metavar='CSV', help='series as of tools/forecast.py')
    g.add_argument('--part', default='test', choices=('train', 'val', 'test', 'all'), help='part of it to evaluate')
    parser.add_argument('--json', action='store_true', help='print what was done as JSON')
    return parser


def check_license(args: argparse.Namespace, source: Source) -> None:
    if args.license is None:
        data = data_name(args, source) or ''
        if data.lower().startswith(_RESTRICTED):
            raise UserError(f'{args.checkpoint} was trained on {data}, whose terms do not allow every use: pass '
                            '--license, the licence under which you publish the weights, such as cc-by-nc-4.0')
        args.license = getattr(source.model, 'pretrained_cfg', {}).get('license')
        if source.forecaster is not None:
            args.license = source.model._hub_mixin_info.model_card_data.license
        if not args.license:
            raise UserError(f'{args.checkpoint} does not say under which licence its weights are: pass --license, for '
                            'example apache-2.0')


def main() -> None:
    args = get_parser().parse_args()
    common.at_least(args, 1, 'batch_size')
    common.at_least(args, 0, 'workers')
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', args.repo):
        raise UserError(f'--repo must be ORG/NAME, got {args.repo!r}')
    if args.out is None and args.dry_run:
        args.out = os.path.join('output', 'hub', args.repo.partition('/')[2])
    if args.out and os.path.lexists(args.out):
        raise UserError(f'{args.out} exists already: nothing is overwritten')
    common.register_models()
    source = read_source(args)
    check_license(args, source)
    dataset = open_data(args, source)
    parent = Path(args.out).parent if args.out else None
    try:
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix='.push_to_hub.', dir=parent))
    except OSError as e:
        raise UserError(f'cannot write {args.out or "a temporary folder"}: {common.one_line(e)}') from None
    try:
        with common.writing(args.out or 'a temporary folder'):
            write_model(source, folder, args.license)
        model = check_reload(source, folder)
        result = None
        if dataset is not None:
            result = measure(model, args, dataset)
        elif args.series:
            result = measure_forecaster(folder, args)
        card = make_card(args, source, folder, result)
        common.write_text(folder / 'README.md', card)
        pushed = None if args.dry_run else push(args, folder)
        entry = manifest_entry(args, source, folder, result, pushed) if pushed else None
        if args.out:
            folder.chmod(0o755)
            os.rename(folder, args.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        common.print_json(dict(repo=args.repo, folder=args.out, pushed=pushed, result=result, manifest_entry=entry,
                               card=card))
        return
    if args.dry_run:
        print(card)
    if args.out:
        print(f'written: {args.out}')
    if pushed:
        print(f'pushed: {pushed["pull_request"] or pushed["url"]}')
        if entry:
            print('entry for vim2/weights/manifest.json, under ARCHITECTURE.TAG:')
            common.print_json(entry)


if __name__ == '__main__':
    common.run(main)
