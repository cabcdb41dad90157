"""Every scheme in plain torch, one matrix at a time: [rows, columns] of fp32 -> (values, scales)."""

from __future__ import annotations

import torch

BLOCKS = {
    "int8": (1, 0), "fp8": (0, 0), "fp8-channel": (1, 0), "fp8-block": (128, 128), "int4-group32": (1, 32),
    "int4-group64": (1, 64), "int4-group": (1, 128), "int8-dynamic": (0, 0), "int8-dynamic-channel": (1, 0),
    "mxfp4": (1, 32), "mxfp8": (1, 32),
}  # fmt: skip


def quantised(x, name):
    """Values as int8, float8_e4m3fn, int32 of eight nibbles, or bytes of two e2m1; scales [blocks down,
    blocks across]."""
    if name.startswith("mx"):
        return microscaled(x, name)
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


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the codes of e2m1 mean."""


def pairs(packed):
    """The values of bytes of two e2m1 [rows, columns / 2], in fp32."""
    return E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


def microscaled(x, name):
    """Groups of 32 over a power of two: the one below their largest magnitude, or the next from 1.75 on, at
    least 2^-127; over that of the largest number of the format."""
    boxes = x.double().reshape(len(x), -1, 32)
    largest = boxes.abs().amax(2)
    power = torch.floor(torch.log2(largest.clamp(min=2.0**-300)))
    power += (largest >= 1.75 * torch.exp2(power)).double()
    scales = torch.exp2((power - (2 if name == "mxfp4" else 8)).clamp(min=-127))
    scaled = (boxes / scales[..., None]).reshape(x.shape)
    if name == "mxfp8":
        return scaled.float().clamp(-448, 448).to(torch.float8_e4m3fn), scales.float()
    # Between two codes the nearer one is taken, halfway the even one.
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    size = scaled.abs().contiguous()
    below, above = torch.bucketize(size, halfway), torch.bucketize(size, halfway, right=True)
    codes = torch.where(below % 2 == 0, below, above) | scaled.signbit().long() << 3
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), scales.float()


GROUPS = {
    f"{kind}-group{end}{zero}": (kind, n, bool(zero) or kind == "awq")
    for kind, zeros in (("int4", ("-zero",)), ("awq", ("",)), ("gptq", ("", "-zero")))
    for zero in zeros
    for end, n in (("32", 32), ("64", 64), ("", 128))
}
"""scheme -> (format, inputs that share a scale, whether there are zero points)."""


def grouped(x, name):
    """Values 0..15 [outputs, inputs], scales and zero points 0..15 [outputs, groups]."""
    kind, n, zeros = GROUPS[name]
    x = x.float()
    boxes = x.reshape(x.shape[0], -1, n)
    low, high = boxes.amin(2).clamp(max=0), boxes.amax(2).clamp(min=0)
    scales = (high - low) / 15 if zeros else boxes.abs().amax(2) / torch.tensor(7.5)
    if kind != "int4":
        scales = scales.half().clamp(min=2.0**-24).float()
    scales[scales == 0] = 1.0
    least = -7 if kind == "gptq" else -8
    points = torch.round((-8 - low / scales).clamp(least, 7)) if zeros else torch.zeros_like(scales)
    scaled = boxes / scales[..., None]
    if zeros:
        scaled = scaled + points[..., None]
    values = torch.round(scaled.clamp(-8, 7)).reshape(x.shape)
    return values.long() + 8, scales, points.long() + 8


def nibbles(words):
    """The eight values of every int32, the lowest first, on a new last axis."""
    return torch.stack([(words.long() >> (4 * k)) & 15 for k in range(8)], -1)


def read_back(state, stem, kind):
    """(values 0..15 [outputs, inputs], scales, zero points 0..15 [outputs, groups]) as loaders read them."""
    if kind == "int4":
        rows, columns = state[f"{stem}weight_shape"].tolist()
        values = nibbles(state[f"{stem}weight_packed"]).reshape(rows, columns)
        zeros = nibbles(state[f"{stem}weight_zero_point"]).permute(0, 2, 1)
        zeros = zeros.reshape(-1, zeros.shape[2])
        assert not zeros[rows:].any()
        return values, state[f"{stem}weight_scale"], zeros[:rows]
    words, zeros, scales = (state[stem + n] for n in ("qweight", "qzeros", "scales"))
    assert words.dtype == zeros.dtype == torch.int32 and scales.dtype == torch.float16
    if kind == "awq":
        order = [0, 4, 1, 5, 2, 6, 3, 7]  # AutoAWQ's AWQ_REVERSE_ORDER
        values = nibbles(words)[..., order].flatten(1)
        return values.T, scales.float().T, nibbles(zeros)[..., order].flatten(1).T
    values = nibbles(words).permute(0, 2, 1).flatten(0, 1)
    group = state[f"{stem}g_idx"]
    n = values.shape[0] // scales.shape[0]
    assert group.dtype == torch.int32 and group.tolist() == [i // n for i in range(values.shape[0])]
    return values.T, scales.float().T, (nibbles(zeros).flatten(1).T + 1) % 16


def matrices(rows, columns, dtype):
    """Normal values; spread over all magnitudes; ties and saturation; zeros in part and whole."""
    torch.manual_seed(rows * 1000 + columns)
    plain = torch.randn(rows, columns)
    yield plain.to(dtype)
    yield (plain * torch.exp2(torch.randint(-40, 12, plain.shape).float())).to(dtype)
    yield (torch.randint(-15, 16, plain.shape) / 2).to(dtype)
    holes = plain.clone()
    holes[:, : columns // 2] = 0
    holes[rows // 2 :] = 0
    yield (holes * -0.0).to(dtype)
    yield holes.to(dtype)
    yield (plain * 2.0**-130).to(dtype)
