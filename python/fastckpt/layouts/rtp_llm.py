"""`rtp_llm`: rtp-llm's weights of one rank after its loader, the form its own dump has.

Matrices are [in, out]. q, k and v are one kernel's columns [hidden, (q_r | k_r | v_r)], gate and up one
[hidden, (gate_r | up_r)]; experts are [experts, (up_r; gate_r), hidden], up before gate, and [experts,
hidden, width / tp]. The embedding is cut along hidden, lm_head padded to 8 * tp rows, then cut by rows.
Source: rtp-llm's utils/model_weight.py (class W, the default tensor-parallel table).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import LayoutError
from ..model import Attention, Experts, Linear, Mla, Mlp, Model, Norm
from ..placement import Placement
from ..target import Target
from ..views import cat, stack
from .cuts import (
    in_part,
    joined,
    out_part,
    padded_part,
    qkv_part,
    require_decoder,
    require_even,
    require_kv_heads,
    require_tensor_parallel,
)
from .naming import Naming


@dataclass(frozen=True, slots=True)
class RtpLlm:
    """Models like Llama and Mixtral: gated feed-forward blocks, norms without bias, no position table."""

    roles: ClassVar[Literal[True]] = True

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied lm_head is written from the embedding, as the engine wants both.

        Raises LayoutError, before the first target, where heads, a feed-forward width or hidden do not
        divide by tp, where kv heads neither divide nor repeat evenly, and for pp, dp or ep; and for a role
        this layout has no name for."""
        require_tensor_parallel("rtp_llm", placement)
        require_decoder("rtp_llm", placement, model.sizes)
        require_kv_heads("rtp_llm", placement, model.sizes)
        require_even("rtp_llm", placement, "hidden_size", model.sizes.hidden)
        if model.encoder is not None:
            raise LayoutError(f"layout rtp_llm has no place for the encoder of {model.family}")
        if model.lm_head.bias is not None:
            raise LayoutError(f"layout rtp_llm has no place for the bias of {model.lm_head.name}")
        for extra in (model.positions, model.embedding_norm, *model.carried):
            if extra is not None:
                raise LayoutError(f"layout rtp_llm has no place for {extra.name} of {model.family}")
        return self._targets(model, placement)

    def naming(self, placement: Placement) -> Naming:
        """The names of the engine's dump, parts counted from 0."""
        stem = f"model-{placement.tp_rank:02d}-{placement.dp_rank:02d}-part-"
        return Naming("", f"{stem}00000.safetensors", stem + "{part:05d}.safetensors")

    def _targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        tp, rank = placement.tp, placement.tp_rank
        key = f"rank_{rank:02d}_{placement.dp_rank:02d}_00"
        yield Target(f"{key}.global.embedding", model.embedding.weight.part(1, rank, tp))
        for i, layer in enumerate(model.layers):
            at = f"{key}.layers.{i}"
            for extra in (layer.attention_after, layer.mlp_after, layer.cross_norm):
                if extra is not None:
                    raise LayoutError(f"layout rtp_llm has no place for {extra.name}")
            yield _gamma(f"{at}.pre_layernorm_weights.gamma", layer.attention_norm)
            yield from _attention(f"{at}.self_attention_weights", layer.attention, model, placement)
            yield _gamma(f"{at}.post_layernorm_weights.gamma", layer.mlp_norm)
            if isinstance(layer.mlp, Experts):
                yield from _experts(f"{at}.partial_moe_weights", layer.mlp, placement)
            else:
                yield from _mlp(f"{at}.ffn_weights", layer.mlp, placement)
        yield _gamma(f"{key}.global.final_layernorm.gamma", model.norm)
        # At one rank the engine's loader cuts nothing, and so pads nothing.
        padding = 8 * tp if tp > 1 else 1
        yield Target(f"{key}.global.lm_head", padded_part(model.lm_head.weight, padding, rank, tp))


def _attention(at: str, attention: Attention | Mla, model: Model, placement: Placement) -> Iterator[Target]:
    if isinstance(attention, Mla) or attention.sinks is not None:
        raise LayoutError(
            f"layout rtp_llm has no place for the attention of {attention.o.name} ({model.family})"
        )
    qkv = joined(attention.q.name, qkv_part(attention, model.sizes, placement))
    yield Target(f"{at}.query_weight.kernel", qkv.weight.T)
    if qkv.bias is not None:
        # The engine's head cut views a vector as one row; at one rank it is not called.
        row = (1, qkv.bias.numel) if placement.tp > 1 else None
        yield Target(f"{at}.query_weight.bias", qkv.bias, row)
    yield from _kernel(f"{at}.attention_output_weight", in_part(attention.o, placement.tp_rank, placement.tp))
    for name, role in (("q_layernorm", attention.q_norm), ("k_layernorm", attention.k_norm)):
        if role is not None:
            yield _gamma(f"{at}.{name}.gamma", role)


def _mlp(at: str, mlp: Mlp, placement: Placement) -> Iterator[Target]:
    rank, tp = placement.tp_rank, placement.tp
    pair = [out_part(linear, rank, tp) for linear in (_gate(mlp), mlp.up)]
    yield from _kernel(f"{at}.intermediate_weight13", joined(mlp.up.name, pair))
    yield from _kernel(f"{at}.intermediate_weight2", in_part(mlp.down, rank, tp))


def _experts(at: str, moe: Experts, placement: Placement) -> Iterator[Target]:
    rank, tp = placement.tp_rank, placement.tp
    if moe.shared is not None or moe.correction is not None or moe.stacks is not None:
        raise LayoutError(f"layout rtp_llm has no place for what {moe.name} has beside experts' matrices")
    for linear in (moe.router, *(x for mlp in moe.experts for x in (mlp.gate, mlp.up, mlp.down))):
        if linear is not None and (linear.bias is not None or linear.scale is not None):
            raise LayoutError(f"layout rtp_llm has no place for the bias or the factors of {linear.name}")
    pairs = [cat([x.weight.part(0, rank, tp) for x in (e.up, _gate(e))]) for e in moe.experts]
    downs = [e.down.weight.part(1, rank, tp) for e in moe.experts]
    yield Target(f"{at}.gate.kernel", moe.router.weight.T)
    yield Target(f"{at}.intermediate_weight.kernel", stack(pairs))
    yield Target(f"{at}.intermediate_weight2.kernel", stack(downs))


def _kernel(at: str, linear: Linear) -> Iterator[Target]:
    if linear.scale is not None:
        raise LayoutError(f"layout rtp_llm has no place for {linear.name}.weight_scale_inv")
    yield Target(f"{at}.kernel", linear.weight.T)
    if linear.bias is not None:
        yield Target(f"{at}.bias", linear.bias)


def _gamma(name: str, role: Norm | None) -> Target:
    if role is None:
        raise LayoutError(f"layout rtp_llm: the model has no norm to write as {name}")
    if role.bias is not None:
        raise LayoutError(f"layout rtp_llm has no place for {role.name}.bias")
    if role.plus_one:
        raise LayoutError(f"layout rtp_llm wants 1 + {role.name}.weight, which is not made yet")
    return Target(name, role.weight)


def _gate(mlp: Mlp) -> Linear:
    if mlp.gate is None:
        raise LayoutError(f"layout rtp_llm has no place for {mlp.up.name}, a block without a gate")
    return mlp.gate
