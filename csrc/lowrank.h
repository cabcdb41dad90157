// A matrix plus a product of two thin ones, in float64, rounded once (LoRA). Rows by columns of the result stay in
// registers while the rank is summed.
#pragma once

#include "port.h"

namespace fastckpt {
namespace {

// ROWS rows by WIDE vectors of columns of the sums.
template <size_t ROWS, size_t WIDE> FASTCKPT_INLINE void low_rank_tile(const LowRank& q, size_t r, size_t c) {
    constexpr size_t MANY = sizeof(Doubles) / sizeof(double);
    Doubles sums[ROWS][WIDE] = {};
    for (size_t k = 0; k < q.rank; ++k) {
        Doubles right[WIDE];
        memcpy(right, q.right + k * q.columns + c, sizeof right);
        for (size_t i = 0; i < ROWS; ++i) {
            const Doubles left = Doubles{} + q.left[(r + i) * q.rank + k];
            for (size_t j = 0; j < WIDE; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
        }
    }
    for (size_t i = 0; i < ROWS; ++i)
        for (size_t j = 0; j < WIDE; ++j) {
            const size_t at = (r + i) * q.columns + c + j * MANY;
            Singles single;
            memcpy(&single, q.base + at, sizeof single);
            single = __builtin_convertvector(sums[i][j] * q.scale + __builtin_convertvector(single, Doubles), Singles);
            memcpy(q.base + at, &single, sizeof single);
        }
}

void add_low_rank(const LowRank& q) {
    FloatMode mode;
    constexpr size_t ROWS = 4, WIDE = 4, MANY = sizeof(Doubles) / sizeof(double), TILE = WIDE * MANY;
    const size_t whole = q.columns - q.columns % TILE;
    for (size_t c = 0; c < whole; c += TILE) {
        size_t r = 0;
        for (; r + ROWS <= q.rows; r += ROWS) low_rank_tile<ROWS, WIDE>(q, r, c);
        for (; r < q.rows; ++r) low_rank_tile<1, WIDE>(q, r, c);
    }
    for (size_t r = 0; r < q.rows; ++r)
        for (size_t c = whole; c < q.columns; ++c) {
            double sum = 0;
            for (size_t k = 0; k < q.rank; ++k) sum += q.left[r * q.rank + k] * q.right[k * q.columns + c];
            float& base = q.base[r * q.columns + c];
            base = static_cast<float>(sum * q.scale + base);
        }
}

}  // namespace
}  // namespace fastckpt
