"""DeepSeek-V4: attention of all heads to one, in most layers also to compressed entries of the tokens further
back; several residual streams; experts that a table chooses in the first layers.

Read by the hub's names, which transformers and vLLM load, by those that transformers trains with, and by
those that its save_pretrained writes, a mixture of the two which vLLM does not load. Written by the hub's.
Source: transformers' configuration_deepseek_v4.py, modeling_deepseek_v4.py and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import Compressed, CompressedIndexer, Compressor
from ..model import Experts, HubCuts, Model
from ..roles import Parameter
from .attention import Attending
from .claims import Claims, Dim, Heads, absent, dim, each_layer, integer, layer_index, section
from .decoder import claimed, decoder
from .dense import Feeding, gated
from .kind import IGNORED, Kind, Norms, Vocabulary
from .known import Known
from .moe import Block, experts, with_shared
from .renaming import as_the_hub

MATRICES = ("w1", "w3", "w2")
BLOCK = Block(hub="ffn", gate="w1", up="w3", down="w2", trained="ffn")
SHARED = "n_shared_experts * moe_intermediate_size"
KIND = Kind(
    "deepseek_v4",
    norms=Norms("attn_norm", "ffn_norm", last="norm"),
    root="",
    trained="",
    vocabulary=Vocabulary("embed", "head"),
    cuts=HubCuts(whole=frozenset({"attention", "shared", SHARED})),
    ignored=(*IGNORED, "mtp.*"),
)

RUNS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
"""Of each kind of layer, how many tokens become one entry, unless config says otherwise; 0: none do."""

SPARSE = "compressed_sparse_attention"
"""The kind whose entries read two runs each, and are chosen by an indexer."""


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a DeepSeek-V4 checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    hub = ckpt if "embed.weight" in ckpt else as_the_hub(ckpt, _SPELLINGS)
    claims = claimed(KIND, hub, config)
    count, hidden = claims.layers(config), dim(config, "hidden_size")
    kinds, hashed, runs = _kinds(config, count), _hashed(config, count), _runs(config)
    heads = Heads(integer(config, "num_attention_heads"), 1, integer(config, "head_dim"))
    number, width = dim(config, "n_routed_experts", "num_local_experts"), dim(config, "moe_intermediate_size")
    shared = Dim(integer(config, "n_shared_experts", 1) * width.size, SHARED)
    streams = dim(config, "hc_mult", default=4)
    mixed = Dim((2 + streams.size) * streams.size, "(2 + hc_mult) * hc_mult")
    all_streams = Dim(streams.size * hidden.size, "hc_mult * hidden_size")
    attends = _attends(claims, config, heads, kinds, runs)

    def feeds(layer: str) -> Callable[[], Experts]:
        corrected = "" if hashed[layer_index(layer)] else "gate.bias"
        block = replace(BLOCK, correction=corrected)
        return with_shared(
            experts(claims, config, layer, block, (number, width, hidden)),
            gated(claims, f"{layer}.ffn.shared_experts", shared, hidden, MATRICES),
        )

    def whole(layer: str) -> Callable[[], tuple[Parameter, ...]]:
        built = [
            claims.parameter(f"{layer}.hc_{block}_{leaf}", *dims, kept=True)
            for block in ("attn", "ffn")
            for leaf, dims in (("fn", (mixed, all_streams)), ("base", (mixed,)), ("scale", (Dim(3, "3"),)))
        ]
        if hashed[layer_index(layer)]:
            rows, each = dim(config, "vocab_size"), dim(config, "num_experts_per_tok")
            built.append(claims.parameter(f"{layer}.ffn.gate.tid2eid", rows, each))
        return lambda: tuple(build() for build in built)

    last = {"fn": (streams, all_streams), "base": (streams,), "scale": (Dim(1, "1"),)}
    carried = [claims.parameter(f"hc_head_{leaf}", *dims, kept=True) for leaf, dims in last.items()]
    model = decoder(
        KIND,
        claims,
        config,
        vocab_size,
        Attending(attends, heads, keys=None),
        Feeding(feeds, {width.key: width.size, shared.key: shared.size}, number.size, width.key, shared.key),
        whole=whole,
    )
    sizes = replace(model.sizes, groups=integer(config, "o_groups"))
    return replace(model, sizes=sizes, carried=tuple(build() for build in carried))


def _attends(
    claims: Claims, config: Mapping[str, JSON], heads: Heads, kinds: Sequence[str], runs: Mapping[str, int]
) -> Callable[[str], Callable[[], Compressed]]:
    hidden, rank = dim(config, "hidden_size"), dim(config, "q_lora_rank")
    groups, o_rank = dim(config, "o_groups"), dim(config, "o_lora_rank")
    size, each = Dim(heads.dim, "head_dim"), Dim(heads.q, "num_attention_heads")
    rows = Dim(heads.q * heads.dim, f"{each.key} * {size.key}")
    if heads.q % groups.size:
        raise RecipeError(f"config: {each.key} {each.size} is no multiple of {groups.key} {groups.size}")
    grouped = Dim(rows.size // groups.size, f"{rows.key} / {groups.key}")
    middle = Dim(groups.size * o_rank.size, f"{groups.key} * {o_rank.key}")

    def compressor(at: str, kind: str, size: Dim) -> Callable[[], Compressor]:
        made, run = size.times(2) if kind == SPARSE else size, Dim(runs[kind], f"compress_rates.{kind}")
        kv, gate = (claims.linear(f"{at}.{leaf}", made, hidden) for leaf in ("wkv", "wgate"))
        positions = claims.parameter(f"{at}.ape", run, made, kept=True)
        norm = claims.norm(f"{at}.norm", size)
        return lambda: Compressor(kv(), gate(), positions(), norm())

    def indexer(at: str) -> Callable[[], CompressedIndexer]:
        count, features = dim(config, "index_n_heads"), dim(config, "index_head_dim")
        both = Dim(count.size * features.size, f"{count.key} * {features.key}")
        q, weights = (
            claims.linear(f"{at}.wq_b", both, rank),
            claims.linear(f"{at}.weights_proj", count, hidden),
        )
        keys = compressor(f"{at}.compressor", SPARSE, features)
        return lambda: CompressedIndexer(q(), weights(), keys())

    def claim(layer: str) -> Callable[[], Compressed]:
        at, kind = f"{layer}.attn", kinds[layer_index(layer)]
        q_a, q_norm = claims.linear(f"{at}.wq_a", rank, hidden), claims.norm(f"{at}.q_norm", rank)
        q, kv = claims.linear(f"{at}.wq_b", rows, rank), claims.linear(f"{at}.wkv", size, hidden)
        kv_norm = claims.norm(f"{at}.kv_norm", size)
        o_a, o = claims.linear(f"{at}.wo_a", middle, grouped), claims.linear(f"{at}.wo_b", hidden, middle)
        sinks = claims.parameter(f"{at}.attn_sink", each, kept=True)
        entries = compressor(f"{at}.compressor", kind, size) if runs[kind] else absent
        index = indexer(f"{at}.indexer") if kind == SPARSE else absent
        return lambda: Compressed(
            q_a(), q_norm(), q(), kv(), kv_norm(), o_a(), o(), sinks(), entries(), index()
        )

    return claim


# ---- what config says of each layer ----


def _kinds(config: Mapping[str, JSON], count: int) -> Sequence[str]:
    """The kind of attention of each of `count` layers, as transformers' class finds it: by `layer_types`, by
    the hub's `compress_ratios`, or every second layer after the first two. Raises RecipeError."""
    said, ratios = config.get("layer_types"), config.get("compress_ratios")
    if said is None and ratios is not None:
        names = {str(run): kind for kind, run in RUNS.items()}  # of JSON's, only a whole number reads so
        if not isinstance(ratios, list) or any(str(r) not in names or isinstance(r, str) for r in ratios):
            raise RecipeError(f"config: compress_ratios must be of {', '.join(names)}, got {ratios!r}")
        said = [names[str(r)] for r in ratios]
    if said is None:
        said = ["heavily_compressed_attention" if i < 2 or i % 2 == 0 else SPARSE for i in range(count)]
    return each_layer({"layer_types": _first(said, count)}, "layer_types", count, [*RUNS])


def _hashed(config: Mapping[str, JSON], count: int) -> list[bool]:
    """In which of `count` layers a table of the vocabulary chooses experts: as `mlp_layer_types` says, or the
    first `num_hash_layers`. Raises RecipeError."""
    if config.get("mlp_layer_types") is None:
        first = integer(config, "num_hash_layers", 3, least=0)
        return [i < first for i in range(count)]
    said = {"mlp_layer_types": _first(config["mlp_layer_types"], count)}
    return [kind == "hash_moe" for kind in each_layer(said, "mlp_layer_types", count, ("hash_moe", "moe"))]


def _first(said: JSON, count: int) -> JSON:
    """What is said of the first `count` layers; the hub's lists also speak of those after the last."""
    return said[:count] if isinstance(said, list) else said


def _runs(config: Mapping[str, JSON]) -> dict[str, int]:
    """How many tokens become one entry in each kind of layer. Raises RecipeError."""
    said = section(config, "compress_rates", optional=True)
    older = {SPARSE: "compress_rate_csa", "heavily_compressed_attention": "compress_rate_hca"}
    usual = {kind: integer(said, kind, RUNS[kind]) for kind in older}
    return {"sliding_attention": 0} | {kind: integer(config, key, usual[kind]) for kind, key in older.items()}


# ---- other names ----

_SPELLINGS = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.compressor\.indexer\.(?:scorer\.)?(q_b_proj|weights_proj)\.", r".indexer.\1."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.position_bias$", ".ape"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.sinks$", ".attn_sink"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.(q_a|q_b|o_a|o_b)_proj\.", r".w\1."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
    *((rf"\.shared_experts\.{old}_proj\.", f".shared_experts.{new}.") for old, new in (
        ("gate", "w1"), ("down", "w2"), ("up", "w3"))),
)  # fmt: skip
"""Of a name, what transformers has in memory or in the files that it saves, and what the hub has there;
applied in order."""


FAMILIES = {"deepseek_v4": Known(recipe, KIND.ignored)}
