#include "isa_table.h"

const fastckpt::Kernels& fastckpt::kernels_portable() {
    static const Kernels table = make_kernels();
    return table;
}
