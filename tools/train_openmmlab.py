#!/usr/bin/env python
"""Train a detector or a segmenter with mmengine's Runner: a config of this package by name, or any config by its path.

    python tools/train_openmmlab.py mask-rcnn_vim2-t_fpn_1x_coco
    torchrun --nproc-per-node 8 tools/train_openmmlab.py vim2-t_upernet_8xb2-160k_ade20k-512x512 --launcher pytorch
    python tools/train_openmmlab.py CONFIG --resume --cfg-options optim_wrapper.optimizer.lr=5e-5
"""
import argparse

import _common as common
import _openmmlab
from _common import UserError


def get_parser() -> argparse.ArgumentParser:
    parser = _openmmlab.get_parser(__doc__.splitlines()[0], 'name of a config of this package, or path of any')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='FILE',
                        help='continue from a checkpoint; without FILE from the last one in the work dir, if any')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--amp-dtype', choices=('float16', 'bfloat16'),
                        help='its low precision; bfloat16 needs no loss scaling (default: float16 on GPUs, else '
                             'bfloat16)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate with the batch size, from the config's base_batch_size")
    common.add_logging_arguments(parser)
    return parser


def set_amp(cfg, dtype: str) -> None:
    import torch
    on_gpu = torch.accelerator.is_available()
    dtype = dtype or ('float16' if on_gpu else 'bfloat16')
    if dtype == 'bfloat16':
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
    elif on_gpu:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    else:
        raise UserError('--amp-dtype float16 needs a GPU: use bfloat16')


def main() -> None:
    args = get_parser().parse_args()
    if args.amp_dtype and not args.amp:
        raise UserError('--amp-dtype needs --amp')
    cfg = _openmmlab.load_config(args)
    if 'train_dataloader' not in cfg:
        raise UserError(f'{args.config} has no train_dataloader: it is no config to train with')
    if args.amp:
        set_amp(cfg, args.amp_dtype)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    _openmmlab.add_backends(cfg, args)
    parts = ('train', 'val') if cfg.get('val_cfg') else ('train',)
    _openmmlab.check_data(cfg, *parts)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if cfg.get('load_from'):
        _openmmlab.check_checkpoint(cfg.load_from)
    _openmmlab.execute(_openmmlab.build_runner(cfg).train, _openmmlab.data_roots(cfg, *parts))


if __name__ == '__main__':
    common.run(main)
