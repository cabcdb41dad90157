// The bodies of the GPU, run on the host one thread after the other: how their arithmetic is tested where
// there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy_cuda.h"

namespace fastckpt {

// Runs `tiles` tiles of a table in main memory. Shared memory is poisoned before every tile; with `shuffle` the
// threads of a phase run in an order that depends on it and on the tile, and so do the tiles.
void run_tiles_on_host(const TableAt& table, uint64_t tiles, uint32_t shuffle);

// The digests of `count` leaves in main memory, by the GPU's body; as launch_digests has them.
void run_digests_on_host(uint64_t leaves, uint64_t count, uint64_t out);

// Quantises `tiles` tiles of a table in main memory, by the GPU's body; as launch_quantise and run_tiles_on_host have it.
void run_quantise_on_host(uint64_t rows, uint64_t owner, uint64_t tiles, uint32_t shuffle);

// What Python must agree with.
uint64_t tiles_of_row(const Copy& row);
uint64_t tiles_of_quant_rows(const QuantRows& rows);

// How many of a warp's accesses to shared memory meet in the worst bank, writing and reading a transposed tile
// of elements of `s` to `d` bytes; 1 is free of conflicts.
struct Conflicts {
    int write, read;
};
Conflicts bank_conflicts(int s, int d);

}  // namespace fastckpt
