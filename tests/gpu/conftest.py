"""Tests in this folder need a GPU and a build with its kernels; elsewhere they are skipped, each visibly."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastckpt.errors import DeviceError
from fastckpt.executors.cuda import usable

HERE = Path(__file__).parent


def why_not() -> str | None:
    try:
        usable("cuda")
    except DeviceError as e:
        return str(e)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [i for i in items if HERE in i.path.parents]
    reason = why_not() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
