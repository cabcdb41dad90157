#include "isa_table.h"

const fastckpt::Kernels& fastckpt::kernels_avx2() {
    static const Kernels table = make_kernels();
    return table;
}
