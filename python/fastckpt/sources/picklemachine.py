"""The machine a pickle runs on: stack, memo, arguments, keys, and what a call or a state becomes.

Law: nothing is imported or called but the functions of the tables below and the caller's own; whatever
else a pickle calls becomes an Inert. What is built is counted before it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..dtypes import DType
from ..errors import SourceError
from .inert import Inert


def allowance(nbytes: int) -> int:
    """Bytes of objects that a pickle of `nbytes` may build, by a count made before they are built.

    The count is about twice what is used: 4 kB a tensor of 150 bytes of pickle, so that a real file
    of any size fits and a bomb is stopped in proportion to its own size. Every opcode counts, so this
    limits opcodes, stack, marks, memo, strings and containers."""
    return min((64 << 20) + 40 * nbytes, (384 << 20) + 3 * nbytes)


MAX_LINE = 1 << 16
"""The longest text argument of a protocol 0 opcode, and the longest name of a global, in bytes."""

MAX_TUPLE_KEYS = 1 << 12
"""The most tuples used as keys or set members: hashes of tuples can be made to collide on purpose."""


class Short(SourceError):
    """The pickle goes on past the bytes given: more of the file is needed, or it is truncated."""


Call = Callable[[tuple[object, ...]], object]


class Machine:
    """A stack cut by marks, a memo, and a position in the bytes; IndexError where the stack runs out."""

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
        self.spent, self.budget = 0, allowance(len(data) - start)
        self.tuple_keys = 0
        self.values, self.calls, self.persistent = values, calls, persistent

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


# ---- calls that give plain values ----


def _one_list(m: Machine, args: tuple[object, ...]) -> list[object] | tuple[object, ...]:
    if not args:
        return []
    if len(args) != 1 or not isinstance(args[0], (list, tuple)):
        raise m.wrong("a container is called with more than one list")
    m.spend(104 * len(args[0]))
    return args[0]


def _plain_set(m: Machine, args: tuple[object, ...]) -> object:
    return {m.key(x) for x in _one_list(m, args)}


def _plain_frozenset(m: Machine, args: tuple[object, ...]) -> object:
    return frozenset(m.key(x) for x in _one_list(m, args))


def _ordered_dict(m: Machine, args: tuple[object, ...]) -> object:
    made = {}
    for pair in _one_list(m, args):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise m.wrong("an OrderedDict is called with something else than pairs")
        made[m.key(pair[0])] = pair[1]
    return made


def _encoded(m: Machine, args: tuple[object, ...]) -> object:
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


_PLAIN_CALLS: dict[str, Callable[[Machine, tuple[object, ...]], object]] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _plain_set,
    "builtins.frozenset": _plain_frozenset,
    "builtins.bytes": _encoded,
    "builtins.bytearray": _encoded,
    "_codecs.encode": _encoded,
}
PLAIN: frozenset[str] = frozenset(_PLAIN_CALLS)
"""The globals whose calls give plain values in every pickle."""
