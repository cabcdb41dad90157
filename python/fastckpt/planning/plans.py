"""What will be done, before a tensor byte is read: recipe and layout chosen, targets named, files laid out.

Law: everything that shapes an output byte is in the plan's key, and nothing else is.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from .. import layouts, recipes
from ..checkpoint import JSON, Cast, Checkpoint
from ..collector import paused
from ..computed import adapters, apart, dequantised
from ..computed.adapters import Adapter
from ..computed.lowrank import lies_nowhere
from ..dtypes import DType, float8_e4m3fn, float8_e5m2, float32
from ..dtypes import dtype as dtype_of
from ..errors import LayoutError, RecipeError, SourceError, expect
from ..extents import Extent, Extents, is_directory
from ..layouts import Adapts, Layout, Resizes
from ..layouts.naming import Naming
from ..layouts.patterns import Patterns
from ..model import Model, Sizes
from ..output.files import FileLayout, Spec, safetensors_layout, split
from ..output.torchzip import Wrap, torch_layout
from ..placement import Placement
from ..quantisation import prequantised, quantplan
from ..quantisation.quantplan import Expansion, Quantised
from ..quantisation.schemes import SCHEMES, Quant
from ..target import Target
from . import plancache, planner
from .plancache import Compiled
from .planned import Ints, Names, PlannedTensors
from .planner import Chunk, Kept, Slots, Table

KEPT_ROWS = 1 << 18
"""A plan keeps at most this many compiled rows (32 MiB); a larger one is compiled again as it runs."""

VERSION = 2
"""Part of every plan key; raised when the same inputs would give other bytes."""

Stream = Callable[[], Iterator[tuple[int, Target]]]
"""Starts the targets of all ranks anew: (serving rank, target), in the plan's order."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller asked for, apart from the checkpoint and the place to put it.

    `placement` and `rank` (None: all ranks); `layout` by name or as an object; `config` as a path or a
    mapping (None: the checkpoint's own); `recipe` by name (None: what served shards were cut with, else by
    the config); `tp_plan` name pattern -> style; `vocab_size`: the embedding rows that count; `dtype` (None:
    as stored, "auto": the config's); `max_shard_size` of a file; `container`: "safetensors" or "bin";
    `sorted`: files ordered as safetensors' save_file orders them, not as the source lies; `weights_key`,
    `client_state`: a training
    checkpoint around a single `.bin`; `held`: only these names are
    made, each as its dtype (a module to fill); `quant`: what is quantised on the way, and how;
    `dense`: what is quantised already is dequantised (dtype None: to what the config names, else bfloat16);
    `adapter`: a PEFT adapter's directory, merged into the checkpoint, or with `apart` cut as the layout cuts
    it (hf, rtp_llm)."""

    placement: Placement
    rank: int | None = None
    layout: str | Layout = "hf"
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None
    recipe: str | None = None
    tp_plan: Mapping[str, str] | None = None
    vocab_size: int | None = None
    dtype: str | DType | None = None
    max_shard_size: str | int | None = "5GB"
    sorted: bool = False
    weights_key: str | None = None
    client_state: Mapping[str, JSON] | None = None
    held: Mapping[str, DType] | None = None
    quant: Quant | None = None
    dense: bool = False
    adapter: str | os.PathLike[str] | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        nothing = type(None)
        expect("placement", self.placement, Placement)
        expect("rank", self.rank, int, nothing)
        if not isinstance(self.layout, str) and not all(
            hasattr(self.layout, part) and not isinstance(self.layout, type)
            for part in ("roles", "targets", "naming")
        ):
            raise LayoutError(f"layout: wanted a name or a layout's object, got {self.layout!r:.80}")
        expect("config", self.config, str, os.PathLike, Mapping, nothing)
        expect("recipe", self.recipe, str, nothing)
        expect("tp_plan", self.tp_plan, Mapping, nothing)
        for pattern, style in (self.tp_plan or {}).items():
            expect("tp_plan: a pattern", pattern, str)
            expect(f"tp_plan: the style of {pattern!r}", style, str)
        expect("vocab_size", self.vocab_size, int, nothing)
        expect("max_shard_size", self.max_shard_size, str, int, nothing)
        expect("adapter", self.adapter, str, os.PathLike, nothing)
        expect("apart", self.apart, bool)
        if self.apart and self.adapter is None:
            raise LayoutError("apart goes with adapter=: it is the adapter that is kept apart")
        expect("weights_key", self.weights_key, str, nothing)
        if self.weights_key == "":
            raise LayoutError("weights_key: wanted a key, got the empty string")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be done.

    `key` digests all that shapes the output bytes, for all ranks alike. `ranks`: those this plan makes;
    `files` their layouts, `file_ranks` whose they are. `texts`: small files written beside (an index), as
    (rank, path, bytes). `config`: the text of a config.json that differs from the one beside the checkpoint
    (given apart, or another vocab_size), else None. `aliases`: tied name -> the name that is stored.
    `options`: what the manifest repeats. `needed_bytes`: source bytes the outputs are made of; a byte that
    two ranks need counts for each; None where values are computed of others (merged, dequantised, one more),
    of which some are read for several. `notes`: what the user should know. `left_out`: names the layout made
    and `held` does not have. `quantised`: the tensors that are quantised, by index; `scans`: the uncut
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
        """(first tensor, rows) of each window, in order: the kept rows, or compiled again."""
        again = (chunk for _, chunk, _ in planner.compiled(self.stream(), self.extents))
        first = 0
        for chunk in again if self.kept is None else (k.chunk() for k in self.kept):
            yield first, chunk
            first += chunk.count

    @property
    def output_bytes(self) -> int:
        """Bytes of all output tensors."""
        return int(self.tensors.nbytes.sum())

    def slots(self) -> Slots:
        """Where the tensors lie, with their digest leaves numbered."""
        return self.tensors.slots()


@paused()
def draft(ckpt: Checkpoint, wanted: Wanted, *, in_memory: bool = False) -> Plan:
    """The plan for what was asked; `in_memory`: no files are laid out.

    Raises RecipeError, LayoutError, ViewError or, for what a file cannot spell, WriteError, before any byte
    of a tensor is read."""
    road = _Road.of(ckpt, wanted)
    placement = wanted.placement
    ranks = tuple(range(placement.world)) if wanted.rank is None else (placement.at(wanted.rank).rank,)
    left_out: dict[str, None] = {}
    expansion = road.expansion

    scaled = wanted.held is not None and any(dequantised.of_matrices(road.checkpoint))
    named_instead: dict[str, str] = {}  # a stored name that is not held -> a name tied to it that is
    for alias, holder in road.aliases.items():
        if wanted.held is not None and holder not in wanted.held and alias in wanted.held:
            named_instead.setdefault(holder, alias)

    def of_rank(rank: int) -> Iterator[Target]:
        targets = road.targets(placement.at(rank))
        return targets if expansion is None else expansion.targets(targets)

    def stream() -> Iterator[tuple[int, Target]]:
        # Rank after rank for each tensor, so that a tensor's source pages serve all ranks while warm.
        for targets in itertools.zip_longest(*(of_rank(r) for r in ranks)):
            for rank, target in zip(ranks, targets, strict=True):
                if target is None:
                    continue
                if wanted.held is not None:
                    name = target.name
                    if name not in wanted.held:
                        left_out[name] = None
                        if (name := named_instead.get(name, name)) not in wanted.held:
                            continue
                    view, kind = target.view, wanted.held[name]
                    if scaled and view.dtype in (float8_e4m3fn, float8_e5m2) and view.dtype is not kind:
                        raise LayoutError(
                            f"{target.name} is quantised, so its bytes cannot become {kind}; "
                            'reshard(quant="none") makes dense weights'
                        )
                    target = Target(name, view.cast(kind), target.shape)
                yield rank, target

    extents = road.checkpoint.extents
    cacheable = wanted.held is None and road.ours and bool(road.checkpoint.structure)
    inputs = road.inputs(placement)
    key = _digest([inputs, list(ranks), plancache.code()])
    scheme = None if expansion is None else expansion.quant.scheme
    found = plancache.load(key, len(extents), scheme) if cacheable else None
    quantised: Mapping[int, Quantised] = {}
    kept: Sequence[Kept] | None
    if found is None:
        spelled = {}
        if expansion is not None:
            spelled = quantplan.quantization_config(expansion.quant, expansion.shapes())
        made, kept, extents, needed, quantised = _compiled(stream, extents, expansion)
        if cacheable and kept is not None and extents is road.checkpoint.extents:
            plancache.store(key, len(extents), Compiled(made, tuple(kept), quantised, spelled))
    else:
        made, kept, quantised, spelled = found.made, found.chunks, found.quantised, dict(found.config)
        dense = prequantised.dense_bytes(extents)
        needed = sum(_needed(k.chunk().rows, dense) for k in kept)
    if expansion is not None:
        expansion.scanned.update(q.name for q in quantised.values() if q.scanned)
    rows = {r: made.of_rank(r) for r in ranks}
    for rank, own in rows.items():
        names = [made.names[i] for i in own.tolist()]
        if len(set(names)) != len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise LayoutError(f"layout {road.name}: two tensors named {twice} on rank {rank}")
    for told in quantised.values():
        if told.name in road.aliases.values():
            raise LayoutError(
                f"quant: {told.name} is tied to another tensor, which would not find its scales"
            )
    aliases = _present({a: named_instead.get(h, h) for a, h in road.aliases.items()}, made, rows.values())
    notes = road.notes
    one_name = aliases and not in_memory and road.naming(placement).single.endswith(".safetensors")
    if one_name and (road.checkpoint.config or {}).get("tie_word_embeddings") is not True:
        ties = ", ".join(f"{a} is {h}" for a, h in aliases.items())
        notes += (f"tied, stored under one name, and no config says so: {ties}",)
    files: list[FileLayout] = []
    file_ranks: list[int] = []
    texts: list[tuple[int, str, bytes]] = []
    nbytes = made.nbytes()
    file, offset = np.zeros(len(made), np.int64), np.zeros(len(made), np.int64)
    for k, (rank, own) in enumerate(rows.items()):
        if in_memory:
            file[own], offset[own] = k, np.cumsum(nbytes[own]) - nbytes[own]
            continue
        laid, index = _files(made.specs(own), road.naming(placement.at(rank)), aliases, wanted)
        at = {made.names[i]: i for i in own.tolist()}
        for layout in laid:
            placed = np.fromiter((at[name] for name in layout.slots.names), np.int64)
            file[placed], offset[placed] = len(files), layout.slots.offset
            files.append(layout)
            file_ranks.append(rank)
        texts += [(rank, path, data) for path, data in index]
    return Plan(
        key=_digest([inputs, [], road.checkpoint.headers]),
        checkpoint=road.checkpoint,
        layout=road.name,
        placement=placement,
        ranks=ranks,
        tensors=PlannedTensors(made, file, offset, nbytes),
        files=tuple(files),
        file_ranks=tuple(file_ranks),
        texts=tuple(texts),
        config=_quantised_config(road.config, spelled),
        aliases=aliases,
        options=road.options,
        extents=extents,
        stream=stream,
        kept=None if kept is None else tuple(kept),
        needed_bytes=needed if all(map(_told, extents)) else None,
        notes=notes,
        left_out=tuple(left_out),
        quantised=quantised,
        scans=None if expansion is None or not expansion.scanned else expansion.uncut,
    )


def _told(extent: Extent) -> bool:
    """Whether it is known which source bytes an extent's bytes are made of."""
    return not lies_nowhere(extent) or prequantised.owner(extent) is not None


def _present(aliases: Mapping[str, str], made: Names, ranks: Iterable[Ints]) -> dict[str, str]:
    """The aliases whose holder every rank has, and which no rank has as a tensor of its own."""
    if not aliases:
        return {}
    named = [{made.names[i] for i in own.tolist()} for own in ranks]
    return {a: h for a, h in aliases.items() if all(h in names and a not in names for names in named)}


def _digest(told: JSON) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True).encode())


def _compiled(
    stream: Stream, extents: Extents, expansion: Expansion | None
) -> tuple[Names, list[Kept] | None, Extents, int, dict[int, Quantised]]:
    """Every tensor in order, the rows of all (None where they are too many to keep), their table, the
    source bytes they need, and what of it is quantised."""
    made = Names()
    quantised: dict[int, Quantised] = {}
    kept: list[Kept] | None = []
    rows = needed = 0
    dense = prequantised.dense_bytes(extents)
    for window, chunk, table in planner.compiled(stream(), extents):
        extents = table
        for rank, t in window:
            if expansion is not None and t.scheme is not None:
                quantised[len(made)] = expansion.quantised(t)
            made.add(rank, t.name, t.dtype, t.stored_shape)
        rows += len(chunk.rows)
        needed += _needed(chunk.rows, dense)
        if rows > KEPT_ROWS:
            kept = None
        elif kept is not None:
            kept.append(Kept.of(chunk))
    if quantised:  # ranks take turns, so what goes with a tensor is found by name
        at = {key: i for i, key in enumerate(zip(made.ranks, made.names, strict=True))}
        for i, told in quantised.items():
            rank, scheme = made.ranks[i], told.scheme
            scales, zeros, form = (
                at[rank, scheme.named(told.name, part)] if part else None
                for part in (scheme.scale, scheme.zero, scheme.form)
            )
            assert scales is not None  # every scheme has scales
            quantised[i] = replace(told, scales=scales, zeros=zeros, form=form)
    return made, kept, extents, needed, quantised


def _needed(rows: Table, dense: NDArray[np.float64]) -> int:
    """Source bytes of the rows; `dense`: by extent, for each byte of what is quantised when it is read the
    bytes it is made of. All others count as they are."""
    moved = planner.nbytes(rows, "src")
    made = rows["src_buffer"] < len(dense)
    return int(moved[~made].sum() + (moved[made] * dense[rows["src_buffer"][made]]).sum())


@dataclass(frozen=True, slots=True)
class _Road:
    """Recipe and layout, chosen and joined: how to make a placement's targets."""

    name: str
    checkpoint: Checkpoint
    targets: Callable[[Placement], Iterator[Target]]
    naming: Callable[[Placement], Naming]
    config: bytes | None
    aliases: Mapping[str, str]
    options: Mapping[str, JSON]
    notes: tuple[str, ...]
    ours: bool
    """Whether recipe and layout are this package's, so that their code is known to a plan's key."""
    expansion: Expansion | None = None

    @staticmethod
    def of(ckpt: Checkpoint, wanted: Wanted) -> _Road:
        if wanted.dense:
            ckpt, wanted = _densified(ckpt, wanted)
        beside = any(os.path.basename(path) == "config.json" for path in ckpt.beside)
        if wanted.config is None and ckpt.config is not None and ("unpadded" in ckpt.facts or not beside):
            wanted = replace(wanted, config=ckpt.config)  # there is none beside, or that of padded shards
        layout = layouts.layout(wanted.layout) if isinstance(wanted.layout, str) else wanted.layout
        if wanted.tp_plan is not None:
            if _layout_name(layout) != "hf":
                raise LayoutError(f"tp_plan goes with layout hf, not {_layout_name(layout)}")
            layout = Patterns(wanted.tp_plan)
        config = None if wanted.config is None else _config(ckpt, wanted.config)
        if layout.roles or wanted.dtype == "auto":
            config = _config(ckpt, wanted.config)
        dtype = _dtype(config, wanted.dtype)
        adapter = None if wanted.adapter is None else adapters.fit(ckpt, os.fspath(wanted.adapter))
        if wanted.apart and (
            adapter is None
            or not (_layout_name(layout) == "hf" or isinstance(layout, Adapts))
            or wanted.tp_plan
            or wanted.quant
        ):
            raise LayoutError(
                "an adapter is kept apart in layouts hf and rtp_llm alone, as it is: no tp_plan, no quant "
                "(vLLM cuts adapters itself: it takes that of layout hf at tp 1)"
            )
        if adapter is not None:
            # What is cast to a module's dtypes at the end is not rounded before.
            whole = float32 if wanted.held is not None else dtype
            ckpt = apart.hollow(adapter, dtype) if wanted.apart else adapters.merged(adapter, whole)
        if dtype is not None:
            dequantised.require_as_stored(ckpt, dtype, scales=not layout.roles)
        cast = ckpt if dtype is None else replace(ckpt, entries=Cast(ckpt.entries, dtype))
        options: dict[str, JSON] = {
            "layout": _layout_name(layout),
            "layout_options": repr(layout),
            "layout_fields": dict(layouts.options_of(layout)),
            "tp_plan": None if wanted.tp_plan is None else dict(wanted.tp_plan),
            "dtype": None if dtype is None else dtype.name,
            "max_shard_size": wanted.max_shard_size,
            "vocab_size": wanted.vocab_size,
            "sorted": wanted.sorted,
            "weights_key": wanted.weights_key,
            "client_state": None if wanted.client_state is None else dict(wanted.client_state),
        }
        if wanted.quant is not None:
            options["quant"] = {
                "scheme": wanted.quant.scheme.name,
                "include": list(wanted.quant.include),
                "exclude": list(wanted.quant.exclude),
            }
            if wanted.quant.scheme != SCHEMES.get(wanted.quant.scheme.name):
                options["scheme"] = repr(wanted.quant.scheme)  # the caller's own, whatever its name
        if wanted.dense:
            options["dense"] = True
        if adapter is not None:
            options["adapter"] = ["apart" if wanted.apart else "merged", *adapter.digests()]
        notes = tuple(str(n) for n in _list(ckpt.facts.get("notes")))
        own_layout = type(layout) in (*layouts.LAYOUTS.values(), Patterns)
        if not layout.roles:
            by_names = layout
            if wanted.vocab_size is not None:  # the config would say it, and no tensor would be cut
                raise LayoutError(f"vocab_size goes with layouts that read roles, not {_layout_name(layout)}")
            if wanted.quant is not None and (config is not None or ckpt.config is not None):
                config = _config(ckpt, wanted.config)
            return _Road(
                _layout_name(layout),
                cast,
                lambda p: by_names.targets(cast, p),
                layout.naming,
                _config_text(config, wanted),
                ckpt.aliases,
                options,
                notes,
                own_layout,
            )._quantising(wanted, config, None)
        by_roles = layout
        assert config is not None
        told = ckpt.facts.get("recipe")
        asked = told if wanted.recipe is None and isinstance(told, str) else wanted.recipe
        recipe = recipes.find(config) if asked is None else recipes.named(asked)
        quant = wanted.quant
        engine = str(dict(layouts.options_of(layout)).get("engine") or "")
        if quant is not None and prequantised.fits(_layout_name(layout), engine, cast, quant):
            _require_dense(quant, wanted, layout.naming(wanted.placement), config)
            cast, config = prequantised.made(cast, config, quant)
            wanted = replace(wanted, config=config, quant=None)
            options["prequantised"] = options.pop("quant")  # the shards can be joined, as quantised ones
        model = recipes.model(recipe, cast, config, wanted.vocab_size)
        options["family"] = model.family
        options["recipe"] = asked
        options["config"] = xxhash.xxh3_64_hexdigest(json.dumps(dict(config), sort_keys=True).encode())
        if len(model.predictions) and _layout_name(layout) != "hf":
            notes += (f"layout {_layout_name(layout)} leaves out the layers of multi-token prediction",)
        resized = layout.resized(model, wanted.placement) if isinstance(layout, Resizes) else {}
        if resized:
            notes += (f"padded; config.json says so: {', '.join(f'{k} {n}' for k, n in resized.items())}",)
        changed = {**resized, **(quantplan.fused_config(config, cast.entries) if engine else {})}
        if changed:
            options["resized"] = {key: config.get(key) for key in changed}
        if model.ignored:
            notes += (f"left out, known to {model.family}: {', '.join(model.ignored)}",)
        aliases = {f"{model.lm_head.name}.weight": f"{model.embedding.name}.weight"} if model.tied else {}
        if adapter is not None and not wanted.apart and adapter.changed & {*aliases, *aliases.values()}:
            raise LayoutError(
                f"adapter: {' and '.join(*aliases.items())} are one tensor, and it changes one of "
                "them; a base that has both, with tie_word_embeddings false, has a place for it"
            )
        road = _Road(
            _layout_name(layout),
            cast,
            lambda p: by_roles.targets(model, p),
            layout.naming,
            _config_text(config, wanted, changed),
            aliases,
            options,
            notes,
            own_layout and recipe in recipes.RECIPES.values(),
        )
        if adapter is not None and wanted.apart:
            if isinstance(by_roles, Adapts):
                return road._thin_by_roles(by_roles, model, adapter, dtype)
            return road._thin(adapter, dtype)
        return road._quantising(wanted, config, model.sizes)

    def _thin(self, adapter: Adapter, dtype: DType | None) -> _Road:
        """This road with the adapter alone, where each rank holds its part of the base."""
        return replace(
            self,
            targets=lambda p: apart.cut(self.targets(p), adapter, dtype),
            naming=lambda p: apart.naming(self.naming(p)),
            config=None,
            aliases={},
        )

    def _thin_by_roles(self, layout: Adapts, model: Model, adapter: Adapter, dtype: DType | None) -> _Road:
        """This road with the adapter alone, under the layout's names; its scale is in it, so that PEFT's
        config does not go beside it."""

        def targets(p: Placement) -> Iterator[Target]:
            return apart.by_roles(lambda thin: layout.adapted(model, p, thin), adapter, dtype)

        return replace(
            self,
            checkpoint=replace(self.checkpoint, beside=()),
            targets=targets,
            naming=layout.adapted_naming,
            config=None,
            aliases={},
        )

    def _quantising(self, wanted: Wanted, config: Mapping[str, JSON] | None, sizes: Sizes | None) -> _Road:
        """This road with what `wanted.quant` asks for, told in the config too."""
        quant = wanted.quant
        if quant is None:
            return self
        _require_dense(quant, wanted, self.naming(wanted.placement), config)
        text = self.config
        if config is not None and text is None:
            text = json.dumps(dict(config)).encode()
        expansion = Expansion(quant, self.name, wanted.placement, lambda: self.targets(Placement()), sizes)
        return replace(self, config=text, expansion=expansion)

    def inputs(self, placement: Placement) -> str:
        """The digest of all that shapes the output, for all ranks alike."""
        grid = placement.tp, placement.pp, placement.dp, placement.ep
        ckpt = self.checkpoint
        # What was opened may have been changed since: names, dtypes and shapes count beside the structure.
        kinds: dict[tuple[int, tuple[int, ...]], int] = {}
        kind = [kinds.setdefault((e.dtype.code, e.shape), len(kinds)) for e in ckpt.entries.values()]
        seen = xxhash.xxh3_128("\0".join(ckpt.entries).encode(errors="surrogatepass"))
        seen.update(np.array(kind, np.int64).tobytes())
        told: list[JSON] = [VERSION, ckpt.structure, seen.hexdigest(), list(grid)]
        told += [[code, *shape] for code, shape in kinds]
        if not ckpt.structure:
            told += [[e.key, e.nbytes] for e in ckpt.extents]
        return _digest([*told, dict(self.options)])


def _require_dense(quant: Quant, wanted: Wanted, naming: Naming, config: Mapping[str, JSON] | None) -> None:
    """Raises LayoutError where the output, or the source as its config has it, cannot be quantised."""
    if wanted.held is not None or naming.single.endswith(".bin"):
        raise LayoutError(f"quant {quant.scheme.name}: wanted safetensors or fresh tensors as the output")
    if config is not None and "quantization_config" in config:
        raise LayoutError(f"quant {quant.scheme.name}: the config says that the source is quantised already")


def _layout_name(layout: Layout) -> str:
    if isinstance(layout, Patterns):
        return "hf"
    known = [name for name, kind in layouts.LAYOUTS.items() if type(layout) is kind]
    return known[0] if known else type(layout).__name__.lower()


def _list(value: JSON) -> list[JSON]:
    return value if isinstance(value, list) else []


def _config(
    ckpt: Checkpoint, given: str | os.PathLike[str] | Mapping[str, JSON] | None
) -> Mapping[str, JSON]:
    """The model's config: given as a mapping or a path, or found beside the checkpoint."""
    if isinstance(given, Mapping):
        try:
            json.dumps(dict(given))
        except (TypeError, ValueError) as e:
            raise RecipeError(f"config: wanted plain values, as config.json holds them: {e}") from None
        return given
    if given is None:
        if ckpt.config is None:
            raise RecipeError(
                f"{ckpt.path}: no config.json beside it; say where it is (config=), "
                'or use layout "same" or a tp_plan'
            )
        return ckpt.config
    path = os.fspath(given)
    if is_directory(path):
        path = os.path.join(path, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise SourceError(f"{path}: not JSON: {e}") from None
    if not isinstance(found, dict):
        raise SourceError(f"{path}: wanted a JSON object, got {type(found).__name__}")
    return found


def _config_text(
    config: Mapping[str, JSON] | None, wanted: Wanted, changed: Mapping[str, JSON] | None = None
) -> bytes | None:
    """The config.json to write in place of the one beside the checkpoint, if another was asked for, or if
    sizes were padded."""
    if config is None or (wanted.config is None and wanted.vocab_size is None and not changed):
        return None
    told = dict(config) if wanted.vocab_size is None else {**config, "vocab_size": wanted.vocab_size}
    told |= changed or {}
    return (json.dumps(told, indent=2) + "\n").encode()


def _quantised_config(config: bytes | None, spelled: Mapping[str, JSON]) -> bytes | None:
    """The config.json with its `quantization_config`, where there is one."""
    if config is None or not spelled:
        return config
    return (json.dumps({**json.loads(config), "quantization_config": spelled}, indent=2) + "\n").encode()


def _dtype(config: Mapping[str, JSON] | None, asked: str | DType | None) -> DType | None:
    if asked != "auto" or isinstance(asked, DType):
        return None if asked is None else dtype_of(asked)
    for key in ("dtype", "torch_dtype"):
        named = (config or {}).get(key)
        if isinstance(named, str):
            return dtype_of(named)
    raise RecipeError('dtype "auto": the config names no dtype or torch_dtype')


def _densified(ckpt: Checkpoint, wanted: Wanted) -> tuple[Checkpoint, Wanted]:
    """The checkpoint with its quantised matrices as dense ones, and a config that does not speak of them."""
    if wanted.adapter is not None:
        raise LayoutError("quant none: an adapter is merged into what is dense already; write that first")
    config = None if wanted.config is None and ckpt.config is None else _config(ckpt, wanted.config)
    ckpt, told = dequantised.plain(ckpt, config, _dtype(config, wanted.dtype))
    return ckpt, replace(wanted, config=told)


def _files(
    specs: list[Spec], naming: Naming, aliases: Mapping[str, str], wanted: Wanted
) -> tuple[list[FileLayout], list[tuple[str, bytes]]]:
    """One rank's files and their index."""
    container = os.path.splitext(naming.single)[1]
    if container == ".safetensors" and (wanted.weights_key or wanted.client_state):
        raise LayoutError("weights_key and client_state make a training checkpoint: one .bin, no safetensors")
    # A .bin holds both names of a tied pair; safetensors, and so its index, hold one.
    parts = split(specs, wanted.max_shard_size, naming.file, aliases if container == ".bin" else {})
    folder = f"{naming.directory}/" if naming.directory else ""
    files = []
    for group in parts.groups:
        if container == ".bin":
            wrap = Wrap(wanted.weights_key, wanted.client_state or {}) if wanted.weights_key else None
            files.append(torch_layout(folder + group.path, group.tensors, group.aliases, wrap))
        else:
            files.append(
                safetensors_layout(
                    folder + group.path,
                    group.tensors,
                    naming.metadata,
                    {a: h for a, h in aliases.items() if any(h == name for name, _, _ in group.tensors)},
                    keep_order=not wanted.sorted,
                )
            )
    index = [] if naming.index is None or parts.index is None else [(folder + naming.index, parts.index)]
    return files, index
