"""Releases of Meta's and Mistral's: their parts are the whole, and what does not fit together is refused."""

from __future__ import annotations

import json

import fastckpt
import pytest
import torch
from fastckpt import sources
from fastckpt.errors import RecipeError, SourceError
from layouts import tiny
from meta_writer import metas, release
from reading import holds, refuses
from safetensors.torch import save_file

NAMES = ("tied", "mistral-mqa")


def made(name="tied", **changes):
    config, hub, *_ = tiny.made(name)
    tensors = metas(hub, config)
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"] + 1)
    config = config | {"tie_word_embeddings": False} | changes
    return config, tensors


@pytest.mark.parametrize(("parts", "axis"), [(1, 0), (2, 0), (2, 1), (8, 1)])
def test_parts_are_the_whole(tmp_path, parts, axis):
    config, tensors = made()
    ckpt = sources.open(release(tmp_path, tensors, config, parts, axis), check_crc=True)
    holds(ckpt, tensors)
    assert (ckpt.format, ckpt.facts["parts"]) == ("meta", parts)
    got = fastckpt.reshard(tmp_path, 2, layout="vllm", config=config)
    want = fastckpt.reshard(tensors, 2, layout="vllm", config=config)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in b)


def test_parts_that_were_swapped_are_refused(tmp_path):
    config, tensors = made()
    one, two = (release(tmp_path, tensors, config, 2) / f"consolidated.0{n}.pth" for n in (0, 1))
    one.rename(tmp_path / "other")
    two.rename(one)
    (tmp_path / "other").rename(two)
    refuses(tmp_path, "consolidated.00.pth: was saved as consolidated.01.pth: swapped")


def test_the_config_is_not_guessed(tmp_path):
    config, tensors = made()
    release(tmp_path, tensors, config, 2)
    with pytest.raises(RecipeError, match=r"no config\.json beside it"):
        fastckpt.plan(tmp_path)
    with pytest.raises(RecipeError, match="n_heads 8, the config has num_attention_heads 4"):
        fastckpt.plan(tmp_path, config=config | {"num_attention_heads": 4, "head_dim": 16})


@pytest.mark.parametrize(
    "files",
    [
        ["consolidated.safetensors"],
        ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"],
    ],
)
def test_mistrals_files(tmp_path, files):
    config, tensors = made("mistral-mqa")
    release(tmp_path, tensors, config)
    (tmp_path / "consolidated.00.pth").unlink()
    each = [
        {n: x for i, (n, x) in enumerate(tensors.items()) if i % len(files) == k} for k in range(len(files))
    ]
    for file, part in zip(files, each, strict=True):
        save_file(part, tmp_path / file)
    ckpt = sources.open(tmp_path)
    holds(ckpt, tensors)
    assert ckpt.format == "meta"
    assert ckpt.saved.args["n_heads"] == 8
    fastckpt.plan(tmp_path, config=config)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_tied_pair_that_is_held_twice(tmp_path, parts):
    config, tensors = made(tie_word_embeddings=True)
    tied = tensors | {"output.weight": tensors["tok_embeddings.weight"].clone()}
    found = fastckpt.open(release(tmp_path / "tied", tied, config, parts), config=config)
    assert found.aliases == {"output.weight": "tok_embeddings.weight"}
    with pytest.raises(RecipeError, match="two tensors"):
        fastckpt.plan(release(tmp_path / "apart", tensors, config, parts), config=config)


def test_the_hubs_files_beside_go_first(tmp_path):
    config, tensors = made("mistral-mqa")
    save_file(tiny.made("mistral-mqa")[1], release(tmp_path, tensors, config) / "model.safetensors")
    assert sources.open(tmp_path).format == "safetensors"


def change(path, edit):
    part = torch.load(path)
    edit(part)
    torch.save(part, path)


WQ = "layers.0.attention.wq.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda p: p.update({"layers.1.ffn_norm.weight": p["layers.1.ffn_norm.weight"] * 2}),
         ["layers.1.ffn_norm.weight in consolidated.00.pth and consolidated.01.pth: two values"]),
        (lambda p: p.pop(WQ), [f"{WQ} is 'absent', wanted 'float32[32, 64]'"]),
        (lambda p: p.update(more=torch.ones(2)), ["more is 'float32[2]', wanted 'absent'"]),
        (lambda p: p.update({WQ: p[WQ][:16]}), [f"{WQ} is 'float32[16, 64]', wanted 'float32[32, 64]'"]),
        (lambda p: p.update({WQ: p[WQ].bfloat16()}), [f"{WQ} is 'bfloat16[32, 64]'"]),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(tmp_path, edit, words):
    config, tensors = made()
    change(release(tmp_path, tensors, config, 2) / "consolidated.01.pth", edit)
    refuses(tmp_path, *words)


def test_a_norm_that_differs_in_one_element(tmp_path):
    """Opening sees samples alone; a run compares the parts' norms whole, wherever they lie."""
    config, tensors = made()
    part = release(tmp_path, tensors, config, 2) / "consolidated.01.pth"
    change(part, lambda p: p.update({"norm.weight": p["norm.weight"].repeat_interleave(2)[::2]}))
    fastckpt.reshard(tmp_path, layout="same")
    change(part, lambda p: p["norm.weight"][5:6].add_(1))
    ckpt = fastckpt.open(tmp_path)
    with pytest.raises(
        SourceError, match=r"norm\.weight in consolidated\.00\.pth and consolidated\.01\.pth: a fl"
    ):
        fastckpt.reshard(ckpt, layout="same")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"layers.0.moe.w1.weight": torch.ones(8, 64)}, ["how 2 files share it is not known"]),
        ({WQ: torch.ones(64, 60)}, [f"{WQ}: 2 parts of (32, 60), and norm.weight has 64"]),
        ({"layers.0.attention.wo.weight": torch.ones(32, 64)}, ["wo.weight: 2 parts of (32, 32)"]),
        ({"tok_embeddings.weight": torch.ones(208, 96)}, ["tok_embeddings.weight: 2 parts of (104, 96)"]),
        ({"norm.weight": torch.ones(2, 64)}, ["no norm.weight, which says how wide the model is"]),
        ({WQ: torch.ones(64, 64).to(torch.float8_e4m3fn)}, [f"{WQ} is float8_e4m3fn; scales"]),
    ],
)
def test_what_no_release_cuts_so(tmp_path, tensors, words):
    config, whole = made()
    refuses(release(tmp_path, whole | tensors, config, 2), *words)


def test_parts_that_are_missing(tmp_path):
    config, tensors = made()
    release(tmp_path, tensors, config, 4)
    (tmp_path / "consolidated.02.pth").unlink()
    refuses(tmp_path, "consolidated.02.pth is missing; there are consolidated.00.pth, consolidated.01.pth")
    (tmp_path / "consolidated.03.pth").unlink()  # as if there had been two
    with pytest.raises(RecipeError, match=r"embed_tokens\.weight has 104 rows, config's vocab_size is 208"):
        fastckpt.plan(tmp_path, config=config)


def test_broken_files(tmp_path):
    config, tensors = made()
    release(tmp_path, tensors, config, 2)
    params = tmp_path / "params.json"
    params.write_text("[]")
    refuses(tmp_path, "params.json")
    params.write_text(json.dumps({"model": {"n_heads": 3}}))
    assert sources.open(tmp_path).saved.args == {"n_heads": 3}
    file = tmp_path / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(tmp_path, "consolidated.01.pth")
