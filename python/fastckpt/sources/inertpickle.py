"""Pickles read as data: an opcode interpreter that builds plain values and never imports or calls.

Law: the result holds None, bool, int, float, str, bytes, list, dict, tuple, set, frozenset, `Inert` and
what the caller's own tables make, nothing else. Every global the tables do not know becomes an Inert;
calling it, building it or filling it only writes down what the pickle said.

The finished tree has no cycles, is at most MAX_DEPTH deep and MAX_NODES large with every shared part
counted as often as it is reached, so a plain recursive walk of it ends.

Source of the opcodes: CPython's pickletools (protocols 0 to 5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..dtypes import DType
from ..errors import SourceError

MEMORY = 384 << 20
"""Bytes of objects that a pickle may build, and 3 more for each of its own bytes, by a count made before
they are built (about twice what a checkpoint's takes: 4 kB a tensor, so 10^5 tensors fit). Every opcode
counts, so this limits opcodes, stack, marks, memo, strings and containers."""

MAX_DEPTH = 200
"""The deepest nesting of containers in the finished tree."""

MAX_NODES = 1 << 24
"""The most values in the finished tree, a shared part counted each time it is reached."""

MAX_INT_BYTES = 1024
"""The longest integer, in bytes; CPython prints one of this size."""

MAX_LINE = 1 << 16
"""The longest text argument of a protocol 0 opcode, and the longest name of a global, in bytes."""

MAX_TUPLE_KEYS = 1 << 12
"""The most tuples used as keys or set members: hashes of tuples can be made to collide on purpose."""


@dataclass(slots=True, eq=False)
class Inert:
    """A global, call or object the pickle named and nobody imported.

    `name` is "module.qualname"; `args` what it was called with; `state` what BUILD gave it (None when
    nothing did); `items` what was appended to it, or (key, value) pairs set on it. Filled while the
    pickle is read and left alone after; two records are equal when they are the same object."""

    name: str
    args: tuple[object, ...] = ()
    state: object | None = None
    items: list[object] = field(default_factory=list)


class Short(SourceError):
    """The pickle goes on past the bytes given: more of the file is needed, or it is truncated."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A pickle read: its `root`, the offset `end` after its STOP, and the `globals` met, by name."""

    root: object
    end: int
    globals: frozenset[str]


Call = Callable[[tuple[object, ...]], object]


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
    for what passes the limits above."""
    machine = _Machine(data, start, values or {}, calls or {}, persistent)
    try:
        root = machine.run()
    except IndexError:
        raise machine.wrong("it takes more values than it made") from None
    _measure(root)
    return Parsed(root, machine.pos, frozenset(machine.bare))


class _Machine:
    """The pickle machine: a stack cut by marks, a memo, and a position in the bytes."""

    __slots__ = (
        "bare", "budget", "calls", "data", "memo", "outer", "persistent", "pos", "size", "spent", "stack",
        "tuple_keys", "values",
    )  # fmt: skip

    def __init__(
        self,
        data: bytes,
        start: int,
        values: Mapping[str, object],
        calls: Mapping[str, Call],
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.data, self.pos, self.size = data, start, len(data)
        self.stack: list[object] = []
        self.outer: list[list[object]] = []  # the stacks below each open mark
        self.memo: dict[int, object] = {}
        self.bare: dict[str, Inert] = {}  # globals no table of values knows, one record a name
        self.spent, self.budget = 0, MEMORY + 3 * (len(data) - start)
        self.tuple_keys = 0
        self.values, self.calls, self.persistent = values, calls, persistent

    def run(self) -> object:
        data, size, ops, costs = self.data, self.size, _OPS, _COSTS
        while True:
            if self.pos >= size:
                raise Short(f"pickle ends at byte {size} without a STOP")
            op = data[self.pos]
            self.pos += 1
            if op == _STOP:
                if len(self.stack) != 1 or self.outer:
                    raise self.wrong(f"STOP with {len(self.stack)} values and {len(self.outer)} open marks")
                return self.stack[0]
            handler = ops[op]
            if handler is None:
                raise self.wrong(f"opcode 0x{op:02x} is unknown or not allowed")
            self.spent += costs[op]
            if self.spent > self.budget:
                raise self.wrong(f"it builds more than {self.budget} bytes of objects")
            handler(self)

    # ---- reading arguments ----

    def wrong(self, what: str) -> SourceError:
        return SourceError(f"pickle at byte {self.pos}: {what}")

    def take(self, n: int) -> bytes:
        at = self.pos
        end = at + n
        if end > self.size:
            raise Short(f"pickle needs {n} bytes at byte {at} of {self.size}")
        self.pos = end
        return self.data[at:end]

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def sized(self, n: int) -> bytes:
        """A run of bytes after its length of `n` bytes."""
        length = self.number(n)
        self.spend(length)
        return self.take(length)

    def line(self) -> bytes:
        at = self.pos
        end = self.data.find(b"\n", at, at + MAX_LINE)
        if end < 0:
            if self.size - at < MAX_LINE:
                raise Short(f"pickle has no end of line after byte {at}")
            raise self.wrong(f"a text argument is longer than {MAX_LINE} bytes")
        self.pos = end + 1
        return self.data[at:end]

    def text(self, raw: bytes) -> str:
        try:
            out = raw.decode()
        except UnicodeDecodeError as e:
            raise self.wrong(f"a string is not utf-8: {e.reason}") from None
        if len(out) != len(raw):
            self.spend(4 * len(raw))
        return out

    def spend(self, nbytes: int) -> None:
        self.spent += nbytes
        if self.spent > self.budget:
            raise self.wrong(f"it builds more than {self.budget} bytes of objects")

    # ---- the stack ----

    def items(self) -> list[object]:
        """The values above the last mark, which is taken away."""
        if not self.outer:
            raise self.wrong("no mark is open")
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def key(self, key: object) -> object:
        """`key` when it may be a key or a set member: plain, and cheap and safe to hash."""
        kind = type(key)
        if kind is str or kind is bool or kind is bytes or key is None or kind is float or kind is DType:
            return key
        if kind is int and -(1 << 63) <= key < 1 << 64:  # type: ignore[operator]
            return key
        if isinstance(key, tuple) and len(key) <= 16:
            self.tuple_keys += 1
            if self.tuple_keys > MAX_TUPLE_KEYS:
                raise self.wrong(f"more than {MAX_TUPLE_KEYS} tuples are used as keys")
            for part in key:
                if isinstance(part, tuple):
                    raise self.wrong("a tuple inside a tuple is used as a key")
                self.key(part)
            return key
        what = f"a record of {key.name}" if isinstance(key, Inert) else f"a value of type {kind.__name__}"
        raise self.wrong(f"{what} is used as a key; wanted a plain value")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise self.wrong(f"memo entry {index} was never stored")
        self.stack.append(self.memo[index])

    # ---- globals, calls, state ----

    def find(self, module: str, name: str) -> object:
        """What the global stands for: a value of the tables, or the one bare record of its name."""
        if len(module) + len(name) > MAX_LINE:
            raise self.wrong(f"the name of a global is longer than {MAX_LINE}")
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in self.values:
            return self.values[full]
        found = self.bare.get(full)
        if found is None:
            self.spend(len(full) + 400)
            found = self.bare[full] = Inert(full)
        return found

    def call(self, function: object, args: object) -> object:
        if not isinstance(function, Inert):
            raise self.wrong(f"a value of type {type(function).__name__} is called")
        if not isinstance(args, tuple):
            raise self.wrong(f"{function.name} is called with a {type(args).__name__}; wanted a tuple")
        if self.bare.get(function.name) is function:
            if (plain := _PLAIN_CALLS.get(function.name)) is not None:
                return plain(self, args)
            if (ours := self.calls.get(function.name)) is not None:
                try:
                    return ours(args)
                except SourceError as e:
                    raise self.wrong(f"{function.name}: {e}") from None
        return Inert(function.name, args)

    def extend(self, onto: object, items: list[object]) -> None:
        if isinstance(onto, list):
            onto.extend(items)
        elif isinstance(onto, Inert) and self.bare.get(onto.name) is not onto:
            onto.items.extend(items)
        else:
            raise self.wrong(f"items are appended to a value of type {type(onto).__name__}")
        self.spend(8 * len(items))

    def update(self, onto: object, items: list[object]) -> None:
        if len(items) % 2:
            raise self.wrong("a key without a value")
        self.spend(104 * (len(items) // 2))
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(onto, dict):
            key = self.key
            for k, v in pairs:
                onto[k if type(k) is str else key(k)] = v
        elif isinstance(onto, Inert) and self.bare.get(onto.name) is not onto:
            onto.items.extend(pairs)
        else:
            raise self.wrong(f"items are set on a value of type {type(onto).__name__}")

    def build(self) -> None:
        state = self.stack.pop()
        onto = self.stack[-1]
        if isinstance(onto, dict):
            return  # attributes of an OrderedDict, such as a state dict's _metadata
        if not isinstance(onto, Inert) or self.bare.get(onto.name) is onto:
            raise self.wrong(f"state is set on a value of type {type(onto).__name__}")
        if onto.state is not None:
            raise self.wrong(f"the state of {onto.name} is set twice")
        onto.state = state


# ---- opcodes: one small function each, in the order of pickletools ----


def _text_number(m: _Machine) -> int:
    raw = m.line().removesuffix(b"L")
    digits = raw.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 2 * MAX_INT_BYTES:
        raise m.wrong(f"{raw[:40]!r} is no integer of at most {2 * MAX_INT_BYTES} digits")
    return int(raw)


def _int(m: _Machine) -> None:
    if m.data[m.pos : m.pos + 3] in (b"00\n", b"01\n"):
        m.stack.append(m.line() == b"01")
    else:
        m.stack.append(_text_number(m))


def _long(m: _Machine, width: int) -> None:
    n = m.number(width)
    if n > MAX_INT_BYTES:
        raise m.wrong(f"an integer has {n} bytes; the limit is {MAX_INT_BYTES}")
    m.stack.append(int.from_bytes(m.take(n), "little", signed=True))


def _float(m: _Machine) -> None:
    raw = m.line()
    try:
        if len(raw) > 64:
            raise ValueError
        m.stack.append(float(raw))
    except ValueError:
        raise m.wrong(f"{raw[:40]!r} is no float") from None


def _string(m: _Machine) -> None:
    raw = m.line()
    if len(raw) < 2 or raw[0] != raw[-1] or raw[:1] not in (b"'", b'"') or b"\\" in raw:
        raise m.wrong("a string of protocol 0 has no quotes, or escapes")  # only Python 2 wrote these
    m.stack.append(m.text(raw[1:-1]))


def _unicode(m: _Machine) -> None:
    try:
        out = m.line().decode("raw-unicode-escape")
        out.encode()
    except UnicodeError as e:
        raise m.wrong(f"a string has a wrong escape: {e}") from None
    m.spend(4 * len(out))
    m.stack.append(out)


def _mark(m: _Machine) -> None:
    m.outer.append(m.stack)
    m.stack = []


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.items()  # POP may take a mark away too


def _tuple(m: _Machine, n: int) -> None:
    if len(m.stack) < n:
        raise m.wrong("it takes more values than it made")
    items = tuple(m.stack[-n:])
    m.stack[-n:] = [items]


def _tuple_of_items(m: _Machine) -> None:
    items = m.items()
    m.spend(8 * len(items))
    m.stack.append(tuple(items))


def _list(m: _Machine) -> None:
    items = m.items()
    m.stack.append(items)


def _dict(m: _Machine) -> None:
    items = m.items()
    made: dict[object, object] = {}
    m.update(made, items)
    m.stack.append(made)


def _append(m: _Machine) -> None:
    item = m.stack.pop()
    m.extend(m.stack[-1], [item])


def _appends(m: _Machine) -> None:
    items = m.items()
    m.extend(m.stack[-1], items)


def _setitem(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.update(m.stack[-1], [key, value])


def _setitems(m: _Machine) -> None:
    items = m.items()
    m.update(m.stack[-1], items)


def _additems(m: _Machine) -> None:
    items = m.items()
    onto = m.stack[-1]
    if not isinstance(onto, set):
        raise m.wrong(f"members are added to a value of type {type(onto).__name__}")
    m.spend(64 * len(items))
    onto.update(m.key(x) for x in items)


def _frozenset(m: _Machine) -> None:
    items = m.items()
    m.spend(64 * len(items))
    m.stack.append(frozenset(m.key(x) for x in items))


def _global(m: _Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    m.stack.append(m.find(module, name))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise m.wrong("the name of a global is no string")
    m.stack.append(m.find(module, name))


def _reduce(m: _Machine) -> None:
    args, function = m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(function, args))


def _newobj_ex(m: _Machine) -> None:
    kwargs, args, cls = m.stack.pop(), m.stack.pop(), m.stack.pop()
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise m.wrong("a call has no tuple of arguments or no dict of named ones")
    m.stack.append(m.call(cls, (*args, kwargs) if kwargs else args))


def _inst(m: _Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    args = tuple(m.items())
    m.stack.append(m.call(m.find(module, name), args))


def _obj(m: _Machine) -> None:
    items = m.items()
    m.stack.append(m.call(items[0], tuple(items[1:])))


def _persistent(m: _Machine, pid: object) -> None:
    if m.persistent is None:
        raise m.wrong("a persistent id stands where none is expected")
    try:
        m.stack.append(m.persistent(pid))
    except SourceError as e:
        raise m.wrong(str(e)) from None


def _put(m: _Machine) -> None:
    index = _text_number(m)
    if index < 0:
        raise m.wrong(f"memo entry {index} is stored")
    m.put(index)


def _memoize(m: _Machine) -> None:
    m.put(len(m.memo))


def _frame(m: _Machine) -> None:
    n = m.number(8)  # a hint for streams: it changes nothing, but must be true
    if n > m.size - m.pos:
        raise Short(f"pickle has a frame of {n} bytes at byte {m.pos} of {m.size}")


def _proto(m: _Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise m.wrong(f"protocol {version}; known are 0 to 5")


_STOP = ord(".")

_HANDLERS: dict[int, tuple[int, Callable[[_Machine], None]]] = {
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
    ord("b"): (16, _Machine.build),
    ord("i"): (320, _inst),
    ord("o"): (320, _obj),
    0x81: (320, _reduce),  # NEWOBJ: class and arguments lie as REDUCE has them
    0x92: (320, _newobj_ex),
    ord("P"): (320, lambda m: _persistent(m, m.text(m.line()))),
    ord("Q"): (320, lambda m: _persistent(m, m.stack.pop())),
    # not here: EXT1, EXT2, EXT4 (a registry of the process) and the out-of-band buffers of protocol 5
}
_OPS: list[Callable[[_Machine], None] | None] = [_HANDLERS.get(op, (0, None))[1] for op in range(256)]
_COSTS: list[int] = [_HANDLERS.get(op, (0, None))[0] for op in range(256)]


# ---- calls that give plain values ----


def _one_list(m: _Machine, args: tuple[object, ...]) -> list[object] | tuple[object, ...]:
    if not args:
        return []
    if len(args) != 1 or not isinstance(args[0], (list, tuple)):
        raise m.wrong("a container is called with more than one list")
    m.spend(104 * len(args[0]))
    return args[0]


def _plain_set(m: _Machine, args: tuple[object, ...]) -> object:
    return {m.key(x) for x in _one_list(m, args)}


def _plain_frozenset(m: _Machine, args: tuple[object, ...]) -> object:
    return frozenset(m.key(x) for x in _one_list(m, args))


def _ordered_dict(m: _Machine, args: tuple[object, ...]) -> object:
    made = {}
    for pair in _one_list(m, args):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise m.wrong("an OrderedDict is called with something else than pairs")
        made[m.key(pair[0])] = pair[1]
    return made


def _encoded(m: _Machine, args: tuple[object, ...]) -> object:
    """Bytes as protocols below 3 write them: text with its encoding, or nothing."""
    if not args:
        return b""
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
        m.spend(len(args[0]))
        try:
            return args[0].encode("latin-1")
        except UnicodeEncodeError as e:
            raise m.wrong(f"bytes are no latin-1 text: {e.reason}") from None
    raise m.wrong("bytes are not given as latin-1 text")


_PLAIN_CALLS: dict[str, Callable[[_Machine, tuple[object, ...]], object]] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _plain_set,
    "builtins.frozenset": _plain_frozenset,
    "builtins.bytes": _encoded,
    "builtins.bytearray": _encoded,
    "_codecs.encode": _encoded,
}
PLAIN: frozenset[str] = frozenset(_PLAIN_CALLS)
"""The globals whose calls give plain values in every pickle."""


# ---- the finished tree ----


def _parts(node: object) -> Iterable[object]:
    if isinstance(node, dict):
        return node.values()  # keys are flat
    if isinstance(node, Inert):
        return (node.args, node.state, node.items)
    return node  # type: ignore[return-value]


_CONTAINERS = (list, dict, tuple, Inert)


def _measure(root: object) -> None:
    """Refuses a tree that contains itself, is too deep, or too large when walked without a memory."""
    if not isinstance(root, _CONTAINERS):
        return
    unfinished = (0, 0)
    known: dict[int, tuple[int, int]] = {}  # id -> (values in it, depth)
    work: list[object] = [root]
    while work:
        node = work[-1]
        state = known.get(id(node))
        if state is None:
            known[id(node)] = unfinished
            for part in _parts(node):
                if isinstance(part, _CONTAINERS):
                    if (inner := known.get(id(part))) is None:
                        work.append(part)
                    elif inner is unfinished:
                        raise SourceError("pickle: a value contains itself")
        elif state is unfinished:
            nodes, depth = 1, 0
            for part in _parts(node):
                if isinstance(part, _CONTAINERS):
                    inner = known[id(part)]
                    nodes += inner[0]
                    depth = max(depth, inner[1])
                else:
                    nodes += 1
            if depth >= MAX_DEPTH:
                raise SourceError(f"pickle: values are nested deeper than {MAX_DEPTH}")
            if nodes > MAX_NODES:
                raise SourceError(f"pickle: it unfolds to more than {MAX_NODES} values")
            known[id(node)] = (nodes, depth + 1)
            work.pop()
        else:
            work.pop()
