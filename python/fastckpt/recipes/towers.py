"""Image towers: what makes hidden vectors of images beside the decoder of a vision-language model.

A tower's layers are a decoder's, under other names (`Block`); patches, positions, outer norms and most
projectors are carried, since no server cuts them. Names and shapes as transformers' modeling files have them,
sizes that a config leaves out as its config classes have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..checkpoint import JSON
from ..errors import RecipeError
from ..mixers import Attention
from ..model import Layer, Layers, Mlp, Sizes, Tower
from ..roles import Linear, Parameter
from .claims import Claims, Dim, Heads, absent, dim, flag, integer
from .fused import fused_attention

Said = Mapping[str, JSON]
Shapes = dict[str, tuple[Dim, ...]]
Built = tuple[Tower, tuple[Parameter, ...]]
"""A tower, and the tensors beside its layers and mergers."""


@dataclass(frozen=True, slots=True)
class Block:
    """The names of a layer's modules: norms; q, k, v (or all three as one) and o; gate (if any), up and down;
    and which of them have biases."""

    norms: tuple[str, str]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    norm_bias: bool = True
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True


def vision(config: Said, **defaults: int) -> Said:
    """config's `vision_config`, with `defaults` for the sizes it leaves out; keys are spelled as in the whole
    config. Raises RecipeError where there is none."""
    said = config.get("vision_config")
    if not isinstance(said, dict):
        raise RecipeError(f"config: vision_config must be an object, got {said!r}")
    return {f"vision_config.{k}": v for k, v in {**defaults, **said}.items()}


def of(said: Said, key: str, default: int | None = None) -> Dim:
    """The size under a key of `vision`. Raises RecipeError."""
    return dim(said, f"vision_config.{key}", default=default)


def carried(claims: Claims, at: str, shapes: Shapes) -> tuple[Parameter, ...]:
    """Claims the tensors of these names below the module `at`."""
    return tuple(claims.parameter(f"{at}.{name}", *dims)() for name, dims in shapes.items())


def norms(names: tuple[str, ...], size: Dim, *, bias: bool = True) -> Shapes:
    """Norms over an axis of that size."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{leaf}": (size,) for name in names for leaf in leaves}


def blocks(
    claims: Claims,
    at: str,
    count: Dim,
    block: Block,
    hidden: Dim,
    heads: Dim,
    width: Dim,
    mergers: tuple[Mlp, ...],
    kv: int | None = None,
) -> Tower:
    """Claims the layers `at`.{i} of a tower. `heads`: how many share the hidden size; `kv`: how many of keys
    and values there are, where that is not as many."""
    each = Heads.of(hidden, heads, kv)
    sizes = Sizes(hidden.size, 0, each.q, each.kv, each.dim, {width.key: width.size})
    layers = [_layer(claims, f"{at}.{i}", block, hidden, each, width) for i in range(count.size)]
    return Tower(Layers(layers), sizes, count.size, mergers)


def _layer(
    claims: Claims, name: str, block: Block, hidden: Dim, heads: Heads, width: Dim
) -> Callable[[], Layer]:
    before, between = (claims.norm(f"{name}.{n}", hidden, bias=block.norm_bias) for n in block.norms)
    *qkv, last = (f"{name}.{n}" for n in block.attention)
    o = claims.linear(last, hidden, hidden, bias=block.o_bias)
    if len(qkv) == 1:
        rows = Dim((heads.q + 2 * heads.kv) * heads.dim, "(heads + 2 * kv heads) * head size")
        whole = claims.linear(qkv[0], rows, hidden, bias=block.qkv_bias)
        attends = fused_attention(whole, o, heads)
    else:
        q, k, v = (claims.linear(n, hidden, hidden, bias=block.qkv_bias) for n in qkv)

        def attends() -> Attention:
            return Attention(q(), k(), v(), o())

    feeds = mlp(claims, name, block.mlp, width, hidden, bias=block.mlp_bias)
    return lambda: Layer(name, before(), attends(), between(), feeds())


def mlp(
    claims: Claims,
    at: str,
    names: tuple[str, ...],
    width: Dim,
    hidden: Dim,
    out: Dim | None = None,
    *,
    bias: bool = True,
) -> Callable[[], Mlp]:
    """Claims a block of the modules `names` below `at`: gate (if there are three), up, and down to `out`,
    `hidden` unless told."""
    *into, last = (f"{at}.{n}" for n in names)
    first = [claims.linear(n, width, hidden, bias=bias) for n in into]
    down = claims.linear(last, out or hidden, width, bias=bias)
    gate: Callable[[], Linear | None] = first[0] if len(first) == 2 else absent
    return lambda: Mlp(gate(), first[-1](), down())


# ---- Qwen's, and GLM's ----

QWEN2 = Block(("norm1", "norm2"), ("attn.qkv", "attn.proj"), ("mlp.fc1", "mlp.fc2"))
QWEN2_5 = Block(
    ("norm1", "norm2"),
    ("attn.qkv", "attn.proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    norm_bias=False,
)
QWEN3 = Block(("norm1", "norm2"), ("attn.qkv", "attn.proj"), ("mlp.linear_fc1", "mlp.linear_fc2"))


def _patches(said: Said, hidden: Dim) -> tuple[Dim, ...]:
    """The shape of the convolution that reads patches of some neighbouring images. transformers does not read
    the `in_chans` of the hub's older configs."""
    patch = of(said, "patch_size")
    return hidden, of(said, "in_channels", 3), of(said, "temporal_patch_size", 2), patch, patch


def qwen2(claims: Claims, at: str, config: Said, hidden: Dim) -> Built:
    """Qwen2-VL's tower, of modules below `at`; its hidden_size is the decoder's."""
    said = vision(config)
    inner = of(said, "embed_dim")
    width = Dim(inner.size * integer(said, "vision_config.mlp_ratio", 4), f"{inner.key} * mlp_ratio")
    return _qwen2(claims, at, said, QWEN2, inner, width, hidden)


def qwen2_5(claims: Claims, at: str, config: Said, hidden: Dim) -> Built:
    """Qwen2.5-VL's tower, of modules below `at`."""
    said = vision(config)
    return _qwen2(claims, at, said, QWEN2_5, of(said, "hidden_size"), of(said, "intermediate_size"), hidden)


def exaone4_5(claims: Claims, at: str, config: Said, hidden: Dim) -> Built:
    """EXAONE 4.5's tower, of modules below `at`: Qwen2.5-VL's with fewer heads of keys and values."""
    said = vision(
        config, depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, patch_size=14,
        num_key_value_heads=8,
    )  # fmt: skip
    inner, kv = of(said, "hidden_size"), of(said, "num_key_value_heads").size
    return _qwen2(claims, at, said, QWEN2_5, inner, of(said, "intermediate_size"), hidden, kv)


def _qwen2(
    claims: Claims,
    at: str,
    said: Said,
    block: Block,
    inner: Dim,
    width: Dim,
    hidden: Dim,
    kv: int | None = None,
) -> Built:
    merged = inner.times(integer(said, "vision_config.spatial_merge_size", 2) ** 2)
    merger = mlp(claims, f"{at}.merger", ("mlp.0", "mlp.2"), merged, merged, hidden)
    tower = blocks(
        claims, f"{at}.blocks", of(said, "depth"), block, inner, of(said, "num_heads"), width, (merger(),), kv
    )
    outer: Shapes = {"patch_embed.proj.weight": _patches(said, inner)}
    return tower, carried(claims, at, outer | norms(("merger.ln_q",), inner, bias=block.norm_bias))


def qwen3(claims: Claims, at: str, config: Said, hidden: Dim) -> Built:
    """Qwen3-VL's tower, of modules below `at`, with a merger for each layer that the decoder's first read."""
    read = vision(config).get("vision_config.deepstack_visual_indexes")
    if not isinstance(read, list):
        raise RecipeError(f"config: vision_config.deepstack_visual_indexes must be a list, got {read!r}")
    return _qwen3(claims, at, config, hidden, len(read))


def qwen3_5(claims: Claims, at: str, config: Said, hidden: Dim) -> Built:
    """Qwen3.5's tower, of modules below `at`: Qwen3-VL's, of which the decoder reads the last layer alone."""
    return _qwen3(claims, at, config, hidden, 0)


def _qwen3(claims: Claims, at: str, config: Said, hidden: Dim, read: int) -> Built:
    """`read`: how many layers the decoder reads beside the last one."""
    said = vision(config)
    inner = of(said, "hidden_size")
    merged = inner.times(integer(said, "vision_config.spatial_merge_size", 2) ** 2)
    lists = [f"{at}.deepstack_merger_list.{i}" for i in range(read)]
    mergers = [
        mlp(claims, n, ("linear_fc1", "linear_fc2"), merged, merged, hidden) for n in (f"{at}.merger", *lists)
    ]
    tower = blocks(
        claims,
        f"{at}.blocks",
        of(said, "depth"),
        QWEN3,
        inner,
        of(said, "num_heads"),
        of(said, "intermediate_size"),
        tuple(build() for build in mergers),
    )
    outer: Shapes = {
        "patch_embed.proj.weight": _patches(said, inner),
        "patch_embed.proj.bias": (inner,),
        "pos_embed.weight": (of(said, "num_position_embeddings"), inner),
    }
    outer |= norms(("merger.norm",), inner)
    outer |= norms(tuple(f"deepstack_merger_list.{i}.norm" for i in range(read)), merged)
    return tower, carried(claims, at, outer)


def glm4v(claims: Claims, at: str, config: Said, hidden: Dim) -> Built:
    """GLM-4.1V's tower, of modules below `at`. Its intermediate_size is the merger's width; layers have that
    of the decoder's hidden vectors."""
    said = vision(config)
    inner, out, width = (of(said, key) for key in ("hidden_size", "out_hidden_size", "intermediate_size"))
    gated = ("gate_proj", "up_proj", "down_proj")
    block = Block(
        ("norm1", "norm2"),
        ("attn.qkv", "attn.proj"),
        tuple(f"mlp.{n}" for n in gated),
        norm_bias=False,
        qkv_bias=flag(said, "vision_config.attention_bias", False),
        o_bias=False,
        mlp_bias=False,
    )
    merger = mlp(claims, f"{at}.merger", gated, width, out, bias=False)
    tower = blocks(
        claims, f"{at}.blocks", of(said, "depth"), block, inner, of(said, "num_heads"), out, (merger(),)
    )
    side = of(said, "image_size").size // of(said, "patch_size").size
    merge = of(said, "spatial_merge_size", 2)
    outer: Shapes = {
        "patch_embed.proj.weight": _patches(said, inner),
        "patch_embed.proj.bias": (inner,),
        "embeddings.position_embedding.weight": (Dim(side**2, "(image_size / patch_size) ** 2"), inner),
        "downsample.weight": (out, inner, merge, merge),
        "downsample.bias": (out,),
        "merger.proj.weight": (out, out),
    }
    outer |= norms(("merger.post_projection_norm",), out)
    return tower, carried(
        claims, at, outer | norms(("post_conv_layernorm", "post_layernorm"), inner, bias=False)
    )


KIMI = Block(("norm0", "norm1"), ("wqkv", "wo"), ("mlp.fc0", "mlp.fc1"))


def kimi_k25(claims: Claims, config: Said, hidden: Dim) -> Built:
    """Kimi K2.5's tower and projector, as its hub has them: transformers turns the rows of q and k."""
    said = vision(
        config, patch_size=14, pos_emb_height=64, pos_emb_width=64, num_attention_heads=16,
        num_hidden_layers=27, hidden_size=1152, intermediate_size=4304,
    )  # fmt: skip
    inner, patch = of(said, "hidden_size"), of(said, "patch_size")
    merge = said.get("vision_config.merge_kernel_size", [2, 2])
    if not isinstance(merge, list) or len(merge) != 2 or not all(type(n) is int and n > 0 for n in merge):
        raise RecipeError(f"config: vision_config.merge_kernel_size must be two numbers, got {merge!r}")
    merged = inner.times(math.prod(n for n in merge if isinstance(n, int)))
    tower = blocks(
        claims,
        "vision_tower.encoder.blocks",
        of(said, "num_hidden_layers"),
        KIMI,
        inner,
        of(said, "num_attention_heads"),
        of(said, "intermediate_size"),
        (),
    )
    grid = of(said, "pos_emb_height"), of(said, "pos_emb_width"), inner
    outer: Shapes = {
        "vision_tower.patch_embed.proj.weight": (inner, Dim(3, "3"), patch, patch),
        "vision_tower.patch_embed.proj.bias": (inner,),
        "vision_tower.patch_embed.pos_emb.weight": grid,
        "mm_projector.proj.0.weight": (merged, merged),
        "mm_projector.proj.0.bias": (merged,),
        "mm_projector.proj.2.weight": (hidden, merged),
        "mm_projector.proj.2.bias": (hidden,),
    }
    outer |= norms(("vision_tower.encoder.final_layernorm",), inner)
    outer |= norms(("mm_projector.pre_norm",), dim(config, "projection_hidden_size", default=1152))
    return tower, tuple(claims.parameter(name, *dims)() for name, dims in outer.items())


# ---- CLIP's kin, behind a projector ----

_APART = tuple(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out"))
CLIP = Block(("layer_norm1", "layer_norm2"), _APART, ("mlp.fc1", "mlp.fc2"))
LLAMA4 = Block(
    ("input_layernorm", "post_attention_layernorm"),
    tuple(f"self_attn.{n}_proj" for n in "qkvo"),
    ("mlp.fc1", "mlp.fc2"),
)
PIXTRAL = Block(
    ("attention_norm", "ffn_norm"),
    tuple(f"attention.{n}_proj" for n in "qkvo"),
    tuple(f"feed_forward.{n}_proj" for n in ("gate", "up", "down")),
    norm_bias=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
)


def _side(said: Said, key: str) -> Dim:
    """A size that some configs give as [height, width]. Raises RecipeError where those differ."""
    value = said.get(f"vision_config.{key}")
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return of({**said, f"vision_config.{key}": value[0]}, key)
    return of(said, key)


def _last(said: Said, features: JSON) -> int:
    """The last of the layers, counted from 1, whose output a config's vision_feature_layer names; negative
    ones count from the end, -1 the last. Raises RecipeError."""
    count = of(said, "num_hidden_layers").size
    chosen = features if isinstance(features, list) else [features]
    whole = [n for n in chosen if isinstance(n, int) and not isinstance(n, bool)]
    last = [n if n >= 0 else count + n + 1 for n in whole]
    if len(last) != len(chosen) or not last or not 0 < max(last) <= count:
        raise RecipeError(f"config: vision_feature_layer {features!r} of {count} layers")
    return max(last)


def _grid(said: Said) -> int:
    """How many patches an image has."""
    return (_side(said, "image_size").size // _side(said, "patch_size").size) ** 2


def _kernel(said: Said, inner: Dim) -> tuple[Dim, ...]:
    patch = _side(said, "patch_size")
    return inner, of(said, "num_channels", 3), patch, patch


def _built(
    claims: Claims,
    at: str,
    said: Said,
    layers: str,
    block: Block,
    outer: Shapes,
    mergers: tuple[Mlp, ...],
    features: JSON = None,
    last: Shapes | None = None,
) -> Built:
    """The tower `at`, of `layers`. `features`: which layers' output is read, None for that of `last`, the
    norms behind them."""
    inner, heads = of(said, "hidden_size"), of(said, "num_attention_heads")
    count, width = of(said, "num_hidden_layers"), of(said, "intermediate_size")
    tower = blocks(claims, f"{at}.{layers}", count, block, inner, heads, width, mergers)
    loose, behind = carried(claims, at, outer), carried(claims, at, last or {})
    if features is None:
        return tower, (*loose, *behind)
    return replace(tower, read=_last(said, features), beyond=behind), loose


def clip(claims: Claims, at: str, config: Said, mergers: tuple[Mlp, ...], features: JSON = None) -> Built:
    """CLIP's tower, of modules below `at`, or below the `vision_model` that older files have there."""
    said = vision(
        config, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=32,
    )  # fmt: skip
    at, inner = _inside(claims, at), of(said, "hidden_size")
    outer: Shapes = {
        "embeddings.class_embedding": (inner,),
        "embeddings.patch_embedding.weight": _kernel(said, inner),
        "embeddings.position_embedding.weight": (Dim(_grid(said) + 1, "patches + 1"), inner),
    }
    outer |= norms(("pre_layrnorm",), inner)
    last = norms(("post_layernorm",), inner)
    return _built(claims, at, said, "encoder.layers", CLIP, outer, mergers, features, last)


def siglip(claims: Claims, at: str, config: Said, mergers: tuple[Mlp, ...], features: JSON = None) -> Built:
    """SigLIP's tower, of modules below `at`, or below the `vision_model` that older files have there."""
    said = vision(
        config, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=16,
    )  # fmt: skip
    outer = _embedded(said, of(said, "hidden_size"))
    return _siglip(claims, at, said, outer, mergers, features)


def siglip2(claims: Claims, at: str, config: Said, mergers: tuple[Mlp, ...], features: JSON = None) -> Built:
    """SigLIP 2's tower for images of any shape, of modules as `siglip` has them: a matrix reads patches."""
    said = vision(
        config, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        patch_size=16, num_patches=256,
    )  # fmt: skip
    inner, patch = of(said, "hidden_size"), of(said, "patch_size")
    seen = Dim(of(said, "num_channels", 3).size * patch.size**2, f"num_channels * {patch.key} ** 2")
    outer: Shapes = {
        "embeddings.patch_embedding.weight": (inner, seen),
        "embeddings.patch_embedding.bias": (inner,),
        "embeddings.position_embedding.weight": (of(said, "num_patches"), inner),
    }
    return _siglip(claims, at, said, outer, mergers, features)


def _siglip(
    claims: Claims, at: str, said: Said, outer: Shapes, mergers: tuple[Mlp, ...], features: JSON
) -> Built:
    at, inner, width = _inside(claims, at), of(said, "hidden_size"), of(said, "intermediate_size")
    if flag(said, "vision_config.vision_use_head", True):
        one = Dim(1, "1")
        outer |= {
            "head.probe": (one, one, inner),
            "head.attention.in_proj_weight": (inner.times(3), inner),
            "head.attention.in_proj_bias": (inner.times(3),),
            "head.attention.out_proj.weight": (inner, inner),
            "head.attention.out_proj.bias": (inner,),
            "head.mlp.fc1.weight": (width, inner),
            "head.mlp.fc1.bias": (width,),
            "head.mlp.fc2.weight": (inner, width),
            "head.mlp.fc2.bias": (inner,),
        }
        outer |= norms(("head.layernorm",), inner)
    last = norms(("post_layernorm",), inner)
    return _built(claims, at, said, "encoder.layers", CLIP, outer, mergers, features, last)


def idefics3(claims: Claims, at: str, config: Said) -> Built:
    """Idefics 3's and SmolVLM's tower, of modules below `at`: SigLIP's without a pooling head."""
    said = vision(
        config, hidden_size=1152, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
        image_size=224, patch_size=32,
    )  # fmt: skip
    inner = of(said, "hidden_size")
    outer = _embedded(said, inner) | norms(("post_layernorm",), inner)
    return _built(claims, at, said, "encoder.layers", CLIP, outer, ())


def _embedded(said: Said, inner: Dim) -> Shapes:
    """SigLIP's patches and positions."""
    return {
        "embeddings.patch_embedding.weight": _kernel(said, inner),
        "embeddings.patch_embedding.bias": (inner,),
        "embeddings.position_embedding.weight": (Dim(_grid(said), "patches"), inner),
    }


def _inside(claims: Claims, at: str) -> str:
    older = f"{at}.vision_model"
    return older if f"{older}.post_layernorm.weight" in claims else at


def pixtral(claims: Claims, at: str, config: Said, mergers: tuple[Mlp, ...], features: JSON = None) -> Built:
    """Pixtral's tower, of modules below `at`."""
    said = vision(
        config, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=1024, patch_size=16,
    )  # fmt: skip
    inner = of(said, "hidden_size")
    outer: Shapes = {"patch_conv.weight": _kernel(said, inner)} | norms(("ln_pre",), inner, bias=False)
    return _built(claims, at, said, "transformer.layers", PIXTRAL, outer, mergers, features)


def llama4(claims: Claims, at: str, config: Said) -> Built:
    """Llama 4's tower, of modules below `at`, and its adapter."""
    said = vision(
        config, hidden_size=768, intermediate_size=5632, num_hidden_layers=34, num_attention_heads=16,
        image_size=448, patch_size=14, projector_input_dim=4096, projector_output_dim=4096,
    )  # fmt: skip
    inner, patch = of(said, "hidden_size"), _side(said, "patch_size")
    seen = Dim(of(said, "num_channels", 3).size * patch.size**2, f"num_channels * {patch.key} ** 2")
    width, out, shuffled = (
        of(said, k) for k in ("projector_input_dim", "projector_output_dim", "intermediate_size")
    )
    adapter = mlp(claims, f"{at}.vision_adapter.mlp", ("fc1", "fc2"), width, shuffled, out, bias=False)
    outer: Shapes = {
        "patch_embedding.linear.weight": (inner, seen),
        "class_embedding": (inner,),
        "positional_embedding_vlm": (Dim(_grid(said) + 1, "patches + 1"), inner),
    }
    outer |= norms(("layernorm_pre", "layernorm_post"), inner)
    return _built(claims, at, said, "model.layers", LLAMA4, outer, (adapter(),))


def internvl(claims: Claims, at: str, config: Said, mergers: tuple[Mlp, ...], features: JSON = None) -> Built:
    """InternVL's tower, of modules below `at`. Raises RecipeError for one with RMS norms, or with norms of q
    and k (InternVL's largest)."""
    said = vision(
        config, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=448, patch_size=14,
    )  # fmt: skip
    for key, usual in (("use_qk_norm", False), ("use_mask_token", False), ("use_mean_pooling", True)):
        if flag(said, f"vision_config.{key}", usual) is not usual:
            raise RecipeError(f"config: vision_config.{key} {not usual} is not read")
    if said.get("vision_config.norm_type", "layer_norm") != "layer_norm":
        raise RecipeError(f"config: vision_config.norm_type {said['vision_config.norm_type']!r} is not read")
    inner, one = of(said, "hidden_size"), Dim(1, "1")
    block = Block(
        ("layernorm_before", "layernorm_after"),
        tuple(f"attention.{n}" for n in ("q_proj", "k_proj", "v_proj", "projection_layer")),
        ("mlp.fc1", "mlp.fc2"),
        qkv_bias=flag(said, "vision_config.attention_bias", False),
    )
    outer: Shapes = {
        "embeddings.cls_token": (one, one, inner),
        "embeddings.patch_embeddings.projection.weight": _kernel(said, inner),
        "embeddings.patch_embeddings.projection.bias": (inner,),
    }
    if flag(said, "vision_config.use_absolute_position_embeddings", True):
        outer["embeddings.position_embeddings"] = (one, Dim(_grid(said) + 1, "patches + 1"), inner)
    for i in range(claims.layers(said, "vision_config.num_hidden_layers")):
        outer |= {f"encoder.layer.{i}.lambda_{n}": (inner,) for n in (1, 2)}
    return _built(claims, at, said, "encoder.layer", block, outer, mergers, features)
