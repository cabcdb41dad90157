"""vLLM's door: `--load-format fastckpt` serves straight from a training checkpoint.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), possibly twice; only then
is anything of vLLM imported.
"""

from __future__ import annotations

LOAD_FORMAT = "fastckpt"


def register() -> None:
    """Enter the load format with vLLM; entering it again changes nothing."""
    from vllm.model_executor import model_loader  # type: ignore[import-not-found]

    from .vllm_loader import FastckptLoader

    if LOAD_FORMAT not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        model_loader.register_model_loader(LOAD_FORMAT)(FastckptLoader)
