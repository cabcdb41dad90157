"""Element types: one table of names, codes and sizes for files, torch and `csrc/copy.h`.

Law: `code` is the byte that stands in a Copy row; `csrc/cast.h` numbers the types alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import SourceError, ViewError


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    `name` is torch's spelling, `code` the byte of a Copy row, `itemsize` in bytes, `kind` one of
    "float", "int", "bool", "complex"; `safetensors` and `storage` are that format's and torch's
    typed-storage names ("" where the format has none); `digits` and `exponent` are the significand's
    bits (hidden one included) and the exponent's bits of a float, else 0; `packed`: the values in one
    element, which safetensors counts along the last axis.
    """

    name: str
    code: int
    itemsize: int
    kind: str
    safetensors: str
    storage: str
    digits: int = 0
    exponent: int = 0
    packed: int = 1

    def __str__(self) -> str:
        return self.name


float32 = DType("float32", 0, 4, "float", "F32", "FloatStorage", 24, 8)
bfloat16 = DType("bfloat16", 1, 2, "float", "BF16", "BFloat16Storage", 8, 8)
float16 = DType("float16", 2, 2, "float", "F16", "HalfStorage", 11, 5)
float8_e4m3fn = DType("float8_e4m3fn", 3, 1, "float", "F8_E4M3", "", 4, 4)
float8_e5m2 = DType("float8_e5m2", 4, 1, "float", "F8_E5M2", "", 3, 5)
float64 = DType("float64", 5, 8, "float", "F64", "DoubleStorage", 53, 11)
int8 = DType("int8", 6, 1, "int", "I8", "CharStorage")
uint8 = DType("uint8", 7, 1, "int", "U8", "ByteStorage")
int16 = DType("int16", 8, 2, "int", "I16", "ShortStorage")
int32 = DType("int32", 9, 4, "int", "I32", "IntStorage")
int64 = DType("int64", 10, 8, "int", "I64", "LongStorage")
bool_ = DType("bool", 11, 1, "bool", "BOOL", "BoolStorage")
uint16 = DType("uint16", 12, 2, "int", "U16", "")
uint32 = DType("uint32", 13, 4, "int", "U32", "")
uint64 = DType("uint64", 14, 8, "int", "U64", "")
complex64 = DType("complex64", 15, 8, "complex", "C64", "ComplexFloatStorage")
complex128 = DType("complex128", 16, 16, "complex", "", "ComplexDoubleStorage")
float8_e8m0fnu = DType("float8_e8m0fnu", 17, 1, "int", "F8_E8M0", "")
float8_e4m3fnuz = DType("float8_e4m3fnuz", 18, 1, "int", "", "")
float8_e5m2fnuz = DType("float8_e5m2fnuz", 19, 1, "int", "", "")
complex32 = DType("complex32", 20, 4, "complex", "", "")
float4_e2m1fn_x2 = DType("float4_e2m1fn_x2", 21, 1, "int", "F4", "", packed=2)

DTYPES: tuple[DType, ...] = (
    float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, float64,
    int8, uint8, int16, int32, int64, bool_, uint16, uint32, uint64,
    complex64, complex128, float8_e8m0fnu, float8_e4m3fnuz, float8_e5m2fnuz,
    complex32, float4_e2m1fn_x2,
)  # fmt: skip
BY_NAME: dict[str, DType] = {d.name: d for d in DTYPES}
BY_SAFETENSORS: dict[str, DType] = {d.safetensors: d for d in DTYPES if d.safetensors}

_SHORT = {"fp32": float32, "bf16": bfloat16, "fp16": float16, "half": float16, "fp8": float8_e4m3fn}


def dtype(name: str | DType) -> DType:
    """The type of that name: torch's spelling ("bfloat16", "torch.bfloat16") or own, or a short one ("bf16").

    Raises ViewError naming the known types."""
    if isinstance(name, DType):
        return name
    plain = str(name).removeprefix("torch.").lower()
    found = BY_NAME.get(plain) or _SHORT.get(plain)
    if found is None:
        raise ViewError(f"unknown dtype {name!r}; known: {', '.join(BY_NAME)}")
    return found


CONFIG_KEYS = ("dtype", "torch_dtype")
"""Where a config.json names the dtype; transformers 4 wrote the second."""


def of_config(config: Mapping[str, object]) -> DType | None:
    """The type that a config.json names, None where it names none. Raises SourceError for one that is not
    known."""
    for key in CONFIG_KEYS:
        if (named := config.get(key)) is not None:
            try:
                return dtype(str(named))
            except ViewError as e:
                raise SourceError(f"config.json: {key}: {e}") from None
    return None


def counted(dtype: DType, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as safetensors writes it, in values. Raises ViewError for packed values without an axis."""
    if dtype.packed == 1:
        return tuple(shape)
    if not shape:
        raise ViewError(f"{dtype}: {dtype.packed} values an element, and no axis to count them on")
    return (*shape[:-1], shape[-1] * dtype.packed)


def in_elements(dtype: DType, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape whose `counted` is `shape`. Raises ViewError where there is none."""
    if dtype.packed == 1:
        return tuple(shape)
    if not shape or shape[-1] % dtype.packed:
        raise ViewError(f"{dtype}: {list(shape)} does not hold whole elements of {dtype.packed} values")
    return (*shape[:-1], shape[-1] // dtype.packed)


def castable(src: DType, dst: DType) -> bool:
    """Whether a Copy row may convert `src` to `dst`: equal types, or two floats."""
    return src is dst or (src.kind == "float" and dst.kind == "float")


def exact(src: DType, dst: DType) -> bool:
    """Whether every value of `src` is a value of `dst`, so that a cast rounds nothing."""
    return src is dst or (
        src.kind == dst.kind == "float" and dst.digits >= src.digits and dst.exponent >= src.exponent
    )
