"""A dense checkpoint as a quantised one, before any layout sees it: its values and scales lie in no file and
are made when they are read.

A layout that fuses, turns or stacks matrices must place their scales too, and it knows how to from sources
that are quantised already. So the dense checkpoint is made to look like one (for `rtp_llm`, and for vLLM
where each fused matrix keeps its own scale). `quantised_targets` is the faster way, for layouts that keep
the hub's matrices.

Law: an element is the same number however it is asked for; scales are those of the hub's uncut matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from threading import Lock
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import JSON, Checkpoint, Entry, Single, moved
from ..dtypes import DType, float16, int32
from ..errors import LayoutError
from ..extents import Buffer, Extent, Extents
from ..quantisation.quantised_config import quantization_config
from ..quantisation.rounding import (
    DENSE,
    Error,
    Floats,
    amax,
    error_of,
    not_finite,
    quantise,
    scale_of,
    stored_zeros,
)
from ..quantisation.schemes import Quant, Scheme
from ..stored import constant
from ..views import View
from .nowhere import nowhere, pitched

PIECE = 1 << 21
"""Dense bytes made at once, unless one row of blocks is more."""

Elements = NDArray[np.generic]


class Asker(Protocol):
    """Gives dense elements, and takes how far the quantised values lie from them."""

    def dense(self, view: View, *, scan: bool = False) -> Elements:
        """The elements of a view, in its shape and dtype; `scan`: for scales alone."""

    def add_error(self, matrix: Matrix, error: Error) -> None:
        """Adds the error of some quantised values of a matrix."""


@dataclass(slots=True, eq=False)
class Matrix:
    """A dense matrix to be quantised by `scheme`. `shape`: [outputs, inputs], or [inputs, outputs] where the
    scheme stores it turned; `build` gives the dense view [outputs, inputs].

    Remembered between calls: `_found`, the largest magnitude of each row (-1: not known yet), and `_blocks`,
    the scales of blocks of several rows (NaN: not known yet)."""

    name: str
    dtype: DType
    shape: tuple[int, int]
    scheme: Scheme
    build: Callable[[], View]
    _view: View | None = None
    _found: Floats | None = None
    _blocks: Floats | None = None
    _lock: Lock = field(default_factory=Lock)

    def dense(
        self, ask: Asker, r0: int, r1: int, c0: int, c1: int, *, scan: bool = False
    ) -> NDArray[np.uint8]:
        """The bytes of a dense box, as `quantise` takes them."""
        view = self._view
        if view is None:
            self._view = view = self.build()
        rows, columns = (1, 0) if self.scheme.turned else (0, 1)
        box = view.narrow(rows, r0, r1 - r0).narrow(columns, c0, c1 - c0)
        return np.ascontiguousarray(ask.dense(box, scan=scan)).reshape(-1).view(np.uint8)

    def pitch(self, rows: int) -> int:
        """The bytes between the columns of a box of so many rows, where it lies turned."""
        return rows * self.dtype.itemsize if self.scheme.turned else 0

    def largest(self, ask: Asker, r0: int, r1: int, held: NDArray[np.uint8] | None = None) -> Floats:
        """The largest magnitudes that the scales of rows [r0, r1) come from: each row's, or for one scale a
        matrix that of all rows.

        `held`: the bytes of those rows where they were read whole; without it, rows that are not known yet
        are read."""
        if self.scheme.block[0] == 0:
            with self._lock:  # else every worker reads the whole matrix
                return np.repeat(self._rows(ask, 0, self.shape[0]).max(), r1 - r0)
        return self._rows(ask, r0, r1, held)

    @property
    def blocks(self) -> Floats:
        """The scales of blocks of several rows that were found so far, NaN for the others."""
        with self._lock:
            if self._blocks is None:
                self._blocks = np.full(self.scheme.grid(*self.shape), np.nan, np.float32)
            return self._blocks

    def _rows(self, ask: Asker, r0: int, r1: int, held: NDArray[np.uint8] | None = None) -> Floats:
        rows, columns = self.shape
        if self._found is None:
            self._found = np.full(rows, -1, np.float32)
        found = self._found
        step = max(1, PIECE // (columns * self.dtype.itemsize)) if held is None else r1 - r0
        for a in range(r0, r1, step):
            b = min(r1, a + step)
            if (found[a:b] < 0).any():
                dense = self.dense(ask, a, b, 0, columns, scan=True) if held is None else held
                largest = amax(dense, self.dtype, b - a, columns)
                if not np.isfinite(largest).all():
                    raise not_finite(self.name, a, b)
                found[a:b] = largest
        return found[r0:r1]


Kind = Literal["values", "scales", "zeros"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One of the tensors that a quantised matrix is stored as: values, scales or zero points. `stored`: its
    shape in the file."""

    matrix: Matrix
    kind: Kind
    name: str
    dtype: DType
    stored: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """`stored` as rows and columns: [1, 1] for a vector of one."""
        return (self.stored[0], self.stored[1]) if len(self.stored) == 2 else (1, 1)

    def box(self, ask: Asker, r0: int, r1: int, c0: int, c1: int) -> Elements:
        """The elements of rows [r0, r1) and columns [c0, c1). Raises SourceError for what is not finite."""
        match self.kind:
            case "values":
                return _values(self.matrix, ask, r0, r1, c0, c1)
            case "scales":
                scales, _ = _scales(self.matrix, ask, r0, r1, c0, c1)
                return scales.astype(np.float16) if self.matrix.scheme.scale_dtype is float16 else scales
            case "zeros":
                return _zeros(self.matrix, ask, r0, r1, c0, c1)


def _values(m: Matrix, ask: Asker, r0: int, r1: int, c0: int, c1: int) -> Elements:
    """Rows [r0, r1) and columns [c0, c1) of the values as they are stored: bytes, or int32 of packed ones."""
    scheme, (rows, columns) = m.scheme, m.shape
    item, kind = (np.int32, "<i4") if scheme.dtype is int32 else (np.int8, "i1")
    tall, wide = _packing(scheme)
    down, across = scheme.block
    # Boxes grow to the blocks they cut, since those share a scale.
    top, bottom = r0 * tall, r1 * tall
    left, right = c0 * wide, c1 * wide
    first, last = (left, right) if across < 2 else _whole(left, right, across, columns)
    out = np.empty((r1 - r0, c1 - c0), item)
    unit = max(down, tall)
    step = unit * max(1, PIECE // ((last - first) * m.dtype.itemsize * unit))
    for a in range(top // unit * unit, bottom, step):
        b = min(a + step, -(-bottom // unit) * unit, rows)
        n, width = b - a, last - first
        dense = m.dense(ask, a, b, first, last)
        whole = dense if (first, last) == (0, columns) else None
        largest = m.largest(ask, a, b, whole) if across == 0 else None
        made = np.empty(n * width * scheme.bits // 8, np.uint8)
        found = quantise(dense, m.dtype, n, width, scheme, largest, made, pitch=m.pitch(n))
        if found is None:
            raise not_finite(m.name, a, b)
        if down > 1 and across > 1:
            m.blocks[a // down : -(-b // down), first // across : -(-last // across)] = found.scales
        held = slice(max(a, top), min(b, bottom)), slice(left, right)
        if (a, b, first, last) == (held[0].start, held[0].stop, left, right):
            ask.add_error(m, found.error)
        else:  # of what was asked for alone, so that no value counts twice
            mine = slice(held[0].start - a, held[0].stop - a), slice(left - first, right - first)
            ask.add_error(m, error_of(dense, m.dtype, (n, width), scheme, found, made, mine))
        box = made.view(kind).reshape(n // tall, width // wide)
        box = box[(held[0].start - a) // tall : (held[0].stop - a) // tall, (left - first) // wide :]
        out[held[0].start // tall - r0 : held[0].stop // tall - r0] = box[:, : c1 - c0]
    return out


def _scales(m: Matrix, ask: Asker, r0: int, r1: int, c0: int, c1: int) -> tuple[Floats, NDArray[np.int8]]:
    """Scales and zero points [r0, r1) x [c0, c1) of a matrix's grid, as fp32 and whole numbers."""
    scheme, (rows, columns) = m.scheme, m.shape
    down, across = scheme.block
    if across == 0:  # of a row, or of all
        one = scale_of(m.largest(ask, r0, r1 if down else r0 + 1), scheme)
        if not np.isfinite(one).all():
            raise not_finite(m.name, r0, r1)
        return one.reshape(-1, 1), np.zeros((r1 - r0, 1), np.int8)
    if down > 1 and across > 1 and not np.isnan(known := m.blocks[r0:r1, c0:c1]).any():
        return known.copy(), np.zeros(known.shape, np.int8)
    left, right = c0 * across, min(columns, c1 * across)
    scales, zeros = np.empty((r1 - r0, c1 - c0), np.float32), np.empty((r1 - r0, c1 - c0), np.int8)
    step = max(1, PIECE // ((right - left) * m.dtype.itemsize * down))
    for a in range(r0, r1, step):
        b = min(r1, a + step)
        top, bottom = a * down, min(rows, b * down)
        dense = m.dense(ask, top, bottom, left, right, scan=True)
        n, width = bottom - top, right - left
        out = np.empty(n * width * scheme.bits // 8, np.uint8)
        found = quantise(dense, m.dtype, n, width, scheme, None, out, pitch=m.pitch(n))
        if found is None:
            raise not_finite(m.name, top, bottom)
        scales[a - r0 : b - r0], zeros[a - r0 : b - r0] = found.scales, found.zeros
    return scales, zeros


def _zeros(m: Matrix, ask: Asker, r0: int, r1: int, c0: int, c1: int) -> NDArray[np.int32]:
    """Zero points as the format packs them: eight outputs an int32."""
    grid = m.scheme.grid(*m.shape)
    tall, wide = (1, 8) if m.scheme.turned else (8, 1)
    rows, columns = (r0 * tall, min(grid[0], r1 * tall)), (c0 * wide, min(grid[1], c1 * wide))
    return stored_zeros(_scales(m, ask, *rows, *columns)[1], m.scheme)


def _packing(scheme: Scheme) -> tuple[int, int]:
    """Rows and columns of the matrix that one stored element holds."""
    many = 8 * scheme.dtype.itemsize // scheme.bits
    return (many, 1) if scheme.packed == "down" else (1, many)


def _whole(start: int, stop: int, block: int, end: int) -> tuple[int, int]:
    """[start, stop) grown to whole blocks, the last of which ends at `end`."""
    return start // block * block, min(end, -(-stop // block) * block)


PLACES: Mapping[str, frozenset[str]] = {
    "rtp_llm": frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8", "awq", "gptq"}),
    "vllm": frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8", "awq", "gptq"}),
}
"""layout -> the formats whose tensors it places when the source has them. vLLM needs that where a scale is
one for a whole matrix, where experts of four bits become a stack, and where an engine holds more tensors of
such a model."""


def fits(layout: str, engine: str, ckpt: Checkpoint, quant: Quant) -> bool:
    """Whether `made` makes the quantised tensors for that layout (else `quantised_targets` does).

    `engine`: the version whose names it uses, "" for none. Raises LayoutError where that engine's form of
    them is not known."""
    scheme = quant.scheme
    found = scheme.format in PLACES.get(layout, ())
    if engine and not found:
        raise LayoutError(
            f"quant {scheme.name}: how engine {engine} holds it is not known; wanted int8, fp8 or four bits"
        )
    if not found or layout != "vllm" or engine or scheme.block == (0, 0):
        return found
    return scheme.bits == 4 and any(
        ".experts." in name and quant.takes(name, entry.shape) for name, entry in ckpt.entries.items()
    )


def made(ckpt: Checkpoint, config: Mapping[str, JSON], quant: Quant) -> tuple[Checkpoint, dict[str, JSON]]:
    """The checkpoint with every chosen matrix as its values and what goes with them, and the config that says
    so. `quant`'s patterns are of the checkpoint's names.

    Raises LayoutError where a pattern names nothing, nothing is chosen, or a matrix does not fit."""
    at = f"quant {quant.scheme.name}"
    for pattern in (*quant.include, *quant.exclude):
        if not any(fnmatchcase(name, pattern) for name in ckpt.entries):
            tied = [f"; {a} is tied to {h}" for a, h in ckpt.aliases.items() if fnmatchcase(a, pattern)]
            raise LayoutError(f"{at}: {pattern!r} names no tensor of {ckpt.path}{''.join(tied[:1])}")
    shapes = {name: entry.shape for name, entry in ckpt.entries.items()}
    parts = {n: tuple(_parts(n, e, quant.scheme)) for n, e in ckpt.entries.items() if quant.takes(n, e.shape)}
    for name, entry in ckpt.entries.items():
        quant.require_named(name, entry.shape)
    if not parts:
        raise LayoutError(f"{at}: no tensor is a matrix known by name; say which with include patterns")
    for alias, holder in ckpt.aliases.items():
        if holder in parts:
            raise LayoutError(f"{at}: {alias} is tied to {holder}, and would not find its scales")
    new = (
        nowhere(part, part.shape, part.dtype, f"{part.kind} of {name}")
        for name, some in parts.items()
        for part in some
    )
    extents, index = Extents((*ckpt.extents, *new)), len(ckpt.extents)
    entries: dict[str, Entry] = {}
    for name, entry in ckpt.entries.items():
        if name not in parts:
            entries[name] = moved(entry, extents)
            continue
        for part in parts[name]:
            entries[part.name] = Single(part.stored, part.dtype, _view(extents, index, part), entry.kind)
            index += 1
        if quant.scheme.form:
            entries[quant.scheme.named(name, quant.scheme.form)] = _form(parts[name][0].matrix, entry.kind)
    new_config = {**config, "quantization_config": quantization_config(quant, shapes)}
    return replace(ckpt, entries=entries, extents=extents, config=new_config), new_config


def owner(extent: Extent) -> Part | None:
    """The part of a matrix that an extent stands for; None for any other."""
    found = extent.where.owner if isinstance(extent.where, Buffer) else None
    return found if isinstance(found, Part) else None


def dense_bytes(extents: Extents) -> NDArray[np.float64]:
    """By extent, how many dense bytes must be read for one byte of it; 0 for scales, since the values read
    the same ones. Empty where nothing is quantised as it is read."""
    each = np.ones(len(extents))
    for i, extent in enumerate(extents):
        if (part := owner(extent)) is not None:
            m = part.matrix
            each[i] = 8 * m.dtype.itemsize / m.scheme.bits if part.kind == "values" else 0.0
    return each if (each != 1).any() else each[:0]


def _parts(name: str, entry: Entry, scheme: Scheme) -> Iterator[Part]:
    """What is stored of a chosen tensor. Raises LayoutError where it does not fit the scheme."""
    at = f"quant {scheme.name}: {name} {entry.shape}"
    if entry.dtype not in DENSE:
        raise LayoutError(f"{at} is {entry.dtype}: wanted {', '.join(d.name for d in DENSE)}")
    if len(entry.shape) != 2:
        raise LayoutError(
            f"{at}: a stack of matrices is not quantised for this layout; write it as hf first, "
            "with split_experts=True (-L split_experts=true)"
        )
    outputs, inputs = entry.shape
    if scheme.bits == 4 and inputs % scheme.shared[1]:
        raise LayoutError(f"{at}: wanted a matrix whose columns divide by the group {scheme.shared[1]}")
    if scheme.turned and (outputs % 8 or not name.endswith("weight")):
        raise LayoutError(f"{at}: wanted a weight whose rows divide by 8, which share an int32")
    shape = (inputs, outputs) if scheme.turned else (outputs, inputs)
    matrix = Matrix(name, entry.dtype, shape, scheme, entry.build)
    yield Part(matrix, "values", scheme.named(name, scheme.values), scheme.dtype, scheme.stored_shape(shape))
    scales = scheme.scale_shape(shape)
    yield Part(matrix, "scales", scheme.named(name, scheme.scale), scheme.scale_dtype, scales)
    if scheme.zero:
        yield Part(matrix, "zeros", scheme.named(name, scheme.zero), scheme.dtype, scheme.zero_shape(shape))


def _view(extents: Extents, index: int, part: Part) -> Callable[[], View]:
    return lambda: pitched(extents, index, part.dtype, part.shape).reshape(part.stored)


def _form(matrix: Matrix, kind: str) -> Entry:
    """The tensor that says the dense shape, or the group of every input."""
    dtype = matrix.scheme.form_dtype
    values = np.array(matrix.scheme.form_values(matrix.shape), np.int32 if dtype is int32 else np.int64)
    return Single(values.shape, dtype, lambda: constant(values, dtype), kind)
