"""Gemma 4's towers, of images and of sound, and what brings their output to the decoder.

vLLM runs transformers' own modules, whole on every rank, so all of them is carried. Source: transformers'
modeling_gemma4.py and configuration_gemma4.py, also for the sizes that a config leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import JSON
from ..errors import RecipeError
from ..roles import Parameter
from .claims import Claims, Dim, dim, flag
from .towers import Config, Shapes, carried, norms, of, part, vision

AT = "model"
CLIPPED = ("input_min", "input_max", "output_min", "output_max")
"""What clips the inputs and outputs of a matrix."""

_IMAGES = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12,
    num_key_value_heads=12, head_dim=64, patch_size=16, position_embedding_size=10240,
)  # fmt: skip
_SOUND = dict(
    hidden_size=1024, num_hidden_layers=12, num_attention_heads=8, conv_kernel_size=5, output_proj_dims=1536
)
_PATCHES = dict(patch_size=16, pooling_kernel_size=3, mm_embed_dim=3840, mm_posemb_size=1120)


def beside(claims: Claims, config: Config, hidden: Dim) -> tuple[None, tuple[Parameter, ...]]:
    """Claims the towers that config speaks of; `hidden`: the decoder's hidden size. Raises RecipeError."""
    shapes: Shapes = {}
    if config.get("vision_config") is not None:
        shapes |= _images(claims, vision(config, _IMAGES), hidden)
    if config.get("audio_config") is not None:
        shapes |= _sound(claims, config, hidden)
    return None, carried(claims, AT, shapes)


def unified(claims: Claims, config: Config, hidden: Dim) -> tuple[None, tuple[Parameter, ...]]:
    """Claims what stands for towers in Gemma 4's unified form: vectors of patches and of sound as they are.
    Raises RecipeError. Source: transformers' modeling_gemma4_unified.py."""
    shapes: Shapes = {}
    if config.get("vision_config") is not None:
        said = vision(config, _PATCHES)
        inner = of(said, "mm_embed_dim")
        side = of(said, "patch_size").size * of(said, "pooling_kernel_size").size
        pixels = Dim(3 * side**2, "3 * (patch_size * pooling_kernel_size) ** 2")
        shapes |= {
            "vision_embedder.patch_dense.weight": (inner, pixels),
            "vision_embedder.patch_dense.bias": (inner,),
            "vision_embedder.pos_embedding": (of(said, "mm_posemb_size"), Dim(2, "2"), inner),
            "embed_vision.embedding_projection.weight": (hidden, of(said, "output_proj_dims", 3840)),
        }
        shapes |= norms(("vision_embedder.patch_ln1",), pixels)
        shapes |= norms(("vision_embedder.patch_ln2", "vision_embedder.pos_norm"), inner)
    if config.get("audio_config") is not None:
        told = part(config, "audio_config")
        read = dim(told, "audio_config.audio_embed_dim", default=640)
        shapes["embed_audio.embedding_projection.weight"] = hidden, read
    return None, carried(claims, AT, shapes)


def _matrices(matrices: Mapping[str, tuple[Dim, Dim]], clipped: bool) -> Shapes:
    """Matrices [out, in] of these modules, and what clips them."""
    out: Shapes = {f"{name}.linear.weight": shape for name, shape in matrices.items()}
    return out | {f"{name}.{leaf}": () for name in matrices if clipped for leaf in CLIPPED}


def _images(claims: Claims, said: Config, hidden: Dim) -> Shapes:
    if flag(said, "vision_config.attention_bias", False):
        raise RecipeError("config: vision_config.attention_bias true is not read")
    inner, width, size = of(said, "hidden_size"), of(said, "intermediate_size"), of(said, "head_dim")
    q, kv = (of(said, key).size for key in ("num_attention_heads", "num_key_value_heads"))
    q_rows, kv_rows = Dim(q * size.size, "heads * head_dim"), Dim(kv * size.size, "kv heads * head_dim")
    clipped = flag(said, "vision_config.use_clipped_linears", False)
    layer = _matrices(
        {
            "self_attn.q_proj": (q_rows, inner),
            "self_attn.k_proj": (kv_rows, inner),
            "self_attn.v_proj": (kv_rows, inner),
            "self_attn.o_proj": (inner, q_rows),
            "mlp.gate_proj": (width, inner),
            "mlp.up_proj": (width, inner),
            "mlp.down_proj": (inner, width),
        },
        clipped,
    )
    layer |= norms(("self_attn.q_norm", "self_attn.k_norm"), size, bias=False)
    around = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    layer |= norms(tuple(f"{n}_layernorm" for n in around), inner, bias=False)
    out: Shapes = {
        f"encoder.layers.{i}.{name}": shape
        for i in range(claims.layers(said, "vision_config.num_hidden_layers"))
        for name, shape in layer.items()
    }
    pixels = Dim(3 * of(said, "patch_size").size ** 2, "3 * vision_config.patch_size ** 2")
    out["patch_embedder.input_proj.weight"] = inner, pixels
    out["patch_embedder.position_embedding_table"] = Dim(2, "2"), of(said, "position_embedding_size"), inner
    if flag(said, "vision_config.standardize", False):
        out |= {"std_bias": (inner,), "std_scale": (inner,)}
    return _below("vision_tower", out) | {"embed_vision.embedding_projection.weight": (hidden, inner)}


def _sound(claims: Claims, config: Config, hidden: Dim) -> Shapes:
    said = part(config, "audio_config", _SOUND)
    inner, out_size, kernel = (
        dim(said, f"audio_config.{key}") for key in ("hidden_size", "output_proj_dims", "conv_kernel_size")
    )
    heads = dim(said, "audio_config.num_attention_heads").size
    size = Dim(inner.size // heads, "hidden_size / num_attention_heads")
    rows = Dim(heads * size.size, f"num_attention_heads * ({size.key})")
    first, second = _channels(said.get("audio_config.subsampling_conv_channels", [128, 32]))
    one, three = Dim(1, "1"), Dim(3, "3")
    wide, twice = inner.times(4), inner.times(2)
    layer = _matrices(
        {f"self_attn.{n}_proj": (rows, inner) for n in "qkv"}
        | {"self_attn.post": (inner, inner)}
        | {f"feed_forward{i}.ffw_layer_1": (wide, inner) for i in (1, 2)}
        | {f"feed_forward{i}.ffw_layer_2": (inner, wide) for i in (1, 2)}
        | {"lconv1d.linear_start": (twice, inner), "lconv1d.linear_end": (inner, inner)},
        flag(said, "audio_config.use_clipped_linears", True),
    )
    layer |= {
        "self_attn.relative_k_proj.weight": (rows, inner),
        "self_attn.per_dim_scale": (size,),
        "lconv1d.depthwise_conv1d.weight": (inner, one, kernel),
    }
    around = tuple(f"feed_forward{i}.{n}_layer_norm" for i in (1, 2) for n in ("pre", "post"))
    inside = ("lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out")
    layer |= norms((*around, *inside), inner, bias=False)
    out: Shapes = {
        f"layers.{i}.{name}": shape
        for i in range(claims.layers(said, "audio_config.num_hidden_layers"))
        for name, shape in layer.items()
    }
    read = Dim(first.size // 4 * second.size, "subsampling_conv_channels / 4")
    out |= {
        "subsample_conv_projection.layer0.conv.weight": (first, one, three, three),
        "subsample_conv_projection.layer0.norm.weight": (first,),
        "subsample_conv_projection.layer1.conv.weight": (second, first, three, three),
        "subsample_conv_projection.layer1.norm.weight": (second,),
        "subsample_conv_projection.input_proj_linear.weight": (inner, read),
        "output_proj.weight": (out_size, inner),
        "output_proj.bias": (out_size,),
    }
    return _below("audio_tower", out) | {"embed_audio.embedding_projection.weight": (hidden, out_size)}


def _channels(said: JSON) -> tuple[Dim, Dim]:
    key = "audio_config.subsampling_conv_channels"
    if not isinstance(said, list) or len(said) != 2:
        raise RecipeError(f"config: {key} must be two numbers, got {said!r}")
    return dim({key: said[0]}, key), dim({key: said[1]}, key)


def _below(at: str, shapes: Shapes) -> Shapes:
    return {f"{at}.{name}": shape for name, shape in shapes.items()}
