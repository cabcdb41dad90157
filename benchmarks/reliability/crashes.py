"""A file system that loses what was not synced, rebuilt from the log of a real run.

What a crash may leave is more than one thing: a file's bytes since its last fsync may be there, be zeros, or
not be there; the names of a directory may be those of any moment since that directory's last fsync, whatever
other directories are at. POSIX promises no more, and no file system forgets more.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_SIZES = struct.Struct("<cIIIq")


@dataclass(frozen=True, slots=True)
class Call:
    """One record of the log; `kind` is shim.c's letter."""

    kind: str
    path: str
    other: str
    number: int
    data: bytes


def read_log(path: Path) -> Iterator[Call]:
    """The calls, in the order in which they were done."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        kind, a, b, n, number = _SIZES.unpack_from(data, at)
        at += _SIZES.size
        parts = data[at : at + a], data[at + a : at + a + b], data[at + a + b : at + a + b + n]
        at += a + b + n
        yield Call(kind.decode(), parts[0].decode(), parts[1].decode(), number, parts[2])


@dataclass(slots=True, eq=False)
class File:
    """Bytes now, and at the last fsync (None: there was none)."""

    now: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None

    def left(self, chance: random.Random | None) -> bytes:
        """What a crash leaves: without `chance` only what was synced."""
        kept = self.synced if self.synced is not None else b""
        if chance is None or bytes(self.now) == kept:
            return kept
        how = chance.randrange(4)
        if how == 0:
            return kept
        if how == 1:
            return bytes(self.now)
        if how == 2:  # the size came through, the bytes did not
            return kept[: len(self.now)].ljust(len(self.now), b"\0")
        cut = chance.randrange(len(self.now) + 1)
        return bytes(self.now[:cut]).ljust(len(self.now), b"\0")


@dataclass(slots=True, eq=False)
class Directory:
    """Names now, and at every moment since the last fsync, the synced ones first."""

    now: dict[str, Node] = field(default_factory=dict)
    since: list[dict[str, Node]] = field(default_factory=lambda: [{}])

    def changed(self) -> None:
        self.since.append(dict(self.now))

    def left(self, chance: random.Random | None) -> dict[str, Node]:
        """What a crash leaves: without `chance` only what was synced."""
        return (
            self.since[0]
            if chance is None
            else chance.choice((self.since[0], self.now, chance.choice(self.since)))
        )


Node = File | Directory


class Disk:
    """The tree below a root, as the calls make it; the root itself is durable."""

    def __init__(self, root: str) -> None:
        self._root, self.tree = root, Directory()

    @staticmethod
    def of(root: Path) -> Disk:
        """A disk that holds a directory as it is, all of it synced."""
        disk = Disk(str(root))
        disk.tree = _read(root)
        return disk

    def _parts(self, path: str) -> list[str]:
        return [p for p in path.removeprefix(self._root).split("/") if p]

    def _node(self, parts: list[str]) -> Node:
        node: Node = self.tree
        for part in parts:
            if not isinstance(node, Directory):
                raise ValueError(f"{parts}: {part} lies in no directory")
            node = node.now[part]
        return node

    def _parent(self, path: str) -> tuple[Directory, str]:
        *above, name = self._parts(path)
        found = self._node(above)
        if not isinstance(found, Directory):
            raise ValueError(f"{path}: lies in no directory")
        return found, name

    def apply(self, call: Call) -> None:
        """Do one call."""
        if " (deleted)" in call.path:
            return
        if call.kind in "wst":
            node = self._node(self._parts(call.path))
            if isinstance(node, Directory):
                node.since = [dict(node.now)]
            elif call.kind == "s":
                node.synced = bytes(node.now)
            elif call.kind == "t":
                node.now.extend(bytes(max(0, call.number - len(node.now))))  # the manager's files only grow
            else:
                end = call.number + len(call.data)
                node.now.extend(bytes(max(0, end - len(node.now))))
                node.now[call.number : end] = call.data
            return
        if call.kind == "m" and not self._parts(call.path):
            return
        directory, name = self._parent(call.path)
        if call.kind == "o":
            held = directory.now.get(name)
            if isinstance(held, File):
                if call.number:
                    held.now = bytearray()
                return
            directory.now[name] = File()
        elif call.kind == "m":
            directory.now[name] = Directory()
        elif call.kind in "ud":
            del directory.now[name]
        elif call.kind in "rx":
            to, new = self._parent(call.other)
            moved = directory.now.pop(name)
            if call.kind == "x":
                directory.now[name] = to.now[new]
            to.now[new] = moved
            if to is not directory:
                to.changed()
        else:
            raise ValueError(f"{call.kind}: the manager makes no such call")
        directory.changed()

    def crash(self, into: Path, chance: random.Random | None) -> None:
        """Write what a crash now would leave."""
        _write(self.tree, into, chance)


def _read(path: Path) -> Directory:
    names: dict[str, Node] = {}
    for entry in path.iterdir():
        data = b"" if entry.is_dir() else entry.read_bytes()
        names[entry.name] = _read(entry) if entry.is_dir() else File(bytearray(data), data)
    return Directory(names, [dict(names)])


def _write(directory: Directory, into: Path, chance: random.Random | None) -> None:
    into.mkdir()
    for name, node in directory.left(chance).items():
        if isinstance(node, Directory):
            _write(node, into / name, chance)
        else:
            fd = os.open(into / name, os.O_WRONLY | os.O_CREAT, 0o666)
            os.write(fd, node.left(chance))
            os.close(fd)
