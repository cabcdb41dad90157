#include "mapping.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

#include "error.h"

namespace fastckpt {
namespace {

// The mappings that live now, for the signal handler: it may take no lock and allocate nothing, so the table is
// fixed and every field atomic. A slot is taken when `end` is not 0.
struct Slot {
    std::atomic<uintptr_t> begin, end;
    std::atomic<bool> faulted;
};
constexpr int SLOTS = 1 << 16;
Slot slots[SLOTS];
std::atomic<uint64_t> fault_count{0};
std::atomic<int> slots_used{0};  // slots from here on were never taken
std::vector<int> free_slots;     // under `mutex`
std::mutex mutex;

uintptr_t page_size = 4096;
struct sigaction previous;

void on_bus_error(int signal, siginfo_t* info, void* context) {
    const int saved = errno;
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    const int used = slots_used.load(std::memory_order_acquire);
    for (int i = 0; i < used; ++i) {
        if (at < slots[i].begin.load(std::memory_order_acquire) || at >= slots[i].end.load(std::memory_order_acquire))
            continue;
        void* page = reinterpret_cast<void*>(at / page_size * page_size);
        if (mmap(page, page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page) {
            slots[i].faulted.store(true, std::memory_order_release);
            fault_count.fetch_add(1);
            errno = saved;
            return;
        }
    }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        sigaction(SIGBUS, &previous, nullptr);  // the access is repeated and has its usual end
    }
    errno = saved;
}

void install_handler() {
    page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
    // A child that is forked while another thread holds the lock would wait for it for ever.
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
}

int take_slot(uintptr_t begin, uintptr_t length) {
    std::lock_guard<std::mutex> lock(mutex);
    static const bool installed = (install_handler(), true);
    (void)installed;
    int i;
    if (!free_slots.empty()) {
        i = free_slots.back();
        free_slots.pop_back();
    } else if ((i = slots_used.load()) == SLOTS) {
        return -1;
    }
    slots[i].faulted.store(false);
    slots[i].begin.store(begin);
    slots[i].end.store(begin + length);
    if (i == slots_used.load()) slots_used.store(i + 1, std::memory_order_release);
    return i;
}

void leave_slot(int i) {
    std::lock_guard<std::mutex> lock(mutex);
    slots[i].end.store(0);
    slots[i].begin.store(0);
    free_slots.push_back(i);
}

std::string reason() { return std::strerror(errno); }

// Throws what `errno` means for a file that was opened or mapped.
[[noreturn]] void refuse(const std::string& what) {
    const bool room = errno == ENOMEM || errno == EMFILE || errno == ENFILE || errno == EAGAIN;
    if (room) throw NoRoom(what + ": " + reason());
    throw BrokenFile(what + ": " + reason());
}

}  // namespace

Mapping::Mapping(const std::string& path, uint64_t nbytes) : path_(path), nbytes_(nbytes) {
    int fd;
    do fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    while (fd < 0 && errno == EINTR);
    if (fd < 0) refuse(path);
    struct stat s;
    if (fstat(fd, &s) != 0 || !S_ISREG(s.st_mode)) {
        ::close(fd);
        throw BrokenFile(path + ": not a regular file");
    }
    if (static_cast<uint64_t>(s.st_size) < nbytes) {
        ::close(fd);
        throw BrokenFile(path + ": wanted " + std::to_string(nbytes) + " bytes, the file has " + std::to_string(s.st_size));
    }
    void* at = nbytes == 0 ? nullptr : mmap(nullptr, nbytes, PROT_READ, MAP_SHARED, fd, 0);
    const int why = errno;
    ::close(fd);
    if (nbytes == 0) return;
    errno = why;
    if (at == MAP_FAILED) refuse(path + ": cannot map " + std::to_string(nbytes) + " bytes");
    address_ = reinterpret_cast<uint64_t>(at);
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    slot_ = take_slot(address_, (nbytes + page - 1) / page * page);
    if (slot_ < 0) {
        munmap(at, nbytes);
        throw NoRoom(path + ": more than " + std::to_string(SLOTS) + " files mapped at once");
    }
}

uint64_t faults() { return fault_count.load(); }

bool Mapping::faulted() const { return slot_ >= 0 ? slots[slot_].faulted.load(std::memory_order_acquire) : faulted_; }

void Mapping::close() {
    if (slot_ < 0) return;
    faulted_ = slots[slot_].faulted.load(std::memory_order_acquire);
    leave_slot(slot_);  // first: once the addresses are free, a fault there is somebody else's
    munmap(reinterpret_cast<void*>(address_), nbytes_);
    slot_ = -1;
    address_ = 0;
}

}  // namespace fastckpt
