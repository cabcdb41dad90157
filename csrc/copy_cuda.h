// What runs on a GPU: Copy rows, digests. No CUDA header here: addresses and streams are integers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "copy.h"

namespace fastckpt {

// Addresses of the four columns of a Table (tiles_cuda.h), in device memory.
struct TableAt {
    uint64_t rows, owner, sources, destinations;
};

// Starts the blocks of `count` tiles from tile `first` on; all of one path. Returns at once.
// Throws std::runtime_error with CUDA's own words when the launch fails.
void launch_tiles(const TableAt& table, int path, uint64_t first, uint64_t count, uint64_t stream);

// Starts the digests of `count` leaves: (address, nbytes) pairs of u64 at `leaves`, u64 results at `out`, all in
// device memory. Throws as launch_tiles does.
void launch_digests(uint64_t leaves, uint64_t count, uint64_t out, uint64_t stream);

struct DeviceState {
    int devices = 0;           // that can be used
    int driver = 0, runtime = 0;  // CUDA versions, 1000 * major + 10 * minor; driver 0: none
    int error = 0;             // of asking for the devices
    std::string why;           // that error in CUDA's words
};
DeviceState device_state();

struct KernelFacts {
    std::string name;
    int registers = 0, local_bytes = 0, shared_bytes = 0, threads = 0, blocks_per_multiprocessor = 0;
};
// What the current device makes of each kernel, digests last. Throws std::runtime_error.
std::vector<KernelFacts> kernel_facts();
KernelFacts digest_facts();

extern const char* const CUDA_ARCHITECTURES;

}  // namespace fastckpt
