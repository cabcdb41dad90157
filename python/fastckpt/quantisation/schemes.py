"""Quantisation schemes: what a matrix becomes, which values share a scale, and how files spell it.

A matrix is [..., rows, columns] = [..., outputs, inputs]. Law: x is stored as round(x / scale) with ties to
even, clamped; scale = amax / reach in fp32 over the values that share it, at least the scheme's floor, and 1
where both are zero. With zero points it is round(x / scale + zero), zero = round(-8 - low / scale), scale =
(high - low) / reach.
Microscaled: scale is 2^floor(log2(amax)), or twice that where amax is 1.75 of it or more, over the power of
two in reach; at least 2^-127.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from ..dtypes import DType, float8_e4m3fn, float16, float32, int8, int32, int64, uint8
from ..errors import LayoutError, expect

Packed = Literal["", "across", "awq", "down", "pairs"]
"""How eight 4-bit values make an int32: eight columns, the first in the lowest bits; eight columns in AWQ's
order (0, 2, 4, 6, 1, 3, 5, 7 from the lowest); eight rows, the first in the lowest. "pairs": two columns make
a byte, the first in the lower bits, and a value is e2m1 (OCP MX: 1 sign, 2 exponent, 1 fraction bit)."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantise a matrix.

    `dtype` of the stored elements, `bits` of one value. `block`: how many rows and columns share a scale (0:
    the whole axis). `reach`: the value that amax is mapped to; `floor`: the smallest scale. `turned`: the
    matrix is stored [inputs, outputs], and `block` and `packed` refer to that form.

    `scale_dtype`: bytes (uint8) hold the exponents of powers of two, 127 more than they are (e8m0).

    `stacks`: what is quantised are stacks of experts [experts, inputs, outputs] alone, each turned, and an
    axis of its own counts the groups (gpt-oss).

    `asymmetric`: groups have zero points, and `reach` is what their whole range is mapped to. `zero_offset`:
    added to a zero point when it is stored, so that the lowest is minus it (GPTQ stores them less one).
    `reciprocal`: values are multiplied by the fp32 reciprocal of the scale (torch.ao), not divided by it
    (compressed-tensors). `dynamic`: scales have torch.ao's shapes, and zero points of 0 beside them.

    `values`, `scale`, `zero`, `form`: what the tensors of a matrix are called, as `named` reads it; `form`
    holds the dense shape, or the group of every input. `format`: compressed-tensors' name of the storage,
    "fp8" for DeepSeek's, "awq", "gptq", or "" where only fastckpt reads it."""

    name: str
    dtype: DType
    bits: int
    block: tuple[int, int]
    reach: float
    floor: float = 0.0
    turned: bool = False
    packed: Packed = ""
    stacks: bool = False
    asymmetric: bool = False
    zero_offset: int = 8
    reciprocal: bool = False
    dynamic: bool = False
    scale_dtype: DType = float32
    values: str = ""
    scale: str = "_scale"
    zero: str = ""
    form: str = ""
    format: str = ""

    @staticmethod
    def named(name: str, part: str) -> str:
        """The name of a part of a matrix: put behind the matrix's, or in place of its `weight`."""
        return name + part if part[:1] in ("", "_") else name.removesuffix("weight") + part

    @property
    def microscaled(self) -> bool:
        """Whether scales are powers of two."""
        return self.scale_dtype is uint8

    @property
    def kind(self) -> str:
        """How the values lie, as `unrounding` names it."""
        return f"{self.packed}{self.bits}" if self.packed else self.dtype.name

    @property
    def shared(self) -> tuple[int, int]:
        """Outputs and inputs that share a scale."""
        return (self.block[1], self.block[0]) if self.turned else self.block

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the values, packed where one is smaller than an element."""
        if self.stacks:
            return (*shape[:-1], shape[-1] // self.block[1], self.block[1] * self.bits // 8)
        if self.packed == "down":
            return (*shape[:-2], shape[-2] * self.bits // 32, shape[-1])
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
            return lead or (() if self.dynamic else (1,))
        if self.dynamic:
            return (*lead, down)
        return (*lead, down, across)

    def zero_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the zero points: eight outputs an int32; torch.ao's are as the scales."""
        if self.dynamic:
            return self.scale_shape(shape)
        down, across = self.grid(shape[-2], shape[-1])
        return (down, -(-across // 8)) if self.turned else (-(-down // 8), across)

    def form_values(self, shape: Sequence[int]) -> list[int]:
        """What `form` holds: the dense shape, or the group of every input."""
        return [i // self.block[0] for i in range(shape[-2])] if self.turned else [*shape]

    @property
    def form_dtype(self) -> DType:
        """The dtype of `form`."""
        return int32 if self.turned else int64


_LEAST_HALF = 2.0**-24
"""The smallest number of fp16 above 0: a scale that came to 0 would take its whole group along."""


def _groups() -> Iterator[Scheme]:
    """The schemes of four bits, each with groups of 128, 64 and 32 inputs."""
    for end, n in (("", 128), ("64", 64), ("32", 32)):
        across = Scheme(
            f"int4-group{end}", int32, 4, (1, n), 7.5, packed="across", values="_packed", form="_shape",
            format="pack-quantized",
        )  # fmt: skip
        yield across
        yield replace(across, name=f"{across.name}-zero", reach=15.0, asymmetric=True, zero="_zero_point")
        awq = Scheme(
            f"awq-group{end}", int32, 4, (n, 1), 15.0, _LEAST_HALF, turned=True, packed="awq",
            asymmetric=True, scale_dtype=float16, values="qweight", scale="scales", zero="qzeros",
            format="awq",
        )  # fmt: skip
        yield awq
        down = replace(
            awq, name=f"gptq-group{end}", reach=7.5, packed="down", asymmetric=False, zero_offset=7,
            form="g_idx", format="gptq",
        )  # fmt: skip
        yield down
        yield replace(down, name=f"{down.name}-zero", reach=15.0, asymmetric=True)


_DYNAMIC = Scheme(
    "int8-dynamic", int8, 8, (0, 0), 127.5, 2.0**-23, reciprocal=True, dynamic=True, zero="_zero_point"
)

_MXFP8 = Scheme(
    "mxfp8", float8_e4m3fn, 8, (1, 32), 448.0, reciprocal=True, scale_dtype=uint8, format="mxfp8-quantized"
)
_MXFP4 = replace(
    _MXFP8, name="mxfp4", dtype=uint8, bits=4, reach=6.0, packed="pairs", values="_packed",
    format="mxfp4-pack-quantized",
)  # fmt: skip

SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("int8", int8, 8, (1, 0), 127.5, format="int-quantized"),
        Scheme("fp8", float8_e4m3fn, 8, (0, 0), 448.0, format="float-quantized"),
        Scheme("fp8-channel", float8_e4m3fn, 8, (1, 0), 448.0, format="float-quantized"),
        Scheme("fp8-block", float8_e4m3fn, 8, (128, 128), 448.0, scale="_scale_inv", format="fp8"),
        *_groups(),
        _MXFP8,
        _MXFP4,
        replace(_MXFP4, name="mxfp4-experts", stacks=True, values="_blocks", scale="_scales", format="mxfp4"),
        _DYNAMIC,
        replace(_DYNAMIC, name="int8-dynamic-channel", block=(1, 0)),
    )
}
"""Name -> scheme. Sources: compressed-tensors 0.20 (calculate_qparams: amax / (range / 2), or with zero
points (max - min) / range; generate_mx_scales; quantize; pack_to_int32, pack_fp4_to_uint8), DeepSeek-V3's
weight_quant (128 x 128 blocks, amax / 448), torch.ao's default_dynamic_qconfig and
per_channel_dynamic_qconfig (MinMaxObserver, symmetric qint8, scale at least fp32's eps), AutoAWQ's
WQLinear_GEMM and AutoGPTQ's QuantLinear (format "gptq") for how theirs lie, gpt-oss's files."""


MICROSCALED = frozenset(s.format for s in (_MXFP8, _MXFP4))
"""compressed-tensors' formats whose scales are exponents of two."""

LINEARS = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "dense", "query",
    "key", "value", "q", "k", "v", "o", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3",
    "w13", "fc1", "fc2", "wi", "wi_0", "wi_1", "wo", "dense_h_to_4h", "dense_4h_to_h", "q_a_proj", "q_b_proj",
    "kv_a_proj_with_mqa", "kv_b_proj", "fused_qkv_a_proj", "fc_in", "fc_out", "Wqkv", "Wi", "Wo",
    "input_linear", "output_linear",
})  # fmt: skip
"""The hub's and the servers' modules of attention, feed-forward blocks and experts: what is quantised unless
patterns say otherwise. Never embeddings, norms, routers or lm_head."""

STACKS = frozenset({"w13_weight", "w2_weight"})
"""vLLM's stacks of experts."""

GRANITE = ("input_linear.weight", "output_linear.weight")
"""How the names end of GraniteMoE's stacks of experts, and of the matrices of its shared block."""

GPT_OSS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""How the names end of gpt-oss's stacks of experts."""

TOWERS = (
    "visual", "vision", "vision_model", "vision_tower", "audio_tower", "multi_modal_projector", "connector",
    "vision_embedder", "embed_vision", "embed_audio", "mm_projector",
)  # fmt: skip
"""The hub's and the servers' modules that hold towers and projectors: engines serve those dense."""

TURNED = frozenset({"c_attn", "c_fc", "c_proj"})
"""GPT-2's modules, stored [in, out]: their rows are no outputs. StarCoder's, which lie the other way round,
go by the same names, and stay dense too."""

_EMBEDDING = re.compile(r".*embed(dings?|_tokens|_positions|_in)?|wte|wpe|shared")
_RECURRENT = re.compile(r"weight_(ih|hh)_l[0-9]+(_reverse)?")


@dataclass(frozen=True, slots=True)
class Quant:
    """A scheme and the tensors it is for: the matrices known by name (LINEARS), and those that a pattern of
    `include` matches, but none that a pattern of `exclude` matches (fnmatch)."""

    scheme: Scheme
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expect("quant: a scheme of SCHEMES", self.scheme, Scheme)
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            expect(f"quant: {name}", patterns, tuple)
            for pattern in patterns:
                expect(f"quant: a pattern of {name}", pattern, str)

    @staticmethod
    def of(asked: str | Quant) -> Quant:
        """What a scheme's name asks for. Raises LayoutError naming the schemes there are."""
        expect("quant", asked, str, Quant)
        if isinstance(asked, Quant):
            return asked
        found = SCHEMES.get(asked)
        if found is None:
            raise LayoutError(f"no quantisation scheme {asked!r}; known: {', '.join(SCHEMES)}, none")
        return Quant(found)

    def require_named(self, name: str, shape: Sequence[int]) -> None:
        """Raises LayoutError for a stack that is itself named like a module of LINEARS, as transformers 5
        names experts, or is the weight of one, as GraniteMoE's are: it would stay dense, or no loader would
        know it, and no pattern says so."""
        if self.scheme.stacks:
            return
        stored = name.removesuffix(".weight") if name.endswith(GRANITE) else name
        stack = len(shape) == 3 and stored.rpartition(".")[2] in LINEARS
        if stack and not any(fnmatchcase(name, p) for p in (*self.include, *self.exclude)):
            raise LayoutError(
                f"quant {self.scheme.name}: {name} {tuple(shape)} is a stack of experts, which would stay "
                "dense; exclude it by a pattern, or write each expert on its own: layout hf with "
                "split_experts=True (-L split_experts=true), where the family's loaders take them so"
            )

    def knows(self, name: str) -> bool:
        """Whether a matrix of that name is quantised unasked."""
        if tower(name):
            return False
        if self.scheme.stacks:
            return name.endswith(GPT_OSS)
        module, _, leaf = name.rpartition(".")
        known = (leaf == "weight" and module.rpartition(".")[2] in LINEARS) or leaf in STACKS
        return known or (self.scheme.dynamic and _RECURRENT.fullmatch(leaf) is not None)

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the tensor of that name is quantised. Raises LayoutError for one that was asked for and is
        no matrix with outputs first, or of an image tower, or an embedding, which loaders of the scheme's
        format take for dense."""
        if any(fnmatchcase(name, p) for p in self.exclude):
            return False
        asked = any(fnmatchcase(name, p) for p in self.include)
        if not (asked or self.knows(name)) or math.prod(shape) == 0:
            return False
        last = name.rpartition(".")[0].rpartition(".")[2]
        if self.scheme.stacks and len(shape) != 3:
            raise LayoutError(f"quant {self.scheme.name}: {name} {tuple(shape)} is no stack of experts")
        if len(shape) not in (2, 3) or last in TURNED:
            if asked:
                raise LayoutError(f"quant: {name} {tuple(shape)} is no matrix [outputs, inputs]")
            return False
        if asked and tower(name):
            raise LayoutError(f"quant: {name} is beside the decoder, where all is dense to loaders")
        if asked and self.scheme.format not in ("", "fp8") and _EMBEDDING.fullmatch(last):
            raise LayoutError(f"quant {self.scheme.name}: {name} is an embedding, dense to loaders of this")
        return True


def tower(name: str) -> str:
    """The module of TOWERS that a tensor or module is in, "" where it is in none."""
    return next((part for part in name.split(".") if part in TOWERS), "")


def said_of(config: Mapping[str, object]) -> object:
    """A config's quantization_config: its own, else that of its text_config, as Kimi K2.5's hub has it; None
    where there is none."""
    within = config.get("text_config")
    if config.get("quantization_config") is None and isinstance(within, dict):
        return within.get("quantization_config")
    return config.get("quantization_config")


def said_form(said: Mapping[str, object], older: str) -> str | None:
    """What a quantization_config calls the form of AWQ's or GPTQ's integers, under an `older` key or "format"
    (transformers 5, GPTQConfig and AwqConfig); both, where the two differ; None where it says nothing."""
    told = {str(said[key]).lower(): key for key in (older, "format") if said.get(key) is not None}
    return " and ".join(told) or None
