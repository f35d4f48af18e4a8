#!/usr/bin/env python3
"""What the Triton kernels compile to, and what bounds them, on GPUs that need not be there.

The launches are recorded from `vim2.ops.triton` itself, run on meta tensors of the shape in question: which kernels
run, with which grid and compile-time constants. Each is compiled ahead of time for sm_80, sm_90, sm_100 and gfx942 with
the Triton that is installed, and its machine code read with the tools of Triton's wheel.

    python tools/kernel_report.py                       # every variant, every target, rooflines: 15 minutes
    python tools/kernel_report.py --variants map-bf16 --targets sm_90
    TRITON_CACHE_DIR=build/kernels python tools/kernel_report.py --table    # keeps what is compiled: interrupt, go on
"""
import argparse
import collections
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vim2._files import write_text  # noqa: E402
from vim2.ops.triton import launch as scan  # noqa: E402

TARGETS = {'sm_80': ('cuda', 80, 32), 'sm_90': ('cuda', 90, 32), 'sm_100': ('cuda', 100, 32),
           'gfx942': ('hip', 'gfx942', 64)}
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
TYPE_NAMES = {torch.float32: '*fp32', torch.float16: '*fp16', torch.bfloat16: '*bf16'}


@dataclasses.dataclass(frozen=True)
class GPU:
    """Published peak rates. `exponentials` and `instructions` are lanes per clock and multiprocessor."""
    name: str
    target: str
    processors: int
    clock: float            # Hz, boost
    bandwidth: float        # bytes/s
    exponentials: int = 16
    instructions: int = 128


# A100 and H100 datasheets and whitepapers (SXM); CUDA C++ programming guide, table "arithmetic instructions", for the
# 16 exponentials.
GPUS = (GPU('A100 SXM 80 GB', 'sm_80', 108, 1.41e9, 2.039e12), GPU('H100 SXM', 'sm_90', 132, 1.98e9, 3.35e12))


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    channels: int
    height: int
    width: int
    states: int = 16
    directions: int = 1

    def __str__(self):
        size = f'{self.width}' if self.height == 1 else f'{self.height}x{self.width}'
        return f'B{self.batch} E{self.channels} L{size} N{self.states} K{self.directions}'


SHAPES = {
    'sequence': Shape(8, 2048, 1, 2048),
    'token mixer, stage 1 at 224': Shape(128, 192, 56, 56, 16, 4),
    'token mixer, stage 2 at 224': Shape(128, 384, 28, 28, 16, 4),
    'token mixer, stage 3 at 224': Shape(128, 768, 14, 14, 16, 4),
    'token mixer, stage 4 at 224': Shape(128, 1536, 7, 7, 16, 4),
    'VMamba (N = 1), stage 3 at 224': Shape(128, 768, 14, 14, 1, 4),
    'channel mixer, stage 3 at 224': Shape(128, 196, 1, 768),
}


@dataclasses.dataclass
class Launch:
    kernel: str
    programs: int
    arguments: Dict[str, object]
    constants: Dict[str, object]
    warps: int


def inputs(shape: Shape, dtype: torch.dtype, time_contiguous=False, gate=False, constant=False, device='meta') -> tuple:
    """u, delta, A, B, C, D, z, delta_bias as the layers give them: channels contiguous, N of B and C contiguous; or
    time contiguous in all of them."""
    b, e, h, w, n, k = dataclasses.astuple(shape)

    def make(*sizes):
        return torch.empty(sizes, dtype=dtype, device=device)

    def weights(*sizes):
        return torch.empty(sizes, dtype=torch.float32, device=device)

    def channels(*lead):
        return make(*lead, e, h, w) if time_contiguous else make(*lead, h, w, e).movedim(-1, len(lead))

    def projections():
        if constant:
            return make(b, k, 1, n, 1, 1)
        return make(b, k, 1, n, h, w) if time_contiguous else make(b, h, w, k, 1, n).permute(0, 3, 4, 5, 1, 2)

    return (channels(b), channels(b, k), weights(k, e, n), projections(), projections(), weights(k, e),
            channels(b) if gate else None, weights(k, e))


def record(shape: Shape, dtype: torch.dtype, plan: Optional[scan.Plan] = None, last=False, training=True, device='meta',
           processors=132, wave=32, **layout) -> List[Launch]:
    """The launches of one forward and, if training, one backward, on a GPU of that many multiprocessors, with warps of
    `wave` lanes."""
    launches = []

    def launch(kernel, programs, *args, num_warps, **constants):
        from vim2.ops.triton import kernels
        runtime = [p.name for p in getattr(kernels, kernel).params if not p.is_constexpr]
        assert len(runtime) == len(args), (kernel, len(runtime), len(args))
        launches.append(Launch(kernel, programs, dict(zip(runtime, args)), constants, num_warps))

    data, directions = inputs(shape, dtype, device=device, **layout), list(range(shape.directions))
    originals = scan._launch, scan._processors, scan._wave
    scan._launch, scan._processors, scan._wave = launch, lambda device: processors, lambda: wave
    try:
        _, _, states = scan.forward(*data, True, directions, last, training, plan=plan)
        if training:
            grad_last = torch.empty((shape.batch, shape.directions, shape.channels, shape.states),
                                    device=device) if last else None
            scan.backward(torch.empty_like(data[0]), grad_last, *data, states, True, directions, plan=plan)
    finally:
        scan._launch, scan._processors, scan._wave = originals
    return launches


def minimum_bytes(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Every input read once and every output written once; the backward's also the gradients' inputs."""
    size = torch.finfo(dtype).bits // 8
    maps = shape.batch * shape.channels * shape.height * shape.width
    projections = 2 * shape.batch * shape.directions * shape.states * shape.height * shape.width
    # Forward: u, delta, B, C in, the output out. Backward: those and grad_out in, the gradients of all four out.
    once = maps * (1 + shape.directions) + projections
    return size * (2 * once + maps if backward else once + maps)


# Machine code --------------------------------------------------------------------------------------------------------

def compile_launch(launch: Launch, target: str):
    """(compiled kernel, seconds)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vim2.ops.triton import kernels
    function = getattr(kernels, launch.kernel)
    signature, attributes = {}, {}
    for i, parameter in enumerate(function.params):
        value = launch.arguments.get(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name] = 'constexpr'
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPE_NAMES[value.dtype]
            attributes[(i,)] = [['tt.divisibility', 16]]
        else:
            signature[parameter.name] = 'i64' if abs(value) >= 2 ** 31 else 'i32'
    start = time.perf_counter()
    kernel = triton.compile(ASTSource(fn=function, signature=signature, constexprs=launch.constants, attrs=attributes),
                            target=GPUTarget(*TARGETS[target]), options={'num_warps': launch.warps})
    return kernel, time.perf_counter() - start


CLASSES = (('MUFU.EX2', 'exp'), ('MUFU', 'mufu'), ('FFMA', 'fma'), ('FMUL', 'fma'), ('FADD', 'fma'),
           ('HADD2', 'convert'), ('F2F', 'convert'), ('PRMT', 'convert'), ('IMAD.U32', 'convert'), ('SHFL', 'shuffle'),
           ('LDG', 'load'), ('STG', 'store'), ('LDS', 'shared'), ('STS', 'shared'), ('BAR', 'barrier'),
           ('LDL', 'spill'), ('STL', 'spill'))


def _classify(opcode: str) -> str:
    return next((group for prefix, group in CLASSES if opcode.startswith(prefix)), 'other')


def _nvidia_tool(name: str, *args: str) -> str:
    import triton
    tool = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', name)
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def inspect_kernel(kernel, target: str) -> Dict[str, object]:
    """Registers, spill instructions, shared memory; on NVIDIA also the instructions of each loop, by class."""
    if not target.startswith('sm_'):
        text = kernel.asm['amdgcn']
        spills = re.search(r'\.vgpr_spill_count:\s+(\d+)', text)
        return dict(registers=int(re.search(r'\.vgpr_count:\s+(\d+)', text).group(1)),
                    spills=int(spills.group(1)) if spills else 0, shared=kernel.metadata.shared, loops=[])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'kernel.cubin')
        Path(path).write_bytes(kernel.asm['cubin'])
        usage, sass = _nvidia_tool('cuobjdump', '--dump-resource-usage', path), _nvidia_tool('cuobjdump', '-sass', path)
    code = []
    for address, opcode, rest in re.findall(
            r'/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);', sass):
        to = re.search(r'0x([0-9a-f]+)', rest) if opcode.startswith('BRA') else None
        code.append((int(address, 16), opcode, int(to.group(1), 16) if to else None))
    # From the target of each backward branch to the branch: enough for ptxas' layout. Less the loops within.
    ranges = sorted({(to, at) for at, _, to in code if to is not None and to < at})
    bodies = [frozenset(i for i, (at, _, _) in enumerate(code) if low <= at <= high) for low, high in ranges]
    loops = []
    for body in bodies:
        own = body.difference(*(other for other in bodies if other < body))
        loops.append(dict(collections.Counter(_classify(code[i][1]) for i in own)))
    return dict(registers=int(re.search(r'REG:(\d+)', usage).group(1)),
                spills=sum(_classify(op) == 'spill' for _, op, _ in code), shared=kernel.metadata.shared, loops=loops)


def per_state(launch: Launch, machine: Dict[str, object]) -> Optional[Dict[str, float]]:
    """Instructions per state and step of the main loops, averaged over a scan, by class."""
    c = launch.constants
    loops = sorted((loop for loop in machine['loops'] if loop.get('exp')), key=lambda loop: loop['exp'], reverse=True)
    if not loops or not launch.kernel.startswith('scan_'):
        return None
    lanes = 32 * launch.warps
    if launch.kernel == 'scan_forward':
        weights = [(loops[0], 1 / (c['T'] * c['NV'] * c['NQ'] * c['BE'] / lanes))]
    else:
        tile = c['NR'] * c['CR'] * c['NL'] * c['CL'] / lanes
        weights = [(loops[0], 1 / (c['T'] * tile))]
        if c['SAVE'] > c['T']:  # a group's first state is found from the one saved: (SAVE / T - 1) / 2 steps a step
            weights.append((loops[1], (c['SAVE'] / c['T'] - 1) / 2 / tile))
    total: Dict[str, float] = collections.Counter()
    for loop, weight in weights:
        for name, n in loop.items():
            total[name] += n * weight
    return {name: round(n, 3) for name, n in total.items()}


# Report --------------------------------------------------------------------------------------------------------------

def variants(wave: int = 32) -> Dict[str, List[Launch]]:
    """Every kernel in every combination of features that changes its code by more than a predicated load, for warps of
    `wave` lanes. Between the two half precisions only conversions differ."""
    Plan, record_ = scan.Plan, functools.partial(record, wave=wave)
    sequence, image = Shape(2, 192, 1, 256), Shape(2, 192, 14, 14, 16, 4)
    out = {}
    for name, dtype in DTYPES.items():
        out[f'map-{name}'] = record_(image, dtype, Plan(True, 208), last=True)
        if name == 'fp16':
            continue
        out[f'sequence-{name}'] = record_(sequence, dtype, Plan(True, 256))
        out[f'sequence-gate-last-{name}'] = record_(sequence, dtype, Plan(True, 256), gate=True, last=True)
        out[f'time-{name}'] = record_(sequence, dtype, Plan(True, 256), time_contiguous=True)
        out[f'chunked-{name}'] = record_(sequence, dtype, Plan(True, 128))
        out[f'constant-{name}'] = record_(sequence, dtype, Plan(True, 256), constant=True)
        out[f'map-infer-{name}'] = record_(image, dtype, Plan(True, 208), training=False)
        out[f'map-apart-{name}'] = record_(image, dtype, Plan(False, 208))
        out[f'ragged-{name}'] = record_(Shape(2, 100, 1, 256, 12), dtype, Plan(True, 256))
        out[f'states-1-{name}'] = record_(dataclasses.replace(image, states=1), dtype, Plan(True, 208))
    out['large-bf16'] = record_(Shape(2, 2 ** 19, 1, 2 ** 13), torch.bfloat16)  # offsets of 64 bits
    for n in (4, 8, 32, 64):
        out[f'states-{n}-bf16'] = record_(dataclasses.replace(image, states=n), torch.bfloat16, Plan(True, 208))
    return out


def distinct(launches: Dict[str, List[Launch]]) -> Iterator[Tuple[str, Launch]]:
    """(variant, launch) without the repetitions: the same kernel with the same constants and types."""
    seen = set()
    for name, group in launches.items():
        for launch in group:
            types = tuple(v.dtype if isinstance(v, torch.Tensor) else 'i' for v in launch.arguments.values())
            key = (launch.kernel, types, tuple(sorted(launch.constants.items())), launch.warps)
            if key not in seen:
                seen.add(key)
                yield name, launch


def compile_row(name: str, launch: Launch, target: str) -> Dict[str, object]:
    import triton
    row = dict(triton=triton.__version__, variant=name, kernel=launch.kernel, target=target)
    try:
        kernel, row['seconds'] = compile_launch(launch, target)
        machine = inspect_kernel(kernel, target)
        row.update(per_state=per_state(launch, machine), **{k: machine[k] for k in ('registers', 'spills', 'shared')})
    except Exception as error:  # one that does not compile is a finding, not the end of the report
        row['error'] = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
    return row


def spilled(rows: List[Dict[str, object]]) -> List[Dict[str, object]]:
    """The rows that must not be: spills on sm_80 or sm_90, but for the variants of other numbers of states than 16."""
    return [r for r in rows if r.get('spills') and r['target'] in ('sm_80', 'sm_90')
            and not r['variant'].startswith('states')]


def machine_code_table(rows: List[Dict[str, object]]) -> str:
    """Markdown: registers / spill instructions / bytes of shared memory / instructions per state and step, per variant
    and kernel, and per target and Triton."""
    columns = sorted({(list(TARGETS).index(r['target']), r['target'], r['triton']) for r in rows})
    heads = [f'{target}, Triton {triton}' for _, target, triton in columns]
    lines = ['| variant | kernel | ' + ' | '.join(heads) + ' |', '|' + '---|' * (2 + len(heads))]
    cells, count = {}, collections.Counter()
    for r in rows:
        key = r['variant'], r['kernel'], r['target'], r['triton']
        count[key] += 1  # a pass has its own of a kernel that both launch
        kernel = r['kernel'] if count[key] == 1 else f"{r['kernel']}, {count[key]}"
        mix = f" / {sum(r['per_state'].values()):.1f}" if r.get('per_state') else ''
        text = 'failed' if 'error' in r else f"{r['registers']} / {r['spills']} / {r['shared']}{mix}"
        cells.setdefault((r['variant'], kernel), {})[key[2:]] = text
    for (variant, kernel), row in cells.items():
        lines.append(f'| {variant} | {kernel} | ' + ' | '.join(row.get(c[1:], '–') for c in columns) + ' |')
    return '\n'.join(lines)


def _row(row) -> str:
    head = f"{row['triton']} {row['variant']:22} {row['kernel']:14} {row['target']:7}"
    if 'error' in row:
        return f"{head} FAILED {row['error']}"
    mix = row['per_state'] or {}
    text = ' '.join(f'{k} {v:.2f}' for k, v in sorted(mix.items(), key=lambda kv: -kv[1]))
    return (f"{head} regs {row['registers']:3} spills {row['spills']:3} shared {row['shared']:5} {row['seconds']:5.1f}s"
            f" | {sum(mix.values()):5.2f}: {text}")


def roofline(dtype_name: str, rows: List[Dict[str, object]]) -> List[Dict[str, object]]:
    """Per shape, GPU and pass: milliseconds of the fewest bytes, of the fewest exponentials, of issue as counted."""
    import triton
    mixes = {(r['variant'], r['kernel'], r['target']): r['per_state'] for r in rows if r.get('per_state')}
    table = []
    for label, shape in SHAPES.items():
        steps = shape.batch * shape.channels * shape.height * shape.width * shape.directions
        variant = f'time-{dtype_name}' if label.startswith('channel') else f'sequence-{dtype_name}'
        if shape.directions > 1:
            variant = f'map-{dtype_name}' if shape.states == 16 else f'states-{shape.states}-{dtype_name}'
        for gpu in GPUS:
            rate = gpu.processors * gpu.clock
            for kernel in ('scan_forward', 'scan_backward'):
                least = minimum_bytes(shape, DTYPES[dtype_name], kernel == 'scan_backward') / gpu.bandwidth * 1e3
                # One exponential per state and step, and one for the softplus.
                exponentials = steps * (shape.states + 1) / (rate * gpu.exponentials) * 1e3
                mix = mixes.get((variant, kernel, gpu.target))
                issue = steps * shape.states * sum(mix.values()) / (rate * gpu.instructions) * 1e3 if mix else None
                table.append(dict(triton=triton.__version__, shape=f'{label} ({shape})', gpu=gpu.name, kernel=kernel,
                                  bytes_ms=least, exponentials_ms=exponentials, issue_ms=issue,
                                  above=issue / max(least, exponentials) if issue else None))
    return table


def roofline_table(table) -> str:
    lines = ['| shape | GPU | kernel | fewest bytes ms | fewest exponentials ms | issue ms, Triton '
             f"{table[0]['triton']} | above the floor |", '|' + '---|' * 7]
    for r in table:
        issue = [f"{r['issue_ms']:.3f}", f"{r['above']:.2f}x"] if r['issue_ms'] else ['–', '–']
        lines.append('| ' + ' | '.join([r['shape'], r['gpu'], r['kernel'], f"{r['bytes_ms']:.3f}",
                                        f"{r['exponentials_ms']:.3f}", *issue]) + ' |')
    return '\n'.join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--targets', nargs='+', default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument('--variants', nargs='+', help='names or prefixes; default: all')
    parser.add_argument('--dtype', default='bf16', choices=list(DTYPES), help='of the roofline table (default: bf16)')
    parser.add_argument('--json', type=Path, help='write everything here too')
    parser.add_argument('--table', action='store_true', help='also print the machine code as a Markdown table')
    parser.add_argument('--beside', type=Path, nargs='+', default=[], metavar='FILE',
                        help='what --json wrote with other Tritons: more columns of the table')
    args = parser.parse_args(argv)
    if scan.interpreting():
        parser.error('TRITON_INTERPRET is set: kernels cannot be compiled')
    import triton
    if 'TRITON_CACHE_DIR' not in os.environ:  # leave nothing behind
        folder = tempfile.TemporaryDirectory(prefix='vim2-kernels-')
        os.environ['TRITON_CACHE_DIR'] = folder.name
    print(f'Triton {triton.__version__}', flush=True)
    rows = []
    for target in args.targets:
        for name, launch in distinct(variants(TARGETS[target][2])):
            if not args.variants or name.startswith(tuple(args.variants)):
                rows.append(compile_row(name, launch, target))
                print(_row(rows[-1]), flush=True)
    table = roofline(args.dtype, rows)
    print(roofline_table(table))
    if args.table:
        others = [row for file in args.beside for row in json.loads(file.read_text())['machine_code']]
        print(machine_code_table(rows + others))
    failed, spills = [r for r in rows if 'error' in r], spilled(rows)
    print(f'Triton {triton.__version__}: {len(rows)} compilations, {len(failed)} failed; {len(spills)} with spills at '
          'N = 16 on sm_80 and sm_90')
    if args.json:
        write_text(args.json, json.dumps(dict(triton=triton.__version__, machine_code=rows, roofline=table), indent=1))
    return 1 if failed or spills else 0


if __name__ == '__main__':
    sys.exit(main())
