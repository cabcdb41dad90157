"""Opens a checkpoint of any known format: headers only, no byte of it executed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Protocol, cast

from ..checkpoint import Checkpoint
from ..collector import paused
from ..errors import SourceError, expect
from ..paths import is_directory, is_file, unexpanded
from .options import Options
from .ranks import natural

__all__ = ["SOURCES", "Options", "Source", "format_of", "open"]


class Source(Protocol):
    """One on-disk format. `matches` looks at names, or at a file's first bytes; `read` reads headers and
    raises SourceError."""

    def matches(self, path: str) -> bool: ...

    def read(self, path: str, options: Options) -> Checkpoint: ...


SOURCES = {
    "training": "",  # a commit of our manager is an output too
    "served": "an output of fastckpt (fastckpt.json)",
    "zero": "a ZeRO checkpoint (latest, *_model_states.pt)",
    "fsdp": "files of FSDP's ranks (model_world_size_N_rank_R.pt, pytorch_model_fsdp_0_rankR.bin)",
    "megatron": "a Megatron checkpoint (latest_checkpointed_iteration.txt, iter_*)",
    "dcp": "a torch distributed checkpoint (.metadata, *.distcp)",
    "peft": "a PEFT adapter (adapter_config.json, adapter_model.*)",
    "meta": "a release of Meta's or Mistral's (consolidated.NN.pth, consolidated*.safetensors)",
    "safetensors": "safetensors (*.safetensors, index)",
    "statedict": "a PyTorch state dict (pytorch_model*.bin, index, or one .bin/.pt file)",
}
"""The modules tried, in this order, and what each looks for: a trainer's directory may hold a ZeRO folder and
an exported copy; the masters win. Those behind the one that matches are not imported."""

UNREAD = {
    "checkpoint_metadata.json": (
        "a checkpoint of nanotron (its examples/llama/convert_nanotron_to_hf.py makes it the hub's)"
    ),
    "_CHECKPOINT_METADATA": "a checkpoint of orbax (JAX)",
    "manifest.ocdbt": "arrays of tensorstore (orbax, Levanter; JAX)",
    "flax_model.msgpack": "weights of Flax",
    "tf_model.h5": "weights of TensorFlow",
}
"""Files by which the checkpoints of other programs are known, and whose they are."""

_DEPTH, _MOST = 3, 1000
"""How far below a directory, and among how many names, its checkpoints are looked for."""

_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pth.tar", ".index.json")
"""Of the files among those: other archives start as torch's do."""


@paused()
def open(
    path: str | os.PathLike[str] | Mapping[str, object],
    *,
    tag: str | None = None,
    also: Iterable[str | os.PathLike[str]] = (),
    rename: Iterable[tuple[str, str]] = (),
    weights: str = "master",
    exclude_frozen: bool = False,
    check_crc: bool = False,
    replicas: str = "equal",
) -> Checkpoint:
    """The checkpoint at `path`, a file or directory of any format of SOURCES, or a dict of tensors.

    Options as in `Options`. Raises SourceError for what is broken, missing or unknown."""
    expect("path", path, str, os.PathLike, Mapping)
    expect("also", also, Iterable)
    for directory in (also := tuple(also)):
        expect("also: a directory", directory, str, os.PathLike)
    expect("rename", rename, Iterable)
    options = Options(
        tag=tag, also=tuple(os.fspath(a) for a in also), weights=weights,
        rename=tuple(tuple(pair) if isinstance(pair, list) else pair for pair in rename),
        exclude_frozen=exclude_frozen, check_crc=check_crc, replicas=replicas,
    )  # fmt: skip
    if isinstance(path, Mapping):
        from . import memory

        return memory.read(path, options)
    where = os.fspath(path)
    _refuse_absent(where)
    with _as_source_errors(where):
        for directory in options.also:
            if not is_directory(directory):
                raise SourceError(f"{directory}: no directory, as also= (--also) names")
        for source in _sources():
            if source.matches(where):
                return replace(source.read(where, options), take_first=replicas == "first")
        raise SourceError(f"{where}: {_what_it_is(where)}")


def format_of(path: str | os.PathLike[str]) -> str | None:
    """The module of SOURCES that reads what is at `path`, as `matches` says; None: none of them does. Raises
    SourceError where that cannot be known."""
    where = os.fspath(path)
    with _as_source_errors(where):
        return next((n for n, s in zip(SOURCES, _sources(), strict=True) if s.matches(where)), None)


@contextmanager
def _as_source_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:  # a directory that may not be listed, a file that goes away meanwhile
        raise SourceError(f"{e.filename or where}: {e.strerror}") from None


def _sources() -> Iterator[Source]:
    return (cast(Source, import_module(f".{name}", __name__)) for name in SOURCES)


def _refuse_absent(path: str) -> None:
    """Raise SourceError for a path that is not there, or may not be looked at."""
    try:
        os.stat(path)
    except (OSError, ValueError) as e:  # ValueError: no path at all, such as one with a zero byte
        why = e.strerror if isinstance(e, OSError) else e
        raise SourceError(f"{path or repr(path)}: {why}{unexpanded(path)}") from None


def _what_it_is(path: str) -> str:
    """What was recognised in something no source reads."""
    looked_for = ", ".join(filter(None, SOURCES.values()))
    if path.endswith(".nemo"):
        return "an archive of NeMo's, which is not read: unpack it (tar -xf) and open the directory"
    if not is_directory(path):
        empty = " (it has 0 bytes)" if os.path.getsize(path) == 0 else ""
        return f"not a checkpoint file{empty}; looked for {looked_for}"
    if (what := _other_program(path)) is not None:
        return f"{what}, which is not read"
    level, theirs = [""], None
    for _ in range(_DEPTH):
        level = [os.path.join(d, n) for d in level for n in _names_in(os.path.join(path, d))][:_MOST]
        inside = [n for n in level if _may_be(os.path.join(path, n))]
        if inside:
            more = ", ..." if len(inside) > 8 else ""
            return f"no checkpoint, but it holds some: {', '.join(inside[:8])}{more}; open one of them"
        known = ((n, _other_program(os.path.join(path, n))) for n in level)
        theirs = theirs or next((f"{n} is {what}, which is not read" for n, what in known if what), None)
    return theirs or f"no known checkpoint; looked for {looked_for}"


def _other_program(path: str) -> str | None:
    """What is at `path`, where another program's checkpoint is."""
    return next((what for name, what in UNREAD.items() if is_file(os.path.join(path, name))), None)


def _may_be(path: str) -> bool:
    """Whether a directory, or a file by its name too, looks like a checkpoint."""
    return (path.endswith(_ENDINGS) or is_directory(path)) and any(s.matches(path) for s in _sources())


def _names_in(path: str) -> list[str]:
    """What a directory holds that may be looked at; nothing where it is none, or may not be listed."""
    try:
        names = [n for n in os.listdir(path) if os.access(os.path.join(path, n), os.R_OK)]
        return sorted(names, key=natural)
    except (NotADirectoryError, PermissionError):
        return []
