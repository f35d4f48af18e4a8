#!/usr/bin/env python
"""Measure a trained detector or segmenter with the config's own evaluator.

    python tools/test_openmmlab.py mask-rcnn_vim2-t_fpn_1x_coco work_dirs/mask-rcnn_vim2-t_fpn_1x_coco/epoch_12.pth
    python tools/test_openmmlab.py vim2-t_upernet_8xb2-160k_ade20k-512x512 CHECKPOINT --tta
"""
import argparse
import json

import _common as common
import _openmmlab
from _common import UserError


def get_parser() -> argparse.ArgumentParser:
    parser = _openmmlab.get_parser(__doc__.splitlines()[0], 'name of a config of this package, or path of any')
    parser.add_argument('checkpoint', help='weights that training saved (.pth)')
    parser.add_argument('--tta', action='store_true',
                        help="test-time augmentation, the config's tta_model and tta_pipeline: several scales, flipped")
    parser.add_argument('--show-dir', metavar='DIR', help='write pictures of predictions into DIR of the work dir')
    parser.add_argument('--json', action='store_true', help='print the metrics as JSON, last')
    return parser


def set_tta(cfg, config: str) -> None:
    from mmengine.config import ConfigDict
    missing = [k for k in ('tta_model', 'tta_pipeline') if k not in cfg]
    if missing:
        raise UserError(f'--tta: {config} has no {" and no ".join(missing)}')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def set_pictures(cfg, config: str, folder: str) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UserError(f'--show-dir: {config} has no default_hooks.visualization')
    hook.draw = True
    if cfg.get('default_scope') == 'mmdet':
        hook.test_out_dir = folder
    else:  # mmseg draws into the visualizer's folder
        hook.interval = 1
        cfg.visualizer.save_dir = folder


def main() -> None:
    args = get_parser().parse_args()
    cfg = _openmmlab.load_config(args)
    if 'test_dataloader' not in cfg:
        raise UserError(f'{args.config} has no test_dataloader: it is no config to test with')
    _openmmlab.check_checkpoint(args.checkpoint)
    cfg.load_from = args.checkpoint
    if args.tta:
        set_tta(cfg, args.config)
    if args.show_dir:
        set_pictures(cfg, args.config, args.show_dir)
    metrics = _openmmlab.build_runner(cfg).test()
    if args.json:
        print(json.dumps({k: float(v) for k, v in metrics.items()}))


if __name__ == '__main__':
    common.run(main)
