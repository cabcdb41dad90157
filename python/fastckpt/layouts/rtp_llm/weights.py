"""rtp-llm's weights by the names of its class W: what each is called in a dump, and which strategy cuts it.

TABLES: the tensor-parallel strategies by how the weights are stored; "default" is for [in, out] and for
packed int4, the others say what differs. Names and tables are data; `split.SPLITS` has the strategies.
tests/layouts/catalogue.py says which of W's names are never written, which cuts differ, and why.
Source: rtp-llm's utils/model_weight.py (class W, gpt_style_tp_strategy) and model_loader/'s tables by scheme
(2025's and 2026's).
"""

from __future__ import annotations

from collections.abc import Mapping

_ATTENTION = "self_attention_weights"
_MLA = f"{_ATTENTION}.mla"
_LINEAR = "linear_attn"
_FFN = "ffn_weights"
_MOE = "partial_moe_weights"


def _norm(name: str, leaf: str) -> dict[str, str]:
    return {f"{name}_gamma": f"{leaf}.gamma", f"{name}_beta": f"{leaf}.beta"}


def _matrix(stem: str, leaf: str, end: str = "") -> dict[str, str]:
    """A kernel, its bias, scale and zero: `{stem}w{end}` and so on."""
    leaves = {"w": "kernel", "b": "bias", "s": "weight_only_quant_scale", "z": "zero"}
    return {f"{stem}{letter}{end}": f"{leaf}.{kind}" for letter, kind in leaves.items()}


def _static(name: str, leaf: str) -> dict[str, str]:
    """The scale of a matrix's inputs, and its reciprocal; STATIC says which of the two holds which."""
    both = {
        f"{name}_static_quant": "static_quant",
        f"{name}_static_quant_reciprocal": "static_quant_reciprocal",
    }
    return {n: f"{leaf}.{end}" for n, end in both.items()}


def _lora(name: str, leaf: str) -> dict[str, str]:
    return {f"{name}_lora_{half}": f"{leaf}.kernel.lora_{half.upper()}" for half in "ab"}


NAMES: Mapping[str, str] = {
    "embedding": "embedding",
    "positional_embedding": "position_encoding.weight",
    "token_type_embedding": "token_type_embedding.weight",
    "lm_head": "lm_head",
    "lm_head_b": "lm_head_b",
    "pre_decoder_ln_gamma": "pre_decoder_layernorm.gamma",
    "pre_decoder_ln_beta": "pre_decoder_layernorm.bias",
    "linear_bias_slopes": "linear_bias_slopes",
    "rope_cos_sin_cache": "rotary_embedding.cos_sin_cache",
    **_norm("final_ln", "final_layernorm"),
    **_norm("pre_ln", "pre_layernorm_weights"),
    **_norm("pre_attn_ln", "pre_attn_layernorm_weights"),
    **_norm("post_ln", "post_layernorm_weights"),
    **_norm("post_ln_2", "post_layernorm_weights_2"),
    **_norm("post_ffn_ln", "post_ffn_layernorm_weights"),
    **_norm("q_ln", f"{_ATTENTION}.q_layernorm"),
    **_norm("k_ln", f"{_ATTENTION}.k_layernorm"),
    **_matrix("attn_qkv_", f"{_ATTENTION}.query_weight"),
    **_matrix("attn_o_", f"{_ATTENTION}.attention_output_weight"),
    "attn_gate_w": f"{_ATTENTION}.gate.weight",
    "attn_gate_s": f"{_ATTENTION}.gate.scale",
    "attn_i_smoother": f"{_ATTENTION}.query_weight.smoother",
    "attn_o_smoother": f"{_ATTENTION}.attention_output_weight.smoother",
    "attn_o_shift": f"{_ATTENTION}.attention_output_weight.shift",
    **{k: v for k, v in _matrix("mla_fusedqkrope_", f"{_MLA}.fusedqkrope").items() if k[-1] in "ws"},
    "mla_fusedqkrope_no_lora_w": f"{_MLA}.fusedqkrope_no_lora.kernel",
    **{k: v for k, v in _matrix("mla_q_b_", f"{_MLA}.query_b_weight").items() if k[-1] in "ws"},
    **{k: v for k, v in _matrix("mla_kv_b_", f"{_MLA}.kv_b_weight").items() if k[-1] in "ws"},
    **_norm("mla_q_a_ln", f"{_MLA}.query_a_layernorm_weight"),
    **_norm("mla_kv_a_ln", f"{_MLA}.key_value_a_layernorm_weight"),
    "mla_kc": f"{_MLA}.kc.kernel",
    "mla_kc_s": f"{_MLA}.kc.weight_only_quant_scale",
    "mla_vc": f"{_MLA}.vc.kernel",
    "mla_vc_s": f"{_MLA}.vc.weight_only_quant_scale",
    "linear_attn_qkvz_w": f"{_LINEAR}.in_proj_qkvz.weight",
    "linear_attn_qkvz_s": f"{_LINEAR}.in_proj_qkvz.scale",
    "linear_attn_ba_w": f"{_LINEAR}.in_proj_ba.weight",
    "linear_attn_conv1d_w": f"{_LINEAR}.conv1d.weight",
    "linear_attn_alog": f"{_LINEAR}.A_log",
    "linear_attn_dt_b": f"{_LINEAR}.dt_bias",
    "linear_attn_norm_w": f"{_LINEAR}.norm.weight",
    "linear_attn_out_w": f"{_LINEAR}.out_proj.weight",
    "linear_attn_out_s": f"{_LINEAR}.out_proj.scale",
    **_matrix("ffn_", f"{_FFN}.intermediate_weight", "1"),
    **_matrix("ffn_", f"{_FFN}.intermediate_weight3", "3"),
    **_matrix("ffn_", f"{_FFN}.intermediate_weight13", "13"),
    **_matrix("ffn_", f"{_FFN}.intermediate_weight2", "2"),
    "ffn_smoother": f"{_FFN}.intermediate_weight2.smoother",
    "vision_attn_qkv_w": f"{_ATTENTION}.vision_query_weight.kernel",
    "vision_attn_qkv_b": f"{_ATTENTION}.vision_query_weight.bias",
    "vision_attn_o_w": f"{_ATTENTION}.vision_attention_output_weight.kernel",
    **{f"vision_ffn_w{i}": f"vision_ffn_weights.intermediate_weight{i.lstrip('1')}.kernel" for i in "132"},
    "shared_expert_gate": f"{_FFN}.shared_expert_gate.kernel",
    "moe_gate": f"{_MOE}.gate.kernel",
    **_matrix("moe_", f"{_MOE}.intermediate_weight", "1"),
    **_matrix("moe_", f"{_MOE}.intermediate_weight2", "2"),
    "e_score_correction_b": f"{_MOE}.e_score_correction_bias",
    **_static("pre_decoder_ln", "pre_decoder_layernorm"),
    **_static("pre_ln", "pre_layernorm_weights"),
    **_static("attention_output", f"{_ATTENTION}.attention_output_weight"),
    **_static("post_ln", "post_layernorm_weights"),
    **_static("ffn_intermediate_weight2", f"{_FFN}.intermediate_weight2"),
    **_static("ffn_intermediate_weight3", f"{_FFN}.intermediate_weight3"),
    **_static("post_ffn_ln", "post_ffn_layernorm_weights"),
    **{f"moe_w{k}_input_s": f"moe_w{k}_activation.static_quant" for k in "12"},
    **{f"moe_w{k}_input_sr": f"moe_w{k}_activation.static_quant_reciprocal" for k in "12"},
    **_lora("attn_qkv_w", f"{_ATTENTION}.query_weight"),
    **_lora("attn_o_w", f"{_ATTENTION}.attention_output_weight"),
    **_lora("ffn_w1", f"{_FFN}.intermediate_weight"),
    **_lora("ffn_w3", f"{_FFN}.intermediate_weight3"),
    **_lora("ffn_w13", f"{_FFN}.intermediate_weight13"),
    **_lora("ffn_w2", f"{_FFN}.intermediate_weight2"),
    "log2phy": "moe_eplb.log2phy",
    "logic_expert_cnt": "moe_eplb.logic_expert_cnt",
}
"""W's name -> the name in a dump, of what is written."""

FP32 = frozenset({"e_score_correction_b"})
"""W's names that are float32 whatever the others are (fp32_weights_list)."""

FACTORS = frozenset(n for n, d in NAMES.items() if d.endswith(("quant_scale", ".scale", "smoother", "shift")))
"""W's names that are float32 beside values of eight bits (data_type in the loader's int8 and fp8 tables)."""

_WHOLE = (
    *(name for name in NAMES if name.endswith(("_gamma", "_beta"))),
    *("rope_cos_sin_cache", "attn_o_b", "ffn_b2", "mla_fusedqkrope_w", "mla_fusedqkrope_s"),
    *("shared_expert_gate", "moe_gate", "e_score_correction_b", "log2phy", "logic_expert_cnt"),
    *(name for name in NAMES if "_static_quant" in name),
    *("attn_qkv_w_lora_a", "attn_o_w_lora_b", "ffn_w2_lora_b", *(f"ffn_w{k}_lora_a" for k in (1, 3, 13))),
)

_DEFAULT: dict[str, str] = {
    **dict.fromkeys(_WHOLE, "sp_id"),
    **dict.fromkeys(("embedding", "positional_embedding", "token_type_embedding"), "sp_neg1"),
    **dict.fromkeys(("lm_head", "lm_head_b"), "sp_0_pad8"),
    "linear_bias_slopes": "split_slopes_tp",
    "attn_qkv_w": "sp_head",
    "attn_qkv_b": "sp_head_b",
    "attn_qkv_s": "sp_head_s",
    "attn_qkv_z": "sp_head_z",
    **dict.fromkeys(("attn_o_w", "attn_o_s", "attn_o_z"), "sp_0"),
    **dict.fromkeys(("attn_i_smoother", "attn_o_smoother", "attn_o_shift"), "sp_0"),
    "mla_fusedqkrope_no_lora_w": "sp_neg1_part_by_head",
    **dict.fromkeys(("mla_q_b_w", "mla_q_b_s", "mla_kv_b_w", "mla_kv_b_s"), "sp_neg1"),
    **dict.fromkeys(("mla_kc", "mla_kc_s", "mla_vc", "mla_vc_s"), "sp_0"),
    **{f"ffn_{kind}{end}": "ffn_sp_neg1" for kind in "wbsz" for end in "13"},
    **{f"ffn_{kind}13": "ffn_sp_neg1_w13" for kind in "wbsz"},
    **dict.fromkeys(("ffn_w2", "ffn_s2", "ffn_z2", "ffn_smoother", "vision_ffn_w2"), "ffn_sp_0"),
    **dict.fromkeys(("attn_gate_w", "attn_gate_s"), "sp_attn_gate"),
    **dict.fromkeys(("linear_attn_qkvz_w", "linear_attn_qkvz_s"), "split_qkvz"),
    "linear_attn_ba_w": "split_ba",
    "linear_attn_conv1d_w": "split_conv1d",
    **dict.fromkeys(("linear_attn_alog", "linear_attn_dt_b"), "split_head_linear"),
    "linear_attn_norm_w": "sp_id",
    **dict.fromkeys(("linear_attn_out_w", "linear_attn_out_s"), "split_out_linear"),
    "vision_attn_qkv_w": "sp_head",
    "vision_attn_qkv_b": "sp_head_b",
    "vision_attn_o_w": "sp_0",
    **dict.fromkeys(("vision_ffn_w1", "vision_ffn_w3"), "ffn_sp_neg1"),
    **dict.fromkeys(("moe_w1", "moe_s1", "moe_z1"), "sp_moe_w1"),
    **dict.fromkeys(("moe_w2", "moe_s2", "moe_z2", "moe_b1", "moe_b2"), "sp_moe_neg1"),
    **dict.fromkeys(("moe_w1_input_s", "moe_w1_input_sr", "moe_w2_input_s", "moe_w2_input_sr"), "ep"),
    **{"attn_qkv_w_lora_b": "sp_head_lora", "attn_o_w_lora_a": "sp_0", "ffn_w2_lora_a": "ffn_sp_0"},
    **{"ffn_w1_lora_b": "ffn_sp_neg1", "ffn_w3_lora_b": "ffn_sp_neg1", "ffn_w13_lora_b": "ffn_sp_neg1_w13"},
}

_OUT_IN = {"attn_qkv_w": "sp_head_gemm_a8", "attn_o_w": "sp_neg1", "ffn_w2": "ffn_sp_neg1"}
_OUT_IN |= dict.fromkeys(("ffn_w1", "ffn_w3"), "ffn_sp_0") | {"ffn_w13": "sp_0_w13"}
_SCALES = dict.fromkeys(("ffn_s1", "ffn_s3"), "ffn_sp_0") | {"ffn_s13": "sp_0_w13"}
_LATENT = dict.fromkeys(("mla_q_b_w", "mla_q_b_s", "mla_kv_b_w", "mla_kv_b_s"), "sp_0")
_LINEAR_T = {"linear_attn_qkvz_w": "split_qkvz_t", "linear_attn_out_w": "split_out_linear_t"}
_ONE_A_MATRIX = (
    *("attn_qkv_s", "attn_o_s", "ffn_s1", "ffn_s3", "ffn_s13", "ffn_s2"),
    *("attn_o_smoother", "attn_o_shift"),
)

TABLES: Mapping[str, Mapping[str, str]] = {
    "default": _DEFAULT,
    "int8": _DEFAULT
    | _OUT_IN
    | _SCALES
    | {"attn_qkv_s": "sp_head_s_gemm_a8", "moe_s2": "ep"}
    | dict.fromkeys(("attn_o_s", "ffn_s2"), "sp_id"),
    "fp8_tensor": _DEFAULT
    | _OUT_IN
    | dict.fromkeys(_ONE_A_MATRIX, "sp_id")
    | dict.fromkeys(("moe_s1", "moe_s2"), "ep"),
    "fp8_block": _DEFAULT
    | _OUT_IN
    | _SCALES
    | _LATENT
    | _LINEAR_T
    | {"linear_attn_qkvz_s": "split_qkvz_t", "linear_attn_out_s": "split_out_linear_t"}
    | {"attn_qkv_s": "sp_head_s_gemm_a8_block", "attn_gate_w": "sp_0", "attn_gate_s": "sp_0"}
    | {"attn_o_s": "sp_neg1", "ffn_s2": "ffn_sp_neg1"},
    "fp8_channel": _DEFAULT
    | _OUT_IN
    | _SCALES
    | {"attn_qkv_s": "sp_head_s_gemm_a8_channel", "attn_gate_w": "sp_0", "attn_gate_s": "sp_0"}
    | _LINEAR_T
    | {"linear_attn_qkvz_s": "split_qkvz_channel_scale", "linear_attn_out_s": "sp_id"}
    | dict.fromkeys(("attn_o_s", "ffn_s2"), "sp_id")
    | {"moe_s2": "ep"},
}
"""How weights are stored -> W's name -> the strategy's name."""


def _held(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (f"{name}_static_quant_reciprocal",), (f"{name}_static_quant",)


_INT8 = {
    "attn_qkv_": _held("pre_ln"),
    "attn_o_": _held("attention_output"),
    "ffn_13": _held("post_ln"),
    "ffn_3": _held("post_ln"),
    "ffn_2": _held("ffn_intermediate_weight2"),
}

STATIC: Mapping[str, Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "int8": _INT8,
    "fp8_tensor": _INT8
    | {
        "attn_o_": (_held("attention_output")[1], _held("attention_output")[0]),
        "ffn_2": (sum(_held("ffn_intermediate_weight2"), ()), ()),
        "moe_1": (("moe_w1_input_sr",), ("moe_w1_input_s",)),
        "moe_2": (("moe_w2_input_sr",), ("moe_w2_input_s",)),
    },
}
"""How weights are stored -> matrix -> (the names that hold the scale of its inputs, those that hold its
reciprocal), as the reference has them, whatever the names say. Source: INT8_ACT_SCALE_MAP in model_loader/
per_tensor_int8_quant_weight.py, FP8_ACT_SCALE_MAP in static_fp8_quant_weight.py."""
