"""Models as files that run elsewhere: ONNX, torch.export, TorchScript. Each file is checked against the model first.

`tools/export.py` is the command line of this. `torch.onnx.export(model, ...)` works as well, without the check: in its
graphs the selective scan is one `Scan` (vim2/ops/loop.py).
"""
import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from . import _files
from .models import TSM2, Vim

__all__ = ['FORMATS', 'Exported', 'OnnxModel', 'check_shapes', 'example_inputs', 'export', 'least_side',
           'quantize_linears']

FORMATS = ('onnx', 'torch', 'portable', 'torchscript')
_KIND = {'onnx': 'ONNX', 'torch': 'torch.export program', 'portable': 'torch.export program',
         'torchscript': 'TorchScript program'}


class Exported(NamedTuple):
    """What `export` did.

    Attributes:
        path: the file.
        bytes: its size.
        inputs, outputs: their names.
        checks: (shape of the first input, largest error relative to the largest output or 1) of each check.
    """
    path: Path
    bytes: int
    inputs: List[str]
    outputs: List[str]
    checks: List[Tuple[Tuple[int, ...], float]]


def export(
        model: nn.Module,
        path: Union[str, os.PathLike],
        format: str = 'onnx',
        *,
        dynamic: bool = True,
        size: Optional[Tuple[int, int]] = None,
        inputs: Optional[Sequence[Tuple[Tensor, ...]]] = None,
        opset: int = 18,
        tolerance: float = 1e-4,
) -> Exported:
    """Write a model to a file, and read the file back: its outputs must be the model's.

    Args:
        model: a ViM2, VMamba, Vim or TSM2, or another timm model, on the CPU, of float32; it is put into evaluation
            mode.
        path: the file to write. It appears when it has been checked, and not before.
        format: 'onnx'; 'torch', a torch.export program (.pt2) that calls the scan's kernel and so needs `import vim2`;
            'portable', one of PyTorch's operators alone, which runs without vim2, slowly; 'torchscript', which needs
            `import vim2`.
        dynamic: leave the number of samples free, and for images the height and width, from one pixel more than the
            stride of the last map, which is 33 for most (Vim: the number of samples alone). Otherwise one sample of
            `size`.
        size: height and width of images, in pixels. Default: the model's.
        inputs: what the file is checked on: the model's positional arguments, as often as wished. Default: random
            numbers, of three sizes or batches.
        opset: ONNX's version of its operators, 18 or newer.
        tolerance: largest error, relative to the largest output or 1, whichever is larger.

    Raises:
        ValueError: an unknown format, a size or opset that cannot be, an input that the file cannot take.
        ModuleNotFoundError: packages that ONNX needs are missing, naming them.
        RuntimeError: the file's outputs differ from the model's; no file is left.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if opset < 18:
        raise ValueError(f'opset must be 18 or newer, got {opset}')
    if format == 'onnx':
        _require('onnx', 'onnxscript', 'onnxruntime')
    path = Path(path)
    model = model.eval()
    example = example_inputs(model, 1, size)
    if dynamic:
        example = example_inputs(model, 2, _traced_size(model, size))
    if inputs is None:
        inputs = [example_inputs(model, batch, side, seed=i + 1)
                  for i, (batch, side) in enumerate(check_shapes(model, dynamic, size))]
    shapes = _dynamic_shapes(model, example) if dynamic else None
    checks: List[Tuple[Tuple[int, ...], float]] = []
    names = _names(model, example)

    def fill(tmp: str) -> None:
        _WRITERS[format](model, example, shapes, tmp, opset)
        run = _READERS[format](tmp)
        for arguments in inputs:
            with torch.no_grad():
                expected = model(*arguments)
                got = run(arguments)
            shape = tuple(arguments[0].shape)
            error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1.))
            if got.shape != expected.shape or not error <= tolerance:
                raise RuntimeError(f'the {_KIND[format]} is wrong for an input of shape {shape}: relative error '
                                   f'{error:.1e}, more than {tolerance:.0e}; nothing was written to {path}')
            checks.append((shape, error))

    _files.write(path, fill)
    return Exported(path, path.stat().st_size, names[0], names[1], checks)


class OnnxModel(nn.Module):
    """An ONNX file as a module: ONNX Runtime on the CPU, with as many threads as PyTorch has when it is made.

    Attributes:
        pretrained_cfg: how images are prepared and what the classes are called, as `export` writes it; or empty.
        num_classes: width of the output, or None where the file leaves it free.

    Raises:
        ModuleNotFoundError: ONNX Runtime is missing.
        ValueError: the file's `pretrained_cfg` is no JSON object. ONNX Runtime's own errors have no class in common.
    """

    def __init__(self, path: Union[str, os.PathLike]):
        super().__init__()
        _require('onnxruntime')
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.path = os.fspath(path)
        self.session = onnxruntime.InferenceSession(self.path, options, providers=['CPUExecutionProvider'])
        self.pretrained_cfg = json.loads(self.session.get_modelmeta().custom_metadata_map.get('pretrained_cfg', '{}'))
        if not isinstance(self.pretrained_cfg, dict):
            raise ValueError(f'its pretrained_cfg is no JSON object: {self.pretrained_cfg!r:.80}')
        width = (self.session.get_outputs()[0].shape or [None])[-1]
        self.num_classes = width if isinstance(width, int) else None

    def check_inputs(self, *shapes: Sequence[int]) -> None:
        """Raise a ValueError if the file, whose sizes may be fixed, does not take inputs of these shapes."""
        for i, shape in zip(self.session.get_inputs(), shapes):
            if len(i.shape) != len(shape) or any(isinstance(d, int) and d != n for d, n in zip(i.shape, shape)):
                raise ValueError(f"{self.path} takes {i.name} of {' x '.join(map(str, i.shape))}, not of "
                                 f"{' x '.join(map(str, shape))}")

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tensors in the file's order, none of them absent; its first output."""
        self.check_inputs(*[t.shape for t in inputs])
        names = [i.name for i in self.session.get_inputs()]
        return torch.from_numpy(self.session.run(None, {n: t.cpu().numpy() for n, t in zip(names, inputs)})[0])


def quantize_linears(path: Union[str, os.PathLike], output: Union[str, os.PathLike]) -> int:
    """Write an ONNX file once more, its Linears in int8, by ONNX Runtime's dynamic quantisation.

    Weights get one scale an output channel; what they multiply is quantised as it comes. Scans, convolutions and norms
    stay in float32. What that costs in accuracy is for the caller to measure.

    Returns:
        The number of Linears.

    Raises:
        ModuleNotFoundError: packages that ONNX needs are missing, naming them.
    """
    _require('onnx', 'onnxruntime')
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    graph = onnx.load(path).graph
    matrices = {t.name for t in graph.initializer if len(t.dims) == 2}  # ONNX Runtime takes no stacks of them
    linears = [node.name for node in graph.node
               if node.op_type in ('MatMul', 'Gemm') and node.input[1] in matrices]
    _files.write(output, lambda tmp: quantize_dynamic(
        os.fspath(path), tmp, weight_type=QuantType.QInt8, per_channel=True, nodes_to_quantize=linears))
    return len(linears)


def example_inputs(model: nn.Module, batch: int = 1, size: Optional[Tuple[int, int]] = None,
                   seed: int = 0) -> Tuple[Any, ...]:
    """Random positional arguments of a model.

    Args:
        batch: number of samples.
        size: height and width of images. Default: the model's.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    if isinstance(model, TSM2):
        if size is not None:
            raise ValueError('a TSM2 reads windows of its own length: it takes no image size')
        M = model.num_variates
        beside = [random(M, model.static_dim) if model.static_dim else None,
                  random(M, model.future_len, model.future_dim) if model.future_dim else None,
                  random(M, model.lookback, model.past_dim) if model.past_dim else None]
        while beside and beside[-1] is None:
            beside.pop()
        return (random(model.lookback, M), *beside)
    channels, *default = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
    return (random(getattr(model, 'in_chans', channels), *(size or default)),)


def least_side(model: nn.Module) -> int:
    """Of images of any size, in pixels: torch.export makes a constant of a size of 1, as the last map would have."""
    info: Any = getattr(model, 'feature_info', None)
    return info[-1]['reduction'] + 1 if info else 33


def check_shapes(model: nn.Module, dynamic: bool = True, size: Optional[Tuple[int, int]] = None,
                 ) -> List[Tuple[int, Optional[Tuple[int, int]]]]:
    """At which numbers of samples and which sizes of images a file is checked: three. A TSM2 has no sizes."""
    if isinstance(model, TSM2):
        return [(batch, None) for batch in ((1, 2, 5) if dynamic else (1, 1, 1))]
    height, width = example_inputs(model, 1, size)[0].shape[2:]
    if not dynamic or isinstance(model, Vim):
        return [(batch, (height, width)) for batch in ((1, 2, 5) if dynamic else (1, 1, 1))]
    least = least_side(model)
    return [(batch, (max(least, h), max(least, w))) for batch, h, w in (
        (1, height, width), (2, height // 2 + 1, width // 2 + 8), (3, height + 17, width - 7))]


def _traced_size(model: nn.Module, size: Optional[Tuple[int, int]]) -> Optional[Tuple[int, int]]:
    """The size of images that a graph for all sizes is made with."""
    if isinstance(model, (TSM2, Vim)):
        return size
    least = least_side(model)
    if size is not None and min(size) < least:
        raise ValueError(f'images of {size[0]}x{size[1]} pixels cannot stand for all sizes: give a size of at least '
                         f'{least}, or dynamic=False')
    height, width = example_inputs(model, 1, size)[0].shape[2:]
    return max(height, least), max(width, least)


def _dynamic_shapes(model: nn.Module, example: Tuple[Tensor, ...]) -> Tuple[Optional[Dict[int, Any]], ...]:
    """For torch.export, of the example's arguments."""
    if isinstance(model, (TSM2, Vim)):
        batch = torch.export.Dim('batch', min=1)
        return tuple(None if t is None else {0: batch} for t in example)
    least = least_side(model)
    return ({0: torch.export.Dim('batch', min=1), 2: torch.export.Dim('height', min=least),
             3: torch.export.Dim('width', min=least)},)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install 'vim2[export]'", name=missing[0])


# ------------------------------------------------------------------------------------------------- writing each format

def _names(model: nn.Module, example: Tuple[Tensor, ...]) -> List[List[str]]:
    """Names of the inputs and of the output."""
    if isinstance(model, TSM2):
        all_names = ('x', 'static', 'future', 'past')
        return [[name for name, t in zip(all_names, example) if t is not None], ['forecast']]
    return [['image'], ['logits' if getattr(model, 'num_classes', 0) else 'features']]


def _write_onnx(model: nn.Module, example, shapes, path: str, opset: int) -> None:
    import onnx_ir
    names = _names(model, example)
    program = torch.onnx.export(
        model, example, dynamo=True, opset_version=opset, dynamic_shapes=shapes, input_names=names[0],
        output_names=names[1], verbose=False)
    assert program is not None
    for node in onnx_ir.traversal.RecursiveGraphIterator(program.model.graph):  # PyTorch's notes: sources, their paths
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    program.model.graph.metadata_props.clear()
    config = getattr(model, 'pretrained_cfg', None)
    if config:  # what a program needs to prepare an image, and to name a class
        keys = ('architecture', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'label_names')
        kept = {k: config[k] for k in keys if config.get(k) is not None}
        program.model.metadata_props['pretrained_cfg'] = json.dumps(kept)
    program.save(path)


def _program(model: nn.Module, example, shapes) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, example, dynamic_shapes=shapes)


def _save(save: Callable, program, path: str) -> None:
    buffer = io.BytesIO()  # where PyTorch writes the file itself, a full disk ends the process (std::terminate)
    save(program, buffer)
    Path(path).write_bytes(buffer.getvalue())


def _write_program(model: nn.Module, example, shapes, path: str, opset: int) -> None:
    _save(torch.export.save, _program(model, example, shapes), path)


def _write_portable(model: nn.Module, example, shapes, path: str, opset: int) -> None:
    from .ops.loop import decompositions
    with torch.no_grad():
        program = _program(model, example, shapes).run_decompositions(decompositions())
    left = {str(node.target) for node in program.graph.nodes if str(node.target).startswith('vim2.')}
    if left:
        raise RuntimeError(f"the program still calls {', '.join(sorted(left))}, which only vim2 has")
    _save(torch.export.save, program, path)


def _write_torchscript(model: nn.Module, example, shapes, path: str, opset: int) -> None:
    # a trace would make constants of sizes; a script keeps all of them free, whatever `dynamic` says
    _save(torch.jit.save, torch.jit.script(model), path)


def _read_onnx(path: str) -> Callable[[Tuple[Tensor, ...]], Tensor]:
    module = OnnxModel(path)
    return lambda arguments: module(*[t for t in arguments if t is not None])


def _read_program(path: str) -> Callable[[Tuple[Tensor, ...]], Tensor]:
    module = torch.export.load(io.BytesIO(Path(path).read_bytes())).module()
    return lambda arguments: module(*arguments)


def _read_torchscript(path: str) -> Callable[[Tuple[Tensor, ...]], Tensor]:
    module = torch.jit.load(path)
    return lambda arguments: module(*arguments)


_WRITERS = {'onnx': _write_onnx, 'torch': _write_program, 'portable': _write_portable,
            'torchscript': _write_torchscript}
_READERS = {'onnx': _read_onnx, 'torch': _read_program, 'portable': _read_program, 'torchscript': _read_torchscript}
