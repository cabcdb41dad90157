// Transposed tiles: axis 3 is contiguous in the destination, axis 2 in the source.
//
// A tile is 32 words of 1, 2 or 4 packed destination elements along axis 3, by `columns_of_tile` along axis 2. It
// is cast and packed before it goes to shared memory, so that both sides move whole 128-byte lines. Tiles begin
// on multiples of 16 bytes on each side where the strides allow it. Where a row is short along axis 3, as what a
// partition holds of a matrix, the tile is folded: 2^folds parts of fewer words each, side by side along axis 2.
#pragma once

#include "tile_cuda.h"

namespace fastckpt {
namespace {

constexpr uint32_t WORDS = 32, SHARED_WORDS = WORDS * 128;

FASTCKPT_HD constexpr uint32_t rows_of_tile(uint32_t d) { return WORDS * 4 / d; }
FASTCKPT_HD constexpr uint32_t columns_of_tile(uint32_t s, uint32_t d) { return smaller(128, 128 * d / s); }

// Where word `word` of column `column` lies in shared memory. VECTOR columns are 16 source bytes. Both ways are
// free of bank conflicts: a warp writes 4 words of 8 neighbouring vectors, and reads whole columns.
template <uint32_t VECTOR> FASTCKPT_HD uint32_t slot(uint32_t word, uint32_t column) {
    return column * WORDS + ((word / 4 ^ column / VECTOR) & 7) * 4 + word % 4;
}

constexpr uint32_t MOST_FOLDS = 3;  // 4 words are a vector of the destination

struct Sheet {  // a row as tiles
    uint32_t row_head, column_head;  // elements before the row in its first tiles
    uint32_t folds;
    uint32_t high, wide;             // tiles along axis 3 and axis 2
};
FASTCKPT_HD Sheet sheet_of(const Copy& c, uint32_t s, uint32_t d) {
    const int64_t dst = c.dst_stride[0] | c.dst_stride[1] | c.dst_stride[2], src = c.src_stride[0] | c.src_stride[1] | c.src_stride[3];
    const uint32_t row_head = (dst & 15) == 0 && c.dst % d == 0 ? static_cast<uint32_t>(c.dst & 15) / d : 0;
    const uint32_t column_head = (src & 15) == 0 && c.src % s == 0 ? static_cast<uint32_t>(c.src & 15) / s : 0;
    uint32_t folds = 0, wide = static_cast<uint32_t>(ratio_up(uint64_t{c.shape[2]} + column_head, columns_of_tile(s, d)));
    if (c.shape[3] <= rows_of_tile(d) / 2)
        for (; folds < MOST_FOLDS && c.shape[3] + row_head <= rows_of_tile(d) >> (folds + 1) && wide > 1; ++folds) wide = (wide + 1) / 2;
    return {row_head, column_head, folds, static_cast<uint32_t>(ratio_up(uint64_t{c.shape[3]} + row_head, rows_of_tile(d))), wide};
}

template <class S, class D> struct Transposed {
    static constexpr uint32_t s = S::size, d = D::size;
    static constexpr uint32_t GROUP = 4 / d;                               // rows in a word
    static constexpr uint32_t VECTOR = 16 / s;                             // columns in a vector
    static constexpr uint32_t HEIGHT = rows_of_tile(d), COLUMNS = columns_of_tile(s, d);
    static constexpr uint32_t LOADS = COLUMNS / VECTOR * WORDS / THREADS;  // vectors of words of a thread
    static constexpr uint32_t STORES = COLUMNS * WORDS / 4 / THREADS;      // vectors of a thread
    static constexpr bool SHARED = true;

    const char* src;  // of the tile's first element, which may lie before the row
    char* dst;
    int64_t src_pitch, dst_pitch;
    uint32_t row_low, row_high, column_low, column_high;  // what of the tile lies in the row
    uint32_t folds, mask;  // which bits of a word's number tell where in its part it is
    bool vectors_in, vectors_out;

    FASTCKPT_HD Transposed(const Work& w) {
        const Copy& c = w.c;
        const Sheet sheet = sheet_of(c, s, d);
        const uint32_t at = static_cast<uint32_t>(w.tile);  // a path has fewer than 2^31 tiles
        const uint32_t area = sheet.high * sheet.wide, plane = quotient(at, area), tile = at - plane * area;
        const uint32_t across = quotient(tile, sheet.wide), along = tile - across * sheet.wide;
        const uint32_t i0 = quotient(plane, c.shape[1]), i1 = plane - i0 * c.shape[1];
        folds = sheet.folds, mask = (WORDS >> folds) - 1;
        const int64_t row = int64_t{across} * HEIGHT - sheet.row_head, column = int64_t{along << folds} * COLUMNS - sheet.column_head;
        src_pitch = c.src_stride[3];
        dst_pitch = c.dst_stride[2];
        src = w.src + i0 * c.src_stride[0] + i1 * c.src_stride[1] + row * src_pitch + column * static_cast<int64_t>(s);
        dst = w.dst + i0 * c.dst_stride[0] + i1 * c.dst_stride[1] + column * dst_pitch + row * static_cast<int64_t>(d);
        row_low = row < 0 ? static_cast<uint32_t>(-row) : 0;
        column_low = column < 0 ? static_cast<uint32_t>(-column) : 0;
        const int64_t rows = c.shape[3] - row, columns = c.shape[2] - column;
        row_high = rows < HEIGHT ? static_cast<uint32_t>(rows) : HEIGHT;
        column_high = columns < COLUMNS << folds ? static_cast<uint32_t>(columns) : COLUMNS << folds;
        vectors_in = column_low == 0 && column_high % VECTOR == 0 && misalignment(src, 16) == 0 && (src_pitch & 15) == 0;
        vectors_out = misalignment(dst, 16) == 0 && (dst_pitch & 15) == 0;
    }

    // The columns before the part of a word.
    FASTCKPT_HD uint32_t beside(uint32_t word) const { return (word & ~mask) * (COLUMNS / WORDS) << folds; }

    FASTCKPT_HD void load(uint32_t thread, uint32_t* shared) const {
        if (!vectors_in) {
            load_words(thread, shared);
            return;
        }
        const uint32_t word = thread / 32 * 4 + thread % 32 / 8, vector = thread % 8;
        const uint32_t first = (word & mask) * GROUP, before = beside(word);
        const uint32_t end = before < column_high ? row_high : 0, last = column_high - before - VECTOR;
        const char* from = src + static_cast<int64_t>(first) * src_pitch + before * s;
        Vector x[LOADS][GROUP] = {};
        FASTCKPT_UNROLL
        for (int g = 0; g < static_cast<int>(GROUP); ++g) {
            const uint32_t row = first + g;
            if (row < row_low || row >= end) continue;
            FASTCKPT_UNROLL  // the last vector again where there are no more
            for (int i = 0; i < static_cast<int>(LOADS); ++i)
                x[i][g] = load_vector(from + g * src_pitch + smaller((vector + 8 * i) * VECTOR, last) * s);
        }
        FASTCKPT_UNROLL
        for (int i = 0; i < static_cast<int>(LOADS); ++i) {
            uint32_t* to = shared + slot<VECTOR>(word, vector * VECTOR) + i * 8 * VECTOR * WORDS;  // the slot of its column
            uint32_t in[4 * GROUP], out[VECTOR];
            by_columns(in, x[i]);
            if constexpr (!Same<S, D>::value) {
                FASTCKPT_UNROLL
                for (int k = 0; k < static_cast<int>(VECTOR * GROUP); k += 8)
                    convert_packed<S, D, 8>(out + k * d / 4, in + k * s / 4);
            }
            FASTCKPT_UNROLL
            for (int v = 0; v < static_cast<int>(VECTOR); ++v) to[v * WORDS] = Same<S, D>::value ? in[v] : out[v];
        }
    }

    // GROUP rows of VECTOR elements, packed: the elements of each column side by side.
    static FASTCKPT_HD void by_columns(uint32_t (&in)[4 * GROUP], const Vector (&x)[GROUP]) {
        FASTCKPT_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (s == 4 || GROUP == 1) {
                FASTCKPT_UNROLL
                for (int g = 0; g < static_cast<int>(GROUP); ++g) in[i * GROUP + g] = x[g].word[i];
            } else if constexpr (s == 2) {
                FASTCKPT_UNROLL
                for (int g = 0; g < static_cast<int>(GROUP); g += 2) {
                    in[i * GROUP + g / 2] = bytes_of(x[g].word[i], x[g + 1].word[i], 0x5410);
                    in[i * GROUP + (GROUP + g) / 2] = bytes_of(x[g].word[i], x[g + 1].word[i], 0x7632);
                }
            } else {
                FASTCKPT_UNROLL
                for (int k = 0; k < 2; ++k) {  // two columns
                    const uint32_t how = k == 0 ? 0x5140 : 0x7362;
                    const uint32_t a = bytes_of(x[0].word[i], x[1].word[i], how), b = bytes_of(x[2].word[i], x[3].word[i], how);
                    in[i * 4 + 2 * k] = bytes_of(a, b, 0x5410), in[i * 4 + 2 * k + 1] = bytes_of(a, b, 0x7632);
                }
            }
        }
    }

    // The same, element by element: a tile whose columns end within a vector, or rows that are not aligned.
    FASTCKPT_HD void load_words(uint32_t thread, uint32_t* shared) const {
        FASTCKPT_KEEP_LOOP
        for (uint32_t i = thread; i < WORDS * COLUMNS; i += THREADS) {
            const uint32_t word = i / COLUMNS, column = i % COLUMNS + beside(word);
            const bool inside = column >= column_low && column < column_high;
            uint32_t bits = 0;
            FASTCKPT_UNROLL
            for (int g = 0; g < static_cast<int>(GROUP); ++g) {
                const uint32_t row = (word & mask) * GROUP + g;
                if (inside && row >= row_low && row < row_high)
                    bits |= convert<S, D>(static_cast<uint32_t>(load_cell<s>(src + row * src_pitch + column * s))) << g * d % 4 * 8;
            }
            shared[slot<VECTOR>(word, i % COLUMNS)] = bits;
        }
    }

    FASTCKPT_HD void store(uint32_t thread, uint32_t* shared) const {
        FASTCKPT_UNROLL
        for (int i = 0; i < static_cast<int>(STORES); ++i) {
            const uint32_t stood = thread / 8 + i * (THREADS / 8), word = thread % 8 * 4, column = stood + beside(word);
            if (column < column_low || column >= column_high) continue;
            const uint32_t* at = shared + slot<VECTOR>(word, stood);
            char* to = dst + column * dst_pitch + (word & mask) * 4;
            const uint32_t row = (word & mask) * GROUP;
            if (vectors_out && row >= row_low && row + 4 * GROUP <= row_high) store_vector<4>(to, load_shared(at).word);
            else store_elements(to, at, row);
        }
    }

    FASTCKPT_HD void store_elements(char* to, const uint32_t* words, uint32_t row) const {
        FASTCKPT_KEEP_LOOP
        for (uint32_t i = 0; i < 4 * GROUP; ++i)
            if (row + i >= row_low && row + i < row_high)
                store_cell<d>(to + i * d, static_cast<typename Cell<d>::type>(words[i / GROUP] >> i % GROUP * 8 * d));
    }
};

}  // namespace
}  // namespace fastckpt
