"""Qwen's image towers, and those like them: EXAONE's, GLM's, Kimi's. A merger joins neighbouring patches."""

from __future__ import annotations

import math

from ..errors import RecipeError
from .claims import Claims, Dim, dim, flag, integer
from .towers import Built, Config, Shapes, StoredLayer, blocks, carried, mlp, norms, of, vision

QWEN2 = StoredLayer(("norm1", "norm2"), ("attn.qkv", "attn.proj"), ("mlp.fc1", "mlp.fc2"))
QWEN2_5 = StoredLayer(
    ("norm1", "norm2"),
    ("attn.qkv", "attn.proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    norm_bias=False,
)
QWEN3 = StoredLayer(("norm1", "norm2"), ("attn.qkv", "attn.proj"), ("mlp.linear_fc1", "mlp.linear_fc2"))


def _patches(said: Config, hidden: Dim) -> tuple[Dim, ...]:
    """The shape of the convolution that reads patches of some neighbouring images. transformers does not read
    the `in_chans` of the hub's older configs."""
    patch = of(said, "patch_size")
    return hidden, of(said, "in_channels", 3), of(said, "temporal_patch_size", 2), patch, patch


def qwen2(claims: Claims, at: str, config: Config, hidden: Dim) -> Built:
    """Qwen2-VL's tower, of modules below `at`; its hidden_size is the decoder's."""
    said = vision(config)
    inner = of(said, "embed_dim")
    width = Dim(inner.size * integer(said, "vision_config.mlp_ratio", 4), f"{inner.key} * mlp_ratio")
    return _qwen2(claims, at, said, QWEN2, inner, width, hidden)


def qwen2_5(claims: Claims, at: str, config: Config, hidden: Dim) -> Built:
    """Qwen2.5-VL's tower, of modules below `at`."""
    said = vision(config)
    return _qwen2(claims, at, said, QWEN2_5, of(said, "hidden_size"), of(said, "intermediate_size"), hidden)


_EXAONE4_5_SIZES = dict(
    depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, patch_size=14,
    num_key_value_heads=8,
)  # fmt: skip


def exaone4_5(claims: Claims, at: str, config: Config, hidden: Dim) -> Built:
    """EXAONE 4.5's tower, of modules below `at`: Qwen2.5-VL's with fewer heads of keys and values."""
    said = vision(config, _EXAONE4_5_SIZES)
    inner, kv = of(said, "hidden_size"), of(said, "num_key_value_heads").size
    return _qwen2(claims, at, said, QWEN2_5, inner, of(said, "intermediate_size"), hidden, kv)


def _qwen2(
    claims: Claims,
    at: str,
    said: Config,
    block: StoredLayer,
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


def qwen3(claims: Claims, at: str, config: Config, hidden: Dim) -> Built:
    """Qwen3-VL's tower, of modules below `at`, with a merger for each layer that the decoder's first read."""
    read = vision(config).get("vision_config.deepstack_visual_indexes")
    if not isinstance(read, list):
        raise RecipeError(f"config: vision_config.deepstack_visual_indexes must be a list, got {read!r}")
    return _qwen3(claims, at, config, hidden, len(read))


def qwen3_5(claims: Claims, at: str, config: Config, hidden: Dim) -> Built:
    """Qwen3.5's tower, of modules below `at`: Qwen3-VL's, of which the decoder reads the last layer alone."""
    return _qwen3(claims, at, config, hidden, 0)


def _qwen3(claims: Claims, at: str, config: Config, hidden: Dim, read: int) -> Built:
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


def glm4v(claims: Claims, at: str, config: Config, hidden: Dim) -> Built:
    """GLM-4.1V's tower, of modules below `at`. Its intermediate_size is the merger's width; layers have that
    of the decoder's hidden vectors."""
    said = vision(config)
    inner, out, width = (of(said, key) for key in ("hidden_size", "out_hidden_size", "intermediate_size"))
    gated = ("gate_proj", "up_proj", "down_proj")
    block = StoredLayer(
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


KIMI = StoredLayer(("norm0", "norm1"), ("wqkv", "wo"), ("mlp.fc0", "mlp.fc1"))


_KIMI_SIZES = dict(
    patch_size=14, pos_emb_height=64, pos_emb_width=64, num_attention_heads=16,
    num_hidden_layers=27, hidden_size=1152, intermediate_size=4304,
)  # fmt: skip


def kimi_k25(claims: Claims, config: Config, hidden: Dim) -> Built:
    """Kimi K2.5's tower and projector, as its hub has them: transformers turns the rows of q and k."""
    said = vision(config, _KIMI_SIZES)
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
