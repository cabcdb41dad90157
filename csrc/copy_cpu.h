// Runs Copy rows on CPU threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy.h"

namespace fastckpt {

struct Rows {
    const Copy* rows;
    size_t count;
    const uint64_t* sources;  // addresses of the source buffers
    size_t source_count;
    const uint64_t* destinations;
    size_t destination_count;
    const uint64_t* mapped;  // for each source: its bytes when it lies in a file mapping, else 0; or null
    uint64_t release_bytes;  // mapped pages are given back when this many were touched; 0 keeps them
};

// Runs every row, in order within a thread. Throws std::invalid_argument for a row that names a buffer or a
// conversion that does not exist; rows before it have then been written.
void copy_rows(const Rows& work, int threads, int isa);

}  // namespace fastckpt
