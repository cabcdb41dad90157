"""A Megatron checkpoint and a config: the hub's model that those parts are of.

What lies where is layout `megatron`'s to say, read backwards (`uniting`); its options are what the run's args
and the names say. Law: config and args agree in every size that shapes do not show, and every part has the
name and shape the layout makes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from .. import recipes
from ..checkpoint import JSON, Checkpoint
from ..dtypes import float32
from ..errors import SourceError
from ..layouts.megatron import Megatron
from ..mixers import Attention
from ..model import Model
from ..paths import is_directory
from ..placement import Placement
from ..planning import configs
from ..sources.assembly import neighbours
from .uniting import phantom_of, whole_of

INTERLEAVED = ("chatglm", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium", "llama4_text")
"""Families whose rotary positions turn neighbouring elements, as Megatron's do with rotary_interleaved."""

Config = str | os.PathLike[str] | Mapping[str, JSON] | None


def join(ckpt: Checkpoint, recipe: str | None, config: Config) -> Checkpoint:
    """The model under the hub's names, as `config`, or the one beside the checkpoint, gives them.

    Without either, the tensors of one rank as they are. Raises SourceError where config and args contradict
    each other, where the parts are not what such a model has, and for parts of several ranks without a
    config; RecipeError and LayoutError for a model that has no place in Megatron."""
    args, grid = ckpt.saved.args or {}, ckpt.saved.grid
    if config is None and ckpt.config is None:
        if grid.world == 1:
            return ckpt
        raise SourceError(
            f"{ckpt.path}: parts of {grid.world} ranks, and no config.json beside them, which says "
            "what model they are of: config= (--config)"
        )
    hub_config = configs.found(ckpt, config)
    find = recipes.find(hub_config) if recipe is None else recipes.named(recipe)
    imagined = recipes.imagined(find, hub_config)
    phantom = phantom_of(ckpt, {name: (float32, shape) for name, shape in imagined.items()}, {})
    model = find(phantom, hub_config)
    notes = (*ckpt.notes, *_checked(ckpt.path, model, hub_config, args))
    before = "0/" if grid.world == 1 else ""
    named = {before + name: entry for name, entry in ckpt.entries.items()}
    beside = ckpt.beside
    if isinstance(config, str | os.PathLike) and is_directory(config):
        beside = neighbours([os.fspath(config), *dict.fromkeys(os.path.dirname(f.path) for f in ckpt.beside)])
    shards = replace(ckpt, entries=named, config=hub_config, beside=beside, recipe=recipe, notes=notes)
    found = whole_of(shards, phantom, model, _layout(shards, args, grid), grid)
    return replace(found, format="megatron model")


def _layout(shards: Checkpoint, args: Mapping[str, JSON], grid: Placement) -> Megatron:
    """How this run cut its model. Rows of the vocabulary: as many as there are."""
    words = shards.entries.get("0/embedding.word_embeddings.weight")
    return Megatron(
        vocab_padding=max(words.shape[0] if words else 1, 1),
        spec="transformer_engine" if any(".layer_norm_" in n for n in shards.entries) else "local",
        experts="sequential" if any(".local_experts." in n for n in shards.entries) else "grouped",
        expert_tp=grid.tp * grid.dp // grid.ep if "num_experts" in args else 0,
        zero_centered_gamma=args.get("apply_layernorm_1p") is True,
    )


def _checked(path: str, model: Model, config: Mapping[str, JSON], args: Mapping[str, JSON]) -> Iterator[str]:
    """Notes on what config and args say. Raises SourceError where they contradict each other."""
    if not args:
        yield "the checkpoint has no args: heads, groups and rotary positions are as the config says"
        return
    sizes = model.sizes
    heads = args.get("num_attention_heads")
    expert = sizes.widths.get(sizes.expert_width)
    dense = [n for key, n in sizes.widths.items() if key not in (sizes.expert_width, sizes.shared_width)]
    wanted: list[tuple[str, JSON, str, JSON]] = [
        ("num_layers", args.get("num_layers"), "layers", len(model.layers)),
        ("hidden_size", args.get("hidden_size"), "hidden size", sizes.hidden),
        ("num_attention_heads", heads, "attention heads", sizes.heads),
        ("num_experts", args.get("num_experts", 0), "experts", sizes.experts),
        ("moe_ffn_hidden_size", args.get("moe_ffn_hidden_size"), "width of an expert", expert),
        *(("ffn_hidden_size", args.get("ffn_hidden_size"), "width", width) for width in dense),
        (
            "untie_embeddings_and_output_weights",
            args.get("untie_embeddings_and_output_weights"),
            "an output layer of its own",
            not model.tied,
        ),
        (
            "rotary_interleaved",
            args.get("rotary_interleaved", False),
            "rotary positions of neighbouring elements",
            model.family in INTERLEAVED,
        ),
    ]
    if len(model.layers) and isinstance(model.layers[0].attention, Attention):
        groups = args.get("num_query_groups") if args.get("group_query_attention") else heads
        wanted += [
            ("num_query_groups", groups, "kv heads", sizes.kv_heads),
            ("kv_channels", args.get("kv_channels"), "head size", sizes.head_dim),
        ]
    for key, arg, what, got in wanted:
        if arg is not None and arg != got:
            raise SourceError(f"{path}: its args say {key} {arg}, the config has {what} {got}")
    yield from _words(path, sizes.vocab, args)
    rope = config.get("rope_parameters")
    theta = (rope if isinstance(rope, dict) else config).get("rope_theta")
    if model.positions is None and theta is not None and args.get("rotary_base", theta) != theta:
        yield f"its args say rotary_base {args['rotary_base']}, the config has rope_theta {theta}"


def _words(path: str, vocab: int, args: Mapping[str, JSON]) -> Iterator[str]:
    """Notes on the rows of the vocabulary. Raises SourceError where the config has another one."""
    trained, rows = args.get("vocab_size"), args.get("padded_vocab_size")
    if isinstance(trained, int) and vocab < trained:
        raise SourceError(f"{path}: its args say vocab_size {trained}, the config has {vocab}")
    if isinstance(rows, int) and vocab > rows:
        raise SourceError(f"{path}: its args say padded_vocab_size {rows}, the config has vocab_size {vocab}")
    step, tp = args.get("make_vocab_size_divisible_by"), args.get("tensor_model_parallel_size", 1)
    if isinstance(rows, int) and isinstance(step, int) and isinstance(tp, int) and rows - vocab >= step * tp:
        yield f"{rows - vocab} rows of the vocabulary are left out as padding: {rows}, the config has {vocab}"
