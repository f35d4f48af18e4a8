"""Triton kernels of the selective scan; `launch` plans and launches them, `docs/op.md` tells the algorithm.

A direction is never a copy: it is a walk (`_walk`) over the positions of the map, row-major indices, at which every
tensor is read with one stride. Direction code d: bit 0 is column-major, bit 1 reversed.

Every program is one warp, so that nothing waits at a barrier. Two layouts of the states, both Triton's own default for
the shape:
- Forward: (N, channels). The lanes run along the channels and all N states of a channel live in one thread's registers:
  y needs no shuffle, B_t and C_t are vector loads that every lane shares.
- Backward: (states per thread NR, channels per thread CR, lanes along the states NL, lanes along the channels CL). The
  gradients of B and C are sums over channels, those of u and delta sums over states: this way neither crosses many
  lanes.

Triton gives a load a layout of its own that follows what it knows of the addresses, and it spreads to everything that
the loaded tensor meets. So strides are run-time values on purpose, `_promised` tells Triton what fits the layouts
above, and addresses depend on the lane even where they are the same for all: else Triton forms them without the lanes,
and the promise is gone when it adds these again.
"""
import inspect

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def _kernel(tensors):
    """triton.jit that specialises on no integer, so that another batch or map size compiles nothing anew."""
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
def _rate(a):
    """a log2 e. -inf, a state that decays at once, becomes a number: its product with a gradient of 0 would be NaN."""
    return tl.where(a < -1e38, -1e38, a) * LOG2E


@triton.jit
def _walk(t, code, H, W):
    """A direction at its step t: (position, counter within a column, step of the position, its step to the next column,
    length of a column). A position is a row-major index into the map; row-major, the map is one column."""
    column = (code % 2) == 1
    sign = tl.where(code >= 2, -1, 1)
    length = tl.where(column, H, H * W)
    inner = tl.where(column, W, 1)
    i = t % length
    p = t // length + i * inner
    return tl.where(code >= 2, H * W - 1 - p, p), i, sign * inner, sign * (1 - (H - 1) * W), length


@triton.jit
def _next(p, i, more, step, jump, length):
    """Position and counter of the next step, or the same ones if there is none."""
    wrap = i + 1 == length
    p_next = p + tl.where(wrap, jump, step)
    return tl.where(more, p_next, p), tl.where(more, tl.where(wrap, 0, i + 1), i)


@triton.jit
def _at(p, stride, INDEX64: tl.constexpr):
    """Offset of position p. In 32 bits, where a map's extent allows it, it costs half of the instructions."""
    if INDEX64:
        return p.to(tl.int64) * stride
    else:
        return p * stride


@triton.jit
def _promised(pointers, offset, VECTOR: tl.constexpr, AXIS: tl.constexpr):
    """pointers + offset. VECTOR > 1: along AXIS, which lies in a thread's registers, they have unit stride within
    groups of that many, aligned to their size.

    Triton spreads the axes over the lanes in the order of what is known of them, and 3.6 and 3.8 differ where nothing
    is known. So the axes that are meant for the lanes get a promise too, the last one the greatest but for AXIS'. It is
    no access that is built on these: the alignment of an access allows VECTOR along AXIS, and one along a lane's axis.
    """
    at = pointers + offset  # here: a promise of an argument would be lost when the function is inlined
    size: tl.constexpr = VECTOR * pointers.dtype.element_ty.primitive_bitwidth // 8
    if len(at.shape) == 3:
        at = tl.max_contiguous(tl.multiple_of(at, (size, 1, 1)), (VECTOR, 1, 2))
    elif VECTOR == 1:
        at = tl.max_contiguous(tl.multiple_of(at, (1, 1, 1, 1)), (1, 1, 2, 4))
    elif AXIS == 0:
        at = tl.max_contiguous(tl.multiple_of(at, (size, 1, 1, 1)), (8, 1, 2, 4))
    else:
        at = tl.max_contiguous(tl.multiple_of(at, (1, size, 1, 1)), (1, 8, 2, 4))
    return at


@triton.jit
def _load(pointers, offset, mask=None, VECTOR: tl.constexpr = 1, AXIS: tl.constexpr = 0):
    """Values in float32, 0 where there is a mask that is not set."""
    at = _promised(pointers, offset, VECTOR, AXIS)
    if mask is None:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, offset, value, mask, VECTOR: tl.constexpr = 1, AXIS: tl.constexpr = 0):
    tl.store(_promised(pointers, offset, VECTOR, AXIS), value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _step_size(raw, shift, SOFTPLUS: tl.constexpr):
    if SOFTPLUS:
        return _softplus(raw + shift)
    else:
        return raw + shift


@_kernel('u delta A B C D z bias start acc out last states')
def scan_forward(
        u, delta, A, B, C, D, z, bias, start, acc, out, last, states,
        E, N, H, W, L, chunk, n_chunks, n_blocks, blocks_per_group, width, per_b, per_c, K, KS, codes, part, n_saved,
        u_b, u_e, u_l, d_b, d_k, d_e, d_l, a_k, a_e, a_n,
        b_b, b_k, b_g, b_n, b_l, c_b, c_k, c_g, c_n, c_l,
        D_k, D_e, bias_k, bias_e, z_b, z_e, z_l, o_b, o_e, o_l,
        KM: tl.constexpr, NV: tl.constexpr, NQ: tl.constexpr, BE: tl.constexpr, T: tl.constexpr, SAVE: tl.constexpr,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        HAS_START: tl.constexpr, WANT_LAST: tl.constexpr, SAVE_STATES: tl.constexpr, FULL_N: tl.constexpr,
        INDEX64: tl.constexpr,
):
    """One program: one image, BE channels of one group, one chunk of scan time, and KM directions one after the other.

    With KM > 1 the directions are added up in `acc`, float32 with the strides of `out`, and the last one writes `out`.
    With KM = 1 and KS > 1 each direction writes its own float32 part of `out`.
    """
    pid = tl.program_id(0)
    k0 = pid % KS  # the directions of a block side by side: they read the same map at about the same time
    block = (pid // KS) % n_blocks
    c = (pid // (KS * n_blocks)) % n_chunks
    b = (pid // (KS * n_blocks * n_chunks)).to(tl.int64)
    group = block // blocks_per_group
    lane = (block % blocks_per_group) * BE + tl.arange(0, BE)[None, None, :]
    mask_e = lane < width
    e = group * width + tl.minimum(lane, width - 1)  # lanes without a channel read the last one and write nothing
    n = tl.arange(0, NQ)[None, :, None] * NV + tl.arange(0, NV)[:, None, None] + 0 * lane
    mask = mask_e & (n < N)
    mask_n = None if FULL_N else n < N
    t_first = c * chunk
    t_last = tl.minimum(t_first + chunk, L)
    # A lane's offsets (_o), 32 bits where they can be, stay apart from the pointers (_p), which all lanes share: this
    # takes half of the registers.
    u_p, u_o = u + b * u_b, _at(e, u_e, INDEX64)
    z_p, z_o = z + b * z_b, _at(e, z_e, INDEX64)
    acc_p, o_o = acc + b * o_b, _at(e, o_e, INDEX64)
    out_p = out + b * o_b + k0.to(tl.int64) * part
    if SAVE_STATES:
        tl.store(states + tl.arange(0, 4), tl.zeros((4,), tl.float32))  # see `launch.states_shape`
    for kk in tl.range(0, KM, disable_licm=True):
        k = (k0 + kk).to(tl.int64)
        code = (codes >> (2 * k0 + 2 * kk)) & 3
        d_p, d_o = delta + b * d_b + k * d_k, _at(e, d_e, INDEX64)
        b_p = B + b * b_b + k * b_k + (e // per_b).to(tl.int64) * b_g + n.to(tl.int64) * b_n
        c_p = C + b * c_b + k * c_k + (e // per_c).to(tl.int64) * c_g + n.to(tl.int64) * c_n
        a2 = _rate(_load(A + k * a_k, e * a_e + n * a_n, mask))
        skip = 0.0
        shift = 0.0
        if HAS_D:
            skip = _load(D + k * D_k, e * D_e)
        if HAS_BIAS:
            shift = _load(bias + k * bias_k, e * bias_e)
        if HAS_START:
            h = _load(start + ((b * K + k) * n_chunks + c) * N * E, n * E + e, mask)
        else:
            h = tl.zeros((NV, NQ, BE), tl.float32)
        p, i, step, jump, length = _walk(t_first, code, H, W)
        for t in range(t_first, t_last, T):
            if SAVE_STATES:
                if (t % SAVE == 0) & (t > 0):  # the state at t = 0 is zero
                    _store(states + 4 + ((b * K + k) * n_saved + t // SAVE - 1) * N * E, n * E + e, h, mask)
            # All loads of T steps first. Past the end the last position is read, computed with a step of zero and
            # written again: the same values, and no mask to carry.
            us, ds, zs, olds = (), (), (), ()
            b_at, c_at, o_at = (), (), ()
            for s in tl.static_range(T):
                us = us + (_load(u_p, u_o + _at(p, u_l, INDEX64)),)
                ds = ds + (_load(d_p, d_o + _at(p, d_l, INDEX64)),)
                o_at = o_at + (o_o + _at(p, o_l, INDEX64),)
                if HAS_Z:
                    zs = zs + (_load(z_p, z_o + _at(p, z_l, INDEX64)),)
                if KM > 1:
                    olds = olds + (_load(acc_p, o_at[s], mask_e & (kk > 0)),)
                b_at = b_at + (_at(p, b_l, INDEX64),)
                c_at = c_at + (_at(p, c_l, INDEX64),)
                p, i = _next(p, i, t + s + 1 < L, step, jump, length)
            ys = ()
            for s in tl.static_range(T):
                dt = tl.where(t + s < L, _step_size(ds[s], shift, SOFTPLUS), 0.0)  # an empty step: decay 1, adds 0
                h = tl.exp2(dt * a2) * h + (dt * us[s]) * _load(b_p, b_at[s], mask_n, NV)
                y = h * _load(c_p, c_at[s], mask_n, NV)
                y = tl.sum(tl.sum(y, axis=0, keep_dims=True), axis=1, keep_dims=True)
                if HAS_D:
                    y += skip * us[s]
                ys = ys + (y,)
            for s in tl.static_range(T):
                y = ys[s]
                if KM > 1:
                    y += olds[s]
                    _store(acc_p, o_at[s], y, mask_e & (kk < KM - 1))
                if HAS_Z:
                    y *= zs[s] * _sigmoid(zs[s])
                _store(out_p, o_at[s], y, mask_e & (kk == KM - 1))
        if WANT_LAST:
            if c == n_chunks - 1:
                _store(last + (b * K + k) * E * N, e * N + n, h, mask)
        if KM > 1:
            tl.debug_barrier()  # the next direction reads what this one wrote to `acc`


@_kernel('x delta A B z bias ends lengths')
def chunk_summary(
        x, delta, A, B, z, bias, ends, lengths,
        E, N, H, W, L, chunk, n_chunks, n_blocks, blocks_per_group, width, per_b, K, codes,
        x_b, x_e, x_l, d_b, d_k, d_e, d_l, a_k, a_e, a_n, b_b, b_k, b_g, b_n, b_l, bias_k, bias_e,
        z_b, z_e, z_l,
        NV: tl.constexpr, NQ: tl.constexpr, BE: tl.constexpr, T: tl.constexpr,
        HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr,
        FULL_N: tl.constexpr, INDEX64: tl.constexpr,
):
    """What one chunk does to a state that enters it: the state that leaves it from zero, and its sum of step sizes.

    ADJOINT runs the recurrence of the gradient, backward in scan time: s = decay (s + x C), with x = grad_out (times
    silu(z)) and B = C.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    c = (pid // n_blocks) % n_chunks
    k = ((pid // (n_blocks * n_chunks)) % K).to(tl.int64)
    code = (codes >> (2 * k)) & 3
    b = (pid // (n_blocks * n_chunks * K)).to(tl.int64)
    group = (block // blocks_per_group).to(tl.int64)
    lane = (block % blocks_per_group) * BE + tl.arange(0, BE)[None, None, :]
    mask_e = lane < width
    e = group * width + tl.minimum(lane, width - 1)  # lanes without a channel read the last one and write nothing
    n = (tl.arange(0, NQ)[None, :, None] * NV + tl.arange(0, NV)[:, None, None] + 0 * lane).to(tl.int64)
    mask = mask_e & (n < N)
    mask_n = None if FULL_N else n < N
    x_p = x + b * x_b + e * x_e
    d_p = delta + b * d_b + k * d_k + e * d_e
    z_p = z + b * z_b + e * z_e
    b_p = B + b * b_b + k * b_k + (e // per_b) * b_g + n * b_n
    a2 = _rate(_load(A + k * a_k, e * a_e + n * a_n, mask))
    shift = 0.0
    if HAS_BIAS:
        shift = _load(bias + k * bias_k, e * bias_e)
    t_first = c * chunk
    t_last = tl.minimum(t_first + chunk, L)
    h = tl.zeros((NV, NQ, BE), tl.float32)
    total = tl.zeros((1, 1, BE), tl.float32)
    for t in range(0, t_last - t_first, T):
        for s in tl.static_range(T):
            ok = t_first + t + s < t_last
            at = tl.minimum(t_first + t + s, t_last - 1)
            if ADJOINT:
                at = t_first + t_last - 1 - at
            p, _, _, _, _ = _walk(at, code, H, W)
            v = _load(x_p, _at(p, x_l, INDEX64))
            dt = tl.where(ok, _step_size(_load(d_p, _at(p, d_l, INDEX64)), shift, SOFTPLUS), 0.0)
            if HAS_Z:
                gate = _load(z_p, _at(p, z_l, INDEX64))
                v *= gate * _sigmoid(gate)
            bt = _load(b_p, _at(p, b_l, INDEX64), mask_n, NV)
            total += dt
            decay = tl.exp2(dt * a2)
            if ADJOINT:  # a step of zero does not keep x out of the sum
                h = decay * (h + tl.where(ok, v, 0.0) * bt)
            else:
                h = decay * h + (dt * v) * bt
    row = (b * K + k) * n_chunks + c
    _store(ends + row * N * E, n * E + e, h, mask)
    _store(lengths + row * E, e, total, mask_e)


@_kernel('ends lengths A initial')
def chunk_carry(ends, lengths, A, initial, E, N, n_chunks, n_blocks, K, a_k, a_e, a_n, i_b, i_k, i_e, i_n,
                NP: tl.constexpr, BE: tl.constexpr, HAS_INITIAL: tl.constexpr, ADJOINT: tl.constexpr):
    """In place: what leaves each chunk from zero becomes what enters it. Sequential over chunks, parallel over
    states."""
    pid = tl.program_id(0)
    k = ((pid // n_blocks) % K).to(tl.int64)
    b = (pid // (n_blocks * K)).to(tl.int64)
    e = ((pid % n_blocks) * BE + tl.arange(0, BE)[None, None, :]).to(tl.int64)
    n = tl.arange(0, NP)[None, :, None].to(tl.int64)
    mask_e = e < E
    mask = mask_e & (n < N)
    a2 = _rate(_load(A + k * a_k, e * a_e + n * a_n, mask))
    if HAS_INITIAL:
        h = _load(initial + b * i_b + k * i_k, e * i_e + n * i_n, mask)
    else:
        h = tl.zeros((1, NP, BE), tl.float32)
    for step in range(n_chunks):
        c = (n_chunks - 1 - step) if ADJOINT else step
        row = (b * K + k) * n_chunks + c
        leaves = _load(ends + row * N * E, n * E + e, mask)
        duration = _load(lengths + row * E, e, mask_e)
        _store(ends + row * N * E, n * E + e, h, mask)
        h = tl.exp2(duration * a2) * h + leaves


@triton.jit
def _lanes(pointer, group, of_group, n, of_n, VECTOR: tl.constexpr, INDEX64: tl.constexpr):
    """Pointer and offsets of the states n of B or C, or of their gradients, of which one access takes VECTOR; added up
    where each has an address of its own, which saves instructions."""
    offset = _at(group, of_group, INDEX64) + _at(n, of_n, INDEX64)
    if VECTOR == 1:
        return pointer + offset, 0
    else:
        return pointer, offset


@triton.jit
def _over_channels(x):
    return tl.broadcast_to(tl.sum(tl.sum(x, axis=1, keep_dims=True), axis=3, keep_dims=True),
                           (x.shape[0], 1, x.shape[2], x.shape[3]))


@triton.jit
def _over_states(x):
    return tl.broadcast_to(tl.sum(tl.sum(x, axis=0, keep_dims=True), axis=2, keep_dims=True),
                           (1, x.shape[1], x.shape[2], x.shape[3]))


@_kernel('grad_out u delta A B C D z bias states end grad_u grad_delta grad_A grad_B grad_C grad_D grad_bias grad_z '
         'acc')
def scan_backward(
        grad_out, u, delta, A, B, C, D, z, bias, states, end,
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_z, acc,
        E, N, H, W, L, chunk, n_chunks, n_blocks, blocks_per_group, width, per_b, per_c, slots_b, slots_c,
        K, KS, codes, part, part_b, part_c, n_saved,
        g_b, g_e, g_l, u_b, u_e, u_l, d_b, d_k, d_e, d_l, a_k, a_e, a_n,
        b_b, b_k, b_g, b_n, b_l, c_b, c_k, c_g, c_n, c_l, D_k, D_e, bias_k, bias_e, z_b, z_e, z_l,
        gu_b, gu_e, gu_l, gd_b, gd_k, gd_e, gd_l, gb_b, gb_k, gb_g, gb_n, gb_l,
        gc_b, gc_k, gc_g, gc_n, gc_l, gz_b, gz_e, gz_l,
        KM: tl.constexpr, NR: tl.constexpr, CR: tl.constexpr, NL: tl.constexpr, CL: tl.constexpr, T: tl.constexpr,
        SAVE: tl.constexpr, B_CONST: tl.constexpr, C_CONST: tl.constexpr, B_VECTOR: tl.constexpr,
        C_VECTOR: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
        SOFTPLUS: tl.constexpr, HAS_END: tl.constexpr, FULL_N: tl.constexpr,
        GB_VECTOR: tl.constexpr, GC_VECTOR: tl.constexpr, INDEX64: tl.constexpr,
):
    """One program: one image, CR CL channels of one group, one chunk of scan time, and KM directions one after the
    other, added up in `acc`, float32 with the strides of grad_u. With KM = 1 and KS > 1 each direction writes its own
    float32 part of grad_u.

    Groups of T steps, last one first: from the state that the forward saved at most SAVE - T steps earlier the states
    of the group are found and kept in registers, then the adjoint runs back over them.
    """
    pid = tl.program_id(0)
    k0 = pid % KS
    block = (pid // KS) % n_blocks
    c = (pid // (KS * n_blocks)) % n_chunks
    b = (pid // (KS * n_blocks * n_chunks)).to(tl.uint32).to(tl.int64)  # unsigned: its upper half is no register
    group = block // blocks_per_group
    # Everything is given to all lanes of the warp, or Triton would find other layouts for what has no states and what
    # has no channels.
    nl = tl.arange(0, NL)[None, None, :, None]
    cl = tl.arange(0, CL)[None, None, None, :]
    first = (block % blocks_per_group) * (CR * CL) + cl * CR  # a thread's first channel
    lane = first + tl.arange(0, CR)[None, :, None, None] + 0 * nl
    e = group * width + tl.minimum(lane, width - 1)  # lanes without a channel read the last one and write nothing
    e_first = group * width + tl.minimum(first, width - 1)
    n = nl * NR + tl.arange(0, NR)[:, None, None, None] + 0 * cl
    mask_e = lane < width
    mask_n = None if FULL_N else n < N
    mask = mask_e & (n < N)
    # Masks that differ within a vector would split it.
    mask_h = (mask_e if CR == 1 else lane >= 0) & (n < N)
    once_e = (nl == 0) & (mask_e if CR == 1 else lane >= 0)
    once_n = (cl == 0) & (n >= 0 if FULL_N else n < N)
    t_first = c * chunk
    t_last = tl.minimum(t_first + chunk, L)
    g_p, g_o = grad_out + b * g_b, _at(e, g_e, INDEX64)
    u_p, u_o = u + b * u_b, _at(e, u_e, INDEX64)
    z_p, z_o = z + b * z_b, _at(e, z_e, INDEX64)
    gz_p, gz_o = grad_z + b * gz_b, _at(e, gz_e, INDEX64)
    acc_p = acc + b * gu_b
    gu_p, gu_o = grad_u + b * gu_b + k0.to(tl.int64) * part, _at(e, gu_e, INDEX64)
    d_o, gd_o = _at(e, d_e, INDEX64), _at(e, gd_e, INDEX64)
    group_b, group_c = e_first // per_b, e_first // per_c
    for kk in tl.range(0, KM, disable_licm=True):
        k = (k0 + kk).to(tl.int64)
        code = (codes >> (2 * k0 + 2 * kk)) & 3
        a2 = _rate(_load(A + k * a_k, e * a_e + n * a_n, mask))
        skip = 0.0
        shift = 0.0
        if HAS_D:
            skip = _load(D + k * D_k, e * D_e, None, CR, 1)
        if HAS_BIAS:
            shift = _load(bias + k * bias_k, e * bias_e, None, CR, 1)
        sum_A = tl.zeros((NR, CR, NL, CL), tl.float32)
        sum_D = tl.zeros((1, CR, NL, CL), tl.float32)
        sum_bias = tl.zeros((1, CR, NL, CL), tl.float32)
        d_p = delta + b * d_b + k * d_k
        gd_p = grad_delta + b * gd_b + k * gd_k
        b_p, b_o = _lanes(B + b * b_b + k * b_k, group_b, b_g, n, b_n, B_VECTOR, INDEX64)
        c_p, c_o = _lanes(C + b * c_b + k * c_k, group_c, c_g, n, c_n, C_VECTOR, INDEX64)
        gb_p = grad_B + (block % slots_b).to(tl.int64) * part_b + b * gb_b + k * gb_k
        gb_p, gb_o = _lanes(gb_p, group_b, gb_g, n, gb_n, GB_VECTOR, INDEX64)
        gc_p = grad_C + (block % slots_c).to(tl.int64) * part_c + b * gc_b + k * gc_k
        gc_o = _at(group_c, gc_g, INDEX64) + _at(n, gc_n, INDEX64)  # added up, this one would make registers spill
        if B_CONST:
            sum_B = tl.zeros((NR, CR, NL, CL), tl.float32)
        if C_CONST:
            sum_C = tl.zeros((NR, CR, NL, CL), tl.float32)
        if HAS_END:
            carry = _load(end + ((b * K + k) * n_chunks + c) * N * E, n * E + e, mask)
        else:
            carry = tl.zeros((NR, CR, NL, CL), tl.float32)
        n_groups = (t_last - t_first + T - 1) // T
        for back in tl.range(0, n_groups, disable_licm=True):
            t = t_first + (n_groups - 1 - back) * T
            segment = t // SAVE
            h = _load(states + 4 + ((b * K + k) * n_saved + segment - 1) * N * E, n * E + e, mask_h & (segment > 0),
                      CR, 1)
            p, i, step, jump, length = _walk(segment * SAVE, code, H, W)
            if SAVE > T:
                for _ in tl.range(segment * SAVE, t, disable_licm=True):
                    dt = _step_size(_load(d_p, d_o + _at(p, d_l, INDEX64), None, CR, 1), shift, SOFTPLUS)
                    x = _load(u_p, u_o + _at(p, u_l, INDEX64), None, CR, 1)
                    bt = _load(b_p, b_o + _at(p, b_l, INDEX64), mask_n, B_VECTOR)
                    h = tl.exp2(dt * a2) * h + (dt * x) * bt
                    p, i = _next(p, i, True, step, jump, length)
            hs = (h,)
            # Read once: u and delta take no more registers than their addresses would. B_t is read twice.
            xs = ()
            raws = ()
            dts = ()
            ps = ()
            for s in tl.static_range(T):
                x = _load(u_p, u_o + _at(p, u_l, INDEX64), None, CR, 1)
                raw = _load(d_p, d_o + _at(p, d_l, INDEX64), None, CR, 1) + shift
                dt = tl.where(t + s < t_last, _softplus(raw) if SOFTPLUS else raw, 0.0)
                bt = _load(b_p, b_o + _at(p, b_l, INDEX64), mask_n, B_VECTOR)
                # + 0.0: or this decay and the same one below would be one value, held in registers in between
                h = tl.exp2(dt * a2 + 0.0) * h + (dt * x) * bt
                hs = hs + (h,)
                xs = xs + (x,)
                raws = raws + (raw,)
                dts = dts + (dt,)
                ps = ps + (p,)
                # As in the forward, what lies past the end is the last position again, with a step of zero.
                p, i = _next(p, i, t + s + 1 < t_last, step, jump, length)
            for s in tl.static_range(T - 1, -1, -1):
                p, x, dt = ps[s], xs[s], dts[s]
                gy = _load(g_p, g_o + _at(p, g_l, INDEX64), None, CR, 1)
                gy = tl.where((mask_e if CR == 1 else True) & (t + s < t_last), gy, 0.0)
                bt = _load(b_p, b_o + _at(p, b_l, INDEX64), mask_n, B_VECTOR)
                ct = _load(c_p, c_o + _at(p, c_l, INDEX64), mask_n, C_VECTOR)
                if KM > 1:
                    old = _load(acc_p, gu_o + _at(p, gu_l, INDEX64), kk > 0, CR, 1)
                if HAS_Z:
                    y = _over_states(hs[s + 1] * ct)
                    if HAS_D:
                        y += skip * x
                    gate = _load(z_p, z_o + _at(p, z_l, INDEX64), None, CR, 1)
                    half = _sigmoid(gate)
                    g_gate = gy * y * half * (1.0 + gate * (1.0 - half))
                    _store(gz_p, gz_o + _at(p, gz_l, INDEX64), g_gate, once_e, CR, 1)
                    gy = gy * gate * half
                gh = carry + gy * ct
                g_du = _over_states(gh * bt)
                carry = tl.exp2(dt * a2) * gh
                through = carry * hs[s]
                g_dt = _over_states(through * a2) * LN2 + g_du * x
                sum_A += through * dt
                if C_CONST:
                    sum_C += gy * hs[s + 1]
                else:
                    _store(gc_p, gc_o + _at(p, gc_l, INDEX64), _over_channels(gy * hs[s + 1]), once_n, GC_VECTOR)
                if B_CONST:
                    sum_B += gh * (dt * x)
                else:
                    _store(gb_p, gb_o + _at(p, gb_l, INDEX64), _over_channels(gh * (dt * x)), once_n, GB_VECTOR)
                if SOFTPLUS:
                    g_dt *= tl.exp2((raws[s] - dt) * LOG2E)  # softplus'(x) = e^(x - softplus(x))
                if HAS_BIAS:
                    sum_bias += tl.where(t + s < t_last, g_dt, 0.0)
                _store(gd_p, gd_o + _at(p, gd_l, INDEX64), g_dt, once_e, CR, 1)
                gx = g_du * dt
                if HAS_D:
                    gx += gy * skip
                    sum_D += gy * x
                if KM > 1:
                    gx += old
                    _store(acc_p, gu_o + _at(p, gu_l, INDEX64), gx, once_e & (kk < KM - 1), CR, 1)
                _store(gu_p, gu_o + _at(p, gu_l, INDEX64), gx, once_e & (kk == KM - 1), CR, 1)
        row = (b * n_chunks + c) * K + k
        _store(grad_A + row * E * N, e * N + n, sum_A, mask)
        if B_CONST:
            _store(grad_B + row * N * E, n * E + e, sum_B, mask)
        if C_CONST:
            _store(grad_C + row * N * E, n * E + e, sum_C, mask)
        if HAS_D:
            _store(grad_D + row * E, e, sum_D, once_e)
        if HAS_BIAS:
            _store(grad_bias + row * E, e, sum_bias, once_e)
        if KM > 1:
            tl.debug_barrier()  # the next direction reads what this one wrote to `acc`


@triton.jit
def _add_up(parts, out, n, count, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + row.to(tl.int64) * n + column, mask=(row < count) & (column < n), other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < n)


@_kernel('p0 p1 p2 p3 p4 p5 o0 o1 o2 o3 o4 o5')
def add_up(p0, p1, p2, p3, p4, p5, o0, o1, o2, o3, o4, o5, n0, n1, n2, n3, n4, n5, c0, c1, c2, c3, c4, c5,
           b0, b1, b2, b3, b4, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Six sums in one launch: o = the sum over c float32 arrays of n elements each, in a fixed order. b0 .. b4 are the
    first blocks of sums 1 to 5."""
    pid = tl.program_id(0)
    if pid < b0:
        _add_up(p0, o0, n0, c0, pid, 1, ROWS * COLUMNS)
    elif pid < b1:
        _add_up(p1, o1, n1, c1, pid - b0, 1, ROWS * COLUMNS)
    elif pid < b2:
        _add_up(p2, o2, n2, c2, pid - b1, 1, ROWS * COLUMNS)
    elif pid < b3:
        _add_up(p3, o3, n3, c3, pid - b2, ROWS, COLUMNS)
    elif pid < b4:
        _add_up(p4, o4, n4, c4, pid - b3, ROWS, COLUMNS)
    else:
        _add_up(p5, o5, n5, c5, pid - b4, ROWS, COLUMNS)
