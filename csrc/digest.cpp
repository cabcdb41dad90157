#include "digest.h"

#include <cstring>

#include "digest_short.h"
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "digests are defined over little-endian words");

namespace fastckpt {

alignas(64) const uint8_t SECRET[SECRET_BYTES] = {FASTCKPT_SECRET};

namespace {

// ---- CRC-32, reflected polynomial EDB88320 ----

constexpr uint32_t POLY = 0xEDB88320u;

struct Tables {
    uint32_t byte[8][256] = {};  // slicing by 8
    uint32_t power[32] = {};     // x^(2^n) mod P

    // x^(n 2^k) mod P
    constexpr uint32_t at(uint64_t n, int k = 0) const {
        uint32_t out = 1u << 31;
        for (; n != 0; n >>= 1, ++k)
            if (n & 1) out = multiply(power[k & 31], out);
        return out;
    }

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

// What folds a lane `bits` further on: Gopal's constants, as their paper bit-reflects them.
constexpr uint64_t fold_low(uint64_t bits) { return uint64_t{TABLES.at(bits + 32)} << 1; }
constexpr uint64_t fold_high(uint64_t bits) { return uint64_t{TABLES.at(bits - 32)} << 1; }
static_assert(fold_low(512) == 0x0154442bd4 && fold_high(512) == 0x01c6e41596, "k1 and k2 of the paper");

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

#define FASTCKPT_WIDE __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.1")))

FASTCKPT_WIDE inline __m512i fold_wide(__m512i x, __m512i k, __m512i next) {
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, k, 0x00), _mm512_clmulepi64_epi128(x, k, 0x11), next, 0x96);
}

// The first whole 256 bytes folded into 64, which have the same CRC with the rest behind them: sixteen lanes at once.
FASTCKPT_WIDE void fold_256(const uint8_t* p, size_t n, uint32_t c, uint8_t (&out)[64]) {
    const __m512i far = _mm512_set_epi64(fold_high(2048), fold_low(2048), fold_high(2048), fold_low(2048), fold_high(2048),
                                         fold_low(2048), fold_high(2048), fold_low(2048));
    const __m512i near = _mm512_set_epi64(fold_high(512), fold_low(512), fold_high(512), fold_low(512), fold_high(512), fold_low(512),
                                          fold_high(512), fold_low(512));
    __m512i x1 = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(c))));
    __m512i x2 = _mm512_loadu_si512(p + 64), x3 = _mm512_loadu_si512(p + 128), x4 = _mm512_loadu_si512(p + 192);
    for (p += 256, n -= 256; n >= 256; p += 256, n -= 256) {
        x1 = fold_wide(x1, far, _mm512_loadu_si512(p));
        x2 = fold_wide(x2, far, _mm512_loadu_si512(p + 64));
        x3 = fold_wide(x3, far, _mm512_loadu_si512(p + 128));
        x4 = fold_wide(x4, far, _mm512_loadu_si512(p + 192));
    }
    _mm512_storeu_si512(out, fold_wide(fold_wide(fold_wide(x1, near, x2), near, x3), near, x4));
}

// Folding by four 128-bit lanes, then a Barrett reduction: V. Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction" (Intel, 2009). At least 64 bytes, a multiple of 16; `first`: the first 64.
FASTCKPT_CLMUL uint32_t crc_clmul(const uint8_t* first, const uint8_t* p, size_t n, uint32_t c) {
    const __m128i k12 = _mm_set_epi64x(fold_high(512), fold_low(512)), k34 = _mm_set_epi64x(fold_high(128), fold_low(128));
    const __m128i k5 = _mm_set_epi64x(0, 0x0163cd6124), barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low32 = _mm_setr_epi32(~0, 0, ~0, 0);
    auto at = [](const uint8_t* q) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)); };
    __m128i x1 = _mm_xor_si128(at(first), _mm_cvtsi32_si128(static_cast<int>(c)));
    __m128i x2 = at(first + 16), x3 = at(first + 32), x4 = at(first + 48);
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

uint64_t digest64_finish(const uint64_t (&acc)[8], size_t n) { return digest_end(acc, n, SECRET); }

uint64_t digest64(const void* data, size_t n) {
    const uint8_t* p = static_cast<const uint8_t*>(data);
    if (n <= 16) return digest_16(p, n, SECRET);
    if (n <= 240) return digest_240(p, n, SECRET);
    return kernels(-1).digest_long(p, n);
}

uint32_t crc32(const void* data, size_t n, uint32_t value) {
    const uint8_t* p = static_cast<const uint8_t*>(data);
    uint32_t c = ~value;
#if defined(__x86_64__)
    static const bool clmul = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    if (clmul && n >= 64) {
        static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
        uint8_t folded[64];
        const uint8_t* first = p;
        if (wide && n >= 512) {
            const size_t most = n / 256 * 256;
            fold_256(p, most, c, folded);
            first = folded;
            c = 0;
            p += most - 64;
            n -= most - 64;
        }
        const size_t whole = n / 16 * 16;
        c = crc_clmul(first, p, whole, c);
        p += whole;
        n -= whole;
    }
#endif
    return ~crc_table(p, n, c);
}

uint32_t crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b) {
    return Tables::multiply(TABLES.at(nbytes_b, 3), a) ^ b;  // 8 bits a byte
}

}  // namespace fastckpt
