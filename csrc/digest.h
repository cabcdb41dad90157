// XXH3-64 with seed 0 (the xxHash specification, XXH3 with the default secret), and CRC-32 as zlib counts it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastckpt {

constexpr size_t SECRET_BYTES = 192, STRIPE = 64;
extern const uint8_t SECRET[SECRET_BYTES];

uint64_t digest64(const void* data, size_t nbytes);
uint64_t digest64_finish(const uint64_t (&acc)[8], size_t nbytes);

// The CRC of `data` after bytes whose CRC is `value`.
uint32_t crc32(const void* data, size_t nbytes, uint32_t value);
// The CRC of a then b, from the CRC of each and the length of b.
uint32_t crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b);

}  // namespace fastckpt
