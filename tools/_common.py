"""What the command-line tools share: errors, YAML recipes, models, checkpoints, devices.

Everything here is plain plumbing around timm; the data side is in `_data.py`.
"""
import argparse
import difflib
import errno
import json
import math
import os
import pickle
import secrets
import struct
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import yaml
from safetensors import SafetensorError

_PREFIXES = ('hf-hub:', 'hf_hub:', 'local-dir:')
# What unreadable, truncated, foreign or unsafe weight files raise in torch, pickle, zip and safetensors.
_LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, AssertionError,
                pickle.UnpicklingError, struct.error, SafetensorError)


class UserError(Exception):
    """Something the person at the keyboard can mend: shown as one line, without a traceback, exit code 2."""


def run(main: Callable[[], Optional[int]]) -> None:
    """Run a tool's `main` and leave the process with its exit code."""
    prog = os.path.basename(sys.argv[0])
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed: `tool >&-`
            setattr(sys, name, open(os.devnull, 'w'))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a file name need not be text
            stream.reconfigure(errors='backslashreplace')
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as e:
        text = str(e)
        if text.startswith('Caught UserError in'):  # from a DataLoader worker: its last line is the message
            text = text.rstrip().splitlines()[-1].partition('UserError: ')[2]
        print(f'{prog}: error: {text}', file=sys.stderr)
        code = 2
    except (MemoryError, torch.OutOfMemoryError) as e:
        print(f'{prog}: error: out of memory ({one_line(e, 200)}): a smaller --batch-size or --img-size takes less',
              file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f'{prog}: interrupted', file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `tool | head`: nobody is left to read
        _drop_output()
        code = 141
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if e.filename is None:
            _drop_output()
        print(f'{prog}: error: cannot write {e.filename or "the output"}: {e.strerror}', file=sys.stderr)
        code = 2
    sys.exit(code)


def _drop_output() -> None:
    """Leave nothing in standard output's buffer that Python would try to write once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: BaseException, limit: int = 400) -> str:
    """The message of an exception on one line, with its type when it has no message."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit - 1] + '…'


def register_models() -> None:
    """Register ViM2's models with timm."""
    try:
        import vim2  # noqa: F401
    except ModuleNotFoundError as e:
        if e.name != 'vim2':
            raise
        raise UserError('the vim2 package is not installed in this Python: run `pip install -e .` in the repository '
                        'root, or `pip install vim2`') from None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default wherever there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        if action.default in (None, False, '', {}) or 'default' in (action.help or ''):
            return action.help
        return super()._get_help_string(action)


class KeyValue(argparse.Action):
    """`--opt a=1 b=text` as a dict; a value is a Python literal where it parses as one, else text."""

    def __call__(self, parser, namespace, values, option_string=None):
        import ast
        out = {}
        for item in values:
            key, sep, value = item.partition('=')
            if not sep or not key:
                parser.error(f'argument {option_string}: expected KEY=VALUE, got {item!r}')
            try:
                out[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                out[key] = value
        setattr(namespace, self.dest, out)


def at_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """Refuse options below `least`; None is fine."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f'--{name.replace("_", "-")} must be at least {least:g}, got {value:g}')


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of tools that run a trained model."""
    g = parser.add_argument_group('model')
    g.add_argument('-m', '--model', default='vim2_micro_patch4_64.tiny_imagenet', metavar='NAME',
                   help='timm model name, with pretrained tag where it has one; hf-hub:USER/NAME or local-dir:PATH')
    g.add_argument('--checkpoint', metavar='FILE',
                   help='weights (.safetensors, .pth, .pth.tar) instead of the pretrained ones')
    g.add_argument('--no-ema', action='store_true',
                   help='take the plain weights where the checkpoint has averaged ones too')
    g.add_argument('--num-classes', type=int, metavar='N', help="outputs (default: the model's)")
    g.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValue, metavar='K=V',
                   help='further model arguments')
    g = parser.add_argument_group('preprocessing')
    g.add_argument('--img-size', type=int, nargs='+', metavar='PX', help="H [W] in pixels (default: the model's)")
    g.add_argument('--crop-pct', type=float, metavar='X',
                   help="part of the resized image that is kept (default: the model's)")
    g.add_argument('--crop-mode', choices=('center', 'squash', 'border'),
                   help="how it is cut out (default: the model's)")
    g.add_argument('--interpolation', metavar='NAME', help="resizing (default: the model's)")
    g.add_argument('--mean', type=float, nargs='+', metavar='X', help="channel means, range 0-1 (default: the model's)")
    g.add_argument('--std', type=float, nargs='+', metavar='X', help="channel deviations (default: the model's)")


def add_precision_arguments(group) -> None:
    group.add_argument('--device', metavar='NAME', help="cuda, cpu, … (default: the machine's accelerator, else cpu)")
    group.add_argument('--amp', action=argparse.BooleanOptionalAction, default=False, help='automatic mixed precision')
    group.add_argument('--amp-dtype', default='bfloat16', choices=tuple(AMP_DTYPES), help='its low precision')


def add_logging_arguments(group) -> None:
    """Where the tools that train log their numbers besides files and the terminal."""
    group.add_argument('--tensorboard', action=argparse.BooleanOptionalAction, default=False,
                       help='log to TensorBoard, in the folder of the run')
    group.add_argument('--wandb', nargs='?', const='vim2', metavar='PROJECT',
                       help='log to Weights & Biases, under PROJECT (vim2 if it is left out)')


def needs(module: str, option: str) -> None:
    """Refuse an option whose package is not installed."""
    import importlib.util
    if importlib.util.find_spec(module) is None:
        raise UserError(f'{option} needs the package {module}: pip install {module}')


class Scalars:
    """Numbers of a run, to TensorBoard and Weights & Biases as `add_logging_arguments` asks; else nowhere.

    Args:
        args: the options; all of them are what Weights & Biases shows as the run's configuration.
        folder: of the run; its name is the run's.
        active: False in all processes but one.
    """

    def __init__(self, args: argparse.Namespace, folder: os.PathLike, active: bool = True):
        self._tensorboard = self._wandb = None
        if active and args.tensorboard:
            needs('tensorboard', '--tensorboard')
            from torch.utils.tensorboard import SummaryWriter
            self._tensorboard = SummaryWriter(str(folder))
        if active and args.wandb:
            needs('wandb', '--wandb')
            import wandb
            identity = Path(folder) / 'wandb-id'  # a run that is resumed goes on there too
            if not identity.exists():
                write_text(identity, secrets.token_hex(4))
            self._wandb = wandb.init(
                project=args.wandb, name=os.path.basename(os.path.normpath(folder)), dir=str(folder), config=vars(args),
                id=identity.read_text(encoding='utf-8'), resume='allow')

    def log(self, step: int, values: Dict[str, Any]) -> None:
        """Log the numbers among `values` under their names."""
        values = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


# ---------------------------------------------------------------------------------------------------- YAML recipes

def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    """One value of a recipe, checked and converted as its command-line option would be."""
    name = action.dest

    def scalar(v):
        if action.type is not None and not isinstance(v, bool):
            try:
                v = action.type(v if isinstance(v, str) else repr(v) if isinstance(v, float) else str(v))
            except (TypeError, ValueError, argparse.ArgumentTypeError) as e:
                raise UserError(f'{where}: {name}: {one_line(e)}') from None
        elif action.type is not None:
            raise UserError(f'{where}: {name}: expected a {action.type.__name__}, got {v!r}')
        elif not isinstance(v, str):
            raise UserError(f'{where}: {name}: expected text, got {v!r}')
        if action.choices is not None and v not in action.choices:
            raise UserError(f'{where}: {name}: {v!r} is not one of {", ".join(map(str, action.choices))}')
        return v

    if value is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f'{where}: {name}: expected true or false, got {value!r}')
        return value
    if isinstance(action, KeyValue):
        if not isinstance(value, dict):
            raise UserError(f'{where}: {name}: expected a mapping, got {value!r}')
        return value
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        values = value if isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise UserError(f'{where}: {name}: expected {action.nargs} values, got {value!r}')
        return [scalar(v) for v in values]
    if isinstance(value, (list, dict)):
        raise UserError(f'{where}: {name}: expected one value, got {value!r}')
    return scalar(value)


def apply_defaults(parser: argparse.ArgumentParser, values: Dict[str, Any], where: str) -> None:
    """Make `values` the parser's defaults, after checking names and types; `where` names their source."""
    actions = {a.dest: a for a in parser._actions if a.dest != 'help'}
    out = {}
    for key, value in values.items():
        action = actions.get(str(key).replace('-', '_'))
        if action is None:
            close = difflib.get_close_matches(str(key), actions, n=1)
            raise UserError(f'{where}: unknown option {key!r}' + (f' (did you mean {close[0]!r}?)' if close else ''))
        out[action.dest] = _convert(action, value, where)
    parser.set_defaults(**out)


class _RecipeLoader(yaml.SafeLoader):
    """Without aliases: a few hundred bytes of nested ones stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f'line {mark.line + 1} has an alias (*NAME), which recipes may not have')
        return super().compose_node(parent, index)


_LARGEST_RECIPE = 1 << 20  # bytes


def read_recipe(path: str) -> Dict[str, Any]:
    """A YAML recipe: one mapping of option names to values."""
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read(_LARGEST_RECIPE + 1)
        if len(text) > _LARGEST_RECIPE:
            raise UserError(f'{path} is no recipe: larger than 1 MiB')
        recipe = yaml.load(text, _RecipeLoader)
    except OSError as e:
        raise UserError(f'cannot read the recipe {path}: {e.strerror or e}') from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: no UTF-8, no such date
        raise UserError(f'{path} is not a YAML file: {one_line(e)}') from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UserError(f'{path}: expected a mapping of options to values, got a {type(recipe).__name__}')
    return recipe


# ------------------------------------------------------------------------------------------------- device, precision

def default_device() -> str:
    """The accelerator that this torch sees, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    return 'cpu'


def check_device(name: str) -> torch.device:
    """The named device, proven to work."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f'device {name!r} cannot be used here: {one_line(e, 160)}') from None
    return device


AMP_DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


def autocast(device: torch.device, amp: bool, dtype: str):
    """A factory of autocast contexts (or of empty ones)."""
    if not amp:
        return nullcontext
    return lambda: torch.autocast(device_type=device.type, dtype=AMP_DTYPES[dtype])


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is honest."""
    if device.type not in ('cpu', 'meta'):
        torch.accelerator.synchronize(device)


# ------------------------------------------------------------------------------------------------------------ models

def create_model(name: str, **kwargs):
    """`timm.create_model` with errors that say what to do."""
    import timm
    register_models()
    if not name.startswith(_PREFIXES) and not timm.is_model(name.split('.')[0]):
        close = difflib.get_close_matches(name.split('.')[0], timm.list_models(), n=3)
        raise UserError(f'unknown model {name!r}' + (f': did you mean {", ".join(close)}?' if close else
                                                     ': `timm.list_models()` lists the names'))
    try:
        return timm.create_model(name, **kwargs)
    except Exception as e:  # network and hub libraries raise types of their own
        expected = kwargs.get('pretrained') or name.startswith(_PREFIXES) or isinstance(e, (TypeError, RuntimeError))
        if not expected:
            raise
        raise UserError(f'cannot create {name!r}: {one_line(e)}') from e


def read_torch(path: str) -> Any:
    """What torch.save wrote, verified and read with weights_only=True: nothing in the file is executed."""
    from vim2 import pretrained
    with _reading(path):
        return pretrained.read_torch(path)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except _LOAD_ERRORS as e:
        raise UserError(f'cannot read the checkpoint {path}: it is damaged, truncated or not a weights file '
                        f'({one_line(e)})') from None


def read_checkpoint(path: str, use_ema: bool = True) -> Dict[str, torch.Tensor]:
    """The weights in a .safetensors, .pth or .pth.tar file (EMA weights where there are any and they are wanted).

    Nothing in the file is executed: safetensors, or torch.load with weights_only=True.
    """
    return _read_checkpoint(path, use_ema)[0]


def _read_checkpoint(path: str, use_ema: bool = True) -> Tuple[Dict[str, torch.Tensor], Optional[List[str]]]:
    """The same, and the names of the classes, where the file, or config.json beside a .safetensors file, has them."""
    from vim2 import pretrained
    if not os.path.isfile(path):
        what = 'is a folder, not a file' if os.path.isdir(path) else 'does not exist'
        hint = f" (a folder with config.json and model.safetensors is a model: --model local-dir:{path})" \
            if os.path.isfile(os.path.join(path, 'config.json')) else ''
        raise UserError(f'checkpoint {path} {what}{hint}')
    content = None
    if path.endswith('.safetensors'):
        with _reading(path):
            state = pretrained.read_checkpoint(path)
        config = Path(path).with_name('config.json')
        content = read_json(config) if config.is_file() else None
    else:
        content = read_torch(path)
        try:
            state = pretrained.select(content, path, None if use_ema else False)
        except RuntimeError as e:
            raise UserError(one_line(e)) from None
    names = content.get('label_names') if isinstance(content, dict) else None
    if names is not None:
        check_names(names, f'{path}: label_names')
    return state, None if names is None else list(names)


def read_json(path: os.PathLike) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    except (ValueError, RecursionError) as e:  # json's and UTF-8's errors; nesting without end
        raise UserError(f'{path} is no JSON: {one_line(e, 200)}') from None


def read_object(path: os.PathLike) -> Dict[str, Any]:
    """The object in a JSON file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f'{path} must hold an object, it holds a {type(value).__name__}')
    return value


def check_names(names: Any, what: str) -> None:
    """Refuse names of classes that are no list of texts."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise UserError(f'{what} must be a list of texts, it is {one_line(repr(names), 80)}')


def class_names(model: torch.nn.Module) -> Optional[List[str]]:
    """The names of a model's classes, in the order of its outputs, where it has them."""
    names = model.pretrained_cfg.get('label_names')
    if not names:
        return None
    check_names(names, 'label_names of the model')
    return list(names) if len(names) == model.num_classes else None


def not_finite(state: Dict[str, torch.Tensor]) -> List[str]:
    """The tensors that hold NaN or infinity; waits for a GPU once."""
    names = {}
    for k, v in state.items():
        if v.is_floating_point():
            names.setdefault(v.device, {})[k] = v.isfinite().all()
    return [k for flags in names.values() for k, ok in zip(flags, torch.stack(list(flags.values())).tolist()) if not ok]


def check_finite(state: Dict[str, torch.Tensor], what: str) -> None:
    """Refuse weights that are NaN or infinite."""
    bad = not_finite(state)
    if bad:
        raise UserError(f'{what} has weights that are not finite: {_some(bad)}')


def _some(keys: Sequence[str], limit: int = 4) -> str:
    keys = list(keys)
    return ', '.join(keys[:limit]) + (f', … ({len(keys)} in all)' if len(keys) > limit else '')


def load_weights(model: torch.nn.Module, path: str, name: str, use_ema: bool = True) -> None:
    """Load a checkpoint file into a model, see `load_state`."""
    state, names = _read_checkpoint(path, use_ema)
    load_state(model, state, path, name)
    if hasattr(model, 'pretrained_cfg'):  # the architecture's names are of its published weights' classes
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names, 'label_descriptions': None}


def load_state(model: torch.nn.Module, state: Dict[str, torch.Tensor], path: str, name: str) -> None:
    """Load weights into a model; every key and shape must match, and the error names those that do not."""
    own = model.state_dict()
    if not all(isinstance(v, torch.Tensor) and v.layout == torch.strided for v in state.values()):
        raise UserError(f'{path} holds no state dict of (dense) tensors')
    state = upgraded(model, state) or state
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [f'{k} {tuple(state[k].shape)} for {tuple(v.shape)}' for k, v in own.items()
              if k in state and state[k].shape != v.shape]
    problems = [f'{label}: {_some(keys)}' for label, keys in
                (('missing keys', missing), ('unexpected keys', unexpected), ('other shapes', shapes)) if keys]
    if problems:
        classifier = model.pretrained_cfg.get('classifier') if hasattr(model, 'pretrained_cfg') else None
        rows = {len(state[k]) for k in own if isinstance(classifier, str) and k.startswith(classifier) and k in state}
        hint = ''
        if len(rows) == 1 and rows != {getattr(model, 'num_classes', None)}:
            hint = f' (the checkpoint has {rows.pop()} classes: --num-classes)'
        raise UserError(f'{path} does not fit {name}: ' + '; '.join(problems) + hint)
    check_finite(state, path)
    model.load_state_dict(state, strict=True)


def upgraded(model: torch.nn.Module, state: Dict[str, torch.Tensor]) -> Optional[Dict[str, torch.Tensor]]:
    """Weights of version 0.1.0 under today's names; None if they are no such."""
    upgrade = getattr(sys.modules[type(model).__module__], 'upgrade_state_dict', None)
    new = upgrade(state) if upgrade is not None else state
    return new if list(new) != list(state) else None


def trained_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model that `add_model_arguments` describes: pretrained, or with the weights of --checkpoint."""
    kwargs = dict(args.model_kwargs)
    if args.num_classes is not None:
        kwargs['num_classes'] = args.num_classes
    model = create_model(args.model, pretrained=not args.checkpoint, **kwargs)
    if args.checkpoint:
        load_weights(model, args.checkpoint, args.model, use_ema=not args.no_ema)
    else:
        check_finite(model.state_dict(), args.model)
    return model


def data_config(args: argparse.Namespace, model: torch.nn.Module) -> Dict[str, Any]:
    """The preprocessing: the model's own, changed by options."""
    from timm.data import resolve_data_config
    options = {k: getattr(args, k, None) for k in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'in_chans')}
    size = image_size(getattr(args, 'img_size', None))
    if size:
        options['input_size'] = (options['in_chans'] or model.pretrained_cfg['input_size'][0], *size)
    try:
        config = resolve_data_config({k: v for k, v in options.items() if v is not None}, model=model)
    except AssertionError:
        raise UserError(f'--mean and --std need one value, or one per channel; got {args.mean}, {args.std}') from None
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"the model's preprocessing cannot be read: {one_line(e)}") from None
    return check_data_config(config)


def check_data_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """Refuse preprocessing that timm would fail on, or divide by zero with."""
    known = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

    def numbers(value, least: float) -> bool:
        return isinstance(value, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and v >= least for v in value)

    size, channels = config['input_size'], 0
    if numbers(size, 1) and len(size) == 3 and all(isinstance(v, int) for v in size):
        channels = size[0]
    tiny = sys.float_info.min
    for key, ok, want in (
            ('input_size', channels, 'channels, height and width in pixels'),
            ('mean', numbers(config['mean'], -math.inf) and len(config['mean']) in (1, channels),
             f'one number, or one for each of the {channels} channels'),
            ('std', numbers(config['std'], tiny) and len(config['std']) in (1, channels),
             f'one positive number, or one for each of the {channels} channels'),
            ('crop_pct', numbers([config['crop_pct']], tiny), 'a positive number'),
            ('crop_mode', config['crop_mode'] in ('center', 'squash', 'border'), 'center, squash or border'),
            ('interpolation', config['interpolation'] in (*known, 'random'), ', '.join(known)),
    ):
        if not ok:
            raise UserError(f'{key} of the preprocessing must be {want}, it is {one_line(repr(config[key]), 80)}')
    return config


def count_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- files

def write_atomic(path: os.PathLike, write: Callable[[str], None]) -> None:
    """Write a file whole or not at all, see `vim2._files.write`; an error that names it where that fails."""
    from vim2 import _files
    with writing(path):
        _files.write(path, write)


def write_text(path: os.PathLike, text: str) -> None:
    """Write a UTF-8 text file, see `write_atomic`."""
    write_atomic(path, lambda tmp: Path(tmp).write_text(text, encoding='utf-8'))


def write_torch(path: os.PathLike, state: Any) -> None:
    """Write what `torch.save` writes, see `write_atomic`."""
    from vim2 import _files
    with writing(path):
        _files.write_torch(path, state)


def write_folder(path: os.PathLike, write: Callable[[str], None]) -> None:
    """Write a folder whole or not at all, see `vim2._files.write_folder`; an error that names it where that fails."""
    from vim2 import _files
    with writing(path):
        _files.write_folder(path, write)


@contextmanager
def locked_folder(path: os.PathLike) -> Iterator[None]:
    """Hold a run's folder for this process alone, and remove what killed writers left in it."""
    from vim2 import _files
    with ExitStack() as stack:
        try:
            with writing(Path(path) / '.lock'):
                stack.enter_context(_files.lock_folder(path))
        except _files.Locked as e:
            raise UserError(f'{e}: wait for it, or choose another folder') from None
        _files.remove_temporaries(path)
        yield


@contextmanager
def writing(path: os.PathLike) -> Iterator[None]:
    """Errors of the system while `path` is written are one line that names it."""
    from vim2 import _files
    try:
        with _files.named_errors(Path(path)):
            yield
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror or one_line(e, 200)}') from None


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


# ---------------------------------------------------------------------------------------------------------- progress

def progress(iterable=None, *, total: Optional[int] = None, desc: str = '', unit: str = 'batch', disable: bool = False,
             initial: int = 0):
    """A tqdm bar on a terminal; silent elsewhere, where the tools print plain lines instead."""
    from tqdm import tqdm
    return tqdm(iterable, total=total, desc=desc, unit=unit, disable=disable or not sys.stderr.isatty(),
                initial=initial, dynamic_ncols=True, leave=False)


class Every:
    """True at most once per `seconds`: for plain progress lines where there is no terminal."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.last = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    seconds = int(round(seconds))
    h, m, s = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f'{h}:{m:02d}:{s:02d}' if h else f'{m}:{s:02d}'


def image_size(values: Optional[List[int]]) -> Optional[tuple]:
    """`--img-size 224` or `--img-size 256 192` as (height, width)."""
    if values is None:
        return None
    if len(values) > 2 or min(values) < 1:
        raise UserError(f'--img-size takes one or two positive numbers (height and width in pixels), got {values}')
    return (values[0], values[-1])
