"""Model families: each recipe turns a checkpoint and its config into a Model.

A family is a line in FAMILIES, here and in its module; a user's own is a file of theirs, or an entry point.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType
from typing import cast

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Model
from ..quantisation.schemes import MICROSCALED, said_form, said_of
from . import imagining
from .known import Known, Recipe


@dataclass(frozen=True, slots=True)
class Family:
    """One line of the table: `model_type` as transformers spells it, the module that reads it, which is
    imported when it is asked for, and what it reads in a few words."""

    model_type: str
    module: str
    about: str

    @property
    def known(self) -> Known:
        """Its recipe, and the names that it leaves out."""
        table = import_module(f".{self.module}", __name__).FAMILIES
        return cast(Mapping[str, Known], table)[self.model_type]


FAMILIES: tuple[Family, ...] = (
    Family("llama", "llama", "Llama: q, k, v and gate, up apart"),
    Family("mistral", "llama", "Mistral: as Llama, no biases"),
    Family("ministral", "llama", "Ministral: as Mistral"),
    Family("granite", "llama", "Granite: as Llama"),
    Family("smollm3", "llama", "SmolLM3: as Llama, tied unless it says otherwise"),
    Family("qwen2", "llama", "Qwen2: as Llama, biases on q, k, v"),
    Family("qwen3", "llama", "Qwen3: as Llama, norms on each head's q and k"),
    Family("ministral3", "llama", "Ministral 3, text: as Mistral"),
    Family("seed_oss", "llama", "Seed-OSS: as Llama, biases on q, k, v"),
    Family("ernie4_5", "llama", "ERNIE 4.5, dense: as Llama, tied unless it says otherwise"),
    Family("hunyuan_v1_dense", "llama", "Hunyuan, dense: as Llama, norms on each head's rotated q and k"),
    Family("internlm3", "llama", "InternLM 3: as Llama"),
    Family("cwm", "llama", "CWM: as Llama"),
    Family("helium", "llama", "Helium: as Llama"),
    Family("stablelm", "llama", "StableLM: as Llama, layer norms"),
    Family("hyperclovax", "llama", "HyperCLOVA X: as Llama, norms after each block too"),
    Family("minicpm3", "minicpm3", "MiniCPM 3: latent attention, no experts, tied"),
    Family("olmo", "olmo", "OLMo: as Llama, norms without weights"),
    Family("olmo2", "olmo", "OLMo 2: norms after each block, and on all of q and of k"),
    Family("olmo3", "olmo", "OLMo 3: as OLMo 2"),
    Family("olmo_hybrid", "olmo_hybrid", "OLMo Hybrid: OLMo 3 with linear attention in most layers"),
    Family("exaone4", "olmo", "EXAONE 4: norms after each block, and on each head's q and k"),
    Family("cohere", "cohere", "Command R: blocks side by side, tied; norms for each head of q and k"),
    Family("cohere2", "cohere", "Command R7B, Command A: as Command R"),
    Family("cohere2_moe", "cohere", "Command A+: as Command R7B, with experts"),
    Family("starcoder2", "ungated", "StarCoder2: no gate, biases, layer norms"),
    Family("phi", "ungated", "Phi 1, 1.5 and 2: no gate, biases, blocks side by side"),
    Family("nemotron", "ungated", "Nemotron: no gate, layer norms by 1 + weight"),
    Family("arcee", "ungated", "Arcee: as Llama, no gate"),
    Family("jais2", "ungated", "Jais 2: no gate, biases, layer norms"),
    Family("apertus", "ungated", "Apertus: no gate, a learned activation, norms on each head's q and k"),
    Family("gemma", "gemma", "Gemma: norms by 1 + weight"),
    Family("gemma2", "gemma", "Gemma 2: norms before and after each block"),
    Family("gemma3_text", "gemma", "Gemma 3, text: Gemma 2 with norms on q and k"),
    Family("gemma4_text", "gemma4", "Gemma 4, text: two kinds of layers, inputs of their own, experts"),
    Family("gemma4_unified_text", "gemma4", "Gemma 4 of the unified form, text: without experts"),
    Family("vaultgemma", "gemma", "VaultGemma: as Gemma"),
    Family("phi3", "phi3", "Phi-3: [q; k; v] and [gate; up] as one"),
    Family("glm", "glm", "GLM: [gate; up] as one"),
    Family("glm4", "glm", "GLM-4: GLM with norms after each block"),
    Family("mixtral", "mixtral", "Mixtral: experts, saved one by one or trained in stacks"),
    Family("phimoe", "mixtral", "Phi-3.5-MoE: Mixtral with biases"),
    Family("minimax_m2", "mixtral", "MiniMax-M2: Mixtral with corrected routing, norms over all of q and k"),
    Family("granitemoe", "granite_moe", "GraniteMoE: experts in two tensors"),
    Family("granitemoeshared", "granite_moe", "GraniteMoE with a shared block"),
    Family("granitemoehybrid", "hybrids", "Granite 4: GraniteMoE with Mamba in place of most attention"),
    Family("nemotron_h", "hybrids", "Nemotron-H, Nemotron 3: each layer one block, Mamba in most"),
    Family("falcon_h1", "hybrids", "Falcon-H1: attention and Mamba side by side"),
    Family("jamba", "jamba", "Jamba: Mamba's first version in place of most attention, experts"),
    Family("bamba", "hybrids", "Bamba: Mamba in place of most attention"),
    Family("llama4_text", "llama4", "Llama 4, text: experts in two tensors [in, out], a shared one"),
    Family("qwen2_moe", "qwen_moe", "Qwen2-MoE: experts and a gated shared one"),
    Family("qwen3_moe", "qwen_moe", "Qwen3-MoE: experts, norms on each head's q and k"),
    Family("olmoe", "qwen_moe", "OLMoE: experts, norms over all of q and all of k"),
    Family("hunyuan_v1_moe", "qwen_moe", "Hunyuan-A13B: experts and a shared one"),
    Family("ernie4_5_moe", "ernie", "ERNIE 4.5 MoE: corrected routing, shared experts, in a range of layers"),
    Family("qwen3_next", "qwen_next", "Qwen3-Next: linear attention, output gates, experts"),
    Family("qwen3_5_moe_text", "qwen_next", "Qwen3.5-MoE, text: as Qwen3-Next"),
    Family("qwen3_5_text", "qwen_next", "Qwen3.5, text: as Qwen3-Next, without experts"),
    Family("glm4_moe", "deepseek", "GLM-4 MoE: corrected routing, shared experts"),
    Family("deepseek_v2", "deepseek", "DeepSeek-V2: latent attention, shared experts"),
    Family("deepseek_v3", "deepseek", "DeepSeek-V3: V2 with corrected routing, fp8 by blocks"),
    Family("kimi_k2", "deepseek", "Kimi K2: as DeepSeek-V3"),
    Family("kimi_linear", "kimi_linear", "Kimi Linear: linear attention, latent attention, experts"),
    Family("deepseek_v32", "deepseek", "DeepSeek-V3.2: V3 whose attention is sparse, by an indexer"),
    Family("glm_moe_dsa", "deepseek", "GLM-5: as DeepSeek-V3.2, layers may share an indexer"),
    Family("deepseek_v4", "deepseek_v4", "DeepSeek-V4: compressed attention, residual streams, experts"),
    Family("mistral4", "deepseek", "Mistral 4, text: as DeepSeek-V2, experts in two tensors"),
    Family("glm4_moe_lite", "deepseek", "GLM-4.7-Flash: as DeepSeek-V3"),
    Family("dots1", "deepseek", "dots.llm1: corrected routing, shared experts, norms on each head's q and k"),
    Family("solar_open", "deepseek", "Solar Open: GLM-4 MoE with experts in every layer"),
    Family("exaone_moe", "deepseek", "K-EXAONE: corrected routing, shared experts"),
    Family("hy_v3", "deepseek", "Hunyuan 3: corrected routing, shared experts, norms on each head's q and k"),
    Family("mimo_v2_flash", "mimo", "MiMo-V2-Flash: sinks, layers of different kv heads, experts"),
    Family("laguna", "laguna", "Laguna: output gates, layers of different heads, experts and a shared one"),
    Family("afmoe", "laguna", "AFMoE (Trinity): output gates, norms after each block, experts"),
    Family("lfm2", "lfm2", "LFM2: short convolutions in most layers, norms on each head's q and k"),
    Family("lfm2_moe", "lfm2", "LFM2-MoE: LFM2 with experts after some dense layers"),
    Family("gpt_oss", "gpt_oss", "gpt-oss: sinks, experts in interleaved stacks"),
    Family("gpt2", "gpt2", "GPT-2: matrices stored [in, out], learned positions"),
    Family("gpt_bigcode", "gpt2", "StarCoder, SantaCoder: as GPT-2, one kv head, matrices [out, in]"),
    Family("gptj", "gptj", "GPT-J: blocks side by side, no gate"),
    Family("opt", "opt", "OPT: learned positions, no gate, layer norms"),
    Family("mpt", "mpt", "MPT: ALiBi, [q; k; v] as one, no gate"),
    Family("gpt_neox", "neox", "GPT-NeoX, Pythia: q, k, v head by head"),
    Family("bloom", "neox", "BLOOM: q, k, v head by head, alibi"),
    Family("falcon", "neox", "Falcon: one kv head, kv groups, or head by head"),
    Family("chatglm", "chatglm", "ChatGLM 2, 3 and GLM-4 in THUDM's own names"),
    Family("cogvlm2", "cogvlm2", "CogVLM2: matrices for image tokens, a tower: ask by name"),
    Family("bert", "bert", "BERT, alone or with a head"),
    Family("roberta", "bert", "RoBERTa, likewise"),
    Family("xlm-roberta", "bert", "XLM-RoBERTa, as RoBERTa"),
    Family("modernbert", "modernbert", "ModernBERT, alone or with a head"),
    Family("jina_bert", "jina_bert", "Jina's BERT, norms on q and k: ask by name"),
    Family("t5", "t5", "T5: encoder and decoder, relative positions"),
    Family("whisper", "whisper", "Whisper: audio encoder and decoder"),
    Family("qwen2_vl", "vision_language", "Qwen2-VL: Qwen2 beside an image tower"),
    Family("qwen2_5_vl", "vision_language", "Qwen2.5-VL: likewise, a tower with gated blocks"),
    Family("qwen3_vl", "vision_language", "Qwen3-VL: Qwen3, whose first layers read the tower's too"),
    Family("qwen3_vl_moe", "vision_language", "Qwen3-VL with experts, in stacks that lie either way"),
    Family("qwen3_5", "vision_language", "Qwen3.5: its text model beside an image tower"),
    Family("qwen3_5_moe", "vision_language", "Qwen3.5-MoE: likewise"),
    Family("glm4v", "vision_language", "GLM-4.1V: GLM-4 beside an image tower"),
    Family("glm4v_moe", "vision_language", "GLM-4.5V, 4.6V: GLM-4 MoE beside the tower of GLM-4.1V"),
    Family("gemma3", "vision_language", "Gemma 3: its text model beside SigLIP"),
    Family("exaone4_5", "vision_language", "EXAONE 4.5: EXAONE 4 beside an image tower like Qwen2.5-VL's"),
    Family("kimi_k25", "vision_language", "Kimi K2.5: Kimi K2 beside an image tower"),
    Family("gemma4", "vision_language", "Gemma 4: its text model beside towers of images and sound"),
    Family("gemma4_unified", "vision_language", "Gemma 4, unified: patches and sound without towers"),
    Family("mistral3", "vision_language", "Mistral Small 3.1, Ministral 3: Mistral beside Pixtral's tower"),
    Family("llava", "vision_language", "LLaVA, Pixtral: a text model beside CLIP, SigLIP or Pixtral's tower"),
    Family("llava_next", "vision_language", "LLaVA-NeXT: likewise"),
    Family("llava_onevision", "vision_language", "LLaVA-OneVision: likewise"),
    Family("internvl", "vision_language", "InternVL in transformers' names: likewise, a tower of its own"),
    Family("cohere2_vision", "vision_language", "Command A Vision: Command R7B's decoder beside SigLIP"),
    Family("lfm2_vl", "vision_language", "LFM2-VL: LFM2 beside SigLIP 2"),
    Family("llama4", "vision_language", "Llama 4: its text model beside an image tower"),
    Family("paligemma", "vision_language", "PaliGemma: Gemma 1 or 2 beside SigLIP"),
    Family("idefics3", "vision_language", "Idefics 3: a text model beside a tower like SigLIP"),
    Family("smolvlm", "vision_language", "SmolVLM: likewise"),
)

TYPES: dict[str, Family] = {family.model_type: family for family in FAMILIES}
"""transformers' `model_type` -> family."""

GROUP = "fastckpt.recipes"
"""The entry-point group of installed packages that bring recipes: `model_type` = a Recipe."""


def find(config: Mapping[str, JSON]) -> Recipe:
    """The recipe for a config, by its `model_type`. Raises RecipeError naming those there are."""
    name = config.get("model_type")
    if name is None:
        raise RecipeError(
            "config: it has no model_type, so it is none of transformers'; config= (--config) names the "
            "model's, recipe= (--recipe) takes a recipe by name"
        )
    recipe = _known(name) if isinstance(name, str) else None
    if recipe is None:
        raise RecipeError(
            f"config: no recipe for model_type {name!r}, known: {', '.join(TYPES)}; recipe= (--recipe) "
            "takes one by name, a tp_plan= (--tp-plan) of name patterns works without one"
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
        raise RecipeError(f"no recipe {name!r}; known: {', '.join(TYPES)}, or the path of a .py file")
    return recipe


def model(recipe: Recipe, ckpt: Checkpoint, config: Mapping[str, JSON], vocab_size: int | None) -> Model:
    """The model as the recipe reads it, with its `quant_method` and `architecture` from the config."""
    said, classes = said_of(config), config.get("architectures")
    return replace(
        recipe(ckpt, config, vocab_size=vocab_size),
        quant_method=_quant_method(said) if isinstance(said, dict) else "",
        architecture=str(classes[0]) if isinstance(classes, list) and classes else "",
    )


def saved_as(config: Mapping[str, JSON], name: str) -> tuple[str, ...]:
    """What the hub calls a tensor of a config's decoder that training calls `name` (`moe.saved_as`); () where
    its family is not known."""
    decoder = config.get("text_config")
    family = TYPES.get(str((decoder if isinstance(decoder, dict) else config).get("model_type")))
    return family.known.saved_as(name) if family else ()


def imagined(recipe: Recipe, config: Mapping[str, JSON]) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the hub gives a model of this config, which no file need hold.

    Of names that a checkpoint may have or not there are none. Raises RecipeError."""
    nothing = imagining.checkpoint()
    recipe(nothing, config)
    return {name: entry.shape for name, entry in nothing.entries.items()}


def _quant_method(said: Mapping[str, JSON]) -> str:
    """The hub's word for the quantisation, with whatever else decides whether an engine can hold it."""
    form = said.get("format")
    method = form if form in ("pack-quantized", *MICROSCALED) else said.get("quant_method")
    holds = {
        "kv_cache_scheme": bool(said.get("kv_cache_scheme")),
        f"{said.get('bits')} bits": method == "awq" and said.get("bits") != 4,
        "sym false": method == "gptq" and said.get("sym", True) is not True,
        "gptq_v2": method == "gptq" and said_form(said, "checkpoint_format") == "gptq_v2",
    }
    more = " and ".join(what for what, so in holds.items() if so)
    return f"{method} with {more}" if more else str(method)


def _known(name: str) -> Recipe | None:
    if name in TYPES:
        return TYPES[name].known.recipe
    from importlib.metadata import entry_points  # takes longer than all recipes; only strangers need it

    for point in entry_points(group=GROUP, name=name):
        return _checked(point.load(), f"entry point {point.value}")
    return None


class _Source(SourceFileLoader):
    """Runs the bytes it is given: what Python has kept of a file may be of an earlier version of it."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.source, self.path)


def _from_file(path: str) -> Recipe:
    import hashlib  # loads OpenSSL, for a user's own file alone

    try:
        with open(path, "rb") as f:
            source = f.read()
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}") from None
    digest = hashlib.sha256(source).hexdigest()[:12]
    module = ModuleType(f"fastckpt_recipe_{digest}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # as of any import: dataclasses look for it there
    _Source(module.__name__, path, source).exec_module(module)
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
