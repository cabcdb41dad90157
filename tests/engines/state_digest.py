"""A state dict in short: what each tensor is, and one digest of all their bytes."""

from __future__ import annotations

import hashlib

import torch


def kinds(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """name -> "dtype rows x columns"."""
    return {
        name: f"{str(t.dtype).removeprefix('torch.')} {'x'.join(map(str, t.shape))}".strip()
        for name, t in sorted(state.items())
    }


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits over names, kinds and bytes, in the order of names."""
    digest = hashlib.sha256()
    told = kinds(state)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {told[name]}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
