// Quantise rows of a dense matrix: amax, scale, round, pack, block after block while it is in cache.
//
// The formulas stand in codes.h. The sums of the error are figures only: their last digits depend on the width of a
// vector.
#pragma once

#include "port.h"

#include "codes.h"

namespace fastckpt {
namespace {

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
template <class U> FASTCKPT_INLINE U load_lanes(const void* p) {
    U x;
    memcpy(&x, p, sizeof x);
    return x;
}

// The bits of the largest magnitude in a box of r x n values, `pitch` apart; above INF32 - 1 where one is not finite.
template <class S> FASTCKPT_INLINE uint32_t largest_bits(const char* src, size_t r, size_t n, size_t pitch) {
    Words m[4] = {{}, {}, {}, {}};
    uint32_t rest = 0;
    auto take = [&](Words& m, const char* p) {
        m = max_of(m, load_as<S, Words>(p) & 0x7fffffffu);
    };
    for (size_t k = 0; k < r; ++k) {
        const char* p = src + k * pitch * S::size;
        size_t i = 0;
        for (; i + 4 * LANES <= n; i += 4 * LANES)
            for (int j = 0; j < 4; ++j) take(m[j], p + (i + j * LANES) * S::size);
        for (; i + LANES <= n; i += LANES) take(m[0], p + i * S::size);
        for (; i < n; ++i) {
            rest = max_of(rest, load_as<S, uint32_t>(p + i * S::size) & 0x7fffffffu);
        }
    }
    return max_of(highest(max_of(max_of(m[0], m[1]), max_of(m[2], m[3]))), rest);
}

// The least and the largest of n values and 0.
struct Range {
    float low = 0, high = 0;
};
template <class S> FASTCKPT_INLINE Range range_of(const char* p, size_t n) {
    Floats low{}, high{};
    Range out;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats x = as_float<Words>(load_as<S, Words>(p + i * S::size));
        low = min_of(x, low), high = max_of(x, high);
    }
    for (int lane = 0; lane < LANES; ++lane)
        out.low = min_of(low[lane], out.low), out.high = max_of(high[lane], out.high);
    for (; i < n; ++i) {
        const float x = as_float(load_as<S, uint32_t>(p + i * S::size));
        out.low = min_of(x, out.low), out.high = max_of(x, out.high);
    }
    return out;
}

// How far y lies from x: kept as sums of x - y, of which the others follow.
struct Sums {
    Floats biggest{}, difference{}, dense{}, across{};
    size_t values = 0;

    void add(Floats x, Floats d) {
        biggest = max_of(as_float<Words>(as_bits<Words>(d) & 0x7fffffffu), biggest);
        difference += d * d, dense += x * x, across += x * d;
    }
    void add(float x, float d) {
        biggest[0] = max_of(d < 0 ? -d : d, biggest[0]);
        difference[0] += d * d, dense[0] += x * x, across[0] += x * d;
    }
    // Floats hold the sums of so many values well enough; then doubles take them over.
    void counted(size_t n, double* out) {
        values += n;
        if (values >= size_t{1} << 16) add_to(out);
    }
    void add_to(double* out) {
        double d = 0, x = 0, xd = 0;
        for (int k = 0; k < LANES; ++k) {
            if (biggest[k] > out[0]) out[0] = biggest[k];
            d += difference[k], x += dense[k], xd += across[k];
        }
        out[1] += d, out[2] += x, out[3] += x - 2 * xd + d, out[4] += x - xd;
        *this = Sums{};
    }
};

// How a box with this scale is divided: see codes.h.
FASTCKPT_INLINE bool may_fuse(float scale, float amax) { return VECTORS_FUSE && fuses(scale, amax); }

struct Factor {
    float scale, reciprocal, zero;
    template <class U> FASTCKPT_HD Scale<U> lanes() const {
        using F = typename FloatOf<U>::type;
        return {F{} + scale, F{} + reciprocal, F{} + zero};
    }
};

// One vector of values, or one, each to a byte in the low bits of its lane (four bits have 8 added); x becomes the
// value and d what it lost, or both with the value's sign taken off.
template <QuantKind KIND, How HOW, bool ZERO, class U>
FASTCKPT_INLINE U round_one(U bits, const Scale<U>& s, typename FloatOf<U>::type& x, typename FloatOf<U>::type& d) {
    x = as_float<U>(KIND == QUANT_E4M3 ? bits & 0x7fffffffu : bits);
    const auto v = divided<HOW, U>(x, s);
    typename FloatOf<U>::type y;
    U code;
    if constexpr (KIND == QUANT_E4M3) code = e4m3<U>(v, y) | (bits >> 24 & 0x80u);
    else if constexpr (KIND == QUANT_INT8) code = whole<ZERO, U>(v, s.zero, 127.0f, y) & 0xffu;
    else code = (whole<ZERO, U>(v, s.zero, 7.0f, y) ^ 8u) & 0xfu;
    d = x - y * s.scale;
    return code;
}

// `ahead` bytes on from a value lies one of the next box or line, which memory brings near while these are rounded.
template <class S, QuantKind KIND, How HOW, bool ZERO>
FASTCKPT_INLINE void round_line(char* out, const char* src, size_t n, ptrdiff_t ahead, const Factor& factor, Sums& sums) {
    const auto all = factor.lanes<Words>();
    const auto one = factor.lanes<uint32_t>();
    size_t i = 0;
    auto lanes = [&](size_t at) {
        Floats x, d;
        const Words codes = round_one<KIND, HOW, ZERO, Words>(load_as<S, Words>(src + at * S::size), all, x, d);
        sums.add(x, d);
        return codes;
    };
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        Words codes[4];
        for (int k = 0; k < 4 * LANES * S::size; k += 64) prefetch(src + i * S::size + ahead + k);
        for (int k = 0; k < 4; ++k) codes[k] = lanes(i + k * LANES);
        store<4>(out + i, pack<1>(codes));
    }
    for (; i + LANES <= n; i += LANES) store<1>(out + i, lanes(i));
    for (; i < n; ++i) {
        float x, d;
        out[i] = static_cast<char>(round_one<KIND, HOW, ZERO, uint32_t>(load_as<S, uint32_t>(src + i * S::size), one, x, d));
        sums.add(x, d);
    }
}

// Bytes below 16 to nibbles, the first value in the lowest; n is a multiple of 8.
FASTCKPT_INLINE void pack_nibbles(char* out, const char* values, size_t n) {
    size_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) pair_nibbles(out + i / 2, values + i);
    for (; i < n; i += 2) out[i / 2] = static_cast<char>(values[i] | values[i + 1] << 4);
}

// The same in AWQ's order: 0, 2, 4, 6, 1, 3, 5, 7 from the lowest.
FASTCKPT_INLINE void pack_awq(char* out, const char* values, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        uint64_t x;
        memcpy(&x, values + i, 8);
        x |= x >> 12;  // 0 and 2 stand in byte 0, 1 and 3 in byte 1, 4 and 6 in byte 4, 5 and 7 in byte 5
        const uint32_t word = static_cast<uint32_t>((x & 0xff) | (x >> 24 & 0xff00) | (x << 8 & 0xff0000) | (x >> 16 & 0xff000000));
        memcpy(out + i / 2, &word, 4);
    }
}

FASTCKPT_INLINE float scale_from(float span, const Quant& q) { return scale_from(span, q.reach, q.floor, q.half); }

template <class S, QuantKind KIND, How HOW>
void round_box(const Quant& q, size_t r0, size_t r1, size_t c0, size_t n, ptrdiff_t ahead, float scale, Sums& sums) {
    const Factor factor{scale, 1.0f / scale, 0};
    for (size_t r = r0; r < r1; ++r)
        round_line<S, KIND, HOW, false>(q.out + r * q.columns + c0, q.src + (r * q.columns + c0) * S::size, n, ahead, factor, sums);
}

template <class S, QuantKind KIND> bool quantise_blocks(const Quant& q) {
    const size_t across = (q.columns + q.block_columns - 1) / q.block_columns;
    Sums sums;
    for (size_t r0 = 0; r0 < q.rows; r0 += q.block_rows) {
        const size_t r1 = r0 + q.block_rows < q.rows ? r0 + q.block_rows : q.rows;
        for (size_t b = 0; b < across; ++b) {
            const size_t c0 = b * q.block_columns, at = r0 / q.block_rows * across + b;
            const size_t n = c0 + q.block_columns < q.columns ? q.block_columns : q.columns - c0;
            const char* src = q.src + (r0 * q.columns + c0) * S::size;
            const uint32_t bits = largest_bits<S>(src, r1 - r0, n, q.columns);
            if (bits >= INF32) return false;
            const float scale = scale_from(q.amax == nullptr ? as_float(bits) : q.amax[r0], q);
            if (!finite(scale)) return false;
            q.scales[at] = scale;
            const size_t next = c0 + n < q.columns ? c0 + n : (r1 - r0) * q.columns;  // the box to the right, or the first below
            const ptrdiff_t ahead = (static_cast<ptrdiff_t>(next) - static_cast<ptrdiff_t>(c0)) * S::size;
            if (q.reciprocal) round_box<S, KIND, RECIPROCAL>(q, r0, r1, c0, n, ahead, scale, sums);
            else if (may_fuse(scale, as_float(bits))) round_box<S, KIND, FUSED>(q, r0, r1, c0, n, ahead, scale, sums);
            else round_box<S, KIND, DIVIDE>(q, r0, r1, c0, n, ahead, scale, sums);
            sums.counted((r1 - r0) * n, q.sums);
        }
    }
    sums.add_to(q.sums);
    return true;
}

// ---- groups of a row, four bits each ----

constexpr size_t GROUPS = 64, PIECE = 1024;  // groups whose scales are found at once, values packed at once

template <class S, How HOW, bool ZERO>
void round_groups(const Quant& q, size_t at, const Factor* factors, size_t groups, Sums& sums) {
    const size_t n = q.block_columns, some = n < PIECE ? PIECE / n : 1;
    const ptrdiff_t ahead = static_cast<ptrdiff_t>(groups * n * S::size);
    char piece[PIECE];
    for (size_t g = 0; g < groups; g += some) {
        const size_t last = g + some < groups ? g + some : groups;
        if (n > PIECE) {  // one group, piece by piece
            for (size_t i = 0; i < n; i += PIECE) {
                const size_t m = i + PIECE < n ? PIECE : n - i;
                round_line<S, QUANT_INT4, HOW, ZERO>(piece, q.src + (at + g * n + i) * S::size, m, ahead, factors[g], sums);
                pack_nibbles(q.out + (at + g * n + i) / 2, piece, m);
            }
            continue;
        }
        for (size_t k = g; k < last; ++k)
            round_line<S, QUANT_INT4, HOW, ZERO>(piece + (k - g) * n, q.src + (at + k * n) * S::size, n, ahead, factors[k], sums);
        pack_nibbles(q.out + (at + g * n) / 2, piece, (last - g) * n);
    }
}

template <class S, bool ZERO> bool quantise_groups(const Quant& q) {
    const size_t n = q.block_columns, across = q.columns / n;
    Sums sums;
    for (size_t r = 0; r < q.rows; ++r) {
        for (size_t g0 = 0; g0 < across; g0 += GROUPS) {
            const size_t groups = g0 + GROUPS < across ? GROUPS : across - g0, at = r * q.columns + g0 * n;
            float largest[GROUPS];
            Range range[GROUPS];
            uint32_t worst = 0;
            for (size_t g = 0; g < groups; ++g) {
                const char* src = q.src + (at + g * n) * S::size;
                const uint32_t bits = largest_bits<S>(src, 1, n, n);
                worst = max_of(worst, bits);
                largest[g] = as_float(bits);
                if constexpr (ZERO) range[g] = range_of<S>(src, n);
            }
            if (worst >= INF32) return false;
            Factor factors[GROUPS];
            bool fast = true;
            for (size_t g = 0; g < groups; ++g) {
                const size_t block = r * across + g0 + g;
                const float scale = scale_from(ZERO ? range[g].high - range[g].low : largest[g], q);
                if (!finite(scale)) return false;
                q.scales[block] = scale;
                factors[g] = {scale, 1.0f / scale, ZERO ? zero_from(range[g].low, scale, q.lowest) : 0};
                if constexpr (ZERO) q.zeros[block] = static_cast<int8_t>(factors[g].zero);
                fast &= may_fuse(scale, largest[g]);
            }
            if (fast) round_groups<S, FUSED, ZERO>(q, at, factors, groups, sums);
            else round_groups<S, DIVIDE, ZERO>(q, at, factors, groups, sums);
            sums.counted(groups * n, q.sums);
        }
    }
    sums.add_to(q.sums);
    return true;
}

// ---- blocks of one column: every lane has a scale of its own ----

constexpr size_t STRIP = 512;  // columns at once: their scales stay in the first cache

struct Strip {
    float low[STRIP], high[STRIP];
    float scale[STRIP], reciprocal[STRIP], zero[STRIP];
    char codes[STRIP];
};

template <class S, class U> FASTCKPT_INLINE void widen(Strip& s, size_t c, const char* src, U& found) {
    using F = typename FloatOf<U>::type;
    const U bits = load_as<S, U>(src);
    found = max_of(found, bits & 0x7fffffffu);
    const F x = as_float<U>(bits);
    F low = load_lanes<F>(s.low + c), high = load_lanes<F>(s.high + c);
    low = min_of(x, low), high = max_of(x, high);
    memcpy(s.low + c, &low, sizeof low), memcpy(s.high + c, &high, sizeof high);
}

// Eight rows of a few columns: their codes, as one word a column (DOWN) or as bytes of the strip's row (AWQ).
template <class S, QuantKind KIND, How HOW, bool ZERO, class U>
FASTCKPT_INLINE void round_column(const Quant& q, Strip& s, size_t r, size_t c0, size_t c, size_t count, Sums& sums) {
    using F = typename FloatOf<U>::type;
    const Scale<U> scale{load_lanes<F>(s.scale + c), load_lanes<F>(s.reciprocal + c), load_lanes<F>(s.zero + c)};
    U word{};
    for (size_t k = 0; k < count; ++k) {
        F x, d;
        const U bits = load_as<S, U>(q.src + ((r + k) * q.columns + c0 + c) * S::size);
        const U code = round_one<KIND, HOW, ZERO, U>(bits, scale, x, d);
        sums.add(x, d);
        if constexpr (KIND == QUANT_INT4_DOWN) {
            word |= code << static_cast<uint32_t>(4 * k);
        } else if constexpr (Lanes<U>::count == 1) {
            s.codes[c] = static_cast<char>(code);
        } else {
            store<1>(s.codes + c, code);
        }
    }
    if constexpr (KIND == QUANT_INT4_DOWN) memcpy(q.out + (r / 8 * q.columns + c0 + c) * 4, &word, sizeof word);
}

template <class S, QuantKind KIND, How HOW, bool ZERO>
void round_strip(const Quant& q, Strip& s, size_t r0, size_t r1, size_t c0, size_t n, Sums& sums) {
    constexpr size_t STEP = KIND == QUANT_INT4_DOWN ? 8 : 1;
    for (size_t r = r0; r < r1; r += STEP) {
        size_t c = 0;
        for (; c + LANES <= n; c += LANES) round_column<S, KIND, HOW, ZERO, Words>(q, s, r, c0, c, STEP, sums);
        for (; c < n; ++c) round_column<S, KIND, HOW, ZERO, uint32_t>(q, s, r, c0, c, STEP, sums);
        if constexpr (KIND == QUANT_INT4_AWQ) pack_awq(q.out + (r * q.columns + c0) / 2, s.codes, n);
    }
}

template <class S, QuantKind KIND, bool ZERO> bool quantise_columns(const Quant& q) {
    Strip s;
    Sums sums;
    for (size_t r0 = 0; r0 < q.rows; r0 += q.block_rows) {
        const size_t r1 = r0 + q.block_rows < q.rows ? r0 + q.block_rows : q.rows;
        for (size_t c0 = 0; c0 < q.columns; c0 += STRIP) {
            const size_t n = c0 + STRIP < q.columns ? STRIP : q.columns - c0;
            for (size_t c = 0; c < n; ++c) s.low[c] = s.high[c] = 0;
            Words found{};
            uint32_t rest = 0;
            for (size_t r = r0; r < r1; ++r) {
                const char* src = q.src + (r * q.columns + c0) * S::size;
                size_t c = 0;
                for (; c + LANES <= n; c += LANES) widen<S, Words>(s, c, src + c * S::size, found);
                for (; c < n; ++c) widen<S, uint32_t>(s, c, src + c * S::size, rest);
            }
            if (highest(found) >= INF32 || rest >= INF32) return false;
            bool fast = true;
            for (size_t c = 0; c < n; ++c) {
                const float largest = max_of(s.high[c], -s.low[c]);
                const float scale = scale_from(ZERO ? s.high[c] - s.low[c] : largest, q);
                if (!finite(scale)) return false;
                const size_t at = r0 / q.block_rows * q.columns + c0 + c;
                s.scale[c] = q.scales[at] = scale;
                s.reciprocal[c] = 1.0f / scale;
                s.zero[c] = ZERO ? zero_from(s.low[c], scale, q.lowest) : 0;
                if (ZERO) q.zeros[at] = static_cast<int8_t>(s.zero[c]);
                fast &= may_fuse(scale, largest);
            }
            if (fast) round_strip<S, KIND, FUSED, ZERO>(q, s, r0, r1, c0, n, sums);
            else round_strip<S, KIND, DIVIDE, ZERO>(q, s, r0, r1, c0, n, sums);
            sums.counted((r1 - r0) * n, q.sums);
        }
    }
    sums.add_to(q.sums);
    return true;
}

template <class S> bool quantise_from(const Quant& q) {
    const bool zero = q.zeros != nullptr;
    switch (q.kind) {
        case QUANT_INT8: return quantise_blocks<S, QUANT_INT8>(q);
        case QUANT_E4M3: return quantise_blocks<S, QUANT_E4M3>(q);
        case QUANT_INT4: return zero ? quantise_groups<S, true>(q) : quantise_groups<S, false>(q);
        case QUANT_INT4_AWQ:
            return zero ? quantise_columns<S, QUANT_INT4_AWQ, true>(q) : quantise_columns<S, QUANT_INT4_AWQ, false>(q);
        default:
            return zero ? quantise_columns<S, QUANT_INT4_DOWN, true>(q) : quantise_columns<S, QUANT_INT4_DOWN, false>(q);
    }
}

bool quantise(const Quant& q) {
    FloatMode mode;
    switch (q.dtype) {
        case FLOAT32: return quantise_from<F32>(q);
        case BFLOAT16: return quantise_from<BF16>(q);
        default: return quantise_from<F16>(q);
    }
}

template <class S> void row_amax_of(float* out, const char* src, size_t rows, size_t columns) {
    for (size_t r = 0; r < rows; ++r) out[r] = as_float(largest_bits<S>(src + r * columns * S::size, 1, columns, columns));
}

void row_amax(float* out, const char* src, size_t rows, size_t columns, Dtype dtype) {
    FloatMode mode;
    switch (dtype) {
        case FLOAT32: return row_amax_of<F32>(out, src, rows, columns);
        case BFLOAT16: return row_amax_of<BF16>(out, src, rows, columns);
        default: return row_amax_of<F16>(out, src, rows, columns);
    }
}

}  // namespace
}  // namespace fastckpt
