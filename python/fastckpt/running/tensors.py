"""torch tensors at the road's end: fresh ones, the caller's, a module's. The one room here that knows torch.

Law: a tensor is filled where it lies; shape, dtype, device and density are checked before the first byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch

from ..dtypes import BY_NAME, DType
from ..errors import DeviceError, LayoutError, expect
from ..extents import Buffer
from ..planning.plans import Plan
from ..sources.memory import lies_as_is

State = dict[str, torch.Tensor]


def allocate(planned: Plan, device: str = "cpu") -> tuple[list[State], list[Buffer]]:
    """A dict of fresh tensors for each of the plan's ranks, and each planned tensor's memory.

    Raises DeviceError where the device has too little memory."""
    states: list[State] = [{} for _ in planned.ranks]
    buffers, needed = [], planned.output_bytes
    for t in planned.tensors:
        made = _fresh(t.name, t.shape, torch_dtype(t.dtype), device, needed)
        states[t.file][t.name] = made
        buffers.append(buffer(made))
    return states, buffers


def _fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, needed: int) -> torch.Tensor:
    """A tensor whose values are not set; `needed`: bytes of all that are made with it. Raises DeviceError."""
    try:
        made = torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as e:  # what main memory has no room for is no OutOfMemoryError
        raise DeviceError(f"{device}: no memory for {name}: the outputs need {needed} bytes; {e}") from None
    if type(made) is not torch.Tensor and not lies_as_is(made):
        raise DeviceError(f"{device}: torch makes a {type(made).__name__} here; leave FakeTensorMode first")
    return made


def matched(planned: Plan, out: Sequence[Mapping[str, torch.Tensor]], device: str) -> list[Buffer]:
    """The caller's memory for each planned tensor; aliases must be the same memory or absent.

    Raises LayoutError for a name that is missing or too much, a shape or dtype that differs, memory that is
    not dense or not plain (a DTensor's); DeviceError for a tensor that is not on `device`."""
    if len(out) != len(planned.ranks):
        raise LayoutError(f"out: wanted {len(planned.ranks)} dicts of tensors, got {len(out)}")
    buffers = []
    for t in planned.tensors:
        given = out[t.file].get(t.name)
        if given is None:
            raise LayoutError(f"out: rank {t.rank} has no tensor {t.name}")
        expect(f"out: {t.name} of rank {t.rank}", given, torch.Tensor)
        if _name(given.device) != device:
            raise DeviceError(f"out: {t.name} is on {given.device}, wanted {device}")
        if not lies_as_is(given):
            raise LayoutError(
                f"out: {t.name} is a {type(given).__name__}, {given.layout}, whose values do not lie in "
                "plain memory (or no more); make it dense and local first"
            )
        want = torch_dtype(t.dtype)
        if tuple(given.shape) != t.shape or given.dtype != want:
            raise LayoutError(
                f"out: {t.name} of rank {t.rank}: got {given.dtype} {tuple(given.shape)}, "
                f"wanted {want} {t.shape}"
            )
        if not given.is_contiguous():
            raise LayoutError(f"out: {t.name} is not contiguous, its strides are {given.stride()}")
        buffers.append(buffer(given))
    _refuse_overlaps(planned, buffers)
    filled: list[set[str]] = [set() for _ in out]
    for t in planned.tensors:
        filled[t.file].add(t.name)
    for state, names, rank in zip(out, filled, planned.ranks, strict=True):
        more = [n for n in state if n not in names and planned.aliases.get(n) not in names]
        if more:
            raise LayoutError(f"out: rank {rank} has {len(more)} tensors nothing fills, such as {more[0]}")
        for alias, holder in planned.aliases.items():
            if alias in state and alias not in names:
                expect(f"out: {alias} of rank {rank}", state[alias], torch.Tensor)
                if not _one(state[alias], state[holder]):
                    raise LayoutError(f"out: {alias} is tied to {holder} but is not the same memory")
    return buffers


def _one(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    if not (lies_as_is(a) and lies_as_is(b)) or (a.device, a.dtype) != (b.device, b.dtype):
        return False
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _refuse_overlaps(planned: Plan, buffers: Sequence[Buffer]) -> None:
    """Memory that is filled twice, or filled before it was read, would hold wrong weights."""
    spans = [(b.address, b.nbytes, True, t.name) for t, b in zip(planned.tensors, buffers, strict=True)]
    devices = {b.device for b in buffers}
    spans += [
        (x.where.address, x.where.nbytes, False, f"the checkpoint's {x.key}")
        for x in planned.extents
        if isinstance(x.where, Buffer) and x.where.device in devices
    ]
    ends = {True: (0, ""), False: (0, "")}  # of what is filled, of what is read: how far, by whom
    for start, nbytes, filled, name in sorted(span for span in spans if span[1]):
        for other in (True, False) if filled else (True,):
            end, before = ends[other]
            if start < end:
                raise LayoutError(f"out: {before} and {name} lie over the same memory")
        ends[filled] = max(ends[filled], (start + nbytes, name))


def buffer(tensor: torch.Tensor) -> Buffer:
    """The memory of a dense tensor."""
    return Buffer(tensor, tensor.data_ptr(), tensor.nbytes, _name(tensor.device))


@cache
def _name(device: torch.device) -> str:
    """The device by its full name; torch spells it out anew each time."""
    return str(device)


@cache
def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's dtype of ours. Raises LayoutError where this torch has none."""
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise LayoutError(f"this torch ({torch.__version__}) has no dtype {dtype}")
    return found


# ---- modules ----


def tensors_of(module: torch.nn.Module) -> State:
    """A module's persistent tensors by name, tied names included. Raises LayoutError for one that has no
    shape yet."""
    expect("module", module, torch.nn.Module)
    state = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    if lazy := [n for n, t in state.items() if torch.nn.parameter.is_lazy(t)]:
        raise LayoutError(f"{lazy[0]} has no shape before the module has run once ({len(lazy)} such)")
    return state


def refuse_copies(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raises LayoutError where a module's state_dict made a tensor: to fill it would change no weight."""
    parameters, buffers = (
        find(remove_duplicate=False) for find in (module.named_parameters, module.named_buffers)
    )
    own = {**dict(parameters), **dict(buffers)}
    memory = {t.untyped_storage().data_ptr() for t in own.values() if lies_as_is(t)}
    for name, tensor in state.items():
        if tensor is not own.get(name) and not (
            lies_as_is(tensor) and tensor.untyped_storage().data_ptr() in memory
        ):
            raise LayoutError(
                f"load_into: {name} in the module's state_dict is none of its parameters and buffers, but a "
                "copy (of FSDP 1, of a hook); load the module before it is wrapped"
            )


def require_made(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raises LayoutError for a buffer on the meta device that no checkpoint holds: it is not persistent."""
    if unmade := [n for n, b in module.named_buffers() if b.is_meta and n not in state]:
        raise LayoutError(
            f"load_into: {unmade[0]} is a buffer on the meta device that checkpoints do not hold "
            f"({len(unmade)} such); make it first, or strict=False leaves it"
        )


def dtypes_of(state: Mapping[str, torch.Tensor]) -> dict[str, DType]:
    """Our dtype of each tensor. Raises LayoutError for one we do not know."""
    out = {}
    for name, tensor in state.items():
        known = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
        if known is None:
            raise LayoutError(f"{name}: no dtype {tensor.dtype} here")
        out[name] = known
    return out


def tied(state: Mapping[str, torch.Tensor], made: set[str]) -> dict[str, str]:
    """Names that need no filling of their own: tied name -> a made name of the same parameter."""
    holder = {id(t): n for n, t in state.items() if n in made}
    return {n: holder[id(t)] for n, t in state.items() if n not in made and id(t) in holder}


def untied(state: Mapping[str, torch.Tensor], made: set[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Names that are one tensor in the checkpoint and two in the module: name -> the made name it equals.

    Raises LayoutError where the two differ in dtype or shape, so that one cannot be copied from the other."""
    one = tied(state, made)
    found = {a: h for a, h in aliases.items() if a in state and a not in one}
    for name, holder in found.items():
        wanted, got = ((state[n].dtype, tuple(state[n].shape)) for n in (holder, name))
        if got != wanted:
            raise LayoutError(f"{name}: got {got[0]} {got[1]}; the checkpoint ties it to {holder}, {wanted}")
    return found


def require_apart(state: Mapping[str, torch.Tensor], made: set[str], aliases: Mapping[str, str]) -> None:
    """Raises LayoutError where two names are two tensors of the checkpoint and one parameter of the module,
    or share its memory."""
    spans: dict[tuple[str, int, int, str], str] = {}
    for name in sorted(n for n in state if n in made or n in aliases):
        tensor = state[name]
        if tensor.nbytes and (tensor.is_meta or lies_as_is(tensor)):  # `matched` refuses any other
            start, nbytes = (id(tensor), 1) if tensor.is_meta else (tensor.data_ptr(), tensor.nbytes)
            span = str(tensor.device), start, start + nbytes, aliases.get(name, name)
            spans.setdefault(span, name)
    on, end, before = "", 0, ""
    for (device, start, stop, _), name in sorted(spans.items()):
        if device == on and start < end:
            raise LayoutError(
                f"load_into: {before} and {name} lie over the same memory in the module, and are two tensors "
                "of the checkpoint"
            )
        if device != on or stop > end:
            on, end, before = device, stop, name


def made_real(state: Mapping[str, torch.Tensor], device: str) -> State:
    """Dense tensors to fill, one for each: the module's own memory, or on `device` where it is on meta.

    Raises DeviceError where the device has too little memory."""
    needed = sum(t.nbytes for t in state.values() if t.is_meta)
    return {
        name: _fresh(name, tuple(t.shape), t.dtype, device, needed) if t.is_meta else t.detach()
        for name, t in state.items()
    }


def device_of(state: Mapping[str, torch.Tensor]) -> str:
    """The one device of tensors that are not on meta; the CPU for none. Raises DeviceError for several."""
    found = sorted({str(t.device) for t in state.values() if not t.is_meta})
    if len(found) > 1:
        raise DeviceError(f"load_into: the module lies on {', '.join(found)}; load its parts one by one")
    return found[0] if found else "cpu"


def tie(states: Sequence[State], aliases: Mapping[str, str]) -> None:
    """Tied names become the same tensors again, on the ranks that hold them."""
    for state in states:
        for alias, holder in aliases.items():
            if holder in state:
                state.setdefault(alias, state[holder])


def assign(module: torch.nn.Module, real: State, tied: Mapping[str, str]) -> None:
    """Put the tensors that replaced meta ones into the module, tied names as one parameter."""
    was = tensors_of(module)
    fresh = {n: t for n, t in real.items() if was[n].is_meta}
    for name, holder in tied.items():
        if holder in fresh:
            fresh[name] = fresh[holder]
    made: dict[int, torch.nn.Parameter] = {}
    for name, tensor in fresh.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        old = was[name]
        if isinstance(old, torch.nn.Parameter):
            if id(old) not in made:
                made[id(old)] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
            setattr(owner, leaf, made[id(old)])
        else:
            setattr(owner, leaf, tensor)
