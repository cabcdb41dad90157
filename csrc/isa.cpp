// Which instruction sets run here, and the kernels of each.
#include "isa.h"

#include <stdexcept>
#include <string>

namespace fastckpt {

const char* const ISA_NAMES[ISAS] = {"portable", "avx2", "avx512"};

bool has_isa(int isa) {
    if (isa == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (isa == 1) return avx2;
    if (isa == 2)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return false;
}

const Kernels& kernels(int isa) {
    static const int best = has_isa(2) ? 2 : has_isa(1) ? 1 : 0;
    if (isa == -1) isa = best;
    if (isa < 0 || isa >= ISAS || !has_isa(isa))
        throw std::invalid_argument("instruction set " + std::to_string(isa) + " is not available here");
#if defined(__x86_64__)
    if (isa == 2) return kernels_avx512();
    if (isa == 1) return kernels_avx2();
#endif
    return kernels_portable();
}

}  // namespace fastckpt
