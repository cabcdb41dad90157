"""`vllm`: vLLM's model format, the state dict of one rank after its load_weights.

Matrices are [out, in]. q, k and v are one `qkv_proj` [q_r; k_r; v_r], gate and up one `gate_up_proj` [gate_r;
up_r], experts `w13_weight` [experts, gate_r; up_r, hidden] and `w2_weight` [experts, hidden, width / tp];
latent attention cuts what follows the low ranks, whose matrices are one `fused_qkv_a_proj`, whole on every
rank, as is an indexer, of which k and the heads' weights are one `wk_weights_proj`; Mamba's
mixers are cut by heads and groups; the vocabulary is padded with zero rows, then cut. Source: vLLM's
layers/linear.py, vocab_parallel_embedding.py, fused_moe/layer.py, mamba/mamba_mixer2.py and models/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np

from ... import dtypes
from ...dtypes import DType
from ...errors import LayoutError
from ...mixers import Attention, Mla, Queries
from ...model import BlockStacks, Experts, Layer, Mlp, Model, PerLayer, Sizes, Stacks, Tower
from ...placement import Placement
from ...roles import Linear, Parameter
from ...stored import constant
from ...target import Target
from ...views import View, cat, stack, zeros
from ..cuts import biases_of, in_part, joined, out_part, padded_part
from ..engines import HUB, Form, Renamed, Served, known, served
from ..hub_form import bias, in_form, norm, out_by_in, parameter
from ..naming import Naming
from ..padding import advice, padded, resized, round_up
from ..requirements import (
    Subject,
    require_alike,
    require_delta,
    require_even,
    require_heads,
    require_known,
    require_least,
    require_mamba,
    require_pad,
    require_subjects,
)
from ..servers import Share, expert_share, layer_range
from .attention import attention_part, heads_part, mixer_part, parent
from .families import APART, CARRIED, RENAMED, ROWS, TOWERS, WHOLE


@dataclass(frozen=True, slots=True)
class Vllm:
    """`vocab_padding`: the vocabulary is padded to a multiple of it (vLLM's DEFAULT_VOCAB_PADDING_SIZE).
    `pad`: heads and widths that do not divide by tp are padded with zeros (layouts/padding.py), each rank's
    width to a multiple of `multiple`. `experts`: which experts a rank holds under expert parallelism, a run
    of them or every ep-th. `gate_up`: the order within `w13_weight`; "up_gate" is what some kernels and
    SGLang's loaders want (where the hub stores gate and up in turn, they stay so). `tower`: an image tower is
    cut by tp, or whole on every rank (vLLM's mm_encoder_tp_mode "data"). `engine`: a version in
    layouts/engines.py, such as "vllm==0.32": the output then has every tensor that version holds, under its
    names, so that its sharded_state loader takes it; "" leaves the hub's names."""

    vocab_padding: int = 64
    pad: bool = False
    multiple: int = 1
    experts: Literal["linear", "round_robin"] = "linear"
    gate_up: Literal["gate_up", "up_gate"] = "gate_up"
    tower: Literal["cut", "whole"] = "cut"
    engine: str = ""
    roles: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        require_least("vllm", self, 1, "multiple", "vocab_padding")
        require_pad("vllm", self.pad, self.multiple)
        if self.engine:
            known(self.engine)
        if self.engine and (self.vocab_padding, self.gate_up) != (64, "gate_up"):
            raise LayoutError(
                f"layout vllm: engine {self.engine} wants vocab_padding 64 and gate_up gate_up, "
                f"got {self.vocab_padding} and {self.gate_up}"
            )

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied lm_head is the embedding's parameter and left out.

        With pp a stage holds a range of layers, the first the embedding, the last the final norm and lm_head
        (and the embedding it is tied to). With dp every group of tp ranks holds the same, but for experts:
        all tp * dp ranks cut their widths, or with ep = tp * dp share them out.

        Raises LayoutError, before the first target, where heads, a feed-forward width or the padded
        vocabulary do not divide, where kv heads neither divide nor repeat evenly, for more stages than
        layers, for another ep, for a model that is no decoder, and for a family or a pipeline that the
        engine's table lacks."""
        engine = HUB
        if self.engine:
            engine = served(self.engine, model.family, model.quant_method, model.architecture)
            self._require_engine(engine, model, placement)
        self._require_subjects(model, placement)
        model = self._padded(model, placement)
        instead = "" if self.pad else advice(model)
        share = expert_share("vllm", placement, model.sizes, instead)
        stage = layer_range("vllm", placement, len(model.layers))
        self._require_even(model, placement, instead)
        _require_decoder(model)
        if model.tower is not None:
            _require_tower(model, model.tower, self._around(placement))
        renamed = RENAMED.get(model.family, ())
        targets = self._targets(model, placement, share, stage, engine)
        dtype = model.embedding.weight.dtype
        named = (_named(t, renamed, engine, dtype) for t in targets)
        return _in_form(named, engine.form(model.quant_method), dtype)

    def _require_subjects(self, model: Model, placement: Placement) -> None:
        own = (isinstance(x.mlp, Experts) and x.mlp.stacks is None for x in model.layers)
        require_subjects(
            "vllm",
            self,
            {
                "experts": Subject(lambda: placement.ep > 1, f"ep above 1, got {placement.ep}"),
                "gate_up": Subject(lambda: any(own), f"experts of gate and up, which {model.family} has not"),
                "tower": Subject(lambda: model.family in WHOLE, f"one of {', '.join(sorted(WHOLE))}"),
            },
        )

    def _require_even(self, model: Model, placement: Placement, instead: str) -> None:
        """Raises LayoutError for a size that does not divide; `instead`: the way out."""
        sizes = model.sizes
        require_heads("vllm", placement, sizes, instead)
        require_delta("vllm", placement, sizes.delta)
        require_mamba("vllm", placement, sizes.mamba)
        require_even("vllm", placement, "the number of a convolution's channels", sizes.channels)
        require_even("vllm", placement, "the number of groups of compressed attention", sizes.groups)
        for key, width in sizes.widths.items():
            if key != sizes.expert_width:
                require_even("vllm", placement, key, width, instead)
        rows = round_up(sizes.vocab, self.vocab_padding)
        require_even("vllm", placement, f"vocab_size {sizes.vocab}, padded to", rows)
        if model.per_layer is not None:
            table, made = model.per_layer.embedding, model.per_layer.projection
            rows = round_up(table.weight.shape[0], self.vocab_padding)
            require_even("vllm", placement, f"the rows of {table.name}", rows)
            require_even("vllm", placement, f"the outputs of {made.name}", made.weight.shape[0])

    def resized(self, model: Model, placement: Placement) -> Mapping[str, int]:
        """config.json's keys whose numbers change. Raises LayoutError where no key can say a new size."""
        return resized(model.family, model.sizes, self._padded(model, placement).sizes)

    def _padded(self, model: Model, placement: Placement) -> Model:
        if not self.pad:
            return model
        ranks = placement.tp * placement.dp if placement.ep == 1 else 1
        return padded(model, placement.tp, ranks, self.multiple)

    def naming(self, placement: Placement) -> Naming:
        """The file names that vLLM's sharded_state loader looks for, parts counted from 0. They tell only tp
        ranks apart; where there are several stages or data-parallel groups, those are named before."""
        stem = "model-rank"
        if placement.pp > 1 or placement.dp > 1:
            pp = f"-pp-{placement.pp_rank}" if placement.pp > 1 else ""
            dp = f"-dp-{placement.dp_rank}" if placement.dp > 1 else ""
            stem = f"model{pp}{dp}-tp"
        stem = f"{stem}-{placement.tp_rank}"
        return Naming("", f"{stem}-part-0.safetensors", stem + "-part-{part}.safetensors")

    def _require_engine(self, engine: Served, model: Model, placement: Placement) -> None:
        """Raises LayoutError for a pipeline that was not compared, and where the engine ties embedding and
        head otherwise than the model."""
        if placement.pp > 1 and engine.everywhere is None:
            raise LayoutError(
                f"engine {self.engine}: what its pipeline stages hold of {model.family} is not known: wanted "
                f"pp 1, got {placement.pp}"
            )
        reading = (x for x in model.layers if isinstance(x.attention, Queries))
        if placement.pp > 1 and engine.reading and (first := next(reading, None)):
            raise LayoutError(
                f"engine {self.engine}: {first.name} reads the keys of an earlier layer, which vLLM does not "
                f"cut into stages: wanted pp 1, got {placement.pp}"
            )
        if engine.tied != "head" and model.tied is not bool(engine.tied):
            apart, one = "a head of its own", "its embedding as its head"
            got, wanted = (one, apart) if model.tied else (apart, one)
            raise LayoutError(f"engine {self.engine}: {model.family}: wanted {wanted}, got {got}")

    def _targets(
        self, model: Model, placement: Placement, share: Share, stage: range, engine: Served
    ) -> Iterator[Target]:
        everywhere = engine.everywhere or frozenset()
        first, last = placement.pp_rank == 0, placement.pp_rank == placement.pp - 1
        first = first or "embedding" in everywhere
        head = last or "head" in everywhere
        tied = head and model.tied
        if first or tied:
            as_head = tied and engine.tied in ("head", "always")
            module = model.lm_head if as_head else model.embedding
            yield Target(f"{module.name}.weight", self._rows(model.embedding.weight, placement))
        if model.tower is not None:
            yield from _tower(model, model.tower, self._around(placement))
        elif model.family in CARRIED:
            yield from _carried(model, placement)
        if first:
            if model.positions is not None:
                yield Target(f"{model.positions.name}.weight", model.positions.weight)
            yield from norm(model.embedding_norm)
            if model.per_layer is not None:
                yield from self._per_layer(model.per_layer, placement)
        reading = 0
        for i in stage:
            layer = model.layers[i]
            targets = self._layer(layer, model, placement, share, engine)
            if engine.reading and isinstance(layer.attention, Queries):
                targets = _moved(targets, layer.name, f"{engine.reading}.{reading}")
                reading += 1
            yield from targets
        if last or "norm" in everywhere:
            yield from norm(model.norm)
        if head:
            lm = model.lm_head
            if not model.tied:
                yield Target(f"{lm.name}.weight", self._rows(lm.weight, placement))
            if lm.bias is not None:
                yield from bias(Linear(lm.name, lm.weight, self._rows(lm.bias, placement)))

    def _per_layer(self, role: PerLayer, placement: Placement) -> Iterator[Target]:
        yield Target(f"{role.embedding.name}.weight", self._rows(role.embedding.weight, placement))
        yield from out_by_in(out_part(role.projection, placement.tp_rank, placement.tp))
        yield from norm(role.norm)

    def _around(self, placement: Placement) -> Placement:
        """Where the rank stands among those that cut an image tower."""
        return Placement() if self.tower == "whole" else placement

    def _rows(self, view: View, placement: Placement) -> View:
        return padded_part(view, self.vocab_padding, placement.tp_rank, placement.tp)

    def _layer(
        self, layer: Layer, model: Model, placement: Placement, share: Share, engine: Served
    ) -> Iterator[Target]:
        form, as_hub, rates = engine.form(model.quant_method), engine.hub_rows, bool(self.engine)
        require_known("vllm", layer)
        yield from norm(layer.attention_norm)
        if layer.attention is not None:
            yield from attention_part(layer.attention, model, placement, as_hub, rates=rates)
        if isinstance(layer.attention, Attention | Queries | Mla):
            module, own = parent(layer.attention.o.name), model.embedding.weight.dtype
            for held in (*engine.held, *form.held):
                one = constant(np.full(1, held.value, np.float32), dtypes.float32)
                yield Target(f"{module}.{held.name}", one if held.float32 else one.cast(own), held.shape)
        if layer.mamba is not None and model.sizes.mamba is not None:
            yield from mixer_part(layer.mamba, model.sizes.mamba, placement, rates=rates)
        yield from norm(layer.attention_after)
        yield from norm(layer.mlp_norm)
        if isinstance(layer.mlp, Experts):
            yield from self._experts(layer.mlp, placement, share, form, model.family in APART)
        elif layer.mlp is not None:
            yield from _mlp(layer.mlp, placement, as_hub, model.family in APART)
        yield from norm(layer.mlp_after)
        for role in layer.whole:
            yield from parameter(role)

    def _experts(
        self, moe: Experts, placement: Placement, share: Share, form: Form, apart: bool
    ) -> Iterator[Target]:
        yield from out_by_in(moe.router)
        if moe.correction is not None:
            yield Target(moe.correction.name, moe.correction.view.cast(dtypes.float32))
        for linear in moe.latent or ():
            yield from out_by_in(linear)
        held = share.of(len(moe.experts), self.experts)
        if moe.stacks is not None:
            yield from _stacks(moe.name, moe.stacks, held, share)
        else:
            mlps = [moe.experts[e] for e in held]
            if form.marlin:
                _require_marlin(mlps[0].up)
            biased = form.biased and bool(mlps[0].up.beside)
            downs = [in_part(mlp.down, share.index, share.count) for mlp in mlps]
            for part, linears in (
                ("w13", [self._pair(mlp, share) for mlp in mlps]),
                ("w2", [_once(x, share) for x in downs]),
            ):
                yield from _stacked(f"{moe.name}.{part}", linears)
                if biased and linears[0].bias is None:
                    none = zeros((len(linears), linears[0].shape[0]), dtypes.float32)
                    yield Target(f"{moe.name}.{part}_bias", none)
        if moe.shared is not None:
            yield from _mlp(moe.shared, placement, apart=apart)
        if moe.shared_gate is not None:
            yield from out_by_in(moe.shared_gate)

    def _pair(self, mlp: Mlp, share: Share) -> Linear:
        both = [out_part(x, share.index, share.count) for x in (mlp.gate, mlp.up) if x is not None]
        return joined(mlp.up.name, both if self.gate_up == "gate_up" else both[::-1])


def _moved(targets: Iterable[Target], layer: str, to: str) -> Iterator[Target]:
    """The tensors of a layer, which an engine holds as `to` beside the module of the layers."""
    module = f"{parent(parent(layer))}.{to}"
    return (Target(module + t.name.removeprefix(layer), t.view, t.shape) for t in targets)


def _require_decoder(model: Model) -> None:
    alone = model.carried and model.tower is None and model.family not in CARRIED
    if model.encoder is not None or alone or not model.causal:
        what = model.carried[0].name if model.carried else "the encoder"
        raise LayoutError(f"layout vllm has no place for {what} of {model.family}, which is no decoder")


def _require_tower(model: Model, tower: Tower, placement: Placement) -> None:
    """Raises LayoutError for a pooling head, and for what tp cuts and does not divide."""
    for role in model.carried:
        if ".head." in role.name:
            raise LayoutError(f"layout vllm has no place for {role.name}")
    unlike = TOWERS.get(model.family, frozenset())
    if "attention" not in unlike:
        require_heads("vllm", placement, tower.sizes)
    for key, width in tower.sizes.widths.items():
        require_even("vllm", placement, key, width)
    for merger in () if "mergers" in unlike else tower.mergers:
        require_even("vllm", placement, f"{merger.up.name}'s width", merger.up.shape[0])
    for role in model.carried:
        if role.name in ROWS.get(model.family, ()):
            require_even("vllm", placement, f"{role.name}'s rows", role.view.shape[0])


def _tower(model: Model, tower: Tower, placement: Placement) -> Iterator[Target]:
    """The tower up to the last layer whose output is read, its mergers, and what lies around them."""
    unlike = TOWERS.get(model.family, frozenset())
    for i in range(tower.read):
        layer = tower.layers[i]
        if not isinstance(layer.attention, Attention) or not isinstance(layer.mlp, Mlp):
            raise LayoutError(f"layout vllm has no place for {layer.name}")
        yield from norm(layer.attention_norm)
        yield from _tower_attention(layer.attention, tower.sizes, placement, unlike)
        yield from norm(layer.mlp_norm)
        yield from _mlp(layer.mlp, placement)
    for merger in tower.mergers:
        if "mergers" in unlike:
            yield from out_by_in(merger.up)
            yield from out_by_in(merger.down)
        else:
            yield from _mlp(merger, placement)
    yield from _carried(model, placement)


def _carried(model: Model, placement: Placement) -> Iterator[Target]:
    """What is in no layer of a tower, or all of one that vLLM does not cut."""
    for role in model.carried:
        cut = role.name in ROWS.get(model.family, ())
        yield Target(role.name, role.view.part(0, placement.tp_rank, placement.tp) if cut else role.view)


def _tower_attention(
    attention: Attention, sizes: Sizes, placement: Placement, unlike: frozenset[str]
) -> Iterator[Target]:
    rank, tp = placement.tp_rank, placement.tp
    apart = (attention.q, attention.k, attention.v)
    if "attention" in unlike:
        for linear in (*apart, attention.o):
            yield from out_by_in(linear)
    elif "rows" in unlike:
        yield from out_by_in(out_part(joined(attention.fused or "", apart), rank, tp))
        yield from out_by_in(in_part(attention.o, rank, tp))
    else:
        yield from heads_part(attention, sizes, placement)


def _named(target: Target, renamed: Renamed, engine: Served, own: DType) -> Target:
    """The target under vLLM's name for its module, then under the engine's for the tensor."""
    name, view = f"^{target.name}", target.view
    for old, new in renamed:
        name = name.replace(old, new)
    name = engine.name(name.removeprefix("^"))
    if (held := engine.dtype(name, own)) is not None:
        view = view.as_stored().cast(held)
    return target if name == target.name and view is target.view else Target(name, view, target.shape)


def _in_form(targets: Iterable[Target], form: Form, own: DType) -> Iterator[Target]:
    """Those tensors of a quantised model that the engine holds, each in the dtype it has there."""
    for target in targets:
        if any(fnmatchcase(target.name, pattern) for pattern in form.rounded):
            yield Target(target.name, target.view.as_stored().cast(own), target.shape)
        elif not any(fnmatchcase(target.name, pattern) for pattern in form.absent):
            yield target


def _require_marlin(linear: Linear) -> None:
    """Raises LayoutError for an expert whose sizes make vLLM hold it in another form, for a slower kernel."""
    scales = linear.part("scales")
    if scales is not None and (linear.shape[1] % 128 or scales.unit[1] not in (0, 32, 64, 128)):
        raise LayoutError(
            f"layout vllm: {linear.name} of {linear.shape[1]} inputs in groups of {scales.unit[1]}: how vLLM "
            "holds experts that its Marlin kernel does not take is not known: wanted a multiple of 128 "
            "inputs, and groups of 32, 64, 128 or all"
        )


def _stacked(name: str, linears: Sequence[Linear]) -> Iterator[Target]:
    """The experts' matrices of one kind as a stack, and stacks of their biases and of what is beside them."""
    first = linears[0]
    require_alike("vllm", name, linears)
    for b in first.beside:
        if b.leaf == "input_scale" and b.view.numel > 1:
            raise LayoutError(
                f"layout vllm: {name}_{b.leaf}: vLLM keeps one for gate and up: arithmetic on values"
            )
    quantised = [[x.beside[k] for x in linears] for k in range(len(first.beside))]
    for suffix, views in (
        (first.leaf, [x.weight.T if first.beside and x.transposed else x.weight for x in linears]),
        ("bias", biases_of(name, linears)),
        *((some[0].leaf, [in_form(b) for b in some]) for some in quantised),
    ):
        if views:
            yield Target(f"{name}_{suffix}", stack(views))
    if first.whole is not None:
        whole = np.array([x.whole for x in linears], np.float32)
        yield Target(f"{name}_weight_shape", constant(whole, dtypes.float32))


def _once(linear: Linear, share: Share) -> Linear:
    """The ranks' results of an expert are summed, so one rank holds its bias and the others zeros."""
    bias = linear.bias
    return replace(linear, bias=zeros(bias.shape, bias.dtype)) if bias is not None and share.index else linear


def _stacks(name: str, stacks: Stacks | BlockStacks, held: range, share: Share) -> Iterator[Target]:
    """gpt-oss's experts, gate and up alternating, as its kernels want them; matrices are [out, in], in mxfp4
    two values a byte with their exponents beside."""

    def of(role: Parameter, axis: int) -> View:
        view = cat([role.view.narrow(0, e, 1) for e in held])
        if view.shape[axis] % share.count:
            raise LayoutError(
                f"layout vllm: {role.name}: {view.shape[axis]} groups do not divide by {share.count} ranks"
            )
        return view.part(axis, share.index, share.count)

    if isinstance(stacks, BlockStacks):
        yield Target(f"{name}.w13_weight", of(stacks.gate_up, 1).merge(2))
        yield Target(f"{name}.w13_weight_scale", of(stacks.gate_up_scales, 1))
        yield Target(f"{name}.w13_bias", of(stacks.gate_up_bias, 1))
        yield Target(f"{name}.w2_weight", of(stacks.down, 2).merge(2))
        yield Target(f"{name}.w2_weight_scale", of(stacks.down_scales, 2))
    else:
        yield Target(f"{name}.w13_weight", of(stacks.gate_up, 2).permute((0, 2, 1)))
        yield Target(f"{name}.w13_bias", of(stacks.gate_up_bias, 1))
        yield Target(f"{name}.w2_weight", of(stacks.down, 1).permute((0, 2, 1)))
    bias = cat([stacks.down_bias.view.narrow(0, e, 1) for e in held])
    yield Target(f"{name}.w2_bias", zeros(bias.shape, bias.dtype) if share.index else bias)  # added once


def _mlp(mlp: Mlp, placement: Placement, as_hub: bool = False, apart: bool = False) -> Iterator[Target]:
    rank, tp = placement.tp_rank, placement.tp
    if mlp.gate is None or apart:
        for linear in (mlp.gate, mlp.up):
            if linear is not None:
                yield from out_by_in(out_part(linear, rank, tp))
    elif as_hub and mlp.fused is not None:
        yield from out_by_in(out_part(joined(mlp.fused, [mlp.gate, mlp.up]), rank, tp))
    else:
        name = mlp.fused or f"{parent(mlp.up.name)}.gate_up_proj"
        both = (mlp.up, mlp.gate) if mlp.up_first else (mlp.gate, mlp.up)
        yield from out_by_in(joined(name, [out_part(x, rank, tp) for x in both]))
    yield from out_by_in(in_part(mlp.down, rank, tp))
    for role in mlp.scalars:
        yield from parameter(role)
