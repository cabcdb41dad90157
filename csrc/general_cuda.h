// General tiles: any strides, any pair of types.
#pragma once

#include "tile_cuda.h"

namespace fastckpt {
namespace {

constexpr uint32_t CELLS = 8;  // elements of a thread
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

}  // namespace
}  // namespace fastckpt
