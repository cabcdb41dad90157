"""Which targets a quantised plan has: a chosen matrix becomes values, scales and what goes with them.

Law: the scales are those of the uncut matrix, whatever the placement. A block or group that a cut would tear
is refused; a scale that is shared across a cut comes from the uncut matrix, which is then read first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from . import dtypes
from .checkpoint import JSON
from .errors import LayoutError
from .model import Sizes
from .placement import Placement
from .rounding import DENSE
from .schemes import Quant, Scheme
from .target import Target
from .views import zeros

FITS: dict[str, frozenset[str]] = {
    "hf": frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8", ""}),
    "same": frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8", ""}),
    "vllm": frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8"}),
}
"""layout -> the formats it can hold. rtp_llm wants its own orders of quantised matrices: not made yet."""

_FUSED = ("qkv_proj", "query_key_value", "gate_up_proj", "w13_weight", "fused_qkv_a_proj")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised tensor of a plan. `name`, `dtype`, `shape`: of the dense matrix; `scanned`: its scales come
    from a first read of the uncut matrix of that name; `scales`, `form`: the plan's tensors that hold the
    scales and, where values are packed, the dense shape."""

    scheme: Scheme
    name: str
    dtype: dtypes.DType
    shape: tuple[int, ...]
    scanned: bool
    scales: int = -1
    form: int | None = None


@dataclass(frozen=True, slots=True)
class Expansion:
    """How targets are expanded. `whole`: name -> shape of every target of an uncut placement.

    `sizes` of the model where the layout knows roles. `scanned`: output name -> dense name, of what needs a
    first read; filled as targets pass."""

    quant: Quant
    layout: str
    placement: Placement
    whole: Mapping[str, tuple[int, ...]]
    sizes: Sizes | None
    scanned: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        quant: Quant, layout: str, placement: Placement, whole: Iterable[Target], sizes: Sizes | None
    ) -> Expansion:
        """Raises LayoutError where the layout has no place for the scheme, or no tensor is chosen."""
        scheme = quant.scheme
        if scheme.format not in FITS.get(layout, frozenset()):
            raise LayoutError(f"layout {layout} has no place for quantisation scheme {scheme.name}")
        shapes = {t.name: t.shape for t in whole}
        if not any(quant.takes(n, s) for n, s in shapes.items()):
            raise LayoutError(
                f"quant {scheme.name}: no tensor is a matrix known by name; say which with include patterns"
            )
        return Expansion(quant, layout, placement, shapes, sizes)

    def targets(self, targets: Iterable[Target]) -> Iterator[Target]:
        """A rank's targets, chosen ones expanded. Raises LayoutError naming the tensor that does not fit."""
        for target in targets:
            if self.quant.takes(target.name, target.shape):
                yield from self._expanded(target)
            else:
                yield target

    def quantised(self, target: Target) -> Quantised:
        """What the plan keeps of a quantised target; where its scales lie is not known yet."""
        scheme = self.quant.scheme
        name = target.name[: len(target.name) - len(scheme.packed)]
        scanned = target.name in self.scanned
        return Quantised(scheme, name, target.view.dtype, target.shape, scanned)

    def uncut(self, whole: Callable[[], Iterator[Target]]) -> Iterator[tuple[int, Target]]:
        """The uncut matrices whose largest magnitudes are read first."""
        names = set(self.scanned.values())
        return ((0, t) for t in whole() if t.name in names)

    def _expanded(self, target: Target) -> Iterator[Target]:
        scheme, name, shape = self.quant.scheme, target.name, target.shape
        if target.view.dtype not in DENSE:
            raise LayoutError(
                f"quant {scheme.name}: {name} is {target.view.dtype}: quantised already, or of a type that "
                f"is not; wanted {', '.join(d.name for d in DENSE)}"
            )
        if self._needs_scan(name, shape):
            self.scanned[name + scheme.packed] = name
        yield Target(name + scheme.packed, target.view, shape, scheme)
        scales = scheme.scale_shape(shape)
        # Zeros stand in for the scales until they are known, and for the shape; the road fills them.
        yield Target(name + scheme.scale, zeros(scales, dtypes.float32))
        if scheme.zero_point:
            yield Target(f"{name}_zero_point", zeros(scales, dtypes.int64))
        if scheme.packed:
            yield Target(f"{name}_shape", zeros((len(shape),), dtypes.int64))

    def _needs_scan(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the scales reach beyond the rank's part, or beyond a band of it."""
        scheme, whole = self.quant.scheme, self.whole[name]
        (down, across), at = scheme.block, f"quant {scheme.name}: {name}"
        rows, columns = shape[-2:]
        cut_rows, cut_columns = rows != whole[-2], columns != whole[-1]
        fused = self.layout == "vllm" and (len(shape) > 2 or _module(name) in _FUSED)
        if scheme.bits == 4 and (columns % across or len(shape) > 2):
            raise LayoutError(f"{at} {shape}: wanted a matrix whose columns divide by the group {across}")
        if across > 1 and cut_columns and columns % across:
            raise LayoutError(f"{at}: {columns} of {whole[-1]} columns a rank cut a block of {across}")
        if down > 1:
            self._require_whole_blocks(name, shape, cut_rows)
        if down == 0 and fused:
            raise LayoutError(f"{at}: vLLM keeps a scale for each matrix that is fused there; not made yet")
        shared = down == 0 or (across == 0 and cut_columns)
        if shared and (shape[:-2] != whole[:-2] or (down == 1 and cut_rows)):
            raise LayoutError(
                f"{at}: a rank holds {shape} of {whole}, cut on more than one axis of its scales"
            )
        return shared

    def _require_whole_blocks(self, name: str, shape: tuple[int, ...], cut: bool) -> None:
        down, rows = self.quant.scheme.block[0], shape[-2]
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
        """The rows of the matrices that are fused under a name."""
        module = _module(name)
        if module in ("gate_up_proj", "w13_weight"):
            return rows // 2, rows // 2
        if module in ("qkv_proj", "query_key_value", "fused_qkv_a_proj"):
            if self.sizes is not None and module != "fused_qkv_a_proj":
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


def quantization_config(expansion: Expansion) -> dict[str, JSON]:
    """The `quantization_config` of config.json: compressed-tensors' or DeepSeek's fp8, else one that loaders
    do not know and so refuse."""
    quant = expansion.quant
    scheme = quant.scheme
    left: list[JSON] = [
        name.removesuffix(".weight")
        for name, shape in expansion.whole.items()
        if name.endswith(".weight")
        and len(shape) == 2
        and "embed" not in name
        and not quant.takes(name, shape)
    ]
    if scheme.format == "":
        return {"quant_method": "fastckpt", "scheme": scheme.name}
    if scheme.format == "fp8":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(scheme.block),
            "modules_to_not_convert": left,
        }
    kind = "float" if scheme.format == "float-quantized" else "int"
    strategy = {(0, 0): "tensor", (1, 0): "channel"}.get(scheme.block, "group")
    weights: dict[str, JSON] = {
        "num_bits": scheme.bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
    }
    inputs: dict[str, JSON] | None = None
    if strategy == "group":
        weights["group_size"] = scheme.block[1]
    else:
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    group: dict[str, JSON] = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
    }


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """A matrix, or a stack of them, as one of so many rows and columns."""
    return math.prod(shape[:-1]), shape[-1]
