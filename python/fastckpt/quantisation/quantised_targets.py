"""Which targets a quantised plan has: a chosen matrix becomes values, scales and what goes with them.

Law: the scales are those of the uncut matrix, whatever the placement. A cut through a block or group is
refused. Where a scale is shared across a cut, or by more than DENSE_BYTES, the uncut matrix is read first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from .. import dtypes
from ..errors import LayoutError
from ..model import Sizes
from ..placement import Placement
from ..target import Target
from ..views import zeros
from .rounding import DENSE
from .schemes import MICROSCALED, Quant, Scheme

SERVED = frozenset({"int-quantized", "float-quantized", "pack-quantized", "fp8", "awq", "gptq"})

FITS: dict[str, frozenset[str]] = {
    "hf": frozenset({*SERVED, *MICROSCALED, "mxfp4", ""}),
    "same": frozenset({*SERVED, *MICROSCALED, "mxfp4", ""}),
    "vllm": SERVED | MICROSCALED,
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
        if scheme.stacks:
            view = view.permute((0, 2, 1))
            shape = view.shape
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
        if scheme.stacks:
            if shape[1] % across or shape != whole or f"{name}_bias" not in self.shapes():
                raise LayoutError(
                    f"{at} {shape} of {whole}: wanted gpt-oss's stacks, which have biases, uncut, of "
                    f"inputs that divide by {across}"
                )
            return False
        rows, columns = shape[-2:]
        cut_rows, cut_columns = rows != whole[-2], columns != whole[-1]
        if (scheme.bits == 4 or scheme.microscaled) and (columns % across or len(shape) > 2):
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


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """A matrix, or a stack of them, as one of so many rows and columns."""
    return math.prod(shape[:-1]), shape[-1]
