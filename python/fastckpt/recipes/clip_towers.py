"""CLIP's image tower and its kin: SigLIP's, Pixtral's, InternVL's, Llama 4's, behind a projector."""

from __future__ import annotations

from dataclasses import replace

from ..checkpoint import JSON
from ..errors import RecipeError
from ..model import Mlp
from .claims import Claims, Dim, flag
from .towers import Built, Config, Shapes, StoredLayer, blocks, carried, mlp, norms, of, vision

_APART = tuple(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out"))
CLIP = StoredLayer(("layer_norm1", "layer_norm2"), _APART, ("mlp.fc1", "mlp.fc2"))
LLAMA4 = StoredLayer(
    ("input_layernorm", "post_attention_layernorm"),
    tuple(f"self_attn.{n}_proj" for n in "qkvo"),
    ("mlp.fc1", "mlp.fc2"),
)
PIXTRAL = StoredLayer(
    ("attention_norm", "ffn_norm"),
    tuple(f"attention.{n}_proj" for n in "qkvo"),
    tuple(f"feed_forward.{n}_proj" for n in ("gate", "up", "down")),
    norm_bias=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
)


def _side(said: Config, key: str) -> Dim:
    """A size that some configs give as [height, width]. Raises RecipeError where those differ."""
    value = said.get(f"vision_config.{key}")
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return of({**said, f"vision_config.{key}": value[0]}, key)
    return of(said, key)


def _last(said: Config, features: JSON) -> int:
    """The last of the layers, counted from 1, whose output a config's vision_feature_layer names; negative
    ones count from the end, -1 the last. Raises RecipeError."""
    count = of(said, "num_hidden_layers").size
    chosen = features if isinstance(features, list) else [features]
    whole = [n for n in chosen if isinstance(n, int) and not isinstance(n, bool)]
    last = [n if n >= 0 else count + n + 1 for n in whole]
    if len(last) != len(chosen) or not last or not 0 < max(last) <= count:
        raise RecipeError(f"config: vision_feature_layer {features!r} of {count} layers")
    return max(last)


def _grid(said: Config) -> int:
    """How many patches an image has."""
    return (_side(said, "image_size").size // _side(said, "patch_size").size) ** 2


def _kernel(said: Config, inner: Dim) -> tuple[Dim, ...]:
    patch = _side(said, "patch_size")
    return inner, of(said, "num_channels", 3), patch, patch


def _built(
    claims: Claims,
    at: str,
    said: Config,
    layers: str,
    block: StoredLayer,
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


_CLIP_SIZES = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    image_size=224, patch_size=32,
)  # fmt: skip


def clip(claims: Claims, at: str, config: Config, mergers: tuple[Mlp, ...], features: JSON) -> Built:
    """CLIP's tower, of modules below `at`, or below the `vision_model` that older files have there."""
    said = vision(config, _CLIP_SIZES)
    at, inner = _inside(claims, at), of(said, "hidden_size")
    outer: Shapes = {
        "embeddings.class_embedding": (inner,),
        "embeddings.patch_embedding.weight": _kernel(said, inner),
        "embeddings.position_embedding.weight": (Dim(_grid(said) + 1, "patches + 1"), inner),
    }
    outer |= norms(("pre_layrnorm",), inner)
    last = norms(("post_layernorm",), inner)
    return _built(claims, at, said, "encoder.layers", CLIP, outer, mergers, features, last)


_SIGLIP_SIZES = _CLIP_SIZES | dict(patch_size=16)


def siglip(claims: Claims, at: str, config: Config, mergers: tuple[Mlp, ...], features: JSON) -> Built:
    """SigLIP's tower, of modules below `at`, or below the `vision_model` that older files have there."""
    said = vision(config, _SIGLIP_SIZES)
    outer = _embedded(said, of(said, "hidden_size"))
    return _siglip(claims, at, said, outer, mergers, features)


_SIGLIP2_SIZES = _SIGLIP_SIZES | dict(num_patches=256)


def siglip2(claims: Claims, at: str, config: Config, mergers: tuple[Mlp, ...], features: JSON) -> Built:
    """SigLIP 2's tower for images of any shape, of modules as `siglip` has them: a matrix reads patches."""
    said = vision(config, _SIGLIP2_SIZES)
    inner, patch = of(said, "hidden_size"), of(said, "patch_size")
    seen = Dim(of(said, "num_channels", 3).size * patch.size**2, f"num_channels * {patch.key} ** 2")
    outer: Shapes = {
        "embeddings.patch_embedding.weight": (inner, seen),
        "embeddings.patch_embedding.bias": (inner,),
        "embeddings.position_embedding.weight": (of(said, "num_patches"), inner),
    }
    return _siglip(claims, at, said, outer, mergers, features)


def _siglip(
    claims: Claims, at: str, said: Config, outer: Shapes, mergers: tuple[Mlp, ...], features: JSON
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


_IDEFICS3_SIZES = _CLIP_SIZES | dict(hidden_size=1152, num_attention_heads=16)


def idefics3(claims: Claims, at: str, config: Config) -> Built:
    """Idefics 3's and SmolVLM's tower, of modules below `at`: SigLIP's without a pooling head."""
    said = vision(config, _IDEFICS3_SIZES)
    inner = of(said, "hidden_size")
    outer = _embedded(said, inner) | norms(("post_layernorm",), inner)
    return _built(claims, at, said, "encoder.layers", CLIP, outer, ())


def _embedded(said: Config, inner: Dim) -> Shapes:
    """SigLIP's patches and positions."""
    return {
        "embeddings.patch_embedding.weight": _kernel(said, inner),
        "embeddings.patch_embedding.bias": (inner,),
        "embeddings.position_embedding.weight": (Dim(_grid(said), "patches"), inner),
    }


def _inside(claims: Claims, at: str) -> str:
    older = f"{at}.vision_model"
    return older if f"{older}.post_layernorm.weight" in claims else at


_PIXTRAL_SIZES = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=1024, patch_size=16,
)  # fmt: skip


def pixtral(claims: Claims, at: str, config: Config, mergers: tuple[Mlp, ...], features: JSON) -> Built:
    """Pixtral's tower, of modules below `at`."""
    said = vision(config, _PIXTRAL_SIZES)
    inner = of(said, "hidden_size")
    outer: Shapes = {"patch_conv.weight": _kernel(said, inner)} | norms(("ln_pre",), inner, bias=False)
    return _built(claims, at, said, "transformer.layers", PIXTRAL, outer, mergers, features)


_LLAMA4_SIZES = dict(
    hidden_size=768, intermediate_size=5632, num_hidden_layers=34, num_attention_heads=16,
    image_size=448, patch_size=14, projector_input_dim=4096, projector_output_dim=4096,
)  # fmt: skip


def llama4(claims: Claims, at: str, config: Config) -> Built:
    """Llama 4's tower, of modules below `at`, and its adapter."""
    said = vision(config, _LLAMA4_SIZES)
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


_INTERNVL_SIZES = _PIXTRAL_SIZES | dict(image_size=448, patch_size=14)


def internvl(claims: Claims, at: str, config: Config, mergers: tuple[Mlp, ...], features: JSON) -> Built:
    """InternVL's tower, of modules below `at`. Raises RecipeError for one with RMS norms, or with norms of q
    and k (InternVL's largest)."""
    said = vision(config, _INTERNVL_SIZES)
    for key, usual in (("use_qk_norm", False), ("use_mask_token", False), ("use_mean_pooling", True)):
        if flag(said, f"vision_config.{key}", usual) is not usual:
            raise RecipeError(f"config: vision_config.{key} {not usual} is not read")
    if said.get("vision_config.norm_type", "layer_norm") != "layer_norm":
        raise RecipeError(f"config: vision_config.norm_type {said['vision_config.norm_type']!r} is not read")
    inner, one = of(said, "hidden_size"), Dim(1, "1")
    block = StoredLayer(
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
