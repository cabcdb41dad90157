"""`hf`: the hub's names and forms; at tp > 1 each rank its slice, as transformers' tensor parallelism cuts.

transformers' base_model_tp_plan cuts q, k, v, gate and up by outputs, o and down by inputs, and the embedding
(embedding_rowwise) and lm_head (colwise_gather_output) by vocabulary rows; every rank holds the rest whole.
Where a family's plan cuts less, its recipe says so (HubCuts). Families without a plan are cut in the same
way; their fused matrices are cut part by part, as packed_colwise does, or group by group. Every rank holds an
image tower whole, and Mamba's mixers, which no plan of transformers cuts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import LayoutError
from ..mixers import Attention, Compressed, DeltaNet, Mla, Queries, Selective, ShortConv
from ..model import BlockStacks, Experts, Layer, Mlp, Model, Prediction, Stacked, Stacks
from ..placement import Placement
from ..roles import Linear
from ..target import Target
from ..views import View, cat, stack
from .cuts import in_part, joined, out_part, qkv_part, regrouped
from .hub_form import bias, norm, parameter, stored
from .mixer_cuts import delta_rest, delta_stored, mamba, queries_part, selective, short_conv
from .naming import Naming, ranked
from .padding import advice, padded, resized, round_up
from .requirements import (
    Subject,
    require_even,
    require_heads,
    require_least,
    require_pad,
    require_subjects,
    require_tensor_parallel,
)

WHOLE = Placement()


@dataclass(frozen=True, slots=True)
class Hf:
    """`replicate_kv`: with fewer kv heads than ranks, repeat them; transformers itself cannot run that.
    `pad`: heads and widths that do not divide by tp are padded with zeros (layouts/padding.py), each rank's
    width to a multiple of `multiple`. `vocab_padding`: the vocabulary is padded with zero rows to a multiple
    of it; the added tokens' logits are 0. `split_experts`: experts that the hub stores in stacks are written
    one by one, as quantised releases have them, where the family's loaders take them so (vLLM; transformers
    does not)."""

    replicate_kv: bool = False
    pad: bool = False
    multiple: int = 1
    vocab_padding: int = 1
    split_experts: bool = False
    roles: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        require_least("hf", self, 1, "multiple", "vocab_padding")
        require_pad("hf", self.pad, self.multiple)

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied lm_head is left out, the config says it is tied.

        Raises LayoutError, before the first target, where heads, kv heads, a feed-forward width or the
        vocabulary do not divide by tp, and for pp, dp or ep."""
        require_tensor_parallel("hf", placement)
        stacks = f"experts in stacks that loaders also take one by one, which {model.family} has not"
        subject = Subject(lambda: any(map(_stacked_layer, model.layers)), stacks)
        require_subjects("hf", self, {"split_experts": subject})
        if self.split_experts:
            model = replace(model, layers=model.layers.map(_unstacked))
        model = self._padded(model, placement)
        instead = "" if self.pad else advice(model)
        if "attention" not in model.cuts.whole:
            self._require_heads(model, placement, instead)
        for key, width in model.sizes.widths.items():
            if key not in model.cuts.whole:
                require_even("hf", placement, key, width, instead)
        if model.sizes.delta is not None and model.cuts.rows:  # else no layer is built to look for one
            net = next((x.attention for x in model.layers if isinstance(x.attention, DeltaNet)), None)
            for linear in () if net is None else (*delta_stored(net), net.o):
                require_even("hf", placement, f"the rows of {linear.name}", linear.shape[0])
        rows = (
            ""
            if len(model.predictions)
            else f"; vocab_padding={placement.tp} (-L vocab_padding={placement.tp}) pads it with zero rows"
        )
        require_even("hf", placement, "vocab_size", model.sizes.vocab, rows)
        return _targets(model, placement)

    def resized(self, model: Model, placement: Placement) -> Mapping[str, int]:
        """config.json's keys whose numbers change. Raises LayoutError where no key can say a new size."""
        return resized(model.family, model.sizes, self._padded(model, placement).sizes)

    def naming(self, placement: Placement) -> Naming:
        """The hub's names, at tp > 1 inside `rank-00/` and so on."""
        return ranked(placement.tp, placement.tp_rank)

    def _padded(self, model: Model, placement: Placement) -> Model:
        if self.pad:
            model = padded(model, placement.tp, placement.tp, self.multiple)
        if model.sizes.vocab % self.vocab_padding == 0:
            return model
        if len(model.predictions):
            raise LayoutError(f"layout hf: the tables of {model.family}'s prediction layers are not padded")
        head, vocab = model.lm_head, round_up(model.sizes.vocab, self.vocab_padding)

        def grown(view: View) -> View:
            return view.pad(0, 0, vocab - view.shape[0])

        more_bias = None if head.bias is None else grown(head.bias)
        return replace(
            model,
            sizes=replace(model.sizes, vocab=vocab),
            embedding=replace(model.embedding, weight=grown(model.embedding.weight)),
            lm_head=replace(head, weight=grown(head.weight), bias=more_bias),
        )

    def _require_heads(self, model: Model, placement: Placement, instead: str) -> None:
        sizes = model.sizes
        if model.cuts.rows and sizes.fused_qkv:
            rows = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
            require_even("hf", placement, "the number of query, key and value rows", rows)
            require_even("hf", placement, "the number of query rows", sizes.heads * sizes.head_dim)
            return
        require_heads("hf", placement, sizes, instead)
        for _, kv in ((sizes.heads, sizes.kv_heads), *sizes.others):
            if kv % placement.tp and not self.replicate_kv:
                raise LayoutError(
                    f"layout hf: {kv} kv heads do not divide by tp {placement.tp}, and "
                    "transformers cannot run replicas; replicate_kv=True (-L replicate_kv=true) writes them "
                    "all the same"
                )


def _stacked_layer(layer: Layer) -> bool:
    """Whether its experts lie in stacks, and loaders take them one by one too."""
    return isinstance(layer.mlp, Experts) and layer.mlp.stacked is not None and layer.mlp.stacked.singly


def _unstacked(layer: Layer) -> Layer:
    if not isinstance(layer.mlp, Experts):
        return layer
    return replace(layer, mlp=replace(layer.mlp, stacked=None))


def _targets(model: Model, placement: Placement) -> Iterator[Target]:
    tp, rank = placement.tp, placement.tp_rank
    table = model.embedding.weight
    if "embedding" not in model.cuts.whole:
        table = table.part(0, rank, tp)
    yield Target(f"{model.embedding.name}.weight", table)
    if model.positions is not None:
        yield Target(f"{model.positions.name}.weight", model.positions.weight)
    if model.per_layer is not None:
        embedding = model.per_layer.embedding
        yield Target(f"{embedding.name}.weight", embedding.weight)
        yield from stored(model.per_layer.projection)
        yield from norm(model.per_layer.norm)
    yield from norm(model.embedding_norm)
    if model.encoder is not None:
        if model.encoder.positions is not None:
            yield Target(f"{model.encoder.positions.name}.weight", model.encoder.positions.weight)
        yield from _layers(model.encoder.layers, model, placement)
        yield from norm(model.encoder.norm)
    yield from _layers(model.layers, model, placement)
    yield from norm(model.norm)
    head = model.lm_head if "head" in model.cuts.whole else out_part(model.lm_head, rank, tp)
    yield from bias(head) if model.tied else stored(head)
    for prediction in model.predictions:
        yield from _prediction(prediction, model, placement)
    if model.tower is not None:
        yield from _layers(model.tower.layers, model, WHOLE)
        for merger in model.tower.mergers:
            yield from _mlp(merger, model, WHOLE)
        for role in model.tower.beyond:
            yield from parameter(role)
    for role in model.carried:
        yield from parameter(role)


def _prediction(role: Prediction, model: Model, placement: Placement) -> Iterator[Target]:
    tp, rank = placement.tp, placement.tp_rank
    if role.embedding is not None:
        yield Target(f"{role.embedding.name}.weight", role.embedding.weight.part(0, rank, tp))
    for each in (role.embedding_norm, role.hidden_norm):
        yield from norm(each)
    yield from stored(role.join)
    yield from _layers([role.layer], model, placement)
    yield from norm(role.norm)
    if role.head is not None:
        yield from stored(out_part(role.head, rank, tp))


def _layers(layers: Iterable[Layer], model: Model, placement: Placement) -> Iterator[Target]:
    for layer in layers:
        yield from norm(layer.attention_norm)
        if isinstance(layer.attention, DeltaNet):
            yield from _delta(layer.attention, model, placement)
        elif isinstance(layer.attention, ShortConv):
            yield from short_conv(layer.attention)
        elif isinstance(layer.attention, Compressed):
            yield from _compressed(layer.attention)
        elif isinstance(layer.attention, Selective):
            yield from selective(layer.attention)
            yield from parameter(layer.attention.a_log)
        elif layer.attention is not None:
            yield from _attention(layer.attention, model, placement)
        if layer.mamba is not None:
            yield from mamba(layer.mamba)
            yield from parameter(layer.mamba.a_log)
        if layer.vision is not None:
            yield from _attention(layer.vision.attention, model, placement)
        yield from norm(layer.attention_after)
        yield from norm(layer.cross_norm)
        if layer.cross is not None:
            yield from _attention(layer.cross, model, placement)
        yield from norm(layer.mlp_norm)
        if isinstance(layer.mlp, Experts):
            yield from _experts(layer.mlp, model, placement)
        elif layer.mlp is not None:
            yield from _mlp(layer.mlp, model, WHOLE if "mlp" in model.cuts.whole else placement)
        if layer.vision is not None:
            yield from _mlp(layer.vision.mlp, model, placement)
        yield from norm(layer.mlp_after)
        for role in layer.whole:
            yield from parameter(role)


def _attention(attention: Attention | Queries | Mla, model: Model, placement: Placement) -> Iterator[Target]:
    if "attention" in model.cuts.whole:
        placement = WHOLE
    tp, rank = placement.tp, placement.tp_rank
    if isinstance(attention, Queries):
        yield from queries_part(attention, placement)
        return
    if isinstance(attention, Mla):
        if attention.q_a is not None:
            yield from stored(attention.q_a)
        yield from norm(attention.q_norm)
        yield from stored(out_part(attention.q, rank, tp))
        yield from stored(attention.kv_a)
        yield from norm(attention.kv_norm)
        yield from stored(out_part(attention.kv_b, rank, tp))
        yield from stored(in_part(attention.o, rank, tp))
        if attention.indexer is not None:
            for linear in (attention.indexer.q, attention.indexer.k, attention.indexer.weights):
                yield from stored(linear)
            yield from norm(attention.indexer.k_norm)
        return
    if attention.fused is None:
        linears = qkv_part(attention, model.sizes, placement)
        for linear in linears[:2] if attention.values_are_keys else linears:
            yield from stored(linear)
    elif model.cuts.rows:
        whole = joined(attention.fused, qkv_part(attention, model.sizes, WHOLE))
        yield from stored(out_part(whole, rank, tp))
    else:
        parts = qkv_part(attention, model.sizes, placement)
        if attention.grouped:
            yield from stored(regrouped(attention.fused, parts, model.sizes.head_dim))
        else:
            yield from stored(joined(attention.fused, parts))
    yield from stored(in_part(attention.o, rank, tp))
    yield from norm(attention.q_norm)
    yield from norm(attention.k_norm)
    if attention.output_gate is not None:
        yield from stored(out_part(attention.output_gate, rank, tp))
    if attention.sinks is not None:
        yield Target(attention.sinks.name, attention.sinks.view.part(0, rank, tp))
    if attention.relative is not None:
        yield Target(attention.relative.name, attention.relative.view.part(1, rank, tp))


def _compressed(role: Compressed) -> Iterator[Target]:
    """All of compressed attention, of which transformers cuts nothing."""
    for linear in (role.q_a, role.q, role.kv, role.o_a, role.o):
        yield from stored(linear)
    yield from norm(role.q_norm)
    yield from norm(role.kv_norm)
    yield from parameter(role.sinks)
    indexer = role.indexer
    for linear in () if indexer is None else (indexer.q, indexer.weights):
        yield from stored(linear)
    for made in (role.compressor, None if indexer is None else indexer.keys):
        if made is not None:
            yield from stored(made.kv)
            yield from stored(made.gate)
            yield from parameter(made.positions)
            yield from norm(made.norm)


def _delta(net: DeltaNet, model: Model, placement: Placement) -> Iterator[Target]:
    at = placement if model.cuts.rows else WHOLE
    for linear in (*delta_stored(net), net.o):
        yield from stored(out_part(linear, at.tp_rank, at.tp))
    for linear in net.low or ():
        yield from stored(linear)
    yield from delta_rest(net)


def _mlp(mlp: Mlp, model: Model, placement: Placement) -> Iterator[Target]:
    tp, rank = placement.tp, placement.tp_rank
    if mlp.gate is None:
        yield from stored(out_part(mlp.up, rank, tp))
    elif mlp.fused is None:
        yield from stored(out_part(mlp.gate, rank, tp))
        yield from stored(out_part(mlp.up, rank, tp))
    elif model.cuts.rows:
        yield from stored(out_part(joined(mlp.fused, _pair(mlp, mlp.gate)), rank, tp))
    else:
        yield from stored(joined(mlp.fused, [out_part(x, rank, tp) for x in _pair(mlp, mlp.gate)]))
    yield from stored(in_part(mlp.down, rank, tp))
    for role in mlp.scalars:
        yield from parameter(role)


def _pair(mlp: Mlp, gate: Linear) -> list[Linear]:
    return [mlp.up, gate] if mlp.up_first else [gate, mlp.up]


def _experts(moe: Experts, model: Model, placement: Placement) -> Iterator[Target]:
    yield from stored(moe.router)
    yield from parameter(moe.correction)
    for linear in moe.latent or ():
        yield from stored(linear)
    routed = WHOLE if "experts" in model.cuts.whole else placement
    if moe.stacks is not None:
        yield from _stacks(moe.stacks, routed)
    elif moe.stacked is not None:
        yield from _stacked(moe.experts, moe.stacked, routed)
    else:
        for mlp in moe.experts:
            yield from _mlp(mlp, model, routed)
    if moe.shared is not None:
        yield from _mlp(moe.shared, model, WHOLE if "shared" in model.cuts.whole else placement)
    if moe.shared_gate is not None:
        yield from stored(moe.shared_gate)


def _stacked(experts: Iterable[Mlp], names: Stacked, placement: Placement) -> Iterator[Target]:
    """The rank's part of the width of every expert's gate, up and down, in the hub's two tensors."""
    tp, rank = placement.tp, placement.tp_rank
    pairs, downs = [], []
    for mlp in experts:
        parts = [out_part(x, rank, tp).weight for x in (mlp.gate, mlp.up) if x is not None]
        pairs.append(cat(parts))
        downs.append(in_part(mlp.down, rank, tp).weight)
    for name, view in ((names.gate_up, stack(pairs)), (names.down, stack(downs))):
        yield Target(name, view.permute((0, 2, 1)) if names.transposed else view)


def _stacks(stacks: Stacks | BlockStacks, placement: Placement) -> Iterator[Target]:
    """The rank's part of every expert's width; gate and up alternate, so that their part is one run."""
    tp, rank = placement.tp, placement.tp_rank
    if isinstance(stacks, BlockStacks):
        for role, axis in (
            (stacks.gate_up, 1),
            (stacks.gate_up_scales, 1),
            (stacks.gate_up_bias, 1),
            (stacks.down, 2),
            (stacks.down_scales, 2),
        ):
            yield Target(role.name, role.view.part(axis, rank, tp))
        yield from parameter(stacks.down_bias)
        return
    yield Target(stacks.gate_up.name, stacks.gate_up.view.part(2, rank, tp))
    yield Target(stacks.gate_up_bias.name, stacks.gate_up_bias.view.part(1, rank, tp))
    yield Target(stacks.down.name, stacks.down.view.part(1, rank, tp))
    yield from parameter(stacks.down_bias)
