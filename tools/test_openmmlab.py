#!/usr/bin/env python
"""Measure a trained detector or segmenter with the config's own evaluator.

    python tools/test_openmmlab.py mask-rcnn_vim2-t_fpn_1x_coco work_dirs/mask-rcnn_vim2-t_fpn_1x_coco/epoch_12.pth
    python tools/test_openmmlab.py vim2-t_upernet_8xb2-160k_ade20k-512x512 CHECKPOINT --tta
"""
import argparse
import functools
import json
import os
from typing import Any, Dict

import _common as common
import _openmmlab
from _common import UserError


def get_parser() -> argparse.ArgumentParser:
    parser = _openmmlab.get_parser(__doc__.splitlines()[0], 'name of a config of this package, or path of any')
    parser.add_argument('checkpoint', nargs='?', help='weights that training saved (.pth)')
    parser.add_argument('--tta', action='store_true',
                        help="test-time augmentation, the config's tta_model and tta_pipeline: several scales, each "
                             'flipped too; of detectors boxes only')
    parser.add_argument('--show-dir', metavar='DIR', help='write pictures of predictions into DIR of the work dir')
    parser.add_argument('--complexity', nargs=2, type=int, metavar=('H', 'W'),
                        help="no test: the model's parameters and its FLOPs for one image of this size, by mmengine")
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
    if cfg.tta_model.type.rpartition('.')[2] == 'DetTTAModel':  # it merges boxes, and refuses masks
        cfg.test_evaluator.metric = 'bbox'
        if 'mask_head' in cfg.model.module.get('roi_head', {}):
            cfg.model.module.roi_head.update(mask_head=None, mask_roi_extractor=None)


def set_pictures(cfg, config: str, folder: str) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UserError(f'--show-dir: {config} has no default_hooks.visualization')
    hook.draw = True
    folder = os.path.abspath(os.path.join(cfg.work_dir, folder))
    if cfg.get('default_scope') == 'mmdet':
        hook.test_out_dir = folder
    else:  # mmseg draws into the visualizer's folder
        hook.interval = 1
        cfg.visualizer.save_dir = folder


def complexity(cfg, height: int, width: int) -> Dict[str, Any]:
    """Parameters, and FLOPs as mmengine counts them: a multiplication with its addition is one."""
    import torch
    from mmengine.analysis import get_model_complexity_info
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    if cfg.get('default_scope') == 'mmdet':  # a detector's forward wants to know the image's size
        from mmdet.structures import DetDataSample
        size = (height, width)
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
                                             scale_factor=(1., 1.)))
        model.forward = functools.partial(model._forward, batch_data_samples=[sample])
    with torch.no_grad():
        info = get_model_complexity_info(model, (3, height, width), show_table=False, show_arch=False)
    params = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return dict(height=height, width=width, flops=info['flops'], params=sum(params.values()),
                params_of={name: n for name, n in params.items() if n})


def main() -> None:
    args = get_parser().parse_args()
    cfg = _openmmlab.load_config(args)
    if args.complexity:
        info = complexity(cfg, *args.complexity)
        if args.json:
            return print(json.dumps(info))
        parts = ', '.join(f'{name} {n / 1e6:.2f} M' for name, n in info['params_of'].items())
        return print(f'{info["params"] / 1e6:.2f} M parameters ({parts}), {info["flops"] / 1e9:.1f} GFLOPs for '
                     f'{info["height"]} x {info["width"]}')
    if not args.checkpoint:
        raise UserError('give a checkpoint, or --complexity H W')
    if 'test_dataloader' not in cfg:
        raise UserError(f'{args.config} has no test_dataloader: it is no config to test with')
    _openmmlab.check_checkpoint(args.checkpoint)
    _openmmlab.check_data(cfg, 'test')
    cfg.load_from = args.checkpoint
    if args.tta:
        set_tta(cfg, args.config)
    if args.show_dir:
        set_pictures(cfg, args.config, args.show_dir)
    metrics = _openmmlab.execute(_openmmlab.build_runner(cfg).test, _openmmlab.data_roots(cfg, 'test'))
    if args.json:
        print(json.dumps({k: float(v) for k, v in metrics.items()}))


if __name__ == '__main__':
    common.run(main)
