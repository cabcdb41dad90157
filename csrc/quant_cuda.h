// The tiles of a QuantRows and the body of each: the choice calls run.template body<Body>(rows, owner, tile).
#pragma once

#include "quant_bytes_cuda.h"
#include "quant_groups_cuda.h"

namespace fastckpt {
namespace {

template <class Run> FASTCKPT_HD void quantise(const Run& run, const QuantRows* rows, const uint32_t* owner, uint64_t tile) {
    const QuantShape shape = shape_of(rows[owner[tile]]);
    if (shape == LINE || shape == SQUARE) run.template body<QuantBytes>(rows, owner, tile);
    else run.template body<QuantGroups>(rows, owner, tile);
}

}  // namespace
}  // namespace fastckpt
