"""SGLang's door: a loader class, which SGLang takes where the name of a load format stands.

    sglang.Engine(model_path=CHECKPOINT, load_format=fastckpt.engines.sglang.FastckptLoader)

Written from the interface of SGLang 0.5.23 (srt/model_loader/loader.py) and tested against a stub of it; it
was not run with SGLang itself. The same law as vllm_loader: every persistent tensor of the module is filled
and every tensor of the rank is used, or nothing is served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sglang  # type: ignore[import-not-found]
from sglang.srt.model_loader.loader import (  # type: ignore[import-not-found]
    DefaultModelLoader,
    post_load_weights,
)
from sglang.srt.runtime_context import get_parallel  # type: ignore[import-not-found]

from ..layouts.vllm import Vllm
from ..placement import Placement
from ..road import load_into
from .asked import Asked, refuse

if TYPE_CHECKING:
    import torch
    from sglang.srt.configs.device_config import DeviceConfig  # type: ignore[import-not-found]
    from sglang.srt.configs.load_config import LoadConfig  # type: ignore[import-not-found]
    from sglang.srt.configs.model_config import ModelConfig  # type: ignore[import-not-found]


class FastckptLoader(DefaultModelLoader):  # type: ignore[misc]
    """The model path is a training checkpoint that fastckpt reads, with the model's config.json in it; the
    extra config as in Asked. Tensor parallelism only."""

    def __init__(self, load_config: LoadConfig) -> None:
        # Not the parent's own, which refuses every key of the extra config but its own.
        self.load_config = load_config
        self.asked = Asked.of(load_config.model_loader_extra_config or {})

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: checkpoints are local."""

    def load_model(self, *, model_config: ModelConfig, device_config: DeviceConfig) -> torch.nn.Module:
        """The module that SGLang builds for this rank, filled.

        Raises SourceError for a checkpoint that cannot be read, RecipeError and LayoutError where it does not
        fit this model, this placement or this version of SGLang."""
        import torch

        parallel = get_parallel()
        refuse(
            {
                "quantization": model_config.quantization,
                "pp_size > 1": parallel.pp_size > 1,
                "moe_ep_size > 1": parallel.moe_ep_size > 1,
                "attention of another tp": parallel.attn_tp_size != parallel.tp_size,
            }
        )
        placement = Placement(tp=parallel.tp_size, rank=parallel.tp_rank)
        layout = Vllm(engine=self.asked.engine or f"sglang=={sglang.__version__}")
        model = self.initialize_model_for_startup(model_config=model_config, device_config=device_config)
        ckpt = self.asked.opened(model_config.model_path)
        config = model_config.hf_config.to_dict()
        load_into(model, ckpt, layout=layout, placement=placement, rank=placement.rank, config=config)
        post_load_weights(model)
        self.postprocess_weights(model, torch.device(device_config.device))
        filled: torch.nn.Module = model.eval()
        return filled
