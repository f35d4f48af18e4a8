#!/usr/bin/env python
"""Write a model to a file that runs without these sources: ONNX, torch.export or TorchScript.

    python tools/export.py vim2_nano_patch2_32.cifar10
    python tools/export.py local-dir:output/train/RUN/model --output model.onnx
    python tools/export.py tsm2.ETTh1-96 --format portable
    python tools/export.py vim2_tiny --checkpoint RUN/best.pth.tar --img-size 256 192 --static
    python tools/export.py vim2_nano_patch2_32.cifar10 --int8 int8.onnx --benchmark --dataset npz --data-dir DIR

The file is checked against the model before it appears: three sizes of a photograph, or of windows of random numbers.
"""
import argparse
import contextlib
import os
import time
import warnings
from pathlib import Path

import torch
from PIL import Image

import _common as common
import _data as data
import _datasets as datasets
from _common import UserError
from validate import evaluate

PHOTO = Path(__file__).with_name('assets') / 'chelsea.jpg'
SUFFIX = {'onnx': '.onnx', 'torch': '.pt2', 'portable': '.pt2', 'torchscript': '.pt'}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], formatter_class=common.HelpFormatter)
    parser.add_argument('model', metavar='MODEL', help='timm model name, with pretrained tag where it has one; '
                        'hf-hub:USER/NAME or local-dir:PATH; the name, folder or Hub repository of a TSM2')
    parser.add_argument('--format', default='onnx', choices=tuple(SUFFIX),
                        help="onnx; torch (a .pt2 that runs on vim2's kernels); portable (a .pt2 of PyTorch's own "
                             'operators, slow); torchscript')
    parser.add_argument('-o', '--output', metavar='FILE', help="the file (default: the model's name in this folder)")
    g = parser.add_argument_group('model')
    g.add_argument('--checkpoint', metavar='FILE',
                   help='weights (.safetensors, .pth, .pth.tar) instead of the pretrained ones')
    g.add_argument('--no-ema', action='store_true',
                   help='take the plain weights where the checkpoint has averaged ones too')
    g.add_argument('--random-weights', action='store_true', help='an untrained model, for trying out')
    g.add_argument('--num-classes', type=int, metavar='N', help="outputs (default: the model's)")
    g.add_argument('--model-kwargs', nargs='*', default={}, action=common.KeyValue, metavar='K=V',
                   help='further model arguments')
    g = parser.add_argument_group('file')
    g.add_argument('--img-size', type=int, nargs='+', metavar='PX', help="H [W] in pixels (default: the model's)")
    g.add_argument('--static', action='store_true',
                   help='one sample of this size only; otherwise their number is free, and so is the size of images '
                        'from 33 pixels a side for most (not for Vim)')
    g.add_argument('--opset', type=int, default=18, metavar='N', help="version of ONNX's operators")
    g.add_argument('--tolerance', type=float, default=1e-4, metavar='X',
                   help='largest error, relative to the largest output or to 1, whichever is larger')
    g.add_argument('--int8', metavar='FILE', help='write the ONNX file once more, its Linears in int8; --data-dir '
                   'measures what that costs')
    g.add_argument('--benchmark', nargs='*', metavar='OTHER.onnx',
                   help='time one sample: the model, the ONNX file, its int8 file, and other ONNX files, in turns')
    g = parser.add_argument_group('accuracy', 'With --data-dir: of the model, the ONNX file and its int8 file.')
    datasets.add_dataset_arguments(g, train=False)
    parser.add_argument('--json', action='store_true', help='print the result as JSON')
    return parser


def load(args: argparse.Namespace) -> torch.nn.Module:
    """The model, on the CPU."""
    import timm
    common.register_models()
    from vim2 import hub, pretrained
    entry = pretrained.manifest().get(args.model)
    tsm2 = entry is not None and not timm.is_model(entry.architecture) or os.path.isdir(args.model)
    if tsm2:
        if args.checkpoint or args.random_weights or args.num_classes is not None or args.model_kwargs:
            raise UserError(f'{args.model} brings its weights and arguments: --checkpoint, --random-weights, '
                            '--num-classes and --model-kwargs are for names of timm')
        try:
            return hub.load(args.model)
        except (OSError, RuntimeError) as e:
            raise UserError(common.one_line(e)) from None
    if args.random_weights:
        kwargs = dict(args.model_kwargs, **({} if args.num_classes is None else {'num_classes': args.num_classes}))
        return common.create_model(args.model, pretrained=False, **kwargs)
    return common.trained_model(args)


def photographs(model: torch.nn.Module, static: bool, size) -> list:
    """The photograph in the model's preprocessing, at the sizes and in the batches that the file is checked at."""
    from timm.data import create_transform, resolve_model_data_config
    from vim2.export import check_shapes
    config = resolve_model_data_config(model)
    image = Image.open(PHOTO).convert('RGB')
    inputs = []
    for number, (batch, (height, width)) in enumerate(check_shapes(model, not static, size)):
        transform = create_transform(**{**config, 'input_size': (3, height, width)}, is_training=False)
        x = transform(image)
        inputs.append((torch.stack([x.roll(7 * i + 5 * number, -1) for i in range(batch)]),))
    return inputs


def benchmark(model: torch.nn.Module, files: list, size, rounds: int = 9) -> dict:
    """Median milliseconds of one sample, in turns and with as many threads as PyTorch uses: the model, and ONNX files.

    A file whose inputs are of fixed sizes gets those.
    """
    import numpy as np
    from vim2.export import OnnxModel, example_inputs
    inputs = example_inputs(model, 1, size)

    def eager():
        with torch.inference_mode():
            model(*inputs)

    def runner(file):
        module = OnnxModel(file)
        fitting = []
        for i, value in zip(module.session.get_inputs(), [t for t in inputs if t is not None]):
            shape = [d if isinstance(d, int) else n for d, n in zip(i.shape, value.shape)]
            fitting.append(torch.from_numpy(np.resize(value.numpy(), shape)))
        return lambda: module(*fitting)

    runs = {'PyTorch': eager, **{str(file): runner(file) for file in files}}
    times = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def open_dataset(model: torch.nn.Module, args: argparse.Namespace):
    """The images of --data-dir, their classes numbered as the model's are."""
    if not hasattr(model, 'pretrained_cfg'):
        raise UserError(f'--data-dir is a data set of images, and {args.model} reads none')
    dataset = datasets.open_to_measure(args)
    datasets.match_classes(dataset, model.num_classes, f'{args.data_dir} ({args.split})', common.class_names(model),
                           of=args.checkpoint or args.model, asked=args.num_classes is not None)
    return dataset


def accuracies(model: torch.nn.Module, files: list, dataset, args: argparse.Namespace) -> dict:
    """Top-1 in per cent: of the model, and of ONNX files."""
    from vim2.export import OnnxModel
    device = torch.device('cpu')
    loader = data.eval_loader(dataset, common.data_config(args, model), batch_size=1 if args.static else 64,
                              device=device, workers=0)
    runs = {'PyTorch': model, **{str(file): OnnxModel(file) for file in files}}
    return {name: evaluate(run, loader, device, contextlib.nullcontext, desc=name)['top1']
            for name, run in runs.items()}


def main() -> None:
    args = get_parser().parse_args()
    common.at_least(args, 1, 'num_classes')
    size = common.image_size(args.img_size)
    output = args.output or Path(args.model.rstrip('/')).name.replace(':', '_') + SUFFIX[args.format]
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f'{output}: there is no folder {Path(output).absolute().parent}')
    for option in ('int8', 'benchmark', 'data_dir'):
        if getattr(args, option) is not None and args.format != 'onnx':
            raise UserError(f'--{option.replace("_", "-")} is for --format onnx, not {args.format}')
    model = load(args)
    from vim2.export import export, quantize_linears
    from vim2.models import TSM2
    inputs = None
    dataset = None if args.data_dir is None else open_dataset(model, args)
    if not isinstance(model, TSM2) and getattr(model, 'in_chans', 3) == 3:
        inputs = photographs(model, args.static, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PyTorch's, about its own exporters
            with common.writing(output):
                done = export(model, output, args.format, dynamic=not args.static, size=size, inputs=inputs,
                              opset=args.opset, tolerance=args.tolerance)
            linears = 0
            if args.int8:
                with common.writing(args.int8):
                    linears = quantize_linears(output, args.int8)
    except (ValueError, RuntimeError, ModuleNotFoundError) as e:
        raise UserError(common.one_line(e)) from e
    files = [output, *([args.int8] if args.int8 else [])]
    milliseconds = {} if args.benchmark is None else benchmark(model, [*files, *args.benchmark], size)
    top1 = {} if dataset is None else accuracies(model, files, dataset, args)
    if args.json:
        common.print_json(dict(model=args.model, format=args.format, path=str(done.path), bytes=done.bytes,
                               inputs=done.inputs, outputs=done.outputs, milliseconds=milliseconds, top1=top1,
                               int8_bytes=Path(args.int8).stat().st_size if args.int8 else None,
                               checks=[dict(shape=list(shape), error=error) for shape, error in done.checks]))
        return
    print(f'{done.path}: {done.bytes / 1e6:.1f} MB, {", ".join(done.inputs)} -> {", ".join(done.outputs)}')
    for shape, error in done.checks:
        print(f'  checked at {"x".join(map(str, shape))}: relative error {error:.1e}')
    if args.int8:
        print(f'{args.int8}: {Path(args.int8).stat().st_size / 1e6:.1f} MB, {linears} Linears in int8, not checked')
    for name in dict.fromkeys([*milliseconds, *top1]):
        numbers = []
        if name in milliseconds:
            numbers.append(f'{milliseconds[name]:.1f} ms, {milliseconds[name] / milliseconds["PyTorch"]:.2f}x')
        if name in top1:
            numbers.append(f'top-1 {top1[name]:.2f} %')
        print(f'{name}: {", ".join(numbers)}')


if __name__ == '__main__':
    common.run(main)
