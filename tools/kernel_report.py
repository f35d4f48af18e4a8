#!/usr/bin/env python3
"""What the Triton kernels compile to, the bytes they move and what bounds them, on GPUs that need not be there.

The launches are recorded from `vim2.ops.triton_scan` itself, run on meta tensors of the shape in question: which
kernels run, with which grid and compile-time constants. Each is compiled ahead of time for sm_80, sm_90, sm_100 and
gfx942, and its machine code read with the tools of the triton wheel.

    python tools/kernel_report.py                       # every variant, every target, rooflines: some minutes
    python tools/kernel_report.py --variants map-fp16 --targets sm_90
    python tools/kernel_report.py --no-compile          # bytes only: instant
    python tools/kernel_report.py --resume build/kernels # every variant compiled once, also if cut short
"""
import argparse
import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vim2.ops import triton_scan  # noqa: E402

TARGETS = {'sm_80': ('cuda', 80, 32), 'sm_90': ('cuda', 90, 32), 'sm_100': ('cuda', 100, 32), 'gfx942': ('hip',
                                                                                                         'gfx942', 64)}
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
    exponentials: int
    instructions: int       # lanes of all warp instructions issued per clock
    cache: int              # bytes of last-level cache


# NVIDIA: A100 and H100 datasheets and whitepapers (SXM), CUDA C++ programming guide table "arithmetic instructions" for
# the 16 exponentials; AMD: MI300X data sheet, CDNA3 ISA guide: transcendentals at a quarter of the 64 lanes' rate.
GPUS = (
    GPU('A100 SXM 80 GB', 'sm_80', 108, 1.41e9, 2.039e12, 16, 128, 40 << 20),
    GPU('H100 SXM', 'sm_90', 132, 1.98e9, 3.35e12, 16, 128, 50 << 20),
    GPU('MI300X', 'gfx942', 304, 2.1e9, 5.3e12, 16, 64, 256 << 20),
)


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
    'token mixer, stage 1 at 1024, one image': Shape(1, 192, 256, 256, 16, 4),
    'channel mixer, stage 3 at 224': Shape(128, 196, 1, 768),
}


@dataclasses.dataclass
class Launch:
    kernel: str
    programs: int
    arguments: Dict[str, object]
    constants: Dict[str, object]
    warps: int


def inputs(shape: Shape, dtype: torch.dtype, time_contiguous=False, gate=False, constant=False, device='meta'):
    """u, delta, A, B, C, D, z, delta_bias as the layers give them: channels (or time) contiguous, N of B and C
    contiguous."""
    b, e, h, w, n, k = dataclasses.astuple(shape)

    def make(*sizes):
        return torch.empty(sizes, dtype=dtype, device=device)

    def weights(*sizes):
        return torch.empty(sizes, dtype=torch.float32, device=device)

    def channels(*lead):
        if time_contiguous:
            return make(*lead, e, h, w)
        return make(*lead, h, w, e).movedim(-1, len(lead))

    B, C = (make(b, k, 1, n, 1, 1) if constant else make(b, h, w, k, 1, n).permute(0, 3, 4, 5, 1, 2) for _ in 'BC')
    return (channels(b), channels(b, k), weights(k, e, n), B, C, weights(k, e), channels(b) if gate else None,
            weights(k, e))


def record(shape: Shape, dtype: torch.dtype, plan: Optional[triton_scan.Plan] = None, gpu: Optional[GPU] = None,
           last=False, training=True, device='meta', **layout) -> List[Launch]:
    """The launches of one forward and, if training, one backward; without a plan, the one for that GPU (an H100)."""
    launches = []

    def launch(kernel, programs, *args, **constants):
        from vim2.ops import triton_kernels
        function = getattr(triton_kernels, kernel)
        names = [name for name in function.arg_names if name not in constants]
        assert len(names) >= len(args), (kernel, len(names), len(args))
        arguments = dict(zip(names, args))
        given = dict(constants)
        warps = given.pop('num_warps')
        runtime = {p.name for p in function.params if not p.is_constexpr}
        arguments.update({name: given.pop(name) for name in list(given) if name in runtime})
        launches.append(Launch(kernel, programs, arguments, given, warps))

    data = inputs(shape, dtype, device=device, **layout)
    if plan is None:
        plan = triton_scan.make_plan(shape.batch, shape.directions, shape.channels, shape.height * shape.width,
                                     triton_scan.Device((gpu or GPUS[1]).processors, (gpu or GPUS[1]).cache),
                                     data[0].element_size())
    directions = list(range(shape.directions))
    original, triton_scan._launch = triton_scan._launch, launch
    try:
        _, _, states = triton_scan.forward(*data, True, directions, last, training, plan=plan)
        if training:
            grad_last = torch.empty((shape.batch, shape.directions, shape.channels, shape.states),
                                    device=device) if last else None
            triton_scan.backward(torch.empty_like(data[0]), grad_last, *data, states, True, directions, plan=plan)
    finally:
        triton_scan._launch = original
    return launches


def passes(launches: List[Launch]) -> Tuple[List[Launch], List[Launch]]:
    """The launches of the forward and those of the backward."""
    split = next(i for i, l in enumerate(launches) if l.kernel in ('scan_forward', 'scan_together')) + 1
    while split < len(launches) and launches[split].kernel == 'merge_parts':
        split += 1
    return launches[:split], launches[split:]


# Bytes ---------------------------------------------------------------------------------------------------------------

def minimum_bytes(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Every input read once, every output written once; no saved states, no partial sums."""
    size, (b, e, h, w, n, k) = torch.empty(0, dtype=dtype).element_size(), dataclasses.astuple(shape)
    maps, weights = b * h * w * size, 4 * k * e * (n + 2)
    forward = maps * (e * (2 + k) + 2 * k * n) + weights
    return forward if not backward else maps * (e * (3 + 2 * k) + 4 * k * n) + 2 * weights


def requested_bytes(launch: Launch) -> Dict[str, Tuple[int, int]]:
    """Bytes that a launch's programs load and store, per tensor: (all requests, distinct ones).

    Follows the kernels' loops over the recorded grid, and holds a tile that a program's threads share for one request.
    tests/test_kernel_report.py checks it, tensor by tensor, against the loads and stores that Triton's interpreter
    runs.
    """
    a, c = launch.arguments, launch.constants
    size = {name: t.element_size() for name, t in a.items() if isinstance(t, torch.Tensor)}
    if launch.kernel == 'merge_parts':
        n = a['n_elements']
        return {'parts': (n * a['n_parts'] * 4,) * 2, 'out': (n * size['out'],) * 2}
    if launch.kernel == 'merge_three':
        out = {}
        for suffix, n, count in (('', 'n_elements', 'n_parts'), ('_B', 'n_B', 'slots_B'), ('_C', 'n_C', 'slots_C')):
            out[f'parts{suffix}'], out[f'out{suffix}'] = (a[n] * a[count] * 4,) * 2, (a[n] * size[f'out{suffix}'],) * 2
        return {name: counted for name, counted in out.items() if counted[0]}
    K, E, N, L, blocks, chunks = a['K'], a['E'], a['N'], a.get('L'), a['n_blocks'], a.get('n_chunks', 1)
    weights = {'A': E * N, 'D': E if c.get('HAS_D') else 0, 'bias': E if c.get('HAS_BIAS') else 0}
    out: Dict[str, List[int]] = collections.defaultdict(lambda: [0, 0])

    def add(name, requests, distinct):
        out[name][0] += int(requests * size[name])
        out[name][1] += int(distinct * size[name])

    if launch.kernel == 'chunk_carry':
        images = launch.programs // (K * -(-E // c['BE']))
        add('A', images * K * E * N, K * E * N)
        add('ends', 2 * images * K * chunks * E * N, 2 * images * K * chunks * E * N)
        add('lengths', images * K * chunks * E, images * K * chunks * E)
        if c['HAS_INITIAL']:
            add('initial', images * K * E * N, images * K * E * N)
        return {k: tuple(v) for k, v in out.items()}

    T, chunk = c['T'], a.get('chunk')
    if launch.kernel == 'scan_together':
        images, steps = a['n_tasks'] // blocks, -(-L // T) * T
        for name, distinct in (('u', 1), ('delta', K)):
            add(name, images * K * steps * E, images * distinct * L * E)
        for name, per in (('B', 'per_b'), ('C', 'per_c')):
            add(name, images * K * blocks * steps * N, images * K * (E // a[per]) * N * L)
        for name, n in weights.items():
            add(name, images * K * n, K * n)
        # Each program's own sums: zeroed, added to by K directions, read. What must reach memory is one writing back.
        add('acc', images * (2 + 2 * K) * L * E, launch.programs * L * c['BE'])
        add('out', images * L * E, images * L * E)
        if c['HAS_Z']:
            add('z', images * L * E, images * L * E)
        if c['SAVE_STATES']:
            kept = images * K * ((L - 1) // c['SAVE']) * E * N
            add('states', kept, kept)
        if c['WANT_LAST']:
            add('last', images * K * E * N, images * K * E * N)
        return {k: tuple(v) for k, v in out.items() if v[0]}
    spans = [(max(i * chunk - a['pad'], 0), min((i + 1) * chunk - a['pad'], L)) for i in range(chunks)]
    if launch.kernel == 'chunk_summary':
        images = launch.programs // (K * chunks * blocks)
        steps = sum(-(-(hi - lo) // T) * T for lo, hi in spans)
        for name in ('x', 'delta', *(['z'] if c['HAS_Z'] else [])):
            add(name, images * K * steps * E, images * (K if name == 'delta' else 1) * L * E)
        per_block = N * (1 if c['B_CONST'] else steps)
        add('B', images * K * (chunks * E * N if c['B_CONST'] else blocks * per_block),
            images * K * N * (1 if c['B_CONST'] else L) * (E // a['per_b']))
        for name in ('A', 'bias'):
            add(name, images * chunks * K * weights[name], K * weights[name])
        add('ends', images * K * chunks * E * N, images * K * chunks * E * N)
        add('lengths', images * K * chunks * E, images * K * chunks * E)
    elif launch.kernel == 'scan_forward':
        images, KM = launch.programs // (a['KS'] * chunks * blocks), c['KM']
        ends = [(i * chunk, min((i + 1) * chunk, L + a['pad'])) for i in range(chunks)]
        whole = c['TIME_VECTOR'] == 1  # rows are masked, everything else reads its last position again
        steps = L if whole else sum(-(-(hi - lo) // T) * T for lo, hi in ends)
        steps_bc = sum(-(-(hi - lo) // T) * T for lo, hi in ends)
        add('u', images * K * steps * E, images * L * E)
        add('delta', images * K * steps * E, images * K * L * E)
        if c['HAS_Z']:
            add('z', images * K * steps * E, images * L * E)
        for name, per in (('B', 'per_b'), ('C', 'per_c')):
            const = c[f'{name}_CONST']
            add(name, images * K * (chunks * E * N if const else blocks * steps_bc * N),
                images * K * (E // a[per]) * N * (1 if const else L))
        if KM > 1:
            add('acc', images * (KM - 1) * 2 * steps * E, 2 * images * L * E if a['acc'] is not a['out'] else 0)
        parts = a['KS']
        add('out', images * parts * steps * E, images * parts * L * E)
        for name in weights:
            add(name, images * chunks * K * weights[name], K * weights[name])
        if c['HAS_START']:
            add('start', images * K * chunks * E * N, images * K * chunks * E * N)
        if c['SAVE_STATES']:
            kept = images * K * ((L + a['pad'] - 1) // c['SAVE']) * E * N  # all but the first, which is zero
            add('states', kept, kept)
        if c['WANT_LAST']:
            add('last', images * K * E * N, images * K * E * N)
    else:
        images, BB, KM = a['n_batch'], a['BB'], c['KM']
        SAVE, PART, width = c['SAVE'], c['PART'], c['CR'] * c['CW'] * c['CL']
        adjoint = recomputed = segments = kept = rows = 0
        for lo, hi in spans:
            longest = 0
            for segment in range((lo + a['pad']) // SAVE, (hi + a['pad'] - 1) // SAVE + 1):
                t_0, t_1 = max(segment * SAVE - a['pad'], lo), min((segment + 1) * SAVE - a['pad'], hi)
                groups = -(-(t_1 - t_0) // T)
                adjoint += groups * T
                parts = -(-groups * T // PART)
                recomputed += (parts - 1) * PART + (groups - parts) * T
                segments, kept, longest = segments + 1, kept + parts - 1, max(longest, parts - 1)
            rows += longest
        first = recomputed + adjoint   # steps that run forward
        add('u', images * K * (first + adjoint) * E, images * L * E)
        add('delta', images * K * (first + (adjoint if c['SOFTPLUS'] else 0)) * E, images * K * L * E)
        add('grad_out', images * K * adjoint * E, images * L * E)
        add('grad_delta', images * K * adjoint * E, images * K * L * E)
        for name, per, reads in (('B', 'per_b', first + adjoint), ('C', 'per_c', adjoint)):
            groups, slots = E // a[per], a[f'slots_{name.lower()}']
            if c[f'{name}_CONST']:
                add(name, images * chunks * K * E * N, images * K * groups * N)
                add(f'grad_{name}', images * chunks * K * E * N, images * chunks * K * E * N)
            else:
                add(name, images * K * blocks * reads * N, images * K * groups * N * L)
                add(f'grad_{name}', images * K * blocks * adjoint * N, images * K * groups * slots * N * L)
        if c['HAS_Z']:
            add('z', images * K * adjoint * E, images * L * E)
            add('grad_z', images * K * adjoint * E, images * L * E)
        add('grad_u', images * (K // KM) * adjoint * E, images * a['KS'] * L * E)
        if KM > 1:  # the program's own sums; what must reach memory is one writing back
            add('acc', 2 * images * (KM - 1) * adjoint * E, launch.programs * L * width)
        add('scratch', 2 * images * K * kept * E * N, K // KM * rows * E * N * -(-images // BB))
        add('states', images * K * (segments - 1) * E * N, images * K * (segments - 1) * E * N)
        if c['HAS_END']:
            add('end', images * chunks * K * E * N, images * chunks * K * E * N)
        sums = -(-images // BB) * chunks * K
        for name, n in (('A', E * N), ('D', weights['D']), ('bias', weights['bias'])):
            add(name, sums * BB * n, K * n)
            add(f'grad_{name}', sums * (2 * BB - 1) * n, sums * n)  # read, but for the first image, and written
    return {k: tuple(v) for k, v in out.items() if v[0]}


def reused(launch: Launch, gpu: GPU, registers: int = 168) -> Tuple[str, ...]:
    """The maps that several directions read or add to, and that stay in the last-level cache in between.

    Directions in turn, or side by side, go over the same map within the time that a program takes for its scans: what
    all resident programs touch must stay in the cache for so long, the backward's scratch with it.
    """
    a, c = launch.arguments, launch.constants
    width = c['BE'] if 'BE' in c else c['CR'] * c['CW'] * c['CL']
    if launch.kernel == 'scan_backward':
        registers = 255
    resident = min(launch.programs, gpu.processors * max(1, 65536 // registers // (32 * launch.warps)))
    scratch = 0
    if launch.kernel == 'scan_backward':
        scratch = resident * requested_bytes(launch).get('scratch', (0, 0))[1] / launch.programs
    maps = ('u', 'acc') if launch.kernel != 'scan_backward' else ('u', 'grad_out', 'acc')
    if a.get('KS', 1) > 1:  # side by side: the programs of a block share its maps, each has its own sums
        resident, maps = resident / a['KS'], maps[:-1]
    span = a['L'] if a.get('n_chunks', 1) == 1 else min(a['L'], a['chunk'] * a['n_chunks'])
    per_position = sum(a[name].element_size() for name in maps)
    if launch.kernel == 'scan_forward' and c['KM'] > 1:
        per_position += a['delta'].element_size()  # streams through, as much of it as of u in each direction
    if a.get('n_chunks', 1) > 1:  # all chunks of an image are resident together before the first one ends
        resident /= a['n_chunks']
    footprint = max(resident * width, min(width, a['E'])) * span * per_position + scratch
    return maps if footprint <= triton_scan.CACHE_SHARE * gpu.cache else ()


def tensor_bytes(launch: Launch, gpu: GPU) -> Dict[str, int]:
    """Bytes of one launch by itself through device memory, by tensor: neighbouring programs share B and C in the cache;
    a map that K directions read one after the other, or add to, is read again from memory unless it fits the cache."""
    a, c = launch.arguments, launch.constants
    counted = {name: once for name, (_, once) in requested_bytes(launch).items()}
    scans = ('scan_forward', 'scan_together', 'scan_backward')
    if launch.kernel not in scans or a['K'] == 1:
        return counted
    kept = reused(launch, gpu)
    images = a['n_batch'] if 'n_batch' in a else a['n_tasks'] // a['n_blocks'] if 'n_tasks' in a else (
        launch.programs // math.prod(a[name] for name in ('KS', 'n_chunks', 'n_blocks')))
    for name in ('u', 'z', 'grad_out'):
        if name in counted and name not in kept and not (name == 'z' and launch.kernel == 'scan_together'):
            counted[name] *= a['K']
    if 'acc' in counted and 'acc' not in kept:
        # Directions in turn read it K - 1 times and write it as often; in lockstep each direction does both, and it is
        # zeroed and read.
        passes = 2 * a['K'] + 2 if launch.kernel == 'scan_together' else 2 * (c['KM'] - 1)
        counted['acc'] = passes * 4 * images * a['L'] * a['E']
    return counted


# What a launch's programs, or the launches of one run, read or overwrite again; and what streams through beside it as
# fast. The rest is read or written once: saved states, the gradients that are merged, weights.
AGAIN = ('u', 'x', 'grad_out', 'delta', 'grad_delta', 'B', 'C', 'scratch', 'acc')
Piece = Tuple[int, int]


def _piece(t: torch.Tensor) -> Piece:
    """Where a tensor starts: the same for launches given the same buffer, another for other images of a tensor.

    The address of the storage object, not of its memory: a meta tensor has none.
    """
    return t.untyped_storage()._cdata, t.storage_offset()


def runs(launches: List[Launch]) -> List[List[Launch]]:
    """A pass cut into what is launched for one group of images: all of it where there are no groups."""
    out: List[List[Launch]] = []
    for launch in launches:
        follows = launch.kernel in ('merge_parts', 'merge_three', 'chunk_carry')
        if out and (follows or out[-1][-1].kernel == 'chunk_carry'):
            out[-1].append(launch)
        else:
            out.append([launch])
    return out


def pass_bytes(launches: List[Launch], gpu: GPU) -> int:
    """Bytes of a forward or backward through device memory: of its launches, less what one leaves in the cache for the
    next.

    - Where everything that a run of launches goes over more than once, and what streams through beside it (`AGAIN`),
      takes less than CACHE_SHARE of the cache, and everything that the run touches fits it, so that no line is dropped
      between two uses: every input once, every output once, and nothing of what one of the launches writes and another
      reads, nor of the scratch. A cache writes back no sooner than it must, so that of a buffer used by many runs only
      what is in it after the last one is written.
    - Else, where the scan is cut into chunks, the main kernel reads what `chunk_summary` has read, in the same order.
      A cache that drops what was used longest ago still holds a line if what was touched since fits: the rest of what
      the two read alike, and at place p of it (0 to 1) the share p of what else the main kernel moves.
    """
    share, total = triton_scan.CACHE_SHARE * gpu.cache, 0
    buffers: Dict[Piece, int] = {}
    for launch in launches:  # PyTorch reads the weights' partial sums, to add them up
        total += sum(once for name, (_, once) in requested_bytes(launch).items()
                     if name in ('grad_A', 'grad_D', 'grad_bias')
                     or name in ('grad_B', 'grad_C') and launch.constants[f'{name[-1]}_CONST'])
    for run in runs(launches):
        pieces: Dict[Piece, int] = {}
        users: Dict[Piece, set] = collections.defaultdict(set)
        names: Dict[Piece, set] = collections.defaultdict(set)
        written = set()
        for i, launch in enumerate(run):
            for name, (_, once) in requested_bytes(launch).items():
                key = _piece(launch.arguments[name])
                pieces[key] = min(pieces.get(key, once), once)  # `chunk_carry` reads and writes the same place
                users[key].add(i)
                names[key].add(name)
                if name in ('scratch', 'acc', 'ends', 'lengths') or name.startswith('parts'):
                    written.add(key)
        again = sum(size for key, size in pieces.items() if len(users[key]) > 1 or names[key] & set(AGAIN))
        if len(run) > 1 and again <= share and sum(pieces.values()) <= gpu.cache:
            for key, size in pieces.items():
                if key in written:
                    buffers[key] = max(buffers.get(key, 0), size)
                else:
                    total += size
            continue
        alone = [tensor_bytes(launch, gpu) for launch in run]
        total += sum(sum(counted.values()) for counted in alone)
        if run[0].kernel == 'chunk_summary':
            main = run[2]
            shared = sum(size for key, size in pieces.items() if {0, 2} <= users[key])
            streams = sum(alone[2].values()) - shared
            total -= int(shared * min(1.0, max(0.0, (share - shared) / streams)))
            assert main.kernel.startswith('scan_')
    return total + sum(buffers.values())


# Machine code --------------------------------------------------------------------------------------------------------

def compile_launch(launch: Launch, target: str):
    """(compiled kernel, seconds)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vim2.ops import triton_kernels
    function = getattr(triton_kernels, launch.kernel)
    signature, attributes = {}, {}
    for i, parameter in enumerate(function.params):
        if parameter.is_constexpr:
            signature[parameter.name] = 'constexpr'
            continue
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPE_NAMES[value.dtype]
            attributes[(i,)] = [['tt.divisibility', 16]]
        else:
            signature[parameter.name] = 'i64' if abs(value) >= 2 ** 31 else 'i32'
    options = {'num_warps': launch.warps}
    registers = triton_scan.max_registers(launch.kernel, launch.constants)
    if target.startswith('sm_') and registers is not None:
        options['maxnreg'] = registers
    start = time.perf_counter()
    kernel = triton.compile(ASTSource(fn=function, signature=signature, constexprs=launch.constants, attrs=attributes),
                            target=GPUTarget(*TARGETS[target]), options=options)
    return kernel, time.perf_counter() - start


def _nvidia_tool(name: str, *args: str) -> str:
    import triton
    tool = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', name)
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


CLASSES = (('MUFU.EX2', 'exp'), ('MUFU', 'mufu'), ('FFMA', 'fma'), ('FMUL', 'fma'), ('FADD', 'fma'), ('HADD2',
                                                                                                      'convert'),
           ('HFMA2', 'convert'), ('F2F', 'convert'), ('PRMT', 'convert'), ('SHFL', 'shuffle'), ('LDG', 'load'),
           ('STG', 'store'), ('LDS', 'shared'), ('STS', 'shared'), ('BAR', 'barrier'), ('LDL', 'spill'), ('STL',
                                                                                                          'spill'),
           ('v_exp', 'exp'), ('v_rcp', 'mufu'), ('v_fma', 'fma'), ('v_mul_f', 'fma'), ('v_add_f', 'fma'), ('v_pk',
                                                                                                           'fma'),
           ('v_cvt', 'convert'), ('global_load', 'load'), ('global_store', 'store'), ('ds_', 'shared'),
           ('scratch', 'spill'), ('s_barrier', 'barrier'))


def _classify(opcode: str) -> str:
    if opcode.endswith('_dpp') or 'row_' in opcode:
        return 'shuffle'
    return next((group for prefix, group in CLASSES if opcode.startswith(prefix)), 'other')


def _loops(code: List[Tuple[int, str, Optional[int]]]) -> List[Tuple[int, int]]:
    """Address ranges of loops: from the target of each backward branch to the branch. Enough for ptxas' layout."""
    return sorted({(to, at) for at, op, to in code if to is not None and to < at})


def natural_loops(code: List[Tuple[int, str, Optional[int]]]) -> List[frozenset]:
    """Loops of AMD code as sets of instruction indices, by header: LLVM lays their blocks out in any order.

    A loop is a branch back to a block that dominates it, and all that reaches the branch without passing that block.
    """
    starts = sorted({0} | {to for _, _, to in code if to is not None and to < len(code)} | {
        at + 1 for at, op, to in code if (to is not None or op.startswith('s_endpgm')) and at + 1 < len(code)})
    index = {start: i for i, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    after: List[List[int]] = []
    for i, end in enumerate(ends):
        _, op, to = code[end - 1]
        after.append([index[to]] if to is not None and to in index else [])
        if not op.startswith(('s_branch', 's_endpgm', 's_setpc')) and end in index:
            after[i].append(index[end])
    before: List[List[int]] = [[] for _ in starts]
    for i, targets in enumerate(after):
        for j in targets:
            before[j].append(i)
    reached, queue = {0}, [0]
    while queue:
        for j in after[queue.pop()]:
            if j not in reached:
                reached.add(j)
                queue.append(j)
    dominators = {i: set(reached) for i in reached}
    dominators[0], changed = {0}, True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new = {i}.union(set.intersection(*(dominators[j] for j in before[i] if j in reached)))
            if new != dominators[i]:
                dominators[i], changed = new, True
    bodies: Dict[int, set] = {}
    for i in reached:
        for header in after[i]:
            if header in dominators[i]:
                body = bodies.setdefault(header, {header})
                queue = [i]
                while queue:
                    block = queue.pop()
                    if block not in body:
                        body.add(block)
                        queue += [j for j in before[block] if j in reached]
    return [frozenset(at for block in bodies[header] for at in range(starts[block], ends[block]))
            for header in sorted(bodies)]


def inspect_kernel(kernel, target: str) -> Dict[str, object]:
    """Registers, spill instructions, shared memory, and instruction counts per loop, innermost first."""
    if target.startswith('sm_'):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'kernel.cubin')
            Path(path).write_bytes(kernel.asm['cubin'])
            usage, sass = _nvidia_tool('cuobjdump', '--dump-resource-usage', path), _nvidia_tool('cuobjdump', '-sass',
                                                                                                 path)
        registers = int(re.search(r'REG:(\d+)', usage).group(1))
        code = []
        for address, opcode, rest in re.findall(
                r'/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);', sass):
            to = re.search(r'0x([0-9a-f]+)', rest) if opcode.startswith('BRA') else None
            code.append((int(address, 16), opcode, int(to.group(1), 16) if to else None))
    else:
        text = kernel.asm['amdgcn']
        registers = int(re.search(r'\.vgpr_count:\s+(\d+)', text).group(1))
        code, labels = [], {}
        for line in text.splitlines():
            line = line.split(';')[0].strip()
            label = re.match(r'(\.LBB\w+):', line)
            if label:
                labels[label.group(1)] = len(code)
            elif re.match(r'[a-z]+_\w+', line):
                op, *rest = line.split(None, 1)
                to = rest[0].strip() if rest and op.startswith(('s_cbranch', 's_branch')) else None
                code.append((len(code), op + ('_dpp' if rest and 'row_' in rest[0] else ''), to))
        code = [(at, op, labels.get(to)) for at, op, to in code]
    spills = sum(_classify(op) == 'spill' for _, op, _ in code)
    if target.startswith('sm_'):
        bodies = [frozenset(i for i, (at, _, _) in enumerate(code) if low <= at <= high) for low, high in _loops(code)]
    else:
        bodies = natural_loops(code)
    loops = [dict(body=body, instructions=len(body),
                  classes=dict(collections.Counter(_classify(code[i][1]) for i in body))) for body in bodies]
    shared = kernel.metadata.shared
    return dict(registers=registers, spills=spills, shared=shared, loops=loops, instructions=len(code))


def per_state(launch: Launch, machine: Dict[str, object]) -> Optional[Dict[str, float]]:
    """Instructions per state and step of the main loops, averaged over a scan, by class."""
    c, loops = launch.constants, machine['loops']
    lanes = 64 if machine.get('target') == 'gfx942' else 32
    bodies = [l['body'] for l in loops]

    def own(i):
        """A loop's instructions less those of the loops within it."""
        inner = [j for j, body in enumerate(bodies) if body < bodies[i]]
        direct = [j for j in inner if not any(bodies[j] < bodies[m] for m in inner)]
        counts = collections.Counter(loops[i]['classes'])
        for j in direct:
            counts.subtract(loops[j]['classes'])
        return counts

    innermost = [i for i, body in enumerate(bodies) if not any(other < body for other in bodies)]
    total: Dict[str, float] = collections.Counter()
    if launch.kernel in ('scan_forward', 'scan_together'):
        main = max(innermost, key=lambda i: loops[i]['classes'].get('exp', 0), default=None)
        if main is None:
            return None
        states = c['T'] * c['NP'] * c['BE'] * c.get('KP', 1) / (lanes * launch.warps)
        for name, n in own(main).items():
            total[name] += n / states
    elif launch.kernel == 'scan_backward':
        with_work = sorted((i for i in innermost if loops[i]['classes'].get('exp', 0)), key=lambda i: min(bodies[i]))
        if len(with_work) != 3:
            return None
        coarse, recompute, adjoint = with_work
        around = [i for i, body in enumerate(bodies) if bodies[adjoint] < body]
        if not around:
            return None
        group = min(around, key=lambda i: len(bodies[i]))
        tile = c['NR'] * c['NL'] * c['CR'] * c['CW'] * c['CL'] / (lanes * launch.warps)
        T, SAVE, PART = c['T'], c['SAVE'], c['PART']
        # Iterations per step of the scan.
        for i, weight in ((coarse, (SAVE - PART) / T / SAVE), (recompute, (PART - T) / T / PART), (adjoint, 1.0),
                          (group, 1 / T)):
            for name, n in own(i).items():
                total[name] += n * weight / tile
    else:
        return None
    return {name: round(n, 3) for name, n in total.items() if n > 0}


# Report --------------------------------------------------------------------------------------------------------------

def variants() -> Dict[str, List[Launch]]:
    """Every kernel in every combination of features that changes its code by more than a predicated load."""
    Plan = triton_scan.Plan
    sequence, short = Shape(2, 192, 1, 256), Shape(2, 192, 1, 250)
    image, large = Shape(2, 192, 14, 14, 16, 4), Shape(2, 192, 28, 28, 16, 4)
    out = {}
    for name, dtype in DTYPES.items():
        out[f'sequence-{name}'] = record(sequence, dtype, Plan(True, 256))
        out[f'sequence-infer-{name}'] = record(sequence, dtype, Plan(True, 256), training=False)
        out[f'sequence-gate-last-{name}'] = record(sequence, dtype, Plan(True, 256), gate=True, last=True)
        out[f'time-{name}'] = record(sequence, dtype, Plan(True, 256), time_contiguous=True)
        out[f'time-odd-{name}'] = record(short, dtype, Plan(True, 256), time_contiguous=True, gate=True)
        out[f'chunked-{name}'] = record(sequence, dtype, Plan(True, 128))
        out[f'constant-{name}'] = record(sequence, dtype, Plan(True, 256), constant=True)
        out[f'map-{name}'] = record(image, dtype, Plan(True, 256, 2, together=2, turns=True), last=True)
        out[f'map-narrow-{name}'] = record(image, dtype, Plan(True, 256, 2, together=2, width=16), last=True)[:1]
        out[f'map-turn-{name}'] = record(image, dtype, Plan(True, 256, 2), training=False)
        out[f'map-apart-{name}'] = record(image, dtype, Plan(False, 256))
        out[f'map-groups-{name}'] = record(large, dtype, Plan(False, 1024, warps=4, group=1, back_chunk=256))
        out[f'ragged-{name}'] = record(Shape(2, 100, 1, 256, 12), dtype, Plan(True, 256))
    for n in (1, 4, 32, 64):
        out[f'states-{n}'] = record(dataclasses.replace(sequence, states=n), torch.float16, Plan(True, 256))
    return out


def distinct(launches: Dict[str, List[Launch]]):
    """(variant, launch) without the repetitions: the same kernel with the same constants and types."""
    seen = set()
    for name, group in launches.items():
        for launch in group:
            types = tuple((k, v.dtype if isinstance(v, torch.Tensor) else 'i') for k,
                          v in sorted(launch.arguments.items()))
            key = (launch.kernel, types, tuple(sorted(launch.constants.items())), launch.warps)
            if key not in seen:
                seen.add(key)
                yield name, launch


CODE_READER = 1  # to be raised when what is read from the machine code changes: invalidates what --resume kept


def _key(launch: Launch, target: str) -> str:
    """What a compilation depends on, as a file name."""
    import triton

    from vim2.ops import triton_kernels
    types = {k: str(v.dtype) if isinstance(v, torch.Tensor) else abs(v) >= 2 ** 31
             for k, v in launch.arguments.items()}
    parts = (Path(triton_kernels.__file__).read_text(), CODE_READER, triton.__version__, launch.kernel,
             sorted(types.items()), sorted(launch.constants.items()), launch.warps, target,
             triton_scan.max_registers(launch.kernel, launch.constants))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def compile_row(name: str, launch: Launch, target: str) -> Dict[str, object]:
    """One line of the report: a variant's kernel on a target."""
    row: Dict[str, object] = dict(variant=name, kernel=launch.kernel, target=target)
    try:
        kernel, seconds = compile_launch(launch, target)
    except Exception as error:  # a kernel that does not compile is a line of the report, not its end
        return dict(row, error=f'{type(error).__name__}: {error}'[:300])
    machine = dict(inspect_kernel(kernel, target), target=target)
    return dict(row, registers=machine['registers'], spills=machine['spills'], shared=machine['shared'],
                instructions=machine['instructions'], seconds=round(seconds, 1), per_state=per_state(launch, machine))


def report_machine_code(targets: List[str], chosen: Dict[str, List[Launch]], log,
                        resume: Optional[Path] = None, compiling: bool = True) -> List[Dict[str, object]]:
    """Rows of all kernels of all variants; with `resume`, a folder, what an earlier run compiled is read from there."""
    rows = []
    for name, launch in distinct(chosen):
        for target in targets:
            path = None if resume is None else resume / f'{_key(launch, target)}.json'
            if path is not None and path.exists():
                row = dict(json.loads(path.read_text()), variant=name)
            elif not compiling:
                continue
            else:
                row = compile_row(name, launch, target)
                if path is not None:
                    partial = path.with_suffix('.tmp')
                    partial.write_text(json.dumps(row))
                    partial.replace(path)
            rows.append(row)
            log(_row(row))
    return rows


def spilled(rows: List[Dict[str, object]]) -> List[Dict[str, object]]:
    """The rows that must not be: spills on sm_80 or sm_90, but for the variants of other numbers of states than 16."""
    return [r for r in rows if r.get('spills') and r['target'] in ('sm_80', 'sm_90')
            and not r['variant'].startswith('states')]


def machine_code_table(rows: List[Dict[str, object]]) -> str:
    """Markdown: registers / spill instructions per variant, kernel and target."""
    targets = [t for t in TARGETS if any(r['target'] == t for r in rows)]
    lines = ['| variant | kernel | ' + ' | '.join(targets) + ' |', '|' + '---|' * (2 + len(targets))]
    cells = {(r['variant'], r['kernel'], r['target']): 'failed' if 'error' in r else f"{r['registers']} / {r['spills']}"
             for r in rows}
    for variant, kernel in dict.fromkeys((r['variant'], r['kernel']) for r in rows):
        lines.append(f'| {variant} | {kernel} | '
                     + ' | '.join(cells.get((variant, kernel, t), '–') for t in targets) + ' |')
    return '\n'.join(lines)


def _row(row) -> str:
    if 'error' in row:
        return f"{row['variant']:24} {row['kernel']:14} {row['target']:7} FAILED {row['error']}"
    mix = row['per_state'] or {}
    text = ' '.join(f'{k} {v:.2f}' for k, v in sorted(mix.items(), key=lambda kv: -kv[1]))
    return (f"{row['variant']:24} {row['kernel']:14} {row['target']:7} regs {row['registers']:3} "
            f"spills {row['spills']:3} shared {row['shared']:6} instr {row['instructions']:5} "
            f"{row['seconds']:5.1f}s | {text}")


def roofline(dtype_name: str, rows: List[Dict[str, object]]) -> List[Dict[str, object]]:
    """Per shape, GPU and pass: bytes over the minimum, and milliseconds by unit."""
    table, dtype = [], DTYPES[dtype_name]
    mixes = {(r['variant'], r['kernel'], r['target']): r['per_state'] for r in rows if r.get('per_state')}
    for label, shape in SHAPES.items():
        steps = shape.batch * shape.channels * shape.height * shape.width * shape.directions
        for gpu in GPUS:
            launches = record(shape, dtype, gpu=gpu, time_contiguous=label.startswith('channel'))
            for backward, group in enumerate(passes(launches)):
                main = next(l for l in group if l.kernel.startswith('scan_'))
                least = minimum_bytes(shape, dtype, backward)
                asked = sum(sum(r for r, _ in requested_bytes(l).values()) for l in group)
                moved = pass_bytes(group, gpu)
                rate = gpu.processors * gpu.clock
                # The fewest exponentials: one per state and step and one for the softplus. A backward that keeps no
                # state needs every decay at least once.
                least_exp = steps * (shape.states + 1) / (rate * gpu.exponentials)
                row = dict(shape=label, size=str(shape), gpu=gpu.name, step='backward' if backward else 'forward',
                           launches=[l.kernel for l in group], requested=asked / least, moved=moved / least,
                           memory_ms=least / gpu.bandwidth * 1e3, moved_ms=moved / gpu.bandwidth * 1e3,
                           exp_ms=least_exp * 1e3)
                # The variant whose code this launch runs.
                variant = 'sequence' if shape.directions == 1 else 'map-apart'
                if main.kernel == 'scan_together' or main.constants['KM'] > 1:
                    variant = 'map-turn' if main.kernel == 'scan_forward' else 'map'
                    variant += '-narrow' if main.constants.get('NL', 1) > 1 and main.kernel == 'scan_together' else ''
                mix = mixes.get((f'{variant}-{dtype_name}', main.kernel, gpu.target))
                if mix:
                    # `chunk_summary` does what a forward of one direction does, but for its output.
                    first = mixes.get((f'sequence-{dtype_name}', 'scan_forward', gpu.target)) or {}
                    chunked = any(l.kernel == 'chunk_summary' for l in group)
                    mix = {k: mix.get(k, 0) + (first.get(k, 0) if chunked else 0) for k in {*mix, *first}}
                    states = steps * shape.states
                    row['exp_used_ms'] = states * (mix.get('exp', 0) + mix.get('mufu', 0)) / (
                        rate * gpu.exponentials) * 1e3
                    row['issue_ms'] = states * sum(mix.values()) / (rate * gpu.instructions) * 1e3
                floor = max(row['memory_ms'], row['exp_ms'])
                units = {'memory': row['moved_ms'], 'exponentials': row.get('exp_used_ms', 0),
                         'issue': row.get('issue_ms', 0)}
                row['floor'] = 'memory' if row['memory_ms'] >= row['exp_ms'] else 'exponentials'
                # The loops of a kernel that the assembler laid out in another way are not told apart: no mix, no claim.
                row['bound'] = max(units, key=units.get) if mix else None
                row['above'] = max(units.values()) / floor if mix else None
                table.append(row)
    return table


def _roofline_table(table) -> str:
    lines = ['| shape | GPU | pass | bytes moved / min | requested / min | memory floor ms | exp floor ms | moved ms | '
             'exp ms | issue ms | bound | above floor |', '|' + '---|' * 12]
    for r in table:
        used = ['–'] * 4
        if r['bound']:
            used = [f"{r['exp_used_ms']:.3f}", f"{r['issue_ms']:.3f}", r['bound'], f"{r['above']:.2f}x"]
        lines.append('| ' + ' | '.join(
            [f"{r['shape']} ({r['size']})", r['gpu'], r['step'], f"{r['moved']:.2f}", f"{r['requested']:.2f}",
             f"{r['memory_ms']:.3f}", f"{r['exp_ms']:.3f}", f"{r['moved_ms']:.3f}", *used]) + ' |')
    return '\n'.join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--targets', nargs='+', default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument('--variants', nargs='+', help='names or prefixes; default: all')
    parser.add_argument('--dtype', default='fp16', choices=list(DTYPES), help='of the roofline table (default: fp16)')
    parser.add_argument('--no-compile', action='store_true', help='bytes only, and with --resume what it holds')
    parser.add_argument('--json', type=Path, help='write everything here too')
    parser.add_argument('--resume', type=Path, metavar='FOLDER',
                        help='keep every finished compilation in this folder, and read from there what is unchanged')
    parser.add_argument('--table', action='store_true', help='also print registers and spills as a Markdown table')
    args = parser.parse_args(argv)
    if triton_scan.interpreting() and not args.no_compile:
        parser.error('TRITON_INTERPRET is set: kernels cannot be compiled')
    if 'TRITON_CACHE_DIR' not in os.environ:  # leave nothing behind outside this folder
        folder = tempfile.TemporaryDirectory(prefix='vim2-kernels-')
        os.environ['TRITON_CACHE_DIR'] = folder.name
    chosen = {k: v for k, v in variants().items() if not args.variants or k.startswith(tuple(args.variants))}
    if args.resume is not None:
        args.resume.mkdir(parents=True, exist_ok=True)
    rows = [] if args.no_compile and args.resume is None else report_machine_code(
        args.targets, chosen, lambda line: print(line, flush=True), args.resume, not args.no_compile)
    table = roofline(args.dtype, rows)
    print(_roofline_table(table))
    if args.table:
        print(machine_code_table(rows))
    failed = [r for r in rows if 'error' in r]
    spills = spilled(rows)
    if rows:
        print(f'{len(rows)} compilations, {len(failed)} failed; '
              f'{len(spills)} with spills at N = 16 on sm_80 and sm_90')
        for row in spills:
            print('  ', _row(row))
    if args.json:
        args.json.write_text(json.dumps(dict(machine_code=rows, roofline=table), indent=1))
    return 1 if failed or spills else 0


if __name__ == '__main__':
    sys.exit(main())
