"""Importing is cheap, names come when they are used, and a run over files needs no torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt.layouts import LAYOUTS
from zero_writer import write_zero

PACKAGE = Path(next(iter(fastckpt.__path__)))


def in_a_process(code: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_brings_nothing_in():
    loaded = in_a_process("import sys, fastckpt; print(*sys.modules, sep='\\n')").split()
    assert "fastckpt" in loaded
    assert not [m for m in loaded if m.startswith(("fastckpt.", "numpy", "torch", "rich", "argparse"))]


def test_importtime_sees_one_module_of_ours():
    command = [sys.executable, "-X", "importtime", "-c", "import fastckpt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert [n for n in names if n.split(".")[0] in ("fastckpt", "numpy", "torch")] == ["fastckpt"]


@pytest.mark.parametrize("name", fastckpt._HOME)
def test_every_public_name_is_there(name):
    value = getattr(fastckpt, name)
    assert value is getattr(importlib.import_module(f"fastckpt.{fastckpt._HOME[name]}"), name)
    assert name in dir(fastckpt)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name))
    imports = [n for n in block.body if isinstance(n, ast.ImportFrom)]
    seen = {a.asname: n.module for n in imports for a in n.names}
    assert seen == fastckpt._HOME


STAR = """
from fastckpt import *
import fastckpt
print(*{*globals()} - {"fastckpt"}, "/", *dir(fastckpt))
"""


def test_a_star_and_dir_give_the_public_names_alone():
    found, listed = (set(names.split()) for names in in_a_process(STAR).split("/"))
    public = {*fastckpt._HOME}
    assert {n for n in found if not n.startswith("__")} == public
    assert {n for n in listed if not n.startswith("__")} == public and "__version__" in listed


def test_every_layout_is_a_public_class():
    assert {home.rpartition(".")[2] for home in LAYOUTS.values()} <= {*fastckpt.__all__}


def test_no_module_carries_the_name_of_a_public_function():
    modules = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    functions = {n for n in fastckpt._HOME if inspect.isroutine(getattr(fastckpt, n))}
    assert {"open", "reshard", "consolidate", "plan", "verify", "diff", "inspect"} <= functions
    assert not modules & functions


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = fastckpt.unknown


def test_version_is_the_project_s():
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert re.search(r'^version = "(.*)"', project.read_text(), re.M)[1] == fastckpt.__version__


UNFIT = """
import sys
from importlib.abc import MetaPathFinder

class Unfit(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "fastckpt._C":
            raise ImportError("libstdc++.so.6: version `GLIBCXX_9' not found")

sys.meta_path.insert(0, Unfit())
from fastckpt.cli import main
sys.exit(main(["inspect", "nowhere"]))
"""


def test_a_compiled_module_that_does_not_load_is_no_reason_to_be_slow():
    done = subprocess.run([sys.executable, "-c", UNFIT], capture_output=True, text=True, timeout=300)
    told = (
        "fastckpt: error: the compiled module does not load: libstdc++.so.6: version `GLIBCXX_9' not found; "
    )
    assert done.returncode == 4 and done.stderr.startswith(told) and done.stderr.count("\n") == 1


OLD = """
import sys, types
import fastckpt
old = fastckpt._C = sys.modules["fastckpt._C"] = types.ModuleType("fastckpt._C")
old.__file__ = "there/_C.so"
if sys.argv[1]:
    old.version = sys.argv[1]
from fastckpt.cli import main
sys.exit(main(["inspect", "nowhere"]))
"""


@pytest.mark.parametrize(("version", "told"), [("0.0.9", "0.0.9"), ("", "of a version it does not tell")])
def test_a_compiled_module_of_another_version_is_refused(version, told):
    command = [sys.executable, "-c", OLD, version]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    line = (
        f"there/_C.so: was built with fastckpt {told}, this is {fastckpt.__version__}; build it again "
        "(python setup.py build_ext --inplace), or install the package again"
    )
    assert (done.returncode, done.stderr) == (4, f"fastckpt: error: {line}\n")


RUN = """
import json, sys
from fastckpt.cli import main
code = 0
for argv in json.loads(sys.argv[1]):
    code |= main(argv)
print(code, "torch" in sys.modules)
"""


def test_a_run_over_files_does_not_import_torch(tmp_path):
    pytest.importorskip("fastckpt._C", reason="the compiled module is not built: torch's executor runs")
    source, one, two = (str(tmp_path / n) for n in ("source", "one", "two"))
    write_zero(source, {"a.weight": torch.randn(7, 5), "b.bias": torch.randn(3)}, stage=3, world=2)
    commands = [
        ["inspect", source],
        ["reshard", source, one, "--layout", "same", "--dtype", "bfloat16", "--quiet"],
        ["consolidate", source, two, "--quiet"],
        ["verify", one],
        ["diff", source, two],
    ]
    assert in_a_process(RUN, json.dumps(commands)).splitlines()[-1] == "0 False"


def test_a_run_imports_the_formats_and_layouts_that_it_asks_for(tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    write_zero(source, {"a.weight": torch.randn(7, 5)}, stage=3, world=2)
    code = "import sys, fastckpt; fastckpt.reshard(sys.argv[1], layout='same', out=sys.argv[2])"
    code += "; print(*sys.modules)"
    loaded = in_a_process(code, source, out).split()
    assert {"fastckpt.sources.zero", "fastckpt.layouts.same"} <= {*loaded}
    for other in ("sources.dcp", "sources.safetensors", "layouts.rtp_llm", "computed.adapters"):
        assert f"fastckpt.{other}" not in loaded


def test_asking_for_the_version_imports_no_numpy():
    code = "import sys; from fastckpt.cli import main; main(['--version']); print('numpy' in sys.modules)"
    assert in_a_process(code).splitlines()[-1] == "False"
