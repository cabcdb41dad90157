// A tile: what one block of a GPU, or one warp of it, does of a Copy row. Tiles of a row move the same number of bytes.
//
// A body is a small struct with load(thread, shared) and store(thread, shared); the barrier is the gap between
// them. The GPU runs threads_of(path) of them at once (copy_cuda.cu), tests run them one by one (tiles_host.cpp).
// There is a body for each path: rows_cuda.h, transposed_cuda.h, general_cuda.h; tiles_cuda.h chooses.
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

namespace fastckpt {
namespace {

enum Path : uint8_t { ROWS, TRANSPOSE, GENERAL, PATHS };

constexpr uint32_t THREADS = 256;
constexpr uint32_t TEAM = FASTCKPT_TEAM;  // threads of a tile of rows: short ones share a block

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

}  // namespace
}  // namespace fastckpt
