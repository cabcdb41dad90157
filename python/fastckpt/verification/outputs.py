"""verify(path): is an output, or any safetensors directory, what it was when it was written.

Law: every byte of every file is under a digest of the manifest, so that one flipped bit anywhere is
found; tensors are read once, a leaf at a time, and looked through for NaN and Inf on the way.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ..digest import digest
from ..errors import FastckptError, SourceError, expect
from ..output.manifest import NAME, TRACE, FileEntry, Manifest, TensorEntry, rank_of
from ..paths import fill, is_directory, let_go
from ..plainjson import json_object, read_json
from ..sources.safetensors import Item, read_header
from .rereading import Progress, Stored, reread

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


@dataclass(slots=True)
class _Seen:
    """A directory as it is looked through: `files` counts those checked, `tensors` are still to be read."""

    root: str
    present: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: list[Stored] = field(default_factory=list)
    files: int = 0
    allow_nonfinite: bool = False


def verify(
    path: str | os.PathLike[str],
    *,
    plain: bool = False,
    engine: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check digests, sizes, headers, missing and extra files, NaN and Inf.

    A directory without a manifest is a problem, since nothing says what it should hold; with `plain` its
    safetensors headers are checked and its values looked through, and the notes say that there were no
    digests. `engine`: the shards must also be what this engine's sharded_state loader wants, "vllm==0.32" or
    "vllm" for the version that is installed, else the newest that is known; it needs the manifest. `progress`
    gets (bytes done, bytes in all, "verify"). Raises SourceError where there is nothing to verify,
    LayoutError for an engine that is not known."""
    start = time.perf_counter()
    expect("path", path, str, os.PathLike)
    expect("engine", engine, str, type(None))
    expect("plain", plain, bool)
    expect("threads", threads, int, type(None))
    expect("progress", progress, Callable, type(None))  # type: ignore[arg-type]
    if threads is not None and threads < 1:
        raise FastckptError(f"threads: wanted at least 1, got {threads}")
    root = os.fspath(path)
    if engine is not None:
        from .expectation import engine_of  # recipes and layouts, which only an engine needs

        engine = engine_of(engine)
    if not is_directory(root):
        what = "is no directory, as an output is" if os.path.exists(root) else "no such directory"
        raise SourceError(f"{root or repr(root)}: {what}")
    seen = _Seen(root)
    seen.present = sorted(_walk(seen))
    if NAME in seen.present:
        _recorded(seen, engine)
    else:
        _unrecorded(seen, plain, engine)
    problems = seen.problems + reread(
        root, seen.tensors, allow_nonfinite=seen.allow_nonfinite, threads=threads, progress=progress
    )
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN} more"]
    return VerifyReport(
        not problems,
        seen.files,
        len(seen.tensors),
        sum(t.nbytes for t in seen.tensors),
        tuple(problems),
        tuple(seen.notes),
        time.perf_counter() - start,
    )


# ---- the directory ----


def _walk(seen: _Seen) -> Iterator[str]:
    """Every file, relative to the root; directories below it that may not be listed are problems."""

    def unlisted(error: OSError) -> None:
        if error.filename == seen.root:
            raise SourceError(f"{seen.root}: {error.strerror}")
        seen.problems.append(f"{os.path.relpath(error.filename, seen.root)}: {error.strerror}")

    for directory, _, names in os.walk(seen.root, onerror=unlisted):
        for name in names:
            yield os.path.relpath(os.path.join(directory, name), seen.root).replace(os.sep, "/")


def _incomplete(root: str, records: list[str]) -> str:
    ranks = sorted(r for name in records if (r := rank_of(name)) is not None)
    found: list[Manifest] = []
    for name in records:
        with suppress(SourceError):
            found.append(Manifest.read(os.path.join(root, name)))
    of = f" of {found[0].world}" if found else ""
    mixed = ", of different plans" if len({m.key for m in found}) > 1 else ""
    some = f"{len(ranks)}{of} ranks{mixed}: {ranks[:16]}"
    return f"no {NAME}: the set is incomplete; there are records of {some}"


def _together(names: Sequence[str], what: str) -> list[str]:
    """One note on files of which the same is said."""
    if len(names) < 2:
        return [f"{name}: {what}" for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"{len(names)} files {what}: {', '.join(names[:_NAMED])}{more}"]


# ---- with a manifest ----


def _recorded(seen: _Seen, engine: str | None) -> None:
    """All but the tensors' bytes against the manifest, and what is recorded against what the engine wants."""
    try:
        manifest = Manifest.read(os.path.join(seen.root, NAME))
    except SourceError as e:
        seen.problems.append(str(e))
        seen.files = len(seen.present)
        return
    _against(seen, manifest)
    if engine is not None and manifest.complete:
        from .expectation import against

        seen.problems += against(seen.root, manifest, engine)


def _against(seen: _Seen, manifest: Manifest) -> None:
    """Ranks, files, sizes, bytes that are no tensor's, and safetensors headers, against the manifest."""
    if not manifest.complete:
        have = len(manifest.shards)
        seen.problems.append(f"{NAME} lists {have} of {manifest.world} ranks: the set is incomplete")
    seen.allow_nonfinite = manifest.record.options.get("allow_nonfinite") is True
    listed = manifest.all_files()
    seen.files = len(listed)
    _unlisted(seen, manifest, listed)
    holders: dict[str, dict[str, TensorEntry]] = {name: {} for name in listed}
    for shard in manifest.shards:
        for tensor, entry in shard.tensors.items():
            holders[entry.file][tensor] = entry
    readable = {name for name, entry in listed.items() if _same_file(seen, name, entry, holders[name])}
    for shard in manifest.shards:
        seen.tensors += [
            Stored(t.file, name, t.dtype, t.offset, t.nbytes, t.digest)
            for name, t in shard.tensors.items()
            if t.file in readable
        ]


def _unlisted(seen: _Seen, manifest: Manifest, listed: Mapping[str, FileEntry]) -> None:
    """Files the manifest does not name: records are compared, weights are a problem, others a note."""
    extra: list[str] = []
    for name in seen.present:
        if name in listed or name == NAME or name.startswith(TRACE):
            continue
        rank = rank_of(name)
        if rank is not None and rank < manifest.world:
            _same_record(seen, name, rank, manifest)
        elif rank is not None or name.endswith(_WEIGHTS):
            seen.problems.append(f"{name}: not in the manifest, a loader may take it for weights")
        else:
            extra.append(name)
    seen.notes += _together(extra, "not in the manifest, not checked")


def _same_file(seen: _Seen, name: str, entry: FileEntry, tensors: Mapping[str, TensorEntry]) -> bool:
    """Compare a listed file with the manifest, but for its tensors' bytes. Whether it can be read at all."""
    path = os.path.join(seen.root, name)
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "no regular file")
        let_go(os.open(path, os.O_RDONLY))
    except OSError as e:
        seen.problems.append(f"{name}: {e.strerror}")
        return False
    nbytes = found.st_size
    if nbytes != entry.nbytes:
        seen.problems.append(f"{name}: {nbytes} bytes, the manifest has {entry.nbytes}")
        return True
    slots = sorted((t.offset, t.nbytes) for t in tensors.values())
    try:
        if digest(_rest(path, nbytes, slots)) != entry.digest:
            what = "its header or closing parts" if slots else "its contents"
            seen.problems.append(f"{name}: {what} differ from the manifest's digest")
        if name.endswith(".safetensors"):
            _same_header(seen, name, tensors)
    except SourceError as e:
        seen.problems.append(f"{name}: {e}")
    except OSError as e:
        seen.problems.append(f"{name}: {e.strerror}")
    return True


def _same_record(seen: _Seen, name: str, rank: int, manifest: Manifest) -> None:
    """A rank's own record, from which the manifest was made."""
    try:
        found = Manifest.read(os.path.join(seen.root, name))
    except SourceError as e:
        seen.problems.append(str(e))
        return
    if found.key != manifest.key or found.shards != tuple(s for s in manifest.shards if s.rank == rank):
        seen.problems.append(f"{name}: is not what {NAME} says of rank {rank}")


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


def _same_header(seen: _Seen, name: str, tensors: Mapping[str, TensorEntry]) -> None:
    found = _header(seen.root, name)
    for tensor in found.keys() ^ tensors.keys():
        where = "the header" if tensor in found else "the manifest"
        seen.problems.append(f"{name}: {tensor} is only in {where}")
    for tensor in found.keys() & tensors.keys():
        t, got = tensors[tensor], found[tensor]
        if (got.dtype, got.shape, got.offset, got.nbytes) != (t.dtype, t.shape, t.offset, t.nbytes):
            seen.problems.append(
                f"{name}: {tensor}: header has {got.dtype}{list(got.shape)} at {got.offset}, the manifest "
                f"{t.dtype}{list(t.shape)} at {t.offset}"
            )


# ---- without one ----


def _unrecorded(seen: _Seen, plain: bool, engine: str | None) -> None:
    """A set that was not finished, or files that something else wrote."""
    records = [name for name in seen.present if rank_of(name) is not None]
    if records or any(name.startswith(TRACE) for name in seen.present):
        seen.problems.append(_incomplete(seen.root, records))
        seen.files = len(seen.present)
    else:
        _plain(seen)
        if not plain:
            seen.problems.append(
                f"no {NAME}: nothing says what these files should hold; plain=True (--plain) checks them"
            )
    if engine is not None:
        seen.problems.append(f"{engine}: without {NAME} nothing says which model this is")


def _plain(seen: _Seen) -> None:
    """What the safetensors headers of a directory say."""
    names = [name for name in seen.present if name.endswith(".safetensors")]
    if not names:
        raise SourceError(f"{seen.root}: nothing to verify: no {NAME}, no *.safetensors")
    seen.files = len(names)
    seen.notes.append(f"no {NAME}: there are no digests; headers were checked and values looked through")
    seen.notes += _together([n for n in seen.present if n.endswith(_WEIGHTS[1:4])], "not checked")
    where: dict[str, str] = {}
    models: dict[str, str] = {}
    for name in names:
        try:
            header = _header(seen.root, name)
        except SourceError as e:
            seen.problems.append(f"{name}: {e}")
            continue
        for tensor, item in header.items():
            seen.tensors.append(Stored(name, tensor, item.dtype, item.offset, item.nbytes, ""))
            where[os.path.join(os.path.dirname(name), tensor)] = name
            # Serving ranks, whose files are model-RANK-part-N, share names.
            one = os.path.join(name.rpartition("-part-")[0] or os.path.dirname(name), tensor)
            if (other := models.setdefault(one, name)) != name:
                seen.problems.append(f"{name}: {tensor} is also in {other}: a loader takes either")
    for name in seen.present:
        if name.endswith(".safetensors.index.json"):
            _same_index(seen, name, where)


def _same_index(seen: _Seen, name: str, where: Mapping[str, str]) -> None:
    """An index names each tensor's file as it is."""
    folder = os.path.dirname(name)
    try:
        weights = json_object(
            read_json(os.path.join(seen.root, name)).get("weight_map"), f"{name}: weight_map"
        )
    except SourceError as e:
        seen.problems.append(str(e).removeprefix(os.path.join(seen.root, "")))
        return
    for tensor, file in weights.items():
        here = where.get(os.path.join(folder, tensor))
        if not isinstance(file, str) or here != os.path.join(folder, file):
            seen.problems.append(f"{name}: {tensor} should lie in {file}, lies in {here or 'no file'}")


def _header(root: str, name: str) -> Mapping[str, Item]:
    """The tensors a safetensors file says it holds. Raises SourceError, which does not name the file."""
    path = os.path.join(root, name)
    try:
        return read_header(path).items
    except SourceError as e:
        raise SourceError(str(e).removeprefix(f"{path}: ")) from None
