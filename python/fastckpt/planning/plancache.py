"""The keys of plans, and compiled ones kept on disk: the next checkpoint of a run is not planned again.

A kept plan holds rows over symbolic extents: they count from the start of each storage, and storages are
found again by their place in the checkpoint's table, which its structure digest fixes. Law: a kept plan is
used only where key, table and its own digest agree, and every row is checked against the extents it reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import xxhash

from ..checkpoint import JSON, Checkpoint
from ..digest import values_digest
from ..dtypes import DTYPES
from ..errors import WriteError
from ..paths import unexpanded
from ..placement import Placement
from ..quantisation.quantised_targets import Quantised
from ..quantisation.schemes import Scheme
from .copies import WORDS, Kept
from .planned import Made

VERSION = 2
"""Part of every plan's key; raised when the same inputs would give other bytes."""

MAGIC = b"fastckpt plan 3\n"
KEPT = 64
"""Plans kept; the longest unused go first."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """The tensors, the rows that make them (None: too many to keep), which of the tensors are quantised, and
    what the config says of those."""

    made: Made
    chunks: tuple[Kept, ...] | None
    quantised: Mapping[int, Quantised]
    config: Mapping[str, JSON]


def folder() -> str | None:
    """Where plans are kept: $FASTCKPT_CACHE, else below the user's cache directory; None for nowhere: "off",
    or a user without a home. Raises WriteError for a $FASTCKPT_CACHE that begins with ~."""
    chosen = os.environ.get("FASTCKPT_CACHE")
    if chosen is None:
        return user_cache("plans")
    if said := unexpanded(chosen):
        raise WriteError(f"FASTCKPT_CACHE={chosen}: begins with ~{said}; write it out, or ./~")
    return None if chosen in ("", "0", "off") else chosen


def user_cache(*within: str) -> str | None:
    """A path in fastckpt's part of the user's cache directory; None for a user who has none."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "fastckpt", *within) if os.path.isabs(home) else None


def inputs(ckpt: Checkpoint, placement: Placement, options: Mapping[str, JSON]) -> str:
    """The digest of all that shapes an output, for all ranks alike."""
    grid = placement.tp, placement.pp, placement.dp, placement.ep
    # What was opened may have been changed since: names, dtypes and shapes count beside the structure.
    kinds: dict[tuple[int, tuple[int, ...]], int] = {}
    kind = [kinds.setdefault((e.dtype.code, e.shape), len(kinds)) for e in ckpt.entries.values()]
    seen = xxhash.xxh3_128("\0".join(ckpt.entries).encode(errors="surrogatepass"))
    seen.update(np.array(kind, np.int64).tobytes())
    shaping: list[JSON] = [VERSION, ckpt.structure, seen.hexdigest(), list(grid)]
    shaping += [[code, *shape] for code, shape in kinds]
    if not ckpt.structure:
        shaping += [[e.key, e.nbytes] for e in ckpt.extents]
    return values_digest([*shaping, dict(options)])


@cache
def code() -> str:
    """Hex digest of this package's own Python source: another version of it makes its own plans."""
    digest, package = xxhash.xxh3_64(), os.path.dirname(os.path.dirname(__file__))
    found = [os.path.join(d, name) for d, _, names in os.walk(package) for name in names]
    for path in sorted(path for path in found if path.endswith(".py")):
        with open(path, "rb") as f:
            digest.update(os.fsencode(os.path.relpath(path, package)) + f.read())
    return str(digest.hexdigest())


def load(key: str, extents: int, scheme: Scheme | None = None) -> Compiled | None:
    """What is kept under `key` for a table of so many extents, quantised by `scheme`; None for nothing."""
    where = folder()
    if where is None:
        return None
    path = os.path.join(where, key)
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError:
        return None
    head, body = data[: len(MAGIC) + 16], memoryview(data)[len(MAGIC) + 16 :]
    if head != MAGIC + xxhash.xxh3_64_hexdigest(body).encode():
        return None  # torn, damaged, or of another version
    size = int.from_bytes(body[:8], "little")
    header = json.loads(bytes(body[8 : 8 + size]))
    if header["extents"] != extents or header["key"] != key:
        return None
    shapes = [tuple(shape) for shape in header["kinds"]]
    dtypes = [DTYPES[code] for code in header["dtypes"]]
    made = Made(header["ranks"], header["names"], dtypes, [shapes[i] for i in header["shapes"]])
    table = bytes(body[8 + size :])  # apart: what is kept of it should not keep the text
    chunks, at = [], 0
    for count, rows, which in header["chunks"]:
        first = np.frombuffer(table, np.uint64, WORDS, at)
        words = np.frombuffer(table, np.uint64, rows * len(which), at + 8 * WORDS).reshape(rows, len(which))
        at += 8 * WORDS + words.nbytes
        tensor = np.frombuffer(table, np.uint32, rows, at)
        chunks.append(Kept(first, np.array(which, np.intp), words, count, tensor))
        at += 4 * rows
    with suppress(OSError):
        os.utime(path)
    quantised: dict[int, Quantised] = {}
    for i, name, code, shape, scanned, *parts in header["quantised"]:
        if scheme is None:
            return None
        quantised[i] = Quantised(scheme, name, DTYPES[code], tuple(shape), scanned, *parts)
    return Compiled(made, tuple(chunks), quantised, header["config"])


def store(key: str, extents: int, plan: Compiled) -> None:
    """Keep a plan; a cache that cannot be written is no error."""
    where = folder()
    if where is None or plan.chunks is None:
        return
    made = plan.made
    kinds = {shape: i for i, shape in enumerate(dict.fromkeys(made.shapes))}
    header = {
        "key": key,
        "extents": extents,
        "ranks": made.ranks,
        "names": made.names,
        "dtypes": [dtype.code for dtype in made.dtypes],
        "kinds": list(kinds),
        "shapes": [kinds[shape] for shape in made.shapes],
        "chunks": [(c.count, len(c.tensor), c.which.tolist()) for c in plan.chunks],
        "quantised": [
            (i, q.name, q.dtype.code, q.shape, q.scanned, q.scales, q.zeros, q.form)
            for i, q in plan.quantised.items()
        ],
        "config": dict(plan.config),
    }
    head = json.dumps(header).encode()
    parts = [len(head).to_bytes(8, "little"), head]
    for chunk in plan.chunks:
        parts += [chunk.first.tobytes(), chunk.words.tobytes(), chunk.tensor.tobytes()]
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    with suppress(OSError):
        os.makedirs(where, mode=0o700, exist_ok=True)
        staged = os.path.join(where, f".{key}.{os.urandom(8).hex()}")
        try:
            with open(staged, "xb", opener=partial(os.open, mode=0o600)) as f:
                f.write(MAGIC + digest.hexdigest().encode())
                f.writelines(parts)
            os.replace(staged, os.path.join(where, key))
        except OSError:
            os.unlink(staged)
        _forget(where)


def _forget(where: str) -> None:
    plans = [
        (os.stat(p).st_mtime, p) for n in os.listdir(where) if os.path.isfile(p := os.path.join(where, n))
    ]
    for _, path in sorted(plans)[:-KEPT]:
        os.unlink(path)
