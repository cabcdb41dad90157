"""rtp-llm's weights by the names of its class W: what each is called in a dump, and which strategy cuts it.

TABLES: the tensor-parallel strategies by how the weights are stored; "default" is for [in, out], the others
say what differs. Names and tables are data; `rtp_split.SPLITS` has the strategies. Source: rtp-llm's
utils/model_weight.py (class W, gpt_style_tp_strategy and its variants; 2025's and 2026's).
"""

from __future__ import annotations

from collections.abc import Mapping

_ATTENTION = "self_attention_weights"
_MLA = f"{_ATTENTION}.mla"
_FFN = "ffn_weights"
_MOE = "partial_moe_weights"
_SCALE = "weight_only_quant_scale"

NAMES: Mapping[str, str] = {
    "embedding": "embedding",
    "positional_embedding": "position_encoding.weight",
    "lm_head": "lm_head",
    "final_ln_gamma": "final_layernorm.gamma",
    "pre_ln_gamma": "pre_layernorm_weights.gamma",
    "post_ln_gamma": "post_layernorm_weights.gamma",
    "q_ln_gamma": f"{_ATTENTION}.q_layernorm.gamma",
    "k_ln_gamma": f"{_ATTENTION}.k_layernorm.gamma",
    "attn_qkv_w": f"{_ATTENTION}.query_weight.kernel",
    "attn_qkv_b": f"{_ATTENTION}.query_weight.bias",
    "attn_qkv_s": f"{_ATTENTION}.query_weight.{_SCALE}",
    "attn_o_w": f"{_ATTENTION}.attention_output_weight.kernel",
    "attn_o_b": f"{_ATTENTION}.attention_output_weight.bias",
    "attn_o_s": f"{_ATTENTION}.attention_output_weight.{_SCALE}",
    "mla_fusedqkrope_w": f"{_MLA}.fusedqkrope.kernel",
    "mla_fusedqkrope_s": f"{_MLA}.fusedqkrope.{_SCALE}",
    "mla_fusedqkrope_no_lora_w": f"{_MLA}.fusedqkrope_no_lora.kernel",
    "mla_q_b_w": f"{_MLA}.query_b_weight.kernel",
    "mla_q_b_s": f"{_MLA}.query_b_weight.{_SCALE}",
    "mla_kv_b_w": f"{_MLA}.kv_b_weight.kernel",
    "mla_kv_b_s": f"{_MLA}.kv_b_weight.{_SCALE}",
    "mla_q_a_ln_gamma": f"{_MLA}.query_a_layernorm_weight.gamma",
    "mla_kv_a_ln_gamma": f"{_MLA}.key_value_a_layernorm_weight.gamma",
    "mla_kc": f"{_MLA}.kc.kernel",
    "mla_vc": f"{_MLA}.vc.kernel",
    "ffn_w13": f"{_FFN}.intermediate_weight13.kernel",
    "ffn_b13": f"{_FFN}.intermediate_weight13.bias",
    "ffn_s13": f"{_FFN}.intermediate_weight13.{_SCALE}",
    "ffn_w2": f"{_FFN}.intermediate_weight2.kernel",
    "ffn_b2": f"{_FFN}.intermediate_weight2.bias",
    "ffn_s2": f"{_FFN}.intermediate_weight2.{_SCALE}",
    "shared_expert_gate": f"{_FFN}.shared_expert_gate.kernel",
    "moe_gate": f"{_MOE}.gate.kernel",
    "moe_w1": f"{_MOE}.intermediate_weight.kernel",
    "moe_s1": f"{_MOE}.intermediate_weight.{_SCALE}",
    "moe_w2": f"{_MOE}.intermediate_weight2.kernel",
    "moe_s2": f"{_MOE}.intermediate_weight2.{_SCALE}",
    "e_score_correction_b": f"{_MOE}.e_score_correction_bias",
}
"""W's name -> the name in a dump. Those that are written today; rtp-llm knows more."""

_DEFAULT: dict[str, str] = {
    "embedding": "sp_neg1",
    "positional_embedding": "sp_neg1",
    "lm_head": "sp_0_pad8",
    "final_ln_gamma": "sp_id",
    "pre_ln_gamma": "sp_id",
    "post_ln_gamma": "sp_id",
    "q_ln_gamma": "sp_id",
    "k_ln_gamma": "sp_id",
    "attn_qkv_w": "sp_head",
    "attn_qkv_b": "sp_head_b",
    "attn_qkv_s": "sp_head_s",
    "attn_o_w": "sp_0",
    "attn_o_b": "sp_id",
    "attn_o_s": "sp_0",
    "mla_fusedqkrope_w": "sp_id",
    "mla_fusedqkrope_s": "sp_id",
    "mla_fusedqkrope_no_lora_w": "sp_neg1_part_by_head",
    "mla_q_b_w": "sp_neg1",
    "mla_q_b_s": "sp_neg1",
    "mla_kv_b_w": "sp_neg1",
    "mla_kv_b_s": "sp_neg1",
    "mla_q_a_ln_gamma": "sp_id",
    "mla_kv_a_ln_gamma": "sp_id",
    "mla_kc": "sp_0",
    "mla_vc": "sp_0",
    "ffn_w13": "ffn_sp_neg1_w13",
    "ffn_b13": "ffn_sp_neg1_w13",
    "ffn_s13": "ffn_sp_neg1_w13",
    "ffn_w2": "ffn_sp_0",
    "ffn_b2": "sp_id",
    "ffn_s2": "ffn_sp_0",
    "shared_expert_gate": "sp_id",
    "moe_gate": "sp_id",
    "moe_w1": "sp_moe_w1",
    "moe_s1": "sp_moe_w1",
    "moe_w2": "sp_moe_neg1",
    "moe_s2": "sp_moe_neg1",
    "e_score_correction_b": "sp_id",
}

_OUT_IN = {"attn_qkv_w": "sp_head_gemm_a8", "attn_o_w": "sp_neg1", "ffn_w2": "ffn_sp_neg1"}
_BLOCKS = {"attn_o_s": "sp_neg1", "ffn_w13": "sp_0_w13", "ffn_s13": "sp_0_w13", "ffn_w2": "sp_neg1"}

TABLES: Mapping[str, Mapping[str, str]] = {
    "default": _DEFAULT,
    "int8": _DEFAULT
    | _OUT_IN
    | {"attn_qkv_s": "sp_head_s_gemm_a8", "attn_o_s": "sp_id", "ffn_s2": "sp_id"}
    | {"ffn_w13": "ffn_sp_0_w13", "ffn_s13": "ffn_sp_0_w13"},
    "fp8_tensor": _DEFAULT
    | _OUT_IN
    | {"ffn_w13": "sp_0_w13"}
    | dict.fromkeys(("attn_qkv_s", "attn_o_s", "ffn_s13", "ffn_s2"), "sp_id"),
    "fp8_block": _DEFAULT
    | _OUT_IN
    | _BLOCKS
    | {"attn_qkv_s": "sp_head_s_gemm_a8_block", "ffn_s2": "sp_neg1"}
    | dict.fromkeys(("mla_q_b_w", "mla_q_b_s", "mla_kv_b_w", "mla_kv_b_s"), "sp_0"),
    "fp8_channel": _DEFAULT
    | _OUT_IN
    | _BLOCKS
    | {"attn_qkv_s": "sp_head_s_gemm_a8_channel"}
    | dict.fromkeys(("attn_o_s", "ffn_s2", "moe_s2"), "sp_id"),
    "fp4_group": _DEFAULT
    | _OUT_IN
    | _BLOCKS
    | {"attn_qkv_w": "sp_head_s_gemm_a4", "attn_qkv_s": "sp_head_s_gemm_a4_group", "ffn_s2": "sp_neg1"},
}
"""How weights are stored -> W's name -> the strategy's name."""
