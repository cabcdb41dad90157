// Matrices quantised by a GPU: what one block does of a QuantRows, a tile. It reads its values once for their largest
// magnitude or their range, and once more, out of cache, to round and pack them.
//
// A body like those of tile_cuda.h with three phases, load, fold and store, and a barrier between each. A thread
// takes eight values of a row at once, a piece; 2^width threads stand side by side along a row. LINE: they take a whole
// row, piece after piece. The others: each takes the pieces of eight rows, one below the other, a patch of 8 x 8.
#pragma once

#include "codes.h"
#include "copy_cuda.h"
#include "tile_cuda.h"

namespace fastckpt {
namespace {

constexpr uint32_t PATCH = 8, SQUARE_SIDE = 128;
constexpr uint32_t PATCHES = THREADS * PATCH;   // pieces of a tile
constexpr uint32_t QUANT_SHARED = 2 * PATCHES;  // words: the low and the high end of each row or column of a patch
constexpr uint32_t FOLD = 16;                   // words that a thread folds into one
constexpr uint32_t DEEP = 4;                    // pieces of a thread under way
constexpr uint32_t AHEAD_UNITS = 8;             // units of a thread under way

// What shares a scale: a row or several, a square block, a group of a row, a group of a column.
enum QuantShape : uint8_t { LINE, SQUARE, GROUP, COLUMN };

FASTCKPT_HD QuantShape shape_of(const QuantRows& q) {
    if (q.kind == QUANT_INT4) return GROUP;
    if (q.kind == QUANT_INT4_AWQ || q.kind == QUANT_INT4_DOWN) return COLUMN;
    return q.flags & QUANT_SQUARE ? SQUARE : LINE;
}

FASTCKPT_HD uint64_t quant_tiles_of(const QuantRows& q) {
    if (shape_of(q) == LINE) return ratio_up(q.rows, THREADS >> q.width);
    return ratio_up(q.rows, PATCHES >> q.width) * ratio_up(q.columns, PATCH << q.width);
}

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

struct QuantTile {
    const QuantRows q;     // by value: nothing is read again after a store
    QuantShape shape;
    uint32_t size;         // bytes of a value
    uint32_t row, column;  // of the tile's first value

    FASTCKPT_HD QuantTile(const QuantRows* rows, const uint32_t* owner, uint64_t i)
        : q(rows[owner[i]]), shape(shape_of(q)), size(item_size(q.dtype)) {
        const uint32_t tile = static_cast<uint32_t>(i - q.first_tile);
        if (shape == LINE) {
            row = tile * (THREADS >> q.width), column = 0;
        } else {
            const uint32_t across = ((q.columns - 1) >> (q.width + 3)) + 1, down = tile / across;
            row = down * (PATCHES >> q.width), column = (tile - down * across) * (PATCH << q.width);
        }
    }

    // ---- where a thread stands ----

    FASTCKPT_HD bool line() const { return shape == LINE; }
    FASTCKPT_HD bool given() const { return q.amax != 0 && !(q.flags & QUANT_LARGEST); }  // the largest magnitudes
    FASTCKPT_HD uint32_t lane(uint32_t thread) const { return thread & ((1u << q.width) - 1); }
    FASTCKPT_HD uint32_t row_of(uint32_t thread) const { return row + (thread >> q.width) * (line() ? 1 : PATCH); }
    FASTCKPT_HD uint32_t column_of(uint32_t thread) const { return column + lane(thread) * PATCH; }
    FASTCKPT_HD uint32_t right() const { return line() ? PATCH << q.width : 0; }  // from a piece to the thread's next
    FASTCKPT_HD uint32_t down() const { return line() ? 0 : 1; }
    FASTCKPT_HD uint32_t parts() const { return 1u << (q.group - 3); }               // threads of a group
    FASTCKPT_HD uint32_t step() const { return shape == GROUP ? 1 : 1u << q.width; }  // from one of them to the next

    // Matrices of whole, aligned pieces, as most are, when they become bytes: their units are taken, below.
    FASTCKPT_HD bool plain() const {
        return (shape == LINE || shape == SQUARE) && q.columns % PATCH == 0 && ((q.src | static_cast<uint64_t>(q.pitch)) & 15) == 0 &&
               (q.out & 7) == 0;
    }
    // Pieces of a thread of a line or a square that are of its matrix, and from one to the next in the source.
    FASTCKPT_HD uint32_t pieces_of(uint32_t r, uint32_t c) const {
        if (r >= q.rows || c >= q.columns) return 0;
        return line() ? ((q.columns - 1 - c) >> (q.width + 3)) + 1 : q.rows - r < PATCH ? q.rows - r : PATCH;
    }
    FASTCKPT_HD int64_t stride() const { return line() ? static_cast<int64_t>(right()) * size : q.pitch; }

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

    // ---- load: the largest magnitude of a thread's values, or the ends of each row or column of its patch; NaN stays ----

    struct Ends {
        float low[PATCH], high[PATCH];
    };

    template <bool BYTES> FASTCKPT_HD void look(const uint32_t (&w)[PATCH], uint32_t k, uint32_t thread, uint32_t* shared, Ends& ends) const {
        if (BYTES && (shape == LINE || shape == SQUARE)) {
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH); ++j) ends.high[0] = higher(magnitude(as_float(w[j])), ends.high[0]);
        } else if (shape == COLUMN) {
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH); ++j)
                ends.low[j] = lower(as_float(w[j]), ends.low[j]), ends.high[j] = higher(as_float(w[j]), ends.high[j]);
        } else {
            float low = 0, high = 0;
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH); ++j) low = lower(as_float(w[j]), low), high = higher(as_float(w[j]), high);
            shared[k * THREADS + thread] = as_bits<uint32_t>(low), shared[PATCHES + k * THREADS + thread] = as_bits<uint32_t>(high);
        }
    }

    // ---- plain matrices: units of 16 bytes of the source, and nothing is asked of each ----

    // Threads side by side take units side by side, so that a warp reads whole lines. A thread's units lie one beside the
    // other in a line, one below the other in a square.
    template <uint32_t SIZE> struct Units {
        static constexpr uint32_t VALUES = 16 / SIZE;
        const char* from;
        char* to;
        int64_t step, further;  // from one to the next, where it is read and where it is written
        uint32_t count;
    };

    template <uint32_t SIZE> FASTCKPT_HD Units<SIZE> units(uint32_t thread) const {
        constexpr uint32_t VALUES = Units<SIZE>::VALUES;
        const uint32_t log = q.width + (!line() && SIZE == 4), tall = PATCH << (log - q.width);
        const uint32_t r = row + (thread >> log) * (line() ? 1 : tall), c = column + (thread & ((1u << log) - 1)) * VALUES;
        if (r >= q.rows || c >= q.columns) return {};
        char* to = reinterpret_cast<char*>(q.out) + (uint64_t{q.first} + r) * q.columns + c;
        if (line()) return {place(r, c), to, 16ll << log, VALUES << log, (q.columns - 1 - c) / VALUES / (1u << log) + 1};
        return {place(r, c), to, q.pitch, q.columns, smaller(tall, q.rows - r)};
    }

    // Some units from number k on; the last one again where there are no more.
    template <uint32_t SIZE, uint32_t N> static FASTCKPT_HD void fetch_units(uint32_t (&w)[4 * N], Units<SIZE>& u, uint32_t k) {
        FASTCKPT_UNROLL
        for (uint32_t i = 0; i < N; ++i) {
            load_kept<4>(w + 4 * i, u.from);
            if (k + i + 1 < u.count) u.from += u.step;
        }
    }

    // The largest magnitude of them: of 16 bits two at once, as integers, which compare as they do, NaN the largest.
    template <uint32_t SIZE> FASTCKPT_HD float largest(Units<SIZE> u) const {
        uint32_t most = 0;
        FASTCKPT_KEEP_LOOP
        for (uint32_t k = 0; k < u.count; k += AHEAD_UNITS) {
            uint32_t w[4 * AHEAD_UNITS];
            fetch_units<SIZE, AHEAD_UNITS>(w, u, k);
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(4 * AHEAD_UNITS); ++j)
                most = SIZE == 2 ? max_halves(most, w[j] & 0x7fff7fffu) : as_bits<uint32_t>(higher(magnitude(as_float(w[j])), as_float(most)));
        }
        if (SIZE == 4) return as_float(most);
        const uint32_t half = max_of(most & 0xffffu, most >> 16);
        return q.dtype == BFLOAT16 ? as_float(half << 16) : from_half(half);
    }

    // Sixteen values at once become bytes.
    template <uint32_t SIZE> FASTCKPT_HD void store_units(Units<SIZE> u, const Scale<uint32_t>& s) const {
        FASTCKPT_KEEP_LOOP
        for (uint32_t k = 0; k < u.count; k += SIZE) {
            uint32_t w[16];
            uint32_t (&packed)[4 * SIZE] = reinterpret_cast<uint32_t (&)[4 * SIZE]>(w);
            fetch_units<SIZE, SIZE>(packed, u, k);
            widen(w);
            code_bytes(w, s);
            FASTCKPT_UNROLL
            for (uint32_t i = 0; i < SIZE; ++i, u.to += u.further)
                if (i == 0 || k + i < u.count) store_vector<4 / SIZE>(u.to, w + 4 / SIZE * i);
        }
    }

    FASTCKPT_HD void load(uint32_t thread, uint32_t* shared) const {
        if (given()) return;
        const uint32_t r0 = row_of(thread), c0 = column_of(thread);
        if (plain()) {
            shared[PATCHES + thread] = as_bits<uint32_t>(size == 2 ? largest(units<2>(thread)) : largest(units<4>(thread)));
            return;
        }
        const uint32_t pieces = line() ? ((q.columns - 1) >> (q.width + 3)) + 1 : PATCH;
        const int64_t pitch = stride();
        Ends ends = {};
        FASTCKPT_KEEP_LOOP
        for (uint32_t k = 0; k < pieces; k += DEEP) {
            const uint32_t r = r0 + k * down(), c = c0 + k * right();
            const char* p = place(r, c);
            uint32_t w[DEEP][PATCH];
            if ((shape == GROUP || shape == COLUMN) && r + DEEP <= q.rows && c + PATCH <= q.columns && misalignment(p, 16) == 0 && (pitch & 15) == 0) {
                FASTCKPT_UNROLL
                for (int i = 0; i < static_cast<int>(DEEP); ++i) fetch(w[i], p + i * pitch);
                FASTCKPT_UNROLL
                for (int i = 0; i < static_cast<int>(DEEP); ++i) {
                    widen(w[i]);
                    look<false>(w[i], k + i, thread, shared, ends);
                }
                continue;
            }
            FASTCKPT_KEEP_LOOP
            for (uint32_t i = 0; i < DEEP && k + i < pieces; ++i) {
                push(w[0], r + i * down(), c + i * right());
                widen(w[0]);
                look<true>(w[0], k + i, thread, shared, ends);
            }
        }
        if (shape == GROUP) return;
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(PATCH); ++j) {
            if (j > 0 && shape != COLUMN) return;
            shared[j * THREADS + thread] = as_bits<uint32_t>(ends.low[j]);
            shared[PATCHES + j * THREADS + thread] = as_bits<uint32_t>(ends.high[j]);
        }
    }

    // ---- fold: sixteen threads' largest to one; the ends of a group to its scale, reciprocal and zero point ----

    FASTCKPT_HD void fold(uint32_t thread, uint32_t* shared) const {
        if (shape == LINE || shape == SQUARE) {
            if (given() || thread >= THREADS / FOLD) return;
            float found = 0;
            FASTCKPT_KEEP_LOOP
            for (uint32_t i = 0; i < FOLD; ++i) found = higher(as_float(shared[PATCHES + thread * FOLD + (i + thread) % FOLD]), found);
            shared[thread] = as_bits<uint32_t>(found);
            return;
        }
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
            const float span = zero ? high - low : higher(high, -low), scale = scale_of(span);
            shared[first] = as_bits<uint32_t>(scale);
            shared[first + step()] = as_bits<uint32_t>(factor(scale, span));
            shared[PATCHES + first] = as_bits<uint32_t>(zero ? zero_from(low, scale, q.lowest) : 0.0f);
            const uint32_t r = row_of(leader) + (shape == GROUP ? k : 0), c = column_of(leader) + (shape == GROUP ? 0 : k);
            if (r >= q.rows || c >= q.columns) continue;
            const uint64_t above = uint64_t{q.first} + r;
            put_scale(shape == GROUP ? (above * q.columns + c) >> q.group : (above >> q.group) * q.columns + c, scale);
        }
    }

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

    // ---- store ----

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

    // The bits of some values become their codes of a byte, packed. Of x / s only the side of each value halfway
    // between two codes is asked, which has eight bits at most: one correction tells it for every x and s (all were
    // tried). What is corrected is -x / s, by the reciprocal's negative: so a zero keeps its sign. None lies so far below
    // that it must be cut.
    template <uint32_t N> FASTCKPT_HD void code_bytes(uint32_t (&w)[N], const Scale<uint32_t>& s) const {
        float v[N];
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(N); ++j) v[j] = as_float(w[j]) * s.reciprocal;
        if (!(q.flags & QUANT_RECIPROCAL)) {
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(N); ++j) v[j] = fused(fused(v[j], s.scale, as_float(w[j])), s.reciprocal, v[j]);
        }
        pack_bytes(w, v);
    }

    // The same of any values and scales, one after the other: rare, a small body.
    FASTCKPT_HD void divide_bytes(uint32_t (&w)[PATCH], const Scale<uint32_t>& s) const {
        const float bound = q.kind == QUANT_E4M3 ? INFINITY : 128.0f;
        float v[PATCH];
        FASTCKPT_KEEP_LOOP
        for (uint32_t k = 0; k < PATCH; ++k) {
            const float x = as_float(w[0]);
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH) - 1; ++j) v[j] = v[j + 1], w[j] = w[j + 1];
            v[PATCH - 1] = at_most<uint32_t>(q.flags & QUANT_RECIPROCAL ? x * s.reciprocal : -(x / s.scale), bound);
        }
        pack_bytes(w, v);
    }

    template <uint32_t N> FASTCKPT_HD void pack_bytes(uint32_t (&w)[N], const float (&v)[N]) const {
        const bool floats = q.kind == QUANT_E4M3;
        FASTCKPT_UNROLL
        for (int j = 0; j < static_cast<int>(N); ++j) w[j] = as_bits<uint32_t>(floats ? v[j] : ROUNDER - at_least<uint32_t>(v[j], -127.0f));
        if (floats) {
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(N / 4); ++j) w[j] = narrow_four<E4M3>(w + 4 * j) ^ 0x80808080u;
        } else {
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(N / 4); ++j)
                w[j] = bytes_of(bytes_of(w[4 * j], w[4 * j + 1], 0x40), bytes_of(w[4 * j + 2], w[4 * j + 3], 0x40), 0x5410);
        }
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

    // The scale of a line or a square, taken from what was found and written by its first thread; whether `code_bytes`
    // can be used with it. False where nothing more is to be done.
    FASTCKPT_HD bool one_scale(uint32_t thread, const uint32_t* shared, uint32_t above, Scale<uint32_t>& s, bool& usual) const {
        const bool leads = line() ? lane(thread) == 0 : thread == 0;
        const uint32_t share = above / q.share;
        uint32_t* found = reinterpret_cast<uint32_t*>(q.amax) + share;
        float amax = 0;
        if (given()) {
            amax = as_float(*found);
        } else {
            const uint32_t log = line() ? q.width : 8, count = (1u << log) / FOLD;
            const uint32_t* from = shared + (thread >> log << log) / FOLD;
            if (count % 4 == 0) {
                FASTCKPT_KEEP_LOOP
                for (uint32_t i = 0; i < count; i += 4) {
                    const Vector v = load_shared(from + i);
                    FASTCKPT_UNROLL
                    for (int j = 0; j < 4; ++j) amax = higher(as_float(v.word[j]), amax);
                }
            } else {
                amax = higher(as_float(from[0]), as_float(from[count - 1]));
            }
        }
        if (q.flags & QUANT_LARGEST) {
            if (leads) raise_to(found, as_bits<uint32_t>(amax));
            return false;
        }
        const float scale = scale_of(amax);
        if (leads && above == share * q.share)
            put_scale(line() ? share : static_cast<uint64_t>(share) * ((q.columns - 1) / SQUARE_SIDE + 1) + column / SQUARE_SIDE, scale);
        s = {scale, factor(scale, amax, -1.0f), 0};
        usual = s.reciprocal != 0 && (q.kind == QUANT_E4M3 || amax <= 128.25f * scale);
        return true;
    }

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

    FASTCKPT_HD void put_bytes(char* to, const uint32_t (&w)[PATCH], uint32_t count) const {
        uint64_t bytes = static_cast<uint64_t>(w[1]) << 32 | w[0];
        FASTCKPT_KEEP_LOOP
        for (uint32_t j = 0; j < PATCH && j < count; ++j, bytes >>= 8) to[j] = static_cast<char>(bytes);
    }

    FASTCKPT_HD void store_bytes(uint32_t thread, const uint32_t* shared) const {
        const uint32_t above = q.first + (line() ? row_of(thread) : row);  // a row that shares the thread's scale
        Scale<uint32_t> s;
        bool usual;
        if (above - q.first >= q.rows || !one_scale(thread, shared, above, s, usual)) return;
        if (usual && plain()) {
            if (size == 2) store_units(units<2>(thread), s);
            else store_units(units<4>(thread), s);
            return;
        }
        uint32_t r = row_of(thread), c = column_of(thread);
        const char* p = place(r, c);
        char* to = reinterpret_cast<char*>(q.out) + (uint64_t{q.first} + r) * q.columns + c;
        const int64_t step = stride();
        const uint32_t further = line() ? right() : q.columns;
        FASTCKPT_KEEP_LOOP
        for (uint32_t count = pieces_of(r, c); count > 0; --count, p += step, to += further) {
            uint32_t w[PATCH];
            if (c + PATCH <= q.columns && misalignment(p, 16) == 0) fetch(w, p);
            else push(w, r, c);
            widen(w);
            if (usual) code_bytes(w, s);
            else divide_bytes(w, s);
            if (c + PATCH <= q.columns && misalignment(to, 8) == 0) store_vector<2>(to, w);
            else put_bytes(to, w, q.columns - c);
            r += down(), c += right();
        }
    }

    FASTCKPT_HD void store(uint32_t thread, const uint32_t* shared) const {
        if (shape == LINE || shape == SQUARE) {
            store_bytes(thread, shared);
            return;
        }
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
            code(w, scales);
            if (q.kind == QUANT_INT4_DOWN) {
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
