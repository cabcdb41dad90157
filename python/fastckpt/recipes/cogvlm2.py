"""CogVLM2: a decoder whose every layer has matrices of its own for image tokens, behind an EVA2-CLIP tower.

The hub's config.json names no `model_type`: ask for the recipe by name. Source: THUDM's modeling_cogvlm.py,
visual.py and configuration_cogvlm.py of cogvlm2-llama3-chat-19B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..mixers import Attention
from ..model import Layer, Layers, Model, Sizes, VisionExpert
from ..roles import Parameter
from .claims import Claims, Dim, Heads, dim, integer, vocabulary
from .decoder import ANCHOR
from .dense import gated
from .fused import fused_attention
from .kind import IGNORED
from .known import Known
from .towers import Shapes, carried, norms, of, vision

KV_HEADS = 8
"""configuration_cogvlm.py's num_multi_query_heads, which config.json may leave out."""


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a CogVLM2 checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, ANCHOR)
    hidden = dim(config, "hidden_size")
    width = dim(config, "intermediate_size")
    kv_count = integer(config, "num_multi_query_heads", KV_HEADS)
    heads = Heads.of(hidden, dim(config, "num_attention_heads"), kv_count)
    rows = Dim((heads.q + 2 * heads.kv) * heads.dim, "(heads + 2 * num_multi_query_heads) * head size")

    def attention(at: str, *, bias: bool) -> Callable[[], Attention]:
        qkv = claims.linear(f"{at}_expert_query_key_value", rows, hidden, bias=bias)
        return fused_attention(qkv, claims.linear(f"{at}_expert_dense", hidden, hidden), heads)

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
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
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
    said = vision(config)
    inner, mlp, patch = (of(said, key) for key in ("hidden_size", "intermediate_size", "patch_size"))
    one, two = Dim(1, "1"), Dim(2, "2")
    shapes: Shapes = {
        "patch_embedding.cls_embedding": (one, inner),
        "patch_embedding.proj.weight": (inner, of(said, "in_channels"), patch, patch),
        "patch_embedding.proj.bias": (inner,),
        "patch_embedding.position_embedding.weight": (of(said, "num_positions"), inner),
    }
    for i in range(claims.layers(said, "vision_config.num_hidden_layers")):
        at = f"transformer.layers.{i}"
        shapes |= norms((f"{at}.input_layernorm", f"{at}.post_attention_layernorm"), inner)
        for name, out, into in (
            ("attention.query_key_value", inner.times(3), inner),
            ("attention.dense", inner, inner),
            ("mlp.fc1", mlp, inner),
            ("mlp.fc2", inner, mlp),
        ):
            shapes |= {f"{at}.{name}.weight": (out, into), f"{at}.{name}.bias": (out,)}
    shapes |= norms(("linear_proj.norm1",), hidden)
    shapes |= {
        "linear_proj.linear_proj.weight": (hidden, inner),
        "linear_proj.dense_h_to_4h.weight": (width, hidden),
        "linear_proj.gate_proj.weight": (width, hidden),
        "linear_proj.dense_4h_to_h.weight": (hidden, width),
        "conv.weight": (inner, inner, two, two),
        "conv.bias": (inner,),
        "boi": (one, one, hidden),
        "eoi": (one, one, hidden),
    }
    return carried(claims, "model.vision", shapes)


FAMILIES = {
    "cogvlm2": Known(recipe, IGNORED),
}
