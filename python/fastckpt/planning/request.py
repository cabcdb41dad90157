"""What a caller asks for, checked before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from ..checkpoint import JSON
from ..dtypes import DType
from ..errors import LayoutError, expect
from ..layouts import Layout, chosen
from ..placement import Placement
from ..quantisation.schemes import Quant


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asked for, apart from the checkpoint and the place to put it.

    `placement` and `rank` (None: all ranks); `layout` by name or as an object; `config` as a path or a
    mapping (None: the checkpoint's own); `recipe` by name (None: what served shards were cut with, else by
    the config); `tp_plan` name pattern -> style; `vocab_size`: the embedding rows that count; `dtype` (None:
    as stored, "auto": the config's); `max_shard_size` of a file; `sorted`: files ordered as safetensors'
    save_file orders them, not as the source lies; `weights_key`, `client_state`: a training checkpoint around
    a single `.bin`; `only`: only these names are made, each as its dtype (a module to fill); `quant`: what is
    quantised on the way, and how; `dense`: what is quantised already is dequantised (dtype None: to what the
    config names, else bfloat16); `adapter`: a PEFT adapter's directory, merged into the checkpoint, or with
    `apart` cut as the layout cuts it (hf, rtp_llm)."""

    placement: Placement
    rank: int | None = None
    layout: str | Layout = "hf"
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None
    recipe: str | None = None
    tp_plan: Mapping[str, str] | None = None
    vocab_size: int | None = None
    dtype: str | DType | None = None
    max_shard_size: str | int | None = "5GB"
    sorted: bool = False
    weights_key: str | None = None
    client_state: Mapping[str, JSON] | None = None
    only: Mapping[str, DType] | None = None
    quant: Quant | None = None
    dense: bool = False
    adapter: str | os.PathLike[str] | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        nothing = type(None)
        expect("placement", self.placement, Placement)
        expect("rank", self.rank, int, nothing)
        if self.placement.rank not in (0, self.rank):
            raise LayoutError(
                f"placement is of rank {self.placement.rank}, and rank={self.rank} was asked for: "
                "rank= says whose part is made, None that of all"
            )
        chosen(self.layout)
        expect("config", self.config, str, os.PathLike, Mapping, nothing)
        expect("recipe", self.recipe, str, nothing)
        expect("tp_plan", self.tp_plan, Mapping, nothing)
        for pattern, style in (self.tp_plan or {}).items():
            expect("tp_plan: a pattern", pattern, str)
            expect(f"tp_plan: the style of {pattern!r}", style, str)
        expect("vocab_size", self.vocab_size, int, nothing)
        expect("max_shard_size", self.max_shard_size, str, int, nothing)
        expect("adapter", self.adapter, str, os.PathLike, nothing)
        expect("apart", self.apart, bool)
        if self.apart and self.adapter is None:
            raise LayoutError(
                "apart (--apart) goes with adapter= (--adapter): it is the adapter that is kept apart"
            )
        expect("weights_key", self.weights_key, str, nothing)
        if self.weights_key == "":
            raise LayoutError("weights_key: wanted a key, got the empty string")


class Serving(TypedDict, total=False):
    """What servers get of a model: the arguments of `plan` and `reshard` that shape an output."""

    placement: Placement | None
    layout: str | Layout
    config: str | os.PathLike[str] | Mapping[str, JSON] | None
    recipe: str | None
    tp_plan: Mapping[str, str] | None
    vocab_size: int | None
    dtype: str | DType | None
    quant: str | Quant | None
    adapter: str | os.PathLike[str] | None
    apart: bool
    max_shard_size: str | int | None
