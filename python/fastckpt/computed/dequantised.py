"""Quantised matrices as dense ones: which stored tensors belong together, and the values they stand for.

Law: a value is (q - zero) * scale, both factors in fp32, then rounded once to the dtype that was asked for
(`unrounding`): torch's `((q.float() - zero) * scale.float()).to(dtype)`.
Sources: compressed-tensors 0.20 (dequantize, unpack_from_int32), DeepSeek-V3's weight_dequant, AutoAWQ's
dequantize_gemm, AutoGPTQ's QuantLinear (format "gptq": zero points are stored less one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from .. import dtypes
from ..checkpoint import JSON, Checkpoint, Entry, Single
from ..dtypes import DType, exact
from ..errors import LayoutError, SourceError
from ..extents import Extents
from ..quantisation.rounding import DENSE
from ..quantisation.schemes import Packed, said_form
from ..quantisation.unrounding import Elements, per_element, unpacked, unrounded
from ..views import View
from .finishes import Read
from .nowhere import Floats, Ints, moved, nowhere, pitched

KNOWN = ("fp8", "compressed-tensors", "awq", "gptq", "fastckpt")
"""The `quant_method`s that are read."""


@dataclass(frozen=True, slots=True, eq=False)
class Dequantised:
    """A dense matrix [outputs, inputs] that is made of these stored tensors when it is read.

    `values`: [outputs, inputs], or packed as `packed` says with `bits` each. `scales`: [outputs or blocks of
    them or 1, inputs or groups of them or 1]; `shared`: how many outputs and inputs share one (0: all).
    `turned`: values are [inputs, outputs], scales and zero points [groups, outputs]. `zeros`: zero points,
    like the scales or packed along outputs, to which `zero_offset` was added. `group`: the group of every
    input. `form`: the dense shape, where it is stored."""

    name: str
    shape: tuple[int, int]
    values: View
    scales: View
    shared: tuple[int, int]
    zeros: View | None = None
    packed: Packed = ""
    bits: int = 8
    turned: bool = False
    zero_offset: int = 0
    group: View | None = None
    form: View | None = None

    @property
    def kind(self) -> str:
        """How the values lie, as `unrounding` names it."""
        return f"{self.packed}{self.bits}" if self.packed else self.values.dtype.name

    def box(self, read: Read, dtype: DType, r0: int, r1: int, c0: int, c1: int) -> Elements:
        """Outputs [r0, r1) of inputs [c0, c1), in `dtype` or in fp32.

        Raises SourceError where the stored shape is another, or an input is in no group."""
        if self.form is not None and read(self.form).tolist() != list(self.shape):
            raise SourceError(f"{self.name}: stored shape {read(self.form).tolist()}, wanted {self.shape}")
        rows, columns = ((c0, c1), (r0, r1)) if self.turned else ((r0, r1), (c0, c1))
        values, (top, left) = _elements(read, self.values, self.kind, rows, columns)
        tall, wide = per_element(self.kind)
        bottom, right = top + len(values) * tall, left + values.shape[1] * wide
        down, across = self.shared[::-1] if self.turned else self.shared
        row = self._groups(read, top, bottom) if self.group else np.arange(top, bottom) // (down or bottom)
        g0, g1 = int(row.min()), int(row.max()) + 1
        k0, k1 = (left // across, -(-right // across)) if across else (0, 1)
        scales = read(self.scales.narrow(0, g0, g1 - g0).narrow(1, k0, k1 - k0).cast(dtypes.float32))
        made = unrounded(
            values,
            self.kind,
            np.asarray(scales, np.float32),
            None if self.zeros is None else self._points(read, self.zeros, (g0, g1), (k0, k1)),
            (row - g0).astype(np.int32),
            across,
            first=left % across if across else 0,
            offset=1 << (self.bits - 1) if self.packed and not self.turned else 0,
            dtype=dtype if dtype in DENSE else dtypes.float32,
        )[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        return made.T if self.turned else made

    def _groups(self, read: Read, start: int, stop: int) -> Ints:
        """The groups of some inputs."""
        assert self.group is not None
        groups = read(self.group.narrow(0, start, stop - start)).astype(np.int64)
        if groups.min() < 0 or groups.max() >= self.scales.shape[0]:
            raise SourceError(
                f"{self.name}: groups of inputs {groups.min()} to {groups.max()}, "
                f"there are {self.scales.shape[0]}"
            )
        return groups

    def _points(self, read: Read, zeros: View, rows: tuple[int, int], columns: tuple[int, int]) -> Floats:
        """Zero points, as whole numbers in fp32, that lie as the scales do."""
        if not self.packed:
            part = zeros.narrow(0, rows[0], rows[1] - rows[0]).narrow(1, columns[0], columns[1] - columns[0])
            return read(part).astype(np.float32)
        how = "awq" if self.packed == "awq" else "across" if self.turned else "down"
        values, (top, left) = _elements(read, zeros, f"{how}{self.bits}", rows, columns)
        whole = unpacked(values, f"{how}{self.bits}")[
            rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left
        ]
        whole -= np.float32(self.zero_offset)
        if self.turned:  # GPTQ's zero point 0 is stored as the highest
            whole[whole == 1 << self.bits] = 0
        return np.ascontiguousarray(whole)


def _elements(
    read: Read, view: View, kind: str, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[Elements, tuple[int, int]]:
    """The stored elements that hold values [rows, columns], and the row and the column of their first."""
    tall, wide = per_element(kind)
    a, b, c, d = rows[0] // tall, -(-rows[1] // tall), columns[0] // wide, -(-columns[1] // wide)
    return read(view.narrow(0, a, b - a).narrow(1, c, d - c)), (a * tall, c * wide)


def plain(
    ckpt: Checkpoint, config: Mapping[str, JSON] | None, dtype: DType | None
) -> tuple[Checkpoint, dict[str, JSON] | None]:
    """The checkpoint with every quantised matrix as a dense one, and its config without quantization_config.

    `dtype`: of the dense matrices; None: the one the config names, else bfloat16. Raises SourceError where
    nothing is quantised, or something is in a way that is not read."""
    told = dict(config) if config is not None else None
    said = told.pop("quantization_config", None) if told is not None else None
    found = {p.name: p for p in _found(ckpt, said if isinstance(said, dict) else {})}
    if not found:
        raise SourceError(f"{ckpt.path}: quant none: no tensor of it is quantised in a way that is read")
    for p in found.values():
        if p.scales.dtype not in DENSE:
            read = ", ".join(d.name for d in DENSE)
            raise SourceError(f"{p.name}: scales of {p.scales.dtype} are not read, only of {read}")
    named = dtypes.of_config(told or {})  # which may be fp8, as what is quantised is stored
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
            entries[name] = Single(entry.shape, entry.dtype, moved(entry, extents), entry.kind)
        elif owner not in entries:
            shape = found[owner].shape
            entries[owner] = Single(shape, dense, _dense(extents, index[owner], shape, dense), entry.kind)
    for alias, holder in ckpt.aliases.items():
        if holder in parts:
            raise SourceError(f"{ckpt.path}: {alias} is tied to {holder}, which is quantised: not read")
    return replace(ckpt, entries=entries, extents=extents, config=told), told


def _dense(extents: Extents, at: int, shape: tuple[int, int], dtype: DType) -> Callable[[], View]:
    return lambda: pitched(extents, at, dtypes.float32, shape).cast(dtype)


BEHIND = ("", "_scale_inv", "_scale", "_zero_point", "_packed", "_shape")
"""What a quantised matrix's tensors are called behind its name."""

INSTEAD = (
    "qweight", "qzeros", "scales", "g_idx", "input_scale", "input_zero_point", "activation_scale"
)  # fmt: skip
"""What they are called in place of `weight`; those of the input mean nothing to a dense matrix."""


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
    said = (config or {}).get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
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


def _found(ckpt: Checkpoint, said: Mapping[str, JSON]) -> Iterator[Dequantised]:
    """The quantised matrices, found by the names of their tensors; `said`: config's quantization_config."""
    method = said.get("quant_method")
    if said.get("transform_config"):
        raise SourceError(f"{ckpt.path}: quant none: a transform_config, of turned weights, is not read")
    if method is not None and method not in KNOWN:
        raise SourceError(f"{ckpt.path}: quant none: {instead({'quantization_config': {**said}})[2:]}")
    for name, entry in ckpt.entries.items():
        stem, _, leaf = name.rpartition(".")
        stem = f"{stem}." if stem else ""
        if leaf == "weight_g_idx":
            raise SourceError(f"{name}: compressed-tensors' reordered inputs are not read")
        if leaf == "weight_packed":
            yield _pack_quantized(ckpt, stem, said)
        elif leaf == "qweight":
            yield _by_groups(ckpt, stem, said)
        elif entry.dtype.itemsize == 1 and (leaf == "weight" or f"{name}_scale" in ckpt.entries):
            yield _bytes(ckpt, name, said)


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
    said: Mapping[str, JSON],
) -> tuple[View, tuple[int, int]]:
    """Scales as a matrix, and how many outputs and inputs share one. Raises SourceError."""
    flat = scales.shape
    if math.prod(flat) == 1:
        return scales.reshape((1, 1)), (0, 0)
    if flat in ((shape[0],), (shape[0], 1)):
        return scales.reshape((shape[0], 1)), (1, 0)
    if block is not None and flat == (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
        return scales, block
    if len(flat) == 2 and flat[0] == shape[0] and (each := _group(shape[1], flat[1], said)):
        return scales, (1, each)
    raise SourceError(f"{name}: scales of shape {flat} do not fit the matrix {shape}")


def _group(inputs: int, groups: int, said: Mapping[str, JSON]) -> int:
    """How many inputs share one of so many scales: what the config says, where the last group may be short,
    or else equal parts; 0 where neither gives so many."""
    for told in (said, *_groups(said)):
        size = told.get("group_size", told.get("q_group_size"))
        if isinstance(size, int) and size > 0 and -(-inputs // size) == groups:
            return size
    return 0 if inputs % groups else inputs // groups


def _bytes(ckpt: Checkpoint, name: str, said: Mapping[str, JSON]) -> Dequantised:
    """fp8 or int8, with a scale for the tensor, each output, group or block."""
    values = _view(ckpt, name)
    if len(values.shape) != 2 or values.dtype.name not in ("int8", "float8_e4m3fn", "float8_e5m2"):
        raise SourceError(f"{name}: {values.dtype} of shape {values.shape} is not dequantised")
    shape = (values.shape[0], values.shape[1])
    inverse = f"{name}_scale_inv" in ckpt.entries
    factors = _view(ckpt, name + ("_scale_inv" if inverse else "_scale"))
    scales, shared = _grid(name, factors, shape, _block(said, inverse), said)
    zeros = None
    if _shifted(ckpt, name, said):
        zeros = _whole(_view(ckpt, f"{name}_zero_point"), f"{name}_zero_point").reshape(scales.shape)
    return Dequantised(name, shape, values, scales, shared, zeros)


def _shifted(ckpt: Checkpoint, name: str, said: Mapping[str, JSON]) -> bool:
    """Whether compressed-tensors' matrix has zero points: where they are, and where the config wants them."""
    return f"{name}_zero_point" in ckpt.entries or _weights(said).get("symmetric") is False


def _block(said: Mapping[str, JSON], inverse: bool) -> tuple[int, int] | None:
    """The block of a config: DeepSeek's, or compressed-tensors'; else DeepSeek's names mean 128 x 128."""
    told = said.get("weight_block_size")
    if told is None:
        told = _weights(said).get("block_structure")
    match told:
        case None:
            return (128, 128) if inverse else None
        case [int(down), int(across)] if down > 0 and across > 0:
            return down, across
    raise SourceError(f"quantization_config: blocks of {told!r:.80}: wanted two numbers above 0")


def _weights(said: Mapping[str, JSON]) -> dict[str, JSON]:
    """What compressed-tensors' config says of the weights. Raises SourceError where groups differ."""
    found = _groups(said)
    if len({(str(w.get("num_bits")), str(w.get("block_structure"))) for w in found}) > 1:
        raise SourceError("quantization_config: config_groups of different widths are not read")
    return found[0] if found else {}


def _groups(said: Mapping[str, JSON]) -> list[dict[str, JSON]]:
    """What each of compressed-tensors' config_groups says of the weights, each once."""
    groups = said.get("config_groups")
    found: list[dict[str, JSON]] = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights not in found:
            found.append(weights)
    return found


def _bits(name: str, told: JSON) -> int:
    if told not in (4, 8) or isinstance(told, bool):
        raise SourceError(f"{name}: {told!r} bits are not read, only 4 and 8")
    return 4 if told == 4 else 8


def _pack_quantized(ckpt: Checkpoint, stem: str, said: Mapping[str, JSON]) -> Dequantised:
    """compressed-tensors' pack-quantized."""
    name = f"{stem}weight"
    values = _view(ckpt, f"{name}_packed")
    if values.dtype is not dtypes.int32 or len(values.shape) != 2:
        raise SourceError(
            f"{name}_packed: {values.dtype} of shape {values.shape} is not read, only int32 [.., ..]"
        )
    told = _weights(said).get("num_bits")
    if told is None and f"{name}_shape" not in ckpt.entries:
        raise SourceError(f"{name}: neither a config nor {name}_shape says of how many bits its values are")
    bits = _bits(name, 4 if told is None else told)  # which its shape, where it is read, must bear out
    shape = (values.shape[0], values.shape[1] * (32 // bits))
    scales, shared = _grid(name, _view(ckpt, f"{name}_scale"), shape, None, said)
    zeros = None
    if _shifted(ckpt, name, said):
        wanted = (-(-shape[0] * bits // 32), scales.shape[1])
        zeros = _whole(_view(ckpt, f"{name}_zero_point", wanted), f"{name}_zero_point", dtypes.int32)
    form = None
    if f"{name}_shape" in ckpt.entries:
        form = _whole(_view(ckpt, f"{name}_shape", (2,)), f"{name}_shape")
    offset = 1 << (bits - 1)
    return Dequantised(
        name, shape, values, scales, shared, zeros, "across", bits, zero_offset=offset, form=form
    )


def _by_groups(ckpt: Checkpoint, stem: str, said: Mapping[str, JSON]) -> Dequantised:
    """AWQ's GEMM form, or GPTQ's. Raises SourceError."""
    name = f"{stem}weight"
    values, scales, zeros = (_view(ckpt, stem + part) for part in ("qweight", "scales", "qzeros"))
    method = said.get("quant_method", "gptq" if f"{stem}g_idx" in ckpt.entries else None)
    if method not in ("awq", "gptq"):
        raise SourceError(f"{name}: {stem}qweight is AWQ's or GPTQ's, and no config says which")
    if any(len(v.shape) != 2 for v in (values, scales, zeros)):
        raise SourceError(f"{name}: {values.shape}, {scales.shape}, {zeros.shape} are no matrices: not read")
    if values.dtype is not dtypes.int32 or zeros.dtype is not dtypes.int32:
        raise SourceError(f"{name}: wanted int32 values and zero points, got {values.dtype}, {zeros.dtype}")
    bits = _bits(name, said.get("bits", said.get("w_bit", 4)))
    many, (groups, outputs) = 32 // bits, scales.shape
    packed: Packed = "awq" if method == "awq" else "down"
    tall, wide = per_element(f"{packed}{bits}")
    inputs = values.shape[0] * tall
    fits = values.shape[1] == outputs // wide and zeros.shape == (groups, -(-outputs // many))
    if not fits or not (each := _group(inputs, groups, said)):
        raise SourceError(f"{name}: {values.shape}, {scales.shape} and {zeros.shape} do not fit each other")
    dense = Dequantised(name, (outputs, inputs), values, scales, (1, each), zeros, packed, bits, turned=True)
    if method == "gptq":
        return _gptq(ckpt, stem, said, dense)
    form = said_form(said, "version") or "gemm"
    if bits != 4 or form != "gemm":
        raise SourceError(f"{name}: AWQ of {bits} bits, version {form!r}; only 4, gemm is read")
    return dense


def _gptq(ckpt: Checkpoint, stem: str, said: Mapping[str, JSON], dense: Dequantised) -> Dequantised:
    """With how GPTQ's format offsets zero points, and the group of each input where the files say it."""
    form = said_form(said, "checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise SourceError(f"{dense.name}: checkpoint_format {form!r}; only gptq and gptq_v2 are read")
    group = None
    if f"{stem}g_idx" in ckpt.entries or said.get("desc_act") is True:
        group = _whole(_view(ckpt, f"{stem}g_idx", (dense.shape[1],)), f"{stem}g_idx")
    return replace(dense, zero_offset=-1 if form == "gptq" else 0, group=group)
