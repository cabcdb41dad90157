"""`megatron`: one rank's part of megatron-core's GPTModel, under its parameters' names.

q, k and v are one `linear_qkv`, for each kv head its query heads, itself and its value head; its rows are cut
evenly, also where a kv head's rows then fall to several ranks. gate and up are one `linear_fc1` [gate_r;
up_r]; the vocabulary is padded with zero rows, then cut. Layers are numbered within their stage. Source:
megatron-core 0.16.1, core/transformer/{attention,mlp}.py, core/transformer/moe/, core/models/gpt/
gpt_layer_specs.py; the padding is Megatron-LM's vocab_size_with_padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from .. import dtypes
from ..errors import LayoutError
from ..model import Attention, Experts, Layer, Linear, Mla, Mlp, Model, Norm, Sizes
from ..placement import Placement
from ..target import Target
from ..views import View
from .cuts import (
    in_part,
    joined,
    out_part,
    padded_part,
    regrouped,
    require_decoder,
    require_even,
    require_kv_heads,
)
from .naming import Naming, hub


@dataclass(frozen=True, slots=True)
class Megatron:
    """`vocab_padding`: the vocabulary is padded to a multiple of it times tp (Megatron-LM's
    make_vocab_size_divisible_by). `spec`: the names of layers made of Transformer Engine's modules, which
    hold the norm before them, or of megatron's own. `experts`: named as TEGroupedMLP or SequentialMLP."""

    vocab_padding: int = 128
    spec: Literal["transformer_engine", "local"] = "transformer_engine"
    experts: Literal["grouped", "sequential"] = "grouped"
    roles: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        if self.vocab_padding < 1:
            raise LayoutError(f"layout megatron: vocab_padding must be at least 1, got {self.vocab_padding}")

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied output layer is written by the last of several stages alone.

        With ep as many groups of tp ranks (dp) hold a run of the experts each, whose widths tp cuts, and
        everything else alike: megatron-core's default order of ranks.

        Raises LayoutError, before the first target, where heads, rows of q, k and v or a feed-forward width
        do not divide by tp, layers by pp, experts by ep, kv heads neither divide nor are shared evenly,
        and for dp unlike ep; and for a role this layout has no name for."""
        sizes = model.sizes
        if placement.dp != placement.ep:
            raise LayoutError(
                f"layout megatron: groups of tp ranks differ by their experts alone: wanted dp equal to ep "
                f"{placement.ep}, got {placement.dp}"
            )
        if placement.ep > 1 and (not sizes.experts or sizes.experts % placement.ep):
            raise LayoutError(f"layout megatron: {sizes.experts} experts do not divide by ep {placement.ep}")
        require_decoder("megatron", placement, sizes)
        require_kv_heads("megatron", placement, sizes)
        rows = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        require_even("megatron", placement, "the number of query, key and value rows", rows)
        if len(model.layers) % placement.pp:
            raise LayoutError(
                f"layout megatron: {len(model.layers)} layers do not divide by pp {placement.pp}"
            )
        if model.encoder is not None:
            raise LayoutError(f"layout megatron has no place for the encoder of {model.family}")
        if model.parallel or model.alibi:
            what = "blocks side by side" if model.parallel else "ALiBi"
            raise LayoutError(f"layout megatron: megatron-core has no {what}, as {model.family} wants")
        for extra in (model.embedding_norm, *model.carried):
            if extra is not None:
                raise LayoutError(f"layout megatron has no place for {extra.name} of {model.family}")
        if model.lm_head.bias is not None:
            raise LayoutError(f"layout megatron has no place for the bias of {model.lm_head.name}")
        return self._targets(model, placement)

    def naming(self, placement: Placement) -> Naming:
        """safetensors in Megatron-LM's directories of ranks: `mp_rank_TT[_PPP][_EEE]`."""
        stage = f"_{placement.pp_rank:03d}" if placement.pp > 1 else ""
        part = f"_{placement.dp_rank:03d}" if placement.ep > 1 else ""
        return hub(f"mp_rank_{placement.tp_rank:02d}{stage}{part}")

    def _targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        first, last = placement.pp_rank == 0, placement.pp_rank == placement.pp - 1
        each = len(model.layers) // placement.pp
        if first:
            table = self._rows(model.embedding.weight, placement)
            yield Target("embedding.word_embeddings.weight", table)
            if model.positions is not None:
                yield Target("embedding.position_embeddings.weight", model.positions.weight)
        for i in range(each):
            layer = model.layers[placement.pp_rank * each + i]
            yield from self._layer(f"decoder.layers.{i}", layer, model.sizes, placement)
        if last:
            yield from _norm("decoder.final_layernorm.", model.norm)
            if not model.tied or not first:
                yield Target("output_layer.weight", self._rows(model.lm_head.weight, placement))

    def _rows(self, view: View, placement: Placement) -> View:
        return padded_part(view, self.vocab_padding * placement.tp, placement.tp_rank, placement.tp)

    def _layer(self, at: str, layer: Layer, sizes: Sizes, placement: Placement) -> Iterator[Target]:
        for extra in (layer.attention_after, layer.mlp_after, layer.cross_norm):
            if extra is not None:
                raise LayoutError(f"layout megatron has no place for {extra.name}")
        if layer.attention_norm is None or layer.mlp_norm is None:
            raise LayoutError(f"layout megatron wants two norms in {layer.name}")
        fused = self.spec == "transformer_engine"
        before = "self_attention.linear_qkv.layer_norm_" if fused else "input_layernorm."
        yield from _norm(f"{at}.{before}", layer.attention_norm)
        yield from _attention(f"{at}.self_attention", layer.attention, sizes, placement)
        routed = isinstance(layer.mlp, Experts)
        between = "mlp.linear_fc1.layer_norm_" if fused and not routed else "pre_mlp_layernorm."
        yield from _norm(f"{at}.{between}", layer.mlp_norm)
        if isinstance(layer.mlp, Experts):
            yield from self._experts(f"{at}.mlp", layer.mlp, placement)
        else:
            yield from _mlp(f"{at}.mlp", layer.mlp, placement)

    def _experts(self, at: str, moe: Experts, placement: Placement) -> Iterator[Target]:
        yield from _linear(f"{at}.router", moe.router)
        if moe.correction is not None:
            yield Target(f"{at}.router.expert_bias", moe.correction.view.cast(dtypes.float32))
        each = len(moe.experts) // placement.ep
        for e in range(each):
            for t in _mlp("", moe.experts[placement.dp_rank * each + e], placement):
                _, fc, leaf = t.name.split(".")
                if leaf == "bias":
                    raise LayoutError(f"layout megatron has no place for the biases of {moe.name}")
                name = f"experts.{fc}.{leaf}{e}"
                if self.experts == "sequential":
                    name = f"experts.local_experts.{e}.{fc}.{leaf}"
                yield Target(f"{at}.{name}", t.view)
        if moe.shared is not None:
            yield from _mlp(f"{at}.shared_experts", moe.shared, placement)
        if moe.shared_gate is not None:
            yield Target(f"{at}.shared_experts.gate_weight", moe.shared_gate.weight)


def _attention(at: str, attention: Attention | Mla, sizes: Sizes, placement: Placement) -> Iterator[Target]:
    if isinstance(attention, Mla) or attention.sinks is not None or attention.relative is not None:
        raise LayoutError(f"layout megatron has no place for the attention of {attention.o.name}")
    qkv = regrouped("", [attention.q, attention.k, attention.v], sizes.head_dim)
    yield from _linear(f"{at}.linear_qkv", out_part(qkv, placement.tp_rank, placement.tp))
    yield from _linear(f"{at}.linear_proj", in_part(attention.o, placement.tp_rank, placement.tp))
    for name, norm in (("q_layernorm", attention.q_norm), ("k_layernorm", attention.k_norm)):
        if norm is not None:
            yield from _norm(f"{at}.{name}.", norm)


def _mlp(at: str, mlp: Mlp, placement: Placement) -> Iterator[Target]:
    tp, rank = placement.tp, placement.tp_rank
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


def _norm(at: str, norm: Norm | None) -> Iterator[Target]:
    """A norm whose parameters begin with `at`: "layer_norm_" or "layernorm."."""
    if norm is None:
        raise LayoutError(f"layout megatron: the model has no norm to write as {at}weight")
    if norm.plus_one:
        raise LayoutError(f"layout megatron wants 1 + {norm.name}.weight, which is not made yet")
    yield Target(f"{at}weight", norm.weight)
    if norm.bias is not None:
        yield Target(f"{at}bias", norm.bias)
