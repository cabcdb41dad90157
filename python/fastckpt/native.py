"""The compiled module, `_C`; None where it is not built, and Python does the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _C
else:
    try:
        from . import _C
    except ImportError:
        _C = None

__all__ = ["_C"]
