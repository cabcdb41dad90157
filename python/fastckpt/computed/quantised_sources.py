"""A checkpoint's quantised matrices: which stored tensors belong together, and all of it with them dense.

Law: the names of tensors and quantization_config tell; what they do not tell is a SourceError.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from .. import dtypes
from ..checkpoint import JSON, Checkpoint, Entry, Single, moved
from ..dtypes import DType, exact
from ..errors import LayoutError, SourceError
from ..extents import Extents
from ..quantisation.rounding import DENSE
from ..quantisation.schemes import Packed, said_form, said_of
from ..quantisation.unrounding import per_element
from ..views import View
from .dequantised import Dequantised
from .nowhere import nowhere, pitched

KNOWN = ("fp8", "compressed-tensors", "modelopt", "awq", "gptq", "mxfp4", "fastckpt")
"""The `quant_method`s that are read."""

MODELOPT = "hf_quant_config.json"
"""What ModelOpt says beside config.json, or in its place: that matrices are quantised."""

WITH_EXPONENTS = ("pairs4", "float8_e4m3fn", "float8_e5m2")
"""The kinds of values of which 32 may share an exponent (OCP MX)."""


def densified(
    ckpt: Checkpoint, config: Mapping[str, JSON] | None, dtype: DType | None
) -> tuple[Checkpoint, dict[str, JSON] | None]:
    """The checkpoint with every quantised matrix as a dense one, and its config without quantization_config.

    `dtype`: of the dense matrices; None: the one the config names, else bfloat16. Raises SourceError where
    nothing is quantised, or something is in a way that is not read."""
    dense_config = None if config is None else _dense_config(config)
    quantization = said_of(config or {})
    found = {p.name: p for p in _found(ckpt, quantization if isinstance(quantization, dict) else {})}
    if not found:
        raise SourceError(f"{ckpt.path}: quant none: no tensor of it is quantised in a way that is read")
    for p in found.values():
        exponents = p.scales.dtype is dtypes.uint8 and p.shared == (1, 32) and p.kind in WITH_EXPONENTS
        if not exponents and p.whole is None and p.scales.dtype not in DENSE:
            read = ", ".join(d.name for d in DENSE)
            raise SourceError(f"{p.name}: scales of {p.scales.dtype} are not read, only of {read}")
    named = dtypes.of_config(dense_config or {})  # which may be fp8, as what is quantised is stored
    dense = dtype or (named if named in DENSE else dtypes.bfloat16)
    first = len(ckpt.extents)
    made = (nowhere(p, p.shape, dtypes.float32, p.name) for p in found.values())
    extents = Extents((*ckpt.extents, *made))
    index = {name: first + i for i, name in enumerate(found)}
    parts = {part: p.name for p in found.values() for part in _names(ckpt, p.name)}
    entries: dict[str, Entry] = {}
    for name, entry in ckpt.entries.items():
        owner = parts.get(name)
        if owner is None:
            entries[name] = moved(entry, extents)
        elif owner not in entries:
            build = _dense(extents, index[owner], found[owner], dense)
            entries[owner] = Single(found[owner].dense_shape, dense, build, entry.kind)
    for alias, holder in ckpt.aliases.items():
        if holder in parts:
            raise SourceError(f"{ckpt.path}: {alias} is tied to {holder}, which is quantised: not read")
    beside = tuple(f for f in ckpt.beside if os.path.basename(f.path) != MODELOPT)
    return replace(ckpt, entries=entries, extents=extents, config=dense_config, beside=beside), dense_config


def _dense_config(config: Mapping[str, JSON]) -> dict[str, JSON]:
    """A config that does not speak of quantised matrices, nor does its decoder's."""
    dense = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(within := config.get("text_config"), dict):
        dense["text_config"] = {key: value for key, value in within.items() if key != "quantization_config"}
    return dense


def _dense(extents: Extents, at: int, matrix: Dequantised, dtype: DType) -> Callable[[], View]:
    def build() -> View:
        view = pitched(extents, at, dtypes.float32, matrix.shape).cast(dtype)
        if not matrix.experts:
            return view
        return view.split(0, matrix.shape[0] // matrix.experts).permute((0, 2, 1))

    return build


BEHIND = (
    "", "_scale_inv", "_scale", "_zero_point", "_packed", "_shape", "_global_scale", "_scale_2", "_blocks",
    "_scales",
)  # fmt: skip
"""What a quantised matrix's tensors are called behind its name."""

INSTEAD = (
    "qweight", "qzeros", "scales", "g_idx", "input_scale", "input_zero_point", "activation_scale",
    "input_global_scale", "k_scale", "v_scale",
)  # fmt: skip
"""What they are called in place of `weight`; those of the input and of a cache mean nothing to a dense
matrix."""


def require_as_stored(ckpt: Checkpoint, dtype: DType, *, scales: bool) -> None:
    """Raises LayoutError where `dtype` for all floats would cast the values of a quantised matrix, which mean
    nothing without their scales, or with `scales` round what goes with them."""
    for matrix, part in of_matrices(ckpt):
        held = ckpt.entries[part].dtype
        if held.kind != "float" or held is dtype or (part != matrix and (exact(held, dtype) or not scales)):
            continue
        raise LayoutError(
            f"{part} is quantised, so its bytes cannot become {dtype}; ask for no dtype{instead(ckpt.config)}"
        )


def instead(config: Mapping[str, JSON] | None) -> str:
    """What a message adds where a quantised source is in the way: how it is made dense, if it can be."""
    quantization = said_of(config or {})
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None or method in KNOWN:
        return '; quant="none" (--quant none) makes dense weights'
    return f"; quant_method {method!r} cannot be made dense here, only {', '.join(KNOWN)} can"


def of_matrices(ckpt: Checkpoint) -> Iterator[tuple[str, str]]:
    """(matrix, stored tensor) of all that is quantised, by their names alone."""
    for name in ckpt.entries:
        if name.endswith("qweight"):
            matrix = name.removesuffix("qweight") + "weight"
        elif name.endswith(("_scale", "_scale_inv")):
            matrix = name.removesuffix("_inv").removesuffix("_scale")
            if matrix not in ckpt.entries and f"{matrix}_packed" not in ckpt.entries:
                continue
        else:
            continue
        yield from ((matrix, part) for part in _names(ckpt, matrix))


def _names(ckpt: Checkpoint, name: str) -> Iterator[str]:
    """The stored tensors of the matrix of that name."""
    stem = name.removesuffix("weight")
    known = [name + part for part in BEHIND]
    if stem != name:
        known += [stem + part for part in INSTEAD]
    return (n for n in known if n in ckpt.entries)


def _found(ckpt: Checkpoint, quantization: Mapping[str, JSON]) -> Iterator[Dequantised]:
    """The quantised matrices, found by the names of their tensors; `quantization`: what the config says."""
    method = quantization.get("quant_method")
    if quantization.get("transform_config"):
        raise SourceError(f"{ckpt.path}: quant none: a transform_config, of turned weights, is not read")
    if method is not None and method not in KNOWN:
        raise SourceError(
            f"{ckpt.path}: quant none: {instead({'quantization_config': {**quantization}})[2:]}"
        )
    for name in ckpt.entries:
        if name.endswith(".pre_quant_scale"):
            raise SourceError(f"{name}: NVIDIA ModelOpt's scales of inputs (AWQ, SmoothQuant) are not read")
    for name, entry in ckpt.entries.items():
        stem, _, leaf = name.rpartition(".")
        stem = f"{stem}." if stem else ""
        if leaf == "weight_g_idx":
            raise SourceError(f"{name}: compressed-tensors' reordered inputs are not read")
        if entry.dtype is dtypes.uint8 and (leaf == "weight_packed" or f"{name}_scale" in ckpt.entries):
            yield _pairs(ckpt, f"{stem}weight", name, quantization)
        elif leaf == "weight_packed":
            yield _pack_quantized(ckpt, stem, quantization)
        elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in ckpt.entries:
            yield _stack(ckpt, name.removesuffix("_blocks"))
        elif leaf == "qweight":
            yield _by_groups(ckpt, stem, quantization)
        elif entry.dtype.itemsize == 1 and (leaf == "weight" or f"{name}_scale" in ckpt.entries):
            yield _bytes(ckpt, name, quantization)


def _view(ckpt: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> View:
    """A stored tensor, as a matrix. Raises SourceError where it is missing or of another shape."""
    if name not in ckpt.entries:
        raise SourceError(f"{ckpt.path}: {name} is not there, and what goes with it cannot be read without")
    view = ckpt[name]
    if shape is not None and view.shape != shape:
        raise SourceError(f"{name}: got shape {view.shape}, wanted {shape}")
    return view


def _whole(view: View, name: str, *wanted: DType) -> View:
    """The view, if it is of one of these integer dtypes. Raises SourceError otherwise."""
    wanted = wanted or (dtypes.int8, dtypes.int32, dtypes.int64)
    if view.dtype not in wanted:
        raise SourceError(f"{name}: got {view.dtype}, wanted {' or '.join(d.name for d in wanted)}")
    return view


def _grid(
    name: str,
    scales: View,
    shape: tuple[int, int],
    block: tuple[int, int] | None,
    quantization: Mapping[str, JSON],
) -> tuple[View, tuple[int, int]]:
    """Scales as a matrix, and how many outputs and inputs share one. Raises SourceError."""
    flat = scales.shape
    if len(flat) == 4 and flat[1::2] == (1, 1):  # ModelOpt's blocks, which are 128 x 128
        flat, block = flat[::2], block or (128, 128)
        scales = scales.reshape(flat)
    if math.prod(flat) == 1:
        return scales.reshape((1, 1)), (0, 0)
    if flat in ((shape[0],), (shape[0], 1)):
        return scales.reshape((shape[0], 1)), (1, 0)
    if block is not None and flat == (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
        return scales, block
    if len(flat) == 2 and flat[0] == shape[0] and (each := _group(shape[1], flat[1], quantization)):
        return scales, (1, each)
    raise SourceError(f"{name}: scales of shape {flat} do not fit the matrix {shape}")


def _group(inputs: int, groups: int, quantization: Mapping[str, JSON]) -> int:
    """How many inputs share one of so many scales: what the config says, where the last group may be short,
    or else equal parts; 0 where neither gives so many."""
    said = [g.get("group_size", g.get("q_group_size")) for g in (quantization, *_groups(quantization))]
    sizes = {n for n in said if isinstance(n, int) and n > 0 and -(-inputs // n) == groups}
    if len(sizes) > 1:
        each = ", ".join(map(str, sorted(sizes)))
        raise SourceError(f"quantization_config: groups of {each} all make {groups} of {inputs} inputs")
    if sizes:
        return sizes.pop()
    return 0 if not groups or inputs % groups else inputs // groups


def _bytes(ckpt: Checkpoint, name: str, quantization: Mapping[str, JSON]) -> Dequantised:
    """fp8 or int8, with a scale for the tensor, each output, group or block."""
    values = _view(ckpt, name)
    if len(values.shape) != 2 or values.dtype.name not in ("int8", "float8_e4m3fn", "float8_e5m2"):
        raise SourceError(f"{name}: {values.dtype} of shape {values.shape} is not dequantised")
    shape = (values.shape[0], values.shape[1])
    inverse = f"{name}_scale_inv" in ckpt.entries
    factors = _view(ckpt, name + ("_scale_inv" if inverse else "_scale"))
    scales, shared = _grid(name, factors, shape, _block(quantization, inverse), quantization)
    zeros = None
    if _shifted(ckpt, name, quantization):
        zeros = _whole(_view(ckpt, f"{name}_zero_point"), f"{name}_zero_point")
        if zeros.numel != scales.numel:
            raise SourceError(f"{name}_zero_point: got shape {zeros.shape}, its scales have {scales.shape}")
        zeros = zeros.reshape(scales.shape)
    return Dequantised(name, shape, values, scales, shared, zeros)


def _shifted(ckpt: Checkpoint, name: str, quantization: Mapping[str, JSON]) -> bool:
    """Whether compressed-tensors' matrix has zero points: where they are, and where the config wants them."""
    return f"{name}_zero_point" in ckpt.entries or _weights(quantization).get("symmetric") is False


def _block(quantization: Mapping[str, JSON], inverse: bool) -> tuple[int, int] | None:
    """The block of a config: DeepSeek's, or compressed-tensors'; else DeepSeek's names mean 128 x 128."""
    block = quantization.get("weight_block_size")
    if block is None:
        block = _weights(quantization).get("block_structure")
    match block:
        case None:
            return (128, 128) if inverse else None
        case [int(down), int(across)] if down > 0 and across > 0:
            return down, across
    raise SourceError(f"quantization_config: blocks of {block!r:.80}: wanted two numbers above 0")


def _weights(quantization: Mapping[str, JSON]) -> dict[str, JSON]:
    """What compressed-tensors' config says of the weights. Raises SourceError where groups differ."""
    found = _groups(quantization)
    if len({(str(w.get("num_bits")), str(w.get("block_structure"))) for w in found}) > 1:
        raise SourceError("quantization_config: config_groups of different widths are not read")
    return found[0] if found else {}


def _groups(quantization: Mapping[str, JSON]) -> list[dict[str, JSON]]:
    """What each of compressed-tensors' config_groups says of the weights, each once."""
    groups = quantization.get("config_groups")
    found: list[dict[str, JSON]] = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights not in found:
            found.append(weights)
    return found


def _bits(name: str, bits: JSON) -> int:
    if bits not in (4, 8) or isinstance(bits, bool):
        raise SourceError(f"{name}: {bits!r} bits are not read, only 4 and 8")
    return 4 if bits == 4 else 8


def _pack_quantized(ckpt: Checkpoint, stem: str, quantization: Mapping[str, JSON]) -> Dequantised:
    """compressed-tensors' pack-quantized."""
    name = f"{stem}weight"
    values = _view(ckpt, f"{name}_packed")
    if values.dtype is not dtypes.int32 or len(values.shape) != 2:
        raise SourceError(
            f"{name}_packed: {values.dtype} of shape {values.shape} is not read, only int32 [.., ..]"
        )
    named = _weights(quantization).get("num_bits")
    if named is None and f"{name}_shape" not in ckpt.entries:
        raise SourceError(f"{name}: neither a config nor {name}_shape says of how many bits its values are")
    bits = _bits(name, 4 if named is None else named)  # which its shape, where it is read, must bear out
    shape = (values.shape[0], values.shape[1] * (32 // bits))
    scales, shared = _grid(name, _view(ckpt, f"{name}_scale"), shape, None, quantization)
    zeros = None
    if _shifted(ckpt, name, quantization):
        wanted = (-(-shape[0] * bits // 32), scales.shape[1])
        zeros = _whole(_view(ckpt, f"{name}_zero_point", wanted), f"{name}_zero_point", dtypes.int32)
    form = None
    if f"{name}_shape" in ckpt.entries:
        form = _whole(_view(ckpt, f"{name}_shape", (2,)), f"{name}_shape")
    offset = 1 << (bits - 1)
    return Dequantised(
        name, shape, values, scales, shared, zeros, "across", bits, zero_offset=offset, form=form
    )


def _pairs(ckpt: Checkpoint, name: str, held: str, quantization: Mapping[str, JSON]) -> Dequantised:
    """mxfp4, whose scales are exponents, and nvfp4, whose scales are e4m3 below one number: in
    compressed-tensors' form they are divided by `_global_scale`, in ModelOpt's multiplied by `_scale_2`.

    `held`: the tensor that holds the values."""
    values, scales = _view(ckpt, held), _view(ckpt, f"{name}_scale")
    if len(values.shape) != 2 or len(scales.shape) != 2:
        raise SourceError(f"{held}: bytes of shape {values.shape}, scales of {scales.shape} are not read")
    if _shifted(ckpt, name, quantization):
        raise SourceError(f"{held}: four-bit floats with zero points are not read")
    shape = (values.shape[0], 2 * values.shape[1])
    whole, multiplied, each = None, held == name, 32
    if scales.dtype is dtypes.float8_e4m3fn:
        number = name + ("_scale_2" if multiplied else "_global_scale")
        whole = _view(ckpt, number, () if multiplied else (1,))
        if whole.dtype is not dtypes.float32:
            raise SourceError(f"{number}: got {whole.dtype}, wanted float32")
        each = (_group(shape[1], scales.shape[-1], quantization) if multiplied else 0) or 16
    if scales.dtype is not dtypes.uint8 and whole is None:
        raise SourceError(f"{name}_scale: got {scales.dtype}, wanted uint8 or float8_e4m3fn")
    if shape[1] % each or scales.shape != (shape[0], shape[1] // each):
        raise SourceError(f"{name}: scales of shape {scales.shape} do not fit {shape}, {each} values each")
    return Dequantised(
        name, shape, values, scales, (1, each), packed="pairs", bits=4, whole=whole, multiplied=multiplied
    )


def _stack(ckpt: Checkpoint, name: str) -> Dequantised:
    """gpt-oss's own experts: `_blocks` [experts, outputs, inputs / 32, 16] and `_scales` without the last
    axis, of what transformers trains as [experts, inputs, outputs]."""
    values, scales = _view(ckpt, f"{name}_blocks"), _view(ckpt, f"{name}_scales")
    if len(values.shape) != 4 or values.shape[3] != 16 or scales.shape != values.shape[:3]:
        raise SourceError(f"{name}: blocks of shape {values.shape} do not fit scales of {scales.shape}")
    if {values.dtype, scales.dtype} != {dtypes.uint8}:
        raise SourceError(f"{name}: got blocks of {values.dtype}, scales of {scales.dtype}, wanted uint8")
    experts, outputs, groups, _ = values.shape
    rows = experts * outputs
    return Dequantised(
        name, (rows, 32 * groups), values.reshape((rows, 16 * groups)), scales.reshape((rows, groups)),
        (1, 32), packed="pairs", bits=4, experts=experts,
    )  # fmt: skip


def _by_groups(ckpt: Checkpoint, stem: str, quantization: Mapping[str, JSON]) -> Dequantised:
    """AWQ's GEMM form, or GPTQ's. Raises SourceError."""
    name = f"{stem}weight"
    values, scales, zeros = (_view(ckpt, stem + part) for part in ("qweight", "scales", "qzeros"))
    method = quantization.get("quant_method", "gptq" if f"{stem}g_idx" in ckpt.entries else None)
    if method not in ("awq", "gptq"):
        raise SourceError(f"{name}: {stem}qweight is AWQ's or GPTQ's, and no config says which")
    if any(len(v.shape) != 2 for v in (values, scales, zeros)):
        raise SourceError(f"{name}: {values.shape}, {scales.shape}, {zeros.shape} are no matrices: not read")
    if values.dtype is not dtypes.int32 or zeros.dtype is not dtypes.int32:
        raise SourceError(f"{name}: wanted int32 values and zero points, got {values.dtype}, {zeros.dtype}")
    bits = _bits(name, quantization.get("bits", quantization.get("w_bit", 4)))
    many, (groups, outputs) = 32 // bits, scales.shape
    packed: Packed = "awq" if method == "awq" else "down"
    tall, wide = per_element(f"{packed}{bits}")
    inputs = values.shape[0] * tall
    fits = values.shape[1] * wide == outputs and zeros.shape == (groups, -(-outputs // many))
    if not fits or not (each := _group(inputs, groups, quantization)):
        raise SourceError(f"{name}: {values.shape}, {scales.shape} and {zeros.shape} do not fit each other")
    dense = Dequantised(name, (outputs, inputs), values, scales, (1, each), zeros, packed, bits, turned=True)
    if method == "gptq":
        return _gptq(ckpt, stem, quantization, dense)
    form = said_form(quantization, "version") or "gemm"
    if bits != 4 or form != "gemm":
        raise SourceError(f"{name}: AWQ of {bits} bits, version {form!r}; only 4, gemm is read")
    return dense


def _gptq(ckpt: Checkpoint, stem: str, quantization: Mapping[str, JSON], dense: Dequantised) -> Dequantised:
    """With how GPTQ's format offsets zero points, and the group of each input where the files say it."""
    form = said_form(quantization, "checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise SourceError(f"{dense.name}: checkpoint_format {form!r}; only gptq and gptq_v2 are read")
    group = None
    if f"{stem}g_idx" in ckpt.entries or quantization.get("desc_act") is True:
        group = _whole(_view(ckpt, f"{stem}g_idx", (dense.shape[1],)), f"{stem}g_idx")
    return replace(dense, zero_offset=-1 if form == "gptq" else 0, group=group)
