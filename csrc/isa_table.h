// Fills the table of kernels for the instruction set this translation unit is compiled for.
#pragma once

#include "dequant.h"
#include "digest_long.h"
#include "isa.h"
#include "quant.h"
#include "tiles.h"

namespace fastckpt {
namespace {

template <class S, class D> Pair pair() { return {line<S, D>, strided<S, D>, transposed<S, D>}; }

template <class S> void fill_floats(Kernels& k, Dtype from) {
    k.pairs[from][FLOAT32] = pair<S, F32>();
    k.pairs[from][BFLOAT16] = pair<S, BF16>();
    k.pairs[from][FLOAT16] = pair<S, F16>();
    k.pairs[from][FLOAT8_E4M3FN] = pair<S, E4M3>();
    k.pairs[from][FLOAT8_E5M2] = pair<S, E5M2>();
    k.pairs[from][FLOAT64] = pair<S, F64>();
}

Kernels make_kernels(const char* name) {
    Kernels k{};
    k.name = name;
    fill_floats<F32>(k, FLOAT32);
    fill_floats<BF16>(k, BFLOAT16);
    fill_floats<F16>(k, FLOAT16);
    fill_floats<E4M3>(k, FLOAT8_E4M3FN);
    fill_floats<E5M2>(k, FLOAT8_E5M2);
    fill_floats<F64>(k, FLOAT64);
    for (int d = 0; d < DTYPES; ++d) {
        switch (ITEMSIZE[d]) {
            case 1: k.pairs[d][d] = pair<Bytes<1>, Bytes<1>>(); break;
            case 2: k.pairs[d][d] = pair<Bytes<2>, Bytes<2>>(); break;
            case 4: k.pairs[d][d] = pair<Bytes<4>, Bytes<4>>(); break;
            case 8: k.pairs[d][d] = pair<Bytes<8>, Bytes<8>>(); break;
            default: k.pairs[d][d] = pair<Bytes<16>, Bytes<16>>(); break;
        }
    }
    k.digest_long = digest_long;
    k.nonfinite = count_nonfinite;
    k.quantise = quantise;
    k.dequantise = dequantise;
    k.row_amax = row_amax;
    return k;
}

}  // namespace
}  // namespace fastckpt
