"""What a checkpoint of make_zero must convert to, read back from beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Truth:
    """The gathered truth of one checkpoint: `master` is None where make_zero says so."""

    path: Path
    stage: int
    exclude_frozen: bool
    shared: dict[str, str]
    frozen: frozenset[str]
    module: Tensors
    master: Tensors | None

    def mismatches(self, got: Tensors) -> list[str]:
        """Where a consolidated fp32 state dict, tied names left out, differs from the truth."""
        gone = self.frozen if self.exclude_frozen else frozenset()
        module = {k: v for k, v in self.module.items() if k not in gone}
        out = [f"missing {k}" for k in module.keys() - got.keys()]
        out += [f"not in the model: {k}" for k in got.keys() - module.keys()]
        for name in module.keys() & got.keys():
            tensor, trained = got[name], module[name]
            wanted = torch.float32 if trained.is_floating_point() else trained.dtype
            if tensor.dtype != wanted:
                out.append(f"{name}: {tensor.dtype}, wanted {wanted}")
            elif tensor.shape != trained.shape:
                out.append(f"{name}: {tuple(tensor.shape)}, wanted {tuple(trained.shape)}")
            elif self.master is not None and not same_bits(tensor, self.master[name]):
                out.append(f"{name}: differs from the gathered master")
            elif self.stage == 0 and not same_bits(tensor, trained.to(wanted)):
                out.append(f"{name}: differs from the module")
            elif name not in gone and not same_bits(tensor.to(trained.dtype), trained):
                out.append(f"{name}: rounds to other values than the module's")
        return sorted(out)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def read_truth(path: Path) -> Truth:
    """The truth that make_zero wrote beside a checkpoint."""
    facts = json.loads((path / "truth.json").read_text())
    master = path / "master.safetensors"
    return Truth(
        path,
        facts["run"]["stage"],
        facts["run"]["exclude_frozen"],
        facts["shared"],
        frozenset(facts["frozen"]),
        load_file(path / "module.safetensors"),
        load_file(master) if master.exists() else None,
    )
