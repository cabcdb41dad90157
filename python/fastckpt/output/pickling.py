"""The pickle of torch's files, written opcode by opcode: dicts of tensors and plain values.

Law: the bytes are those of CPython's pickler, protocol 2, for what torch.save gives it. Nothing is ever read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import JSON
from ..dtypes import DType
from ..errors import WriteError
from ..views import dense_strides
from .files import Spec

_BATCH = 1000
_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Wrap:
    """A single-file training checkpoint: {weights_key: tensors, **client_state}, of plain values."""

    weights_key: str
    client_state: Mapping[str, JSON]


def pickled(path: str, tensors: Sequence[Spec], aliases: Mapping[str, str], wrap: Wrap | None) -> bytes:
    """The pickle of a dict of tensors, or of a checkpoint around it; tensor k lies in storage k.

    Each alias is of a tensor. Raises WriteError, naming `path`, for a value that cannot be written."""
    writer = _Pickle(path)
    if wrap is None:
        writer.tensors(tensors, aliases)
    else:
        if wrap.weights_key in wrap.client_state:
            raise WriteError(f"{path}: client state has a key {wrap.weights_key!r} of its own")
        writer.mapping([wrap.weights_key, *wrap.client_state], lambda k: (
            writer.tensors(tensors, aliases) if k == wrap.weights_key else writer.value(wrap.client_state[k])
        ))  # fmt: skip
    return bytes(writer.out + b".")


class _Pickle:
    """The opcodes CPython's pickler writes, protocol 2, for dicts of tensors and plain values."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.out = bytearray(b"\x80\x02")
        self._memo: dict[str, int] = {}
        self._count = 0

    def put(self) -> int:
        """Number the value just written; the pickler numbers every one, used again or not."""
        k = self._count
        self._count += 1
        self.out += b"q" + bytes((k,)) if k < 256 else b"r" + struct.pack("<I", k)
        return k

    def get(self, k: int) -> None:
        self.out += b"h" + bytes((k,)) if k < 256 else b"j" + struct.pack("<I", k)

    def named(self, key: str, opcodes: bytes) -> None:
        """A global or constant string: written once, got from the memo after."""
        if key in self._memo:
            self.get(self._memo[key])
        else:
            self.out += opcodes
            self._memo[key] = self.put()

    def glob(self, module: str, name: str) -> None:
        self.named(f"{module} {name}", f"c{module}\n{name}\n".encode())

    def word(self, text: str) -> None:
        self.named(f"'{text}", self.encoded(text))

    def encoded(self, text: str) -> bytes:
        raw = text.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw

    def string(self, text: str) -> None:
        self.out += self.encoded(text)
        self.put()

    def integer(self, n: int) -> None:
        if 0 <= n < 1 << 8:
            self.out += b"K" + bytes((n,))
        elif 0 <= n < 1 << 16:
            self.out += b"M" + struct.pack("<H", n)
        elif -(1 << 31) <= n < 1 << 31:
            self.out += b"J" + struct.pack("<i", n)
        else:
            raw = n.to_bytes((n.bit_length() >> 3) + 1, "little", signed=True)
            if n < 0 and raw[-1] == 0xFF and raw[-2] & 0x80:
                raw = raw[:-1]
            if len(raw) > 255:
                said = f"client state holds an integer of {len(raw)} bytes, wanted at most 255"
                raise WriteError(f"{self.path}: {said}")
            self.out += b"\x8a" + bytes((len(raw),)) + raw

    def integers(self, values: Sequence[int]) -> None:
        """A tuple of integers."""
        if not values:
            self.out += b")"
            return
        if len(values) > 3:
            self.out += b"("
        for n in values:
            self.integer(n)
        self.out += b"\x85\x86\x87t"[min(len(values), 4) - 1 : min(len(values), 4)]
        self.put()

    def mapping(self, keys: Sequence[str], value: Callable[[str], None]) -> None:
        """A dict: each key, then what `value(key)` writes, a thousand pairs a batch."""
        self.out += b"}"
        self.put()
        if len(keys) == 1:
            self.string(keys[0])
            value(keys[0])
            self.out += b"s"
            return
        # a full last batch is followed by an empty one, as CPython does
        for first in range(0, len(keys) + 1, _BATCH) if keys else ():
            self.out += b"("
            for key in keys[first : first + _BATCH]:
                self.string(key)
                value(key)
            self.out += b"u"

    def value(self, value: JSON, depth: int = 0) -> None:
        """A plain value."""
        if depth > _MAX_DEPTH:
            raise WriteError(f"{self.path}: client state is nested deeper than {_MAX_DEPTH}")
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            self.string(value)
        elif isinstance(value, dict):
            inner = value
            self.mapping(list(inner), lambda k: self.value(inner[k], depth + 1))
        elif isinstance(value, list):
            self.sequence(value, depth)
        else:
            raise WriteError(f"{self.path}: client state holds a {type(value).__name__}; wanted plain values")

    def sequence(self, values: Sequence[JSON], depth: int) -> None:
        self.out += b"]"
        self.put()
        if len(values) == 1:
            self.value(values[0], depth + 1)
            self.out += b"a"
            return
        for first in range(0, len(values), _BATCH):
            self.out += b"("
            for item in values[first : first + _BATCH]:
                self.value(item, depth + 1)
            self.out += b"e"

    def tensors(self, tensors: Sequence[Spec], aliases: Mapping[str, str]) -> None:
        """The dict of tensors; tensor k lies in storage k; an alias gets its holder's tensor again."""
        specs = {t[0]: (k, t[1], t[2]) for k, t in enumerate(tensors)}
        made: dict[str, int] = {}

        def write(name: str) -> None:
            if name in aliases:
                self.get(made[aliases[name]])
            else:
                made[name] = self.tensor(*specs[name])

        self.mapping([*specs, *aliases], write)

    def tensor(self, key: int, dtype: DType, shape: tuple[int, ...]) -> int:
        """A contiguous tensor that is the whole of storage `key`; its number in the memo."""
        typed = bool(dtype.storage)  # newer types have no typed storage: torch keeps bytes and the type
        numel = math.prod(shape)
        self.glob("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self.word("storage")
        self.glob(*(("torch", dtype.storage) if typed else ("torch.storage", "UntypedStorage")))
        self.string(str(key))
        self.word("cpu")
        self.integer(numel if typed else numel * dtype.itemsize)
        self.out += b"t"
        self.put()
        self.out += b"QK\x00"
        self.integers(shape)
        self.integers(dense_strides([max(n, 1) for n in shape]))
        self.out += b"\x89"
        self.glob("collections", "OrderedDict")
        self.out += b")R"
        self.put()
        if not typed:
            self.glob("torch", dtype.name)
        self.out += b"t"
        self.put()
        self.out += b"R"
        return self.put()
