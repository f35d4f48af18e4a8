#!/usr/bin/env python3
"""Everything that a GPU must show of the Triton scan, in one command: correctness, determinism, timings.

Runs the op's whole test suite with the Triton backend on the device, then times forward and forward + backward against
the reference and, if it is installed, mamba_ssm's CUDA kernel, and writes JSON and Markdown.

    python tools/gpu_check.py --output gpu_check        # gpu_check.json, gpu_check.md
"""
import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / 'tools'))
from kernel_report import DTYPES, SHAPES, Shape, minimum_bytes  # noqa: E402

from vim2.ops import cross_selective_scan, selective_scan, triton_scan  # noqa: E402


def run_suite(device: str) -> dict:
    """tests/test_ops.py with the Triton backend on the device."""
    environment = dict(os.environ, VIM2_TEST_BACKEND='triton', VIM2_TEST_DEVICE=device)
    environment.pop('TRITON_INTERPRET', None)
    start = time.perf_counter()
    run = subprocess.run([sys.executable, '-m', 'pytest', '-q', str(ROOT / 'tests' / 'test_ops.py')], cwd=ROOT,
                         env=environment, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    return dict(returncode=run.returncode, seconds=round(time.perf_counter() - start, 1),
                summary=lines[-1] if lines else run.stderr[-500:],
                failures=[l for l in lines if l.startswith('FAILED')])


def make_inputs(shape: Shape, dtype: torch.dtype, device: str):
    """Fresh random inputs of `cross_selective_scan` (K > 1) or `selective_scan` in the layers' layouts, requiring
    gradients."""
    b, e, h, w, n, k = dataclasses.astuple(shape)

    def randn(*sizes, scale=1.0, shift=0.0):
        return torch.randn(sizes, device=device).mul_(scale).add_(shift).to(dtype)

    weights = (-torch.rand(k, e, n, device=device) * 4 - 0.01, torch.randn(k, e, device=device),
               torch.randn(k, e, device=device) - 4)
    if k > 1:
        x = randn(b, h, w, e).permute(0, 3, 1, 2)
        delta = randn(b, k, h, w, e, scale=0.5).permute(0, 1, 4, 2, 3)
        B, C = (randn(b, h, w, k, n).permute(0, 3, 4, 1, 2) for _ in 'BC')
        data = [x, delta, weights[0], B, C, weights[1], weights[2]]
        fn = cross_selective_scan
        def call(*a, backend):
            return fn(*a, delta_softplus=True, backend=backend)
    else:
        u, delta = randn(b, e, h * w), randn(b, e, h * w, scale=0.5)
        B, C = (randn(b, h * w, n).transpose(1, 2) for _ in 'BC')
        data = [u, delta, weights[0][0], B, C, weights[1][0], weights[2][0]]
        def call(u, delta, A, B, C, D, bias, backend):
            return selective_scan(u, delta, A, B, C, D, None, bias, True, backend=backend)
    return call, [t.detach().requires_grad_() for t in data]


def milliseconds(fn, device: str, repeats: int) -> float:
    """Median over repeats, after warm-up (which compiles)."""
    module = getattr(torch, torch.device(device).type)
    for _ in range(3):
        fn()
    times = []
    for _ in range(repeats):
        start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        module.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def time_shape(label: str, shape: Shape, dtype_name: str, device: str, repeats: int) -> list:
    dtype, rows = DTYPES[dtype_name], []
    call, data = make_inputs(shape, dtype, device)
    steps = shape.height * shape.width
    candidates = {'triton': lambda: call(*data, backend='triton')}
    if steps <= 1024 and steps * shape.batch * shape.channels * shape.directions * shape.states <= 2 ** 28:
        candidates['reference'] = lambda: call(*data, backend='reference')  # it holds every state
    if shape.directions == 1:
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
            u, delta, A, B, C, D, bias = data
            candidates['mamba_ssm'] = lambda: selective_scan_fn(
                u, delta, A, B.contiguous(), C.contiguous(), D, None, bias, True)
        except ImportError:
            pass
    for name, run in candidates.items():
        out = run()
        seed = torch.randn_like(out)

        def inference(run=run):
            with torch.no_grad():
                run()

        def training(run=run, seed=seed):
            torch.autograd.grad(run(), data, seed)

        row = dict(shape=label, size=str(shape), dtype=dtype_name, implementation=name,
                   forward_ms=milliseconds(inference, device, repeats), training_ms=milliseconds(training, device,
                                                                                                 repeats))
        row['forward_GB_per_s'] = minimum_bytes(shape, dtype, False) / row['forward_ms'] / 1e6
        if name == 'triton':
            first, second = (torch.autograd.grad(run(), data, seed) for _ in range(2))
            row['deterministic'] = all(torch.equal(a, b) for a, b in zip(first, second))
        rows.append(row)
    return rows


def markdown(result: dict) -> str:
    lines = [f"# Triton scan on {result['device']}", '', f"PyTorch {result['torch']}, Triton {result['triton']}", '']
    if result.get('suite'):
        lines += [f"Test suite: {result['suite']['summary']} ({result['suite']['seconds']} s)", '']
        lines += [f'- {line}' for line in result['suite']['failures']]
    lines += ['| shape | dtype | implementation | forward ms | forward + backward ms | GB/s of the fewest bytes | '
              'same bits twice |', '|' + '---|' * 7]
    for r in result['timings']:
        if 'error' in r:
            lines.append(f"| {r['shape']} ({r['size']}) | {r['dtype']} | failed: {r['error']} | | | | |")
        else:
            lines.append(f"| {r['shape']} ({r['size']}) | {r['dtype']} | {r['implementation']} | "
                         f"{r['forward_ms']:.3f} | {r['training_ms']:.3f} | "
                         f"{r['forward_GB_per_s']:.0f} | {r.get('deterministic', '')} |")
    lines += ['', 'Plans chosen (changes of the default plan):', '']
    lines += [f'- `{key}`: {change or "none"}' for key, change in result.get('plans', {}).items()]
    return '\n'.join(lines) + '\n'


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', help="'cuda' (ROCm too) or 'xpu' (default: cuda)")
    parser.add_argument('--dtypes', nargs='+', default=['fp16', 'fp32'], choices=list(DTYPES))
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--no-tests', action='store_true', help='timings only')
    parser.add_argument('--output', type=Path, default=Path('gpu_check'), help='path without suffix')
    args = parser.parse_args(argv)
    module = getattr(torch, torch.device(args.device).type, None)
    if module is None or not module.is_available():
        print(f"gpu_check: no '{args.device}' device here; tools/kernel_report.py needs none", file=sys.stderr)
        return 2
    import triton
    result = dict(device=module.get_device_name(), platform=platform.platform(), torch=torch.__version__,
                  triton=triton.__version__, suite=None if args.no_tests else run_suite(args.device), timings=[])
    for dtype in args.dtypes:
        for label, shape in SHAPES.items():
            try:
                rows = time_shape(label, shape, dtype, args.device, args.repeats)
            except (RuntimeError,
                    torch.OutOfMemoryError) as error:  # one shape too many is no reason to lose the others
                rows = [dict(shape=label, size=str(shape), dtype=dtype, error=str(error).splitlines()[0])]
                module.empty_cache()
            result['timings'] += rows
            for row in rows:
                print(row, flush=True)
    # What the first calls chose among: the changes of a plan by (backward, device, dtype, ...).
    result['plans'] = {str(key): change for key, change in triton_scan._tuned.items()}
    args.output.with_suffix('.json').write_text(json.dumps(result, indent=1))
    args.output.with_suffix('.md').write_text(markdown(result))
    print(markdown(result))
    wrong = [r for r in result['timings'] if r.get('deterministic') is False or 'error' in r]
    return 1 if wrong or (result['suite'] and result['suite']['returncode']) else 0


if __name__ == '__main__':
    sys.exit(main())
