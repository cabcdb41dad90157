// Files mapped for reading that survive truncation.
#pragma once

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
    void close();

  private:
    std::string path_;
    uint64_t address_ = 0, nbytes_ = 0;
    int slot_ = -1;
    bool faulted_ = false;
};

// Pages replaced by zeros in this process so far, over all mappings.
uint64_t faults();

}  // namespace fastckpt
