"""What servers are to get: the options that say it on a command line, and what they mean.

Law: nothing heavy is imported before an option is read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import FastckptError, SourceError
from ..placement import Placement

if TYPE_CHECKING:
    from ..layouts import Layout
    from ..planning.request import Serving
    from ..quantisation.schemes import Quant


def add(p: argparse.ArgumentParser, *, config: str = "beside CHECKPOINT") -> None:
    """Add the options; `config`: where the model's config is looked for when none is given."""
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("dp", "data"), ("ep", "expert")):
        p.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help=f"{meaning} parallelism (default: 1)"
        )
    p.add_argument("--layout", default="hf", help="hf, vllm, rtp_llm, megatron or same (default: hf)")
    p.add_argument(
        "-L",
        action="append",
        type=_option,
        default=[],
        dest="layout_option",
        metavar="KEY=VALUE",
        help="an option of the layout (docs/layouts.md); repeatable",
    )
    p.add_argument(
        "--dtype", help="dtype of the floats: a name, or `auto` for the config's (default: as stored)"
    )
    add_config(p, config=config)
    p.add_argument("--tp-plan", metavar="FILE", help="JSON of name patterns, for a model without a recipe")
    p.add_argument(
        "--vocab-size", type=int, metavar="N", help="rows of the embedding that are tokens; more are padding"
    )
    add_adapter(p)
    p.add_argument(
        "--apart", action="store_true", help="with --adapter: write it alone, cut as CHECKPOINT would be"
    )
    p.add_argument("--quant", metavar="SCHEME", help="quantise on the way (int8, ...), or dequantise (none)")
    for name, meaning in (
        ("include", "quantise these tensors too"),
        ("exclude", "do not quantise these tensors"),
    ):
        p.add_argument(
            f"--quant-{name}", action="append", default=[], metavar="PATTERN", help=f"{meaning}; repeatable"
        )
    add_files(p)


def add_files(p: argparse.ArgumentParser) -> None:
    """Add the option that cuts an output into files."""
    p.add_argument(
        "--max-shard-size",
        "--max_shard_size",
        type=or_none,
        default="5GB",
        metavar="SIZE",
        help="bytes of one file at most, `none` for a single file (default: 5GB)",
    )


def or_none(text: str) -> str | None:
    """An option's text, None for `none`."""
    return None if text.lower() == "none" else text


class _Once(argparse.Action):
    """An option that cannot be given again: argparse would forget the first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option_string}: wanted one, got a second; a run merges one adapter")
        setattr(namespace, self.dest, values)


def add_adapter(p: argparse.ArgumentParser) -> None:
    """Add the option that names an adapter."""
    p.add_argument("--adapter", action=_Once, metavar="DIR", help="merge this PEFT adapter (LoRA) on the way")


def add_config(p: argparse.ArgumentParser, *, config: str = "beside CHECKPOINT") -> None:
    """Add the option that names the model's config; `config`: where it is looked for when none is given."""
    p.add_argument("--config", metavar="FILE", help=f"config.json or its directory (default: {config})")


def add_recipe(p: argparse.ArgumentParser) -> None:
    """Add the option that names the model's family."""
    p.add_argument(
        "--recipe",
        metavar="FAMILY",
        help="a family that `recipes` lists, or your .py file (default: the config's model_type)",
    )


def add_foreign(p: argparse.ArgumentParser) -> None:
    """Add the options that say what another program's shards are."""
    p.add_argument(
        "--cut-as",
        type=_cut_as,
        metavar="LAYOUT[:KEY=VALUE,...]",
        help="CHECKPOINT is another program's shards: their layout, with its grid and options (vllm:tp=8)",
    )
    p.add_argument(
        "--like",
        metavar="PATH",
        help="with --cut-as: the model's config.json, or a checkpoint with its names and shapes",
    )


def foreign(args: argparse.Namespace) -> tuple[Layout, Placement] | None:
    """How the shards that are read were cut, where they have no record. Raises FastckptError."""
    from ..layouts import layout

    if (args.cut_as is None) != (args.like is None):
        raise FastckptError("--cut-as and --like go together: how the shards were cut, and of what model")
    if args.cut_as is None:
        return None
    if args.tag or args.also or args.rename or args.exclude_frozen_parameters or args.weights != "master":
        raise FastckptError(
            "--cut-as: shards have no tag, no frozen or module weights, lie in one directory, and keep their "
            "names: leave --tag, --also, --rename, --strip-prefix, --weights and "
            "--exclude-frozen-parameters out"
        )
    name, sizes, options = args.cut_as
    return layout(name, options), Placement(**sizes)


def _cut_as(text: str) -> tuple[str, dict[str, int], dict[str, str]]:
    layout, _, rest = text.partition(":")
    options = _by_key("--cut-as", [_option(pair) for pair in rest.split(",")] if rest else [])
    sizes = {axis: natural(options.pop(axis, "1"), f"{axis}: ") for axis in ("tp", "pp", "dp", "ep")}
    return layout, sizes, options


def natural(text: str, of: str = "") -> int:
    """The number that an option's text spells; `of` begins the message of what is none."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{of}wanted a number, got {text[:40]!r}")
    return int(text)


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"wanted KEY=VALUE, got {text!r}")
    return key, value


def _by_key(option: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The values by their keys. Raises FastckptError for a key that stands twice."""
    out: dict[str, str] = {}
    for key, value in pairs:
        if key in out:
            raise FastckptError(f"{option}: {key} stands twice, as {out[key]} and as {value}")
        out[key] = value
    return out


def placement(args: argparse.Namespace) -> Placement:
    """The grid. Raises LayoutError."""
    return Placement(tp=args.tp, pp=args.pp, dp=args.dp, ep=args.ep)


def serving(args: argparse.Namespace) -> Serving:
    """All that was asked for. Raises FastckptError."""
    from ..layouts import layout

    return {
        "placement": placement(args),
        "layout": layout(args.layout, _by_key("-L", args.layout_option)),
        "config": args.config,
        "recipe": args.recipe,
        "tp_plan": _tp_plan(args),
        "vocab_size": args.vocab_size,
        "dtype": args.dtype,
        "quant": _quant(args),
        "adapter": args.adapter,
        "apart": args.apart,
        "max_shard_size": args.max_shard_size,
    }


def _quant(args: argparse.Namespace) -> Quant | str | None:
    """What is quantised, and how. Raises FastckptError."""
    from ..quantisation.schemes import Quant

    if args.quant == "none":
        if args.quant_include or args.quant_exclude:
            raise FastckptError("--quant-include and --quant-exclude go with a scheme, not with none")
        return "none"
    if args.quant is not None:
        scheme = Quant.of(args.quant).scheme
        return Quant(scheme, tuple(args.quant_include), tuple(args.quant_exclude))
    if args.quant_include or args.quant_exclude:
        raise FastckptError("--quant-include and --quant-exclude go with --quant SCHEME")
    return None


def _tp_plan(args: argparse.Namespace) -> dict[str, str] | None:
    """Name patterns and their styles. Raises FastckptError."""
    path = args.tp_plan
    if path is None:
        return None
    from ..plainjson import read_json  # brings numpy, which `--version` does without

    try:
        found = read_json(path)
    except SourceError as e:
        raise FastckptError(f"--tp-plan {e}") from None
    plan = {name: style for name, style in found.items() if isinstance(style, str)}
    if len(plan) != len(found):
        raise FastckptError(f'--tp-plan {path}: wanted {{"name pattern": "style", ...}}')
    return plan
