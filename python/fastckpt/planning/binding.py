"""Where the extents of compiled rows lie: in files and buffers.

Law: a bound row reads inside its extent, and memory is where it was; this is checked here, and trusted after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ViewError
from ..extents import Buffer, Extents, File
from .copies import NOTHING, Ints, Table, span


@dataclass(frozen=True, slots=True)
class Binding:
    """Where each extent lies: `places` are the distinct files and buffers, in order of first use;
    extent i is `nbytes[i]` bytes from `offset[i]` of place `place[i]`."""

    places: tuple[File | Buffer, ...]
    place: Ints
    offset: Ints
    nbytes: Ints

    @staticmethod
    def of(extents: Extents) -> Binding:
        """The binding of an extent table. Raises SourceError for memory that is no more."""
        index: dict[File | Buffer, int] = {}
        place = np.empty(len(extents), np.int64)
        offset = np.empty(len(extents), np.int64)
        size = np.empty(len(extents), np.int64)
        for i, extent in enumerate(extents):
            where = extent.where
            if where not in index:
                if isinstance(where, Buffer):
                    where.check()
                index[where] = len(index)
            place[i], offset[i], size[i] = index[where], extent.offset, extent.nbytes
        return Binding(tuple(index), place, offset, size)

    def bind(self, rows: Table) -> Table:
        """The rows with `src_buffer` a place and `src` counted from that place's start.

        Raises ViewError for a row that would read outside its extent: a plan of other files."""
        out: Table = rows.copy()
        real = out["src_buffer"] != NOTHING
        extent = out["src_buffer"][real].astype(np.int64)
        if len(extent) and int(extent.max()) >= len(self.place):
            raise ViewError(f"plan: a row reads extent {int(extent.max())} of {len(self.place)}")
        low, high = span(out[real], "src")
        bad = (low < 0) | (high > self.nbytes[extent])
        if bad.any():
            i = int(np.argmax(bad))
            raise ViewError(
                f"plan: a row reads bytes [{int(low[i])}, {int(high[i])}) of extent {int(extent[i])}, "
                f"which has {int(self.nbytes[extent[i]])}"
            )
        out["src"][real] += self.offset[extent].astype(np.uint64)
        out["src_buffer"][real] = self.place[extent]
        return out
