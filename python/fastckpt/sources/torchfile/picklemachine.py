"""The machine that runs a pickle: stack, memo, arguments, keys, and what a call or a state becomes.

Law: nothing is imported, and nothing called but the functions in the tables below and the caller's own;
whatever else a pickle calls becomes an Inert. What is built is counted before it is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from ...dtypes import DType
from ...errors import SourceError
from .inert import Inert

FLOOR = 14 << 20
"""Bytes of objects that any pickle may build, however small its file. With what is not counted to the byte (a
stretch of the stack, tables of this package) that is 16 MiB."""


def allowance(pickle: int, file: int) -> int:
    """Bytes of objects that a pickle of so many bytes in a file of so many may build.

    With the pickle itself and the file's directory, which are a part of the file, that is at most four times
    the file and 16 MiB. A count is made before anything is built and takes nothing back for what is let go
    again, so the truth lies below it. Real files of the smallest tensors there are need about all of it.
    The second bound is for files that are large because they are sparse."""
    return FLOOR + min(3 * file, 24 * pickle)


DICT_ITEM, DICT_NAME, SET_ITEM = 100, 72, 100
"""Bytes of an item of a dict, of one whose keys are all strings, and of a set: while their tables grow."""

MEMO = 128
"""Bytes of a value the memo keeps: its item and its index."""

INERT = 136
"""Bytes of a record."""

MAX_LINE = 1 << 16
"""The longest text argument of a protocol 0 opcode, and the longest name of a global, in bytes."""

MAX_TUPLE_KEYS = 1 << 12
"""The most tuples used as keys or set members: hashes of tuples can be made to collide on purpose."""


class Short(SourceError):
    """The pickle goes on past the bytes given: more of the file is needed, or it is truncated."""


class Wrong(SourceError):
    """The pickle is wrong, and the message says at which byte."""


Call = Callable[[tuple[object, ...], "Machine"], object]
"""What a call becomes: of its arguments, what it builds counted (`Machine.spend`) before it is built."""

Persistent = Callable[[object, "Machine"], object]
"""What a persistent id stands for; counted alike."""


class Machine:
    """A stack cut by marks, a memo, and a position in the bytes; IndexError where the stack runs out.

    The memo keeps only what a GET may fetch (`fetched`), and knows how many entries there would be."""

    __slots__ = (
        "apart", "bare", "data", "fetched", "left", "limit", "live", "memo", "outer", "persistent", "plain",
        "pos", "record_keys", "size", "stack", "stored", "tables", "tuple_keys", "values",
    )  # fmt: skip

    def __init__(
        self,
        data: bytes,
        start: int,
        values: Mapping[str, object],
        calls: Mapping[str, Call],
        persistent: Persistent | None,
        file: int,
    ) -> None:
        self.data, self.pos, self.size = data, start, len(data)
        self.stack: list[object] = []
        self.outer: list[list[object]] = []  # the stacks below each open mark
        self.memo: dict[int, object] = {}
        self.fetched = fetched(data, start)
        self.stored = 0  # entries 0 to here were stored
        self.apart: set[int] = set()  # and these beyond
        self.bare: dict[str, Inert] = {}  # globals no table of values knows, one record a name
        self.plain: dict[Inert, Call] = {}  # the calls of those that a table knows
        self.left = self.limit = allowance(len(data) - start, file)
        self.live = 0  # bytes of the stack
        self.tuple_keys = 0
        self.record_keys = False  # whether a record may be a key
        self.values, self.tables, self.persistent = values, (_PLAIN_CALLS, calls), persistent

    # ---- reading arguments ----

    def wrong(self, what: str) -> Wrong:
        return Wrong(f"pickle at byte {self.pos}: {what}")

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

    # ---- the limit ----

    def spend(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < self.live:
            raise self.wrong(f"it builds more than {self.limit} bytes of objects")

    def look(self) -> None:
        """Measure the stack as it stands, since its values come and go, and hold it against what is left."""
        self.live = 10 * (len(self.stack) + sum(map(len, self.outer))) + 72 * len(self.outer)
        self.spend(0)

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
        if isinstance(key, Inert) and self.record_keys:
            return key
        what = f"a record of {key.name}" if isinstance(key, Inert) else f"a value of type {kind.__name__}"
        raise self.wrong(f"{what} is used as a key; wanted a plain value")

    def put(self, index: int) -> None:
        if index == self.stored and not self.apart:
            self.stored += 1
        elif index >= self.stored and index not in self.apart:
            self.fetched = b""  # out of order, as no pickler stores: all is kept from here on
            self.spend(MEMO)
            self.apart.add(index)
            while self.stored in self.apart:
                self.apart.remove(self.stored)
                self.stored += 1
        value = self.stack[-1]
        if index >= len(self.fetched) or self.fetched[index]:
            self.spend(MEMO)
            self.memo[index] = value

    def memoize(self) -> None:
        self.put(self.stored + len(self.apart))

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index] if index in self.memo else self.absent(index))

    def absent(self, index: int) -> object:
        raise self.wrong(f"memo entry {index} was never stored")

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
            self.spend(len(full) + 600)
            found = self.bare[full] = Inert(full)
            for table in self.tables:
                if full in table:
                    self.plain[found] = table[full]
        return found

    def call(self, function: object, args: object) -> object:
        if not isinstance(function, Inert):
            raise self.wrong(f"a value of type {type(function).__name__} is called")
        if not isinstance(args, tuple):
            raise self.wrong(f"{function.name} is called with a {type(args).__name__}; wanted a tuple")
        ours = self.plain.get(function)
        if ours is None:
            self.spend(INERT)
            return Inert(function.name, args)
        try:
            return ours(args, self)
        except Wrong:
            raise
        except SourceError as e:
            raise self.wrong(f"{function.name}: {e}") from None

    def extend(self, onto: object, items: list[object]) -> None:
        self.spend(10 * len(items))
        if isinstance(onto, list):
            onto.extend(items)
        elif isinstance(onto, Inert) and self.bare.get(onto.name) is not onto:
            onto.items.extend(items)
        else:
            raise self.wrong(f"items are appended to a value of type {type(onto).__name__}")

    def update(self, onto: object, items: list[object]) -> None:
        if len(items) % 2:
            raise self.wrong("a key without a value")
        keys = items[::2]
        names = all([type(k) is str for k in keys])
        self.spend((DICT_NAME if names else DICT_ITEM) * len(keys))
        pairs = zip(keys, items[1::2], strict=True)
        if isinstance(onto, dict):
            if names:
                onto.update(pairs)
                return
            for k, v in pairs:
                onto[self.key(k)] = v
        elif isinstance(onto, Inert) and self.bare.get(onto.name) is not onto:
            self.spend(16 * len(keys))
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


def _one_list(args: tuple[object, ...]) -> list[object] | tuple[object, ...]:
    if not args:
        return []
    if len(args) != 1 or not isinstance(args[0], (list, tuple)):
        raise SourceError("it is called with more than one list")
    return args[0]


def _plain_set(args: tuple[object, ...], m: Machine) -> object:
    items = _one_list(args)
    m.spend(216 + SET_ITEM * len(items))
    return {m.key(x) for x in items}


def _plain_frozenset(args: tuple[object, ...], m: Machine) -> object:
    items = _one_list(args)
    m.spend(216 + SET_ITEM * len(items))
    return frozenset(m.key(x) for x in items)


def _ordered_dict(args: tuple[object, ...], m: Machine) -> object:
    items = _one_list(args)
    m.spend(64 + DICT_ITEM * len(items))
    made = {}
    for pair in items:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise SourceError("it is called with something else than pairs")
        made[m.key(pair[0])] = pair[1]
    return made


def _encoded(args: tuple[object, ...], m: Machine) -> object:
    """Bytes as protocols below 3 write them: text with its encoding, or nothing."""
    if not args:
        return b""
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
        m.spend(40 + len(args[0]))
        try:
            return args[0].encode("latin-1")
        except UnicodeEncodeError as e:
            raise SourceError(f"bytes are no latin-1 text: {e.reason}") from None
    raise SourceError("bytes are not given as latin-1 text")


_PLAIN_CALLS: dict[str, Call] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _plain_set,
    "builtins.frozenset": _plain_frozenset,
    "builtins.bytes": _encoded,
    "builtins.bytearray": _encoded,
    "_codecs.encode": _encoded,
}
PLAIN: frozenset[str] = frozenset(_PLAIN_CALLS)
"""The globals whose calls give plain values in every pickle."""


# ---- which memo entries are wanted ----

_STEP = 1 << 20
_TEXT_GET = re.compile(rb"g([0-9]{1,2048})L?\n")


def fetched(data: bytes, start: int) -> bytes:
    """For each memo index, whether a GET in `data` may name it; indices beyond the end may be named too.

    Whatever could be the bytes of a GET is taken for one, wherever it stands, so that no opcode needs to be
    read: most entries of a torch pickle are never fetched, and would keep all that was built on the way."""
    puts = sum(data.count(op, start) for op in (b"q", b"r", b"p", b"\x94"))
    out = np.zeros(max(puts + 1, 256), bool)
    out[:256] = True  # of one byte
    for m in _TEXT_GET.finditer(data, start):
        if (index := int(m[1])) < len(out):
            out[index] = True
    whole = np.frombuffer(data, np.uint8)
    for at in range(start, len(data) - 4, _STEP):
        part = whole[at : at + _STEP + 4]
        after = np.flatnonzero(part[:-4] == ord("j"))[:, None] + np.arange(1, 5)
        index = part[after].view("<u4")
        out[index[index < len(out)]] = True
    return out.tobytes()
