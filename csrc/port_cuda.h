// What the tile bodies ask of a GPU, each with its twin on the host: the only file of the CUDA road, besides
// the launch, that knows which compiler reads it.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "cast.h"

#if defined(__CUDA_ARCH__)  // an instruction for e4m3: sm_89 has it too, which nvcc before 12.1 does not know
#if __CUDA_ARCH__ >= 900 || (__CUDA_ARCH__ >= 890 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201)
#define FASTCKPT_CASTS_E4M3
#endif
#endif

#if defined(__CUDACC__)
#define FASTCKPT_UNROLL _Pragma("unroll")
#define FASTCKPT_KEEP_LOOP _Pragma("unroll 1")
#else
#define FASTCKPT_UNROLL
#define FASTCKPT_KEEP_LOOP
#endif

namespace fastckpt {
namespace {

#if !defined(__CUDA_ARCH__)
// What a GPU would stop at, the host would let pass.
inline void require_aligned(const void* p, uintptr_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) throw std::logic_error("a vector of a tile is not aligned");
}
#endif

struct alignas(16) Vector {  // 16 bytes: one load or store
    uint32_t word[4];
};

// 16 aligned bytes that nothing writes meanwhile and nobody reads twice.
FASTCKPT_HD Vector load_vector(const char* p) {
    Vector v;
#if defined(__CUDA_ARCH__)
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(p));
#else
    require_aligned(p, 16);
    memcpy(&v, p, 16);
#endif
    return v;
}

#ifndef FASTCKPT_HINT
#define FASTCKPT_HINT ""  // of the loads that are kept
#endif

// Two or four aligned words, kept in cache because they are read once more soon, or their neighbours are.
template <int WORDS> FASTCKPT_HD void load_kept(uint32_t* words, const char* p) {
    static_assert(WORDS == 2 || WORDS == 4);
#if defined(__CUDA_ARCH__)
    if constexpr (WORDS == 4)
        asm("ld.global.nc" FASTCKPT_HINT ".v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
            : "l"(p));
    else
        asm("ld.global.nc" FASTCKPT_HINT ".v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
#else
    require_aligned(p, 4 * WORDS);
    memcpy(words, p, 4 * WORDS);
#endif
}

// Has the line of 128 bytes brought near, where it is not; the address is mapped.
FASTCKPT_HD void prefetch_line([[maybe_unused]] const char* p) {
#if defined(__CUDA_ARCH__)
    asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
#endif
}

// *p becomes the larger of itself and x, whoever else raises it.
FASTCKPT_HD void raise_to(uint32_t* p, uint32_t x) {
#if defined(__CUDA_ARCH__)
    atomicMax(p, x);
#else
    *p = *p < x ? x : *p;
#endif
}

// One, two or four aligned words that nobody reads soon.
template <int WORDS> FASTCKPT_HD void store_vector(char* p, const uint32_t* words) {
    static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4);
#if defined(__CUDA_ARCH__)
    if constexpr (WORDS == 4)
        asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                     :
                     : "l"(p), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
    else if constexpr (WORDS == 2)
        asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" : : "l"(p), "r"(words[0]), "r"(words[1]) : "memory");
    else
        asm volatile("st.global.cs.u32 [%0], %1;" : : "l"(p), "r"(words[0]) : "memory");
#else
    require_aligned(p, 4 * WORDS);
    memcpy(p, words, 4 * WORDS);
#endif
}

// 16 bytes of shared memory, aligned.
FASTCKPT_HD Vector load_shared(const uint32_t* p) {
#if defined(__CUDA_ARCH__)
    return *reinterpret_cast<const Vector*>(p);
#else
    Vector v;
    memcpy(&v, p, 16);
    return v;
#endif
}

// The low word of (high:low) >> bits; bits < 32.
FASTCKPT_HD uint32_t funnel(uint32_t low, uint32_t high, uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __funnelshift_r(low, high, bits);
#else
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
#endif
}

// Moves the words of two vectors down by fewer bytes than one has.
template <uint32_t WORDS> FASTCKPT_HD void shift_words(uint32_t (&x)[2 * WORDS], uint32_t bytes) {
    static_assert(WORDS == 2 || WORDS == 4);
    if constexpr (WORDS == 4) {
        if (bytes & 8) {
            FASTCKPT_UNROLL
            for (int i = 0; i < 6; ++i) x[i] = x[i + 2];
        }
    }
    if (bytes & 4) {
        FASTCKPT_UNROLL
        for (int i = 0; i <= static_cast<int>(WORDS); ++i) x[i] = x[i + 1];
    }
    FASTCKPT_UNROLL
    for (int i = 0; i < static_cast<int>(WORDS); ++i) x[i] = funnel(x[i], x[i + 1], bytes % 4 * 8);
}

// Four bytes of high:low, by the nibbles of `how`, the lowest first.
FASTCKPT_HD uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t how) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, how);
#else
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> (how >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return out;
#endif
}

// The larger of each half of two words, as integers.
FASTCKPT_HD uint32_t max_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return __vmaxu2(a, b);
#else
    const uint32_t low = a << 16 > b << 16 ? a : b, high = a > b ? a : b;
    return bytes_of(low, high, 0x7610);
#endif
}

// ---- two elements at once, by an instruction where a GPU has one; its NaN is any ----

// Two elements side by side, as fp32.
template <class S> FASTCKPT_HD void widen_pair(uint32_t* x, uint32_t pair) {
    static_assert(S::size == 2);
#if defined(__CUDA_ARCH__)
    if constexpr (Same<S, F16>::value) {
        float low, high;
        asm("cvt.f32.f16 %0, %1;" : "=f"(low) : "h"(static_cast<uint16_t>(pair)));
        asm("cvt.f32.f16 %0, %1;" : "=f"(high) : "h"(static_cast<uint16_t>(pair >> 16)));
        x[0] = as_bits<uint32_t>(low), x[1] = as_bits<uint32_t>(high);
        return;
    }
    if constexpr (Same<S, BF16>::value) {
        x[0] = pair << 16, x[1] = pair & 0xffff0000u;
        return;
    }
#endif
    x[0] = S::to_f32(pair & 0xffffu), x[1] = S::to_f32(pair >> 16);
}

// Two fp32 as elements side by side.
template <class D> FASTCKPT_HD uint32_t narrow_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    [[maybe_unused]] const float low = as_float(a), high = as_float(b);
    [[maybe_unused]] uint32_t pair;
    if constexpr (Same<D, BF16>::value) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
    if constexpr (Same<D, F16>::value) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
#endif
    return D::from_f32(a) | D::from_f32(b) << 8 * D::size;
}

// Four fp32 as bytes of a word.
template <class D> FASTCKPT_HD uint32_t narrow_four(const uint32_t* x) {
    static_assert(D::size == 1);
#if defined(FASTCKPT_CASTS_E4M3)
    if constexpr (Same<D, E4M3>::value) {
        uint16_t low, high;
        uint32_t word;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(as_float(x[1])), "f"(as_float(x[0])));
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(as_float(x[3])), "f"(as_float(x[2])));
        asm("mov.b32 %0, {%1, %2};" : "=r"(word) : "h"(low), "h"(high));
        return word;
    }
#endif
    return narrow_pair<D>(x[0], x[1]) | narrow_pair<D>(x[2], x[3]) << 16;
}

template <int SIZE> struct Cell;
template <> struct Cell<1> { using type = uint8_t; };
template <> struct Cell<2> { using type = uint16_t; };
template <> struct Cell<4> { using type = uint32_t; };
template <> struct Cell<8> { using type = uint64_t; };
template <> struct Cell<16> { using type = Vector; };

FASTCKPT_HD uint32_t misalignment(const char* p, uint32_t of) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) & (of - 1);
}

// One element at any alignment; on a GPU one access where it is aligned.
template <int SIZE> FASTCKPT_HD typename Cell<SIZE>::type load_cell(const char* p) {
    using T = typename Cell<SIZE>::type;
#if defined(__CUDA_ARCH__)
    if (misalignment(p, SIZE) == 0) return *reinterpret_cast<const T*>(p);
#endif
    T x;
    memcpy(&x, p, SIZE);
    return x;
}
// One element that is aligned.
template <int SIZE> FASTCKPT_HD typename Cell<SIZE>::type load_aligned(const char* p) {
    using T = typename Cell<SIZE>::type;
#if defined(__CUDA_ARCH__)
    return *reinterpret_cast<const T*>(p);
#else
    T x;
    memcpy(&x, p, SIZE);
    return x;
#endif
}
template <int SIZE> FASTCKPT_HD void store_aligned(char* p, typename Cell<SIZE>::type x) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<typename Cell<SIZE>::type*>(p) = x;
#else
    memcpy(p, &x, SIZE);
#endif
}
template <int SIZE> FASTCKPT_HD void store_cell(char* p, typename Cell<SIZE>::type x) {
#if defined(__CUDA_ARCH__)
    if (misalignment(p, SIZE) == 0) {
        store_aligned<SIZE>(p, x);
        return;
    }
#endif
    memcpy(p, &x, SIZE);
}

}  // namespace
}  // namespace fastckpt
