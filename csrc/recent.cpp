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
    std::vector<Window> oldest;
    {
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
        if (held_ <= limit_) return;
        // Every core is interrupted each time pages are given back: seldom, then, and neighbours at once.
        while (held_ > limit_ / 2) {
            oldest.push_back(order_.back());
            held_ -= oldest.back().high - oldest.back().low;
            known_.erase(oldest.back().low);
            order_.pop_back();
        }
    }
    std::sort(oldest.begin(), oldest.end(), [](const Window& a, const Window& b) { return a.low < b.low; });
    for (size_t i = 0; i < oldest.size();) {
        const uint64_t start = oldest[i].low;
        uint64_t stop = oldest[i++].high;
        while (i < oldest.size() && oldest[i].low == stop) stop = oldest[i++].high;
        madvise(reinterpret_cast<void*>(start), stop - start, MADV_DONTNEED);
    }
}

}  // namespace fastckpt
