"""What config.json says of quantised matrices, so that every loader knows them from those that stay dense.

Law: a loader takes for quantised what it is not told of, so every matrix that stays dense is named, as that
loader calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..checkpoint import JSON
from ..errors import LayoutError
from .schemes import Quant, Scheme, said_of, tower


def quantization_config(quant: Quant, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, JSON]:
    """The `quantization_config` of config.json for dense matrices of these names and shapes, in the words of
    the scheme's format; one that only fastckpt reads gets a `quant_method` that loaders do not know and so
    refuse."""
    scheme = quant.scheme
    if any(name.endswith("hc_head_fn") for name in shapes):
        raise LayoutError(
            f"quant {scheme.name}: DeepSeek-V4's modules go by other names in transformers than in its "
            "files, so that no config.json says which of them stay dense"
        )
    dense = _Dense.of(quant, shapes)
    match scheme.format:
        case "":
            return {"quant_method": "fastckpt", "scheme": scheme.name}
        case "fp8":
            return _fp8(scheme, dense)
        case "mxfp4":
            return {"quant_method": "mxfp4", "modules_to_not_convert": [*GPT_OSS_DENSE]}
        case "awq":
            return _awq(scheme, dense)
        case "gptq":
            return _gptq(scheme, dense, head="lm_head.weight" in shapes)
    return _compressed(quant, shapes, dense)


@dataclass(frozen=True, slots=True)
class _Dense:
    """The modules that stay dense. `files`: as the files name them; `plain`: those of them in no tower;
    `roots`: the towers of the others. Files call a tower's modules otherwise than transformers' models do:
    `towers` are patterns that find them by both names. `heads`: output layers that files do not name."""

    files: tuple[str, ...]
    plain: tuple[str, ...]
    roots: tuple[str, ...]
    towers: tuple[str, ...]
    heads: tuple[str, ...]

    @staticmethod
    def of(quant: Quant, shapes: Mapping[str, tuple[int, ...]]) -> _Dense:
        matrices = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
        files = [n.removesuffix(".weight") for n in matrices if not quant.takes(n, shapes[n])]
        files += [name.replace(*FORGETS) for name in files if FORGETS[0] in name]
        roots = [root for root in dict.fromkeys(map(tower, files)) if root]
        heads = [
            head
            for head, of in HEADS.items()
            if f"{head}.weight" not in shapes and any(name.startswith(of) for name in shapes)
        ]
        return _Dense(
            files=tuple(files),
            plain=tuple(name for name in files if not tower(name)),
            roots=tuple(roots),
            towers=tuple(rf"(.*\.)?{root}\..*" for root in roots),
            heads=tuple(heads),
        )


def _fp8(scheme: Scheme, dense: _Dense) -> dict[str, JSON]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(scheme.block),
        "modules_to_not_convert": [*dense.files, *dense.heads, *_fused(dense.files)],
    }


GPT_OSS_DENSE = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
"""What gpt-oss's own files say that stays dense."""


def _fused(names: Iterable[str]) -> list[str]:
    """What vLLM calls the modules of towers where it fuses them: of some families it does not know what of.

    Read by its fp8 alone, which takes names as they are (quant_utils.is_layer_skipped of 0.32)."""
    ends = ((".q_proj", ".qkv_proj"), (".gate_proj", ".gate_up_proj"))
    return [n.replace(*end) for n in names for end in ends if tower(n) and n.endswith(end[0])]


def _awq(scheme: Scheme, dense: _Dense) -> dict[str, JSON]:
    return {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.block[0],
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*dense.plain, *dense.roots, *dense.towers],
    }


def _gptq(scheme: Scheme, dense: _Dense, *, head: bool) -> dict[str, JSON]:
    """`head`: the model has an lm_head, of which a key of its own tells; of every other dense module a
    negative pattern does."""
    names = [re.escape(name) for name in dense.plain if name != "lm_head"]
    skipped: dict[str, JSON] = {f"-:^{name}$": {} for name in (*names, *dense.towers)}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.block[0],
        "desc_act": False,
        "sym": not scheme.asymmetric,
        "lm_head": head and "lm_head" not in dense.plain,
        "dynamic": skipped,
    }


FORGETS = (".self_attn.f_", ".self_attn.forget_gate.f_")
"""A part of the names of Kimi Linear's files, and what transformers' modules have there."""

HEADS = {
    "lm_head": "",
    "lm_head.decoder": "lm_head.dense.",
    "cls.predictions.decoder": "cls.predictions.",
    "proj_out": "model.decoder.",
    "decoder": "head.norm.",
}
"""transformers' output layers -> how a name in models that have them begins. Files may not name them (tied
ones lie in none, GPT-NeoX's is called embed_out there), but compressed-tensors and transformers' fp8 take
every Linear of a model for quantised that is not ignored."""


def _compressed(quant: Quant, shapes: Mapping[str, tuple[int, ...]], dense: _Dense) -> dict[str, JSON]:
    scheme, left = quant.scheme, [*dense.plain, *(f"re:{pattern}" for pattern in dense.towers), *dense.heads]
    if "model.norm.bias" in shapes:  # Phi-3.5-MoE: transformers calls its routers so; Mixtral's are no Linear
        gates = [name for name in left if name.endswith(".block_sparse_moe.gate")]
        left = left + [name.replace(".block_sparse_moe.gate", ".mlp.router") for name in gates]
    root = "backbone."  # Nemotron-H: transformers calls it model
    left = left + [f"model.{name.removeprefix(root)}" for name in left if name.startswith(root)]
    # Of those that were asked for a loader may have some that are called otherwise than Linear (vLLM's
    # ParallelLMHead).
    asked = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if quant.takes(name, shape) and not quant.knows(name)
    ]
    kind = "float" if scheme.kind in ("float8_e4m3fn", "pairs4") else "int"
    strategy = {(0, 0): "tensor", (1, 0): "channel"}.get(scheme.block, "group")
    weights: dict[str, JSON] = {
        "num_bits": scheme.bits,
        "type": kind,
        "symmetric": not scheme.asymmetric,
        "strategy": strategy,
        "dynamic": False,
    }
    inputs: dict[str, JSON] | None = None
    if strategy == "group":
        weights["group_size"] = scheme.block[1]
        if scheme.microscaled:
            weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    else:
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    group: dict[str, JSON] = {"targets": ["Linear", *asked], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*left],
    }


def served_config(config: Mapping[str, JSON], names: Iterable[str]) -> dict[str, JSON]:
    """What config.json must also say for vLLM. Of GPTQ, which of the hub's modules are quantised: else vLLM
    looks for them among the names in the files, where modules are fused. Of fp8 and AWQ, how vLLM calls those
    of a tower that are not, where newer files have its layers right in `vision_tower`."""
    said = said_of(config)
    if not isinstance(said, dict):
        return {}
    left = said.get("modules_to_not_convert")
    if isinstance(left, list):
        inside = [str(name).replace(*INSIDE) for name in left if INSIDE[0] in str(name)]
        return {"quantization_config": {**said, "modules_to_not_convert": [*left, *inside]}} if inside else {}
    if said.get("quant_method") != "gptq" or said.get("modules_in_block_to_quantize"):
        return {}
    modules: list[JSON] = [
        n.removesuffix(".qweight") for n in names if n.endswith(".qweight") and ".experts." not in n
    ]
    return {"quantization_config": {**said, "modules_in_block_to_quantize": modules}}


INSIDE = ("vision_tower.encoder.", "vision_tower.vision_model.encoder.")
"""Where the layers of a tower of CLIP's kin lie in newer files, and in vLLM."""
