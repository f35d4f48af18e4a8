"""What train_openmmlab.py and test_openmmlab.py share: the config of the command line, and mmengine's Runner for it."""
import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence, Tuple

import torch
import torch.distributed as dist

import _common as common
from _common import UserError


def get_parser(description: str, config_help: str) -> argparse.ArgumentParser:
    try:
        from mmengine.config import DictAction
    except ModuleNotFoundError as e:
        if e.name != 'mmengine':
            raise
        raise UserError('mmengine is not installed: python -m vim2.install_openmmlab') from None
    parser = argparse.ArgumentParser(description=description, formatter_class=common.HelpFormatter)
    parser.add_argument('config', help=config_help)
    parser.add_argument('--work-dir', metavar='DIR',
                        help="logs and checkpoints (default: the config's, else work_dirs/NAME of the config)")
    parser.add_argument('--data-root', metavar='DIR', help="folder of the data (default: the config's)")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='K=V',
                        help='change the config: dotted keys; lists as key="[a,b]" or key=a,b')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none',
                        help='what started the processes; pytorch: torchrun')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(args: argparse.Namespace):
    """The config, with the command line's changes."""
    common.register_models()
    from vim2.openmmlab import load_config
    try:
        cfg = load_config(args.config, args.cfg_options, args.data_root)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(common.one_line(e, 1000)) from None
    except ModuleNotFoundError as e:
        raise UserError(f'{args.config} needs {e.name}: python -m vim2.install_openmmlab') from None
    except (SyntaxError, KeyError, TypeError, AttributeError, NameError, ImportError) as e:
        raise UserError(f'cannot read the config {args.config}: {common.one_line(e)}') from None
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or os.path.join('work_dirs', Path(args.config).stem)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg


def check_data(cfg, *parts: str) -> None:
    """Refuse a config whose folders of images or files of annotations are not there, before a model is built.

    Args:
        parts: 'train', 'val' or 'test': which data loaders and evaluators are going to be used.
    """
    for part in parts:
        for path, root in _data_paths(cfg, part):
            if not os.path.exists(path):
                raise UserError(f'there is no {path} ({part} data): --data-root DIR says where the data are'
                                + (f', now {root}' if root else ''))


def _data_paths(cfg, part: str) -> Iterator[Tuple[str, str]]:
    """Local files and folders that a part of the config reads, each with the data root that it is in."""
    from vim2.openmmlab import datasets_of

    def local(path: Any) -> bool:
        return isinstance(path, str) and bool(path) and '://' not in path

    for dataset in datasets_of((cfg.get(f'{part}_dataloader') or {}).get('dataset')):
        root = dataset.get('data_root') or ''
        names = [dataset.get('ann_file'), *(dataset.get('data_prefix') or {}).values()]
        if dataset.get('backend_args') is None and '://' not in root:
            yield from ((os.path.join(root, name), root) for name in names if local(name))
    evaluators = cfg.get(f'{part}_evaluator') or []
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        if local(evaluator.get('ann_file')) and evaluator.get('backend_args') is None:
            yield evaluator['ann_file'], ''


def add_backends(cfg, args: argparse.Namespace) -> None:
    """What --tensorboard and --wandb ask for, beside the logs of the work dir."""
    backends = []
    if args.tensorboard:
        common.needs('tensorboard', '--tensorboard')
        backends.append(dict(type='TensorboardVisBackend'))
    if args.wandb:
        common.needs('wandb', '--wandb')
        name = os.path.basename(os.path.normpath(cfg.work_dir))
        backends.append(dict(type='WandbVisBackend', init_kwargs=dict(project=args.wandb, name=name)))
    if not backends:
        return
    if cfg.get('visualizer') is None:
        cfg.visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
    cfg.visualizer.vis_backends = [*(cfg.visualizer.get('vis_backends') or []), *backends]


def check_checkpoint(path: str) -> None:
    """Refuse a file that torch.load could not read without running code, which mmengine would then do."""
    if path.startswith(('http://', 'https://')):
        raise UserError(f'{path}: download it and give its path')
    if not os.path.isfile(path):
        raise UserError(f'there is no checkpoint {path}')
    from mmengine.runner.checkpoint import get_torch_safe_globals
    try:
        with torch.serialization.safe_globals(get_torch_safe_globals()):  # mmengine's history of losses
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError) as e:
        raise UserError(f'cannot read the checkpoint {path}: {common.one_line(e, 200)}') from None
    if unsafe:
        raise UserError(f'{path} holds objects besides weights ({", ".join(sorted(unsafe)[:4])}); reading them could '
                        "run code, so it is refused. Where you trust it, save its weights alone: "
                        "torch.save({'state_dict': state_dict}, FILE)")


def data_roots(cfg, *parts: str) -> Sequence[str]:
    return sorted({root for part in parts for _, root in _data_paths(cfg, part)})


def build_runner(cfg):
    """mmengine's Runner; on a CPU also for several processes, which mmengine has only for GPUs."""
    import mmengine.runner
    if cfg.launcher != 'none' and not torch.accelerator.is_available():
        if cfg.launcher != 'pytorch':
            raise UserError(f'--launcher {cfg.launcher} needs GPUs; on CPUs use torchrun and --launcher pytorch')
        if 'RANK' not in os.environ:
            raise UserError('--launcher pytorch is for processes that torchrun starts: torchrun --nproc-per-node N '
                            'tools/train_openmmlab.py … --launcher pytorch')
        torch.distributed.init_process_group('gloo')
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                       find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.setdefault('model_wrapper_cfg', wrapper)
        cfg.model = replace_type(cfg.model, 'SyncBN', 'BN')
    try:
        return mmengine.runner.Runner.from_cfg(cfg)
    except Exception as e:  # mmengine re-raises what a class raises, as many types
        raise UserError(common.one_line(_first(e), 1000)) from e


def execute(action: Callable[[], Any], roots: Sequence[str] = ()) -> Any:
    """Train or test; mistakes in what the config names are one line, everything else keeps its traceback.

    Args:
        roots: folders of data: what lacks there is a matter of --data-root.
    """
    force = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # where that fails, mmengine would read a checkpoint by running its code
    before = os.environ.get(force)
    os.environ[force] = '1'
    try:
        result = action()
        if dist.is_available() and dist.is_initialized():
            # mmengine leaves it to the exit, where a process whose peer is gone first now and then aborts
            dist.barrier()
            dist.destroy_process_group()
        return result
    except Exception as e:  # mmengine re-raises what a class raises, as many types
        cause = _first(e)
        if isinstance(cause, FileNotFoundError):
            inside = any(str(cause.filename or '').startswith(root) for root in roots if root)
            hint = ' (--data-root says where the data are)' if inside else ''
            raise UserError(f'{common.one_line(cause)}{hint}') from e
        if re.search('keys do not match|No pretrained weights are published|write init_cfg=', str(cause)):
            raise UserError(common.one_line(cause, 1000)) from e
        if isinstance(cause, pickle.UnpicklingError):
            raise UserError(f'the checkpoint holds what cannot be read without running code: '
                            f'{common.one_line(cause, 200)}') from e
        raise
    finally:
        if before is None:
            del os.environ[force]
        else:
            os.environ[force] = before


def _first(e: BaseException) -> BaseException:
    while e.__cause__ is not None:
        e = e.__cause__
    return e


def replace_type(config: Any, old: str, new: str) -> Any:
    """The config with another `type` wherever it stands."""
    if isinstance(config, dict):
        return type(config)({k: new if k == 'type' and v == old else replace_type(v, old, new)
                             for k, v in config.items()})
    if isinstance(config, (list, tuple)):
        return type(config)(replace_type(v, old, new) for v in config)
    return config
