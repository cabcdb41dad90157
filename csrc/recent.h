// Which pages of mapped files were read last, so that older ones can be given back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fastckpt {

// The windows of some mapped source buffers in the order of their last reading. Beyond `limit` bytes the older half
// is given back to the page cache; whoever reads them again finds them there. Threads share one, so that none
// takes pages from under another.
class Recent {
  public:
    // Buffer i starts at addresses[i]; `mapped` says how many bytes of it lie in a file mapping, 0 for other memory.
    Recent(const uint64_t* addresses, const uint64_t* mapped, size_t count, uint64_t limit)
        : addresses_(addresses, addresses + count), mapped_(mapped, mapped + count), limit_(limit) {}
    Recent(const Recent&) = delete;
    Recent& operator=(const Recent&) = delete;

    size_t count() const { return mapped_.size(); }
    bool mapped(uint32_t buffer) const { return mapped_[buffer] != 0; }
    // What one share of work may span in a source, so that threads together stay near the limit.
    uint64_t span() const { return limit_ / 4 + 1; }
    // Bytes [low, high) of a mapped buffer were read.
    void touched(uint32_t buffer, uint64_t low, uint64_t high);

  private:
    struct Window {
        uint64_t low, high;  // addresses
    };
    using Order = std::list<Window>;  // the one read last stands first

    const std::vector<uint64_t> addresses_, mapped_;
    const uint64_t limit_;
    std::mutex mutex_;
    Order order_;
    std::unordered_map<uint64_t, Order::iterator> known_;  // by `low`
    uint64_t held_ = 0;
};

}  // namespace fastckpt
