#!/usr/bin/env python
"""Measure a classifier: top-1, top-5, loss and images per second of any timm model on any data set.

    python tools/validate.py --model vim2_nano_patch2_32.cifar10 --dataset npz --data-dir DIR --split test
    python tools/validate.py --model vim2_nano_patch2_32 --checkpoint RUN/last.pth.tar --dataset npz --data-dir DIR
    python tools/validate.py --model local-dir:output/train/RUN/model --data-dir imagenet --img-size 256 --json
"""
import argparse
import time
from typing import Callable, Dict, Sequence

import torch
import torch.distributed as dist
from timm.utils import accuracy

import _common as common
import _data as data
import _datasets as datasets
from _common import UserError


@torch.inference_mode()
def evaluate(model, loader, device: torch.device, autocast, *, distributed: bool = False,
             memory_format=torch.contiguous_format, progress: bool = True, desc: str = 'evaluate',
             each_batch: Callable[[], None] = lambda: None) -> Dict[str, float]:
    """Top-1 and top-5 (per cent), mean cross-entropy, number of images and images per second.

    With `distributed` the figures are over all processes, and the images that a sampler repeats to make the
    processes even are not counted twice.
    """
    model.eval()
    limit = None
    if distributed and not datasets.is_streaming(loader.dataset):
        world, rank = dist.get_world_size(), dist.get_rank()
        limit = (len(loader.dataset) + world - 1 - rank) // world
    totals = torch.zeros(4, dtype=torch.float64)  # images, top-1 and top-5 hits, summed loss
    count = 0
    begin = time.perf_counter()
    with common.progress(total=len(loader), desc=desc, disable=not progress) as bar:
        for images, target in loader:
            with autocast():
                output = model(images.contiguous(memory_format=memory_format))
            if limit is not None:
                keep = max(0, limit - count)
                output, target = output[:keep], target[:keep]
            n = len(target)
            if n:
                if int(target.max()) >= output.shape[1] or int(target.min()) < 0:
                    raise UserError(f'labels run from {int(target.min())} to {int(target.max())}, the model has '
                                    f'{output.shape[1]} outputs: pass --num-classes or --class-map')
                output = output.float()
                top1, top5 = accuracy(output, target, topk=(1, 5))
                loss = torch.nn.functional.cross_entropy(output, target, reduction='sum')
                totals += torch.stack([torch.tensor(float(n)), top1.cpu() * n, top5.cpu() * n, loss.cpu()]).double()
                count += n
            bar.update()
            each_batch()
            if count and not bar.disable:
                bar.set_postfix_str(f'top1 {totals[1] / totals[0]:.2f}, loss {totals[3] / totals[0]:.4f}, '
                                    f'{count / (time.perf_counter() - begin):.0f} img/s')
    common.synchronize(device)
    seconds = time.perf_counter() - begin
    if distributed:
        totals = totals.to(device if device.type == 'cuda' else 'cpu')
        dist.all_reduce(totals)
    total, top1, top5, loss = totals.tolist()
    if not total:
        raise UserError('the data set gave no image')
    return dict(top1=top1 / total, top5=top5 / total, loss=loss / total, count=int(total), seconds=seconds,
                images_per_second=total / seconds)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], formatter_class=common.HelpFormatter)
    common.add_model_arguments(parser)
    g = parser.add_argument_group('data')
    datasets.add_dataset_arguments(g, train=False)
    g.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images per batch')
    g.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='loader processes')
    g = parser.add_argument_group('precision and hardware')
    common.add_precision_arguments(g)
    g.add_argument('--channels-last', action='store_true', help='channels-last memory format')
    g.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    g.add_argument('--onnx', metavar='FILE', help='measure a file of tools/export.py in place of the model, on the CPU')
    g = parser.add_argument_group('output')
    g.add_argument('--json', action='store_true', help='print the result as JSON')
    g.add_argument('--no-progress', action='store_true', help='no progress bar on a terminal')
    return parser


def open_onnx(args: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The file of --onnx. What it does not say of its classes and of how images are prepared is the model's."""
    from vim2.export import OnnxModel
    if args.torchcompile or args.amp or device.type != 'cpu':
        raise UserError('--onnx runs in ONNX Runtime on the CPU, without --torchcompile and --amp: pass --device cpu')
    try:
        file = OnnxModel(args.onnx)
    except Exception as e:  # ONNX Runtime's errors have no class in common
        raise UserError(f'{args.onnx}: {common.one_line(e)}') from None
    file.pretrained_cfg = {**model.pretrained_cfg, **file.pretrained_cfg}
    if file.num_classes is None:
        file.num_classes = model.num_classes
    return file


def check_batches(file: torch.nn.Module, count: int, batch_size: int, size: Sequence[int]) -> None:
    """Refuse batches that an ONNX file of fixed sizes does not take, before the first is made."""
    try:
        for batch in {min(batch_size, count), count % batch_size or batch_size}:
            file.check_inputs((batch, *size))
    except ValueError as e:
        raise UserError(f'{e}: see --batch-size and --img-size') from None


def main() -> None:
    args = get_parser().parse_args()
    common.at_least(args, 1, 'batch_size', 'num_classes')
    common.at_least(args, 0, 'workers')
    device = common.check_device(args.device or common.default_device())
    common.image_size(args.img_size)
    dataset = datasets.open_to_measure(args, batch_size=args.batch_size, verbose=not args.no_progress)
    model = common.trained_model(args)
    parameters = common.count_parameters(model)
    source = args.onnx or args.checkpoint
    if args.onnx:
        model = open_onnx(args, model, device)
    datasets.match_classes(dataset, model.num_classes, f'{args.data_dir or args.dataset} ({args.split})',
                           common.class_names(model), of=source or args.model, asked=args.num_classes is not None)
    config = common.data_config(args, model)
    if args.onnx:
        count = args.batch_size if datasets.is_streaming(dataset) else len(dataset)
        check_batches(model, count, args.batch_size, config['input_size'])
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=memory_format)
    loader = data.eval_loader(dataset, config, batch_size=args.batch_size, device=device, workers=args.workers)
    run = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model
    autocast = common.autocast(device, args.amp, args.amp_dtype)
    result = evaluate(run, loader, device, autocast, memory_format=memory_format, progress=not args.no_progress)
    height, width = config['input_size'][-2:]
    report = dict(model=args.model, checkpoint=args.checkpoint, parameters=parameters, dataset=args.dataset or 'folder',
                  data_dir=args.data_dir, split=args.split, img_size=[height, width], device=str(device),
                  precision=args.amp_dtype if args.amp else 'float32', **result)
    if args.json:
        common.print_json(report)
        return
    print(f'{args.model}' + (f' ({source})' if source else '') +
          f': {parameters / 1e6:.2f} M parameters, {height}x{width} px, {report["precision"]} on {device}')
    print(f'top-1 {result["top1"]:.2f} %   top-5 {result["top5"]:.2f} %   loss {result["loss"]:.4f}   '
          f'{result["count"]} images   {result["images_per_second"]:.0f} images/s')


if __name__ == '__main__':
    common.run(main)
