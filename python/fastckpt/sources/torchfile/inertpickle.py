"""Pickles read as data: an opcode interpreter that builds plain values and never imports or calls.

Law: the result holds None, bool, int, float, str, bytes, list, dict, tuple, set, frozenset, `Inert` and
what the caller's own tables make, nothing else. Every global the tables do not know becomes an Inert;
calling it, building it or filling it only writes down what the pickle said.

The finished tree has no cycles, is at most `inert.MAX_DEPTH` deep and, with every shared part counted as
often as it is reached, not larger than the pickle has bytes, or MAX_NODES: so a plain recursive walk of it
ends.

Source of the opcodes: CPython's pickletools (protocols 0 to 5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import SourceError
from .inert import check_tree
from .picklemachine import SET_ITEM, Call, Machine, Persistent, Short, Wrong

MAX_INT_BYTES = 1024
"""The longest integer, in bytes; CPython prints one of this size."""

_SLICE = 1 << 14
"""Bytes of pickle between two looks at the size of the stack."""

_U4, _I4 = struct.Struct("<I").unpack_from, struct.Struct("<i").unpack_from


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
    persistent: Persistent | None = None,
    file: int | None = None,
    record_keys: bool = False,
) -> Parsed:
    """The pickle that starts at `data[start]`, read without importing or calling anything it names.

    `values`: global name -> the value it stands for. `calls`: global name -> a function of ours that takes
    the arguments of a REDUCE or NEWOBJ of that name. `persistent`: makes the value of a persistent id.
    `file`: the size of the file that the pickle is a part of, which limits what it may build
    (`picklemachine.allowance`); by default that of the pickle. `record_keys`: an Inert may be a key, and each
    is a key of its own. Raises Short where the bytes end early, and SourceError for anything else that is
    wrong or exceeds the limits (here, in picklemachine and in inert)."""
    machine = Machine(data, start, values or {}, calls or {}, persistent, file or len(data) - start)
    machine.record_keys = record_keys
    root = _run(machine)
    check_tree(root, machine.pos - start)
    return Parsed(root, machine.pos, frozenset(machine.bare))


def _run(m: Machine) -> object:
    """Runs the opcodes up to STOP and returns the one value they leave."""
    while m.pos < m.size:
        if _run_some(m, min(m.pos + _SLICE, m.size)):
            if len(m.stack) != 1 or m.outer:
                raise m.wrong(f"STOP with {len(m.stack)} values and {len(m.outer)} open marks")
            return m.stack[0]
        m.look()
    raise Short(f"pickle ends at byte {m.size} without a STOP")


def _run_some(m: Machine, until: int) -> bool:
    """Runs opcodes up to byte `until` or to STOP; whether it was STOP.

    The opcodes that torch files are made of are run right here, as their functions below would: a call for
    each of millions would take most of the time."""
    data, pos, stack, memo = m.data, m.pos, m.stack, m.memo
    ops, costs, fetched = _OPS, _COSTS, m.fetched
    try:
        while pos < until:
            op = data[pos]
            pos += 1
            if op == _LONG_BINPUT:
                (index,) = _U4(data, pos)
                pos += 4
                if index == m.stored and index < len(fetched) and not fetched[index] and stack:
                    m.stored += 1
                else:
                    m.pos = pos
                    m.put(index)
                    fetched = m.fetched
            elif op == _MEMOIZE:
                index = m.stored
                if index < len(fetched) and not fetched[index] and stack and not m.apart:
                    m.stored += 1
                else:
                    m.pos = pos
                    m.memoize()
                    fetched = m.fetched
            elif op == _BINGET:
                index = data[pos]
                pos += 1
                stack.append(memo[index] if index in memo else m.absent(index))
            elif op == _LONG_BINGET:
                (index,) = _U4(data, pos)
                pos += 4
                stack.append(memo[index] if index in memo else m.absent(index))
            elif op == _BININT1:
                stack.append(data[pos])
                pos += 1
            elif op == _MARK:
                m.outer.append(stack)
                stack = m.stack = []
            elif op in _CALLS:
                args = stack.pop()
                m.pos = pos
                stack[-1] = m.call(stack[-1], args)
            elif op == _BINUNICODE:
                (n,) = _U4(data, pos)
                at = m.pos = pos + 4
                pos = at + n
                if pos > m.size:
                    raise Short(f"pickle needs {n} bytes at byte {at} of {m.size}")
                m.spend(56 + n)
                stack.append(m.text(data[at:pos]))
            elif op == _TUPLE and m.outer:
                items = stack
                stack = m.stack = m.outer.pop()
                m.left -= 64 + 8 * len(items)
                stack.append(tuple(items))
            elif op == _TUPLE1:
                m.left -= 64
                stack[-1] = (stack[-1],)
            elif op == _TUPLE2:
                m.left -= 72
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif op == _BININT:
                m.left -= 32
                stack.append(_I4(data, pos)[0])
                pos += 4
            elif op == _EMPTY_TUPLE:
                stack.append(())
            elif op == _EMPTY_DICT:
                m.pos = pos
                m.spend(64)
                stack.append({})
            elif op == _STOP:
                m.pos = pos
                return True
            else:
                handler = ops[op]
                m.pos = pos
                if handler is None:
                    raise m.wrong(f"opcode 0x{op:02x} is unknown or not allowed")
                m.spend(costs[op])
                handler(m)
                pos, stack, fetched = m.pos, m.stack, m.fetched
    except struct.error:
        raise Short(f"pickle needs more bytes at byte {pos} of {m.size}") from None
    except IndexError:
        if pos >= m.size:
            raise Short(f"pickle needs more bytes at byte {pos}, its end") from None
        m.pos = pos
        raise m.wrong("it takes more values than it made") from None
    m.pos = pos
    return False


# ---- opcodes: one small function each, in the order of pickletools ----


def _text_number(m: Machine) -> int:
    raw = m.line().removesuffix(b"L")
    digits = raw.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 2 * MAX_INT_BYTES:
        raise m.wrong(f"{raw[:40]!r} is no integer of at most {2 * MAX_INT_BYTES} digits")
    m.spend(len(digits) // 2)
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
    m.spend(n)
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


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.items()  # POP may take a mark away too


def _tuple3(m: Machine) -> None:
    third, second, first = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.stack.append((first, second, third))


def _list(m: Machine) -> None:
    items = m.items()
    m.spend(10 * len(items))
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
    m.spend(SET_ITEM * len(items))
    onto.update(m.key(x) for x in items)


def _frozenset(m: Machine) -> None:
    items = m.items()
    m.spend(SET_ITEM * len(items))
    m.stack.append(frozenset(m.key(x) for x in items))


def _global(m: Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    m.stack.append(m.find(module, name))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise m.wrong("the name of a global is no string")
    m.stack.append(m.find(module, name))


def _newobj_ex(m: Machine) -> None:
    kwargs, args, cls = m.stack.pop(), m.stack.pop(), m.stack.pop()
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise m.wrong("a call has no tuple of arguments or no dict of named ones")
    m.spend(64 + 8 * len(args))
    m.stack.append(m.call(cls, (*args, kwargs) if kwargs else args))


def _inst(m: Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    items = m.items()
    m.spend(64 + 8 * len(items))
    m.stack.append(m.call(m.find(module, name), tuple(items)))


def _obj(m: Machine) -> None:
    items = m.items()
    m.spend(64 + 8 * len(items))
    m.stack.append(m.call(items[0], tuple(items[1:])))


def _persistent(m: Machine, pid: object) -> None:
    if m.persistent is None:
        raise m.wrong("a persistent id stands where none is expected")
    try:
        m.stack.append(m.persistent(pid, m))
    except Wrong:
        raise
    except SourceError as e:
        raise m.wrong(str(e)) from None


def _put(m: Machine) -> None:
    index = _text_number(m)
    if index < 0:
        raise m.wrong(f"memo entry {index} is stored")
    m.put(index)


def _frame(m: Machine) -> None:
    n = m.number(8)  # a hint for streams: it changes nothing, but must be true
    if n > m.size - m.pos:
        raise Short(f"pickle has a frame of {n} bytes at byte {m.pos} of {m.size}")


def _proto(m: Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise m.wrong(f"protocol {version}; known are 0 to 5")


_STOP, _MARK, _MEMOIZE = ord("."), ord("("), 0x94
_CALLS = ord("R"), 0x81  # REDUCE and NEWOBJ
_BININT, _BININT1, _BINUNICODE = ord("J"), ord("K"), ord("X")
_LONG_BINPUT, _BINGET, _LONG_BINGET = ord("r"), ord("h"), ord("j")
_TUPLE, _TUPLE1, _TUPLE2, _EMPTY_TUPLE, _EMPTY_DICT = ord("t"), 0x85, 0x86, ord(")"), ord("}")

_HANDLERS: dict[int, tuple[int, Callable[[Machine], None]]] = {
    # opcode: (bytes of objects it makes that last, at most; what it does)
    0x80: (0, _proto),
    0x95: (0, _frame),
    ord("0"): (0, _pop),
    ord("1"): (0, lambda m: m.items().clear()),
    ord("2"): (0, lambda m: m.stack.append(m.stack[-1])),
    ord("N"): (0, lambda m: m.stack.append(None)),
    0x88: (0, lambda m: m.stack.append(True)),
    0x89: (0, lambda m: m.stack.append(False)),
    ord("I"): (32, _int),
    ord("L"): (32, lambda m: m.stack.append(_text_number(m))),
    ord("M"): (32, lambda m: m.stack.append(m.number(2))),
    0x8A: (32, lambda m: _long(m, 1)),
    0x8B: (32, lambda m: _long(m, 4)),
    ord("F"): (32, _float),
    ord("G"): (32, lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0])),
    ord("S"): (64, _string),
    ord("T"): (64, lambda m: m.stack.append(m.text(m.sized(4)))),
    ord("U"): (64, lambda m: m.stack.append(m.text(m.sized(1)))),
    ord("V"): (64, _unicode),
    0x8C: (56, lambda m: m.stack.append(m.text(m.sized(1)))),
    0x8D: (64, lambda m: m.stack.append(m.text(m.sized(8)))),
    ord("B"): (48, lambda m: m.stack.append(m.sized(4))),
    ord("C"): (48, lambda m: m.stack.append(m.sized(1))),
    0x8E: (48, lambda m: m.stack.append(m.sized(8))),
    0x96: (48, lambda m: m.stack.append(m.sized(8))),  # a bytearray, kept as bytes
    ord("]"): (64, lambda m: m.stack.append([])),
    ord("a"): (32, _append),  # the first item of a list makes room for four
    ord("e"): (0, _appends),
    ord("l"): (64, _list),
    ord("t"): (0, lambda m: m.items().clear()),  # where no mark is open, which it says
    0x87: (80, _tuple3),
    ord("d"): (232, _dict),
    ord("s"): (168, _setitem),  # the first item of a dict makes its table
    ord("u"): (168, _setitems),
    0x8F: (216, lambda m: m.stack.append(set())),
    0x90: (0, _additems),
    0x91: (216, _frozenset),
    ord("g"): (0, lambda m: m.get(_text_number(m))),
    ord("p"): (0, _put),
    ord("q"): (0, lambda m: m.put(m.number(1))),
    ord("c"): (0, _global),
    0x93: (0, _stack_global),
    ord("b"): (0, Machine.build),
    ord("i"): (0, _inst),
    ord("o"): (0, _obj),
    0x92: (0, _newobj_ex),
    ord("P"): (0, lambda m: _persistent(m, m.text(m.line()))),
    ord("Q"): (0, lambda m: _persistent(m, m.stack.pop())),
    # not here: EXT1, EXT2, EXT4 (a registry of the process) and the out-of-band buffers of protocol 5
}
_OPS: list[Callable[[Machine], None] | None] = [_HANDLERS.get(op, (0, None))[1] for op in range(256)]
_COSTS: list[int] = [_HANDLERS.get(op, (0, None))[0] for op in range(256)]
