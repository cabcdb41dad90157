"""What will be done, before a tensor byte is read: targets named and compiled, files laid out.

Law: everything that shapes an output byte is in the plan's key, and nothing else is.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..checkpoint import JSON, Checkpoint
from ..collector import paused
from ..computed import prequantised, quantised_sources
from ..computed.nowhere import lies_nowhere
from ..digest import LEAF, values_digest
from ..dtypes import DType, float8_e4m3fn, float8_e5m2
from ..errors import LayoutError, ViewError
from ..extents import Extent, Extents
from ..layouts.naming import Naming
from ..output.files import FileLayout, Specs, safetensors_layout, split
from ..output.pickling import Wrap
from ..output.torchzip import torch_layout
from ..paths import pieces_of
from ..placement import Placement
from ..quantisation import quantised_config
from ..quantisation.quantised_targets import Expansion, Quantised
from ..target import Target
from . import configs, copies, plancache
from .batches import Slots
from .compiling import in_windows
from .copies import Chunk, Ints, Kept, Table
from .plancache import Compiled
from .planned import Made, PlannedTensors
from .request import Request
from .resolving import Resolved, resolve

KEPT_ROWS = 1 << 18
"""A plan keeps at most this many compiled rows (32 MiB); a larger one is compiled again as it runs."""

Stream = Callable[[], Iterator[tuple[int, Target]]]
"""Starts the targets of all ranks anew: (serving rank, target), in the plan's order."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be done.

    `key` digests all that shapes the output bytes, for all ranks alike. `ranks`: those this plan makes;
    `files` their layouts, `file_ranks` whose they are. `texts`: small files written beside (an index), as
    (rank, path, bytes). `config`: the text of a config.json that differs from the one beside the checkpoint
    (given apart, or another vocab_size), else None. `aliases`: tied name -> the name that is stored, on the
    ranks that hold that one and no tensor of the tied name.
    `options`: what the manifest repeats. `needed_bytes`: source bytes the outputs are made of; a byte that
    two ranks need counts for each; None where values are computed of others (merged, dequantised, one more),
    of which some are read for several. `notes`: what the user should know. `left_out`: names the layout made
    and `only` does not have. `quantised`: the tensors that are quantised, by index; `scans`: the uncut
    matrices whose largest magnitudes are read first."""

    key: str
    checkpoint: Checkpoint
    layout: str
    placement: Placement
    ranks: tuple[int, ...]
    tensors: PlannedTensors
    files: tuple[FileLayout, ...]
    file_ranks: tuple[int, ...]
    texts: tuple[tuple[int, str, bytes], ...]
    config: bytes | None
    aliases: Mapping[str, str]
    options: Mapping[str, JSON]
    extents: Extents
    stream: Stream
    kept: tuple[Kept, ...] | None
    needed_bytes: int | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    quantised: Mapping[int, Quantised] = field(default_factory=dict)
    scans: Stream | None = None

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """(first tensor, rows) of each window, in order: the kept rows, or compiled again.

        Raises LayoutError where other targets come than when the plan was made."""
        first = 0
        for chunk in self._again() if self.kept is None else (k.chunk() for k in self.kept):
            yield first, chunk
            first += chunk.count

    def _again(self) -> Iterator[Chunk]:
        """The windows compiled again: over the same table, so that what targets add to it (constants, what is
        computed) has the same numbers."""
        first, known = 0, len(self.checkpoint.extents)
        for window, chunk, table in in_windows(self.stream(), self.checkpoint.extents):
            stop = first + chunk.count
            same = Made.of(window) == self.tensors.made.part(first, stop) and len(table) <= len(self.extents)
            if not same or not all(_same(table[i], self.extents[i]) for i in range(known, len(table))):
                break
            yield chunk
            first, known = stop, len(table)
        if first != len(self.tensors):
            raise LayoutError(f"layout {self.layout} makes other tensors than when it was planned")

    @property
    def output_bytes(self) -> int:
        """Bytes of all output tensors."""
        return int(self.tensors.nbytes.sum())

    def slots(self) -> Slots:
        """Where the tensors lie, with their digest leaves numbered."""
        return self.tensors.slots()


@paused()
def draft(ckpt: Checkpoint, request: Request, *, in_memory: bool = False) -> Plan:
    """The plan for what was asked; `in_memory`: no files are laid out.

    Raises RecipeError, LayoutError, ViewError or, for what a file cannot spell, WriteError, before any byte
    of a tensor is read."""
    resolved = resolve(ckpt, request, to_files=not in_memory)
    ckpt, placement, expansion = resolved.checkpoint, request.placement, resolved.expansion
    ranks = tuple(range(placement.world)) if request.rank is None else (placement.at(request.rank).rank,)
    left_out: dict[str, None] = {}
    instead = {} if request.only is None else _named_instead(resolved.aliases, request.only)
    stream = _stream(resolved, request, ranks, instead, left_out)
    inputs = plancache.inputs(ckpt, placement, resolved.options)
    compiled, extents, needed = _kept_or_compiled(resolved, request, stream, [inputs, list(ranks)])
    made, quantised = compiled.made, compiled.quantised
    if expansion is not None:
        expansion.scanned.update(q.name for q in quantised.values() if q.scanned)
    rows = made.of_ranks(ranks)
    names = {r: [made.names[i] for i in own.tolist()] for r, own in rows.items()}
    _require_findable(resolved, names, quantised.values())
    tied = {a: instead.get(h, h) for a, h in resolved.aliases.items()}
    aliases = {a: h for own in names.values() for a, h in _present(tied, own).items()}
    notes = resolved.notes
    namings = {} if in_memory else {r: resolved.naming(placement.at(r)) for r in ranks}
    one_name = aliases and any(n.single.endswith(".safetensors") for n in namings.values())
    given = request.config is not None or ckpt.config is not None
    config = configs.found(ckpt, request.config) if one_name and given else {}
    if one_name and config.get("tie_word_embeddings") is not True:
        ties = ", ".join(f"{a} is {h}" for a, h in aliases.items())
        notes += (f"tied, stored under one name, and no config says so: {ties}",)
    tensors, files, texts = _laid_out(made, rows, namings, aliases, request)
    return Plan(
        key=values_digest([inputs, ckpt.headers, *([] if in_memory else _beside(ckpt))]),
        checkpoint=ckpt,
        layout=resolved.name,
        placement=placement,
        ranks=ranks,
        tensors=tensors,
        files=tuple(file for _, file in files),
        file_ranks=tuple(rank for rank, _ in files),
        texts=tuple(texts),
        config=configs.quantised(resolved.config, compiled.config),
        aliases=aliases,
        options=resolved.options,
        extents=extents,
        stream=stream,
        kept=compiled.chunks,
        needed_bytes=needed if all(map(_sources_known, extents)) else None,
        notes=notes,
        left_out=tuple(left_out),
        quantised=quantised,
        scans=None if expansion is None or not expansion.scanned else expansion.uncut,
    )


# ---- which targets, as rows ----


def _named_instead(aliases: Mapping[str, str], only: Mapping[str, DType]) -> dict[str, str]:
    """A stored name that is not asked for -> a name tied to it that is."""
    out: dict[str, str] = {}
    for alias, holder in aliases.items():
        if holder not in only and alias in only:
            out.setdefault(holder, alias)
    return out


def _stream(
    resolved: Resolved,
    request: Request,
    ranks: Sequence[int],
    instead: Mapping[str, str],
    left_out: dict[str, None],
) -> Stream:
    """The targets of these ranks; names that `only` lacks go to `left_out` as they pass."""
    expansion, only = resolved.expansion, request.only

    def of_rank(rank: int) -> Iterator[tuple[int, Target]]:
        targets = resolved.targets(request.placement.at(rank))
        return zip(itertools.repeat(rank), targets if expansion is None else expansion.targets(targets))

    def in_turn() -> Iterator[tuple[int, Target]]:
        # Rank after rank for each tensor, so that a tensor's source pages serve all ranks while warm.
        # A list: in a map, a StopIteration that a layout lets out would end the ranks, and be no error.
        turns = itertools.zip_longest(*[of_rank(rank) for rank in ranks])
        return (target for turn in turns for target in turn if target is not None)

    if only is None:
        return in_turn
    scaled = any(quantised_sources.of_matrices(resolved.checkpoint))
    return lambda: _as_asked(in_turn(), only, scaled, instead, left_out)


def _as_asked(
    targets: Iterable[tuple[int, Target]],
    only: Mapping[str, DType],
    scaled: bool,
    instead: Mapping[str, str],
    left_out: dict[str, None],
) -> Iterator[tuple[int, Target]]:
    """The targets of those names, each as its dtype; `scaled`: some are values of quantised matrices."""
    for rank, target in targets:
        name = target.name
        if name not in only:
            left_out[name] = None
            name = instead.get(name, name)
            if name not in only:
                continue
        view, kind = target.view, only[name]
        if scaled and view.dtype in (float8_e4m3fn, float8_e5m2) and view.dtype is not kind:
            raise LayoutError(
                f"{target.name} is quantised, so its bytes cannot become {kind}; "
                'quant="none" (--quant none) makes dense weights'
            )
        try:
            view = view.cast(kind)
        except ViewError as e:
            raise ViewError(f"{name}: {e}") from None
        yield rank, Target(name, view, target.shape)


def _beside(ckpt: Checkpoint) -> list[JSON]:
    """The digests of config and tokenizer files, which go with the weights: a rank whose output has others is
    not done."""
    out: list[JSON] = []
    for file in ckpt.beside:
        seen = xxhash.xxh3_64()
        for piece in pieces_of(file.path, LEAF):
            seen.update(piece)
        out.append(seen.hexdigest())
    return out


def _kept_or_compiled(
    resolved: Resolved, request: Request, stream: Stream, inputs: list[JSON]
) -> tuple[Compiled, Extents, int]:
    """The tensors and their rows, kept or made now; the extent table they index; the source bytes needed."""
    extents, expansion = resolved.checkpoint.extents, resolved.expansion
    if request.only is not None or not resolved.ours or not resolved.checkpoint.structure:
        return _compiled(stream, extents, expansion)
    key = values_digest([*inputs, plancache.code()])
    kept = plancache.load(key, len(extents), None if expansion is None else expansion.quant.scheme)
    if kept is not None:
        own = {name: name for name in resolved.checkpoint.entries}  # one string for both
        kept.made.names[:] = [own.get(name, name) for name in kept.made.names]
        dense = prequantised.dense_bytes(extents)
        return kept, extents, sum(_needed(k.chunk().rows, dense) for k in kept.chunks or ())
    made, table, needed = _compiled(stream, extents, expansion)
    if table is extents:
        plancache.store(key, len(extents), made)
    return made, table, needed


def _compiled(stream: Stream, extents: Extents, expansion: Expansion | None) -> tuple[Compiled, Extents, int]:
    """Every tensor in order and the rows of all; the extent table they index; the source bytes needed."""
    spelled: dict[str, JSON] = {}
    if expansion is not None:
        spelled = quantised_config.quantization_config(expansion.quant, expansion.shapes())
    made = Made()
    quantised: dict[int, Quantised] = {}
    kept: list[Kept] | None = []
    rows = needed = 0
    dense = prequantised.dense_bytes(extents)
    for window, chunk, table in in_windows(stream(), extents):
        extents = table
        if expansion is not None:
            chosen = ((i, t) for i, (_, t) in enumerate(window, len(made)) if t.scheme is not None)
            quantised |= {i: expansion.quantised(t) for i, t in chosen}
        made.extend(window)
        rows += len(chunk.rows)
        needed += _needed(chunk.rows, dense)
        if rows > KEPT_ROWS:
            kept = None
        elif kept is not None:
            kept.append(Kept.of(chunk))
    chunks = None if kept is None else tuple(kept)
    return Compiled(made, chunks, _with_scales(made, quantised), spelled), extents, needed


def _with_scales(made: Made, quantised: Mapping[int, Quantised]) -> dict[int, Quantised]:
    """Where what goes with each of the tensors lies: ranks take turns, so it is found by name."""
    if not quantised:
        return {}
    at = {key: i for i, key in enumerate(zip(made.ranks, made.names, strict=True))}
    out = {}
    for i, matrix in quantised.items():
        rank, scheme = made.ranks[i], matrix.scheme
        scales, zeros, form = (
            at[rank, scheme.named(matrix.name, part)] if part else None
            for part in (scheme.scale, scheme.zero, scheme.form)
        )
        assert scales is not None  # every scheme has scales
        out[i] = replace(matrix, scales=scales, zeros=zeros, form=form)
    return out


def _same(one: Extent, other: Extent) -> bool:
    """Whether two extents are one, or were computed alike."""
    computed = lies_nowhere(one) and lies_nowhere(other)
    return one == other or (computed and (one.key, one.nbytes) == (other.key, other.nbytes))


def _sources_known(extent: Extent) -> bool:
    """Whether it is known which source bytes an extent's bytes are made of."""
    return not lies_nowhere(extent) or prequantised.owner(extent) is not None


def _needed(rows: Table, dense: NDArray[np.float64]) -> int:
    """Source bytes of the rows; `dense`: by extent, for each byte of what is quantised when it is read the
    bytes it is made of. All others count as they are."""
    moved = copies.nbytes(rows, "src")
    made = rows["src_buffer"] < len(dense)
    return int(moved[~made].sum() + (moved[made] * dense[rows["src_buffer"][made]]).sum())


# ---- what is made of them ----


def _require_findable(
    resolved: Resolved, names: Mapping[int, Sequence[str]], quantised: Iterable[Quantised]
) -> None:
    """Raises LayoutError for two tensors of one name, and for a quantised one that another shares."""
    for rank, own in names.items():
        if len(set(own)) != len(own):
            twice = Counter(own).most_common(1)[0][0]
            raise LayoutError(f"layout {resolved.name}: two tensors named {twice} on rank {rank}")
    for matrix in quantised:
        if matrix.name in resolved.aliases.values():
            raise LayoutError(
                f"quant: {matrix.name} is tied to another tensor, which would not find its scales"
            )


def _present(aliases: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The aliases whose holder is among a rank's names, and which are no tensor of its own there."""
    if not aliases:
        return {}
    own = set(names)
    return {a: h for a, h in aliases.items() if h in own and a not in own}


def _laid_out(
    made: Made,
    rows: Mapping[int, Ints],
    namings: Mapping[int, Naming],
    aliases: Mapping[str, str],
    request: Request,
) -> tuple[PlannedTensors, list[tuple[int, FileLayout]], list[tuple[int, str, bytes]]]:
    """Where the tensors lie: files and indices of each rank, or in memory, where it has no naming."""
    nbytes, file, offset = made.nbytes(), np.zeros(len(made), np.int64), np.zeros(len(made), np.int64)
    files: list[tuple[int, FileLayout]] = []
    texts: list[tuple[int, str, bytes]] = []
    for k, (rank, own) in enumerate(rows.items()):
        naming = namings.get(rank)
        if naming is None:
            file[own], offset[own] = k, np.cumsum(nbytes[own]) - nbytes[own]
            continue
        specs = made.specs(own)
        laid, index = _files(specs, naming, _present(aliases, specs.names), request)
        at = {made.names[i]: i for i in own.tolist()}
        for layout in laid:
            placed = np.fromiter((at[name] for name in layout.slots.names), np.int64)
            file[placed], offset[placed] = len(files), layout.slots.offset
            files.append((rank, layout))
        texts += [(rank, path, data) for path, data in index]
    return PlannedTensors(made, file, offset, nbytes), files, texts


def _files(
    specs: Specs, naming: Naming, aliases: Mapping[str, str], request: Request
) -> tuple[list[FileLayout], list[tuple[str, bytes]]]:
    """One rank's files and their index."""
    container = os.path.splitext(naming.single)[1]
    if container == ".safetensors" and request.weights_key:
        raise LayoutError("weights_key and client_state make a training checkpoint: one .bin, no safetensors")
    # A .bin holds both names of a tied pair; safetensors, and so its index, hold one.
    parts = split(specs, request.max_shard_size, naming.file, aliases if container == ".bin" else {})
    folder = f"{naming.directory}/" if naming.directory else ""
    files = []
    for group in parts.groups:
        if container == ".bin":
            wrap = Wrap(request.weights_key, request.client_state or {}) if request.weights_key else None
            files.append(torch_layout(folder + group.path, group.tensors, group.aliases, wrap))
        else:
            files.append(
                safetensors_layout(
                    folder + group.path,
                    group.tensors,
                    naming.metadata,
                    {a: h for a, h in aliases.items() if h in group.tensors.names},
                    keep_order=not request.sorted,
                )
            )
    index = [] if naming.index is None or parts.index is None else [(folder + naming.index, parts.index)]
    return files, index
