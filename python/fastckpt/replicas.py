"""What a checkpoint holds more than once: its copies are compared before one of them is taken.

Law: a run makes nothing of a checkpoint whose replicas differ, unless it was opened for the first of each. Up
to WHOLE bytes they are compared whole, the smallest first, the others in samples, which a note says; what two
names share (`always`) is compared whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from .checkpoint import Checkpoint, Replica
from .errors import SourceError
from .extents import Extents, File
from .leaves import leaves
from .sources.samples import located, positions, sampled_bytes
from .views import View

WHOLE = 1 << 30
"""Bytes of replicas that one run reads to compare them whole."""

SAMPLES = 64
"""Elements that are compared of any other, evenly from the first to the last."""

AT_ONCE = 1 << 10
"""Replicas whose samples are read together."""


def compare(ckpt: Checkpoint) -> tuple[int, tuple[str, ...]]:
    """The bytes that were read for it, and notes on what was not compared whole, and on what differs.

    Raises SourceError naming the first tensor whose replicas differ, and where they lie, unless the first is
    to be taken."""
    nbytes = np.array([_nbytes(replica, ckpt.path) for replica in ckpt.replicas], np.int64)
    order = np.argsort(nbytes, kind="stable")
    whole = np.array([replica.always for replica in ckpt.replicas], bool)
    whole[order] |= 2 * np.cumsum(nbytes[order]) <= WHOLE
    rest = [ckpt.replicas[i] for i in np.flatnonzero(~whole)]
    all_of = [ckpt.replicas[i] for i in np.flatnonzero(whole)]
    drifted: list[str] = []
    for found in chain(_in_samples(rest), _in_whole(all_of, ckpt.extents)):
        if not ckpt.take_first:
            raise SourceError(
                f"{ckpt.path}: {found}: which one is meant is in doubt; replicas='first' (--replicas first) "
                "takes the first"
            )
        drifted.append(found)
    notes: list[str] = []
    if rest:
        sampled = f"{len(rest)} replicas of {nbytes[~whole].sum()} bytes"
        notes += [f"{sampled} were compared in samples, not whole, such as {rest[0].what}"]
    if drifted:
        notes += [f"{len(drifted)} replicas differ, and the first was taken, such as {drifted[0]}"]
    return 2 * int(nbytes[whole].sum()), tuple(notes)


def _nbytes(replica: Replica, path: str) -> int:
    """Its bytes. Raises SourceError where both sides are not of one kind."""
    kept, other = replica.kept(), replica.other()
    if (kept.shape, kept.dtype) != (other.shape, other.dtype):
        raise SourceError(
            f"{path}: {replica.what}: {kept.dtype}{list(kept.shape)} and {other.dtype}{list(other.shape)}"
        )
    return kept.nbytes


def _in_samples(replicas: Sequence[Replica]) -> Iterator[str]:
    """Those of which a sample differs, in words."""
    for first in range(0, len(replicas), AT_ONCE):
        some = replicas[first : first + AT_ONCE]
        views = [view for replica in some for view in (replica.kept(), replica.other())]
        seen = sampled_bytes(views, SAMPLES)
        for k, replica in enumerate(some):
            pairs = zip(positions(views[2 * k], SAMPLES), seen[2 * k], seen[2 * k + 1], strict=True)
            if odd := next(((i, a, b) for i, a, b in pairs if a != b), None):
                yield _difference(replica, *odd)


def _in_whole(replicas: Sequence[Replica], extents: Extents) -> Iterator[str]:
    """Those that differ, in words."""
    kept = leaves(((str(k), replica.kept()) for k, replica in enumerate(replicas)), extents)
    other = leaves(((str(k), replica.other()) for k, replica in enumerate(replicas)), extents)
    found = -1
    for (name, at, a), (_, _, b) in zip(kept, other, strict=True):
        differs = np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)
        if int(name) != found and differs.any():
            found = int(name)
            replica = replicas[found]
            item = replica.kept().dtype.itemsize
            k = int(differs.argmax()) // item
            one, two = (bytes(data[k * item : (k + 1) * item]) for data in (a, b))
            yield _difference(replica, at // item + k, one, two)


def _difference(replica: Replica, element: int, a: bytes, b: bytes) -> str:
    """Which element differs, and where both of its values lie."""
    kept, other = replica.kept(), replica.other()
    one, two = (f"{data[::-1].hex()} in {_place(view, element)}" for view, data in ((kept, a), (other, b)))
    return f"{replica.what}: a {kept.dtype} is {one} and {two}"


def _place(view: View, element: int) -> str:
    """The file that an element lies in, and what is stored there."""
    ((extent, offset, _),) = located(view, [element])
    where = extent.where.path if isinstance(extent.where, File) else "memory"
    return f"{where} ({extent.key}, byte {offset})"
