#include "digest.h"

#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "digests are defined over little-endian words");

namespace fastckpt {

alignas(64) const uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

namespace {

constexpr uint64_t P1 = 0x9E3779B185EBCA87ull, P2 = 0xC2B2AE3D27D4EB4Full, P3 = 0x165667B19E3779F9ull;
constexpr uint64_t MIX1 = 0x165667919E3779F9ull, MIX2 = 0x9FB21C651E98DF25ull;

uint64_t read64(const uint8_t* p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}
uint32_t read32(const uint8_t* p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}
uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}
uint64_t rotate(uint64_t x, int n) { return x << n | x >> (64 - n); }
uint64_t mix(const uint8_t* p, const uint8_t* secret) {
    return fold(read64(p) ^ read64(secret), read64(p + 8) ^ read64(secret + 8));
}
uint64_t avalanche(uint64_t h) {
    h = (h ^ h >> 37) * MIX1;
    return h ^ h >> 32;
}
uint64_t avalanche_xxh64(uint64_t h) {
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
}

uint64_t digest_16(const uint8_t* p, size_t n) {  // at most 16 bytes
    if (n > 8) {
        uint64_t low = read64(p) ^ read64(SECRET + 24) ^ read64(SECRET + 32);
        uint64_t high = read64(p + n - 8) ^ read64(SECRET + 40) ^ read64(SECRET + 48);
        return avalanche(n + __builtin_bswap64(low) + high + fold(low, high));
    }
    if (n >= 4) {
        uint64_t x = read32(p + n - 4) + (static_cast<uint64_t>(read32(p)) << 32);
        x ^= read64(SECRET + 8) ^ read64(SECRET + 16);
        x ^= rotate(x, 49) ^ rotate(x, 24);
        x *= MIX2;
        x ^= (x >> 35) + n;
        x *= MIX2;
        return x ^ x >> 28;
    }
    if (n > 0) {
        uint32_t x = static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[n >> 1]) << 24 | p[n - 1] |
                     static_cast<uint32_t>(n) << 8;
        return avalanche_xxh64(x ^ static_cast<uint64_t>(read32(SECRET) ^ read32(SECRET + 4)));
    }
    return avalanche_xxh64(read64(SECRET + 56) ^ read64(SECRET + 64));
}

uint64_t digest_240(const uint8_t* p, size_t n) {  // 17 to 240 bytes
    uint64_t h = n * P1;
    if (n <= 128) {
        for (size_t i = 0; 32 * i < n; ++i)
            h += mix(p + 16 * i, SECRET + 32 * i) + mix(p + n - 16 * (i + 1), SECRET + 32 * i + 16);
        return avalanche(h);
    }
    for (size_t i = 0; i < 8; ++i) h += mix(p + 16 * i, SECRET + 16 * i);
    uint64_t end = mix(p + n - 16, SECRET + 136 - 17);
    h = avalanche(h);
    for (size_t i = 8; i < n / 16; ++i) end += mix(p + 16 * i, SECRET + 16 * (i - 8) + 3);
    return avalanche(h + end);
}

// ---- CRC-32, reflected polynomial EDB88320 ----

constexpr uint32_t POLY = 0xEDB88320u;

struct Tables {
    uint32_t byte[8][256] = {};  // slicing by 8
    uint32_t power[32] = {};     // x^(2^n) mod P

    constexpr Tables() {
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t c = i;
            for (int k = 0; k < 8; ++k) c = c & 1 ? c >> 1 ^ POLY : c >> 1;
            byte[0][i] = c;
        }
        for (int t = 1; t < 8; ++t)
            for (int i = 0; i < 256; ++i) byte[t][i] = byte[t - 1][i] >> 8 ^ byte[0][byte[t - 1][i] & 255];
        power[0] = 1u << 30;
        for (int n = 1; n < 32; ++n) power[n] = multiply(power[n - 1], power[n - 1]);
    }

    // a * b mod P
    static constexpr uint32_t multiply(uint32_t a, uint32_t b) {
        uint32_t product = 0;
        for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
            if (a & bit) product ^= b;
            b = b & 1 ? b >> 1 ^ POLY : b >> 1;
        }
        return product;
    }
};
constexpr Tables TABLES;

uint32_t crc_table(const uint8_t* p, size_t n, uint32_t c) {
    const auto& t = TABLES.byte;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t x = read64(p) ^ c;
        c = t[7][x & 255] ^ t[6][x >> 8 & 255] ^ t[5][x >> 16 & 255] ^ t[4][x >> 24 & 255] ^ t[3][x >> 32 & 255] ^
            t[2][x >> 40 & 255] ^ t[1][x >> 48 & 255] ^ t[0][x >> 56];
    }
    for (; n > 0; --n) c = c >> 8 ^ t[0][(c ^ *p++) & 255];
    return c;
}

#if defined(__x86_64__)
#define FASTCKPT_CLMUL __attribute__((target("pclmul,sse4.1")))

FASTCKPT_CLMUL inline __m128i fold_by(__m128i x, __m128i k, __m128i next) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11)), next);
}

// Folding by four 128-bit lanes, then a Barrett reduction: V. Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction" (Intel, 2009). At least 64 bytes, a multiple of 16.
FASTCKPT_CLMUL uint32_t crc_clmul(const uint8_t* p, size_t n, uint32_t c) {
    const __m128i k12 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), k34 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i k5 = _mm_set_epi64x(0, 0x0163cd6124), barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low32 = _mm_setr_epi32(~0, 0, ~0, 0);
    auto at = [](const uint8_t* q) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)); };
    __m128i x1 = _mm_xor_si128(at(p), _mm_cvtsi32_si128(static_cast<int>(c)));
    __m128i x2 = at(p + 16), x3 = at(p + 32), x4 = at(p + 48);
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
        x1 = fold_by(x1, k12, at(p));
        x2 = fold_by(x2, k12, at(p + 16));
        x3 = fold_by(x3, k12, at(p + 32));
        x4 = fold_by(x4, k12, at(p + 48));
    }
    x1 = fold_by(fold_by(fold_by(x1, k34, x2), k34, x3), k34, x4);
    for (; n >= 16; p += 16, n -= 16) x1 = fold_by(x1, k34, at(p));
    x1 = _mm_xor_si128(_mm_srli_si128(x1, 8), _mm_clmulepi64_si128(x1, k34, 0x10));
    x1 = _mm_xor_si128(_mm_srli_si128(x1, 4), _mm_clmulepi64_si128(_mm_and_si128(x1, low32), k5, 0x00));
    x2 = _mm_clmulepi64_si128(_mm_and_si128(x1, low32), barrett, 0x10);
    x2 = _mm_clmulepi64_si128(_mm_and_si128(x2, low32), barrett, 0x00);
    return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(x1, x2), 1));
}
#endif

}  // namespace

uint64_t digest64_finish(const uint64_t (&acc)[8], size_t n) {
    uint64_t h = n * P1;
    for (int i = 0; i < 4; ++i)
        h += fold(acc[2 * i] ^ read64(SECRET + 11 + 16 * i), acc[2 * i + 1] ^ read64(SECRET + 19 + 16 * i));
    return avalanche(h);
}

uint64_t digest64(const void* data, size_t n) {
    const uint8_t* p = static_cast<const uint8_t*>(data);
    if (n <= 16) return digest_16(p, n);
    if (n <= 240) return digest_240(p, n);
    return kernels(-1).digest_long(p, n);
}

uint32_t crc32(const void* data, size_t n, uint32_t value) {
    const uint8_t* p = static_cast<const uint8_t*>(data);
    uint32_t c = ~value;
#if defined(__x86_64__)
    static const bool clmul = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    if (clmul && n >= 64) {
        const size_t whole = n / 16 * 16;
        c = crc_clmul(p, whole, c);
        p += whole;
        n -= whole;
    }
#endif
    return ~crc_table(p, n, c);
}

uint32_t crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b) {
    uint32_t shift = 1u << 31;  // x^0
    for (int k = 3; nbytes_b != 0; nbytes_b >>= 1, ++k)
        if (nbytes_b & 1) shift = Tables::multiply(TABLES.power[k & 31], shift);
    return Tables::multiply(shift, a) ^ b;
}

}  // namespace fastckpt
