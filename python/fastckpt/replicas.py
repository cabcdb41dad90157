"""What a checkpoint holds more than once: its copies are compared before one of them is taken.

Law: a run makes nothing of a checkpoint whose replicas differ. Up to WHOLE bytes they are compared whole, the
smallest first, the others in samples, which a note says; what two names share (`always`) is compared whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from .checkpoint import Checkpoint, Replica
from .errors import SourceError
from .extents import Extents, File
from .leaves import leaves
from .sources.samples import located
from .views import View

WHOLE = 1 << 30
"""Bytes of replicas that one run reads to compare them whole."""

SPOTS, SPOT = 16, 64
"""How many places are looked at of a replica that is compared in samples, evenly from its first element to
its last, and the most elements of each."""

Chosen = Sequence[tuple[Replica, bool]]
"""Replicas, and whether each is compared whole."""


def compare(ckpt: Checkpoint) -> tuple[int, tuple[str, ...]]:
    """The bytes that were read for it, and notes on what was not compared whole.

    Raises SourceError naming the first tensor whose replicas differ, and where they lie."""
    if not ckpt.replicas:
        return 0, ()
    nbytes = np.array([_nbytes(replica, ckpt.path) for replica in ckpt.replicas], np.int64)
    order = np.argsort(nbytes, kind="stable")
    whole = np.array([replica.always for replica in ckpt.replicas])
    whole[order] |= 2 * np.cumsum(nbytes[order]) <= WHOLE
    chosen = [*zip(ckpt.replicas, whole.tolist(), strict=True)]
    read = 0
    for number, at, a, b in _in_step(chosen, ckpt.extents):
        read += len(a) + len(b)
        if not np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)):
            pair = next(itertools.islice(_pairs(chosen), number, None))
            raise SourceError(f"{ckpt.path}: {_told(*pair, at, bytes(a), bytes(b))}")
    if whole.all():
        return read, ()
    return read, (
        f"{np.count_nonzero(~whole)} replicas of {nbytes[~whole].sum()} bytes were compared in samples, not "
        f"whole, such as {ckpt.replicas[int(np.argmin(whole))].what}",
    )


def _nbytes(replica: Replica, path: str) -> int:
    """Its bytes. Raises SourceError where both sides are not of one kind."""
    kept, other = replica.kept(), replica.other()
    if (kept.shape, kept.dtype) != (other.shape, other.dtype):
        raise SourceError(
            f"{path}: {replica.what}: {kept.dtype}{list(kept.shape)} and {other.dtype}{list(other.shape)}"
        )
    return kept.nbytes


def _in_step(chosen: Chosen, extents: Extents) -> Iterator[tuple[int, int, memoryview, memoryview]]:
    """(number of a pair, offset in bytes, the bytes of both sides from there on), leaf by leaf."""
    kept = leaves(((str(k), view) for k, (_, view, _) in enumerate(_pairs(chosen))), extents)
    other = leaves(((str(k), view) for k, (_, _, view) in enumerate(_pairs(chosen))), extents)
    for (name, at, a), (_, _, b) in zip(kept, other, strict=True):
        yield int(name), at, a, b


def _pairs(chosen: Chosen) -> Iterator[tuple[Replica, View, View]]:
    """What is compared of both sides: all of a replica, or spots of it."""
    for replica, whole in chosen:
        kept, other = replica.kept(), replica.other()
        if whole:
            yield replica, kept, other
        else:
            yield from ((replica, a, b) for a, b in zip(_spots(kept), _spots(other), strict=True))


def _spots(view: View) -> Iterator[View]:
    """Short runs along the last axis."""
    view = view if view.shape else view.reshape((1,))
    n = min(SPOT, view.shape[-1])
    for i in sorted({k * (view.numel - 1) // (SPOTS - 1) for k in range(SPOTS)}):
        *outer, last = (int(at) for at in np.unravel_index(i, view.shape))
        part = view
        for axis, at in enumerate(outer):
            part = part.narrow(axis, at, 1)
        yield part.narrow(view.ndim - 1, min(last, view.shape[-1] - n), n)


def _told(replica: Replica, kept: View, other: View, at: int, a: bytes, b: bytes) -> str:
    """Which element differs, and where both of its values lie; `a`, `b`: bytes of both, from byte `at` on."""
    item = kept.dtype.itemsize
    k = next(k for k in range(0, len(a), item) if a[k : k + item] != b[k : k + item])
    element = (at + k) // item
    one, two = (
        f"{data[k : k + item][::-1].hex()} in {_place(view, element)}"
        for view, data in ((kept, a), (other, b))
    )
    return f"{replica.what}: a {kept.dtype} is {one} and {two}: which one is meant is in doubt"


def _place(view: View, element: int) -> str:
    """The file that an element lies in, and what is stored there."""
    extent, offset, _ = located(view, element)
    where = extent.where.path if isinstance(extent.where, File) else "memory"
    return f"{where} ({extent.key}, byte {offset})"
