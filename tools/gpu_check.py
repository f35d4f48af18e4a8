#!/usr/bin/env python3
"""What a GPU must show of the Triton scan and of the models, in one command for a machine that is lent for minutes.

Stages with a time limit each; results are written after every stage, as JSON and Markdown, so that what is done is kept
if the machine goes. Nothing but PyTorch, Triton and timm is needed, and nothing is downloaded.

    python tools/gpu_check.py --minutes 4 --output gpu_check     # gpu_check.json, gpu_check.md
    python tools/gpu_check.py --stages correct plans --minutes 2
    python tools/gpu_check.py --dry-run                          # every stage on the CPU, tiny, in Triton's interpreter
"""
import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if '--dry-run' in sys.argv:
    os.environ['TRITON_INTERPRET'] = '1'  # read when triton is imported

import torch  # noqa: E402

from vim2._files import write_text  # noqa: E402
from vim2.ops import cross_selective_scan  # noqa: E402
from vim2.ops.reference import scan_reference, scan_reference_backward  # noqa: E402
from vim2.ops.triton import launch as scan  # noqa: E402

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
TOLERANCE = {'fp32': 5e-6, 'fp16': 1e-3, 'bf16': 8e-3}  # relative norm of the error, against float64


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    channels: int
    height: int
    width: int
    states: int = 16
    directions: int = 4
    layout: str = 'channels'  # contiguous in memory: channels, time (and the N values of B and C apart), or odd gaps

    def __str__(self):
        size = f'{self.width}' if self.height == 1 else f'{self.height}x{self.width}'
        time = ', time contiguous' if self.layout == 'time' else ''
        return f'B{self.batch} E{self.channels} L{size} N{self.states} K{self.directions}{time}'


SHAPES = {  # what tells most first: a stage may be cut short
    'token mixer, stage 1 at 224': Shape(128, 192, 56, 56),
    'token mixer, stage 3 at 224': Shape(128, 768, 14, 14),
    'channel mixer, stage 3 at 224': Shape(128, 196, 1, 768, 16, 1, 'time'),
    'the same, channels contiguous': Shape(128, 196, 1, 768, 16, 1),
    'VMamba (N = 1), stage 2 at 224': Shape(128, 384, 28, 28, 1),
    'token mixer, stage 2 at 224': Shape(128, 384, 28, 28),
    'token mixer, stage 4 at 224': Shape(128, 1536, 7, 7),
    'small net, 32x32': Shape(256, 64, 32, 32),
    'small net, 4x4': Shape(256, 512, 4, 4),
    'one image of 1024, stage 1': Shape(1, 192, 256, 256),
    'sequence': Shape(8, 2048, 1, 2048, 16, 1),
}
TINY = {'map': Shape(1, 6, 2, 3, 2, 2), 'sequence': Shape(1, 5, 1, 6, 2, 1, 'time')}


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0, gate=False, groups=(1, 1),
                constant=False, shared_A=False) -> list:
    """u, delta, A, B, C, D, z, delta_bias of the canonical scan, in a layer's layouts."""
    b, e, h, w, n, k = dataclasses.astuple(shape)[:6]
    torch.manual_seed(seed)

    def laid(t, axis):
        if shape.layout == 'odd':
            wide = t.new_zeros([s + 1 for s in t.shape])
            return wide[tuple(slice(0, s) for s in t.shape)].copy_(t)
        return t if shape.layout == 'time' else t.movedim(axis, -1).contiguous().movedim(-1, axis)

    def values(*sizes, axis, scale=1.0, shift=0.0):
        return laid(torch.randn(sizes, device=device).mul_(scale).add_(shift).to(dtype), axis)

    positions = (1, 1) if constant else (h, w)
    A = -4 * torch.rand(k, 1 if shared_A else e, n, device=device) - 0.01
    return [values(b, e, h, w, axis=1), values(b, k, e, h, w, axis=2, scale=0.5), A.expand(k, e, n),
            values(b, k, groups[0], n, *positions, axis=3), values(b, k, groups[1], n, *positions, axis=3),
            torch.randn(k, e, device=device), values(b, e, h, w, axis=1) if gate else None,
            torch.randn(k, e, device=device) - 2]


def codes(shape: Shape) -> List[int]:
    return list(range(shape.directions))


# Correctness ---------------------------------------------------------------------------------------------------------

def _cases(tiny: bool) -> Dict[str, Tuple[str, Shape, dict]]:
    """(dtype, shape, options): every dtype, odd shapes, every optional input, every way the work is cut."""
    if tiny:
        return {'map': ('fp32', TINY['map'], {}), 'gated sequence': ('bf16', TINY['sequence'], dict(gate=True))}
    chunked = dict(plan=scan.Plan(False, 64))
    out = {f'map 9x6, ragged channels, {name}': (name, Shape(2, 70, 9, 6), {}) for name in DTYPES}
    out.update({
        f'small map 8x8, {name}': (name, Shape(3, 64, 8, 8), dict(plan=scan.Plan(True, 64))) for name in DTYPES})
    out.update({
        'directions apart': ('fp32', Shape(2, 64, 7, 7), dict(plan=scan.Plan(False, 64))),
        'directions apart, chunked, last state': ('bf16', Shape(1, 96, 16, 17), dict(last=True, **chunked)),
        'three directions, one state': ('fp32', Shape(2, 33, 5, 7, 1, 3), {}),
        'four states': ('bf16', Shape(2, 128, 4, 4, 4), {}), 'eight states': ('fp16', Shape(2, 48, 2, 2, 8), {}),
        '12 states, last state': ('fp32', Shape(2, 40, 1, 37, 12, 1), dict(last=True)),
        '32 states': ('fp32', Shape(1, 40, 1, 50, 32, 1), {}), '64 states': ('bf16', Shape(1, 40, 1, 21, 64, 1), {}),
        'sequence, gate, last state': ('fp32', Shape(2, 64, 1, 101, 16, 1), dict(gate=True, last=True)),
        'sequence, chunked, gate': ('bf16', Shape(1, 64, 1, 1000, 16, 1), dict(gate=True, plan=scan.Plan(True, 128))),
        'channel mixer, reversed': ('bf16', Shape(4, 49, 1, 192, 16, 1, 'time'), dict(shared_A=True, reverse=True)),
        'groups': ('fp32', Shape(2, 96, 1, 33, 16, 1), dict(groups=(2, 3))),
        'constant B and C': ('fp32', Shape(2, 24, 1, 33, 16, 1), dict(constant=True, groups=(24, 24))),
        'any strides': ('fp16', Shape(2, 32, 5, 3, 16, 4, 'odd'), {}),
        'one step': ('fp32', Shape(2, 32, 1, 1, 16, 1), {}),
        'a length of 65,536': ('fp32', Shape(1, 32, 1, 65536, 16, 1), {}),
    })
    return out


def check_case(name: str, dtype: str, shape: Shape, device: str, options: dict) -> dict:
    """Outputs and every gradient against the reference in float64, and the same bits twice."""
    options = dict(options)
    plan, last, reverse = (options.pop(key, None) for key in ('plan', 'last', 'reverse'))
    data = make_inputs(shape, DTYPES[dtype], device, seed=len(name), **options)
    directions = [2] if reverse else codes(shape)
    grad_out = torch.randn_like(data[0])
    b, e, _, _, n, k = dataclasses.astuple(shape)[:6]
    grad_last = torch.randn(b, k, e, n, device=device) if last else None
    out, state, saved = scan.forward(*data, True, directions, True, True, plan=plan)
    grads = scan.backward(grad_out, grad_last, *data, saved, True, directions, plan=plan)
    again = scan.backward(grad_out, grad_last, *data, saved, True, directions, plan=plan)
    if shape.height * shape.width > 4096:  # the reference would take too long: the same scan uncut is the oracle
        whole = scan.Plan(True, -(-shape.height * shape.width // 64) * 64)
        want = list(scan.forward(*data, True, directions, True, True, plan=whole))[:2]
        want += scan.backward(grad_out, grad_last, *data, saved, True, directions, plan=whole)
    else:
        exact = [None if t is None else t.double() for t in data]
        want = [*scan_reference(*exact, True, directions), *scan_reference_backward(
            grad_out.double(), None if grad_last is None else grad_last.double(), *exact, True, directions)]
    errors = {}
    names = ('out', 'last state', *(f'grad of {n}' for n in ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')))
    for label, actual, expected in zip(names, (out, state, *grads), want):
        if expected is not None and expected.numel():
            error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
            errors[label] = error.item()
    worst = max(errors, key=lambda label: errors[label] if errors[label] == errors[label] else float('inf'))
    same = all(torch.equal(a, b) for a, b in zip(grads, again))
    return dict(case=name, worst=worst, error=errors[worst], deterministic=same,
                passed=bool(same and all(e <= TOLERANCE[dtype] for e in errors.values())))


def _run_case(name: str, device: str, tiny: bool) -> dict:
    try:
        dtype, shape, options = _cases(tiny)[name]
        return check_case(name, dtype, shape, device, options)
    except Exception as error:
        return dict(case=name, passed=False, error=repr(error)[:600], trace=traceback.format_exc()[-1500:])


def stage_correct(args) -> Iterator[dict]:
    """In processes: they compile side by side, and a fault of one on the device does not end the others."""
    cases = _cases(args.dry_run)
    if args.dry_run:
        yield from (_run_case(name, args.device, True) for name in cases)
        return
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context('spawn')) as pool:
        futures = [pool.submit(_run_case, name, args.device, False) for name in cases]
        for future in as_completed(futures):
            yield future.result()


def stage_operator(args) -> Iterator[dict]:
    """The public functions: autograd, autocast, a CUDA graph, and the automatic choice of the backend."""
    shape = TINY['map'] if args.dry_run else Shape(2, 64, 8, 8)
    u, delta, A, B, C, D, _, bias = make_inputs(shape, torch.float32, args.device)
    leaves = [t.detach().requires_grad_() for t in (u, delta, A, B[:, :, 0], C[:, :, 0], D, bias)]

    def run(backend):
        out = cross_selective_scan(*leaves, True, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(run('triton'), run('reference')))
    yield dict(case='autograd', error=error, passed=error < 1e-5)
    if args.dry_run:
        return
    from vim2.ops import available_backends
    yield dict(case='automatic choice', passed=available_backends(args.device)[0] == 'triton')
    halves = [t.detach().bfloat16() if t.dim() > 3 else t for t in leaves]
    with torch.no_grad():
        for _ in range(2):
            want = cross_selective_scan(*halves, True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cross_selective_scan(*halves, True)
        out.zero_()
        graph.replay()
        yield dict(case='CUDA graph', passed=bool(torch.equal(out, want)))


# Timings -------------------------------------------------------------------------------------------------------------

def synchronize(device: str) -> None:
    if device != 'cpu':
        getattr(torch, device).synchronize()


def milliseconds(fn: Callable[[], object], device: str, seconds: float = 0.15) -> Tuple[float, float]:
    """(time on the device, time of the call in Python), medians after a warm-up that compiles."""
    fn()
    synchronize(device)
    if device == 'cpu':
        start = time.perf_counter()
        fn()
        return (time.perf_counter() - start) * 1e3, 0.0
    fn()
    module = getattr(torch, device)
    module.synchronize()
    times, calls, begin = [], [], time.perf_counter()
    while len(times) < 50 and (time.perf_counter() - begin < seconds or len(times) < 3):
        start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        start.record()
        called = time.perf_counter()
        fn()
        calls.append(time.perf_counter() - called)
        end.record()
        module.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], sorted(calls)[len(calls) // 2] * 1e3


def time_scan(shape: Shape, dtype: torch.dtype, device: str, **plan) -> dict:
    data = make_inputs(shape, dtype, device)
    grad_out, directions = torch.randn_like(data[0]), codes(shape)
    infer, call = milliseconds(lambda: scan.forward(*data, True, directions, False, False, **plan), device)
    _, _, saved = scan.forward(*data, True, directions, False, True, **plan)
    train, _ = milliseconds(lambda: scan.forward(*data, True, directions, False, True, **plan), device)
    back, back_call = milliseconds(
        lambda: scan.backward(grad_out, None, *data, saved, True, directions, **plan), device)
    return dict(forward_ms=infer, training_forward_ms=train, backward_ms=back, forward_call_ms=call,
                backward_call_ms=back_call)


@contextlib.contextmanager
def constants(**values):
    before = {name: getattr(scan, name) for name in values}
    for name, value in values.items():
        setattr(scan, name, value)
    scan.make_plan.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(scan, name, value)
        scan.make_plan.cache_clear()


Job = Tuple[dict, str, Shape]  # changes of the constants of `launch` (`merge` is the plan's), label, shape


def _plan(choice: dict, shape: Shape) -> dict:
    """Keywords of forward and backward."""
    whole = -(-shape.height * shape.width // 64) * 64
    return dict(plan=scan.Plan(choice['merge'], whole)) if 'merge' in choice else {}


def _of_launch(choice: dict) -> dict:
    return {k: v for k, v in choice.items() if k != 'merge'}


def _compile_only(job: Job, processors: int) -> None:
    """Compile what a shape's forwards and backward launch, from tensors without memory, into Triton's cache on disk."""
    from vim2.ops.triton import kernels
    choice, _, shape = job
    scan._processors = lambda device: processors
    scan._launch = lambda kernel, programs, *args, **rest: getattr(kernels, kernel).warmup(
        *args, grid=(programs,), **rest)
    with constants(**_of_launch(choice)):
        data, plan = make_inputs(shape, torch.bfloat16, 'meta'), _plan(choice, shape)
        scan.forward(*data, True, codes(shape), False, False, **plan)
        _, _, saved = scan.forward(*data, True, codes(shape), False, True, **plan)
        scan.backward(torch.empty_like(data[0]), None, *data, saved, True, codes(shape), **plan)


def _compile_side_by_side(jobs: List[Job], args) -> None:
    """One after the other, as they are launched, it would take minutes."""
    if not args.dry_run:
        processors = scan._processors(torch.device(args.device))
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context('spawn')) as pool:
            for future in [pool.submit(_compile_only, job, processors) for job in jobs]:
                future.result()


def stage_timings(args) -> Iterator[dict]:
    """Each stage's shape; the whole training step of an operator beside the reference's."""
    shapes = TINY if args.dry_run else SHAPES
    _compile_side_by_side([({}, label, shape) for label, shape in shapes.items()], args)
    for label, shape in shapes.items():
        yield dict(shape=label, size=str(shape), dtype='bf16', **time_scan(shape, torch.bfloat16, args.device))
    shape = TINY['map'] if args.dry_run else Shape(8, 768, 14, 14)
    u, delta, A, B, C, D, _, bias = make_inputs(shape, torch.bfloat16, args.device)
    leaves = [t.detach().requires_grad_() for t in (u, delta, A, B[:, :, 0], C[:, :, 0], D, bias)]
    for backend in ('triton', 'reference'):
        def training(backend=backend):
            torch.autograd.grad(cross_selective_scan(*leaves, True, backend=backend).sum(), leaves)
        ms, call = milliseconds(training, args.device)
        yield dict(shape=f'operator, {backend}', size=str(shape), dtype='bf16', training_ms=ms, call_ms=call)


# The designs that counting instructions did not decide between.
CHOICES = (dict(), dict(SAVE=8), dict(SAVE=4), dict(STEPS=8), dict(SAVE=32), dict(CHANNELS=1), dict(merge=False),
           dict(merge=True))


def stage_plans(args) -> Iterator[dict]:
    shapes = {'map': TINY['map']} if args.dry_run else {label: SHAPES[label] for label in (
        'token mixer, stage 1 at 224', 'token mixer, stage 3 at 224', 'channel mixer, stage 3 at 224',
        'small net, 4x4')}
    jobs = [(choice, label, shape) for choice in (CHOICES[:4] if args.dry_run else CHOICES)
            for label, shape in shapes.items() if 'merge' not in choice or shape.directions > 1]
    _compile_side_by_side(jobs, args)
    for choice, label, shape in jobs:
        with constants(**_of_launch(choice)):
            times = time_scan(shape, torch.bfloat16, args.device, **_plan(choice, shape))
        yield dict(choice=str(choice), shape=label, **{k: times[k] for k in (
            'forward_ms', 'training_forward_ms', 'backward_ms')})


# Models --------------------------------------------------------------------------------------------------------------

def time_model(name: str, args, compiled: bool, batch: int, size: int) -> dict:
    import timm

    import vim2  # noqa: F401, registers the models
    device, module = args.device, getattr(torch, args.device, None)
    row = dict(model=name, compiled=compiled, batch=batch, size=size)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000).to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(0, 1000, (batch,), device=device)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **({} if device == 'cpu' else dict(fused=True)))

    def inference():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return run(x)

    def training():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        return loss

    model.eval()
    ms, _ = milliseconds(inference, device, 1.0)
    row.update(images_per_s=batch / ms * 1e3)
    model.train()
    if device != 'cpu':
        module.reset_peak_memory_stats()
    ms, call = milliseconds(training, device, 1.5)
    row.update(training_ms=ms, training_images_per_s=batch / ms * 1e3, call_ms=call)
    if device != 'cpu':
        row['peak_GB'] = module.max_memory_allocated() / 1e9
    row['finite'] = bool(training().isfinite())
    return row


def _try(row: dict, fn: Callable[[], dict], device: str) -> dict:
    try:
        return fn()
    except Exception as error:
        if device != 'cpu':
            getattr(torch, device).empty_cache()
        return dict(row, error=repr(error)[:600], trace=traceback.format_exc()[-1500:])


def stage_models(args) -> Iterator[dict]:
    names, batch, size = (['test_vim2'], 1, 32) if args.dry_run else (
        ['vim2_tiny', 'swin_tiny_patch4_window7_224', 'convnext_tiny'], 128, 224)
    for name in names:
        yield _try(dict(model=name), lambda name=name: time_model(name, args, False, batch, size), args.device)


def stage_compile(args) -> Iterator[dict]:
    """torch.compile: the same outputs as eager, then its speed beside the others'."""
    import timm

    import vim2  # noqa: F401

    def same():
        torch.manual_seed(0)
        model = timm.create_model('test_vim2').to(args.device).eval()
        x = torch.randn(2, 3, 64, 64, device=args.device)
        with torch.no_grad():
            backend = 'eager' if args.dry_run else 'inductor'
            want, got = model(x), torch.compile(model, fullgraph=True, backend=backend)(x)
        error = ((got - want).norm() / want.norm()).item()
        return dict(case='test_vim2 compiled against eager', error=error, passed=error < 1e-4)

    yield _try(dict(case='test_vim2 compiled against eager', passed=False), same, args.device)
    if not args.dry_run:
        for name in ('vim2_tiny', 'swin_tiny_patch4_window7_224', 'convnext_tiny'):
            yield _try(dict(model=name), lambda name=name: time_model(name, args, True, 128, 224), args.device)


def stage_train(args) -> Iterator[dict]:
    """A command of the caller's, tools/train.py for instance, for the time that is left."""
    if not args.train_command:
        yield dict(note='no --train-command')
        return
    left = max(30.0, args.deadline - time.monotonic())
    try:
        run = subprocess.run(args.train_command, shell=True, cwd=ROOT, timeout=left, capture_output=True, text=True)
        yield dict(command=args.train_command, returncode=run.returncode, tail=(run.stdout + run.stderr)[-2000:])
    except subprocess.TimeoutExpired as error:
        yield dict(command=args.train_command, note=f'stopped after {left:.0f} s',
                   tail=(error.stdout or b'').decode(errors='replace')[-2000:])


STAGES = {  # and the seconds, compilation included, after which a stage starts nothing more
    'correct': (stage_correct, 90), 'operator': (stage_operator, 30), 'timings': (stage_timings, 60),
    'plans': (stage_plans, 90), 'models': (stage_models, 60), 'compile': (stage_compile, 120),
    'train': (stage_train, float('inf')),
}


def _cell(value) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value).replace('|', '/').replace('\n', ' ')[:160]


def markdown(result: dict) -> str:
    lines = [f"# The scan and the models on {result['device']}", '',
             f"PyTorch {result['torch']}, Triton {result['triton']}, {result['platform']}", '']
    for name, stage in result['stages'].items():
        lines += [f"## {name} ({stage['seconds']:.0f} s{', ' + stage['note'] if stage.get('note') else ''})", '']
        keys: List[str] = []
        for row in stage['rows']:
            keys += [key for key in row if key not in keys and key != 'trace']
        if keys:
            lines += ['| ' + ' | '.join(keys) + ' |', '|' + '---|' * len(keys)]
        lines += ['| ' + ' | '.join(_cell(row.get(key, '')) for key in keys) + ' |' for row in stage['rows']] + ['']
    return '\n'.join(lines)


def write(result: dict, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (('.json', json.dumps(result, indent=1)), ('.md', markdown(result))):
        write_text(output.with_name(output.name + suffix), text)


def failures(result: dict) -> List[dict]:
    return [row for stage in result['stages'].values() for row in stage['rows']
            if row.get('passed') is False or 'trace' in row or row.get('finite') is False or row.get('returncode')]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', help="'cuda' (ROCm too) or 'xpu' (default: cuda)")
    parser.add_argument('--minutes', type=float, default=8,
                        help='for everything; the train stage takes what is left (default: 8)')
    parser.add_argument('--stages', nargs='+', default=list(STAGES), choices=list(STAGES))
    parser.add_argument('--train-command', help='what the train stage runs, in a shell, in the repository')
    parser.add_argument('--workers', type=int, default=12, help='processes that compile side by side (default: 12)')
    parser.add_argument('--dry-run', action='store_true', help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument('--output', type=Path, default=Path('gpu_check'), help='path without suffix')
    args = parser.parse_args(argv)
    args.deadline = time.monotonic() + 60 * args.minutes
    import triton
    if args.dry_run:
        args.device, name = 'cpu', "a CPU, in Triton's interpreter"
        why = scan.missing([torch.empty(0)])
        if why is not None:
            print(f'gpu_check: {why}', file=sys.stderr)
            return 2
    else:
        module = getattr(torch, args.device, None)
        if module is None or not module.is_available():
            print(f"gpu_check: no '{args.device}' device here; --dry-run needs none", file=sys.stderr)
            return 2
        name = module.get_device_name()
    result = dict(device=name, platform=platform.platform(), torch=torch.__version__, triton=triton.__version__,
                  stages={})
    for stage in args.stages:
        run, limit = STAGES[stage]
        rows: List[dict] = []
        start = time.monotonic()
        end = min(start + limit, args.deadline)
        result['stages'][stage] = kept = dict(rows=rows, seconds=0.0, note='')
        if start >= args.deadline:
            kept['note'] = 'no time left'
        else:
            try:
                for row in run(args):
                    rows.append(row)
                    print(f'{stage}:', {k: v for k, v in row.items() if k != 'trace'}, flush=True)
                    if time.monotonic() > end:
                        kept['note'] = 'cut short'
                        break
            except Exception as error:  # a stage that fails is no reason to lose the others
                rows.append(dict(error=repr(error)[:600], trace=traceback.format_exc()[-3000:], passed=False))
                print(rows[-1]['trace'], flush=True)
        kept['seconds'] = time.monotonic() - start
        if args.device != 'cpu':
            getattr(torch, args.device).empty_cache()
        write(result, args.output)
    wrong = failures(result)
    for row in wrong:
        print('FAILED', {k: v for k, v in row.items() if k != 'trace'}, row.get('trace', ''), sep='\n')
    print(f"gpu_check: {len(wrong)} failures; results in {args.output}.json and .md")
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
