"""Trained models as tools/push_to_hub.py finds them: what a checkpoint holds, and what it tells about its training."""
import argparse
import ast
import contextlib
import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch

import _common as common
import train as training
from _common import UserError
from _runs import check_training_state

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
    check_training_state(checkpoint, str(path))
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
    if not is_ours(name):
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
                for key, (_, scale) in LOGGED.items():
                    if isinstance(row.get(key), (int, float)):
                        out[key] = round(row[key] * scale, 2)
    return out


# mmengine's names of metrics: how they are shown, and a factor that makes them percent
LOGGED = {'mIoU': ('mIoU', 1), 'coco/bbox_mAP': ('box AP', 100), 'coco/segm_mAP': ('mask AP', 100)}


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


def is_ours(architecture: str) -> bool:
    from vim2.models import model_names
    return architecture == 'tsm2' or architecture in model_names()
