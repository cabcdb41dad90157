"""One conversion in a fresh process: peak memory over the imports, and what was read.

    python probe.py WHAT CHECKPOINT OUT TP

WHAT is one of reshard, reshard same, consolidate, zero_to_fp32, or of peers.SPLITS.

Prints JSON. `peak`: bytes by which VmHWM grew over the imports; `disk`: bytes the kernel fetched from storage
for this process (with a cold cache: all it read, mapped or not, read-ahead included); `read`, `needed`:
fastckpt's own count.
"""

from __future__ import annotations

import json
import sys
import time


def status(path: str, key: str) -> int:
    """A number of a /proc file."""
    with open(path) as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key))


def main() -> int:
    what, checkpoint, out, tp = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    told: dict[str, float] = {}
    if "zero" in what:
        import deepspeed.utils.zero_to_fp32  # noqa: F401
        import peers
    elif what.startswith("dcp_to_torch_save"):
        import peers
        import torch.distributed.checkpoint.format_utils  # noqa: F401
    else:
        import fastckpt
        import fastckpt.road
        from fastckpt.layouts.same import Same
    before = status("/proc/self/status", "VmHWM") * 1024
    disk = status("/proc/self/io", "read_bytes")
    began = time.perf_counter()
    if what == "zero_to_fp32":
        peers.zero_to_fp32(checkpoint, out)
    elif what.endswith("split"):
        peers.SPLITS[what](checkpoint, out, tp, peers.LLAMA)
    elif what == "consolidate":
        report = fastckpt.consolidate(checkpoint, out, durable=False)
        told = {"read": report.bytes_read, "needed": report.bytes_needed}
    else:
        layout, ranks = ("hf", tp) if what == "reshard" else (Same("safetensors"), 1)
        report = fastckpt.reshard(checkpoint, ranks, layout=layout, dtype="bfloat16", out=out, durable=False)
        told = {"read": report.bytes_read, "needed": report.bytes_needed}
    told["seconds"] = time.perf_counter() - began
    told["peak"] = status("/proc/self/status", "VmHWM") * 1024 - before
    told["disk"] = status("/proc/self/io", "read_bytes") - disk
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
