"""Greedy tokens from a vLLM engine: python vllm_generate.py '{"model": DIR, "tensor_parallel_size": 2, ...}'.

Takes what vLLM's LLM takes besides the defaults below, and prints a line "GENERATED " + JSON: tokens and
their log probabilities. The prompts are token ids, so no tokenizer is needed.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
PROMPTS = ([5, 17, 301, 42], [7, 7, 99], [250, 3, 8, 120, 64, 33, 12])


def main(asked: dict) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        skip_tokenizer_init=True, max_model_len=64, enforce_eager=True, dtype="bfloat16", seed=0, **asked
    )
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=1)
    made = llm.generate([{"prompt_token_ids": list(p)} for p in PROMPTS], greedy, use_tqdm=False)
    tokens = [list(m.outputs[0].token_ids) for m in made]
    scores = [m.outputs[0].cumulative_logprob for m in made]
    print("GENERATED " + json.dumps({"tokens": tokens, "scores": scores}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
