"""Which files make up a ZeRO checkpoint: `latest`, the tag folder, one file a rank.

Law: every rank's file is there exactly once, or a SourceError says which is not. Names as DeepSpeed's
engine writes them (`_get_zero_ckpt_name`, `_get_ckpt_name`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import SourceError
from ...output.manifest import NAME
from ...paths import ABSENT, content, exists, is_directory, is_file
from ..ranks import check_ranks, natural

OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
MODEL_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
KINDS = (OPTIM, MODEL_OF_RANK, MODEL, EXPERT, LAYER)

_FAST = re.compile(r"(.+_states\.pt)-\d+\.\d+")
"""A name of DeepSpeed's fast writer at stages 0 to 2 (0.19.8, runtime/model_checkpointing/writer_factory.py:
create_writer): the one it stands for, which writer it was, and of how many. Each wrote a whole file."""

_MODEL_OF_SEVERAL = re.compile(r"pytorch_model(_\d+)?")
"""accelerate's tags, one for each model that it prepared (1.15, accelerator.py: save_state)."""

UNSUPPORTED = (
    (re.compile(r"expert_\d+_mp_rank_\d+_model_states\.pt"), "expert files of old DeepSpeed versions"),
    (re.compile(r"layer_\d+-.*-model_states\.pt"), "layer files of a grid with further axes"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one model-parallel rank of one tag.

    `root`: the directory with `latest`, or the tag folder's parent. `folder`: the tag folder. `mp`: the
    model-parallel rank, 0 where there is one. `optim`: dp rank -> optimizer file. `model`: rank 0's
    model-states file of stages 0-2, or None; `copies`: those of other nodes, where each has its own storage.
    `model_of`: dp rank -> model-states file of stage 3. `experts`: (MoE layer, expert) -> its file.
    `universal`: the directory of a universal checkpoint's masters, else None."""

    root: str
    folder: str
    tag: str
    mp: int
    optim: Mapping[int, str]
    model: str | None
    copies: tuple[str, ...]
    model_of: Mapping[int, str]
    experts: Mapping[tuple[int, int], str]
    universal: str | None

    def what(self, kind: str) -> str:
        """Files of that kind, in words."""
        return f"{kind} of model-parallel rank {self.mp}," if self.mp else kind


@dataclass(frozen=True, slots=True)
class Grid:
    """The files of one tag: those of model-parallel ranks 0, 1, .., and of a pipeline's layers.

    `layers`: (layer, tensor-parallel rank) -> the file of its 16-bit weights."""

    ranks: tuple[Files, ...]
    layers: Mapping[tuple[int, int], str]

    def degrees(self, world: int, told: tuple[int, int] | None, pipeline: bool) -> tuple[int, int]:
        """Pipeline stages and tensor-parallel ranks, as these files and rank 0's model states tell: how many
        model-parallel ranks, the degrees if said, and whether there is a pipeline.

        Raises SourceError for files that are missing or left over."""
        where, models = self.ranks[0].folder, {model for _, model in self.layers}
        check_ranks({files.mp: files.folder for files in self.ranks}, world, "model-parallel files", where)
        if self.layers and not pipeline:
            path = self.layers[min(self.layers)]
            raise SourceError(f"{path}: a pipeline's layer beside whole model states: of two runs")
        tp = len(models) if pipeline else len(self.ranks)
        if world == 1:  # the degrees of a sequence-parallel run call its ranks tensor-parallel
            told = None
        pp, tp = told or (len(self.ranks) // max(tp, 1), tp)
        if pp * tp != len(self.ranks) or (pp > 1 and not pipeline):
            raise SourceError(f"{where}: {len(self.ranks)} model-parallel ranks, no {pp} stages of {tp} each")
        if pipeline and models != {*range(tp)}:
            raise SourceError(
                f"{where}: files of layers of tensor-parallel ranks {sorted(models)}, wanted {tp}: not "
                "saved, or left on another node's disk, which also= (--also) names"
            )
        return pp, tp


def is_zero(path: str) -> bool:
    """Whether a directory is a ZeRO checkpoint: a tag folder, or the directory that holds tag folders."""
    return is_directory(path) and (
        _is_tag_folder(path)
        or any(is_file(os.path.join(path, name)) for name in ("latest", "latest_universal"))
        or bool(tags(path))
    )


def tags(root: str) -> list[str]:
    """The tag folders in a directory, in natural order; none that may not be listed (lost+found)."""
    return sorted((n for n in os.listdir(root) if _is_tag_folder(os.path.join(root, n))), key=natural)


def find(path: str, tag: str | None, also: Iterable[str] = ()) -> Grid:
    """The files of `tag`, or of the tag that `latest` names, in `path` and the directories `also`.

    `path` may be the tag folder itself. Raises SourceError for a missing `latest`, a tag that is not there,
    a file that is there twice, and a model-parallel rank without files below one with."""
    if _is_tag_folder(path):
        folder = os.path.abspath(path)
        root = os.path.dirname(folder)
        if tag is not None and tag != os.path.basename(folder):
            raise SourceError(
                f"{path}: this is the folder of tag {os.path.basename(folder)!r}, wanted {tag!r}"
            )
        tag = os.path.basename(folder)
    else:
        root = path
        there = tags(path)
        known = f"tags here: {', '.join(there) or 'none'}"
        if tag is None:
            if len(models := [*filter(_MODEL_OF_SEVERAL.fullmatch, there)]) > 1:
                raise SourceError(
                    f"{path}: holds {len(models)} models, {', '.join(models)}; tag= (--tag) says which: "
                    "`latest` names the one that was saved last"
                )
            tag = _latest(path, known)
        folder = os.path.join(path, tag)
        if is_file(os.path.join(folder, NAME)):
            raise SourceError(f"{path}: the commits of a training job; open one of them, such as {folder}")
        if tag not in there and not any(_is_tag_folder(os.path.join(a, tag)) for a in also):
            if is_directory(folder):
                os.listdir(folder)  # one that may not be listed says so
            raise SourceError(f"{path}: no ZeRO checkpoint with tag {tag[:80]!r}; {known}")
    return _sorted_out(root, folder, tag, [folder, *(_tag_folder_of(a, tag) for a in also)])


def check_name(path: str, saved_as: str) -> None:
    """Raise SourceError for a file that torch saved as another rank's or another expert's, `saved_as`."""
    here, there = _whose(os.path.basename(path)), _whose(f"{saved_as}.pt")
    if there is not None and there != here:
        raise SourceError(f"{path}: was saved as {saved_as}.pt: swapped with, or copied from, that file")


def _whose(name: str) -> tuple[re.Pattern[str], tuple[int, ...]] | None:
    """Which kind of file it is, and of which rank or expert, by its name; None for any other file."""
    for kind in KINDS:
        if found := kind.fullmatch(name):
            return kind, tuple(int(n or 0) for n in found.groups())
    return None


def _latest(root: str, known: str) -> str:
    """The tag in `latest`, or where there is none in `latest_universal`."""
    paths = [os.path.join(root, name) for name in ("latest", "latest_universal")]
    path = next((p for p in paths if exists(p)), None)
    if path is None:
        raise SourceError(f"{root}: no file `latest`; name the tag; {known}")
    if not is_file(path):
        raise SourceError(f"{path}: not a regular file")
    try:
        tag = content(path, 4096).decode().strip()
    except UnicodeDecodeError as e:
        raise SourceError(f"{path}: {e}") from None
    if not tag or tag != os.path.basename(tag) or tag in (".", ".."):
        raise SourceError(f"{path}: names no tag: {tag[:80]!r}; {known}")
    return tag


def _is_tag_folder(path: str) -> bool:
    try:
        names = os.listdir(path)
    except OSError as e:
        if isinstance(e, PermissionError) or e.errno in ABSENT:
            return False
        raise
    plain = [found[1] if (found := _FAST.fullmatch(name)) else name for name in names]
    return any(kind.fullmatch(name) for name in plain for kind in (OPTIM, MODEL_OF_RANK, MODEL))


def _tag_folder_of(directory: str, tag: str) -> str:
    """A further directory is a tag folder, or holds one of the same tag."""
    inner = os.path.join(directory, tag)
    return inner if is_directory(inner) else directory


def _by_kind(folders: Iterable[str]) -> dict[re.Pattern[str], dict[tuple[int, ...], list[str]]]:
    """Kind -> the numbers of rank or expert -> the files of that name, one in a folder."""
    found: dict[re.Pattern[str], dict[tuple[int, ...], list[str]]] = {kind: {} for kind in KINDS}
    once: dict[str, str] = {}
    for directory in filter(is_directory, folders):
        once.setdefault(os.path.realpath(directory), directory)
    for directory in once.values():
        for name in sorted(os.listdir(directory), key=natural):
            path = os.path.join(directory, name)
            if (whose := _whose(name)) is not None:
                kind, numbers = whose
                found[kind].setdefault(numbers, []).append(path)
            elif (written := _FAST.fullmatch(name)) and _whose(written[1]):
                raise SourceError(
                    f"{path}: a whole file of DeepSpeed's fast writer, under a name that DeepSpeed does not "
                    f"load either; rename it to {written[1]} (of several model states the first, -0.N, and "
                    "remove the others)"
                )
            elif what := next((what for pattern, what in UNSUPPORTED if pattern.fullmatch(name)), None):
                raise SourceError(f"{path}: {what} are not supported yet")
    return found


def _only(paths: Sequence[str]) -> str:
    if len(paths) > 1:
        raise SourceError(f"{paths[1]}: is there twice, also as {paths[0]}")
    return paths[0]


def _rank_0_first(paths: Sequence[str], optim: str | None) -> list[str]:
    """Model states of stages 0-2. Where nodes have storage of their own (`use_node_local_storage`) each wrote
    a copy; rank 0's, which has the tied names, lies beside the optimizer file `optim` of rank 0."""
    beside = [path for path in paths if optim and os.path.dirname(path) == os.path.dirname(optim)]
    if len(paths) == 1 or len(beside) != 1:
        return [_only(paths)]
    return beside + [path for path in paths if path not in beside]


def _by_sequence(optims: Iterable[tuple[int, ...]]) -> bool:
    """Whether these (dp, mp) are those of Ulysses' sequence parallelism, whose rank in a sequence DeepSpeed
    0.18 wrote as the model-parallel one: data-parallel ranks are numbered through, not each mp's from 0."""
    numbers = [(dp, mp) for dp, mp in optims]
    ranks = 1 + max((mp for _, mp in numbers), default=0)
    return ranks > 1 and all(dp % ranks == mp for dp, mp in numbers)


def _sorted_out(root: str, folder: str, tag: str, folders: list[str]) -> Grid:
    found = _by_kind(folders)
    models_of, optims, experts, layers = (
        {n: _only(paths) for n, paths in found[kind].items()}
        for kind in (MODEL_OF_RANK, OPTIM, EXPERT, LAYER)
    )
    models = {n: _rank_0_first(paths, optims.get((0, *n))) for n, paths in found[MODEL].items()}
    if models and models_of:
        raise SourceError(
            f"{folder}: both {os.path.basename(models[min(models)][0])} (stages 0-2) and "
            f"{os.path.basename(models_of[min(models_of)])} (stage 3): files of two runs"
        )
    zero = os.path.join(folder, "zero")
    universal = zero if is_directory(zero) else None
    if universal and optims:
        raise SourceError(
            f"{folder}: both {os.path.basename(optims[min(optims)])} and zero/: files of two runs"
        )
    if _by_sequence(optims):
        models_of, optims = ({(*rank[:1], 0): p for rank, p in t.items()} for t in (models_of, optims))
    there = {numbers[-1] for table in (found[MODEL], models_of, optims, experts) for numbers in table}
    gap = next((mp for mp in range(max(there, default=0)) if mp not in there), None)
    if gap is not None:
        raise SourceError(f"{folder}: no files of model-parallel rank {gap}, and some of rank {max(there)}")

    def of(table: Mapping[tuple[int, ...], str], mp: int) -> dict[int, str]:
        """The files of one model-parallel rank by the data-parallel one."""
        return {dp: path for (dp, rank), path in table.items() if rank == mp}

    def files(mp: int) -> Files:
        paths = models.get((mp,), [])
        return Files(
            root, folder, tag, mp, of(optims, mp), paths[0] if paths else None, tuple(paths[1:]),
            of(models_of, mp),
            {(layer, e): path for (layer, e, rank), path in experts.items() if rank == mp}, universal,
        )  # fmt: skip

    ranks = (files(mp) for mp in range(max(there, default=0) + 1))
    return Grid(tuple(ranks), {(n, model): path for (n, model), path in layers.items()})
