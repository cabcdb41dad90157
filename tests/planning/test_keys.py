"""The key of a plan is the same in the process of every rank: the order of no set may reach it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
KINDS = "moe-z2", "z3-", "autoep", "fsdp2", "megatron", "torchtitan", "nvme"
KEYS = """
import sys, fastckpt
from fastckpt.errors import FastckptError

for path in sys.argv[1:]:
    for asked in ({"layout": "same"}, {"layout": "vllm", "tp": 2}):
        try:
            plan = fastckpt.plan(path, **asked)
            print(path, asked, plan.key, plan.checkpoint.notes, plan.checkpoint.unread)
        except FastckptError as e:
            print(path, asked, e)
"""


def told(seed: int, paths: list[str]) -> list[str]:
    """The keys of plans, and what else is said of checkpoints, by a process with this seed of its hashes."""
    said = subprocess.run(
        [sys.executable, "-c", KEYS, *paths],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        text=True,
        capture_output=True,
        check=True,
    )
    return said.stdout.splitlines()


def test_every_process_makes_the_same_plan(packed: Callable[[str, str], Path]) -> None:
    """Of what DeepSpeed, FSDP, Megatron and torchtitan left."""
    archives = sorted(FIXTURES.glob("*/*.tar.xz"))
    held = [packed(at.parent.name, at.name.removesuffix(".tar.xz")) for at in archives]
    roots = [
        *FIXTURES.iterdir(),
        *FIXTURES.glob("torchtitan/*"),
        *held,
        *(p for at in held for p in at.iterdir()),
    ]
    paths = sorted(str(at) for at in roots if at.is_dir())
    first = told(0, paths)
    plans = [line for line in first if re.search(r"} [0-9a-f]{32} ", line)]
    assert len(plans) > 60 and {*KINDS} <= {kind for kind in KINDS for line in plans if kind in line}
    assert first == told(1, paths) == told(2, paths)
