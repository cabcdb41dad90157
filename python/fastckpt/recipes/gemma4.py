"""Gemma 4, text: layers of two kinds, whose heads differ in size and number; the last ones may read the keys
and values of earlier ones, and every layer an input of its own. A mixture stands beside a block that every
token passes. Source: transformers' configuration_gemma4.py and modeling_gemma4.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import Attention, Queries
from ..model import Experts, Mlp, Model, PerLayer, Stacked
from ..roles import Parameter
from .attention import Attending, others, unlike
from .claims import Claims, Dim, Heads, absent, dim, each_layer, flag, integer, layer_index, section
from .decoder import Whole, claimed, decoder
from .dense import Feeding, gated
from .gemma import AROUND
from .kind import IGNORED, TIED, Kind
from .known import Known
from .moe import Block, experts, with_shared

FULL, SLIDING = "full_attention", "sliding_attention"
KIND = Kind("gemma4_text", norms=AROUND, vocabulary=TIED)
BLOCK = Block(
    hub="", router="router.proj", stacked=Stacked("experts.gate_up_proj", "experts.down_proj"), trained=""
)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Gemma 4 checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = claimed(KIND, ckpt, config)
    count, hidden = claims.layers(config), dim(config, "hidden_size")
    told = _told(config, count)
    number = dim(config, "num_experts") if flag(config, "enable_moe_block", False) else None
    per_layer, inputs = _per_layer(claims, config, count, hidden)
    stale = (f"model.layers.{i}.self_attn.{n}.*" for i in range(told.first, count) for n in _STALE)
    model = decoder(
        replace(KIND, ignored=(*IGNORED, *stale)),
        claims,
        config,
        vocab_size,
        _attending(claims, config, told),
        _feeding(claims, config, told, number),
        whole=_whole(claims, hidden, number, inputs),
    )
    return replace(model, per_layer=per_layer())


@dataclass(frozen=True, slots=True)
class _Told:
    """What config says of the layers: the `heads` of each, whether it attends to all tokens (`full`), and the
    `first` of those that read the keys and values of an earlier one."""

    heads: Sequence[Heads]
    full: Sequence[bool]
    first: int

    @property
    def usual(self) -> Heads:
        """The heads of sliding layers, of which there are most."""
        return self.heads[self.full.index(False)] if False in self.full else self.heads[0]


def _told(config: Mapping[str, JSON], count: int) -> _Told:
    heads, full = _heads(config, count)
    first = count - integer(config, "num_kv_shared_layers", 0, least=0)
    if first < 1 or set(full[:first]) != set(full):
        raise RecipeError(f"config: num_kv_shared_layers {count - first}: no earlier layer of each kind")
    return _Told(heads, full, first)


def _attending(claims: Claims, config: Mapping[str, JSON], told: _Told) -> Attending:
    hidden, bias = dim(config, "hidden_size"), flag(config, "attention_bias", False)
    one_matrix = flag(config, "attention_k_eq_v", False)

    def claim(layer: str) -> Callable[[], Attention | Queries]:
        at, i = f"{layer}.self_attn", layer_index(layer)
        own, size = told.heads[i], Dim(told.heads[i].dim, "head_dim")
        rows = Dim(own.q * own.dim, "num_attention_heads * head_dim")
        kv_rows = Dim(own.kv * own.dim, "num_key_value_heads * head_dim")
        q, q_norm = claims.linear(f"{at}.q_proj", rows, hidden, bias=bias), claims.norm(f"{at}.q_norm", size)
        o = claims.linear(f"{at}.o_proj", hidden, rows, bias=bias)
        if i >= told.first:
            return lambda: Queries(q(), o(), q_norm())
        k = claims.linear(f"{at}.k_proj", kv_rows, hidden, bias=bias)
        k_norm = claims.norm(f"{at}.k_norm", size)
        same = one_matrix and told.full[i]
        v = k if same else claims.linear(f"{at}.v_proj", kv_rows, hidden, bias=bias)
        return lambda: Attention(
            q(), k(), v(), o(), q_norm(), k_norm(), values_are_keys=same, heads=unlike(own, told.usual)
        )

    return Attending(claim, told.usual, keys=None, others=others(told.heads, told.usual))


def _feeding(claims: Claims, config: Mapping[str, JSON], told: _Told, number: Dim | None) -> Feeding:
    """`number`: how many experts stand beside each block, None where none do."""
    hidden, width = dim(config, "hidden_size"), dim(config, "intermediate_size")
    doubled = flag(config, "use_double_wide_mlp", False)
    wide = Dim(2 * width.size, f"2 * {width.key}") if doubled else width
    widths = {d.key: d.size for d in (width, *([wide] if told.first < len(told.heads) else ()))}

    def dense(layer: str) -> Callable[[], Mlp]:
        return gated(claims, f"{layer}.mlp", wide if layer_index(layer) >= told.first else width, hidden)

    if number is None:
        return Feeding(dense, widths)
    sizes = number, dim(config, "moe_intermediate_size"), hidden

    def mixture(layer: str) -> Callable[[], Experts]:
        return with_shared(experts(claims, config, layer, BLOCK, sizes), dense(layer))

    widths[sizes[1].key] = sizes[1].size
    return Feeding(mixture, widths, number.size, sizes[1].key, width.key)


def _whole(claims: Claims, hidden: Dim, number: Dim | None, inputs: Dim | None) -> Whole:
    """What claims what else a layer has; `inputs`: how wide its own input is, None where it has none."""
    shapes: dict[str, tuple[Dim, ...]] = {"layer_scalar": (Dim(1, "1"),)}
    if number is not None:
        shapes |= {"router.scale": (hidden,), "router.per_expert_scale": (number,)}
        shapes |= {f"{n}.weight": (hidden,) for n in _MIXED}
    if inputs is not None:
        shapes["per_layer_input_gate.weight"] = inputs, hidden
        shapes["per_layer_projection.weight"] = hidden, inputs
        shapes["post_per_layer_input_norm.weight"] = (hidden,)

    def claim(layer: str) -> Callable[[], tuple[Parameter, ...]]:
        built = [claims.parameter(f"{layer}.{name}", *dims) for name, dims in shapes.items()]
        return lambda: tuple(build() for build in built)

    return claim


def unified(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of Gemma 4's unified form, which has neither experts nor inputs of layers. Raises
    RecipeError."""
    without: dict[str, JSON] = {"hidden_size_per_layer_input": 0, "enable_moe_block": False}
    model = recipe(ckpt, {**config, **without}, vocab_size=vocab_size)
    return replace(model, family="gemma4_unified_text")


_MIXED = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
"""Norms around a mixture and the block beside it."""

_STALE = ("k_proj", "v_proj", "k_norm", "v_norm")
"""What the hub's files have in layers that read the keys and values of earlier ones; transformers leaves them
out."""


def _heads(config: Mapping[str, JSON], count: int) -> tuple[list[Heads], list[bool]]:
    """The heads of every layer, and whether it attends to all tokens. Raises RecipeError."""
    full = [(i + 1) % 6 == 0 for i in range(count)]
    if config.get("layer_types") is not None:
        full = [kind == FULL for kind in each_layer(config, "layer_types", count, (FULL, SLIDING))]
    full[-1] = True  # as transformers has it, whatever a config says
    kv = integer(config, "num_key_value_heads", 4)
    usual = {"head_dim": integer(config, "head_dim", 256), "num_key_value_heads": kv}
    wide = usual | {"head_dim": integer(config, "global_head_dim", 512)}
    if flag(config, "attention_k_eq_v", False):
        wide["num_key_value_heads"] = integer(config, "num_global_key_value_heads", kv)
    q = integer(config, "num_attention_heads", 8)
    own = [wide if each else usual for each in full]
    if "per_layer_config" in config:
        said = section(config, "per_layer_config", optional=True)
        own = [usual | _overrides(said.get(str(i), {}), i) for i in range(count)]
    return [Heads(q, each["num_key_value_heads"], each["head_dim"]) for each in own], full


def _overrides(said: JSON, layer: int) -> dict[str, int]:
    """What per_layer_config says of a layer. Raises RecipeError for anything but its heads."""
    if not isinstance(said, dict) or not said.keys() <= {"head_dim", "num_key_value_heads"}:
        raise RecipeError(
            f"config: per_layer_config of layer {layer} must be of head_dim and num_key_value_heads, got "
            f"{said!r}"
        )
    return {key: integer(said, key) for key in said}


def _per_layer(
    claims: Claims, config: Mapping[str, JSON], count: int, hidden: Dim
) -> tuple[Callable[[], PerLayer | None], Dim | None]:
    """Claims what gives layers inputs of their own, and says how wide those are (None: there are none)."""
    if config.get("hidden_size_per_layer_input") == 0:
        return absent, None
    width = dim(config, "hidden_size_per_layer_input", default=256)
    rows = dim(config, "vocab_size_per_layer_input", default=262144)
    all_layers = Dim(count * width.size, f"num_hidden_layers * {width.key}")
    embedding = claims.table("model.embed_tokens_per_layer", rows, all_layers)
    projection = claims.linear("model.per_layer_model_projection", all_layers, hidden)
    norm = claims.norm("model.per_layer_projection_norm", width)
    return lambda: PerLayer(embedding(), projection(), norm()), width


FAMILIES = {"gemma4_text": Known(recipe, IGNORED), "gemma4_unified_text": Known(unified, IGNORED)}
