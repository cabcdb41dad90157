#include "recent.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace fastckpt {
namespace {

// Faulting one page of a file may map a whole huge page of it, so pages are counted and given back in such windows.
constexpr uint64_t WINDOW = 2u << 20;

}  // namespace

void Recent::touched(uint32_t buffer, uint64_t low, uint64_t high) {
    static const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    const uint64_t base = addresses_[buffer];
    // Never a page beyond the buffer's own: what lies there is not ours.
    const uint64_t first = base / page * page, last = (base + mapped_[buffer] + page - 1) / page * page;
    std::lock_guard<std::mutex> lock(mutex_);
    for (uint64_t at = (base + low) / WINDOW * WINDOW; at < base + high; at += WINDOW) {
        const Window w{std::max(at, first), std::min(at + WINDOW, last)};
        const auto [entry, fresh] = known_.try_emplace(w.low);
        if (fresh) {
            order_.push_front(w);
            entry->second = order_.begin();
            held_ += w.high - w.low;
        } else {
            order_.splice(order_.begin(), order_, entry->second);
        }
    }
    while (held_ > limit_) {
        const Window oldest = order_.back();
        madvise(reinterpret_cast<void*>(oldest.low), oldest.high - oldest.low, MADV_DONTNEED);
        held_ -= oldest.high - oldest.low;
        known_.erase(oldest.low);
        order_.pop_back();
    }
}

}  // namespace fastckpt
