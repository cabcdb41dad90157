"""What the documents say of the tree: their links and paths exist, and the journey they print can be made."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import layouts
from fastckpt.cli import main
from fastckpt.doors.arguments import parser
from fastckpt.doors.demo import Llama
from fastckpt.errors import FastckptError
from fastckpt.layouts.patterns import STYLES
from fastckpt.placement import Placement

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/**/*.md")]
PATH = re.compile(r"`((?:python|csrc|tests|docs|benchmarks|examples)/[\w./-]+\.\w+)`")
NEW = ("x", "test_x", "isa_x")
"""The files that adding.md tells to make."""
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")


def sections(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    missing = []
    for link, section in LINK.findall(text):
        target = page.parent / link if link else page
        if not target.exists() or (section and section not in sections(target)):
            missing.append(f"{link}#{section}")
    missing += [
        path for path in PATH.findall(text) if not (ROOT / path).exists() and Path(path).stem not in NEW
    ]
    assert not missing


def test_the_journey_of_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (ROOT / "docs/architecture.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "demo").mkdir()
    Llama.of(1_000_000).write(str(tmp_path / "demo/checkpoint"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "journey.py").write_text(code)
    runpy.run_path("journey.py")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "(128, 128)"  # hop 1
    assert sum(line.startswith((" [", "[[")) for line in lines) == 7  # hop 2: fragments
    assert "model.layers.0.self_attn.qkv_proj.weight (64, 128)" in lines  # hop 4
    assert "offset=" in lines[-1]  # hop 5


def test_the_readme_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Llama.of(1_000_000)
    demo.write(str(tmp_path / "checkpoint-12"))
    monkeypatch.chdir(tmp_path)
    python, commands = (ROOT / "README.md").read_text().split("```")[1:4:2]
    model = torch.nn.Module()
    for name, shape in demo.shapes().items():
        *path, leaf = name.split(".")
        place = model
        for step in path:
            if not hasattr(place, step):
                place.add_module(step, torch.nn.Module())
            place = place.get_submodule(step)
        place.register_parameter(leaf, torch.nn.Parameter(torch.full(shape, torch.nan)))
    exec(python.removeprefix("python"), {"model": model})
    assert not any(p.isnan().any() for p in model.parameters())
    for made in ("served", "whole"):
        (tmp_path / made).rename(tmp_path / f"{made}-by-python")
    for line in commands.strip().splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    for layout in layouts.LAYOUTS.keys() - {"same"}:  # the same with any other layout
        assert fastckpt.plan("checkpoint-12", 8, layout=layout).ranks == (*range(8),)


def test_the_layouts_example_gives_what_the_option_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/layouts.md").read_text()
    code, option = re.findall(r"```python\n(fastckpt\.reshard.*)  # (-L .*)\n```", page)[0]
    Llama.of(1_000_000).write(str(tmp_path / "checkpoint-12"))
    monkeypatch.chdir(tmp_path)
    exec(code, {"fastckpt": fastckpt})
    assert main(["reshard", "checkpoint-12", "wanted", "--tp", "8", "--layout", "vllm", *option.split()]) == 0
    assert fastckpt.diff("served", "wanted").equal
    (made, wanted) = (json.loads((tmp_path / d / "fastckpt.json").read_text()) for d in ("served", "wanted"))
    assert made["key"] == wanted["key"]


def figures(*pages: str) -> list[str]:
    """What stands between the marks of pages."""
    texts = ((ROOT / page).read_text() for page in pages)
    return [text.split("<!-- figures -->\n")[1].split("\n<!-- end of figures -->")[0] for text in texts]


def tables(*options: str) -> str:
    """What benchmarks/table.py makes of the committed results."""
    results = sorted(map(str, (ROOT / "benchmarks/results").glob("20*.json")))
    command = [sys.executable, str(ROOT / "benchmarks/table.py"), *options, *results]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_figures_are_those_of_the_results() -> None:
    """All of them: README has every row that compares with other software, the other pages every run."""
    assert figures("README.md") == [tables("--short").rstrip()]
    told = figures("benchmarks/README.md", "benchmarks/reliability/README.md")
    runs = tables().rstrip().split("\n\n")
    assert sorted("\n\n".join(told).split("\n\n")) == sorted(runs)


def test_the_table_of_errors_is_that_of_the_classes() -> None:
    rows = re.findall(r"\| `(\w+Error)` \| (\d) \|", (ROOT / "docs/formats.md").read_text())
    classes = [c for c in FastckptError.__subclasses__() if c.__module__ == FastckptError.__module__]
    assert {name: int(code) for name, code in rows} == {c.__name__: c.exit_code for c in classes}


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_option_of_a_layout_is_in_the_table(layout: str) -> None:
    """As `-L`'s help says. A row names the layout, or stands in the section that does."""
    section, told = "", set()
    for line in (ROOT / "docs/layouts.md").read_text().splitlines():
        if line.startswith("## "):
            section = line
        elif line.startswith("| ") and f"`{layout}`" in section + line:
            told |= {word for cell in line.split("|")[1:3] for word in cell.replace(",", " ").split()}
    assert {f.name for f in fields(layouts.layout(layout))} <= told


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_the_names_of_files(layout: str) -> None:
    """A row says what a layout cuts by, and what its files are called."""
    text = (ROOT / "docs/layouts.md").read_text().split("## Grids and file names")[1].split("\n## ")[0]
    row = next(line for line in text.splitlines() if line.startswith(f"| `{layout}` |"))
    axes = [axis for axis in ("tp", "pp", "dp") if re.search(rf"\b{axis}\b", row.split("|")[2])]
    for more in ((), ("pp",), ("dp",), ("pp", "dp")):
        if {"tp", *more} <= {*axes}:
            naming = layouts.layout(layout).naming(Placement(tp=2, rank=1, **dict.fromkeys(more, 2)))
            assert f"`{naming.directory or naming.single}" in row, more
    if not axes:
        assert f"`{layouts.layout(layout).naming(Placement()).single}`" in row


def test_a_model_that_no_recipe_knows(tmp_path: Path) -> None:
    """The recipe of names and the patterns cut as the family's own recipe does."""
    page = (ROOT / "docs/layouts.md").read_text()
    text = page.split("## A model that no recipe knows")[1].split("\n## ")[0]
    code, plan = re.findall(r"```(?:python|json)\n(.*?)```", text, re.DOTALL)
    mine, ckpt = tmp_path / "mine.py", tmp_path / "ckpt"
    mine.write_text(code)
    Llama.of(1_000_000).write(str(ckpt))
    for got, layout in (
        (fastckpt.reshard(ckpt, 4, layout="vllm", recipe=str(mine)), "vllm"),
        (fastckpt.reshard(ckpt, 4, tp_plan=json.loads(plan)), "hf"),
    ):
        for rank, want in enumerate(fastckpt.reshard(ckpt, 4, layout=layout)):
            assert got[rank].keys() == want.keys()
            assert all(torch.equal(got[rank][n], want[n]) for n in want)
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert {word for row in rows for word in re.findall(r"`(\w+)`", row)} == STYLES.keys()


def test_every_module_has_its_row() -> None:
    rooms = (ROOT / "docs/architecture.md").read_text().split("## Rooms")[1].split("## Arrows")[0]
    package = ROOT / "python/fastckpt"
    alike = {"sources", "recipes", "layouts", "engines"}  # one row for modules of one kind
    modules = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in alike]
    modules += (ROOT / "csrc").iterdir()
    named = set(re.findall(r"`(\w+)`", rooms))
    assert {p.stem for p in modules if not p.stem.startswith("__")} <= named


def test_the_manager_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"\n\n((?:    .*\n+)+)", (ROOT / "docs/manager.md").read_text())
    saves, managers = [textwrap.dedent(b) for b in blocks if b.startswith("    from fastckpt")]
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loss": 0.5, "root": "runs/more"}
    for steps in ("range(2)", "range(2, 4)"):
        exec(saves.replace("in ...", f"in {steps}"), dict(given))
    with fastckpt.CheckpointManager("runs/ck") as manager:
        assert manager.steps() == [1, 2, 3]
    imports, *lines = managers.strip().splitlines()
    for line in filter(None, lines):
        exec(f"{imports}\n{line}.close()", given | {"CheckpointManager": fastckpt.CheckpointManager})


def test_the_renames_of_olmo_core() -> None:
    """Its names become a Llama's, and with the other two norms an OLMo 2's."""
    text = (ROOT / "docs/formats.md").read_text().split("**OLMo-core**")[1].split("\n- ")[0]
    words = [word for found in re.findall(r"--rename\s+'([^']+)'", text) for word in ("--rename", found)]
    *common, norm, mlp_norm, olmo_norm, olmo_mlp_norm = parser().parse_args(["inspect", "x", *words]).rename
    leaves = ("attention.w_q", "attention.w_out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    names = ["embeddings", "lm_head.norm", "lm_head.w_out"]
    names += [f"blocks.0.{leaf}" for leaf in (*leaves, "attention_norm", "feed_forward_norm")]
    state = {f"{name}.weight": torch.ones(1) for name in names}
    outside = {"model.embed_tokens", "model.norm", "lm_head"}
    inside = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"}
    for two, norms in (
        ((norm, mlp_norm), {"input_layernorm", "post_attention_layernorm"}),
        ((olmo_norm, olmo_mlp_norm), {"post_attention_layernorm", "post_feedforward_layernorm"}),
    ):
        wanted = outside | {f"model.layers.0.{leaf}" for leaf in inside | norms}
        assert fastckpt.open(state, rename=[*common, *two]).entries.keys() == {f"{n}.weight" for n in wanted}
