"""A checkpoint for the command line, and the command line itself."""

from __future__ import annotations

import json
import os

import pytest
from doors.llama import CONFIG, llama
from fastckpt import cli
from zero_writer import write_zero


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A ZeRO-3 llama of three ranks, with its config."""
    path = tmp_path_factory.mktemp("cli") / "checkpoint"
    write_zero(path, llama(), stage=3, world=3)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def run(capsys):
    def run(*argv: str | os.PathLike[str]) -> tuple[int, str, str]:
        code = cli.main([os.fspath(a) for a in argv])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
