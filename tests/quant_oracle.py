"""Every scheme in plain torch, one matrix at a time: [rows, columns] of fp32 -> (values, scales)."""

from __future__ import annotations

import torch

BLOCKS = {
    "int8": (1, 0), "fp8": (0, 0), "fp8-channel": (1, 0), "fp8-block": (128, 128), "int4-group32": (1, 32),
    "int4-group64": (1, 64), "int4-group": (1, 128), "int8-dynamic": (0, 0), "int8-dynamic-channel": (1, 0),
}  # fmt: skip


def quantised(x, name):
    """Values as int8, float8_e4m3fn, or int32 of eight nibbles; scales [blocks down, blocks across]."""
    x = x.float()
    rows, columns = x.shape
    down, across = BLOCKS[name]
    down, across = down or rows, across or columns
    reach = torch.tensor({"int4": 7.5, "int8": 127.5, "fp8": 448.0, "fp8-": 448.0}[name[:4]])
    padded = torch.nn.functional.pad(x, (0, -columns % across, 0, -rows % down))
    boxes = padded.reshape(padded.shape[0] // down, down, padded.shape[1] // across, across)
    scales = boxes.abs().amax((1, 3)) / reach
    if "dynamic" in name:
        scales = torch.maximum(scales, torch.tensor(torch.finfo(torch.float32).eps))
    scales[scales == 0] = 1.0
    each = scales.repeat_interleave(down, 0).repeat_interleave(across, 1)[:rows, :columns]
    out = x * (torch.tensor(1.0) / each) if "dynamic" in name else x / each
    if name.startswith("fp8"):
        out = torch.clamp(out, -448.0, 448.0)
    else:
        high = 7 if name.startswith("int4") else 127
        out = torch.clamp(torch.round(out), -high - 1, high)
    if name.startswith("fp8"):
        return out.to(torch.float8_e4m3fn), scales
    if name.startswith("int4"):
        packed = torch.zeros(rows, columns // 8, dtype=torch.int64)
        for k in range(8):
            packed |= (out[:, k::8].to(torch.int64) + 8) << (4 * k)
        return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32), scales
    return out.to(torch.int8), scales
