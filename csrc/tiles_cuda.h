// How many tiles a row has, and the body of each: the choice calls run.template body<Body>(work).
#pragma once

#include "general_cuda.h"
#include "rows_cuda.h"
#include "transposed_cuda.h"

namespace fastckpt {
namespace {

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
