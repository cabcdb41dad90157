"""Random targets, and a dull interpreter of the rows they become."""

import numpy as np
from fastckpt import dtypes
from fastckpt.extents import Buffer, Extent, Extents
from fastckpt.planning.copies import NOTHING
from fastckpt.stored import constant, strided
from fastckpt.target import Target
from fastckpt.views import cat

UNWRITTEN = 0xEE


def interpret(rows, places, destinations):
    """Run rows element by element; a byte written twice is a failure."""
    size = np.array([d.itemsize for d in dtypes.DTYPES])
    raw = [p.owner.tobytes() for p in places]
    for row in rows:
        out = destinations[row["dst_buffer"]]
        wide, narrow = int(size[row["dst_dtype"]]), int(size[row["src_dtype"]])
        for index in np.ndindex(*row["shape"]):
            d = int(row["dst"]) + int((np.array(index) * row["dst_stride"]).sum())
            assert (out[d : d + wide] == UNWRITTEN).all(), "written twice"
            if row["src_buffer"] == NOTHING:
                out[d : d + wide] = 0
                continue
            s = int(row["src"]) + int((np.array(index) * row["src_stride"]).sum())
            assert s >= 0 and s + narrow <= len(raw[row["src_buffer"]])
            out[d : d + wide] = np.frombuffer(raw[row["src_buffer"]][s : s + narrow], np.uint8)


def random_targets(rng):
    data = np.arange(1, 400, dtype=np.int64) * 0x0101010101
    extents = Extents([Extent(Buffer(data, data.ctypes.data, data.nbytes), 0, data.nbytes, "a")])
    targets = []
    for k in range(rng.randrange(1, 6)):
        shape = [rng.randrange(1, 6) for _ in range(rng.randrange(0, 6))]
        shape = shape[:3] if np.prod(shape) > 300 else shape
        view = strided(extents, 0, dtypes.int64, shape, offset=rng.randrange(0, 50))
        if shape:
            axes = list(range(len(shape)))
            rng.shuffle(axes)
            view = view.permute(axes)
            if rng.random() < 0.5:
                view = view.pad(rng.randrange(view.ndim), rng.randrange(2), rng.randrange(3))
            if rng.random() < 0.5:
                view = cat([view, view], rng.randrange(view.ndim))
            if rng.random() < 0.2:
                view = cat([view, view.narrow(0, 0, 0)], 0)
            if rng.random() < 0.3:
                view = view.reshape([view.numel])
        targets.append(Target(f"t{k}", view))
    if rng.random() < 0.3:
        targets.append(Target("constant", constant(np.arange(7, dtype=np.int64), dtypes.int64)))
    return targets, extents
