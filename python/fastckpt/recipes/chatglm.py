"""ChatGLM 2, 3 and GLM-4 in their own form: [q; k; v] as one, [gate; up] as one, few kv heads.

Names and config keys as THUDM's modeling_chatglm.py has them; transformers' `glm` is another spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Layer, Layers, Model, Sizes
from .claims import Claims, Dim, Heads, dim, flag, integer, vocabulary
from .fused import fused_attention, fused_mlp
from .known import Known

IGNORED = ("*rotary_pos_emb.inv_freq",)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a ChatGLM checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    for key, wanted in (("rmsnorm", True), ("post_layer_norm", True)):
        if flag(config, key, wanted) is not wanted:
            raise RecipeError(f"config: {key} {not wanted} is not read")
    claims = Claims(ckpt, "transformer.embedding.word_embeddings.weight")
    hidden = dim(config, "hidden_size")
    width = dim(config, "ffn_hidden_size")
    count = integer(config, "num_attention_heads")
    shared = flag(config, "multi_query_attention", False)
    kv_count = integer(config, "multi_query_group_num") if shared else count
    heads = Heads(count, kv_count, integer(config, "kv_channels"))
    q_rows = Dim(heads.q * heads.dim, "num_attention_heads * kv_channels")
    rows = Dim((heads.q + 2 * heads.kv) * heads.dim, "(heads + 2 * kv heads) * kv_channels")
    bias = flag(config, "add_bias_linear", False)
    qkv_bias = bias or flag(config, "add_qkv_bias", False)

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.input_layernorm", hidden)
        qkv = claims.linear(f"{name}.self_attention.query_key_value", rows, hidden, bias=qkv_bias)
        o = claims.linear(f"{name}.self_attention.dense", hidden, q_rows, bias=bias)
        after = claims.norm(f"{name}.post_attention_layernorm", hidden)
        gate_up = claims.linear(f"{name}.mlp.dense_h_to_4h", width.times(2), hidden, bias=bias)
        down = claims.linear(f"{name}.mlp.dense_4h_to_h", hidden, width, bias=bias)
        attends, feeds = fused_attention(qkv, o, heads), fused_mlp(gate_up, down)
        return lambda: Layer(name, before(), attends(), after(), feeds())

    vocab, embedding, lm_head, tied = vocabulary(
        claims,
        config,
        vocab_size,
        embedding="transformer.embedding.word_embeddings",
        hidden=hidden,
        tied_default=False,
        head="transformer.output_layer",
        key="padded_vocab_size",
    )
    at = "transformer.encoder"
    return Model(
        family="chatglm",
        sizes=Sizes(
            hidden.size,
            vocab,
            heads.q,
            heads.kv,
            heads.dim,
            {width.key: width.size},
            head_keys=("num_attention_heads", "multi_query_group_num", "") if shared else None,
            vocab_key="padded_vocab_size",
        ),
        embedding=embedding,
        layers=Layers([layer(f"{at}.layers.{i}") for i in range(integer(config, "num_layers"))]),
        norm=claims.norm(f"{at}.final_layernorm", hidden)(),
        lm_head=lm_head,
        tied=tied,
        ignored=claims.close(IGNORED),
    )


FAMILIES = {
    "chatglm": Known(recipe, IGNORED),
}
