"""`vllm`: vLLM's model format, the state dict of one rank after its load_weights.

Matrices are [out, in]. q, k and v are one `qkv_proj` [q_r; k_r; v_r], gate and up one `gate_up_proj`
[gate_r; up_r], experts `w13_weight` [experts, gate_r; up_r, hidden] and `w2_weight` [experts, hidden,
width / tp]; latent attention cuts what follows the low ranks, whose matrices are one `fused_qkv_a_proj`,
whole on every rank; the vocabulary is padded with zero rows, then cut. Source: vLLM's layers/linear.py,
vocab_parallel_embedding.py, fused_moe/layer.py and models/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from .. import dtypes
from ..errors import LayoutError
from ..model import Attention, Experts, Layer, Linear, Mla, Mlp, Model, Parameter, Sizes, Stacks
from ..placement import Placement
from ..target import Target
from ..views import View, cat, stack, zeros
from .cuts import (
    bias,
    in_form,
    in_part,
    joined,
    norm,
    out_part,
    padded_part,
    plain,
    qkv_part,
    require_even,
    require_heads,
    require_kv_heads,
)
from .naming import Naming
from .padding import padded
from .servers import Share, expert_share, layer_range

RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_oss": ((".self_attn.", ".attn."), (".embed_tokens.", ".embedding.")),
    "chatglm": ((".word_embeddings.", "."),),
}
"""family -> (a part of the hub's name, what vLLM's module is called), where the two differ."""


@dataclass(frozen=True, slots=True)
class Vllm:
    """`vocab_padding`: the vocabulary is padded to a multiple of it (vLLM's DEFAULT_VOCAB_PADDING_SIZE).
    `pad`: heads and widths that do not divide are padded with zeros (layouts/padding.py); the server's config
    must then say the padded sizes. `experts`: which of them a rank of expert parallelism holds: a run of
    them, or every ep-th.
    `gate_up`: the order within `w13_weight`; "up_gate" is what some kernels and SGLang's loaders want
    (where the hub stores gate and up in turn, they stay so)."""

    vocab_padding: int = 64
    pad: bool = False
    experts: Literal["linear", "round_robin"] = "linear"
    gate_up: Literal["gate_up", "up_gate"] = "gate_up"
    roles: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        if self.vocab_padding < 1:
            raise LayoutError(f"layout vllm: vocab_padding must be at least 1, got {self.vocab_padding}")

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied lm_head is the embedding's parameter and left out.

        With pp a stage holds a range of layers, the first the embedding, the last the final norm and lm_head
        (and the embedding it is tied to). With dp every group of tp ranks holds the same, but for experts:
        all tp * dp ranks cut their widths, or with ep = tp * dp share them out. Raises LayoutError, before
        the first target, where heads, a feed-forward width or the padded vocabulary do not divide, where kv
        heads neither divide nor repeat evenly, for more stages than layers, for another ep, and for a model
        that is no decoder."""
        if self.pad:
            ranks = placement.tp * placement.dp
            model = padded(model, placement.tp, ranks if placement.ep == 1 else 1)
        share = expert_share("vllm", placement, model.sizes)
        stage = layer_range("vllm", placement, len(model.layers))
        require_heads("vllm", placement, model.sizes)
        for key, width in model.sizes.widths.items():
            if key != model.sizes.expert_width:
                require_even("vllm", placement, key, width)
        require_kv_heads("vllm", placement, model.sizes)
        rows = model.sizes.vocab + -model.sizes.vocab % self.vocab_padding
        require_even("vllm", placement, f"vocab_size {model.sizes.vocab}, padded to", rows)
        if model.encoder is not None or model.carried:
            raise LayoutError(f"layout vllm has no place for {model.family}, which is no decoder")
        renamed = RENAMED.get(model.family, ())
        return (_named(t, renamed) for t in self._targets(model, placement, share, stage))

    def naming(self, placement: Placement) -> Naming:
        """The pattern of vLLM's sharded_state loader, parts counted from 0; it tells tp ranks apart only, so
        stages and data-parallel groups stand before them where there are several."""
        stem = "model-rank"
        if placement.pp > 1 or placement.dp > 1:
            pp = f"-pp-{placement.pp_rank}" if placement.pp > 1 else ""
            dp = f"-dp-{placement.dp_rank}" if placement.dp > 1 else ""
            stem = f"model{pp}{dp}-tp"
        stem = f"{stem}-{placement.tp_rank}"
        return Naming("", f"{stem}-part-0.safetensors", stem + "-part-{part}.safetensors")

    def _targets(self, model: Model, placement: Placement, share: Share, stage: range) -> Iterator[Target]:
        first, last = placement.pp_rank == 0, placement.pp_rank == placement.pp - 1
        if first or (last and model.tied):
            yield Target(f"{model.embedding.name}.weight", self._rows(model.embedding.weight, placement))
        if first:
            if model.positions is not None:
                yield Target(f"{model.positions.name}.weight", model.positions.weight)
            yield from norm(model.embedding_norm)
        for i in stage:
            yield from self._layer(model.layers[i], model, placement, share)
        if last:
            yield from norm(model.norm)
            head = model.lm_head
            if not model.tied:
                yield Target(f"{head.name}.weight", self._rows(head.weight, placement))
            if head.bias is not None:
                yield from bias(Linear(head.name, head.weight, self._rows(head.bias, placement)))

    def _rows(self, view: View, placement: Placement) -> View:
        return padded_part(view, self.vocab_padding, placement.tp_rank, placement.tp)

    def _layer(self, layer: Layer, model: Model, placement: Placement, share: Share) -> Iterator[Target]:
        yield from norm(layer.attention_norm)
        if isinstance(layer.attention, Mla):
            yield from _latent(layer.attention, placement)
        else:
            yield from _attention(layer.attention, model.sizes, placement)
        yield from norm(layer.attention_after)
        yield from norm(layer.mlp_norm)
        if isinstance(layer.mlp, Experts):
            yield from self._experts(layer.mlp, placement, share)
        else:
            yield from _mlp(layer.mlp, placement)
        yield from norm(layer.mlp_after)

    def _experts(self, moe: Experts, placement: Placement, share: Share) -> Iterator[Target]:
        yield from plain(moe.router)
        if moe.correction is not None:
            yield Target(moe.correction.name, moe.correction.view.cast(dtypes.float32))
        held = share.of(len(moe.experts), self.experts)
        if moe.stacks is not None:
            yield from _stacks(moe.name, moe.stacks, held, share)
        else:
            mlps = [moe.experts[e] for e in held]
            downs = [in_part(mlp.down, share.index, share.count) for mlp in mlps]
            yield from _stacked(f"{moe.name}.w13", [self._pair(mlp, share) for mlp in mlps])
            yield from _stacked(f"{moe.name}.w2", [_once(x, share) for x in downs])
        if moe.shared is not None:
            yield from _mlp(moe.shared, placement)
        if moe.shared_gate is not None:
            yield from plain(moe.shared_gate)

    def _pair(self, mlp: Mlp, share: Share) -> Linear:
        both = [out_part(x, share.index, share.count) for x in (mlp.gate, mlp.up) if x is not None]
        return joined(mlp.up.name, both if self.gate_up == "gate_up" else both[::-1])


def _named(target: Target, renamed: tuple[tuple[str, str], ...]) -> Target:
    name = target.name
    for old, new in renamed:
        name = name.replace(old, new)
    return target if name == target.name else Target(name, target.view, target.shape)


def _stacked(name: str, linears: Sequence[Linear]) -> Iterator[Target]:
    """The experts' matrices of one kind as a stack, their biases and what stands beside them likewise."""
    first = linears[0]
    quantised = [[x.beside[k] for x in linears] for k in range(len(first.beside))]
    for suffix, views in (
        (first.leaf, [x.weight.T if first.beside and x.transposed else x.weight for x in linears]),
        ("bias", [x.bias for x in linears if x.bias is not None]),
        *((some[0].leaf, [in_form(b) for b in some]) for some in quantised),
    ):
        if views:
            yield Target(f"{name}_{suffix}", stack(views))


def _once(linear: Linear, share: Share) -> Linear:
    """What the ranks make of an expert is summed, so one of them adds its bias and the others zeros."""
    bias = linear.bias
    return replace(linear, bias=zeros(bias.shape, bias.dtype)) if bias is not None and share.index else linear


def _stacks(name: str, stacks: Stacks, held: range, share: Share) -> Iterator[Target]:
    """Experts with gate and up in turn, as gpt-oss's kernels want what its hub has; matrices [out, in]."""

    def of(role: Parameter, axis: int) -> View:
        view = cat([role.view.narrow(0, e, 1) for e in held])
        return view.part(axis, share.index, share.count)

    yield Target(f"{name}.w13_weight", of(stacks.gate_up, 2).permute((0, 2, 1)))
    yield Target(f"{name}.w13_bias", of(stacks.gate_up_bias, 1))
    yield Target(f"{name}.w2_weight", of(stacks.down, 1).permute((0, 2, 1)))
    bias = cat([stacks.down_bias.view.narrow(0, e, 1) for e in held])
    yield Target(f"{name}.w2_bias", zeros(bias.shape, bias.dtype) if share.index else bias)  # added once


def _attention(attention: Attention, sizes: Sizes, placement: Placement) -> Iterator[Target]:
    name = attention.fused or f"{_parent(attention.q.name)}.qkv_proj"
    yield from plain(joined(name, qkv_part(attention, sizes, placement)))
    yield from plain(in_part(attention.o, placement.tp_rank, placement.tp))
    yield from norm(attention.q_norm)
    yield from norm(attention.k_norm)
    if attention.sinks is not None:
        sinks = attention.sinks.view.part(0, placement.tp_rank, placement.tp)
        yield Target(attention.sinks.name, sinks)


def _latent(attention: Mla, placement: Placement) -> Iterator[Target]:
    tp, rank = placement.tp, placement.tp_rank
    if attention.q_a is None:
        yield from plain(attention.kv_a)
    else:
        name = f"{_parent(attention.q_a.name)}.fused_qkv_a_proj"
        yield from plain(joined(name, [attention.q_a, attention.kv_a]))
    yield from norm(attention.q_norm)
    yield from plain(out_part(attention.q, rank, tp))
    yield from norm(attention.kv_norm)
    yield from plain(out_part(attention.kv_b, rank, tp))
    yield from plain(in_part(attention.o, rank, tp))


def _mlp(mlp: Mlp, placement: Placement) -> Iterator[Target]:
    rank, tp = placement.tp_rank, placement.tp
    up = out_part(mlp.up, rank, tp)
    if mlp.gate is not None:
        name = mlp.fused or f"{_parent(mlp.up.name)}.gate_up_proj"
        up = joined(name, [out_part(mlp.gate, rank, tp), up])
    yield from plain(up)
    yield from plain(in_part(mlp.down, rank, tp))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
