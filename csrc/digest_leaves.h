// Digests of leaves on a GPU: eight threads a leaf, each with one of XXH3's eight accumulators, which never talk
// until the end. A body like those of tiles_cuda.h: load(thread, shared), a barrier, store(thread, shared).
#pragma once

#include "digest_short.h"

namespace fastckpt {
namespace {

constexpr uint32_t LEAF_THREADS = 256, LANES_OF_LEAF = 8, LEAVES_OF_BLOCK = LEAF_THREADS / LANES_OF_LEAF;
constexpr uint32_t SHORT_LEAF = 240;  // up to here XXH3 has other formulas

struct LeafAt {
    uint64_t address, nbytes;
};

struct DigestTables {  // where host or device can read them
    uint8_t secret[192];
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
        if (i < count && leaves[i].nbytes > SHORT_LEAF) shared[thread] = accumulated(leaves[i], thread % LANES_OF_LEAF);
    }

    FASTCKPT_HD void store(uint32_t thread, uint64_t* shared) const {
        const uint64_t i = block * LEAVES_OF_BLOCK + thread / LANES_OF_LEAF;
        if (i >= count || thread % LANES_OF_LEAF != 0) return;
        const size_t n = leaves[i].nbytes;
        const uint8_t* data = reinterpret_cast<const uint8_t*>(leaves[i].address);
        out[i] = n > SHORT_LEAF ? digest_end(shared + thread, n, tables->secret)
                 : n > 16       ? digest_240(data, n, tables->secret)
                                : digest_16(data, n, tables->secret);
    }

    // This lane's word and its neighbour's.
    static FASTCKPT_HD void add(uint64_t& acc, const Vector& v, uint32_t lane, uint64_t key) {
        const uint64_t low = v.word[0] | static_cast<uint64_t>(v.word[1]) << 32, high = v.word[2] | static_cast<uint64_t>(v.word[3]) << 32;
        const uint64_t mine = lane & 1 ? high : low, other = lane & 1 ? low : high;
        const uint64_t x = mine ^ key;
        acc += other + (x & 0xffffffffu) * (x >> 32);
    }

    static FASTCKPT_HD Vector words_at(const char* p, bool aligned) { return aligned ? load_vector(p) : load_cell<16>(p); }

    FASTCKPT_HD uint64_t accumulated(const LeafAt& leaf, uint32_t lane) const {
        constexpr uint32_t STRIPES = 16, PERIOD = STRIPES * 64, ONCE = 8;
        const uint8_t* secret = tables->secret;
        const char* data = reinterpret_cast<const char*>(leaf.address) + lane / 2 * 16;
        const bool aligned = leaf.address % 16 == 0;
        const uint64_t n = leaf.nbytes, periods = (n - 1) / PERIOD;
        uint64_t acc = tables->start[lane];
        FASTCKPT_KEEP_LOOP
        for (uint64_t p = 0; p < periods; ++p, data += PERIOD) {
            FASTCKPT_KEEP_LOOP
            for (uint32_t first = 0; first < STRIPES; first += ONCE) {
                Vector v[ONCE];
                FASTCKPT_UNROLL
                for (uint32_t i = 0; i < ONCE; ++i) v[i] = words_at(data + (first + i) * 64, aligned);
                FASTCKPT_UNROLL
                for (uint32_t i = 0; i < ONCE; ++i) add(acc, v[i], lane, read64(secret + (first + i + lane) * 8));
            }
            acc = (acc ^ acc >> 47 ^ read64(secret + 128 + lane * 8)) * 0x9E3779B1u;
        }
        const uint64_t rest = n - periods * PERIOD;
        FASTCKPT_KEEP_LOOP
        for (uint32_t i = 0; i < (rest - 1) / 64; ++i) add(acc, words_at(data + i * 64, aligned), lane, read64(secret + (i + lane) * 8));
        add(acc, load_cell<16>(data + rest - 64), lane, read64(secret + 121 + lane * 8));
        return acc;
    }
};

}  // namespace
}  // namespace fastckpt
