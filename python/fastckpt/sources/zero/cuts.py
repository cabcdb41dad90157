"""How the tensor-parallel ranks' parts of a parameter make the whole, as `universal_checkpoint_info` says it.

Law: what is not said in a form that is known is refused; a whole is made of pieces along one axis, each
element once. Source: deepspeed/checkpoint/ds_to_universal.py (`merge_tp_slices`: the categories and which
goes before which), affine.py (`affine_map`) and constants.py of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ...errors import SourceError
from ...views import dense_strides
from ..patterns import compiled
from ..plain_values import integers, listing, mapping
from .partitions import Shape

VERSION, AFFINE_VERSION = 0.4, 1
"""The newest versions of the two descriptions that are known."""

REPLICATED, AVERAGED = "tp_replicated_parameter_patterns", "parameter_to_average_patterns"
HALVES, SUBS = "parameter_with_2_sub_params_cat_dim_0", "parameter_with_sub_params"
ROWS, VOCABULARY = "parameter_with_row_parallelism_patterns", "vocabulary_parameter_patterns"
STAGES, UNSUPPORTED = "pipeline_replicated_parameter_patterns", "autotp_unsupported_parameter_patterns"
WIDTHS, AFFINE = "sub_param_shard_widths", "affine_map"
LISTS = (REPLICATED, AVERAGED, HALVES, ROWS, VOCABULARY, STAGES)
KNOWN = {
    *LISTS, SUBS, UNSUPPORTED, WIDTHS, AFFINE,
    "universal_checkpoint_version", "original_vocab_size", "padded_vocab_size",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + length) along the axis of what tensor-parallel rank `rank` holds."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The whole of a parameter, of `shape`: `pieces` along `axis`, in order.

    `same`: pieces that several ranks hold, of which the first is taken. `told`: whether anything was said of
    this parameter; the default is a cut along the first axis. `padded`: the parts have more, which is left
    out."""

    shape: Shape
    axis: int
    pieces: tuple[Piece, ...]
    same: tuple[tuple[Piece, Piece], ...] = ()
    told: bool = True
    padded: bool = False

    def clipped(self, length: int) -> Cut:
        """The first `length` elements along the axis."""
        pieces, left = [], length
        for piece in self.pieces:
            pieces.append(replace(piece, length=min(left, piece.length)))
            left -= pieces[-1].length
        held = tuple(p for p in pieces if p.length)
        return replace(self, shape=_with(self.shape, self.axis, length), pieces=held, padded=True)


class Cuts:
    """What `universal_checkpoint_info` says, None where there is none, of parameters cut over `tp` ranks.

    Raises SourceError for a version or a kind of statement that is not known, `where` names the file."""

    def __init__(self, info: object, tp: int, where: str) -> None:
        self._tp, self._where, self._none = tp, f"{where}: universal_checkpoint_info", info is None
        self._info = {} if info is None else mapping(info, self._where)
        unknown = sorted(str(key) for key in self._info if key not in KNOWN)
        version = self._info.get("universal_checkpoint_version", 0.0)
        if unknown or not isinstance(version, (int, float)) or version > VERSION:
            what = f"says {unknown[0]}" if unknown else f"is of version {version!r}"
            raise SourceError(f"{self._where} {what}, which is not known: it may say how tensors are cut")
        self._version = version
        self._lists = {key: self._patterns(key, self._info.get(key, ())) for key in LISTS}
        self._subs = [
            (self._patterns(SUBS, said.get("patterns")), said)
            for said in (mapping(s, f"{self._where}: {SUBS}") for s in self._list(SUBS))
        ]
        self._unsupported = self._patterns(UNSUPPORTED, tuple(self._table(self._info, UNSUPPORTED)))
        affine = self._table(self._info, AFFINE)
        if affine.get("version", AFFINE_VERSION) != AFFINE_VERSION:
            raise SourceError(f"{self._where}: {AFFINE} of version {affine['version']!r} is not known")
        self._maps = self._table(affine, "params")
        self._mapped = self._patterns(AFFINE, tuple(self._maps))

    def check_used(self, names: Iterable[str]) -> None:
        """Raises SourceError where a list of cuts, not of names spelt out, matches none of these, which are
        all parameters: it was made for another model, and they would be joined by default."""
        lists = {key: self._lists[key] for key in (REPLICATED, AVERAGED, HALVES, ROWS)}
        lists |= {f"{SUBS}[{k}]": patterns for k, (patterns, _) in enumerate(self._subs)}
        unused = {key: p for key, p in lists.items() if self._tp > 1 and p.others and not p.exact}
        for name in names:
            unused = {key: p for key, p in unused.items() if not p.matching(name)}
            if not unused:
                return
        for key in unused:
            raise SourceError(f"{self._where}: {key} matches no parameter: it is of another model")

    def over_stages(self, name: str) -> bool:
        """Whether a parameter is said to stand in several stages of a pipeline, of which the first counts."""
        return self._match(STAGES, name) is not None

    def of(self, name: str, shapes: Sequence[Shape]) -> Cut:
        """How the parts of these shapes, of ranks 0, 1, .., are joined. Raises SourceError."""
        where = f"{self._where}: {name}"
        if (odd := self._found(self._unsupported, name)) is not None:
            reason = self._table(self._info, UNSUPPORTED)[odd]
            raise SourceError(f"{where}: DeepSpeed says that its cut cannot be undone: {reason}")
        if len({len(shape) for shape in shapes}) != 1:
            raise SourceError(f"{where}: parts of shapes {list(shapes)}")
        if (key := self._found(self._mapped, name)) is not None:
            cut = _affine(self._maps[key], shapes, where)
        elif self._tp == 1:
            cut = _whole(shapes, where)
        elif self._none:
            raise SourceError(
                f"{self._where} is not there: nothing says along which axis the {self._tp} tensor-parallel "
                "ranks cut each tensor; load and save it once with a DeepSpeed whose AutoTP writes it, or a "
                "Megatron-DeepSpeed that does"
            )
        else:
            cut = self._by_lists(name, shapes, where)
        return self._unpadded(name, cut, where)

    def _by_lists(self, name: str, shapes: Sequence[Shape], where: str) -> Cut:
        if self._match(REPLICATED, name) or self._match(AVERAGED, name):
            # An average of equals is each of them; that they are equal is compared.
            return _whole(shapes, where)
        if self._match(HALVES, name):
            if any(shape[0] % 2 for shape in shapes if shape):
                raise SourceError(f"{where}: two parts in {list(shapes)}")
            return _joined(shapes, 0, [[shape[0] // 2 for shape in shapes if shape]] * 2, where)
        for patterns, said in self._subs:
            if (pattern := self._found(patterns, name)) is not None:
                return self._sub(said, pattern, shapes, where)
        axis = 1 if self._match(ROWS, name) else 0
        if axis >= len(shapes[0]):
            raise SourceError(f"{where}: is said to be cut along axis {axis}, its parts have {list(shapes)}")
        cut = _joined(shapes, axis, [[shape[axis] for shape in shapes]], where)
        if axis or self._match(VOCABULARY, name):
            return cut
        if self._maps:
            raise SourceError(
                f"{where}: neither {AFFINE} nor a list speaks of it: it may be whole on every rank"
            )
        return replace(cut, told=False)

    def _sub(self, said: Mapping[object, object], pattern: str, shapes: Sequence[Shape], where: str) -> Cut:
        """Sub-parameters one after another along an axis, each cut over the ranks."""
        axis = said.get("partition_dim")
        spec = listing(said.get("shape"), f"{where}: shape")
        if not isinstance(axis, int) or not 0 <= axis < len(shapes[0]) or len(spec) != len(shapes[0]):
            raise SourceError(f"{where}: shape {spec}, partition_dim {axis!r} of parts {list(shapes)}")
        total, sizes = sum(shape[axis] for shape in shapes), spec[axis]
        for a, n in enumerate(spec):
            if a != axis and n not in (-1, None) and n != shapes[0][a]:
                raise SourceError(f"{where}: axis {a} is said to be {n}, its parts have {list(shapes)}")
        if isinstance(sizes, int) and self._version < 0.4:
            if not 0 < sizes <= total or total % sizes:
                raise SourceError(f"{where}: {sizes} equal parts of {total}")
            sizes = (total // sizes,) * sizes
        widths = self._table(self._info, WIDTHS).get(pattern)
        if widths is None and self._version < 0.4:
            each = integers(sizes, f"{where}: shape")
            if any(n % self._tp for n in each):
                raise SourceError(f"{where}: parts of {list(each)} over {self._tp} ranks: nothing says how")
            return _joined(shapes, axis, [[n // self._tp] * self._tp for n in each], where)
        cut = [integers(w, f"{where}: {WIDTHS}") for w in listing(widths, f"{where}: {WIDTHS}")]
        if any(len(w) != self._tp for w in cut) or [sum(w) for w in cut] != list(integers(sizes, where)):
            raise SourceError(f"{where}: {WIDTHS} {cut} over {self._tp} ranks, wanted those of {sizes}")
        return _joined(shapes, axis, cut, where)

    def _unpadded(self, name: str, cut: Cut, where: str) -> Cut:
        """A vocabulary without the rows that were added so that it divides."""
        if not self._match(VOCABULARY, name):
            return cut
        size, padded = (self._info.get(f"{of}_vocab_size") for of in ("original", "padded"))
        rows = cut.shape[0] if cut.shape and cut.axis == 0 else 0
        if type(size) is not int or not 0 < size <= rows or padded not in (None, rows):
            raise SourceError(
                f"{where}: original_vocab_size {size!r}, padded {padded!r} of {list(cut.shape)}"
            )
        return cut.clipped(size) if size < cut.shape[0] else cut

    # ---- what is said, checked ----

    def _table(self, of: Mapping[object, object], key: str) -> dict[object, object]:
        return mapping(of.get(key, {}), f"{self._where}: {key}")

    def _list(self, key: str) -> Sequence[object]:
        return listing(self._info.get(key, ()), f"{self._where}: {key}")

    def _match(self, key: str, name: str) -> str | None:
        return self._found(self._lists[key], name)

    def _patterns(self, key: str, said: object) -> _Patterns:
        where = f"{self._where}: {key}"
        return _Patterns.of(listing(said, where), where)

    def _found(self, patterns: _Patterns, name: str) -> str | None:
        found = patterns.matching(name)
        if len(found) > 1:
            raise SourceError(f"{self._where}: {name}: both {found[0]} and {found[1]} speak of it")
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class _Patterns:
    """Regular expressions that match at a name's start; those that spell a name out are looked up."""

    exact: frozenset[str]
    others: tuple[re.Pattern[str], ...]

    @staticmethod
    def of(said: Sequence[object], where: str) -> _Patterns:
        exact, others = set(), []
        for text in said:
            if not isinstance(text, str):
                raise SourceError(f"{where}: wanted patterns, got {text!r:.80}")
            plain = re.sub(r"\\(\W)", r"\1", text[1:-1])
            if text == _spelt(plain):
                exact.add(text)
                continue
            others.append(compiled(text, where))
        return _Patterns(frozenset(exact), tuple(others))

    def matching(self, name: str) -> list[str]:
        """Those that match."""
        spelt = _spelt(name)
        found = [spelt] if spelt in self.exact else []
        return found + [p.pattern for p in self.others if p.match(name)]


def _spelt(name: str) -> str:
    return f"^{re.escape(name)}$"


# ---- pieces ----


def _whole(shapes: Sequence[Shape], where: str) -> Cut:
    """Every rank holds all of it."""
    if len(set(shapes)) != 1:
        raise SourceError(f"{where}: is said to be whole on every rank, its parts have {list(shapes)}")
    length = shapes[0][0] if shapes[0] else 1
    pieces = [Piece(rank, 0, length) for rank in range(len(shapes))]
    return Cut(shapes[0], 0, (pieces[0],), tuple((pieces[0], p) for p in pieces[1:]))


def _joined(shapes: Sequence[Shape], axis: int, widths: Sequence[Sequence[int]], where: str) -> Cut:
    """Sub-parameter after sub-parameter, of each every rank's part; `widths`: of each, the ranks' lengths."""
    parts = [0] * len(shapes) if not widths else [sum(w) for w in zip(*widths, strict=True)]
    for shape, part in zip(shapes, parts, strict=True):
        if not shape or _with(shape, axis, 0) != _with(shapes[0], axis, 0) or shape[axis] != part:
            raise SourceError(f"{where}: parts of {list(shapes)}, wanted {parts} along axis {axis}")
    pieces, at = [], [0] * len(shapes)
    for each in widths:
        for rank, length in enumerate(each):
            pieces.append(Piece(rank, at[rank], length))
            at[rank] += length
    return Cut(_with(shapes[0], axis, sum(parts)), axis, tuple(p for p in pieces if p.length))


def _affine(said: object, shapes: Sequence[Shape], where: str) -> Cut:
    """Pieces as blocks of the whole and of a rank's part, both dense, that differ along one axis."""
    entry = mapping(said, where)
    shape = integers(entry.get("logical_shape"), f"{where}: logical_shape")
    ranks = mapping(entry.get("ranks"), f"{where}: ranks")
    if {*ranks} != {*range(len(shapes))}:
        raise SourceError(f"{where}: a map of ranks {sorted(map(str, ranks))}, wanted {len(shapes)}")
    blocks = []
    for rank, part in enumerate(shapes):
        own = mapping(ranks[rank], f"{where}: rank {rank}")
        if integers(own.get("shard_shape"), where) != part:
            raise SourceError(f"{where}: rank {rank} holds {list(part)}, not {own['shard_shape']}")
        for piece in listing(own.get("pieces"), f"{where}: pieces"):
            block = mapping(piece, f"{where}: piece")
            if block.get("scale", 1.0) != 1.0:
                raise SourceError(f"{where}: held {block['scale']} times its value by each rank: not undone")
            size = integers(block.get("shape"), f"{where}: piece")
            source, dest = (
                _origin(block.get(k), of, size, where) for k, of in (("source", shape), ("dest", part))
            )
            blocks.append(_Block(rank, size, source, dest))
    if not shape:
        return _whole(shapes, where)
    axes = {
        a for b in blocks for a, n in enumerate(b.size) if n != shape[a] or n != shapes[b.rank][a]
    }  # fmt: skip
    if len(axes) > 1:
        raise SourceError(f"{where}: pieces that cut axes {sorted(axes)}: not read")
    return _tiled(shape, axes.pop() if axes else 0, blocks, shapes, where)


@dataclass(frozen=True, slots=True)
class _Block:
    """A box of `size` in the whole, from element `source`, and in a rank's part, from element `dest`."""

    rank: int
    size: Shape
    source: Shape
    dest: Shape


def _tiled(shape: Shape, axis: int, blocks: Sequence[_Block], shapes: Sequence[Shape], where: str) -> Cut:
    """The cut of blocks that cover the whole and each part once, but for what several ranks hold."""
    along = [(b.source[axis], b.dest[axis], b.size[axis], b.rank) for b in blocks]
    first: dict[tuple[int, int], Piece] = {}
    same = []
    for source, dest, length, rank in sorted(along):
        piece = Piece(rank, dest, length)
        held = first.setdefault((source, length), piece)
        if held is not piece:
            same.append((held, piece))
    pieces = {at: piece for at, piece in sorted(first.items()) if piece.length}
    edges = [0, *accumulate(length for _, length in pieces)]
    if [source for source, _ in pieces] != edges[:-1] or edges[-1] != shape[axis]:
        raise SourceError(f"{where}: pieces {[*pieces]} do not make {list(shape)} along axis {axis}")
    for rank, part in enumerate(shapes):
        own = sorted((d, n) for _, d, n, r in along if r == rank and n)
        if [0, *accumulate(n for _, n in own)] != [*(d for d, _ in own), part[axis]]:
            raise SourceError(f"{where}: rank {rank}: pieces {own} do not make its {list(part)}")
    return Cut(shape, axis, tuple(pieces.values()), tuple(same))


def _origin(said: object, shape: Shape, size: Shape, where: str) -> Shape:
    """The first element of a block of `size` in a dense tensor of `shape`, from [offset, strides]."""
    offset, strides = (*listing(said, f"{where}: piece"), None, None)[:2]
    dense = dense_strides(shape)
    if not isinstance(offset, int) or offset < 0 or len(size) != len(shape):
        raise SourceError(f"{where}: a piece {said!r:.80} of {list(shape)}")
    if [*integers(strides, f"{where}: piece")] != dense:
        raise SourceError(f"{where}: a piece of strides {strides!r:.80} in {list(shape)}: not read")
    origin, left = [], offset
    for step in dense:
        at, left = divmod(left, step) if step else (0, left)
        origin.append(at)
    leaves = left or any(o + n > whole for o, n, whole in zip(origin, size, shape, strict=True))
    if leaves and 0 not in size:
        raise SourceError(f"{where}: a piece of {list(size)} from {origin} leaves {list(shape)}")
    return tuple(origin)


def _with(shape: Shape, axis: int, length: int) -> Shape:
    return (*shape[:axis], length, *shape[axis + 1 :])
