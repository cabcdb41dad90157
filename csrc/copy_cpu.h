// Runs Copy rows on CPU threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy.h"
#include "recent.h"

namespace fastckpt {

struct Rows {
    const Copy* rows;
    size_t count;
    const uint64_t* sources;  // addresses of the source buffers
    size_t source_count;
    const uint64_t* destinations;
    size_t destination_count;
    Recent* recent;  // gives mapped pages of the sources back behind the copies; null keeps them
};

// Runs every row, in order within a thread, on `threads` threads or as many as the system starts. Throws
// std::invalid_argument for a row that names a buffer or a conversion that does not exist; rows before it have
// then been written.
void copy_rows(const Rows& work, int threads, int isa);

}  // namespace fastckpt
