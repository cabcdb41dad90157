"""How many values and scales differ from those of the packages that define the schemes, as a table.

    python benchmarks/quant_oracles.py

Packages that are not installed are left out and named. compressed-tensors, torchao and torch.ao quantise the
same random matrix [256, 512] in fp32, bf16 and fp16. A cell has how many of its values differ, of its scales
and, where there are any, of its zero points; a `0` says that every one is equal, bit for bit.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Iterator

import fastckpt
import torch

Compared = tuple[str, torch.Tensor, torch.Tensor]
"""What is compared ("values", "scales", "zero points"), theirs and ours."""

NAME = "a.q_proj.weight"
ROWS, COLUMNS = 256, 512
DTYPES = torch.float32, torch.bfloat16, torch.float16


def main() -> int:
    """Print the table."""
    warnings.filterwarnings("ignore")
    missing = []
    print("| scheme | defined by | scales | float32 | bfloat16 | float16 |\n|---|---|---|---|---|---|")
    for package, oracle in ORACLES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
            continue
        torch.manual_seed(0)
        rows: dict[str, list[str]] = {}  # scheme -> how many scales, and a cell for each dtype
        for dtype in DTYPES:
            for scheme, compared in oracle(torch.randn(ROWS, COLUMNS).to(dtype)):
                row = rows.setdefault(scheme, [str(b.numel()) for what, _, b in compared if what == "scales"])
                row.append(", ".join(str(differing(a, b)) for _, a, b in compared))
        source = f"{package} {version.partition('+')[0]}"
        for scheme, row in rows.items():
            print(f"| {scheme} | {source} | {' | '.join(row + [''] * (1 + len(DTYPES) - len(row)))} |")
    if missing:
        print(f"\nnot installed: {', '.join(missing)}", file=sys.stderr)
    return 0


def differing(theirs: torch.Tensor, ours: torch.Tensor) -> int:
    """Elements whose bits differ."""
    a, b = theirs.contiguous().reshape(-1), ours.contiguous().reshape(-1)
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    return int((a.view(torch.uint8) != b.view(torch.uint8)).reshape(len(a), -1).any(1).sum())


def ours(dense: torch.Tensor, scheme: str) -> dict[str, torch.Tensor]:
    (made,) = fastckpt.reshard({NAME: dense}, layout="same", quant=scheme)
    return made


def nibbles(words: torch.Tensor) -> torch.Tensor:
    return torch.stack([(words >> (4 * k)) & 15 for k in range(8)], -1)


def compressed_tensors(dense: torch.Tensor) -> Iterator[tuple[str, list[Compared]]]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    for scheme, kind, strategy in (
        ("int8", "int", "channel"), ("fp8", "float", "tensor"), ("fp8-channel", "float", "channel")
    ):  # fmt: skip
        args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, symmetric=True)
        axes = (0, 1) if strategy == "tensor" else (1,)
        low, high = (f(axes, keepdim=True) for f in (dense.amin, dense.amax))
        scale, zero = calculate_qparams(low, high, args)
        made = ours(dense, scheme)
        values = quantize(dense, scale, zero, args, dtype=made[NAME].dtype)
        yield scheme, [("values", values, made[NAME]), ("scales", scale.float(), made[f"{NAME}_scale"])]
    for group, end in ((128, ""), (64, "64"), (32, "32")):
        for symmetric in (True, False):
            scheme = f"int4-group{end}{'' if symmetric else '-zero'}"
            args = QuantizationArgs(num_bits=4, strategy="group", group_size=group, symmetric=symmetric)
            boxes = dense.reshape(ROWS, -1, group)
            scale, zero = calculate_qparams(boxes.amin(2), boxes.amax(2), args)
            state = {"weight": dense, "weight_scale": scale, "weight_zero_point": zero}
            told = QuantizationScheme(targets=["Linear"], weights=args)
            packed = PackedQuantizationCompressor.compress(state, told)
            made = ours(dense, scheme)
            compared = [
                ("values", nibbles(packed["weight_packed"]), nibbles(made[f"{NAME}_packed"])),
                ("scales", scale.float(), made[f"{NAME}_scale"]),
            ]
            if not symmetric:
                points = nibbles(packed["weight_zero_point"]), nibbles(made[f"{NAME}_zero_point"])
                compared.append(("zero points", *points))
            yield scheme, compared
    yield from microscaled(dense)


def microscaled(dense: torch.Tensor) -> Iterator[tuple[str, list[Compared]]]:
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
    from compressed_tensors.quantization.utils import calculate_qparams

    for scheme, compressor, part in (
        ("mxfp4", MXFP4PackedCompressor, "weight_packed"), ("mxfp8", MXFP8QuantizationCompressor, "weight")
    ):  # fmt: skip
        told = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[f"{scheme.upper()}A16"])
        boxes = dense.reshape(ROWS, -1, 32)
        scale, _ = calculate_qparams(boxes.amin(2), boxes.amax(2), told.weights)
        theirs = compressor.compress({"weight": dense.clone(), "weight_scale": scale}, told)
        made = ours(dense, scheme)
        values = made[NAME + part.removeprefix("weight")]
        yield (
            scheme,
            [
                ("values", *(spread(v, scheme) for v in (theirs[part], values))),
                ("scales", theirs["weight_scale"], made[f"{NAME}_scale"]),
            ],
        )


def spread(values: torch.Tensor, scheme: str) -> torch.Tensor:
    return torch.stack([values & 15, values >> 4], -1) if scheme == "mxfp4" else values


def torchao(dense: torch.Tensor) -> Iterator[tuple[str, list[Compared]]]:
    from torchao.quantization import quant_primitives as q

    eps = torch.finfo(torch.float32).eps
    told = (q.MappingType.SYMMETRIC, (1, COLUMNS), torch.int8)
    scale, zero = q.choose_qparams_affine(dense, *told, eps=eps, scale_dtype=torch.float32)
    values = q.quantize_affine(dense, (1, COLUMNS), scale, zero, torch.int8)
    made = ours(dense, "int8-dynamic-channel")
    yield "int8-dynamic-channel", [("values", values, made[NAME]), ("scales", scale, made[f"{NAME}_scale"])]
    blocks = {"fp8": (ROWS, COLUMNS), "fp8-channel": (1, COLUMNS), "fp8-block": (128, 128)}
    for scheme, block in blocks.items():
        scale = q._choose_scale_float8(dense, block, torch.float8_e4m3fn)
        values = q._quantize_affine_float8(dense, scale, torch.float8_e4m3fn)
        made = ours(dense, scheme)
        end = "_scale_inv" if scheme == "fp8-block" else "_scale"
        yield scheme, [("values", values, made[NAME]), ("scales", scale, made[NAME + end])]


def torch_ao(dense: torch.Tensor) -> Iterator[tuple[str, list[Compared]]]:
    from torch.ao import quantization as q

    if dense.dtype is not torch.float32:
        return  # quantize_dynamic takes no other
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    with torch.no_grad():
        linear.weight.copy_(dense)
    for scheme, config in (
        ("int8-dynamic", q.default_dynamic_qconfig), ("int8-dynamic-channel", q.per_channel_dynamic_qconfig)
    ):  # fmt: skip
        made = ours(dense, scheme)
        theirs = q.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear: config})[0].weight()
        if scheme == "int8-dynamic":
            scale, zero = torch.tensor([theirs.q_scale()]), torch.tensor([theirs.q_zero_point()])
        else:
            scale, zero = theirs.q_per_channel_scales(), theirs.q_per_channel_zero_points()
        yield (
            scheme,
            [
                ("values", theirs.int_repr(), made[NAME]),
                ("scales", scale.float(), made[f"{NAME}_scale"]),
                ("zero points", zero.long(), made[f"{NAME}_zero_point"]),
            ],
        )


ORACLES: dict[str, Callable[[torch.Tensor], Iterator[tuple[str, list[Compared]]]]] = {
    "compressed-tensors": compressed_tensors,
    "torchao": torchao,
    "torch": torch_ao,
}
"""Package -> what it defines: (scheme, what to compare)."""


if __name__ == "__main__":
    sys.exit(main())
