"""What megatron-core needs so that a GPTModel of its own modules is built and run without a GPU."""

from __future__ import annotations

import torch
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils


def enable() -> None:
    """Put stand-ins in the place of what wants CUDA or Transformer Engine."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # latent attention's tables ask for it
    begin = DotProductAttention.__init__

    def plain(self, *args, k_channels=None, v_channels=None, **kwargs):
        """megatron's own attention without weights, which latent attention is built with and cannot run."""
        begin(self, *args, **kwargs)

    DotProductAttention.__init__ = plain
    for absent in ("TELinear", "TEColumnParallelLinear"):
        if not isinstance(getattr(multi_latent_attention, absent), type):
            setattr(multi_latent_attention, absent, type(absent, (), {}))
    moe_utils.te_general_gemm = None  # the router's own product
