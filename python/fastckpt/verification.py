"""verify(path): is an output, or any safetensors directory, what it was when it was written.

Law: every byte of every file is under a digest of the manifest, so that one flipped bit anywhere is
found; tensors are read once, a leaf at a time, and looked through for NaN and Inf on the way.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .checkpoint import JSON
from .digest import LEAF, combine, digest, leaf_digests
from .doors.text import counted
from .dtypes import DType
from .errors import FastckptError, SourceError, expect
from .extents import File, fill, is_directory, let_go
from .finite import nonfinite
from .output.manifest import NAME, Manifest, TensorEntry, rank_of
from .sources.safetensors import MAX_HEADER, Item, read_header

_READS = 16
"""Reads of one task."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
_SHOWN = 1000
"""The most problems a report lists."""
_NAMED = 5
"""The most files one note names."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verify found: `problems` in words, `notes` what could not be checked; `ok` means no problems."""

    ok: bool
    files: int
    tensors: int
    bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor to read; `digest` "" where none is known."""

    path: str
    name: str
    dtype: DType
    offset: int
    nbytes: int
    digest: str


def verify(
    path: str | os.PathLike[str],
    *,
    plain: bool = False,
    engine: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check digests, sizes, headers, missing and extra files, NaN and Inf; `progress(bytes done, of)`.

    A directory without a manifest is a problem, since nothing says what it should hold; with `plain` its
    safetensors headers are checked and its values looked through, and the notes say that there were no
    digests. `engine`: the shards must also be what this engine's sharded_state loader wants, "vllm==0.32" or
    "vllm" for the version that is installed, else the newest that is known; it needs the manifest. Raises
    SourceError where there is nothing to verify, LayoutError for an engine that is not known."""
    start = time.perf_counter()
    expect("path", path, str, os.PathLike)
    expect("engine", engine, str, type(None))
    expect("plain", plain, bool)
    expect("threads", threads, int, type(None))
    if threads is not None and threads < 1:
        raise FastckptError(f"threads: wanted at least 1, got {threads}")
    root = os.fspath(path)
    if engine is not None:
        from .expectation import against, engine_of  # recipes and layouts, which only this needs

        engine = engine_of(engine)
    if not is_directory(root):
        raise SourceError(f"{root}: no such directory")
    problems: list[str] = []
    present = sorted(_walk(root, problems))
    notes: list[str] = []
    tensors: list[_Tensor] = []
    allowed = False
    records = [name for name in present if rank_of(name) is not None]
    if NAME in present:
        try:
            manifest = Manifest.read(os.path.join(root, NAME))
        except SourceError as e:
            return VerifyReport(False, len(present), 0, 0, (str(e),), (), time.perf_counter() - start)
        if not manifest.complete:
            have = len(manifest.shards)
            problems.append(f"{NAME} lists {have} of {manifest.world} ranks: the set is incomplete")
        allowed = manifest.record.options.get("allow_nonfinite") is True
        gone = _against(root, manifest, present, problems, notes)
        if engine is not None and manifest.complete:
            problems += against(root, manifest, engine)
        files = len(manifest.all_files())
        for shard in manifest.shards:
            tensors += [
                _Tensor(t.file, name, t.dtype, t.offset, t.nbytes, t.digest)
                for name, t in shard.tensors.items()
                if t.file not in gone
            ]
    elif records or any(name.startswith(".fastckpt-") for name in present):
        problems.append(_incomplete(root, records))
        files = len(present)
    else:
        files, tensors = _plain(root, present, problems, notes)
        if not plain:
            problems.append(
                f"no {NAME}: nothing says what these files should hold; plain (--plain) checks them alone"
            )
    if engine is not None and NAME not in present:
        problems.append(f"{engine}: without {NAME} nothing says which model this is")
    total = _read_all(root, tensors, allowed, threads, progress, problems)
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN} more"]
    return VerifyReport(
        not problems, files, len(tensors), total, tuple(problems), tuple(notes), time.perf_counter() - start
    )


# ---- the directory ----


def _walk(root: str, problems: list[str]) -> Iterator[str]:
    """Every file, relative to the root; directories that may not be listed are problems."""

    def unlisted(error: OSError) -> None:
        problems.append(f"{os.path.relpath(error.filename, root)}: {error.strerror}")

    for directory, _, names in os.walk(root, onerror=unlisted):
        for name in names:
            yield os.path.relpath(os.path.join(directory, name), root).replace(os.sep, "/")


def _incomplete(root: str, records: list[str]) -> str:
    ranks = sorted(r for name in records if (r := rank_of(name)) is not None)
    of = ""
    for name in records[:1]:
        try:
            of = f" of {Manifest.read(os.path.join(root, name)).world}"
        except SourceError:
            of = ""
    return f"no {NAME}: the set is incomplete; there are records of {len(ranks)}{of} ranks: {ranks[:16]}"


def _against(
    root: str, manifest: Manifest, present: list[str], problems: list[str], notes: list[str]
) -> set[str]:
    """Sizes, bytes that are no tensor's, and safetensors headers, against the manifest.

    Returns the files of which nothing can be read."""
    listed = manifest.all_files()
    extra: list[str] = []
    gone: set[str] = set()
    for name in present:
        if name in listed or name == NAME or name.startswith(".fastckpt-"):
            continue
        rank = rank_of(name)
        if rank is not None and rank < manifest.world:
            _same_record(root, name, rank, manifest, problems)
            continue
        if rank is not None or name.endswith(_WEIGHTS):
            problems.append(f"{name}: not in the manifest, a loader may take it for weights")
        else:
            extra.append(name)
    notes += _together(extra, "not in the manifest, not checked")
    holders: dict[str, list[tuple[str, TensorEntry]]] = {name: [] for name in listed}
    for shard in manifest.shards:
        for tensor, entry in shard.tensors.items():
            holders[entry.file].append((tensor, entry))
    for name, file in listed.items():
        path = os.path.join(root, name)
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(0, "no regular file")
            let_go(os.open(path, os.O_RDONLY))
        except OSError as e:
            problems.append(f"{name}: {e.strerror}")
            gone.add(name)
            continue
        nbytes = found.st_size
        if nbytes != file.nbytes:
            problems.append(f"{name}: {nbytes} bytes, the manifest has {file.nbytes}")
            continue
        slots = sorted(((t.offset, t.nbytes) for _, t in holders[name]))
        try:
            if digest(_rest(path, nbytes, slots)) != file.digest:
                what = "its header or closing parts" if slots else "its contents"
                problems.append(f"{name}: {what} differ from the manifest's digest")
            if name.endswith(".safetensors"):
                _same_header(root, name, dict(holders[name]), problems)
        except SourceError as e:
            problems.append(f"{name}: {e}")
        except OSError as e:
            problems.append(f"{name}: {e.strerror}")
    return gone


def _together(names: Sequence[str], what: str) -> list[str]:
    """One note on files of which the same is said."""
    if len(names) < 2:
        return [f"{name}: {what}" for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"{counted(len(names), 'file')} {what}: {', '.join(names[:_NAMED])}{more}"]


def _same_record(root: str, name: str, rank: int, manifest: Manifest, problems: list[str]) -> None:
    """A rank's own record, from which the manifest was made."""
    try:
        found = Manifest.read(os.path.join(root, name))
    except SourceError as e:
        problems.append(str(e))
        return
    if found.key != manifest.key or found.shards != tuple(s for s in manifest.shards if s.rank == rank):
        problems.append(f"{name}: is not what {NAME} says of rank {rank}")


def _rest(path: str, nbytes: int, slots: list[tuple[int, int]]) -> bytes:
    """The bytes of a file that are no tensor's."""
    out, at = bytearray(), 0
    with open(path, "rb", buffering=0) as f:
        for offset, size in [*slots, (nbytes, 0)]:
            if offset > at:
                between = bytearray(offset - at)
                fill(between, f.fileno(), at)
                out += between
            at = offset + size
    return bytes(out)


def _same_header(root: str, name: str, tensors: Mapping[str, TensorEntry], problems: list[str]) -> None:
    found = _header(root, name)
    for tensor in found.keys() ^ tensors.keys():
        where = "the header" if tensor in found else "the manifest"
        problems.append(f"{name}: {tensor} is only in {where}")
    for tensor in found.keys() & tensors.keys():
        t, got = tensors[tensor], found[tensor]
        if (got.dtype, got.shape, got.offset, got.nbytes) != (t.dtype, t.shape, t.offset, t.nbytes):
            problems.append(
                f"{name}: {tensor}: header has {got.dtype}{list(got.shape)} at {got.offset}, the manifest "
                f"{t.dtype}{list(t.shape)} at {t.offset}"
            )


def _plain(root: str, present: list[str], problems: list[str], notes: list[str]) -> tuple[int, list[_Tensor]]:
    """A directory without a manifest: what its safetensors headers say."""
    names = [name for name in present if name.endswith(".safetensors")]
    if not names:
        raise SourceError(f"{root}: nothing to verify: no {NAME}, no *.safetensors")
    notes.append(f"no {NAME}: there are no digests; headers were checked and values looked through")
    notes += _together([n for n in present if n.endswith(_WEIGHTS[1:4])], "not checked")
    tensors = []
    where: dict[str, str] = {}
    for name in names:
        try:
            header = _header(root, name)
        except SourceError as e:
            problems.append(f"{name}: {e}")
            continue
        for tensor, item in header.items():
            tensors.append(_Tensor(name, tensor, item.dtype, item.offset, item.nbytes, ""))
            where[os.path.join(os.path.dirname(name), tensor)] = name
    for name in present:
        if name.endswith(".safetensors.index.json"):
            _same_index(root, name, where, problems)
    return len(names), tensors


def _same_index(root: str, name: str, where: Mapping[str, str], problems: list[str]) -> None:
    """An index names each tensor's file as it is."""
    folder = os.path.dirname(name)
    try:
        with open(File.at(os.path.join(root, name)).path, "rb") as f:
            index: JSON = json.loads(f.read(MAX_HEADER))
        weights = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weights, dict):
            raise ValueError("no weight_map")
    except (SourceError, OSError, ValueError, RecursionError) as e:
        problems.append(f"{name}: {e}")
        return
    for tensor, file in weights.items():
        here = where.get(os.path.join(folder, tensor))
        if not isinstance(file, str) or here != os.path.join(folder, file):
            problems.append(f"{name}: {tensor} should lie in {file}, lies in {here or 'no file'}")


def _header(root: str, name: str) -> Mapping[str, Item]:
    """The tensors a safetensors file says it holds. Raises SourceError, which does not name the file."""
    path = os.path.join(root, name)
    try:
        return read_header(path).items
    except SourceError as e:
        raise SourceError(str(e).removeprefix(f"{path}: ")) from None


# ---- tensor bytes ----


def _read_all(
    root: str,
    tensors: list[_Tensor],
    allowed: bool,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
    problems: list[str],
) -> int:
    """Read every tensor once, by leaves, and enter digests that differ and values that are not finite."""
    tensors = sorted(tensors, key=lambda t: (t.path, t.offset))
    nbytes = np.array([t.nbytes for t in tensors], np.int64)
    first = np.concatenate([[0], np.cumsum(-(-nbytes // LEAF))])
    of = np.repeat(np.arange(len(tensors)), np.diff(first))  # the tensor of each leaf
    within = (np.arange(len(of)) - first[of]) * LEAF
    offset = np.array([t.offset for t in tensors], np.int64)[of] + within
    size = np.minimum(nbytes[of] - within, LEAF)
    leaves, bad = np.zeros(len(of), np.uint64), np.zeros(len(of), np.int64)
    failed: dict[int, str] = {}
    total, done = int(nbytes.sum()), 0

    def check(fd: int, buffer: NDArray[np.uint8], low: int, high: int) -> None:
        """Leaves [low, high), which one buffer holds: read them at once, digest, look for NaN and Inf."""
        at, start = offset[low:high], int(offset[low])
        data = buffer[: int(at[-1] + size[high - 1]) - start]
        fill(data.data, fd, start)
        leaves[low:high] = leaf_digests(data, at - start, size[low:high])
        same = [tensors[k].dtype for k in of[low:high]]
        for i, j in _neighbours(same, at, size[low:high]):
            run = data[int(at[i]) - start : int(at[j - 1] + size[low + j - 1]) - start]
            if nonfinite(run, same[i]):
                for k in range(i, j):
                    leaf = data[int(at[k]) - start :][: int(size[low + k])]
                    bad[low + k] = nonfinite(leaf, same[i])

    def task(reads: list[tuple[int, int]]) -> int:
        """Some reads, one after another: one buffer, one descriptor while the file stays the same."""
        buffer, opened, fd = np.empty(LEAF, np.uint8), "", -1
        try:
            for low, high in reads:
                try:
                    path = tensors[of[low]].path
                    if path != opened:
                        let_go(fd)
                        opened, fd = "", -1
                        fd, opened = os.open(os.path.join(root, path), os.O_RDONLY), path
                    check(fd, buffer, low, high)
                except OSError as e:
                    failed.update(dict.fromkeys(of[low:high].tolist(), str(e.strerror)))
                except SourceError as e:
                    failed.update(dict.fromkeys(of[low:high].tolist(), str(e)))
        finally:
            let_go(fd)
        return sum(int(size[low:high].sum()) for low, high in reads)

    number = {path: k for k, path in enumerate(dict.fromkeys(t.path for t in tensors))}
    reads = _reads(offset, size, np.array([number[t.path] for t in tensors], np.int64)[of])
    tasks = [reads[k : k + _READS] for k in range(0, len(reads), _READS)]
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for read in pool.map(task, tasks):
            done += read
            if progress is not None:
                progress(done, total)
    for k, t in enumerate(tensors):
        mine = slice(int(first[k]), int(first[k + 1]))
        if k in failed:
            problems.append(f"{t.path}: {t.name}: {failed[k]}")
        elif t.digest and combine(leaves[mine]) != t.digest:
            problems.append(f"{t.path}: {t.name}: its bytes differ from the manifest's digest")
        elif not allowed and (count := int(bad[mine].sum())):
            problems.append(f"{t.path}: {t.name}: {count} of its values are NaN or Inf")
    return total


def _reads(
    offset: NDArray[np.int64], size: NDArray[np.int64], file: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Ranges of leaves that lie in one file within one buffer's length."""
    out, low = [], 0
    starts, ends = offset.tolist(), (offset + size).tolist()
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
