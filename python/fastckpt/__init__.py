"""fastckpt: ZeRO/FSDP training checkpoints in, serving shards out, in one pass.

Law: importing this package imports nothing else of it, and neither numpy nor torch; a public name brings
its module in when it is first used (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint as Checkpoint
    from .doors.difference import Diff as Diff
    from .doors.difference import diff as diff
    from .doors.inspection import Inspection as Inspection
    from .doors.inspection import inspect as inspect
    from .dtypes import DType as DType
    from .dtypes import bfloat16 as bfloat16
    from .dtypes import dtype as dtype
    from .dtypes import float8_e4m3fn as float8_e4m3fn
    from .dtypes import float8_e5m2 as float8_e5m2
    from .dtypes import float16 as float16
    from .dtypes import float32 as float32
    from .dtypes import float64 as float64
    from .errors import DeviceError as DeviceError
    from .errors import FastckptError as FastckptError
    from .errors import LayoutError as LayoutError
    from .errors import ManagerError as ManagerError
    from .errors import RecipeError as RecipeError
    from .errors import SourceError as SourceError
    from .errors import ViewError as ViewError
    from .errors import WriteError as WriteError
    from .joining.foreign import open_shards as open_shards
    from .layouts.hf import Hf as Hf
    from .layouts.megatron import Megatron as Megatron
    from .layouts.rtp_llm import RtpLlm as RtpLlm
    from .layouts.same import Same as Same
    from .layouts.vllm import Vllm as Vllm
    from .manager.job import Job as Job
    from .manager.manager import CheckpointManager as CheckpointManager
    from .manager.runner import JobRunner as JobRunner
    from .opening import open as open
    from .placement import Placement as Placement
    from .planning.plans import Plan as Plan
    from .quantisation.schemes import SCHEMES as SCHEMES
    from .quantisation.schemes import Quant as Quant
    from .road import consolidate as consolidate
    from .road import load_into as load_into
    from .road import plan as plan
    from .road import prepare as prepare
    from .road import reshard as reshard
    from .running.runs import Report as Report
    from .sources.memory import partitioned as partitioned
    from .verification.loaded import verify_tensors as verify_tensors
    from .verification.outputs import VerifyReport as VerifyReport
    from .verification.outputs import verify as verify

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "checkpoint",
    "CheckpointManager": "manager.manager",
    "Job": "manager.job",
    "JobRunner": "manager.runner",
    "Inspection": "doors.inspection",
    "inspect": "doors.inspection",
    "Diff": "doors.difference",
    "diff": "doors.difference",
    "DType": "dtypes",
    "bfloat16": "dtypes",
    "dtype": "dtypes",
    "float8_e4m3fn": "dtypes",
    "float8_e5m2": "dtypes",
    "float16": "dtypes",
    "float32": "dtypes",
    "float64": "dtypes",
    "DeviceError": "errors",
    "FastckptError": "errors",
    "LayoutError": "errors",
    "ManagerError": "errors",
    "RecipeError": "errors",
    "SourceError": "errors",
    "ViewError": "errors",
    "WriteError": "errors",
    "Hf": "layouts.hf",
    "Megatron": "layouts.megatron",
    "RtpLlm": "layouts.rtp_llm",
    "Same": "layouts.same",
    "Vllm": "layouts.vllm",
    "Placement": "placement",
    "Plan": "planning.plans",
    "Report": "running.runs",
    "consolidate": "road",
    "load_into": "road",
    "plan": "road",
    "prepare": "road",
    "reshard": "road",
    "SCHEMES": "quantisation.schemes",
    "Quant": "quantisation.schemes",
    "open": "opening",
    "open_shards": "joining.foreign",
    "partitioned": "sources.memory",
    "VerifyReport": "verification.outputs",
    "verify": "verification.outputs",
    "verify_tensors": "verification.loaded",
}
"""Every public name and the module it lives in."""

__all__ = [*_HOME]


if not TYPE_CHECKING:  # a type checker sees the imports above instead

    def __getattr__(name: str) -> object:
        """The public name, from its module; kept, so that the next use is a plain attribute."""
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f".{home}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*_HOME, *(name for name in globals() if name.startswith("__"))])
