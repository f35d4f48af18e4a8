"""Sixteen-lane float32 vectors for Numba, on raw addresses.

Numba vectorises loops when LLVM can prove enough about them, and the scan's recurrence gives it little to prove. These
intrinsics emit LLVM's vector type instead, which every target splits into the registers that it has (one on AVX-512,
two on AVX2, four on NEON). Addresses are int64, offsets are bytes: no array objects, no bounds, no reference counts.
"""
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
VBYTES = 4 * LANES

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VEC, _VEC_I32 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_VEC_I16, _VEC_F16 = ir.VectorType(_I16, LANES), ir.VectorType(ir.HalfType(), LANES)

# dtype codes of tensors in memory
F32, BF16, F16 = 0, 1, 2


class _Vector(types.Type):
    def __init__(self):
        super().__init__(name='float32x16')


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _VEC)


def _splat(value, ty=_VEC):
    return ir.Constant(ty, [value] * LANES)


def _pointer(builder, address, ty):
    return builder.inttoptr(address, ty.as_pointer())


def _load(builder, address, ty, align):
    return builder.load(_pointer(builder, address, ty), align=align)


def _store(builder, value, address, align):
    builder.store(value, _pointer(builder, address, value.type), align=align)


def _call(builder, name, ty, *args, **kwargs):
    fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ty, [a.type for a in args]), name)
    return builder.call(fn, args, **kwargs)


def _fma(builder, a, b, c):
    # fuses where the target has the instruction; elsewhere a product and a sum, not a call of libm
    return _call(builder, 'llvm.fmuladd.v16f32', _VEC, a, b, c)


def _broadcast(builder, scalar):
    undefined = ir.Constant(_VEC, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_VEC_I32, [0] * LANES))


def _has_avx512(context) -> bool:
    """Whether Numba compiles for AVX-512: the last part of what it keys its cache with lists the target's features."""
    return '+avx512f' in context.codegen().magic_tuple()[-1].split(',')


def _clamp(builder, x, low=None, high=None):
    """x within bounds; NaN passes."""
    for bound, compare in ((low, '<'), (high, '>')):
        if bound is not None:
            limit = _splat(bound)
            x = builder.select(builder.fcmp_ordered(compare, x, limit), limit, x)
    return x


def _exp2(context, builder, x):
    """2^x; relative error < 2e-7, and the error vanishes with x: a decay exp(dt A) close to 1 keeps its rate.

    x is rounded to a multiple t of a power of two, and f = x - t goes into a polynomial 1 + f q(f). With AVX-512 t is a
    multiple of 1/16, 2^t comes from a table in a register and the instruction that scales by powers of two, and q is
    of degree 2; elsewhere t is an integer, shifted into the exponent, and q is of degree 4.
    """
    if _has_avx512(context):
        magic = _splat(1.5 * 2.0 ** 19)  # adding it leaves x, in 1/16, in the low bits
        shifted = builder.fadd(x, magic)
        t = builder.fsub(shifted, magic)
        f = builder.fsub(x, t)
        table = ir.Constant(_VEC, [2.0 ** (j / LANES) for j in range(LANES)])
        power = _call(builder, 'llvm.x86.avx512.permvar.sf.512', _VEC, table, builder.bitcast(shifted, _VEC_I32))
        power = _call(builder, 'llvm.x86.avx512.mask.scalef.ps.512', _VEC, power, t, power, ir.Constant(_I16, -1),
                      ir.Constant(_I32, 4))  # all lanes, rounded as usual; scales by 2^floor(t)
        q = _fma(builder, f, _splat(0.05550410866482158), _splat(0.24022650695910072))
        q = _fma(builder, f, q, _splat(0.6931471805599453))
        return _fma(builder, power, builder.fmul(f, q), power)
    x = _clamp(builder, x, -126.0, 127.99999)  # what the exponent of a float32 holds
    magic = _splat(12582912.0)  # 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    shifted = builder.fadd(x, magic)
    f = builder.fsub(x, builder.fsub(shifted, magic))
    p = _splat(0.001326472731307149)
    for c in (0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0):
        p = _fma(builder, p, f, _splat(c))
    exponent = builder.shl(builder.bitcast(shifted, _VEC_I32), _splat(23, _VEC_I32))
    return builder.bitcast(builder.add(builder.bitcast(p, _VEC_I32), exponent), _VEC)


def _exp2_nonpositive(context, builder, x):
    """2^x for x <= 0; -inf, as a step size of 0 before the softplus, is taken for -126."""
    return _exp2(context, builder, _clamp(builder, x, -126.0) if _has_avx512(context) else x)


def _log1p(builder, e):
    """log(1 + e) for 0 <= e <= 1 as e q(e), without a division: relative error < 5e-7, for the smallest e too.

    The even and the odd powers in two chains: what bounds the softplus is the length of its chain, not its operations.
    """
    square = builder.fmul(e, e)
    even, odd = _splat(0.04408963397145271), _splat(-0.00853920727968216)
    for c, d in ((0.1774524301290512, -0.10768172889947891), (0.33275479078292847, -0.2449546456336975),
                 (0.9999998211860657, -0.4999740421772003)):
        even, odd = _fma(builder, even, square, _splat(c)), _fma(builder, odd, square, _splat(d))
    return builder.fmul(e, _fma(builder, odd, e, even))


def _binary(emit):
    @intrinsic
    def op(typingctx, a, b):
        return vector(vector, vector), lambda context, builder, sig, args: emit(builder, *args)
    return op


def _unary(emit):
    @intrinsic
    def op(typingctx, a):
        return vector(vector), lambda context, builder, sig, args: emit(builder, *args)
    return op


vadd = _binary(lambda builder, a, b: builder.fadd(a, b))
vsub = _binary(lambda builder, a, b: builder.fsub(a, b))
vmul = _binary(lambda builder, a, b: builder.fmul(a, b))
vdiv = _binary(lambda builder, a, b: builder.fdiv(a, b))
vmax = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered('>', a, b), a, b))
vlog1p = _unary(_log1p)
vabs = _unary(lambda builder, a: _call(builder, 'llvm.fabs.v16f32', _VEC, a))


@intrinsic
def vexp2(typingctx, x):
    """2^x"""
    return vector(vector), lambda context, builder, sig, args: _exp2(context, builder, *args)


@intrinsic
def vexp2_nonpositive(typingctx, x):
    """2^x for x <= 0"""
    return vector(vector), lambda context, builder, sig, args: _exp2_nonpositive(context, builder, *args)


@intrinsic
def vfma(typingctx, a, b, c):
    """a * b + c"""
    return vector(vector, vector, vector), lambda context, builder, sig, args: _fma(builder, *args)


@intrinsic
def vselect_negative(typingctx, x, a, b):
    """a where x < 0, else b"""
    def codegen(context, builder, sig, args):
        x, a, b = args
        return builder.select(builder.fcmp_ordered('<', x, _splat(0.0)), a, b)
    return vector(vector, vector, vector), codegen


@intrinsic
def vset(typingctx, x):
    """A scalar in every lane."""
    return vector(types.float32), lambda context, builder, sig, args: _broadcast(builder, args[0])


@intrinsic
def vsum(typingctx, a):
    """Sum of the lanes, as a tree."""
    def codegen(context, builder, sig, args):
        return _call(builder, 'llvm.vector.reduce.fadd.v16f32', _F32, ir.Constant(_F32, 0.0), args[0],
                     fastmath=('reassoc',))
    return types.float32(vector), codegen


@intrinsic
def vfold4(typingctx, a, b, c, d):
    """Four vectors summed over each four neighbouring lanes: (a, b, c, d) of lanes 0 to 3, of 4 to 7, and so on."""
    def interleave(builder, x, y, order):
        """Per four lanes, those of x and y (which count from 4) that `order` says."""
        lanes = [4 * quarter + i if i < 4 else LANES + 4 * quarter + i - 4 for quarter in range(4) for i in order]
        return builder.shuffle_vector(x, y, ir.Constant(_VEC_I32, lanes))

    def codegen(context, builder, sig, args):
        a, b, c, d = args
        ab, cd = (builder.fadd(interleave(builder, x, y, (0, 4, 1, 5)), interleave(builder, x, y, (2, 6, 3, 7)))
                  for x, y in ((a, b), (c, d)))
        return builder.fadd(interleave(builder, ab, cd, (0, 1, 4, 5)), interleave(builder, ab, cd, (2, 3, 6, 7)))
    return vector(vector, vector, vector, vector), codegen


def _finish_folded(builder, folded):
    for half in (LANES // 2, LANES // 4):
        low, high = (builder.shuffle_vector(folded, folded, ir.Constant(
            ir.VectorType(_I32, half), list(range(start, start + half)))) for start in (0, half))
        folded = builder.fadd(low, high)
    return folded


@intrinsic
def add_folded(typingctx, address, folded):
    """Finish the four sums of :func:`vfold4` and add them to four neighbouring float32."""
    def codegen(context, builder, sig, args):
        address, folded = args
        old = _load(builder, address, ir.VectorType(_F32, 4), 4)
        _store(builder, builder.fadd(old, _finish_folded(builder, folded)), address, 4)
        return context.get_dummy_value()
    return types.none(types.int64, vector), codegen


@intrinsic
def add_folded_strided(typingctx, address, stride, folded):
    """:func:`add_folded`, to float32 `stride` bytes apart."""
    def codegen(context, builder, sig, args):
        address, stride, folded = args
        folded = _finish_folded(builder, folded)
        for i in range(4):
            old = _load(builder, address, _F32, 4)
            _store(builder, builder.fadd(old, builder.extract_element(folded, ir.Constant(_I32, i))), address, 4)
            address = builder.add(address, stride)
        return context.get_dummy_value()
    return types.none(types.int64, types.int64, vector), codegen


@intrinsic
def vload(typingctx, address):
    return vector(types.int64), lambda context, builder, sig, args: _load(builder, args[0], _VEC, 4)


@intrinsic
def vstore(typingctx, address, value):
    def codegen(context, builder, sig, args):
        _store(builder, args[1], args[0], 4)
        return context.get_dummy_value()
    return types.none(types.int64, vector), codegen


@intrinsic
def vbroadcast(typingctx, address):
    """The float32 at an address in every lane."""
    def codegen(context, builder, sig, args):
        return _broadcast(builder, _load(builder, args[0], _F32, 4))
    return vector(types.int64), codegen


@intrinsic
def load_f32(typingctx, address):
    return types.float32(types.int64), lambda context, builder, sig, args: _load(builder, args[0], _F32, 4)


@intrinsic
def store_f32(typingctx, address, value):
    def codegen(context, builder, sig, args):
        _store(builder, args[1], args[0], 4)
        return context.get_dummy_value()
    return types.none(types.int64, types.float32), codegen


@intrinsic
def load_i64(typingctx, address):
    return types.int64(types.int64), lambda context, builder, sig, args: _load(builder, args[0], _I64, 8)


@intrinsic
def store_i64(typingctx, address, value):
    def codegen(context, builder, sig, args):
        _store(builder, args[1], args[0], 8)
        return context.get_dummy_value()
    return types.none(types.int64, types.int64), codegen


def _prefetch(locality):
    @intrinsic
    def prefetch(typingctx, address):
        def codegen(context, builder, sig, args):
            ty = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _I32, _I32, _I32])
            fn = cgutils.get_or_insert_function(builder.module, ty, 'llvm.prefetch.p0')
            builder.call(fn, [_pointer(builder, args[0], ir.IntType(8))]
                         + [ir.Constant(_I32, v) for v in (0, locality, 1)])
            return context.get_dummy_value()
        return types.none(types.int64), codegen
    return prefetch


# Ask for the cache line at an address, for reading, in the first or in the second cache; any address is allowed.
prefetch, prefetch_far = _prefetch(3), _prefetch(2)


@intrinsic
def transpose16(typingctx, target, target_stride, source, source_stride):
    """Transpose 16 x 16 float32 in registers; the strides are those of the rows, in bytes."""
    def codegen(context, builder, sig, args):
        target, target_stride, source, source_stride = args
        rows = []
        for _ in range(LANES):
            rows.append(_load(builder, source, _VEC, 4))
            source = builder.add(source, source_stride)
        half = LANES // 2
        low = ir.Constant(_VEC_I32, [i // 2 + (i % 2) * LANES for i in range(LANES)])
        high = ir.Constant(_VEC_I32, [i // 2 + half + (i % 2) * LANES for i in range(LANES)])
        for _ in range(4):  # to interleave the two halves of the rows four times is to transpose
            rows = [builder.shuffle_vector(rows[i // 2], rows[i // 2 + half], high if i % 2 else low)
                    for i in range(LANES)]
        for row in rows:
            _store(builder, row, target, 4)
            target = builder.add(target, target_stride)
        return context.get_dummy_value()
    return types.none(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def transpose4(typingctx, target, source, stride, scale):
    """16 rows of 4 float32, `stride` bytes apart, times `scale`, to 4 neighbouring vectors of 16."""
    def codegen(context, builder, sig, args):
        target, source, stride, scale = args

        def join(parts):
            """Vectors one behind the other."""
            while len(parts) > 1:
                both = ir.Constant(ir.VectorType(_I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
                parts = [builder.shuffle_vector(a, b, both) for a, b in zip(parts[::2], parts[1::2])]
            return parts[0]

        rows = []
        for _ in range(LANES):
            rows.append(_load(builder, source, ir.VectorType(_F32, 4), 4))
            source = builder.add(source, stride)
        # row 4 i + j in quarter i of vector j: then four 4 x 4 transpositions, in two rounds of interleaving
        vectors = [join(rows[j::4]) for j in range(4)]
        for _ in range(2):
            vectors = [builder.shuffle_vector(vectors[j // 2], vectors[j // 2 + 2], ir.Constant(_VEC_I32, [
                4 * quarter + i // 2 + 2 * (j % 2) + i % 2 * LANES for quarter in range(4) for i in range(4)]))
                for j in range(4)]
        for vector_ in vectors:
            _store(builder, builder.fmul(vector_, _broadcast(builder, scale)), target, 4)
            target = builder.add(target, ir.Constant(_I64, VBYTES))
        return context.get_dummy_value()
    return types.none(types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def fetch_add(typingctx, address):
    """Atomically add 1 to the int64 at an address; returns what it was."""
    def codegen(context, builder, sig, args):
        return builder.atomic_rmw('add', _pointer(builder, args[0], _I64), ir.Constant(_I64, 1), 'monotonic')
    return types.int64(types.int64), codegen


def _widen_bf16(builder, bits, int32):
    shift = ir.Constant(int32, [16] * LANES if isinstance(int32, ir.VectorType) else 16)
    return builder.shl(builder.zext(bits, int32), shift)


def _narrow_bf16(builder, bits, int32):
    """float32 bits to bfloat16 bits, to nearest even; NaN stays a (quiet) NaN."""
    def constant(value):
        return ir.Constant(int32, [value] * LANES if isinstance(int32, ir.VectorType) else value)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
    nan = builder.icmp_unsigned('>', builder.and_(bits, constant(0x7FFFFFFF)), constant(0x7F800000))
    quiet = builder.or_(builder.lshr(bits, constant(16)), constant(0x40))
    return builder.select(nan, quiet, rounded)


@intrinsic
def vload_bf16(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.bitcast(_widen_bf16(builder, _load(builder, args[0], _VEC_I16, 2), _VEC_I32), _VEC)
    return vector(types.int64), codegen


@intrinsic
def vload_f16(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.fpext(_load(builder, args[0], _VEC_F16, 2), _VEC)
    return vector(types.int64), codegen


@intrinsic
def vstore_bf16(typingctx, address, value):
    def codegen(context, builder, sig, args):
        bits = _narrow_bf16(builder, builder.bitcast(args[1], _VEC_I32), _VEC_I32)
        _store(builder, builder.trunc(bits, _VEC_I16), args[0], 2)
        return context.get_dummy_value()
    return types.none(types.int64, vector), codegen


@intrinsic
def vstore_f16(typingctx, address, value):
    def codegen(context, builder, sig, args):
        _store(builder, builder.fptrunc(args[1], _VEC_F16), args[0], 2)
        return context.get_dummy_value()
    return types.none(types.int64, vector), codegen


@intrinsic
def load_bf16(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.bitcast(_widen_bf16(builder, _load(builder, args[0], _I16, 2), _I32), _F32)
    return types.float32(types.int64), codegen


@intrinsic
def load_f16(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.fpext(_load(builder, args[0], ir.HalfType(), 2), _F32)
    return types.float32(types.int64), codegen


@intrinsic
def store_bf16(typingctx, address, value):
    def codegen(context, builder, sig, args):
        bits = _narrow_bf16(builder, builder.bitcast(args[1], _I32), _I32)
        _store(builder, builder.trunc(bits, _I16), args[0], 2)
        return context.get_dummy_value()
    return types.none(types.int64, types.float32), codegen


@intrinsic
def store_f16(typingctx, address, value):
    def codegen(context, builder, sig, args):
        _store(builder, builder.fptrunc(args[1], ir.HalfType()), args[0], 2)
        return context.get_dummy_value()
    return types.none(types.int64, types.float32), codegen


@njit(inline='always')
def vload_as(dtype, address):
    if dtype == F32:
        return vload(address)
    if dtype == BF16:
        return vload_bf16(address)
    return vload_f16(address)


@njit(inline='always')
def vstore_as(dtype, address, value):
    if dtype == F32:
        vstore(address, value)
    elif dtype == BF16:
        vstore_bf16(address, value)
    else:
        vstore_f16(address, value)


@njit(inline='always')
def load_as(dtype, address):
    if dtype == F32:
        return load_f32(address)
    if dtype == BF16:
        return load_bf16(address)
    return load_f16(address)


@njit(inline='always')
def store_as(dtype, address, value):
    if dtype == F32:
        store_f32(address, value)
    elif dtype == BF16:
        store_bf16(address, value)
    else:
        store_f16(address, value)
