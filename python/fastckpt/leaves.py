"""The dense bytes of views, leaf by leaf, for whoever compares them: in order, and in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from operator import itemgetter

import numpy as np

from .digest import LEAF
from .executors import pick
from .extents import Buffer, Extents, fresh
from .planning.batches import Slots, cut
from .planning.binding import Binding
from .planning.compiling import in_windows
from .running.runs import reader_of
from .target import Target
from .views import View


def leaves(named: Iterable[tuple[str, View]], extents: Extents) -> Iterator[tuple[str, int, memoryview]]:
    """(name, offset in bytes, at most a leaf of bytes) of each view, one leaf after another.

    `extents`: the table that the views are over, most of them. The memory is valid until the next step; views
    of no elements give none. Raises SourceError."""
    staging = fresh(LEAF)
    target, whole = Buffer(staging, staging.ctypes.data, LEAF), memoryview(staging.data)
    windows = in_windows(((0, Target(name, view)) for name, view in named), extents)
    for table, over_it in itertools.groupby(windows, itemgetter(2)):
        binding = Binding.of(table)
        with reader_of(table, binding, alone=False) as reader:
            lane = reader.lane(pick(None))
            for window, chunk, _ in over_it:
                nbytes = np.array([t.view.nbytes for _, t in window], np.int64)
                slots = Slots.of(np.zeros_like(nbytes), np.cumsum(nbytes) - nbytes, nbytes)
                for batch in cut(chunk, 0, slots, binding, stage=LEAF, band=LEAF, in_order=True):
                    lane.run(batch.rows, [target])
                    for at, size, leaf in zip(
                        batch.leaf_offset.tolist(), batch.leaf_size.tolist(), batch.leaf.tolist(), strict=True
                    ):
                        t = int(np.searchsorted(slots.leaf, leaf, "right")) - 1
                        yield window[t][1].name, (leaf - int(slots.leaf[t])) * LEAF, whole[at : at + size]
