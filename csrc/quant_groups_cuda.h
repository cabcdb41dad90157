// Groups of a row or of a column quantised to four bits a value, with zero points or without, packed along either; groups
// of a row to floats of four or eight bits and an exponent.
#pragma once

#include "quant_place_cuda.h"

namespace fastckpt {
namespace {

constexpr uint32_t DEEP = 4;  // pieces of a thread under way

// The scales of a piece's values.
struct Scales {
    Scale<uint32_t> of[PATCH];
    bool divide;  // by the scales; else times the reciprocals, corrected or not

    FASTCKPT_HD void all(float scale, float reciprocal, float zero) {
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(PATCH); ++j) of[j] = {scale, reciprocal, zero};
        divide = reciprocal == 0;
    }
};

struct QuantGroups : QuantPlace {
    using QuantPlace::QuantPlace;

    FASTCKPT_HD uint32_t parts() const { return 1u << (q.group - 3); }               // threads of a group
    FASTCKPT_HD bool power() const { return q.flags & QUANT_POWER; }
    FASTCKPT_HD uint32_t step() const { return shape == GROUP ? 1 : 1u << q.width; }  // from one of them to the next

    // ---- load: the ends of each row or column of a thread's patch; NaN stays ----

    struct Ends {
        float low[PATCH], high[PATCH];
    };

    // Piece k of a thread.
    FASTCKPT_HD void look(const uint32_t (&w)[PATCH], uint32_t k, uint32_t thread, uint32_t* shared, Ends& ends) const {
        if (shape == COLUMN) {
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH); ++j)
                ends.low[j] = lower(as_float(w[j]), ends.low[j]), ends.high[j] = higher(as_float(w[j]), ends.high[j]);
        } else {
            float low = 0, high = 0;
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH); ++j) low = lower(as_float(w[j]), low), high = higher(as_float(w[j]), high);
            put_ends(shared, k, thread, low, high);
        }
    }

    static FASTCKPT_HD void put_ends(uint32_t* shared, uint32_t k, uint32_t thread, float low, float high) {
        shared[k * THREADS + thread] = as_bits<uint32_t>(low);
        shared[PATCHES + k * THREADS + thread] = as_bits<uint32_t>(high);
    }

    FASTCKPT_HD void load(uint32_t thread, uint32_t* shared) const {
        const uint32_t r0 = row_of(thread), c = column_of(thread);
        Ends ends = {};
        FASTCKPT_KEEP_LOOP
        for (uint32_t k = 0; k < PATCH; k += DEEP) {
            const uint32_t r = r0 + k;
            const char* p = place(r, c);
            uint32_t w[DEEP][PATCH];
            if (r + DEEP <= q.rows && c + PATCH <= q.columns && misalignment(p, 16) == 0 && (q.pitch & 15) == 0) {
                FASTCKPT_UNROLL
                for (int i = 0; i < static_cast<int>(DEEP); ++i) fetch(w[i], p + i * q.pitch);
                FASTCKPT_UNROLL
                for (int i = 0; i < static_cast<int>(DEEP); ++i) {
                    widen(w[i]);
                    look(w[i], k + i, thread, shared, ends);
                }
                continue;
            }
            FASTCKPT_KEEP_LOOP
            for (uint32_t i = 0; i < DEEP; ++i) {
                push(w[0], r + i, c);
                widen(w[0]);
                look(w[0], k + i, thread, shared, ends);
            }
        }
        if (shape == GROUP) return;
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(PATCH); ++j) put_ends(shared, j, thread, ends.low[j], ends.high[j]);
    }

    // ---- fold: the ends of a group to its scale, reciprocal and zero point ----

    FASTCKPT_HD void fold(uint32_t thread, uint32_t* shared) const {
        const uint32_t log = 8 + 3 - q.group;  // 2^log groups of the same row or column of each patch
        FASTCKPT_KEEP_LOOP
        for (uint32_t g = thread; g < PATCH << log; g += THREADS) {
            const uint32_t k = g >> log, leader = (g & ((1u << log) - 1)) * (shape == GROUP ? parts() : 1), first = k * THREADS + leader;
            float low = 0, high = 0;
            FASTCKPT_KEEP_LOOP
            for (uint32_t i = 0; i < parts(); ++i) {  // begun in different places: free of most bank conflicts
                const uint32_t at = first + ((i + g) & (parts() - 1)) * step();
                low = lower(as_float(shared[at]), low), high = higher(as_float(shared[PATCHES + at]), high);
            }
            const bool zero = q.flags & QUANT_ZERO;
            const float span = zero ? high - low : higher(high, -low), scale = power() ? power_of(span) : scale_of(span);
            shared[first] = as_bits<uint32_t>(scale);
            shared[first + step()] = as_bits<uint32_t>(factor(scale, span));
            shared[PATCHES + first] = as_bits<uint32_t>(zero ? zero_from(low, scale, q.lowest) : 0.0f);
            const uint32_t r = row_of(leader) + (shape == GROUP ? k : 0), c = column_of(leader) + (shape == GROUP ? 0 : k);
            if (r >= q.rows || c >= q.columns) continue;
            const uint64_t above = uint64_t{q.first} + r;
            const uint64_t at = shape == GROUP ? (above * q.columns + c) >> q.group : (above >> q.group) * q.columns + c;
            if (power()) reinterpret_cast<uint8_t*>(q.scales)[at] = static_cast<uint8_t>(as_bits<uint32_t>(scale) >> 23);
            else put_scale(at, scale);
        }
    }

    FASTCKPT_HD float power_of(float span) const {
        if (!finite(span)) refuse();
        return power_from(magnitude(span), q.reach);  // of zeros it may be -0
    }

    // ---- store ----

    // The bits of eight values become their codes of a float of four bits; of eight bits, four a word.
    FASTCKPT_HD void code_floats(uint32_t (&w)[PATCH], float reciprocal) const {
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(PATCH); ++j) {
            const float v = as_float(w[j]) * reciprocal;
            float y;
            w[j] = q.kind == QUANT_E4M3 ? as_bits<uint32_t>(v) : e2m1<uint32_t>(magnitude(v), y) | (as_bits<uint32_t>(v) >> 28 & 8u);
        }
        if (q.kind == QUANT_E4M3) w[0] = narrow_four<E4M3>(w), w[1] = narrow_four<E4M3>(w + 4);
    }

    // The bits of eight values become their codes of four bits.
    FASTCKPT_HD void code(uint32_t (&w)[PATCH], Scales& scales) const {
        float v[PATCH], y;
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(PATCH); ++j) v[j] = as_float(w[j]) * scales.of[j].reciprocal;
        if (scales.divide) {  // rare: a small body, one value after the other is pushed through
            FASTCKPT_KEEP_LOOP
            for (uint32_t k = 0; k < PATCH; ++k) {
                const float x = as_float(w[0]), s = scales.of[0].scale;
                FASTCKPT_UNROLL
                for (int j = 0; j < static_cast<int>(PATCH) - 1; ++j)
                    v[j] = v[j + 1], w[j] = w[j + 1], scales.of[j].scale = scales.of[j + 1].scale;
                v[PATCH - 1] = x / s, w[PATCH - 1] = as_bits<uint32_t>(x), scales.of[PATCH - 1].scale = s;
            }
        } else {
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH); ++j) v[j] = corrected<uint32_t>(v[j], as_float(w[j]), scales.of[j]);
        }
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(PATCH); ++j) w[j] = (whole<true, uint32_t>(v[j], scales.of[j].zero, 7.0f, y) ^ 8) & 0xf;
    }

    // Eight codes in four bits each of a word, the first lowest, or in AWQ's order: 0, 2, 4, 6, 1, 3, 5, 7.
    FASTCKPT_HD uint32_t nibbles(const uint32_t (&w)[PATCH]) const {
        uint32_t word = 0;
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(PATCH); ++j) word |= w[j] << 4 * j;
        if (q.kind == QUANT_INT4_AWQ) {
            word = (word & 0xf00ff00fu) | (word >> 4 & 0x00f000f0u) | (word & 0x00f000f0u) << 4;
            word = (word & 0xff0000ffu) | (word >> 8 & 0x0000ff00u) | (word & 0x0000ff00u) << 8;
        }
        return word;
    }

    FASTCKPT_HD void put_word(uint64_t address, uint64_t at, uint32_t word) const {
        store_aligned<4>(reinterpret_cast<char*>(address) + 4 * at, word);
    }
    // A zero point as it is stored, in its four bits.
    FASTCKPT_HD uint32_t stored(float zero) const { return static_cast<uint32_t>(static_cast<int32_t>(zero - q.lowest)) & 0xfu; }

    // The scales of a group of each of eight columns; their zero points packed.
    FASTCKPT_HD void column_scales(uint32_t thread, const uint32_t* shared, uint64_t at, Scales& scales) const {
        uint32_t points[PATCH];
        scales.divide = false;
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(PATCH); ++j) {
            const uint32_t* held = shared + j * THREADS + lane(thread);
            scales.of[j] = {as_float(held[0]), as_float(held[step()]), as_float(held[PATCHES])};
            scales.divide |= held[step()] == 0;
            points[j] = stored(scales.of[j].zero);
        }
        if (lane(thread) == thread && q.zeros != 0) put_word(q.zeros, at / PATCH, nibbles(points));
    }

    FASTCKPT_HD void store(uint32_t thread, const uint32_t* shared) const {
        uint32_t r = row_of(thread);
        const uint32_t c = column_of(thread);
        if (r >= q.rows || c >= q.columns) return;
        const uint32_t above = q.first + r;
        Scales scales{};
        if (shape == COLUMN) column_scales(thread, shared, static_cast<uint64_t>(above >> q.group) * q.columns + c, scales);
        uint32_t words[PATCH] = {}, points = 0;  // of a patch's columns, of its rows
        uint64_t at = static_cast<uint64_t>(above) * q.columns + c;
        FASTCKPT_KEEP_LOOP
        for (uint32_t k = 0; k < PATCH && r < q.rows; ++k) {
            if (shape == GROUP) {
                const uint32_t* held = shared + k * THREADS + (thread & ~(parts() - 1));
                scales.all(as_float(held[0]), as_float(held[1]), as_float(held[PATCHES]));
                points |= stored(scales.of[0].zero) << 4 * k;
            }
            uint32_t w[PATCH];
            const char* p = place(r, c);
            if (c + PATCH <= q.columns && misalignment(p, 16) == 0) fetch(w, p);
            else push(w, r, c);
            widen(w);
            if (power()) code_floats(w, scales.of[0].reciprocal);
            else code(w, scales);
            if (q.kind == QUANT_E4M3) {
                store_vector<2>(reinterpret_cast<char*>(q.out) + at, w);
            } else if (q.kind == QUANT_INT4_DOWN) {
                FASTCKPT_UNROLL
                for (int j = 0; j < static_cast<int>(PATCH); ++j) words[j] |= w[j] << 4 * k;
            } else {
                put_word(q.out, at / PATCH, nibbles(w));
            }
            ++r, at += q.columns;
        }
        const uint64_t eight = above / PATCH;
        if (q.kind == QUANT_INT4_DOWN) {
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH); ++j) put_word(q.out, eight * q.columns + c + j, words[j]);
        }
        if (shape == GROUP && q.zeros != 0 && (thread & (parts() - 1)) == 0)
            put_word(q.zeros, eight * (q.columns >> q.group) + (c >> q.group), points);
    }
};

}  // namespace
}  // namespace fastckpt
