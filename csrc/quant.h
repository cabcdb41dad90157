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

// The least and the largest of n values and 0; NaN is passed over.
struct Range {
    float low = 0, high = 0;
};
template <class S> FASTCKPT_INLINE Range range_of(const char* p, size_t n) {
    Floats low[2] = {{}, {}}, high[2] = {{}, {}};
    Range out;
    size_t i = 0;
    auto take = [&](int k, size_t at) {
        const Floats x = as_float<Words>(load_as<S, Words>(p + at * S::size));
        low[k] = min_of(x, low[k]), high[k] = max_of(x, high[k]);
    };
    for (; i + 2 * LANES <= n; i += 2 * LANES) take(0, i), take(1, i + LANES);
    for (; i + LANES <= n; i += LANES) take(0, i);
    for (; i < n; ++i) {
        const float x = as_float(load_as<S, uint32_t>(p + i * S::size));
        out.low = min_of(x, out.low), out.high = max_of(x, out.high);
    }
    out.low = min_of(out.low, -highest(-min_of(low[0], low[1])));
    out.high = max_of(out.high, highest(max_of(high[0], high[1])));
    return out;
}

// How far y lies from x: kept as sums of x - y, of which the others follow.
struct Sums {
    Floats biggest{}, difference{}, dense{}, across{};
    size_t values = 0;

    void add(Floats x, Floats d) {
        biggest = max_of(as_float<Words>(as_bits<Words>(d) & 0x7fffffffu), biggest);
        difference = multiply_add(d, d, difference), dense = multiply_add(x, x, dense), across = multiply_add(x, d, across);
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
    x = as_float<U>(KIND == QUANT_E4M3 || KIND == QUANT_E2M1 ? bits & 0x7fffffffu : bits);
    const auto v = divided<HOW, U>(x, s);
    typename FloatOf<U>::type y;
    U code;
    if constexpr (KIND == QUANT_E4M3) code = e4m3<U>(v, y) | (bits >> 24 & 0x80u);
    else if constexpr (KIND == QUANT_E2M1) code = e2m1<U>(v, y) | (bits >> 28 & 8u);
    else if constexpr (KIND == QUANT_INT8) code = whole<ZERO, U>(v, s.zero, 127.0f, y) & 0xffu;
    else code = (whole<ZERO, U>(v, s.zero, 7.0f, y) ^ 8u) & 0xfu;
    d = multiply_add(-y, s.scale, x);
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

FASTCKPT_INLINE float scale_from(float span, const Quant& q) {
    return q.power ? power_from(span, q.reach) : scale_from(span, q.reach, q.floor, q.half);
}

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

// ---- groups of a line, four bits each ----

constexpr size_t GROUPS = 128, PIECE = 1024;  // groups whose scales are found at once, values packed at once

// The scales of groups of n values, `step` bytes apart; `at`: the number of the first. False where one is not finite; with
// zero points NaN shows in the error alone: `whole`.
template <class S, bool ZERO>
bool find_factors(const Quant& q, const char* src, size_t groups, size_t n, size_t step, size_t at, Factor* factors, bool& fast) {
    Range range[GROUPS];
    uint32_t worst = 0;
    for (size_t g = 0; g < groups; ++g) {
        if constexpr (ZERO) {
            range[g] = range_of<S>(src + g * step, n);
        } else {
            const uint32_t bits = largest_bits<S>(src + g * step, 1, n, n);
            worst = max_of(worst, bits);
            range[g].high = as_float(bits);
        }
    }
    if (worst >= INF32) return false;
    fast = true;
    for (size_t g = 0; g < groups; ++g) {
        const float scale = scale_from(range[g].high - range[g].low, q);
        if (!finite(scale)) return false;
        q.scales[at + g] = scale;
        factors[g] = {scale, 1.0f / scale, ZERO ? zero_from(range[g].low, scale, q.lowest) : 0};
        if constexpr (ZERO) q.zeros[at + g] = static_cast<int8_t>(factors[g].zero);
        fast &= may_fuse(scale, max_of(range[g].high, -range[g].low));
    }
    return true;
}

// The codes of those groups, one a byte, group after group.
template <class S, QuantKind KIND, How HOW, bool ZERO>
void round_groups(char* codes, const char* src, size_t groups, size_t n, size_t step, ptrdiff_t ahead, const Factor* factors, Sums& sums) {
    for (size_t g = 0; g < groups; ++g) round_line<S, KIND, HOW, ZERO>(codes + g * n, src + g * step, n, ahead, factors[g], sums);
}

template <class S, QuantKind KIND, bool ZERO>
void round_groups(char* codes, const char* src, size_t groups, size_t n, size_t step, ptrdiff_t ahead, const Factor* factors, bool fast, Sums& sums) {
    if constexpr (KIND == QUANT_E2M1) round_groups<S, KIND, RECIPROCAL, ZERO>(codes, src, groups, n, step, ahead, factors, sums);
    else if (fast) round_groups<S, KIND, FUSED, ZERO>(codes, src, groups, n, step, ahead, factors, sums);
    else round_groups<S, KIND, DIVIDE, ZERO>(codes, src, groups, n, step, ahead, factors, sums);
}

bool whole(Sums& sums, const Quant& q) {
    sums.add_to(q.sums);
    return q.sums[1] == q.sums[1];
}

template <class S, QuantKind KIND, bool ZERO> bool quantise_groups(const Quant& q) {
    const size_t n = q.block_columns, across = q.columns / n, some = n < PIECE ? PIECE / n : 1;
    Sums sums;
    for (size_t r = 0; r < q.rows; ++r) {
        for (size_t g0 = 0; g0 < across; g0 += GROUPS) {
            const size_t groups = g0 + GROUPS < across ? GROUPS : across - g0;
            const char* src = q.src + (r * q.columns + g0 * n) * S::size;
            char* out = q.out + (r * q.columns + g0 * n) / 2;
            Factor factors[GROUPS];
            bool fast;
            if (!find_factors<S, ZERO>(q, src, groups, n, n * S::size, r * across + g0, factors, fast)) return false;
            const ptrdiff_t ahead = static_cast<ptrdiff_t>(groups * n * S::size);
            char piece[PIECE];
            for (size_t g = 0; g < groups; g += some) {
                const size_t count = g + some < groups ? some : groups - g;
                for (size_t i = 0; i < n; i += PIECE) {  // several groups, or a part of one
                    const size_t m = i + PIECE < n ? PIECE : n - i;
                    round_groups<S, KIND, ZERO>(piece, src + (g * n + i) * S::size, count, m, n * S::size, ahead, factors + g, fast, sums);
                    pack_nibbles(out + (g * n + i) / 2, piece, count * m);
                }
            }
            sums.counted(groups * n, q.sums);
        }
    }
    return whole(sums, q);
}

// ---- groups of a column, where columns lie as lines ----

// The words of n rows of a few columns, a word of a line of each; `stride`: words of a row of the output.
FASTCKPT_INLINE void put_words(char* out, size_t stride, const uint32_t* words, size_t n, size_t columns) {
    size_t c = 0;
    for (; n % LANES == 0 && c + LANES <= columns; c += LANES)
        for (size_t r = 0; r < n; r += LANES) {
            Words m[LANES];
            for (size_t k = 0; k < LANES; ++k) memcpy(&m[k], words + (c + k) * n + r, sizeof m[k]);
            transpose(m);
            for (size_t k = 0; k < LANES; ++k) memcpy(out + ((r + k) * stride + c) * 4, &m[k], sizeof m[k]);
        }
    for (size_t r = 0; r < n; ++r)
        for (size_t k = c; k < columns; ++k) memcpy(out + (r * stride + k) * 4, words + k * n + r, 4);
}

// Codes of eight lines as words: AWQ's order, 0, 2, 4, 6, 1, 3, 5, 7 from the lowest.
FASTCKPT_INLINE void join_awq(uint32_t* words, const char* codes, size_t n) {
    const auto* c = reinterpret_cast<const uint8_t*>(codes);
    for (size_t i = 0; i < n; ++i)
        words[i] = c[i] | c[n + i] << 16 | c[2 * n + i] << 4 | c[3 * n + i] << 20 | c[4 * n + i] << 8 | c[5 * n + i] << 24 |
                   c[6 * n + i] << 12 | static_cast<uint32_t>(c[7 * n + i]) << 28;
}

// Not std::vector: its code would be shared by the instruction sets.
struct Scratch {
    explicit Scratch(size_t nbytes) : bytes(new char[nbytes]) {}
    ~Scratch() { delete[] bytes; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    char* const bytes;
};

template <class S, bool ZERO> bool quantise_turned(const Quant& q) {
    const size_t most = q.block_rows < q.rows ? q.block_rows : q.rows;
    const Scratch scratch(GROUPS * most * 3 / 2);
    char *const packed = scratch.bytes, *const codes = packed + GROUPS * most / 2;
    uint32_t* const words = reinterpret_cast<uint32_t*>(packed);
    Sums sums;
    const size_t strip = q.kind == QUANT_INT4_DOWN ? 32 : GROUPS;  // so many make whole lines of the output
    for (size_t c = 0; c < q.columns; c += strip) {
        const size_t count = c + strip < q.columns ? strip : q.columns - c;
        for (size_t r = 0; r < q.rows; r += most) {
            const size_t n = r + most < q.rows ? most : q.rows - r;
            const char* src = q.src + c * q.pitch + r * S::size;
            Factor factors[GROUPS];
            bool fast;
            if (!find_factors<S, ZERO>(q, src, count, n, q.pitch, r / most * q.columns + c, factors, fast)) return false;
            // the next groups of these columns, or the first of the next ones
            const size_t ahead = r + n < q.rows ? n * S::size : strip * q.pitch - r * S::size;
            round_groups<S, QUANT_INT4, ZERO>(codes, src, count, n, q.pitch, static_cast<ptrdiff_t>(ahead), factors, fast, sums);
            if (q.kind == QUANT_INT4_DOWN) {
                pack_nibbles(packed, codes, count * n);
                put_words(q.out + (r / 8 * q.columns + c) * 4, q.columns, words, n / 8, count);
            } else {
                for (size_t k = 0; k < count; k += 8) join_awq(words + k / 8 * n, codes + k * n, n);
                put_words(q.out + (r * q.columns + c) / 2, q.columns / 8, words, n, count / 8);
            }
            sums.counted(count * n, q.sums);
        }
    }
    return whole(sums, q);
}

template <class S> bool quantise_from(const Quant& q) {
    const bool zero = q.zeros != nullptr;
    switch (q.kind) {
        case QUANT_INT8: return quantise_blocks<S, QUANT_INT8>(q);
        case QUANT_E4M3: return quantise_blocks<S, QUANT_E4M3>(q);
        case QUANT_INT4: return zero ? quantise_groups<S, QUANT_INT4, true>(q) : quantise_groups<S, QUANT_INT4, false>(q);
        case QUANT_E2M1: return quantise_groups<S, QUANT_E2M1, false>(q);
        default: return zero ? quantise_turned<S, true>(q) : quantise_turned<S, false>(q);
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
