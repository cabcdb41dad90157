// Fills the table of kernels for the instruction set this translation unit is compiled for.
#pragma once

#include "dequant.h"
#include "digest_long.h"
#include "isa.h"
#include "lowrank.h"
#include "quant.h"
#include "tiles.h"

namespace fastckpt {
namespace {

template <class S, class D> Pair pair() { return {line<S, D>, strided<S, D>, transposed<S, D>}; }

// The conversions from a float to the others.
template <class S> void fill_floats(Kernels& k, Dtype from) {
    auto fill = [&](auto to, Dtype code) {
        using D = decltype(to);
        if constexpr (!Same<S, D>::value) k.pairs[from][code] = pair<S, D>();
    };
    fill(F32{}, FLOAT32);
    fill(BF16{}, BFLOAT16);
    fill(F16{}, FLOAT16);
    fill(E4M3{}, FLOAT8_E4M3FN);
    fill(E5M2{}, FLOAT8_E5M2);
    fill(F64{}, FLOAT64);
}

Kernels make_kernels() {
    Kernels k{};
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
    k.add_low_rank = add_low_rank;
    k.row_amax = row_amax;
    return k;
}

}  // namespace
}  // namespace fastckpt
