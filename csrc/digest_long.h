// The accumulation loop of XXH3-64 for more than 240 bytes, over the lanes of one instruction set.
#pragma once

#include "digest.h"
#include "port.h"

namespace fastckpt {
namespace {

#if defined(__AVX512BW__)

struct Accumulator {
    __m512i acc;
    FASTCKPT_INLINE void add(Accumulator& a, const uint8_t* data, const uint8_t* secret) {
        __m512i d = _mm512_loadu_si512(data), key = _mm512_xor_si512(d, _mm512_loadu_si512(secret));
        __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
        __m512i swapped = _mm512_shuffle_epi32(d, static_cast<_MM_PERM_ENUM>(0x4e));
        a.acc = _mm512_add_epi64(product, _mm512_add_epi64(a.acc, swapped));
    }
    FASTCKPT_INLINE void scramble(Accumulator& a, const uint8_t* secret) {
        const __m512i prime = _mm512_set1_epi32(static_cast<int>(0x9E3779B1u));
        __m512i x = _mm512_xor_si512(a.acc, _mm512_srli_epi64(a.acc, 47));
        x = _mm512_xor_si512(x, _mm512_loadu_si512(secret));
        __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), prime);
        a.acc = _mm512_add_epi64(_mm512_mul_epu32(x, prime), _mm512_slli_epi64(high, 32));
    }
};

#elif defined(__AVX2__)

struct Accumulator {
    __m256i acc[2];
    FASTCKPT_INLINE void add(Accumulator& a, const uint8_t* data, const uint8_t* secret) {
        for (int i = 0; i < 2; ++i) {
            __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data) + i);
            __m256i key = _mm256_xor_si256(d, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + i));
            __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
            a.acc[i] = _mm256_add_epi64(product, _mm256_add_epi64(a.acc[i], _mm256_shuffle_epi32(d, 0x4e)));
        }
    }
    FASTCKPT_INLINE void scramble(Accumulator& a, const uint8_t* secret) {
        const __m256i prime = _mm256_set1_epi32(static_cast<int>(0x9E3779B1u));
        for (int i = 0; i < 2; ++i) {
            __m256i x = _mm256_xor_si256(a.acc[i], _mm256_srli_epi64(a.acc[i], 47));
            x = _mm256_xor_si256(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + i));
            __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
            a.acc[i] = _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
        }
    }
};

#else

struct Accumulator {
    uint64_t acc[8];
    FASTCKPT_INLINE void add(Accumulator& a, const uint8_t* data, const uint8_t* secret) {
        uint64_t d[8], s[8];
        memcpy(d, data, 64);
        memcpy(s, secret, 64);
        for (int i = 0; i < 8; ++i) {
            uint64_t key = d[i] ^ s[i];
            a.acc[i ^ 1] += d[i];
            a.acc[i] += (key & 0xffffffffu) * (key >> 32);
        }
    }
    FASTCKPT_INLINE void scramble(Accumulator& a, const uint8_t* secret) {
        uint64_t s[8];
        memcpy(s, secret, 64);
        for (int i = 0; i < 8; ++i) a.acc[i] = (a.acc[i] ^ (a.acc[i] >> 47) ^ s[i]) * 0x9E3779B1u;
    }
};

#endif

uint64_t digest_long(const uint8_t* data, size_t n) {
    constexpr size_t STRIPES = (SECRET_BYTES - STRIPE) / 8, PERIOD = STRIPES * STRIPE;
    const uint64_t start[8] = {0xC2B2AE3Dull,         0x9E3779B185EBCA87ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
                               0x85EBCA77C2B2AE63ull, 0x85EBCA77ull,         0x27D4EB2F165667C5ull, 0x9E3779B1ull};
    Accumulator a;
    memcpy(&a, start, 64);
    const size_t periods = (n - 1) / PERIOD;
    for (size_t p = 0; p < periods; ++p, data += PERIOD) {
        for (size_t i = 0; i < STRIPES; ++i) {
            prefetch(reinterpret_cast<const char*>(data + i * STRIPE + 512));
            Accumulator::add(a, data + i * STRIPE, SECRET + i * 8);
        }
        Accumulator::scramble(a, SECRET + SECRET_BYTES - STRIPE);
    }
    const size_t rest = n - periods * PERIOD;
    for (size_t i = 0; i < (rest - 1) / STRIPE; ++i) Accumulator::add(a, data + i * STRIPE, SECRET + i * 8);
    Accumulator::add(a, data + rest - STRIPE, SECRET + SECRET_BYTES - STRIPE - 7);
    uint64_t acc[8];
    memcpy(acc, &a, 64);
    return digest64_finish(acc, n);
}

}  // namespace
}  // namespace fastckpt
