"""What a layout refuses: sizes that do not divide, options that mean nothing, roles it has no place for.

Sizes are looked at before a view is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

from ..errors import LayoutError, expect
from ..mixers import (
    Attention,
    Compressed,
    DeltaHeads,
    DeltaNet,
    MambaHeads,
    Mla,
    Queries,
    Selective,
    ShortConv,
)
from ..model import Experts, Layer, Mlp, Sizes
from ..placement import Placement
from ..roles import Linear

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def require_least(layout: str, made: object, least: int, *options: str) -> None:
    """Raises LayoutError where one of these options of a layout is less than `least`."""
    for name in options:
        expect(f"layout {layout}: {name}", size := getattr(made, name), int)
        if size < least:
            raise LayoutError(f"layout {layout}: {name} must be at least {least}, got {size}")


def require_pad(layout: str, pad: bool, multiple: int) -> None:
    """Raises LayoutError for a multiple that nothing is padded to."""
    if multiple > 1 and not pad:
        raise LayoutError(
            f"layout {layout}: multiple goes with pad=True (-L pad=true), which pads widths to it"
        )


def require_alike(layout: str, name: str, linears: Sequence[Linear]) -> None:
    """Raises LayoutError for experts' matrices that cannot be one stack."""
    forms = {(x.leaf, x.packed, *((b.leaf, b.unit) for b in x.beside)) for x in linears}
    if len(forms) != 1:
        raise LayoutError(f"layout {layout}: {name}: experts are stored unlike one another")


class Subject(NamedTuple):
    """What an option speaks of: whether the model and the placement have it, and what it is, in words."""

    there: Callable[[], bool]
    what: str


def require_subjects(layout: str, made: DataclassInstance, subjects: Mapping[str, Subject]) -> None:
    """Raises LayoutError for an option that is not as by default where it could not change anything.

    Options that allow something (`pad`, `replicate_kv`), or ask for a size that may hold already, are not
    among `subjects`."""
    for option in fields(made):
        value = getattr(made, option.name)
        if value != option.default and option.name in subjects:
            subject = subjects[option.name]
            if not subject.there():
                said = str(value).lower() if isinstance(value, bool) else value
                raise LayoutError(f"layout {layout}: {option.name}={said} wants {subject.what}")


def require_tensor_parallel(layout: str, placement: Placement) -> None:
    """Raises LayoutError for a placement that cuts by more than tensor parallelism."""
    for name in ("pp", "dp", "ep"):
        size = getattr(placement, name)
        if size != 1:
            raise LayoutError(f"layout {layout} does not cut by {name} yet: wanted {name} 1, got {size}")


def require_even(layout: str, placement: Placement, what: str, size: int, instead: str = "") -> None:
    """Raises LayoutError where `size` does not divide by tp; `instead`: the way out, for the message."""
    if size % placement.tp:
        raise LayoutError(f"layout {layout}: {what} {size} does not divide by tp {placement.tp}{instead}")


def require_heads(layout: str, placement: Placement, sizes: Sizes, instead: str = "") -> None:
    """Raises LayoutError where tp does not divide the query heads, or neither divides nor is divided by the
    kv heads of any layer: those are dealt out evenly or repeated evenly."""
    tp = placement.tp
    for heads, kv in ((sizes.heads, sizes.kv_heads), *sizes.others):
        require_even(layout, placement, "the number of attention heads", heads, instead)
        if kv % tp and tp % kv:
            raise LayoutError(
                f"layout {layout}: neither do {kv} kv heads divide by tp {tp} nor tp by kv heads{instead}"
            )


def require_delta(layout: str, placement: Placement, heads: DeltaHeads | None) -> None:
    """Raises LayoutError where tp does not divide the key heads of linear attention; value heads follow."""
    if heads is not None:
        require_even(layout, placement, "the number of linear attention's key heads", heads.keys)


def require_mamba(layout: str, placement: Placement, heads: MambaHeads | None) -> None:
    """Raises LayoutError where tp does not divide the heads of Mamba's mixers, nor their groups, unless all
    heads are one group, which every rank then holds."""
    if heads is None:
        return
    require_even(layout, placement, "the number of Mamba's heads", heads.heads)
    if heads.groups > 1:
        require_even(layout, placement, "the number of groups of Mamba's heads", heads.groups)


def require_heads_alike(layout: str, attention: Attention) -> None:
    """Raises LayoutError unless all heads are of one size, without a gate that is a module of its own, and q
    and k are normed head by head, by the same weights, before the rotary positions."""
    norm, k, v = attention.q_norm, attention.k, attention.v
    if attention.output_gate is not None:
        raise LayoutError(f"layout {layout} has no place for {attention.output_gate.name}, an output gate")
    if k.shape[0] != v.shape[0]:
        raise LayoutError(f"layout {layout} has no place for {v.name}, of other rows than {k.name}")
    for other, what in (
        (attention.whole_norms, "a norm of all heads"),
        (attention.own_norms, "a norm with weights for each head"),
        (attention.rotated, "a norm after the rotary positions"),
    ):
        if other and norm is not None:
            raise LayoutError(f"layout {layout} has no place for {norm.name}, {what}")


def require_neighbours(layout: str, attention: Mla, otherwise: str = "") -> None:
    """Raises LayoutError for latent attention whose rotary positions turn halves: servers turn neighbours,
    whatever a config says; `otherwise`: which do not, and what to do with those."""
    if attention.halves:
        raise LayoutError(
            f"layout {layout} has no place for {attention.kv_a.name}, whose rotary positions turn halves of "
            f"its rows, and not neighbours (rope_interleave false){otherwise}"
        )


def require_no_scalars(layout: str, mlp: Mlp) -> None:
    """Raises LayoutError for a block whose activation has learned numbers."""
    for role in mlp.scalars:
        raise LayoutError(f"layout {layout} has no place for {role.name}")


def require_known(layout: str, layer: Layer, *, vision: bool = False) -> None:
    """Raises LayoutError for what only layers beside an encoder have, and for matrices of image tokens where
    there is no place for `vision`. A user's own recipe may make any layer."""
    attention = layer.attention
    relative = attention.relative if isinstance(attention, Attention) else None
    cross = None if layer.cross is None else layer.cross.o
    images = None if layer.vision is None or vision else layer.vision.attention.o
    for role in (cross, layer.cross_norm, relative, images):
        if role is not None:
            raise LayoutError(f"layout {layout} has no place for {role.name}")


_OTHERS: Mapping[type, str] = {
    ShortConv: "a short convolution",
    Selective: "a Mamba mixer",
    Compressed: "compressed attention",
    Queries: "attention to the keys of another layer",
}


def two_blocks(layout: str, layer: Layer) -> tuple[Attention | Mla | DeltaNet, Mlp | Experts]:
    """The attention and the feed-forward block of a layer. Raises LayoutError for one that has not just these
    two, or whose attention reads what other layers make or store otherwise."""
    if layer.mamba is not None:
        raise LayoutError(f"layout {layout} has no place for {layer.mamba.o.name}, of a Mamba mixer")
    if layer.attention is None or layer.mlp is None:
        raise LayoutError(f"layout {layout} has no place for {layer.name}, a layer of one block")
    for role in layer.whole:
        raise LayoutError(f"layout {layout} has no place for {role.name}")
    attention = layer.attention
    if not isinstance(attention, Attention | Mla | DeltaNet):
        what = _OTHERS[type(attention)]
        raise LayoutError(f"layout {layout} has no place for {attention.o.name}, of {what}")
    if isinstance(attention, DeltaNet) and attention.low is not None:
        raise LayoutError(f"layout {layout} has no place for {attention.low[0].name}, of a low rank")
    if isinstance(attention, Attention) and (attention.heads or attention.values_are_keys):
        raise LayoutError(f"layout {layout} has no place for {attention.k.name}, unlike other layers' keys")
    return attention, layer.mlp
