"""Runs a kernel's PTX: all threads of some blocks at once, each instruction over those that stand at it.

Of the threads that wait for nothing those at the first instruction go on, until a branch parts them or they
come to where others stand: what was parted meets again. A barrier waits for every thread of its block; one
that has ended, or waits at another barrier, is a fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from .memory import WARP, Fault, Global, Shared
from .operations import CONVERSIONS, OPERATIONS, TYPES, Array
from .program import Instruction, Kernel, Name, Number, Operand, Place, Program, Register, Several

LANES = 4096  # threads that run at once
STEPS = 1_000_000  # instructions after which they are taken to run for ever
CACHED = ("", ".nc", ".cs", ".nc.L1::no_allocate")  # how loads and stores may be cached: all one here

Run = Callable[["Lanes"], None]


class Machine:
    """Some blocks of a launch under way. `issued[i]`: how many warps ran instruction i."""

    def __init__(
        self, kernel: Kernel, memory: Global, symbols: dict[str, int], arguments: bytes, blocks: Array
    ) -> None:
        self.kernel, self.memory, self.symbols, self.arguments = kernel, memory, symbols, arguments
        self.lanes = len(blocks) * kernel.threads
        self.shared = Shared(len(blocks), kernel.shared_bytes)
        thread = np.tile(np.arange(kernel.threads, dtype=np.uint32), len(blocks))
        block = np.repeat(blocks.astype(np.uint32), kernel.threads)
        self.registers = {"%tid.x": thread, "%ctaid.x": block}
        self.number = (
            block.astype(np.int32) * kernel.threads + thread.astype(np.int32) + 1
        )  # of the launch, from 1
        self.row = np.repeat(np.arange(len(blocks)), kernel.threads)  # of shared memory
        self.at = np.zeros(self.lanes, np.int32)  # the instruction that each thread stands at
        self.waits = np.zeros(self.lanes, bool)  # at the barrier before it
        self.issued = np.zeros(len(kernel.code), np.int64)

    def register(self, name: str) -> Array:
        """What each thread holds there; rubbish before it is written."""
        if name not in self.registers:
            width = self.kernel.widths[name.lstrip("%").rstrip("0123456789")]
            rubbish = np.frombuffer(bytes.fromhex("efbeaddeefbeadde")[:width], f"u{width}")
            self.registers[name] = np.full(self.lanes, rubbish[0], bool if width == 1 else rubbish.dtype)
        return self.registers[name]

    def run(self) -> None:
        """Until every thread has ended. Raises Fault where a GPU would stop or might give another result."""
        end = len(self.kernel.code)
        while True:
            standing = np.where(self.waits, end, self.at)
            first = int(standing.min())
            if first == end:
                if not self.waits.any():
                    return
                self.meet()
                continue
            here = standing == first
            self.go(first, int(standing[~here].min(initial=end)), np.flatnonzero(here))

    def go(self, i: int, stop: int, who: Array) -> None:
        """The threads `who` from instruction i on, up to where others stand."""
        lanes, code = Lanes(self, who), self.kernel.code
        warps = len(np.unique((self.number[who] - 1) // WARP))
        while i < stop:
            ins = code[i]
            self.issued[i] += warps
            if self.issued[i] > STEPS:
                raise Fault(f"{ins.text}: run {STEPS} times")
            try:
                under = lanes.under(ins)
                if ins.opcode in ("bra", "bra.uni"):
                    to = self.kernel.labels[ins.operands[0].name]
                    if len(under.who) not in (0, len(who)):
                        self.at[who] = i + 1
                        self.at[under.who] = to
                        return
                    i = to if len(under.who) else i + 1
                    continue
                if ins.opcode == "ret":
                    self.at[who] = i + 1
                    self.at[under.who] = len(code)
                    return
                if ins.opcode == "bar.sync":
                    self.at[who] = i + 1
                    self.waits[who] = True
                    return
                if len(under.who):
                    decoded(ins)(under)
            except Fault as fault:
                lane = int(under.who[fault.lane])
                thread, block = (int(self.registers[x][lane]) for x in ("%tid.x", "%ctaid.x"))
                where = f"{self.kernel.name}, line {ins.line}: {ins.text}: thread {thread} of block {block}"
                raise Fault(f"{where}: {fault}") from None
            i += 1
        self.at[who] = i

    def meet(self) -> None:
        """Barriers that all threads of a block have come to open."""
        waits = self.waits.reshape(-1, self.kernel.threads)
        at = self.at.reshape(waits.shape)
        for block in np.flatnonzero(waits.any(axis=1)):
            if not waits[block].all() or (at[block] != at[block, 0]).any():
                raise Fault(f"{self.kernel.name}: a barrier that not every thread of its block comes to")
            self.shared.meet(block)
            waits[block] = False


class Lanes:
    """Some threads of a machine, and their registers."""

    def __init__(self, machine: Machine, who: Array) -> None:
        self.machine, self.who = machine, who
        self.chosen = slice(None) if len(who) == machine.lanes else who

    def under(self, ins: Instruction) -> Lanes:
        """Those that run an instruction."""
        if ins.guard is None:
            return self
        held = self.machine.register(ins.guard[0].name)[self.chosen]
        return Lanes(self.machine, self.who[held == ins.guard[1]])

    def read(self, operand: Operand, dtype: np.dtype) -> Array:
        """[n] or [1] values of this type: the low bytes of what the operand holds."""
        if isinstance(operand, Number) and dtype.kind == "b":
            return np.array([operand.value != 0])
        if isinstance(operand, Number):
            return np.array([operand.value & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)
        if isinstance(operand, Name):
            return np.array([self.machine.symbols[operand.name]], np.uint64).astype(dtype)
        if not isinstance(operand, Register):
            raise TypeError(f"{operand} as a value")
        held = self.machine.register(operand.name)[self.chosen]
        return (held if held.itemsize == dtype.itemsize else held.astype(f"u{dtype.itemsize}")).view(dtype)

    def write(self, operand: Operand, values: Array) -> None:
        """[n] or [1] values, extended to the register as their type has it."""
        if not isinstance(operand, Register):
            raise TypeError(f"{operand} as a destination")
        held = self.machine.register(operand.name)
        if values.itemsize < held.itemsize:
            values = values.astype(f"{values.dtype.kind}{held.itemsize}")
        if values.itemsize != held.itemsize:
            raise TypeError(f"{values.dtype} into {operand.name}")
        held[self.chosen] = values.view(held.dtype)

    def address(self, operand: Operand) -> Array:
        """[n] addresses."""
        if not isinstance(operand, Place):
            raise TypeError(f"{operand} as an address")
        base = operand.base
        width = self.machine.register(base.name).dtype if isinstance(base, Register) else TYPES["u64"]
        at = self.read(base, width).astype(np.uint64) + np.uint64(operand.offset & (1 << 64) - 1)
        return np.broadcast_to(at, len(self.who))


@cache
def decoded(ins: Instruction) -> Run:
    """What an instruction does. Raises NotImplementedError by name for what is not known here."""
    op = ins.opcode.split(".")
    kind = TYPES.get(op[-1])
    if ins.opcode in CONVERSIONS:
        return _conversion(ins, TYPES[op[1 if len(op) == 3 else 2]], TYPES[op[-1]])
    if op[0] in ("ld", "st") and kind is not None:
        return _access(ins, op, kind)
    if ins.opcode in ("atom.max.u32", "atom.global.max.u32"):
        return _atomic(ins)
    if ins.opcode == "cvta.to.global.u64":
        return lambda t: t.write(ins.operands[0], t.read(ins.operands[1], TYPES["u64"]))
    if ins.opcode == "prefetch.global.L2":
        return lambda t: t.machine.memory.prefetch(t.address(ins.operands[0]))
    if ins.opcode in ("mov.b32", "mov.b64") and any(isinstance(x, Several) for x in ins.operands):
        return _packing(ins)
    operation = OPERATIONS.get(ins.opcode) or OPERATIONS.get(".".join(op[:-1]))
    if operation is None or op[-1] not in operation.types or len(ins.operands) != 1 + len(operation.takes):
        raise NotImplementedError(f"line {ins.line}: {ins.text}")
    takes = [{"t": kind, "u": TYPES["u32"], "p": TYPES["pred"]}[x] for x in operation.takes]
    to, *operands = ins.operands
    run = operation.run

    def step(t: Lanes) -> None:
        t.write(to, run(*(t.read(x, d) for x, d in zip(operands, takes, strict=True))))

    return step


def _conversion(ins: Instruction, to: np.dtype, source: np.dtype) -> Run:
    run = CONVERSIONS[ins.opcode]
    return lambda t: t.write(ins.operands[0], run(t.read(ins.operands[1], source), to))


def _packing(ins: Instruction) -> Run:
    """mov between a register and two of half its width, the low one first."""
    to, source = ins.operands
    whole = TYPES[ins.opcode.removeprefix("mov.")]
    half, bits = np.dtype(f"u{whole.itemsize // 2}"), whole.type(whole.itemsize * 4)

    def unpack(t: Lanes) -> None:
        both = t.read(source, whole)
        for i, x in enumerate(to.parts):
            t.write(x, (both >> whole.type(i) * bits).astype(half))

    def pack(t: Lanes) -> None:
        low, high = (t.read(x, half).astype(whole) for x in source.parts)
        t.write(to, high << bits | low)

    return unpack if isinstance(to, Several) else pack


def _access(ins: Instruction, op: list[str], kind: np.dtype) -> Run:
    """Loads and stores of one to four values."""
    count = int(op[-2][1:]) if op[-2] in ("v2", "v4") else 1
    middle = op[1 : -1 if count == 1 else -2]
    space = (
        middle.pop(0) if middle and middle[0] in ("global", "shared", "param") else "global"
    )  # generic: global
    if "".join(f".{x}" for x in middle) not in CACHED:
        raise NotImplementedError(f"line {ins.line}: {ins.text}")
    place, value = ins.operands[:: 1 if op[0] == "st" else -1]
    parts = value.parts if isinstance(value, Several) else (value,)
    if len(parts) != count:
        raise NotImplementedError(f"line {ins.line}: {ins.text}")

    def parameter(t: Lanes) -> None:
        (at,) = np.unique(t.address(place)).tolist()
        t.write(parts[0], np.frombuffer(t.machine.arguments[at : at + kind.itemsize], kind))

    def load(t: Lanes) -> None:
        m, who = t.machine, t.machine.number[t.who]
        if space == "shared":
            values = m.shared.load(t.address(place), kind, count, who, m.row[t.who])
        else:
            values = m.memory.load(t.address(place), kind, count, who)
        for i, x in enumerate(parts):
            t.write(x, values[:, i])

    def store(t: Lanes) -> None:
        m, who = t.machine, t.machine.number[t.who]
        values = np.stack([np.broadcast_to(t.read(x, kind), len(who)) for x in parts], axis=1)
        if space == "shared":
            m.shared.store(t.address(place), values, who, m.row[t.who])
        else:
            m.memory.store(t.address(place), values, who)

    if space == "param":
        return parameter
    return load if op[0] == "ld" else store


def _atomic(ins: Instruction) -> Run:
    to, place, value = ins.operands

    def step(t: Lanes) -> None:
        values = np.broadcast_to(t.read(value, TYPES["u32"]), len(t.who))
        t.write(to, t.machine.memory.raise_to(t.address(place), values, t.machine.number[t.who]))

    return step


@dataclass(frozen=True, slots=True)
class Counted:
    """Of a launch: how many warps ran each instruction, and the waves of Shared."""

    issued: Array
    waves: Counter[str]


def launch(
    program: Program, kernel: Kernel, memory: Global, blocks: int, arguments: Iterable[bytes]
) -> Counted:
    """Runs `blocks` blocks of a kernel on these parameters.

    Raises Fault as Machine.run does, ValueError where parameters are not those of the kernel."""
    symbols = {name: memory.constant(name, data) for name, data in program.constants.items()} | kernel.shared
    given = b""
    for (name, nbytes), data in zip(kernel.parameters.items(), arguments, strict=True):
        if len(data) != nbytes:
            raise ValueError(f"{name}: {len(data)} bytes, wanted {nbytes}")
        symbols[name] = len(given)
        given += data
    memory.launch()
    counted = Counted(np.zeros(len(kernel.code), np.int64), Counter())
    at_once = max(1, LANES // kernel.threads)
    for first in range(0, blocks, at_once):
        machine = Machine(kernel, memory, symbols, given, np.arange(first, min(blocks, first + at_once)))
        machine.run()
        counted.issued[:] += machine.issued
        counted.waves.update(machine.shared.waves)
    return counted
