"""The compiled part: copies, mapped files, digests. Every function releases the GIL while it works."""

import mmap

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview | mmap.mmap | NDArray[np.generic]

version: str  # of the package it was built with
compiler: str
built_with_cuda: bool
cuda_archs: str  # with CUDA only
copy_bytes: int
quant_rows_bytes: int

def fields() -> list[tuple[str, int, int]]:
    """The fields of struct Copy: (name, offset, size), in bytes."""

def isas() -> list[str]:
    """The instruction sets that can run here, portable first; `copy_rows` takes the position."""

def copy_rows(
    rows: Buffer,
    sources: Buffer,
    destinations: Buffer,
    threads: int = 1,
    isa: int = -1,
    recent: Recent | None = None,
) -> None:
    """Runs every Copy row.

    `sources` and `destinations`: uint64 addresses. `isa`: -1 takes the best. `recent`, made of the
    same sources, is told what was read. Trusted: offsets and strides. Raises ValueError for a buffer index or
    a conversion that does not exist."""

class Recent:
    """The mapped pages read last; beyond `limit` bytes the oldest are given back. Threads share one.

    `addresses`: uint64, of the sources; `mapped`: uint64, for each its bytes that lie in a file mapping, else
    0. It must not outlive the mappings in use."""

    def __init__(self, addresses: Buffer, mapped: Buffer, limit: int) -> None: ...

def run_tiles_on_host(
    rows: Buffer, owner: Buffer, sources: Buffer, destinations: Buffer, shuffle: int = 0
) -> None:
    """Runs the bodies of the GPU's tiles in main memory, thread after thread, as `tiles.Tiles` has them.

    `shuffle` other than 0: tiles and threads in an order drawn from it. For tests."""

def run_digests_on_host(leaves: Buffer, out: Buffer) -> None:
    """out[i] (uint64) becomes the XXH3-64 of leaves[i], an (address, nbytes) pair of uint64, by the body that
    runs on GPUs. For tests."""

def run_quantise_on_host(rows: Buffer, owner: Buffer, shuffle: int = 0) -> None:
    """Quantises matrices in main memory, given as `quantrows.tiled` has them, by the body that runs on GPUs;
    `shuffle` as in `run_tiles_on_host`. For tests."""

def tiles_of_quant_rows(rows: Buffer, out: Buffer) -> None:
    """out[i] (uint64) becomes the tiles of row i of `quantrows.QUANT_ROWS`."""

def tiles_of_rows(rows: Buffer, out: Buffer) -> None:
    """out[i] (uint64) becomes the tiles of row i, whose path is chosen."""

def bank_conflicts(src_size: int, dst_size: int) -> tuple[int, int]:
    """A warp's accesses that meet in the worst bank of shared memory, writing and reading a transpose."""

def device_state() -> dict[str, int | str]:
    """devices, driver, runtime, error, why: what CUDA says of this machine. Only with CUDA."""

def kernel_facts() -> list[dict[str, int | str]]:
    """name, registers, local_bytes, shared_bytes, threads, blocks_per_multiprocessor of each kernel on the
    current device. Only with CUDA; raises RuntimeError without a device."""

def launch_tiles(
    rows: int, owner: int, sources: int, destinations: int, path: int, first: int, count: int, stream: int
) -> None:
    """Starts `count` tiles of one path from tile `first` on, on a stream; the first four are addresses of the
    columns of `tiles.Tiles` in device memory. Only with CUDA; raises RuntimeError in CUDA's words."""

def launch_digests(leaves: int, count: int, out: int, stream: int) -> None:
    """Starts the digests of `count` leaves; (address, nbytes) pairs at `leaves` and results at `out`, all in
    device memory. Only with CUDA; raises RuntimeError in CUDA's words."""

def launch_quantise(rows: int, owner: int, first: int, count: int, stream: int) -> None:
    """Starts `count` tiles from tile `first` on of a table of `quantrows.QUANT_ROWS`, on a stream; the first
    two are addresses in device memory. Only with CUDA; raises RuntimeError in CUDA's words."""

def digest64(buffer: Buffer) -> int:
    """XXH3-64, seed 0."""

def leaf_digests(buffer: Buffer, offsets: Buffer, sizes: Buffer, out: Buffer) -> None:
    """out[i] (uint64) becomes the XXH3-64 of buffer[offsets[i]:][:sizes[i]] (int64)."""

def crc32(buffer: Buffer, value: int = 0) -> int:
    """As zlib.crc32."""

def crc32_combine(a: int, b: int, nbytes_b: int) -> int:
    """The CRC-32 of x + y from that of x, that of y, and the bytes of y."""

def nonfinite(buffer: Buffer, dtype_code: int) -> int:
    """Elements that are NaN or infinite; 0 for integers and bools. Raises ValueError for an unknown code."""

def quantise(
    dense: Buffer,
    dtype_code: int,
    rows: int,
    columns: int,
    pitch: int,
    block_rows: int,
    block_columns: int,
    reach: float,
    floor: float,
    lowest: float,
    reciprocal: bool,
    half: bool,
    power: bool,
    kind: int,
    amax: Buffer | None,
    out: Buffer,
    scales: Buffer,
    zeros: Buffer | None,
    sums: Buffer,
    isa: int = -1,
) -> bool:
    """Quantises rows x columns of fp32, bf16 or fp16 as csrc/quant.h says; False where one is not finite.

    `kind`: `rounding.KINDS`' numbers. `pitch`: of AWQ's and GPTQ's, bytes between columns, which lie as
    lines. `amax` (fp32): one a row. `scales` (fp32), `zeros` (int8): one a block. `sums` (fp64): 5, added to.
    Raises ValueError for sizes that do not fit."""

def dequantise(
    values: Buffer,
    kind: int,
    rows: int,
    columns: int,
    scales: Buffer,
    zeros: Buffer | None,
    row: Buffer,
    group: int,
    first: int,
    offset: float,
    dtype_code: int,
    out: Buffer,
    isa: int = -1,
) -> None:
    """out becomes (value - offset - zero) * scale of rows x columns quantised values, as fp32, bf16 or fp16.

    `kind`: `unrounding.KINDS`' numbers. Value (r, c) goes with the scale and zero (fp32) number
    (first + c) // group of their row row[r] (int32), for `group` 0 with the only one there. Raises ValueError
    for sizes that do not fit."""

def add_low_rank(
    base: Buffer,
    left: Buffer,
    right: Buffer,
    rows: int,
    rank: int,
    columns: int,
    scale: float,
    isa: int = -1,
) -> None:
    """base (fp32) += scale * left @ right (fp64 that holds values of fp32), as csrc/lowrank.h says.

    Raises ValueError for sizes that do not fit."""

def row_amax(dense: Buffer, dtype_code: int, rows: int, columns: int, out: Buffer, isa: int = -1) -> None:
    """out[i] (fp32) becomes the largest magnitude of row i, not finite where a value is not."""

def faults() -> int:
    """Pages of mapped files that were gone when they were read, in this process so far."""

class Mapping:
    """The first `nbytes` of a file, mapped read-only.

    When the file shrinks under it, what is gone reads as zeros and `faulted` turns true; bytes gone from the
    last page that remains are zeros without a fault, so compare size and times as well. Raises SourceError
    when the file is missing, irregular or shorter."""

    def __init__(self, path: str, nbytes: int) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def faulted(self) -> bool: ...
    def close(self) -> None:
        """Unmaps; the address must not be used after."""
