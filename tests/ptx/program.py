"""PTX as data: the text that nvcc makes of a .cu file, taken apart into kernels and their instructions."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

WIDTHS = {"pred": 1, "b16": 2, "b32": 4, "f32": 4, "b64": 8, "f64": 8}
SCOPE = re.compile(r"^\{ | \}$|; (?!\})")
"""What parts the statements of a line that has several: a scope of its own."""
PARAMETERS = {"u8": 1, "u16": 2, "u32": 4, "f32": 4, "u64": 8, "f64": 8}


@dataclass(frozen=True, slots=True)
class Register:
    """A register, or a special one as %tid.x."""

    name: str


@dataclass(frozen=True, slots=True)
class Number:
    """An immediate: an integer, or the bits of a float."""

    value: int


@dataclass(frozen=True, slots=True)
class Name:
    """A label, a parameter or an array."""

    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """What stands in brackets: a base, and bytes from there."""

    base: Register | Name | Number
    offset: int


@dataclass(frozen=True, slots=True)
class Several:
    """What stands in braces."""

    parts: tuple[Register, ...]


Operand = Register | Number | Name | Place | Several


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `guard`: the predicate it runs under, and the value that must have."""

    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel; `labels`: the number of the instruction after each."""

    name: str
    threads: int  # of a block
    parameters: dict[str, int]  # in order, bytes of each
    widths: dict[str, int]  # bytes of the registers, by their letters
    shared: dict[str, int]  # where each array lies
    shared_bytes: int
    code: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclass(frozen=True, slots=True)
class Program:
    """The kernels of a file, and its arrays of constants in global memory."""

    kernels: tuple[Kernel, ...]
    constants: dict[str, bytes]

    def kernel(self, *words: str) -> Kernel:
        """The one whose mangled name has all these words. Raises ValueError where not one has."""
        found = [k for k in self.kernels if all(w in k.name for w in words)]
        if len(found) != 1:
            raise ValueError(f"{words}: {[k.name for k in found]} of {[k.name for k in self.kernels]}")
        return found[0]


def parse(text: str) -> Program:
    """The program of a PTX text as nvcc writes it. Raises ValueError for any other."""
    text = re.sub(r"//[^\n]*", "", text)
    array = re.compile(r"^\.global \.align \d+ \.b8 (\w+)\[(\d+)\] = \{([\d, ]*)\};", re.M)
    constants = {
        m[1]: bytes(int(x) for x in m[3].split(",")).ljust(int(m[2]), b"\0") for m in array.finditer(text)
    }
    entry = re.compile(r"\.entry (\w+)\(([^)]*)\)([^{]*)^\{(.*?)^\}", re.S | re.M)
    return Program(
        tuple(_kernel(m, text.count("\n", 0, m.start(4)) + 1) for m in entry.finditer(text)), constants
    )


def _kernel(found: re.Match[str], line: int) -> Kernel:
    name, parameters, directives, body = found.groups()
    threads = re.search(r"\.maxntid (\d+)(, 1, 1)?\s", directives)
    if threads is None:
        raise ValueError(f"{name}: no .maxntid in {directives!r}")
    given: dict[str, int] = {}
    for words in parameters.split(","):
        m = re.fullmatch(r"\s*\.param (?:\.align \d+ )?\.(\w+) (\w+)(?:\[(\d+)\])?\s*", words)
        if m is None:
            raise ValueError(f"{name}: parameter {words!r}")
        given[m[2]] = int(m[3]) if m[3] else PARAMETERS[m[1]]
    widths: dict[str, int] = {}
    shared: dict[str, int] = {}
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    end = 0
    lines = ((n, x) for n, words in enumerate(body.splitlines(), line) for x in SCOPE.split(words.strip()))
    for number, words in lines:
        words = " ".join(words.split()).removesuffix(";").strip()
        if words in ("", "{", "}") or words.startswith(".pragma"):
            continue
        if m := re.fullmatch(r"(\$\w+):", words):
            labels[m[1]] = len(code)
        elif m := re.fullmatch(r"\.reg \.(\w+) %?([a-z]+)(?:<\d+>)?", words):
            if widths.setdefault(m[2], WIDTHS[m[1]]) != WIDTHS[m[1]]:
                raise ValueError(f"{name}: line {number}: {words}: registers %{m[2]} of two widths")
        elif m := re.fullmatch(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", words):
            shared[m[2]] = -(-end // int(m[1])) * int(m[1])
            end = shared[m[2]] + int(m[3])
        elif m := re.fullmatch(r"(?:@(!?)(%\w+) )?([a-z][\w.:]*)(?: (.*))?", words):
            guard = (Register(m[2]), not m[1]) if m[2] else None
            operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,][^,]*", m[4] or "")
            code.append(Instruction(number, words, m[3], tuple(_operand(x.strip()) for x in operands), guard))
        else:
            raise ValueError(f"{name}: line {number}: {words}")
    return Kernel(name, int(threads[1]), given, widths, shared, end, tuple(code), labels)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Several(tuple(Register(x.strip()) for x in text[1:-1].split(",")))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        at = _operand(base.strip())
        if not isinstance(at, Register | Name | Number):
            raise ValueError(f"an address {text}")
        return Place(at, int(offset or "0"))
    if text.startswith("%"):
        return Register(text)
    if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text):
        return Number(int(text, 0))
    if m := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", text):
        return Number(struct.unpack(">I" if m[1] == "f" else ">Q", bytes.fromhex(m[2]))[0])
    return Name(text)
