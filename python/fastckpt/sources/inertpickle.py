"""Pickles read as data: an opcode interpreter that builds plain values and never imports or calls.

Law: the result holds None, bool, int, float, str, bytes, list, dict, tuple, set, frozenset, `Inert` and
what the caller's own tables make, nothing else. Every global the tables do not know becomes an Inert;
calling it, building it or filling it only writes down what the pickle said.

The finished tree has no cycles, is at most `inert.MAX_DEPTH` deep and MAX_NODES large with every shared part
counted as often as it is reached, so a plain recursive walk of it ends.

Source of the opcodes: CPython's pickletools (protocols 0 to 5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import SourceError
from .inert import Inert, check_tree
from .picklemachine import PLAIN, Call, Machine, Short

__all__ = ["PLAIN", "Call", "Inert", "Parsed", "Short", "parse"]

MAX_INT_BYTES = 1024
"""The longest integer, in bytes; CPython prints one of this size."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A pickle read: its `root`, the offset `end` after its STOP, and the `globals` met, by name."""

    root: object
    end: int
    globals: frozenset[str]


def parse(
    data: bytes,
    start: int = 0,
    *,
    values: Mapping[str, object] | None = None,
    calls: Mapping[str, Call] | None = None,
    persistent: Callable[[object], object] | None = None,
) -> Parsed:
    """The pickle that starts at `data[start]`, read without importing or calling anything it names.

    `values`: global name -> the value it stands for. `calls`: global name -> a function of ours that
    takes the arguments of a REDUCE or NEWOBJ of that name. `persistent`: makes the value of a
    persistent id. Raises Short where the bytes end early, SourceError for whatever else is wrong and
    for what passes the limits (here, in picklemachine and in inert)."""
    machine = Machine(data, start, values or {}, calls or {}, persistent)
    try:
        root = _run(machine)
    except IndexError:
        raise machine.wrong("it takes more values than it made") from None
    check_tree(root)
    return Parsed(root, machine.pos, frozenset(machine.bare))


def _run(m: Machine) -> object:
    """Runs the opcodes up to STOP and returns the one value they leave."""
    data, size, ops, costs = m.data, m.size, _OPS, _COSTS
    while True:
        if m.pos >= size:
            raise Short(f"pickle ends at byte {size} without a STOP")
        op = data[m.pos]
        m.pos += 1
        if op == _STOP:
            if len(m.stack) != 1 or m.outer:
                raise m.wrong(f"STOP with {len(m.stack)} values and {len(m.outer)} open marks")
            return m.stack[0]
        handler = ops[op]
        if handler is None:
            raise m.wrong(f"opcode 0x{op:02x} is unknown or not allowed")
        m.spent += costs[op]
        if m.spent > m.budget:
            raise m.wrong(f"it builds more than {m.budget} bytes of objects")
        handler(m)


# ---- opcodes: one small function each, in the order of pickletools ----


def _text_number(m: Machine) -> int:
    raw = m.line().removesuffix(b"L")
    digits = raw.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 2 * MAX_INT_BYTES:
        raise m.wrong(f"{raw[:40]!r} is no integer of at most {2 * MAX_INT_BYTES} digits")
    return int(raw)


def _int(m: Machine) -> None:
    if m.data[m.pos : m.pos + 3] in (b"00\n", b"01\n"):
        m.stack.append(m.line() == b"01")
    else:
        m.stack.append(_text_number(m))


def _long(m: Machine, width: int) -> None:
    n = m.number(width)
    if n > MAX_INT_BYTES:
        raise m.wrong(f"an integer has {n} bytes; the limit is {MAX_INT_BYTES}")
    m.stack.append(int.from_bytes(m.take(n), "little", signed=True))


def _float(m: Machine) -> None:
    raw = m.line()
    try:
        if len(raw) > 64:
            raise ValueError
        m.stack.append(float(raw))
    except ValueError:
        raise m.wrong(f"{raw[:40]!r} is no float") from None


def _string(m: Machine) -> None:
    raw = m.line()
    if len(raw) < 2 or raw[0] != raw[-1] or raw[:1] not in (b"'", b'"') or b"\\" in raw:
        raise m.wrong("a string of protocol 0 has no quotes, or escapes")  # only Python 2 wrote these
    m.stack.append(m.text(raw[1:-1]))


def _unicode(m: Machine) -> None:
    try:
        out = m.line().decode("raw-unicode-escape")
        out.encode()
    except UnicodeError as e:
        raise m.wrong(f"a string has a wrong escape: {e}") from None
    m.spend(4 * len(out))
    m.stack.append(out)


def _mark(m: Machine) -> None:
    m.outer.append(m.stack)
    m.stack = []


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.items()  # POP may take a mark away too


def _tuple(m: Machine, n: int) -> None:
    if len(m.stack) < n:
        raise m.wrong("it takes more values than it made")
    items = tuple(m.stack[-n:])
    m.stack[-n:] = [items]


def _tuple_of_items(m: Machine) -> None:
    items = m.items()
    m.spend(8 * len(items))
    m.stack.append(tuple(items))


def _list(m: Machine) -> None:
    items = m.items()
    m.stack.append(items)


def _dict(m: Machine) -> None:
    items = m.items()
    made: dict[object, object] = {}
    m.update(made, items)
    m.stack.append(made)


def _append(m: Machine) -> None:
    item = m.stack.pop()
    m.extend(m.stack[-1], [item])


def _appends(m: Machine) -> None:
    items = m.items()
    m.extend(m.stack[-1], items)


def _setitem(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.update(m.stack[-1], [key, value])


def _setitems(m: Machine) -> None:
    items = m.items()
    m.update(m.stack[-1], items)


def _additems(m: Machine) -> None:
    items = m.items()
    onto = m.stack[-1]
    if not isinstance(onto, set):
        raise m.wrong(f"members are added to a value of type {type(onto).__name__}")
    m.spend(64 * len(items))
    onto.update(m.key(x) for x in items)


def _frozenset(m: Machine) -> None:
    items = m.items()
    m.spend(64 * len(items))
    m.stack.append(frozenset(m.key(x) for x in items))


def _global(m: Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    m.stack.append(m.find(module, name))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise m.wrong("the name of a global is no string")
    m.stack.append(m.find(module, name))


def _reduce(m: Machine) -> None:
    args, function = m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(function, args))


def _newobj_ex(m: Machine) -> None:
    kwargs, args, cls = m.stack.pop(), m.stack.pop(), m.stack.pop()
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise m.wrong("a call has no tuple of arguments or no dict of named ones")
    m.stack.append(m.call(cls, (*args, kwargs) if kwargs else args))


def _inst(m: Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    args = tuple(m.items())
    m.stack.append(m.call(m.find(module, name), args))


def _obj(m: Machine) -> None:
    items = m.items()
    m.stack.append(m.call(items[0], tuple(items[1:])))


def _persistent(m: Machine, pid: object) -> None:
    if m.persistent is None:
        raise m.wrong("a persistent id stands where none is expected")
    try:
        m.stack.append(m.persistent(pid))
    except SourceError as e:
        raise m.wrong(str(e)) from None


def _put(m: Machine) -> None:
    index = _text_number(m)
    if index < 0:
        raise m.wrong(f"memo entry {index} is stored")
    m.put(index)


def _memoize(m: Machine) -> None:
    m.put(len(m.memo))


def _frame(m: Machine) -> None:
    n = m.number(8)  # a hint for streams: it changes nothing, but must be true
    if n > m.size - m.pos:
        raise Short(f"pickle has a frame of {n} bytes at byte {m.pos} of {m.size}")


def _proto(m: Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise m.wrong(f"protocol {version}; known are 0 to 5")


_STOP = ord(".")

_HANDLERS: dict[int, tuple[int, Callable[[Machine], None]]] = {
    # opcode: (bytes of objects it makes, roughly and rather too many, what it does)
    0x80: (16, _proto),
    0x95: (16, _frame),
    ord("("): (80, _mark),
    ord("0"): (16, _pop),
    ord("1"): (16, lambda m: m.items().clear()),
    ord("2"): (16, lambda m: m.stack.append(m.stack[-1])),
    ord("N"): (16, lambda m: m.stack.append(None)),
    0x88: (16, lambda m: m.stack.append(True)),
    0x89: (16, lambda m: m.stack.append(False)),
    ord("I"): (40, _int),
    ord("L"): (40, lambda m: m.stack.append(_text_number(m))),
    ord("J"): (40, lambda m: m.stack.append(int.from_bytes(m.take(4), "little", signed=True))),
    ord("K"): (16, lambda m: m.stack.append(m.number(1))),
    ord("M"): (40, lambda m: m.stack.append(m.number(2))),
    0x8A: (40, lambda m: _long(m, 1)),
    0x8B: (40, lambda m: _long(m, 4)),
    ord("F"): (40, _float),
    ord("G"): (40, lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0])),
    ord("S"): (64, _string),
    ord("T"): (64, lambda m: m.stack.append(m.text(m.sized(4)))),
    ord("U"): (64, lambda m: m.stack.append(m.text(m.sized(1)))),
    ord("V"): (64, _unicode),
    ord("X"): (64, lambda m: m.stack.append(m.text(m.sized(4)))),
    0x8C: (64, lambda m: m.stack.append(m.text(m.sized(1)))),
    0x8D: (64, lambda m: m.stack.append(m.text(m.sized(8)))),
    ord("B"): (64, lambda m: m.stack.append(m.sized(4))),
    ord("C"): (64, lambda m: m.stack.append(m.sized(1))),
    0x8E: (64, lambda m: m.stack.append(m.sized(8))),
    0x96: (64, lambda m: m.stack.append(m.sized(8))),  # a bytearray, kept as bytes
    ord("]"): (64, lambda m: m.stack.append([])),
    ord("a"): (32, _append),
    ord("e"): (16, _appends),
    ord("l"): (64, _list),
    ord(")"): (16, lambda m: m.stack.append(())),
    ord("t"): (64, _tuple_of_items),
    0x85: (64, lambda m: _tuple(m, 1)),
    0x86: (72, lambda m: _tuple(m, 2)),
    0x87: (80, lambda m: _tuple(m, 3)),
    ord("}"): (72, lambda m: m.stack.append({})),
    ord("d"): (72, _dict),
    ord("s"): (240, _setitem),  # the first item of a dict makes its table
    ord("u"): (240, _setitems),
    0x8F: (224, lambda m: m.stack.append(set())),
    0x90: (16, _additems),
    0x91: (224, _frozenset),
    ord("g"): (16, lambda m: m.get(_text_number(m))),
    ord("h"): (16, lambda m: m.get(m.number(1))),
    ord("j"): (16, lambda m: m.get(m.number(4))),
    ord("p"): (120, _put),
    ord("q"): (60, lambda m: m.put(m.number(1))),
    ord("r"): (120, lambda m: m.put(m.number(4))),
    0x94: (120, _memoize),
    ord("c"): (16, _global),
    0x93: (16, _stack_global),
    ord("R"): (320, _reduce),
    ord("b"): (16, Machine.build),
    ord("i"): (320, _inst),
    ord("o"): (320, _obj),
    0x81: (320, _reduce),  # NEWOBJ: class and arguments lie as REDUCE has them
    0x92: (320, _newobj_ex),
    ord("P"): (320, lambda m: _persistent(m, m.text(m.line()))),
    ord("Q"): (320, lambda m: _persistent(m, m.stack.pop())),
    # not here: EXT1, EXT2, EXT4 (a registry of the process) and the out-of-band buffers of protocol 5
}
_OPS: list[Callable[[Machine], None] | None] = [_HANDLERS.get(op, (0, None))[1] for op in range(256)]
_COSTS: list[int] = [_HANDLERS.get(op, (0, None))[0] for op in range(256)]
