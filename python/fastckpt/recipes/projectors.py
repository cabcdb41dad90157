"""Projectors, which bring an image tower's output to the hidden size of a decoder, and the tower before each.

Every function of a family claims both, of a config; `hidden`: the decoder's hidden size.
"""

from __future__ import annotations

from ..checkpoint import JSON
from ..errors import RecipeError
from ..model import Mlp
from . import clip_towers
from .claims import Claims, Dim, dim, flag, integer
from .fused import fused_mlp
from .towers import Built, Config, Shapes, carried, mlp, norms, of, vision

TOWERS = {
    "clip_vision_model": clip_towers.clip,
    "siglip_vision_model": clip_towers.siglip,
    "siglip2_vision_model": clip_towers.siglip2,
    "pixtral": clip_towers.pixtral,
    "internvl_vision": clip_towers.internvl,
}
"""`model_type` of a vision_config -> its tower."""

AT = "multi_modal_projector"


def _before(
    config: Config,
    usual: str,
    claims: Claims,
    mergers: tuple[Mlp, ...] = (),
    features: JSON = None,
    at: str = "vision_tower",
) -> Built:
    """The tower `at`, of the kind that the config says, or the `usual` one."""
    kind = vision(config).get("vision_config.model_type", usual)
    if not isinstance(kind, str) or kind not in TOWERS:
        raise RecipeError(
            f"config: no tower for vision_config's model_type {kind!r}, known: {', '.join(TOWERS)}"
        )
    return TOWERS[kind](claims, at, config, mergers, features)


def _inner(config: Config, default: int) -> Dim:
    return of(vision(config), "hidden_size", default)


def _projector(claims: Claims, hidden: Dim, features: Dim, *, bias: bool) -> tuple[Mlp]:
    return (mlp(claims, AT, ("linear_1", "linear_2"), hidden, features, hidden, bias=bias)(),)


def _features(config: Config, usual: int) -> tuple[JSON, int]:
    """Which layers' output the projector reads, and of how many."""
    said = config.get("vision_feature_layer")
    return (usual if said is None else said), len(said) if isinstance(said, list) else 1


def llava(claims: Claims, config: Config, hidden: Dim, usual: int = -2) -> Built:
    """LLaVA's. `usual`: the layer whose output is read, where config does not say. Raises RecipeError."""
    pixtral = vision(config).get("vision_config.model_type") == "pixtral"
    features, count = _features(config, usual)
    bias = flag(config, "multimodal_projector_bias", True)
    read = _inner(config, 1024 if pixtral else 768).times(count)
    projector = _projector(claims, hidden, read, bias=bias)
    return _before(config, "clip_vision_model", claims, projector, features)


def llava_of_tiles(claims: Claims, config: Config, hidden: Dim, usual: int) -> Built:
    """LLaVA's of images in tiles, with a vector between their rows. Raises RecipeError."""
    tower, loose = llava(claims, config, hidden, usual)
    return tower, (*loose, claims.parameter("image_newline", hidden)())


def mistral3(claims: Claims, config: Config, hidden: Dim) -> Built:
    """Mistral 3's, which merges neighbouring patches first. Raises RecipeError."""
    inner, (features, count) = _inner(config, 1024), _features(config, -1)
    merged = inner.times(integer(config, "spatial_merge_size", 2) ** 2)
    bias = flag(config, "multimodal_projector_bias", False)
    projector = _projector(claims, hidden, inner.times(count), bias=bias)
    tower, loose = _before(config, "pixtral", claims, projector, features)
    shapes: Shapes = {"patch_merger.merging_layer.weight": (inner, merged)}
    shapes |= norms(("norm",), inner, bias=False)
    return tower, (*loose, *carried(claims, AT, shapes))


def internvl(claims: Claims, config: Config, hidden: Dim) -> Built:
    """InternVL's. Raises RecipeError."""
    ratio = config.get("downsample_ratio", 0.5)
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise RecipeError(f"config: downsample_ratio must be a number up to 1, got {ratio!r}")
    features = _inner(config, 1024).times(int(1 / ratio) ** 2)
    tower, loose = _before(config, "internvl_vision", claims, _projector(claims, hidden, features, bias=True))
    return tower, (*loose, *carried(claims, AT, norms(("layer_norm",), features)))


def gemma3(claims: Claims, config: Config, hidden: Dim) -> Built:
    """Gemma 3's. Raises RecipeError."""
    inner = _inner(config, 768)
    tower, loose = _before(config, "siglip_vision_model", claims)
    shapes: Shapes = {"mm_input_projection_weight": (inner, hidden), "mm_soft_emb_norm.weight": (inner,)}
    return tower, (*loose, *carried(claims, AT, shapes))


def paligemma(claims: Claims, config: Config, hidden: Dim) -> Built:
    """PaliGemma's. Raises RecipeError."""
    tower, loose = _before(config, "siglip_vision_model", claims)
    shapes: Shapes = {"linear.weight": (hidden, _inner(config, 1152)), "linear.bias": (hidden,)}
    return tower, (*loose, *carried(claims, AT, shapes))


def cohere2_vision(claims: Claims, config: Config, hidden: Dim) -> Built:
    """Command A Vision's. Raises RecipeError."""
    at, both = f"model.{AT}", dim(config, "alignment_intermediate_size", default=36864)
    if both.size % 2:
        raise RecipeError(f"config: {both.key} must be even, got {both.size}")
    read = _inner(config, 768).times(integer(config, "downsample_factor", 2) ** 2)
    up_gate = claims.linear(f"{at}.linear_1", both, read, bias=True)
    down = claims.linear(f"{at}.linear_2", hidden, Dim(both.size // 2, f"{both.key} / 2"), bias=True)
    projector = fused_mlp(up_gate, down, up_first=True)
    return _before(config, "siglip_vision_model", claims, (projector(),), at="model.vision_tower")


def lfm2_vl(claims: Claims, config: Config, hidden: Dim) -> Built:
    """LFM2-VL's. Raises RecipeError."""
    at, width = f"model.{AT}", dim(config, "projector_hidden_size", default=2560)
    read = _inner(config, 768).times(integer(config, "downsample_factor", 2) ** 2)
    bias = flag(config, "projector_bias", True)
    projector = mlp(claims, at, ("linear_1", "linear_2"), width, read, hidden, bias=bias)
    tower, loose = _before(config, "siglip2_vision_model", claims, (projector(),), at="model.vision_tower")
    shapes = norms(("layer_norm",), read) if flag(config, "projector_use_layernorm", True) else {}
    return tower, (*loose, *carried(claims, at, shapes))


def llama4(claims: Claims, config: Config, hidden: Dim) -> Built:
    """Llama 4's. Raises RecipeError."""
    tower, loose = clip_towers.llama4(claims, "vision_model", config)
    shapes: Shapes = {"linear_1.weight": (hidden, of(vision(config), "vision_output_dim", 7680))}
    return tower, (*loose, *carried(claims, AT, shapes))


def idefics3(claims: Claims, config: Config, hidden: Dim) -> Built:
    """Idefics 3's and SmolVLM's. Raises RecipeError."""
    tower, loose = clip_towers.idefics3(claims, "model.vision_model", config)
    read = _inner(config, 1152).times(integer(config, "scale_factor", 2) ** 2)
    shapes: Shapes = {"modality_projection.proj.weight": (hidden, read)}
    return tower, (*loose, *carried(claims, "model.connector", shapes))
