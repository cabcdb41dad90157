// The one definition of every conversion. Each function is written once for one 32-bit lane or for a
// vector of them (GNU vector types): U is uint32_t or a vector of uint32_t.
//
// The rule for every pair of different float types, equal to torch 2.13 on CPU for every value but NaN:
//   - through fp32: fp64 is rounded to fp32 first (torch does so too), everything narrower widens exactly;
//   - round to nearest, ties to even; denormals are kept on both sides;
//   - too large: fp16, bf16 and e5m2 give infinity; e4m3fn has none and saturates, inf included, to +-448;
//   - NaN: always the destination's canonical quiet NaN with the sign of the source; payloads are dropped.
//       fp32 7fc00000   bf16 7fc0   fp16 7e00   e4m3fn 7f   e5m2 7f   fp64 7ff8000000000000   (| sign)
// Equal types are copied byte for byte, NaN payloads included.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTCKPT_HD __host__ __device__ __forceinline__
#else
#define FASTCKPT_HD inline __attribute__((always_inline))
#endif

namespace fastckpt {

// Numbered as `code` in dtypes.py.
enum Dtype : uint8_t {
    FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT64,
    INT8, UINT8, INT16, INT32, INT64, BOOL, UINT16, UINT32, UINT64,
    COMPLEX64, COMPLEX128, FLOAT8_E8M0FNU, FLOAT8_E4M3FNUZ, FLOAT8_E5M2FNUZ,
    COMPLEX32, FLOAT4_E2M1FN_X2,
    DTYPES
};
constexpr uint8_t ITEMSIZE[DTYPES] = {4, 2, 2, 1, 1, 8, 1, 1, 2, 4, 8, 1, 2, 4, 8, 8, 16, 1, 1, 1, 4, 1};

namespace {  // internal linkage: these are compiled once for each instruction set

template <class U> struct FloatOf;  // the float and the signed twin of a lane type
template <> struct FloatOf<uint32_t> { using type = float; using integer = int32_t; };

template <class U> FASTCKPT_HD typename FloatOf<U>::type as_float(U bits) {
    typename FloatOf<U>::type f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
template <class U, class F> FASTCKPT_HD U as_bits(F f) {
    U bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

constexpr uint32_t INF32 = 0x7f800000u, NAN32 = 0x7fc00000u;

// Whether a lane is a NaN, and whether a < b for lanes below 2^31: vectors compare signed integers cheaply only.
template <class U> FASTCKPT_HD auto is_nan(U bits) { return as_float<U>(bits) != as_float<U>(bits); }
template <class U> FASTCKPT_HD auto less(U a, U b) {
    using Int = typename FloatOf<U>::integer;
    return (Int)a < (Int)b;
}

// A float with E exponent and M fraction bits in the low 1 + E + M bits of a lane. With FINITE
// the type has no infinity and one NaN, all ones (e4m3fn); NAN_CODE is the canonical NaN.
template <int E, int M, bool FINITE, uint32_t NAN_CODE> struct Small {
    static constexpr int size = (1 + E + M) / 8;
    static constexpr int SHIFT = 23 - M;
    static constexpr uint32_t BIAS = (1u << (E - 1)) - 1, REBIAS = 127 - BIAS;
    static constexpr uint32_t SIGN = 1u << (E + M);
    static constexpr uint32_t LIMIT = FINITE ? SIGN - 2 : ((1u << E) - 1) << M;  // largest finite, or infinity
    static constexpr uint32_t TOP = FINITE ? SIGN - 1 : LIMIT;                   // the first code that is no finite value

    template <class U> static FASTCKPT_HD U to_f32(U x) {
        U a = x & (SIGN - 1);
        // The exponent is rebiased by a multiplication, which also normalises denormals.
        U r = as_bits<U>(as_float<U>(a << SHIFT) * as_float<uint32_t>((127 + REBIAS) << 23));
        if constexpr (FINITE) {
            r = a == (U{} + TOP) ? U{} + NAN32 : r;
        } else {
            r = less(a, U{} + TOP) ? r : U{} + INF32;
            r = less(U{} + TOP, a) ? U{} + NAN32 : r;
        }
        return r | ((x & SIGN) << (31 - E - M));
    }
    template <class U> static FASTCKPT_HD U from_f32(U x) {
        constexpr uint32_t MIN_NORMAL = (REBIAS + 1) << 23;
        // Adding a float whose last place is our smallest denormal rounds to it, ties to even.
        constexpr uint32_t MAGIC = (REBIAS + 24 - M) << 23;
        U a = x & 0x7fffffffu;
        U normal = ((a + ((1u << (SHIFT - 1)) - 1) + ((a >> SHIFT) & 1u)) >> SHIFT) - (REBIAS << M);
        U small = as_bits<U>(as_float<U>(a) + as_float<uint32_t>(MAGIC)) - MAGIC;
        U r = less(a, U{} + MIN_NORMAL) ? small : normal;
        r = less(U{} + LIMIT, r) ? U{} + LIMIT : r;
        r = is_nan(x) ? U{} + NAN_CODE : r;
        return r | ((x >> (31 - E - M)) & SIGN);
    }
    // The NaN of the sign of an fp32.
    static FASTCKPT_HD uint32_t nan(uint32_t x) { return (x >> (31 - E - M) & SIGN) | NAN_CODE; }
};

using F16 = Small<5, 10, false, 0x7e00>;
using E4M3 = Small<4, 3, true, 0x7f>;
using E5M2 = Small<5, 2, false, 0x7f>;

struct BF16 {
    static constexpr int size = 2;
    template <class U> static FASTCKPT_HD U to_f32(U x) {
        U r = x << 16;
        return is_nan(r) ? (r & 0x80000000u) | NAN32 : r;
    }
    template <class U> static FASTCKPT_HD U from_f32(U x) {
        U r = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
        return is_nan(x) ? nan(x) : r;
    }
    template <class U> static FASTCKPT_HD U nan(U x) { return ((x >> 16) & 0x8000u) | 0x7fc0u; }
};

struct F32 {
    static constexpr int size = 4;
    template <class U> static FASTCKPT_HD U to_f32(U x) { return x; }
    template <class U> static FASTCKPT_HD U from_f32(U x) { return x; }
    static FASTCKPT_HD uint32_t nan(uint32_t x) { return (x & 0x80000000u) | NAN32; }
};

struct F64 {
    static constexpr int size = 8;
    static FASTCKPT_HD uint32_t to_f32(uint64_t x) {
        double value;
        memcpy(&value, &x, 8);
        uint32_t r = as_bits<uint32_t>(static_cast<float>(value));
        return (x << 1) > (0x7ff0ull << 49) ? static_cast<uint32_t>(x >> 63) << 31 | NAN32 : r;
    }
    static FASTCKPT_HD uint64_t from_f32(uint32_t x) {
        double value = as_float(x);
        uint64_t r;
        memcpy(&r, &value, 8);
        return (x & 0x7fffffffu) > INF32 ? static_cast<uint64_t>(x >> 31) << 63 | 0x7ff8ull << 48 : r;
    }
};

// Any type of SIZE bytes, copied as it is.
template <int SIZE> struct Bytes {
    static constexpr int size = SIZE;
};

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };

// The bits of S to the bits of D, in every lane; neither is fp64.
template <class S, class D, class U> FASTCKPT_HD U convert(U x) {
    if constexpr (Same<S, D>::value) return x;
    else return D::from_f32(S::to_f32(x));
}

template <int SIZE> struct Word { using type = uint32_t; };
template <> struct Word<8> { using type = uint64_t; };

// One element from `src` to `dst`, at any alignment.
template <class S, class D> FASTCKPT_HD void convert_one(void* dst, const void* src) {
    if constexpr (Same<S, D>::value) {
        memcpy(dst, src, S::size);
    } else {
        typename Word<S::size>::type x = 0;
        memcpy(&x, src, S::size);  // little endian: the low bytes
        typename Word<D::size>::type y = D::from_f32(S::to_f32(x));
        memcpy(dst, &y, D::size);
    }
}

}  // namespace
}  // namespace fastckpt
