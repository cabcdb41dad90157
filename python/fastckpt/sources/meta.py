"""Reads releases of Meta's (`consolidated.NN.pth`) and Mistral's (`consolidated*.safetensors`).

Law: of several files each holds a part of every matrix, in their order; which axis is cut its name says, and
the other one's size agrees. What they all hold whole, norms and rotary positions, they hold alike.
Source: Meta's llama-models, models/llama3/model.py (ColumnParallelLinear: rows; RowParallelLinear: columns;
VocabParallelEmbedding), and llama, model.py (ParallelEmbedding: columns); mistral-inference, transformer.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..checkpoint import Checkpoint, Entry, Saved, Single
from ..errors import SourceError
from ..paths import is_directory, is_file, listed
from ..plainjson import read_json
from ..views import View, cat
from . import safetensors, torchfile
from .assembly import assemble
from .options import Options
from .ranks import check_one_save
from .samples import Agreement
from .statedict import state_dict, tensors_in
from .torchfile import Tensor
from .torchtensors import by_storage, in_one_table, places

_PART = re.compile(r"consolidated\.(\d+)\.pth")
_PARAMS = "params.json"

_NORM = "norm.weight"
"""As long as the hidden state is wide."""
_EMBEDDING = "tok_embeddings.weight"
"""Cut by columns until Llama 2, by rows since."""
_BY_ROWS = re.compile(r"(layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])|output)\.weight")
_BY_COLUMNS = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")


def matches(path: str) -> bool:
    """Whether `path` is a directory with such files, and no model under the hub's names."""
    if not is_directory(path) or safetensors.whole_model(path):
        return False
    return bool(_parts(path) or listed(path, "consolidated*.safetensors"))


def read(path: str, options: Options) -> Checkpoint:
    """The model in a release, under Meta's names; its `args` are what params.json says. Raises
    SourceError for a part that is missing, of another model, or cut as no release is."""
    names = _parts(path)
    found = _of_parts(path, names, options) if names else safetensors.read(path, options)
    where = os.path.join(path, _PARAMS)
    said = read_json(where) if is_file(where) else {}
    model = said.get("model")
    return replace(found, format="meta", saved=Saved(args=model if isinstance(model, dict) else said))


def _parts(path: str) -> list[str]:
    return [name for name in listed(path, "consolidated.*.pth") if _PART.fullmatch(name)]


def _of_parts(path: str, names: Sequence[str], options: Options) -> Checkpoint:
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(names))]
    if odd := sorted({*wanted} ^ {*names}):
        what = "is missing" if odd[0] in wanted else "is one too many"
        raise SourceError(f"{path}: {odd[0]} {what}; there are {', '.join(names)}")
    options.refuse_zero_only(path)
    options.refuse_also(path)
    where = [os.path.join(path, name) for name in names]
    files = [torchfile.load(p, check_crc=options.check_crc, wanted=tensors_in) for p in where]
    dicts = [state_dict(file.root) for file in files]
    first = dicts[0].tensors
    if (norm := first.get(_NORM)) is None or not norm.flat:
        raise SourceError(f"{where[0]}: no {_NORM}, which says how wide the model is")
    if scaled := next((name for name, t in first.items() if t.dtype.itemsize == 1), ""):
        raise SourceError(f"{where[0]}: {scaled} is {first[scaled].dtype}; scales of a release are not read")
    for at, file, part in zip(where, files, dicts, strict=True):
        was = f"{file.saved_as}.pth"  # what torch saved it as, where that was a file
        if _PART.fullmatch(was) and was != os.path.basename(at):
            raise SourceError(f"{at}: was saved as {was}: swapped with, or copied from, that file")
        known = {**first, **part.tensors}
        check_one_save(at, ((n, _kind(part.tensors.get(n)), _kind(first.get(n))) for n in known))
    extents, opened = in_one_table(files)
    tied = by_storage(first) if len(files) == 1 else {}
    held = {
        name: [o.entry(part.tensors[name], extents) for o, part in zip(opened, dicts, strict=True)]
        for name in first
        if name not in tied
    }
    same = Agreement(path, options.replicas)
    for name, parts in held.items():
        for at, other in zip(names[1:], parts[1:], strict=True):
            if len(other.shape) == 1:
                same.add(f"{name} in {names[0]} and {at}", parts[0], other)
    same.check()
    return assemble(
        path, "meta", {name: _whole(path, name, parts, norm.shape[0]) for name, parts in held.items()},
        extents, options, aliases=tied, files=[file.file for file in files], search=[path],
        facts={"parts": len(files)}, unread=dicts[0].rest, inert=[n for file in files for n in file.inert],
        layout=[places(part.tensors.values()) for part in dicts], headers=[file.digest for file in files],
        replicas=same.replicas,
    )  # fmt: skip


def _kind(t: Tensor | None) -> str:
    return "absent" if t is None else f"{t.dtype}{list(t.shape)}"


def _whole(path: str, name: str, parts: Sequence[Entry], width: int) -> Entry:
    """A tensor of its parts, in a model `width` wide. Raises SourceError where no release cuts it so."""
    shape = parts[0].shape
    if len(parts) == 1 or len(shape) == 1:
        return parts[0]
    by_columns = _BY_COLUMNS.fullmatch(name) is not None
    if len(shape) != 2 or not (by_columns or name == _EMBEDDING or _BY_ROWS.fullmatch(name)):
        raise SourceError(f"{path}: {name}: how {len(parts)} files share it is not known")
    axis = int(by_columns or (name == _EMBEDDING and shape[1] != width))
    whole = tuple(n * len(parts) if k == axis else n for k, n in enumerate(shape))
    if whole[0 if by_columns else 1] != width:
        raise SourceError(f"{path}: {name}: {len(parts)} parts of {shape}, and {_NORM} has {width}")
    return Single(whole, parts[0].dtype, partial(_joined, parts, axis))


def _joined(parts: Sequence[Entry], axis: int) -> View:
    return cat([part.build() for part in parts], axis)
