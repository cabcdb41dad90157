// XXH3-64 apart from its long loop: up to 240 bytes, and the end of more. For host and device; `secret` is SECRET
// wherever that lies.
#pragma once

#include <cstddef>
#include <cstdint>

#include "port_cuda.h"

#define FASTCKPT_SECRET \
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, \
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, \
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, \
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, \
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, \
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, \
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, \
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, \
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, \
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, \
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, \
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e

namespace fastckpt {
namespace {

constexpr uint64_t P1 = 0x9E3779B185EBCA87ull, P2 = 0xC2B2AE3D27D4EB4Full, P3 = 0x165667B19E3779F9ull;
constexpr uint64_t MIX1 = 0x165667919E3779F9ull, MIX2 = 0x9FB21C651E98DF25ull;

FASTCKPT_HD uint64_t read64(const uint8_t* p) { return load_cell<8>(reinterpret_cast<const char*>(p)); }
FASTCKPT_HD uint32_t read32(const uint8_t* p) { return load_cell<4>(reinterpret_cast<const char*>(p)); }
FASTCKPT_HD uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}
FASTCKPT_HD uint64_t rotate(uint64_t x, int n) { return x << n | x >> (64 - n); }
FASTCKPT_HD uint64_t mix(const uint8_t* p, const uint8_t* secret) {
    return fold(read64(p) ^ read64(secret), read64(p + 8) ^ read64(secret + 8));
}
FASTCKPT_HD uint64_t swapped64(uint64_t x) {
    x = (x & 0x00ff00ff00ff00ffull) << 8 | (x >> 8 & 0x00ff00ff00ff00ffull);
    x = (x & 0x0000ffff0000ffffull) << 16 | (x >> 16 & 0x0000ffff0000ffffull);
    return x << 32 | x >> 32;
}
FASTCKPT_HD uint64_t avalanche(uint64_t h) {
    h = (h ^ h >> 37) * MIX1;
    return h ^ h >> 32;
}
FASTCKPT_HD uint64_t avalanche_xxh64(uint64_t h) {
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
}

FASTCKPT_HD uint64_t digest_16(const uint8_t* p, size_t n, const uint8_t* secret) {  // at most 16 bytes
    if (n > 8) {
        uint64_t low = read64(p) ^ read64(secret + 24) ^ read64(secret + 32);
        uint64_t high = read64(p + n - 8) ^ read64(secret + 40) ^ read64(secret + 48);
        return avalanche(n + swapped64(low) + high + fold(low, high));
    }
    if (n >= 4) {
        uint64_t x = read32(p + n - 4) + (static_cast<uint64_t>(read32(p)) << 32);
        x ^= read64(secret + 8) ^ read64(secret + 16);
        x ^= rotate(x, 49) ^ rotate(x, 24);
        x *= MIX2;
        x ^= (x >> 35) + n;
        x *= MIX2;
        return x ^ x >> 28;
    }
    if (n > 0) {
        uint32_t x = static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[n >> 1]) << 24 | p[n - 1] |
                     static_cast<uint32_t>(n) << 8;
        return avalanche_xxh64(x ^ static_cast<uint64_t>(read32(secret) ^ read32(secret + 4)));
    }
    return avalanche_xxh64(read64(secret + 56) ^ read64(secret + 64));
}

FASTCKPT_HD uint64_t digest_240(const uint8_t* p, size_t n, const uint8_t* secret) {  // 17 to 240 bytes
    uint64_t h = n * P1;
    if (n <= 128) {
        for (size_t i = 0; 32 * i < n; ++i)
            h += mix(p + 16 * i, secret + 32 * i) + mix(p + n - 16 * (i + 1), secret + 32 * i + 16);
        return avalanche(h);
    }
    for (size_t i = 0; i < 8; ++i) h += mix(p + 16 * i, secret + 16 * i);
    uint64_t end = mix(p + n - 16, secret + 136 - 17);
    h = avalanche(h);
    for (size_t i = 8; i < n / 16; ++i) end += mix(p + 16 * i, secret + 16 * (i - 8) + 3);
    return avalanche(h + end);
}

FASTCKPT_HD uint64_t digest_end(const uint64_t* acc, size_t n, const uint8_t* secret) {
    uint64_t h = n * P1;
    for (int i = 0; i < 4; ++i)
        h += fold(acc[2 * i] ^ read64(secret + 11 + 16 * i), acc[2 * i + 1] ^ read64(secret + 19 + 16 * i));
    return avalanche(h);
}

}  // namespace
}  // namespace fastckpt
