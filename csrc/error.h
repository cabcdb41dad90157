// What the C++ rooms throw. module.cpp turns BrokenFile into fastckpt.errors.SourceError, NoRoom into
// fastckpt.errors.WriteError and std::invalid_argument (a caller's mistake) into ValueError.
#pragma once

#include <stdexcept>
#include <string>

namespace fastckpt {

// A file cannot be mapped or read as its header promised.
struct BrokenFile : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The file is sound, and this process may not have the addresses, descriptors or table for it.
struct NoRoom : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace fastckpt
