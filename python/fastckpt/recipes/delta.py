"""Linear attention by the gated delta rule, in the layers that config says.

What q, k, v, z, b and a are is in `model.DeltaNet`. Source: the modeling files of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import JSON
from ..errors import RecipeError
from ..model import Attends, DeltaHeads, DeltaNet, Linear, Parameter
from .claims import Claims, Dim, dim, each_layer, integer
from .fused import parts

Claim = Callable[[str], Callable[[], Attends]]
"""Claims the attention of a layer by the layer's name, and returns what builds it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How the hub stores a DeltaNet. `matrices`: module -> the initials of what it holds, `grouped`: key head
    by key head, else one matrix after another."""

    matrices: Mapping[str, str]
    grouped: bool = False


def heads_of(config: Mapping[str, JSON]) -> DeltaHeads:
    """The heads of linear attention that a config says. Raises RecipeError where the value heads do not share
    the key heads evenly."""
    heads = DeltaHeads(
        keys=integer(config, "linear_num_key_heads"),
        values=integer(config, "linear_num_value_heads"),
        key_dim=integer(config, "linear_key_head_dim"),
        value_dim=integer(config, "linear_value_head_dim"),
    )
    if heads.values % heads.keys:
        raise RecipeError(
            f"config: linear_num_value_heads {heads.values} is no multiple of linear_num_key_heads "
            f"{heads.keys}"
        )
    return heads


def hybrid(stored: Stored, claims: Claims, config: Mapping[str, JSON], attends: Claim) -> Claim:
    """Linear attention in the layers that config says, `attends` in all others."""
    linear = _delta_net(stored, claims, config)
    which = _linear_layers(config, claims.layers(config))
    return lambda layer: (linear if layer in which else attends)(layer)


def _linear_layers(config: Mapping[str, JSON], count: int) -> frozenset[str]:
    """The names of those of `count` layers that have linear attention: as `layer_types` says, or without it
    all but every `full_attention_interval`-th."""
    types: Sequence[str]
    if config.get("layer_types") is None:
        every = integer(config, "full_attention_interval", 4)
        types = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    else:
        types = each_layer(config, "layer_types", count, ("linear_attention", "full_attention"))
    return frozenset(f"model.layers.{i}" for i, kind in enumerate(types) if kind == "linear_attention")


def _delta_net(
    stored: Stored, claims: Claims, config: Mapping[str, JSON]
) -> Callable[[str], Callable[[], DeltaNet]]:
    heads, hidden = heads_of(config), dim(config, "hidden_size")
    keys = Dim(heads.keys * heads.key_dim, "linear_num_key_heads * linear_key_head_dim")
    values = Dim(heads.values * heads.value_dim, "linear_num_value_heads * linear_value_head_dim")
    each = Dim(heads.values, "linear_num_value_heads")
    rows = {"q": keys, "k": keys, "v": values, "z": values, "b": each, "a": each}
    groups = heads.keys if stored.grouped else 1
    kernel, one_head = dim(config, "linear_conv_kernel_dim"), Dim(heads.value_dim, "linear_value_head_dim")

    def together(held: str) -> Dim:
        return Dim(sum(rows[part].size for part in held), " + ".join(rows[part].key for part in held))

    def claim(layer: str) -> Callable[[], DeltaNet]:
        at = f"{layer}.linear_attn"
        wholes = {
            held: claims.linear(f"{at}.{module}", together(held), hidden)
            for module, held in stored.matrices.items()
        }
        conv = claims.parameter(f"{at}.conv1d.weight", together("qkv"), Dim(1, "1"), kernel)
        a_log = claims.parameter(f"{at}.A_log", each, kept=True)
        dt_bias = claims.parameter(f"{at}.dt_bias", each)
        norm = claims.norm(f"{at}.norm", one_head)
        o = claims.linear(f"{at}.out_proj", hidden, values)

        def build() -> DeltaNet:
            found: dict[str, Linear] = {}
            for held, whole in wholes.items():
                each_rows = [rows[part].size for part in held]
                apart = parts(whole(), groups, each_rows) if len(held) > 1 else [whole()]
                found |= zip(held, apart, strict=True)
            kernels, k_at = conv(), keys.size
            q, k, v = (
                Parameter(kernels.name, kernels.view.narrow(0, start, size))
                for start, size in ((0, k_at), (k_at, k_at), (2 * k_at, values.size))
            )
            return DeltaNet(
                found["q"], found["k"], found["v"], found["z"], found["b"], found["a"],
                (q, k, v), a_log(), dt_bias(), norm(), o(), groups,
            )  # fmt: skip

        return build

    return claim
