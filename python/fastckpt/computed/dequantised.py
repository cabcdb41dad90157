"""Quantised matrices as dense ones: the values that stored tensors stand for.

Law: a value is (q - zero) * scale, both factors in fp32, then rounded once to the dtype that was asked for
(`unrounding`): torch's `((q.float() - zero) * scale.float()).to(dtype)`.
Sources: compressed-tensors 0.20 (dequantize, unpack_from_int32), DeepSeek-V3's weight_dequant, AutoAWQ's
dequantize_gemm, AutoGPTQ's QuantLinear (format "gptq": zero points are stored less one), OCP Microscaling
Formats 1.0 (e2m1, e8m0), transformers' convert_moe_packed_tensors (gpt-oss) and NVIDIA ModelOpt 0.47
(NVFP4QTensor, FP8QTensor, MXFP8QTensor).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import dtypes
from ..dtypes import DType
from ..errors import SourceError
from ..quantisation.rounding import DENSE
from ..quantisation.schemes import Packed
from ..quantisation.unrounding import Elements, per_element, unpacked, unrounded
from ..views import View
from .finishes import Read
from .nowhere import Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Dequantised:
    """A dense matrix [outputs, inputs] that is made of these stored tensors when it is read.

    `values`: [outputs, inputs], or packed as `packed` says with `bits` each. `scales`: [outputs or blocks of
    them or 1, inputs or groups of them or 1]; `shared`: how many outputs and inputs share one (0: all).
    `turned`: values are [inputs, outputs], scales and zero points [groups, outputs]. `zeros`: zero points,
    like the scales or packed along outputs, to which `zero_offset` was added. `group`: the group of every
    input. `form`: the dense shape, where it is stored. `whole`: one number that all scales are divided by,
    with `multiplied` multiplied.
    `experts`: how many matrices lie below one another (0: it is no stack)."""

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
    whole: View | None = None
    multiplied: bool = False
    experts: int = 0

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape as it is trained: of a stack [experts, inputs, outputs]."""
        rows, columns = self.shape
        return (self.experts, columns, rows // self.experts) if self.experts else self.shape

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
        made = unrounded(
            values,
            self.kind,
            self._scales(read, self.scales.narrow(0, g0, g1 - g0).narrow(1, k0, k1 - k0)),
            None if self.zeros is None else self._points(read, self.zeros, (g0, g1), (k0, k1)),
            (row - g0).astype(np.int32),
            across,
            first=left % across if across else 0,
            offset=1 << (self.bits - 1) if self.packed == "across" else 0,
            dtype=dtype if dtype in DENSE else dtypes.float32,
        )[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        return made.T if self.turned else made

    def _scales(self, read: Read, part: View) -> Floats:
        """Some scales in fp32; bytes are exponents of two (e8m0). Raises SourceError for one that is none."""
        if part.dtype is dtypes.uint8:
            exponents = read(part).astype(np.int32)
            if (exponents == 255).any():
                raise SourceError(f"{self.name}: a scale's exponent is 255, which e8m0 keeps for NaN")
            return np.asarray(np.ldexp(np.float32(1), exponents - 127), np.float32)
        scales = np.asarray(read(part.cast(dtypes.float32)), np.float32)
        if self.whole is None:
            return scales
        whole = np.asarray(read(self.whole.cast(dtypes.float32)), np.float32).ravel()
        return scales * whole if self.multiplied else scales / whole

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
