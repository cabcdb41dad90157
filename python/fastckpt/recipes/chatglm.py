"""ChatGLM 2, 3 and GLM-4 in their own form: [q; k; v] as one, [gate; up] as one, few kv heads.

Names and config keys as THUDM's modeling_chatglm.py has them; transformers' `glm` is another spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Attention, Layer, Layers, Mlp, Model, Sizes
from .claims import Claims, Dim, flag, integer, vocabulary
from .fused import gate_up_parts, qkv_parts

IGNORED = ("*rotary_pos_emb.inv_freq",)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a ChatGLM checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    for key, wanted in (("rmsnorm", True), ("post_layer_norm", True)):
        if flag(config, key, wanted) is not wanted:
            raise RecipeError(f"config: {key} {not wanted} is not read")
    claims = Claims(ckpt, "transformer.embedding.word_embeddings.weight")
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    width = Dim(integer(config, "ffn_hidden_size"), "ffn_hidden_size")
    pair = Dim(2 * width.size, "2 * ffn_hidden_size")
    heads = integer(config, "num_attention_heads")
    shared = flag(config, "multi_query_attention", False)
    kv_heads = integer(config, "multi_query_group_num") if shared else heads
    head_dim = integer(config, "kv_channels")
    if heads % kv_heads:
        raise RecipeError(f"config: {heads} attention heads do not share {kv_heads} kv heads evenly")
    q_rows = Dim(heads * head_dim, "num_attention_heads * kv_channels")
    rows = Dim((heads + 2 * kv_heads) * head_dim, "(heads + 2 * kv heads) * kv_channels")
    bias = flag(config, "add_bias_linear", False)
    qkv_bias = bias or flag(config, "add_qkv_bias", False)

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.input_layernorm", hidden)
        qkv = claims.linear(f"{name}.self_attention.query_key_value", rows, hidden, bias=qkv_bias)
        o = claims.linear(f"{name}.self_attention.dense", hidden, q_rows, bias=bias)
        after = claims.norm(f"{name}.post_attention_layernorm", hidden)
        up = claims.linear(f"{name}.mlp.dense_h_to_4h", pair, hidden, bias=bias)
        down = claims.linear(f"{name}.mlp.dense_4h_to_h", hidden, width, bias=bias)

        def build() -> Layer:
            whole, both = qkv(), up()
            attention = Attention(*qkv_parts(whole, heads, kv_heads, head_dim), o(), fused=whole.name)
            return Layer(
                name, before(), attention, after(), Mlp(*gate_up_parts(both), down(), fused=both.name)
            )

        return build

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
            heads,
            kv_heads,
            head_dim,
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
