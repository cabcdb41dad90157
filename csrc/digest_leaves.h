// Digests of leaves on a GPU: four threads a leaf, each with two of XXH3's eight accumulators, which need nothing
// of the others' until the end, and a KiB of the leaf under way, the next ones on their way to the second cache.
// Blocks are small, so that few leaves reach many multiprocessors. A body like those of tiles_cuda.h: load(thread, shared), a barrier, store(thread, shared).
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

    FASTCKPT_HD void accumulate(const LeafAt& leaf, uint32_t lane, uint64_t* out) const {
        constexpr uint32_t STRIPES = 16, PERIOD = STRIPES * 64, PRIME = 0x9E3779B1u;
        const uint32_t first = 2 * lane;
        const char* data = reinterpret_cast<const char*>(leaf.address) + lane * 16;
        const bool aligned = leaf.address % 16 == 0;
        const uint64_t n = leaf.nbytes, periods = (n - 1) / PERIOD;
        Pair acc{tables->start[first], tables->start[first + 1]};
        FASTCKPT_KEEP_LOOP
        for (uint64_t p = 0; p < periods; ++p, data += PERIOD) {
            if (AHEAD != 0 && p + AHEAD < periods) {  // eight lines by four threads
                const char* next = data + AHEAD * PERIOD + lane * (PERIOD / LANES_OF_LEAF - 16);
                prefetch_line(next);
                prefetch_line(next + 128);
            }
            Vector v[STRIPES];
            if (aligned) {  // asked once, so that all loads go out together
                FASTCKPT_UNROLL
                for (uint32_t i = 0; i < STRIPES; ++i) v[i] = load_vector(data + i * 64);
            } else {
                FASTCKPT_UNROLL
                for (uint32_t i = 0; i < STRIPES; ++i) v[i] = load_cell<16>(data + i * 64);
            }
            FASTCKPT_UNROLL
            for (uint32_t i = 0; i < STRIPES; ++i) add(acc, v[i], key(i + first), key(i + first + 1));
            acc.low = (acc.low ^ acc.low >> 47 ^ key(16 + first)) * PRIME;
            acc.high = (acc.high ^ acc.high >> 47 ^ key(17 + first)) * PRIME;
        }
        const uint64_t rest = n - periods * PERIOD;
        FASTCKPT_KEEP_LOOP
        for (uint32_t i = 0; i < (rest - 1) / 64; ++i) add(acc, load_cell<16>(data + i * 64), key(i + first), key(i + first + 1));
        const uint8_t* last = tables->secret + 121 + first * 8;
        add(acc, load_cell<16>(data + rest - 64), read64(last), read64(last + 8));
        out[0] = acc.low;
        out[1] = acc.high;
    }
};

}  // namespace
}  // namespace fastckpt
