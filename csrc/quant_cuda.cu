// Matrices quantised in device memory: one launch over a table of them cut into tiles, one block a tile.
#include "launch_cuda.h"
#include "quant_cuda.h"

namespace fastckpt {

namespace {

struct QuantThread {
    uint32_t thread;
    uint32_t* shared;

    template <class Body> __device__ void body(const QuantRows* rows, const uint32_t* owner, uint64_t tile) const {
        const Body body(rows, owner, tile);
        body.load(thread, shared);
        __syncthreads();
        body.fold(thread, shared);
        __syncthreads();
        body.store(thread, shared);
    }
};

__global__ void __launch_bounds__(THREADS, 3) quantise_tiles(const QuantRows* rows, const uint32_t* owner, uint64_t first) {
    __shared__ alignas(16) uint32_t shared[QUANT_SHARED];
    quantise(QuantThread{threadIdx.x, shared}, rows, owner, first + blockIdx.x);
}

}  // namespace

void launch_quantise(uint64_t rows, uint64_t owner, uint64_t first, uint64_t count, uint64_t stream) {
    if (count > 0x7fffffffu) throw std::invalid_argument("quantise: too many tiles");
    if (count == 0) return;
    quantise_tiles<<<static_cast<unsigned>(count), THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const QuantRows*>(rows), reinterpret_cast<const uint32_t*>(owner), first);
    check(cudaGetLastError(), "quantise");
}

KernelFacts quantise_facts() { return facts_of("quantise", reinterpret_cast<const void*>(quantise_tiles), THREADS); }

}  // namespace fastckpt
