// What the launches of every kernel share: errors of CUDA, and what a device makes of a kernel. For *_cuda.cu alone.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "copy_cuda.h"

namespace fastckpt {
namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

KernelFacts facts_of(const char* name, const void* kernel, int threads) {
    cudaFuncAttributes a;
    check(cudaFuncGetAttributes(&a, kernel), name);
    KernelFacts f{name, a.numRegs, static_cast<int>(a.localSizeBytes), static_cast<int>(a.sharedSizeBytes), threads, 0};
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&f.blocks_per_multiprocessor, kernel, threads, 0), name);
    return f;
}

}  // namespace
}  // namespace fastckpt
