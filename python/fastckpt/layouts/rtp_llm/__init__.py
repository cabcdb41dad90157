"""`rtp_llm`: the weights of one rank as rtp-llm's loader makes them, in the form of the engine's own dump.

Each weight is made whole by its process function (`merge`, `roles`), then cut by the strategy that
the engine's table has for it (`weights`, `split`). Matrices are [in, out]: q, k and v are one kernel
[hidden, (q | k | v)], gate and up one [hidden, (gate | up)]; experts are [experts, (up; gate), hidden] and
[experts, hidden, width]. The embedding is cut along hidden; lm_head is padded to a multiple of 8 * tp rows,
then cut. int8 and fp8 matrices stay [out, in], as the engine's kernels want. Source: rtp-llm's
utils/model_weight.py (class W) and models/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from ... import dtypes
from ...errors import LayoutError
from ...mixers import Mla
from ...model import Layer, Model
from ...placement import Placement
from ...stored import constant
from ...target import Target
from ..naming import Naming
from ..requirements import (
    Subject,
    require_delta,
    require_even,
    require_heads,
    require_least,
    require_subjects,
)
from .lora import Lookup, layer_pairs
from .matrices import Whole, norm
from .merge import slopes
from .roles import Making, layer_weights, of_one_scale, of_w13
from .rope import cos_sin_cache
from .split import SPLITS, Cut, phy2log
from .weights import FACTORS, FP32, NAMES, TABLES

TOWERS = {"cogvlm2": "model.vision."}
"""family -> the hub's prefix of its image tower, which the first tp rank holds whole, by the names behind the
prefix. Every rank holds embedding and head whole, since the tower's vectors go among the embedded tokens.
Source: rtp-llm's models/cogvlm2.py and multimodal_mixin.py of 2025."""

POSITIONS = 1 << 20
"""The most positions of latent attention's table, which is computed whole; a record may say any number."""


@dataclass(frozen=True, slots=True)
class RtpLlm:
    """`absorb`: latent attention also gets kc and vc, the matrices that absorb keys and values, beside kv_b.
    `w13`: gate and up are one weight. `split_rope`: the rope rows of latent attention are reordered, even
    ones first, as 2025's engine wants them. `use_stack_weight`: the ranks that share experts cut their widths
    (today's moe_pure_tp_mode, 2025's use_stack_weight); else each holds its experts whole. `ffn_tp`: how many
    ranks cut the feed-forward block (0: tp). `physical_experts`: how many places there are for experts,
    redundant ones included (0: as many as experts), on `nodes` nodes. `rope_positions`: for how many
    positions latent attention gets its table of cosines and sines, the engine's max_seq_len (0: no table).
    `one_scale`: of fp8 with one scale a matrix, q, k and v are requantised with the largest of their scales,
    and so are an expert's up and gate, as the engine does once they are loaded."""

    absorb: bool = True
    w13: bool = True
    split_rope: bool = False
    use_stack_weight: bool = True
    ffn_tp: int = 0
    physical_experts: int = 0
    nodes: int = 1
    rope_positions: int = 0
    one_scale: bool = False
    roles: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        require_least("rtp_llm", self, 0, "ffn_tp", "physical_experts", "rope_positions")
        require_least("rtp_llm", self, 1, "nodes")
        if self.rope_positions > POSITIONS:
            raise LayoutError(
                f"layout rtp_llm: rope_positions must be at most {POSITIONS}, got {self.rope_positions}"
            )

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied lm_head is written from the embedding, as the engine wants both.

        Every group of tp ranks cuts attention and dense blocks. Experts are distributed over ep parts; the tp
        * dp / ep ranks of a part cut their widths. Raises LayoutError, before the first target, where heads,
        a feed-forward width or hidden do not divide, where kv heads neither divide nor repeat evenly, for pp,
        and for an ep that the ranks or the experts do not divide by; and for a role this layout has no name
        for."""
        cut = self._cut(model, placement)
        order = self._order(model, placement)
        self._require(model, cut, len(order))
        return self._targets(model, cut, order)

    def naming(self, placement: Placement) -> Naming:
        """The names of the engine's dump, parts counted from 0."""
        return _naming("model", placement)

    def adapted(self, model: Model, placement: Placement, thin: Lookup) -> Iterator[Target]:
        """The rank's part of an adapter, as `lora` has it. Raises LayoutError as `targets` does."""
        cut = self._cut(model, placement)
        self._require(model, cut, len(self._order(model, placement)))
        making = self._making()
        return (
            _target(f"{_key(cut)}.layers.{i}", whole, cut)
            for i, layer in enumerate(model.layers)
            for whole in layer_pairs(layer, making, thin)
        )

    def adapted_naming(self, placement: Placement) -> Naming:
        """As those of the weights; the engine has no dump of adapters."""
        return _naming("adapter_model", placement)

    def _making(self) -> Making:
        return Making(self.absorb, self.w13, self.split_rope, self.one_scale)

    def _cut(self, model: Model, placement: Placement) -> Cut:
        self._require_subjects(model)
        ffn = self.ffn_tp or placement.tp
        if placement.tp % ffn:
            raise LayoutError(f"layout rtp_llm: tp {placement.tp} does not divide by ffn_tp {ffn}")
        sizes = model.sizes
        return Cut(
            placement,
            sizes.heads,
            sizes.kv_heads,
            sizes.head_dim,
            sizes.hidden,
            ffn=(placement.tp_rank % ffn, ffn),
            stack=self.use_stack_weight,
        )

    def _require_subjects(self, model: Model) -> None:
        """Raises LayoutError for options that speak of what the model does not have."""
        sizes, layers, no = model.sizes, model.layers, f", which {model.family} has not"
        latent = Subject(lambda: any(isinstance(x.attention, Mla) for x in layers), f"latent attention{no}")
        experts = Subject(lambda: sizes.experts > 0, f"experts{no}")
        rope = f"latent attention with plain or YaRN positions{no}"
        more = "more physical_experts than experts"
        subjects = {
            "absorb": latent,
            "split_rope": latent,
            "rope_positions": Subject(lambda: model.rope is not None, rope),
            "w13": Subject(
                lambda: any(map(of_w13, layers)), f"dense blocks of gate and up, in this order{no}"
            ),
            "ffn_tp": Subject(lambda: bool(sizes.widths.keys() - {sizes.expert_width}), f"dense blocks{no}"),
            "use_stack_weight": experts,
            "physical_experts": experts,
            "nodes": Subject(lambda: self.physical_experts > sizes.experts, more),
            "one_scale": Subject(lambda: any(map(of_one_scale, layers)), f"fp8 with one scale a matrix{no}"),
        }
        require_subjects("rtp_llm", self, subjects)

    def _order(self, model: Model, placement: Placement) -> list[int]:
        """Which expert each place holds."""
        experts = model.sizes.experts
        places = self.physical_experts or experts
        if places == experts:
            return list(range(experts))
        return phy2log(experts, places, placement.ep, self.nodes)

    def _require(self, model: Model, cut: Cut, places: int) -> None:
        """Raises LayoutError for what cannot be cut or has no place, from sizes and names alone."""
        sizes, grid = model.sizes, cut.place
        if grid.pp != 1:
            raise LayoutError(
                f"layout rtp_llm: the engine's loader has no stages: wanted pp 1, got {grid.pp}"
            )
        if grid.tp * grid.dp % grid.ep:
            raise LayoutError(f"layout rtp_llm: tp * dp {grid.tp * grid.dp} does not divide by ep {grid.ep}")
        if grid.ep > 1 and (not places or places % grid.ep):
            raise LayoutError(f"layout rtp_llm: {places} experts do not divide by ep {grid.ep}")
        if grid.dp > 1 and grid.ep == 1 and places and self.use_stack_weight:
            raise LayoutError(
                f"layout rtp_llm: with dp {grid.dp} experts are shared out by ep, got ep 1: the engine's "
                "versions differ in who holds what; use_stack_weight=False (-L use_stack_weight=false) "
                "gives every rank all of them"
            )
        require_heads("rtp_llm", grid, sizes)
        require_delta("rtp_llm", grid, sizes.delta)
        for key, width in sizes.widths.items():
            what, count = "ffn_tp" if self.ffn_tp else "tp", cut.ffn_tp[1]
            if key == sizes.expert_width:
                what, count = "tp * dp / ep" if grid.ep > 1 else "tp", cut.moe_tp[1]
            if width % count:
                raise LayoutError(f"layout rtp_llm: {key} {width} does not divide by {what} {count}")
        require_even("rtp_llm", grid, "hidden_size", sizes.hidden)
        if "gptq_v2" in model.quant_method:
            raise LayoutError(
                "layout rtp_llm has no place for GPTQ's zero points as they are (gptq_v2): the engine takes "
                'all for stored less 1; quant="none" (--quant none) makes dense weights'
            )
        if model.encoder is not None:
            raise LayoutError(f"layout rtp_llm has no place for the encoder of {model.family}")
        if model.positions is not None and model.first_position:
            raise LayoutError(
                f"layout rtp_llm has no place for {model.positions.name}, whose positions begin with row "
                f"{model.first_position}"
            )
        for extra in model.carried:
            if model.family not in TOWERS and not extra.name.endswith("token_type_embeddings.weight"):
                raise LayoutError(f"layout rtp_llm has no place for {extra.name} of {model.family}")
        if model.norm is None and model.lm_head.name != model.embedding.name:
            raise LayoutError(f"layout rtp_llm has no place for {model.lm_head.name} of {model.family}")

    def _targets(self, model: Model, cut: Cut, order: list[int]) -> Iterator[Target]:
        key = _key(cut)
        ends = replace(cut, place=Placement()) if model.family in TOWERS else cut
        for whole in _before(model):
            yield _target(f"{key}.global", whole, ends)
        if model.family in TOWERS and cut.place.tp_rank == 0:
            for role in model.carried:
                name = role.name.removeprefix(TOWERS[model.family])
                yield Target(f"{key}.global.{name}", role.view)
        if self.rope_positions and model.rope is not None:
            table = cos_sin_cache(model.rope, self.rope_positions)
            yield _target(f"{key}.global", Whole("rope_cos_sin_cache", table), cut)
        making = self._making()
        for i, layer in enumerate(model.layers):
            own = _own_cut(layer, model, cut)
            for whole in layer_weights(layer, model, cut, making, order):
                by_head = whole.name.startswith(("mla_fusedqkrope_no_lora_w", "linear_attn_"))
                yield _target(f"{key}.layers.{i}", whole, own if by_head else cut)
            if len(order) > model.sizes.experts:
                for whole in _places(order, model.sizes.experts):
                    yield _target(f"{key}.layers.{i}", whole, cut)
        for whole in _after(model):
            yield _target(f"{key}.global", whole, ends)


def _key(cut: Cut) -> str:
    place = cut.place
    return f"rank_{place.tp_rank:02d}_{place.dp_rank:02d}_{cut.experts[0]:02d}"


def _naming(stem: str, placement: Placement) -> Naming:
    stem = f"{stem}-{placement.tp_rank:02d}-{placement.dp_rank:02d}-part-"
    return Naming("", f"{stem}00000.safetensors", stem + "{part:05d}.safetensors")


def _target(at: str, whole: Whole, cut: Cut) -> Target:
    """One rank's part. With a single rank the engine's loader cuts nothing, and so pads nothing; for lm_head
    only tp counts."""
    grid, views = cut.place, [whole.view, *whole.also]
    if grid.tp > 1 or (whole.name != "lm_head" and (grid.dp, grid.ep) != (1, 1)):
        split, own = SPLITS[TABLES[whole.table][whole.name]], replace(cut, bits=whole.bits)
        views = [split(view, own) for view in views]
    view, *also = views
    if whole.name in FP32 or (whole.table != "default" and whole.name in FACTORS):
        view = view.cast(dtypes.float32)
    if whole.finish is not None:
        view = whole.finish(view)
    return Target(f"{at}.{NAMES[whole.name]}", view, also=tuple(also))


def _before(model: Model) -> Iterator[Whole]:
    yield Whole("embedding", model.embedding.weight)
    if model.positions is not None:
        yield Whole("positional_embedding", model.positions.weight)
    for role in () if model.family in TOWERS else model.carried:
        yield Whole("token_type_embedding", role.view)
    yield from norm("pre_decoder_ln", model.embedding_norm)
    if model.alibi:
        yield Whole("linear_bias_slopes", slopes(model.sizes.heads))


def _after(model: Model) -> Iterator[Whole]:
    if model.norm is None:
        return
    yield from norm("final_ln", model.norm)
    yield Whole("lm_head", model.lm_head.weight)
    if model.lm_head.bias is not None:
        yield Whole("lm_head_b", model.lm_head.bias)


def _places(order: list[int], experts: int) -> Iterator[Whole]:
    """The places of each expert [experts, redundant + 1], filled up with -1, and how many it has [experts].

    Source: rtp-llm's model_loader/loader.py, _init_eplb_weight."""
    places = np.full((experts, len(order) - experts + 1), -1, np.int32)
    count = np.zeros(experts, np.int32)
    for place, expert in enumerate(order):
        places[expert, count[expert]] = place
        count[expert] += 1
    yield Whole("logic_expert_cnt", constant(count, dtypes.int32))
    yield Whole("log2phy", constant(places, dtypes.int32))


def _own_cut(layer: Layer, model: Model, cut: Cut) -> Cut:
    """The cut of latent attention's queries, whose heads are wider than its values', and of linear
    attention, which has heads of its own."""
    if isinstance(layer.attention, Mla):
        return replace(cut, head_dim=layer.attention.q.shape[0] // cut.heads)
    delta = model.sizes.delta
    if delta is None:
        return cut
    return replace(
        cut,
        kv_heads=delta.keys,
        head_dim=delta.key_dim,
        value_heads=delta.values,
        value_dim=delta.value_dim,
    )
