// Lines and squares quantised to a byte a value: int8 and e4m3, a scale a line, a share of lines, or a square of 128 x 128.
#pragma once

#include "quant_place_cuda.h"

namespace fastckpt {
namespace {

constexpr uint32_t FOLD = 16;        // words that a thread folds into one
constexpr uint32_t AHEAD_UNITS = 8;  // units of a thread under way

struct QuantBytes : QuantPlace {
    using QuantPlace::QuantPlace;

    FASTCKPT_HD bool given() const { return q.amax != 0 && !(q.flags & QUANT_LARGEST); }  // the largest magnitudes
    FASTCKPT_HD uint32_t right() const { return line() ? PATCH << q.width : 0; }  // from a piece to the thread's next
    FASTCKPT_HD uint32_t down() const { return line() ? 0 : 1; }
    // From a piece to the thread's next, in the source.
    FASTCKPT_HD int64_t stride() const { return line() ? static_cast<int64_t>(right()) * size : q.pitch; }
    // A thread's pieces that are of its matrix.
    FASTCKPT_HD uint32_t pieces_of(uint32_t r, uint32_t c) const {
        if (r >= q.rows || c >= q.columns) return 0;
        return line() ? ((q.columns - 1 - c) >> (q.width + 3)) + 1 : q.rows - r < PATCH ? q.rows - r : PATCH;
    }

    // ---- plain matrices: units of 16 bytes of the source, and nothing is asked of each ----

    // Matrices of whole, aligned pieces, as most are.
    FASTCKPT_HD bool plain() const {
        return q.columns % PATCH == 0 && ((q.src | static_cast<uint64_t>(q.pitch)) & 15) == 0 && (q.out & 7) == 0;
    }

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

    // ---- load: the largest magnitude of a thread's values; NaN stays ----

    FASTCKPT_HD void load(uint32_t thread, uint32_t* shared) const {
        if (given()) return;
        float most = 0;
        if (plain()) most = size == 2 ? largest(units<2>(thread)) : largest(units<4>(thread));
        else most = largest_pieces(row_of(thread), column_of(thread));
        shared[thread] = as_bits<uint32_t>(most);
    }

    FASTCKPT_HD float largest_pieces(uint32_t r, uint32_t c) const {
        float most = 0;
        FASTCKPT_KEEP_LOOP
        for (uint32_t count = pieces_of(r, c); count > 0; --count, r += down(), c += right()) {
            uint32_t w[PATCH] = {};
            push(w, r, c);
            widen(w);
            FASTCKPT_UNROLL
            for (int j = 0; j < static_cast<int>(PATCH); ++j) most = higher(magnitude(as_float(w[j])), most);
        }
        return most;
    }

    // ---- fold: sixteen threads' largest to one ----

    FASTCKPT_HD void fold(uint32_t thread, uint32_t* shared) const {
        if (given() || thread >= THREADS / FOLD) return;
        float found = 0;
        FASTCKPT_KEEP_LOOP
        for (uint32_t i = 0; i < FOLD; ++i) found = higher(as_float(shared[thread * FOLD + (i + thread) % FOLD]), found);
        shared[THREADS + thread] = as_bits<uint32_t>(found);
    }

    // ---- store ----

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
            const uint32_t* from = shared + THREADS + (thread >> log << log) / FOLD;
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

    FASTCKPT_HD void put_bytes(char* to, const uint32_t (&w)[PATCH], uint32_t count) const {
        uint64_t bytes = static_cast<uint64_t>(w[1]) << 32 | w[0];
        FASTCKPT_KEEP_LOOP
        for (uint32_t j = 0; j < PATCH && j < count; ++j, bytes >>= 8) to[j] = static_cast<char>(bytes);
    }

    FASTCKPT_HD void store(uint32_t thread, const uint32_t* shared) const {
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
};

}  // namespace
}  // namespace fastckpt
