// One launch for each path over a table of rows cut into tiles: one block a tile, or one warp.
#include "launch_cuda.h"
#include "tiles_cuda.h"

#ifndef FASTCKPT_ARCHITECTURES
#define FASTCKPT_ARCHITECTURES ""
#endif

namespace fastckpt {

const char* const CUDA_ARCHITECTURES = FASTCKPT_ARCHITECTURES;

namespace {

// A row is held by reference and a block or a warp takes one tile: a copy of the row goes to local memory, a loop
// over tiles spills.
struct Threads {
    uint32_t thread;
    uint32_t* shared;

    template <class Body> __device__ void body(const Work& w) const {
        const Body body(w);
        body.load(thread, shared);
        if constexpr (Body::SHARED) __syncthreads();
        body.store(thread, shared);
    }
};

template <Path PATH> __global__ void __launch_bounds__(THREADS, 4)
    copy_tiles(const Table table, const uint64_t first, const uint32_t count) {
    __shared__ alignas(16) uint32_t shared[PATH == TRANSPOSE ? SHARED_WORDS : 4];
    constexpr uint32_t TEAMS = THREADS / threads_of(PATH);
    const uint32_t tile = blockIdx.x * TEAMS + threadIdx.x / threads_of(PATH);
    if (tile >= count) return;  // only where a block has several, which meet at no barrier
    const Work work(table, first + tile);
    dispatch<PATH>(Threads{threadIdx.x % threads_of(PATH), shared}, work);
}

using Kernel = void (*)(Table, uint64_t, uint32_t);
constexpr Kernel KERNELS[PATHS] = {copy_tiles<ROWS>, copy_tiles<TRANSPOSE>, copy_tiles<GENERAL>};
const char* const NAMES[PATHS] = {"rows", "transpose", "general"};

}  // namespace

void launch_tiles(const TableAt& at, int path, uint64_t first, uint64_t count, uint64_t stream) {
    if (path < 0 || path >= PATHS || count > 0x7fffffffu) throw std::invalid_argument("launch: no such path, or too many tiles");
    if (count == 0) return;
    const Table table{reinterpret_cast<const Copy*>(at.rows), reinterpret_cast<const uint32_t*>(at.owner),
                      reinterpret_cast<const uint64_t*>(at.sources), reinterpret_cast<const uint64_t*>(at.destinations)};
    const auto tiles = static_cast<uint32_t>(count), teams = THREADS / threads_of(static_cast<uint8_t>(path));
    KERNELS[path]<<<(tiles + teams - 1) / teams, THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(table, first, tiles);
    check(cudaGetLastError(), NAMES[path]);
}

DeviceState device_state() {
    DeviceState s;
    const cudaError_t error = cudaGetDeviceCount(&s.devices);  // leaves its output unwritten on an error
    if (error != cudaSuccess) {
        s.devices = 0;
        s.error = static_cast<int>(error);
        s.why = cudaGetErrorString(error);
        cudaGetLastError();
    }
    if (cudaDriverGetVersion(&s.driver) != cudaSuccess) s.driver = 0;
    if (cudaRuntimeGetVersion(&s.runtime) != cudaSuccess) s.runtime = 0;
    return s;
}

std::vector<KernelFacts> kernel_facts() {
    std::vector<KernelFacts> facts;
    for (int path = 0; path < PATHS; ++path)
        facts.push_back(facts_of(NAMES[path], reinterpret_cast<const void*>(KERNELS[path]), THREADS));
    facts.push_back(digest_facts());
    facts.push_back(quantise_facts());
    return facts;
}

}  // namespace fastckpt
