// Matrices quantised by a GPU: a tile of a QuantRows, which one block takes, and where its threads stand in it. Its values
// are read once for their largest magnitude or their range, and once more, out of cache, to be rounded and packed.
//
// A body like those of tile_cuda.h with three phases, load, fold and store, and a barrier between each. A thread
// takes eight values of a row at once, a piece; 2^width threads stand side by side along a row. LINE: they take a whole
// row, piece after piece. The others: each takes the pieces of eight rows, one below the other, a patch of 8 x 8.
//
// Lines and squares become bytes (quant_bytes_cuda.h), groups of rows or columns four bits, or bytes with an exponent
// (quant_groups_cuda.h).
#pragma once

#include "codes.h"
#include "copy_cuda.h"
#include "tile_cuda.h"

namespace fastckpt {
namespace {

constexpr uint32_t PATCH = 8, SQUARE_SIDE = 128;
constexpr uint32_t PATCHES = THREADS * PATCH;   // pieces of a tile
constexpr uint32_t QUANT_SHARED = 2 * PATCHES;  // words: the low and the high end of each row or column of a patch

// What shares a scale: a row or several, a square block, a group of a row, a group of a column.
enum QuantShape : uint8_t { LINE, SQUARE, GROUP, COLUMN };

FASTCKPT_HD QuantShape shape_of(const QuantRows& q) {
    if (q.kind == QUANT_INT4 || q.flags & QUANT_POWER) return GROUP;
    if (q.kind == QUANT_INT4_AWQ || q.kind == QUANT_INT4_DOWN) return COLUMN;
    return q.flags & QUANT_SQUARE ? SQUARE : LINE;
}

FASTCKPT_HD uint64_t quant_tiles_of(const QuantRows& q) {
    if (shape_of(q) == LINE) return ratio_up(q.rows, THREADS >> q.width);
    return ratio_up(q.rows, PATCHES >> q.width) * ratio_up(q.columns, PATCH << q.width);
}

struct QuantPlace {
    const QuantRows q;     // by value: nothing is read again after a store
    QuantShape shape;
    uint32_t size;         // bytes of a value
    uint32_t row, column;  // of the tile's first value

    FASTCKPT_HD QuantPlace(const QuantRows* rows, const uint32_t* owner, uint64_t i)
        : q(rows[owner[i]]), shape(shape_of(q)), size(item_size(q.dtype)) {
        const uint32_t tile = static_cast<uint32_t>(i - q.first_tile);
        if (shape == LINE) {
            row = tile * (THREADS >> q.width), column = 0;
        } else {
            const uint32_t across = ((q.columns - 1) >> (q.width + 3)) + 1, down = tile / across;
            row = down * (PATCHES >> q.width), column = (tile - down * across) * (PATCH << q.width);
        }
    }

    FASTCKPT_HD bool line() const { return shape == LINE; }
    FASTCKPT_HD uint32_t lane(uint32_t thread) const { return thread & ((1u << q.width) - 1); }
    FASTCKPT_HD uint32_t row_of(uint32_t thread) const { return row + (thread >> q.width) * (line() ? 1 : PATCH); }
    FASTCKPT_HD uint32_t column_of(uint32_t thread) const { return column + lane(thread) * PATCH; }

    FASTCKPT_HD const char* place(uint32_t r, uint32_t c) const {
        return reinterpret_cast<const char*>(q.src) + static_cast<int64_t>(r) * q.pitch + static_cast<uint64_t>(c) * size;
    }
    FASTCKPT_HD void refuse() const { *reinterpret_cast<uint32_t*>(q.bad) = 1; }

    // ---- pieces: packed words, then the bits of fp32 values ----

    FASTCKPT_HD void fetch(uint32_t (&w)[PATCH], const char* p) const {
        load_kept<4>(w, p);
        if (size == 4) load_kept<4>(w + 4, p + 16);
    }

    // A piece at a border, zeros beyond, or not aligned: one value after the other is pushed in.
    FASTCKPT_HD void push(uint32_t (&w)[PATCH], uint32_t r, uint32_t c) const {
        const char* p = place(r, c);
        FASTCKPT_KEEP_LOOP
        for (uint32_t j = 0; j < PATCH; ++j, p += size) {
            const bool inside = r < q.rows && c + j < q.columns;
            const uint32_t x = !inside ? 0 : size == 4 ? load_aligned<4>(p) : load_aligned<2>(p);
            FASTCKPT_UNROLL
            for (int i = 0; i < static_cast<int>(PATCH) - 1; ++i)
                w[i] = size == 4 ? w[i + 1] : i < 3 ? funnel(w[i], w[i + 1], 16) : i == 3 ? w[i] >> 16 | x << 16 : 0;
            w[PATCH - 1] = size == 4 ? x : 0;
        }
    }

    template <uint32_t N> FASTCKPT_HD void widen(uint32_t (&w)[N]) const {
        if (q.dtype == BFLOAT16) {
            FASTCKPT_UNROLL
            for (int j = N - 1; j >= 0; --j) w[j] = j % 2 ? w[j / 2] & 0xffff0000u : w[j / 2] << 16;
        } else if (q.dtype == FLOAT16) {
            FASTCKPT_UNROLL
            for (int j = N - 1; j >= 0; --j) w[j] = as_bits<uint32_t>(from_half(w[j / 2] >> j % 2 * 16 & 0xffffu));
        }
    }

    // ---- scales ----

    FASTCKPT_HD float scale_of(float span) const {
        const float scale = scale_from(span, q.reach, q.floor, q.flags & QUANT_HALF);
        if (!finite(span) || !finite(scale)) refuse();
        return scale;
    }

    // The reciprocal of a scale, or with -1 its negative; 0 where values up to `span` must be divided by the scale itself.
    FASTCKPT_HD float factor(float scale, float span, float one = 1.0f) const {
        return q.flags & QUANT_RECIPROCAL || fuses(scale, span) ? one / scale : 0.0f;
    }

    FASTCKPT_HD void put_scale(uint64_t at, float scale) const {
        char* to = reinterpret_cast<char*>(q.scales);
        if (q.flags & QUANT_HALF) store_aligned<2>(to + 2 * at, static_cast<uint16_t>(to_half(scale)));
        else store_aligned<4>(to + 4 * at, as_bits<uint32_t>(scale));
    }
};

}  // namespace
}  // namespace fastckpt
