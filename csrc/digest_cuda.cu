// Digests of leaves in device memory.
#include "digest_leaves.h"
#include "launch_cuda.h"

namespace fastckpt {

namespace {

__device__ const DigestTables TABLES = FASTCKPT_DIGEST_TABLES;

__global__ void __launch_bounds__(LEAF_THREADS, 8) digest_leaves(const LeafAt* leaves, uint64_t count, uint64_t* out) {
    __shared__ uint64_t shared[ACCUMULATORS];
    const Leaves body{leaves, count, out, &TABLES, blockIdx.x};
    body.load(threadIdx.x, shared);
    __syncthreads();
    body.store(threadIdx.x, shared);
}

}  // namespace

void launch_digests(uint64_t leaves, uint64_t count, uint64_t out, uint64_t stream) {
    const uint64_t blocks = (count + LEAVES_OF_BLOCK - 1) / LEAVES_OF_BLOCK;
    if (blocks > 0x7fffffffu) throw std::invalid_argument("digests: too many leaves");
    if (blocks == 0) return;
    digest_leaves<<<static_cast<unsigned>(blocks), LEAF_THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const LeafAt*>(leaves), count, reinterpret_cast<uint64_t*>(out));
    check(cudaGetLastError(), "digests");
}

KernelFacts digest_facts() { return facts_of("digest", reinterpret_cast<const void*>(digest_leaves), LEAF_THREADS); }

}  // namespace fastckpt
