// Threads over rows: the choice of a body for each row, cutting big rows, giving mapped pages back.
#include "copy_cpu.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "isa.h"
#include "port.h"

namespace fastckpt {

namespace {

// Outputs of one call larger than this go past the cache; smaller ones are a staging buffer that is read next.
constexpr uint64_t STREAM_CALL = 6u << 20;
// A row smaller than this is written through the cache all the same.
constexpr uint64_t STREAM_ROW = 512;
// What a thread takes at a time, in output bytes.
constexpr uint64_t SHARE = 4u << 20;

uint64_t elements(const Copy& c) {
    return uint64_t{c.shape[0]} * c.shape[1] * c.shape[2] * c.shape[3];
}
uint64_t output_bytes(const Copy& c) { return elements(c) * ITEMSIZE[c.dst_dtype < DTYPES ? c.dst_dtype : 0]; }

void zero_row(const Copy& c, char* dst, size_t size) {
    const bool contiguous = c.dst_stride[3] == static_cast<int64_t>(size) || c.shape[3] == 1;
    for (uint32_t i = 0; i < c.shape[0]; ++i)
        for (uint32_t j = 0; j < c.shape[1]; ++j)
            for (uint32_t k = 0; k < c.shape[2]; ++k) {
                char* d = dst + i * c.dst_stride[0] + j * c.dst_stride[1] + k * c.dst_stride[2];
                if (contiguous) {
                    memset(d, 0, c.shape[3] * size);
                } else {
                    for (uint32_t l = 0; l < c.shape[3]; ++l, d += c.dst_stride[3]) memset(d, 0, size);
                }
            }
}

// The axis that is contiguous in the source while axis 3 is contiguous in the destination, or -1.
int transposed_axis(const Copy& c, int64_t src_size) {
    for (int axis = 2; axis >= 0; --axis)
        if (c.shape[axis] > 1 && c.src_stride[axis] == src_size) return axis;
    return -1;
}

void run_row(const Copy& c, const Pair& pair, char* dst, const char* src, int64_t dst_size, int64_t src_size, bool past) {
    const bool dense = c.shape[3] == 1 || c.dst_stride[3] == dst_size;
    if (dense && (c.shape[3] == 1 || c.src_stride[3] == src_size)) {
        if (c.shape[2] == 1 && c.shape[1] == 1 && c.shape[0] == 1) {
            pair.line(dst, src, c.shape[3], past);
            return;
        }
        for (uint32_t i = 0; i < c.shape[0]; ++i)
            for (uint32_t j = 0; j < c.shape[1]; ++j) {
                char* d = dst + i * c.dst_stride[0] + j * c.dst_stride[1];
                const char* s = src + i * c.src_stride[0] + j * c.src_stride[1];
                for (uint32_t k = 0; k < c.shape[2]; ++k, d += c.dst_stride[2], s += c.src_stride[2])
                    pair.line(d, s, c.shape[3], past);
            }
        return;
    }
    const int axis = dense ? transposed_axis(c, src_size) : -1;
    if (axis >= 0) {
        const int a = axis == 0 ? 1 : 0, b = axis == 2 ? 1 : 2;
        for (uint32_t i = 0; i < c.shape[a]; ++i)
            for (uint32_t j = 0; j < c.shape[b]; ++j)
                pair.transpose(dst + i * c.dst_stride[a] + j * c.dst_stride[b],
                               src + i * c.src_stride[a] + j * c.src_stride[b], c.shape[3], c.shape[axis],
                               c.dst_stride[axis], c.src_stride[3], past);
        return;
    }
    for (uint32_t i = 0; i < c.shape[0]; ++i)
        for (uint32_t j = 0; j < c.shape[1]; ++j)
            for (uint32_t k = 0; k < c.shape[2]; ++k)
                pair.strided(dst + i * c.dst_stride[0] + j * c.dst_stride[1] + k * c.dst_stride[2],
                             src + i * c.src_stride[0] + j * c.src_stride[1] + k * c.src_stride[2], c.shape[3],
                             c.dst_stride[3], c.src_stride[3]);
}

struct Span {
    uint64_t low, high;
};

// The bytes of its source buffer that a row touches, as one span.
Span source_span(const Copy& c) {
    Span s{c.src, c.src + (c.src_dtype < DTYPES ? ITEMSIZE[c.src_dtype] : 1)};
    for (int a = 0; a < AXES; ++a) {
        int64_t reach = c.src_stride[a] * (static_cast<int64_t>(c.shape[a]) - 1);
        (reach < 0 ? s.low : s.high) += static_cast<uint64_t>(reach);
    }
    return s;
}

// Tells `Recent` what one share of rows has read: neighbouring spans of a source together.
class Reads {
  public:
    explicit Reads(Recent* recent) : recent_(recent) {}
    ~Reads() { tell(); }

    void add(const Copy& c) {
        if (c.src_buffer == ZERO_BUFFER || !recent_->mapped(c.src_buffer)) return;
        const Span s = source_span(c);
        if (c.src_buffer == buffer_ && s.low <= span_.high + NEAR && s.high + NEAR >= span_.low) {
            span_ = {std::min(s.low, span_.low), std::max(s.high, span_.high)};
            return;
        }
        tell();
        buffer_ = c.src_buffer;
        span_ = s;
    }

  private:
    static constexpr uint64_t NEAR = 64u << 10;

    void tell() {
        if (buffer_ != ZERO_BUFFER) recent_->touched(buffer_, span_.low, span_.high);
    }

    Recent* recent_;
    uint32_t buffer_ = ZERO_BUFFER;
    Span span_{0, 0};
};

class Runner {
  public:
    Runner(const Rows& work, const Kernels& kernels) : work_(work), kernels_(kernels) {
        uint64_t total = 0;
        for (size_t i = 0; i < work.count && total < STREAM_CALL; ++i) total += output_bytes(work.rows[i]);
        large_ = total >= STREAM_CALL;
    }

    // Runs rows in order; false when one is not valid, which stops there.
    bool run(const Copy* rows, size_t count, Reads* reads) {
        for (size_t i = 0; i < count; ++i) {
            const Copy& c = rows[i];
            if (i + 1 < count) ahead(rows[i + 1]);
            if (c.dst_buffer >= work_.destination_count || c.src_dtype >= DTYPES || c.dst_dtype >= DTYPES) return false;
            if (elements(c) == 0) continue;
            char* dst = reinterpret_cast<char*>(work_.destinations[c.dst_buffer] + c.dst);
            if (c.src_buffer == ZERO_BUFFER) {
                zero_row(c, dst, ITEMSIZE[c.dst_dtype]);
                continue;
            }
            const Pair& pair = kernels_.pairs[c.src_dtype][c.dst_dtype];
            if (c.src_buffer >= work_.source_count || pair.line == nullptr) return false;
            const char* src = reinterpret_cast<const char*>(work_.sources[c.src_buffer] + c.src);
            const bool past = large_ && output_bytes(c) >= STREAM_ROW;
            run_row(c, pair, dst, src, ITEMSIZE[c.dst_dtype], ITEMSIZE[c.src_dtype], past);
            if (reads != nullptr) reads->add(c);
        }
        fence();
        return true;
    }

  private:
    // The next row's first lines, so that rows out of source order wait less.
    void ahead(const Copy& c) const {
        if (c.src_buffer < work_.source_count) {
            const char* p = reinterpret_cast<const char*>(work_.sources[c.src_buffer] + c.src);
            __builtin_prefetch(p);
            __builtin_prefetch(p + 64);
        }
    }

    const Rows& work_;
    const Kernels& kernels_;
    bool large_;
};

// Cuts rows into shares of bounded output and bounded source span, each a run of consecutive rows.
class Shares {
  public:
    struct Share {
        const Copy* rows;
        size_t count;
    };

    Shares(const Rows& work, uint64_t bytes) : bytes_(bytes), span_(work.recent == nullptr ? 0 : work.recent->span()) {
        size_t first = 0;
        uint64_t held = 0;
        for (size_t i = 0; i < work.count; ++i) {
            const Copy& c = work.rows[i];
            const uint64_t n = output_bytes(c);
            if (excess(c) > 1) {
                if (i > first) shares.push_back({work.rows + first, i - first});
                cut(c);
                first = i + 1;
                held = 0;
            } else if ((held += n) >= bytes_) {
                shares.push_back({work.rows + first, i + 1 - first});
                first = i + 1;
                held = 0;
            }
        }
        if (first < work.count) shares.push_back({work.rows + first, work.count - first});
    }

    std::vector<Share> shares;

  private:
    // By how much a row is too large for one share; at most 1 when it fits.
    uint64_t excess(const Copy& c) const {
        uint64_t n = (output_bytes(c) + bytes_ - 1) / bytes_;
        if (span_ > 0 && c.src_buffer != ZERO_BUFFER) {
            Span s = source_span(c);
            n = std::max(n, (s.high - s.low + span_ - 1) / span_);
        }
        return n;
    }

    // Cuts along the axis that strides furthest in the source, so that a share is a compact piece of it.
    void cut(const Copy& c) {
        const int64_t* stride = c.src_buffer == ZERO_BUFFER ? c.dst_stride : c.src_stride;
        int axis = -1;
        for (int a = 0; a < AXES; ++a)
            if (c.shape[a] > 1 && (axis < 0 || std::llabs(stride[a]) > std::llabs(stride[axis]))) axis = a;
        const uint64_t pieces = excess(c);
        if (axis < 0 || pieces <= 1) {
            pieces_.push_back(c);
            shares.push_back({&pieces_.back(), 1});
            return;
        }
        const uint64_t n = c.shape[axis];
        uint64_t step = std::max<uint64_t>(1, n / pieces);
        for (uint64_t whole : {256u, 64u})  // whole tiles, else whole cache lines
            if (step > whole) {
                step = step / whole * whole;
                break;
            }
        for (uint64_t at = 0; at < n; at += step) {
            Copy part = c;
            part.shape[axis] = static_cast<uint32_t>(std::min(step, n - at));
            part.src += static_cast<uint64_t>(static_cast<int64_t>(at) * c.src_stride[axis]);
            part.dst += static_cast<uint64_t>(static_cast<int64_t>(at) * c.dst_stride[axis]);
            if (step == 1 && excess(part) > 1) {
                cut(part);
            } else {
                pieces_.push_back(part);
                shares.push_back({&pieces_.back(), 1});
            }
        }
    }

    const uint64_t bytes_, span_;
    std::deque<Copy> pieces_;  // a deque: its elements never move
};

[[noreturn]] void refuse(const Rows& work, const Kernels& k) {
    for (size_t i = 0; i < work.count; ++i) {
        const Copy& c = work.rows[i];
        const std::string row = "copy row " + std::to_string(i) + ": ";
        const bool known = c.src_dtype < DTYPES && c.dst_dtype < DTYPES;
        if (!known || (c.src_buffer != ZERO_BUFFER && k.pairs[c.src_dtype][c.dst_dtype].line == nullptr))
            throw std::invalid_argument(row + "no conversion of dtype code " + std::to_string(c.src_dtype) + " to " +
                                        std::to_string(c.dst_dtype));
        if (c.dst_buffer >= work.destination_count)
            throw std::invalid_argument(row + "destination buffer " + std::to_string(c.dst_buffer) + " of " +
                                        std::to_string(work.destination_count));
        if (c.src_buffer != ZERO_BUFFER && c.src_buffer >= work.source_count)
            throw std::invalid_argument(row + "source buffer " + std::to_string(c.src_buffer) + " of " +
                                        std::to_string(work.source_count));
    }
    throw std::invalid_argument("a copy row changed while it ran");
}

}  // namespace

void copy_rows(const Rows& work, int threads, int isa) {
    const Kernels& k = kernels(isa);
    Runner runner(work, k);
    FloatMode mode;
    if (threads <= 1 && work.recent == nullptr) {
        if (!runner.run(work.rows, work.count, nullptr)) refuse(work, k);
        return;
    }
    const Shares cut(work, SHARE);
    std::atomic<size_t> next{0};
    std::atomic<bool> valid{true};
    auto worker = [&] {
        FloatMode own;
        for (size_t i; (i = next.fetch_add(1)) < cut.shares.size() && valid;) {
            const auto& [rows, count] = cut.shares[i];
            if (work.recent == nullptr) {
                if (!runner.run(rows, count, nullptr)) valid = false;
            } else {
                Reads reads(work.recent);
                if (!runner.run(rows, count, &reads)) valid = false;
            }
        }
    };
    std::vector<std::thread> pool;
    const size_t wanted = std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), cut.shares.size());
    pool.reserve(wanted);
    try {
        while (pool.size() + 1 < wanted) pool.emplace_back(worker);
    } catch (const std::system_error&) {  // the system starts no more: those there are do the work
    }
    worker();
    for (std::thread& t : pool) t.join();
    if (!valid) refuse(work, k);
}

}  // namespace fastckpt
