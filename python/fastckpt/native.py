"""The compiled module, `_C`; None where it is not built, and Python does the same.

Law: one that was built with another version of this package is refused, since it may give other bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import __version__
from .errors import DeviceError

if TYPE_CHECKING:
    from . import _C
else:
    try:
        from . import _C
    except ImportError:
        _C = None
    else:
        if (built := getattr(_C, "version", "of a version it does not tell")) != __version__:
            raise DeviceError(
                f"{_C.__file__}: was built with fastckpt {built}, this is {__version__}; build it again "
                "(python setup.py build_ext --inplace), or install the package again"
            )

__all__ = ["_C"]
