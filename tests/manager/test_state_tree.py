"""State taken apart and put together again is the same; what cannot be is refused with its place."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fastckpt.errors import ManagerError
from fastckpt.manager.state_tree import Builder, fill, flatten, merged
from fastckpt.manager.template_check import check
from fastckpt.sources.training import names_in, parts_of
from hypothesis import given, settings
from hypothesis import strategies as st


def through(state: object) -> object:
    """Apart, through the text of a file, and together."""
    flat = flatten(state)
    return Builder(flat.tensors).build(json.loads(json.dumps(flat.tree)))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans() | st.none(), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(plain)
def test_plain_values_return(state: object) -> None:
    assert repr(through(state)) == repr(state)  # repr tells 1 from 1.0 and True, and nan from nan


@pytest.mark.parametrize(
    "value",
    [
        1 << 70,
        -0.0,
        complex(1, float("inf")),
        {1, 2},
        frozenset({"a"}),
        torch.bfloat16,
        torch.device("cuda", 1),
        torch.Size([2, 3]),
        OrderedDict([("b", 1), ("a", (2,))]),
        {"list": [1]},
        {"tensor": "x"},
        {"dict": {"float": "nan"}},
    ],
    ids=repr,
)
def test_odd_values_return(value: object) -> None:
    back = through({"k": [value]})
    assert repr(back) == repr({"k": [value]}) and type(back["k"][0]) is type(value)


def test_numpy_returns() -> None:
    state = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "s": np.float32(0.1),
        "r": np.random.RandomState(1),
    }
    state["r"] = state["r"].get_state()
    back: Any = through(state)
    assert back["a"].dtype == np.int16 and back["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert back["s"] == np.float32(0.1) and type(back["s"]) is np.float32
    again = np.random.RandomState(2)
    again.set_state(back["r"])
    assert again.randint(1 << 30) == np.random.RandomState(1).randint(1 << 30)


def test_modules_keep_versions_of_their_layers() -> None:
    model = torch.nn.BatchNorm1d(3)
    back: Any = through(model)
    assert back._metadata == model.state_dict()._metadata and list(back) == list(model.state_dict())


class Odd:
    pass


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": [0, Odd()]}}, r"at a\.b\.1: a Odd"),
        ({"f": len}, r"at f: a builtin_function_or_method"),
        (defaultdict(int), "at its root: a defaultdict"),
        ({(1, 2): 3}, r"key \(1, 2\)"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two tensors are named 'a.b'"),
        ({"n": np.array(["text"])}, "at n: "),
        ({"n": np.ma.masked_less(np.ones(2), 1)}, "at n: a MaskedArray"),
        ({"n": np.zeros(1, [("a", "f4")])[0]}, "at n: a void"),
    ],
)
def test_what_is_no_plain_value(state: object, said: str) -> None:
    with pytest.raises(ManagerError, match=said):
        flatten(state)


def test_names_and_parts(trained: Callable[..., dict[str, Any]]) -> None:
    tree = flatten(trained(1)).tree
    names = names_in(tree)
    assert names[0] == "model.0.weight" and "optimizer.state.0.exp_avg" in names
    assert parts_of(tree) == {
        "model": "module",
        "optimizer": "object",
        "scheduler": "object",
        "seen": "value",
    }


def test_templates_are_filled(trained: Callable[..., dict[str, Any]], same: Callable[..., bool]) -> None:
    saved, template = trained(1, 3), trained(2, 0)
    flat = flatten(saved)
    ids = {k: id(v) for k, v in template.items()}
    template["own"] = "stays"
    back = Builder(flat.tensors).build(flat.tree, template)
    assert back is template and template.pop("own") == "stays"
    assert {k: id(v) for k, v in template.items() if k != "seen"} == {
        k: v for k, v in ids.items() if k != "seen"
    }
    assert same(template, saved)


def test_tensors_of_templates_keep_their_dtype() -> None:
    template = {"x": torch.zeros(3, dtype=torch.float64), "list": [torch.zeros(2)]}
    x, y = template["x"], template["list"][0]
    flat = flatten({"x": torch.arange(3), "list": [torch.ones(2, dtype=torch.bfloat16)]})
    back: Any = Builder(flat.tensors).build(flat.tree, template)
    assert back["x"] is x and x.tolist() == [0.0, 1.0, 2.0] and x.dtype == torch.float64
    assert back["list"][0] is y and y.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"x": torch.zeros(4)}, r"at x: saved shape \(3,\), the template's is \(4,\)"),
        ({"n": torch.zeros(1)}, "at n: the template has a tensor"),
        ({"lacking": 1}, "'lacking' is not in the commit"),
        ({"x": torch.nn.Linear(1, 1)}, "at x: the template has a Linear"),
        ([torch.zeros(3)], "at its root: the template has a list, the commit dict"),
        ({"l": [torch.zeros(1)]}, "at l: 2 were saved, the template has 1"),
        ({"l": [torch.zeros(2), 1]}, r"at l\.0: saved shape"),
        ({"m": 5}, "at m: wanted an object with load_state_dict, got int"),
        ({"m": torch.nn.Linear(2, 2)}, r"at m\.weight: saved shape"),
        ({"m": torch.nn.Linear(2, 1, bias=False)}, "at m: the module has no 'bias'"),
    ],
)
def test_templates_that_do_not_fit(template: object, said: str) -> None:
    flat = flatten({"x": torch.zeros(3), "n": 1, "m": torch.nn.Linear(2, 1), "l": [torch.zeros(1), 1]})
    with pytest.raises(ManagerError, match=said):
        check(flat.tree, template, lambda name: tuple(flat.tensors[name].shape), allow_missing=False)


def test_a_kind_of_value_from_a_newer_version() -> None:
    with pytest.raises(ManagerError, match="no kind of value 'fraction' here; was it written by a newer"):
        Builder({}).build({"dict": [["x", {"fraction": [1, 2]}]]})


def test_nothing_is_spread_by_filling() -> None:
    with pytest.raises(ManagerError, match=r"restore: read shape \(3,\), wanted \(2, 3\)"):
        fill(torch.zeros(2, 3), torch.zeros(3))


def test_objects_of_ranks() -> None:
    """What is alike in an object of each rank stays, with the versions of its layers."""
    models = [torch.nn.BatchNorm1d(2) for _ in range(2)]
    models[1].num_batches_tracked += 1
    trees = [flatten({"m": m, "n": {"rank": r}}).tree for r, m in enumerate(models)]
    for tree, rank in zip(trees, (0, 1), strict=True):
        tree["dict"][0][1]["state"][1]["ordered"].append(["rank", rank])  # type: ignore[index, call-overload]
    tree, differing = merged(trees)
    assert differing == ["m.rank", "n.rank"]
    back: Any = Builder(flatten({"m": models[0]}).tensors).build(tree)
    assert list(back["m"]) == list(models[0].state_dict()) and back["n"] == {}
    assert back["m"]._metadata == models[0].state_dict()._metadata


def test_trees_of_ranks() -> None:
    states: list[dict[str, object]] = [{"a": {"same": 1, "rank": r}, "list": [1, 2]} for r in range(3)]
    states[0]["only"] = 3
    trees = [flatten(s).tree for s in states]
    tree, differing = merged(trees)
    assert Builder({}).build(tree) == {"a": {"same": 1}, "list": [1, 2]}
    assert differing == ["a.rank", "only"]
    assert merged(trees[:1] * 3) == (trees[0], [])
