"""What the Triton backend can run, how it cuts the work, and the launches.

The kernels are in `kernels`; `docs/op.md` tells the algorithm and why the parallel axes are chosen as they are.
"""
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

__all__ = ['Plan', 'backward', 'forward', 'make_plan', 'missing', 'states_shape']

MAX_STATES = 64
OLDEST = (3, 5)  # older ones do not compile the kernels
# Steps between two saved states. They are most of what a training step keeps: 4 N / SAVE bytes per channel, direction
# and step. The backward finds the states in between again, (SAVE / STEPS + 1) / 2 times each.
SAVE = 16
STEPS = 4     # steps of a group of the backward, whose states are in registers
CHANNELS = 2  # of a thread of the backward
DEVICES = ('cuda', 'xpu')  # ROCm's device type is 'cuda' too
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Warps per multiprocessor below which a launch is cut finer.
WARPS = 8


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors. Read before triton is imported."""
    return os.environ.get('TRITON_INTERPRET', '0').lower() in ('1', 'true', 'on', 'yes', 'y')


@functools.lru_cache(maxsize=None)
def _unusable() -> Optional[str]:
    """What is wrong with the triton that is installed, in words."""
    if importlib.util.find_spec('triton') is None:
        return 'the package triton is not installed (pip install triton)'
    for package in ('triton', 'pytorch-triton-rocm', 'pytorch-triton-xpu', 'triton-windows', 'pytorch-triton'):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(version) < OLDEST:
            return f"it needs triton {OLDEST[0]}.{OLDEST[1]} (PyTorch 2.9) or later, {package} {version} is installed"
        if interpreting() and _numbers(version) < (3, 7) and _numbers(importlib.metadata.version('numpy')) >= (2, 4):
            return (f"the interpreter of {package} {version} fails with NumPy 2.4 and later, by a fault of Triton's "
                    "own (pip install 'numpy<2.4', or triton 3.7 or later)")
        break
    return None


def _numbers(version: str) -> Tuple[int, ...]:
    """(major, minor)"""
    return tuple(int(part) for part in version.split('+')[0].split('.')[:2] if part.isdigit())


def missing(tensors: Sequence[Tensor]) -> Optional[str]:
    """What keeps this backend from running on these tensors, in words; None if nothing does. Never imports triton."""
    if _unusable() is not None:
        return _unusable()
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


def states_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tuple[int]:
    """Shape of the states that the forward saves: 4 zeros and (B, K, segments - 1, N, E), flattened.

    One before each segment of `SAVE` steps but the first, where it is zero. One dimension that is never 0 or 1, because
    torch.export fixes a dimension that happens to be.
    """
    segments = -(-u.shape[2] * u.shape[3] // SAVE)
    return (u.shape[0] * A.shape[0] * (segments - 1) * A.shape[2] * u.shape[1] + 4,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work of a forward or backward is cut.

    Args:
        merge: a program scans all K directions in turn and adds them up; else each direction is a program of its own,
            which writes its own float32 part, and a second kernel adds the parts up.
        chunk: steps of scan time per program, a multiple of `SAVE`; a scan of several chunks takes a pass before the
            main one that finds what enters each chunk.
    """
    merge: bool
    chunk: int


@functools.lru_cache(maxsize=None)
def make_plan(warps: int, directions: int, length: int, processors: int) -> Plan:
    """The plan for `warps` programs (images x blocks of channels) on a device of that many multiprocessors.

    Directions share a program where images and channels alone fill the device, and are apart where they do not; the
    scan is cut into chunks only if even so most of the device is idle: a chunked scan computes every decay twice.
    """
    want = WARPS * processors
    merge = directions == 1 or warps >= want
    if not merge:
        warps *= directions
    chunk = -(-length // SAVE) * SAVE
    if 2 * warps < want and length >= 8 * SAVE:
        chunks = min(-(-want // warps), length // (4 * SAVE))
        chunk = -(-length // (chunks * SAVE)) * SAVE
        merge = merge and (directions == 1 or chunk >= length)
    return Plan(merge, chunk)


@functools.lru_cache(maxsize=None)
def _processors(device: torch.device) -> int:
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == 'xpu':
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1


@functools.lru_cache(maxsize=None)
def forward_layout(states: int, wave: int, vector: int, steps: int = 4) -> Dict[str, int]:
    """Compile-time sizes of the kernels that keep a channel per lane: `vector` states per load, and steps per group.

    Args:
        wave: lanes of a warp.
    """
    padded = _power_of_two(states)
    if padded > 16 or states < padded:  # more states, or a mask for each, take registers
        steps = 4 if states == padded else 2
    return dict(NV=vector, NQ=padded // vector, BE=wave, T=steps)


def backward_layout(states: int, wave: int, width: int, vector: int) -> Dict[str, int]:
    """Compile-time sizes of the backward: how a warp's registers and lanes are spread over states and channels.

    A thread holds 4 states, where that leaves no more than 8 lanes for the states, of `vector` channels, where these
    divide a group's `width` channels: in one access, or not at all.
    """
    padded = _power_of_two(states)
    registers = max(min(padded, 4), padded // 8)
    lanes = padded // registers
    channels = vector if registers <= 4 and width % (vector * wave // lanes) == 0 else 1
    return dict(NR=registers, CR=channels, NL=lanes, CL=wave // lanes, T=min(STEPS, SAVE))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _wave() -> int:
    return 64 if torch.version.hip else 32


class _Scan:
    """What forward and backward derive alike from the inputs: the groups of the channels, strides and compile-time
    flags."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions):
        u, delta, B, C, z = (_flat(t) for t in (u, delta, B, C, z))
        self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.bias = u, delta, A, B, C, D, z, delta_bias
        self.batch, self.E, self.H, self.W = u.shape
        self.K, self.N, self.L = len(directions), A.shape[2], self.H * self.W
        self.full_n = self.N == _power_of_two(self.N)
        self.codes = sum(code << (2 * k) for k, code in enumerate(directions))
        self.n_saved = -(-self.L // SAVE) - 1
        # A tensor (..., 1, 1) over a longer scan is constant: loaded once, and its gradient summed over the scan.
        self.b_const, self.c_const = (t.shape[-2:] != u.shape[-2:] or self.L == 1 for t in (B, C))
        groups = [t.shape[2] for t, const in ((B, self.b_const), (C, self.c_const)) if not const]
        self.groups = math.lcm(*groups)
        self.width = self.E // self.groups
        self.flags = dict(HAS_BIAS=delta_bias is not None, SOFTPLUS=bool(delta_softplus))

    def cut(self, channels: int, plan: Optional[Plan]) -> None:
        """Cut the channels of each group into blocks, and the rest as a plan says."""
        self.per_group = -(-self.width // channels)
        self.n_blocks = self.per_group * self.groups
        if plan is None:
            plan = make_plan(self.batch * self.n_blocks, self.K, self.L, _processors(self.u.device))
        if plan.chunk % SAVE or plan.chunk < 1:
            raise ValueError(f'the chunk must be a positive multiple of {SAVE}, got {plan.chunk}')
        self.merge, self.chunk = plan.merge or self.K == 1, plan.chunk
        self.n_chunks = -(-self.L // plan.chunk)
        if self.n_chunks > 1 and self.K > 1 and plan.merge:
            raise ValueError(f'directions cannot share a program where the scan of {self.L} steps is cut into chunks '
                             f'of {plan.chunk}')
        self.programs = self.batch * (1 if self.merge else self.K) * self.n_chunks * self.n_blocks

    def index64(self, *others: Tensor) -> bool:
        """Whether an image (and direction) of these tensors or of the inputs is too large for offsets of 32 bits."""
        maps = [t for t in (self.u, self.delta, self.B, self.C, self.z, *others) if t is not None and t.dim() > 3]
        return any(_extent(t, 1 if t.dim() == 4 else 2) >= 2 ** 31 for t in maps)

    def vector(self, t: Tensor, limit: int) -> int:
        """Elements of B_t or C_t that one load may take."""
        return _vector(t, 3, min(limit, self.N)) if self.full_n else 1

    def strides(self) -> Tuple[int, ...]:
        """The kernels' arguments from `u_b` to `z_l`."""
        return (*_strides(self.u, 3), *_strides(self.delta, 4), *self.A.stride(), *_strides(self.B, 5),
                *_strides(self.C, 5), *_weight(self.D), *_weight(self.bias), *_strides(self.z, 3))

    def cuts(self) -> Tuple[int, ...]:
        """The kernels' arguments from `E` to `width`."""
        return (self.E, self.N, self.H, self.W, self.L, self.chunk, self.n_chunks, self.n_blocks, self.per_group,
                self.width)


def _is_flat(t: Tensor) -> bool:
    """Whether one stride leads from each position of the map (the last two dimensions) to the next, in row-major
    order."""
    return t.shape[-2] == 1 or t.shape[-1] == 1 or t.stride(-2) == t.shape[-1] * t.stride(-1)


def _flat(t: Optional[Tensor]) -> Optional[Tensor]:
    """t, copied if its map has gaps or is column-major."""
    return t if t is None or _is_flat(t) else t.contiguous()


def _writable(like: Tensor) -> Tensor:
    """like, or as much memory in a layout that the kernels write: they take maps that are flat, weights in a row."""
    fits = _is_flat(like) if like.dim() > 3 else like.is_contiguous()
    return like if fits else like.new_empty(like.shape)


def _strides(t: Optional[Tensor], dims: int) -> Tuple[int, ...]:
    """Strides of all dimensions but the map's, and of its positions, 0 if there is one; `dims` zeros for no tensor."""
    if t is None:
        return (0,) * dims
    height, width = t.shape[-2:]
    return (*t.stride()[:-2], t.stride(-1) if width > 1 else t.stride(-2) if height > 1 else 0)


def _extent(t: Tensor, first: int) -> int:
    """Elements of memory that the dimensions from `first` on span."""
    return sum((size - 1) * stride for size, stride in zip(t.shape[first:], t.stride()[first:])) + 1


def _vector(t: Tensor, unit: int, limit: int) -> int:
    """Elements along dimension `unit` that one access may take, at most `limit`: their alignment, 1 if their stride is
    not 1."""
    if t.stride(unit) != 1 or limit == 1:
        return 1
    steps = [s for i, s in enumerate(t.stride()) if i != unit and t.shape[i] > 1]
    # A meta tensor has no address; what is allocated is aligned to 16 bytes.
    offset = t.storage_offset() if t.is_meta else t.data_ptr() // t.element_size()
    return math.gcd(min(limit, 16 // t.element_size()), offset, *steps)


def _weight(t: Optional[Tensor]) -> Tuple[int, int]:
    return (0, 0) if t is None else t.stride()


def _launch(kernel: str, programs: int, *args, **constants) -> None:
    """The one place that launches a kernel; tools/kernel_report.py records here what would run."""
    from . import kernels
    run = getattr(kernels, kernel)[(programs,)]
    device = args[0].device
    if device.type == 'cuda' and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, not on the tensors'
            run(*args, **constants)
    else:
        run(*args, **constants)


def _parts(t: Tensor, count: int) -> Tensor:
    """`count` float32 arrays, each with the layout of t, which is dense, and as long as t."""
    return t.new_empty((count * t.numel(),), dtype=torch.float32)


def _add_up(few: List[Tuple[Tensor, Tensor, int]], many: List[Tuple[Tensor, Tensor, int]]) -> None:
    """out = the sum of `count` float32 arrays, for up to three (parts, out, count) of a few and three of many parts."""
    if not few and not many:
        return
    none = (few or many)[0][0]
    few, many = (sets + [(none, none, 0)] * (3 - len(sets)) for sets in (few, many))
    rows, columns = 32, 32
    sizes = [out.numel() if count else 0 for _, out, count in few + many]
    blocks = [-(-n // (rows * columns)) for n in sizes[:3]] + [-(-n // columns) for n in sizes[3:]]
    first = [sum(blocks[:i + 1]) for i in range(6)]
    parts, outs, counts = zip(*few, *many)
    _launch('add_up', first[5], *parts, *outs, *sizes, *counts, *first[:5], ROWS=rows, COLUMNS=columns, num_warps=4)


def _chunk_states(scan: _Scan, x: Tensor, adjoint: bool, initial: Optional[Tensor]) -> Tensor:
    """What enters each chunk, (B, K, chunks, N, E): the state, or, if x is grad_out, the adjoint's."""
    u, A = scan.u, scan.A
    ends = u.new_empty((scan.batch, scan.K, scan.n_chunks, scan.N, scan.E), dtype=torch.float32)
    lengths = u.new_empty((scan.batch, scan.K, scan.n_chunks, scan.E), dtype=torch.float32)
    B = scan.C if adjoint else scan.B
    z = scan.z if adjoint else None
    layout = forward_layout(scan.N, _wave(), scan.vector(B, 8))
    per_group = -(-scan.width // layout['BE'])
    n_blocks = per_group * scan.groups
    _launch(
        'chunk_summary', scan.batch * scan.K * scan.n_chunks * n_blocks,
        x, scan.delta, A, B, x if z is None else z, x if scan.bias is None else scan.bias, ends, lengths,
        scan.E, scan.N, scan.H, scan.W, scan.L, scan.chunk, scan.n_chunks, n_blocks, per_group, scan.width,
        scan.E // B.shape[2], scan.K, scan.codes,
        *_strides(x, 3), *_strides(scan.delta, 4), *A.stride(), *_strides(B, 5), *_weight(scan.bias), *_strides(z, 3),
        **layout, HAS_Z=z is not None, ADJOINT=adjoint, FULL_N=scan.full_n, INDEX64=scan.index64(x),
        **scan.flags, num_warps=1)
    blocks = -(-scan.E // layout['BE'])
    _launch(
        'chunk_carry', scan.batch * scan.K * blocks,
        ends, lengths, A, ends if initial is None else initial, scan.E, scan.N, scan.n_chunks, blocks, scan.K,
        *A.stride(), *((0,) * 4 if initial is None else initial.stride()),
        NP=_power_of_two(scan.N), BE=layout['BE'], HAS_INITIAL=initial is not None, ADJOINT=adjoint, num_warps=1)
    return ends


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
    """The canonical scan, see `torch.ops.vim2.scan`.

    Returns:
        out (B, E, H, W) in u's dtype and layout, the last states (B, K, E, N) float32 or an empty tensor, and the saved
        states (`states_shape`) or an empty tensor.
    """
    like = torch.empty_like(u)
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions)
    u, delta, B, C, z = scan.u, scan.delta, scan.B, scan.C, scan.z
    vector = min(scan.vector(B, 8), scan.vector(C, 8))
    layout = forward_layout(scan.N, _wave(), vector, min(SAVE, 8 if u.element_size() == 2 else 4))
    scan.cut(layout['BE'], plan)
    out = _writable(like)
    # An operator may not return one tensor twice: an empty one each.
    last = u.new_empty((scan.batch, scan.K, scan.E, scan.N) if want_last_state else (0,), dtype=torch.float32)
    states = u.new_empty(states_shape(u, A, B, C) if save_states else (0,), dtype=torch.float32)
    start = _chunk_states(scan, u, False, None) if scan.n_chunks > 1 else None
    target = out if scan.merge else _parts(out, scan.K)
    acc = out if scan.K == 1 or out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    gated = z is not None and scan.merge  # with the directions apart there is no one program that could gate their sum
    _launch(
        'scan_forward', scan.programs,
        u, delta, A, B, C, u if D is None else D, u if z is None else z, u if delta_bias is None else delta_bias,
        u if start is None else start, acc if scan.merge else target, target, last, states,
        *scan.cuts(), scan.E // B.shape[2], scan.E // C.shape[2], scan.K, 1 if scan.merge else scan.K, scan.codes,
        0 if scan.merge else out.numel(), scan.n_saved,
        *scan.strides(), *_strides(out, 3),
        KM=scan.K if scan.merge else 1, **layout, SAVE=SAVE, HAS_D=D is not None, HAS_Z=gated,
        HAS_START=start is not None, WANT_LAST=want_last_state,
        SAVE_STATES=save_states, FULL_N=scan.full_n, INDEX64=scan.index64(out), **scan.flags,
        num_warps=1)
    if not scan.merge:
        if z is None:
            _add_up([(target, out, scan.K)], [])
        else:
            _add_up([(target, acc, scan.K)], [])
            out.copy_(acc * torch.nn.functional.silu(z.float()))
    return out if out is like else like.copy_(out), last, states


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
    if states.numel() != math.prod(states_shape(u, A, B, C)):
        raise RuntimeError(f'the saved states have shape {tuple(states.shape)}, not {states_shape(u, A, B, C)}')
    likes = [u.new_empty((0,)) if t is None else torch.empty_like(t) for t in (u, delta, A, B, C, D, z, delta_bias)]
    grads = [_writable(like) for like in likes]
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias = grads
    if z is not None and len(directions) > 1:
        # The gate multiplies the sum over directions, which no single pass has: one more forward finds it.
        total, _, _ = forward(u.float(), delta, A, B, C, D, None, delta_bias, delta_softplus, directions, False, False,
                              plan=plan)
        g, zf = grad_out.float(), z.float()
        gate = torch.sigmoid(zf)
        grad_z.copy_(g * total * gate * (1 + zf * (1 - gate)))
        grad_out, z = g * zf * gate, None
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions)
    u, delta, B, C, z, grad_out = scan.u, scan.delta, scan.B, scan.C, scan.z, _flat(grad_out)
    # Constant projections' channels differ in B and C, and their gradients' sums are tiles in registers.
    channels = 1 if scan.b_const or scan.c_const else min(
        _vector(t, dim, CHANNELS) for t, dim in (
            (grad_out, 1), (u, 1), (delta, 2), (z, 1), (grad_u, 1), (grad_delta, 2), (D, 1), (delta_bias, 1))
        if t is not None)
    layout = backward_layout(scan.N, _wave(), scan.width, channels)
    scan.cut(layout['CR'] * layout['CL'], plan)
    end = None
    if scan.n_chunks > 1:
        end = _chunk_states(scan, grad_out, True, grad_last)
    elif grad_last is not None:
        end = grad_last.transpose(-1, -2).to(torch.float32).contiguous()  # (B, K, N, E), like a chunk's
    # What a program writes: the gradient itself, or its part of it, float32.
    few, many = [], []

    def parts(grad: Tensor, count: int, sets: List[Tuple[Tensor, Tensor, int]]) -> Tensor:
        if count == 1:
            return grad
        sets.append((_parts(grad, count), grad, count))
        return sets[-1][0]

    def scanned(grad: Tensor, const: bool) -> Tuple[Tensor, int]:
        if const:
            return u.new_empty((scan.batch, scan.n_chunks, scan.K, scan.N, scan.E), dtype=torch.float32), 1
        slots = scan.n_blocks // grad.shape[2]
        return parts(grad, slots, few), slots

    def weights(grad: Tensor) -> Tensor:
        return parts(grad, scan.batch * scan.n_chunks, many) if grad.numel() else grad

    to_u = grad_u if scan.merge else parts(grad_u, scan.K, few)
    acc = to_u
    if scan.merge and scan.K > 1 and u.dtype != torch.float32:
        acc = torch.empty_like(grad_u, dtype=torch.float32)
    to_B, slots_b = scanned(grad_B, scan.b_const)
    to_C, slots_c = scanned(grad_C, scan.c_const)
    to_A, to_D, to_bias = weights(grad_A), weights(grad_D), weights(grad_bias)
    _launch(
        'scan_backward', scan.programs,
        grad_out, u, delta, A, B, C, u if D is None else D, u if z is None else z,
        u if delta_bias is None else delta_bias, states, states if end is None else end,
        to_u, grad_delta, to_A, to_B, to_C, to_D, to_bias, grad_u if z is None else grad_z, acc,
        *scan.cuts(), scan.E // B.shape[2], scan.E // C.shape[2], slots_b, slots_c, scan.K,
        1 if scan.merge else scan.K, scan.codes, 0 if scan.merge else u.numel(), B.numel(), C.numel(), scan.n_saved,
        *_strides(grad_out, 3), *scan.strides(), *_strides(grad_u, 3), *_strides(grad_delta, 4),
        *_strides(grad_B, 5), *_strides(grad_C, 5), *_strides(None if z is None else grad_z, 3),
        KM=scan.K if scan.merge else 1, **layout, SAVE=SAVE, B_CONST=scan.b_const, C_CONST=scan.c_const,
        B_VECTOR=scan.vector(B, layout['NR']), C_VECTOR=scan.vector(C, layout['NR']), HAS_D=D is not None,
        HAS_Z=z is not None, HAS_END=end is not None, FULL_N=scan.full_n,
        GB_VECTOR=_vector(grad_B, 3, layout['NR'] if scan.full_n else 1),
        GC_VECTOR=_vector(grad_C, 3, layout['NR'] if scan.full_n else 1),
        INDEX64=scan.index64(grad_out, *grads), **scan.flags, num_warps=1)
    _add_up(few, many)
    for grad, part, const in ((grad_B, to_B, scan.b_const), (grad_C, to_C, scan.c_const)):
        if const:
            per_group = part.sum(1).unflatten(-1, (grad.shape[2], -1)).sum(-1)  # (B, K, N, G)
            grad.copy_(per_group.transpose(-1, -2)[..., None, None])
    return tuple(like if grad is like else like.copy_(grad) for like, grad in zip(likes, grads))
