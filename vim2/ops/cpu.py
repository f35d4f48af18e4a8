"""The selective scan on CPUs: fused forward and backward kernels in Numba, on torch's own threads.

A job is one image and a range of blocks of 16 channels. It walks the scan in chunks of up to `CHUNK` steps; in each it
reads the chunk's B and C once and then, block by block, keeps four states of 16 channels in registers while it steps
through the chunk. Any strides are read as they are: in place where channels are contiguous, elsewhere the inputs of a
chunk are gathered into a tile of 4 KB, at the positions that the scan direction visits. The state never reaches memory
but at the chunks' borders, from which the backward starts again. All sums have an order that depends on the shapes
alone, so results do not depend on the number of threads.

Importing this module imports Numba; compiling takes seconds, once per machine (Numba caches the result on disk).
"""
import ctypes
import functools
import inspect
import mmap
import os
import sys
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from numba import cfunc, njit, types
from torch import Tensor

from . import simd
from .scan import CHUNK, channel_blocks, contract_delta, expand_delta, states_shape
from .simd import (
    F32, LANES, VBYTES, add_folded, add_folded_strided, fetch_add, load_as, load_f32, load_i64, prefetch, prefetch_far,
    store_as, store_f32, store_i64, transpose4, transpose16, vabs, vadd, vbroadcast, vdiv, vexp2, vexp2_nonpositive,
    vfma, vfold4, vload, vload_as, vlog1p, vmax, vmul, vselect_negative, vset, vstore, vstore_as, vsub, vsum,
)

LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
ZERO, ONE = np.float32(0), np.float32(1)
TILE = CHUNK * VBYTES  # bytes of a tile of one chunk by 16 channels
OFFSETS = 8 * (CHUNK + 8)  # bytes of a chunk's offsets and what is noted behind them
FORWARD_OFFSETS, BACKWARD_OFFSETS = 6 * OFFSETS, 11 * OFFSETS  # those of 6 and 11 tensors

# The kernels take one address: int64 fields, then one descriptor per tensor (address, dtype code, byte strides).
(NEXT_JOB, NEXT_WORKER, JOBS, DIRECTIONS, DIM, STATES, HEIGHT, WIDTH, GROUP_WIDTH, GROUP_BLOCKS, BLOCKS, PARTS,
 SOFTPLUS, SCRATCH, SCRATCH_SIZE, SAVED, ORDER) = (8 * i for i in range(17))
FIELDS = 17 + 4  # ORDER holds up to four scan directions
ADDRESS, DTYPE, STRIDE_B, STRIDE_K, STRIDE_G, STRIDE_E, STRIDE_N, STRIDE_H, STRIDE_W, STRIDE_PART = (
    8 * i for i in range(10))
# The tensors in their order, with the letters in _AXES of each one's dimensions; p: parts that are summed afterwards.
_TENSORS = dict(
    u='behw', delta='bkehw', A='ken', B='bkgnhw', C='bkgnhw', D='ke', z='behw', bias='ke', out='behw', last='bken',
    grad_out='behw', grad_last='bken', grad_u='behw', grad_delta='bkehw', grad_z='behw', grad_A='bken',
    grad_B='pbkgnhw', grad_C='pbkgnhw', grad_D='bke', grad_bias='bke')
(U, DELTA, A_, B_, C_, D_, Z, BIAS, OUT, LAST, G_OUT, G_LAST, G_U, G_DELTA, G_Z, G_A, G_B, G_C, G_D, G_BIAS) = (
    8 * (FIELDS + 10 * i) for i in range(len(_TENSORS)))
_NAMES = list(_TENSORS)
_AXES = {'b': STRIDE_B, 'k': STRIDE_K, 'g': STRIDE_G, 'e': STRIDE_E, 'n': STRIDE_N, 'h': STRIDE_H, 'w': STRIDE_W,
         'p': STRIDE_PART}
_DTYPES = {torch.float32: F32, torch.bfloat16: 1, torch.float16: 2}

# Only the entry points are cached on disk, under a key that this module makes (see `_entries`).
_jit = njit(error_model='numpy')


@njit(inline='always')
def _origin(tensor, image, k, group, channel):
    """Address of a tensor's first position; the stride of an axis that it lacks is 0."""
    return (load_i64(tensor) + image * load_i64(tensor + STRIDE_B) + k * load_i64(tensor + STRIDE_K)
            + group * load_i64(tensor + STRIDE_G) + channel * load_i64(tensor + STRIDE_E))


@njit(inline='always')
def _position(p, direction, start):
    """Where a direction's step `start` is: row and column, or column and row if the direction runs along columns."""
    height, width = load_i64(p + HEIGHT), load_i64(p + WIDTH)
    if direction >= 2:
        start = height * width - 1 - start
    inner = height if direction & 1 else width
    outer = start // inner
    return outer, start - outer * inner, inner


@_jit
def _offsets(tensor, direction, outer, i, inner, steps, offsets):
    """Byte offsets in one tensor of what a direction visits from :func:`_position` (outer, i, inner) on.

    Then, one int64 more, how they follow one another: 1 or -1 if every step moves by one float32 up or down in memory,
    else 0.
    """
    down, right = load_i64(tensor + STRIDE_H), load_i64(tensor + STRIDE_W)
    along, across = (down, right) if direction & 1 else (right, down)
    offset = outer * across + i * along
    left = inner - i  # positions in this row (column)
    if direction >= 2:
        along, across, left = -along, -across, i + 1
    jump = across - inner * along  # from where a row's next position would be to the next row
    even = left >= steps or jump == 0
    t, end = offsets, offsets + 8 * steps
    while t < end:
        stop = min(end, t + 8 * left)
        while t < stop:
            store_i64(t, offset)
            offset += along
            t += 8
        offset += jump
        left = inner
    store_i64(offsets + 8 * CHUNK, along // 4 if even and steps > 1 and (along == 4 or along == -4) else 0)


@njit(inline='always')
def _lowest(t, steps, run):
    """Which of the 16 steps from t on, or of the last 16 if these are fewer, is first in memory (see `_offsets`)."""
    return min(t, steps - LANES) if run > 0 else min(t + LANES, steps) - 1


@_jit
def _load_tile(tensor, origin, offsets, steps, lanes, tile):
    """Gather (steps, 16 channels) into a float32 tile; lanes beyond `lanes` become 0."""
    dtype, stride = load_i64(tensor + DTYPE), load_i64(tensor + STRIDE_E)
    size = 4 if dtype == F32 else 2
    if lanes == LANES and stride == size:
        for t in range(steps):
            vstore(tile + VBYTES * t, vload_as(dtype, origin + load_i64(offsets + 8 * t)))
        return
    run = load_i64(offsets + 8 * CHUNK)
    if lanes == LANES and dtype == F32 and run != 0 and steps >= LANES:
        # the scan itself runs along memory: read along it and transpose in registers, some of the last steps twice
        for t in range(0, steps, LANES):
            first = _lowest(t, steps, run)
            transpose16(tile + VBYTES * first, run * VBYTES, origin + load_i64(offsets + 8 * first), stride)
        return
    for t in range(steps):
        source = origin + load_i64(offsets + 8 * t)
        target = tile + VBYTES * t
        if dtype == F32:
            for i in range(lanes):
                store_f32(target + 4 * i, load_f32(source + i * stride))
        else:
            for i in range(lanes):
                store_f32(target + 4 * i, load_as(dtype, source + i * stride))
        for i in range(lanes, LANES):
            store_f32(target + 4 * i, ZERO)


@njit(inline='always')
def _in_place(tensor):
    """Whether 16 neighbouring channels of a tensor are a vector in memory."""
    return load_i64(tensor + DTYPE) == F32 and load_i64(tensor + STRIDE_E) == 4


@_jit
def _view_tile(tensor, origin, offsets, steps, lanes, tile, identity):
    """Where the (steps, 16 channels) of a tensor can be read as vectors: in place, or in a tile gathered for it.

    Returns:
        (base, offsets): step t is at base + offsets[t].
    """
    if lanes == LANES and _in_place(tensor):
        return origin, offsets
    _load_tile(tensor, origin, offsets, steps, lanes, tile)
    return tile, identity


@_jit
def _store_tile(tensor, origin, offsets, steps, lanes, tile, accumulate):
    """Scatter a float32 tile to where :func:`_load_tile` would have read it, or add it there."""
    dtype, stride = load_i64(tensor + DTYPE), load_i64(tensor + STRIDE_E)
    size = 4 if dtype == F32 else 2
    if lanes == LANES and stride == size:
        for t in range(steps):
            target = origin + load_i64(offsets + 8 * t)
            value = vload(tile + VBYTES * t)
            if accumulate:
                value = vadd(value, vload_as(dtype, target))
            vstore_as(dtype, target, value)
        return
    run = load_i64(offsets + 8 * CHUNK)
    if lanes == LANES and dtype == F32 and run != 0 and steps >= LANES and not accumulate:
        for t in range(0, steps, LANES):
            first = _lowest(t, steps, run)
            transpose16(origin + load_i64(offsets + 8 * first), stride, tile + VBYTES * first, run * VBYTES)
        return
    for t in range(steps):
        target = origin + load_i64(offsets + 8 * t)
        source = tile + VBYTES * t
        for i in range(lanes):
            value = load_f32(source + 4 * i)
            if accumulate:
                value += load_as(dtype, target + i * stride)
            store_as(dtype, target + i * stride, value)


@_jit
def _load_rows(tensor, origin, offsets, steps, states, rows):
    """B or C of one chunk and group as (steps, states) float32."""
    dtype, stride = load_i64(tensor + DTYPE), load_i64(tensor + STRIDE_N)
    for t in range(steps):
        source = origin + load_i64(offsets + 8 * t)
        target = rows + 4 * states * t
        for n in range(states):
            store_f32(target + 4 * n, load_as(dtype, source + n * stride))


@_jit
def _view_rows(tensor, origin, offsets, steps, states, rows, identity):
    """Where B or C of one chunk and group can be read, N float32 a step: in place, or in `rows`; as `_view_tile`."""
    if load_i64(tensor + DTYPE) == F32 and load_i64(tensor + STRIDE_N) == 4:
        return origin, offsets
    _load_rows(tensor, origin, offsets, steps, states, rows)
    return rows, identity


@_jit
def _load_lanes(origin, stride, lanes, target):
    """One vector of up to 16 float32 `stride` bytes apart; the rest 0."""
    for i in range(LANES):
        store_f32(target + 4 * i, load_f32(origin + i * stride) if i < lanes else ZERO)


@_jit
def _load_weights(tensor, k, first, last, per_group, width, count, scale, target):
    """A parameter of blocks first to last: per block `count` vectors of 16 channels times `scale`; 0 if there is none.

    Its dimension E is the channels, N (if it has one) what the vectors of a block are for.
    """
    dtype, to_lane, to_vector = load_i64(tensor + DTYPE), load_i64(tensor + STRIDE_E), load_i64(tensor + STRIDE_N)
    there = load_i64(tensor) != 0
    for block in range(first, last):
        group = block // per_group
        i = (block - group * per_group) * LANES
        lanes = min(LANES, width - i) if there else 0
        origin = _origin(tensor, 0, k, 0, group * width + i)
        done = 0
        if lanes == LANES and dtype == F32 and to_vector == 4:
            while done + 4 <= count:
                transpose4(target, origin + 4 * done, to_lane, scale)
                target += 4 * VBYTES
                done += 4
        for n in range(done, count):
            source = origin + n * to_vector
            for lane in range(lanes):
                store_f32(target + 4 * lane, load_as(dtype, source + lane * to_lane) * scale)
            for lane in range(lanes, LANES):
                store_f32(target + 4 * lane, ZERO)
            target += VBYTES


@_jit
def _fill(target, count):
    for i in range(count):
        vstore(target + VBYTES * i, vset(ZERO))


@njit(inline='always')
def _decay_of(x):
    """exp(-|x|): softplus(x) = max(x, 0) + log1p of it."""
    return vexp2_nonpositive(vmul(vabs(x), vset(-LOG2E)))


@_jit
def _silu_tile(tile, steps, slope):
    """In place: z becomes silu(z). If `slope` is an address, d silu / d z goes there."""
    one = vset(ONE)
    for t in range(steps):
        x = vload(tile + VBYTES * t)
        e = _decay_of(x)
        r = vdiv(one, vadd(one, e))
        gate = vselect_negative(x, vmul(e, r), r)
        if slope:
            vstore(slope + VBYTES * t, vmul(gate, vfma(x, vsub(one, gate), one)))
        vstore(tile + VBYTES * t, vmul(x, gate))


# What is fetched ahead: per stream (a tensor that is read or written position by position) the line of the next block
# at each step, into the first cache, and all lines of the next chunk, row by row, into the second one. Four int64 say
# where: of the next block and of the next chunk's first one, the address less a step's offset, and the offsets' table.
NEAR, NEAR_OFFSETS, NEXT, NEXT_OFFSETS = 0, 8, 16, 24
STREAM = 32
ROW, LINE, ROW_BYTES = (5 * STREAM + 8 * i for i in range(3))  # behind the streams, 5 at most: where the next chunk's
AHEAD = 5 * STREAM + 24                                        # lines are: bytes in its tables and in a row


@njit(inline='always')
def _look_ahead(ahead, stream, more, near, near_offsets, then, then_offsets):
    """Note where a stream goes on: in the next block if there are `more`, and in the next chunk."""
    at = ahead + STREAM * stream
    store_i64(at + NEAR, near if more else then)
    store_i64(at + NEAR_OFFSETS, near_offsets if more else then_offsets)
    store_i64(at + NEXT, then)
    store_i64(at + NEXT_OFFSETS, then_offsets)


@njit(inline='always')
def _share_rows(ahead, block, blocks):
    """Note which lines of the next chunk a block fetches, one a step: its share of them, in their order in memory."""
    first = block * CHUNK
    row = first // blocks
    store_i64(ahead + ROW, 8 * row)
    store_i64(ahead + LINE, VBYTES * (first - row * blocks))
    store_i64(ahead + ROW_BYTES, VBYTES * blocks)


@njit(inline='always')
def _near(ahead, stream):
    return load_i64(ahead + STREAM * stream + NEAR), load_i64(ahead + STREAM * stream + NEAR_OFFSETS)


@njit(inline='always')
def _next(ahead, stream):
    return load_i64(ahead + STREAM * stream + NEXT), load_i64(ahead + STREAM * stream + NEXT_OFFSETS)


@njit(inline='always')
def _fetch_near(stream, o):
    prefetch(stream[0] + load_i64(stream[1] + o))


@njit(inline='always')
def _fetch_next(stream, row, line):
    prefetch_far(stream[0] + load_i64(stream[1] + row) + line)


@njit(inline='always')
def _advance(row, line, row_bytes):
    """The next line of the next chunk: in the same row, or the first one of the row behind it."""
    line += VBYTES
    over = line == row_bytes
    return row + 8 if over else row, 0 if over else line


@njit(inline='always')
def _fetch_next_of_three(a, b, c, row, line, row_bytes):
    """:func:`_fetch_next` of three streams; returns :func:`_advance`."""
    _fetch_next(a, row, line)
    _fetch_next(b, row, line)
    _fetch_next(c, row, line)
    return _advance(row, line, row_bytes)


@_jit
def _step_sizes(steps, softplus, at, view, bias, dt, ahead):
    """Step sizes of one chunk and block, into a tile; fetches the next block's lines of three streams.

    Softplus is a long chain of operations: its exponential is taken a step ahead, which makes two shorter ones.
    """
    b = vload(bias)
    x = vadd(vload(at + load_i64(view)), b)
    e = _decay_of(x)
    near_u, near_dt, near_out = _near(ahead, 0), _near(ahead, 1), _near(ahead, 2)
    for o in range(0, 8 * steps, 8):
        _fetch_near(near_u, o)
        _fetch_near(near_dt, o)
        _fetch_near(near_out, o)
        following = vadd(vload(at + load_i64(view + min(o + 8, 8 * steps - 8))), b)
        if softplus:
            then = _decay_of(following)
            x = vadd(vmax(x, vset(ZERO)), vlog1p(e))
            e = then
        vstore(dt + 8 * o, x)
        x = following


@njit(inline='always')
def _step_input(first, keep, d, at_u, skip, at_sum, dtu, y):
    """d u, and what y is before more states are added to it: D u plus the sum at `at_sum`, if that is an address.

    The first states find out and, if there are more of them (`keep`), leave d u for those; they find both in tiles.
    """
    if not first:
        return vload(dtu), vload(y)
    x = vload(at_u)
    s = vfma(skip, x, vload(at_sum)) if at_sum else vmul(skip, x)
    x = vmul(d, x)
    if keep:
        vstore(dtu, x)
    return x, s


@_jit
def _steps_forward(steps, states, dt, at_u, view_u, skip, sums, rows_b, view_b, rows_c, view_c, decay, h, dtu, y,
                   target, view_target, ahead):
    """The recurrence of one chunk and block: updates the states h (N, 16); y = D u + <C, h> (steps, 16).

    To y are added the sums at `sums`, and the last sum is stored at `target`, if these are addresses, else in y.
    Fetches one line of the next chunk per step and stream: the recurrence hardly uses the memory, and many such
    requests at once would wait for each other.
    """
    n = 0
    next_u, next_dt, next_out = _next(ahead, 0), _next(ahead, 1), _next(ahead, 2)
    row, line, row_bytes = load_i64(ahead + ROW), load_i64(ahead + LINE), load_i64(ahead + ROW_BYTES)
    skip = vload(skip)
    while n + 4 <= states:
        o = VBYTES * n
        a0, a1 = vload(decay + o), vload(decay + o + VBYTES)
        a2, a3 = vload(decay + o + 2 * VBYTES), vload(decay + o + 3 * VBYTES)
        h0, h1 = vload(h + o), vload(h + o + VBYTES)
        h2, h3 = vload(h + o + 2 * VBYTES), vload(h + o + 3 * VBYTES)
        direct = target != 0 and n + 4 == states
        for t in range(steps):
            d, to = vload(dt + VBYTES * t), load_i64(view_target + 8 * t)
            b, c = rows_b + load_i64(view_b + 8 * t) + 4 * n, rows_c + load_i64(view_c + 8 * t) + 4 * n
            x, s = _step_input(n == 0, states > 4, d, at_u + load_i64(view_u + 8 * t), skip, sums + to if sums else 0,
                               dtu + VBYTES * t, y + VBYTES * t)
            if n == 0:
                row, line = _fetch_next_of_three(next_u, next_dt, next_out, row, line, row_bytes)
            h0 = vfma(vexp2(vmul(d, a0)), h0, vmul(x, vbroadcast(b)))
            h1 = vfma(vexp2(vmul(d, a1)), h1, vmul(x, vbroadcast(b + 4)))
            h2 = vfma(vexp2(vmul(d, a2)), h2, vmul(x, vbroadcast(b + 8)))
            h3 = vfma(vexp2(vmul(d, a3)), h3, vmul(x, vbroadcast(b + 12)))
            s = vfma(h1, vbroadcast(c + 4), vfma(h0, vbroadcast(c), s))
            s = vfma(h3, vbroadcast(c + 12), vfma(h2, vbroadcast(c + 8), s))
            vstore(target + to if direct else y + VBYTES * t, s)
        vstore(h + o, h0)
        vstore(h + o + VBYTES, h1)
        vstore(h + o + 2 * VBYTES, h2)
        vstore(h + o + 3 * VBYTES, h3)
        n += 4
    while n < states:
        a0, h0 = vload(decay + VBYTES * n), vload(h + VBYTES * n)
        direct = target != 0 and n + 1 == states
        for t in range(steps):
            d, to = vload(dt + VBYTES * t), load_i64(view_target + 8 * t)
            x, s = _step_input(n == 0, states > 1, d, at_u + load_i64(view_u + 8 * t), skip, sums + to if sums else 0,
                               dtu + VBYTES * t, y + VBYTES * t)
            if n == 0:
                row, line = _fetch_next_of_three(next_u, next_dt, next_out, row, line, row_bytes)
            h0 = vfma(vexp2(vmul(d, a0)), h0, vmul(x, vbroadcast(rows_b + load_i64(view_b + 8 * t) + 4 * n)))
            s = vfma(h0, vbroadcast(rows_c + load_i64(view_c + 8 * t) + 4 * n), s)
            vstore(target + to if direct else y + VBYTES * t, s)
        vstore(h + VBYTES * n, h0)
        n += 1


@njit(inline='always')
def _moves_like(tensor, other):
    """Whether two tensors have the same strides of height and width, and so the same offsets."""
    return (load_i64(tensor + STRIDE_H) == load_i64(other + STRIDE_H)
            and load_i64(tensor + STRIDE_W) == load_i64(other + STRIDE_W))


@njit(inline='always')
def _table(tensor, other, own, others):
    """Where a tensor's offsets are: its own table, or that of another one that moves alike."""
    return others if _moves_like(tensor, other) else own


@_jit
def _own_offsets(tensor, other, direction, outer, i, inner, steps, offsets):
    """:func:`_offsets`, unless another tensor's serve as well."""
    if not _moves_like(tensor, other):
        _offsets(tensor, direction, outer, i, inner, steps, offsets)


@njit(inline='always')
def _chunks(length):
    """Into how many chunks a scan is cut, and the steps of each but the last.

    Chunks of CHUNK steps start at whole cache lines where the scan runs along memory. If that leaves a few steps to the
    last one of not many, all are made equal: a short chunk costs little less than a long one.
    """
    chunks = (length + CHUNK - 1) // CHUNK
    left = length - (chunks - 1) * CHUNK
    return chunks, (length + chunks - 1) // chunks if left < LANES and chunks <= 8 else CHUNK


@njit(inline='always')
def _follow(p, next_chunk, chunks, restart, k, image, first, part_blocks):
    """What follows a chunk: the next one if there is one, else chunk `restart` of the next direction or, after the last
    direction, of what is the next job by now.

    Returns:
        (chunk, k, image, first channel), where `first` is the job's first block.
    """
    if next_chunk < 0 or next_chunk == chunks:
        next_chunk, k = restart, k + 1
        if k == load_i64(p + DIRECTIONS):
            job = min(load_i64(p + NEXT_JOB), load_i64(p + JOBS) - 1)
            k, image = 0, job // load_i64(p + PARTS)
            first = (job - image * load_i64(p + PARTS)) * part_blocks
    per_group = load_i64(p + GROUP_BLOCKS)
    return next_chunk, k, image, first // per_group * load_i64(p + GROUP_WIDTH) + first % per_group * LANES


@_jit
def _forward_offsets(p, direction, start, steps, at):
    """Offsets of u, delta, B, and those of out, C and z that have others, in a chunk: a table each, from `at`."""
    outer, i, inner = _position(p, direction, start)
    _offsets(p + U, direction, outer, i, inner, steps, at)
    _offsets(p + DELTA, direction, outer, i, inner, steps, at + OFFSETS)
    _offsets(p + B_, direction, outer, i, inner, steps, at + 2 * OFFSETS)
    _own_offsets(p + OUT, p + U, direction, outer, i, inner, steps, at + 3 * OFFSETS)
    _own_offsets(p + C_, p + B_, direction, outer, i, inner, steps, at + 4 * OFFSETS)
    if load_i64(p + Z):
        _offsets(p + Z, direction, outer, i, inner, steps, at + 5 * OFFSETS)


@_jit
def _forward(p, worker):
    jobs, parts, blocks = load_i64(p + JOBS), load_i64(p + PARTS), load_i64(p + BLOCKS)
    directions, states = load_i64(p + DIRECTIONS), load_i64(p + STATES)
    width, per_group = load_i64(p + GROUP_WIDTH), load_i64(p + GROUP_BLOCKS)
    dim, length = load_i64(p + DIM), load_i64(p + HEIGHT) * load_i64(p + WIDTH)
    groups = dim // width
    chunks, most = _chunks(length)
    u, delta, b_, c_, z, out = p + U, p + DELTA, p + B_, p + C_, p + Z, p + OUT
    per_b, per_c = groups // load_i64(b_ + STRIDE_PART), groups // load_i64(c_ + STRIDE_PART)
    part_blocks = (blocks + parts - 1) // parts

    now = load_i64(p + SCRATCH) + worker * load_i64(p + SCRATCH_SIZE)
    then = now + FORWARD_OFFSETS  # those of the next chunk, whose first block is prefetched
    identity = then + FORWARD_OFFSETS
    identity_rows = identity + OFFSETS
    tile_u = identity + 2 * OFFSETS
    tile_dt, tile_y, tile_x = tile_u + TILE, tile_u + 2 * TILE, tile_u + 3 * TILE
    rows_b = tile_u + 4 * TILE
    rows_c = rows_b + 4 * CHUNK * states
    h = rows_c + 4 * CHUNK * states
    decay = h + VBYTES * part_blocks * states
    skip = decay + VBYTES * part_blocks * states
    bias = skip + VBYTES * part_blocks
    ahead = bias + VBYTES * part_blocks

    softplus = load_i64(p + SOFTPLUS)
    streams = _in_place(u) and _in_place(delta) and _in_place(out)
    table_out, table_c = _table(out, u, 3 * OFFSETS, 0), _table(c_, b_, 4 * OFFSETS, 2 * OFFSETS)
    for t in range(CHUNK):
        store_i64(identity + 8 * t, VBYTES * t)
        store_i64(identity_rows + 8 * t, 4 * states * t)
    _forward_offsets(p, load_i64(p + ORDER), 0, min(most, length), now)
    while True:
        job = fetch_add(p + NEXT_JOB)
        if job >= jobs:
            break
        image = job // parts
        first = (job - image * parts) * part_blocks
        last = min(first + part_blocks, blocks)
        for k in range(directions):
            _load_weights(p + A_, k, first, last, per_group, width, states, LOG2E, decay)
            _load_weights(p + D_, k, first, last, per_group, width, 1, ONE, skip)
            _load_weights(p + BIAS, k, first, last, per_group, width, 1, ONE, bias)
            _fill(h, (last - first) * states)
            for chunk in range(chunks):
                steps = min(most, length - chunk * most)
                next_chunk, next_k, next_image, channel = _follow(
                    p, chunk + 1, chunks, 0, k, image, first, part_blocks)
                _forward_offsets(p, load_i64(p + ORDER + 8 * next_k), next_chunk * most,
                                 min(most, length - next_chunk * most), then)
                next_u = _origin(u, next_image, 0, 0, channel)
                next_delta = _origin(delta, next_image, next_k, 0, channel)
                next_out = _origin(out, next_image, 0, 0, channel)
                next_off_u, next_off_delta, next_off_out = then, then + OFFSETS, then + table_out
                if not streams:  # lines that are there already
                    next_u, next_delta, next_out = tile_u, tile_u, tile_u
                    next_off_u, next_off_delta, next_off_out = identity, identity, identity
                off_u, off_delta, off_b, off_z = now, now + OFFSETS, now + 2 * OFFSETS, now + 5 * OFFSETS
                off_out = now + table_out
                off_c = now + table_c
                loaded = -1
                at_b, view_b, at_c, view_c = rows_b, identity_rows, rows_c, identity_rows
                for block in range(first, last):
                    group = block // per_group
                    i = (block - group * per_group) * LANES
                    lanes = min(LANES, width - i)
                    channel = group * width + i
                    state = h + VBYTES * (block - first) * states
                    if group != loaded:
                        loaded = group
                        at_b, view_b = _view_rows(
                            b_, _origin(b_, image, k, group // per_b, 0), off_b, steps, states, rows_b, identity_rows)
                        at_c, view_c = _view_rows(
                            c_, _origin(c_, image, k, group // per_c, 0), off_c, steps, states, rows_c, identity_rows)
                    if load_i64(p + SAVED):
                        saved = load_i64(p + SAVED) + VBYTES * states * (
                            ((image * directions + k) * chunks + chunk) * blocks + block)
                        for n in range(states):
                            vstore(saved + VBYTES * n, vload(state + VBYTES * n))
                    at_u, view_u = _view_tile(
                        u, _origin(u, image, 0, 0, channel), off_u, steps, lanes, tile_u, identity)
                    at_dt, view_dt = _view_tile(
                        delta, _origin(delta, image, k, 0, channel), off_delta, steps, lanes, tile_dt, identity)
                    origin = _origin(out, image, 0, 0, channel)
                    gate = load_i64(z) != 0 and k == directions - 1
                    direct = lanes == LANES and _in_place(out)
                    more = block + 1 < last
                    _look_ahead(ahead, 0, more, at_u + VBYTES, off_u, next_u, next_off_u)
                    _look_ahead(ahead, 1, more, at_dt + VBYTES, off_delta, next_delta, next_off_delta)
                    _look_ahead(ahead, 2, more, origin + VBYTES, off_out, next_out, next_off_out)
                    _share_rows(ahead, block - first, last - first)
                    _step_sizes(steps, softplus, at_dt, view_dt, bias + VBYTES * (block - first), tile_dt, ahead)
                    # the sum over directions so far is in the output itself
                    _steps_forward(steps, states, tile_dt, at_u, view_u, skip + VBYTES * (block - first),
                                   origin if direct and k > 0 else 0, at_b, view_b, at_c, view_c,
                                   decay + VBYTES * (block - first) * states, state, tile_x, tile_y,
                                   origin if direct and not gate else 0, off_out, ahead)
                    if gate:
                        if k > 0 and not direct:
                            _load_tile(out, origin, off_out, steps, lanes, tile_u)
                            for t in range(0, VBYTES * steps, VBYTES):
                                vstore(tile_y + t, vadd(vload(tile_y + t), vload(tile_u + t)))
                        _load_tile(z, _origin(z, image, 0, 0, channel), off_z, steps, lanes, tile_u)
                        _silu_tile(tile_u, steps, 0)
                        for t in range(0, VBYTES * steps, VBYTES):
                            vstore(tile_y + t, vmul(vload(tile_y + t), vload(tile_u + t)))
                        _store_tile(out, origin, off_out, steps, lanes, tile_y, False)
                    elif not direct:
                        _store_tile(out, origin, off_out, steps, lanes, tile_y, k > 0)
                now, then = then, now
            if load_i64(p + LAST):
                target = p + LAST
                for block in range(first, last):
                    group = block // per_group
                    i = (block - group * per_group) * LANES
                    origin = _origin(target, image, k, 0, group * width + i)
                    for n in range(states):
                        for lane in range(min(LANES, width - i)):
                            store_f32(origin + lane * load_i64(target + STRIDE_E) + n * load_i64(target + STRIDE_N),
                                      load_f32(h + VBYTES * ((block - first) * states + n) + 4 * lane))


@_jit
def _prepare_backward(steps, softplus, at_u, view_u, at_dt, view_dt, at_g, view_g, bias, dt, dtu, slope, sum_d,
                      ahead):
    """Step sizes, times inputs, and their slope, into tiles; adds to the gradient of D. As `_step_sizes`."""
    near_u, near_dt, near_g = _near(ahead, 0), _near(ahead, 1), _near(ahead, 2)
    near_gu, near_gdt = _near(ahead, 3), _near(ahead, 4)
    b, total, zero, one = vload(bias), vload(sum_d), vset(ZERO), vset(ONE)
    step = vadd(vload(at_dt + load_i64(view_dt)), b)
    e = _decay_of(step)
    for t in range(steps):
        o = 8 * t
        _fetch_near(near_u, o)
        _fetch_near(near_dt, o)
        _fetch_near(near_g, o)
        _fetch_near(near_gu, o)
        _fetch_near(near_gdt, o)
        following = vadd(vload(at_dt + load_i64(view_dt + 8 * min(t + 1, steps - 1))), b)
        x, g = vload(at_u + load_i64(view_u + o)), vload(at_g + load_i64(view_g + o))
        if softplus:
            then = _decay_of(following)
            r = vdiv(one, vadd(one, e))
            vstore(slope + 8 * o, vselect_negative(step, vmul(e, r), r))
            step = vadd(vmax(step, zero), vlog1p(e))
            e = then
        total = vfma(x, g, total)
        vstore(dt + 8 * o, step)
        vstore(dtu + 8 * o, vmul(x, step))
        step = following
    vstore(sum_d, total)


@_jit
def _finish_backward(steps, softplus, at_u, view_u, at_g, view_g, skip, dt, slope, g_dtu, g_dt, sum_bias, to_gu,
                     view_gu, accumulate, to_gdelta, view_gdelta):
    """Gradients of u (stored, or added to what is there) and delta from those of dt u and dt; adds to delta_bias's."""
    d, total = vload(skip), vload(sum_bias)
    for t in range(steps):
        o = VBYTES * t
        gx = vload(g_dtu + o)
        g = vfma(gx, vload(at_u + load_i64(view_u + 8 * t)), vload(g_dt + o))
        if softplus:
            g = vmul(g, vload(slope + o))
        total = vadd(total, g)
        vstore(to_gdelta + load_i64(view_gdelta + 8 * t), g)
        gx = vfma(gx, vload(dt + o), vmul(d, vload(at_g + load_i64(view_g + 8 * t))))
        to = to_gu + load_i64(view_gu + 8 * t)
        vstore(to, vadd(vload(to), gx) if accumulate else gx)
    vstore(sum_bias, total)


@njit(inline='always')
def _adjoint(keep, decay_keep, b, c, a, d, x, gy, h, g, s, sx, sd):
    """One state's step of the adjoint recurrence, from h after the step and the adjoint g carried from the next one.

    Returns h before the step, g to carry on, the sums s (gradient of A), sx (of dt u) and sd (of dt), and what each
    channel adds to the gradients of B and C.
    """
    to_c = vmul(gy, h)
    g = vfma(gy, vbroadcast(c), g)
    to_b = vmul(g, x)
    sx = vfma(g, vbroadcast(b), sx)
    h = vload(keep)
    g = vmul(g, vload(decay_keep))
    through_decay = vmul(g, h)
    return h, g, vfma(through_decay, d, s), sx, vfma(through_decay, a, sd), to_b, to_c


@njit(inline='always')
def _sum_vectors(states):
    """Vectors per step that sum the gradient of B or C: one for four states, folded, or one for a state."""
    return states // 4 + states % 4


@_jit
def _steps_backward(steps, states, n, count, dt, dtu, y, gy, view_gy, g_dtu, g_dt, rows_b, view_b, rows_c, view_c,
                    decay, h, carry, g_a, acc_b, acc_c, keep, ahead):
    """Recompute `count` (4 or 1) states of one chunk and block from its start, then run their adjoints back.

    Adds to y, to g_dtu (gradient of dt u) and g_dt (gradient of dt through the decay), which state 0 starts, to g_a,
    acc_b and acc_c (gradients of B
    and C, not yet summed over the lanes: see `_sum_vectors`); `carry` holds the adjoint that crosses chunks. `keep` is
    scratch for (steps, 2 * count) vectors: the state before each step and its decay. As `_steps_forward`, state 0
    fetches lines of the next chunk: those that are read on the way there, those that are written on the way back.
    """
    next_u, next_dt, next_g = _next(ahead, 0), _next(ahead, 1), _next(ahead, 2)
    next_gu, next_gdt = _next(ahead, 3), _next(ahead, 4)
    row, line, row_bytes = load_i64(ahead + ROW), load_i64(ahead + LINE), load_i64(ahead + ROW_BYTES)
    back_row, back_line = row, line
    slots = _sum_vectors(states)
    o = VBYTES * n
    ln2 = vset(LN2)
    if count == 4:
        a0, a1 = vload(decay + o), vload(decay + o + VBYTES)
        a2, a3 = vload(decay + o + 2 * VBYTES), vload(decay + o + 3 * VBYTES)
        h0, h1 = vload(h), vload(h + VBYTES)
        h2, h3 = vload(h + 2 * VBYTES), vload(h + 3 * VBYTES)
        for t in range(steps):
            d, x = vload(dt + VBYTES * t), vload(dtu + VBYTES * t)
            b, c = rows_b + load_i64(view_b + 8 * t) + 4 * n, rows_c + load_i64(view_c + 8 * t) + 4 * n
            if n == 0:
                row, line = _fetch_next_of_three(next_u, next_dt, next_g, row, line, row_bytes)
            k = keep + 8 * VBYTES * t
            vstore(k, h0)
            vstore(k + VBYTES, h1)
            vstore(k + 2 * VBYTES, h2)
            vstore(k + 3 * VBYTES, h3)
            e0, e1, e2, e3 = vexp2(vmul(d, a0)), vexp2(vmul(d, a1)), vexp2(vmul(d, a2)), vexp2(vmul(d, a3))
            vstore(k + 4 * VBYTES, e0)
            vstore(k + 5 * VBYTES, e1)
            vstore(k + 6 * VBYTES, e2)
            vstore(k + 7 * VBYTES, e3)
            h0 = vfma(e0, h0, vmul(x, vbroadcast(b)))
            h1 = vfma(e1, h1, vmul(x, vbroadcast(b + 4)))
            h2 = vfma(e2, h2, vmul(x, vbroadcast(b + 8)))
            h3 = vfma(e3, h3, vmul(x, vbroadcast(b + 12)))
            if y:
                s = vfma(h1, vbroadcast(c + 4), vmul(h0, vbroadcast(c)))
                s = vfma(h3, vbroadcast(c + 12), vfma(h2, vbroadcast(c + 8), s))
                vstore(y + VBYTES * t, vadd(vload(y + VBYTES * t), s))
        a0, a1, a2, a3 = vmul(a0, ln2), vmul(a1, ln2), vmul(a2, ln2), vmul(a3, ln2)
        g0, g1 = vload(carry + o), vload(carry + o + VBYTES)
        g2, g3 = vload(carry + o + 2 * VBYTES), vload(carry + o + 3 * VBYTES)
        s0, s1 = vload(g_a + o), vload(g_a + o + VBYTES)
        s2, s3 = vload(g_a + o + 2 * VBYTES), vload(g_a + o + 3 * VBYTES)
        for t in range(steps - 1, -1, -1):
            d, x, g = vload(dt + VBYTES * t), vload(dtu + VBYTES * t), vload(gy + load_i64(view_gy + 8 * t))
            b, c = rows_b + load_i64(view_b + 8 * t) + 4 * n, rows_c + load_i64(view_c + 8 * t) + 4 * n
            if n == 0:
                _fetch_next(next_gu, back_row, back_line)
                _fetch_next(next_gdt, back_row, back_line)
                back_row, back_line = _advance(back_row, back_line, row_bytes)
            k, at = keep + 8 * VBYTES * t, VBYTES * (slots * t + n // 4)
            e = k + 4 * VBYTES
            sx, sd = (vload(g_dtu + VBYTES * t), vload(g_dt + VBYTES * t)) if n else (vset(ZERO), vset(ZERO))
            h0, g0, s0, sx, sd, b0, c0 = _adjoint(k, e, b, c, a0, d, x, g, h0, g0, s0, sx, sd)
            h1, g1, s1, sx, sd, b1, c1 = _adjoint(k + VBYTES, e + VBYTES, b + 4, c + 4, a1, d, x, g, h1, g1, s1, sx, sd)
            h2, g2, s2, sx, sd, b2, c2 = _adjoint(k + 2 * VBYTES, e + 2 * VBYTES, b + 8, c + 8, a2, d, x, g, h2, g2, s2,
                                                  sx, sd)
            h3, g3, s3, sx, sd, b3, c3 = _adjoint(k + 3 * VBYTES, e + 3 * VBYTES, b + 12, c + 12, a3, d, x, g, h3, g3,
                                                  s3, sx, sd)
            vstore(acc_b + at, vadd(vload(acc_b + at), vfold4(b0, b1, b2, b3)))
            vstore(acc_c + at, vadd(vload(acc_c + at), vfold4(c0, c1, c2, c3)))
            vstore(g_dtu + VBYTES * t, sx)
            vstore(g_dt + VBYTES * t, sd)
        vstore(carry + o, g0)
        vstore(carry + o + VBYTES, g1)
        vstore(carry + o + 2 * VBYTES, g2)
        vstore(carry + o + 3 * VBYTES, g3)
        vstore(g_a + o, s0)
        vstore(g_a + o + VBYTES, s1)
        vstore(g_a + o + 2 * VBYTES, s2)
        vstore(g_a + o + 3 * VBYTES, s3)
    else:
        a0, h0 = vload(decay + o), vload(h)
        for t in range(steps):
            d, x = vload(dt + VBYTES * t), vload(dtu + VBYTES * t)
            if n == 0:
                row, line = _fetch_next_of_three(next_u, next_dt, next_g, row, line, row_bytes)
            k = keep + 2 * VBYTES * t
            vstore(k, h0)
            e0 = vexp2(vmul(d, a0))
            vstore(k + VBYTES, e0)
            h0 = vfma(e0, h0, vmul(x, vbroadcast(rows_b + load_i64(view_b + 8 * t) + 4 * n)))
            if y:
                c = rows_c + load_i64(view_c + 8 * t) + 4 * n
                vstore(y + VBYTES * t, vfma(h0, vbroadcast(c), vload(y + VBYTES * t)))
        a0 = vmul(a0, ln2)
        g0, s0 = vload(carry + o), vload(g_a + o)
        for t in range(steps - 1, -1, -1):
            d, x, g = vload(dt + VBYTES * t), vload(dtu + VBYTES * t), vload(gy + load_i64(view_gy + 8 * t))
            b, c = rows_b + load_i64(view_b + 8 * t) + 4 * n, rows_c + load_i64(view_c + 8 * t) + 4 * n
            if n == 0:
                _fetch_next(next_gu, back_row, back_line)
                _fetch_next(next_gdt, back_row, back_line)
                back_row, back_line = _advance(back_row, back_line, row_bytes)
            k, at = keep + 2 * VBYTES * t, VBYTES * (slots * t + states // 4 + n % 4)
            sx, sd = (vload(g_dtu + VBYTES * t), vload(g_dt + VBYTES * t)) if n else (vset(ZERO), vset(ZERO))
            h0, g0, s0, sx, sd, b0, c0 = _adjoint(k, k + VBYTES, b, c, a0, d, x, g, h0, g0, s0, sx, sd)
            vstore(acc_b + at, vadd(vload(acc_b + at), b0))
            vstore(acc_c + at, vadd(vload(acc_c + at), c0))
            vstore(g_dtu + VBYTES * t, sx)
            vstore(g_dt + VBYTES * t, sd)
        vstore(carry + o, g0)
        vstore(g_a + o, s0)


@_jit
def _flush_rows(tensor, origin, offsets, steps, states, acc):
    """Sum what `_steps_backward` accumulated and add it to float32 gradients of B or C; clears it."""
    stride, slots, quads = load_i64(tensor + STRIDE_N), _sum_vectors(states), states // 4
    if stride == 4 and slots == quads:
        for t in range(steps):
            target, source = origin + load_i64(offsets + 8 * t), acc + VBYTES * slots * t
            for i in range(quads):
                add_folded(target + 16 * i, vload(source + VBYTES * i))
                vstore(source + VBYTES * i, vset(ZERO))
        return
    for t in range(steps):
        target = origin + load_i64(offsets + 8 * t)
        for i in range(slots):
            source = acc + VBYTES * (slots * t + i)
            if i < quads:
                add_folded_strided(target + 4 * i * stride, stride, vload(source))
            else:
                at = target + (i + 3 * quads) * stride
                store_f32(at, load_f32(at) + vsum(vload(source)))
            vstore(source, vset(ZERO))


@_jit
def _backward_offsets(p, direction, start, steps, at):
    """Offsets of u, delta, B, and those of the other tensors that have others, in a chunk: a table each, from `at`."""
    outer, i, inner = _position(p, direction, start)
    _offsets(p + U, direction, outer, i, inner, steps, at)
    _offsets(p + DELTA, direction, outer, i, inner, steps, at + OFFSETS)
    _offsets(p + B_, direction, outer, i, inner, steps, at + 2 * OFFSETS)
    _own_offsets(p + G_OUT, p + U, direction, outer, i, inner, steps, at + 3 * OFFSETS)
    _own_offsets(p + G_U, p + U, direction, outer, i, inner, steps, at + 4 * OFFSETS)
    _own_offsets(p + G_DELTA, p + DELTA, direction, outer, i, inner, steps, at + 5 * OFFSETS)
    _own_offsets(p + C_, p + B_, direction, outer, i, inner, steps, at + 6 * OFFSETS)
    _offsets(p + G_B, direction, outer, i, inner, steps, at + 7 * OFFSETS)
    _own_offsets(p + G_C, p + G_B, direction, outer, i, inner, steps, at + 8 * OFFSETS)
    if load_i64(p + Z):
        _offsets(p + Z, direction, outer, i, inner, steps, at + 9 * OFFSETS)
        _offsets(p + G_Z, direction, outer, i, inner, steps, at + 10 * OFFSETS)


@_jit
def _backward(p, worker):
    jobs, parts, blocks = load_i64(p + JOBS), load_i64(p + PARTS), load_i64(p + BLOCKS)
    directions, states = load_i64(p + DIRECTIONS), load_i64(p + STATES)
    width, per_group = load_i64(p + GROUP_WIDTH), load_i64(p + GROUP_BLOCKS)
    dim, length = load_i64(p + DIM), load_i64(p + HEIGHT) * load_i64(p + WIDTH)
    groups = dim // width
    chunks, most = _chunks(length)
    u, delta, b_, c_, z = p + U, p + DELTA, p + B_, p + C_, p + Z
    g_out, g_u, g_delta, g_z, g_b, g_c = p + G_OUT, p + G_U, p + G_DELTA, p + G_Z, p + G_B, p + G_C
    per_b, per_c = groups // load_i64(b_ + STRIDE_PART), groups // load_i64(c_ + STRIDE_PART)
    part_blocks = (blocks + parts - 1) // parts

    now = load_i64(p + SCRATCH) + worker * load_i64(p + SCRATCH_SIZE)
    then = now + BACKWARD_OFFSETS  # those of the chunk before, whose first block is prefetched
    identity = then + BACKWARD_OFFSETS
    identity_rows = identity + OFFSETS
    tile_u = identity + 2 * OFFSETS
    tile_dt, tile_slope, tile_x = tile_u + TILE, tile_u + 2 * TILE, tile_u + 3 * TILE
    tile_gy, tile_gx, tile_gdt = tile_u + 4 * TILE, tile_u + 5 * TILE, tile_u + 6 * TILE
    tile_y, tile_z = tile_u + 7 * TILE, tile_u + 8 * TILE
    keep = tile_u + 9 * TILE
    rows_b = keep + 8 * TILE
    rows_c = rows_b + 4 * CHUNK * states
    acc_b = rows_c + 4 * CHUNK * states
    acc_c = acc_b + VBYTES * CHUNK * _sum_vectors(states)
    sum_d = acc_c + VBYTES * CHUNK * _sum_vectors(states)
    sum_bias = sum_d + VBYTES * part_blocks
    carry = sum_bias + VBYTES * part_blocks
    sum_a = carry + VBYTES * part_blocks * states
    decay = sum_a + VBYTES * part_blocks * states
    skip = decay + VBYTES * part_blocks * states
    bias = skip + VBYTES * part_blocks
    ahead = bias + VBYTES * part_blocks

    _fill(acc_b, 2 * CHUNK * _sum_vectors(states))
    softplus = load_i64(p + SOFTPLUS)
    streams = _in_place(u) and _in_place(delta) and _in_place(g_out) and _in_place(g_u) and _in_place(g_delta)
    table_out, table_gu = _table(g_out, u, 3 * OFFSETS, 0), _table(g_u, u, 4 * OFFSETS, 0)
    table_gdelta, table_c = _table(g_delta, delta, 5 * OFFSETS, OFFSETS), _table(c_, b_, 6 * OFFSETS, 2 * OFFSETS)
    table_gc = _table(g_c, g_b, 8 * OFFSETS, 7 * OFFSETS)
    for t in range(CHUNK):
        store_i64(identity + 8 * t, VBYTES * t)
        store_i64(identity_rows + 8 * t, 4 * states * t)
    _backward_offsets(p, load_i64(p + ORDER), (chunks - 1) * most, length - (chunks - 1) * most, now)
    while True:
        job = fetch_add(p + NEXT_JOB)
        if job >= jobs:
            break
        image = job // parts
        part = job - image * parts
        first = part * part_blocks
        last = min(first + part_blocks, blocks)
        for k in range(directions):
            _load_weights(p + A_, k, first, last, per_group, width, states, LOG2E, decay)
            _load_weights(p + D_, k, first, last, per_group, width, 1, ONE, skip)
            _load_weights(p + BIAS, k, first, last, per_group, width, 1, ONE, bias)
            _fill(sum_d, 2 * part_blocks)
            _fill(sum_a, (last - first) * states)
            if load_i64(p + G_LAST):
                tensor = p + G_LAST
                for block in range(first, last):
                    group = block // per_group
                    i = (block - group * per_group) * LANES
                    origin = _origin(tensor, image, k, 0, group * width + i)
                    for n in range(states):
                        _load_lanes(origin + n * load_i64(tensor + STRIDE_N), load_i64(tensor + STRIDE_E),
                                    min(LANES, width - i), carry + VBYTES * ((block - first) * states + n))
            else:
                _fill(carry, (last - first) * states)
            for chunk in range(chunks - 1, -1, -1):
                steps = min(most, length - chunk * most)
                next_chunk, next_k, next_image, channel = _follow(
                    p, chunk - 1, chunks, chunks - 1, k, image, first, part_blocks)
                _backward_offsets(p, load_i64(p + ORDER + 8 * next_k), next_chunk * most,
                                  min(most, length - next_chunk * most), then)
                next_u = _origin(u, next_image, 0, 0, channel)
                next_delta = _origin(delta, next_image, next_k, 0, channel)
                next_g, next_gu = _origin(g_out, next_image, 0, 0, channel), _origin(g_u, next_image, 0, 0, channel)
                next_gdelta = _origin(g_delta, next_image, next_k, 0, channel)
                next_off_u, next_off_delta, next_off_g = then, then + OFFSETS, then + table_out
                next_off_gu, next_off_gdelta = then + table_gu, then + table_gdelta
                if not streams:  # lines that are there already
                    next_u, next_delta, next_g, next_gu, next_gdelta = tile_u, tile_u, tile_u, tile_u, tile_u
                    next_off_u, next_off_delta, next_off_g = identity, identity, identity
                    next_off_gu, next_off_gdelta = identity, identity
                off_u, off_delta, off_b, off_c = now, now + OFFSETS, now + 2 * OFFSETS, now + table_c
                off_out, off_gu, off_gdelta = now + table_out, now + table_gu, now + table_gdelta
                off_gb, off_gc, off_z, off_gz = now + 7 * OFFSETS, now + table_gc, now + 9 * OFFSETS, now + 10 * OFFSETS
                loaded = -1
                at_b, view_b, at_c, view_c = rows_b, identity_rows, rows_c, identity_rows
                for block in range(first, last):
                    group = block // per_group
                    i = (block - group * per_group) * LANES
                    lanes = min(LANES, width - i)
                    channel = group * width + i
                    j = block - first
                    if group != loaded:
                        if loaded >= 0:
                            _flush(p, part, image, k, loaded // per_b, loaded // per_c, off_gb, off_gc, steps, acc_b,
                                   acc_c)
                        loaded = group
                        at_b, view_b = _view_rows(
                            b_, _origin(b_, image, k, group // per_b, 0), off_b, steps, states, rows_b, identity_rows)
                        at_c, view_c = _view_rows(
                            c_, _origin(c_, image, k, group // per_c, 0), off_c, steps, states, rows_c, identity_rows)
                    at_u, view_u = _view_tile(
                        u, _origin(u, image, 0, 0, channel), off_u, steps, lanes, tile_u, identity)
                    at_dt, view_dt = _view_tile(
                        delta, _origin(delta, image, k, 0, channel), off_delta, steps, lanes, tile_dt, identity)
                    at_gy, view_gy = _view_tile(
                        g_out, _origin(g_out, image, 0, 0, channel), off_out, steps, lanes, tile_gy, identity)
                    d = vload(skip + VBYTES * j)
                    y = 0
                    if load_i64(z):
                        # keep grad_out * d silu / d z in tile_z for the gradient of z, and gate grad_out
                        y = tile_y
                        _load_tile(z, _origin(z, image, 0, 0, channel), off_z, steps, lanes, tile_x)
                        _silu_tile(tile_x, steps, tile_z)
                        for t in range(steps):
                            o = VBYTES * t
                            g = vload(at_gy + load_i64(view_gy + 8 * t))
                            vstore(tile_z + o, vmul(vload(tile_z + o), g))
                            vstore(tile_gy + o, vmul(vload(tile_x + o), g))
                            vstore(tile_y + o, vmul(d, vload(at_u + load_i64(view_u + 8 * t))))
                        at_gy, view_gy = tile_gy, identity
                    to_gu = _origin(g_u, image, 0, 0, channel)
                    to_gdelta = _origin(g_delta, image, k, 0, channel)
                    more = block + 1 < last
                    _look_ahead(ahead, 0, more, at_u + VBYTES, off_u, next_u, next_off_u)
                    _look_ahead(ahead, 1, more, at_dt + VBYTES, off_delta, next_delta, next_off_delta)
                    _look_ahead(ahead, 2, more, at_gy + VBYTES, off_out, next_g, next_off_g)
                    _look_ahead(ahead, 3, more, to_gu + VBYTES, off_gu, next_gu, next_off_gu)
                    _look_ahead(ahead, 4, more, to_gdelta + VBYTES, off_gdelta, next_gdelta, next_off_gdelta)
                    _share_rows(ahead, j, last - first)
                    _prepare_backward(
                        steps, softplus, at_u, view_u, at_dt, view_dt, at_gy, view_gy, bias + VBYTES * j, tile_dt,
                        tile_x, tile_slope, sum_d + VBYTES * j, ahead)
                    saved = load_i64(p + SAVED) + VBYTES * states * (
                        ((image * directions + k) * chunks + chunk) * blocks + block)
                    n = 0
                    while n < states:
                        count = 4 if n + 4 <= states else 1
                        _steps_backward(
                            steps, states, n, count, tile_dt, tile_x, y, at_gy, view_gy, tile_gx, tile_gdt, at_b,
                            view_b, at_c, view_c, decay + VBYTES * j * states, saved + VBYTES * n,
                            carry + VBYTES * j * states, sum_a + VBYTES * j * states, acc_b, acc_c, keep,
                            ahead)
                        n += count
                    direct = lanes == LANES and _in_place(g_u) and _in_place(g_delta)
                    _finish_backward(
                        steps, softplus, at_u, view_u, at_gy, view_gy, skip + VBYTES * j, tile_dt, tile_slope, tile_gx,
                        tile_gdt, sum_bias + VBYTES * j, to_gu if direct else tile_gx, off_gu if direct else identity,
                        direct and k > 0, to_gdelta if direct else tile_gdt, off_gdelta if direct else identity)
                    if not direct:
                        _store_tile(g_u, to_gu, off_gu, steps, lanes, tile_gx, k > 0)
                        _store_tile(g_delta, to_gdelta, off_gdelta, steps, lanes, tile_gdt, False)
                    if load_i64(z):
                        for t in range(0, VBYTES * steps, VBYTES):
                            vstore(tile_y + t, vmul(vload(tile_y + t), vload(tile_z + t)))
                        _store_tile(g_z, _origin(g_z, image, 0, 0, channel), off_gz, steps, lanes, tile_y, k > 0)
                if loaded >= 0:
                    _flush(p, part, image, k, loaded // per_b, loaded // per_c, off_gb, off_gc, steps, acc_b, acc_c)
                now, then = then, now
            for block in range(first, last):
                group = block // per_group
                i = (block - group * per_group) * LANES
                j = block - first
                for lane in range(min(LANES, width - i)):
                    row = (image * directions + k) * dim + group * width + i + lane
                    store_f32(load_i64(p + G_D) + 4 * row, load_f32(sum_d + VBYTES * j + 4 * lane))
                    store_f32(load_i64(p + G_BIAS) + 4 * row, load_f32(sum_bias + VBYTES * j + 4 * lane))
                    for n in range(states):
                        store_f32(load_i64(p + G_A) + 4 * (row * states + n),
                                  load_f32(sum_a + VBYTES * (j * states + n) + 4 * lane))


@_jit
def _flush(p, part, image, k, group_b, group_c, off_b, off_c, steps, acc_b, acc_c):
    states = load_i64(p + STATES)
    for tensor, group, offsets, acc in ((p + G_B, group_b, off_b, acc_b), (p + G_C, group_c, off_c, acc_c)):
        origin = _origin(tensor, image, k, group, 0) + part * load_i64(tensor + STRIDE_PART)
        _flush_rows(tensor, origin, offsets, steps, states, acc)


@functools.lru_cache(maxsize=None)
def _entries():
    """The entry points, before they are compiled.

    Numba takes a cached function for current if the file that defines it is unchanged. Here other files matter as well,
    so the entry points are closures over a digest of them all: closed-over values are part of Numba's key.
    """
    source = inspect.getsource(sys.modules[__name__]) + inspect.getsource(simd) + f'CHUNK = {CHUNK}'
    digest = zlib.crc32(source.encode()) | 1

    def forward_entry(p):
        if digest:
            _forward(p, fetch_add(p + NEXT_WORKER))

    def backward_entry(p):
        if digest:
            _backward(p, fetch_add(p + NEXT_WORKER))

    return dict(forward=forward_entry, backward=backward_entry)


@functools.lru_cache(maxsize=None)
def _compiled(name: str):
    """An entry point in C's calling convention: torch's own OpenMP threads can call it, without Python.

    Compiled when it is first needed, so that who only runs models does not wait for the backward.
    """
    return cfunc(types.void(types.int64), cache=True, error_model='numpy')(_entries()[name])


_ENTRY_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


def _find_openmp():
    """`GOMP_parallel` of the OpenMP runtime that torch runs on, or None.

    The same threads then serve torch and the scan: a second pool would fight with torch's, whose threads spin for a
    while after each operator.
    """
    if 'OpenMP' not in torch.__config__.parallel_info() or not os.path.exists('/proc/self/maps'):
        return None
    with open('/proc/self/maps') as maps:
        paths = {line.split(None, 5)[-1].strip() for line in maps if 'omp' in line and '.so' in line}
    home = os.path.dirname(os.path.dirname(torch.__file__))
    for path in sorted(paths, key=lambda name: (not name.startswith(home), name)):
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
def _call(name: str):
    """An entry point as ctypes sees it: the call releases the interpreter lock."""
    return _ENTRY_TYPE(_compiled(name).address)


def _run(name: str, address: int, workers: int) -> None:
    """Run an entry point, 'forward' or 'backward', on `workers` threads; each takes jobs until there are none left.

    Args:
        address: that of the fields.
    """
    entry = _call(name)
    if workers == 1:
        entry(address)
    elif _openmp is not None:
        _openmp(entry, address, workers, 0)
    else:
        # keyed by process: threads do not survive a fork
        pool = _pools.setdefault((os.getpid(), workers), ThreadPoolExecutor(workers, 'vim2-scan'))
        list(pool.map(lambda _: entry(address), range(workers)))


def _geometry(t: Optional[Tensor]):
    return None if t is None else (t.dtype, t.shape, t.stride())


class _Plan(NamedTuple):
    """Everything but addresses."""
    fields: array
    scratch: int        # bytes
    workers: int
    images: slice       # those to be scanned
    step_sizes: int     # elements of these images' step sizes, if they have to be formed from factors; else 0


# Step sizes of low rank are multiplied out for a few images at a time. Then the caches hold them until they are scanned
# (their gradient until it is contracted), and the system need not find memory for a whole batch of them.
_STEP_SIZES = 10 << 20  # bytes


@functools.lru_cache(maxsize=1024)
def _plans(backward: bool, geometry: tuple, factor: Optional[tuple], directions: Tuple[int, ...], softplus: bool,
           threads: int) -> Tuple[List[_Plan], int]:
    """A plan for all images, or several for a few of them each if the step sizes have to be formed.

    Args:
        geometry: `_geometry` of each tensor that there is, in the order of _TENSORS. delta's gradient is laid out as
            delta is.
        factor: that of delta_weight, by which delta is to be multiplied; or None.

    Returns:
        (plans, unit): gradients of delta's factors are to be formed for so many images at a time. Shapes alone set it,
        because it sets the order of a sum.
    """
    batch, geometry = geometry[0][1][0], list(geometry)
    if factor is None:
        return [_plan(backward, tuple(geometry), directions, softplus, threads, range(batch), 0)], batch
    u, delta, weight = (torch.empty_strided(shape, strides, dtype=dtype, device='meta')
                        for dtype, shape, strides in (geometry[0], geometry[1], factor))
    one = expand_delta(delta[:1], weight, u)
    unit = min(batch, max(1, _STEP_SIZES // (one.numel() * one.element_size())))
    jobs = unit * (_backward_parts(batch, _blocks(*(geometry[i][1] for i in (0, 3, 4)))) if backward else 1)
    count = unit * max(1, threads // 2, -(-threads // jobs) if backward else 1)  # the forward's parts are no fixed ones
    plans = []
    for first in range(0, batch, count):
        images = range(first, min(batch, first + count))
        full = expand_delta(delta[first:images.stop], weight, u)
        geometry[_NAMES.index('delta')] = _geometry(full)
        if backward:
            geometry[_NAMES.index('grad_delta')] = _geometry(full)
        plans.append(_plan(backward, tuple(geometry), directions, softplus, threads, images, full.numel()))
    return plans, unit


def _blocks(u: Sequence[int], B: Sequence[int], C: Sequence[int]) -> int:
    """Blocks of channels that the kernels work on, for tensors of these shapes."""
    groups, _, blocks = channel_blocks(u[1], B[2], C[2])
    return groups * blocks


def _plan(backward: bool, geometry: tuple, directions: Tuple[int, ...], softplus: bool, threads: int, images: range,
          step_sizes: int) -> _Plan:
    """The plan for some of the images. Step sizes that have to be formed are there for these images alone."""
    (_, dim, height, width), states = geometry[0][1], geometry[2][1][2]
    groups_b, groups_c = geometry[3][1][2], geometry[4][1][2]
    groups, group_width, group_blocks = channel_blocks(dim, groups_b, groups_c)
    blocks = groups * group_blocks
    parts = _backward_parts(geometry[0][1][0], blocks) if backward else _forward_parts(len(images), blocks, threads)
    workers = max(1, min(threads, len(images) * parts))
    size = -(-(_backward_scratch if backward else _forward_scratch)(-(-blocks // parts), states) // 4096) * 4096
    fields = array('q', [0] * (FIELDS + 10 * len(geometry)))
    for at, value in (
            (NEXT_JOB, images.start * parts), (JOBS, images.stop * parts), (DIRECTIONS, len(directions)), (DIM, dim),
            (STATES, states), (HEIGHT, height), (WIDTH, width), (GROUP_WIDTH, group_width),
            (GROUP_BLOCKS, group_blocks), (BLOCKS, blocks), (PARTS, parts), (SOFTPLUS, int(softplus)),
            (SCRATCH_SIZE, size)):
        fields[at // 8] = value
    fields[ORDER // 8:ORDER // 8 + len(directions)] = array('q', directions)
    for i, (axes, known) in enumerate(zip(_TENSORS.values(), geometry)):
        if known is None:
            continue
        dtype, shape, strides = known
        at = FIELDS + 10 * i
        fields[at + DTYPE // 8] = _DTYPES[dtype]
        for axis, length, stride in zip(axes, shape, strides):
            # a dimension of one element is never stepped along: that is how constants are read at every position
            fields[at + _AXES[axis] // 8] = 0 if length == 1 else stride * dtype.itemsize
    fields[(B_ + STRIDE_PART) // 8], fields[(C_ + STRIDE_PART) // 8] = groups_b, groups_c
    return _Plan(fields, workers * size + 64, workers, slice(images.start, images.stop), step_sizes)


def _formed(plans: List[_Plan], u: Tensor, delta: Tensor, delta_weight: Optional[Tensor]
            ) -> Iterator[Tuple[_Plan, Tensor]]:
    """Each plan with its images' step sizes: delta itself or, in memory that the next plan's use again, the product."""
    if delta_weight is None:
        yield plans[0], delta
        return
    memory = _fresh(torch.empty(plans[0].step_sizes, dtype=delta.dtype))
    for plan in plans:
        yield plan, expand_delta(delta[plan.images], delta_weight, u, memory)


def _start(name: str, plan: _Plan, tensors: Sequence[Optional[Tensor]], saved: Optional[Tensor]) -> None:
    """Run 'forward' or 'backward'.

    Args:
        tensors: in the order of _TENSORS.
        saved: the states at the chunks' borders.
    """
    fields = plan.fields[:]  # calls from several threads share the plan
    scratch = torch.empty(plan.scratch, dtype=torch.uint8)
    fields[SCRATCH // 8] = -(-scratch.data_ptr() // 64) * 64
    at = FIELDS
    for t in tensors:
        if t is not None:
            fields[at] = t.data_ptr()
        at += 10
    if plan.step_sizes:  # images count from the batch's first one, which is not there
        for tensor in (DELTA, G_DELTA) if name == 'backward' else (DELTA,):
            fields[tensor // 8] -= plan.images.start * fields[(tensor + STRIDE_B) // 8]
    if saved is not None:
        fields[SAVED // 8] = saved.data_ptr()
    _run(name, fields.buffer_info()[0], plan.workers)


def _forward_parts(batch: int, blocks: int, threads: int) -> int:
    # Any cut gives the same result. Each reads B and C anew: no more cuts than it takes to keep the threads busy.
    return max(1, min(blocks, -(-threads // batch)))


def _backward_parts(batch: int, blocks: int) -> int:
    # Each part sums its own gradients of B and C: the cut sets the order of that sum, so only shapes may set it. The
    # sums of parts of fewer blocks cost more than what more threads would save.
    return max(1, min(-(-blocks // 6), -(-16 // batch)))


def _forward_scratch(blocks: int, states: int) -> int:
    return (2 * FORWARD_OFFSETS + 2 * OFFSETS + 4 * TILE + 8 * CHUNK * states
            + VBYTES * blocks * (2 + 2 * states) + AHEAD)


def _backward_scratch(blocks: int, states: int) -> int:
    sums = states // 4 + states % 4  # see _sum_vectors
    return (2 * BACKWARD_OFFSETS + 2 * OFFSETS + 17 * TILE + (8 * states + 2 * VBYTES * sums) * CHUNK
            + VBYTES * blocks * (4 + 3 * states) + AHEAD)


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
    if len(directions) == 1 or like.dtype == torch.float32:
        return _fresh(torch.empty_like(like))
    return _fresh(torch.empty_like(like, dtype=torch.float32))


@functools.lru_cache(maxsize=1024)
def _dense_strides(shape: torch.Size, strides: Tuple[int, ...]) -> Tuple[int, ...]:
    """Strides of `torch.empty_like` of a tensor of this shape and strides."""
    return torch.empty_like(torch.empty_strided(shape, strides, device='meta')).stride()


def _zero_parts(like: Tensor, parts: int) -> Tensor:
    """(parts, ...) float32 zeros, each part in the layout of `torch.empty_like(like)`."""
    size, strides = like.numel(), _dense_strides(like.shape, like.stride())
    return torch.zeros(parts * size).as_strided((parts, *like.shape), (size, *strides))


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in the layout of a part."""
    if parts.shape[0] == 1:
        return parts[0]
    return torch.sum(parts, 0, out=torch.empty_strided(parts.shape[1:], parts.stride()[1:]))


def _gradient(like: Optional[Tensor], value: Optional[Tensor], u: Tensor) -> Tensor:
    """A gradient in the dtype and layout of `torch.empty_like(like)`; empty if there is no such tensor."""
    if like is None:
        return u.new_empty(0)
    strides = _dense_strides(like.shape, like.stride())
    if value.dtype == like.dtype and value.stride() == strides:
        return value
    return torch.empty_strided(like.shape, strides, dtype=like.dtype).copy_(value)


def forward(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
        delta_bias: Optional[Tensor], delta_softplus: bool, directions: List[int], want_last_state: bool,
        save_states: bool, delta_weight: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The canonical scan (see `vim2.ops.scan`): out, last states or empty, saved states or empty."""
    out = _sum_buffer(u, directions)
    last = torch.empty((u.shape[0], A.shape[0], u.shape[1], A.shape[2]) if want_last_state else (0,))
    states = _fresh(torch.empty(states_shape(u, A, B, C) if save_states else (0,)))
    others = (A, B, C, D, z, delta_bias, out, last if want_last_state else None)
    plans, _ = _plans(False, tuple([_geometry(t) for t in (u, delta, *others)]), _geometry(delta_weight),
                      tuple(directions), delta_softplus, torch.get_num_threads())
    for plan, full in _formed(plans, u, delta, delta_weight):
        _start('forward', plan, (u, full, *others), states if save_states else None)
    return out if out.dtype == u.dtype else torch.empty_like(u).copy_(out), last, states


def prepared(tensors: Sequence[Optional[Tensor]], softplus: bool, directions: List[int], out: Tensor,
             last: Optional[Tensor], delta_weight: Optional[Tensor] = None) -> Callable:
    """:func:`forward` for tensors like these, with all that depends on more than addresses worked out.

    Args:
        tensors: u to delta_bias, as for `forward`.
        out, last: what it returned for them; last None if the function need not return it.
        delta_weight: as for `forward`.

    Returns:
        A function that takes such tensors, in any views of the same memory, with delta_weight last, to (out, last).
    """
    dtype, shape, strides = _geometry(out)
    sums = dtype if len(directions) == 1 else torch.float32
    last_shape = None if last is None else last.shape
    wanted = last is not None and last.numel() > 0
    geometry = (*map(_geometry, tensors), (sums, shape, strides), _geometry(last) if wanted else None)
    plans, _ = _plans(False, geometry, _geometry(delta_weight), tuple(directions), softplus, torch.get_num_threads())

    def call(u: Tensor, delta: Tensor, *others: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        *others, delta_weight = others
        out = _fresh(torch.empty_strided(shape, strides, dtype=sums))
        last = None if last_shape is None else torch.empty(last_shape, dtype=torch.float32)
        for plan, full in _formed(plans, u, delta, delta_weight):
            _start('forward', plan, (u, full, *others, out, last if wanted else None), None)
        return out if sums is dtype else torch.empty_strided(shape, strides, dtype=dtype).copy_(out), last

    return call


def backward(
        grad_out: Tensor, grad_last: Optional[Tensor], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Optional[Tensor], z: Optional[Tensor], delta_bias: Optional[Tensor], states: Tensor, delta_softplus: bool,
        directions: List[int], delta_weight: Optional[Tensor] = None,
) -> Tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, delta_weight (an empty tensor for each that is absent)."""
    batch, dim = u.shape[:2]
    k, n = A.shape[0], A.shape[2]
    if grad_out.dtype not in _DTYPES:
        grad_out = grad_out.float()
    if grad_last is not None:
        grad_last = grad_last.float()
    grad_u, grad_delta = _sum_buffer(u, directions), _fresh(torch.empty_like(delta))
    grad_z = None if z is None else _sum_buffer(z, directions)
    grad_A, grad_D, grad_bias = torch.empty(batch, k, dim, n), torch.empty(batch, k, dim), torch.empty(batch, k, dim)
    parts = _backward_parts(batch, _blocks(u.shape, B.shape, C.shape))
    # zeros: parts that hold no block of a group leave its slice as it is
    grad_B, grad_C = (_zero_parts(t, parts) for t in (B, C))
    others = (A, B, C, D, z, delta_bias, None, None, grad_out, grad_last, grad_u)
    sums = (grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias)
    plans, unit = _plans(True, tuple([_geometry(t) for t in (u, delta, *others, grad_delta, *sums)]),
                         _geometry(delta_weight), tuple(directions), delta_softplus, torch.get_num_threads())
    grad_weight = memory = None
    for plan, full in _formed(plans, u, delta, delta_weight):
        if delta_weight is None:
            _start('backward', plan, (u, delta, *others, grad_delta, *sums), states)
            continue
        if memory is None:
            memory = _fresh(torch.empty(plan.step_sizes, dtype=delta.dtype))
        grad = memory.as_strided(full.shape, full.stride())
        _start('backward', plan, (u, full, *others, grad, *sums), states)
        for part, low, target in zip(*(t.split(unit) for t in (grad, delta[plan.images], grad_delta[plan.images]))):
            of_delta, of_weight = contract_delta(part, low, delta_weight)
            target.copy_(of_delta)
            grad_weight = of_weight.float() if grad_weight is None else grad_weight.add_(of_weight)
    summed = (grad_u, grad_delta, _sum(grad_A), _sum(grad_B), _sum(grad_C), None if D is None else _sum(grad_D), grad_z,
              None if delta_bias is None else _sum(grad_bias), grad_weight)
    given = (u, delta, A, B, C, D, z, delta_bias, delta_weight)
    return tuple(_gradient(t, g, u) for t, g in zip(given, summed))
