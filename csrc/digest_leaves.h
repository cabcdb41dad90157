// Digests of leaves on a GPU: four threads a leaf, each with two of XXH3's eight accumulators, which need nothing
// of the others' until the end, and a KiB of the leaf under way, the next ones on their way to the second cache.
// Blocks are small, so that few leaves reach many multiprocessors. A body like those of tile_cuda.h: load(thread, shared), a barrier, store(thread, shared).
#pragma once

#include "digest_short.h"

#ifndef FASTCKPT_AHEAD
#define FASTCKPT_AHEAD 2
#endif

namespace fastckpt {
namespace {

constexpr uint32_t LEAF_THREADS = 64, LANES_OF_LEAF = 4, LEAVES_OF_BLOCK = LEAF_THREADS / LANES_OF_LEAF;
constexpr uint32_t ACCUMULATORS = 2 * LEAF_THREADS;  // of a block, in shared memory
constexpr uint32_t AHEAD = FASTCKPT_AHEAD;  // periods of a KiB between what is asked for and what is taken
constexpr uint32_t SHORT_LEAF = 240;  // up to here XXH3 has other formulas

struct LeafAt {
    uint64_t address, nbytes;
};

struct DigestTables {  // where host or device can read them
    alignas(16) uint8_t secret[192];
    uint64_t start[8];
};
#define FASTCKPT_DIGEST_TABLES                                                                                      \
    {{FASTCKPT_SECRET},                                                                                             \
     {0xC2B2AE3Dull, 0x9E3779B185EBCA87ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull, 0x85EBCA77C2B2AE63ull,    \
      0x85EBCA77ull, 0x27D4EB2F165667C5ull, 0x9E3779B1ull}}

struct Leaves {
    const LeafAt* leaves;
    uint64_t count;
    uint64_t* out;
    const DigestTables* tables;
    uint64_t block;

    FASTCKPT_HD void load(uint32_t thread, uint64_t* shared) const {
        const uint64_t i = block * LEAVES_OF_BLOCK + thread / LANES_OF_LEAF;
        if (i < count && leaves[i].nbytes > SHORT_LEAF) accumulate(leaves[i], thread % LANES_OF_LEAF, shared + 2 * thread);
    }

    FASTCKPT_HD void store(uint32_t thread, uint64_t* shared) const {
        const uint64_t i = block * LEAVES_OF_BLOCK + thread / LANES_OF_LEAF;
        if (i >= count || thread % LANES_OF_LEAF != 0) return;
        const size_t n = leaves[i].nbytes;
        const uint8_t* data = reinterpret_cast<const uint8_t*>(leaves[i].address);
        out[i] = n > SHORT_LEAF ? digest_end(shared + 2 * thread, n, tables->secret)
                 : n > 16       ? digest_240(data, n, tables->secret)
                                : digest_16(data, n, tables->secret);
    }

    struct Pair {
        uint64_t low, high;
    };

    // 16 bytes into two accumulators: each takes its own word, mixed with its key, and the other's as it is.
    static FASTCKPT_HD void add(Pair& acc, const Vector& v, uint64_t low_key, uint64_t high_key) {
        const uint64_t low = v.word[0] | static_cast<uint64_t>(v.word[1]) << 32, high = v.word[2] | static_cast<uint64_t>(v.word[3]) << 32;
        const uint64_t x = low ^ low_key, y = high ^ high_key;
        acc.low += high + (x & 0xffffffffu) * (x >> 32);
        acc.high += low + (y & 0xffffffffu) * (y >> 32);
    }

    FASTCKPT_HD uint64_t key(uint32_t word) const { return load_aligned<8>(reinterpret_cast<const char*>(tables->secret + word * 8)); }

    static constexpr uint32_t STRIPE_BYTES = 64, STRIPES = 16, PERIOD = STRIPES * STRIPE_BYTES;

    // How 16 bytes of a stripe are read: as an aligned vector; as two around them, shifted; byte by byte.
    enum Reading { ALIGNED, SHIFTED, BYTES };

    template <Reading HOW> static FASTCKPT_HD Vector read(const char* p) {
        if constexpr (HOW == ALIGNED) return load_vector(p);
        if constexpr (HOW == BYTES) return load_cell<16>(p);
        const uint32_t past = misalignment(p, 16);
        uint32_t x[8];
        load_kept<4>(x, p - past);
        load_kept<4>(x + 4, p - past + 16);
        shift_words<4>(x, past);
        return {{x[0], x[1], x[2], x[3]}};
    }

    // The first `count` stripes from `data` on, `SOME` of them under way.
    template <Reading HOW, uint32_t SOME> FASTCKPT_HD void take(Pair& acc, const char* data, uint32_t count, uint32_t first) const {
        FASTCKPT_KEEP_LOOP
        for (uint32_t i = 0; i < count; i += SOME) {
            Vector v[SOME] = {};
            FASTCKPT_UNROLL
            for (uint32_t k = 0; k < SOME; ++k)
                if (i + k < count) v[k] = read<HOW>(data + (i + k) * STRIPE_BYTES);
            FASTCKPT_UNROLL
            for (uint32_t k = 0; k < SOME; ++k)
                if (i + k < count) add(acc, v[k], key(i + k + first), key(i + k + first + 1));
        }
    }

    FASTCKPT_HD void accumulate(const LeafAt& leaf, uint32_t lane, uint64_t* out) const {
        constexpr uint32_t PRIME = 0x9E3779B1u;
        const uint32_t first = 2 * lane;
        const char* data = reinterpret_cast<const char*>(leaf.address) + lane * 16;
        const bool aligned = leaf.address % 16 == 0;
        const uint64_t n = leaf.nbytes, periods = (n - 1) / PERIOD, whole = n / PERIOD;
        const uint32_t rest = static_cast<uint32_t>(n - periods * PERIOD);
        Pair acc{tables->start[first], tables->start[first + 1]};
        const uint64_t low_key = key(STRIPES + first), high_key = key(STRIPES + first + 1);
        FASTCKPT_KEEP_LOOP
        for (uint64_t p = 0;; ++p, data += PERIOD) {
            if (AHEAD != 0 && p + AHEAD < whole) {  // eight lines by four threads
                const char* next = data + AHEAD * PERIOD + lane * (PERIOD / LANES_OF_LEAF - 16);
                prefetch_line(next);
                prefetch_line(next + 128);
            }
            const bool full = p < periods;
            const uint32_t count = full ? STRIPES : (rest - 1) / STRIPE_BYTES;
            if (aligned && full) {  // all loads go out together
                Vector v[STRIPES];
                FASTCKPT_UNROLL
                for (uint32_t i = 0; i < STRIPES; ++i) v[i] = load_vector(data + i * STRIPE_BYTES);
                FASTCKPT_UNROLL
                for (uint32_t i = 0; i < STRIPES; ++i) add(acc, v[i], key(i + first), key(i + first + 1));
            } else if (full && (p + 1 < periods || rest >= 16)) {  // the vectors around lie in the leaf
                take<SHIFTED, 4>(acc, data, STRIPES, first);
            } else if (aligned) {
                take<ALIGNED, 4>(acc, data, count, first);
            } else {
                take<BYTES, 1>(acc, data, count, first);
            }
            if (!full) break;
            acc.low = (acc.low ^ acc.low >> 47 ^ low_key) * PRIME;
            acc.high = (acc.high ^ acc.high >> 47 ^ high_key) * PRIME;
        }
        const uint8_t* last = tables->secret + 121 + first * 8;
        add(acc, load_cell<16>(data + rest - STRIPE_BYTES), read64(last), read64(last + 8));
        out[0] = acc.low;
        out[1] = acc.high;
    }
};

}  // namespace
}  // namespace fastckpt
