"""What vLLM calls and cuts otherwise than most, family by family. Source: vLLM's models/."""

from __future__ import annotations

from ..engines import Renamed

_HEAD = ("lm_head.", "language_model.lm_head.")
_INSIDE = (
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.embeddings.", "vision_tower.vision_model.embeddings."),
    ("vision_tower.encoder.", "vision_tower.vision_model.encoder."),
    ("vision_tower.pre_layrnorm.", "vision_tower.vision_model.pre_layrnorm."),
    ("vision_tower.post_layernorm.", "vision_tower.vision_model.post_layernorm."),
)
"""Older files have a tower of CLIP's kin below vision_model, as vLLM does."""

_BESIDE = (
    ("model.language_model.", "language_model.model."),
    *(
        (f"model.{name}.", f"{name}.")
        for name in (
            *("vision_tower", "vision_embedder", "embed_vision", "audio_tower", "embed_audio"),
            "multi_modal_projector",
        )
    ),
    _HEAD,
)
_LFM2 = ((".conv.", ".short_conv."), (".feed_forward.gate_up_proj.", ".feed_forward.w13."))

RENAMED: dict[str, Renamed] = {
    "deepseek_v4": (
        ("^head.", "lm_head."),
        ("^embed.", "model.embed_tokens."),
        ("^", "model."),
        (".ffn.gate.bias", ".ffn.gate.e_score_correction_bias"),
        (".shared_experts.w2.", ".shared_experts.down_proj."),
    ),
    "gpt_oss": ((".self_attn.", ".attn."), (".embed_tokens.", ".embedding.")),
    "chatglm": ((".word_embeddings.", "."),),
    "nemotron_h": (("backbone.embeddings.", "model.embed_tokens."), ("backbone.", "model.")),
    "jamba": ((".self_attn.", "."),),
    "falcon_h1": ((".mamba.", ".mamba.mamba."),),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _LFM2),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), (("model.", "language_model.model."), _HEAD)),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "exaone4_5"),
        (("model.language_model.", "language_model.model."), ("model.visual.", "visual."), _HEAD),
    ),
    "kimi_k25": (
        ("mm_projector.proj.0.", "mm_projector.linear_1."),
        ("mm_projector.proj.2.", "mm_projector.linear_2."),
    ),
    **dict.fromkeys(("gemma4", "gemma4_unified"), _BESIDE),
    "cohere2_vision": (*_BESIDE, *_INSIDE),
    "lfm2_vl": (*_BESIDE, *_INSIDE, *_LFM2),
    **dict.fromkeys(("gemma3", "llava", "llava_next", "llava_onevision", "paligemma"), _INSIDE),
}
"""family -> (a part of the hub's name, what vLLM's module is called), where the two differ, applied in order;
names begin with ^ for as long."""

CUT_NORMS = frozenset({"minimax_m2"})
"""Families whose norms over all of q and of k vLLM cuts by heads, rather than hold them whole."""

APART = frozenset({"laguna"})
"""Families whose blocks, but for experts', have gate and up as matrices of their own in vLLM too."""

UNJOINED = frozenset({"minicpm3"})
"""Families of whose latent attention vLLM keeps the matrices of the two low ranks apart."""

HALVES = frozenset({"minicpm3"})
"""Families in whose latent attention vLLM turns halves of the rotary rows, not neighbours."""

QWEN_DELTA: dict[str, str] = {"in_proj_qkvz": "qkvz", "in_proj_ba": "ba"}
DELTA: dict[str, dict[str, str]] = {
    "kimi_linear": {"in_proj_qkvgfab": "qkvbf"},
    "olmo_hybrid": {"in_proj_qkvg": "qkvz"},
}
"""family -> which matrices of its linear attention vLLM has as one: its name, the initials of those in it (f
and g are of low rank, before a and z), where that is not as in Qwen3.5."""

PAIRED = frozenset({"llama4_text", "llama4"})
"""Families whose rotary positions turn neighbouring rows of a head of q and k; vLLM puts all the even rows
before the odd ones (Llama4ForCausalLM.permute_qk_weight_for_rotary)."""

TOWERS: dict[str, frozenset[str]] = {
    "internvl": frozenset({"attention", "mergers"}),
    **dict.fromkeys(("llava_onevision", "lfm2_vl"), frozenset({"mergers"})),
    "qwen2_vl": frozenset({"rows"}),
}
"""family -> how vLLM cuts its tower otherwise than a decoder: "attention" or "mergers" are whole on every
rank, [q; k; v] is cut as one run of "rows", whatever they are."""

WHOLE = frozenset({
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe",
    "exaone4_5", "kimi_k25",
})  # fmt: skip
"""Families whose tower vLLM can hold whole on every rank (supports_encoder_tp_data)."""

CARRIED = frozenset({"gemma4", "gemma4_unified", "deepseek_v4"})
"""Families of which every rank holds what lies beside the decoder's layers whole: towers that vLLM runs as
transformers' own modules, or the mixer of residual streams."""

ROWS: dict[str, frozenset[str]] = {
    "gemma4_unified": frozenset({f"model.vision_embedder.patch_dense.{leaf}" for leaf in ("weight", "bias")}),
    **dict.fromkeys(("glm4v", "glm4v_moe"), frozenset({"model.visual.merger.proj.weight"})),
    "llama4": frozenset(
        {"vision_model.patch_embedding.linear.weight", "multi_modal_projector.linear_1.weight"}
    ),
}
"""family -> matrices beside its tower's layers of which each rank holds a run of rows."""
