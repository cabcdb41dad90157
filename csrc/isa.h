// What one instruction set offers: a table of kernels, filled once by each isa_*.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cast.h"

namespace fastckpt {

// n elements, contiguous on both sides; `stream`: past the cache.
using Line = void (*)(char* dst, const char* src, size_t n, bool stream);
// n elements, `dst_step` and `src_step` bytes apart.
using Strided = void (*)(char* dst, const char* src, size_t n, int64_t dst_step, int64_t src_step);
// dst[c][r] = src[r][c] for rows x cols of the source; elements of a row are contiguous on both sides,
// source rows lie `src_step` bytes apart, destination rows `dst_step`.
using Transpose = void (*)(char* dst, const char* src, size_t rows, size_t cols, int64_t dst_step,
                           int64_t src_step, bool stream);

struct Pair {
    Line line = nullptr;  // null: this pair cannot be converted
    Strided strided = nullptr;
    Transpose transpose = nullptr;
};

// What becomes of a value: a byte, or four bits, of which eight make a word: eight columns, the first lowest (INT4,
// E2M1), in AWQ's order (AWQ), or eight rows, the first lowest (DOWN).
enum QuantKind : uint8_t { QUANT_INT8, QUANT_E4M3, QUANT_INT4, QUANT_INT4_AWQ, QUANT_INT4_DOWN, QUANT_E2M1, QUANT_KINDS };

// Rows of a dense matrix and how they are quantised (quant.h).
// `src`: rows x columns of `dtype` (fp32, bf16 or fp16), row after row; for AWQ and DOWN turned: column after column,
//     `pitch` bytes apart.
// `out`: one byte a value, or two values a byte.
// Blocks: for AWQ and DOWN one column wide (columns and block_rows are multiples of 8); for INT4 and E2M1 whole groups of
//     one row (multiples of 8); for the others any.
// `amax`: one a row, taken as the largest magnitude where a scale is shared beyond these values (blocks are then whole
//     rows), or null.
// `scales`: one a block, row after row of blocks; `half`: rounded to fp16; `power`: powers of two, with `reciprocal`.
// `zeros`: one zero point a block, from `lowest` to 7, or null where there are none.
// `sums`: the largest error, then the sums of (x - y)^2, x^2, y^2 and x y, added to.
struct Quant {
    const char* src;
    size_t rows, columns, pitch, block_rows, block_columns;
    Dtype dtype;
    QuantKind kind;
    bool reciprocal;  // int8: multiply by the reciprocal of the scale
    bool half, power;
    float reach, floor, lowest;
    const float* amax;
    char* out;
    float* scales;
    int8_t* zeros;
    double* sums;
};

// How a value lies: a byte (UINT8 for eight bits packed across), four bits of which eight make a word of a row, the
// first lowest (INT4) or in AWQ's order (AWQ), or four or eight bits of which a word holds that many rows (DOWN). E2M1:
// a float of four bits, two of which make a byte of a row, the first lowest.
enum DequantKind : uint8_t {
    DEQUANT_INT8,
    DEQUANT_E4M3,
    DEQUANT_E5M2,
    DEQUANT_UINT8,
    DEQUANT_INT4,
    DEQUANT_INT4_AWQ,
    DEQUANT_INT4_DOWN,
    DEQUANT_INT8_DOWN,
    DEQUANT_E2M1,
    DEQUANT_KINDS
};

// Quantised values and what they mean (dequant.h): (value - offset - zero) * scale.
// `values`: rows x columns, as they lie, in whole words, or bytes of two.
// `scales`, `zeros` (or null): `groups` a row. Value (r, c) has number (first + c) / group of row row[r], or with group
//     0 that row's first.
// `out`: rows x columns of `dtype` (fp32, bf16 or fp16).
struct Dequant {
    const char* values;
    size_t rows, columns;
    DequantKind kind;
    Dtype dtype;
    const float* scales;
    const float* zeros;
    const int32_t* row;
    size_t groups, group, first;
    float offset;
    char* out;
};

// A matrix and a product of two thin ones (lowrank.h): base += scale * left @ right, summed in the order of the rank in
// float64, then rounded once.
// `base`: rows x columns, row after row.
// `left`: rows x rank, `right`: rank x columns; all are values of fp32, so that a product of two is exact.
struct LowRank {
    float* base;
    const double* left;
    const double* right;
    size_t rows, rank, columns;
    double scale;
};

struct Kernels {
    Pair pairs[DTYPES][DTYPES];  // [source][destination]
    // XXH3-64 of more than 240 bytes, seed 0.
    uint64_t (*digest_long)(const uint8_t* data, size_t nbytes);
    // Elements that are NaN or infinite among n of a float type; 0 for the others.
    uint64_t (*nonfinite)(const char* data, size_t n, Dtype dtype);
    // Quantises; false, with `out` undefined, where a value or its scale is NaN or infinite.
    bool (*quantise)(const Quant& q);
    // Dequantises.
    void (*dequantise)(const Dequant& q);
    // Adds a product of thin matrices.
    void (*add_low_rank)(const LowRank& q);
    // The largest magnitude of each row of fp32, bf16 or fp16; not finite where a value is not.
    void (*row_amax)(float* out, const char* src, size_t rows, size_t columns, Dtype dtype);
};

const Kernels& kernels_portable();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

constexpr int ISAS = 3;
extern const char* const ISA_NAMES[ISAS];  // portable, avx2, avx512: the number of an isa is its place here

// Whether this machine and this build have that instruction set.
bool has_isa(int isa);
// The kernels of an instruction set, or of the best one for -1. Throws std::invalid_argument.
const Kernels& kernels(int isa);

}  // namespace fastckpt
