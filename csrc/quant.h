// Quantise rows of a dense matrix: amax, scale, round, pack, block after block while it is in cache.
//
// All arithmetic is fp32: scale = max(amax / reach, floor), 1 where that is 0; value = x / scale or
// x * (1 / scale), clamped, rounded to nearest with ties to even. The sums of the error are figures only:
// their last digits depend on the width of a vector.
#pragma once

#include "isa.h"
#include "port.h"

namespace fastckpt {
namespace {

template <class U> FASTCKPT_INLINE typename FloatOf<U>::type at_most(typename FloatOf<U>::type a, float high) {
    typename FloatOf<U>::type h = a - a + high;
    return a < h ? a : h;
}
template <class U> FASTCKPT_INLINE typename FloatOf<U>::type at_least(typename FloatOf<U>::type a, float low) {
    typename FloatOf<U>::type l = a - a + low;
    return a > l ? a : l;
}

// A float in [-2^22, 2^22] to the nearest integer, ties to even. The sum cannot fuse with a product: a clamp
// stands between them.
template <class U> FASTCKPT_INLINE U nearest(typename FloatOf<U>::type x) { return as_bits<U>(x + 12582912.0f) - 0x4b400000u; }

template <class U> struct Lanes { static constexpr size_t count = LANES; };
template <> struct Lanes<uint32_t> { static constexpr size_t count = 1; };

template <class S, class U> FASTCKPT_INLINE U load_as(const char* p) {
    if constexpr (Lanes<U>::count == 1) {
        uint32_t x = 0;
        memcpy(&x, p, S::size);
        return S::to_f32(x);
    } else {
        return S::to_f32(load<S::size>(p));
    }
}
template <class U> FASTCKPT_INLINE void store_byte(char* p, U x) {
    if constexpr (Lanes<U>::count == 1) *p = static_cast<char>(x);
    else store<1>(p, x);
}

// The bits of the largest magnitude among n values; above INF32 - 1 where one is not finite.
template <class S> FASTCKPT_INLINE uint32_t largest_bits(const char* p, size_t n, uint32_t so_far) {
    Words m[4] = {{}, {}, {}, {}};
    size_t i = 0;
    auto take = [&](Words& m, size_t at) {
        Words a = load_as<S, Words>(p + at * S::size) & 0x7fffffffu;
        m = less(m, a) ? a : m;
    };
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; ++k) take(m[k], i + k * LANES);
    for (; i + LANES <= n; i += LANES) take(m[0], i);
    for (int k = 0; k < 4; ++k)
        for (int lane = 0; lane < LANES; ++lane) so_far = m[k][lane] > so_far ? m[k][lane] : so_far;
    for (; i < n; ++i) {
        uint32_t a = load_as<S, uint32_t>(p + i * S::size) & 0x7fffffffu;
        so_far = a > so_far ? a : so_far;
    }
    return so_far;
}

struct Sums {
    Floats biggest{}, difference{}, dense{}, quantised{}, both{};
    void add_to(double* out) const {
        for (int k = 0; k < LANES; ++k) {
            out[0] = biggest[k] > out[0] ? biggest[k] : out[0];
            out[1] += difference[k], out[2] += dense[k], out[3] += quantised[k], out[4] += both[k];
        }
    }
};

// One vector of values, or one value, to bytes; y becomes what they stand for.
template <class S, QuantKind KIND, bool RECIPROCAL, class U>
FASTCKPT_INLINE void round_one(char* out, const char* src, float scale, typename FloatOf<U>::type& x, typename FloatOf<U>::type& y) {
    constexpr float HIGH = KIND == QUANT_INT4 ? 7.0f : 127.0f;
    x = as_float<U>(load_as<S, U>(src));
    typename FloatOf<U>::type v;
    if constexpr (RECIPROCAL) v = x * scale;
    else v = x / scale;
    if constexpr (KIND == QUANT_E4M3) {
        U code = E4M3::from_f32(as_bits<U>(v));
        store_byte<U>(out, code);
        y = as_float<U>(E4M3::to_f32(code));
    } else {
        U q = nearest<U>(at_least<U>(at_most<U>(v, HIGH), -HIGH - 1));
        store_byte<U>(out, q);
        y = as_float<U>(as_bits<U>(at_least<U>(at_most<U>(v, HIGH), -HIGH - 1) + 12582912.0f)) - 12582912.0f;
    }
}

template <class S, QuantKind KIND, bool RECIPROCAL>
FASTCKPT_INLINE void round_line(char* out, const char* src, size_t n, float scale, Sums& sums) {
    const float factor = RECIPROCAL ? 1.0f / scale : scale;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats x, y;
        round_one<S, KIND, RECIPROCAL, Words>(out + i, src + i * S::size, factor, x, y);
        y *= scale;
        Floats d = x - y;
        Floats size = as_float<Words>(as_bits<Words>(d) & 0x7fffffffu);
        sums.biggest = size > sums.biggest ? size : sums.biggest;
        sums.difference += d * d, sums.dense += x * x, sums.quantised += y * y, sums.both += x * y;
    }
    for (; i < n; ++i) {
        float x, y;
        round_one<S, KIND, RECIPROCAL, uint32_t>(out + i, src + i * S::size, factor, x, y);
        y *= scale;
        float d = x - y, size = d < 0 ? -d : d;
        sums.biggest[0] = size > sums.biggest[0] ? size : sums.biggest[0];
        sums.difference[0] += d * d, sums.dense[0] += x * x, sums.quantised[0] += y * y, sums.both[0] += x * y;
    }
}

// Bytes of -8..7 to nibbles with 8 added, the first value in the lowest; n is a multiple of 8.
FASTCKPT_INLINE void pack_nibbles(char* out, const char* values, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        uint64_t x;
        memcpy(&x, values + i, 8);
        x = (x & 0x0f0f0f0f0f0f0f0full) ^ 0x0808080808080808ull;  // in four bits, adding 8 turns the top one
        x = (x | x >> 4) & 0x00ff00ff00ff00ffull;
        x = (x | x >> 8) & 0x0000ffff0000ffffull;
        x = x | x >> 16;
        memcpy(out + i / 2, &x, 4);
    }
}

FASTCKPT_INLINE float scale_from(float amax, const Quant& q) {
    float scale = amax / q.reach;
    if (scale < q.floor) scale = q.floor;
    return scale == 0 ? 1.0f : scale;
}

template <class S, QuantKind KIND, bool RECIPROCAL> bool quantise_as(const Quant& q) {
    constexpr size_t PIECE = 1024;  // values of int4 rounded before they are packed
    const size_t across = (q.columns + q.block_columns - 1) / q.block_columns;
    for (size_t r0 = 0; r0 < q.rows; r0 += q.block_rows) {
        const size_t r1 = r0 + q.block_rows < q.rows ? r0 + q.block_rows : q.rows;
        Sums sums;
        for (size_t b = 0; b < across; ++b) {
            const size_t c0 = b * q.block_columns;
            const size_t n = c0 + q.block_columns < q.columns ? q.block_columns : q.columns - c0;
            uint32_t bits = 0;
            for (size_t r = r0; r < r1; ++r) bits = largest_bits<S>(q.src + (r * q.columns + c0) * S::size, n, bits);
            if (bits >= INF32) return false;
            const float scale = scale_from(q.amax == nullptr ? as_float(bits) : q.amax[r0], q);
            q.scales[r0 / q.block_rows * across + b] = scale;
            for (size_t r = r0; r < r1; ++r) {
                const char* src = q.src + (r * q.columns + c0) * S::size;
                if constexpr (KIND == QUANT_INT4) {
                    char piece[PIECE];
                    for (size_t i = 0; i < n; i += PIECE) {
                        const size_t m = i + PIECE < n ? PIECE : n - i;
                        round_line<S, KIND, RECIPROCAL>(piece, src + i * S::size, m, scale, sums);
                        pack_nibbles(q.out + (r * q.columns + c0 + i) / 2, piece, m);
                    }
                } else {
                    round_line<S, KIND, RECIPROCAL>(q.out + r * q.columns + c0, src, n, scale, sums);
                }
            }
        }
        sums.add_to(q.sums);
    }
    return true;
}

template <class S> bool quantise_from(const Quant& q) {
    switch (q.kind) {
        case QUANT_INT8: return q.reciprocal ? quantise_as<S, QUANT_INT8, true>(q) : quantise_as<S, QUANT_INT8, false>(q);
        case QUANT_E4M3: return quantise_as<S, QUANT_E4M3, false>(q);
        default: return quantise_as<S, QUANT_INT4, false>(q);
    }
}

bool quantise(const Quant& q) {
    switch (q.dtype) {
        case FLOAT32: return quantise_from<F32>(q);
        case BFLOAT16: return quantise_from<BF16>(q);
        default: return quantise_from<F16>(q);
    }
}

template <class S> void row_amax_of(float* out, const char* src, size_t rows, size_t columns) {
    for (size_t r = 0; r < rows; ++r) out[r] = as_float(largest_bits<S>(src + r * columns * S::size, columns, 0));
}

void row_amax(float* out, const char* src, size_t rows, size_t columns, Dtype dtype) {
    switch (dtype) {
        case FLOAT32: return row_amax_of<F32>(out, src, rows, columns);
        case BFLOAT16: return row_amax_of<BF16>(out, src, rows, columns);
        default: return row_amax_of<F16>(out, src, rows, columns);
    }
}

}  // namespace
}  // namespace fastckpt
