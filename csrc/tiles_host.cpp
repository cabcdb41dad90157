#include "tiles_host.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "digest_leaves.h"
#include "port.h"
#include "quant_cuda.h"
#include "tiles_cuda.h"

namespace fastckpt {

namespace {

struct Host {
    const std::vector<uint32_t>& order;
    uint32_t* shared;

    template <class Body> void body(const Work& w) const {
        const Body body(w);
        const uint32_t threads = threads_of(w.c.path);
        for (uint32_t thread : order)
            if (thread < threads) body.load(thread, shared);
        for (uint32_t thread : order)
            if (thread < threads) body.store(thread, shared);
    }
};

struct HostQuantiser {
    const std::vector<uint32_t>& order;
    uint32_t* shared;

    template <class Body> void body(const QuantRows* rows, const uint32_t* owner, uint64_t tile) const {
        const Body body(rows, owner, tile);
        for (uint32_t thread : order) body.load(thread, shared);
        for (uint32_t thread : order) body.fold(thread, shared);
        for (uint32_t thread : order) body.store(thread, shared);
    }
};

// The most different words that one bank holds of those a warp reaches for at once.
int worst_bank(const std::vector<uint32_t>& words) {
    std::set<uint32_t> banks[32];
    for (uint32_t w : words) banks[w % 32].insert(w);
    size_t worst = 0;
    for (const auto& bank : banks) worst = std::max(worst, bank.size());
    return static_cast<int>(worst);
}

template <uint32_t s, uint32_t d> Conflicts conflicts() {
    constexpr uint32_t VECTOR = 16 / s, COLUMNS = columns_of_tile(s, d);
    Conflicts worst{0, 0};
    for (uint32_t warp = 0; warp < THREADS / 32; ++warp) {
        for (uint32_t column = 0; column < COLUMNS; column += 8 * VECTOR)
            for (uint32_t v = 0; v < VECTOR; ++v) {
                std::vector<uint32_t> words;
                for (uint32_t lane = 0; lane < 32; ++lane)
                    words.push_back(slot<VECTOR>(warp * 4 + lane / 8, column + lane % 8 * VECTOR + v));
                worst.write = std::max(worst.write, worst_bank(words));
            }
        // 16-byte reads go by quarter warps.
        for (uint32_t quarter = 0; quarter < 4; ++quarter) {
            std::vector<uint32_t> words;
            for (uint32_t lane = quarter * 8; lane < quarter * 8 + 8; ++lane)
                for (uint32_t k = 0; k < 4; ++k) words.push_back(slot<VECTOR>(lane % 8 * 4, warp * 4 + lane / 8) + k);
            worst.read = std::max(worst.read, worst_bank(words));
        }
    }
    return worst;
}

template <uint32_t s> Conflicts conflicts_from(int d) {
    switch (d) {
        case 1: return conflicts<s, 1>();
        case 2: return conflicts<s, 2>();
        case 4: return conflicts<s, 4>();
        default: throw std::invalid_argument("bank_conflicts: no transposed elements of " + std::to_string(d) + " bytes");
    }
}

}  // namespace

void run_tiles_on_host(const TableAt& at, uint64_t tiles, uint32_t shuffle) {
    const Table table{reinterpret_cast<const Copy*>(at.rows), reinterpret_cast<const uint32_t*>(at.owner),
                      reinterpret_cast<const uint64_t*>(at.sources), reinterpret_cast<const uint64_t*>(at.destinations)};
    FloatMode mode;
    std::mt19937 random(shuffle);
    std::vector<uint32_t> order(THREADS);
    std::iota(order.begin(), order.end(), 0u);
    std::vector<uint64_t> turn(tiles);
    std::iota(turn.begin(), turn.end(), uint64_t{0});
    if (shuffle != 0) std::shuffle(turn.begin(), turn.end(), random);
    std::vector<uint32_t> shared(SHARED_WORDS);
    for (uint64_t i : turn) {
        if (shuffle != 0) std::shuffle(order.begin(), order.end(), random);
        std::fill(shared.begin(), shared.end(), 0xdeadbeefu);
        const Work work(table, i);
        const Host run{order, shared.data()};
        switch (work.c.path) {
            case ROWS: dispatch<ROWS>(run, work); break;
            case TRANSPOSE: dispatch<TRANSPOSE>(run, work); break;
            case GENERAL: dispatch<GENERAL>(run, work); break;
            default: throw std::invalid_argument("a row has path " + std::to_string(work.c.path));
        }
    }
}

void run_digests_on_host(uint64_t leaves, uint64_t count, uint64_t out) {
    static const DigestTables tables = FASTCKPT_DIGEST_TABLES;
    std::vector<uint64_t> shared(ACCUMULATORS);
    for (uint64_t block = 0; block * LEAVES_OF_BLOCK < count; ++block) {
        const Leaves body{reinterpret_cast<const LeafAt*>(leaves), count, reinterpret_cast<uint64_t*>(out), &tables, block};
        std::fill(shared.begin(), shared.end(), 0xdeadbeefdeadbeefull);
        for (uint32_t thread = LEAF_THREADS; thread-- > 0;) body.load(thread, shared.data());
        for (uint32_t thread = 0; thread < LEAF_THREADS; ++thread) body.store(thread, shared.data());
    }
}

void run_quantise_on_host(uint64_t rows, uint64_t owner, uint64_t tiles, uint32_t shuffle) {
    FloatMode mode;
    std::mt19937 random(shuffle);
    std::vector<uint32_t> order(THREADS), shared(QUANT_SHARED);
    std::iota(order.begin(), order.end(), 0u);
    std::vector<uint64_t> turn(tiles);
    std::iota(turn.begin(), turn.end(), uint64_t{0});
    if (shuffle != 0) std::shuffle(turn.begin(), turn.end(), random);
    for (uint64_t i : turn) {
        if (shuffle != 0) std::shuffle(order.begin(), order.end(), random);
        std::fill(shared.begin(), shared.end(), 0xdeadbeefu);
        quantise(HostQuantiser{order, shared.data()}, reinterpret_cast<const QuantRows*>(rows), reinterpret_cast<const uint32_t*>(owner), i);
    }
}

uint64_t tiles_of_quant_rows(const QuantRows& rows) { return quant_tiles_of(rows); }

uint64_t tiles_of_row(const Copy& row) { return tiles_of(row); }

Conflicts bank_conflicts(int s, int d) {
    switch (s) {
        case 1: return conflicts_from<1>(d);
        case 2: return conflicts_from<2>(d);
        case 4: return conflicts_from<4>(d);
        default: throw std::invalid_argument("bank_conflicts: no transposed elements of " + std::to_string(s) + " bytes");
    }
}

}  // namespace fastckpt
