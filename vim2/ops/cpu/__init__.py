"""The selective scan on CPUs: kernels in C++ (scan.cpp), loaded by ctypes and run on torch's own threads.

There is one library per instruction set, built when vim2 is installed (build.py); the environment variable
VIM2_SCAN_ISA chooses another one than the processor's best. The kernels take one address, of int64 fields: how the
scan is cut, and for each tensor its address, dtype and byte strides. All strides are read and written as they are.
"""
import ctypes
import functools
import math
import mmap
import os
import platform
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ..low_rank import contract_delta, expand_delta
from . import build

__all__ = ['backward', 'forward', 'missing', 'states_shape']

ISA_ENV = 'VIM2_SCAN_ISA'
CHUNK = 64  # steps between two saved states, as in scan.cpp

# The tensors in their order, with the letters of each one's dimensions; p: parts that are summed afterwards.
_TENSORS = dict(
    u='behw', delta='bkehw', A='ken', B='bkgnhw', C='bkgnhw', D='ke', z='behw', bias='ke', out='behw', last='bken',
    grad_out='behw', grad_last='bken', grad_u='behw', grad_delta='bkehw', grad_z='behw', grad_A='bken',
    grad_B='pbkgnhw', grad_C='pbkgnhw', grad_D='bke', grad_bias='bke')
_AXES = list(_TENSORS.values())
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SAVED, _HEADER, _PATHS, _FIELDS = 12, 19, 11, 9  # the place of an address; fields before the paths; paths; of a tensor


# ---- the library ----------------------------------------------------------------------------------------------------

def _instruction_set() -> str:
    asked = os.environ.get(ISA_ENV)
    if asked:
        return asked
    if platform.machine().lower() in ('aarch64', 'arm64'):
        return 'neon'
    capability = torch.backends.cpu.get_cpu_capability()
    return next((isa for isa in ('avx512', 'avx2') if capability.startswith(isa.upper())), 'baseline')


@functools.lru_cache(maxsize=None)
def _library() -> Union[ctypes.CDLL, str]:
    """The library for this processor, or what is wrong with it, in words."""
    isa, folder = _instruction_set(), Path(__file__).parent
    names = build.libraries(build.this_platform())
    cure = ('install vim2 anew (pip install .) or, in a checkout, run `python vim2/ops/cpu/build.py`, whose compiler '
            'comes with `pip install ziglang`')
    name = next((name for name, its_isa in names.items() if its_isa == isa), None)
    if name is None:
        return f"{ISA_ENV}={isa}: there is no such library for this machine; choose one of {', '.join(names.values())}"
    if not (folder / name).exists():
        return f'its compiled library {name} is not there: {cure}'
    try:
        library = ctypes.CDLL(str(folder / name))
        version = library.vim2_scan_version
        version.restype = ctypes.c_int64
        if version() != build.version():
            return f'its compiled library {name} was built from other sources: {cure}'
    except (OSError, AttributeError) as e:
        return f'its compiled library {name} cannot be loaded ({e}): {cure}'
    return library


def missing(tensors: Sequence[Tensor]) -> Optional[str]:
    """What keeps this backend from running on these tensors, in words; None if nothing does."""
    for t in tensors:
        if t.device.type != 'cpu':
            return f"it needs CPU tensors, these are on '{t.device.type}'"
        if t.dtype not in _DTYPES:
            return f'it takes float32, float16 and bfloat16, not {t.dtype}'
    return _library() if isinstance(_library(), str) else None


def _find_openmp():
    """`GOMP_parallel` of the OpenMP runtime that torch runs on, or None.

    The same threads then serve torch and the scan: a second pool would fight with torch's, whose threads spin for a
    while after each operator.
    """
    if sys.platform != 'linux' or 'OpenMP' not in torch.__config__.parallel_info():
        return None
    with open('/proc/self/maps') as maps:
        paths = {line.split(None, 5)[-1].strip() for line in maps if 'omp' in line and '.so' in line}
    home = str(Path(torch.__file__).parent.parent)
    for path in sorted(paths, key=lambda path: (not path.startswith(home), path)):
        if os.path.basename(path).startswith(('libgomp', 'libiomp5', 'libomp')):
            try:
                function = ctypes.CDLL(path).GOMP_parallel
            except (OSError, AttributeError):
                continue
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            function.restype = None
            return function
    return None


_openmp = _find_openmp()
_pools = {}


@functools.lru_cache(maxsize=None)
def _entry(name: str):
    """'forward' or 'backward' of the library; a call releases the interpreter lock."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f'the CPU backend of the scan cannot run here: {library}')
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)((f'vim2_scan_{name}', library))


# ---- a call ---------------------------------------------------------------------------------------------------------

class _Plan(NamedTuple):
    """Everything but addresses."""
    fields: array
    jobs: int
    workers: int


def _blocks(dim: int, groups_b: int, groups_c: int) -> Tuple[int, int]:
    """Groups of channels within which B and C are both shared, and blocks of up to 16 channels, none of which crosses a
    group's border. Narrower registers have more blocks, but not more channels in them."""
    groups = math.lcm(groups_b, groups_c)
    return groups, groups * -(-dim // groups // 16)


def states_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tuple[int]:
    """Shape of the states that the forward saves for the backward: (B, K, chunks, blocks, N, 16), flattened.

    One dimension, because torch.export fixes a dimension that happens to be 1, and at small images `chunks` is.
    """
    chunks = (u.shape[2] * u.shape[3] + CHUNK - 1) // CHUNK
    _, blocks = _blocks(u.shape[1], B.shape[2], C.shape[2])
    return (u.shape[0] * A.shape[0] * chunks * blocks * A.shape[2] * 16,)


def _backward_parts(batch: int, blocks: int) -> int:
    """Into how many ranges of channels each image is cut. Each sums its own gradients of B and C: the cut sets the
    order of that sum, so only shapes may set it. The sums of smaller parts cost more than more threads would save."""
    return max(1, min(-(-blocks // 6), -(-16 // batch)))


@functools.lru_cache(maxsize=1024)
def _plan(backward: bool, geometry: tuple, directions: Tuple[int, ...], softplus: bool, batch: int,
          threads: int) -> _Plan:
    """The plan for tensors of these dtypes, shapes and strides, in the order of _TENSORS.

    Args:
        batch: number of all images, which sets the backward's cut; u may hold some of them.
    """
    images, dim, height, width = geometry[0][1]
    groups_b, groups_c = geometry[3][1][2], geometry[4][1][2]
    groups, blocks = _blocks(dim, groups_b, groups_c)
    # Any cut of the forward gives the same result. Each part reads B and C anew: no more than keep the threads busy.
    parts = _backward_parts(batch, blocks) if backward else max(1, min(blocks, -(-threads // images)))
    paths, tensors = {}, []
    for axes, known in zip(_AXES, geometry):
        if known is None:
            tensors += [0] * _FIELDS
            continue
        dtype, shape, strides = known
        # a dimension of one element is never stepped along: that is how constants are read at every position
        step = {axis: 0 if size == 1 else stride * dtype.itemsize for axis, size, stride in zip(axes, shape, strides)}
        path = paths.setdefault((step['h'], step['w']), len(paths)) if 'h' in step else 0
        tensors += [0, _DTYPES[dtype], path, *(step.get(axis, 0) for axis in 'pbkgen')]
    header = [0, images, len(directions), dim, geometry[2][1][2], height, width, groups, groups_b, groups_c, parts,
              int(softplus), 0, 0, *directions, *[0] * (4 - len(directions)), len(paths)]
    steps = [step for path in paths for step in path]
    fields = array('q', header + steps + [0] * (2 * _PATHS - len(steps)) + tensors)
    return _Plan(fields, images * parts, max(1, min(threads, images * parts)))


def _run(name: str, tensors: Sequence[Optional[Tensor]], saved: Optional[Tensor], directions: List[int], softplus: bool,
         batch: int) -> None:
    """Run 'forward' or 'backward' on torch's threads; each takes jobs until there are none left."""
    geometry = tuple([None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors])
    plan = _plan(name == 'backward', geometry, tuple(directions), softplus, batch, torch.get_num_threads())
    fields, at = plan.fields[:], _HEADER + 2 * _PATHS  # a copy: calls from several threads share the plan
    for t in tensors:
        if t is not None:
            fields[at] = t.data_ptr()
        at += _FIELDS
    if saved is not None:  # (images, n)
        fields[_SAVED], fields[_SAVED + 1] = saved.data_ptr(), saved.shape[1]
    entry, address = _entry(name), fields.buffer_info()[0]
    if plan.workers == 1:
        entry(address)
    elif _openmp is not None:
        _openmp(entry, address, plan.workers, 0)
    else:
        # keyed by process: threads do not survive a fork
        pool = _pools.setdefault((os.getpid(), plan.workers), ThreadPoolExecutor(plan.workers, 'vim2-scan'))
        list(pool.map(lambda _: entry(address), range(plan.workers)))
    if fields[0] < plan.jobs:  # the next job to take: a thread that finds no memory takes none
        raise MemoryError(f'the {name} of the scan finds no memory for its states')


# ---- tensors --------------------------------------------------------------------------------------------------------

_HUGE = 4 << 20  # blocks from here on often come fresh from the system; glibc recycles none of over 32 MB
_MADV_HUGEPAGE = 14


@functools.lru_cache(maxsize=None)
def _madvise():
    """Linux's madvise, or None elsewhere."""
    function = getattr(ctypes.CDLL(None), 'madvise', None) if sys.platform == 'linux' else None
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _fresh(t: Tensor) -> Tensor:
    """Ask the system to back a large new tensor by huge pages, where it gives them to who asks.

    Half of the backward's time would else go into page faults, one for every 4 KB of gradient. It is advice: a system
    that does not take it returns an error, which means nothing here.
    """
    size = t.numel() * t.element_size()
    if size >= _HUGE and _madvise() is not None:
        page = mmap.PAGESIZE
        start = -(-t.data_ptr() // page) * page
        _madvise()(start, (t.data_ptr() + size - start) // page * page, _MADV_HUGEPAGE)
    return t


def _sum_buffer(like: Tensor, directions: List[int]) -> Tensor:
    """Where a sum over directions is formed: the result itself, or in float32 if its dtype is narrower."""
    return _fresh(torch.empty_like(like, dtype=like.dtype if len(directions) == 1 else torch.float32))


def _gradient(like: Optional[Tensor], value: Optional[Tensor], u: Tensor) -> Tensor:
    """A gradient in the dtype and layout of `torch.empty_like(like)`; an empty tensor if there is no such input."""
    if like is None:
        return u.new_empty(0)
    result = torch.empty_like(like)
    return value if value.dtype == like.dtype and value.stride() == result.stride() else result.copy_(value)


# Step sizes of low rank are multiplied out for a few images at a time: the memory of a whole batch's would be the most
# that a model's forward holds.
_STEP_SIZES = 10 << 20  # bytes


def _images_at_a_time(delta: Tensor, dim: int, jobs_per_image: int) -> Tuple[int, int]:
    """How many images' gradients of the factors are formed together, which shapes alone set, because it sets the order
    of a sum; and how many images are scanned together, enough for all threads."""
    batch, directions, _, height, width = delta.shape
    unit = min(batch, max(1, _STEP_SIZES // (directions * dim * height * width * delta.element_size())))
    threads = torch.get_num_threads()
    return unit, unit * max(1, threads // 2, -(-threads // (unit * jobs_per_image)))


def _slices(tensors: Sequence[Optional[Tensor]], count: int) -> Iterator[List[Optional[Tensor]]]:
    """`count` images at a time of those tensors (in the order of _TENSORS) that have images."""
    batch = tensors[0].shape[0]
    for first in range(0, batch, count):
        yield [t if t is None or 'b' not in axes or count >= batch else t.narrow(axes.index('b'), first, min(
            count, batch - first)) for axes, t in zip(_AXES, tensors)]


def forward(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
        delta_bias: Optional[Tensor], delta_softplus: bool, directions: List[int], want_last_state: bool,
        save_states: bool, delta_weight: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The canonical scan (see `vim2.ops.reference`): out, last states or empty, saved states or empty."""
    batch, dim = u.shape[:2]
    out = _sum_buffer(u, directions)
    last = torch.empty((batch, A.shape[0], dim, A.shape[2]) if want_last_state else (0,))
    # zeros: registers of less than 16 lanes write none beyond a group's channels
    allocate = torch.zeros if dim // _blocks(dim, B.shape[2], C.shape[2])[0] % 16 else torch.empty
    states = _fresh(allocate(states_shape(u, A, B, C) if save_states else (0,)))
    tensors = [u, delta, A, B, C, D, z, delta_bias, out, last if want_last_state else None]
    count, memory = batch, None
    if delta_weight is not None:
        # the forward is cut into as many parts as there are threads
        count = min(batch, _images_at_a_time(delta, dim, torch.get_num_threads())[1])
        memory = _fresh(delta.new_empty(count * delta[0, :, 0].numel() * dim))
    saved = states.view(batch, -1).split(count) if save_states else [None] * batch
    for some, its_saved in zip(_slices(tensors, count), saved):
        some[1] = expand_delta(some[1], delta_weight, u, memory)
        _run('forward', some, its_saved, directions, delta_softplus, batch)
    return out if out.dtype == u.dtype else torch.empty_like(u).copy_(out), last, states


def backward(
        grad_out: Tensor, grad_last: Optional[Tensor], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Optional[Tensor], z: Optional[Tensor], delta_bias: Optional[Tensor], states: Tensor, delta_softplus: bool,
        directions: List[int], delta_weight: Optional[Tensor] = None,
) -> Tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, delta_weight (an empty tensor for each that is absent)."""
    batch, dim = u.shape[:2]
    k, n = A.shape[0], A.shape[2]
    grad_out = grad_out if grad_out.dtype in _DTYPES else grad_out.float()
    grad_last = None if grad_last is None else grad_last.float()
    grad_u, grad_delta = _sum_buffer(u, directions), _fresh(torch.empty_like(delta))
    grad_z = None if z is None else _sum_buffer(z, directions)
    grad_A, grad_D, grad_bias = torch.empty(batch, k, dim, n), torch.empty(batch, k, dim), torch.empty(batch, k, dim)
    parts = _backward_parts(batch, _blocks(dim, B.shape[2], C.shape[2])[1])
    # zeros, in the layout of each part's sum: parts that hold no block of a group leave its slice as it is
    grad_B, grad_C = (torch.zeros(parts * t.numel()).as_strided(
        (parts, *t.shape), (t.numel(), *torch.empty_like(t, device='meta').stride())) for t in (B, C))
    tensors = [u, delta, A, B, C, D, z, delta_bias, None, None, grad_out, grad_last, grad_u, grad_delta, grad_z, grad_A,
               grad_B, grad_C, grad_D, grad_bias]
    unit = count = batch
    grad_weight = memory = None
    if delta_weight is not None:
        unit, count = _images_at_a_time(delta, dim, parts)
        count = min(batch, count)
        memory = [_fresh(delta.new_empty(count * delta[0, :, 0].numel() * dim)) for _ in range(2)]
    for some, its_saved in zip(_slices(tensors, count), states.view(batch, -1).split(count)):
        factor, target = some[1], some[13]
        if delta_weight is not None:
            some[1] = expand_delta(factor, delta_weight, u, memory[0])
            some[13] = memory[1].as_strided(some[1].shape, some[1].stride())
        _run('backward', some, its_saved, directions, delta_softplus, batch)
        if delta_weight is not None:
            for grad, low, to in zip(some[13].split(unit), factor.split(unit), target.split(unit)):
                of_delta, of_weight = contract_delta(grad, low, delta_weight)
                to.copy_(of_delta)
                grad_weight = of_weight.float() if grad_weight is None else grad_weight.add_(of_weight)
    grad_A, grad_B, grad_C, grad_D, grad_bias = (
        t[0] if t.shape[0] == 1 else torch.sum(t, 0, out=torch.empty_strided(t.shape[1:], t.stride()[1:]))
        for t in (grad_A, grad_B, grad_C, grad_D, grad_bias))
    given = (u, delta, A, B, C, D, z, delta_bias, delta_weight)
    grads = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_weight)
    return tuple(_gradient(t, g, u) for t, g in zip(given, grads))
