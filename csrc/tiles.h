// The bodies: a contiguous line, a strided line, a transposed tile. Written once over port.h's lanes.
#pragma once

#include "port.h"

namespace fastckpt {
namespace {

FASTCKPT_INLINE void copy_bytes(char* dst, const char* src, size_t n, bool past) {
    constexpr size_t STEP = 4 * BLOCK;
    if (!past || n < 2 * STEP) {
        memcpy(dst, src, n);
        return;
    }
    size_t i = -reinterpret_cast<uintptr_t>(dst) % BLOCK;
    memcpy(dst, src, i);
    for (; i + STEP <= n; i += STEP)
        for (size_t k = 0; k < STEP; k += BLOCK) stream(dst + i + k, load<4>(src + i + k));
    memcpy(dst + i, src + i, n - i);
}

// One block of converted elements, from element i of src.
template <class S, class D> FASTCKPT_INLINE Words block(const char* src, size_t i) {
    constexpr int COUNT = 4 / D::size;
    Words w[COUNT];
    for (int k = 0; k < COUNT; ++k) w[k] = convert<S, D>(load<S::size>(src + (i + k * LANES) * S::size));
    return pack<D::size>(w);
}

// The same of 32-bit elements that are read one block after another.
template <class S, class D> FASTCKPT_INLINE Words block(Realigned& from) {
    constexpr int COUNT = 4 / D::size;
    Words w[COUNT];
    for (int k = 0; k < COUNT; ++k) w[k] = convert<S, D>(from.next());
    return pack<D::size>(w);
}

template <class S, class D> void line(char* dst, const char* src, size_t n, bool past) {
    if constexpr (Same<S, D>::value) {
        copy_bytes(dst, src, n * S::size, past);
    } else if constexpr (S::size > 4 || D::size > 4) {
        for (size_t i = 0; i < n; ++i) convert_one<S, D>(dst + i * D::size, src + i * S::size);
    } else {
        constexpr size_t STEP = BLOCK / D::size;
        size_t i = 0;
        if (n >= STEP) {
            // The first and the last block may overlap their neighbours: the same bytes are written twice.
            size_t head = -reinterpret_cast<uintptr_t>(dst) % BLOCK;
            auto blocks = [&](auto put) {
                if constexpr (S::size == 4 && D::size == 2) {  // conversions of 8-bit floats are long
                    if (Realigned::helps(src + i * S::size) && n - i >= 16 * STEP) {
                        Realigned from(src + i * S::size);
                        for (; i + 2 * STEP <= n; i += STEP) put(dst + i * D::size, block<S, D>(from));
                    }
                }
                for (; i + STEP <= n; i += STEP) put(dst + i * D::size, block<S, D>(src, i));
            };
            // A line that is first written through the cache costs more than it saves in a short run.
            if (past && head % D::size == 0 && n >= (head == 0 ? 4 : 64) * STEP) {
                if (head > 0) store<4>(dst, block<S, D>(src, 0));
                i = head / D::size;
                blocks(stream);
            } else {
                blocks(store<4>);
            }
            if (i < n) store<4>(dst + (n - STEP) * D::size, block<S, D>(src, n - STEP));
            return;
        }
        auto lanes = [&](size_t at) {
            store<D::size>(dst + at * D::size, convert<S, D>(load<S::size>(src + at * S::size)));
        };
        if (n >= LANES) {
            for (; i + LANES <= n; i += LANES) lanes(i);
            if (i < n) lanes(n - LANES);
            return;
        }
        for (; i < n; ++i) convert_one<S, D>(dst + i * D::size, src + i * S::size);
    }
}

template <class S, class D> void strided(char* dst, const char* src, size_t n, int64_t dst_step, int64_t src_step) {
    for (size_t i = 0; i < n; ++i, dst += dst_step, src += src_step) convert_one<S, D>(dst, src);
}

template <class S, class D>
void transpose_plain(char* dst, const char* src, size_t rows, size_t cols, int64_t dst_step, int64_t src_step) {
    constexpr size_t TILE = 16;
    for (size_t r0 = 0; r0 < rows; r0 += TILE)
        for (size_t c0 = 0; c0 < cols; c0 += TILE)
            for (size_t c = c0; c < cols && c < c0 + TILE; ++c)
                for (size_t r = r0; r < rows && r < r0 + TILE; ++r)
                    convert_one<S, D>(dst + c * dst_step + r * D::size, src + r * src_step + c * S::size);
}

// DEPTH x LANES elements of the source: 4 / D::size neighbouring rows are packed into 32-bit words first,
// so that one transpose of words makes LANES whole blocks of the destination.
template <class S, class D> struct Micro {
    static constexpr int GROUP = 4 / D::size, DEPTH = LANES * GROUP;
    // Eight bits are long to convert, and four rows of them make a word: unrolled, they would be a third of the module.
    static constexpr bool LONG = S::size == 1 || D::size == 1;

    // One of the LANES vectors of words; `row`: the first of its rows.
    FASTCKPT_INLINE Words words(const char* row, int64_t src_step, int64_t ahead) {
        Words w = convert<S, D>(load<S::size>(row));
        prefetch(row + ahead);
#pragma GCC unroll 4
        for (int k = 1; k < GROUP; ++k) {
            w |= convert<S, D>(load<S::size>(row + k * src_step)) << (8 * D::size * k);
            prefetch(row + k * src_step + ahead);
        }
        return w;
    }

    // All of them, by little code.
    static __attribute__((noinline)) void fill(Words* m, const char* src, int64_t src_step, int64_t ahead) {
#pragma GCC unroll 1
        for (int i = 0; i < LANES; ++i) m[i] = words(src + i * GROUP * src_step, src_step, ahead);
    }
};

// A tile of ROWS source rows and WIDTH bytes of each is transposed at a time, and the next one to the right (in the
// next band at the end) prefetched meanwhile. Within a tile the destination's rows are walked first, and each gets LINES
// lines while its page is known. What one block made is stored between the loads of the next: a burst of stores keeps
// loads waiting. Vectors shorter than a line want wider tiles, a line at a time (measured).
constexpr size_t LINE = 64, ROWS = 256, WIDTH = LANES == 16 ? 512 : 1024, LINES = LANES == 16 ? 2 : 1;

// A rectangle of at least DEPTH x LANES elements; with PAST the rows of the destination begin with a line.
template <class S, class D, bool PAST>
void turn(char* dst, const char* src, int64_t rows, int64_t cols, int64_t dst_step, int64_t src_step) {
    using M = Micro<S, D>;
    constexpr int64_t COLS = WIDTH / S::size, DEEP = LINES * LINE / D::size, READ = LANES * S::size;
    static_assert(DEEP % M::DEPTH == 0 && ROWS % DEEP == 0, "lines are whole blocks, a tile whole lines");
    Words m[LANES];
    char* to = nullptr;  // where they belong
    auto put = [&](int i) __attribute__((always_inline)) {
        if constexpr (PAST) stream(to + i * dst_step, m[i]);
        else store<4>(to + i * dst_step, m[i]);
    };
    auto put_all = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) put(i);
    };
    auto block = [&](int64_t r, int64_t c, int64_t ahead) __attribute__((always_inline)) {
        const char* from = src + r * src_step + c * S::size;
        if (M::LONG || !PAST || to == nullptr) {
            if (to != nullptr) put_all();
            Words next[LANES];
            M::fill(next, from, src_step, ahead);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) m[i] = next[i];
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
                put(i);
                m[i] = M::words(from + i * M::GROUP * src_step, src_step, ahead);
            }
        }
        transpose(m);
        to = dst + c * dst_step + r * D::size;
    };
    // Blocks of a source's row begin where a load of it does not straddle two lines. At both ends blocks may overlap
    // their neighbours: the same bytes are written twice.
    const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(src) % READ);
    const int64_t begin = src_step % READ == 0 && off % S::size == 0 && cols >= 2 * COLS ? -off / S::size : 0;
    for (int64_t r0 = 0; r0 < rows; r0 += ROWS) {
        const int64_t r1 = r0 + static_cast<int64_t>(ROWS) < rows ? r0 + ROWS : rows;
        for (int64_t c0 = begin; c0 < cols; c0 += COLS) {
            const int64_t c1 = c0 + COLS < cols ? c0 + COLS : cols;
            int64_t ahead = WIDTH;
            if (c1 == cols) ahead = static_cast<int64_t>(ROWS) * src_step + (begin - c0) * S::size;
            for (int64_t l = r0; l < r1; l += DEEP)
                for (int64_t c = c0; c < c1; c += LANES)
                    for (int64_t r = l; r < l + DEEP && r < r1; r += M::DEPTH)
                        block(r < rows - M::DEPTH ? r : rows - M::DEPTH, c < 0 ? 0 : c < cols - LANES ? c : cols - LANES, ahead);
        }
    }
    put_all();
}

template <class S, class D>
void transposed(char* dst, const char* src, size_t rows, size_t cols, int64_t dst_step, int64_t src_step, bool past) {
    if constexpr (S::size > 4 || D::size > 4) {
        transpose_plain<S, D>(dst, src, rows, cols, dst_step, src_step);
    } else {
        constexpr size_t DEPTH = Micro<S, D>::DEPTH;
        if (rows < DEPTH || cols < LANES) {
            transpose_plain<S, D>(dst, src, rows, cols, dst_step, src_step);
            return;
        }
        // Streaming needs whole aligned cache lines: from the first row whose destination is aligned.
        const size_t head = -reinterpret_cast<uintptr_t>(dst) % LINE, first = head / D::size;
        past = past && dst_step % static_cast<int64_t>(LINE) == 0 && head % D::size == 0 && first + DEPTH <= rows;
        auto part = [&](size_t r, size_t n) {
            turn<S, D, false>(dst + r * D::size, src + r * src_step, n, cols, dst_step, src_step);
        };
        if (!past) {
            part(0, rows);
            return;
        }
        const size_t whole = (rows - first) / DEPTH * DEPTH, left = rows - first - whole;
        if (first > 0) part(0, first < DEPTH ? DEPTH : first);
        turn<S, D, true>(dst + head, src + first * src_step, whole, cols, dst_step, src_step);
        if (left > 0) part(rows - DEPTH, DEPTH);
    }
}

// ---- NaN and infinity ----

template <class W> FASTCKPT_INLINE uint64_t count_at_least(const char* p, size_t n, W mask, W low) {
    uint64_t total = 0;
    for (size_t i = 0; i < n;) {
        size_t stop = n - i < 128 ? n : i + 128;  // a count of 128 fits the smallest lane
        W count = 0;
        for (; i < stop; ++i) {
            W x;
            memcpy(&x, p + i * sizeof(W), sizeof x);
            count = static_cast<W>(count + ((x & mask) >= low));
        }
        total += count;
    }
    return total;
}

uint64_t count_nonfinite(const char* p, size_t n, Dtype dtype) {
    switch (dtype) {
        case COMPLEX64: n *= 2; [[fallthrough]];
        case FLOAT32: return count_at_least<uint32_t>(p, n, 0x7fffffffu, INF32);
        case BFLOAT16: return count_at_least<uint16_t>(p, n, 0x7fff, 0x7f80);
        case FLOAT16: return count_at_least<uint16_t>(p, n, 0x7fff, 0x7c00);
        case FLOAT8_E4M3FN: return count_at_least<uint8_t>(p, n, 0x7f, 0x7f);
        case FLOAT8_E5M2: return count_at_least<uint8_t>(p, n, 0x7f, 0x7c);
        case COMPLEX128: n *= 2; [[fallthrough]];
        case FLOAT64: return count_at_least<uint64_t>(p, n, ~0ull >> 1, 0x7ff0ull << 48);
        case FLOAT8_E8M0FNU: return count_at_least<uint8_t>(p, n, 0xff, 0xff);
        case FLOAT8_E4M3FNUZ:
        case FLOAT8_E5M2FNUZ: {
            uint64_t total = 0;
            for (size_t i = 0; i < n; ++i) total += static_cast<uint8_t>(p[i]) == 0x80;
            return total;
        }
        default: return 0;
    }
}

}  // namespace
}  // namespace fastckpt
