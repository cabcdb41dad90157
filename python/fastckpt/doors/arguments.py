"""What the command line accepts: the commands and their options.

Law: nothing heavy is imported here; every option's value is plain (strings, numbers, pairs).
"""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from .. import __version__
from ..errors import FastckptError
from . import run_options, serving_options
from .manager_commands import add_parser as commands_of_manager

EPILOG = "exit codes: 0 ok, 1 mismatch, 2 usage, 3 broken or unsafe input, 4 environment, 130 Ctrl-C"


class UsageError(FastckptError):
    """The command line is none; `usage` says what would be one."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print and leave."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` is the chosen command's name.

    Its parse_args raises UsageError."""
    top: argparse.ArgumentParser = Parser(
        prog="fastckpt",
        description="ZeRO/FSDP training checkpoints in, serving shards out, in one pass.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"fastckpt {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", epilog=EPILOG, allow_abbrev=False
        )
        run_options.add_printing(made)
        return made

    _inspect(command("inspect", "show what a checkpoint holds, from its headers"))
    _plan(command("plan", "show which bytes of which file would go where; nothing is written"))
    _reshard(command("reshard", "write the shards of the serving ranks"))
    command("recipes", "list the model families that can be read, and the names each leaves out")
    _consolidate(command("consolidate", "write one state dict, as DeepSpeed's zero_to_fp32 does"))
    _verify(command("verify", "check an output against its manifest: digests, headers, NaN and infinity"))
    _diff(command("diff", "compare two checkpoints of any formats; exit 1 where they differ"))
    _doctor(command("doctor", "show what this build and this machine offer"))
    commands_of_manager(commands)
    _demo(command("demo", "take a small ZeRO-3 checkpoint through all of the above, and time it"))
    return top


# ---- what each command takes ----


def _inspect(p: argparse.ArgumentParser) -> None:
    _path(p)
    _source(p)
    serving_options.add_config(p)
    p.add_argument("--plot", metavar="PNG", help="draw what quantising cost, by layer and role")


def _plan(p: argparse.ArgumentParser) -> None:
    _path(p)
    _source(p)
    _rank(p)
    serving_options.add(p)
    run_options.add_limits(p)


def _reshard(p: argparse.ArgumentParser) -> None:
    _path(p)
    _out(p)
    _source(p)
    _rank(p)
    serving_options.add(p)
    _run(p)
    p.add_argument("--allow-nonfinite", action="store_true", help="write NaN and infinity as they are")


def _consolidate(p: argparse.ArgumentParser) -> None:
    _path(p)
    _out(p)
    _source(p)
    serving_options.add_files(p)
    _run(p)
    p.add_argument(
        "--safe-serialization",
        "--safe_serialization",
        action="store_true",
        help="safetensors, not .bin",
    )
    p.add_argument(
        "--dtype",
        type=serving_options.or_none,
        default="float32",
        help="dtype of the float tensors, `none` for each one's own (default: float32)",
    )
    serving_options.add_config(p)
    serving_options.add_adapter(p)
    p.add_argument("--weights-key", metavar="KEY", help="one .bin file, {KEY: state dict}")
    p.add_argument(
        "--client-state",
        action="append",
        default=[],
        metavar="NAME",
        help="with --weights-key: put this plain value of the checkpoint beside the weights; repeatable",
    )


def _verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="DIR")
    p.add_argument(
        "--plain", action="store_true", help="a directory without a manifest: check headers and values alone"
    )
    p.add_argument(
        "--engine",
        metavar="NAME[==VERSION]",
        help="also check names, shapes and dtypes against this engine's loader (vllm, vllm==0.32)",
    )
    run_options.add_threads(p)
    run_options.add_quiet(p)


def _diff(p: argparse.ArgumentParser) -> None:
    p.add_argument("a", metavar="A")
    p.add_argument("b", metavar="B")
    _names(p)
    serving_options.add_config(p, config="beside A, beside B")
    run_options.add_quiet(p)


def _doctor(p: argparse.ArgumentParser) -> None:
    p.add_argument("--path", default=".", metavar="DIR", help="look at the file system that holds DIR")


def _demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("--size", default="64MB", help="bytes of the checkpoint's weights (default: 64MB)")
    p.add_argument("--keep", metavar="DIR", help="work in DIR, new or empty, and leave it")


# ---- options of several commands ----


def _path(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="CHECKPOINT", help="a directory or file of any known format")


def _out(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="OUT", help="the output directory, new or empty")


def _names(p: argparse.ArgumentParser) -> None:
    p.add_argument("-t", "--tag", help="the ZeRO tag, or the step of a run (default: the latest)")
    p.add_argument(
        "--rename",
        action="append",
        type=_rename,
        default=[],
        metavar="REGEX=REPL",
        help="rename tensors, as re.sub does; a name of which nothing remains is left out; cut at the last "
        "`=`; repeatable, applied in order",
    )
    p.add_argument(
        "--strip-prefix",
        action="append",
        type=strip_prefix,
        default=[],
        dest="rename",
        metavar="PREFIX",
        help="take PREFIX off the names that begin with it; repeatable",
    )
    p.add_argument(
        "--weights",
        choices=("master", "module"),
        default="master",
        help="the optimizer's masters, or the module's 16-bit weights (default: master)",
    )


def _source(p: argparse.ArgumentParser) -> None:
    _names(p)
    p.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="DIR",
        help="another directory with files of this checkpoint; repeatable",
    )
    p.add_argument(
        "--exclude-frozen-parameters",
        "--exclude_frozen_parameters",
        action="store_true",
        help="leave out the parameters that were not trained",
    )
    p.add_argument("--check-crc", action="store_true", help="check the CRC32 of every record that is used")
    p.add_argument(
        "--replicas",
        choices=("equal", "first"),
        default="equal",
        help="what ranks hold more than once must be equal, or the first copy is taken (default: equal)",
    )
    serving_options.add_recipe(p)
    serving_options.add_foreign(p)


def _rank(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--rank",
        type=_rank_or_auto,
        metavar="R",
        help="one rank's part only; `auto` takes it from torchrun's or Slurm's environment",
    )


def _run(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--dry-run", action="store_true", help="print the plan, or why OUT is refused; write nothing"
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing output, in one step")
    p.add_argument("--no-fsync", action="store_false", dest="durable", help="do not wait for the disk")
    run_options.add_limits(p)
    run_options.add_quiet(p)


def _rename(text: str) -> tuple[str, str]:
    pattern, equals, replacement = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"wanted REGEX=REPL, got {text!r}")
    try:
        re.compile(pattern)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"{pattern!r} is no regular expression: {e}") from None
    return pattern, replacement


def strip_prefix(prefix: str) -> tuple[str, str]:
    """The rename pair that takes `prefix` off the names that begin with it."""
    return "^" + re.escape(prefix), ""


def _rank_or_auto(text: str) -> int | str:
    return text if text == "auto" else serving_options.natural(text)
