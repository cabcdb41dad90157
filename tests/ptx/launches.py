"""Starts the kernels as csrc/*_cuda.cu do: over tables in a memory, as many blocks as they ask for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from fastckpt.executors.tiles import Tiles
from fastckpt.planning.copies import ROWS

from .compiled import DEFAULT, Target, compiled
from .machine import Counted, launch
from .memory import Global

PATHS = ("rows", "transpose", "general")
TEAM, FLIGHT = 32, 8  # threads of a tile of rows, units of a thread; `made` by the host's module is for these
LEAVES_OF_BLOCK = 16


def bytes_of(*numbers: int) -> bytes:
    return np.array(numbers, np.uint64).tobytes()


def copies(memory: Global, made: Tiles, target: Target = DEFAULT) -> dict[str, Counted]:
    """Runs tiles whose buffers lie in this memory; what each path counted that has some.

    Where tiles of rows have another size, there may be some beyond the end of a row: they do nothing."""
    program = compiled("copy_cuda.cu", target).program
    defined = {name: int(x) for name, _, x in (d.partition("=") for d in target.defines) if x.isdigit()}
    team = defined.get("TEAM", TEAM)
    made = _cut(made, team * defined.get("FLIGHT", FLIGHT))
    columns = ("rows", "owner", "sources", "destinations")
    table = bytes_of(*(memory.put(name, getattr(made, name)) for name in columns))
    issued = {}
    for path, name in enumerate(PATHS):
        first, count = made.borders[path], made.borders[path + 1] - made.borders[path]
        if count:
            kernel = program.kernel("copy_tiles", f"PathE{path}")
            teams = kernel.threads // team if name == "rows" else 1
            given = table, bytes_of(first), np.uint32(count).tobytes()
            issued[name] = launch(program, kernel, memory, -(-count // teams), given)
    return issued


def _cut(made: Tiles, units: int) -> Tiles:
    """The same rows in tiles of so many units."""
    if units == TEAM * FLIGHT:
        return made
    rows = made.rows.copy()
    count = np.bincount(made.owner, minlength=len(rows))
    count = np.where(rows["path"] == ROWS, -(-count * TEAM * FLIGHT // units), count)
    ends = np.cumsum(count)
    rows["first_tile"] = ends - count
    owner = np.repeat(np.arange(len(rows), dtype=np.uint32), count)
    borders = np.searchsorted(rows["path"][owner], np.arange(4)).tolist()
    return replace(made, rows=rows, owner=owner, borders=tuple(borders))


def digests(memory: Global, leaves: np.ndarray, out: int, target: Target = DEFAULT) -> Counted:
    """Digests of leaves that lie in this memory, [n, (address, nbytes)], to the u64 at `out`."""
    program = compiled("digest_cuda.cu", target).program
    given = memory.put("leaves", leaves), len(leaves), out
    blocks = -(-len(leaves) // LEAVES_OF_BLOCK)
    return launch(program, program.kernel("digest_leaves"), memory, blocks, [bytes_of(x) for x in given])


def quantise(memory: Global, rows: np.ndarray, owner: np.ndarray, target: Target = DEFAULT) -> Counted:
    """Quantises the tiles of rows (QUANT_ROWS) whose buffers lie in this memory."""
    program = compiled("quant_cuda.cu", target).program
    given = memory.put("rows", rows), memory.put("owner", owner), 0
    kernel = program.kernel("quantise_tiles")
    return launch(program, kernel, memory, len(owner), [bytes_of(x) for x in given])
