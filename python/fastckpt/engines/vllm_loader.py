"""The loader vLLM calls: the module's own parameters are filled in place, each rank reading only its bytes.

Law: every persistent tensor of the module is filled and every tensor of the rank is used. A name, a shape, a
placement or a version that the layout does not know is an error, and nothing is served.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
import vllm  # type: ignore[import-not-found]
from vllm.config import get_current_vllm_config  # type: ignore[import-not-found]
from vllm.distributed import get_pp_group, get_tp_group  # type: ignore[import-not-found]
from vllm.model_executor.layers.fusion.mm_input_norm import (  # type: ignore[import-not-found]
    FusedMMInputNorm,
)
from vllm.model_executor.model_loader import BaseModelLoader  # type: ignore[import-not-found]

from ..checkpoint import Checkpoint
from ..layouts.vllm import Vllm
from ..placement import Placement
from ..road import load_into
from .asked import Asked, refuse

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, ParallelConfig

log = logging.getLogger("vllm.fastckpt")


class FastckptLoader(BaseModelLoader):  # type: ignore[misc]
    """`--load-format fastckpt`. The model directory is a training checkpoint that fastckpt reads, with the
    model's config.json (and, for text, its tokenizer) in it; `--model-loader-extra-config` as in Asked."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.asked = Asked.of(load_config.model_loader_extra_config)

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: checkpoints are local."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill the module that vLLM built for this rank.

        Raises SourceError for a checkpoint that cannot be read, RecipeError and LayoutError where it does not
        fit this model, this placement or this version of vLLM."""
        start = time.perf_counter()
        parallel = get_current_vllm_config().parallel_config
        refuse(unknown(model_config, parallel))
        placement = placement_of(model_config, parallel)
        ckpt = self.asked.opened(model_config.model)
        give_bias(model, ckpt, self.load_config.device)
        leave_norms_of_pixels(model)
        seeing = model_config.multimodal_config
        layout = Vllm(
            engine=self.asked.engine or f"vllm=={vllm.__version__}",
            experts=parallel.expert_placement_strategy,
            tower="whole" if seeing is not None and seeing.mm_encoder_tp_mode == "data" else "cut",
        )
        # vLLM's config, not the one beside the checkpoint: it is the one this module was built by.
        config = model_config.hf_config.to_dict()
        load_into(model, ckpt, layout=layout, placement=placement, rank=placement.rank, config=config)
        log.info(
            "fastckpt: %s %s, rank %d of %d, loaded in %.2f s",
            ckpt.format,
            ckpt.path,
            placement.rank,
            placement.world,
            time.perf_counter() - start,
        )


def give_bias(model: torch.nn.Module, ckpt: Checkpoint, device: str | None) -> None:
    """Make the head's bias, where the checkpoint has one and the module is of vLLM's Transformers backend,
    which makes it only when its own loader meets it (TransformersForCausalLM.load_weights)."""
    head = getattr(model, "lm_head", None)
    if head is not None and "lm_head.bias" in ckpt.entries and getattr(head, "bias", head) is None:
        with torch.device(device or get_current_vllm_config().device_config.device):
            head._register_bias()


def leave_norms_of_pixels(model: torch.nn.Module) -> None:
    """What vLLM makes of the image processor's config, and no checkpoint holds, is no longer persistent."""
    for module in model.modules():
        if isinstance(module, FusedMMInputNorm):
            for name, buffer in tuple(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)


def placement_of(model_config: ModelConfig, parallel: ParallelConfig) -> Placement:
    """Where this process stands, in vLLM's order of ranks."""
    tp, pp, dp = get_tp_group(), get_pp_group(), parallel.data_parallel_size
    ranks = tp.world_size * dp
    shared = parallel.enable_expert_parallel and model_config.get_num_experts() > 0
    rank = (pp.rank_in_group * dp + parallel.data_parallel_rank) * tp.world_size + tp.rank_in_group
    return Placement(tp=tp.world_size, pp=pp.world_size, dp=dp, ep=ranks if shared else 1, rank=rank)


def unknown(model_config: ModelConfig, parallel: ParallelConfig) -> dict[str, object]:
    """What would make tensors of this module another's than the layout's: name -> what was asked."""
    configs = (model_config.hf_config, model_config.hf_text_config)  # as vLLM looks for it
    told = (getattr(config, "quantization_config", None) for config in configs)
    stored: dict[str, object] = next(filter(None, told), {})
    method = stored.get("quant_method")  # vLLM's own word for AWQ and GPTQ begins with auto_
    other = None if model_config.quantization in (method, f"auto_{method}") else model_config.quantization
    return {
        "quantization of what is stored otherwise": other,
        "enable_eplb": parallel.enable_eplb,
        "prefill_context_parallel_size > 1": parallel.prefill_context_parallel_size > 1,
    }
