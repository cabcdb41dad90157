"""Model families: each recipe turns a checkpoint and its config into a Model.

A family is a file here and a line in FAMILIES; a user's own is a file of theirs, or an entry point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from typing import Protocol, cast

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Model
from . import (
    bert,
    chatglm,
    cogvlm2,
    cohere,
    decoder,
    deepseek,
    ernie,
    gemma,
    glm,
    gpt2,
    gpt_oss,
    gptj,
    granite_moe,
    imagining,
    jina_bert,
    llama,
    llama4,
    mixtral,
    mixture,
    modernbert,
    mpt,
    neox,
    olmo,
    opt,
    phi3,
    qwen_moe,
    qwen_next,
    t5,
    ungated,
    vision_language,
    whisper,
)


class Recipe(Protocol):
    """Checks every name and shape against the config at once; roles are built when they are asked for.

    `vocab_size`: how many embedding rows count, where checkpoint and config differ. Raises RecipeError for a
    name that is missing, does not fit, or has no role."""

    def __call__(
        self, ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None
    ) -> Model: ...


@dataclass(frozen=True, slots=True)
class Family:
    """One line of the table: `model_type` as transformers spells it, its recipe, what it reads in a few
    words, and the patterns of names it knows and leaves out."""

    model_type: str
    recipe: Recipe
    about: str
    ignored: tuple[str, ...] = decoder.IGNORED


def _decoder(kind: decoder.Kind, about: str) -> Family:
    return Family(kind.family, partial(decoder.recipe, kind=kind), about, kind.ignored)


def _wrapper(wrapper: vision_language.Wrapper, about: str) -> Family:
    return Family(wrapper.family, partial(vision_language.recipe, wrapper=wrapper), about)


def _mixture(family: mixture.Mixture, about: str) -> Family:
    kind = family.kind
    return Family(kind.family, partial(mixture.recipe, mixture=family), about, kind.ignored)


FAMILIES: tuple[Family, ...] = (
    _decoder(llama.LLAMA, "Llama: q, k, v and gate, up apart"),
    _decoder(llama.MISTRAL, "Mistral: as Llama, no biases"),
    _decoder(llama.MINISTRAL, "Ministral: as Mistral"),
    _decoder(llama.GRANITE, "Granite: as Llama"),
    _decoder(llama.SMOLLM3, "SmolLM3: as Llama, tied unless it says otherwise"),
    _decoder(llama.QWEN2, "Qwen2: as Llama, biases on q, k, v"),
    _decoder(llama.QWEN3, "Qwen3: as Llama, norms on each head's q and k"),
    _decoder(llama.MINISTRAL3, "Ministral 3, text: as Mistral"),
    _decoder(llama.SEED_OSS, "Seed-OSS: as Llama, biases on q, k, v"),
    _decoder(llama.ERNIE4_5, "ERNIE 4.5, dense: as Llama, tied unless it says otherwise"),
    _decoder(llama.HUNYUAN, "Hunyuan, dense: as Llama, norms on each head's rotated q and k"),
    _decoder(llama.INTERNLM3, "InternLM 3: as Llama"),
    _decoder(llama.CWM, "CWM: as Llama"),
    _decoder(llama.HELIUM, "Helium: as Llama"),
    _decoder(llama.STABLELM, "StableLM: as Llama, layer norms"),
    _decoder(olmo.OLMO, "OLMo: as Llama, norms without weights"),
    _decoder(olmo.OLMO2, "OLMo 2: norms after each block, and on all of q and of k"),
    _decoder(olmo.OLMO3, "OLMo 3: as OLMo 2"),
    _decoder(olmo.EXAONE4, "EXAONE 4: norms after each block, and on each head's q and k"),
    _decoder(cohere.COHERE, "Command R: blocks side by side, tied; norms for each head of q and k"),
    _decoder(cohere.COHERE2, "Command R7B, Command A: as Command R"),
    _decoder(ungated.STARCODER2, "StarCoder2: no gate, biases, layer norms"),
    _decoder(ungated.PHI, "Phi 1, 1.5 and 2: no gate, biases, blocks side by side"),
    _decoder(ungated.NEMOTRON, "Nemotron: no gate, layer norms by 1 + weight"),
    _decoder(ungated.ARCEE, "Arcee: as Llama, no gate"),
    _decoder(ungated.JAIS2, "Jais 2: no gate, biases, layer norms"),
    _decoder(ungated.APERTUS, "Apertus: no gate, a learned activation, norms on each head's q and k"),
    _decoder(gemma.GEMMA, "Gemma: norms by 1 + weight"),
    _decoder(gemma.GEMMA2, "Gemma 2: norms before and after each block"),
    _decoder(gemma.GEMMA3, "Gemma 3, text: Gemma 2 with norms on q and k"),
    _decoder(gemma.VAULTGEMMA, "VaultGemma: as Gemma"),
    _decoder(phi3.PHI3, "Phi-3: [q; k; v] and [gate; up] as one"),
    _decoder(glm.GLM, "GLM: [gate; up] as one"),
    _decoder(glm.GLM4, "GLM-4: GLM with norms after each block"),
    _mixture(mixtral.MIXTRAL, "Mixtral: experts, saved one by one or trained in stacks"),
    _mixture(mixtral.PHIMOE, "Phi-3.5-MoE: Mixtral with biases"),
    _mixture(mixtral.MINIMAX_M2, "MiniMax-M2: Mixtral with corrected routing, norms over all of q and k"),
    _mixture(granite_moe.GRANITEMOE, "GraniteMoE: experts in two tensors"),
    _mixture(granite_moe.GRANITEMOESHARED, "GraniteMoE with a shared block"),
    _mixture(llama4.LLAMA4_TEXT, "Llama 4, text: experts in two tensors [in, out], a shared one"),
    _mixture(qwen_moe.QWEN2_MOE, "Qwen2-MoE: experts and a gated shared one"),
    _mixture(qwen_moe.QWEN3_MOE, "Qwen3-MoE: experts, norms on each head's q and k"),
    _mixture(qwen_moe.OLMOE, "OLMoE: experts, norms over all of q and all of k"),
    _mixture(qwen_moe.HUNYUAN_V1_MOE, "Hunyuan-A13B: experts and a shared one"),
    _mixture(ernie.ERNIE4_5_MOE, "ERNIE 4.5 MoE: corrected routing, shared experts, in a range of layers"),
    _mixture(qwen_next.QWEN3_NEXT, "Qwen3-Next: linear attention, output gates, experts"),
    _mixture(qwen_next.QWEN3_5_MOE, "Qwen3.5-MoE, text: as Qwen3-Next"),
    _decoder(qwen_next.QWEN3_5, "Qwen3.5, text: as Qwen3-Next, without experts"),
    _mixture(deepseek.GLM4_MOE, "GLM-4 MoE: corrected routing, shared experts"),
    _mixture(deepseek.V2, "DeepSeek-V2: latent attention, shared experts"),
    _mixture(deepseek.V3, "DeepSeek-V3: V2 with corrected routing, fp8 by blocks"),
    _mixture(deepseek.KIMI_K2, "Kimi K2: as DeepSeek-V3"),
    _mixture(deepseek.DEEPSEEK_V32, "DeepSeek-V3.2: V3 whose attention is sparse, by an indexer"),
    _mixture(deepseek.GLM_MOE_DSA, "GLM-5: as DeepSeek-V3.2, layers may share an indexer"),
    _mixture(deepseek.GLM4_MOE_LITE, "GLM-4.7-Flash: as DeepSeek-V3"),
    _mixture(deepseek.DOTS1, "dots.llm1: corrected routing, shared experts, norms on each head's q and k"),
    _mixture(deepseek.SOLAR_OPEN, "Solar Open: GLM-4 MoE with experts in every layer"),
    _mixture(deepseek.EXAONE_MOE, "K-EXAONE: corrected routing, shared experts"),
    Family("gpt_oss", gpt_oss.recipe, "gpt-oss: sinks, experts in interleaved stacks"),
    Family("gpt2", gpt2.recipe, "GPT-2: matrices stored [in, out], learned positions", gpt2.IGNORED),
    Family(
        "gpt_bigcode",
        partial(gpt2.recipe, bigcode=True),
        "StarCoder, SantaCoder: as GPT-2, one kv head, matrices [out, in]",
        gpt2.IGNORED,
    ),
    Family("gptj", gptj.recipe, "GPT-J: blocks side by side, no gate", gptj.IGNORED),
    Family("opt", opt.recipe, "OPT: learned positions, no gate, layer norms", ()),
    Family("mpt", mpt.recipe, "MPT: ALiBi, [q; k; v] as one, no gate", ()),
    Family("gpt_neox", neox.neox, "GPT-NeoX, Pythia: q, k, v head by head", neox.IGNORED),
    Family("bloom", neox.bloom, "BLOOM: q, k, v head by head, alibi", neox.IGNORED),
    Family("falcon", neox.falcon, "Falcon: one kv head, kv groups, or head by head", neox.IGNORED),
    Family("chatglm", chatglm.recipe, "ChatGLM 2, 3 and GLM-4 in THUDM's own names", chatglm.IGNORED),
    Family("cogvlm2", cogvlm2.recipe, "CogVLM2: matrices for image tokens, a tower: ask by name"),
    Family("bert", bert.recipe, "BERT, alone or with a head", bert.IGNORED),
    Family("roberta", partial(bert.recipe, names=bert.ROBERTA), "RoBERTa, likewise", bert.IGNORED),
    Family(
        "xlm-roberta", partial(bert.recipe, names=bert.ROBERTA), "XLM-RoBERTa, as RoBERTa", bert.IGNORED
    ),
    Family("modernbert", modernbert.recipe, "ModernBERT, alone or with a head", ()),
    Family(
        "jina_bert",
        jina_bert.recipe,
        "Jina's BERT, norms on q and k: ask by name",
        jina_bert.IGNORED,
    ),
    Family("t5", t5.recipe, "T5: encoder and decoder, relative positions", ()),
    Family("whisper", whisper.recipe, "Whisper: audio encoder and decoder", ()),
    _wrapper(vision_language.QWEN2_VL, "Qwen2-VL: Qwen2 beside an image tower"),
    _wrapper(vision_language.QWEN2_5_VL, "Qwen2.5-VL: likewise, a tower with gated blocks"),
    _wrapper(vision_language.QWEN3_VL, "Qwen3-VL: Qwen3, whose first layers read the tower's too"),
    _wrapper(vision_language.GLM4V, "GLM-4.1V: GLM-4 beside an image tower"),
    _wrapper(vision_language.GEMMA3, "Gemma 3: its text model beside SigLIP"),
    _wrapper(vision_language.MISTRAL3, "Mistral Small 3.1: Mistral beside Pixtral's tower"),
    _wrapper(vision_language.LLAVA, "LLaVA, Pixtral: a text model beside CLIP, SigLIP or Pixtral's tower"),
    _wrapper(vision_language.LLAVA_ONEVISION, "LLaVA-OneVision: likewise"),
    _wrapper(vision_language.INTERNVL, "InternVL in transformers' names: likewise, a tower of its own"),
)

RECIPES: dict[str, Recipe] = {family.model_type: family.recipe for family in FAMILIES}
"""transformers' `model_type` -> recipe."""

GROUP = "fastckpt.recipes"
"""The entry-point group of installed packages that bring recipes: `model_type` = a Recipe."""


def find(config: Mapping[str, JSON]) -> Recipe:
    """The recipe for a config, by its `model_type`. Raises RecipeError naming those there are."""
    name = config.get("model_type")
    recipe = _known(name) if isinstance(name, str) else None
    if recipe is None:
        raise RecipeError(
            f"config: no recipe for model_type {name!r}, known: {', '.join(RECIPES)}; recipe= (--recipe) "
            "takes one by name, a tp_plan of name patterns works without one"
        )
    return recipe


def named(name: str) -> Recipe:
    """The recipe a user asked for: a `model_type`, or the path of a Python file (`.py`) with a RECIPE in it.

    The file is run: it is the user's own program, never part of a checkpoint, so a config cannot name one.
    Raises RecipeError."""
    if name.endswith(".py"):
        return _from_file(name)
    recipe = _known(name)
    if recipe is None:
        raise RecipeError(f"no recipe {name!r}; known: {', '.join(RECIPES)}, or the path of a .py file")
    return recipe


def model(recipe: Recipe, ckpt: Checkpoint, config: Mapping[str, JSON], vocab_size: int | None) -> Model:
    """The model as the recipe reads it, with its `quant_method` from the config."""
    read, said = recipe(ckpt, config, vocab_size=vocab_size), config.get("quantization_config")
    if not isinstance(said, dict):
        return read
    return replace(read, quant_method=_quant_method(said))


def imagined(recipe: Recipe, config: Mapping[str, JSON]) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the hub gives a model of this config, which no file need hold.

    Of names that a checkpoint may have or not there are none. Raises RecipeError."""
    nothing = imagining.checkpoint()
    recipe(nothing, config)
    return {name: entry.shape for name, entry in nothing.entries.items()}


def _quant_method(said: Mapping[str, JSON]) -> str:
    """The hub's word for the quantisation, with whatever else decides whether an engine can hold it."""
    packed = said.get("format") == "pack-quantized"
    method = "pack-quantized" if packed else said.get("quant_method")
    holds = {
        "kv_cache_scheme": bool(said.get("kv_cache_scheme")),
        f"{said.get('bits')} bits": method == "awq" and said.get("bits") != 4,
        "sym false": method == "gptq" and said.get("sym", True) is not True,
    }
    more = " and ".join(what for what, so in holds.items() if so)
    return f"{method} with {more}" if more else str(method)


def _known(name: str) -> Recipe | None:
    if name in RECIPES:
        return RECIPES[name]
    from importlib.metadata import entry_points  # takes longer than all recipes; only strangers need it

    for point in entry_points(group=GROUP, name=name):
        return _checked(point.load(), f"entry point {point.value}")
    return None


def _from_file(path: str) -> Recipe:
    try:
        with open(path, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()[:12]
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}") from None
    spec = spec_from_file_location(f"fastckpt_recipe_{digest}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path}: not a Python file")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = _checked(getattr(module, "RECIPE", None), f"{path}: RECIPE")

    def of_file(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
        # The file's digest is part of the family, so that no plan of an earlier version is taken up again.
        model = recipe(ckpt, config, vocab_size=vocab_size)
        return replace(model, family=f"{model.family} ({digest})")

    return of_file


def _checked(found: object, where: str) -> Recipe:
    if not callable(found):
        raise RecipeError(f"{where}: wanted a recipe (a function, or Names), got {found!r}")
    return cast(Recipe, found)
