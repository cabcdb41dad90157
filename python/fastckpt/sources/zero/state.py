"""What a ZeRO rank's pickled trees say, taken out of them and checked once.

Law: nothing here knows files or views; a key that is missing or has a value of another kind is a SourceError
that names it.
Keys as DeepSpeed's `engine._save_checkpoint`, `stage_1_and_2.state_dict`, `stage3._rigid_state_dict` and
`bf16_optimizer.state_dict` write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

from ...checkpoint import JSON, Checkpoint
from ...errors import SourceError
from ..plain_values import integers, listing, mapping
from ..torchfile import Inert, Tensor, type_name
from .autoep import KEYS as AUTOEP_KEYS
from .autoep import AutoEp, autoep
from .partitions import Shape
from .spelling import respelled

Value = TypeVar("Value")

_ID = re.compile(r"[0-9]{1,18}_[0-9]{1,18}")

_ENGINE_KEYS = frozenset((
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info",
    "num_experts", "folding", *AUTOEP_KEYS,
))  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class OptimState:
    """One rank's optimizer file.

    `stage`: None in files of BF16_Optimizer, which is stage 1. `counts`: the ranks each group is cut over.
    `flats`: the masters, one tensor a group (stage 3: a sub-group); `ids`: what DeepSpeed calls each of stage
    3, None if unsaid. `alignment`: elements after each
    parameter of each group, None in older files. `held`: of each group, the parameters it holds a piece of,
    by name; None if unsaid. `ranks`: those each sub-group of stage 3 is cut over, None if unsaid. `step`: the
    optimizer's, a number or where it lies, None if unsaid."""

    stage: int | None
    counts: tuple[int, ...]
    flats: tuple[Tensor, ...]
    ids: tuple[str | None, ...]
    alignment: tuple[tuple[int, ...], ...] | None
    held: tuple[Mapping[object, object], ...] | None
    ranks: tuple[tuple[int, ...], ...] | None
    step: Tensor | int | None
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """One rank's model-states file.

    `shapes`: name -> shape a group, None when ZeRO was off. `frozen_shapes`, `fragments`: None where frozen
    parameters are kept in `module` alone. `shared`: tied name -> holder. `experts`: how many each of
    DeepSpeed's MoE layers has; `data_before_experts`: how the ranks that hold them are numbered; `autoep`:
    what AutoEP says of them, None where they are not its. `pipeline`: `module` lies in files of layers, and
    is empty here. `mp_world`: the model-parallel ranks. `degrees`: how many of them are pipeline stages, and
    tensor-parallel ranks of a stage; None if unsaid. `fp32_masters`: DeepSpeed's config says so. `zenflow`:
    ZenFlow trained; `quantised`: ZeRO++ kept frozen parameters as int8 codes. `universal`: what
    universal_checkpoint_info says of cuts, as it stands. `client`: the caller's own plain values; `opaque`:
    the caller's keys whose values are not plain."""

    module: Mapping[str, object]
    buffers: tuple[str, ...]
    shapes: tuple[Mapping[str, Shape], ...] | None
    frozen_shapes: Mapping[str, Shape] | None
    fragments: Mapping[str, Tensor] | None
    shared: Mapping[str, str]
    global_steps: int | None
    dp_world: int | None
    version: str
    experts: tuple[int, ...]
    data_before_experts: bool
    autoep: AutoEp | None
    pipeline: bool
    mp_world: int
    degrees: tuple[int, int] | None
    fp32_masters: bool
    zenflow: bool
    quantised: bool
    universal: object
    client: Mapping[str, JSON]
    opaque: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rank:
    """One model-parallel rank's checkpoint, its model states and its optimizer's step (None if unsaid)."""

    checkpoint: Checkpoint
    state: ModelState
    step: int | None


def optim_state(root: object, where: str) -> OptimState:
    """The OptimState of a parsed optimizer file. Raises SourceError."""
    top = mapping(root, where)
    state = mapping(top.get("optimizer_state_dict"), f"{where}: optimizer_state_dict")
    stage = _stage(state.get("zero_stage"), where)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    if key not in state:
        raise SourceError(f"{where}: no {key}, so no ZeRO masters; keys: {', '.join(map(str, state))}")
    saved = state[key]
    listed = [saved] if isinstance(saved, Tensor) else listing(saved, f"{where}: {key}")
    flats = tuple(_flat(t, f"{where}: {key}[{k}]") for k, t in enumerate(listed))
    counts = state.get("partition_count")
    counts = [counts] if isinstance(counts, int) else counts
    moments = state.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    return OptimState(
        stage=stage,
        counts=integers(counts, f"{where}: partition_count", bits=20),
        flats=flats,
        ids=tuple(map(_id, flats)),
        alignment=_alignment(state.get("param_alignment_paddings"), f"{where}: param_alignment_paddings"),
        held=_held(state.get("param_slice_mappings")),
        ranks=_ranks(state.get("ds_zero_partition_groups"), f"{where}: ds_zero_partition_groups"),
        step=_step(moments),
        version=str(top.get("ds_version", state.get("ds_version", ""))),
    )


def model_state(root: object, where: str) -> ModelState:
    """The ModelState of a parsed model-states file. Raises SourceError."""
    top = mapping(root, where)
    pipeline = "module" in top and top["module"] is None
    shapes = top.get("param_shapes")
    groups = None
    if shapes is not None:
        listed = [shapes] if isinstance(shapes, dict) else listing(shapes, f"{where}: param_shapes")
        groups = tuple(_shapes(g, f"{where}: param_shapes[{k}]") for k, g in enumerate(listed))
        _no_doubles(groups, where)
    frozen, fragments = top.get("frozen_param_shapes"), top.get("frozen_param_fragments")
    if (frozen is None) != (fragments is None):
        raise SourceError(
            f"{where}: frozen_param_shapes and frozen_param_fragments: one is None, the other is not"
        )
    experts = integers(top.get("num_experts") or (), f"{where}: num_experts", bits=20)
    layers = autoep(next((top[key] for key in AUTOEP_KEYS if top.get(key)), None), experts, where)
    mp_world = _number(top.get("mp_world_size")) or 1
    if layers is not None and mp_world > 1:
        raise SourceError(f"{where}: AutoEP beside AutoTP (folding) is not supported yet")
    client, opaque = _client(top)
    config = _dict(top.get("ds_config"))
    zero = _dict(config.get("zero_optimization"))
    module = {} if pipeline else _names(mapping(top.get("module"), f"{where}: module"), f"{where}: module")
    buffers = tuple(_strings(top.get("buffer_names", ()), f"{where}: buffer_names"))
    shared = _pairs(top.get("shared_params") or {}, f"{where}: shared_params")
    frozen_shapes = _but_stacks(_shapes, frozen, layers, f"{where}: frozen_param_shapes")
    return ModelState(
        module=respelled(module, (*(groups or ()), frozen_shapes or {}), (*buffers, *shared)),
        buffers=buffers,
        shapes=groups,
        frozen_shapes=frozen_shapes,
        fragments=_but_stacks(_tensors, fragments, layers, f"{where}: frozen_param_fragments"),
        shared=shared,
        global_steps=_number(top.get("global_steps")),
        dp_world=_number(top.get("dp_world_size")),
        version=str(top.get("ds_version", "")),
        experts=experts,
        data_before_experts=_data_before_experts(config),
        autoep=layers,
        pipeline=pipeline,
        mp_world=mp_world,
        degrees=_degrees(top.get("checkpoint_parallel_dimensions")),
        fp32_masters=_fp32_masters(config),
        zenflow=bool(zero.get("zenflow")),
        quantised=bool(zero.get("zero_quantized_nontrainable_weights")),
        universal=top.get("universal_checkpoint_info"),
        client=client,
        opaque=opaque,
    )


def _data_before_experts(config: Mapping[object, object]) -> bool:
    return config.get("use_data_before_expert_parallelism") is True


def _fp32_masters(config: Mapping[object, object]) -> bool:
    """Whether it is there (it may be but a path), and no option makes the masters 16-bit."""
    halves = (
        _dict(config.get(key)).get(f"{name}_master_weights_and_grads")
        for key, name in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"))
    )
    return bool(config) and not any(halves)


def _dict(value: object) -> Mapping[object, object]:
    """The value, if it is a dict: a client's ds_config may be anything."""
    return value if isinstance(value, dict) else {}


def _client(top: Mapping[object, object]) -> tuple[dict[str, JSON], tuple[str, ...]]:
    """The caller's own keys: those whose values are plain, and the names of the others."""
    plain: dict[str, JSON] = {}
    opaque = []
    for key, value in top.items():
        if key in _ENGINE_KEYS:
            continue
        try:
            plain[str(key)] = _plain(value)
        except TypeError:
            opaque.append(str(key))
    return plain, tuple(opaque)


def _plain(value: object) -> JSON:
    """A value as JSON spells it; TypeError for one it cannot."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _plain(v) for k, v in value.items()}
    raise TypeError


def _degrees(value: object) -> tuple[int, int] | None:
    """Pipeline stages and tensor-parallel ranks of `checkpoint_parallel_dimensions`; older files lack it."""
    if not isinstance(value, dict):
        return None
    pp, tp = (_number(value.get(key)) for key in ("pp_degree", "tp_degree"))
    return None if pp is None or tp is None else (pp, tp)


def _stage(value: object, where: str) -> int | None:
    if isinstance(value, Inert):  # ZeroStageEnum(n)
        value = value.args[0] if len(value.args) == 1 else value
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3):
        return value
    raise SourceError(f"{where}: zero_stage {value!r} is no stage of 0 to 3")


def _step(moments: object) -> Tensor | int | None:
    """The first step the optimizer tells of: with a parameter's moments (torch's, DeepSpeed's; not all have
    one under Muon), else with a group's options (DeepSpeed's older FusedAdam)."""
    table = moments if isinstance(moments, dict) else {}
    state, groups = table.get("state"), table.get("param_groups")
    kept = list(state.values()) if isinstance(state, dict) else []
    for place in kept + groups if isinstance(groups, list) else kept:
        step = place.get("step") if isinstance(place, dict) else None
        if isinstance(step, Tensor) and step.numel == 1:
            return step
        if (number := _number(step)) is not None:
            return number
    return None


def _held(value: object) -> tuple[Mapping[object, object], ...] | None:
    """`param_slice_mappings`, of which only the names are used."""
    if not isinstance(value, list) or not all(isinstance(group, dict) for group in value):
        return None
    return tuple(value)


def _ranks(value: object, where: str) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    groups = [mapping(group, where) for group in listing(value, where)]
    return tuple(integers(group.get("partition_ranks"), where, bits=20) for group in groups)


def _alignment(value: object, where: str) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    return tuple(integers(group, where) for group in listing(value, where))


def _strings(value: object, where: str) -> list[str]:
    out = []
    for name in listing(value, where):
        if not isinstance(name, str):
            raise SourceError(f"{where}: wanted names, got {type_name(name)}")
        out.append(name)
    return out


def _names(value: dict[object, object], where: str) -> dict[str, object]:
    """The value itself, whose keys are names."""
    if not _all_named(value):
        odd = next(key for key in value if not isinstance(key, str))
        raise SourceError(f"{where}: wanted names, got {type_name(odd)}")
    return value


def _all_named(value: dict[object, object]) -> TypeGuard[dict[str, object]]:
    return all(isinstance(key, str) for key in value)


def _pairs(value: object, where: str) -> dict[str, str]:
    named = _names(mapping(value, where), where)
    return dict(zip(named, _strings(list(named.values()), where), strict=True))


def _shapes(value: object, where: str) -> dict[str, Shape]:
    """Name -> shape; equal shapes are one tuple."""
    known: dict[Shape, Shape] = {}
    out = {}
    for name, shape in _names(mapping(value, where), where).items():
        checked = integers(shape, f"{where}: {name}")
        out[name] = known.setdefault(checked, checked)
    return out


def _but_stacks(
    read: Callable[[object, str], dict[str, Value]], value: object, layers: AutoEp | None, where: str
) -> dict[str, Value] | None:
    """What is frozen, by name, but for AutoEP's stacks: a set of ranks has a part of them here, and all lies
    in the experts' files."""
    if value is None:
        return None
    return {n: v for n, v in read(value, where).items() if layers is None or n not in layers.stacks}


def _tensors(value: object, where: str) -> dict[str, Tensor]:
    named = _names(mapping(value, where), where)
    return {name: _tensor(t, f"{where}: {name}") for name, t in named.items()}


def _tensor(value: object, where: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise SourceError(f"{where}: wanted a tensor, got {type_name(value)}")
    return value


def _flat(value: object, where: str) -> Tensor:
    t = _tensor(value, where)
    if not t.flat:
        raise SourceError(f"{where}: wanted one dense axis, got shape {t.shape}, stride {t.stride}")
    return t


def _id(flat: Tensor) -> str | None:
    """`ds_id`: the numbers of a sub-group's first and last parameter."""
    said = (flat.attributes or {}).get("ds_id")
    return said if isinstance(said, str) and _ID.fullmatch(said) else None


def _no_doubles(groups: Sequence[Mapping[str, Shape]], where: str) -> None:
    if len(groups) < 2:
        return
    seen: dict[str, int] = {}
    for g, group in enumerate(groups):
        for name in group:
            if name in seen:
                raise SourceError(f"{where}: param_shapes names {name} in groups {seen[name]} and {g}")
            seen[name] = g


def _number(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
