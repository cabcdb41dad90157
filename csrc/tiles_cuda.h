// What one block of a GPU does of a Copy row: a tile. Tiles of a row move the same number of bytes.
//
// A body is a small struct with load(thread, shared) and store(thread, shared); the barrier is the gap between
// them. The GPU runs THREADS of them at once (copy_cuda.cu), tests run them one by one (tiles_host.cpp).
//
// Contract: base addresses of buffers are multiples of 16; axes 0 to 2 together have fewer than 2^31 indices;
// the path of a row is the one that tiles.py chose.
#pragma once

#include "copy.h"
#include "port_cuda.h"

namespace fastckpt {
namespace {

enum Path : uint8_t { ROWS, TRANSPOSE, GENERAL, PATHS };

constexpr uint32_t THREADS = 256;
constexpr uint32_t FLIGHT = 64;  // bytes of the wider side that a thread has under way
constexpr uint32_t STEPS = 2;    // times a thread does so in a tile of rows
constexpr uint32_t CELLS = 8;    // elements of a thread in a general tile

FASTCKPT_HD constexpr uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
FASTCKPT_HD constexpr uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }
FASTCKPT_HD uint64_t ratio_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

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

// Element i of packed words, and its place in them.
template <int SIZE> FASTCKPT_HD uint32_t unpack(const uint32_t* words, int i) {
    if constexpr (SIZE == 4) return words[i];
    else return words[i * SIZE / 4] >> (i * SIZE % 4 * 8) & ((1u << (8 * SIZE)) - 1);
}
template <int SIZE> FASTCKPT_HD uint32_t packed(uint32_t bits, int i) {
    if constexpr (SIZE == 4) return bits;
    else return bits << (i * SIZE % 4 * 8);
}

// ---- rows: axis 3 is contiguous on both sides, a line ----
//
// Equal types move as bytes. A unit is as many elements as fill 16 bytes of the narrower type; it begins on a
// multiple of 16 bytes of the destination, so the first and the last unit of a line may be cut.

FASTCKPT_HD constexpr uint32_t unit_elements(uint32_t s, uint32_t d) { return 16 / smaller(s, d); }
FASTCKPT_HD constexpr uint32_t units_at_once(uint32_t s, uint32_t d) {
    return larger(1, FLIGHT / (unit_elements(s, d) * larger(s, d)));
}
FASTCKPT_HD constexpr uint32_t units_of_tile(uint32_t s, uint32_t d) { return THREADS * STEPS * units_at_once(s, d); }

struct Lines {
    uint64_t length;  // elements of a line
    uint64_t units;   // units of a line, the most that one of them has
};

// `scale`: what one element of the row is in elements of size `d`.
FASTCKPT_HD Lines lines_of(const Copy& c, uint32_t s, uint32_t d, uint32_t scale) {
    const int64_t off = (c.shape[0] > 1 ? c.dst_stride[0] : 0) | (c.shape[1] > 1 ? c.dst_stride[1] : 0) |
                        (c.shape[2] > 1 ? c.dst_stride[2] : 0);
    const uint32_t head = (off & 15) == 0 ? static_cast<uint32_t>(c.dst & 15) / d : 16 / d - 1;
    const uint64_t length = uint64_t{c.shape[3]} * scale;
    return {length, ratio_up(length + head, unit_elements(s, d))};
}

template <class S, class D> struct Rows {
    static constexpr bool BYTES = Same<S, D>::value;
    static constexpr uint32_t s = BYTES ? 1 : S::size, d = BYTES ? 1 : D::size;
    static constexpr uint32_t N = unit_elements(s, d), ONCE = units_at_once(s, d);
    static constexpr uint32_t IN = N * s / 16, OUT = N * d / 16;  // vectors of a unit
    static constexpr bool SHARED = false;

    const Work& w;
    Lines lines;
    uint64_t first, skip;  // the tile's first line, and units before it there

    FASTCKPT_HD Rows(const Work& work) : w(work), lines(lines_of(work.c, s, d, BYTES ? item_size(work.c.dst_dtype) : 1)) {
        const uint64_t start = w.tile * units_of_tile(s, d);
        first = start < lines.units ? 0 : start / lines.units;
        skip = start - first * lines.units;
    }

    struct Unit {
        const char* src;    // of its first element, which may lie before the line
        char* dst;
        uint32_t low, high;  // the elements of it that lie in the line
        bool vectors;        // all do, and its destination is aligned
        uint64_t left;       // source bytes from its first element to the end of the line
    };

    FASTCKPT_HD Unit unit(uint32_t i) const {
        const Copy& c = w.c;
        uint64_t at = skip + i, line = first;
        if (at >= lines.units) {
            const uint32_t more = lines.units >= units_of_tile(s, d) ? 1 : static_cast<uint32_t>(at) / static_cast<uint32_t>(lines.units);
            line += more;
            at -= more * lines.units;
        }
        const uint32_t n1 = c.shape[1], n2 = c.shape[2];
        const uint32_t outer = line < n2 ? 0 : static_cast<uint32_t>(line) / n2;
        const uint32_t i2 = static_cast<uint32_t>(line) - outer * n2;
        const uint32_t i0 = outer < n1 ? 0 : outer / n1;
        const uint32_t i1 = outer - i0 * n1;
        if (i0 >= c.shape[0]) return Unit{w.src, w.dst, 0, 0, false, 0};
        char* dst = w.dst + i0 * c.dst_stride[0] + i1 * c.dst_stride[1] + i2 * c.dst_stride[2];
        const char* src = w.src + i0 * c.src_stride[0] + i1 * c.src_stride[1] + i2 * c.src_stride[2];
        const uint32_t off = misalignment(dst, 16);
        const bool aligned = off % d == 0;
        const int64_t begin = static_cast<int64_t>(at * N) - (aligned ? off / d : 0);
        const int64_t rest = static_cast<int64_t>(lines.length) - begin;  // elements to the end of the line
        const uint32_t low = begin < 0 ? static_cast<uint32_t>(-begin) : 0;
        const uint32_t high = rest >= static_cast<int64_t>(N) ? N : rest > 0 ? static_cast<uint32_t>(rest) : 0;
        return {src + begin * static_cast<int64_t>(s), dst + begin * static_cast<int64_t>(d), low, high,
                aligned && low == 0 && high == N, rest > 0 ? static_cast<uint64_t>(rest) * s : 0};
    }

    // A unit's elements from IN source vectors to OUT destination vectors.
    static FASTCKPT_HD void put(char* dst, const uint32_t* words) {
        if constexpr (BYTES) {
            store_vector(dst, {{words[0], words[1], words[2], words[3]}});
        } else {
            uint32_t out[4 * OUT] = {};
            FASTCKPT_UNROLL
            for (int i = 0; i < static_cast<int>(N); ++i)
                out[i * d / 4] |= packed<d>(D::from_f32(S::to_f32(unpack<s>(words, i))), i);
            FASTCKPT_UNROLL
            for (int v = 0; v < static_cast<int>(OUT); ++v)
                store_vector(dst + 16 * v, {{out[4 * v], out[4 * v + 1], out[4 * v + 2], out[4 * v + 3]}});
        }
    }

    template <int VECTORS> static FASTCKPT_HD void get(uint32_t* words, const char* src) {
        FASTCKPT_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            const Vector x = load_vector(src + 16 * v);
            FASTCKPT_UNROLL
            for (int k = 0; k < 4; ++k) words[4 * v + k] = x.word[k];
        }
    }

    // A unit whose source is not aligned: the aligned vectors around it, shifted.
    static FASTCKPT_HD void realign(const Unit& u) {
        const uint32_t off = misalignment(u.src, 16), bits = off % 4 * 8;
        uint32_t x[4 * IN + 4];
        get<IN + 1>(x, u.src - off);
        if (off & 8) {
            FASTCKPT_UNROLL
            for (int i = 0; i < static_cast<int>(4 * IN + 2); ++i) x[i] = x[i + 2];
        }
        if (off & 4) {
            FASTCKPT_UNROLL
            for (int i = 0; i < static_cast<int>(4 * IN + 1); ++i) x[i] = x[i + 1];
        }
        FASTCKPT_UNROLL
        for (int i = 0; i < static_cast<int>(4 * IN); ++i) x[i] = funnel(x[i], x[i + 1], bits);
        put(u.dst, x);
    }

    // A unit at a border.
    FASTCKPT_HD void elements(const Unit& u) const {
        FASTCKPT_KEEP_LOOP
        for (uint32_t i = u.low; i < u.high; ++i) {
            if constexpr (BYTES) element<Bytes<1>, Bytes<1>>(u.dst + i, u.src + i, w.zero);
            else element<S, D>(u.dst + i * d, u.src + i * s, false);
        }
    }

    FASTCKPT_HD bool direct(const Unit& u) const { return u.vectors && (w.zero || misalignment(u.src, 16) == 0); }

    FASTCKPT_HD void load(uint32_t, uint32_t*) const {}

    FASTCKPT_HD void store(uint32_t thread, uint32_t*) const {
        FASTCKPT_KEEP_LOOP
        for (uint32_t step = 0; step < STEPS; ++step) {
            const uint32_t i = thread + step * ONCE * THREADS;
            uint32_t words[ONCE][4 * IN] = {};
            char* to[ONCE];
            bool rest = false;
            FASTCKPT_UNROLL
            for (int k = 0; k < static_cast<int>(ONCE); ++k) {
                const Unit u = unit(i + k * THREADS);
                const bool now = direct(u);
                to[k] = now ? u.dst : nullptr;
                rest |= !now && u.high > u.low;
                if (now && !w.zero) get<IN>(words[k], u.src);
            }
            FASTCKPT_UNROLL
            for (int k = 0; k < static_cast<int>(ONCE); ++k)
                if (to[k] != nullptr) put(to[k], words[k]);
            if (!rest) continue;
            FASTCKPT_KEEP_LOOP
            for (uint32_t k = 0; k < ONCE; ++k) {
                const Unit u = unit(i + k * THREADS);
                if (direct(u)) continue;
                if (u.vectors && u.left >= 16 * (IN + 1) - misalignment(u.src, 16)) realign(u);
                else elements(u);
            }
        }
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
    uint64_t high, wide;             // tiles along axis 3 and axis 2
};
FASTCKPT_HD Sheet sheet_of(const Copy& c, uint32_t s, uint32_t d) {
    const int64_t dst = c.dst_stride[0] | c.dst_stride[1] | c.dst_stride[2], src = c.src_stride[0] | c.src_stride[1] | c.src_stride[3];
    const uint32_t row_head = (dst & 15) == 0 && c.dst % d == 0 ? static_cast<uint32_t>(c.dst & 15) / d : 0;
    const uint32_t column_head = (src & 15) == 0 && c.src % s == 0 ? static_cast<uint32_t>(c.src & 15) / s : 0;
    return {row_head, column_head, ratio_up(uint64_t{c.shape[3]} + row_head, rows_of_tile(d)),
            ratio_up(uint64_t{c.shape[2]} + column_head, columns_of_tile(s, d))};
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
        const uint64_t area = sheet.high * sheet.wide, plane = w.tile / area, tile = w.tile - plane * area;
        const uint64_t across = tile / sheet.wide, along = tile - across * sheet.wide;
        const uint32_t i0 = static_cast<uint32_t>(plane) / c.shape[1], i1 = static_cast<uint32_t>(plane) - i0 * c.shape[1];
        const int64_t row = static_cast<int64_t>(across * HEIGHT) - sheet.row_head;
        const int64_t column = static_cast<int64_t>(along * COLUMNS) - sheet.column_head;
        src_pitch = c.src_stride[3];
        dst_pitch = c.dst_stride[2];
        src = w.src + i0 * c.src_stride[0] + i1 * c.src_stride[1] + row * src_pitch + column * static_cast<int64_t>(s);
        dst = w.dst + i0 * c.dst_stride[0] + i1 * c.dst_stride[1] + column * dst_pitch + row * static_cast<int64_t>(d);
        row_low = row < 0 ? static_cast<uint32_t>(-row) : 0;
        column_low = column < 0 ? static_cast<uint32_t>(-column) : 0;
        const int64_t rows = c.shape[3] - row, columns = c.shape[2] - column;
        row_high = rows < HEIGHT ? static_cast<uint32_t>(rows) : HEIGHT;
        column_high = columns < COLUMNS ? static_cast<uint32_t>(columns) : COLUMNS;
        const bool full = row_low == 0 && row_high == HEIGHT && column_low == 0 && column_high == COLUMNS;
        vectors_in = full && misalignment(src, 16) == 0 && (src_pitch & 15) == 0;
        vectors_out = row_low == 0 && row_high == HEIGHT && misalignment(dst, 16) == 0 && (dst_pitch & 15) == 0;
    }

    FASTCKPT_HD void load(uint32_t thread, uint32_t* shared) const {
        if (!vectors_in) {
            load_words(thread, shared);
            return;
        }
        const uint32_t word = thread / 32 * 4 + thread % 32 / 8, vector = thread % 8;
        const char* from = src + static_cast<int64_t>(word * GROUP) * src_pitch + vector * 16;
        Vector x[LOADS][GROUP];
        FASTCKPT_UNROLL
        for (int i = 0; i < static_cast<int>(LOADS); ++i) {
            FASTCKPT_UNROLL
            for (int g = 0; g < static_cast<int>(GROUP); ++g) x[i][g] = load_vector(from + g * src_pitch + i * 128);
        }
        FASTCKPT_UNROLL
        for (int i = 0; i < static_cast<int>(LOADS); ++i) {
            FASTCKPT_UNROLL
            for (int v = 0; v < static_cast<int>(VECTOR); ++v) {
                uint32_t bits = 0;
                FASTCKPT_UNROLL
                for (int g = 0; g < static_cast<int>(GROUP); ++g)
                    bits |= packed<d>(convert<S, D>(unpack<s>(x[i][g].word, v)), g);
                shared[slot<VECTOR>(word, (vector + 8 * i) * VECTOR + v)] = bits;
            }
        }
    }

    // The same, element by element: a tile at a border, or rows that are not aligned.
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
                    bits |= packed<d>(convert<S, D>(static_cast<uint32_t>(load_cell<s>(src + row * src_pitch + column * s))), g);
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
            if (vectors_out) store_vector(to, load_shared(at));
            else store_elements(to, at, word * GROUP);
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
        line = first / w.c.shape[3];
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
        case FLOAT8_E4M3FN: run.template body<Body<S, E4M3>>(w); break;
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
        return planes * sheet.high * sheet.wide;
    }
    if (same) return ratio_up(lines * lines_of(c, 1, 1, d).units, units_of_tile(1, 1));
    return ratio_up(lines * lines_of(c, s, d, 1).units, units_of_tile(s, d));
}

}  // namespace
}  // namespace fastckpt
