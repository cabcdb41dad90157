"""What callers ask for is checked before anything is opened: a wrong argument is an error that names it."""

import os

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt.errors import FastckptError, LayoutError, SourceError
from fastckpt.layouts.megatron import Megatron
from fastckpt.layouts.same import Same
from fastckpt.layouts.vllm import Vllm
from layouts import tiny
from safetensors.torch import save_file

NO = object()
WRONG = {
    "out": [5, b"x", [5], {"w": 1, "x": {}}, "", "a\0b"],
    "tp": ["8", 0, -1, 2.0, True, None, 10**12, 10**30],
    "rank": [8, -1, "0", True, 1.0],
    "placement": [5, (8,)],
    "layout": [3, None, dict, "nonsense", Vllm(pad="no"), Megatron(spec="te"), Same("zip")],
    "config": [5, [], {"model_type": NO}, {"model_type": "llama", "torch_dtype": torch.float32}],
    "recipe": [5, "nonsense"],
    "tp_plan": [5, ["a"], {"*": 5}, {5: "colwise"}, {"*": "diagonal"}],
    "vocab_size": ["36", 36.0, 0, -3],
    "dtype": ["nonsense", 5, [], np.float32, "int8", torch.bool, "complex64", "float8_e8m0fnu"],
    "quant": ["nonsense", 5],
    "apart": [True, "no"],
    "allow_nonfinite": ["no", 0, None],
    "durable": ["no", 0],
    "overwrite": ["no", None],
    "device": ["nonsense", 5, None],
    "max_shard_size": ["nonsense", 0, -1, [], "9" * 400 + "GB"],
    "memory": ["nonsense", 1, []],
    "threads": [0, -2, 1 << 17, "2", 1.5, True],
    "progress": [5],
    "adapter": [5],
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_argument_is_named(tmp_path, argument):
    config, files, _ = tiny.made("biased")
    for value in WRONG[argument]:
        given = {"config": config, "out": tmp_path / "out", argument: value}
        with pytest.raises(FastckptError) as e:
            fastckpt.reshard(files, **given)
        word = {"max_shard_size": "size", "quant": "quantisation", "memory": "size"}.get(argument)
        assert argument in str(e.value) or (word and word in str(e.value)), (value, str(e.value))
        assert not (tmp_path / "out").exists()


def test_a_config_may_be_any_file(tmp_path):
    """What anyone may have written ends in an error, as it does beside a checkpoint."""
    _, files, _ = tiny.made("biased")
    for name, text, why in (
        ("twice", '{"model_type": "llama", "model_type": "gpt2"}', "'model_type' stands twice"),
        ("deep", '{"a":' * 100_000, "no JSON"),
        ("list", "[]", "wanted a JSON object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(SourceError, match=rf"{name}: .*{why}"):
            fastckpt.plan(files, config=tmp_path / name)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path, why in (("pipe", "not a regular file"), ("none", "No such file"), ("a\0b", "embedded null")):
        with pytest.raises(SourceError, match=why):
            fastckpt.plan(files, config=tmp_path / path)


@pytest.mark.parametrize("path", [None, 5, [], b"x"])
def test_a_path_is_a_path(path):
    verbs = (fastckpt.open, fastckpt.reshard, fastckpt.consolidate, fastckpt.verify, fastckpt.inspect)
    for verb in (*verbs, fastckpt.plan, lambda p: fastckpt.diff(p, p)):
        with pytest.raises(FastckptError, match="path: wanted str or PathLike"):
            verb(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tag": 5}, {"also": "x"}, {"also": 5}, {"also": [5]}, {"rename": "ab"}, {"rename": ["ab"]},
        {"rename": {"a": "b"}}, {"rename": [("a", 5)]}, {"rename": [("(", "")]}, {"weights": 5},
        {"exclude_frozen": "no"}, {"check_crc": 1}, {"replicas": "last"}, {"config": 5}, {"config": b"x"},
        {"recipe": 5},
    ],
)  # fmt: skip
def test_a_wrong_option_of_open_is_named(tmp_path, wrong):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FastckptError, match=next(iter(wrong))):
        fastckpt.open(tmp_path, **wrong)


def test_more_wrong_arguments_are_named(tmp_path):
    files = {"a": torch.ones(2)}
    save_file(files, tmp_path / "model.safetensors")
    with pytest.raises(FastckptError, match="a tensor's name: wanted str, got int 5"):
        fastckpt.reshard({5: torch.ones(2)}, layout="same")
    one = fastckpt.Placement(tp=2, rank=1)  # all ranks were made once, or another one
    for rank in (None, 0):
        with pytest.raises(LayoutError, match="placement is of rank 1, and rank="):
            fastckpt.plan(files, placement=one, rank=rank, tp_plan={"*": "colwise"})
    assert fastckpt.plan(files, placement=one, rank=1, tp_plan={"*": "colwise"}).ranks == (1,)
    for quant, said in (
        (lambda: fastckpt.Quant("int8"), "a scheme of SCHEMES: wanted Scheme"),
        (lambda: fastckpt.Quant(fastckpt.SCHEMES["int8"], include="a"), "include: wanted tuple"),
        (lambda: fastckpt.Quant(fastckpt.SCHEMES["int8"], exclude=(5,)), "a pattern of exclude: wanted str"),
        (lambda: fastckpt.reshard(files, layout="same", quant=["int8"]), "quant: wanted str or Quant"),
    ):
        with pytest.raises(FastckptError, match=said):
            quant()
    with pytest.raises(FastckptError, match="module: wanted Module"):
        fastckpt.load_into(5, tmp_path)
    with pytest.raises(FastckptError, match="biggest: wanted int"):
        fastckpt.inspect(tmp_path, biggest="10")
    with pytest.raises(FastckptError, match="ckpt: wanted str or PathLike or Checkpoint or Mapping, got int"):
        fastckpt.verify_tensors(files, 5)
    for path in ("a\0b", "\ud800"):
        with pytest.raises(FastckptError, match=r"no path: |no name of a directory"):
            fastckpt.reshard(files, layout="same", out=path)
        with pytest.raises(FastckptError, match="no path: "):
            fastckpt.CheckpointManager(path)
    for given, said in (
        ({"layout": 3}, "layout: wanted a name"), ({"layout": Vllm(tower="x")}, "layout vllm: tower"),
        ({"like": 3}, "like: wanted str"), ({"path": 3}, "path: wanted str"),
        ({"tp": 2, "placement": fastckpt.Placement(tp=4)}, "tp=2 and placement.tp=4 differ"),
    ):  # fmt: skip
        with pytest.raises(FastckptError, match=said):
            fastckpt.open_shards(**{"path": tmp_path, "layout": "vllm", "like": tmp_path} | given)
    with pytest.raises(FastckptError, match="strict: wanted bool"):
        fastckpt.load_into(torch.nn.Linear(1, 1), tmp_path, strict="no")
    with pytest.raises(FastckptError, match="out: a of rank 0: wanted Tensor, got int 5"):
        fastckpt.reshard(files, layout="same", out=[{"a": 5}])
    with pytest.raises(FastckptError, match="safe_serialization: wanted bool"):
        fastckpt.consolidate(tmp_path, tmp_path / "out", safe_serialization="no")
    for wrong in ({"engine": 5}, {"threads": 0}, {"threads": "2"}, {"plain": "no"}):
        with pytest.raises(FastckptError, match=next(iter(wrong))):
            fastckpt.verify(tmp_path, **wrong)
    with pytest.raises(FastckptError, match="weights_key: wanted str or None"):
        fastckpt.consolidate(tmp_path, tmp_path / "out", weights_key=5)
    with pytest.raises(FastckptError, match="weights_key goes with out="):
        fastckpt.consolidate(tmp_path, weights_key="m")
    with pytest.raises(FastckptError, match="weights_key: wanted a key"):
        fastckpt.consolidate(tmp_path, tmp_path / "out", weights_key="")
    with pytest.raises(
        FastckptError, match=r"weights_key .* make a training checkpoint: one \.bin, no safetens"
    ):
        fastckpt.consolidate(tmp_path, tmp_path / "out", weights_key="m", safe_serialization=True)
    with pytest.raises(FastckptError, match="quant int8: wanted safetensors or fresh tensors as the output"):
        fastckpt.reshard(tmp_path, layout=Same("bin"), quant="int8", out=tmp_path / "out")
    with pytest.raises(FastckptError, match="client_state: wanted Sequence"):
        fastckpt.consolidate(tmp_path, tmp_path / "out", weights_key="m", client_state="step")
    with pytest.raises(FastckptError, match="out: wanted"):
        fastckpt.consolidate(tmp_path, 5)
    for verb in (fastckpt.verify, lambda path, **given: fastckpt.diff(path, path, **given)):
        with pytest.raises(FastckptError, match="progress: wanted Callable"):
            verb(tmp_path, progress=5)
    with pytest.raises(FastckptError, match="held: a: wanted Tensor, got ndarray"):
        fastckpt.verify_tensors({"a": np.ones(2, np.float32)}, tmp_path)
    for parts, shapes, said in ((5, {"a": (2,)}, "parts"), ([files], [2], "shapes")):
        with pytest.raises(FastckptError, match=f"{said}: wanted"):
            fastckpt.partitioned(parts, shapes)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_device_of_torch_s():
    (got,) = fastckpt.reshard({"a": torch.ones(2)}, layout="same", device=torch.device("cpu"))
    assert torch.equal(got["a"], torch.ones(2))


@pytest.mark.parametrize(
    "size",
    [{"tp": 2.0}, {"tp": "2"}, {"tp": True}, {"tp": 2, "rank": 1.0}, {"ep": 2**21}, {"tp": 2048, "dp": 2048}],
)
def test_a_grid_is_of_whole_numbers(size):
    with pytest.raises(LayoutError, match="placement"):
        fastckpt.Placement(**size)
