"""Tensors' bytes read again, leaf by leaf, for their digests and for NaN and infinity.

Law: every byte is read once; files are read in order, several tasks at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..digest import LEAF, combine, leaf_digests
from ..dtypes import DType
from ..errors import SourceError
from ..finite import nonfinite
from ..paths import fill, let_go
from ..pipeline import cores, feed

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and the phase, "verify"."""

_READS = 16
"""Reads of one task."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor to read: its `nbytes` from `offset` of the file `path`; `digest` "" where none is known."""

    path: str
    name: str
    dtype: DType
    offset: int
    nbytes: int
    digest: str


def reread(
    root: str,
    tensors: Sequence[Stored],
    *,
    allow_nonfinite: bool,
    threads: int | None,
    progress: Progress | None,
) -> list[str]:
    """What is wrong with the tensors of a directory, in words: not readable, other bytes, NaN or Inf."""
    tensors = sorted(tensors, key=lambda t: (t.path, t.offset))
    leaves = _Leaves(root, tensors)
    reads = leaves.reads()
    before = np.concatenate([[0], np.cumsum(leaves.size)]).tolist()  # bytes before each leaf
    groups = [reads[k : k + _READS] for k in range(0, len(reads), _READS)]
    tasks = [_Task(group, before[group[0][0]], before[group[-1][1]]) for group in groups]
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, before[-1], "verify")

    feed(tasks, [leaves.run] * min(threads or min(8, cores()), len(tasks)), count)
    return list(leaves.problems(allow_nonfinite))


@dataclass(frozen=True, slots=True)
class _Task:
    """Reads that one thread does one after another, and which bytes of all they are."""

    reads: list[tuple[int, int]]
    start: int
    stop: int


class _Leaves:
    """The leaves of tensors as columns, in the order of the files: where each lies, and what was found."""

    def __init__(self, root: str, tensors: Sequence[Stored]) -> None:
        self.root, self.tensors = root, tensors
        nbytes = np.array([t.nbytes for t in tensors], np.int64)
        self.first = np.concatenate([[0], np.cumsum(-(-nbytes // LEAF))])  # of each tensor
        self.tensor = np.repeat(np.arange(len(tensors)), np.diff(self.first))
        within = (np.arange(len(self.tensor)) - self.first[self.tensor]) * LEAF
        self.offset = np.array([t.offset for t in tensors], np.int64)[self.tensor] + within
        self.size = np.minimum(nbytes[self.tensor] - within, LEAF)
        self.digests = np.zeros(len(self.tensor), np.uint64)
        self.bad = np.zeros(len(self.tensor), np.int64)  # values that are not finite
        self.failed: dict[int, str] = {}  # tensor -> why it could not be read

    def reads(self) -> list[tuple[int, int]]:
        """Ranges of leaves that lie in one file within one buffer's length."""
        number = {path: k for k, path in enumerate(dict.fromkeys(t.path for t in self.tensors))}
        file = np.array([number[t.path] for t in self.tensors], np.int64)[self.tensor]
        out, low = [], 0
        starts, ends = self.offset.tolist(), (self.offset + self.size).tolist()
        new_file = np.concatenate([file[1:] != file[:-1], [True]]).tolist()
        for k, end in enumerate(ends):
            if end - starts[low] > LEAF:
                out.append((low, k))
                low = k
            if new_file[k]:
                out.append((low, k + 1))
                low = k + 1
                if low == len(ends):
                    break
        return out

    def run(self, task: _Task) -> None:
        """Some reads, one after another: one buffer, one descriptor while the file stays the same."""
        buffer, opened, fd = np.empty(LEAF, np.uint8), "", -1
        try:
            for low, high in task.reads:
                mine = self.tensor[low:high].tolist()
                try:
                    path = self.tensors[mine[0]].path
                    if path != opened:
                        let_go(fd)
                        opened, fd = "", -1
                        fd, opened = os.open(os.path.join(self.root, path), os.O_RDONLY), path
                    self.check(fd, buffer, low, high)
                except OSError as e:
                    self.failed.update(dict.fromkeys(mine, str(e.strerror)))
                except SourceError as e:
                    self.failed.update(dict.fromkeys(mine, str(e)))
        finally:
            let_go(fd)

    def check(self, fd: int, buffer: NDArray[np.uint8], low: int, high: int) -> None:
        """Leaves [low, high), which one buffer holds: read them at once, digest, look for NaN and Inf."""
        at, size = self.offset[low:high] - self.offset[low], self.size[low:high]
        data = buffer[: int(at[-1] + size[-1])]
        fill(data.data, fd, int(self.offset[low]))
        self.digests[low:high] = leaf_digests(data, at, size)
        dtypes = [self.tensors[k].dtype for k in self.tensor[low:high].tolist()]
        for i, j in _neighbours(dtypes, at, size):
            if nonfinite(data[int(at[i]) : int(at[j - 1] + size[j - 1])], dtypes[i]):
                for k in range(i, j):
                    self.bad[low + k] = nonfinite(data[int(at[k]) :][: int(size[k])], dtypes[i])

    def problems(self, allow_nonfinite: bool) -> Iterator[str]:
        """What was found, tensor by tensor."""
        for k, t in enumerate(self.tensors):
            mine = slice(int(self.first[k]), int(self.first[k + 1]))
            if k in self.failed:
                yield f"{t.path}: {t.name}: {self.failed[k]}"
            elif t.digest and combine(self.digests[mine]) != t.digest:
                yield f"{t.path}: {t.name}: its bytes differ from the manifest's digest"
            elif not allow_nonfinite and (count := int(self.bad[mine].sum())):
                yield f"{t.path}: {t.name}: {count} of its values are NaN or Inf"


def _neighbours(
    dtypes: Sequence[DType], offset: NDArray[np.int64], size: NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """Ranges of leaves of one dtype that lie one right behind the other."""
    low = 0
    joined = (offset[:-1] + size[:-1] == offset[1:]).tolist()
    for k in range(1, len(dtypes) + 1):
        if k == len(dtypes) or not joined[k - 1] or dtypes[k] is not dtypes[k - 1]:
            yield low, k
            low = k
