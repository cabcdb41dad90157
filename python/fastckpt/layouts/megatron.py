"""`megatron`: one rank's part of megatron-core's GPTModel, under its parameters' names.

q, k and v are one `linear_qkv`: for each kv head its query heads, their output gates where there are any
(attention_output_gate), itself and its value head. Its rows are cut evenly, even where that gives several
ranks parts of one kv head. Of latent attention, the matrices behind the low ranks are cut. gate and up are
one `linear_fc1` [gate_r; up_r]; the vocabulary is padded with zero rows, then cut. Layers are numbered within
their stage. Source: megatron-core 0.16.1 and 0.19.2, core/transformer/{attention,
multi_latent_attention,mlp}.py, core/transformer/moe/, core/models/gpt/gpt_layer_specs.py; the padding is
Megatron-LM's vocab_size_with_padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from .. import dtypes
from ..errors import LayoutError
from ..mixers import Attention, DeltaNet, Mla
from ..model import Experts, Layer, Mlp, Model, Sizes
from ..placement import Placement
from ..roles import Linear, Norm
from ..target import Target
from ..views import View
from .cuts import in_part, joined, out_part, padded_part, regrouped
from .naming import Naming, hub
from .requirements import (
    Subject,
    require_even,
    require_heads,
    require_heads_alike,
    require_known,
    require_least,
    require_neighbours,
    require_no_scalars,
    require_subjects,
    two_blocks,
)
from .servers import Share


@dataclass(frozen=True, slots=True)
class Megatron:
    """`vocab_padding`: the vocabulary is padded to a multiple of it times tp (Megatron-LM's
    make_vocab_size_divisible_by). `spec`: the names of layers made of Transformer Engine's modules, which
    hold the norm before them, or of megatron's own. `experts`: named as TEGroupedMLP or SequentialMLP.
    `expert_tp`: how many ranks cut one expert (expert_tensor_parallel_size; 0: tp).
    `first_stage`, `last_stage`: how many layers the first and the last stage hold
    (num_layers_in_first_pipeline_stage, ..._last_...; 0: as many as each of the others).
    `zero_centered_gamma`: norms are stored as their factor less 1 (layernorm_zero_centered_gamma), as the
    hub's Gemma has them."""

    vocab_padding: int = 128
    spec: Literal["transformer_engine", "local"] = "transformer_engine"
    experts: Literal["grouped", "sequential"] = "grouped"
    expert_tp: int = 0
    first_stage: int = 0
    last_stage: int = 0
    zero_centered_gamma: bool = False
    roles: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        require_least("megatron", self, 1, "vocab_padding")
        require_least("megatron", self, 0, "expert_tp", "first_stage", "last_stage")

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied output layer is written only by the last of several stages.

        The tp * dp ranks of a stage are also the expert_tp * ep ranks of its experts: each run of expert_tp
        ranks holds a run of the experts and cuts their widths, which is megatron-core's default order of
        ranks. All else is the same in every dp group.

        Raises LayoutError, before the first target, where heads, rows of q, k and v or a feed-forward width
        do not divide by tp, layers by pp, experts by ep, an expert's width by expert_tp, kv heads neither
        divide nor are shared evenly, and for a dp that the experts do not need; and for a role this layout
        has no name for."""
        experts = Subject(lambda: model.sizes.experts > 0, f"experts, which {model.family} has not")
        stages = Subject(lambda: placement.pp > 1, f"pp above 1, got {placement.pp}")
        subjects = {"experts": experts, "expert_tp": experts, "first_stage": stages, "last_stage": stages}
        require_subjects("megatron", self, subjects)
        self._require_even(model.sizes, placement)
        stage = self._stage(len(model.layers), placement)
        if model.encoder is not None:
            raise LayoutError(f"layout megatron has no place for the encoder of {model.family}")
        if model.parallel or model.alibi:
            what = "blocks side by side" if model.parallel else "ALiBi"
            raise LayoutError(f"layout megatron: megatron-core has no {what}, as {model.family} wants")
        if model.positions is not None and model.first_position:
            raise LayoutError(
                f"layout megatron has no place for {model.positions.name}, whose positions begin with row "
                f"{model.first_position}"
            )
        for extra in (model.embedding_norm, *model.carried):
            if extra is not None:
                raise LayoutError(f"layout megatron has no place for {extra.name} of {model.family}")
        if model.lm_head.bias is not None:
            raise LayoutError(f"layout megatron has no place for the bias of {model.lm_head.name}")
        return self._targets(model, placement, stage)

    def _require_even(self, sizes: Sizes, placement: Placement) -> None:
        """Raises LayoutError for sizes that this placement cannot cut."""
        grid = self._experts_grid(placement)
        if placement.tp * placement.dp != grid.count * grid.ep:
            raise LayoutError(
                f"layout megatron: dp groups differ only in their experts: wanted tp * dp equal to "
                f"expert_tp * ep {grid.count * grid.ep}, got {placement.tp * placement.dp}"
            )
        if placement.ep > 1 and (not sizes.experts or sizes.experts % placement.ep):
            raise LayoutError(f"layout megatron: {sizes.experts} experts do not divide by ep {placement.ep}")
        require_heads("megatron", placement, sizes)
        for key, width in sizes.widths.items():
            if key != sizes.expert_width or grid.count == placement.tp:
                require_even("megatron", placement, key, width)
            elif width % grid.count:
                raise LayoutError(f"layout megatron: {key} {width} does not divide by expert_tp {grid.count}")
        rows = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        require_even("megatron", placement, "the number of query, key and value rows", rows)

    def naming(self, placement: Placement) -> Naming:
        """safetensors in Megatron-LM's directories of ranks: `mp_rank_TT[_PPP][_EEE]`.

        These names distinguish ranks by tp, pp and ep. Where expert_tp is more than tp, several ranks of one
        name cut an expert, and `_expert_tp_NN` is added."""
        grid = self._experts_grid(placement)
        stage = f"_{placement.pp_rank:03d}" if placement.pp > 1 else ""
        part = f"_{grid.ep_rank:03d}" if placement.ep > 1 else ""
        more = f"_expert_tp_{grid.index:02d}" if grid.count > placement.tp else ""
        return hub(f"mp_rank_{placement.tp_rank:02d}{stage}{part}{more}")

    def _experts_grid(self, placement: Placement) -> Share:
        """Which of the experts, and of their widths, this rank holds."""
        count, rank = self.expert_tp or placement.tp, placement.stage_rank
        return Share(rank % count, count, rank // count % placement.ep, placement.ep)

    def _stage(self, layers: int, placement: Placement) -> range:
        """The layers of this rank's stage. Raises LayoutError where the others cannot share the rest."""
        pp = placement.pp
        given = {0: self.first_stage, pp - 1: self.last_stage} if pp > 1 else {}
        said = {stage: count for stage, count in given.items() if count}
        others, rest = pp - len(said), layers - sum(said.values())
        if rest < others or (rest % others if others else rest):
            apart = f", {' and '.join(map(str, said.values()))} of them apart," if said else ""
            raise LayoutError(f"layout megatron: {layers} layers{apart} do not divide by pp {pp}")
        sizes = [said.get(stage, rest // others if others else 0) for stage in range(pp)]
        start = sum(sizes[: placement.pp_rank])
        return range(start, start + sizes[placement.pp_rank])

    def _targets(self, model: Model, placement: Placement, stage: range) -> Iterator[Target]:
        first, last = placement.pp_rank == 0, placement.pp_rank == placement.pp - 1
        if first:
            table = self._rows(model.embedding.weight, placement)
            yield Target("embedding.word_embeddings.weight", table)
            if model.positions is not None:
                yield Target("embedding.position_embeddings.weight", model.positions.weight)
        for i, layer in enumerate(stage):
            yield from self._layer(f"decoder.layers.{i}", model.layers[layer], model.sizes, placement)
        if last:
            yield from self._norm("decoder.final_layernorm.", model.norm)
            if not model.tied or not first:
                yield Target("output_layer.weight", self._rows(model.lm_head.weight, placement))

    def _rows(self, view: View, placement: Placement) -> View:
        return padded_part(view, self.vocab_padding * placement.tp, placement.tp_rank, placement.tp)

    def _layer(self, at: str, layer: Layer, sizes: Sizes, placement: Placement) -> Iterator[Target]:
        require_known("megatron", layer)
        for extra in (layer.attention_after, layer.mlp_after):
            if extra is not None:
                raise LayoutError(f"layout megatron has no place for {extra.name}")
        attention, mlp = two_blocks("megatron", layer)
        if layer.attention_norm is None or layer.mlp_norm is None:
            raise LayoutError(f"layout megatron wants two norms in {layer.name}")
        if isinstance(attention, DeltaNet):
            raise LayoutError(f"layout megatron has no place for the linear attention of {layer.name}")
        fused, latent = self.spec == "transformer_engine", isinstance(attention, Mla)
        before = "self_attention.linear_qkv.layer_norm_" if fused and not latent else "input_layernorm."
        yield from self._norm(f"{at}.{before}", layer.attention_norm)
        if isinstance(attention, Mla):
            yield from self._latent(f"{at}.self_attention", attention, placement)
        else:
            yield from self._attention(f"{at}.self_attention", attention, sizes, placement)
        routed = isinstance(mlp, Experts)
        between = "mlp.linear_fc1.layer_norm_" if fused and not routed else "pre_mlp_layernorm."
        yield from self._norm(f"{at}.{between}", layer.mlp_norm)
        if isinstance(mlp, Experts):
            yield from self._experts(f"{at}.mlp", mlp, placement)
        else:
            yield from _mlp(f"{at}.mlp", mlp, placement.tp_rank, placement.tp)

    def _experts(self, at: str, moe: Experts, placement: Placement) -> Iterator[Target]:
        yield from _linear(f"{at}.router", moe.router)
        if moe.correction is not None:
            yield Target(f"{at}.router.expert_bias", moe.correction.view.cast(dtypes.float32))
        grid = self._experts_grid(placement)
        for e, expert in enumerate(grid.of(len(moe.experts), "linear")):
            for t in _mlp("", moe.experts[expert], grid.index, grid.count):
                _, fc, leaf = t.name.split(".")
                name = f"experts.{fc}.{leaf}{e}"
                if self.experts == "sequential":
                    name = f"experts.local_experts.{e}.{fc}.{leaf}"
                yield Target(f"{at}.{name}", t.view)
        if moe.shared is not None:
            yield from _mlp(f"{at}.shared_experts", moe.shared, placement.tp_rank, placement.tp)
        if moe.shared_gate is not None:
            for t in _unbiased("", moe.shared_gate):
                yield Target(f"{at}.shared_experts.gate_weight", t.view)

    def _attention(
        self, at: str, attention: Attention, sizes: Sizes, placement: Placement
    ) -> Iterator[Target]:
        require_heads_alike("megatron", attention)
        rank, tp = placement.tp_rank, placement.tp
        queries = [attention.q] if attention.gate is None else [attention.q, attention.gate]
        qkv = regrouped(attention.q.name, [*queries, attention.k, attention.v], sizes.head_dim)
        yield from _linear(f"{at}.linear_qkv", out_part(qkv, rank, tp))
        yield from _linear(f"{at}.linear_proj", in_part(attention.o, rank, tp))
        if attention.sinks is not None:
            yield Target(f"{at}.core_attention.softmax_offset", attention.sinks.view.part(0, rank, tp))
        for name, norm in (("q_layernorm", attention.q_norm), ("k_layernorm", attention.k_norm)):
            if norm is not None:
                yield from self._norm(f"{at}.{name}.", norm)

    def _latent(self, at: str, attention: Mla, placement: Placement) -> Iterator[Target]:
        """Transformer Engine's modules hold the low-rank matrices whole, and their norms with the matrix that
        follows; megatron's own modules cut the low-rank matrices too."""
        require_neighbours("megatron", attention)
        if attention.indexer is not None:
            raise LayoutError(f"layout megatron has no place for {attention.indexer.q.name}, an indexer")
        rank, tp = placement.tp_rank, placement.tp
        fused = self.spec == "transformer_engine"

        def low(name: str, linear: Linear, norm: str, role: Norm | None) -> Iterator[Target]:
            if not fused:
                require_even("megatron", placement, f"the rows of {linear.name}", linear.shape[0])
            yield from _unbiased(
                f"{at}.linear_{name}_down_proj", linear if fused else out_part(linear, rank, tp)
            )
            place = f"linear_{name}_up_proj.layer_norm_" if fused else f"{norm}."
            yield from self._norm(f"{at}.{place}", role)

        if attention.q_a is None:
            yield from _unbiased(f"{at}.linear_q_proj", out_part(attention.q, rank, tp))
        else:
            yield from low("q", attention.q_a, "q_layernorm", attention.q_norm)
            yield from _unbiased(f"{at}.linear_q_up_proj", out_part(attention.q, rank, tp))
        yield from low("kv", attention.kv_a, "kv_layernorm", attention.kv_norm)
        yield from _unbiased(f"{at}.linear_kv_up_proj", out_part(attention.kv_b, rank, tp))
        yield from _linear(f"{at}.linear_proj", in_part(attention.o, rank, tp))

    def _norm(self, at: str, norm: Norm | None) -> Iterator[Target]:
        """A norm whose parameters begin with `at`: "layer_norm_" or "layernorm."."""
        if norm is None:
            raise LayoutError(f"layout megatron: the model has no norm to write as {at}weight")
        if norm.plus_one != self.zero_centered_gamma:
            stored, wanted = ("less 1", True) if norm.plus_one else ("itself", False)
            raise LayoutError(
                f"layout megatron: {norm.name}.weight is the factor {stored}: wanted "
                f"zero_centered_gamma={wanted} (-L zero_centered_gamma={str(wanted).lower()})"
            )
        yield Target(f"{at}weight", norm.weight)
        if norm.bias is not None:
            yield Target(f"{at}bias", norm.bias)


def _mlp(at: str, mlp: Mlp, rank: int, tp: int) -> Iterator[Target]:
    require_no_scalars("megatron", mlp)
    up = out_part(mlp.up, rank, tp)
    if mlp.gate is not None:
        up = joined(mlp.up.name, [out_part(mlp.gate, rank, tp), up])
    yield from _linear(f"{at}.linear_fc1", up)
    yield from _linear(f"{at}.linear_fc2", in_part(mlp.down, rank, tp))


def _linear(at: str, linear: Linear) -> Iterator[Target]:
    if linear.beside:
        raise LayoutError(f"layout megatron has no place for {linear.name}.{linear.beside[0].leaf}")
    yield Target(f"{at}.weight", linear.weight)
    if linear.bias is not None:
        yield Target(f"{at}.bias", linear.bias)


def _unbiased(at: str, linear: Linear) -> Iterator[Target]:
    if linear.bias is not None:
        raise LayoutError(f"layout megatron has no place for {linear.name}.bias")
    return _linear(at, linear)
