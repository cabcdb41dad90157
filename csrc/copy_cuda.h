// What runs on a GPU: Copy rows, digests, quantising. No CUDA header here: addresses and streams are integers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "copy.h"

namespace fastckpt {

// Addresses of the four columns of a Table (tile_cuda.h), in device memory.
struct TableAt {
    uint64_t rows, owner, sources, destinations;
};

// Starts the blocks of `count` tiles from tile `first` on; all of one path. Returns at once.
// Throws std::runtime_error with CUDA's own words when the launch fails.
void launch_tiles(const TableAt& table, int path, uint64_t first, uint64_t count, uint64_t stream);

// Starts the digests of `count` leaves: (address, nbytes) pairs of u64 at `leaves`, u64 results at `out`, all in
// device memory. Throws as launch_tiles does.
void launch_digests(uint64_t leaves, uint64_t count, uint64_t out, uint64_t stream);

// Some rows of a dense matrix in device memory, and what becomes of them (quant_place_cuda.h). `first`: the number of the
// first of them, whole blocks below; all addresses but `src` are those of the whole matrix. `share`: rows that share a
// scale; `group`, `width`: base-2 logarithms of the values of a group and of the threads side by side.
//
// `amax`: u32, the bits of the largest magnitude of each `share` of rows: raised (LARGEST) or taken; 0: it is found
// here. `zeros`: packed zero points, or 0. `bad`: u32, set to 1 where a value or a scale is NaN or infinite.
struct QuantRows {
    uint64_t src, out, scales, zeros, amax, bad;
    int64_t pitch;  // bytes from a row to the next in the source
    uint64_t first_tile;
    uint32_t rows, columns, first, share, group, width;
    float reach, floor, lowest;
    uint8_t dtype, kind, flags, reserved;  // Dtype, QuantKind, QuantFlag
};
static_assert(sizeof(QuantRows) == 104, "QuantRows has no holes");

// HALF: scales are fp16. ZERO: groups have zero points. SQUARE: blocks of 128 x 128. LARGEST: nothing is quantised. POWER:
// groups of a row share a power of two, of which a byte has the exponent; with RECIPROCAL.
enum QuantFlag : uint8_t {
    QUANT_RECIPROCAL = 1, QUANT_HALF = 2, QUANT_ZERO = 4, QUANT_SQUARE = 8, QUANT_LARGEST = 16, QUANT_POWER = 32
};

// Starts `count` tiles from tile `first` on of a table of QuantRows, whose row each tile belongs to stands at `owner`
// (u32). Throws as launch_tiles does.
void launch_quantise(uint64_t rows, uint64_t owner, uint64_t first, uint64_t count, uint64_t stream);

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
// What the current device makes of each kernel, digests and quantising last. Throws std::runtime_error.
std::vector<KernelFacts> kernel_facts();
KernelFacts digest_facts();
KernelFacts quantise_facts();

extern const char* const CUDA_ARCHITECTURES;

}  // namespace fastckpt
