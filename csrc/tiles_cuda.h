// What one block of a GPU, or one warp of it, does of a Copy row: a tile. Tiles of a row move the same number of bytes.
//
// A body is a small struct with load(thread, shared) and store(thread, shared); the barrier is the gap between
// them. The GPU runs threads_of(path) of them at once (copy_cuda.cu), tests run them one by one (tiles_host.cpp).
//
// Contract: base addresses of buffers are multiples of 16; axes 0 to 2 together have fewer than 2^31 indices, and a path
// fewer than 2^31 tiles; the path of a row is the one that tiles.py chose.
#pragma once

#include "copy.h"
#include "port_cuda.h"

// `make gpu` also measures others (FASTCKPT_DEFINES, setup.py).
#ifndef FASTCKPT_TEAM
#define FASTCKPT_TEAM 32
#endif
#ifndef FASTCKPT_FLIGHT
#define FASTCKPT_FLIGHT 8
#endif

namespace fastckpt {
namespace {

enum Path : uint8_t { ROWS, TRANSPOSE, GENERAL, PATHS };

constexpr uint32_t THREADS = 256;
constexpr uint32_t TEAM = FASTCKPT_TEAM;      // threads of a tile of rows: short ones share a block
constexpr uint32_t FLIGHT = FASTCKPT_FLIGHT;  // units of a thread: all under way at once
constexpr uint32_t SOME = 4;                  // of these at once in several lines, or where the source is not aligned,
constexpr uint32_t APART = 2;                 // and where each has a place of its own
constexpr uint32_t CELLS = 8;                 // elements of a thread in a general tile

// Threads of a tile; of a block where they meet in shared memory.
FASTCKPT_HD constexpr uint32_t threads_of(uint8_t path) { return path == ROWS ? TEAM : THREADS; }

FASTCKPT_HD constexpr uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
FASTCKPT_HD constexpr uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }
FASTCKPT_HD uint64_t ratio_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
// a / b, at once where that is 0; nvcc itself divides by 32 bits where they suffice.
template <class T> FASTCKPT_HD T quotient(T a, T b) { return a < b ? 0 : a / b; }

constexpr uint64_t pack_sizes() {
    uint64_t packed = 0;
    for (int d = DTYPES - 1; d >= 0; --d) {
        uint64_t log = 0;
        while (1u << log < ITEMSIZE[d]) ++log;
        packed = packed << 3 | log;
    }
    return packed;
}
constexpr uint64_t PACKED_SIZES = pack_sizes();  // a GPU sees scalars of the host, not tables
FASTCKPT_HD uint32_t item_size(uint8_t dtype) { return 1u << (PACKED_SIZES >> 3 * dtype & 7); }

// The rows of a plan cut into tiles, as they lie in the memory of whoever runs them.
struct Table {
    const Copy* rows;              // `first_tile` filled
    const uint32_t* owner;         // the row of each tile
    const uint64_t* sources;       // base addresses of the buffers
    const uint64_t* destinations;
};

// A tile: its row, and where that lies.
struct Work {
    const Copy& c;
    bool zero;        // nothing is read
    const char* src;  // of the row's first element
    char* dst;
    uint64_t tile;    // of the row

    FASTCKPT_HD Work(const Table& table, uint64_t i)
        : c(table.rows[table.owner[i]]),
          zero(c.src_buffer == ZERO_BUFFER),
          src(reinterpret_cast<const char*>(zero ? 0 : table.sources[c.src_buffer]) + c.src),
          dst(reinterpret_cast<char*>(table.destinations[c.dst_buffer]) + c.dst),
          tile(i - c.first_tile) {}
};

// ---- elements and vectors of them ----

template <class S, class D> FASTCKPT_HD void element(char* dst, const char* src, bool zero) {
    using Out = typename Cell<D::size>::type;
    if constexpr (Same<S, D>::value) {
        store_cell<D::size>(dst, zero ? Out{} : load_cell<S::size>(src));
    } else {
        const typename Word<S::size>::type x = load_cell<S::size>(src);
        store_cell<D::size>(dst, static_cast<Out>(D::from_f32(S::to_f32(x))));
    }
}

// N elements of S, packed, to as many of D: what the formulas of cast.h give, but for NaN, of which a GPU's instructions
// make another. Whether there is one; x: the elements as fp32.
template <class S, class D, int N> FASTCKPT_HD bool convert_numbers(uint32_t* out, const uint32_t* in, uint32_t (&x)[N]) {
    constexpr int s = S::size, d = D::size;
    bool nan = false;
    FASTCKPT_UNROLL
    for (int i = 0; i < N; i += 2) {
        if constexpr (s == 4) x[i] = in[i], x[i + 1] = in[i + 1];
        else widen_pair<S>(x + i, in[i / 2]);
        if constexpr (d == 4) out[i] = x[i], out[i + 1] = x[i + 1];
        if constexpr (d == 2) out[i / 2] = narrow_pair<D>(x[i], x[i + 1]);
        nan |= is_nan(x[i]) || is_nan(x[i + 1]);
    }
    if constexpr (d == 1) {
        FASTCKPT_UNROLL
        for (int i = 0; i < N; i += 4) out[i / 4] = narrow_four<D>(x + i);
    }
    return nan;
}

// The same with every NaN put right.
template <class S, class D, int N> FASTCKPT_HD void convert_packed(uint32_t* out, const uint32_t* in) {
    constexpr int s = S::size, d = D::size;
    uint32_t x[N];
    if (!convert_numbers<S, D, N>(out, in, x)) return;
    FASTCKPT_UNROLL
    for (int i = 0; i < N; ++i) {
        if (!is_nan(x[i])) continue;
        const uint32_t y = D::nan(s == 4 || i % 2 ? in[i * s / 4] : in[i * s / 4] << 16);
        const int at = i * d % 4 * 8;
        if constexpr (d == 4) out[i] = y;
        else out[i * d / 4] = (out[i * d / 4] & ~(((1u << 8 * d) - 1) << at)) | y << at;
    }
}

// ---- rows: axis 3 is contiguous on both sides, a line ----
//
// Equal types move as bytes. A unit is as many elements as fill 16 bytes of the wider type, so that neighbouring
// threads read and write neighbouring bytes; it begins on a multiple of its own bytes in the destination, so the
// first and the last unit of a line may be cut.

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
    static constexpr bool OFTEN = BYTES || d > 1;  // casts to fp8 are seldom, and much code each way
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

    // Whether all the tile's units are whole and aligned and its lines lie along axis 2 alone, within a GiB.
    FASTCKPT_HD bool even(const Unit& begin) const {
        const Copy& c = w.c;
        const uint32_t most = ROWS_TILE / units + 2;  // lines of a tile
        const bool aligned = begin.aligned && begin.low == 0 && off(begin) == 0 && (c.dst_stride[2] & (INTO - 1)) == 0 &&
                             (w.zero || (c.src_stride[2] & (FROM - 1)) == 0);
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

    // Whole aligned units of lines that are as far apart.
    FASTCKPT_HD uint32_t gridded(uint32_t i, const Unit& begin) const {
        const uint32_t start = static_cast<uint32_t>(skip), down = TEAM / units, right = TEAM - down * units;
        const uint64_t end = uint64_t{lines_left()} * units - start;
        const uint32_t count = ((end < ROWS_TILE ? static_cast<uint32_t>(end) : ROWS_TILE) + TEAM - 1 - i) / TEAM;  // of the thread's
        const uint32_t line = (start + i) / units;
        uint32_t column = start + i - line * units, left = 0;
        uint32_t flags = (1u << count) - 1;  // which units there are, and from FLIGHT on, after which a line ends
        uint32_t x[FLIGHT][WORDS_IN] = {};
        Walk<const char> in(begin.src - start * FROM, line, column, down, right, units, w.c.src_stride[2], FROM);
        Walk<char> out(begin.dst - start * INTO, line, column, down, right, units, w.c.dst_stride[2], INTO);
        FASTCKPT_UNROLL
        for (uint32_t k = 0; k < FLIGHT; ++k) {
            if (k < count && !w.zero) load_kept<WORDS_IN>(x[k], in.at);
            column += right;
            const bool turns = column >= units;
            if (turns) column -= units, flags |= 1u << (FLIGHT + k);
            in.next(turns);
        }
        FASTCKPT_UNROLL
        for (uint32_t k = 0; k < FLIGHT; ++k) {
            if ((flags >> k & 1) != 0 && put(out.at, x[k])) left |= 1u << k;
            out.next((flags >> (FLIGHT + k) & 1) != 0);
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
        const uint32_t left = one && past == 0       ? straight(from, to)
                              : one && OFTEN         ? shifted(from, to, past)
                              : OFTEN && even(begin) ? gridded(thread, begin)
                                                     : mixed(thread, begin);
        if (left != 0) each(w, thread, left);
    }
};

// ---- transpose: axis 3 is contiguous in the destination, axis 2 in the source ----
//
// A tile is 32 words of 1, 2 or 4 packed destination elements along axis 3, by `columns_of_tile` along axis 2. It
// is cast and packed before it goes to shared memory, so that both sides move whole 128-byte lines. Tiles begin
// on multiples of 16 bytes on each side where the strides allow it.

constexpr uint32_t WORDS = 32, SHARED_WORDS = WORDS * 128;

FASTCKPT_HD constexpr uint32_t rows_of_tile(uint32_t d) { return WORDS * 4 / d; }
FASTCKPT_HD constexpr uint32_t columns_of_tile(uint32_t s, uint32_t d) { return smaller(128, 128 * d / s); }

// Where word `word` of column `column` lies in shared memory. VECTOR columns are 16 source bytes. Both ways are
// free of bank conflicts: a warp writes 4 words of 8 neighbouring vectors, and reads whole columns.
template <uint32_t VECTOR> FASTCKPT_HD uint32_t slot(uint32_t word, uint32_t column) {
    return column * WORDS + ((word / 4 ^ column / VECTOR) & 7) * 4 + word % 4;
}

struct Sheet {  // a row as tiles
    uint32_t row_head, column_head;  // elements before the row in its first tiles
    uint32_t high, wide;             // tiles along axis 3 and axis 2
};
FASTCKPT_HD Sheet sheet_of(const Copy& c, uint32_t s, uint32_t d) {
    const int64_t dst = c.dst_stride[0] | c.dst_stride[1] | c.dst_stride[2], src = c.src_stride[0] | c.src_stride[1] | c.src_stride[3];
    const uint32_t row_head = (dst & 15) == 0 && c.dst % d == 0 ? static_cast<uint32_t>(c.dst & 15) / d : 0;
    const uint32_t column_head = (src & 15) == 0 && c.src % s == 0 ? static_cast<uint32_t>(c.src & 15) / s : 0;
    return {row_head, column_head, static_cast<uint32_t>(ratio_up(uint64_t{c.shape[3]} + row_head, rows_of_tile(d))),
            static_cast<uint32_t>(ratio_up(uint64_t{c.shape[2]} + column_head, columns_of_tile(s, d)))};
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
    bool vectors_in, vectors_out;

    FASTCKPT_HD Transposed(const Work& w) {
        const Copy& c = w.c;
        const Sheet sheet = sheet_of(c, s, d);
        const uint32_t at = static_cast<uint32_t>(w.tile);  // a path has fewer than 2^31 tiles
        const uint32_t area = sheet.high * sheet.wide, plane = quotient(at, area), tile = at - plane * area;
        const uint32_t across = quotient(tile, sheet.wide), along = tile - across * sheet.wide;
        const uint32_t i0 = quotient(plane, c.shape[1]), i1 = plane - i0 * c.shape[1];
        const int64_t row = int64_t{across} * HEIGHT - sheet.row_head, column = int64_t{along} * COLUMNS - sheet.column_head;
        src_pitch = c.src_stride[3];
        dst_pitch = c.dst_stride[2];
        src = w.src + i0 * c.src_stride[0] + i1 * c.src_stride[1] + row * src_pitch + column * static_cast<int64_t>(s);
        dst = w.dst + i0 * c.dst_stride[0] + i1 * c.dst_stride[1] + column * dst_pitch + row * static_cast<int64_t>(d);
        row_low = row < 0 ? static_cast<uint32_t>(-row) : 0;
        column_low = column < 0 ? static_cast<uint32_t>(-column) : 0;
        const int64_t rows = c.shape[3] - row, columns = c.shape[2] - column;
        row_high = rows < HEIGHT ? static_cast<uint32_t>(rows) : HEIGHT;
        column_high = columns < COLUMNS ? static_cast<uint32_t>(columns) : COLUMNS;
        vectors_in = column_low == 0 && column_high == COLUMNS && misalignment(src, 16) == 0 && (src_pitch & 15) == 0;
        vectors_out = misalignment(dst, 16) == 0 && (dst_pitch & 15) == 0;
    }

    FASTCKPT_HD void load(uint32_t thread, uint32_t* shared) const {
        if (!vectors_in) {
            load_words(thread, shared);
            return;
        }
        const uint32_t word = thread / 32 * 4 + thread % 32 / 8, vector = thread % 8;
        const char* from = src + static_cast<int64_t>(word * GROUP) * src_pitch + vector * 16;
        Vector x[LOADS][GROUP] = {};
        FASTCKPT_UNROLL
        for (int g = 0; g < static_cast<int>(GROUP); ++g) {
            const uint32_t row = word * GROUP + g;
            if (row < row_low || row >= row_high) continue;
            FASTCKPT_UNROLL
            for (int i = 0; i < static_cast<int>(LOADS); ++i) x[i][g] = load_vector(from + g * src_pitch + i * 128);
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

    // The same, element by element: a tile whose columns are cut, or rows that are not aligned.
    FASTCKPT_HD void load_words(uint32_t thread, uint32_t* shared) const {
        FASTCKPT_KEEP_LOOP
        for (uint32_t i = thread; i < WORDS * COLUMNS; i += THREADS) {
            const uint32_t word = i / COLUMNS, column = i % COLUMNS;
            const bool inside = column >= column_low && column < column_high;
            uint32_t bits = 0;
            FASTCKPT_UNROLL
            for (int g = 0; g < static_cast<int>(GROUP); ++g) {
                const uint32_t row = word * GROUP + g;
                if (inside && row >= row_low && row < row_high)
                    bits |= convert<S, D>(static_cast<uint32_t>(load_cell<s>(src + row * src_pitch + column * s))) << g * d % 4 * 8;
            }
            shared[slot<VECTOR>(word, column)] = bits;
        }
    }

    FASTCKPT_HD void store(uint32_t thread, uint32_t* shared) const {
        FASTCKPT_UNROLL
        for (int i = 0; i < static_cast<int>(STORES); ++i) {
            const uint32_t column = thread / 8 + i * (THREADS / 8), word = thread % 8 * 4;
            if (column < column_low || column >= column_high) continue;
            const uint32_t* at = shared + slot<VECTOR>(word, column);
            char* to = dst + column * dst_pitch + word * 4;
            const uint32_t row = word * GROUP;
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

// ---- general: any strides, any pair ----

constexpr uint32_t GENERAL_TILE = THREADS * CELLS;

struct Float {};  // any float: which one, the row says

FASTCKPT_HD void cast_element(char* dst, uint8_t to, const char* src, uint8_t from) {
    uint32_t x = 0;
    switch (from) {
        case FLOAT32: x = load_cell<4>(src); break;
        case BFLOAT16: x = BF16::to_f32<uint32_t>(load_cell<2>(src)); break;
        case FLOAT16: x = F16::to_f32<uint32_t>(load_cell<2>(src)); break;
        case FLOAT8_E4M3FN: x = E4M3::to_f32<uint32_t>(load_cell<1>(src)); break;
        case FLOAT8_E5M2: x = E5M2::to_f32<uint32_t>(load_cell<1>(src)); break;
        case FLOAT64: x = F64::to_f32(load_cell<8>(src)); break;
        default: break;
    }
    switch (to) {
        case FLOAT32: store_cell<4>(dst, x); break;
        case BFLOAT16: store_cell<2>(dst, static_cast<uint16_t>(BF16::from_f32(x))); break;
        case FLOAT16: store_cell<2>(dst, static_cast<uint16_t>(F16::from_f32(x))); break;
        case FLOAT8_E4M3FN: store_cell<1>(dst, static_cast<uint8_t>(E4M3::from_f32(x))); break;
        case FLOAT8_E5M2: store_cell<1>(dst, static_cast<uint8_t>(E5M2::from_f32(x))); break;
        case FLOAT64: store_cell<8>(dst, F64::from_f32(x)); break;
        default: break;
    }
}

template <class S, class D> struct General {
    static constexpr bool SHARED = false;

    const Work& w;
    uint64_t line;   // the tile's first element: its line over axes 0 to 2,
    uint32_t start;  // and its place there

    FASTCKPT_HD General(const Work& work) : w(work) {
        const uint64_t first = w.tile * GENERAL_TILE;
        line = quotient(first, uint64_t{w.c.shape[3]});
        start = static_cast<uint32_t>(first - line * w.c.shape[3]);
    }

    FASTCKPT_HD void load(uint32_t, uint32_t*) const {}

    FASTCKPT_HD void store(uint32_t thread, uint32_t*) const {
        const Copy& c = w.c;
        const uint32_t n1 = c.shape[1], n2 = c.shape[2], n3 = c.shape[3];
        FASTCKPT_KEEP_LOOP
        for (uint32_t k = 0; k < CELLS; ++k) {
            const uint64_t at = uint64_t{start} + thread + k * THREADS;
            const uint32_t more = at < n3 ? 0 : static_cast<uint32_t>(at / n3);
            const uint32_t i3 = static_cast<uint32_t>(at - uint64_t{more} * n3), i = static_cast<uint32_t>(line) + more;
            const uint32_t outer = i / n2, i2 = i - outer * n2, i0 = outer / n1, i1 = outer - i0 * n1;
            if (i0 >= c.shape[0]) return;
            char* to = w.dst + i0 * c.dst_stride[0] + i1 * c.dst_stride[1] + i2 * c.dst_stride[2] + i3 * c.dst_stride[3];
            const char* from = w.src + i0 * c.src_stride[0] + i1 * c.src_stride[1] + i2 * c.src_stride[2] + i3 * c.src_stride[3];
            if constexpr (Same<S, Float>::value) cast_element(to, c.dst_dtype, from, c.src_dtype);
            else element<S, D>(to, from, w.zero);
        }
    }
};

// ---- the choice of a body: each calls run.template body<Body>(work) ----
//
// The pairs that weights are cast with; tiles.py sends the others the general way.

template <template <class, class> class Body, class S, class Run> FASTCKPT_HD void cast_to(const Run& run, const Work& w) {
    switch (w.c.dst_dtype) {
        case FLOAT32: if constexpr (!Same<S, F32>::value) run.template body<Body<S, F32>>(w); break;
        case BFLOAT16: if constexpr (!Same<S, BF16>::value) run.template body<Body<S, BF16>>(w); break;
        case FLOAT16: if constexpr (!Same<S, F16>::value) run.template body<Body<S, F16>>(w); break;
        case FLOAT8_E4M3FN: if constexpr (!Same<S, F16>::value) run.template body<Body<S, E4M3>>(w); break;
        default: break;
    }
}

template <template <class, class> class Body, class Run> FASTCKPT_HD void cast(const Run& run, const Work& w) {
    switch (w.c.src_dtype) {
        case FLOAT32: cast_to<Body, F32>(run, w); break;
        case BFLOAT16: cast_to<Body, BF16>(run, w); break;
        case FLOAT16: cast_to<Body, F16>(run, w); break;
        default: break;
    }
}

template <template <class, class> class Body, class Run> FASTCKPT_HD void move(const Run& run, const Work& w) {
    switch (item_size(w.c.dst_dtype)) {
        case 1: run.template body<Body<Bytes<1>, Bytes<1>>>(w); break;
        case 2: run.template body<Body<Bytes<2>, Bytes<2>>>(w); break;
        case 4: run.template body<Body<Bytes<4>, Bytes<4>>>(w); break;
        default: break;
    }
}

template <Path PATH, class Run> FASTCKPT_HD void dispatch(const Run& run, const Work& w) {
    const bool same = w.zero || w.c.src_dtype == w.c.dst_dtype;
    if constexpr (PATH == ROWS) {
        if (same) run.template body<Rows<Bytes<1>, Bytes<1>>>(w);
        else cast<Rows>(run, w);
    } else if constexpr (PATH == TRANSPOSE) {
        if (same) move<Transposed>(run, w);
        else cast<Transposed>(run, w);
    } else if (same) {
        const uint32_t size = item_size(w.c.dst_dtype);
        if (size == 8) run.template body<General<Bytes<8>, Bytes<8>>>(w);
        else if (size == 16) run.template body<General<Bytes<16>, Bytes<16>>>(w);
        else move<General>(run, w);
    } else {
        run.template body<General<Float, Float>>(w);
    }
}

// The tiles of a row.
FASTCKPT_HD uint64_t tiles_of(const Copy& c) {
    const bool same = c.src_buffer == ZERO_BUFFER || c.src_dtype == c.dst_dtype;
    const uint32_t s = item_size(c.src_dtype), d = item_size(c.dst_dtype);
    const uint64_t planes = uint64_t{c.shape[0]} * c.shape[1], lines = planes * c.shape[2];
    if (lines * c.shape[3] == 0) return 0;
    if (c.path == GENERAL) return ratio_up(lines * c.shape[3], GENERAL_TILE);
    if (c.path == TRANSPOSE) {
        const Sheet sheet = sheet_of(c, s, d);
        return planes * sheet.high * sheet.wide;  // in 64 bits
    }
    if (same) return ratio_up(lines * lines_of(c, 1, 1, d).units, ROWS_TILE);
    return ratio_up(lines * lines_of(c, s, d, 1).units, ROWS_TILE);
}

}  // namespace
}  // namespace fastckpt
