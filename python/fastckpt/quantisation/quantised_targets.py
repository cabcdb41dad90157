"""Which targets a quantised plan has: a chosen matrix becomes values, scales and what goes with them.

Law: the scales are those of the uncut matrix, whatever the placement. A cut through a block or group is
refused. Where a scale is shared across a cut, or by more than DENSE_BYTES, the uncut matrix is read first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from .. import dtypes
from ..checkpoint import JSON
from ..errors import LayoutError
from ..model import Sizes
from ..placement import Placement
from ..target import Target
from ..views import zeros
from .rounding import DENSE
from .schemes import Quant, Scheme, tower

FITS: dict[str, frozenset[str]] = {
    "hf": frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8", "awq", "gptq", ""}),
    "same": frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8", "awq", "gptq", ""}),
    "vllm": frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8", "awq", "gptq"}),
}
"""layout -> the formats it can hold when its own tensors are quantised; for others see `prequantised`."""

WHY = {
    "megatron": ": megatron-core stores no quantised weights, its fp8 is made in memory",
    "rtp_llm": ": wanted int8, fp8, fp8-channel, fp8-block, an awq or gptq scheme, or of experts int4-group",
}
"""layout -> what else there is to say of it."""

DENSE_BYTES = 1 << 21
"""Dense bytes made at once, unless one row of blocks is more: they are read back from cache."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised tensor of a plan. `name`, `dtype`, `shape`: the dense matrix's, the shape turned where the
    scheme stores it turned. `scanned`: the uncut matrix of that name is read first, for its scales. `scales`,
    `zeros`, `form`: the numbers of the plan's tensors that hold those, where the scheme has them."""

    scheme: Scheme
    name: str
    dtype: dtypes.DType
    shape: tuple[int, ...]
    scanned: bool
    scales: int = -1
    zeros: int | None = None
    form: int | None = None


@dataclass(frozen=True, slots=True)
class Expansion:
    """Turns targets into quantised ones. `whole` gives the targets of an uncut placement; `sizes`: the
    model's, where the layout knows roles.

    Filled as targets pass: `dense`, output name -> dense name, and `scanned`, the dense names of the matrices
    that must be read first."""

    quant: Quant
    layout: str
    placement: Placement
    whole: Callable[[], Iterator[Target]]
    sizes: Sizes | None
    dense: dict[str, str] = field(default_factory=dict)
    scanned: set[str] = field(default_factory=set)
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scheme = self.quant.scheme
        if scheme.format not in FITS.get(self.layout, frozenset()):
            raise LayoutError(
                f"layout {self.layout} has no place for quantisation scheme {scheme.name}"
                f"{WHY.get(self.layout, '')}"
            )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every uncut target. Raises LayoutError where none is chosen."""
        if not self._shapes:
            self._shapes.update((t.name, t.shape) for t in self.whole())
            for name, shape in self._shapes.items():
                self.quant.require_named(name, shape)
            for pattern in (*self.quant.include, *self.quant.exclude):
                if not any(fnmatchcase(name, pattern) for name in self._shapes):
                    raise LayoutError(
                        f"quant {self.quant.scheme.name}: {pattern!r} names no tensor that layout "
                        f"{self.layout} writes; of tied ones it writes one"
                    )
            if not any(self.quant.takes(n, s) for n, s in self._shapes.items()):
                raise LayoutError(
                    f"quant {self.quant.scheme.name}: no tensor is a matrix known by name; say which with "
                    "include patterns"
                )
        return self._shapes

    def targets(self, targets: Iterable[Target]) -> Iterator[Target]:
        """A rank's targets, chosen ones expanded. Raises LayoutError naming the tensor that does not fit."""
        for target in targets:
            if self.quant.takes(target.name, target.shape):
                yield from self._expanded(target)
            else:
                yield target

    def quantised(self, target: Target) -> Quantised:
        """What the plan keeps of a quantised target; where its scales lie is not known yet."""
        name = self.dense[target.name]
        return Quantised(self.quant.scheme, name, target.view.dtype, target.shape, name in self.scanned)

    def uncut(self) -> Iterator[tuple[int, Target]]:
        """The uncut matrices whose largest magnitudes are read first."""
        return ((0, t) for t in self.whole() if t.name in self.scanned)

    def _expanded(self, target: Target) -> Iterator[Target]:
        scheme, name, shape = self.quant.scheme, target.name, target.shape
        if target.view.dtype not in DENSE:
            raise LayoutError(
                f"quant {scheme.name}: {name} is {target.view.dtype}: quantised already, or of a type that "
                f"is not; wanted {', '.join(d.name for d in DENSE)}"
            )
        if self._needs_scan(name, shape, target.view.dtype.itemsize):
            self.scanned.add(name)
        view = target.view
        if scheme.turned:
            if not name.endswith("weight"):
                raise LayoutError(f"quant {scheme.name}: {name}: wanted a name that ends with weight")
            view, shape = view.reshape(shape).T, shape[::-1]
        values = scheme.named(name, scheme.values)
        self.dense[values] = name
        yield Target(values, view, shape, scheme)
        # Zeros stand in for what goes with the values until the road knows it.
        yield Target(scheme.named(name, scheme.scale), zeros(scheme.scale_shape(shape), scheme.scale_dtype))
        if scheme.zero:
            points = dtypes.int64 if scheme.dynamic else scheme.dtype
            yield Target(scheme.named(name, scheme.zero), zeros(scheme.zero_shape(shape), points))
        if scheme.form:
            n = len(scheme.form_values(shape))
            yield Target(scheme.named(name, scheme.form), zeros((n,), scheme.form_dtype))

    def _needs_scan(self, name: str, shape: tuple[int, ...], itemsize: int) -> bool:
        """Whether the scales reach beyond the rank's part, or beyond a band of it."""
        scheme, whole = self.quant.scheme, self.shapes()[name]
        (down, across), at = scheme.shared, f"quant {scheme.name}: {name}"
        rows, columns = shape[-2:]
        cut_rows, cut_columns = rows != whole[-2], columns != whole[-1]
        if scheme.bits == 4 and (columns % across or len(shape) > 2):
            raise LayoutError(f"{at} {shape}: wanted a matrix whose columns divide by the group {across}")
        if rows % 8 and (scheme.turned or (scheme.asymmetric and cut_rows)):
            raise LayoutError(f"{at} {shape}: wanted rows that divide by 8, which share an int32")
        if across > 1 and cut_columns and columns % across:
            raise LayoutError(f"{at}: {columns} of {whole[-1]} columns a rank cut a block of {across}")
        if down > 1:
            self._require_whole_blocks(name, shape, cut_rows)
        shared = down == 0 or (across == 0 and cut_columns)
        if shared and (shape[:-2] != whole[:-2] or (down == 1 and cut_rows)):
            raise LayoutError(
                f"{at}: a rank holds {shape} of {whole}, cut on more than one axis of its scales"
            )
        return shared and (cut_rows or cut_columns or rows * columns * itemsize > DENSE_BYTES)

    def _require_whole_blocks(self, name: str, shape: tuple[int, ...], cut: bool) -> None:
        down, rows = self.quant.scheme.shared[0], shape[-2]
        if not cut and self.layout != "vllm" and len(shape) == 2:
            return  # the hub's own matrix, as the hub would quantise it: the last block may be short
        parts = self._parts(name, rows)
        for part in parts if cut or len(shape) > 2 else parts[:-1]:
            if part % down:
                raise LayoutError(
                    f"quant {self.quant.scheme.name}: {name} {shape}: {part} rows that begin and end a part "
                    f"are no multiple of the block {down}"
                )

    def _parts(self, name: str, rows: int) -> tuple[int, ...]:
        """The rows of each matrix that is fused under a name. Raises LayoutError where they are not known."""
        module = _module(name)
        if module in ("gate_up_proj", "w13", "w13_weight", "input_linear"):
            return rows // 2, rows // 2
        if module in ("qkv_proj", "query_key_value", "fused_qkv_a_proj"):
            if self.sizes is not None and not self.sizes.others and module != "fused_qkv_a_proj":
                tp, head = self.placement.tp, self.sizes.head_dim
                q, kv = self.sizes.heads // tp * head, max(1, self.sizes.kv_heads // tp) * head
                if q + 2 * kv == rows:
                    return q, kv, kv
            raise LayoutError(
                f"quant {self.quant.scheme.name}: {name}: the rows of its parts are not known, so blocks may "
                "stand across them"
            )
        return (rows,)


def _module(name: str) -> str:
    """The last module of a weight's name, or the last part where it is no `.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]


# ---- what the config says ----


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
    dense = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not quant.takes(name, shape)
    ]
    dense += [name.replace(*FORGETS) for name in dense if FORGETS[0] in name]
    # Files call a tower's modules otherwise than transformers' models do: a pattern finds them by both names.
    roots = [root for root in dict.fromkeys(map(tower, dense)) if root]
    towers = [rf"(.*\.)?{root}\..*" for root in roots]
    plain = [name for name in dense if not tower(name)]
    heads = [
        head
        for head, of in HEADS.items()
        if f"{head}.weight" not in shapes and any(name.startswith(of) for name in shapes)
    ]
    match scheme.format:
        case "":
            return {"quant_method": "fastckpt", "scheme": scheme.name}
        case "fp8":
            return {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "weight_block_size": list(scheme.block),
                "modules_to_not_convert": [*dense, *heads, *_fused(dense)],
            }
        case "awq":
            return {
                "quant_method": "awq",
                "bits": scheme.bits,
                "group_size": scheme.block[0],
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": [*plain, *roots, *towers],
            }
        case "gptq":
            # lm_head has a key of its own; a negative pattern tells loaders of every other one that stays.
            names = [re.escape(name) for name in plain if name != "lm_head"]
            skipped: dict[str, JSON] = {f"-:^{name}$": {} for name in (*names, *towers)}
            return {
                "quant_method": "gptq",
                "checkpoint_format": "gptq",
                "bits": scheme.bits,
                "group_size": scheme.block[0],
                "desc_act": False,
                "sym": not scheme.asymmetric,
                "lm_head": "lm_head" not in plain and "lm_head.weight" in shapes,
                "dynamic": skipped,
            }
    return _compressed_config(quant, shapes, [*plain, *(f"re:{pattern}" for pattern in towers), *heads])


def _fused(names: Iterable[str]) -> list[str]:
    """What vLLM calls the modules of towers where it fuses them: of some families it does not know what of.

    Read by its fp8 alone, which takes names as they are (quant_utils.is_layer_skipped of 0.32)."""
    ends = ((".q_proj", ".qkv_proj"), (".gate_proj", ".gate_up_proj"))
    return [n.replace(*end) for n in names for end in ends if tower(n) and n.endswith(end[0])]


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


def _compressed_config(
    quant: Quant, shapes: Mapping[str, tuple[int, ...]], dense: list[str]
) -> dict[str, JSON]:
    """compressed-tensors' `quantization_config`; `dense`: the modules that stay so, or patterns of them."""
    scheme, left = quant.scheme, dense
    if "model.norm.bias" in shapes:  # Phi-3.5-MoE: transformers calls its routers so; Mixtral's are no Linear
        gates = [name for name in dense if name.endswith(".block_sparse_moe.gate")]
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
    kind = "float" if scheme.format == "float-quantized" else "int"
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
    said = config.get("quantization_config")
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


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """A matrix, or a stack of them, as one of so many rows and columns."""
    return math.prod(shape[:-1]), shape[-1]
