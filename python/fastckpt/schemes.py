"""Quantisation schemes: what a matrix becomes, which share a scale, how it is spelled in files.

A matrix is [..., rows, columns] = [..., outputs, inputs]. Law: x is stored as round(x / scale) with ties to
even, clamped; scale = amax / reach in fp32 over the values that share it, and 1 where they are all zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .dtypes import DType, float8_e4m3fn, int8, int32
from .errors import LayoutError


@dataclass(frozen=True, slots=True)
class Scheme:
    """`dtype` of the stored elements, `bits` of one value; `block`: rows and columns that share a scale, 0 is
    the whole axis. `reach`: the value amax is mapped to; `floor`: the smallest scale.

    `reciprocal`: values are multiplied by the fp32 reciprocal of the scale (torch.ao) rather than divided by
    it (compressed-tensors). `packed`, `scale`: what is put behind the tensor's name for values and scales.
    `zero_point`: a tensor of zeros stands beside the scale. `format`: compressed-tensors' name of the
    storage, "fp8" for DeepSeek's, "" where only fastckpt reads it."""

    name: str
    dtype: DType
    bits: int
    block: tuple[int, int]
    reach: float
    floor: float = 0.0
    reciprocal: bool = False
    packed: str = ""
    scale: str = "_scale"
    zero_point: bool = False
    format: str = ""

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the values: packed along columns where one is smaller than an element."""
        return (*shape[:-1], shape[-1] * self.bits // (8 * self.dtype.itemsize))

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Scales of one matrix, down and across; a block that the edge cuts has one of its own."""
        down, across = self.block
        return -(-rows // down) if down else 1, -(-columns // across) if across else 1

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales as the format has it: a tensor's is [1], a channel's [rows, 1]; for
        torch.ao's schemes a scalar and [rows]."""
        lead, (down, across) = tuple(shape[:-2]), self.grid(shape[-2], shape[-1])
        if self.block == (0, 0):
            return lead or (() if self.zero_point else (1,))
        if self.zero_point:
            return (*lead, down)
        return (*lead, down, across)


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("int8", int8, 8, (1, 0), 127.5, format="int-quantized"),
        Scheme("fp8", float8_e4m3fn, 8, (0, 0), 448.0, format="float-quantized"),
        Scheme("fp8-channel", float8_e4m3fn, 8, (1, 0), 448.0, format="float-quantized"),
        Scheme("fp8-block", float8_e4m3fn, 8, (128, 128), 448.0, scale="_scale_inv", format="fp8"),
        Scheme("int4-group32", int32, 4, (1, 32), 7.5, packed="_packed", format="pack-quantized"),
        Scheme("int4-group64", int32, 4, (1, 64), 7.5, packed="_packed", format="pack-quantized"),
        Scheme("int4-group", int32, 4, (1, 128), 7.5, packed="_packed", format="pack-quantized"),
        Scheme("int8-dynamic", int8, 8, (0, 0), 127.5, 2.0**-23, reciprocal=True, zero_point=True),
        Scheme("int8-dynamic-channel", int8, 8, (1, 0), 127.5, 2.0**-23, reciprocal=True, zero_point=True),
    )
}
"""Name -> scheme. Sources: compressed-tensors 0.20 (calculate_qparams: symmetric, amax / (range / 2)),
DeepSeek-V3's weight_quant (128 x 128 blocks, amax / 448), torch.ao's default_dynamic_qconfig and
per_channel_dynamic_qconfig (MinMaxObserver, symmetric qint8, scale at least fp32's eps)."""


LINEARS = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "dense", "query",
    "key", "value", "q", "k", "v", "o", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3",
    "fc1", "fc2", "wi", "wi_0", "wi_1", "wo", "dense_h_to_4h", "dense_4h_to_h", "q_a_proj", "q_b_proj",
    "kv_a_proj_with_mqa", "kv_b_proj", "fused_qkv_a_proj",
})  # fmt: skip
"""The hub's and the servers' modules of attention, feed-forward blocks and experts: what is quantised unless
patterns say otherwise. Never embeddings, norms, routers or lm_head."""

STACKS = frozenset({"w13_weight", "w2_weight"})
"""vLLM's stacks of experts."""

TURNED = frozenset({"c_attn", "c_fc", "c_proj"})
"""GPT-2's modules, stored [in, out]: their rows are no outputs."""

_RECURRENT = re.compile(r"weight_(ih|hh)_l[0-9]+(_reverse)?")


@dataclass(frozen=True, slots=True)
class Quant:
    """A scheme and which tensors it is for. `include`, `exclude`: patterns of tensor names (fnmatch) that are
    added to, and taken from, the matrices the names tell (LINEARS); exclude wins."""

    scheme: Scheme
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @staticmethod
    def of(asked: str | Quant) -> Quant:
        """The wish behind a scheme's name. Raises LayoutError naming the schemes there are."""
        if isinstance(asked, Quant):
            return asked
        found = SCHEMES.get(asked)
        if found is None:
            raise LayoutError(f"no quantisation scheme {asked!r}; known: {', '.join(SCHEMES)}")
        return Quant(found)

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the tensor of that name is quantised. Raises LayoutError for one that was asked for and is
        no matrix with outputs first."""
        if any(fnmatchcase(name, p) for p in self.exclude):
            return False
        asked = any(fnmatchcase(name, p) for p in self.include)
        module, _, leaf = name.rpartition(".")
        last = module.rpartition(".")[2]
        known = (leaf == "weight" and last in LINEARS) or leaf in STACKS
        known |= self.scheme.zero_point and _RECURRENT.fullmatch(leaf) is not None
        if not (asked or known) or math.prod(shape) == 0:
            return False
        if len(shape) not in (2, 3) or last in TURNED:
            if asked:
                raise LayoutError(f"quant: {name} {tuple(shape)} is no matrix [outputs, inputs]")
            return False
        return True
