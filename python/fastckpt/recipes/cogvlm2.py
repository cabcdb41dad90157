"""CogVLM2: a decoder whose every layer has matrices of its own for image tokens, behind an EVA2-CLIP tower.

The hub's config.json names no `model_type`: ask for the recipe by name. Source: THUDM's modeling_cogvlm.py,
visual.py and configuration_cogvlm.py of cogvlm2-llama3-chat-19B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Attention, Layer, Layers, Model, Parameter, Sizes, VisionExpert
from .claims import Claims, Dim, integer, vocabulary
from .decoder import ANCHOR, IGNORED, gated
from .fused import qkv_parts

KV_HEADS = 8
"""configuration_cogvlm.py's num_multi_query_heads, which config.json may leave out."""


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a CogVLM2 checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, ANCHOR)
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    width = Dim(integer(config, "intermediate_size"), "intermediate_size")
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_multi_query_heads", KV_HEADS)
    head_dim = hidden.size // heads
    if hidden.size % heads or heads % kv_heads:
        raise RecipeError(
            f"config: {heads} attention heads of hidden_size {hidden.size} with {kv_heads} kv heads: wanted "
            "heads that divide hidden_size and share kv heads evenly"
        )
    rows = Dim((heads + 2 * kv_heads) * head_dim, "(heads + 2 * num_multi_query_heads) * head size")

    def attention(at: str, *, bias: bool) -> Callable[[], Attention]:
        qkv = claims.linear(f"{at}_expert_query_key_value", rows, hidden, bias=bias)
        o = claims.linear(f"{at}_expert_dense", hidden, hidden)

        def build() -> Attention:
            whole = qkv()
            return Attention(*qkv_parts(whole, heads, kv_heads, head_dim), o(), fused=whole.name)

        return build

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.input_layernorm", hidden)
        text = attention(f"{name}.self_attn.language", bias=False)
        image = attention(f"{name}.self_attn.vision", bias=True)
        between = claims.norm(f"{name}.post_attention_layernorm", hidden)
        text_mlp = gated(claims, f"{name}.mlp.language_mlp", width, hidden)
        image_mlp = gated(claims, f"{name}.mlp.vision_mlp", width, hidden)
        return lambda: Layer(
            name, before(), text(), between(), text_mlp(), vision=VisionExpert(image(), image_mlp())
        )

    vocab, embedding, lm_head, tied = vocabulary(
        claims, config, vocab_size, embedding="model.embed_tokens", hidden=hidden, tied_default=False
    )
    return Model(
        family="cogvlm2",
        sizes=Sizes(hidden.size, vocab, heads, kv_heads, head_dim, {width.key: width.size}),
        embedding=embedding,
        layers=Layers([layer(f"model.layers.{i}") for i in range(integer(config, "num_hidden_layers"))]),
        norm=claims.norm("model.norm", hidden)(),
        lm_head=lm_head,
        tied=tied,
        carried=_tower(claims, config, hidden, width),
        ignored=claims.close(IGNORED),
    )


def _tower(claims: Claims, config: Mapping[str, JSON], hidden: Dim, width: Dim) -> tuple[Parameter, ...]:
    """Every tensor of `model.vision`, which makes hidden vectors of images."""
    said = config.get("vision_config")
    if not isinstance(said, dict):
        raise RecipeError(f"config: vision_config must be an object, got {said!r}")
    named = {f"vision_config.{key}": value for key, value in said.items()}

    def dim(key: str, times: int = 1) -> Dim:
        size = integer(named, f"vision_config.{key}")
        return Dim(size * times, f"vision_config.{key}" if times == 1 else f"{times} * vision_config.{key}")

    inner, mlp, patch, one, two = (
        dim("hidden_size"), dim("intermediate_size"), dim("patch_size"), Dim(1, "1"), Dim(2, "2")
    )  # fmt: skip
    shapes: dict[str, tuple[Dim, ...]] = {
        "patch_embedding.cls_embedding": (one, inner),
        "patch_embedding.proj.weight": (inner, dim("in_channels"), patch, patch),
        "patch_embedding.proj.bias": (inner,),
        "patch_embedding.position_embedding.weight": (dim("num_positions"), inner),
    }
    for i in range(dim("num_hidden_layers").size):
        at = f"transformer.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{at}.{norm}.weight": (inner,), f"{at}.{norm}.bias": (inner,)}
        for name, out, into in (
            ("attention.query_key_value", dim("hidden_size", 3), inner),
            ("attention.dense", inner, inner),
            ("mlp.fc1", mlp, inner),
            ("mlp.fc2", inner, mlp),
        ):
            shapes |= {f"{at}.{name}.weight": (out, into), f"{at}.{name}.bias": (out,)}
    shapes |= {
        "linear_proj.linear_proj.weight": (hidden, inner),
        "linear_proj.norm1.weight": (hidden,),
        "linear_proj.norm1.bias": (hidden,),
        "linear_proj.dense_h_to_4h.weight": (width, hidden),
        "linear_proj.gate_proj.weight": (width, hidden),
        "linear_proj.dense_4h_to_h.weight": (hidden, width),
        "conv.weight": (inner, inner, two, two),
        "conv.bias": (inner,),
        "boi": (one, one, hidden),
        "eoi": (one, one, hidden),
    }
    return tuple(claims.parameter(f"model.vision.{name}", *dims)() for name, dims in shapes.items())
