// What a value becomes when it is quantised: its scale, its zero point, its code. Written once for one 32-bit lane
// or a vector of them, for the CPU (quant.h) and the GPU. Include port.h before it where vectors are used.
//
// All arithmetic is fp32: scale = max(amax / reach, floor), 1 where that is 0; value = x / scale or
// x * (1 / scale), clamped, rounded to nearest with ties to even. With zero points: scale = (high - low) / reach,
// both with 0 in between, zero = round(-8 - low / scale), value = x / scale + zero.
#pragma once

#include "isa.h"

namespace fastckpt {
namespace {

FASTCKPT_HD float max_of(float a, float b) { return a > b ? a : b; }
FASTCKPT_HD float min_of(float a, float b) { return a < b ? a : b; }
FASTCKPT_HD uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

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

FASTCKPT_HD float scale_from(float span, float reach, float floor, bool half) {
    float scale = span / reach;
    if (scale < floor) scale = floor;
    if (half) scale = as_float(F16::to_f32(F16::from_f32(as_bits<uint32_t>(scale))));
    return scale == 0 ? 1.0f : scale;
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

template <How HOW, class U>
FASTCKPT_HD typename FloatOf<U>::type divided(typename FloatOf<U>::type x, const Scale<U>& s) {
    if constexpr (HOW == FUSED) {
        typename FloatOf<U>::type q = x * s.reciprocal;
        q = fused(fused_less(q, s.scale, x), s.reciprocal, q);
        return fused(fused_less(q, s.scale, x), s.reciprocal, q);
    } else if constexpr (HOW == RECIPROCAL) {
        return x * s.reciprocal;
    } else {
        return x / s.scale;
    }
}

// The code of a magnitude in e4m3fn and its value y: E4M3 of cast.h for what is no NaN, decoded on the way. Added to a
// power of two 2^20 times its own, `a` rounds to three bits of fraction, or to 2^-9 where that is more; the sum's low
// bits count those steps.
template <class U> FASTCKPT_HD U e4m3(typename FloatOf<U>::type a, typename FloatOf<U>::type& y) {
    const U power = max_of(as_bits<U>(at_most<U>(a, 448.0f)) & INF32, U{} + (121u << 23)), magic = power + (20u << 23);
    const auto sum = as_float<U>(magic) + at_most<U>(a, 448.0f);
    y = sum - as_float<U>(magic);
    return as_bits<U>(sum) - magic + (power >> 20) - (121u << 3);
}

// The code of a scaled value v in the low bits of its lane (four bits have 8 added), and what it means in scales, y;
// for e4m3 of a magnitude.
template <QuantKind KIND, bool ZERO, class U>
FASTCKPT_HD U code_of(typename FloatOf<U>::type v, typename FloatOf<U>::type zero, typename FloatOf<U>::type& y) {
    if constexpr (KIND == QUANT_E4M3) {
        return e4m3<U>(v, y);
    } else {
        constexpr float HIGH = KIND == QUANT_INT8 ? 127.0f : 7.0f;
        if constexpr (ZERO) v += zero;
        const auto shifted = at_least<U>(at_most<U>(v, HIGH), -HIGH - 1) + ROUNDER;
        y = shifted - ROUNDER;
        if constexpr (ZERO) y -= zero;
        const U code = as_bits<U>(shifted) & 0xffu;
        if constexpr (KIND == QUANT_INT8) return code;
        else return (code ^ 8u) & 0xfu;
    }
}

}  // namespace
}  // namespace fastckpt
