"""The files of a ZeRO checkpoint as they are opened, into one table of extents.

Law: of each file only the pickle and headers are read, and of a checkpoint only the files that are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ...checkpoint import Entry
from ...errors import SourceError
from ...extents import Extent, Extents, File
from ...pipeline import each
from .. import assembly, torchfile
from ..options import Options
from ..torchfile import Tensor, TorchFile, Tree, Wanted
from ..torchtensors import Opened
from .experts import check_files, tensors
from .files import Files, check_name
from .order import sampled
from .partitions import Shape
from .parts import parts
from .state import ModelState, OptimState, model_state, optim_state
from .universal import master, master_file, master_tensors

THREADS = 8
"""Files opened at a time; the wait is for the file system."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A tensor that lies whole in an opened file."""

    opened: Opened
    tensor: Tensor

    def entry(self, extents: Extents, kind: str) -> Entry:
        """The entry of it."""
        return self.opened.entry(self.tensor, extents, kind)


@dataclass(slots=True)
class Opening:
    """The files of one checkpoint as they are opened, and the one table of their extents."""

    files: Files
    options: Options
    extents: list[Extent] = field(default_factory=list)
    opened: list[TorchFile] = field(default_factory=list)
    raws: list[Extent] = field(default_factory=list)  # in files without a header
    trees: dict[bytes, Tree] = field(default_factory=dict)  # of optimizer files, which are often identical

    def model(self, path: str, first: OptimState | None = None) -> tuple[Opened, ModelState]:
        """A model-states file with the tensors that the options need; `first`: rank 0's optimizer state."""
        copy = self.options.weights == "module" or self.files.universal is not None
        wanted = partial(_model_tensors, options=self.options, copy=copy, first=first)
        opened = self._add(torchfile.load(path, check_crc=self.options.check_crc, wanted=wanted))
        return opened, model_state(opened.file.root, path)

    def optim(self, paths: Sequence[str]) -> list[Opened]:
        """Optimizer files with their masters."""
        return self._many(paths, optim_tensors, self.trees)

    def experts(self, state: ModelState) -> dict[str, Whole]:
        """The tensors of DeepSpeed's MoE experts by name, each in the file of its own expert."""
        held = self.files.experts
        check_files(state, held, self.files.folder)
        out: dict[str, Whole] = {}
        keys = sorted(held)
        for (_, expert), opened in zip(keys, self._many([held[k] for k in keys], None, {}), strict=True):
            for name, t in tensors(opened.file.root, expert, state.autoep, opened.file.file.path).items():
                if name in out:
                    raise SourceError(f"{opened.file.file.path}: {name} is in another expert's file too")
                out[name] = Whole(opened, t)
        return out

    def universal(self, shapes: Mapping[str, Shape]) -> dict[str, Whole]:
        """The masters of a universal checkpoint by name, each in a file of its own."""
        paths = {name: master_file(self.files, name) for name in shapes}
        opened = self._many(list(paths.values()), master_tensors, {})
        return {
            name: Whole(o, master(o.file.root, shape, o.file.file.path))
            for (name, shape), o in zip(shapes.items(), opened, strict=True)
        }

    def layers(self, paths: Sequence[str]) -> list[Opened]:
        """Files of a pipeline's layers."""
        return self._many(paths, None, {})

    def fragments(self, paths: Sequence[str]) -> list[Opened]:
        """Model-states files with their frozen fragments."""
        return self._many(paths, _fragments, {})

    def raw(self, file: File, nbytes: int, key: str) -> int:
        """The first bytes of a file without a header, as the extent of that number."""
        self.raws.append(Extent(file, 0, nbytes, key))
        self.extents.append(self.raws[-1])
        return len(self.extents) - 1

    def held(self) -> list[File]:
        """Every file that was opened."""
        return [*(f.file for f in self.opened), *(x.where for x in self.raws if isinstance(x.where, File))]

    def digests(self) -> list[str]:
        """Of each file's header and pickle, and of what was sampled of files without."""
        return [*(f.digest for f in self.opened), *([assembly.sampled(self.raws)] if self.raws else [])]

    def _many(self, paths: Sequence[str], wanted: Wanted | None, trees: dict[bytes, Tree]) -> list[Opened]:
        """Files in order, opened by several threads; identical pickles are parsed once."""

        def load(path: str) -> TorchFile:
            return torchfile.load(path, check_crc=self.options.check_crc, wanted=wanted, known=trees)

        return [self._add(file) for file in each(load, paths, THREADS)]

    def _add(self, file: TorchFile) -> Opened:
        check_name(file.file.path, file.saved_as)
        base = len(self.extents)
        self.extents.extend(file.extents)
        self.opened.append(file)
        return Opened(file, base)


def _model_tensors(root: object, options: Options, copy: bool, first: OptimState | None) -> list[Tensor]:
    """What is needed of a model-states file: buffers, weights that no other file holds, all with `copy`, else
    those that tell whose masters an optimizer file holds."""
    state = model_state(root, "pickle")
    found = parts(state, "pickle")
    names: list[str] = list(found.buffers)
    if not options.exclude_frozen:
        names += found.kept
    if copy or state.shapes is None:
        names = list(state.module)
    elif first is not None and first.stage != 3:
        names += sampled(state.shapes, first.alignment, max(first.counts, default=1) or 1)
    tensors = [t for t in map(state.module.get, names) if isinstance(t, Tensor)]
    return tensors + ([] if options.exclude_frozen else list((state.fragments or {}).values()))


def _fragments(root: object) -> list[Tensor]:
    return list((model_state(root, "pickle").fragments or {}).values())


def optim_tensors(root: object) -> list[Tensor]:
    """What is needed of an optimizer file: the masters, and the step where it is a tensor."""
    state = optim_state(root, "pickle")
    return [*state.flats, *([state.step] if isinstance(state.step, Tensor) else [])]
