"""What a Megatron run's own arguments say of its model and its grid.

Source: Megatron-LM, megatron/training/arguments.py (validate_args) and checkpointing.py
(load_args_from_checkpoint, check_checkpoint_args).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import JSON
from ..errors import SourceError
from .torchfile import Inert, type_name

FORMAT = "megatron"
"""The source's name."""

Args = Mapping[str, JSON]

OLDEST = 3.0
"""The first checkpoint_version whose files have the names and the order of rows that are read."""

KEPT = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention",
    "num_query_groups", "kv_channels", "num_experts", "moe_ffn_hidden_size", "vocab_size",
    "padded_vocab_size", "make_vocab_size_divisible_by", "untie_embeddings_and_output_weights",
    "rotary_interleaved", "rotary_base", "apply_layernorm_1p", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)  # fmt: skip


TURNED = ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")
"""Args under which rows of gate and up are stored block by block, in turn (transformer_config.py of 0.19)."""


def args_of(state: object) -> dict[str, JSON]:
    """Those of KEPT that a saved state's `args` say; none where it has no args (NeMo's).

    Raises SourceError for args that are no argparse.Namespace of plain values, for a state of Megatron before
    its checkpoint_version 3, and for an order of rows that no layout writes."""
    if not isinstance(state, dict):
        raise SourceError(f"wanted a dict, got {type_name(state)}")
    version = state.get("checkpoint_version", OLDEST)
    if not isinstance(version, int | float) or not version >= OLDEST:  # NaN is no version
        raise SourceError(
            f"checkpoint_version {version!r}: wanted {OLDEST} or later; Megatron-LM can load and save it anew"
        )
    args = state.get("args")
    if args is None:
        return {}
    if not isinstance(args, Inert) or not isinstance(args.state, dict):
        raise SourceError(f"args: wanted an argparse.Namespace, got {type_name(args)}")
    for key in TURNED:
        if args.state.get(key) is not None:
            raise SourceError(f"args: {key} {args.state[key]!r}: gate and up in turn are not read")
    said: dict[str, JSON] = {}
    for key in KEPT:
        value = args.state.get(key)
        if value is not None:
            if not isinstance(value, bool | int | float):
                raise SourceError(f"args: {key}: wanted a number or a bool, got {type_name(value)}")
            said[key] = value
    return said


def size(args: Args, key: str, default: int = 1) -> int:
    """A size that args may say. Raises SourceError where it is no positive number."""
    value = args.get(key, default)
    if type(value) is not int or value < 1:
        raise SourceError(f"args: {key} is {value!r}; wanted a number from 1 on")
    return value


def writer_of(state: object) -> tuple[int, int] | None:
    """(process, of how many) that wrote a rank's file, None where its args do not say, or where its processes
    are not in the default order (use_tp_pp_dp_mapping)."""
    args = state.get("args") if isinstance(state, dict) else None
    said = args.state if isinstance(args, Inert) and isinstance(args.state, dict) else {}
    process, world = said.get("rank"), said.get("world_size")
    if said.get("use_tp_pp_dp_mapping") or type(process) is not int or type(world) is not int:
        return None
    return process, world
