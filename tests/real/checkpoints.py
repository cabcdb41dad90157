"""Which real checkpoints the tests run on, as pytest parameters.

"kept/NAME" lies in tests/fixtures, written by DeepSpeed once; "made/NAME" is written by the DeepSpeed that is
installed, before its first test, and kept in pytest's cache.
"""

from __future__ import annotations

import pytest
from real.make_zero import NIGHTLY, NORMAL

KEPT = (
    "z0-llama-w2",
    "z1-mixed-w2",
    "z2-llama-w2-robin",
    "z2-mixed-w3",
    "z3-llama-w2-even",
    "z3-llama-w2-subgroups",
    "z3-mixed-w4",
)
MADE = [f"made/{run.name}" for run in NORMAL]
NIGHTLY_MADE = [pytest.param(f"made/{run.name}", marks=pytest.mark.nightly) for run in NIGHTLY]
ALL = [*(f"kept/{name}" for name in KEPT), *MADE, *NIGHTLY_MADE]
