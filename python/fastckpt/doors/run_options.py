"""How a run goes and what it says: the options that set its limits and its progress."""

from __future__ import annotations

import argparse

from .serving_options import natural


def add_printing(p: argparse.ArgumentParser) -> None:
    """Add `--json` and `--debug`, which every command has."""
    p.add_argument(
        "--json", action="store_true", help="print JSON; progress and errors as JSON lines on stderr"
    )
    p.add_argument("-d", "--debug", action="store_true", help="show the traceback of an error")
    p.set_defaults(quiet=False)


def add_limits(p: argparse.ArgumentParser) -> None:
    """Add `--memory` and `--threads`."""
    p.add_argument("--memory", metavar="SIZE", help="bytes held at once (default: 64 MiB + 4 MiB a thread)")
    add_threads(p)


def add_threads(p: argparse.ArgumentParser) -> None:
    """Add `--threads`."""
    p.add_argument("--threads", type=_positive, metavar="N", help="workers (default: the usable cores)")


def add_quiet(p: argparse.ArgumentParser) -> None:
    """Add `--quiet`."""
    p.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def _positive(text: str) -> int:
    if (number := natural(text)) < 1:
        raise argparse.ArgumentTypeError("wanted at least 1")
    return number
