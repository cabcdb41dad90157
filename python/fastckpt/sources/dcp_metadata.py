"""`.metadata` of a DCP save: which box of which tensor lies where.

Law: a pickle of dataclasses, read as records; the boxes of a tensor tile it, and a file it names lies in the
directory. Source of the format: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..dtypes import DType
from ..errors import SourceError, naming
from ..paths import inside
from ..stored import check_tiles
from . import torchfile
from .plain_values import integers, mapping
from .torchfile import Inert, type_name

Sizes = tuple[int, ...]

_MODULE = "torch.distributed.checkpoint."

_PLACES = (_MODULE + "filesystem._StorageInfo", "olmo_core.distributed.checkpoint.filesystem._StorageInfo")
"""What says where a box lies: torch's record, and that of OLMo-core's writer (3.0), which has its fields."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor: its name in the metadata, dtype, shape, and the boxes it lies in as (offsets, sizes)."""

    key: str
    dtype: DType
    shape: Sizes
    boxes: tuple[tuple[Sizes, Sizes], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a box lies: `nbytes` from `offset` of a file."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """`.metadata`, read: its tensors by key, the place of each box and of every other value, how many bytes
    each file has, the path of each key (of other values too) in the state that was saved, and the digest of
    the pickle."""

    tensors: Mapping[str, Stored]
    places: Mapping[tuple[str, Sizes], Place]
    others: Mapping[str, Place]
    files: Mapping[str, int]
    paths: Mapping[str, tuple[str, ...]]
    digest: str


def metadata(where: str, save: int) -> Metadata:
    """`.metadata` at `where`, of a save of so many bytes in all, which limit what may be built of it.

    Raises SourceError."""
    root, digest = torchfile.pickled(where, save=save)
    body = _state(root, _MODULE + "metadata.Metadata")
    tensors, paths = {}, {}
    planned = body.get("planner_data")
    for key, value in mapping(body.get("state_dict_metadata"), "state_dict_metadata").items():
        if not isinstance(key, str):
            raise SourceError(f"a name is {key!r}; wanted a string")
        if isinstance(value, Inert) and value.name == _MODULE + "metadata.TensorStorageMetadata":
            tensors[key] = _stored(key, _state(value, value.name))
        paths[key] = _path(key, planned)
    places: dict[tuple[str, Sizes], Place] = {}
    others: dict[str, Place] = {}
    files: dict[str, int] = {}
    for name, at, place in _places(mapping(body.get("storage_data"), "storage_data")):
        if at is None:
            others[name] = place
        elif places.setdefault((name, at), place) != place:
            raise SourceError(f"{name} at {at}: lies in {places[name, at]} and in {place}: in doubt")
        files[place.file] = max(files.get(place.file, 0), place.offset + place.nbytes)
    return Metadata(tensors, places, others, files, paths, digest)


def _state(value: object, *names: str) -> dict[object, object]:
    """The attributes of a dataclass that has one of these names."""
    short = names[0].rpartition(".")[2]
    if not isinstance(value, Inert) or value.name not in names:
        raise SourceError(f"wanted a {short}, got {type_name(value)}")
    return mapping(value.state, f"the attributes of a {short}")


def _stored(key: str, state: Mapping[object, object]) -> Stored:
    properties, chunks = state.get("properties"), state.get("chunks")
    told = properties.state if isinstance(properties, Inert) else None
    dtype = told[0] if isinstance(told, tuple) and told else None
    if not isinstance(dtype, DType):
        shown = dtype.name if isinstance(dtype, Inert) else dtype
        raise SourceError(f"{key}: its dtype is {shown}, which is not read")
    if not isinstance(chunks, list):
        raise SourceError(f"{key}: its chunks are no list")
    shape = integers(state.get("size"), f"{key}: its size")
    boxes: dict[Sizes, Sizes] = {}  # replicas are listed once each, and are equal
    for chunk in chunks:
        box = _state(chunk, _MODULE + "metadata.ChunkStorageMetadata")
        at, size = (integers(box.get(k), f"{key}: the {k} of a chunk") for k in ("offsets", "sizes"))
        if len(at) != len(shape) or len(size) != len(shape):
            raise SourceError(f"{key}: a chunk of {size} at {at} in {shape}")
        if boxes.setdefault(at, size) != size and 0 not in size:
            raise SourceError(f"{key}: chunks of {boxes[at]} and {size} at {at}")
    whole = tuple((at, size) for at, size in boxes.items() if 0 not in size)
    if 0 not in shape:
        with naming(key):
            check_tiles(shape, whole)
    return Stored(key, dtype, shape, whole if 0 not in shape else ())


def _places(table: Mapping[object, object]) -> Iterator[tuple[str, Sizes | None, Place]]:
    """The key and the offsets of each box, and its place; other values have no offsets."""
    for index, info in table.items():
        told, lies = _state(index, _MODULE + "metadata.MetadataIndex"), _state(info, *_PLACES)
        key, at = told.get("fqn"), told.get("offset")
        file, offset, nbytes = (lies.get(k) for k in ("relative_path", "offset", "length"))
        if not isinstance(key, str) or not isinstance(file, str):
            raise SourceError(f"the place of {key!r} is in {file!r}")
        if type(offset) is not int or type(nbytes) is not int:
            raise SourceError(f"{key}: its place is ({offset!r}, {nbytes!r}); wanted bytes")
        if lies.get("transform_descriptors"):
            raise SourceError(f"{key}: stored as {lies['transform_descriptors']}, which is not read")
        if not inside(file):
            raise SourceError(f"{key}: is in {file!r}, which leaves the directory")
        yield key, None if at is None else integers(at, f"{key}: its offset"), Place(file, offset, nbytes)


def _path(key: str, paths: object) -> tuple[str, ...]:
    """The keys that led to a value in the nested state; flat saves have one."""
    found = paths.get(key) if isinstance(paths, dict) else None
    if not isinstance(found, tuple) or not found:
        return (key,)
    return tuple(str(part) for part in found)
