"""Greedy tokens from vLLM engines, one after another: vllm_generate.py TP JOBS, a JSON list of objects.

Each job is what vLLM's LLM takes besides the defaults below, and a "job" name. Prints a JSON line a job: its
tokens and their log probabilities, or "error". The prompts are token ids, so no tokenizer is needed; the
ranks are processes of this script's (vLLM's external_launcher), because starting one costs more than a job.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
PROMPTS = ([5, 17, 301, 42], [7, 7, 99], [250, 3, 8, 120, 64, 33, 12])


def generated(asked: dict, tp: int) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import destroy_model_parallel

    try:
        destroy_model_parallel()  # of the job before: only a mixture of experts has a group for its experts
        llm = LLM(
            skip_tokenizer_init=True, max_model_len=64, enforce_eager=True, dtype="bfloat16", seed=0,
            tensor_parallel_size=tp, distributed_executor_backend="external_launcher", **asked,
        )  # fmt: skip
        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=1)
        made = llm.generate([{"prompt_token_ids": list(p)} for p in PROMPTS], greedy, use_tqdm=False)
        told = {
            "tokens": [list(m.outputs[0].token_ids) for m in made],
            "scores": [m.outputs[0].cumulative_logprob for m in made],
        }
    except Exception:  # whatever stops one job is told, and the next one tried
        return {"error": traceback.format_exc()}
    return told


def rank(index: int, tp: int, port: int, jobs: list[dict]) -> None:
    os.environ |= {
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(tp), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    for asked in jobs:
        job = asked.pop("job")
        told = generated(asked, tp)
        if index == 0 or "error" in told:
            print("JOB " + json.dumps({"job": job, "rank": index} | told), flush=True)


def main(tp: int, jobs: list[dict]) -> None:
    import multiprocessing

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ["VLLM_DIST_IDENT"] = str(port)
    start = multiprocessing.get_context("spawn").Process
    ranks = [start(target=rank, args=(r, tp, port, jobs)) for r in range(tp)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
