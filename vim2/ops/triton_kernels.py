"""Triton kernels of the selective scan; `triton_scan` plans and launches them, `docs/op.md` tells the algorithm.

Scan time runs over t = 0 .. L + pad - 1, of which the first `pad` steps are empty. Direction code d visits the
natural positions in the order of `vim2.ops.scan`: bit 0 is column-major, bit 1 reversed. A direction is never a copy:
it is a walk of (row, column) counters (`_natural`) that all tensors share.

Three layouts of the states, all Triton's own default for the shape:
- Forward: (N, channels). The lanes run along the channels and all N states of a channel live in one thread's registers:
  y needs no shuffle, B_t and C_t are vector loads that every lane shares.
- Forward with the directions in lockstep: (states per thread, directions, lanes along the states, lanes along the
  channels), with a warp per direction and 1 or 2 lanes along the states.
- Backward: (states per thread, channels per thread, warps, lanes along the states, lanes along the channels). The
  gradients of B and C are sums over channels, those of u and delta over states: this way neither sum crosses many
  lanes.

Triton gives a load whose addresses are provably contiguous its own layout, and that layout then spreads to everything
that the loaded tensor meets. So the strides of A, of the saved states and of every other tensor in the states' layout
are run-time values on purpose.
"""
import inspect

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)



def _kernel(tensors):
    """triton.jit that specialises on no integer: their values would multiply the variants, and hints say what
    matters."""
    def decorate(function):
        names = list(inspect.signature(function).parameters.items())
        integers = [name for name, p in names if name not in tensors.split() and p.annotation is not tl.constexpr]
        return triton.jit(do_not_specialize=integers)(function)
    return decorate


@triton.jit
def _softplus(x):
    """log(1 + e^x) with one exponential and no logarithm: max(x, 0) + e P(e), e = e^-|x|, P ~ log1p(e) / e on [0, 1].

    P is the minimax polynomial, relative error 3e-8. log2(1 + e) would lose all digits of a small step size.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = 0.005232685245573521 * e - 0.029505198821425438
    p = p * e + 0.07822588086128235
    p = p * e - 0.13663239777088165
    p = p * e + 0.19106003642082214
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _place(t, code, H, W, INDEX64: tl.constexpr):
    """Step t of a direction as (outer, inner) counters of its scan."""
    n_inner = tl.where((code % 2) == 1, H, W)
    j = t // n_inner
    i = t % n_inner
    if INDEX64:
        j = j.to(tl.int64)
        i = i.to(tl.int64)
    return j, i


@triton.jit
def _next(j, i, more, code, H, W):
    """The step after (j, i), or the same one if there are no more."""
    wrap = i + 1 == tl.where((code % 2) == 1, H, W)
    return tl.where(more & wrap, j + 1, j), tl.where(more, tl.where(wrap, 0, i + 1), i)


@triton.jit
def _natural(j, i, code, H, W):
    """(row, column) of the map at the scan's counters (j, i)."""
    column = (code % 2) == 1
    h = tl.where(column, i, j)
    w = tl.where(column, j, i)
    back = code >= 2
    return tl.where(back, H - 1 - h, h), tl.where(back, W - 1 - w, w)


@triton.jit
def _columns(x, T: tl.constexpr):
    """The T columns of x (channels, T) as a tuple; free where each thread holds its row."""
    if T == 4:
        a, b = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
        a0, a1 = tl.split(a)
        b0, b1 = tl.split(b)
        return a0, b0, a1, b1
    else:
        tl.static_assert(T == 8)
        a, b = tl.split(tl.reshape(x, (x.shape[0], 2, 2, 2)))
        aa, ab = tl.split(a)
        ba, bb = tl.split(b)
        x0, x4 = tl.split(aa)
        x2, x6 = tl.split(ab)
        x1, x5 = tl.split(ba)
        x3, x7 = tl.split(bb)
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _tile(columns, T: tl.constexpr):
    """Inverse of `_columns`."""
    if T == 4:
        x = tl.join(tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3]))
    else:
        tl.static_assert(T == 8)
        x = tl.join(
            tl.join(tl.join(columns[0], columns[4]), tl.join(columns[2], columns[6])),
            tl.join(tl.join(columns[1], columns[5]), tl.join(columns[3], columns[7])))
    return tl.reshape(x, (columns[0].shape[0], T))


@triton.jit
def _vector(pointer, offset, n, s_n, N, VECTOR: tl.constexpr, FULL_N: tl.constexpr):
    """B_t or C_t: N values that start at `offset`; VECTOR > 1 promises unit stride and that alignment, in elements."""
    if VECTOR > 1:
        size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        at = tl.max_contiguous(tl.multiple_of(pointer + offset + n, VECTOR * size), VECTOR)
    else:
        at = pointer + offset + n * s_n
    if FULL_N:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def _load(at, mask, FULL: tl.constexpr):
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _store(at, value, mask, FULL: tl.constexpr):
    value = value.to(at.dtype.element_ty)
    if FULL:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=mask)


@triton.jit
def _rows(pointers, VECTOR: tl.constexpr):
    """Promise that each row of a (channels, steps) block of addresses starts aligned to VECTOR elements and is
    contiguous."""
    size: tl.constexpr = pointers.dtype.element_ty.primitive_bitwidth // 8
    return tl.max_contiguous(tl.multiple_of(pointers, (1, VECTOR * size)), (1, VECTOR))


@_kernel('u delta A B C D z bias start acc out last states')
def scan_forward(
        u, delta, A, B, C, D, z, bias, start, acc, out, last, states,
        E, N, H, W, L, pad, chunk, n_chunks, n_blocks, blocks_per_group, width, per_b, per_c, K, KS, codes,
        part_stride, n_saved,
        u_b, u_e, u_h, u_w, d_b, d_k, d_e, d_h, d_w, a_k, a_e, a_n,
        b_b, b_k, b_g, b_n, b_h, b_w, c_b, c_k, c_g, c_n, c_h, c_w,
        D_k, D_e, bias_k, bias_e, z_b, z_e, z_h, z_w, o_b, o_e, o_h, o_w, h_n,
        KM: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, T: tl.constexpr, SAVE: tl.constexpr,
        B_CONST: tl.constexpr, C_CONST: tl.constexpr, B_VECTOR: tl.constexpr, C_VECTOR: tl.constexpr,
        FULL_N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        HAS_START: tl.constexpr, WANT_LAST: tl.constexpr, SAVE_STATES: tl.constexpr, UNIT_E: tl.constexpr,
        EVEN_E: tl.constexpr,
        TIME_VECTOR: tl.constexpr, REVERSE: tl.constexpr, INDEX64: tl.constexpr,
):
    """One program: one image, BE channels of one group, one chunk of scan time, and KM directions one after the other.

    With KM > 1 the directions are added up in `acc`, float32 with the strides of `out`, by the threads that wrote it;
    the last direction writes `out`. With KM = 1 and KS > 1 each direction writes its own float32 part of `out`.
    """
    pid = tl.program_id(0)
    k0 = pid % KS  # the directions of a block side by side: they read the same map at about the same time
    block = (pid // KS) % n_blocks
    c = (pid // (KS * n_blocks)) % n_chunks
    b = (pid // (KS * n_blocks * n_chunks)).to(tl.int64)
    group = block // blocks_per_group
    lane = (block % blocks_per_group) * BE + tl.arange(0, BE)
    mask_e = lane < width
    e = group * width + lane
    n = tl.arange(0, NP)
    if INDEX64:
        e = e.to(tl.int64)
        group = group.to(tl.int64)
        n = n.to(tl.int64)
    if UNIT_E:
        e_u, e_d, e_z, e_o = e, e, e, e
    else:
        e_u, e_d, e_z, e_o = e * u_e, e * d_e, e * z_e, e * o_e
    tile_mask = mask_e[None, :] & (n < N)[:, None]
    t_first = c * chunk
    t_last = tl.minimum(t_first + chunk, L + pad)
    for kk in tl.range(0, KM, disable_licm=True):
        k = (k0 + kk).to(tl.int64)
        code = (codes >> (2 * k0 + 2 * kk)) & 3
        u_p = u + b * u_b
        d_p = delta + b * d_b + k * d_k
        b_p = B + b * b_b + k * b_k
        c_p = C + b * c_b + k * c_k
        out_p = out + b * o_b + k0.to(tl.int64) * part_stride
        acc_p = acc + b * o_b
        if HAS_Z:
            z_p = z + b * z_b
        a2 = tl.load(A + k * a_k + e[None, :] * a_e + n[:, None] * a_n, mask=tile_mask,
                     other=0.0).to(tl.float32) * LOG2E
        if B_CONST:
            b_tile = tl.load(b_p + (e // per_b)[None, :] * b_g + n[:, None] * b_n, mask=tile_mask,
                             other=0.0).to(tl.float32)
        else:
            b_p += ((group * width) // per_b) * b_g
        if C_CONST:
            c_tile = tl.load(c_p + (e // per_c)[None, :] * c_g + n[:, None] * c_n, mask=tile_mask,
                             other=0.0).to(tl.float32)
        else:
            c_p += ((group * width) // per_c) * c_g
        if HAS_D:
            skip = tl.load(D + k * D_k + e * D_e, mask=mask_e, other=0.0).to(tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + k * bias_k + e * bias_e, mask=mask_e, other=0.0).to(tl.float32)
        row = (b * K + k) * n_saved
        if HAS_START:
            h = tl.load(start + (((b * K + k) * n_chunks + c) * N * E + (n[:, None] * h_n + e[None, :])),
                        mask=tile_mask, other=0.0)
        else:
            h = tl.zeros((NP, BE), tl.float32)
        j_, i_ = _place(t_first, code, H, W, INDEX64)
        for t in range(t_first, t_last, T):
            if SAVE_STATES:
                if (t % SAVE == 0) & (t > 0):  # the state at t = 0 is zero
                    tl.store(states + ((row + t // SAVE - 1) * N * E + (n[:, None] * h_n + e[None, :])), h,
                             mask=tile_mask)
            us = ()
            ds = ()
            zs = ()
            olds = ()
            b_at = ()
            c_at = ()
            o_at = ()
            ok = ()
            if TIME_VECTOR > 0:
                q0 = (L + pad - T - t) if REVERSE else t
                q = q0 + tl.arange(0, T)
                if INDEX64:
                    q = q.to(tl.int64)
                # A group that can be cut short is never aligned: its mask would not keep the vector loads whole anyway.
                if TIME_VECTOR > 1:
                    whole = mask_e[:, None]
                else:
                    whole = mask_e[:, None] & (q < L)[None, :]
                u_at = _rows(u + b * u_b + (e * u_e)[:, None] + q[None, :], TIME_VECTOR)
                d_at = _rows(delta + b * d_b + k * d_k + (e * d_e)[:, None] + q[None, :], TIME_VECTOR)
                u_cols = _columns(tl.load(u_at, mask=whole, other=0.0), T)
                d_cols = _columns(tl.load(d_at, mask=whole, other=0.0), T)
                if HAS_Z:
                    z_at = (e * z_e)[:, None] + q[None, :] * z_w
                    z_cols = _columns(tl.load(z + b * z_b + z_at, mask=whole, other=0.0), T)
                for s in tl.static_range(T):
                    us = us + (u_cols[T - 1 - s if REVERSE else s],)
                    ds = ds + (d_cols[T - 1 - s if REVERSE else s],)
                    if HAS_Z:
                        zs = zs + (z_cols[T - 1 - s if REVERSE else s],)
                    at = (q0 + T - 1 - s) if REVERSE else (q0 + s)
                    ok = ok + (at < L,)
                    at = tl.minimum(at, L - 1)
                    if INDEX64:
                        at = at.to(tl.int64)
                    b_at = b_at + (at * b_w,)
                    c_at = c_at + (at * c_w,)
            else:
                for s in tl.static_range(T):
                    ok = ok + (t + s < L,)
                    h_, w_ = _natural(j_, i_, code, H, W)
                    us = us + (_load(u_p + (h_ * u_h + w_ * u_w) + e_u, mask_e, EVEN_E),)
                    ds = ds + (_load(d_p + (h_ * d_h + w_ * d_w) + e_d, mask_e, EVEN_E),)
                    at = h_ * o_h + w_ * o_w
                    o_at = o_at + (at,)
                    if HAS_Z:
                        zs = zs + (_load(z_p + (h_ * z_h + w_ * z_w) + e_z, mask_e, EVEN_E),)
                    if KM > 1:
                        olds = olds + (tl.load(acc_p + at + e_o, mask=mask_e & (kk > 0), other=0.0),)
                    # Past the end the last position is read, computed with a step of zero and written again: the same
                    # values, and no mask to carry.
                    b_at = b_at + (h_ * b_h + w_ * b_w,)
                    c_at = c_at + (h_ * c_h + w_ * c_w,)
                    j_, i_ = _next(j_, i_, t + s + 1 < L, code, H, W)
            ys = ()
            for s in tl.static_range(T):
                x = us[s].to(tl.float32)
                dt = ds[s].to(tl.float32)
                if HAS_BIAS:
                    dt += shift
                if SOFTPLUS:
                    dt = _softplus(dt)
                dt = tl.where(ok[s], dt, 0.0)  # an empty step: decay 1, nothing added
                if B_CONST:
                    bt = b_tile
                else:
                    bt = _vector(b_p, b_at[s], n, b_n, N, B_VECTOR, FULL_N)[:, None]
                if C_CONST:
                    ct = c_tile
                else:
                    ct = _vector(c_p, c_at[s], n, c_n, N, C_VECTOR, FULL_N)[:, None]
                h = tl.exp2(dt[None, :] * a2) * h + (dt * x)[None, :] * bt
                y = tl.sum(h * ct, axis=0)
                if HAS_D:
                    y += skip * x
                ys = ys + (y,)
            if TIME_VECTOR > 0:
                cols = ()
                for s in tl.static_range(T):
                    y = ys[T - 1 - s if REVERSE else s]
                    if HAS_Z:
                        gate = zs[T - 1 - s if REVERSE else s].to(tl.float32)
                        y *= gate * _sigmoid(gate)
                    cols = cols + (y,)
                at = _rows(out + b * o_b + (e * o_e)[:, None] + q[None, :], TIME_VECTOR)
                tl.store(at, _tile(cols, T).to(out.dtype.element_ty), mask=whole)
            else:
                for s in tl.static_range(T):
                    y = ys[s]
                    if KM > 1:
                        y += olds[s]
                        tl.store(acc_p + o_at[s] + e_o, y, mask=mask_e & (kk < KM - 1))
                    if HAS_Z:
                        gate = zs[s].to(tl.float32)
                        y *= gate * _sigmoid(gate)
                    if KM > 1:
                        tl.store(out_p + o_at[s] + e_o, y.to(out.dtype.element_ty), mask=mask_e & (kk == KM - 1))
                    else:
                        _store(out_p + o_at[s] + e_o, y, mask_e, EVEN_E)
        if WANT_LAST:
            if c == n_chunks - 1:
                tl.store(last + ((b * K + k) * E + e)[None, :] * N + n[:, None], h, mask=tile_mask)
        if KM > 1:
            # The next direction reads what this one wrote to `acc`.
            tl.debug_barrier()


@triton.jit
def _direction_states(pointer, offset, n, s_n, N, mask_k, VECTOR: tl.constexpr, FULL_N: tl.constexpr):
    """`_vector` in the layout of `scan_together`: N values per direction."""
    if VECTOR > 1:
        size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        at = tl.multiple_of(pointer + offset + n, (VECTOR * size, 1, 1, 1))
        at = tl.max_contiguous(at, (VECTOR, 1, 1, 1))
    else:
        at = pointer + offset + n * s_n
    if FULL_N:
        return tl.load(at, mask=mask_k, other=0.0).to(tl.float32)
    else:
        return tl.load(at, mask=mask_k & (n < N), other=0.0).to(tl.float32)


@triton.jit
def _of_lane(x, nl, i, NL: tl.constexpr):
    """What lane i of the NL along the states holds, in all of them."""
    if NL == 1:
        return x
    else:
        return tl.sum(tl.where(nl == i, x, 0.0), axis=2, keep_dims=True)


@_kernel('u delta A B C D z bias acc out last states')
def scan_together(
        u, delta, A, B, C, D, z, bias, acc, out, last, states,
        E, N, H, W, L, n_tasks, n_blocks, blocks_per_group, width, per_b, per_c, K, codes, n_saved,
        u_b, u_e, u_h, u_w, d_b, d_k, d_e, d_h, d_w, a_k, a_e, a_n,
        b_b, b_k, b_g, b_n, b_h, b_w, c_b, c_k, c_g, c_n, c_h, c_w,
        D_k, D_e, bias_k, bias_e, z_b, z_e, z_h, z_w, o_b, o_e, o_h, o_w, h_n,
        KP: tl.constexpr, NP: tl.constexpr, NL: tl.constexpr, BE: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
        SAVE: tl.constexpr, B_VECTOR: tl.constexpr, C_VECTOR: tl.constexpr,
        FULL_N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        WANT_LAST: tl.constexpr, SAVE_STATES: tl.constexpr, UNIT_E: tl.constexpr, INDEX64: tl.constexpr,
):
    """All K directions of BE channels of one image in lockstep, image after image.

    The tile is (states per thread, KP directions, NL lanes along the states, BE lanes along the channels), 32 lanes and
    a warp per direction. What has no states is done once for NL steps: each of the NL lanes takes one of them.

    What the directions add up stays in `acc`, L BE float32 of the program's own, which it uses again for its next
    image: like u, which the warps of all directions read at about the same time, that is meant never to leave the
    cache. Two directions may meet at a position within the same T steps, so they add one after the other: the same
    order, and the same bits, every time.
    """
    NR: tl.constexpr = NP // NL
    pid = tl.program_id(0)
    kd = tl.arange(0, KP)[None, :, None, None]
    local = tl.arange(0, BE)[None, None, None, :]
    nl = tl.arange(0, NL)[None, None, :, None]
    n = nl * NR + tl.arange(0, NR)[:, None, None, None]
    rows = tl.arange(0, R)[:, None]  # a second layout, of positions and channels, for what is done once per image
    lane = tl.arange(0, BE)[None, :]
    code = (codes >> (2 * kd)) & 3
    mask_k = kd < K
    acc_p = acc + pid.to(tl.int64) * L * BE
    k = kd.to(tl.int64)
    for task in range(pid, n_tasks, tl.num_programs(0)):
        block = task % n_blocks
        b = (task // n_blocks).to(tl.int64)
        group = block // blocks_per_group
        first = (block % blocks_per_group) * BE
        mask_lane = first + lane < width
        e_lane = group * width + first + lane
        e = group * width + first + local
        if INDEX64:
            e_lane = e_lane.to(tl.int64)
            e = e.to(tl.int64)
            group = group.to(tl.int64)
        if UNIT_E:
            e_u, e_d, e_z, e_o = e, e, e_lane, e_lane
        else:
            e_u, e_d, e_z, e_o = e * u_e, e * d_e, e_lane * z_e, e_lane * o_e
        mask = mask_k & (first + local < width)
        tile_mask = mask & (n < N)
        for p in range(0, L, R):
            tl.store(acc_p + (p + rows) * BE + lane, tl.zeros((R, BE), tl.float32), mask=mask_lane & (p + rows < L))
        a2 = tl.load(A + k * a_k + e * a_e + n * a_n, mask=tile_mask, other=0.0).to(tl.float32) * LOG2E
        if HAS_D:
            skip = tl.load(D + k * D_k + e * D_e, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + k * bias_k + e * bias_e, mask=mask, other=0.0).to(tl.float32)
        u_p = u + b * u_b
        d_p = delta + b * d_b + k * d_k
        b_p = B + b * b_b + ((group * width) // per_b) * b_g + k * b_k
        c_p = C + b * c_b + ((group * width) // per_c) * c_g + k * c_k
        h = tl.zeros((NR, KP, NL, BE), tl.float32)
        j_, i_ = _place(kd * 0, code, H, W, INDEX64)
        tl.debug_barrier()  # acc is zero
        for t in range(0, L, T):
            if SAVE_STATES:
                if (t % SAVE == 0) & (t > 0):
                    tl.store(states + (((b * K + k) * n_saved + t // SAVE - 1) * N * E + e) + n * h_n, h,
                             mask=tile_mask)
            hs = ()
            ws = ()
            for s in tl.static_range(T):
                h_, w_ = _natural(j_, i_, code, H, W)
                hs = hs + (h_,)
                ws = ws + (w_,)
                # Past the end the last position is read again and computed with a step of zero, but not added.
                j_, i_ = _next(j_, i_, t + s + 1 < L, code, H, W)
            # What has no states is done once for NL steps, each lane along the states for one of them.
            xs = ()
            ds = ()
            o_at = ()
            for m in tl.static_range(T // NL):
                h_, w_ = hs[m * NL], ws[m * NL]
                for i in tl.static_range(1, NL):
                    h_ = tl.where(nl == i, hs[m * NL + i], h_)
                    w_ = tl.where(nl == i, ws[m * NL + i], w_)
                xs = xs + (tl.load(u_p + (h_ * u_h + w_ * u_w) + e_u, mask=mask, other=0.0),)
                ds = ds + (tl.load(d_p + (h_ * d_h + w_ * d_w) + e_d, mask=mask, other=0.0),)
                o_at = o_at + ((h_ * W + w_) * BE + local,)
            dts = ()
            dus = ()
            ys = ()
            for m in tl.static_range(T // NL):
                x = xs[m].to(tl.float32)
                dt = ds[m].to(tl.float32)
                if HAS_BIAS:
                    dt += shift
                if SOFTPLUS:
                    dt = _softplus(dt)
                dt = tl.where(t + m * NL + nl < L, dt, 0.0)
                dts = dts + (dt,)
                dus = dus + (dt * x,)
                if HAS_D:
                    ys = ys + (skip * x,)
                else:
                    ys = ys + (tl.zeros((1, KP, NL, BE), tl.float32),)
            totals = ()
            for m in tl.static_range(T // NL):
                total = ys[m]
                for i in tl.static_range(NL):
                    h_, w_ = hs[m * NL + i], ws[m * NL + i]
                    bt = _direction_states(b_p, h_ * b_h + w_ * b_w, n, b_n, N, mask_k, B_VECTOR, FULL_N)
                    ct = _direction_states(c_p, h_ * c_h + w_ * c_w, n, c_n, N, mask_k, C_VECTOR, FULL_N)
                    h = tl.exp2(_of_lane(dts[m], nl, i, NL) * a2) * h + _of_lane(dus[m], nl, i, NL) * bt
                    y = tl.sum(tl.sum(h * ct, axis=0, keep_dims=True), axis=2, keep_dims=True)
                    if NL > 1:
                        y = tl.where(nl == i, y, 0.0)
                    total += y
                totals = totals + (total,)
            for turn in tl.static_range(KP):
                olds = ()
                for m in tl.static_range(T // NL):
                    mine = (kd == turn) & mask & (t + m * NL + nl < L)
                    olds = olds + (tl.load(acc_p + o_at[m], mask=mine, other=0.0),)
                for m in tl.static_range(T // NL):
                    mine = (kd == turn) & mask & (t + m * NL + nl < L)
                    tl.store(acc_p + o_at[m], olds[m] + totals[m], mask=mine)
                tl.debug_barrier()
        if WANT_LAST:
            tl.store(last + ((b * K + k) * E + e) * N + n, h, mask=tile_mask)
        for p in range(0, L, R):
            at = p + rows
            if INDEX64:
                at = at.to(tl.int64)
            ok = mask_lane & (at < L)
            y = tl.load(acc_p + at * BE + lane, mask=ok, other=0.0)
            if HAS_Z:
                gate = tl.load(z + b * z_b + (at // W) * z_h + (at % W) * z_w + e_z, mask=ok, other=0.0).to(tl.float32)
                y *= gate * _sigmoid(gate)
            tl.store(out + b * o_b + (at // W) * o_h + (at % W) * o_w + e_o, y.to(out.dtype.element_ty), mask=ok)
        tl.debug_barrier()  # before acc is zeroed for the next image


@_kernel('x delta A B z bias ends lengths')
def chunk_summary(
        x, delta, A, B, z, bias, ends, lengths,
        E, N, H, W, L, pad, chunk, n_chunks, n_blocks, blocks_per_group, width, per_b, K, codes,
        x_b, x_e, x_h, x_w, d_b, d_k, d_e, d_h, d_w, a_k, a_e, a_n, b_b, b_k, b_g, b_n, b_h, b_w, bias_k, bias_e,
        z_b, z_e, z_h, z_w, h_n,
        NP: tl.constexpr, BE: tl.constexpr, B_CONST: tl.constexpr, B_VECTOR: tl.constexpr, FULL_N: tl.constexpr,
        HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr,
        UNIT_E: tl.constexpr, EVEN_E: tl.constexpr,
        T: tl.constexpr, INDEX64: tl.constexpr,
):
    """What one chunk does to a state that enters it: the state that leaves it from zero, and its sum of step sizes.

    ADJOINT runs the recurrence of the gradient, backward in scan time: s = decay (s + x C), with x = grad_out (times
    silu(z)) and B = C.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    c = (pid // n_blocks) % n_chunks
    direction = (pid // (n_blocks * n_chunks)) % K
    code = (codes >> (2 * direction)) & 3
    k = direction.to(tl.int64)
    b = (pid // (n_blocks * n_chunks * K)).to(tl.int64)
    group = block // blocks_per_group
    lane = (block % blocks_per_group) * BE + tl.arange(0, BE)
    mask_e = lane < width
    e = group * width + lane
    n = tl.arange(0, NP)
    if INDEX64:
        e = e.to(tl.int64)
        group = group.to(tl.int64)
        n = n.to(tl.int64)
    if UNIT_E:
        e_x, e_d, e_z = e, e, e
    else:
        e_x, e_d, e_z = e * x_e, e * d_e, e * z_e
    tile_mask = mask_e[None, :] & (n < N)[:, None]
    x_p = x + b * x_b
    d_p = delta + b * d_b + k * d_k
    b_p = B + b * b_b + k * b_k
    if HAS_Z:
        z_p = z + b * z_b
    a2 = tl.load(A + k * a_k + e[None, :] * a_e + n[:, None] * a_n, mask=tile_mask, other=0.0).to(tl.float32) * LOG2E
    if B_CONST:
        b_tile = tl.load(b_p + (e // per_b)[None, :] * b_g + n[:, None] * b_n, mask=tile_mask, other=0.0).to(tl.float32)
    else:
        b_p += ((group * width) // per_b) * b_g
    if HAS_BIAS:
        shift = tl.load(bias + k * bias_k + e * bias_e, mask=mask_e, other=0.0).to(tl.float32)
    t_first = tl.maximum(c * chunk - pad, 0)
    t_last = tl.minimum((c + 1) * chunk - pad, L)
    h = tl.zeros((NP, BE), tl.float32)
    total = tl.zeros((BE,), tl.float32)
    for t in range(0, t_last - t_first, T):
        xs = ()
        ds = ()
        zs = ()
        b_at = ()
        for s in tl.static_range(T):
            if ADJOINT:
                valid = t_last - 1 - t - s >= t_first
                at = tl.maximum(t_last - 1 - t - s, t_first)
            else:
                valid = t_first + t + s < t_last
                at = tl.minimum(t_first + t + s, t_last - 1)
            j_, i_ = _place(at, code, H, W, INDEX64)
            h_, w_ = _natural(j_, i_, code, H, W)
            x_t = _load(x_p + (h_ * x_h + w_ * x_w) + e_x, mask_e, EVEN_E).to(tl.float32)
            if ADJOINT:  # a step of zero does not keep it out of the sum
                x_t = tl.where(valid, x_t, 0.0)
            xs = xs + (x_t,)
            dt = _load(d_p + (h_ * d_h + w_ * d_w) + e_d, mask_e, EVEN_E).to(tl.float32)
            if HAS_Z:
                zs = zs + (_load(z_p + (h_ * z_h + w_ * z_w) + e_z, mask_e, EVEN_E).to(tl.float32),)
            b_at = b_at + (h_ * b_h + w_ * b_w,)
            if HAS_BIAS:
                dt += shift
            if SOFTPLUS:
                dt = _softplus(dt)
            ds = ds + (tl.where(valid, dt, 0.0),)
        for s in tl.static_range(T):
            if B_CONST:
                bt = b_tile
            else:
                bt = _vector(b_p, b_at[s], n, b_n, N, B_VECTOR, FULL_N)[:, None]
            dt = ds[s]
            total += dt
            v = xs[s]
            if HAS_Z:
                v *= zs[s] * _sigmoid(zs[s])
            decay = tl.exp2(dt[None, :] * a2)
            if ADJOINT:
                h = decay * (h + v[None, :] * bt)
            else:
                h = decay * h + (dt * v)[None, :] * bt
    row = (b * K + k) * n_chunks + c
    tl.store(ends + (row * N * E + (n[:, None] * h_n + e[None, :])), h, mask=tile_mask)
    tl.store(lengths + row * E + e, total, mask=mask_e)


@_kernel('ends lengths A initial')
def chunk_carry(ends, lengths, A, initial, E, N, n_chunks, n_blocks, K, a_k, a_e, a_n, h_n, i_b, i_k, i_e, i_n,
                NP: tl.constexpr, BE: tl.constexpr, HAS_INITIAL: tl.constexpr, ADJOINT: tl.constexpr):
    """In place: what leaves each chunk from zero becomes what enters it. Sequential over chunks, parallel over
    states."""
    pid = tl.program_id(0)
    block = pid % n_blocks
    k = ((pid // n_blocks) % K).to(tl.int64)
    b = (pid // (n_blocks * K)).to(tl.int64)
    e = (block * BE + tl.arange(0, BE)).to(tl.int64)
    n = tl.arange(0, NP)
    mask_e = e < E
    mask = mask_e[None, :] & (n < N)[:, None]
    a2 = tl.load(A + k * a_k + e[None, :] * a_e + n[:, None] * a_n, mask=mask, other=0.0).to(tl.float32) * LOG2E
    if HAS_INITIAL:
        h = tl.load(initial + b * i_b + k * i_k + e[None, :] * i_e + n[:, None] * i_n, mask=mask,
                    other=0.0).to(tl.float32)
    else:
        h = tl.zeros((NP, BE), tl.float32)
    for step in range(n_chunks):
        c = (n_chunks - 1 - step) if ADJOINT else step
        row = (b * K + k) * n_chunks + c
        at = ends + (row * N * E + (n[:, None] * h_n + e[None, :]))
        leaves = tl.load(at, mask=mask, other=0.0)
        length = tl.load(lengths + row * E + e, mask=mask_e, other=0.0)
        tl.store(at, h, mask=mask)
        h = tl.exp2(length[None, :] * a2) * h + leaves


@triton.jit
def _merge(parts, out, n_elements, n_parts, block, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n_elements
    total = tl.load(parts + at, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, n_parts):
        parts += n_elements
        total += tl.load(parts + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@_kernel('parts out')
def merge_parts(parts, out, n_elements, n_parts, BLOCK: tl.constexpr):
    """out = sum of n_parts arrays of n_elements each, added up in order, in float32."""
    _merge(parts, out, n_elements, n_parts, tl.program_id(0), BLOCK)


@_kernel('parts parts_B parts_C out out_B out_C')
def merge_three(parts, parts_B, parts_C, out, out_B, out_C, n_elements, n_B, n_C, n_parts, slots_B, slots_C,
                blocks, blocks_B, BLOCK: tl.constexpr):
    """`merge_parts` of up to three sets in one launch: what the backward does for every group of images."""
    pid = tl.program_id(0)
    if pid < blocks:
        _merge(parts, out, n_elements, n_parts, pid, BLOCK)
    elif pid < blocks + blocks_B:
        _merge(parts_B, out_B, n_B, slots_B, pid - blocks, BLOCK)
    else:
        _merge(parts_C, out_C, n_C, slots_C, pid - blocks - blocks_B, BLOCK)


@triton.jit
def _pick(values, s, T: tl.constexpr):
    """values[s] at run time. The adjoint's loop stays rolled: unrolled, ptxas hoists addresses until registers
    spill."""
    picked = values[0]
    for i in tl.static_range(1, T):
        picked = tl.where(s == i, values[i], picked)
    return picked


@triton.jit
def _over_channels(x):
    """Sum over the channels of one program: its threads' own, then 8 lanes, then its warps."""
    return tl.sum(tl.sum(tl.sum(x, axis=1, keep_dims=True), axis=4, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _over_states(x):
    return tl.sum(tl.sum(x, axis=0, keep_dims=True), axis=3, keep_dims=True)


@triton.jit
def _states_vector(pointer, offset, n, s_n, N, VECTOR: tl.constexpr, FULL_N: tl.constexpr):
    """`_vector` in the backward's layout, where a thread holds a few neighbouring states."""
    if VECTOR > 1:
        size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        at = tl.multiple_of(pointer + offset + n, (VECTOR * size, 1, 1, 1, 1))
        at = tl.max_contiguous(at, (VECTOR, 1, 1, 1, 1))
    else:
        at = pointer + offset + n * s_n
    if FULL_N:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def _steps(h, t, a2, shift, b_tile, u_p, d_p, b_p, e_u, e_d, n, mask_e, code, H, W, N, u_h, u_w, d_h, d_w, b_h, b_w,
           b_n,
           T: tl.constexpr, B_CONST: tl.constexpr, B_VECTOR: tl.constexpr, FULL_N: tl.constexpr, HAS_BIAS: tl.constexpr,
           SOFTPLUS: tl.constexpr, EVEN_E: tl.constexpr, INDEX64: tl.constexpr):
    """The states after T whole steps from t, in the backward's layout."""
    j_, i_ = _place(t, code, H, W, INDEX64)
    for _ in tl.static_range(T):
        h_, w_ = _natural(j_, i_, code, H, W)
        dt = _load(d_p + (h_ * d_h + w_ * d_w) + e_d, mask_e, EVEN_E).to(tl.float32)
        x = _load(u_p + (h_ * u_h + w_ * u_w) + e_u, mask_e, EVEN_E).to(tl.float32)
        if HAS_BIAS:
            dt += shift
        if SOFTPLUS:
            dt = _softplus(dt)
        if B_CONST:
            bt = b_tile
        else:
            bt = _states_vector(b_p, h_ * b_h + w_ * b_w, n, b_n, N, B_VECTOR, FULL_N)
        h = tl.exp2(dt * a2) * h + (dt * x) * bt
        j_, i_ = _next(j_, i_, True, code, H, W)
    return h


@_kernel('grad_out u delta A B C D z bias states end grad_u grad_delta grad_A grad_B grad_C grad_D grad_bias '
         'grad_z scratch acc')
def scan_backward(
        grad_out, u, delta, A, B, C, D, z, bias, states, end,
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_z, scratch, acc,
        E, N, H, W, L, pad, chunk, n_chunks, n_blocks, blocks_per_group, width, per_b, per_c, slots_b, slots_c,
        K, KS, codes, BB, n_batch, part_stride, part_b, part_c, n_saved, scratch_n, part_size,
        g_b, g_e, g_h, g_w, u_b, u_e, u_h, u_w, d_b, d_k, d_e, d_h, d_w, a_k, a_e, a_n,
        b_b, b_k, b_g, b_n, b_h, b_w, c_b, c_k, c_g, c_n, c_h, c_w, D_k, D_e, bias_k, bias_e, z_b, z_e, z_h, z_w, h_n,
        gu_b, gu_e, gu_h, gu_w, gd_b, gd_k, gd_e, gd_h, gd_w, gb_b, gb_k, gb_g, gb_n, gb_h, gb_w,
        gc_b, gc_k, gc_g, gc_n, gc_h, gc_w, gz_b, gz_e, gz_h, gz_w,
        KM: tl.constexpr, ONCE: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, CR: tl.constexpr, CW: tl.constexpr,
        CL: tl.constexpr, T: tl.constexpr, PART: tl.constexpr, SAVE: tl.constexpr,
        B_CONST: tl.constexpr, C_CONST: tl.constexpr, B_VECTOR: tl.constexpr, C_VECTOR: tl.constexpr,
        FULL_N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        HAS_END: tl.constexpr, UNIT_E: tl.constexpr, EVEN_E: tl.constexpr, INDEX64: tl.constexpr,
):
    """One program: BE = CR CW CL channels of one group, one chunk of scan time, BB images in turn, and of each image KM
    directions in turn, added up in `acc`: L BE float32 of the program's own, used again for every image, so that it
    need never leave the cache; ONCE says that all this is one turn. With KM = 1 and KS > 1 each direction writes its
    own float32 part of grad_u.

    Segments of SAVE steps, last one first. From the state saved at a segment's start: one pass forward that keeps, in
    the program's own scratch, the state before each part of PART steps; per part, last one first, one pass that keeps
    in registers the states before each group of T steps; per group, last one first, forward keeping all T states, then
    the adjoint.
    """
    pid = tl.program_id(0)
    k0 = pid % KS
    block = (pid // KS) % n_blocks
    c = (pid // (KS * n_blocks)) % n_chunks
    b_block = pid // (KS * n_blocks * n_chunks)
    group = block // blocks_per_group
    local = ((tl.arange(0, CR)[None, :, None, None, None] * CW + tl.arange(0, CW)[None, None, :, None, None]) * CL
             + tl.arange(0, CL)[None, None, None, None, :])
    lane = (block % blocks_per_group) * (CR * CW * CL) + local
    mask_e = lane < width
    e = group * width + lane
    n = tl.arange(0, NL)[None, None, None, :, None] * NR + tl.arange(0, NR)[:, None, None, None, None]
    GROUPS: tl.constexpr = PART // T
    groups = tl.arange(0, GROUPS)[:, None, None, None, None, None]
    if INDEX64:
        e = e.to(tl.int64)
        group = group.to(tl.int64)
        n = n.to(tl.int64)
    if UNIT_E:
        e_u, e_d, e_z, e_g, e_gu, e_gd, e_gz = e, e, e, e, e, e, e
    else:
        e_u, e_d, e_z, e_g, e_gu, e_gd, e_gz = e * u_e, e * d_e, e * z_e, e * g_e, e * gu_e, e * gd_e, e * gz_e
    mask_n = n < N
    tile_mask = mask_e & mask_n
    tile = n * scratch_n + local
    scratch_p = scratch + pid.to(tl.int64) * (SAVE // PART) * part_size
    t_first = tl.maximum(c * chunk - pad, 0)
    t_last = tl.minimum((c + 1) * chunk - pad, L)
    acc_p = acc + pid.to(tl.int64) * L * (CR * CW * CL)
    for turn in tl.range(0, 1 if ONCE else BB * KM, disable_licm=True):
        b_in = turn // KM
        kk = turn % KM
        k = (k0 + kk).to(tl.int64)
        code = (codes >> (2 * k0 + 2 * kk)) & 3
        b = (b_block * BB + b_in).to(tl.int64)
        # An image past the last one: no segment runs, and what is summed stays.
        live = b < n_batch
        a2 = tl.load(A + k * a_k + e * a_e + n * a_n, mask=tile_mask, other=0.0).to(tl.float32) * LOG2E
        if HAS_D:
            skip = tl.load(D + k * D_k + e * D_e, mask=mask_e, other=0.0).to(tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + k * bias_k + e * bias_e, mask=mask_e, other=0.0).to(tl.float32)
        else:
            shift = 0.0
        sum_A = tl.zeros((NR, CR, CW, NL, CL), tl.float32)
        sum_D = tl.zeros((1, CR, CW, 1, CL), tl.float32)
        sum_bias = tl.zeros((1, CR, CW, 1, CL), tl.float32)
        g_p = grad_out + b * g_b
        u_p = u + b * u_b
        d_p = delta + b * d_b + k * d_k
        b_p = B + b * b_b + k * b_k
        c_p = C + b * c_b + k * c_k
        gu_p = grad_u + b * gu_b + k0.to(tl.int64) * part_stride
        gd_p = grad_delta + b * gd_b + k * gd_k
        z_p = z + b * z_b
        gz_p = grad_z + b * gz_b
        if B_CONST:
            b_tile = tl.load(b_p + (e // per_b) * b_g + n * b_n, mask=tile_mask & live, other=0.0).to(tl.float32)
            sum_B = tl.zeros((NR, CR, CW, NL, CL), tl.float32)
        else:
            b_tile = 0.0
            b_p += ((group * width) // per_b) * b_g
            gb_p = (grad_B + (block % slots_b).to(tl.int64) * part_b
                    + b * gb_b + k * gb_k + ((group * width) // per_b) * gb_g)
        if C_CONST:
            c_tile = tl.load(c_p + (e // per_c) * c_g + n * c_n, mask=tile_mask & live, other=0.0).to(tl.float32)
            sum_C = tl.zeros((NR, CR, CW, NL, CL), tl.float32)
        else:
            c_p += ((group * width) // per_c) * c_g
            gc_p = (grad_C + (block % slots_c).to(tl.int64) * part_c
                    + b * gc_b + k * gc_k + ((group * width) // per_c) * gc_g)
        if HAS_END:
            carry = tl.load(end + (((b * K + k) * n_chunks + c) * N * E + (n * h_n + e)), mask=tile_mask & live,
                            other=0.0)
        else:
            carry = tl.zeros((NR, CR, CW, NL, CL), tl.float32)
        first_segment = (t_first + pad) // SAVE
        n_segments = tl.where(live, (t_last + pad - 1) // SAVE - first_segment + 1, 0)
        for back in tl.range(0, n_segments, disable_licm=True):
            segment = first_segment + n_segments - 1 - back
            t_0 = tl.maximum(segment * SAVE - pad, t_first)
            t_1 = tl.minimum((segment + 1) * SAVE - pad, t_last)
            n_groups = (t_1 - t_0 + T - 1) // T
            n_parts = (n_groups + GROUPS - 1) // GROUPS
            h = tl.load(states + (((b * K + k) * n_saved + segment - 1) * N * E + (n * h_n + e)),
                        mask=tile_mask & (segment > 0), other=0.0)
            for part in tl.range(0, n_parts - 1, disable_licm=True):
                tl.store(scratch_p + part * part_size + tile, h, mask=tile_mask)
                for g in tl.range(part * GROUPS, (part + 1) * GROUPS, disable_licm=True):
                    h = _steps(
                        h, t_0 + g * T, a2, shift, b_tile, u_p, d_p, b_p, e_u, e_d, n, mask_e, code, H, W, N, u_h, u_w,
                        d_h, d_w, b_h, b_w, b_n, T, B_CONST, B_VECTOR, FULL_N, HAS_BIAS, SOFTPLUS, EVEN_E, INDEX64)
            # The last part's state is at hand; the others are fetched from this program's scratch.
            tl.debug_barrier()
            for back_part in tl.range(0, n_parts, disable_licm=True):
                part = n_parts - 1 - back_part
                low = part * GROUPS
                high = tl.minimum(low + GROUPS, n_groups)
                if back_part > 0:
                    h = tl.load(scratch_p + part * part_size + tile, mask=tile_mask, other=0.0)
                starts = tl.where(groups == 0, h[None], 0.0)
                for g in tl.range(low, high - 1, disable_licm=True):
                    h = _steps(
                        h, t_0 + g * T, a2, shift, b_tile, u_p, d_p, b_p, e_u, e_d, n, mask_e, code, H, W, N, u_h, u_w,
                        d_h, d_w, b_h, b_w, b_n, T, B_CONST, B_VECTOR, FULL_N, HAS_BIAS, SOFTPLUS, EVEN_E, INDEX64)
                    starts = tl.where(groups == g + 1 - low, h[None], starts)
                for back_group in tl.range(0, high - low, disable_licm=True):
                    g = high - 1 - back_group
                    h = tl.sum(tl.where(groups == g - low, starts, 0.0), axis=0)
                    hs = ()
                    dts = ()
                    rows = ()
                    columns = ()
                    t = t_0 + g * T
                    j_, i_ = _place(t, code, H, W, INDEX64)
                    for s in tl.static_range(T):
                        valid = t + s < t_1
                        h_, w_ = _natural(j_, i_, code, H, W)
                        raw = _load(d_p + (h_ * d_h + w_ * d_w) + e_d, mask_e, EVEN_E).to(tl.float32)
                        x = _load(u_p + (h_ * u_h + w_ * u_w) + e_u, mask_e, EVEN_E).to(tl.float32)
                        if HAS_BIAS:
                            raw += shift
                        if SOFTPLUS:
                            dt = _softplus(raw)
                        else:
                            dt = raw
                        dt = tl.where(valid, dt, 0.0)
                        if B_CONST:
                            bt = b_tile
                        else:
                            bt = _states_vector(b_p, h_ * b_h + w_ * b_w, n, b_n, N, B_VECTOR, FULL_N)
                        hs = hs + (h,)
                        h = tl.exp2(dt * a2) * h + (dt * x) * bt
                        dts = dts + (dt,)
                        rows = rows + (h_,)
                        columns = columns + (w_,)
                        # As in the forward, what lies past the end is the last position again, with a step of zero.
                        j_, i_ = _next(j_, i_, t + s + 1 < t_1, code, H, W)
                    for back_step in tl.range(0, T, disable_licm=True):
                        step = T - 1 - back_step
                        h_ = _pick(rows, step, T)
                        w_ = _pick(columns, step, T)
                        dt = _pick(dts, step, T)
                        before = _pick(hs, step, T)
                        ok = t + step < t_1
                        # Read again, here and below: a register per step costs more than a hit in the first cache.
                        x = _load(u_p + (h_ * u_h + w_ * u_w) + e_u, mask_e, EVEN_E).to(tl.float32)
                        gy = _load(g_p + (h_ * g_h + w_ * g_w) + e_g, mask_e, EVEN_E).to(tl.float32)
                        gy = tl.where(ok, gy, 0.0)
                        if B_CONST:
                            bt = b_tile
                        else:
                            bt = _states_vector(b_p, h_ * b_h + w_ * b_w, n, b_n, N, B_VECTOR, FULL_N)
                        if C_CONST:
                            ct = c_tile
                        else:
                            ct = _states_vector(c_p, h_ * c_h + w_ * c_w, n, c_n, N, C_VECTOR, FULL_N)
                        if HAS_Z:
                            y = _over_states(h * ct)
                            if HAS_D:
                                y += skip * x
                            gate = _load(z_p + (h_ * z_h + w_ * z_w) + e_z, mask_e, EVEN_E).to(tl.float32)
                            half = _sigmoid(gate)
                            gz = gy * y * half * (1.0 + gate * (1.0 - half))
                            _store(gz_p + (h_ * gz_h + w_ * gz_w) + e_gz, gz, mask_e, EVEN_E)
                            gy = gy * gate * half
                        gh = carry + gy * ct
                        if C_CONST:
                            sum_C += gy * h
                        else:
                            _store(gc_p + (h_ * gc_h + w_ * gc_w) + n * gc_n, _over_channels(gy * h), mask_n, FULL_N)
                        if B_CONST:
                            sum_B += gh * (dt * x)
                        else:
                            _store(gb_p + (h_ * gb_h + w_ * gb_w) + n * gb_n, _over_channels(gh * (dt * x)), mask_n,
                                   FULL_N)
                        g_du = _over_states(gh * bt)
                        carry = tl.exp2(dt * a2) * gh
                        through = carry * before
                        sum_A += through * dt
                        g_dt = _over_states(through * a2) * LN2 + g_du * x
                        if SOFTPLUS:
                            # softplus'(x) = e^(x - softplus(x))
                            raw = _load(d_p + (h_ * d_h + w_ * d_w) + e_d, mask_e, EVEN_E).to(tl.float32)
                            if HAS_BIAS:
                                raw += shift
                            g_dt *= tl.exp2((raw - dt) * LOG2E)
                        gx = g_du * dt
                        if HAS_D:
                            gx += gy * skip
                            sum_D += gy * x
                        if HAS_BIAS:
                            sum_bias += tl.where(ok, g_dt, 0.0)
                        _store(gd_p + (h_ * gd_h + w_ * gd_w) + e_gd, g_dt, mask_e, EVEN_E)
                        at = h_ * gu_h + w_ * gu_w
                        if KM > 1:
                            acc_at = acc_p + (h_ * W + w_) * (CR * CW * CL) + local
                            gx += tl.load(acc_at, mask=mask_e & (kk > 0), other=0.0)
                            tl.store(acc_at, gx, mask=mask_e & (kk < KM - 1))
                            tl.store(gu_p + at + e_gu, gx.to(grad_u.dtype.element_ty), mask=mask_e & (kk == KM - 1))
                        else:
                            _store(gu_p + at + e_gu, gx, mask_e, EVEN_E)
                        h = before
        row = (b * n_chunks + c) * K + k
        if B_CONST:
            tl.store(grad_B + (row * N * E + (n * h_n + e)), sum_B, mask=tile_mask & live)
        if C_CONST:
            tl.store(grad_C + (row * N * E + (n * h_n + e)), sum_C, mask=tile_mask & live)
        # Added to what the program's earlier images left there.
        more = b_in > 0
        sums = (b_block.to(tl.int64) * n_chunks + c) * K + k
        at_A = grad_A + (sums * N * E + (n * h_n + e))
        tl.store(at_A, sum_A + tl.load(at_A, mask=tile_mask & more, other=0.0), mask=tile_mask)
        if HAS_D:
            at_D = grad_D + sums * E + e
            tl.store(at_D, sum_D + tl.load(at_D, mask=mask_e & more, other=0.0), mask=mask_e)
        if HAS_BIAS:
            at_bias = grad_bias + sums * E + e
            tl.store(at_bias, sum_bias + tl.load(at_bias, mask=mask_e & more, other=0.0), mask=mask_e)
        # The next turn reads what this one's threads wrote: `acc` and the sums.
        tl.debug_barrier()
