// What a value becomes when it is quantised: its scale, its zero point, its code. Written once for one 32-bit lane
// or a vector of them, for the CPU (quant.h) and the GPU. Include port.h before it where vectors are used.
//
// All arithmetic is fp32: scale = max(amax / reach, floor), 1 where that is 0; value = x / scale or
// x * (1 / scale), clamped, rounded to nearest with ties to even. With zero points: scale = (high - low) / reach,
// both with 0 in between, zero = round(-8 - low / scale), value = x / scale + zero. Microscaled: scale = a power of two.
#pragma once

#include "isa.h"

namespace fastckpt {
namespace {

// Where one is a NaN, it is a, and b is taken.
FASTCKPT_HD float max_of(float a, float b) {
#if defined(__CUDA_ARCH__)
    return fmaxf(a, b);
#else
    return a > b ? a : b;
#endif
}
FASTCKPT_HD float min_of(float a, float b) {
#if defined(__CUDA_ARCH__)
    return fminf(a, b);
#else
    return a < b ? a : b;
#endif
}
FASTCKPT_HD uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The same, but a NaN stays.
FASTCKPT_HD float higher(float a, float b) {
#if defined(__CUDA_ARCH__)
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
#else
    return a != a || b != b ? as_float(NAN32) : max_of(a, b);
#endif
}
FASTCKPT_HD float lower(float a, float b) {
#if defined(__CUDA_ARCH__)
    float c;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
#else
    return a != a || b != b ? as_float(NAN32) : min_of(a, b);
#endif
}

FASTCKPT_HD float magnitude(float a) {
#if defined(__CUDA_ARCH__)
    return fabsf(a);
#else
    return as_float(as_bits<uint32_t>(a) & 0x7fffffffu);
#endif
}

// a * b + c and c - a * b, rounded once.
FASTCKPT_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}
FASTCKPT_HD float fused_less(float a, float b, float c) { return fused(-a, b, c); }

template <class U> FASTCKPT_HD typename FloatOf<U>::type at_most(typename FloatOf<U>::type a, float high) {
    return min_of(a, typename FloatOf<U>::type{} + high);
}
template <class U> FASTCKPT_HD typename FloatOf<U>::type at_least(typename FloatOf<U>::type a, float low) {
    return max_of(a, typename FloatOf<U>::type{} + low);
}

FASTCKPT_HD bool finite(float x) { return (as_bits<uint32_t>(x) & 0x7fffffffu) < INF32; }

// Added to a float in [-2^22, 2^22] it rounds that to the nearest integer, ties to even, which then stands in
// the low bits. The sum cannot fuse with a product: a clamp stands between them.
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23

// ---- scales and zero points ----

// fp16, as F16 of cast.h; NaN payloads aside.
FASTCKPT_HD uint32_t to_half(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    return F16::from_f32(as_bits<uint32_t>(x));
#endif
}
FASTCKPT_HD float from_half(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
    return x;
#else
    return as_float(F16::to_f32(bits));
#endif
}

FASTCKPT_HD float scale_from(float span, float reach, float floor, bool half) {
    float scale = span / reach;
    if (scale < floor) scale = floor;
    if (half) scale = from_half(to_half(scale));
    return scale == 0 ? 1.0f : scale;
}

// compressed-tensors' generate_mx_scales: 2^floor(log2(amax)), or the next power where amax is 1.75 of it or more, less
// the exponent of `reach`; at least 2^-127, the least that a byte of exponent (e8m0) can say.
FASTCKPT_HD float power_from(float amax, float reach) {
    const uint32_t power = (as_bits<uint32_t>(amax) + (1u << 21)) >> 23, most = (as_bits<uint32_t>(reach) >> 23) - 127;
    return as_float(power > most ? (power - most) << 23 : 1u << 22);
}

FASTCKPT_HD float zero_from(float low, float scale, float lowest) {
    const float zero = at_least<uint32_t>(at_most<uint32_t>(-8.0f - low / scale, 7.0f), lowest) + ROUNDER;
    return zero - ROUNDER;
}

// ---- values ----

// DIVIDE: by the scale. FUSED: the same, correctly rounded, without a division: x / s by the correctly rounded
// reciprocal r of s, corrected twice with residuals that a fused multiply-add gives exactly (Markstein). Right
// where nothing under- or overflows that could still reach a code: `fuses`. RECIPROCAL: times r, rounded.
enum How { DIVIDE, FUSED, RECIPROCAL };

FASTCKPT_HD bool fuses(float scale, float amax) { return scale > 0x1p-60f && scale < 0x1p60f && amax < scale * 0x1p20f; }

template <class U> struct Scale {
    typename FloatOf<U>::type scale, reciprocal, zero;
};

// x / s, of q = x * r.
template <class U>
FASTCKPT_HD typename FloatOf<U>::type corrected(typename FloatOf<U>::type q, typename FloatOf<U>::type x, const Scale<U>& s) {
    q = fused(fused_less(q, s.scale, x), s.reciprocal, q);
    return fused(fused_less(q, s.scale, x), s.reciprocal, q);
}

template <How HOW, class U>
FASTCKPT_HD typename FloatOf<U>::type divided(typename FloatOf<U>::type x, const Scale<U>& s) {
    if constexpr (HOW == FUSED) {
        return corrected<U>(x * s.reciprocal, x, s);
    } else if constexpr (HOW == RECIPROCAL) {
        return x * s.reciprocal;
    } else {
        return x / s.scale;
    }
}

// The code of a magnitude in a float of FRACTION bits of fraction, whose least normal number is 2^(LEAST - 127), and its
// value y; at most `most`. Added to a power of two 2^(23 - FRACTION) times its own, `a` rounds to as many bits of fraction,
// or to a step of the least ones where that is more; the sum's low bits count those steps.
template <uint32_t FRACTION, uint32_t LEAST, class U>
FASTCKPT_HD U small_float(typename FloatOf<U>::type a, float most, typename FloatOf<U>::type& y) {
    constexpr uint32_t REST = 23 - FRACTION;
    const U power = max_of(as_bits<U>(at_most<U>(a, most)) & INF32, U{} + (LEAST << 23)), magic = power + (REST << 23);
    const auto sum = as_float<U>(magic) + at_most<U>(a, most);
    y = sum - as_float<U>(magic);
    return as_bits<U>(sum) - magic + (power >> REST) - (LEAST << FRACTION);
}

// E4M3 of cast.h for what is no NaN, decoded on the way; e2m1.
template <class U> FASTCKPT_HD U e4m3(typename FloatOf<U>::type a, typename FloatOf<U>::type& y) {
    return small_float<3, 121, U>(a, 448.0f, y);
}
template <class U> FASTCKPT_HD U e2m1(typename FloatOf<U>::type a, typename FloatOf<U>::type& y) {
    return small_float<1, 127, U>(a, 6.0f, y);
}

// The bits of a float in whose low ones a scaled value stands, rounded to an integer from -high - 1 to high; y: that
// without the zero point.
template <bool ZERO, class U>
FASTCKPT_HD U whole(typename FloatOf<U>::type v, typename FloatOf<U>::type zero, float high, typename FloatOf<U>::type& y) {
    if constexpr (ZERO) v += zero;
    const auto shifted = at_least<U>(at_most<U>(v, high), -high - 1) + ROUNDER;
    y = shifted - ROUNDER;
    if constexpr (ZERO) y -= zero;
    return as_bits<U>(shifted);
}

}  // namespace
}  // namespace fastckpt
