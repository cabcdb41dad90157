"""A file written by somebody else becomes part of an output, with its digest."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastckpt.digest import LEAF, digest
from fastckpt.errors import WriteError
from fastckpt.output.manifest import FileEntry, Manifest
from fastckpt.output.writer import Output
from fastckpt.verification.outputs import verify
from outputs import RECORD


@pytest.mark.parametrize("rank", [None, 0], ids=["whole", "part"])
@pytest.mark.parametrize("nbytes", [0, 5, LEAF, 2 * LEAF + 3])
def test_adopted(tmp_path: Path, rank: int | None, nbytes: int) -> None:
    theirs, data = tmp_path / "theirs.pt", bytes(k % 251 for k in range(nbytes))
    theirs.write_bytes(data)
    with Output(tmp_path / "out", key="k", rank=rank) as out:
        out.adopt(theirs, "engine/one.pt")
        out.commit(RECORD)
    assert not theirs.exists()
    assert (tmp_path / "out/engine/one.pt").read_bytes() == data
    assert Manifest.read(tmp_path / "out").files == {"engine/one.pt": FileEntry(nbytes, digest(data))}
    assert verify(tmp_path / "out").problems == ()


def test_what_is_not_there(tmp_path: Path) -> None:
    with Output(tmp_path / "out", key="k") as out, pytest.raises(WriteError, match=r"gone\.pt"):
        out.adopt(tmp_path / "gone.pt", "one.pt")
    assert not (tmp_path / "out").exists()
