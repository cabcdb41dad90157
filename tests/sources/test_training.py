"""A training commit as a checkpoint: the model in it, whole, for the road; and commits that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastckpt
import pytest
import torch
from fastckpt.digest import digest
from fastckpt.errors import SourceError
from fastckpt.manager.manager import CheckpointManager
from outputs import changed
from safetensors.torch import load_file, save_file


def model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Embedding(3, 7), torch.nn.Linear(7, 3))
    made[2].bias = torch.nn.Parameter(torch.zeros(3))
    return made


def committed(root: Path, state: Callable[[int], dict[str, Any]], world: int = 1) -> Path:
    """One commit of `world` ranks."""

    def one(rank: int) -> None:
        with CheckpointManager(root, rank=rank, world=world, timeout=120) as manager:
            manager.save(3, state(rank))

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(one, range(world)))
    return root / "step-00000003"


@pytest.mark.parametrize("world", [1, 3])
def test_the_only_module(tmp_path: Path, world: int) -> None:
    net = model(1)
    optimizer = torch.optim.AdamW(net.parameters())
    step = committed(
        tmp_path, lambda r: {"net": net, "optimizer": optimizer, "rank": torch.tensor([r]), "n": r}, world
    )
    found = fastckpt.open(step)
    want = net.state_dict()
    assert found.format == "training" and set(found) == set(want) and found.saved.step == 3
    assert found.unread == (f"{len(load_names(step)) - len(want)} tensors that are not the model's "
                            "(optimizer and the like)",)  # fmt: skip
    fastckpt.reshard(step, layout="same", out=tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    assert set(got) == set(want) and all(torch.equal(got[n], t) for n, t in want.items())
    assert "net" not in str(fastckpt.inspect(step).tensors)
    assert fastckpt.diff(step, tmp_path / "out").equal


def load_names(step: Path) -> list[str]:
    with CheckpointManager(step.parent, rank=0, world=1) as manager:
        return manager.open(3, 0).names


def test_several_modules_and_none(tmp_path: Path) -> None:
    two = fastckpt.open(committed(tmp_path / "two", lambda r: {"a": model(1), "b": model(2)}))
    assert {n.split(".")[0] for n in two} == {"a", "b"}
    shared = torch.ones(4)
    state = {"x": {"w": shared, "v": shared}}
    plain = fastckpt.open(committed(tmp_path / "plain", lambda r: {**state, "own": torch.ones(2) * r}, 2))
    assert set(plain) == {"x.w"} and dict(plain.aliases) == {"x.v": "x.w"}
    assert plain.unread == ("own: each rank has its own",)


def test_what_is_refused(tmp_path: Path) -> None:
    step = committed(tmp_path / "ck", lambda r: {"net": model(1)})
    with pytest.raises(SourceError, match="this is no ZeRO checkpoint"):
        fastckpt.open(step, weights="module")
    for name, said in (
        ("tensors.json", "differ from the commit's digest"),
        ("rank-00000/state.json", "differ from the commit's digest"),
        ("fastckpt.json", "does not have its own digest"),
    ):
        sound = (step / name).read_bytes()
        at = sound.index(b"0") if name != "fastckpt.json" else sound.index(b"training")
        (step / name).write_bytes(sound[:at] + b"1" + sound[at + 1 :])
        with pytest.raises(SourceError, match=said):
            fastckpt.open(step)
        (step / name).write_bytes(sound)
    told = (step / "rank-00000/state.json").read_bytes()
    (step / "rank-00000/state.json").unlink()
    os.mkfifo(step / "rank-00000/state.json")  # opening it would wait for a writer
    with pytest.raises(SourceError, match=r"state\.json: not a regular file"):
        fastckpt.open(step)
    (step / "rank-00000/state.json").unlink()
    (step / "rank-00000/state.json").write_bytes(told)
    file = step / "rank-00000/state.safetensors"
    kept = {n: t.clone() for n, t in load_file(file).items()}
    save_file(kept, file, {"saved": "again" * 9})  # its data begin elsewhere than they did
    with pytest.raises(SourceError, match=r"state\.safetensors: net\..* at byte \d+, fastckpt\.json says"):
        fastckpt.open(step)
    save_file({n: t for n, t in kept.items() if n != NAMED}, file)
    with pytest.raises(SourceError, match=f"{NAMED} is in fastckpt.json and not in rank-00000"):
        fastckpt.open(step)
    file.unlink()
    with pytest.raises(SourceError, match=r"state\.safetensors"):
        fastckpt.open(step)
    own = committed(tmp_path / "own", lambda r: {"net": model(r)}, 2)
    with pytest.raises(SourceError, match=r"net\.0\.weight differs from rank to rank"):
        fastckpt.open(own)
    with pytest.raises(SourceError, match="no tensor of a model"):
        fastckpt.open(committed(tmp_path / "none", lambda r: {"n": 1}))


def resigned(step: Path, name: str, change: Callable[[Any], None]) -> None:
    """Changes a file of a commit, and makes its record and digests true of it again."""
    if name == "fastckpt.json":
        changed(step, change)
        return
    body = json.loads((step / name).read_text())
    change(body)
    (step / name).write_text(json.dumps(body))
    said = {"digest": digest((step / name).read_bytes())}
    changed(step, lambda r: ({**r["files"], **r["ranks"][0]["files"]})[name].update(said))


NAMED = "net.0.weight"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("tensors.json", lambda t: t[NAMED].pop("dtype"), "is no entry of tensors.json"),
        ("tensors.json", lambda t: t[NAMED].update(dtype="float33"), "is no entry of tensors.json"),
        ("tensors.json", lambda t: t[NAMED].update(shape=[9, 5]), "its boxes have 35 elements"),
        ("tensors.json", lambda t: t[NAMED].update(shape=[35]), "a box of other axes"),
        ("tensors.json", lambda t: t[NAMED].update(boxes=[]), "its boxes have 0 elements"),
        ("tensors.json", lambda t: t[NAMED].update(boxes=[[0, [0, 0]]]), "is no box of tensors.json"),
        ("tensors.json", lambda t: t[NAMED]["boxes"].append(t[NAMED]["boxes"][0]), "70 elements"),
        ("tensors.json", lambda t: t[NAMED]["boxes"][0].__setitem__(0, 5), "of rank 5 is not on this disk"),
        ("fastckpt.json", lambda r: of(r).update(nbytes=8), r"shape \(7, 5\) of float32 is not 8 bytes"),
        ("fastckpt.json", lambda r: of(r).update(shape=[5, 7]), r"holds float32\[5, 7\], tensors.json says"),
        ("fastckpt.json", lambda r: of(r).update(offset="0"), "offset: wanted int, got str"),
        ("fastckpt.json", lambda r: of(r).update(offset=-8), "-8 is no size"),
        ("fastckpt.json", lambda r: of(r).update(file="rank-0/../../x"), "do not lie in a file of the rank"),
        ("fastckpt.json", lambda r: of(r).update(file="elsewhere"), "do not lie in a file of the rank"),
        ("fastckpt.json", lambda r: elsewhere(r), "lies in elsewhere, which is no rank's file"),
        ("fastckpt.json", lambda r: r.update(world=2), "is no whole training commit"),
        ("fastckpt.json", lambda r: r.update(world=0, ranks=[]), "is no whole training commit"),
        ("fastckpt.json", lambda r: r.update(ranks=[3]), "a rank is a JSON object"),
        ("fastckpt.json", lambda r: r.update(source=None), "source: wanted dict, got NoneType"),
    ],
)
def test_records_that_are_signed_and_wrong(
    tmp_path: Path, name: str, change: Callable[[Any], None], said: str
) -> None:
    step = committed(tmp_path, lambda r: {"net": model(1)})
    resigned(step, name, lambda body: None)
    assert set(fastckpt.open(step)) == set(model(1).state_dict())
    resigned(step, name, change)
    with pytest.raises(SourceError, match=said):
        fastckpt.open(step)


def test_a_tied_name_with_a_tensor_of_its_own(tmp_path: Path) -> None:
    step = committed(tmp_path, lambda r: {"net": model(1)})
    change = {"aliases": {NAMED: "net.0.bias"}}
    resigned(step, "rank-00000/state.json", lambda state: state.update(change))
    with pytest.raises(SourceError, match=f"{NAMED} is a tensor of its own and is tied to net.0.bias"):
        fastckpt.open(step)


def test_several_engines(tmp_path: Path) -> None:
    step = committed(tmp_path, lambda r: {"net": model(1)})
    tree = {"dict": [[name, {"engine": name}] for name in ("actor", "critic")]}
    resigned(step, "rank-00000/state.json", lambda state: state.update(tree=tree))
    with pytest.raises(SourceError, match="2 engines; open the directory of one of them"):
        fastckpt.open(step)


def test_ranks_states_that_are_not_theirs(tmp_path: Path) -> None:
    step = committed(tmp_path, lambda r: {"net": model(1)})
    name = "rank-00000/state.json"
    resigned(step, name, lambda state: state.update(rank=1))
    with pytest.raises(SourceError, match=r"state of rank 0: schema .*, rank 1; wanted schema"):
        fastckpt.open(step)
    changed(step, lambda r: r["ranks"][0]["files"].pop(name))
    with pytest.raises(SourceError, match=f"no {name} in the commit; it holds"):
        fastckpt.open(step)


def elsewhere(record: dict[str, Any]) -> None:
    """A rank's file under a name that tells of no rank."""
    rank = record["ranks"][0]
    rank["files"]["elsewhere"] = rank["files"].pop(of(record)["file"])
    for tensor in rank["tensors"].values():
        tensor["file"] = "elsewhere"


def of(record: dict[str, Any]) -> dict[str, Any]:
    """Where the record says that a tensor lies."""
    found: dict[str, Any] = record["ranks"][0]["tensors"][NAMED]
    return found
