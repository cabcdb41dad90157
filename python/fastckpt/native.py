"""The compiled module, `_C`; None where it is not built, and Python does the same.

Law: one that was built with another version of this package is refused, since it may give other bytes; so is
one that does not load here, since Python is far slower, and nobody would be told.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import __version__
from .errors import DeviceError

if TYPE_CHECKING:
    from . import _C
else:
    try:
        _C = import_module("._C", __package__)
    except ModuleNotFoundError:
        _C = None
    except ImportError as e:
        raise DeviceError(
            f"the compiled module does not load: {e}; build it again (python setup.py build_ext --inplace) "
            "or remove it: Python does the same, far slower"
        ) from None
    else:
        if (built := getattr(_C, "version", "of a version it does not tell")) != __version__:
            raise DeviceError(
                f"{_C.__file__}: was built with fastckpt {built}, this is {__version__}; build it again "
                "(python setup.py build_ext --inplace), or install the package again"
            )

__all__ = ["_C"]
