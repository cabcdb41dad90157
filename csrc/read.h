// Files: mapped for reading, surviving truncation, or read by position.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastckpt {

// The first `nbytes` of a file, mapped read-only. If the file shrinks while it is mapped, reading what is gone
// gives zeros and `faulted` turns true, where the process would else be killed by SIGBUS. (What is gone from
// the last page that remains reads as zeros without a fault: compare the file's size and times as well.)
class Mapping {
  public:
    // Throws BrokenFile: no such file, shorter than `nbytes`, no regular file, or no free slot.
    Mapping(const std::string& path, uint64_t nbytes);
    ~Mapping() { close(); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    const std::string& path() const { return path_; }
    uint64_t address() const { return address_; }
    uint64_t nbytes() const { return nbytes_; }
    bool faulted() const;
    void release(uint64_t offset, uint64_t nbytes);   // gives the pages that hold this range back
    void willneed(uint64_t offset, uint64_t nbytes);  // starts reading this range
    void close();

  private:
    void advise(uint64_t offset, uint64_t nbytes, int advice);

    std::string path_;
    uint64_t address_ = 0, nbytes_ = 0, length_ = 0;
    int slot_ = -1;
    bool faulted_ = false;
};

// Pages replaced by zeros in this process so far, over all mappings.
uint64_t faults();

// Reads piece i, sizes[i] bytes at offsets[i] of the file, to destination + positions[i], on so many threads.
// Throws BrokenFile naming the offset where the file ends or fails.
void read_at(int fd, const int64_t* offsets, const int64_t* sizes, const int64_t* positions, size_t count,
             char* destination, int threads);

}  // namespace fastckpt
