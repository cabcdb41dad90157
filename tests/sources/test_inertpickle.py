"""inertpickle against CPython's own pickler, and against pickles nobody should read."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import enum
import pickle
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from fastckpt.errors import SourceError
from fastckpt.sources.torchfile import inert, inertpickle, picklemachine
from fastckpt.sources.torchfile.inert import Inert
from fastckpt.sources.torchfile.inertpickle import parse
from fastckpt.sources.torchfile.picklemachine import Short
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.binary(max_size=300)
)
KEYS = st.none() | st.booleans() | st.integers(-(1 << 62), 1 << 62) | TEXT | st.binary(max_size=9)
TREES = st.recursive(
    LEAVES | st.sets(KEYS, max_size=5) | st.frozensets(KEYS, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS | st.tuples(KEYS, KEYS), inner, max_size=5)
        | st.dictionaries(KEYS, inner, max_size=5).map(OrderedDict)
    ),
    max_leaves=30,
)


def _plain(value: object) -> object:
    """The value with every type spelled out, so that 1, True and 1.0 differ."""
    if isinstance(value, dict):
        return ("dict", [(_plain(k), _plain(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [_plain(v) for v in value])
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(map(repr, value)))
    return (type(value).__name__, value.hex() if isinstance(value, (float, bytes)) else value)


@settings(max_examples=150, deadline=None)
@given(TREES, st.integers(0, 5))
def test_plain_values_come_back(value: object, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    parsed = parse(b"before" + data + b"after", 6)
    assert parsed.end == 6 + len(data)
    assert _plain(parsed.root) == _plain(value)
    assert parsed.globals <= picklemachine.PLAIN


@pytest.mark.parametrize("protocol", range(6))
def test_large_values_come_back(protocol: int) -> None:
    value = [list(range(70_000)), "x" * 60_000, b"\xfe" * 300, 1 << 2000, -(1 << 2001), 255, 256, 65536, -1]
    value += [{str(k): k for k in range(3000)}, tuple(range(5)), set(range(2000)), float("inf"), -0.0]
    shared: list[object] = [1]
    value += [[shared, shared]]
    root = parse(pickle.dumps(value, protocol)).root
    assert _plain(root) == _plain(value)
    assert isinstance(root, list) and root[-1][0] is root[-1][1]


def test_python_2_strings() -> None:
    assert parse(b"S'ab'\n.").root == "ab"
    assert parse(b"U\x02ab.").root == "ab"
    assert parse(b"T\x02\0\0\0ab.").root == "ab"
    assert parse(b"I01\n.").root is True
    assert parse(b"L12L\n.").root == 12


# ---- records ----


class Colour(enum.Enum):
    RED = 3


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class Slotted:
    __slots__ = ("x",)


class Named(dict):  # type: ignore[type-arg]
    pass


class Keyworded:
    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        return (1,), {"k": 2}

    def __new__(cls, *args: int, **kw: int) -> Keyworded:
        return super().__new__(cls)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_become_records(protocol: int) -> None:
    slotted = Slotted()
    slotted.x = 5  # type: ignore[attr-defined]
    value = [argparse.Namespace(a=1), Colour.RED, Point(4), slotted, Named(k=1), Keyworded(), Point, len]
    value += [collections.defaultdict(list, {1: [2]}), collections.deque([1, 2]), datetime.date(2020, 1, 2)]
    value += [np.float32(1.5), np.arange(3), np.random.default_rng(0).bit_generator.state, slice(1, 2)]
    root = parse(pickle.dumps(value, protocol)).root
    assert isinstance(root, list)
    ns, red, point, slots, named, key, cls, fn, default, deque, date, scalar, array, state, cut = root
    assert (ns.name, ns.args, ns.state) == ("argparse.Namespace", (), {"a": 1})
    assert (red.name, red.args) == (f"{__name__}.Colour", (3,))
    assert (point.name, point.state) == (f"{__name__}.Point", {"x": 4})
    assert slots.state == (None, {"x": 5})
    assert (named.name, named.items) == (f"{__name__}.Named", [("k", 1)])
    assert key.args == (1, {"k": 2}) if protocol >= 4 else key.name == "functools.partial"
    assert (cls.name, fn.name) == (f"{__name__}.Point", "builtins.len")
    assert (default.name, default.items) == ("collections.defaultdict", [(1, [2])])
    assert default.args[0].name == "builtins.list"
    assert (deque.name, deque.items) == ("collections.deque", [1, 2])
    assert date.name == "datetime.date" and isinstance(date.args[0], bytes)
    assert scalar.name.endswith("multiarray.scalar") and scalar.args[1] == b"\0\0\xc0?"
    assert array.state[1] == (3,) if protocol < 5 else array.name.endswith("_frombuffer")
    assert isinstance(state, dict) and cut.args == (1, 2, None)


def test_the_oldest_opcodes() -> None:
    made = parse(b"(cos\nsystem\nI1\no.")
    assert isinstance(made.root, Inert) and (made.root.name, made.root.args) == ("os.system", (1,))
    made = parse(b"(I1\nios\nsystem\n.")
    assert isinstance(made.root, Inert) and (made.root.name, made.root.args) == ("os.system", (1,))
    assert made.globals == {"os.system"}


def test_an_ordered_dict_of_pairs() -> None:
    assert parse(b"ccollections\nOrderedDict\n]](K\x01K\x02ea\x85R.").root == {1: 2}


def test_a_record_of_the_same_class_does_not_share() -> None:
    root = parse(pickle.dumps([Point(1), Point(2)])).root
    assert isinstance(root, list) and [p.state for p in root] == [{"x": 1}, {"x": 2}]


def test_tables_of_the_caller() -> None:
    data = b"\x80\x02cm\nA\ncm\nB\nK\x05\x85RX\x01\0\0\0pQ\x87."
    calls = {"m.B": lambda args, machine: ("b", args)}
    root = parse(data, values={"m.A": 7}, calls=calls, persistent=lambda pid, machine: [pid]).root
    assert root == (7, ("b", (5,)), ["p"])


# ---- refusals ----


def _string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _nested(value: object, times: int) -> object:
    for _ in range(times):
        value = [value]
    return value


REFUSED = {
    "empty": (b"", "without a STOP"),
    "no stop": (b"K\x01", "without a STOP"),
    "stop on nothing": (b".", "STOP with 0"),
    "stop on two": (b"NN.", "STOP with 2"),
    "stop in a mark": (b"N(N.", "open marks"),
    "unknown opcode": (b"\xff.", "0xff"),
    "extension 1": (b"\x82\x01.", "0x82"),
    "extension 2": (b"\x83\x01\x00.", "0x83"),
    "extension 4": (b"\x84\x01\x00\x00\x00.", "0x84"),
    "buffer": (b"\x97.", "0x97"),
    "protocol": (b"\x80\x06N.", "protocol 6"),
    "missing memo": (b"h\x07.", "memo entry 7"),
    "missing long memo": (b"j\xff\xff\xff\xff.", "memo entry"),
    "put on nothing": (b"q\x00.", "more values"),
    "pop on nothing": (b"0.", "no mark"),
    "no mark": (b"Nt.", "no mark"),
    "negative put": (b"Np-1\n.", "memo entry -1"),
    "append to int": (b"K\x01K\x02a.", "appended to a value of type int"),
    "append to tuple": (b")K\x02a.", "appended"),
    "append to a class": (b"cos\nsystem\nK\x02a.", "appended"),
    "set on list": (b"]K\x01K\x02s.", "set on a value of type list"),
    "odd items": (b"}(K\x01u.", "key without a value"),
    "odd dict": (b"(K\x01d.", "key without a value"),
    "add to list": (b"](K\x01\x90.", "members are added"),
    "list key": (b"}]K\x01s.", "type list is used as a key"),
    "dict key": (b"}}K\x01s.", "type dict is used as a key"),
    "set key": (b"}\x8fK\x01s.", "type set is used as a key"),
    "record key": (b"}cos\nsystem\n)RK\x01s.", "record of os.system is used as a key"),
    "record member": (b"\x8f(cos\nsystem\n\x90.", "used as a key"),
    "nested tuple key": (b"})\x85\x85K\x01s.", "tuple inside a tuple"),
    "list in tuple key": (b"}]\x85K\x01s.", "type list is used as a key"),
    "huge key": (b"}\x8a\x09" + b"\x11" * 9 + b"K\x01s.", "used as a key"),
    "huge member by call": (b"cbuiltins\nset\n](\x8a\x09" + b"\x11" * 9 + b"e\x85R.", "used as a key"),
    "call a value": (b"K\x01)R.", "type int is called"),
    "arguments no tuple": (b"cos\nsystem\nK\x01R.", "called with a int"),
    "build a value": (b"K\x01}b.", "state is set on a value of type int"),
    "build a class": (b"cos\nsystem\n}b.", "state is set"),
    "build twice": (b"cos\nsystem\n)R}b}b.", "set twice"),
    "object of nothing": (b"(o.", "more values"),
    "stack global": (b"K\x01K\x02\x93.", "no string"),
    "persistent": (b"K\x01Q.", "persistent id"),
    "set of a number": (b"cbuiltins\nset\nK\x01\x85R.", "more than one list"),
    "ordered dict": (b"ccollections\nOrderedDict\n](K\x01e\x85R.", "pairs"),
    "bytes": (b"c_codecs\nencode\nK\x01K\x02\x86R.", "latin-1"),
    "bytes above": (
        b"c_codecs\nencode\n" + b"X\x02\0\0\0\xc4\x80" + _string("latin1") + b"\x86R.",
        "latin-1",
    ),
    "other codec": (b"c_codecs\nencode\n" + _string("x") + _string("zip") + b"\x86R.", "latin-1"),
    "utf-8": (b"X\x01\0\0\0\xff.", "not utf-8"),
    "surrogate": (b"X\x03\0\0\0\xed\xa0\x80.", "not utf-8"),
    "surrogate escape": (b"V\\ud800\n.", "escape"),
    "text int": (b"Iabc\n.", "no integer"),
    "text int of signs": (b"I--1\n.", "no integer"),
    "text int too long": (b"I" + b"1" * 3000 + b"\n.", "no integer"),
    "text float": (b"Fabc\n.", "no float"),
    "quotes": (b"Sab\n.", "quotes"),
    "escapes": (b"S'\\x41'\n.", "quotes"),
    "long integer": (b"\x8b\x00\x00\x00\x7f" + b"\x01" * 100, "has 2130706432 bytes"),
    "short": (b"X\x10\0\0\0abc", "needs 16 bytes"),
    "endless string": (b"\x8d" + b"\xff" * 8, "builds more than"),
    "long string": (b"\x8d" + struct.pack("<Q", 1 << 23) + b"abc", "needs 8388608"),
    "endless line": (b"I" + b"1" * 100_000, "longer than"),
    "line without end": (b"I12", "no end of line"),
    "self in list": (b"]q\x00h\x00a.", "contains itself"),
    "self in dict": (b"}q\x00K\x01h\x00s.", "contains itself"),
    "self in state": (b"cos\nsystem\n)Rq\x00h\x00b.", "contains itself"),
    "self through tuple": (b"]q\x00h\x00\x85a.", "contains itself"),
    "deep tuples": (b")" + b"\x85" * 300 + b".", "deeper than"),
    "deep lists": (b"]" * 300 + b"a" * 299 + b".", "deeper than"),
    "deep in deep": (pickle.dumps([deep := _nested([0] * 1100, 150), _nested(deep, 150)], 4), "deeper than"),
    "long global": (b"c" + b"a" * 40_000 + b"\n" + b"b" * 40_000 + b"\n.", "name of a global is longer"),
    "unfolding": (b")" + b"2\x86" * 40 + b".", "unfolds"),
    "unfolding deep": (b")" + b"2\x86" * 5000 + b".", "deeper|unfolds"),
    "not a pickle": (b"hello world", "memo entry|no integer"),
    "zeros": (bytes(1000), "0x00"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, match = REFUSED[name]
    with pytest.raises(SourceError, match=match) as e:
        parse(data)
    assert str(e.value).startswith("pickle")


def test_a_tree_may_have_as_many_values_as_its_pickle_has_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a save of thousands of ranks needs; what is written once and shared may not grow alike."""
    monkeypatch.setattr(inert, "MAX_NODES", 64)
    written = [[k, k + 1, k + 2] for k in range(256, 512)]
    assert parse(pickle.dumps(written, 2)).root == written
    with pytest.raises(SourceError, match="unfolds"):
        parse(pickle.dumps([written[0]] * 1024, 2))


BOMBS = {
    "dicts": b"}",
    "lists": b"]",
    "sets": b"\x8f",
    "marks": b"(",
    "stack": b"N",
    "copies": b"2",
    "numbers": b"J1234",
    "small numbers": b"M\x00\x01",
    "floats": b"G\0\0\0\0\0\0\0\1",
    "long numbers": b"\x8a\x09" + b"\x11" * 9,
    "empty strings": b"X\0\0\0\0",
    "strings": b"X\x03\0\0\0abc",
    "short strings": b"\x8c\x02ab",
    "wide strings": b"X\x05\0\0\0a\xf0\x9f\x92\xa9",
    "bytes": b"C\x01a",
    "tuples of one": b"N\x85",
    "tuples of two": b"NN\x86",
    "tuples of marks": b"(NNNNt",
    "tuples in tuples": b"\x85",
    "lists of one": b"]Na",
    "lists of two": b"](NNe",
    "dicts of one": b"}NNs",
    "dicts of names": b"}(X\1\0\0\0aNu",
    "sets of one": b"\x8f(K\1\x90",
    "frozen sets": b"(K\1\x91",
    "records": b"cos\nsystem\n)R",
    "records with state": b"cos\nsystem\n)R}b",
    "records with items": b"cos\nsystem\n)R(NNu",
    "ordered dicts": b"ccollections\nOrderedDict\n)R",
    "memo": b"Nq\0h\0\x94g300\n",
    "memo kept": b"J1234\x94j\xff\xff\0\0",
}


def _peak(data: bytes) -> int:
    """The most bytes that were allocated at once while `data` was read, and refused."""
    tracemalloc.start()
    try:
        with pytest.raises(SourceError):
            parse(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("nbytes", [1 << 18, 12 << 20])
@pytest.mark.nightly
def test_memory_stays_within_four_times_the_file_and_sixteen_mib(name: str, nbytes: int) -> None:
    """A file of nothing but one thing; the pickle itself is the fourth time."""
    data = BOMBS[name] * (nbytes // len(BOMBS[name]))
    assert _peak(data) <= 3 * len(data) + (16 << 20)


@pytest.mark.parametrize("name", BOMBS)
def test_memory_stays_within_the_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above with a low floor, so that every file runs into it."""
    monkeypatch.setattr(picklemachine, "FLOOR", 1 << 18)
    data = BOMBS[name] * (40_000 // len(BOMBS[name]))
    assert _peak(data) <= 3 * len(data) + (1 << 18) + (2 << 20)


def test_a_bomb_stops_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picklemachine, "allowance", lambda pickle, file: 1 << 16)
    for data in (
        b"}" * 10_000,
        b"(" * 30_000,
        b"]" + b"2" * 99_999,
        b"N" + b"\x94" * 10_000 + b"".join(b"j" + struct.pack("<I", k) + b"0" for k in range(10_000)),
        b"\x8f" * 10_000,
    ):
        with pytest.raises(SourceError, match="builds more than"):
            parse(data + b".")


def test_what_is_counted_is_not_less_than_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picklemachine, "allowance", lambda pickle, file: 1 << 40)
    for name, part in BOMBS.items():
        data = part * (20_000 // len(part))
        machine = picklemachine.Machine(data, 0, {}, {}, None, len(data))
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(SourceError):
                inertpickle._run(machine)
            held = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        stack = 10 * (len(machine.stack) + sum(map(len, machine.outer))) + 72 * len(machine.outer)
        assert held <= machine.limit - machine.left + stack + 8192, name


def test_colliding_keys_are_refused() -> None:
    """Integers equal modulo 2^61 - 1 have one hash: a dict of many takes quadratic time."""
    step = (1 << 61) - 1
    data = b"}("
    for k in range(1, 2000):
        n = k * step
        data += b"\x8a" + bytes([9]) + n.to_bytes(9, "little") + b"N"
    with pytest.raises(SourceError, match="used as a key"):
        parse(data + b"u.")


def test_many_tuple_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps({(k, k): k for k in range(100)})
    assert parse(data).root == {(k, k): k for k in range(100)}
    monkeypatch.setattr(picklemachine, "MAX_TUPLE_KEYS", 99)
    with pytest.raises(SourceError, match="tuples are used as keys"):
        parse(data)


def test_short_is_told_apart_from_wrong() -> None:
    """Every true prefix of a pickle asks for more bytes."""
    data = pickle.dumps({"a": [1.5, "text", b"bytes", 1 << 70], "b": Point(3)}, 2)
    for n in range(len(data)):
        with pytest.raises(Short):
            parse(data[:n])
