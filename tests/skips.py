"""What a run left out, folded: a line a reason, the most frequent first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest


def by_reason(skipped: Iterable[pytest.TestReport | pytest.CollectReport]) -> list[str]:
    """How many tests, or whole files, each reason kept from running."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in skipped
        if isinstance(report.longrepr, tuple)
    )
    return [f"{count:5} {reason}" for reason, count in reasons.most_common()]
