// Every intrinsic of the host stands here. Compiled once for each instruction set, chosen by the flags
// of the translation unit, so everything has internal linkage.
//
// Words: LANES 32-bit lanes. Block: BLOCK bytes, the unit of a streaming store, = one Words of bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cast.h"

#define FASTCKPT_INLINE static inline __attribute__((always_inline))

namespace fastckpt {
namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr size_t BLOCK = LANES * 4;

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef double Doubles __attribute__((vector_size(LANES * 4)));
typedef float Singles __attribute__((vector_size(LANES * 2)));  // as many as Doubles has
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint8_t Quarters __attribute__((vector_size(LANES)));
template <> struct FloatOf<Words> { using type = Floats; using integer = Ints; };

template <int SIZE> struct Lane;
template <> struct Lane<1> { using type = Quarters; };
template <> struct Lane<2> { using type = Halves; };
template <> struct Lane<4> { using type = Words; };

// LANES elements of SIZE bytes, each widened with zeros to a lane; any alignment.
template <int SIZE> FASTCKPT_INLINE Words load(const char* p) {
    typename Lane<SIZE>::type narrow;
    memcpy(&narrow, p, sizeof narrow);
    if constexpr (SIZE == 4) return narrow;
    else return __builtin_convertvector(narrow, Words);
}

// The low SIZE bytes of each lane; any alignment.
template <int SIZE> FASTCKPT_INLINE void store(char* p, Words w) {
    if constexpr (SIZE == 4) {
        memcpy(p, &w, sizeof w);
    } else {
        auto narrow = __builtin_convertvector(w, typename Lane<SIZE>::type);
        memcpy(p, &narrow, sizeof narrow);
    }
}

// Blocks one after another from any address that divides by 4, read in the lines they lie in: where each load straddles
// two lines, one thread takes half as long again to read main memory. Only where a block is a line; of the smaller ones
// half straddle none. `next` reads up to a block more than it gives.
#if defined(__AVX512BW__)
class Realigned {
  public:
    explicit Realigned(const char* p) : at_(p - offset(p)) {
        const Words places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        index_ = (__m512i)(places + static_cast<uint32_t>(offset(p) / 4));
        line_ = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(0xffff << (offset(p) / 4)), at_);
    }
    Words next() {
        at_ += BLOCK;
        const __m512i after = _mm512_load_si512(at_), out = _mm512_permutex2var_epi32(line_, index_, after);
        line_ = after;
        return (Words)out;
    }
    static bool helps(const char* p) { return offset(p) != 0 && offset(p) % 4 == 0; }

  private:
    static size_t offset(const char* p) { return reinterpret_cast<uintptr_t>(p) % BLOCK; }

    const char* at_;
    __m512i index_, line_;
};
#else
struct Realigned {
    explicit Realigned(const char*) {}
    Words next() { return Words{}; }
    static constexpr bool helps(const char*) { return false; }
};
#endif

// The low SIZE bytes of the lanes of 4 / SIZE vectors, side by side in one block.
template <int SIZE> FASTCKPT_INLINE Words pack(const Words* w) {
    if constexpr (SIZE == 4) return w[0];
    Words out;
#if defined(__AVX512BW__)
    if constexpr (SIZE == 2) {
        out = (Words)_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)w[0])),
                                        _mm512_cvtepi32_epi16((__m512i)w[1]), 1);
    } else {
        __m512i lo = _mm512_inserti64x2(_mm512_castsi128_si512(_mm512_cvtepi32_epi8((__m512i)w[0])),
                                        _mm512_cvtepi32_epi8((__m512i)w[1]), 1);
        lo = _mm512_inserti64x2(lo, _mm512_cvtepi32_epi8((__m512i)w[2]), 2);
        out = (Words)_mm512_inserti64x2(lo, _mm512_cvtepi32_epi8((__m512i)w[3]), 3);
    }
#elif defined(__AVX2__)
    if constexpr (SIZE == 2) {
        __m256i p = _mm256_packus_epi32((__m256i)w[0], (__m256i)w[1]);
        out = (Words)_mm256_permute4x64_epi64(p, 0xd8);
    } else {
        __m256i p = _mm256_packus_epi16(_mm256_packus_epi32((__m256i)w[0], (__m256i)w[1]),
                                        _mm256_packus_epi32((__m256i)w[2], (__m256i)w[3]));
        out = (Words)_mm256_permutevar8x32_epi32(p, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
#elif defined(__SSE2__)
    __m128i s[4 / SIZE];  // SSE2 packs signed words only: extend the sign first, and nothing saturates
    for (int i = 0; i < 4 / SIZE; ++i) s[i] = _mm_srai_epi32(_mm_slli_epi32((__m128i)w[i], 32 - 8 * SIZE), 32 - 8 * SIZE);
    if constexpr (SIZE == 2) out = (Words)_mm_packs_epi32(s[0], s[1]);
    else out = (Words)_mm_packs_epi16(_mm_packs_epi32(s[0], s[1]), _mm_packs_epi32(s[2], s[3]));
#else
    for (int i = 0; i < 4 / SIZE; ++i) store<SIZE>(reinterpret_cast<char*>(&out) + i * LANES * SIZE, w[i]);
#endif
    return out;
}

// a > b ? a : b and a < b ? a : b, lane by lane; integers are below 2^31.
FASTCKPT_INLINE Floats max_of(Floats a, Floats b) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
FASTCKPT_INLINE Floats min_of(Floats a, Floats b) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}
FASTCKPT_INLINE Words max_of(Words a, Words b) {
#if defined(__AVX512BW__)
    return (Words)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Words)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return less(a, b) ? b : a;
#endif
}

// The largest lane; all are below 2^31.
FASTCKPT_INLINE uint32_t highest(Words w) {
#if defined(__AVX512BW__)
    return _mm512_reduce_max_epu32((__m512i)w);
#else
    uint32_t out = 0;
    for (int lane = 0; lane < LANES; ++lane) out = w[lane] > out ? w[lane] : out;
    return out;
#endif
}

FASTCKPT_INLINE float highest(Floats f) {
#if defined(__AVX512BW__)
    return _mm512_reduce_max_ps((__m512)f);
#else
    float out = f[0];
    for (int lane = 1; lane < LANES; ++lane) out = f[lane] > out ? f[lane] : out;
    return out;
#endif
}

// a * b + c and c - a * b, rounded once; slow where VECTORS_FUSE is false.
#if defined(__AVX512BW__) || (defined(__AVX2__) && defined(__FMA__))
constexpr bool VECTORS_FUSE = true;
#else
constexpr bool VECTORS_FUSE = false;
#endif
FASTCKPT_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int lane = 0; lane < LANES; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#endif
}
FASTCKPT_INLINE Floats fused_less(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return fused(-a, b, c);
#endif
}

// a * b + c, rounded once where VECTORS_FUSE, else twice: for products that are exact, and for figures.
FASTCKPT_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512BW__)
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}
FASTCKPT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    if constexpr (VECTORS_FUSE) return fused(a, b, c);
    else return a * b + c;
}
FASTCKPT_INLINE float multiply_add(float a, float b, float c) {
    if constexpr (VECTORS_FUSE) return __builtin_fmaf(a, b, c);
    else return a * b + c;
}

// A block of bytes below 16 to half as many, the first of two in the low four bits.
FASTCKPT_INLINE void pair_nibbles(char* out, const char* bytes) {
#if defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(bytes), _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(pairs));
#elif defined(__AVX2__)
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    const __m256i pairs = _mm256_maddubs_epi16(x, _mm256_set1_epi16(0x1001));
    const __m256i bytes_of = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes_of));
#else
    for (size_t i = 0; i < BLOCK / 2; ++i) out[i] = static_cast<char>(bytes[2 * i] | bytes[2 * i + 1] << 4);
#endif
}

// A block past the cache; `p` is aligned to BLOCK. Ordered before other stores by `fence`.
FASTCKPT_INLINE void stream(char* p, Words w) {
#if defined(__AVX512BW__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)w);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)w);
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)w);
#else
    memcpy(p, &w, sizeof w);
#endif
}

FASTCKPT_INLINE void fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Into the second-level cache; any address, mapped or not.
FASTCKPT_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// m[i][j] becomes m[j][i].
FASTCKPT_INLINE void transpose(Words (&m)[LANES]) {
#if defined(__AVX512BW__)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)m[i], (__m512i)m[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)m[i], (__m512i)m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        m[i] = (Words)_mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        m[i + 8] = (Words)_mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
        m[i + 4] = (Words)_mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        m[i + 12] = (Words)_mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
#elif defined(__AVX2__)
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32((__m256i)m[i], (__m256i)m[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32((__m256i)m[i], (__m256i)m[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        m[i] = (Words)_mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        m[i + 4] = (Words)_mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
#elif defined(__SSE2__)
    __m128i a = _mm_unpacklo_epi32((__m128i)m[0], (__m128i)m[1]), b = _mm_unpackhi_epi32((__m128i)m[0], (__m128i)m[1]);
    __m128i c = _mm_unpacklo_epi32((__m128i)m[2], (__m128i)m[3]), d = _mm_unpackhi_epi32((__m128i)m[2], (__m128i)m[3]);
    m[0] = (Words)_mm_unpacklo_epi64(a, c);
    m[1] = (Words)_mm_unpackhi_epi64(a, c);
    m[2] = (Words)_mm_unpacklo_epi64(b, d);
    m[3] = (Words)_mm_unpackhi_epi64(b, d);
#else
    uint32_t in[LANES][LANES], out[LANES][LANES];
    memcpy(in, m, sizeof in);
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) out[j][i] = in[i][j];
    memcpy(m, out, sizeof out);
#endif
}

// Denormals are values here whatever mode the calling thread is in.
class [[maybe_unused]] FloatMode {
  public:
#if defined(__SSE2__)
    FloatMode() { _mm_setcsr(0x1f80); }
    ~FloatMode() { _mm_setcsr(saved_); }

  private:
    unsigned saved_ = _mm_getcsr();
#elif defined(__aarch64__)
    FloatMode() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~FloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

  private:
    uint64_t saved_;
#endif
};

}  // namespace
}  // namespace fastckpt
