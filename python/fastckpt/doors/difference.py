"""What differs between two checkpoints of any formats: names, shapes, dtypes, bits, values.

Law: memory is bounded; both sides are brought through the road leaf by leaf, and no tensor is held whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .. import sources
from ..checkpoint import JSON, Checkpoint, Entry
from ..dtypes import DType, bfloat16, complex32
from ..errors import ViewError, expect
from ..opening import TIES_UNSAID, join
from ..opening import open as open_checkpoint
from ..quantisation.unrounding import unpacked
from ..recipes import strangers
from ..road import stream
from ..running.runs import Progress
from ..sources.megatron_args import FORMAT as MEGATRON
from ..sources.served import SHARDS
from .text import counted, some

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.float64] | NDArray[np.complex128]
TRAINED = ("zero", MEGATRON)
"""What a trainer left, with tags and masters."""


@dataclass(frozen=True, slots=True)
class Unequal:
    """A tensor of both sides whose bits or dtypes differ.

    `max_abs`: the largest |a - b| over float64 values; NaN equals NaN, and NaN against a number counts as
    infinity. `differing`: elements whose values differ; `bits`: elements of one dtype whose bits differ and
    values do not (-0.0 and 0.0, NaN payloads)."""

    name: str
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    max_abs: float
    differing: int
    bits: int

    @property
    def text(self) -> str:
        """The tensor and what differs, on one line."""
        kind = self.dtype_a if self.dtype_a == self.dtype_b else f"{self.dtype_a} against {self.dtype_b}"
        if self.differing:
            values = f"max abs diff {self.max_abs:.6g}, {counted(self.differing, 'element')}"
        else:
            values = "all values equal"
        bits = f", {counted(self.bits, 'element')} in bits alone" if self.bits else ""
        return f"{self.name}: {kind}, {values}{bits}"

    def json(self) -> dict[str, JSON]:
        """The fields; an infinite `max_abs` as the string "inf"."""
        return {
            "name": self.name,
            "shape": [*self.shape],
            "dtypes": [self.dtype_a, self.dtype_b],
            "max_abs": "inf" if self.max_abs == float("inf") else self.max_abs,
            "differing": self.differing,
            "bits": self.bits,
        }


@dataclass(frozen=True, slots=True)
class Diff:
    """Two checkpoints held side by side.

    `only_a`, `only_b`: names that one side lacks. `shapes`: (name, shape in a, shape in b). `unequal`:
    tensors of one shape whose bits or dtypes differ. `ties`: names that are a tied name on one side and left
    out on the other, whose config ties them; no difference. `tensors`, `nbytes`: what was compared, in bytes
    of side a."""

    a: str
    b: str
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unequal: tuple[Unequal, ...]
    ties: tuple[str, ...]
    tensors: int
    nbytes: int

    @property
    def equal(self) -> bool:
        """Whether names, shapes, dtypes and every bit agree."""
        return not (self.only_a or self.only_b or self.shapes or self.unequal)

    @property
    def max_abs(self) -> float:
        """The largest difference of any tensor that both sides hold in one shape."""
        return max((u.max_abs for u in self.unequal), default=0.0)

    def text(self) -> str:
        """What differs, at most SHOWN names of a kind, and one line of judgement."""
        lines = [f"a  {self.a}", f"b  {self.b}"]
        for side, names in (("a", self.only_a), ("b", self.only_b)):
            lines += some(f"only in {side}", names)
            lines += [f"  {way}"] if (way := strangers.wrapped(names)) else []
        lines += some("tied, named on one side only", self.ties)
        shapes = [f"{name}: {list(x)} against {list(y)}" for name, x, y in self.shapes]
        lines += some("shapes", shapes)
        lines += some("values, bits or dtypes", [u.text for u in self.unequal])
        whole = f"{counted(self.tensors, 'tensor')}, {self.nbytes} bytes compared"
        if self.equal:
            lines.append(f"bit-equal: {whole}")
        elif not (self.only_a or self.only_b or self.shapes or any(u.differing for u in self.unequal)):
            lines.append(f"different, but in no value: {whole}")
        else:
            lines.append(f"different: {whole}, max abs diff {self.max_abs:.6g}")
        return "\n".join(lines)

    def json(self) -> dict[str, JSON]:
        """All of it as JSON values."""
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "only_a": [*self.only_a],
            "only_b": [*self.only_b],
            "shapes": [{"name": n, "shapes": [[*x], [*y]]} for n, x, y in self.shapes],
            "unequal": [u.json() for u in self.unequal],
            "ties": [*self.ties],
            "tensors": self.tensors,
            "bytes": self.nbytes,
        }


def diff(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    *,
    tag: str | None = None,
    rename: Sequence[tuple[str, str]] = (),
    weights: str = "master",
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints, paths or opened: names, shapes, dtypes, and every value of what both hold.

    `tag`, `rename`, `weights` and `config` are those of `open` and hold for the sides given as paths; all but
    `rename` for a trainer's side (ZeRO, Megatron) alone where the other is none. `progress` gets (bytes done,
    bytes in all, "compare"), bytes of side a. Shards that were cut alike are compared as they lie, by
    "rank/name", others as the models they make. Raises SourceError as `open` does."""
    expect("progress", progress, Callable, type(None))  # type: ignore[arg-type]
    trained = [c for c in (a, b) if isinstance(c, (str, os.PathLike)) and sources.format_of(c) in TRAINED]
    one, two = (
        c if isinstance(c, Checkpoint)
        else open_checkpoint(c, tag=tag, rename=rename, weights=weights, config=config)
        if c in trained or not trained
        else open_checkpoint(c, rename=rename)
        for c in (a, b)
    )  # fmt: skip
    # A trainer's checkpoint that no config speaks of is what the other side's config says.
    one, two = (
        join(c, None, other.config) if c.format in (MEGATRON, *TIES_UNSAID) and other.config else c
        for c, other in ((one, two), (two, one))
    )
    if not isinstance(a, Checkpoint) and not isinstance(b, Checkpoint):
        one, two = _as_they_lie(one, two)
    return _difference(one, two, progress)


def _difference(one: Checkpoint, two: Checkpoint, progress: Progress | None) -> Diff:
    """`diff` of two opened checkpoints."""
    names_a, names_b = ({*c.entries, *c.aliases} for c in (one, two))
    ties = {n for n in names_a ^ names_b if _tied(n, one, two)}
    # A name tied to one holder on both sides is compared with its holder.
    both = [
        n
        for n in (*one.entries, *one.aliases)
        if n in names_b and (n not in one.aliases or one.aliases[n] != two.aliases.get(n))
    ]
    entries = {n: (_entry(one, n), _entry(two, n)) for n in both}
    same = {n: (x, y) for n, (x, y) in entries.items() if x.shape == y.shape}
    total = sum(_nbytes(x) for x, _ in same.values())
    left, right = (_leaves(c, [n for n, (x, _) in same.items() if 0 not in x.shape]) for c in (one, two))
    unequal: list[Unequal] = []
    done = 0
    for name, (x, y) in same.items():
        pairs = _pairs(_pieces(left, name, x), _pieces(right, name, y), x.dtype, y.dtype)
        found = _compare(pairs, x.dtype, y.dtype)
        if found is not None:
            unequal.append(Unequal(name, x.shape, x.dtype.name, y.dtype.name, *found))
        done += _nbytes(x)
        if progress is not None:
            progress(done, total, "compare")
    return Diff(
        one.path,
        two.path,
        tuple(sorted(names_a - names_b - ties)),
        tuple(sorted(names_b - names_a - ties)),
        tuple((n, x.shape, y.shape) for n, (x, y) in entries.items() if n not in same),
        tuple(unequal),
        tuple(sorted(ties)),
        len(same),
        total,
    )


def _as_they_lie(one: Checkpoint, two: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Shards that were cut alike, each tensor named "rank/name": a model joined of them has one rank's copy
    of what several hold, and the others may differ."""
    if one.format == two.format == "served":
        a, b = sources.open(one.path), sources.open(two.path)
        if a.format == b.format == SHARDS and a.entries.keys() == b.entries.keys():
            return a, b
    return one, two


def _entry(ckpt: Checkpoint, name: str) -> Entry:
    return ckpt.entries[ckpt.aliases.get(name, name)]


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _tied(name: str, one: Checkpoint, two: Checkpoint) -> bool:
    """Whether the side without `name` holds its bytes under another of its tied names, as a config says."""
    if not any(c.config and c.config.get("tie_word_embeddings") is True for c in (one, two)):
        return False
    have, lack = (one, two) if name in one else (two, one)
    holder = have.aliases.get(name, name)
    group = {holder, *(n for n, h in have.aliases.items() if h == holder)} - {name}
    return any(n in lack for n in group)


# ---- bytes of both sides, in step ----


def _leaves(ckpt: Checkpoint, names: Sequence[str]) -> Iterator[tuple[str, int, memoryview]]:
    """The bytes of `names` in order; a tied name gives its holder's."""
    plain = replace(ckpt, entries={n: _entry(ckpt, n) for n in names}, aliases={})
    return iter(stream(plain, names))


def _pieces(leaves: Iterator[tuple[str, int, memoryview]], name: str, entry: Entry) -> Iterator[Bytes]:
    """The bytes of the next tensor of a stream, which must be `name`; a piece lives until the next one."""
    done, total = 0, _nbytes(entry)
    while done < total:
        got, at, piece = next(leaves)
        if got != name or at != done:
            raise ViewError(f"diff: wanted {name} from byte {done}, the stream gave {got} from byte {at}")
        done += len(piece)
        yield np.frombuffer(piece, np.uint8)


def _pairs(
    left: Iterator[Bytes], right: Iterator[Bytes], dtype_a: DType, dtype_b: DType
) -> Iterator[tuple[Bytes, Bytes]]:
    """The bytes of equally many elements of both sides, whatever the sizes of their pieces."""
    a = b = np.empty(0, np.uint8)
    while True:
        if not len(a):
            a = next(left, a)
        if not len(b):
            b = next(right, b)
        count = min(len(a) // dtype_a.itemsize, len(b) // dtype_b.itemsize)
        if not count:
            return
        cut_a, cut_b = count * dtype_a.itemsize, count * dtype_b.itemsize
        yield a[:cut_a], b[:cut_b]
        a, b = a[cut_a:], b[cut_b:]


def _compare(
    pairs: Iterator[tuple[Bytes, Bytes]], dtype_a: DType, dtype_b: DType
) -> tuple[float, int, int] | None:
    """The largest difference, how many elements differ, and how many in bits alone; None where dtype and
    every bit agree."""
    equal = dtype_a is dtype_b
    worst, differing, bits = 0.0, 0, 0
    for a, b in pairs:
        if dtype_a is dtype_b and np.array_equal(a, b):
            continue
        equal = False
        apart = _distances(a, b, dtype_a, dtype_b)
        worst = max(worst, float(apart.max()))
        differing += int(np.count_nonzero(apart))
        if dtype_a is dtype_b:
            other = (a.reshape(-1, dtype_a.itemsize) != b.reshape(-1, dtype_a.itemsize)).any(axis=1)
            bits += int(np.count_nonzero(other & (apart == 0)))
    return None if equal else (worst, differing, bits)


def _distances(a: Bytes, b: Bytes, dtype_a: DType, dtype_b: DType) -> NDArray[np.generic]:
    """|a - b| by element: exact for integers of one type, else over float64 (complex128) values."""
    if dtype_a is dtype_b and dtype_a.kind != "float" and dtype_a.kind != "complex":
        x, y = a.view(_raw(dtype_a)), b.view(_raw(dtype_b))
        return np.maximum(x, y).astype(np.uint64) - np.minimum(x, y).astype(np.uint64)  # wraps to the truth
    with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN is told of when it is widened
        x, y = _values(a, dtype_a), _values(b, dtype_b)
        alike = (x == y) | (np.isnan(x) & np.isnan(y))
        apart = np.where(alike, 0.0, np.abs(x - y))
    return np.where(np.isnan(apart), np.inf, apart)


def _values(data: Bytes, dtype: DType) -> Numbers:
    """The elements as float64, or as complex128."""
    if dtype is bfloat16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype is complex32:
        return data.view(np.float16).astype(np.float32).view(np.complex64).astype(np.complex128)
    if dtype.kind == "float" and dtype.itemsize == 1:
        return unpacked(data, dtype.name).astype(np.float64)
    return data.view(_raw(dtype)).astype(np.complex128 if dtype.kind == "complex" else np.float64)


def _raw(dtype: DType) -> np.dtype[np.generic]:
    """numpy's type for the elements; bytes for what numpy does not know."""
    if dtype.kind == "bool":
        return np.dtype(np.uint8)
    try:
        return np.dtype(dtype.name)
    except TypeError:
        return np.dtype(f"u{dtype.itemsize}")
