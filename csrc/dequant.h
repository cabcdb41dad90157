// What quantised values mean: unpacked, less their zero point, times their scale, in fp32, then rounded once. A strip
// of a row at a time, which stays in the first cache; so do the scales of a row, one for each column.
#pragma once

#include "isa.h"
#include "port.h"
#include "tiles.h"

namespace fastckpt {
namespace {

// n values of a row from column c on, as fp32.
FASTCKPT_INLINE void widen(float* out, const Dequant& q, size_t row, size_t c, size_t n) {
    const char* bytes = q.values + row * q.columns + c;
    char* floats = reinterpret_cast<char*>(out);
    // Eight values of a word, lane by lane: where they stand in it, in bits.
    typedef uint32_t Eight __attribute__((vector_size(32)));
    auto words = [&](const Eight& shift) {
        const char* src = q.values + (row * q.columns + c) / 2;
        for (size_t i = 0; i < n; i += 8) {
            uint32_t word;
            memcpy(&word, src + i / 2, 4);
            const auto eight = __builtin_convertvector((Eight{} + word) >> shift & 15u, float __attribute__((vector_size(32))));
            memcpy(out + i, &eight, sizeof eight);
        }
    };
    auto down = [&](size_t bits) {
        const size_t many = 32 / bits, shift = row % many * bits;
        const char* src = q.values + (row / many * q.columns + c) * 4;
        for (size_t i = 0; i < n; ++i) {
            uint32_t word;
            memcpy(&word, src + i * 4, 4);
            out[i] = static_cast<float>(static_cast<int32_t>(word >> shift & ((1u << bits) - 1)));
        }
    };
    switch (q.kind) {
        case DEQUANT_E4M3: return line<E4M3, F32>(floats, bytes, n, false);
        case DEQUANT_E5M2: return line<E5M2, F32>(floats, bytes, n, false);
        case DEQUANT_INT8:
            for (size_t i = 0; i < n; ++i) out[i] = static_cast<int8_t>(bytes[i]);
            return;
        case DEQUANT_UINT8:
            for (size_t i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(bytes[i]);
            return;
        case DEQUANT_INT4: return words(Eight{0, 4, 8, 12, 16, 20, 24, 28});
        case DEQUANT_INT4_AWQ: return words(Eight{0, 16, 4, 20, 8, 24, 12, 28});
        case DEQUANT_INT4_DOWN: return down(4);
        case DEQUANT_E2M1: {
            // Its exponent and fraction stand in an fp32's highest and lowest bits of them: 2^126 too small.
            auto meant = [](uint32_t x) { return as_float((x & 7) << 22 | (x & 8) << 28) * 0x1p126f; };
            const auto* src = reinterpret_cast<const uint8_t*>(q.values) + (row * q.columns + c) / 2;
            for (size_t i = 0; i < n / 2; ++i) {
                out[2 * i] = meant(src[i]);
                out[2 * i + 1] = meant(src[i] >> 4u);
            }
            return;
        }
        default: return down(8);
    }
}

// What the columns from c on have of a row of figures, one for each group of columns.
FASTCKPT_INLINE void each(float* out, const Dequant& q, const float* figures, float added, size_t c, size_t n) {
    if (q.group == 0) {
        for (size_t i = 0; i < n; ++i) out[i] = figures[0] + added;
        return;
    }
    for (size_t i = 0; i < n;) {
        const size_t at = q.first + c + i, end = (at / q.group + 1) * q.group - at + i, stop = end < n ? end : n;
        const float figure = figures[at / q.group] + added;
        for (; i < stop; ++i) out[i] = figure;
    }
}

void dequantise(const Dequant& q) {
    FloatMode mode;
    constexpr size_t WIDE = 1024;
    float x[WIDE], scale[WIDE], zero[WIDE];
    const size_t size = ITEMSIZE[q.dtype];
    const bool zeros = q.zeros != nullptr || q.offset != 0;
    for (size_t c = 0; c < q.columns; c += WIDE) {
        const size_t n = c + WIDE < q.columns ? WIDE : q.columns - c;
        if (q.zeros == nullptr)
            for (size_t i = 0; i < n; ++i) zero[i] = q.offset;
        for (size_t r = 0; r < q.rows; ++r) {
            if (r == 0 || q.row[r] != q.row[r - 1]) {
                const size_t at = static_cast<size_t>(q.row[r]) * q.groups;
                each(scale, q, q.scales + at, 0, c, n);
                if (q.zeros != nullptr) each(zero, q, q.zeros + at, q.offset, c, n);
            }
            widen(x, q, r, c, n);
            if (zeros)
                for (size_t i = 0; i < n; ++i) x[i] = (x[i] - zero[i]) * scale[i];
            else
                for (size_t i = 0; i < n; ++i) x[i] *= scale[i];
            char* out = q.out + (r * q.columns + c) * size;
            const char* floats = reinterpret_cast<const char*>(x);
            switch (q.dtype) {
                case FLOAT32: line<F32, F32>(out, floats, n, false); break;
                case BFLOAT16: line<F32, BF16>(out, floats, n, false); break;
                default: line<F32, F16>(out, floats, n, false);
            }
        }
    }
}

}  // namespace
}  // namespace fastckpt
