"""How a quantised checkpoint of the hub stores its matrices, by `quantization_config` in its config.json.

These forms are read: fp8 with a scale for each matrix or block (DeepSeek-V3's form); compressed-tensors' int8
and fp8 with a scale for each matrix, output or block, mxfp8 and mxfp4; packed integers of compressed-tensors,
AWQ and GPTQ.
Every other is refused by name. Source: transformers' quantization_config classes, compressed-tensors'
QuantizationScheme, AutoAWQ's WQLinear_GEMM and AutoGPTQ's QuantLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..checkpoint import JSON
from ..errors import RecipeError
from ..quantisation.schemes import said_form

Form = Literal["matrix", "transposed", "vector", "scalar"]
Elements = Literal["floats", "exponents", "integers"]


class StoredBeside(NamedTuple):
    """A tensor beside a quantised matrix: its name below the module, how many outputs and inputs share one of
    its elements (0: all), and the forms in which the hub may store it; `needed`: it must be there;
    `elements`: what it holds, exponents in bytes."""

    leaf: str
    unit: tuple[int, int]
    forms: tuple[Form, ...]
    needed: bool = True
    elements: Elements = "floats"


@dataclass(frozen=True, slots=True)
class Quantised:
    """`beside`: the tensors beside a matrix. `leaf`: the matrix's name below its module. `packed`: how many
    outputs and inputs one int32 of it holds, or with (1, 2) one byte ((1, 1): a value is a byte, not packed).
    `transposed`: it is stored [in, out]. `shape`: the name below the module of a tensor of its outputs and
    inputs, "" for none."""

    beside: tuple[StoredBeside, ...]
    leaf: str = "weight"
    packed: tuple[int, int] = (1, 1)
    transposed: bool = False
    shape: str = ""


_INPUT = StoredBeside("input_scale", (0, 0), ("scalar", "vector"), needed=False)
_SMOOTHER = StoredBeside("smoother", (0, 1), ("vector",), needed=False)
_SHIFT = StoredBeside("shift", (0, 1), ("vector",), needed=False)


def quantised(config: Mapping[str, JSON]) -> Quantised | None:
    """How a config says that matrices are quantised, None where it does not. Raises RecipeError."""
    said = config.get("quantization_config")
    if said is None:
        return None
    if not isinstance(said, dict):
        raise _unread(said)
    match said.get("quant_method"):
        case "fp8":
            return _fp8(said)
        case "compressed-tensors":
            return _compressed(said)
        case "awq":
            return _awq(said)
        case "gptq":
            return _gptq(said)
    raise _unread(said)


def _unread(said: JSON | Mapping[str, JSON]) -> RecipeError:
    return RecipeError(
        f"config: quantization_config {said!r} is not read; read are fp8 by matrix or block, "
        "compressed-tensors int8 and fp8 by matrix, output or block, packed integers, mxfp4 and mxfp8, awq "
        "and gptq, both without an order of their inputs"
    )


def _fp8(said: Mapping[str, JSON]) -> Quantised:
    match said.get("weight_block_size"):
        case None:
            return Quantised((StoredBeside("weight_scale", (0, 0), ("scalar", "vector")), _INPUT))
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Quantised((StoredBeside("weight_scale_inv", (rows, columns), ("matrix",)),))
    raise _unread(said)


def _compressed(said: Mapping[str, JSON]) -> Quantised:
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or said.get("transform_config"):  # of turned weights
        raise _unread(said)
    weights = [g.get("weights") if isinstance(g, dict) else None for g in groups.values()]
    first = weights[0] if weights else None
    if not isinstance(first, dict) or any(w != first for w in weights):
        raise _unread(said)
    match said.get("format"):
        case "pack-quantized":
            return _packed(said, first)
        case "mxfp4-pack-quantized" | "mxfp8-quantized" as form:
            return _microscaled(said, first, form)
    if first.get("num_bits") != 8 or first.get("symmetric") is not True:
        raise _unread(said)
    extra = (_INPUT, _SMOOTHER, _SHIFT)
    match first.get("strategy"), first.get("block_structure"):
        case "tensor", _:
            return Quantised((StoredBeside("weight_scale", (0, 0), ("scalar", "vector")), *extra))
        case "channel", _:
            return Quantised((StoredBeside("weight_scale", (1, 0), ("matrix", "vector")), *extra))
        case "block", [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Quantised((StoredBeside("weight_scale", (rows, columns), ("matrix",)),))
    raise _unread(said)


def _packed(said: Mapping[str, JSON], weights: Mapping[str, JSON]) -> Quantised:
    """compressed-tensors' integers in int32, by groups or outputs. An order of the inputs that was undone
    ("static", "weight") leaves no trace; one that was not has a tensor of its own (weight_g_idx)."""
    group = -1 if weights.get("strategy") == "channel" else weights.get("group_size")
    symmetric, order = weights.get("symmetric"), weights.get("actorder")
    ordered = order not in (None, False, "static", "weight")
    if weights.get("type") != "int" or not isinstance(symmetric, bool) or ordered:
        raise _unread(said)
    if weights.get("strategy") not in ("group", "channel"):
        raise _unread(said)
    each, group = _packing(said, weights.get("num_bits"), group)
    scale = StoredBeside("weight_scale", (1, group), ("matrix",))
    zero = StoredBeside("weight_zero_point", (each, group), ("matrix",), elements="integers")
    beside = (scale,) if symmetric else (scale, zero)
    return Quantised(beside, "weight_packed", (1, each), shape="weight_shape")


def _microscaled(said: Mapping[str, JSON], weights: Mapping[str, JSON], form: str) -> Quantised:
    """compressed-tensors' floats of four or eight bits, an exponent for 32 inputs."""
    bits = 4 if form.startswith("mxfp4") else 8
    wanted = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    if any(weights.get(key) != value for key, value in wanted.items()):
        raise _unread(said)
    scale = StoredBeside("weight_scale", (1, 32), ("matrix",), elements="exponents")
    return Quantised((scale,), "weight_packed", (1, 2)) if bits == 4 else Quantised((scale,))


def _packing(said: Mapping[str, JSON], bits: JSON, group: JSON) -> tuple[int, int]:
    """(values in an int32, inputs that share a scale; 0: all)."""
    if bits not in (4, 8) or not isinstance(bits, int) or not isinstance(group, int) or group == 0:
        raise _unread(said)
    return 32 // bits, max(group, 0)


def _zeros(each: int, group: int) -> StoredBeside:
    """AWQ's and GPTQ's zero points."""
    return StoredBeside("qzeros", (each, group), ("transposed",), elements="integers")


def _awq(said: Mapping[str, JSON]) -> Quantised:
    each, group = _packing(said, said.get("bits"), said.get("group_size"))
    if said_form(said, "version") not in (None, "gemm") or said.get("zero_point", True) is not True:
        raise _unread(said)
    beside = _zeros(each, group), StoredBeside("scales", (1, group), ("transposed",))
    return Quantised(beside, "qweight", (each, 1), True)


def _gptq(said: Mapping[str, JSON]) -> Quantised:
    each, group = _packing(said, said.get("bits"), said.get("group_size"))
    known = said_form(said, "checkpoint_format") in (None, "gptq", "gptq_v2")
    if said.get("desc_act") is True or not known:
        raise _unread(said)
    beside = (
        _zeros(each, group),
        StoredBeside("scales", (1, group), ("transposed",)),
        StoredBeside("g_idx", (0, 1), ("vector",), needed=False, elements="integers"),
    )
    return Quantised(beside, "qweight", (1, each), True)
