"""Greedy tokens from vLLM engines at TP = 2: python vllm_generate.py '[{"model": DIR, ...}, ...]'.

Each object holds what vLLM's LLM takes besides the defaults below; the engines run one after another, in
two processes that are vLLM's two ranks, since starting them takes longer than all the rest. Prints a line
"GENERATED " + JSON for each engine: tokens and their log probabilities, or {"error": traceback}. The prompts
are token ids, so no tokenizer is needed.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import traceback

import without_torchvision  # noqa: F401

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
}  # fmt: skip
PROMPTS = ([5, 17, 301, 42], [7, 7, 99], [250, 3, 8, 120, 64, 33, 12])
WORLD = 2


def generated(asked: dict) -> dict:
    """What one engine makes of the prompts."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        skip_tokenizer_init=True, max_model_len=64, enforce_eager=True, dtype="bfloat16", seed=0,
        tensor_parallel_size=WORLD, distributed_executor_backend="external_launcher",
        num_gpu_blocks_override=32, **asked,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=1)
    made = llm.generate([{"prompt_token_ids": list(p)} for p in PROMPTS], greedy, use_tqdm=False)
    tokens = [list(m.outputs[0].token_ids) for m in made]
    return {"tokens": tokens, "scores": [m.outputs[0].cumulative_logprob for m in made]}


def rank(index: int, ports: list[int], engines: list[dict]) -> None:
    """One rank of every engine."""
    os.environ |= {
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1"
    }  # fmt: skip
    from vllm.distributed import destroy_model_parallel
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    # Ranks that were started from outside have no name of their own for the memory they share.
    name = _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(lambda of: f"/{ports[0]}{name(of).lstrip('/')}")

    for port, asked in zip(ports, engines, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # on one port a rank could meet the engine of before
        try:
            told = generated(asked)
        except Exception:  # the next engine is asked all the same; the test reads what this one says
            told = {"error": traceback.format_exc()}
        gc.collect()  # the engine of before and its cache
        destroy_model_parallel()  # only a mixture of experts gets a group of expert parallelism
        if index == 0:
            # In one go: the other rank logs there too.
            os.write(1, f"\nGENERATED {json.dumps(told)}\n".encode())


def main(engines: list[dict]) -> None:
    """Start the ranks and wait for them."""
    import multiprocessing

    sockets = [socket.socket() for _ in engines]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    start = multiprocessing.get_context("spawn").Process
    ranks = [start(target=rank, args=(r, ports, engines)) for r in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
