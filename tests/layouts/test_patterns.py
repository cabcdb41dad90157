"""Name patterns: which tensor is cut where, and what is refused."""

from __future__ import annotations

import json

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError
from fastckpt.layouts import Patterns
from fastckpt.placement import Placement
from reading import memory, same, shard
from safetensors.torch import load_file

TENSORS = {
    "enc.0.q.weight": torch.randn(12, 8),
    "enc.0.q.bias": torch.randn(12),
    "enc.0.o.weight": torch.randn(8, 12),
    "enc.0.o.bias": torch.randn(8),
    "enc.0.gate_up": torch.randn(3, 16, 8),
    "enc.0.down": torch.randn(3, 8, 8),
    "emb.weight": torch.randn(20, 8),
    "norm.weight": torch.randn(8),
    "steps": torch.tensor(7),
}
PLAN = {
    "enc.*.q": "colwise",
    "*.o": "rowwise",
    "*.gate_up": "packed_colwise",
    "*.down": "rowwise",
    "emb.weight": "embedding_colwise",
    "*": "replicate",
}


def cut(r, tp):
    t = TENSORS
    return t | {
        "enc.0.q.weight": t["enc.0.q.weight"].chunk(tp, 0)[r],
        "enc.0.q.bias": t["enc.0.q.bias"].chunk(tp, 0)[r],
        "enc.0.o.weight": t["enc.0.o.weight"].chunk(tp, 1)[r],
        "enc.0.gate_up": torch.cat([h.chunk(tp, 1)[r] for h in t["enc.0.gate_up"].chunk(2, 1)], 1),
        "enc.0.down": t["enc.0.down"].chunk(tp, 2)[r],
        "emb.weight": t["emb.weight"].chunk(tp, 1)[r],
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_tensor_is_cut_as_its_pattern_says(tp):
    ckpt = memory(TENSORS, pieces=2)
    for place in Placement(tp=tp).ranks():
        got = shard(Patterns(PLAN).targets(ckpt, place))
        same(got, cut(place.rank, tp))
    assert Patterns(PLAN).naming(place).directory == (f"rank-{tp - 1:02d}" if tp > 1 else "")


def test_the_first_pattern_decides():
    ckpt = memory({"a.weight": torch.randn(4, 6)})
    first = {"a.*": "rowwise", "*": "colwise"}
    assert next(Patterns(first).targets(ckpt, Placement(tp=2))).shape == (4, 3)
    assert next(Patterns(dict(reversed(first.items()))).targets(ckpt, Placement(tp=2))).shape == (2, 6)


REFUSED = [
    ({"a.weight": "colwise"}, 2, r'no pattern matches b; write "\*": "replicate"'),
    ({"*": "colwise"}, 3, r"a\.weight has 4 on axis 0, which does not divide by tp 3"),
    ({"a*": "packed_rowwise", "*": "replicate"}, 2, r"6 on axis 1, which does not divide by 2 \* tp 2"),
    ({"b": "rowwise", "*": "replicate"}, 2, r"b has shape \(\), which rowwise cannot cut"),
]


@pytest.mark.parametrize(("plan", "tp", "message"), REFUSED)
def test_refusals_come_before_the_first_target(plan, tp, message):
    ckpt = memory({"a.weight": torch.randn(4, 6), "b": torch.tensor(1.0)})
    with pytest.raises(LayoutError, match=message):
        Patterns(plan).targets(ckpt, Placement(tp=tp))


def test_a_packed_vector_is_refused():
    with pytest.raises(LayoutError, match=r"b has shape \(8,\), which packed_colwise cannot cut"):
        Patterns({"b": "packed_colwise"}).targets(memory({"b": torch.randn(8)}), Placement(tp=2))


def test_unknown_styles_are_named():
    with pytest.raises(LayoutError, match=r"'x': unknown style 'columns'; known: colwise, "):
        Patterns({"x": "columns"})


def test_a_tied_name_that_is_cut_otherwise_is_a_tensor_of_its_own(tmp_path):
    table = torch.arange(48.0).view(8, 6)
    held = {"embed.weight": table, "head.weight": table}
    for plan, mine in (
        ({"head*": "rowwise", "*": "colwise"}, lambda r: table[:, 3 * r : 3 * r + 3]),
        ({"head*": "colwise", "*": "replicate"}, lambda r: table[4 * r : 4 * r + 4]),
        ({"head*": "replicate", "*": "rowwise"}, lambda r: table),
    ):
        for rank, got in enumerate(fastckpt.reshard(held, 2, tp_plan=plan)):
            assert torch.equal(got["head.weight"], mine(rank))
        out = tmp_path / plan["head*"]
        fastckpt.reshard(held, 2, tp_plan=plan, out=out)
        assert torch.equal(load_file(out / "rank-01/model.safetensors")["head.weight"], mine(1))
        back = fastckpt.reshard(out, layout="same")[0]
        assert torch.equal(back["embed.weight"], table) and torch.equal(back["head.weight"], table)
    alike = fastckpt.reshard(held, 2, tp_plan={"*": "colwise"})[1]
    assert alike["head.weight"] is alike["embed.weight"]


def test_a_vocabulary_that_no_names_tell_is_refused(tmp_path):
    for options in ({"layout": "same"}, {"tp": 2, "tp_plan": {"*": "replicate"}}):
        with pytest.raises(LayoutError, match="vocab_size goes with layouts that read roles"):
            fastckpt.reshard({"e.weight": torch.ones(8, 4)}, vocab_size=4, out=tmp_path / "out", **options)


def test_a_pattern_that_matches_nothing_is_told(tmp_path):
    plan = {"e": "colwise", "*.q_prj.weight": "colwise", "head.*": "replicate", "*": "replicate"}
    state = {"e.weight": torch.ones(8, 4)}
    assert fastckpt.plan(state | {"head.weight": state["e.weight"]}, 2, tp_plan=plan).notes[-1] == (
        "tp_plan: no tensor matches *.q_prj.weight"
    )
    assert fastckpt.plan(state, 2, tp_plan={"e": "colwise"}).notes == ()


def test_a_recipe_that_no_names_need_is_refused(tmp_path):
    for options in ({"layout": "same"}, {"tp": 2, "tp_plan": {"*": "replicate"}}):
        with pytest.raises(LayoutError, match="recipe goes with layouts that read roles"):
            fastckpt.reshard({"e.weight": torch.ones(8, 4)}, recipe="llama", **options)


def test_a_tied_name_that_no_file_holds_is_told(tmp_path):
    table = torch.ones(8, 6)
    held, plan = {"embed.weight": table, "head.weight": table}, {"*": "colwise"}
    report = fastckpt.reshard(held, 2, tp_plan=plan, out=tmp_path / "one")
    assert any("head.weight is embed.weight" in note for note in report.notes)
    config = {"tie_word_embeddings": True}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    torch.save(held, tmp_path / "in/pytorch_model.bin")
    assert fastckpt.reshard(tmp_path / "in", 2, tp_plan=plan, out=tmp_path / "two").notes == ()
