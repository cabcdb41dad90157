"""Writes an adapter with PEFT itself, the base it goes with, and what PEFT's own merge makes of both.

    python make_peft.py DIR

DIR gets base/, adapter/, merged.safetensors and trained.safetensors (the adapted model's state in training).
The tests do not need peft: what this wrote, with the versions in made.json, is in tests/fixtures/peft.
Weights are small whole numbers and scales powers of two, so that PEFT's arithmetic in float32 is exact.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def whole_numbers(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for x in module.state_dict().values():
            x.copy_(torch.randint(-4, 5, x.shape))


def main(out: Path) -> None:
    torch.manual_seed(11)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, attention_bias=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    whole_numbers(model)
    model.save_pretrained(out / "base")
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"], bias="lora_only",
        modules_to_save=["lm_head"], rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 2}, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model, lora)
    whole_numbers(adapted)
    base = LlamaForCausalLM.from_pretrained(out / "base").state_dict()
    state = adapted.state_dict()
    with torch.no_grad():  # the base stays what was saved, but for what the adapter trains of it
        for name, x in state.items():
            inner = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            inner = inner.replace(".original_module.", ".")
            if inner in base and not name.endswith(".base_layer.bias"):
                x.copy_(base[inner])
    adapted.save_pretrained(out / "adapter")
    (out / "adapter" / "README.md").unlink(missing_ok=True)
    save_file({n: x.contiguous().clone() for n, x in state.items()}, out / "trained.safetensors")
    merged = adapted.merge_and_unload().state_dict()
    save_file({n: x.contiguous().clone() for n, x in merged.items()}, out / "merged.safetensors")
    versions = {p: metadata.version(p) for p in ("peft", "transformers", "torch")}
    (out / "made.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
