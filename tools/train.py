#!/usr/bin/env python
"""Train an image classifier: ViM2 or any other timm model.

    python tools/train.py --config tools/recipes/cifar10_nano.yaml --data-dir DIR
    torchrun --nproc-per-node 8 tools/train.py --config tools/recipes/imagenet_vim2.yaml --data-dir DIR
    python tools/train.py --resume output/train/RUN/last.pth.tar

Built from timm's parts: data sets, transforms, Mixup/CutMix, losses, optimizers, schedulers, EMA. A run writes to
OUTPUT/EXPERIMENT: args.yaml, summary.csv, last.pth.tar (newest state), previous.pth.tar (the one before it),
best.pth.tar (best epoch by --eval-metric), and model/, a folder for `timm.create_model('local-dir:…/model',
pretrained=True)` with the weights that were evaluated best.

Resume is exact. Every random number of training is a function of (seed, epoch, batch or sample), checkpoints are
renamed into place after they are complete, and they hold whatever else a run carries along. A run that is killed at
any moment and resumed therefore ends with the same bits as one that was not, with any number of --workers, on
hardware whose kernels are deterministic (see --deterministic). Streaming data sets resume at the last complete epoch,
with the same number of --workers. SIGTERM and SIGINT (Ctrl-C, slurm) write a checkpoint first; the exit code is 143 or
130.
"""
import argparse
import fnmatch
import logging
import math
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad, distribute_bn, init_distributed_device
from torch.nn import functional as F

import _common as common
import _data as data
import _datasets as datasets
import validate as validation
from _common import KeyValue, UserError
from _device import DeviceBatches, GraphedStep
from _runs import FORMAT, Progress, Run, Signals, Stopped, read_training_checkpoint

# Options that may differ between a run and its continuation: they do not touch the numbers (or say where things are).
_FREE_ON_RESUME = {
    'config', 'resume', 'resume_with_changes', 'output', 'experiment', 'data_dir', 'dataset_download', 'workers',
    'pin_memory', 'cache_images', 'device', 'log_interval', 'checkpoint_interval_steps', 'val_batch_size',
    'no_progress', 'initial_checkpoint', 'pretrained', 'dist_backend', 'dist_url', 'tensorboard', 'wandb',
}


# all that timm has, but for plateau: it is deprecated there, and its counters cannot be resumed
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none')
_flag = argparse.BooleanOptionalAction  # a recipe's true can be taken back: --no-OPTION


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], formatter_class=common.HelpFormatter)
    parser.add_argument('-c', '--config', metavar='YAML',
                        help='recipe with option values; the command line overrides it')

    g = parser.add_argument_group('data')
    datasets.add_dataset_arguments(g, train=True)
    g.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images per process and batch')
    g.add_argument('--val-batch-size', type=int, metavar='N', help='the same for evaluation (default: --batch-size)')
    g.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='loader processes per training process')
    g.add_argument('--data-on-device', action=_flag, default=False,
                   help='keep all images, which must have one size, on the device and crop, flip and color them there: '
                        'for small images')
    g.add_argument('--pin-memory', action=_flag, default=False, help='page-locked batches, for faster copies to a GPU')

    g = parser.add_argument_group('model')
    g.add_argument('-m', '--model', default='vim2_tiny', metavar='NAME', help='timm model name')
    g.add_argument('--pretrained', action=_flag, default=False, help='start from pretrained weights')
    g.add_argument('--initial-checkpoint', metavar='FILE', help='start from the weights in a .safetensors or .pth file')
    g.add_argument('--num-classes', type=int, metavar='N', help="outputs (default: the data set's, else the model's)")
    g.add_argument('--img-size', type=int, nargs='+', metavar='PX', help="H [W] in pixels (default: the model's)")
    g.add_argument('--in-chans', type=int, metavar='N', help="input channels, 1 or 3 (default: the model's)")
    g.add_argument('--mean', type=float, nargs='+', metavar='X', help="channel means, range 0-1 (default: the model's)")
    g.add_argument('--std', type=float, nargs='+', metavar='X', help="channel deviations (default: the model's)")
    g.add_argument('--interpolation', metavar='NAME', help="resizing at evaluation (default: the model's)")
    g.add_argument('--crop-pct', type=float, metavar='X', help="centre crop at evaluation (default: the model's)")
    g.add_argument('--freeze', nargs='+', default=[], metavar='PATTERN',
                   help="parameters that are not trained, such as 'stem.*' 'stages.0.*'; quote them. The statistics of "
                        'batch normalisation go on')
    g.add_argument('--drop', type=float, metavar='P', help='dropout rate')
    g.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth rate')
    g.add_argument('--grad-checkpointing', action=_flag, default=False, help='less memory, more time')
    g.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValue, metavar='K=V',
                   help='further model arguments')

    g = parser.add_argument_group('optimization')
    g.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs, warm-up included')
    g.add_argument('--minutes', type=float, metavar='M',
                   help='end after M minutes at the latest: schedule and --mixup-off-epoch then run by the clock')
    g.add_argument('--opt', default='adamw', metavar='NAME', help="optimizer, one of timm.optim.list_optimizers()")
    g.add_argument('--lr', type=float, default=1e-3, metavar='X', help='peak learning rate')
    g.add_argument('--weight-decay', type=float, default=0.05, metavar='X', help='weight decay')
    g.add_argument('--momentum', type=float, default=0.9, metavar='X', help='momentum, where there is one (SGD)')
    g.add_argument('--opt-betas', type=float, nargs='+', metavar='B', help="betas (default: the optimizer's)")
    g.add_argument('--opt-eps', type=float, metavar='X', help="epsilon (default: the optimizer's)")
    g.add_argument('--opt-kwargs', nargs='*', default={}, action=KeyValue, metavar='K=V',
                   help='further optimizer arguments')
    g.add_argument('--layer-decay', type=float, metavar='X', help='learning rate factor per layer towards the input')
    g.add_argument('--clip-grad', type=float, metavar='X', help='clip gradients at this (default: off)')
    g.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what is clipped')
    g.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per optimizer update')
    g.add_argument('--sched', default='cosine', choices=_SCHEDULES, help="timm's schedules")
    g.add_argument('--warmup-epochs', type=float, default=5, metavar='N', help='epochs of linear warm-up')
    g.add_argument('--warmup-lr', type=float, default=1e-6, metavar='X', help='learning rate at the start')
    g.add_argument('--min-lr', type=float, default=1e-5, metavar='X', help='learning rate at the end')
    g.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr after the schedule')
    g.add_argument('--decay-epochs', type=float, metavar='N',
                   help='step: epochs between decays (default: 90); wsd, rsqrt: epochs or part of the decay '
                        '(default: 0.2)')
    g.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
                   help='multistep schedule: epochs of decay')
    g.add_argument('--decay-rate', type=float, default=0.1, metavar='X', help='decay factor (poly: power)')
    g.add_argument('--sched-on-epochs', action=_flag, default=False, help='step the schedule once an epoch')

    g = parser.add_argument_group('augmentation and regularization')
    g.add_argument('--no-aug', action='store_true', help='no augmentation at all')
    g.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr', 'pad'),
                   help="timm's crops, or pad: padded random crop, usual for small images (default: rrc)")
    g.add_argument('--crop-padding', type=int, default=4, metavar='PX', help='pixels around the image in the pad crop')
    g.add_argument('--scale', type=float, nargs=2, metavar='X', help='area range of the crop (default: 0.08 1.0)')
    g.add_argument('--ratio', type=float, nargs=2, metavar='X', help='aspect range of the crop (default: 0.75 1.333)')
    g.add_argument('--train-sizes', type=int, nargs='+', metavar='PX',
                   help='each training batch at one of these sizes, drawn at random, resized on the device from '
                        '--img-size: weights that hold at all of them')
    g.add_argument('--train-sizes-order', default='random', choices=('random', 'growing'),
                   help='growing: one after the other in the course of the schedule, small and fast ones first')
    g.add_argument('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    g.add_argument('--vflip', type=float, default=0., metavar='P', help='probability of a vertical flip')
    g.add_argument('--color-jitter', type=float, metavar='X', help='color jitter; timm skips it where --aa is on')
    g.add_argument('--aa', metavar='POLICY', help="AutoAugment policy, such as rand-m9-mstd0.5-inc1")
    g.add_argument('--train-interpolation', default='random', metavar='NAME', help='resizing in training')
    g.add_argument('--reprob', type=float, default=0., metavar='P', help='probability of random erasing')
    g.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='what erased pixels become')
    g.add_argument('--recount', type=int, default=1, metavar='N', help='most erased boxes per image')
    g.add_argument('--mixup', type=float, default=0., metavar='A', help='mixup alpha, 0 is off')
    g.add_argument('--cutmix', type=float, default=0., metavar='A', help='CutMix alpha, 0 is off')
    g.add_argument('--mixup-prob', type=float, default=1., metavar='P', help='probability of mixing a batch (or image)')
    g.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P',
                   help='probability of CutMix where both are on')
    g.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'),
                   help='what shares a mixing ratio')
    g.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N',
                   help='no mixing from this epoch on, 0: never off')
    g.add_argument('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')

    g = parser.add_argument_group('weight averaging')
    g.add_argument('--model-ema', action=_flag, default=False, help='evaluate and export averaged weights')
    g.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='X', help='its decay per update')
    g.add_argument('--model-ema-warmup', action=_flag, default=True,
                   help='let the decay grow from 0: short runs would average in their random start')

    g = parser.add_argument_group('precision and hardware')
    common.add_precision_arguments(g)
    g.add_argument('--channels-last', action=_flag, default=False, help='channels-last memory format')
    g.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    g.add_argument('--cuda-graph', action=_flag, default=False,
                   help='replay forward and backward as a CUDA graph: for small models, which wait for their launches')
    g.add_argument('--deterministic', action=_flag, default=False, help='refuse nondeterministic kernels (GPU)')
    g.add_argument('--sync-bn', action=_flag, default=False, help='batch norm statistics over all processes')
    g.add_argument('--dist-backend', metavar='NAME', help='torch.distributed backend (default: by device)')
    g.add_argument('--dist-url', metavar='URL', help='torch.distributed initialization (default: env://)')

    g = parser.add_argument_group('run')
    g.add_argument('--seed', type=int, default=42, metavar='N', help='seed of everything random')
    g.add_argument('--output', default='output/train', metavar='DIR', help='folder of all runs')
    g.add_argument('--experiment', metavar='NAME', help='folder of this run in it (default: date-model-size)')
    g.add_argument('--resume', metavar='FILE|auto',
                   help='continue from a last.pth.tar, with its options; auto: from OUTPUT/EXPERIMENT if it holds one, '
                        'else start')
    g.add_argument('--resume-with-changes', action=_flag, default=False,
                   help='continue although options differ that change the numbers')
    g.add_argument('--checkpoint-interval-steps', type=int, default=0, metavar='N',
                   help='write last.pth.tar every N optimizer updates too, 0: at the end of epochs only')
    g.add_argument('--val-interval', type=int, default=1, metavar='N',
                   help='epochs between evaluations; the last epoch is evaluated too; 0: never')
    g.add_argument('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'),
                   help='what makes an epoch the best')
    g.add_argument('--log-interval', type=float, default=60, metavar='S',
                   help='seconds between progress lines where there is no terminal')
    g.add_argument('--no-progress', action='store_true', help='no progress bar on a terminal either')
    common.add_logging_arguments(g)
    return parser


def parse_args(argv: Optional[List[str]] = None) -> Tuple[argparse.Namespace, Optional[dict]]:
    """Options and, on resume, the checkpoint. Later ones win: defaults, checkpoint, recipe, command line."""
    parser = get_parser()
    first, _ = parser.parse_known_args(argv)
    resume = first.resume
    if first.config:
        recipe = common.read_recipe(first.config)
        resume = resume or recipe.get('resume')
    else:
        recipe = {}
    if resume == 'auto':
        output, experiment = (getattr(first, k) if getattr(first, k) != parser.get_default(k) else recipe.get(k) or
                              parser.get_default(k) for k in ('output', 'experiment'))
        if not experiment:
            raise UserError('--resume auto needs --experiment, to know which run')
        resume = os.path.join(output, experiment, 'last.pth.tar')
        if not os.path.exists(resume):
            resume = None
    checkpoint = None
    if resume:
        checkpoint = read_training_checkpoint(resume)
        # a run may have been moved: it goes on where its checkpoint is, unless the command line says otherwise
        skip = ('config', 'resume', 'resume_with_changes', 'output', 'experiment')
        saved = {k: v for k, v in checkpoint['args'].items() if k not in skip}
        known = {a.dest for a in parser._actions}
        common.apply_defaults(parser, {k: v for k, v in saved.items() if k in known}, resume)
    if recipe:
        common.apply_defaults(parser, recipe, first.config)
    args = parser.parse_args(argv)
    args.resume = resume
    check_args(args)
    if checkpoint is not None:
        check_resume(args, checkpoint)
    return args, checkpoint


def check_args(args: argparse.Namespace) -> None:
    common.at_least(args, 1, 'batch_size', 'val_batch_size', 'epochs', 'grad_accum_steps', 'num_classes', 'in_chans',
                    'recount')
    common.at_least(args, 0, 'val_interval', 'workers', 'checkpoint_interval_steps', 'warmup_epochs', 'lr',
                    'weight_decay', 'seed', 'crop_padding', 'mixup', 'cutmix', 'cooldown_epochs', 'log_interval')
    for name in ('hflip', 'vflip', 'reprob', 'mixup_prob', 'mixup_switch_prob', 'smoothing', 'model_ema_decay', 'drop',
                 'drop_path'):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f'--{name.replace("_", "-")} must be between 0 and 1, got {value}')
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(f'mixup and CutMix pair images: --batch-size must be even, got {args.batch_size}')
    common.image_size(args.img_size)
    if args.minutes is not None and args.minutes <= 0:
        raise UserError(f'--minutes must be positive, got {args.minutes}')
    if args.data_on_device and (args.aa or args.vflip):
        raise UserError('--data-on-device works without --aa and --vflip')
    if args.cuda_graph and (args.grad_accum_steps > 1 or args.grad_checkpointing
                            or args.amp and args.amp_dtype == 'float16'):
        raise UserError('--cuda-graph works without --grad-accum-steps, --grad-checkpointing and --amp-dtype float16')
    if args.train_sizes and min(args.train_sizes) < 1:
        raise UserError(f'--train-sizes must be positive, got {min(args.train_sizes)}')


def checked_options(options: Dict[str, Any], where: str) -> Dict[str, Any]:
    """The options of a run as its checkpoint or args.yaml has them, each checked as on the command line."""
    parser = get_parser()
    known = {a.dest for a in parser._actions} - {'help'}
    common.apply_defaults(parser, {k: v for k, v in options.items() if k in known}, where)
    return vars(parser.parse_args([]))


def check_resume(args: argparse.Namespace, checkpoint: dict) -> None:
    """The continuation must be of the same run."""
    saved = checkpoint['args']
    changed = [f'{k}: {saved[k]!r} -> {v!r}' for k, v in vars(args).items()
               if k not in _FREE_ON_RESUME and k in saved and saved[k] != v]
    if changed and not args.resume_with_changes:
        raise UserError(f'{args.resume} was trained with other options, so that the result would be neither run: '
                        f'{"; ".join(changed)}. Pass --resume-with-changes if you mean it')


# ---------------------------------------------------------------------------------------------------------- training

def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """A batch (B, C, H, W) with its shorter side `size`, as evaluation at that size would resize the images."""
    height, width = images.shape[-2:]
    size = tuple(max(1, round(n * size / min(height, width))) for n in (height, width))
    if size == (height, width):
        return images
    return F.interpolate(images, size=size, mode='bilinear', antialias=True)


class Trainer:
    """One training run in one process (of several, under torchrun)."""

    def __init__(self, args: argparse.Namespace, checkpoint: Optional[dict], signals: Optional[Signals] = None):
        self.args = args
        self.signals = signals or Signals()
        self.progress = Progress()
        self.saved = 'There is no checkpoint yet'
        self.setup_device()
        self.primary = self.rank == 0
        self.run = Run(self.run_folder(), args)
        # before any random number: initial weights are a function of the seed, the same in all processes
        data.seed_everything(args.seed, 0)
        self.open_data()
        self.build_model()
        self.build_loaders()
        self.build_optimization()
        if checkpoint is not None:
            self.restore(checkpoint)
        self.wrap_model()
        self.started = None

    # -- setup

    def setup_device(self) -> None:
        args = self.args
        name = args.device or common.default_device()
        common.check_device(name)
        setup = argparse.Namespace(device=name, dist_backend=args.dist_backend, dist_url=args.dist_url)
        try:
            self.device = init_distributed_device(setup)
        except (RuntimeError, AssertionError, ValueError) as e:
            raise UserError(f'cannot start distributed training: {common.one_line(e)}') from None
        self.rank, self.world_size, self.distributed = setup.rank, setup.world_size, setup.distributed
        self.control = dist.new_group(backend='gloo') if self.distributed else None  # of the CPU: no wait for the GPU
        self.asked: Optional[Tuple[Any, torch.Tensor]] = None
        self.spent = 0.  # of --minutes, see asked_to_stop
        self.autocast = common.autocast(self.device, args.amp, args.amp_dtype)
        if args.deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        elif self.device.type == 'cuda':
            torch.backends.cudnn.benchmark = True

    def run_folder(self) -> str:
        args = self.args
        if args.resume and args.experiment is None:
            args.output, args.experiment = os.path.split(os.path.dirname(os.path.abspath(args.resume)))
        if args.experiment is None:
            size = f'-{args.img_size[0]}' if args.img_size else ''
            stamp = datetime.now().strftime('%Y%m%d-%H%M%S')
            name = f'{stamp}-{"".join(c if c.isalnum() or c in "._-" else "_" for c in args.model)}{size}'
            if self.distributed:  # all processes write and read one folder
                names = [name]
                dist.broadcast_object_list(names, src=0)
                name = names[0]
            args.experiment = name
        return os.path.join(args.output, args.experiment)

    def open_data(self) -> None:
        args = self.args
        shared = dict(class_map=args.class_map, download=args.dataset_download,
                      cache_images=args.cache_images or args.data_on_device,
                      input_key=args.input_key, target_key=args.target_key, seed=args.seed, verbose=self.primary)
        self.train_data = datasets.open_dataset(args.dataset, args.data_dir, args.train_split, is_training=True,
                                                batch_size=args.batch_size, num_samples=args.train_num_samples,
                                                **shared)
        self.val_data = datasets.open_dataset(args.dataset, args.data_dir, args.val_split, strict=True,
                                              batch_size=args.val_batch_size or args.batch_size,
                                              num_samples=args.val_num_samples, **shared)
        self.streaming = datasets.is_streaming(self.train_data)
        if self.streaming and args.checkpoint_interval_steps:
            raise UserError('a streaming data set cannot resume in the middle of an epoch: drop '
                            '--checkpoint-interval-steps (checkpoints are then written at the end of epochs)')
        self.label_names = datasets.class_names(self.train_data)
        self.label_descriptions = datasets.class_descriptions(self.train_data)

    def build_model(self) -> None:
        args = self.args
        num_classes = args.num_classes or (len(self.label_names) if self.label_names else None)
        kwargs = {k: v for k, v in (('num_classes', num_classes), ('in_chans', args.in_chans), ('drop_rate', args.drop),
                                    ('drop_path_rate', args.drop_path)) if v is not None}
        pretrained = args.pretrained and not args.resume
        model = common.create_model(args.model, pretrained=pretrained, **kwargs, **args.model_kwargs)
        num_classes = getattr(model, 'num_classes', num_classes)
        train, val = (f'{args.data_dir or args.dataset} ({s})' for s in (args.train_split, args.val_split))
        asked = args.num_classes is not None
        datasets.match_classes(self.train_data, num_classes, train, asked=asked)
        datasets.match_classes(self.val_data, num_classes, val, self.label_names, of=train, asked=asked)
        if args.initial_checkpoint and not args.resume:
            common.load_weights(model, args.initial_checkpoint, args.model)
        for pattern in args.freeze:
            matching = [p for n, p in model.named_parameters() if fnmatch.fnmatchcase(n, pattern)]
            if not matching:
                raise UserError(f'--freeze {pattern!r} matches no parameter of {args.model}')
            for parameter in matching:
                parameter.requires_grad = False
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError('--freeze leaves nothing to train')
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
        self.data_config = common.data_config(args, model)
        # what was trained is what the exported weights ask for
        kept = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
        model.pretrained_cfg.update({k: self.data_config[k] for k in kept}, num_classes=num_classes,
                                    label_names=self.label_names, label_descriptions=self.label_descriptions)
        self.num_classes = num_classes
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.memory_format)
        if args.sync_bn and self.distributed:
            from timm.layers import convert_sync_batchnorm
            self.model = convert_sync_batchnorm(self.model)
        self.ema = None
        if args.model_ema:
            self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    def build_loaders(self) -> None:
        args, config = self.args, self.data_config
        if args.data_on_device:
            self.sampler = data.EpochBatches(len(self.train_data), args.batch_size, args.seed, self.rank,
                                             self.world_size)
            self.train_loader = DeviceBatches(
                self.train_data.images, self.train_data.targets(), self.sampler, seed=args.seed,
                size=config['input_size'][-2:], mean=config['mean'], std=config['std'], device=self.device,
                crop_mode=None if args.no_aug else args.train_crop_mode or 'rrc', padding=args.crop_padding,
                scale=args.scale or (0.08, 1.), ratio=args.ratio or (3 / 4, 4 / 3),
                hflip=0. if args.no_aug else args.hflip, color_jitter=0. if args.no_aug else args.color_jitter or 0.)
        else:
            loader = dict(batch_size=args.batch_size, transform=self.train_transform(), mean=config['mean'],
                          std=config['std'], channels=config['input_size'][0], device=self.device,
                          workers=args.workers, seed=args.seed, pin_memory=args.pin_memory)
            if self.streaming:
                self.train_loader, self.sampler = data.streaming_loader(self.train_data, **loader), None
            else:
                self.train_loader, self.sampler = data.train_loader(
                    self.train_data, rank=self.rank, world_size=self.world_size, **loader)
        self.val_loader = data.eval_loader(
            self.val_data, config, batch_size=args.val_batch_size or args.batch_size, device=self.device,
            workers=args.workers, distributed=self.distributed, pin_memory=args.pin_memory)
        self.batches = len(self.train_loader)
        self.mixup = None
        if args.mixup > 0 or args.cutmix > 0:
            self.mixup = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
                               switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
                               num_classes=self.num_classes)
        self.erasing = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=self.device) \
            if args.reprob > 0 and not args.no_aug else None

    def train_transform(self):
        args, config = self.args, self.data_config
        try:
            return data.train_transform(
                config['input_size'], crop_mode=args.train_crop_mode, crop_padding=args.crop_padding,
                no_aug=args.no_aug, scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip,
                color_jitter=args.color_jitter, auto_augment=args.aa, interpolation=args.train_interpolation,
                mean=config['mean'], std=config['std'])
        except (AssertionError, KeyError, ValueError) as e:
            raise UserError(f'augmentation options do not work: {type(e).__name__}: {common.one_line(e)}') from e

    def build_optimization(self) -> None:
        args = self.args
        if self.mixup is not None:
            criterion = SoftTargetCrossEntropy()
        elif args.smoothing > 0:
            criterion = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
        else:
            criterion = torch.nn.CrossEntropyLoss()
        self.criterion = criterion.to(self.device)
        args_for_timm = argparse.Namespace(**{**vars(args), 'opt_args': args.opt_kwargs})
        try:
            self.optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(cfg=args_for_timm))
        except (AssertionError, ValueError, TypeError, KeyError) as e:
            raise UserError(f'cannot make the optimizer {args.opt!r}: {common.one_line(e)}') from e
        self.scaler = NativeScaler(device=self.device.type) if args.amp and args.amp_dtype == 'float16' else None
        self.updates_per_epoch = math.ceil(self.batches / args.grad_accum_steps)
        args_for_timm.sched_on_updates = not args.sched_on_epochs
        if args.decay_epochs is None and args.sched not in ('wsd', 'rsqrt'):
            args_for_timm.decay_epochs = 90
        try:
            self.scheduler, self.epochs = create_scheduler_v2(
                self.optimizer, **scheduler_kwargs(args_for_timm, decreasing_metric=args.eval_metric == 'loss'),
                updates_per_epoch=self.updates_per_epoch)
        except (AssertionError, ValueError, TypeError) as e:
            raise UserError(f'cannot make the schedule {args.sched!r}: {common.one_line(e)}') from e
        if self.scheduler is None and args.sched != 'none':
            raise UserError(f'this version of timm has no schedule {args.sched!r}')
        self.epochs = int(self.epochs)
        self.parameters = list(model_parameters(self.model, exclude_head='agc' in args.clip_mode))

    def wrap_model(self) -> None:
        args = self.args
        self.train_model = self.model
        if args.torchcompile:
            self.train_model = torch.compile(self.model, backend=args.torchcompile,
                                             dynamic=False if args.cuda_graph else None)
        self.graph = None
        if args.cuda_graph:
            if self.device.type != 'cuda' or self.distributed:
                raise UserError('--cuda-graph needs one process on a CUDA device')
            self.graph = GraphedStep(self.train_model, self.criterion, self.autocast, self.optimizer,
                                     others=self.model, size=self.data_config['input_size'][-2:])
        if self.distributed:
            from torch.nn.parallel import DistributedDataParallel
            ids = None if self.device.type == 'cpu' else [self.device]
            self.train_model = DistributedDataParallel(self.train_model, device_ids=ids)

    # -- state

    def state(self) -> dict:
        state = dict(
            format=FORMAT,
            arch=self.args.model,
            args=dict(vars(self.args)),
            epoch=self.progress.epoch,
            progress=self.progress.state_dict(),
            world_size=self.world_size,
            train_samples=None if self.streaming else len(self.train_data),
            label_names=self.label_names,
            state_dict=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        if self.ema is not None:
            state['state_dict_ema'] = self.ema.module.state_dict()
        if self.scheduler is not None:
            state['scheduler'] = self.scheduler.state_dict()
        if self.scaler is not None:
            state[self.scaler.state_dict_key] = self.scaler.state_dict()
        return state

    def save(self, best: bool = False) -> None:
        """Write a checkpoint; only of numbers that are finite, so that each is a state to go back to."""
        p = self.progress
        averaged = {} if self.ema is None else self.ema.module.state_dict()
        moments = {f'optimizer.{i}.{k}': v for i, state in self.optimizer.state_dict()['state'].items()
                   for k, v in state.items() if isinstance(v, torch.Tensor)}
        for what, state in (('weights', self.model.state_dict()), ('averaged weights', averaged),
                            ('optimizer state', moments)):
            bad = common.not_finite(state)
            if bad:
                raise UserError(f'the {what} are not finite in epoch {p.epoch} by batch {p.batch}: '
                                f'{common.one_line(", ".join(bad), 120)}. {self.way_back()}')
        loss_sum, samples = self.over_processes(p.loss_sum, p.samples)
        if self.primary:
            state = self.state()
            state['progress'].update(loss_sum=loss_sum, samples=samples)
            self.run.save(state, best)
        self.note_saved()

    def note_saved(self) -> None:
        """Remember what the last checkpoint is, for who has to go back to it."""
        p = self.progress
        largest = torch.stack([v.detach().abs().max().float() for v in self.model.parameters()]).max().item()
        loss = f', training loss {p.loss_sum / p.samples:.4g}' if p.samples else ''
        self.saved = (f'{self.run.folder / "last.pth.tar"} is of epoch {p.epoch}, batch {p.batch}{loss}; its weights '
                      f'are finite, the largest {largest:.3g}')

    def way_back(self) -> str:
        """What a run that diverged can go back to."""
        p = self.progress
        best = f'. best.pth.tar is of epoch {p.best_epoch}' if p.best_epoch is not None else ''
        return f'{self.saved}{best}. A lower --lr, --clip-grad or bfloat16 may help'

    def restore(self, checkpoint: dict) -> None:
        args = self.args
        for what, saved, now in (
                ('processes', checkpoint['world_size'], self.world_size),
                ('training images', checkpoint['train_samples'], None if self.streaming else len(self.train_data)),
        ):
            if saved != now and not args.resume_with_changes:
                raise UserError(f'{args.resume} was trained with {saved} {what}, now there are {now}. '
                                'Pass --resume-with-changes if you mean it')
        if common.upgraded(self.model, checkpoint['state_dict']) is not None:
            raise UserError(f'{args.resume} is of version 0.1.0, whose optimizer state has no counterpart today: '
                            '--initial-checkpoint starts from its weights')
        names = checkpoint.get('label_names')  # 0.1.0 had none
        if names and self.label_names and names != self.label_names:
            changed = sorted(set(names) ^ set(self.label_names)) or 'the same names in another order'
            raise UserError(f'{args.resume} was trained with other classes than {args.data_dir or args.dataset} has: '
                            f'{common.one_line(str(changed), 160)}')
        try:
            self.model.load_state_dict(checkpoint['state_dict'])
            fresh = [{k: v for k, v in g.items() if k != 'params'} for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            if args.resume_with_changes:  # the checkpoint's moments, this run's settings
                for group, settings in zip(self.optimizer.param_groups, fresh):
                    group.update(settings)
            if self.ema is not None:
                self.ema.module.load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
            if self.scheduler is not None and 'scheduler' in checkpoint and not args.resume_with_changes:
                self.scheduler.load_state_dict(checkpoint['scheduler'])
            if self.scaler is not None and self.scaler.state_dict_key in checkpoint:
                self.scaler.load_state_dict(checkpoint[self.scaler.state_dict_key])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError) as e:
            raise UserError(f'{args.resume} does not fit this run: {common.one_line(e)}') from None
        common.check_finite(checkpoint['state_dict'], args.resume)
        self.progress.load_state_dict({k: v for k, v in checkpoint['progress'].items() if k in vars(self.progress)})
        self.note_saved()
        if not self.primary:  # the sums are over all processes: one of them carries them on
            self.progress.loss_sum, self.progress.samples = 0., 0

    # -- running

    def log(self, text: str) -> None:
        if self.primary:
            from tqdm import tqdm
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def fit(self) -> None:
        args, p = self.args, self.progress
        lost = None
        if self.primary:
            self.run.create(resume=bool(args.resume))
            if args.resume:
                self.run.adopt(args.resume)
                lost = self.run.restore_best(p)
        self.scalars = common.Scalars(args, self.run.folder, active=self.primary)
        if self.distributed:
            dist.barrier()
        height, width = self.data_config['input_size'][-2:]
        self.log(f'{args.model}: {common.count_parameters(self.model) / 1e6:.2f} M parameters, {height}x{width} px, '
                 f'{self.num_classes} classes, on {self.device}' +
                 (f' x {self.world_size}' if self.distributed else ''))
        self.log(f'{self.describe(self.train_data)} training and {self.describe(self.val_data)} evaluation images, '
                 f'{self.epochs} epochs of {self.updates_per_epoch} updates; run folder {self.run.folder}')
        if args.resume:
            self.log(f'resumed from {args.resume} at epoch {p.epoch}, batch {p.batch} of {self.batches}')
        if lost:
            self.log(lost)
        if p.epoch >= self.epochs:
            self.log(f'nothing to do: the run has its {self.epochs} epochs')
        self.started, self.seconds_before, self.before_first_update = time.monotonic(), p.train_seconds, None
        self.spent = self.seconds_before / (60 * args.minutes) if args.minutes else 0.
        ended = p.epoch >= self.epochs
        while not ended:
            train = self.train_epoch()
            ended = p.epoch + 1 >= self.epochs or self.spent >= 1
            self.finish_epoch(train, ended)
        if self.primary:
            self.take_best()
            folder = self.run.export(self.model, self.label_names, self.label_descriptions)
            what = f'the {p.best_kind} of the last epoch, which were never evaluated'
            if p.best_metric is not None:
                what = (f'the {p.best_kind} of epoch {p.best_epoch}, the best that were evaluated: '
                        f'{args.eval_metric} {p.best_metric:.3f}')
            self.log(f'done. Exported to {folder}: {what}')
        self.scalars.close()
        if self.distributed:
            dist.barrier()
            dist.destroy_process_group()

    def take_best(self) -> None:
        """Put the weights that were evaluated best into the model."""
        p = self.progress
        if p.best_metric is None and self.ema is not None:
            p.best_kind = 'averaged weights'
        state = {'state_dict': self.model.state_dict()}
        if p.best_epoch is not None and p.best_epoch + 1 < p.epoch:
            state = read_training_checkpoint(str(self.run.folder / 'best.pth.tar'))
        elif self.ema is not None:
            state['state_dict_ema'] = self.ema.module.state_dict()
        self.model.load_state_dict(state['state_dict_ema' if p.best_kind == 'averaged weights' else 'state_dict'])

    @staticmethod
    def describe(dataset) -> str:
        try:
            return f'{len(dataset):,}' if len(dataset) else 'streamed'
        except TypeError:
            return 'streamed'

    def train_epoch(self) -> Dict[str, float]:
        args, p = self.args, self.progress
        epoch, accum = p.epoch, args.grad_accum_steps
        if self.sampler is not None:
            self.sampler.set_position(epoch, p.batch)
        else:
            self.train_data.set_epoch(epoch)
            data.seed_stream(self.train_loader, args.seed, 4, epoch, self.rank)
        if self.mixup is not None:
            at = self.scheduled_updates() // self.updates_per_epoch if args.minutes else epoch
            self.mixup.mixup_enabled = not (args.mixup_off_epoch and at >= args.mixup_off_epoch)
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self.scheduled_updates())
        self.train_model.train()
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        last_group = self.batches - (self.batches % accum or accum)
        loss_dtype = torch.float32 if self.device.type == 'mps' else torch.float64
        loss_sum = torch.tensor(p.loss_sum, dtype=loss_dtype, device=self.device)
        bar = common.progress(total=self.batches, initial=p.batch, desc=f'epoch {epoch}',
                              disable=not self.primary or args.no_progress)
        every = common.Every(args.log_interval if bar.disable else 0.5)  # reading the loss waits for the device
        begin, start_batch, seen = time.perf_counter(), p.batch, 0

        with bar:
            for i, (images, target) in enumerate(self.train_loader, start=p.batch):
                need_update = (i + 1) % accum == 0 or i + 1 == self.batches
                group = self.batches - last_group if i >= last_group else accum
                # everything random below is a function of this
                data.seed_everything(args.seed, 3, epoch, i, self.rank)
                if self.erasing is not None:
                    images = self.erasing(images)
                if self.mixup is not None:
                    images, target = self.mixup(images, target)
                if args.train_sizes:
                    images = resize(images, self.train_size())
                images = images.contiguous(memory_format=self.memory_format)
                sync = nullcontext() if need_update or not self.distributed else self.train_model.no_sync()
                if self.graph is not None:
                    loss = self.graph(images, target)
                    self.update()
                else:
                    with sync:
                        with self.autocast():
                            loss = self.criterion(self.train_model(images), target)
                        self.backward(loss / group, need_update)
                loss_sum += loss.detach().to(loss_sum.dtype) * len(images)
                p.samples += len(images)
                p.batch = i + 1
                seen += len(images)
                if not need_update:
                    bar.update()
                    continue
                p.updates += 1
                if self.before_first_update is None:
                    common.synchronize(self.device)
                    self.before_first_update = time.monotonic() - self.started
                self.optimizer.zero_grad(set_to_none=self.graph is None)
                if self.ema is not None:
                    self.ema.update(self.model, step=p.updates)
                lr = self.top_rate()
                stop = self.asked_to_stop()
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=self.scheduled_updates())
                bar.update()
                checkpoint = args.checkpoint_interval_steps and p.updates % args.checkpoint_interval_steps == 0
                report = (bool(args.log_interval) or not bar.disable) and every()
                if checkpoint or stop or (report and self.primary):
                    p.loss_sum = loss_sum.item()
                    self.check_finite(p.loss_sum, epoch, i)
                if checkpoint and not stop:
                    self.save()
                if stop:
                    self.stop()
                if report and self.primary:
                    speed = seen * self.world_size / (time.perf_counter() - begin)
                    if bar.disable:
                        eta = (time.perf_counter() - begin) / (i + 1 - start_batch) * (self.batches - i - 1)
                        self.log(f'  epoch {epoch} [{i + 1}/{self.batches}] loss {p.loss_sum / p.samples:.4f} '
                                 f'lr {lr:.2e} {speed:.0f} img/s, {common.duration(eta)} left in epoch')
                    else:
                        bar.set_postfix_str(f'loss {p.loss_sum / p.samples:.4f}, lr {lr:.2e}, {speed:.0f} img/s')
                if self.spent >= 1:
                    break
        common.synchronize(self.device)
        p.loss_sum = loss_sum.item()
        self.check_finite(p.loss_sum, epoch, p.batch - 1)
        seconds = time.perf_counter() - begin
        p.train_seconds += seconds
        loss_sum, samples = self.over_processes(p.loss_sum, p.samples)
        if self.distributed:
            # the first process's statistics, as in its checkpoints: an average could not be resumed exactly
            distribute_bn(self.model, self.world_size, reduce=False)
            if self.ema is not None:
                distribute_bn(self.ema.module, self.world_size, reduce=False)
        return dict(loss=loss_sum / max(samples, 1), img_s=seen * self.world_size / max(seconds, 1e-9), seconds=seconds)

    def over_processes(self, loss_sum: float, samples: int) -> Tuple[float, int]:
        """The sums over all processes."""
        if not self.distributed:
            return loss_sum, samples
        totals = torch.tensor([loss_sum, samples], dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals[0].item(), int(totals[1].item())

    def backward(self, loss: torch.Tensor, need_update: bool) -> None:
        args = self.args
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode,
                        parameters=self.parameters, need_update=need_update)
            return
        loss.backward()
        if need_update:
            self.update()

    def train_size(self) -> int:
        """The size of the next batch, see --train-sizes-order."""
        sizes = self.args.train_sizes
        if self.args.train_sizes_order == 'random':
            return random.choice(sizes)
        at = self.scheduled_updates() * len(sizes) // (self.epochs * self.updates_per_epoch)
        return sizes[min(at, len(sizes) - 1)]

    def update(self) -> None:
        if self.args.clip_grad is not None:
            dispatch_clip_grad(self.parameters, value=self.args.clip_grad, mode=self.args.clip_mode)
        self.optimizer.step()

    def clock(self) -> float:
        """The part of --minutes that is over, 0 without; training before a resume counts.

        What comes before the first update, compilation above all, takes its time, but nothing of the schedule.
        """
        if not self.args.minutes or self.before_first_update is None:
            return self.spent
        training = self.seconds_before + time.monotonic() - self.started - self.before_first_update
        return training / max(60 * self.args.minutes - self.before_first_update, 1e-3)

    def scheduled_updates(self) -> int:
        """Where the schedule is: at the updates that are done, or as far as the clock is, if that is further."""
        return max(self.progress.updates, int(min(self.spent, 1.) * self.epochs * self.updates_per_epoch))

    def top_rate(self) -> float:
        """The learning rate of the last layers: with --layer-decay the first group's is far below it."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    def check_finite(self, loss_sum: float, epoch: int, batch: int) -> None:
        if not math.isfinite(loss_sum):
            raise UserError(f'the loss is {loss_sum} in epoch {epoch} by batch {batch}: training diverged. '
                            f'{self.way_back()}')

    def asked_to_stop(self) -> bool:
        """Whether a process of the run got a signal; and sets `spent`, the part of --minutes that is over.

        Both are the same in all processes at the same update: over processes they come one call late, because nobody
        waits for them. Clocks of their own would give each process its learning rate and its end.
        """
        if not self.distributed:
            self.spent = self.clock()
            return self.signals.number is not None
        state = torch.tensor([self.signals.number or 0, self.clock()], dtype=torch.float64)
        before, self.asked = self.asked, (dist.all_reduce(state, dist.ReduceOp.MAX, self.control, async_op=True), state)
        if before is None:
            return False
        before[0].wait()
        number, self.spent = int(before[1][0]), before[1][1].item()
        if number:
            self.asked[0].wait()
            self.signals.number = number
        return bool(number)

    def stop(self) -> None:
        """Save, and end because of a signal."""
        last = self.run.folder / 'last.pth.tar'
        if self.streaming:  # resumes at the last complete epoch
            text = f'continue at the last complete epoch with --resume {last}' if last.exists() else 'nothing is saved'
        else:
            self.save()
            text = f'continue with --resume {last}'
        raise Stopped(self.signals.number, text)

    def check_stop(self) -> None:
        """Between the batches of an evaluation."""
        if self.asked_to_stop():
            self.stop()

    def evaluate(self, model: torch.nn.Module, epoch: int) -> Dict[str, float]:
        return validation.evaluate(
            model, self.val_loader, self.device, self.autocast, distributed=self.distributed,
            memory_format=self.memory_format, progress=self.primary and not self.args.no_progress,
            desc=f'evaluate {epoch}', each_batch=self.check_stop)

    def finish_epoch(self, train: Dict[str, float], ended: bool) -> None:
        """Evaluate, write the summary, step the schedule, save."""
        args, p = self.args, self.progress
        epoch, best, line, row = p.epoch, False, '', {}
        lr = self.top_rate()
        if args.val_interval and ((epoch + 1) % args.val_interval == 0 or ended):
            found = {'weights': self.evaluate(self.model, epoch)}
            if self.ema is not None:
                found['averaged weights'] = self.evaluate(self.ema.module, epoch)
            sign = -1 if args.eval_metric == 'loss' else 1
            kind = max(found, key=lambda k: sign * found[k][args.eval_metric])
            metric = found[kind][args.eval_metric]
            best = math.isfinite(metric) and (p.best_metric is None or sign * metric > sign * p.best_metric)
            if best:
                p.best_metric, p.best_epoch, p.best_kind = metric, epoch, kind
            line = ''.join(f', top1 {m["top1"]:.2f} top5 {m["top5"]:.2f} loss {m["loss"]:.4f}'
                           + (f' ({k})' if len(found) > 1 else '') for k, m in found.items()) + (' *' if best else '')
            row = {f'eval_{k}': found[kind][k] for k in ('loss', 'top1', 'top5')}
        else:
            metric = None
        self.log(f'epoch {epoch}: train loss {train["loss"]:.4f}{line}, lr {lr:.2e}, {train["img_s"]:.0f} img/s, '
                 f'{common.duration(train["seconds"])}, about '
                 f'{common.duration(p.train_seconds / (epoch + 1) * (self.epochs - epoch - 1))} left')
        if self.primary:
            row = dict(train_loss=train['loss'], **row, lr=lr)
            self.run.append_summary(dict(epoch=epoch, **row))
            self.scalars.log(epoch, row)
        p.epoch, p.batch, p.loss_sum, p.samples = epoch + 1, 0, 0., 0
        if self.scheduler is not None:
            self.scheduler.step(p.epoch, metric)
        self.save(best)


def main() -> int:
    args, checkpoint = parse_args()
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(name)s: %(message)s')
    with Signals() as signals:
        trainer = Trainer(args, checkpoint, signals)
        try:
            trainer.fit()
        except Stopped as e:
            print(f'train.py: stopped by {signal.Signals(e.number).name}: {e}', file=sys.stderr)
            return 128 + e.number
        except RuntimeError as e:
            if not trainer.distributed or not (isinstance(e, dist.DistError) or 'gloo' in str(e)):
                raise
            raise UserError(f'another process of the run has ended ({common.one_line(e, 120)}). '
                            f'{trainer.saved}') from None
        finally:
            trainer.run.release()
    return 0


if __name__ == '__main__':
    common.run(main)
