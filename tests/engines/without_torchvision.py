"""Importing this puts names in place of torchvision where it is absent, also in programs that are started."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

if find_spec("torchvision") is None:
    stubs = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stubs")
    sys.path.insert(0, stubs)
    os.environ["PYTHONPATH"] = os.pathsep.join([stubs, os.environ.get("PYTHONPATH", "")])
