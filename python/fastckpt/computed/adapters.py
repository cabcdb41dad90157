"""PEFT adapters (LoRA): what their names mean, and how they are merged into a base.
`adapter_shards` keeps them apart instead.

An adapter holds two thin matrices for some modules of a base, A [rank, inputs] and B [outputs, rank]. The
module's weight becomes W + scale * B @ A (`lowrank` says exactly how), with scale = lora_alpha / rank, or
lora_alpha / sqrt(rank) with use_rslora. Its other tensors (modules_to_save, biases) replace the base's.
Source: peft 0.21, tuners/lora/{config,layer,model}.py and utils/save_and_load.py.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .. import dtypes, sources
from ..checkpoint import JSON, Checkpoint, Entry, Single
from ..digest import values_digest
from ..dtypes import DType
from ..errors import SourceError, near
from ..extents import Extents
from ..paths import is_directory, is_file, listed
from ..sources import peft
from ..sources.ties import with_decoder
from ..views import View, stack
from .adapter_pairs import WRAPPED, Pair, SavedAs, placed
from .adapter_settings import PLAIN_STARTS, Settings
from .lowrank import LowRank
from .nowhere import nowhere, pitched

PREFIX = "base_model.model."
"""What PEFT puts before every name of the base."""

MERGED = (dtypes.float32, dtypes.bfloat16, dtypes.float16)
"""The types of weights that are merged: what float32 holds exactly."""

_THIN = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.(?P<name>[^.]+))?\.weight")
_TABLE = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<half>[AB])(\.(?P<name>[^.]+))?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<leaf>[^.]+)")
_OLD = ".original_module."
_ADDED = (".lora_", ".token_adapter.", ".trainable_tokens_", ".modules_to_save.")
"""Parts of the names that PEFT adds to a model's own."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that takes the place of one of the base's, and its name in PEFT's files."""

    entry: Entry
    name: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter and the `base` it fits. `pairs`: the base's module -> its thin matrices; `stacks`: the name
    of a stack of the base -> those of each expert; `saved`: the base's name -> the tensor that replaces it.
    Their views refer to the extents of `tensors`, the checkpoint that holds them."""

    settings: Settings
    base: Checkpoint
    tensors: Checkpoint
    pairs: Mapping[str, Pair]
    stacks: Mapping[str, tuple[Pair, ...]]
    saved: Mapping[str, Saved]

    @property
    def changed(self) -> frozenset[str]:
        """The names of the base's tensors that it changes."""
        return frozenset((*self.saved, *self.adapted))

    @property
    def adapted(self) -> dict[str, tuple[Pair, ...]]:
        """The name of each of the base's tensors that it adds to -> its one pair, or those of each expert."""
        return {f"{m}.weight": (pair,) for m, pair in self.pairs.items()} | dict(self.stacks)

    def entry(self, name: str) -> Entry:
        """The base's tensor, or the one that replaces it."""
        saved = self.saved.get(name)
        return self.base.entries[name] if saved is None else saved.entry

    def digests(self) -> tuple[str, str]:
        """Hex digests of what it does to a base: of what shapes the result, and of its own headers."""
        shaping = [
            [(n, *((p.scale, p.flipped) for p in pairs)) for n, pairs in self.adapted.items()],
            [*self.saved],
        ]
        return values_digest([shaping, self.tensors.structure]), self.tensors.headers

    def applied(self, entries: Mapping[str, Entry], extents: Extents) -> Checkpoint:
        """The base with these entries over this table, and with the adapter in its files and digests."""
        base, (structure, headers) = self.base, self.digests()
        return replace(
            base,
            entries=entries,
            extents=extents,
            files=tuple(dict.fromkeys((*base.files, *self.tensors.files))),
            structure=values_digest([base.structure, structure]) if base.structure else "",
            headers=values_digest([base.headers, headers]),
        )


def fit(ckpt: Checkpoint, directory: str, saved_as: SavedAs, config: Mapping[str, JSON]) -> Adapter:
    """The adapter in `directory` and the base in `ckpt`, under the base's own names; `config`: the base's.

    Where the directory holds a config and no weights, `ckpt` is a checkpoint of the adapted model, which
    holds both. Raises SourceError."""
    settings = Settings.read(_config(directory))
    own = {n: e for n, e in _named(ckpt).items() if _is_adapters(n)}
    weights = _weights(ckpt, directory, settings, own)
    tensors = replace(ckpt, entries=own, aliases={}) if weights is None else sources.open(weights)
    thin, saved = _parted(tensors)
    base = _base(ckpt, own, saved)
    pairs, stacks = placed(settings, thin, base, saved_as, tensors.path)
    adapter = Adapter(settings, base, tensors, pairs, stacks, saved)
    _check(adapter, with_decoder(config))
    return adapter


def _config(directory: str) -> str:
    """The path of an adapter's config."""
    config = os.path.join(directory, peft.CONFIG)
    if is_directory(directory) and not is_file(config):
        named = [n for n in listed(directory, "*") if is_file(os.path.join(directory, n, peft.CONFIG))]
        there = f"adapters lie in {', '.join(named)}" if named else "PEFT writes it (save_pretrained)"
        raise SourceError(f"{config}: is missing; {there}")
    return config


def _weights(ckpt: Checkpoint, directory: str, settings: Settings, own: Mapping[str, Entry]) -> str | None:
    """Where an adapter's weights lie, None where they are those that the checkpoint holds (`own`)."""
    weights = peft.weights(directory)
    if weights is None and own:
        return None
    if weights is None and sources.format_of(directory) == "dcp":
        weights = directory  # as accelerate saves an adapter that was trained under FSDP
    if weights is None:
        raise SourceError(f"{directory}: no weights of an adapter, and {ckpt.path} holds none either")
    if own:
        raise SourceError(
            f"{ckpt.path} holds an adapter ({next(iter(own))}), and {directory} another; open the base alone"
        )
    where = os.path.dirname(ckpt.path) if is_file(ckpt.path) else ckpt.path
    if os.path.realpath(where) == os.path.realpath(directory):
        raise SourceError(
            f"{directory}: whether the model in it holds its adapter already is written nowhere (torchtune's "
            "does, and is opened without adapter=, --adapter); keep a base in another directory"
        )
    if settings.start not in PLAIN_STARTS:
        raise SourceError(
            f"{settings.path}: init_lora_weights {settings.start!r} trains against a changed base; let PEFT "
            "convert the adapter (path_initial_model_for_weight_conversion)"
        )
    return weights


def _base(ckpt: Checkpoint, own: Mapping[str, Entry], saved: Mapping[str, Saved]) -> Checkpoint:
    """The model without the adapter's tensors (`own`), under its own names; `saved` replace some."""
    entries: dict[str, Entry] = {}
    for name, entry in ckpt.entries.items():
        if name in own:
            continue
        new = _base_name(name)
        if new in entries:
            raise SourceError(f"{ckpt.path}: {name} is a second {new} of the base model")
        if _OLD in name and new not in saved:
            raise SourceError(f"{ckpt.path}: nothing takes the place of {name}")
        entries[new] = entry
    aliases = {_base_name(a): _base_name(h) for a, h in ckpt.aliases.items() if a not in own}
    return replace(ckpt, entries=entries, aliases=aliases)


def merged(adapter: Adapter, dtype: DType | None) -> Checkpoint:
    """The base with the adapter merged; what that changes is rounded once, to `dtype` (None: to the base's
    own)."""
    base = adapter.base
    apart = adapter.tensors.extents is not base.extents
    shared = Extents((*base.extents, *adapter.tensors.extents)) if apart else base.extents
    first = len(base.extents) if apart else 0  # of the adapter's extents

    def of_adapter(entry: Entry) -> View:
        return entry.build().over(shared, first)

    def wide(name: str) -> View:
        saved = adapter.saved.get(name)
        return of_adapter(saved.entry) if saved else base.entries[name].build().over(shared)

    extents = [*shared]
    index: dict[str, range] = {}  # of a tensor, the numbers of its matrices' extents
    for name, pairs in adapter.adapted.items():
        shape = adapter.entry(name).shape[-2:]
        whole = wide(name).reshape((len(pairs), *shape))
        index[name] = range(len(extents), len(extents) + len(pairs))
        for e, pair in enumerate(pairs):
            thin_a, thin_b = of_adapter(pair.a), of_adapter(pair.b)
            left, right = (thin_a.T, thin_b.T) if pair.flipped else (thin_b, thin_a)
            matrix = LowRank(whole.narrow(0, e, 1).reshape(shape), left, right, pair.scale)
            extents.append(nowhere(matrix, shape, dtypes.float32, f"{name} {e}"))
    table = Extents(extents)

    def build(name: str, entry: Entry, kind: DType) -> Callable[[], View]:
        if name in index:

            def sums() -> View:
                made = [pitched(table, i, dtypes.float32, entry.shape[-2:]) for i in index[name]]
                return (stack(made) if len(entry.shape) == 3 else made[0]).cast(kind)

            return sums
        saved = adapter.saved.get(name)
        if saved is not None:
            return lambda: saved.entry.build().over(table, first).cast(kind)
        return lambda: entry.build().over(table)

    changed = adapter.changed

    def entry_of(name: str, old: Entry) -> Entry:
        kind = kind_of(old.dtype, dtype) if name in changed else old.dtype
        return Single(adapter.entry(name).shape, kind, build(name, old, kind), old.kind)

    modules = len(adapter.pairs) + len(adapter.stacks)
    note = f"{adapter.settings.path}: {modules} modules merged, {len(adapter.saved)} tensors replaced"
    made = adapter.applied({n: entry_of(n, e) for n, e in base.entries.items()}, table)
    return replace(made, notes=(*base.notes, note))


# ---- names and sizes ----


def _is_adapters(name: str) -> bool:
    """Whether a tensor in a checkpoint of an adapted model is the adapter's."""
    return any(mark in name for mark in _ADDED)


def _named(ckpt: Checkpoint) -> dict[str, Entry]:
    """Every name and its tensor, tied names too."""
    return {**ckpt.entries, **{a: ckpt.entries[h] for a, h in ckpt.aliases.items()}}


def _base_name(name: str) -> str:
    """The name the base model has for a tensor of the adapted one."""
    return re.sub(rf"({WRAPPED})+\.", ".", name.removeprefix(PREFIX)).replace(_OLD, ".")


def _parted(tensors: Checkpoint) -> tuple[dict[str, Pair], dict[str, Saved]]:
    """The adapter's pairs, by PEFT's names of modules, and what it saved, by the base's names. Raises
    SourceError for what is no pair, and for an unread name."""
    thin: dict[tuple[str, str], Entry] = {}  # module, half
    tables: set[str] = set()
    saved: dict[str, Saved] = {}
    called: set[str] = set()  # the adapter's own name, which its file leaves out
    taken: dict[tuple[str, str], str] = {}  # what a tensor is -> its name
    for name, entry in _named(tensors).items():
        inner = name.removeprefix(PREFIX)
        found = next((m for p in (_THIN, _TABLE, _SAVED) if (m := p.fullmatch(inner))), None)
        if found is None and _is_adapters(inner):
            raise SourceError(f"{tensors.path}: {name} is not read: DoRA, biases of B, tokens and the like")
        called.update({found["name"]} - {None} if found else ())
        if len(called) > 1:
            raise SourceError(f"{tensors.path}: several adapters: {', '.join(sorted(called))}; wanted one")
        if found is None:
            place = _base_name(name), ""
            saved[place[0]] = Saved(entry, inner)
        elif found.re is _SAVED:
            place = f"{found['module']}.{found['leaf']}", ""
            saved[place[0]] = Saved(entry, place[0])
        else:
            place = found["module"], found["half"]
            thin[place] = entry
            tables.update({found["module"]} if found.re is _TABLE else ())
        if taken.setdefault(place, name) != name:
            what = f"{place[1]} of {place[0]}" if place[1] else place[0]
            raise SourceError(f"{tensors.path}: {name} is a second {what}, beside {taken[place]}")
    pairs = {}
    for module in dict.fromkeys(module for module, _ in thin):
        a, b = thin.get((module, "A")), thin.get((module, "B"))
        if a is None or b is None:
            raise SourceError(
                f"{tensors.path}: {module} has {'B' if a is None else 'A'} alone, wanted A and B"
            )
        if 0 in (*a.shape, *b.shape):
            raise SourceError(
                f"{tensors.path}: {module}: A {a.shape} and B {b.shape} hold no element, as a save at ZeRO-3 "
                "that gathers no weights leaves them"
            )
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise SourceError(f"{tensors.path}: {module}: A {a.shape} and B {b.shape} are no pair")
        form = "lora_embedding_{}" if module in tables else "lora_{}.weight"
        a_name, b_name = (f"{module}.{form.format(half)}" for half in "AB")
        pairs[module] = Pair(a, b, a_name, b_name, module in tables, 1.0)
    return pairs, saved


def _check(adapter: Adapter, config: Mapping[str, JSON]) -> None:
    """Raises SourceError where the adapter does not fit its base."""
    base, where = adapter.base, adapter.tensors.path
    if not adapter.changed:
        raise SourceError(f"{where}: holds no tensor of an adapter")
    tied = {*base.aliases, *base.aliases.values()}
    rows = Counter(e.shape[0] for e in base.entries.values() if len(e.shape) == 2)
    for name in adapter.changed:
        if name in tied or _may_be_tied(adapter, name, config, rows):
            raise SourceError(
                f"{where}: {name} is tied to another tensor, which would have to change with it; a base that "
                "has both, with tie_word_embeddings false, has a place for it"
            )
        if name not in base.entries:
            raise SourceError(f"{where}: the base {base.path} has no {name}{near(name, base.entries)}")
    for name, pairs in adapter.adapted.items():
        weight, pair = adapter.entry(name), pairs[0]  # all of a stack are alike
        a, b, shape = pair.a, pair.b, weight.shape[1:] if name in adapter.stacks else weight.shape
        if (b.shape[0], a.shape[1]) != (shape[::-1] if pair.flipped else shape):
            raise SourceError(f"{where}: B {b.shape} @ A {a.shape} does not fit {name} {weight.shape}")
        for role, entry in ((name, weight), ("A", a), ("B", b)):
            if entry.dtype not in MERGED:
                kinds = ", ".join(d.name for d in MERGED)
                raise SourceError(f"{where}: {name}: {role} is {entry.dtype}, wanted {kinds}")


def _may_be_tied(adapter: Adapter, name: str, config: Mapping[str, JSON], rows: Mapping[int, int]) -> bool:
    """Whether a tensor is embedding and output matrix in one, as far as the base's config and names tell.
    `rows`: how many of the base's matrices have so many.

    Where no table has as many rows as the config says (padded, or resized since), those of rows that few
    matrices have may be it: the others of a layer have their like in every layer."""
    base, saved, size = adapter.base, adapter.saved.get(name), config.get("vocab_size")
    changed = base.entries.get(name) if saved is None else saved.entry
    if changed is None or len(changed.shape) != 2 or size is None:
        return False
    alike = rows.get(changed.shape[0], 0)
    if changed.shape[0] != size and (size in rows or alike > 2):
        return False
    said = config.get("tie_word_embeddings")
    return said is True or (said is None and alike < 2)


def kind_of(old: DType, asked: DType | None) -> DType:
    """The dtype a tensor gets: what was asked for, where it is a float."""
    return asked if asked is not None and old.kind == "float" else old
