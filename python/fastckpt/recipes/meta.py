"""Models under Meta's names, respelled as the hub has them: torchtitan's saves, Meta's releases, Mistral's.

Law: how the rows of q and k lie is the family's to say (`Meta.pairs`); no checkpoint says it.
Source: torchtitan 0.1 to 0.3, models/*/state_dict_adapter.py; transformers, convert_llama_weights_to_hf.py
and convert_mistral_weights_to_hf.py; mistral-inference, transformer_layers.py and moe.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from ..checkpoint import JSON, Checkpoint, Entry, Single
from ..errors import RecipeError
from ..views import View
from .claims import flag

EMBEDDING = "tok_embeddings.weight"
"""A name that every checkpoint under Meta's names has."""

IGNORED = ("rope.freqs", "freqs_cis")
"""Buffers that some of them carry: angles of rotary positions, which every server computes itself."""

_TORCHTUNES = "norm.scale"
"""torchtune's name for Meta's norm.weight; what it calls q and k is another thing in each of its families."""

_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # torchtitan has the hub's name since 0.3
}

_QKV = {f"w{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkv"}
_TURNED = (_QKV["wq.weight"], _QKV["wk.weight"])
GATED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    **{f"attention.{name}": hub for name, hub in _QKV.items()},
    **{f"attention.qkv_linear.{name}": hub for name, hub in _QKV.items()},  # torchtitan's since 0.3
    **{f"feed_forward.{name}.weight": f"mlp.{hub}.weight" for name, hub in GATED.items()},
}

HEAD_NORMS = {f"attention.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
"""The norms of each head's q and k."""

ROUTED = {"moe.router.gate.weight": "mlp.gate.weight"}
STACKS = {
    stored: f"mlp.experts.{{e}}.{hub}.weight"
    for name, hub in GATED.items()
    for stored in (
        f"moe.experts.{name}",
        f"moe.routed_experts.inner_experts.{name}_{'EDF' if name == 'w2' else 'EFD'}",
    )
}
"""torchtitan's router and experts, until 0.2 and since 0.3."""

CORRECTIONS = ("moe.expert_bias", "moe.expert_bias_E")
"""What is added to the scores of experts when they are selected, likewise."""

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_COUNTER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Meta:
    """How a family lies under Meta's names. `pairs`: rotary positions turn rows 2i and 2i + 1 of each head of
    q and k, where those of the hub's model turn rows i and i + size / 2. `names`: what a layer has that not
    every family does, and the hub's name for it, both with {e} for the number of an expert. `stacks`: tensors
    [experts, out, in] of a layer, and the hub's name for an expert's."""

    pairs: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)


def is_metas(ckpt: Checkpoint) -> bool:
    """Whether a checkpoint's names are Meta's."""
    return EMBEDDING in ckpt


def respelled(ckpt: Checkpoint, meta: Meta, config: Mapping[str, JSON], head_dim: int) -> Checkpoint:
    """The checkpoint under the hub's names, with q and k as the hub has them and experts one by one; a name
    that is not known stays. Raises RecipeError where the config contradicts params.json or what Meta's names
    mean, and for two tensors that would have one name."""
    if _TORCHTUNES in ckpt:
        raise RecipeError(
            f"{ckpt.path}: torchtune's own names ({_TORCHTUNES}) are not read; its FullModelHFCheckpointer "
            "writes the hub's"
        )
    _check(ckpt, config)
    entries: dict[str, Entry] = {}
    names: dict[str, str] = {}
    for stored in (*ckpt.entries, *ckpt.aliases):
        for name, entry in _spelled(stored, ckpt.entries[ckpt.aliases.get(stored, stored)], meta, head_dim):
            if name in names:
                raise RecipeError(f"{ckpt.path}: {names[name]} and {stored} would both be {name}")
            names[name], entries[name] = stored, entry
    told = f"{ckpt.path} (its names as the hub has them)"  # in errors alone
    return replace(ckpt, path=told, entries=entries, aliases={})  # tied names are two of the same bytes


def _spelled(stored: str, entry: Entry, meta: Meta, head_dim: int) -> Iterator[tuple[str, Entry]]:
    """What the hub has in place of a tensor."""
    if (found := _LAYER.fullmatch(stored)) is None:
        yield _OUTSIDE.get(stored, stored), entry
        return
    at, within = f"model.layers.{found[1]}", found[2]
    if within in meta.stacks and len(entry.shape) == 3:
        for e in range(entry.shape[0]):
            matrix = _remade(entry, partial(_expert, entry, e), entry.shape[1:])
            yield f"{at}.{meta.stacks[within].format(e=e)}", matrix
        return
    if (number := _COUNTER.search(within)) is not None:
        within = _COUNTER.sub("{e}", within, 1)
    hub = meta.names.get(within, _IN_LAYER.get(within))
    if hub is not None and number is not None:
        hub = hub.format(e=number[0])
    if meta.pairs and hub in _TURNED:
        entry = _remade(entry, partial(_halves, entry, head_dim), entry.shape)
    yield stored if hub is None else f"{at}.{hub}", entry


def _remade(entry: Entry, make: Callable[[], View], shape: tuple[int, ...]) -> Entry:
    return Single(shape, entry.dtype, make, entry.kind)


def _expert(stack: Entry, e: int) -> View:
    return stack.build().narrow(0, e, 1).reshape(stack.shape[1:])


def _halves(stored: Entry, head_dim: int) -> View:
    """Of each head the even rows, then the odd ones."""
    pairs = stored.build().split(0, head_dim).split(1, 2)
    return pairs.permute((0, 2, 1, 3)).reshape(stored.shape)


# ---- what params.json says ----

_SAID = {
    "dim": ("hidden_size",),
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim",),
    "hidden_dim": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "rope_theta": ("rope_theta",),
}
"""Its keys, and the config's; the first of those that has a value counts."""


def _check(ckpt: Checkpoint, config: Mapping[str, JSON]) -> None:
    """Raises RecipeError where the config says something else."""
    if not flag(config, "rope_interleave", True):
        raise RecipeError(
            f"{ckpt.path}: config's rope_interleave is false, and under Meta's names rotary positions turn "
            "neighbouring rows"
        )
    params = ckpt.saved.args
    if params is None:
        return
    rope = config.get("rope_parameters")
    told = {**config, **(rope if isinstance(rope, dict) else {})}
    for key, ours in _SAID.items():
        name = next((k for k in ours if told.get(k) is not None), None)
        if params.get(key) in (None, -1) or name is None:  # -1: as many words as the tokenizer has
            continue
        if params[key] != told[name]:
            raise RecipeError(
                f"{ckpt.path}: params.json says {key} {params[key]}, the config has {name} {told[name]}"
            )
