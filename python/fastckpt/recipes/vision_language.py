"""Vision-language models: a decoder of another family under a prefix, beside an image tower and a projector.

The decoder is read by its own family's recipe, from config's `text_config`. Names as save_pretrained writes
them; names as transformers trains, where those differ, are read as well. Source: transformers' modeling files
and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Model, Stacked, Tower
from ..roles import Parameter
from . import decoder, gemma4, gemma4_towers, imagining, lfm2, mixture, projectors, qwen_towers
from .claims import Claims, Dim, dim, flag, integer, section
from .cohere import COHERE2
from .deepseek import GLM4V_MOE_TEXT, KIMI_K2, MISTRAL4, V3
from .gemma import GEMMA, GEMMA2
from .gemma import GEMMA3 as GEMMA3_TEXT
from .glm import GLM4
from .imagining import Imagined
from .kind import IGNORED
from .known import Known, Recipe
from .llama import LLAMA, MINISTRAL3, MISTRAL, QWEN2, QWEN3
from .llama4 import LLAMA4_TEXT
from .moe import Block
from .olmo import EXAONE4
from .qwen_moe import QWEN3_MOE
from .qwen_next import QWEN3_5, QWEN3_5_MOE
from .renaming import renamed, respelled, spelled
from .towers import Built, Config


def _qwen3_moe(ckpt: Checkpoint, config: Config, *, vocab_size: int | None = None) -> Model:
    """Qwen3-VL's mixture: stacks [experts, out, in], as transformers 5 has them, or [experts, in, out], as
    the hub does, or each expert on its own, as quantisers leave them. Raises RecipeError where shapes do not
    tell."""
    hidden, width = (integer(config, key) for key in ("hidden_size", "moe_intermediate_size"))
    found = next((e.shape[1:] for n, e in ckpt.entries.items() if n.endswith(".mlp.experts.down_proj")), ())
    if found and hidden == width:
        raise RecipeError(f"config: experts of {hidden} by {width} may be stored either way: not read")
    turned = found == (width, hidden)
    stacked = Stacked("experts.gate_up_proj", "experts.down_proj", transposed=turned, singly=True)
    kind = replace(QWEN3_MOE, block=Block(stacked=stacked))
    return mixture.recipe(ckpt, config, vocab_size=vocab_size, mixture=kind)


TEXTS: Mapping[str, Recipe] = {
    "qwen3_vl_moe_text": _qwen3_moe,
    "qwen3_5_moe_text": partial(mixture.recipe, mixture=QWEN3_5_MOE),
    "gemma4_text": gemma4.recipe,
    "gemma4_unified_text": gemma4.unified,
    "lfm2": lfm2.lfm2,
    "lfm2_moe": lfm2.lfm2_moe,
    "llama4_text": partial(mixture.recipe, mixture=LLAMA4_TEXT),
    "glm4v_moe_text": partial(mixture.recipe, mixture=GLM4V_MOE_TEXT),
    "mistral4": partial(mixture.recipe, mixture=MISTRAL4),
    "deepseek_v3": partial(mixture.recipe, mixture=V3),
    "kimi_k2": partial(mixture.recipe, mixture=KIMI_K2),
    **{
        name: partial(decoder.recipe, kind=kind)
        for name, kind in {
            "llama": LLAMA,
            "mistral": MISTRAL,
            "ministral3": MINISTRAL3,
            "qwen2": QWEN2,
            "qwen3": QWEN3,
            "gemma": GEMMA,
            "gemma2": GEMMA2,
            "gemma3_text": GEMMA3_TEXT,
            "cohere2": COHERE2,
            "exaone4": EXAONE4,
            "exaone4_5_text": EXAONE4,
            "qwen2_vl_text": QWEN2,
            "qwen2_5_vl_text": QWEN2,
            "qwen3_vl_text": QWEN3,
            "qwen3_5_text": QWEN3_5,
            "glm4v_text": replace(GLM4, attention=replace(GLM4.attention, qkv_bias=True)),
        }.items()
    },
}
"""`model_type` of a text_config -> the recipe of the decoder it is of."""


TowerClaim = Callable[[Claims, Config, Dim], tuple[Tower | None, tuple[Parameter, ...]]]
"""Of a config, claims the tower (None: all of it is carried) and the projector to the decoder's hidden size.
Raises RecipeError."""


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A family of vision-language models.

    `texts`: the `model_type`s its decoder may have. `beside` claims what is not the decoder; the hub has the
    decoder below `text`, and its head as `head`. `trained`: prefixes of names as transformers trains, and
    what save_pretrained writes in their place. `tied`: whether embedding and head are one where nothing
    tells. `flat`: older configs have no `text_config`, and give the decoder's sizes as their own. `further`:
    what the decoder's layer that predicts a further token lies below, by both names. `unlike`: the texts
    that engines hold by other names than the rest, so that the model is a family of its own to them.
    `ignored`: patterns of names beside the decoder that are left out."""

    family: str
    texts: tuple[str, ...]
    beside: TowerClaim
    text: str = "language_model.model."
    head: str = "language_model.lm_head."
    trained: tuple[tuple[str, str], ...] = ()
    tied: bool = False
    flat: bool = False
    further: str = ""
    unlike: tuple[str, ...] = ()
    ignored: tuple[str, ...] = IGNORED

    def saved(self, name: str) -> str:
        """What save_pretrained calls a tensor."""
        found = next(((old, new) for old, new in self.trained if name.startswith(old)), ("", ""))
        return found[1] + name[len(found[0]) :]

    def inner(self, name: str) -> str | None:
        """What the decoder's own recipe calls a tensor that is saved as `name`; None for one beside it."""
        for outer, own in ((self.text, "model."), (self.head, "lm_head.")):
            if name.startswith(outer):
                return own + name[len(outer) :]
        return name if self.further and name.startswith(self.further) else None

    def outer(self, name: str) -> str:
        """How the hub calls a module or tensor that the decoder's own recipe calls `name`."""
        for own, outer in (("model.", self.text), ("lm_head.", self.head)):
            if f"{name}.".startswith(own):
                return outer.rstrip(".") if f"{name}." == own else outer + name[len(own) :]
        return name


def recipe(
    ckpt: Checkpoint,
    config: Config,
    *,
    vocab_size: int | None = None,
    wrapper: Wrapper,
) -> Model:
    """The model of a vision-language checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    imagined = isinstance(ckpt.entries, Imagined)
    ckpt = ckpt if imagined else spelled(ckpt, wrapper.saved)
    told = _text_config(config, wrapper)
    kind = told.get("model_type")
    if not isinstance(kind, str) or kind not in wrapper.texts:
        raise RecipeError(
            f"config: no recipe for a {wrapper.family} whose text_config has model_type {kind!r}, known: "
            f"{', '.join(wrapper.texts)}"
        )
    within = {inner: name for name in (*ckpt.entries, *ckpt.aliases) if (inner := wrapper.inner(name))}
    text = imagining.checkpoint() if imagined else respelled(ckpt, within)
    told["tie_word_embeddings"] = _tied(config, told, wrapper, None if imagined else text)
    try:
        model = renamed(TEXTS[kind](text, told, vocab_size=vocab_size), wrapper.outer)
    except RecipeError as error:
        raise RecipeError(f"{wrapper.family}'s decoder, by the names of {kind}: {error}") from None
    decoder = set(within.values())
    others = {n: n for n in (*ckpt.entries, *ckpt.aliases) if n not in decoder}
    beside = imagining.checkpoint() if imagined else respelled(ckpt, others)
    claims = Claims(beside, "")
    tower, loose = wrapper.beside(claims, config, dim(told, "hidden_size"))
    if isinstance(ckpt.entries, Imagined):
        made = {wrapper.outer(name): entry for name, entry in text.entries.items()}
        for name, entry in (made | dict(beside.entries)).items():
            ckpt.entries.want(name, entry.shape)
    return replace(
        model,
        family=f"{wrapper.family} of {kind}" if kind in wrapper.unlike else wrapper.family,
        tower=tower,
        carried=(*model.carried, *loose),
        ignored=(*model.ignored, *claims.close(wrapper.ignored)),
    )


def _text_config(config: Config, wrapper: Wrapper) -> dict[str, JSON]:
    """The decoder's config. Raises RecipeError where there is none."""
    if config.get("text_config") is None and wrapper.flat:
        return {**config, "model_type": wrapper.texts[0]}
    said = section(config, "text_config")
    usual = DEFAULTS.get(str(said.get("model_type")), {})
    quantised = {k: v for k, v in config.items() if k == "quantization_config"}
    return {**usual, **said, **quantised}


def _tied(config: Config, told: Config, wrapper: Wrapper, text: Checkpoint | None) -> bool:
    """Whether embedding and head are one: as the whole config says, else as the checkpoint has them. Of one
    that is only imagined, as text_config says, else as config's class."""
    default = flag(told, "tie_word_embeddings", wrapper.tied)
    if text is not None:
        default = "lm_head.weight" not in text.entries
    return flag(config, "tie_word_embeddings", default)


DEFAULTS: Mapping[str, Mapping[str, JSON]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "gemma": {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    },
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    },
}  # fmt: skip
"""What a text_config leaves out where it is as in transformers' config class: the hub's of LLaVA 1.5,
PaliGemma and Gemma 3 say little more than what differs."""


def _within(build: Callable[[Claims, str, Config, Dim], Built], at: str) -> TowerClaim:
    """A tower below the module `at` that has its projector within."""

    def beside(claims: Claims, config: Config, hidden: Dim) -> Built:
        return build(claims, at, config, hidden)

    return beside


# What transformers 5.23 trains and saves, where its own names are not the hub's.
_QWEN2 = (("model.language_model.", "model."), ("model.visual.", "visual."))
_LLAVA = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
_KIMI = (
    ("model.language_model.", "language_model.model."),
    ("language_model.model.blocks.", "language_model.model.layers."),
    ("lm_head.", "language_model.lm_head."),
    ("model.mm_projector.", "mm_projector."),
    ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
)

_APART = ("llama", "mistral", "qwen2", "qwen3")

QWEN2_VL = Wrapper(
    "qwen2_vl",
    ("qwen2_vl_text",),
    _within(qwen_towers.qwen2, "visual"),
    "model.",
    "lm_head.",
    _QWEN2,
    flat=True,
)
QWEN2_5_VL = Wrapper(
    "qwen2_5_vl",
    ("qwen2_5_vl_text",),
    _within(qwen_towers.qwen2_5, "visual"),
    "model.",
    "lm_head.",
    _QWEN2,
    flat=True,
)
QWEN3_VL = Wrapper(
    "qwen3_vl",
    ("qwen3_vl_text",),
    _within(qwen_towers.qwen3, "model.visual"),
    "model.language_model.",
    "lm_head.",
)
QWEN3_VL_MOE = replace(QWEN3_VL, family="qwen3_vl_moe", texts=("qwen3_vl_moe_text",))
QWEN3_5_VL = replace(
    QWEN3_VL,
    family="qwen3_5",
    texts=("qwen3_5_text",),
    beside=_within(qwen_towers.qwen3_5, "model.visual"),
    further="mtp.",
)
QWEN3_5_VL_MOE = replace(QWEN3_5_VL, family="qwen3_5_moe", texts=("qwen3_5_moe_text",))
GLM4V = Wrapper(
    "glm4v", ("glm4v_text",), _within(qwen_towers.glm4v, "model.visual"), "model.language_model.", "lm_head."
)
GLM4V_MOE = replace(GLM4V, family="glm4v_moe", texts=("glm4v_moe_text",))
GEMMA3 = Wrapper("gemma3", ("gemma3_text",), projectors.gemma3, trained=_LLAVA, tied=True)
EXAONE4_5 = Wrapper(
    "exaone4_5",
    ("exaone4", "exaone4_5_text"),
    _within(qwen_towers.exaone4_5, "model.visual"),
    "model.language_model.",
    "lm_head.",
    ignored=(*IGNORED, "mtp.*"),
)
KIMI_K25 = Wrapper("kimi_k25", ("kimi_k2", "deepseek_v3"), qwen_towers.kimi_k25, trained=_KIMI)
GEMMA4 = Wrapper(
    "gemma4",
    ("gemma4_text",),
    gemma4_towers.beside,
    "model.language_model.",
    "lm_head.",
    tied=True,
    ignored=(*IGNORED, "model.embed_vision.embedding.*", "model.embed_audio.embedding.*"),
)
"""Some files have tables of the family before it, which vLLM's gemma4_mm.py leaves out."""
GEMMA4_UNIFIED = Wrapper(
    "gemma4_unified",
    ("gemma4_unified_text",),
    gemma4_towers.unified,
    "model.language_model.",
    "lm_head.",
    trained=(
        ("model.embed_vision.multimodal_embedder.", "model.embed_vision."),
        *(
            (f"model.embed_vision.{name}", f"model.vision_embedder.{name}")
            for name in ("patch_ln1", "patch_dense", "patch_ln2", "pos_embedding", "pos_norm")
        ),
    ),
    tied=True,
)
MISTRAL3 = Wrapper(
    "mistral3",
    (*_APART, "ministral3", "mistral4"),
    projectors.mistral3,
    trained=_LLAVA,
    tied=True,
    unlike=("mistral4",),
)
LLAVA = Wrapper("llava", _APART, projectors.llava, trained=_LLAVA)
LLAVA_NEXT = Wrapper("llava_next", _APART, partial(projectors.llava_of_tiles, usual=-2), trained=_LLAVA)
LLAVA_ONEVISION = Wrapper(
    "llava_onevision", _APART, partial(projectors.llava_of_tiles, usual=-1), trained=_LLAVA
)
INTERNVL = Wrapper("internvl", _APART, projectors.internvl, trained=_LLAVA, tied=True)
COHERE2_VISION = Wrapper(
    "cohere2_vision", ("cohere2",), projectors.cohere2_vision, "model.language_model.", "lm_head.", tied=True
)
LFM2_VL = Wrapper(
    "lfm2_vl", ("lfm2", "lfm2_moe"), projectors.lfm2_vl, "model.language_model.", "lm_head.", tied=True
)
LLAMA4 = Wrapper("llama4", ("llama4_text",), projectors.llama4)
PALIGEMMA = Wrapper("paligemma", ("gemma", "gemma2"), projectors.paligemma, trained=_LLAVA, tied=True)
IDEFICS3 = Wrapper("idefics3", ("llama",), projectors.idefics3, "model.text_model.", "lm_head.")
SMOLVLM = replace(IDEFICS3, family="smolvlm")

_WRAPPERS = (
    QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5_VL, QWEN3_5_VL_MOE, GLM4V, GLM4V_MOE, GEMMA3,
    GEMMA4, GEMMA4_UNIFIED, EXAONE4_5, KIMI_K25, MISTRAL3, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, INTERNVL,
    COHERE2_VISION, LFM2_VL, LLAMA4, PALIGEMMA, IDEFICS3, SMOLVLM,
)  # fmt: skip
FAMILIES = {w.family: Known(partial(recipe, wrapper=w), w.ignored) for w in _WRAPPERS}
