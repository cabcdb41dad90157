"""Modules filled where their parameters lie: names, ties, meta devices, and what is refused."""

import fastckpt
import pytest
import torch
from fastckpt.errors import DeviceError, LayoutError, ViewError
from torch._subclasses.fake_tensor import FakeTensorMode
from zero_writer import write_zero


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(13, 6)
        self.up = torch.nn.Linear(6, 9)
        self.head = torch.nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_into_a_module(tmp_path, meta, dtype):
    source = Net()
    params = {n: p.detach() for n, p in source.named_parameters()}
    truth = write_zero(
        tmp_path,
        params,
        stage=3,
        world=3,
        buffers={"steps": source.steps + 3},
        tied={"head.weight": "embed.weight"},
    )
    with torch.device("meta" if meta else "cpu"):
        module = Net().to(dtype)
    module.up.bias.requires_grad_(False)
    assert fastckpt.load_into(module, tmp_path) is module
    assert module.head.weight is module.embed.weight and not module.up.bias.requires_grad
    for name, tensor in module.state_dict().items():
        want = truth[name].to(dtype) if truth[name].is_floating_point() else truth[name]
        assert torch.equal(tensor, want) and tensor.dtype == want.dtype, name

    other = Net()
    other.more = torch.nn.Linear(2, 2)
    with pytest.raises(LayoutError, match=r"2 tensors of the module .*more\.weight"):
        fastckpt.load_into(other, tmp_path)
    fastckpt.load_into(other, tmp_path, strict=False)
    assert torch.equal(other.up.weight.detach(), truth["up.weight"])


def test_a_module_of_one_rank_is_filled(tmp_path):
    """Cut by patterns, over two threads in bounded memory, told as it goes."""
    weight, bias = torch.randn(6, 4), torch.randn(3)
    torch.save({"a.weight": weight, "b.bias": bias}, tmp_path / "x.pt")
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3, bias=False), "b": torch.nn.Linear(1, 3)})
    del module["b"].weight
    told = []
    fastckpt.load_into(
        module, tmp_path / "x.pt", tp=2, rank=1, layout="hf",
        tp_plan={"a.weight": "colwise", "*": "replicate"}, threads=2,
        memory="80MiB", progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert torch.equal(module["a"].weight, weight[3:]) and torch.equal(module["b"].bias, bias)
    assert told[-1] == (60, 60, "copy")
    with pytest.raises(LayoutError, match=r"which of the 2 ranks"):
        fastckpt.load_into(module, tmp_path / "x.pt", tp=2)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_a_name_tied_in_the_checkpoint_alone_is_filled_too(tmp_path, meta, strict):
    """As torch's load_state_dict would: the file holds both names."""
    source = Net()
    torch.save(source.state_dict(), tmp_path / "x.pt")
    with torch.device("meta" if meta else "cpu"):
        module = Net()
        module.head = torch.nn.Linear(6, 13, bias=False)
    fastckpt.load_into(module, tmp_path / "x.pt", strict=strict)
    assert module.head.weight is not module.embed.weight
    assert module.head.weight.data_ptr() != module.embed.weight.data_ptr()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    module.head.to(torch.bfloat16)
    with pytest.raises(LayoutError, match=r"head\.weight: got torch\.bfloat16 .* ties it to embed\.weight"):
        fastckpt.load_into(module, tmp_path / "x.pt", strict=strict)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_name_is_filled_where_the_module_lacks_its_holder(tmp_path, meta, tied):
    """The one tensor of the checkpoint goes by another of its names, and fills all that the module has."""
    weight = torch.randn(13, 6)
    torch.save({"embed.weight": weight, "head.weight": weight, "last.weight": weight}, tmp_path / "x.pt")
    with torch.device("meta" if meta else "cpu"):
        module = torch.nn.ModuleDict({n: torch.nn.Linear(6, 13, bias=False) for n in ("head", "last")})
    if tied:
        module["last"].weight = module["head"].weight
    with pytest.raises(LayoutError, match=r"0 tensors of the module .* 1 of the checkpoint .*embed\.weight"):
        fastckpt.load_into(module, tmp_path / "x.pt")
    fastckpt.load_into(module, tmp_path / "x.pt", strict=False)
    assert (module["last"].weight is module["head"].weight) is tied
    assert all(torch.equal(t, weight) for t in module.state_dict().values())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_that_ties_what_the_checkpoint_does_not(device):
    with torch.device(device):
        module = torch.nn.ModuleDict(
            {"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)}
        )
        module["head"].weight = module["embed"].weight
    state = {"embed.weight": torch.zeros(4, 3), "head.weight": torch.ones(4, 3)}
    with pytest.raises(
        LayoutError, match=r"embed.weight and head.weight lie over the same memory .*two tens"
    ):
        fastckpt.load_into(module, state)


@pytest.mark.parametrize("how", ["one parameter", "one memory", "one parameter on meta"])
def test_a_module_that_ties_a_name_to_another_than_the_checkpoint_does(how):
    """The checkpoint's head is its first table, the module's head is its second."""
    with torch.device("meta" if how.endswith("meta") else "cpu"):
        module = torch.nn.ModuleDict({n: torch.nn.Linear(3, 3, bias=False) for n in ("a", "b", "head")})
    second = module["b"].weight
    module["head"].weight = torch.nn.Parameter(second.data) if how == "one memory" else second
    one = torch.ones(3, 3)
    state = {"a.weight": one, "b.weight": torch.zeros(3, 3), "head.weight": one}
    for strict in (True, False):
        with pytest.raises(
            LayoutError, match=r"(b|head).weight and (b|head).weight lie over the same memory"
        ):
            fastckpt.load_into(module, state, strict=strict)
    fastckpt.load_into(module, state | {"b.weight": one})
    assert all(torch.equal(x, one) for x in module.state_dict().values())


def test_a_buffer_no_checkpoint_holds_is_not_left_on_meta_unsaid(tmp_path):
    truth = write_zero(
        tmp_path, {"up.weight": torch.randn(3, 2), "up.bias": torch.randn(3)}, stage=3, world=2
    )
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"up": torch.nn.Linear(2, 3)})
        module.register_buffer("angles", torch.zeros(4), persistent=False)
    with pytest.raises(LayoutError, match="angles is a buffer on the meta device"):
        fastckpt.load_into(module, tmp_path)
    fastckpt.load_into(module, tmp_path, strict=False)
    assert module.angles.is_meta and torch.equal(module["up"].weight.detach(), truth["up.weight"])


def test_a_tied_module_does_not_choose_between_two_tensors():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    with pytest.raises(LayoutError, match="same memory"):
        fastckpt.load_into(module, {"0.weight": torch.zeros(3, 3), "1.weight": torch.ones(3, 3)})


def test_a_module_on_two_devices_or_of_other_numbers():
    given = {"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(2, 2)}
    module = torch.nn.ModuleDict({n: torch.nn.Linear(2, 2, bias=False) for n in "ab"})
    with FakeTensorMode():  # needs no second device
        module["b"].weight = torch.nn.Parameter(torch.empty(2, 2, device="cuda"))
    with pytest.raises(DeviceError, match="the module lies on cpu, cuda:0; load its parts one by one"):
        fastckpt.load_into(module, given)
    module = torch.nn.Module()
    module.register_buffer("w", torch.ones(2, dtype=torch.int32))
    with pytest.raises(ViewError, match=r"^w: cast: no conversion from float32 to int32"):
        fastckpt.load_into(module, {"w": torch.ones(2)})
    module.w = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
    with pytest.raises(LayoutError, match=r"^w: no dtype torch\.qint8 here"):
        fastckpt.load_into(module, {"w": torch.ones(2)})


def test_names_that_a_wrapper_changed_are_told_with_the_way_out():
    module = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(LayoutError, match=r"torch\.compile puts there; rename= \(--rename '_orig_mod"):
        fastckpt.load_into(module, {"_orig_mod.weight": torch.ones(2, 2)})


def test_a_copy_that_state_dict_makes_is_not_filled_in_place_of_the_module():
    module = torch.nn.Linear(2, 2, bias=False)
    module._register_state_dict_hook(lambda _, state, *__: state.update(weight=state["weight"].clone()))
    with pytest.raises(LayoutError, match="weight in the module's state_dict is none of its"):
        fastckpt.load_into(module, {"weight": torch.ones(2, 2)})
    with pytest.raises(LayoutError, match="weight has no shape before the module has run"):
        fastckpt.load_into(torch.nn.LazyLinear(2, bias=False), {"weight": torch.ones(2, 2)})
