"""An option that could change nothing is refused; every option of every layout has its line here."""

from __future__ import annotations

import dataclasses

import pytest
from fastckpt.errors import LayoutError
from fastckpt.layouts import LAYOUTS, layout
from fastckpt.placement import Placement
from layouts import families, test_families, test_layouts

REFUSED = [
    ("hf", "split_experts", "true", "granite", "experts in stacks that loaders also take one by one, which"),
    ("hf", "split_experts", "true", "qwen3_moe", "experts in stacks that .*, which qwen3_moe has not"),
    ("hf", "split_experts", "true", "granitemoe", "experts in stacks that .*, which granitemoe has not"),
    ("hf", "split_experts", "true", "gpt_oss", "experts in stacks that .*, which gpt_oss has not"),
    ("vllm", "experts", "round_robin", "qwen3_moe", "ep above 1, got 1"),
    ("vllm", "gate_up", "up_gate", "phi3", "experts of gate and up, which phi3 has not"),
    ("vllm", "gate_up", "up_gate", "gpt_oss", "experts of gate and up, which gpt_oss has not"),
    ("vllm", "tower", "whole", "granite", "one of exaone4_5, glm4v"),
    ("megatron", "experts", "sequential", "granite", "experts, which granite has not"),
    ("megatron", "expert_tp", "1", "granite", "experts, which granite has not"),
    ("megatron", "first_stage", "1", "granite", "pp above 1, got 1"),
    ("megatron", "last_stage", "1", "granite", "pp above 1, got 1"),
    ("rtp_llm", "absorb", "false", "granite", "latent attention, which granite has not"),
    ("rtp_llm", "split_rope", "true", "granite", "latent attention, which granite has not"),
    ("rtp_llm", "rope_positions", "9", "granite", "latent attention with plain or YaRN positions, which"),
    ("rtp_llm", "w13", "false", "bloom", "dense blocks of gate and up, in this order, which bloom has not"),
    ("rtp_llm", "w13", "false", "mixtral", "dense blocks of gate and up, in this order, which mixtral"),
    ("rtp_llm", "ffn_tp", "1", "mixtral", "dense blocks, which mixtral has not"),
    ("rtp_llm", "use_stack_weight", "false", "granite", "experts, which granite has not"),
    ("rtp_llm", "physical_experts", "8", "granite", "experts, which granite has not"),
    ("rtp_llm", "nodes", "2", "qwen3_moe", "more physical_experts than experts"),
    ("rtp_llm", "one_scale", "true", "granite", "fp8 with one scale a matrix, which granite has not"),
    ("rtp_llm", "one_scale", "true", "deepseek_v3", "fp8 with one scale a matrix, which deepseek_v3"),
]
"""(layout, option, value, a model without what it speaks of, what the message wants)."""

EVERYWHERE = {
    "same": {"container"},
    "hf": {"replicate_kv", "pad", "multiple", "vocab_padding"},
    "vllm": {"vocab_padding", "pad", "multiple", "engine"},
    "rtp_llm": set(),
    "megatron": {"vocab_padding", "spec", "zero_centered_gamma"},
}
"""What every model has, or an option that allows something; zero_centered_gamma is held to the norms."""


def model_of(name):
    return test_families.model_of(name) if name in families.FAMILIES else test_layouts.model_of(name)[0]


@pytest.mark.parametrize(("name", "option", "value", "model", "wanted"), REFUSED)
def test_refused_before_the_first_tensor(name, option, value, model, wanted):
    with pytest.raises(LayoutError, match=f"^layout {name}: {option}={value} wants {wanted}"):
        layout(name, {option: value}).targets(model_of(model), Placement())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_option_is_here(name):
    fields = {f.name for f in dataclasses.fields(layout(name))}
    assert fields == EVERYWHERE[name] | {option for n, option, *_ in REFUSED if n == name}


def test_a_default_may_be_said():
    """A default that is written out asks for nothing."""
    layout("rtp_llm", {"split_rope": "false", "nodes": "1"}).targets(model_of("granite"), Placement())
