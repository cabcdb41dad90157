"""What a PEFT adapter's config says of its weights.

Source: peft 0.21, tuners/lora/config.py.

Law: a field of the config that is not known and is set is refused, since it could change a weight.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..checkpoint import JSON
from ..errors import SourceError
from ..sources import peft
from ..sources.patterns import compiled

READ = frozenset(
    ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
     "bias", "modules_to_save", "target_parameters")
)  # fmt: skip
"""Fields of the config that are read, or that the tensors themselves tell."""

HARMLESS = frozenset(
    ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
     "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
     "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
     "qalora_group_size", "runtime_config", "ensure_weight_tying")
)  # fmt: skip
"""Fields that say how an adapter was trained or is run, and change nothing of what it is."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it was; others train against a changed base."""


Patterns = tuple[tuple[re.Pattern[str], float], ...]
"""Which modules' names end with what, and their values."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an adapter's config says. `path`: its file; `ranks`, `alphas`: of modules with values of their
    own; `start`: init_lora_weights; `biases`: the base's biases were trained too; `parameters`: ends of names
    of parameters that were adapted, beside modules."""

    path: str
    rank: float
    alpha: float
    rslora: bool
    ranks: Patterns
    alphas: Patterns
    start: JSON
    biases: bool
    parameters: tuple[str, ...]

    @staticmethod
    def read(path: str) -> Settings:
        """The settings in an adapter_config.json. Raises SourceError for what is not read."""
        config = peft.read_config(path)
        if config.get("peft_type") != "LORA":
            raise SourceError(
                f"{path}: peft_type {config.get('peft_type')!r} is not read, only LORA is; PEFT's "
                "merge_and_unload makes one model of those that can be merged"
            )
        for key, value in config.items():
            if key not in READ | HARMLESS and value:
                raise SourceError(
                    f"{path}: {key} {value!r} is not read; PEFT's merge_and_unload makes one model of it"
                )
        return Settings(
            path=path,
            rank=_number(path, "r", config.get("r")),
            alpha=_number(path, "lora_alpha", config.get("lora_alpha")),
            rslora=_flag(path, "use_rslora", config.get("use_rslora")),
            ranks=_numbers(path, "rank_pattern", config.get("rank_pattern")),
            alphas=_numbers(path, "alpha_pattern", config.get("alpha_pattern")),
            start=config.get("init_lora_weights"),
            biases=config.get("bias") not in (None, "none"),
            parameters=_names(path, "target_parameters", config.get("target_parameters")),
        )

    def scale(self, module: str, rank: int) -> float:
        """What a product is multiplied by, of a module or a parameter. Raises SourceError where its rank is
        not the config's, and where it has several scales."""
        ranks, alphas = _own(self.ranks, module, self.rank), _own(self.alphas, module, self.alpha)
        if rank not in ranks:
            said = " or ".join(f"{r:g}" for r in ranks)
            raise SourceError(f"{self.path}: {module} has rank {rank}, the config says {said}")
        if len(alphas) > 1:
            raise SourceError(
                f"{self.path}: alpha_pattern gives {module} {' and '.join(f'{a:g}' for a in alphas)}: PEFT "
                "trains with the first pattern that fits, and sorts them when it saves; leave the one meant"
            )
        return alphas[0] / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, name: str) -> bool:
        """Whether a tensor of the base is one of `parameters`."""
        return any(f".{name}".endswith(f".{end}") for end in self.parameters)


def _own(patterns: Patterns, module: str, default: float) -> list[float]:
    """The values of the patterns that a module's name ends with (peft's get_pattern_key), each once."""
    return [*dict.fromkeys(value for pattern, value in patterns if pattern.match(module))] or [default]


def _flag(path: str, key: str, value: JSON) -> bool:
    if not isinstance(value, bool | None):
        raise SourceError(f"{path}: {key} {value!r:.80}: wanted true or false")
    return value is True


def _number(path: str, key: str, value: JSON) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SourceError(f"{path}: {key} {value!r}: wanted a positive number")
    return float(value)


def _names(path: str, key: str, value: JSON) -> tuple[str, ...]:
    names = [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
    if names != (value or []):
        raise SourceError(f"{path}: {key} {value!r}: wanted names")
    return (*names,)


def _numbers(path: str, key: str, value: JSON) -> Patterns:
    if not isinstance(value, dict | None):
        raise SourceError(f"{path}: {key} {value!r:.80}: wanted patterns and numbers")
    return tuple(
        (compiled(k, f"{path}: {key}", r"(.*\.)?(", ")$"), _number(path, f"{key}[{k!r}]", v))
        for k, v in (value or {}).items()
    )
