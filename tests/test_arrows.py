"""Imports go one way, as docs/architecture.md draws them; what could execute a checkpoint is not imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from os.path import commonpath
from pathlib import Path

import fastckpt
import pytest

ROOT = Path(next(iter(fastckpt.__path__)))

CORE = (
    "errors",
    "dtypes",
    "paths",
    "extents",
    "views",
    "stored",
    "checkpoint",
    "plainjson",
    "placement",
    "target",
)
MODEL = ("roles", "mixers", "model")
PLAIN = (*CORE, *MODEL)
TABLE = ("copies", "axes", "compiling", "binding", "batches")
FILES = (
    "syscalls",
    "signals",
    "files",
    "pickling",
    "torchzip",
    "manifest",
    "filesystem",
    "whole",
    "part",
    "writer",
)

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "native": ("errors", "__init__", "_C"),  # the compiled module, where there is one
    "collector": (),
    "dtypes": CORE[:1],
    "paths": CORE[:1],
    "extents": CORE[:3],
    "views": CORE[:4],
    "stored": CORE[:5],
    "checkpoint": (*CORE[:5], "placement"),
    "plainjson": (*CORE[:5], "checkpoint"),
    "placement": CORE[:5],
    "schemes": CORE[:2],
    "target": (*CORE[:5], "schemes"),
    "roles": CORE,
    "mixers": (*CORE, "roles"),
    "model": (*CORE, "roles", "mixers"),
    # Sources never see models; recipes and layouts never see files; none of them sees a plan.
    "sources": (*CORE, "collector", "digest", "manifest", "pipeline"),
    "recipes": (*PLAIN, "schemes"),
    "layouts": (*PLAIN, "finishes"),
    "nowhere": CORE,
    "lowrank": (*CORE, "native", "nowhere"),
    "finishes": (*CORE, "nowhere"),
    # The table: rows of copies, bound and cut.
    "copies": CORE,
    "axes": (*CORE, "copies"),
    "compiling": (*CORE, "copies", "axes"),
    "binding": (*CORE, "copies"),
    "batches": (*CORE, "digest", "copies", "axes", "binding"),
    "unrounding": (*CORE, "native"),
    "rounding": (*CORE, "schemes", "unrounding", "native"),
    "quantised_targets": (*PLAIN, "schemes", "rounding"),
    "quantised_config": (*CORE, "schemes"),
    "digest": (*CORE, "native"),
    "finite": (*CORE, "digest", "native"),
    # What reads and runs a plan.
    "reader": (*CORE, "digest", *TABLE, "_C"),
    "executors": (*CORE, *TABLE, "native"),
    "dequantised": (*CORE, "nowhere", "finishes", "rounding", "unrounding", "schemes"),
    "quantised_sources": (*CORE, "nowhere", "dequantised", "rounding", "unrounding", "schemes"),
    "prequantised": (*CORE, "nowhere", "quantised_config", "rounding", "schemes"),
    "computing": (
        *CORE,
        "digest",
        "limits",
        *TABLE,
        "nowhere",
        "lowrank",
        "finishes",
        "dequantised",
        "prequantised",
        "rounding",
        "reader",
    ),
    # What makes output real.
    "syscalls": CORE,
    "signals": (),
    "files": CORE,
    "pickling": (*CORE, "files"),
    "torchzip": (*CORE, "digest", "files", "pickling"),
    "manifest": (*CORE, "digest", "files"),
    "filesystem": CORE,
    "whole": (*CORE, "digest", "syscalls", "manifest", "filesystem"),
    "part": (*CORE, "manifest", "filesystem"),
    "writer": (*CORE, "digest", *FILES[:-1]),
    "rereading": (*CORE, "digest", "finite", "pipeline"),
    "outputs": (*CORE, "digest", "rereading", *FILES, "expectation", "sources"),
    # The way back, through sources, recipes and layouts.
    "inverse": CORE,
    "uniting": (*PLAIN, "digest", "inverse", "layouts"),
    "megatron": (*PLAIN, "uniting", "sources", "recipes", "layouts", "configs"),
    "recorded": (*PLAIN, "collector", "digest", "manifest", "uniting", "recipes", "layouts"),
    "opening": (*CORE, "collector", "sources", "configs", "recorded", "megatron"),
    "expectation": (*PLAIN, "manifest", "sources", "layouts", "recorded"),
    "foreign": (*PLAIN, "sources", "recipes", "layouts", "uniting", "opening"),
    "adapter_settings": (*CORE, "sources"),
    "adapter_pairs": (*CORE, "adapter_settings"),
    "adapters": (*PLAIN, "digest", "nowhere", "lowrank", "sources", "adapter_settings", "adapter_pairs"),
    "adapter_shards": (*PLAIN, "nowhere", "finishes", "adapters"),
    # The spine.
    "planned": (*CORE, "copies", "batches", "files"),
    "plancache": (*CORE, "digest", "copies", "planned", "schemes", "quantised_targets"),
    "request": (*CORE, "layouts", "schemes"),
    "configs": (*CORE, "request"),
    "resolving": (
        *PLAIN,
        "digest",
        "adapters",
        "adapter_shards",
        "quantised_sources",
        "recipes",
        "layouts",
        "schemes",
        "quantised_targets",
        "quantised_config",
        "prequantised",
        "configs",
        "request",
    ),
    "plans": (
        *PLAIN,
        *TABLE,
        "collector",
        "digest",
        "quantised_sources",
        "nowhere",
        "layouts",
        "resolving",
        "configs",
        "request",
        "planned",
        "plancache",
        "quantised_targets",
        "quantised_config",
        "prequantised",
        "files",
        "pickling",
        "torchzip",
    ),
    "pipeline": CORE,
    "limits": (*CORE, "digest", "executors", "files", "pipeline"),
    "sinks": (*CORE, "digest", "finite", *TABLE, "pipeline", "planned", "reader", *FILES),
    "quantising": (*CORE, "digest", *TABLE, "plans", "schemes", "quantised_targets", "rounding", "reader"),
    "figures": (*CORE, *TABLE, "plans", "schemes", "quantised_targets", "prequantised", "rounding"),
    "tensors": (*CORE, "sources", *TABLE, "plans"),
    "gpu_sinks": (*CORE, "digest", *TABLE, "reader", "sinks", "executors"),
    "gpu_sources": (*CORE, "nowhere", *TABLE, "plans", "executors"),
    "quantrows": (*CORE, "schemes", "rounding"),
    "gpu_quantising": (
        *CORE,
        "executors",
        *TABLE,
        "plans",
        "quantised_targets",
        "quantising",
        "quantrows",
        "gpu_sources",
        "rounding",
        "schemes",
    ),
    "gpu_transfer": (
        *CORE,
        "digest",
        "gpu_sinks",
        "executors",
        "sinks",
        "pipeline",
        *TABLE,
        "plans",
        "reader",
    ),
}
MAY_IMPORT["runs"] = (*MAY_IMPORT, "__init__")
MAY_IMPORT["leaves"] = (*MAY_IMPORT, "__init__")
MAY_IMPORT["replicas"] = (*MAY_IMPORT, "__init__")
MAY_IMPORT["road"] = (*MAY_IMPORT, "__init__")
# The doors stand side by side; what writes their words stands before them. `__init__` holds the version.
MAY_IMPORT["text"] = CORE
MAY_IMPORT["drawing"] = ()
MAY_IMPORT["losses"] = (*CORE, "text", "drawing")
MAY_IMPORT["serving_options"] = (*CORE, "layouts", "schemes", "request")
MAY_IMPORT["run_options"] = ("serving_options",)
MAY_IMPORT["manager"] = (*MAY_IMPORT, "__init__")
MAY_IMPORT["terminal"] = (*CORE, "text", "runs")
MAY_IMPORT["manager_commands"] = (*MAY_IMPORT, "plan_description")
MAY_IMPORT["arguments"] = (*CORE, "text", "serving_options", "run_options", "manager_commands", "__init__")
SPINE = (*MAY_IMPORT, "__init__", "_C")
# An engine's plug-in mechanism opens these; nothing here imports them.
MAY_IMPORT["engines"] = (*MAY_IMPORT, "__init__")
DOORS = ("inspection", "plan_description", "difference", "doctor", "zero_to_fp32")
MAY_IMPORT |= {door: SPINE for door in DOORS}
for last in ("quant", "loaded", "demo", "cli", "__init__"):
    MAY_IMPORT[last] = (*MAY_IMPORT, "__init__", "_C")
MAY_IMPORT["__main__"] = ("cli",)
"""Each room (a module, or a package with all its modules) and the other rooms it may import."""

WITHIN: dict[str, tuple[tuple[str, ...], ...]] = {
    "sources": (
        ("options", "samples", "steps", "ranks", "patterns"),
        ("assembly",),
        ("torchfile",),
        ("plain_values", "torchtensors", "ties", "shards"),
        ("distributed", "dcp_metadata"),
        # one format each
        ("zero", "safetensors", "statedict", "dcp", "memory"),
        ("fsdp", "megatron_args", "meta"),
        ("megatron_dist",),
        ("megatron",),
        ("served", "peft", "training"),  # what fastckpt or PEFT wrote, in the two formats before them
        ("__init__",),
    ),
    "sources/torchfile": (
        ("inert", "zipentries"),
        ("picklemachine", "torchzip"),
        ("inertpickle", "forms"),
        ("torchpickle",),
        ("__init__",),
    ),
    "sources/zero": (
        ("partitions", "files", "autoep"),
        ("spelling", "cuts"),
        ("state",),
        ("order", "parts", "experts", "universal"),
        ("opening",),
        ("pipeline", "swapped", "entries"),
        ("grid",),
        ("__init__",),
    ),
    "recipes": (
        ("quantised", "imagining", "renaming", "known"),
        ("strangers",),
        ("claims",),
        ("fused", "meta"),
        ("mamba",),
        ("kind",),
        ("attention", "dense", "delta"),
        (
            "latent",
            "decoder",
            "names",
            "moe",
            "gpt2",
            "neox",
            "chatglm",
            "bert",
            "t5",
            "whisper",
            "jina_bert",
        ),
        ("mixture", "towers"),
        ("clip_towers", "qwen_towers", "gemma4_towers"),
        (
            *("llama", "gemma", "phi3", "glm", "olmo", "cohere", "ungated", "gptj", "mpt", "opt"),
            *("mixtral", "deepseek", "ernie", "granite_moe", "llama4", "gpt_oss", "cogvlm2"),
            *("laguna", "lfm2", "deepseek_v4", "kimi_linear", "jamba"),
            *("modernbert", "minicpm3", "projectors"),
        ),
        ("qwen_moe", "hybrids", "mimo", "olmo_hybrid", "gemma4"),
        ("qwen_next",),
        ("vision_language",),  # a tower before any family's decoder
        ("__init__",),
    ),
    "layouts": (
        ("naming", "requirements", "hub_form", "cuts", "servers", "padding", "engines"),
        ("mixer_cuts",),
        ("same", "hf", "vllm", "rtp_llm", "megatron", "patterns"),
        ("__init__",),
    ),
    "layouts/vllm": (("families",), ("attention",), ("__init__",)),
    "layouts/rtp_llm": (
        ("merge", "split", "weights"),  # rtp-llm's catalogue, of which its layout is made
        ("matrices",),
        ("roles", "rope"),
        ("lora",),
        ("__init__",),
    ),
    "manager": (
        ("__init__", "coordination", "state_tree", "pieces", "commits", "metadata", "job", "uploaders"),
        ("policies", "saving", "remote", "standing", "reporting", "template_check", "sigterm"),
        ("opened", "retention", "background"),
        ("loading", "publishing"),
        ("resuming",),
        ("manager",),
        ("runner",),
    ),
    "engines": (("__init__", "asked"), ("vllm_loader", "sglang"), ("vllm",)),
    "executors": (("torch", "cpu", "tiles"), ("cuda",), ("__init__",)),
}
"""Cells within a package: a module imports siblings from cells before its own only. Of a package within one,
only `__init__` is imported from outside."""

TORCH = {
    "executors/torch",
    "executors/cuda",
    "running/tensors",
    "running/gpu_sinks",
    "running/gpu_sources",
    "running/gpu_transfer",
    "running/gpu_quantising",
    "verification/loaded",
}
TORCH |= {"engines/vllm_loader", "engines/sglang"}
TORCH |= {
    f"manager/{m}"
    for m in [
        "coordination",
        "template_check",
        "state_tree",
        "pieces",
        "saving",
        "standing",
        "opened",
        "retention",
        "loading",
        "publishing",
        "resuming",
        "manager",
        "runner",
    ]
}
TORCH_IN_FUNCTIONS = {"sources/memory", "running/runs", "road", "quant", "zero_to_fp32", "doors/demo"}
"""Where torch may be imported. The first are themselves imported inside functions only."""

FLOORS = ("planning", "computed", "quantisation", "output", "running", "joining", "verification", "doors")
"""Packages that only hold together rooms of one kind; each module there is a room with arrows of its own."""

VAGUE = {"utils", "util", "common", "helpers", "base", "misc"}
MAKES = {f"torch.{f}" for f in ("empty", "zeros", "ones", "full", "tensor", "arange", "randn")}
EXECUTES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code"}

MODULES = sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.rglob("*.py"))


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text())


def room(module: str) -> str:
    """The room a module is in: a package, or itself where it stands alone or on a floor."""
    first, _, rest = module.partition("/")
    return rest if first in FLOORS and rest != "__init__" else first


def cell(package: str, module: str) -> int:
    """Which cell of a package a module in it stands in, alone or within an inner package."""
    name = module.removeprefix(f"{package}/").split("/")[0]
    found = [k for k, names in enumerate(WITHIN[package]) if name in names]
    assert found, f"{module} stands in no cell of {package}"
    return found[0]


@cache
def imports(module: str) -> tuple[tuple[str, bool], ...]:
    return tuple(find_imports(module))


def find_imports(module: str) -> Iterator[tuple[str, bool]]:
    """(what is imported: a module of ours as "./path", or a dotted name; whether on import of the module)."""
    tree = parsed(module)
    later = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    typing_only = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING"
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        at_once = id(node) not in later and id(node) not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                own = alias.name.split(".")[0] == "fastckpt"
                yield ("./" + "/".join(alias.name.split(".")[1:]) if own else alias.name), at_once
        elif isinstance(node, ast.ImportFrom):
            place = node.module.split(".") if node.module else []
            if node.level:
                place = [*module.split("/")[: -node.level], *place]
            elif place[0] == "fastckpt":
                place = place[1:]
            else:
                yield node.module or "", at_once
                continue
            for alias in node.names:
                yield "./" + resolve(place, alias.name), at_once


def resolve(place: list[str], name: str) -> str:
    """The module that `from place import name` reaches."""
    for path in ([*place, name], place):
        for candidate in ("/".join(path), "/".join([*path, "__init__"])):
            if candidate in MODULES or candidate == "_C":
                return candidate
    return "/".join([*place, name])


def test_every_module_has_its_place() -> None:
    for module in MODULES:
        assert room(module) in (*MAY_IMPORT, *FLOORS), f"{module} stands in no cell; draw its arrows first"
        if "/" in module and module.split("/")[0] not in FLOORS:
            cell(module.rpartition("/")[0], module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    for imported, _ in imports(module):
        if not imported.startswith("./"):
            continue
        other = imported.removeprefix("./")
        if room(other) != room(module):
            assert room(other) in MAY_IMPORT[room(module)], f"{module} imports {other}"
        elif other != module:
            package = commonpath([module, other])
            assert cell(package, other) < cell(package, module), f"{module} imports its sibling {other}"
        inner, _, name = other.rpartition("/")
        if "/" in inner and not module.startswith(f"{inner}/"):
            assert name == "__init__", f"{module} imports {other}, which is not the door of {inner}"


def test_packages_import_one_way() -> None:
    """No two packages import each other, whatever their modules may."""
    pairs = {
        (module.split("/")[0], imported.split("/")[1])
        for module in MODULES
        for imported, _ in imports(module)
        if "/" in module and imported.startswith("./") and imported.count("/") >= 2
    }
    assert not {(a, b) for a, b in pairs if a < b and (b, a) in pairs}


@pytest.mark.parametrize("module", MODULES)
def test_torch_stays_where_tensors_live(module: str) -> None:
    for imported, at_once in imports(module):
        if imported.split(".")[0] == "torch":
            assert module in TORCH | TORCH_IN_FUNCTIONS, f"{module} imports torch"
            assert module in TORCH or not at_once, f"{module} imports torch when it is imported itself"
        if imported.removeprefix("./") in TORCH:
            assert not at_once or module in TORCH, f"{module} brings torch in through {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_executes_a_checkpoint(module: str) -> None:
    for imported, _ in imports(module):
        assert imported.split(".")[0] not in EXECUTES, f"{module} imports {imported}"
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "__import__", "torch.load"}, f"{module}: {called}"
            assert not any(k.arg == "allow_pickle" for k in node.keywords), f"{module}: {called} with pickles"


@pytest.mark.parametrize("module", sorted(TORCH | TORCH_IN_FUNCTIONS))
def test_tensors_are_made_where_the_call_says(module: str) -> None:
    """Not on torch's default device, which is the caller's: servers load within `torch.device("cuda")`."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in MAKES:
            assert any(k.arg == "device" for k in node.keywords), f"{module}: {ast.unparse(node)}"


def test_names_say_something() -> None:
    for module in MODULES:
        assert VAGUE.isdisjoint(module.split("/")), module
