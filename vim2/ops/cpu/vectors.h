// One register of float32 and what the scan computes with it, in GCC's vector extensions, which Clang has too.
// Exponentials and logarithms are good to a few units in the last place; NaN in is NaN out.
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef int64_t i64;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));  // bfloat16 or float16
typedef float vf_mem __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // anywhere in memory
typedef uint16_t vh_mem __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16") for

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf load(const float *p) { return *(const vf_mem *)p; }
INLINE void store(float *p, vf x) { *(vf_mem *)p = x; }
INLINE vf max0(vf x) { return x < 0.f ? vf{} : x; }
INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE float sum(vf x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

// ---- exponentials ---------------------------------------------------------------------------------------------------

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// 2^x, relative error < 2e-7, and it vanishes with x: a decay exp(dt A) close to 1 keeps its rate. 2^-inf is 0.
// x = t + f with t a multiple of a power of two: 2^t is exact or from a table, 2^f a polynomial 1 + f q(f).
INLINE vf exp2(vf x) {
#ifdef __AVX512F__
    constexpr float magic = 1.5f * (1 << 19);  // adding it leaves x in 1/16 in the low bits
    const vf table = {0x1p0f, 0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f, 0x1.3dea64p0f, 0x1.4bfdaep0f,
                      0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f, 0x1.ae89fap0f,
                      0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};
    const vf shifted = x + magic, f = _mm512_reduce_ps(x, 4 << 4 | 8);  // x less the nearest multiple of 1/16
    const vf power = _mm512_scalef_ps(_mm512_permutexvar_ps((__m512i)shifted, table), x - f);  // times 2^floor(t)
    const vf q = (f * 0.05550410866482158f + 0.24022650695910072f) * f + 0.6931471805599453f;
    return power * (f * q + 1.f);
#else
    constexpr float magic = 1.5f * (1 << 23) + 127;  // adding it leaves the exponent's bits of 2^t in the low bits
    x = x < -127.f ? splat(-127.f) : x;              // 0, by an exponent of 0
    x = x > 128.f ? splat(128.f) : x;                // infinity
    const vf shifted = x + magic, f = x - (shifted - magic);
    vf q = (f * 0.001326472731307149f + 0.009671512991189957f) * f + 0.05550733581185341f;
    q = ((q * f + 0.24022242426872253f) * f + 0.6931470036506653f) * f + 1.f;
    return q * (vf)((vi)shifted << 23);
#endif
}

// log(1 + e) for 0 <= e <= 1 as e q(e), in two short chains: relative error < 6e-7, for the smallest e too
INLINE vf log1p(vf e) {
    const vf s = e * e;
    const vf even = ((s * 0.04408963397145271f + 0.1774524301290512f) * s + 0.33275479078292847f) * s
        + 0.9999998211860657f;
    const vf odd = ((s * -0.00853920727968216f - 0.10768172889947891f) * s - 0.2449546456336975f) * s
        - 0.4999740421772003f;
    return e * (odd * e + even);
}

// exp(-|x|), of which both are made: softplus(x) = max(x, 0) + log1p of it
INLINE vf decay_of(vf x) { return exp2(absolute(x) * -LOG2E); }
INLINE vf sigmoid(vf x, vf decay) {
    const vf r = 1.f / (1.f + decay);
    return x < 0.f ? decay * r : r;
}

// ---- narrower types -------------------------------------------------------------------------------------------------

enum Type : i64 { FLOAT, BFLOAT16, FLOAT16 };

INLINE vf widen(i64 type, vh h) {
    const vu bits = __builtin_convertvector(h, vu) << 16;
    if (type == BFLOAT16) return (vf)bits;
    const vu magnitude = bits + bits;  // float16's exponent and fraction, without the sign, at the top
    const vf normal = (vf)((magnitude >> 4) + (0xe0u << 23)) * 0x1p-112f;
    const vf subnormal = (vf)((magnitude >> 17) | (126u << 23)) - 0.5f;
    return (vf)((bits & 0x80000000u) | (magnitude < 1u << 27 ? (vu)subnormal : (vu)normal));
}

// To the nearest, ties to even, as PyTorch rounds
INLINE vh narrow(i64 type, vf x) {
    const vu bits = (vu)x, magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    vu h;
    if (type == BFLOAT16) {
        h = magnitude > 0x7f800000u ? vu{} + 0x7fc0u : (magnitude + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    } else {
        // the addition rounds at float16's last bit; what is too large becomes infinite on the way
        const vu exponent = (magnitude & 0x7f800000u) < 0x38800000u ? vu{} + 0x38800000u : magnitude & 0x7f800000u;
        const vu rounded = (vu)((vf)magnitude * 0x1p112f * 0x1p-110f + (vf)(exponent + (15u << 23)));
        h = magnitude > 0x7f800000u ? vu{} + 0x7e00u : (rounded >> 13 & 0x7c00u) + (rounded & 0x0fffu);
    }
    return __builtin_convertvector(sign | h, vh);
}

// Up to LANES elements of any type, `stride` bytes apart; the rest 0
INLINE vf gather(i64 type, i64 stride, const char *p, int lanes) {
    if (type == FLOAT) {
        if (lanes == LANES && stride == 4) return load((const float *)p);
        float v[LANES] = {};
        for (int i = 0; i < lanes; i++) v[i] = *(const float *)(p + i * stride);
        return load(v);
    }
    if (lanes == LANES && stride == 2) return widen(type, *(const vh_mem *)p);
    uint16_t v[LANES] = {};
    for (int i = 0; i < lanes; i++) v[i] = *(const uint16_t *)(p + i * stride);
    return widen(type, *(const vh_mem *)v);
}
INLINE void scatter(i64 type, i64 stride, char *p, int lanes, vf x) {
    if (type == FLOAT) {
        if (lanes == LANES && stride == 4) return store((float *)p, x);
        float v[LANES];
        store(v, x);
        for (int i = 0; i < lanes; i++) *(float *)(p + i * stride) = v[i];
        return;
    }
    uint16_t v[LANES];
    *(vh_mem *)v = narrow(type, x);
    if (lanes == LANES && stride == 2) memcpy(p, v, sizeof v);
    else for (int i = 0; i < lanes; i++) *(uint16_t *)(p + i * stride) = v[i];
}

// ---- shuffles -------------------------------------------------------------------------------------------------------

template <int... i> struct Lanes {};
template <int n, int... i> struct LanesTo : LanesTo<n - 1, n - 1, i...> {};
template <int... i> struct LanesTo<0, i...> { typedef Lanes<i...> type; };
constexpr LanesTo<LANES>::type all_lanes;

// f of each lane: unlike what a pragma unrolls, early enough for arrays to become registers
template <class F, int... i>
INLINE void each_lane(F f, Lanes<i...>) { (f(i), ...); }

// In a matrix of S x S tiles, those of row a and of row b: of each pair of tiles the first of both, and the second
template <int S, int... i>
INLINE vf firsts(vf a, vf b, Lanes<i...>) { return __builtin_shufflevector(a, b, (i & S ? LANES + i - S : i)...); }
template <int S, int... i>
INLINE vf seconds(vf a, vf b, Lanes<i...>) { return __builtin_shufflevector(a, b, (i & S ? LANES + i : i + S)...); }

// Transposes LANES vectors, from tiles of half a vector to single elements
template <int S = LANES / 2>
INLINE void transpose(vf *v) {
    each_lane([&](int i) {
        if (i & S) return;
        const vf a = v[i], b = v[i + S];
        v[i] = firsts<S>(a, b, all_lanes), v[i + S] = seconds<S>(a, b, all_lanes);
    }, all_lanes);
    if constexpr (S > 1) transpose<S / 2>(v);
}

// Per four lanes, those of x and y (which count from 4) that a, b, c, d say
template <int a, int b, int c, int d, int... i>
INLINE vf pick(vf x, vf y, Lanes<i...>) {
    constexpr int from[] = {a, b, c, d};
    return __builtin_shufflevector(x, y, (i / 4 * 4 + from[i % 4] % 4 + (from[i % 4] < 4 ? 0 : LANES))...);
}

// Four vectors as one: of each four neighbouring lanes, the sums of the four vectors' lanes there
INLINE vf fold4(const vf *v) {
    const vf ab = pick<0, 4, 1, 5>(v[0], v[1], all_lanes) + pick<2, 6, 3, 7>(v[0], v[1], all_lanes);
    const vf cd = pick<0, 4, 1, 5>(v[2], v[3], all_lanes) + pick<2, 6, 3, 7>(v[2], v[3], all_lanes);
    return pick<0, 1, 4, 5>(ab, cd, all_lanes) + pick<2, 3, 6, 7>(ab, cd, all_lanes);
}
