"""Recipe and layout, found for what was asked and joined: how a placement's targets are made.

Law: what shapes an output byte beside the checkpoint stands in `options`, which the plan's key digests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .. import layouts, recipes
from ..checkpoint import JSON, Cast, Checkpoint
from ..computed import prequantised, quantised_sources
from ..digest import values_digest
from ..dtypes import DType, float32
from ..errors import LayoutError, RecipeError
from ..layouts import Adapts, ByNames, ByRoles, Layout, Resizes
from ..layouts.naming import Naming
from ..layouts.patterns import Patterns
from ..model import Model, Sizes
from ..placement import Placement
from ..quantisation import quantised_config
from ..quantisation.quantised_targets import Expansion
from ..quantisation.schemes import SCHEMES, Quant, said_of
from ..recipes import strangers
from ..target import Target
from . import configs
from .request import Request

if TYPE_CHECKING:
    from ..computed.adapters import Adapter


@dataclass(frozen=True, slots=True)
class Resolved:
    """How to make a placement's targets, and name their files.

    `name`: the layout's. `checkpoint`: what they are made of, cast and merged as asked. `config`, `aliases`,
    `options`, `notes`: see `plans.Plan`. `ours`: recipe and layout are this package's. `expansion`: how
    targets are quantised."""

    name: str
    checkpoint: Checkpoint
    targets: Callable[[Placement], Iterator[Target]]
    naming: Callable[[Placement], Naming]
    config: bytes | None
    aliases: Mapping[str, str]
    options: Mapping[str, JSON]
    notes: tuple[str, ...]
    ours: bool
    expansion: Expansion | None = None


def resolve(ckpt: Checkpoint, request: Request, *, to_files: bool) -> Resolved:
    """The road that was asked for. Raises RecipeError, LayoutError or ViewError where there is none."""
    if request.dense:
        ckpt, request = _densified(ckpt, request)
    if request.config is None and ckpt.config is not None and (ckpt.unpadded or ckpt.config_file is None):
        request = replace(request, config=ckpt.config)  # there is none beside, or that of padded shards
    layout = _layout(request)
    if layout.roles and request.adapter is None and (why := strangers.adapted([*ckpt.entries])):
        raise RecipeError(f"{ckpt.path}: {why}")
    config = None
    if layout.roles or request.config is not None or request.dtype == "auto":
        config = configs.found(ckpt, request.config)
    dtype = configs.dtype(config, request.dtype)
    if to_files:
        configs.require_scales(dtype)
    adapter = None
    if request.adapter is not None:
        from ..computed import adapters

        told = config or ckpt.config or {}
        adapter = adapters.fit(ckpt, os.fspath(request.adapter), partial(recipes.saved_as, told), told)
        ckpt = _adapted(adapter, layout, request, dtype)
    if dtype is not None:
        quantised_sources.require_as_stored(ckpt, dtype, scales=not layout.roles)
        ckpt = replace(ckpt, entries=Cast(ckpt.entries, dtype))
    options = _options(layout, request, dtype, adapter)
    if not layout.roles:
        return _by_names(ckpt, layout, request, config, options)
    assert config is not None
    return _by_roles(ckpt, layout, request, config, options, adapter, dtype)


def _densified(ckpt: Checkpoint, request: Request) -> tuple[Checkpoint, Request]:
    """The checkpoint with its quantised matrices as dense ones, and a config that does not speak of them."""
    if request.adapter is not None:
        raise LayoutError("quant none: an adapter is merged into what is dense already; write that first")
    config = None if request.config is None and ckpt.config is None else configs.found(ckpt, request.config)
    ckpt, dense_config = quantised_sources.densified(ckpt, config, configs.dtype(config, request.dtype))
    return ckpt, replace(request, config=dense_config)


def _layout(request: Request) -> Layout:
    layout = layouts.chosen(request.layout)
    if request.tp_plan is None:
        return layout
    if _name(layout) != "hf":
        raise LayoutError(f"tp_plan goes with layout hf, not {_name(layout)}")
    return Patterns(request.tp_plan)


def _name(layout: Layout) -> str:
    if isinstance(layout, Patterns):
        return "hf"
    return layouts.name_of(type(layout)) or type(layout).__name__.lower()


def _ours(layout: Layout) -> bool:
    """Whether the key of a kept plan knows the layout's code."""
    return type(layout) is Patterns or layouts.name_of(type(layout)) is not None


def _adapted(adapter: Adapter, layout: Layout, request: Request, dtype: DType | None) -> Checkpoint:
    """The checkpoint with the adapter merged, or, where it is kept apart, what is cut as its base is."""
    from ..computed import adapter_shards, adapters

    if not request.apart:
        # What is cast to a module's dtypes at the end is not rounded before.
        return adapters.merged(adapter, float32 if request.only is not None else dtype)
    fits = _name(layout) == "hf" or isinstance(layout, Adapts)
    if not fits or request.tp_plan or request.quant:
        raise LayoutError(
            "an adapter is kept apart in layouts hf and rtp_llm alone, as it is: no tp_plan, no quant "
            "(vLLM cuts adapters itself: it takes that of layout hf at tp 1)"
        )
    return adapter_shards.hollow(adapter, dtype)


def _options(
    layout: Layout, request: Request, dtype: DType | None, adapter: Adapter | None
) -> dict[str, JSON]:
    """What shapes the output, as the record repeats it."""
    quant = request.quant
    out: dict[str, JSON] = {
        "layout": _name(layout),
        "layout_options": repr(layout),
        "layout_fields": dict(layouts.options_of(layout)),
        "tp_plan": None if request.tp_plan is None else dict(request.tp_plan),
        "dtype": None if dtype is None else dtype.name,
        "max_shard_size": request.max_shard_size,
        "vocab_size": request.vocab_size,
        "sorted": request.sorted,
        "weights_key": request.weights_key,
        "client_state": None if request.client_state is None else dict(request.client_state),
    }
    if quant is not None:
        include, exclude = quant.include, quant.exclude
        out["quant"] = {"scheme": quant.scheme.name, "include": [*include], "exclude": [*exclude]}
        if quant.scheme != SCHEMES.get(quant.scheme.name):
            out["scheme"] = repr(quant.scheme)  # the caller's own, whatever its name
    if request.dense:
        out["dense"] = True
    if adapter is not None:
        out["adapter"] = ["apart" if request.apart else "merged", *adapter.digests()]
    return out


# ---- by the checkpoint's names ----


def _by_names(
    ckpt: Checkpoint,
    layout: ByNames,
    request: Request,
    config: Mapping[str, JSON] | None,
    options: Mapping[str, JSON],
) -> Resolved:
    if request.vocab_size is not None:  # the config would say it, and no tensor would be cut
        raise LayoutError(f"vocab_size goes with layouts that read roles, not {_name(layout)}")
    if request.recipe not in (None, ckpt.recipe):  # nor did it join the shards
        raise LayoutError(f"recipe goes with layouts that read roles, not {_name(layout)}")
    if ckpt.config is not None and (request.quant is not None or request.dtype is not None):
        config = configs.found(ckpt, request.config)
    unused = layout.unused(ckpt) if isinstance(layout, Patterns) else []
    missed = [f"tp_plan: no tensor matches {', '.join(unused)}"] if unused else []
    resolved = Resolved(
        _name(layout),
        ckpt,
        partial(layout.targets, ckpt),
        layout.naming,
        configs.text(config, request),
        ckpt.aliases,
        options,
        (*ckpt.notes, *missed),
        _ours(layout),
    )
    return _quantising(resolved, request, config, None)


# ---- by roles ----


def _by_roles(
    ckpt: Checkpoint,
    layout: ByRoles,
    request: Request,
    config: Mapping[str, JSON],
    options: dict[str, JSON],
    adapter: Adapter | None,
    dtype: DType | None,
) -> Resolved:
    name, quant = _name(layout), request.quant
    asked = ckpt.recipe if request.recipe is None else request.recipe
    recipe = recipes.find(config) if asked is None else recipes.named(asked)
    engine = str(dict(layouts.options_of(layout)).get("engine") or "")
    if quant is not None and prequantised.fits(name, engine, ckpt, quant):
        _require_dense(quant, request, layout.naming(request.placement), config)
        ckpt, config = prequantised.made(ckpt, config, quant)
        request = replace(request, config=config, quant=None)
        options["prequantised"] = options.pop("quant")  # the shards can be joined, as quantised ones
    try:
        model = recipes.model(recipe, ckpt, config, request.vocab_size)
    except RecipeError as error:
        if "prequantised" not in options:
            raise
        raise RecipeError(f"layout {name}, which places what is quantised: {error}") from error
    options["family"] = model.family
    options["recipe"] = asked
    options["config"] = values_digest(dict(config))
    resized = layout.resized(model, request.placement) if isinstance(layout, Resizes) else {}
    changed = quantised_config.served_config(config, ckpt.entries) if engine else {}
    if name == "rtp_llm":
        changed = configs.older(config, dtype)
    if resized or changed:
        options["resized"] = {key: config.get(key) for key in (*configs.sized(config, resized), *changed)}
    resolved = Resolved(
        name,
        ckpt,
        partial(layout.targets, model),
        layout.naming,
        configs.text(config, request, resized, changed),
        _tied(model, adapter, request),
        options,
        (*ckpt.notes, *_notes_of(model, name, resized)),
        _ours(layout) and (config.get("model_type") if asked is None else asked) in recipes.TYPES,
    )
    if adapter is not None and request.apart:
        return _thin(resolved, layout, model, adapter, dtype)
    return _quantising(resolved, request, config, model.sizes)


def _notes_of(model: Model, layout: str, resized: Mapping[str, int]) -> Iterator[str]:
    """What the user should know of a model in a layout."""
    if len(model.predictions) and layout != "hf":
        yield f"layout {layout} leaves out the layers of multi-token prediction"
    if resized:
        yield f"padded; config.json says so: {', '.join(f'{k} {n}' for k, n in resized.items())}"
    if model.ignored:
        yield f"left out, known to {model.family}: {', '.join(model.ignored)}"


def _tied(model: Model, adapter: Adapter | None, request: Request) -> dict[str, str]:
    """The aliases of a model. Raises LayoutError where an adapter unties them."""
    if not model.tied:
        return {}
    head, embedding = f"{model.lm_head.name}.weight", f"{model.embedding.name}.weight"
    if adapter is not None and not request.apart and adapter.changed & {head, embedding}:
        raise LayoutError(
            f"adapter: {head} and {embedding} are one tensor, and it changes one of "
            "them; a base that has both, with tie_word_embeddings false, has a place for it"
        )
    return {head: embedding}


def _thin(
    resolved: Resolved, layout: ByRoles, model: Model, adapter: Adapter, dtype: DType | None
) -> Resolved:
    """The adapter alone: where each rank holds its part of the base, or as a layout has names for it."""
    from ..computed import adapter_shards

    alone = replace(resolved, config=None, aliases={})
    if not isinstance(layout, Adapts):
        return replace(
            alone,
            targets=lambda p: adapter_shards.cut(resolved.targets(p), adapter, dtype),
            naming=lambda p: _adapter_naming(resolved.naming(p)),
        )
    # Its scale is in it, so that PEFT's config does not go beside it.
    return replace(
        alone,
        checkpoint=replace(resolved.checkpoint, beside=()),
        targets=lambda p: adapter_shards.by_roles(partial(layout.adapted, model, p), adapter, dtype),
        naming=layout.adapted_naming,
    )


def _adapter_naming(of_base: Naming) -> Naming:
    """The names of an adapter's files, as PEFT calls them, where a base has those."""
    part = "adapter_model-{part:05d}-of-{parts:05d}.safetensors"
    return replace(of_base, single="adapter_model.safetensors", part=part, index=None)


# ---- quantised on the way ----


def _quantising(
    resolved: Resolved, request: Request, config: Mapping[str, JSON] | None, sizes: Sizes | None
) -> Resolved:
    """With what `request.quant` asks for, told in the config too."""
    quant = request.quant
    if quant is None:
        return resolved
    _require_dense(quant, request, resolved.naming(request.placement), config)
    text = resolved.config
    if config is not None and text is None:
        text = json.dumps(dict(config)).encode()
    whole = partial(resolved.targets, Placement())
    expansion = Expansion(quant, resolved.name, request.placement, whole, sizes)
    return replace(resolved, config=text, expansion=expansion)


def _require_dense(quant: Quant, request: Request, naming: Naming, config: Mapping[str, JSON] | None) -> None:
    """Raises LayoutError where the output, or the source as its config has it, cannot be quantised."""
    if request.only is not None or naming.single.endswith(".bin"):
        raise LayoutError(f"quant {quant.scheme.name}: wanted safetensors or fresh tensors as the output")
    if config is not None and said_of(config) is not None:
        raise LayoutError(
            f"quant {quant.scheme.name}: the config says that the source is quantised already"
            f"{quantised_sources.instead(config)}"
        )
