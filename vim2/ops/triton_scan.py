"""Triton backend of the selective scan: what it can run, how it cuts the work, and the launches.

The kernels are in `triton_kernels`; `docs/op.md` tells the algorithm and why the parallel axes are chosen as they are.
"""
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import threading
import types
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

__all__ = ['Plan', 'backward', 'forward', 'make_plan', 'missing', 'states_shape']

MAX_STATES = 64
# Steps between two saved states: 4 N / SAVE bytes per channel and step, once written and once read; twice as many with
# more than one direction, where the states are saved for each but u and the output are one map. The backward keeps the
# states in between, one in PART steps, in a scratch of each program's own, small enough for the cache.
SAVE = 128
PART = 8
DEVICES = ('cuda', 'xpu')  # ROCm's device type is 'cuda' too
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Lanes per multiprocessor below which a launch is cut finer: 12 warps, of a channel per lane.
LANES_PER_PROCESSOR = 384


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors. Read before triton is imported."""
    return os.environ.get('TRITON_INTERPRET', '0').lower() in ('1', 'true', 'on', 'yes', 'y')


def missing(tensors: Sequence[Tensor]) -> Optional[str]:
    """What keeps this backend from running on these tensors, in words; None if nothing does. Never imports triton."""
    if importlib.util.find_spec('triton') is None:
        return 'the package triton is not installed (pip install triton)'
    for t in tensors:
        if t.dtype not in DTYPES:
            return f'it takes float32, float16 and bfloat16, not {t.dtype}'
        if t.device.type == 'cpu' and not interpreting():
            return ("it needs a GPU ('cuda', ROCm included, or 'xpu'), these tensors are on 'cpu' (TRITON_INTERPRET=1, "
                    'set before triton is imported, runs its kernels on the CPU, slowly)')
        if t.device.type not in DEVICES + ('cpu', 'meta'):
            return f"it needs a GPU ('cuda', ROCm included, or 'xpu'), these tensors are on '{t.device.type}'"
    if len(tensors) > 2 and tensors[2].shape[-1] > MAX_STATES:
        return f'it takes up to {MAX_STATES} states, A has {tensors[2].shape[-1]}'
    return None


def save_steps(directions: int) -> int:
    """Steps between two saved states: of the number of directions alone, because forward and backward must agree."""
    return SAVE if directions == 1 else 2 * SAVE


def states_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tuple[int]:
    """Shape of the states that the forward saves, (B, K, segments - 1, N, E) and two zeros, flattened.

    One before each segment of `save_steps` steps but the first, where it is zero. One dimension that is never 0 or 1,
    because torch.export fixes a dimension that happens to be.
    """
    segments = -(-u.shape[2] * u.shape[3] // save_steps(A.shape[0]))
    return (u.shape[0] * A.shape[0] * (segments - 1) * A.shape[2] * u.shape[1] + 2,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Args:
        merge: a program of the forward scans all K directions in turn and adds them up; else each direction is a
            program of its own, which writes its own float32 part, and a second kernel adds the parts up.
        chunk: steps of scan time per program, a multiple of `save_steps`; a scan of several chunks takes a pass before
            the main one that finds what enters each chunk.
        batch: images per program of the backward: the partial sums of A's gradient are written once per program.
        together: programs of a forward that runs all directions of a block of channels in lockstep and adds them up in
            a scratch in the cache, used again image after image; 0: the forward is as `merge` says.
        turns: a program of the backward takes all K directions in turn and adds up the gradient of u in a scratch in
            the cache; else each direction is a program of its own.
        width: channels per program of the forward; 0: 32 with the directions in lockstep, else as many of 32, 64, 128
            as divide the channels of a group.
        warps: warps per program of the backward, each of 8 or 16 channels; 0: by the channels of a group.
        group: images per group of the backward: one group after the other, through the same buffers for its partial
            sums, which so need never leave the cache; 0: all images at once.
        back_chunk: `chunk` of the backward, where that is another one; 0: `chunk`.
    """
    merge: bool
    chunk: int
    batch: int = 1
    together: int = 0
    turns: bool = False
    width: int = 0
    warps: int = 0
    group: int = 0
    back_chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan depends on: multiprocessors and bytes of the last-level cache."""
    processors: int
    cache: int


# Infinity Cache, which PyTorch does not report: what it calls the L2 cache are 4 MB per chiplet.
_CACHES = {'gfx942': 256 << 20, 'gfx950': 256 << 20}


@functools.lru_cache(maxsize=None)
def _device(device: torch.device) -> Device:
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        arch = getattr(properties, 'gcnArchName', '').split(':')[0]
        return Device(properties.multi_processor_count, _CACHES.get(arch, properties.L2_cache_size))
    if device.type == 'xpu':
        properties = torch.xpu.get_device_properties(device)
        return Device(properties.gpu_subslice_count, getattr(properties, 'last_level_cache_size', 16 << 20))
    return Device(1, 32 << 20)


# Channels per program of the forward with the directions in lockstep, a warp per direction: 32 are a channel per lane;
# 16, for maps that only so fit the cache, take two lanes per channel, each with half of its states.
TOGETHER = (32, 16)
# Of the last-level cache, what the maps that are read or added to more than once may take: the rest is for what streams
# through it.
CACHE_SHARE = 0.8


@functools.lru_cache(maxsize=None)
def make_plan(batch: int, directions: int, channels: int, length: int, device: Device, size: int = 2, states: int = 16,
              grouped: bool = True) -> Plan:
    """The plan for a shape on a device, with `size` bytes per element of u; `grouped`: the backward may go in groups.

    Directions share one program where images x channels fill the device and the maps in flight fit its cache; they are
    apart where they do not, and the scan is chunked only if even the directions apart leave most of the device idle: a
    chunked scan computes every decay twice. A backward with the directions apart goes in groups of images that fit the
    cache, partial sums included.
    """
    want = LANES_PER_PROCESSOR * device.processors
    lanes = batch * channels
    merge = directions == 1 or 2 * lanes >= want
    if not merge:
        lanes *= directions
    save = save_steps(directions)
    chunk = -(-length // save) * save
    if 4 * lanes < want and length >= 4 * save:
        chunks = min(-(-want // lanes), length // (2 * save))
        chunk = -(-length // (chunks * save)) * save
        merge = directions == 1
    together, width, turns, chunked = 0, 0, False, chunk < length
    share = CACHE_SHARE * device.cache
    for block in TOGETHER if directions > 1 and not chunked else ():
        # Programs per multiprocessor: 8 warps, which fit whatever registers the compiler takes, fewer if their maps, u
        # and a float32 sum, would not fit the cache. Of the widths the larger one that fits: fewer instructions.
        resident = min(8 // directions, int(share // (device.processors * block * length * (size + 4))))
        if resident:
            together, width = min(resident * device.processors, batch * -(-channels // block)), block
            break
    # Short scans: A's gradient is one write of N floats per program and channel, so let a program take several images.
    images = max(1, min(batch, 512 // max(length, 1)))
    while images > 1 and batch * channels * directions // images < want:
        images //= 2
    group = warps = back_chunk = 0
    # The backward has about 8 warps per multiprocessor, of 16 channels each; with its directions in turn, as many as
    # fit the cache with u, grad_out, the sums and the scratch, but not less than half.
    half = 64 * device.processors
    if directions > 1 and not chunked and batch * channels >= half:
        slots = min(2 * half, int(share // (length * (2 * size + 4) + 4 * states * _scratch_rows(length, save))))
        if slots >= max(half, channels):
            turns = batch * channels >= slots
            images = -(-batch // (slots // channels)) if turns else images
        elif grouped:
            group, back_chunk = _group(batch, directions, channels, length, device, size, states)
    if group:
        # A warp per scheduler: a group has few programs, and parts of the gradients of B and C that stay in the cache.
        images, warps = 1, 4
    return Plan(merge, chunk, images, together, turns, width, warps, group, back_chunk)


def _scratch_rows(steps: int, save: int) -> int:
    """States that a program of the backward keeps in its scratch, at most, over that many steps, saved every `save`."""
    return -(-min(steps, save) // PART) - 1


def _group(batch: int, directions: int, channels: int, length: int, device: Device, size: int,
           states: int) -> Tuple[int, int]:
    """Images per group of the backward and steps per program; (0, 0) if no group both fits the cache and is worth it.

    A group alone has few programs, so its scans are cut too. Of the cuts whose group fits, the one with most warps at a
    time, each of 16 channels, 8 per multiprocessor being enough; of two with as many, the one with larger groups. A
    chunked scan takes a seventh more instructions.
    """
    maps, scanned = directions * channels * length, 2 * directions * states * length
    slots = -(-channels // 64)  # parts of the gradients of B and C
    # u, grad_out; parts of grad_u; delta, grad_delta; B and C and their gradients' parts.
    image = 2 * channels * length * size + maps * (4 + 2 * size) + scanned * (size + 4 * slots * (slots > 1))
    best = device.processors, 0, 0, 0  # at least one warp each
    save = save_steps(directions)
    for count in range(1, length // save + 2):
        chunk = -(-length // (count * save)) * save
        chunks = -(-length // chunk)
        rows = (chunks - 1) * _scratch_rows(chunk, save) + _scratch_rows(length - (chunks - 1) * chunk, save)
        if chunks > 1:
            rows += chunks + 1  # what enters each chunk
        group = min(batch, int(CACHE_SHARE * device.cache // (image + 4 * directions * channels * states * rows)))
        warps = min(8 * device.processors, group * directions * -(-channels // 16) * length / chunk)
        best = max(best, (warps * (7 / 8 if chunks > 1 else 1), group, -chunks, chunk))
    return best[1], best[3] if best[2] < -1 else 0


def _plan(u: Tensor, directions: int, states: int) -> Plan:
    batch, channels, height, width = u.shape
    # Hundreds of launches would be as many nodes of a graph.
    return make_plan(batch, directions, channels, height * width, _device(u.device), u.element_size(), states,
                     not getattr(_tracing, 'on', False))


# Autotuning ---------------------------------------------------------------------------------------------------------

AUTOTUNE_ENV = 'VIM2_SCAN_AUTOTUNE'
MIN_STEPS = 1 << 22  # channels x steps x directions of a call below which the launch, not the plan, sets its time
_tuned: Dict[tuple, Dict[str, object]] = {}


def plan_grid(plan: Plan, channels: int, directions: int, length: int, backward: bool) -> List[Dict[str, object]]:
    """The changes of a plan that are tried, the plan itself first: at most 4 forward and 3 backward.

    Each is one more kernel to compile, 5 s forward and 15 s backward. `channels` are those of a group.
    """
    chunked = plan.chunk < length
    if backward:
        if plan.group:  # fewer bytes, but more launches of fewer programs each
            apart = dict(group=0, back_chunk=0, warps=0)
            return [{}, apart, dict(apart, turns=True)]
        grid = [{}, dict(warps=4)] if channels >= 256 else [{}, dict(warps=2)]
        return grid + ([dict(turns=not plan.turns, batch=1)] if directions > 1 and not chunked else [])
    if directions > 1 and not chunked:
        grid = [dict(together=0, width=0, merge=True), dict(together=0, width=0, merge=False)]
        return [{}] + (grid if plan.together else [dict(merge=not plan.merge)])
    return [{}] + [dict(width=width) for width in (32, 64, 128) if width <= channels][:3]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of one run on the device, after one that compiles."""
    module = getattr(torch, device.type)
    run()
    times = []
    for _ in range(5):
        start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return sorted(times)[2]


def autotuning(u: Tensor, directions: int) -> bool:
    """Whether a call is worth, and allows, trying several plans.

    Not in the interpreter, in a trace or a graph capture, nor where torch.use_deterministic_algorithms or
    VIM2_SCAN_AUTOTUNE=0 ask for the same plan in every process: plans differ in the order of float sums.
    """
    if (u.device.type not in DEVICES or interpreting() or getattr(_tracing, 'on', False)
            or torch.are_deterministic_algorithms_enabled() or os.environ.get(AUTOTUNE_ENV, '1') == '0'):
        return False
    if u.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
        return False
    return u.numel() * directions >= MIN_STEPS


def tuned_plan(run: Callable[[Plan], object], u: Tensor, A: Tensor, B: Tensor, directions: List[int], gated: bool,
               backward: bool, seconds: Callable[[Callable[[], object], torch.device], float] = _seconds) -> Plan:
    """The fastest of `plan_grid` for this device, dtype, states, directions and shape, batch and length to powers of 2.

    Measured at the first call and kept for the process, so that a process computes the same bits every time.
    """
    batch, channels, height, width = u.shape
    plan = _plan(u, len(directions), A.shape[2])
    rounded = tuple(_power_of_two(n) for n in (batch, height, width))
    key = (backward, u.device, u.dtype, A.shape[2], B.shape[2], tuple(directions), channels, *rounded, u.stride(1) == 1,
           gated, plan.chunk < height * width, bool(plan.together), plan.turns, plan.width, plan.group > 0)
    if key not in _tuned:
        best = None
        for change in plan_grid(plan, channels // B.shape[2], len(directions), height * width, backward):
            candidate = dataclasses.replace(plan, **change)
            try:
                taken = seconds(lambda candidate=candidate: run(candidate), u.device)
            except torch.OutOfMemoryError:
                continue  # the outputs of a trial are there beside those of the call itself
            if best is None or taken < best[0]:
                best = taken, change
        if best is None:
            return plan
        _tuned[key] = best[1]
    return dataclasses.replace(plan, **_tuned[key])


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _alignment(t: Tensor, unit: int, limit: int) -> int:
    """Largest power of two <= limit, in elements, that aligns t's start and every step but those along `unit`.

    0 if dimension `unit` does not have stride 1.
    """
    if t.stride(unit) != 1:
        return 0
    steps = [s for i, s in enumerate(t.stride()) if i != unit % t.dim() and t.shape[i] > 1]
    if t.device.type == 'meta' or getattr(_tracing, 'on', False):
        offset = t.storage_offset() % limit  # there is no address yet; what is allocated is aligned to 16 bytes
    else:
        offset = t.data_ptr() // t.element_size() % limit
    return math.gcd(limit, offset, *steps)


def _extent(t: Tensor, first: int) -> int:
    """Largest element offset within dimensions first.. of t."""
    return sum((size - 1) * abs(step) for size, step in zip(t.shape[first:], t.stride()[first:]))


class _Scan:
    """What forward and backward derive alike from the inputs: the cut of the channels, strides and compile-time
    flags."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, plan):
        self.plan = _plan(u, len(directions), A.shape[2]) if plan is None else plan
        self.directions = directions
        self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.bias = u, delta, A, B, C, D, z, delta_bias
        self.batch, self.E, self.H, self.W = u.shape
        self.K, self.N, self.L = len(directions), A.shape[2], u.shape[2] * u.shape[3]
        self.NP = _power_of_two(self.N)
        self.codes = sum(code << (2 * k) for k, code in enumerate(directions))
        self.save = save_steps(self.K)
        if self.plan.chunk % self.save or self.plan.chunk < 1:
            raise ValueError(f'the chunk must be a positive multiple of {self.save}, got {self.plan.chunk}')
        # A tensor (..., 1, 1) over a longer scan is constant: loaded once, and its gradient summed over the scan.
        self.b_const, self.c_const = (t.shape[-2:] != u.shape[-2:] or self.L == 1 for t in (B, C))
        groups = [t.shape[2] for t, const in ((B, self.b_const), (C, self.c_const)) if not const]
        self.groups = math.lcm(*groups) if groups else 1
        self.width = self.E // self.groups
        self.n_chunks = -(-self.L // self.plan.chunk)
        if self.n_chunks > 1 and self.K > 1 and (self.plan.merge or self.plan.together or self.plan.turns):
            raise ValueError(f'directions cannot share a program where the scan of {self.L} steps is cut into chunks '
                             f'of {self.plan.chunk}')
        # Sequences with time contiguous in memory are read as tiles of a few steps.
        self.T = 8 if u.element_size() == 2 and self.NP <= 16 and self.N == self.NP else 4
        self.time_vector = 0
        self.reverse = directions[0] >= 2
        if self.K == 1 and self.H == 1 and directions[0] % 2 == 0 and self.L > 1:
            along = [_alignment(t, -1, 16 // t.element_size()) for t in (u, delta)]
            if min(along) > 0 and u.stride(1) != 1:
                self.time_vector = min(*along, self.T) if self.L % self.T == 0 else 1
        self.pad = -self.L % self.T if self.time_vector and self.reverse else 0
        self.unit_e = all(t is None or t.stride(d) == 1 for t, d in ((u, 1), (delta, 2), (z, 1)))
        self.flags = dict(
            B_CONST=self.b_const, C_CONST=self.c_const, FULL_N=self.N == self.NP,
            HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=bool(delta_softplus))

    def index64(self, *outputs: Tensor) -> bool:
        extents = [_extent(self.u, 1), _extent(self.delta, 2), _extent(self.A, 1), _extent(self.B, 2), _extent(self.C,
                                                                                                               2)]
        extents += [_extent(t, 1) for t in (self.z, self.bias, self.D) if t is not None]
        extents += [_extent(t, 2 if t.dim() > 4 else 1) for t in outputs] + [self.N * self.E]
        return max(extents) >= 2 ** 31 - 2 ** 16

    def blocks(self, width: int) -> Tuple[int, int]:
        """Blocks of `width` channels per group, and in all."""
        per_group = -(-self.width // width)
        return per_group, per_group * self.groups

    def vector(self, t: Tensor, limit: int) -> int:
        """Alignment, in elements, of the N values of B or C at one position; 1: loaded one by one."""
        return max(1, min(_alignment(t, 3, 16 // t.element_size()), limit)) if self.N == self.NP else 1

    def strides(self, names: str) -> Dict[str, int]:
        """Kernel arguments for the strides of the inputs whose prefixes are in `names`."""
        axes = dict(u=(self.u, 'behw'), d=(self.delta, 'bkehw'), a=(self.A, 'ken'), b=(self.B, 'bkgnhw'),
                    c=(self.C, 'bkgnhw'), D=(self.D, 'ke'), bias=(self.bias, 'ke'), z=(self.z, 'behw'))
        out = {}
        for name in names.split():
            t, dims = axes[name]
            out.update(_strides(name, t, dims))
        return out


def _strides(name: str, t: Optional[Tensor], dims: str) -> Dict[str, int]:
    return {f'{name}_{dim}': 0 if t is None else t.stride(i) for i, dim in enumerate(dims)}


def _like(t: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """An uninitialised tensor with the layout of `torch.empty_like(t)`: dense, so element i of its storage is a
    value."""
    return torch.empty_like(t, dtype=dtype)


def _parts(t: Tensor, count: int) -> Tensor:
    """`count` float32 arrays, each with the layout of t, which is dense, and as long as t."""
    return t.new_empty((count * t.numel(),), dtype=torch.float32)


def max_registers(kernel: str, constants: Dict[str, object]) -> Optional[int]:
    """Registers per thread that ptxas may use in a launch with these constants; None: as it likes.

    Left alone it spills, so that one more program of 4 warps fits on a multiprocessor, where two programs, on which the
    plans count, or four of the chunks' summary would do. The forward as it is mostly needs no more than it takes.
    """
    if kernel in ('scan_backward', 'scan_together'):
        return 255
    if kernel == 'scan_forward' and (constants['TIME_VECTOR'] or not constants['FULL_N']):
        return 255
    return 128 if kernel == 'chunk_summary' else None


_tracing = threading.local()


@contextlib.contextmanager
def traced():
    """Launches within become nodes of the graph that is being traced (`torch.library.wrap_triton`)."""
    before, _tracing.on = getattr(_tracing, 'on', False), True
    try:
        yield
    finally:
        _tracing.on = before


def _launch(kernel: str, programs: int, *args, **constants) -> None:
    """The one place that launches a kernel; tools/kernel_report.py records here what would run."""
    from . import triton_kernels
    function = getattr(triton_kernels, kernel)
    registers = None
    if args[0].is_cuda and torch.version.hip is None:
        registers = max_registers(kernel, constants)
    if getattr(_tracing, 'on', False):
        if registers is not None:
            import triton  # a limit of registers reaches Inductor only as part of a configuration
            function = triton.autotune([triton.Config({}, num_warps=constants.pop('num_warps'),
                                                      maxnreg=registers)], key=[])(function)
        torch.library.wrap_triton(function)[(programs,)](*args, **constants)
        return
    run = function[(programs,)]
    if args[0].is_cuda:
        if registers is not None:
            constants['maxnreg'] = registers
        with torch.cuda.device(args[0].device):  # Triton launches on the current device, not on the tensors'
            run(*args, **constants)
    else:
        run(*args, **constants)


def _add_up(*sets: Tuple[Tensor, Tensor, int]) -> None:
    """Up to three times out = the sum of `count` float32 arrays: (parts, out, count)."""
    block = 1024
    parts, outs, counts = zip(*sets)
    sizes = [out.numel() for out in outs]
    blocks = [-(-n // block) for n in sizes]
    if len(sets) == 1:
        _launch('merge_parts', blocks[0], parts[0], outs[0], sizes[0], counts[0], BLOCK=block, num_warps=4)
    else:
        none = 3 - len(sets)
        _launch('merge_three', sum(blocks), *parts, *parts[:none], *outs, *outs[:none], *sizes, *[0] * none, *counts,
                *[0] * none, *blocks[:2], BLOCK=block, num_warps=4)


def _width(scan: '_Scan') -> Tuple[int, int]:
    """Channels per program and warps of the kernels that keep a channel per lane."""
    if scan.plan.width and not scan.plan.together:
        return scan.plan.width, max(1, scan.plan.width // 32)
    width = 32
    while width < 128 and 2 * width <= scan.width and scan.width % (2 * width) == 0:
        width *= 2
    return width, width // 32


def _chunk_states(scan: '_Scan', x: Tensor, adjoint: bool, initial: Optional[Tensor],
                  images: int) -> Callable[..., Tensor]:
    """A function that finds what enters each chunk, (B, K, chunks, N, E): the state, or the adjoint's if x is grad_out.

    It takes x, delta, B (the adjoint: C), z and the initial states of some of the images, at most `images`, and returns
    the same buffer at every call.
    """
    u, A = scan.u, scan.A
    ends = u.new_empty((images, scan.K, scan.n_chunks, scan.N, scan.E), dtype=torch.float32)
    lengths = u.new_empty((images, scan.K, scan.n_chunks, scan.E), dtype=torch.float32)
    width, warps = _width(scan)
    per_group, n_blocks = scan.blocks(width)
    B, const = (scan.C, scan.c_const) if adjoint else (scan.B, scan.b_const)
    gated = adjoint and scan.z is not None
    unit = scan.delta.stride(2) == 1 and x.stride(1) == 1 and (not gated or scan.z.stride(1) == 1)
    flags = {k: v for k, v in scan.flags.items() if k in ('FULL_N', 'HAS_BIAS', 'SOFTPLUS')}
    summary = dict(
        **_strides('x', x, 'behw'), **scan.strides('d a bias z'), **_strides('b', B, 'bkgnhw'), h_n=scan.E,
        NP=scan.NP, BE=width, B_CONST=const, B_VECTOR=scan.vector(B, 16), HAS_Z=gated, ADJOINT=adjoint, UNIT_E=unit,
        EVEN_E=scan.width % width == 0, T=4, INDEX64=scan.index64(x), **flags, num_warps=warps)
    strides = (*A.stride(), scan.E, *(initial.stride() if initial is not None else (0, 0, 0, 0)))

    def find(x: Tensor, delta: Tensor, B: Tensor, z: Optional[Tensor], initial: Optional[Tensor]) -> Tensor:
        batch = x.shape[0]
        _launch(
            'chunk_summary', batch * scan.K * scan.n_chunks * n_blocks,
            x, delta, A, B, z if gated else x, x if scan.bias is None else scan.bias, ends, lengths,
            scan.E, scan.N, scan.H, scan.W, scan.L, scan.pad, scan.plan.chunk, scan.n_chunks, n_blocks, per_group,
            scan.width, scan.E // B.shape[2], scan.K, scan.codes, **summary)
        _launch(
            'chunk_carry', batch * scan.K * -(-scan.E // 32),
            ends, lengths, A, initial if initial is not None else ends, scan.E, scan.N, scan.n_chunks,
            -(-scan.E // 32), scan.K, *strides,
            NP=scan.NP, BE=32, HAS_INITIAL=initial is not None, ADJOINT=adjoint, num_warps=1)
        return ends

    return find


def _together_layout(states: int, directions: int, width: int) -> Dict[str, int]:
    """The five dimensions of `scan_together`, see `triton_kernels`, for a power of two of states: a warp per direction.

    Four lanes per channel and 8 warps would double the occupancy, but take a third more instructions per state.
    """
    return dict(KP=_power_of_two(directions), NP=states, NL=min(states, 32 // width), BE=width)


def _together(scan: '_Scan', out: Tensor, last: Tensor, states: Tensor) -> None:
    """The forward of K > 1 directions in lockstep, in a few programs that each take image after image."""
    u, B, C, D, z = scan.u, scan.B, scan.C, scan.D, scan.z
    width = scan.plan.width or TOGETHER[0]
    layout = _together_layout(scan.NP, scan.K, width)
    per_group, n_blocks = scan.blocks(width)
    tasks = scan.batch * n_blocks
    programs = min(scan.plan.together, tasks)
    sums = u.new_empty((programs, scan.L, width), dtype=torch.float32)
    flags = {k: v for k, v in scan.flags.items() if not k.endswith('_CONST')}
    _launch(
        'scan_together', programs,
        u, scan.delta, scan.A, B, C, u if D is None else D, u if z is None else z,
        u if scan.bias is None else scan.bias,
        sums, out, last, states,
        scan.E, scan.N, scan.H, scan.W, scan.L, tasks, n_blocks, per_group, scan.width,
        scan.E // B.shape[2], scan.E // C.shape[2], scan.K, scan.codes, -(-scan.L // scan.save) - 1,
        **scan.strides('u d a b c D bias z'), **_strides('o', out, 'behw'), h_n=scan.E,
        **layout, T=4, R=512 // width, SAVE=scan.save,
        B_VECTOR=scan.vector(B, scan.NP // layout['NL']), C_VECTOR=scan.vector(C, scan.NP // layout['NL']),
        HAS_D=D is not None,
        WANT_LAST=last.numel() > 0, SAVE_STATES=states.numel() > 0, UNIT_E=scan.unit_e and out.stride(1) == 1,
        INDEX64=scan.index64(out), **flags,
        num_warps=layout['KP'])


def forward(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor],
        z: Optional[Tensor],
        delta_bias: Optional[Tensor],
        delta_softplus: bool,
        directions: List[int],
        want_last_state: bool,
        save_states: bool,
        *,
        plan: Optional[Plan] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The canonical scan, see `vim2.ops.operator`.

    Returns:
        out (B, E, H, W) in u's dtype and layout, the last states (B, K, E, N) float32 or an empty tensor, and the saved
        states (`states_shape`) or an empty tensor.
    """
    if plan is None and autotuning(u, len(directions)):
        plan = tuned_plan(lambda p: forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions,
                                            want_last_state, save_states, plan=p),
                          u, A, B, directions, z is not None, False)
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, plan)
    out = _like(u)
    # An operator may not return one tensor twice: an empty one each.
    last = u.new_empty((scan.batch, scan.K, scan.E, scan.N) if want_last_state else (0,), dtype=torch.float32)
    states = u.new_empty(states_shape(u, A, B, C) if save_states else (0,), dtype=torch.float32)
    states[-2:] = 0.0
    if scan.plan.together and scan.K > 1 and not (scan.b_const or scan.c_const):
        _together(scan, out, last, states)
        return out, last, states
    start = _chunk_states(scan, u, False, None, scan.batch)(u, delta, B, z, None) if scan.n_chunks > 1 else None

    merged = scan.K == 1 or scan.plan.merge
    # With the directions apart there is no one program that could gate their sum.
    gate_after = not merged and z is not None
    target = out if merged else _parts(out, scan.K)
    acc = out if merged and (scan.K == 1 or out.dtype == torch.float32) else _like(out,
                                                                                   torch.float32) if merged else target
    width, warps = _width(scan)
    per_group, n_blocks = scan.blocks(width)
    flags = dict(scan.flags, HAS_Z=z is not None and merged)
    # Both the gate and the last state in groups of 8 steps spill where 3 programs are to fit on a multiprocessor.
    steps = 4 if flags['HAS_Z'] and want_last_state and not scan.time_vector else scan.T
    _launch(
        'scan_forward', scan.batch * (1 if merged else scan.K) * scan.n_chunks * n_blocks,
        u, delta, A, B, C, u if D is None else D, u if z is None else z, u if delta_bias is None else delta_bias,
        last if start is None else start, acc, target, last, states,
        scan.E, scan.N, scan.H, scan.W, scan.L, scan.pad, scan.plan.chunk, scan.n_chunks, n_blocks, per_group,
        scan.width,
        scan.E // B.shape[2], scan.E // C.shape[2], scan.K, 1 if merged else scan.K, scan.codes,
        0 if merged else out.numel(), -(-scan.L // scan.save) - 1,
        **scan.strides('u d a b c D bias z'), **_strides('o', out, 'behw'), h_n=scan.E,
        KM=scan.K if merged else 1, NP=scan.NP, BE=width, T=steps, SAVE=scan.save,
        B_VECTOR=scan.vector(B, 16), C_VECTOR=scan.vector(C, 16), HAS_D=D is not None, HAS_START=start is not None,
        WANT_LAST=want_last_state, SAVE_STATES=save_states, UNIT_E=scan.unit_e and out.stride(1) == 1,
        EVEN_E=scan.width % width == 0,
        TIME_VECTOR=scan.time_vector, REVERSE=scan.reverse if scan.time_vector else False,
        INDEX64=scan.index64(out), **flags, num_warps=warps)
    if not merged:
        if gate_after:
            total = _like(out, torch.float32)
            _add_up((target, total, scan.K))
            out.copy_(total * torch.nn.functional.silu(z.float()))
        else:
            _add_up((target, out, scan.K))
    return out, last, states


def _backward_layout(scan: '_Scan') -> Dict[str, int]:
    """The backward's five dimensions, see `triton_kernels`: 32 lanes over states and channels, warps over channels."""
    lanes = min(scan.NP, 4 if scan.NP <= 16 else 8)
    registers = scan.NP // lanes
    # Constant projections and the sums of their gradients are tiles in registers too.
    per_lane = 2 if registers <= 4 and not (scan.b_const or scan.c_const) else 1
    warps, span = scan.plan.warps, per_lane * (32 // lanes)
    if not warps:
        # Fewer programs along the channels write fewer partial sums of the gradients of B and C.
        warps = 8 if -(-scan.width // (8 * span)) * 2 == -(-scan.width // (4 * span)) else 4
        while warps > 1 and warps * span > scan.width:
            warps //= 2
    return dict(NR=registers, NL=lanes, CR=per_lane, CW=warps, CL=32 // lanes, T=4, PART=PART)


def backward(
        grad_out: Tensor,
        grad_last: Optional[Tensor],
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor],
        z: Optional[Tensor],
        delta_bias: Optional[Tensor],
        states: Tensor,
        delta_softplus: bool,
        directions: List[int],
        *,
        plan: Optional[Plan] = None,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias; an empty tensor for each that is absent. Deterministic."""
    if plan is None and autotuning(u, len(directions)):
        plan = tuned_plan(lambda p: backward(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, states,
                                             delta_softplus, directions, plan=p),
                          u, A, B, directions, z is not None, True)
    grad_z = u.new_empty(0) if z is None else _like(z)
    if z is not None and len(directions) > 1:
        # The gate multiplies the sum over directions, which no single pass has: one more forward finds it.
        total, _, _ = forward(u.float(), delta, A, B, C, D, None, delta_bias, delta_softplus, directions, False, False,
                              plan=plan)
        g, zf = grad_out.float(), z.float()
        gate = torch.sigmoid(zf)
        grad_z.copy_(g * total * gate * (1 + zf * (1 - gate)))
        grad_out, z = g * zf * gate, None
    plan = _plan(u, len(directions), A.shape[2]) if plan is None else plan
    if plan.back_chunk:
        plan = dataclasses.replace(plan, chunk=plan.back_chunk, merge=False, together=0, width=0)
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, plan)
    if z is None and states.numel() != math.prod(states_shape(u, A, B, C)):
        raise RuntimeError(f'the saved states have shape {tuple(states.shape)}, not {states_shape(u, A, B, C)}')

    turns = plan.turns and scan.K > 1
    apart = scan.K > 1 and not turns
    grad_u, grad_delta, grad_B, grad_C = _like(u), _like(delta), _like(B), _like(C)
    group = min(plan.group or scan.batch, scan.batch)
    if any(t.stride(0) * scan.batch != t.numel() for t in (grad_u, grad_B, grad_C)):
        group = scan.batch  # a group's part of what `merge_parts` writes must be one piece of memory
    images = min(plan.batch, group)
    layout = _backward_layout(scan)
    width = layout['CR'] * layout['CW'] * layout['CL']
    per_group, n_blocks = scan.blocks(width)

    # The buffers of one group, which the next ones use again: they are meant to stay in the cache.
    def scanned(t: Tensor, grad: Tensor, const: bool) -> Tuple[Optional[Tensor], int]:
        """Buffer for the parts of the gradient of B or C, None if the kernel writes it itself, and their number."""
        if const:
            return u.new_empty((scan.batch, scan.n_chunks, scan.K, scan.N, scan.E), dtype=torch.float32), 1
        slots = n_blocks // t.shape[2]
        return None if slots == 1 else _parts(grad[:group], slots), slots

    parts_u = _parts(grad_u[:group], scan.K) if apart else None
    parts_B, slots_b = scanned(B, grad_B, scan.b_const)
    parts_C, slots_c = scanned(C, grad_C, scan.c_const)
    programs = (1 if turns else scan.K) * scan.n_chunks * n_blocks  # per block of images
    blocks = -(-group // images)
    scratch = u.new_empty((blocks * programs, scan.save // PART, scan.N, width), dtype=torch.float32)
    acc = u.new_empty((blocks * programs, scan.L, width) if turns else (0,), dtype=torch.float32)
    end = enter = None
    if scan.n_chunks > 1:
        enter = _chunk_states(scan, grad_out, True, grad_last, group)
    elif grad_last is not None:
        end = grad_last.transpose(-1, -2).to(torch.float32).contiguous()  # (B, K, N, E), like a chunk's

    n_groups = -(-scan.batch // group)
    sums = ((n_groups - 1) * blocks - (-(scan.batch - (n_groups - 1) * group) // images), scan.n_chunks, scan.K)
    sum_A = u.new_empty(sums + (scan.N, scan.E), dtype=torch.float32)
    sum_D = u.new_empty(sums + (scan.E,) if D is not None else (0,), dtype=torch.float32)
    sum_bias = u.new_empty(sums + (scan.E,) if delta_bias is not None else (0,), dtype=torch.float32)
    unit = scan.unit_e and all(t is None or t.stride(d) == 1 for t, d in (
        (grad_out, 1), (grad_u, 1), (grad_delta, 2), (grad_z if z is not None else None, 1)))
    n_saved = -(-scan.L // scan.save) - 1
    constants = dict(
        **_strides('g', grad_out, 'behw'), **scan.strides('u d a b c D bias z'), h_n=scan.E,
        **_strides('gu', grad_u, 'behw'), **_strides('gd', grad_delta, 'bkehw'), **_strides('gb', grad_B, 'bkgnhw'),
        **_strides('gc', grad_C, 'bkgnhw'), **_strides('gz', grad_z if z is not None else None, 'behw'),
        KM=scan.K if turns else 1, ONCE=images == 1 and not turns, **layout, SAVE=scan.save,
        B_VECTOR=scan.vector(B, layout['NR']), C_VECTOR=scan.vector(C, layout['NR']),
        HAS_D=D is not None, HAS_END=scan.n_chunks > 1 or end is not None, UNIT_E=unit,
        EVEN_E=scan.width % width == 0,
        INDEX64=scan.index64(grad_out, grad_u, grad_delta, grad_B, grad_C), **scan.flags, num_warps=layout['CW'])

    def split(t: Optional[Tensor], size: int = group) -> Sequence[Optional[Tensor]]:
        """A tensor's part for each group, `size` long; a tensor that is absent, or the same for all, as it is."""
        return [t] * n_groups if n_groups == 1 or t is None else t.split(size)

    saved = scan.K * n_saved * scan.N * scan.E  # numbers per image
    cuts = {name: split(t) for name, t in dict(
        g=grad_out, u=u, delta=delta, B=B, C=C, z=u if z is None else z, gu=grad_u, gd=grad_delta, gB=grad_B, gC=grad_C,
        gz=grad_u if z is None else grad_z, last=grad_last, end=end).items()}
    cuts.update(
        states=split(states[:-2], group * saved) if saved and n_groups > 1 else [states] * n_groups,
        to_u=cuts['gu'] if parts_u is None else [parts_u] * n_groups,
        to_B=split(parts_B) if scan.b_const else cuts['gB'] if parts_B is None else [parts_B] * n_groups,
        to_C=split(parts_C) if scan.c_const else cuts['gC'] if parts_C is None else [parts_C] * n_groups,
        A=split(sum_A, blocks), D=split(sum_A if D is None else sum_D, blocks),
        bias=split(sum_A if delta_bias is None else sum_bias, blocks))
    for p in (types.SimpleNamespace(**dict(zip(cuts, values))) for values in zip(*cuts.values())):
        if enter is not None:
            p.end = enter(p.g, p.delta, p.C, p.z, p.last)
        _launch(
            'scan_backward', -(-p.g.shape[0] // images) * programs,
            p.g, p.u, p.delta, A, p.B, p.C, u if D is None else D, p.z, u if delta_bias is None else delta_bias,
            p.states, p.states if p.end is None else p.end,
            p.to_u, p.gd, p.A, p.to_B, p.to_C, p.D, p.bias, p.gz, scratch, acc,
            scan.E, scan.N, scan.H, scan.W, scan.L, scan.pad, plan.chunk, scan.n_chunks, n_blocks, per_group,
            scan.width,
            scan.E // B.shape[2], scan.E // C.shape[2], slots_b, slots_c, scan.K,
            1 if turns else scan.K, scan.codes, images,
            p.g.shape[0], p.gu.numel() if apart else 0, p.gB.numel(), p.gC.numel(), n_saved,
            width, scan.N * width, **constants)
        sets = [(parts, out, count) for parts, out, count in (
            (parts_u, p.gu, scan.K), (parts_B, p.gB, slots_b), (parts_C, p.gC, slots_c))
            if parts is not None and count > 1]
        if sets:
            _add_up(*sets)

    for t, grad, parts, const in ((B, grad_B, parts_B, scan.b_const), (C, grad_C, parts_C, scan.c_const)):
        if const:
            per_group_sum = parts.sum(1).unflatten(-1, (t.shape[2], -1)).sum(-1)  # (B, K, N, G)
            grad.copy_(per_group_sum.transpose(-1, -2)[..., None, None])
    # An operator may not return one tensor twice: an empty one each.
    grad_A = _like(A).copy_(sum_A.sum((0, 1)).transpose(-1, -2))
    grad_D = u.new_empty(0) if D is None else _like(D).copy_(sum_D.sum((0, 1)))
    grad_bias = u.new_empty(0) if delta_bias is None else _like(delta_bias).copy_(sum_bias.sum((0, 1)))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias
