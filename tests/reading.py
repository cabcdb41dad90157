"""Views and checkpoints for tests: a dull numpy reader that shares nothing with the executors.

Bytes are compared, so a value is a numpy array of the dtype's bit pattern (bfloat16 as uint16).
"""

from __future__ import annotations

import ctypes
import os

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt import dtypes, sources
from fastckpt.checkpoint import Checkpoint, Single
from fastckpt.computed.nowhere import computed
from fastckpt.digest import LEAF
from fastckpt.errors import SourceError
from fastckpt.executors import pick
from fastckpt.extents import Buffer, Extent, Extents
from fastckpt.planning.batches import Slots, cut
from fastckpt.planning.binding import Binding
from fastckpt.planning.compiling import compile
from fastckpt.reader import Positioned
from fastckpt.running.computing import Computing
from fastckpt.sources.samples import OF_ONE, located, positions
from fastckpt.stored import runs
from fastckpt.target import Target

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _bytes_of(extent):
    where = extent.where
    if isinstance(where, Buffer):
        whole = (ctypes.c_uint8 * where.nbytes).from_address(where.address)
        return np.frombuffer(whole, np.uint8)[extent.offset : extent.offset + extent.nbytes]
    with open(where.path, "rb") as f:
        f.seek(extent.offset)
        return np.frombuffer(f.read(extent.nbytes), np.uint8)


def read(view):
    """The elements of a view that casts nothing, as bit patterns. Checks that fragments tile it."""
    bits, d = _BITS[view.dtype.itemsize], len(view.shape)
    out, seen = np.zeros(view.shape, bits), np.zeros(view.shape, np.uint8)
    held = {}
    for row in view.rows.tolist():
        extent, stored, offset = row[:3]
        origin, size, stride = row[3 : 3 + d], row[3 + d : 3 + 2 * d], row[3 + 2 * d :]
        box = tuple(slice(o, o + n) for o, n in zip(origin, size, strict=True))
        seen[box] += 1
        if extent < 0:
            continue
        assert stored == view.dtype.code, "this reader casts nothing"
        if extent not in held:
            raw = _bytes_of(view.extents[extent])
            held[extent] = raw[: len(raw) // view.dtype.itemsize * view.dtype.itemsize].view(bits)
        index = np.full((1,) * d, offset)
        for axis, (n, step) in enumerate(zip(size, stride, strict=True)):
            index = index + (np.arange(n) * step).reshape([-1 if a == axis else 1 for a in range(d)])
        out[box] = held[extent][index]
    assert (seen == 1).all(), "fragments do not tile the view"
    return out


def bits(tensor):
    """A torch tensor's elements as bit patterns."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().view(_BITS[tensor.element_size()]).reshape(tensor.shape)


def shard(targets):
    """Targets -> name -> (dtype name, bit patterns in the target's final shape)."""
    out = {}
    for target in targets:
        assert target.name not in out, f"{target.name} twice"
        out[target.name] = (target.view.dtype.name, elements(target.view).reshape(target.shape))
    return out


def equal(got, want):
    """Asserts that two dicts of torch tensors are one: names, shapes, dtypes, bits."""
    assert sorted(got) == sorted(want)
    for name, x in want.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
        assert (bits(got[name]) == bits(x)).all(), name


def same(got, tensors):
    """Asserts that a `shard` holds exactly these torch tensors: names, shapes, dtypes, bits."""
    assert sorted(got) == sorted(tensors)
    for name, (dtype, value) in got.items():
        want = tensors[name]
        assert dtype == str(want.dtype).removeprefix("torch."), name
        assert value.shape == tuple(want.shape), name
        assert (value == bits(want)).all(), name


def memory(tensors, pieces=1, config=None, aliases=None):
    """A checkpoint over torch tensors, each cut into `pieces` runs that lie in as many buffers."""
    flats = {name: bits(t).reshape(-1) for name, t in tensors.items()}
    rows, places = [[] for _ in range(pieces)], {}
    at = [0] * pieces
    for name, flat in flats.items():
        cuts = np.linspace(0, len(flat), pieces + 1).astype(int)
        places[name] = []
        for p in range(pieces):
            part = flat[cuts[p] : cuts[p + 1]]
            at[p] = -(-at[p] // part.itemsize) * part.itemsize
            places[name].append((at[p] // part.itemsize, len(part)))
            rows[p].append((at[p], part.view(np.uint8)))
            at[p] += part.nbytes
    buffers = [np.zeros(max(n, 1), np.uint8) for n in at]
    for p, parts in enumerate(rows):
        for start, part in parts:
            buffers[p][start : start + len(part)] = part
    extents = Extents(
        Extent(Buffer(b, b.ctypes.data, b.nbytes), 0, b.nbytes, f"piece {p}") for p, b in enumerate(buffers)
    )

    def entry(name, tensor):
        dtype = dtypes.dtype(str(tensor.dtype))
        first, count = np.array(places[name], np.int64).T

        def build():
            flat = runs(extents, dtype, np.arange(pieces), first, count)
            return flat.reshape(tuple(tensor.shape))

        return Single(tuple(tensor.shape), dtype, build)

    entries = {name: entry(name, t) for name, t in tensors.items()}
    return Checkpoint("memory", "memory", entries, extents, aliases or {}, config=config)


def elements(view):
    """The elements of a view as bit patterns; what is made when it is read, by the package itself."""
    if not computed([e.where for e in view.extents]):
        return read(view)
    out = np.zeros(view.shape, _BITS[view.dtype.itemsize])
    chunk, extents = compile([Target("x", view)], view.extents)
    binding = Binding.of(extents)
    with Computing(extents, binding, Positioned) as reader:
        lane = reader.lane(pick("torch"))
        for batch in cut(chunk, 0, Slots.of([0], [0], [view.nbytes]), binding, stage=LEAF):
            lane.run(batch.rows, [Buffer(out, out.ctypes.data, out.nbytes)])
    return out


def holds(ckpt, tensors):
    """Asserts that a checkpoint holds exactly these torch tensors, tied names too: shapes, dtypes, bits."""
    assert sorted([*ckpt, *ckpt.aliases]) == sorted(tensors)
    for name, want in tensors.items():
        assert (ckpt[name].dtype.name, ckpt[name].shape) == (str(want.dtype)[6:], tuple(want.shape)), name
        assert (read(ckpt[name]) == bits(want)).all(), name


def refuses(path, *words, **options):
    """The checkpoint at `path` cannot be opened, and the error says these words."""
    with pytest.raises(SourceError) as e:
        sources.open(path, **options)
    for word in words:
        assert word in str(e.value), str(e.value)


def refuses_a_copy_that_differs(path, **options):
    """Of the largest tensor that the checkpoint at `path` holds twice one element is changed, in the copy
    that is not taken, where opening looks at none: no run takes one for both. Opened for the first of each,
    it is what it was, also where opening looks at what differs."""
    ckpt = fastckpt.open(path, **options)
    (whole,) = fastckpt.reshard(ckpt, layout="same")
    copies = ckpt.replicas
    most = max(copies, key=lambda r: r.kept().numel)
    seen = positions(most.kept(), OF_ONE)
    element = next((i for i in range(most.kept().numel) if i not in seen), 1)
    places = [located(view, [element])[0] for view in (most.kept(), most.other())]
    (one, at, _), (other, start, _) = places
    assert (one.where, at) != (other.where, start)
    flip(other.where.path, start)
    ckpt = fastckpt.open(path, **options)
    with pytest.raises(SourceError) as e:
        fastckpt.reshard(ckpt, layout="same")
    for word in (most.what, *(f"{x.where.path} ({x.key}, byte {at})" for x, at, _ in places)):
        assert word in str(e.value), str(e.value)
    ((_, start, _),) = located(most.other(), [0])
    flip(other.where.path, start)
    (first,) = fastckpt.reshard(fastckpt.open(path, replicas="first", **options), layout="same")
    assert first.keys() == whole.keys() and all(torch.equal(first[n], x) for n, x in whole.items())


def flip(path, at):
    """One bit of a file made another."""
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))


def refuses_what_is_written_to(file, path, **options):
    """A file of the checkpoint at `path` that changes once copying has begun is an error, and no output."""
    late = []

    def rewrite(done, total, phase):
        if phase == "copy" and not late:
            late.append((done, total))
            with file.open("r+b") as f:
                f.seek(-(1 << 16), os.SEEK_END)
                f.write(b"\x11")

    out = path.with_name("out")
    with pytest.raises(SourceError, match="changed since its header was read"):
        fastckpt.reshard(path, layout="same", out=out, threads=1, progress=rewrite, **options)
    assert late and late[0][0] < late[0][1]
    assert not out.exists()
