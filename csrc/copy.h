// struct Copy: one strided copy, the contract between Python, C++ and CUDA. A plan is a table of these.
// Offsets and strides are in bytes and all address arithmetic is 64-bit. numpy's dtype of the same name
// (copies.COPY) is checked against FIELDS at import.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastckpt {

constexpr int AXES = 4;
constexpr uint32_t ZERO_BUFFER = 0xFFFFFFFFu;  // src_buffer of a row that writes zeros

struct Copy {
    uint64_t src;               // bytes from the start of the source buffer to the first element
    uint64_t dst;               // bytes from the start of the destination buffer to the first element
    int64_t src_stride[AXES];   // bytes between neighbours on each axis in the source
    int64_t dst_stride[AXES];   // bytes between neighbours on each axis in the destination; descending
    uint32_t shape[AXES];       // elements on each axis; right-aligned, leading axes padded with 1 (stride 0)
    uint32_t src_buffer;        // index of the source buffer, or ZERO_BUFFER
    uint32_t dst_buffer;        // index of the destination buffer
    uint64_t first_tile;        // tiles of the rows before this one (cuda); 0 on cpu
    uint8_t src_dtype;          // Dtype (cast.h)
    uint8_t dst_dtype;          // Dtype (cast.h)
    uint8_t path;               // `axes.classify`: 0 rows, 1 transpose, 2 general
    uint8_t reserved[13];       // zero
};

static_assert(sizeof(Copy) == 128, "a Copy row is 128 bytes");
static_assert(offsetof(Copy, src) == 0 && offsetof(Copy, dst) == 8);
static_assert(offsetof(Copy, src_stride) == 16 && offsetof(Copy, dst_stride) == 48);
static_assert(offsetof(Copy, shape) == 80 && offsetof(Copy, src_buffer) == 96);
static_assert(offsetof(Copy, dst_buffer) == 100 && offsetof(Copy, first_tile) == 104);
static_assert(offsetof(Copy, src_dtype) == 112 && offsetof(Copy, dst_dtype) == 113);
static_assert(offsetof(Copy, path) == 114 && offsetof(Copy, reserved) == 115);

struct Field {
    const char* name;
    size_t offset, size;
};

#define FASTCKPT_FIELD(f) {#f, offsetof(Copy, f), sizeof(Copy::f)}
constexpr Field FIELDS[] = {
    FASTCKPT_FIELD(src),        FASTCKPT_FIELD(dst),        FASTCKPT_FIELD(src_stride), FASTCKPT_FIELD(dst_stride),
    FASTCKPT_FIELD(shape),      FASTCKPT_FIELD(src_buffer), FASTCKPT_FIELD(dst_buffer), FASTCKPT_FIELD(first_tile),
    FASTCKPT_FIELD(src_dtype),  FASTCKPT_FIELD(dst_dtype),  FASTCKPT_FIELD(path),       FASTCKPT_FIELD(reserved),
};
#undef FASTCKPT_FIELD

}  // namespace fastckpt
