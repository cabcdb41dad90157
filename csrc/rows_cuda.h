// Tiles of rows: axis 3 is contiguous on both sides, a line.
//
// Equal types move as bytes. A unit is as many elements as fill 16 bytes of the wider type, so that neighbouring
// threads read and write neighbouring bytes; it begins on a multiple of its own bytes in the destination, so the
// first and the last unit of a line may be cut.
#pragma once

#include "tile_cuda.h"

// `make gpu` also measures others (FASTCKPT_DEFINES, setup.py).
#ifndef FASTCKPT_FLIGHT
#define FASTCKPT_FLIGHT 8
#endif

namespace fastckpt {
namespace {

constexpr uint32_t FLIGHT = FASTCKPT_FLIGHT;  // units of a thread: all under way at once
constexpr uint32_t SOME = 4;                  // of these at once in several lines, or where the source is not aligned,
constexpr uint32_t APART = 2;                 // and where each has a place of its own
constexpr uint32_t ROWS_TILE = TEAM * FLIGHT;  // units

FASTCKPT_HD constexpr uint32_t unit_elements(uint32_t s, uint32_t d) { return 16 / larger(s, d); }

struct Lines {
    uint64_t length;  // elements of a line
    uint64_t units;   // units of a line, the most that one of them has
};

// `scale`: what one element of the row is in elements of size `d`.
FASTCKPT_HD Lines lines_of(const Copy& c, uint32_t s, uint32_t d, uint32_t scale) {
    const uint32_t into = unit_elements(s, d) * d;
    const int64_t off = (c.shape[0] > 1 ? c.dst_stride[0] : 0) | (c.shape[1] > 1 ? c.dst_stride[1] : 0) |
                        (c.shape[2] > 1 ? c.dst_stride[2] : 0);
    const uint32_t head = (off & (into - 1)) == 0 ? static_cast<uint32_t>(c.dst & (into - 1)) / d : into / d - 1;
    const uint64_t length = uint64_t{c.shape[3]} * scale;
    return {length, ratio_up(length + head, unit_elements(s, d))};
}

template <class S, class D> struct Rows {
    static constexpr bool BYTES = Same<S, D>::value;
    static constexpr uint32_t s = BYTES ? 1 : S::size, d = BYTES ? 1 : D::size;
    static constexpr uint32_t N = unit_elements(s, d), FROM = N * s, INTO = N * d;  // elements and bytes of a unit
    static constexpr uint32_t WORDS_IN = FROM / 4, WORDS_OUT = INTO / 4;
    static constexpr bool OFTEN = BYTES || (d > 1 && s + d > 4);  // casts to fp8 and between 16 bits are seldom, and much code
    static constexpr bool SHARED = false;

    const Work& w;
    uint64_t length, skip;        // elements of a line; units of the tile's first line before it
    uint32_t first, units, stay;  // the tile's first line; units of a line; those of the tile that lie in its first

    FASTCKPT_HD Rows(const Work& work) : w(work) {
        const Lines lines = lines_of(w.c, s, d, BYTES ? item_size(w.c.dst_dtype) : 1);
        const uint64_t start = w.tile * ROWS_TILE, line = quotient(start, lines.units);
        length = lines.length, first = static_cast<uint32_t>(line), units = clamped(lines.units);
        skip = start - line * lines.units, stay = clamped(lines.units - skip);
    }

    static FASTCKPT_HD uint32_t clamped(uint64_t x) { return x < 1u << 28 ? static_cast<uint32_t>(x) : 1u << 28; }

    struct Unit {
        const char* src;     // of its first element, which may lie before the line
        char* dst;
        uint32_t low, left;  // elements of it before the line, and to the end of that
        bool aligned;        // its destination
    };

    // Unit `at` of a line; nothing of it beyond the last.
    FASTCKPT_HD Unit unit_at(uint32_t line, uint64_t at) const {
        const Copy& c = w.c;
        const uint32_t n1 = c.shape[1], n2 = c.shape[2];
        const uint32_t outer = line < n2 ? 0 : line / n2, i2 = line - outer * n2;
        const uint32_t i0 = outer < n1 ? 0 : outer / n1, i1 = outer - i0 * n1;
        if (i0 >= c.shape[0]) return {w.src, w.dst, 0, 0, true};
        const char* src = w.src + i0 * c.src_stride[0] + i1 * c.src_stride[1] + i2 * c.src_stride[2];
        char* dst = w.dst + i0 * c.dst_stride[0] + i1 * c.dst_stride[1] + i2 * c.dst_stride[2];
        const uint32_t past = misalignment(dst, INTO);
        const bool aligned = past % d == 0;
        const int64_t begin = static_cast<int64_t>(at * N) - (aligned ? past / d : 0);
        const int64_t left = static_cast<int64_t>(length) - begin;
        return {src + begin * static_cast<int64_t>(s), dst + begin * static_cast<int64_t>(d),
                begin < 0 ? static_cast<uint32_t>(-begin) : 0, left < 0 ? 0 : clamped(static_cast<uint64_t>(left)), aligned};
    }

    // Unit i of the tile; `begin` is its first.
    FASTCKPT_HD Unit unit(uint32_t i, const Unit& begin) const {
        if (i >= stay) {
            const uint32_t more = (i - stay) / units;
            return unit_at(first + 1 + more, i - stay - more * units);
        }
        const uint32_t n = i * N;
        return {begin.src + n * s, begin.dst + n * d, i == 0 ? begin.low : 0, begin.left > n ? begin.left - n : 0, begin.aligned};
    }

    FASTCKPT_HD uint32_t off(const Unit& u) const { return w.zero ? 0 : misalignment(u.src, FROM); }

    // Whether it is read and written as vectors, also those around it.
    FASTCKPT_HD bool whole(const Unit& u, uint32_t off) const {
        return u.aligned && u.low == 0 && u.left >= N && (off == 0 || u.left * s >= 2 * FROM - off);
    }

    // Stores a unit; whether it holds a NaN, which `each` puts right.
    static FASTCKPT_HD bool put(char* dst, const uint32_t* words) {
        if constexpr (BYTES) {
            store_vector<WORDS_OUT>(dst, words);
            return false;
        } else {
            uint32_t out[WORDS_OUT], x[N];
            const bool nan = convert_numbers<S, D, static_cast<int>(N)>(out, words, x);
            store_vector<WORDS_OUT>(dst, out);
            return nan;
        }
    }

    // Units i, i + TEAM, ... of the tile that `which` has a bit of, element by element.
    // Rare: where the tile lies is found once more, so that it takes no registers until then.
    static FASTCKPT_HD void each(const Work& w, uint32_t i, uint32_t which) {
        const Rows tile(w);
        const Unit begin = tile.unit_at(tile.first, tile.skip);
        FASTCKPT_KEEP_LOOP
        for (; which != 0; i += TEAM, which >>= 1) {
            if ((which & 1) == 0) continue;
            const Unit u = tile.unit(i, begin);
            FASTCKPT_KEEP_LOOP
            for (uint32_t e = u.low; e < smaller(N, u.left); ++e) {
                if constexpr (BYTES) element<Bytes<1>, Bytes<1>>(u.dst + e, u.src + e, w.zero);
                else element<S, D>(u.dst + e * d, u.src + e * s, false);
            }
        }
    }

    // Each of the following moves a thread's units, TEAM apart, from number i on, and leaves some to `each`.

    // Whole aligned units of one line: nothing is asked of each.
    FASTCKPT_HD uint32_t straight(const char* from, char* to) const {
        uint32_t x[FLIGHT][WORDS_IN] = {}, left = 0;
        if (!w.zero) {
            FASTCKPT_UNROLL
            for (int k = 0; k < static_cast<int>(FLIGHT); ++k) load_kept<WORDS_IN>(x[k], from + k * TEAM * FROM);
        }
        FASTCKPT_UNROLL
        for (int k = 0; k < static_cast<int>(FLIGHT); ++k)
            if (put(to + k * TEAM * INTO, x[k])) left |= 1u << k;
        return left;
    }

    // The same where the source is not aligned: the aligned vectors around each, shifted.
    FASTCKPT_HD uint32_t shifted(const char* from, char* to, uint32_t past) const {
        uint32_t left = 0;
        FASTCKPT_KEEP_LOOP
        for (uint32_t j = 0; j < FLIGHT; j += SOME, from += SOME * TEAM * FROM, to += SOME * TEAM * INTO) {
            uint32_t x[SOME][2 * WORDS_IN];
            FASTCKPT_UNROLL
            for (int k = 0; k < static_cast<int>(SOME); ++k) {
                load_kept<WORDS_IN>(x[k], from - past + k * TEAM * FROM);
                load_kept<WORDS_IN>(x[k] + WORDS_IN, from - past + k * TEAM * FROM + FROM);
            }
            FASTCKPT_UNROLL
            for (int k = 0; k < static_cast<int>(SOME); ++k) {
                shift_words<WORDS_IN>(x[k], past);
                if (put(to + k * TEAM * INTO, x[k])) left |= 1u << k << j;
            }
        }
        return left;
    }

    // Whether all the tile's units are whole and lie alike, and its lines along axis 2 alone, within a GiB.
    FASTCKPT_HD bool even(const Unit& begin, uint32_t past) const {
        const Copy& c = w.c;
        const uint32_t most = ROWS_TILE / units + 2;  // lines of a tile
        const bool aligned = begin.aligned && begin.low == 0 && (c.dst_stride[2] & (INTO - 1)) == 0 &&
                             (w.zero || (c.src_stride[2] & (FROM - 1)) == 0) && (past == 0 || c.shape[2] == 1 || c.src_stride[2] > 0);
        const bool whole = length < 1u << 28 && length == units * N && begin.left == length - skip * N;
        const bool last = first + lines_left() == c.shape[0] * c.shape[1] * c.shape[2];
        return aligned && whole && (last || lines_left() >= most) && near(c.src_stride[2], most) && near(c.dst_stride[2], most);
    }
    // Lines of axis 2 from the tile's first on.
    FASTCKPT_HD uint32_t lines_left() const { return w.c.shape[2] - (first < w.c.shape[2] ? first : first % w.c.shape[2]); }
    // Whether so many lines lie within a GiB: offsets from the first, and one step further, are of 32 bits.
    static FASTCKPT_HD bool near(int64_t pitch, uint32_t lines) {
        const int64_t most = (1u << 30) / lines;
        return pitch < most && -most < pitch;
    }

    // A thread's units on one side of such a tile: each lies `step` bytes from the one before, and `turn` more where that
    // is beyond the end of its line.
    template <class Byte> struct Walk {
        Byte* at;
        int32_t step, turn;

        // From unit `column` of `line` on, `down` lines and `right` units further each time.
        FASTCKPT_HD Walk(Byte* from, uint32_t line, uint32_t column, uint32_t down, uint32_t right, uint32_t units, int64_t pitch, uint32_t bytes)
            : at(from + line * pitch + column * bytes),
              step(static_cast<int32_t>(down * pitch + right * bytes)),
              turn(static_cast<int32_t>(pitch - units * bytes)) {}
        FASTCKPT_HD void next(bool turns) { at += turns ? step + turn : step; }
    };

    // Whole units of lines that are as far apart. Where the source is not aligned, the vectors around each: what they have
    // beyond the end of a line is of the next one, and the last unit of all is left.
    template <bool SHIFTED> FASTCKPT_HD uint32_t gridded(uint32_t i, const Unit& begin, uint32_t past) const {
        constexpr uint32_t WORDS = SHIFTED ? 2 * WORDS_IN : WORDS_IN, STEP = SHIFTED ? 16 / WORDS : FLIGHT;  // more would spill
        const uint32_t start = static_cast<uint32_t>(skip), down = TEAM / units, right = TEAM - down * units;
        const uint64_t end = uint64_t{lines_left()} * units - start;
        const uint32_t count = ((end < ROWS_TILE ? static_cast<uint32_t>(end) : ROWS_TILE) + TEAM - 1 - i) / TEAM;  // of the thread's
        const uint32_t line = (start + i) / units;
        uint32_t column = start + i - line * units, left = 0;
        uint32_t here = (1u << count) - 1;  // which units there are
        if (SHIFTED && end <= ROWS_TILE && (end - 1 - i) % TEAM == 0) left = 1u << (count - 1), here ^= left;
        Walk<const char> in(begin.src - past - start * FROM, line, column, down, right, units, w.c.src_stride[2], FROM);
        Walk<char> out(begin.dst - start * INTO, line, column, down, right, units, w.c.dst_stride[2], INTO);
        FASTCKPT_KEEP_LOOP
        for (uint32_t j = 0; j < FLIGHT; j += STEP) {
            uint32_t x[STEP][WORDS] = {}, turned = 0;  // after which units a line ends
            FASTCKPT_UNROLL
            for (uint32_t k = 0; k < STEP; ++k) {
                if ((here >> (j + k) & 1) != 0 && !w.zero) {
                    load_kept<WORDS_IN>(x[k], in.at);
                    if constexpr (SHIFTED) load_kept<WORDS_IN>(x[k] + WORDS_IN, in.at + FROM);
                }
                column += right;
                const bool turns = column >= units;
                if (turns) column -= units, turned |= 1u << k;
                in.next(turns);
            }
            FASTCKPT_UNROLL
            for (uint32_t k = 0; k < STEP; ++k) {
                if constexpr (SHIFTED) shift_words<WORDS_IN>(x[k], past);
                if ((here >> (j + k) & 1) != 0 && put(out.at, x[k])) left |= 1u << k << j;
                out.next((turned >> k & 1) != 0);
            }
        }
        return left;
    }

    // Any units: those that are not aligned as above, those at a border are left.
    FASTCKPT_HD uint32_t mixed(uint32_t i, const Unit& begin) const {
        uint32_t left = 0;
        FASTCKPT_KEEP_LOOP
        for (uint32_t j = 0; j < FLIGHT; j += APART) {
            uint32_t x[APART][2 * WORDS_IN] = {}, offs = 0;
            char* to[APART];
            FASTCKPT_UNROLL
            for (int k = 0; k < static_cast<int>(APART); ++k) {
                const Unit u = unit(i + (j + k) * TEAM, begin);
                const uint32_t past = off(u);
                const bool now = whole(u, past);
                to[k] = now ? u.dst : nullptr;
                offs |= past << 4 * k;
                if (!now && u.left > u.low) left |= 1u << k << j;
                if (!now || w.zero) continue;
                load_kept<WORDS_IN>(x[k], u.src - past);
                if (past != 0) load_kept<WORDS_IN>(x[k] + WORDS_IN, u.src - past + FROM);
            }
            FASTCKPT_UNROLL
            for (int k = 0; k < static_cast<int>(APART); ++k) {
                if (to[k] == nullptr) continue;
                shift_words<WORDS_IN>(x[k], offs >> 4 * k & 15);
                if (put(to[k], x[k])) left |= 1u << k << j;
            }
        }
        return left;
    }

    FASTCKPT_HD void load(uint32_t, uint32_t*) const {}

    FASTCKPT_HD void store(uint32_t thread, uint32_t*) const {
        const Unit begin = unit_at(first, skip);
        const uint32_t past = off(begin);
        const bool one = stay >= ROWS_TILE && whole(begin, past) && begin.left >= (ROWS_TILE + (past != 0)) * N;
        const char* from = begin.src + thread * FROM;
        char* to = begin.dst + thread * INTO;
        const uint32_t left = one && past == 0               ? straight(from, to)
                              : one && OFTEN                 ? shifted(from, to, past)
                              : !OFTEN || !even(begin, past) ? mixed(thread, begin)
                              : past == 0                    ? gridded<false>(thread, begin, 0)
                                                             : gridded<true>(thread, begin, past);
        if (left != 0) each(w, thread, left);
    }
};

}  // namespace
}  // namespace fastckpt
