"""The command line: what each command does, one function each (`arguments` says what they take).

Exit codes: 0 ok, 1 mismatch (verify, diff, demo), 2 usage, 3 broken or unsafe input, 4 environment,
129 SIGHUP, 130 Ctrl-C, 141 the reader of our output went away, 143 SIGTERM. An error is one line on stderr,
with --json the object {"error": what, "kind": the error's class, "exit": code}; FASTCKPT_DEBUG=1 or --debug
shows its traceback. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from .doors import serving_options
from .doors.arguments import UsageError, parser
from .doors.terminal import progress, show
from .doors.text import columns, counted, harmless, size
from .errors import FastckptError, WriteError
from .output.signals import Endings
from .placement import Placement

if TYPE_CHECKING:
    from .checkpoint import JSON, Checkpoint
    from .doors.losses import Loss
    from .planning.plans import Plan
    from .running.runs import Report
    from .verification.outputs import VerifyReport

INTERRUPTED, UNHEARD = 130, 141

LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""The variables of torchrun and of Slurm that `--rank auto` reads."""

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `argv` defaults to the process's own."""
    words = sys.argv[1:] if argv is None else argv
    as_json = "--json" in words  # as far as one can tell before they are understood
    debug = os.environ.get("FASTCKPT_DEBUG") == "1"

    def failed(error: BaseException, message: str, code: int, usage: str = "") -> int:
        return _failed(error, message, code, usage, as_json=as_json, debug=debug)

    _prepare()
    endings = Endings()
    try:
        endings.heard()
        commands = parser()
        args = commands.parse_args(words)
        if args.command is None:
            commands.print_help()
            return 2
        as_json, debug = args.json, debug or args.debug
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except SystemExit as e:  # --help, --version; SIGTERM and SIGHUP
        return e.code if isinstance(e.code, int) else 2
    except KeyboardInterrupt as e:
        return failed(e, "interrupted, nothing half made was left behind", INTERRUPTED)
    except BrokenPipeError:
        # Nobody reads our output any more; keep the interpreter's own last flush from failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNHEARD
    except UsageError as e:
        return failed(e, str(e), e.exit_code, e.usage)
    except FastckptError as e:
        return failed(e, str(e), e.exit_code)
    except RuntimeError as e:
        if (ending := _ending(e)) is None:
            raise
        return ending
    except (OSError, MemoryError) as e:
        return failed(e, str(e) or "out of memory", WriteError.exit_code)
    finally:
        endings.as_before()


def _prepare() -> None:
    """Streams that can say anything, and as many open files as the system lets this user have.

    No file that is opened later may get the number of a stream that the caller closed: others write there."""
    with suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(fd)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: what is said goes nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ending(error: BaseException) -> int | None:
    """The exit code of the signal that an error goes back to, None where there was none.

    A second signal, while the first is seen to, can make locks of the standard library raise RuntimeError."""
    before = error.__context__
    while before is not None:
        if isinstance(before, KeyboardInterrupt):
            return INTERRUPTED
        if isinstance(before, SystemExit) and isinstance(before.code, int):
            return before.code
        before = before.__context__
    return None


def _failed(error: BaseException, message: str, code: int, usage: str, *, as_json: bool, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if as_json:
        told = {"error": message, "kind": type(error).__name__, "exit": code}
        text = json.dumps(told)
    else:
        what = "" if isinstance(error, KeyboardInterrupt) else "error: "
        one_line = message.replace("\n", "\\n")
        text = harmless(f"{usage}fastckpt: {what}{one_line}")
    with suppress(OSError):  # the exit code is still heard
        print(text, file=sys.stderr, flush=True)
    return code


# ---- the commands ----


def _inspect(args: argparse.Namespace) -> int:
    from .doors.inspection import inspect
    from .planning import configs

    ckpt = _opened(args)
    if args.config is not None:
        ckpt = replace(ckpt, config=configs.found(ckpt, args.config))
    found = inspect(ckpt, recipe=args.recipe)
    if args.plot is not None:
        _plot(args.plot, found.losses)
    show(args, found.text, found.json)
    return 0


def _plot(path: str, found: Sequence[Loss]) -> None:
    from .doors.losses import picture

    if not path.endswith(".png"):
        raise FastckptError(f"--plot {path}: wanted a name that ends with .png")
    drawn = picture(found)
    try:
        with open(path, "wb") as f:
            f.write(drawn)
    except OSError as e:
        raise WriteError(f"{path}: {e.strerror}") from None


def _plan(args: argparse.Namespace) -> int:
    from .road import plan

    serving = serving_options.serving(args)
    rank = _rank(args.rank, serving_options.placement(args))
    _show_plan(args, plan(_opened(args), rank=rank, **serving), rank)
    return 0


def _reshard(args: argparse.Namespace) -> int:
    from .road import reshard

    if args.dry_run:
        return _plan(args)
    serving = serving_options.serving(args)
    with progress(as_json=args.json, quiet=args.quiet) as shown:
        report = reshard(
            _opened(args),
            rank=_rank(args.rank, serving_options.placement(args)),
            allow_nonfinite=args.allow_nonfinite,
            out=args.out,
            durable=args.durable,
            overwrite=args.overwrite,
            memory=args.memory,
            threads=args.threads,
            progress=shown,
            **serving,
        )
    _show_report(args, report)
    return 0


def _consolidate(args: argparse.Namespace) -> int:
    from .road import consolidate, consolidation

    shaping = dict(
        safe_serialization=args.safe_serialization,
        max_shard_size=args.max_shard_size,
        dtype=args.dtype,
        weights_key=args.weights_key,
        client_state=args.client_state,
        adapter=args.adapter,
    )
    if args.dry_run:
        _show_plan(args, consolidation(_opened(args), **shaping))
        return 0
    with progress(as_json=args.json, quiet=args.quiet) as shown:
        report = consolidate(
            _opened(args),
            args.out,
            **shaping,
            durable=args.durable,
            overwrite=args.overwrite,
            memory=args.memory,
            threads=args.threads,
            progress=shown,
        )
    _show_report(args, report)
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from .recipes import FAMILIES

    def text() -> str:
        types_of: dict[str, tuple[str, ...]] = {}
        for family in FAMILIES:
            for pattern in family.known.ignored:
                types_of[pattern] = *types_of.get(pattern, ()), family.model_type
        lines = ["known to be stale, and left out (--json names all families):"]
        for types in dict.fromkeys(types_of.values()):  # those that are left out of the same families
            patterns = ", ".join(pattern for pattern, of in types_of.items() if of == types)
            some = ", ".join(types) if len(types) <= 8 else f"{len(types)} families, such as {types[0]}"
            lines.append(f"  in {some}: {patterns}")
        return "\n".join([*columns([(f.model_type, f.about) for f in FAMILIES]), *lines])

    def as_json() -> dict[str, JSON]:
        return {
            "families": [
                {"model_type": f.model_type, "about": f.about, "ignored": list(f.known.ignored)}
                for f in FAMILIES
            ]
        }

    show(args, text, as_json)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .verification.outputs import verify

    with progress(as_json=args.json, quiet=args.quiet) as shown:
        report = verify(args.path, plain=args.plain, engine=args.engine, threads=args.threads, progress=shown)

    def text() -> str:
        seen = f"{counted(report.files, 'file')}, {counted(report.tensors, 'tensor')}, {size(report.bytes)}"
        judged = "ok" if report.ok else counted(len(report.problems), "problem")
        return "\n".join([*report.problems, *report.notes, f"{judged}: {seen} in {report.seconds:.2f} s"])

    show(args, text, lambda: _fields(report))
    return 0 if report.ok else 1


def _diff(args: argparse.Namespace) -> int:
    from .doors.difference import diff

    with progress(as_json=args.json, quiet=args.quiet) as shown:
        found = diff(
            args.a, args.b, tag=args.tag, rename=args.rename, weights=args.weights, config=args.config,
            progress=shown,
        )  # fmt: skip
    show(args, found.text, found.json)
    return 0 if found.equal else 1


def _manager(args: argparse.Namespace) -> int:
    from .doors.manager_commands import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from .doors.doctor import examine

    found = examine(args.path)
    show(args, found.text, found.json)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .doors.demo import demo
    from .output.files import parse_size

    return demo(parse_size(args.size), args.keep, as_json=args.json)


COMMANDS: dict[str, Command] = {
    "inspect": _inspect,
    "plan": _plan,
    "reshard": _reshard,
    "consolidate": _consolidate,
    "verify": _verify,
    "diff": _diff,
    "recipes": _recipes,
    "doctor": _doctor,
    "manager": _manager,
    "demo": _demo,
}


# ---- what they print ----


def _show_plan(args: argparse.Namespace, planned: Plan, rank: int | None = None) -> None:
    """What a plan will do; nothing is written. Raises WriteError where it could not be."""
    from .doors.plan_description import describe_plan
    from .running.runs import require_place

    if args.command != "plan":  # a dry run of what writes
        require_place(planned, args.out, rank, overwrite=args.overwrite)
    found = describe_plan(planned, threads=args.threads, memory=args.memory)
    show(args, found.text, found.json)


def _show_report(args: argparse.Namespace, report: object) -> None:
    from .running.runs import Report

    assert isinstance(report, Report)  # the output was a path

    def text() -> str:
        rate = report.bytes_written / report.seconds / 1e9 if report.seconds else 0.0
        tensors = counted(report.tensors, "tensor")
        needed = "" if report.bytes_needed is None else f" for {size(report.bytes_needed)} needed"
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.phases.items())
        return "\n".join(
            [
                *report.notes,
                f"{report.out}: {tensors} in {counted(len(report.files), 'file')}, plan {report.key}",
                *([f"read {size(report.bytes_scanned)} first, for scales"] if report.bytes_scanned else []),
                f"read {size(report.bytes_read)}{needed}, "
                f"wrote {size(report.bytes_written)} in {report.seconds:.2f} s ({rate:.2f} GB/s; {phases}), "
                f"peak memory {size(report.peak_memory)}",
            ]
        )

    show(args, text, lambda: _fields(report))


def _fields(record: Report | VerifyReport) -> dict[str, JSON]:
    """A record of plain values as JSON: the fields under their own names."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    found: dict[str, JSON] = json.loads(json.dumps(values, default=dict))  # dict: a mapping of any kind
    return found


# ---- what they were asked ----


def _opened(args: argparse.Namespace) -> Checkpoint:
    from .joining.foreign import open_shards
    from .opening import open

    cut = serving_options.foreign(args)
    if cut is not None:
        layout, placement = cut
        return open_shards(
            args.path, layout, args.like, placement=placement, recipe=args.recipe, replicas=args.replicas
        )
    return open(
        args.path,
        tag=args.tag,
        also=args.also,
        rename=args.rename,
        weights=args.weights,
        exclude_frozen=args.exclude_frozen_parameters,
        check_crc=args.check_crc,
        replicas=args.replicas,
        recipe=args.recipe,
        config=args.config,
    )


def _rank(asked: int | str | None, placement: Placement) -> int | None:
    """The rank asked for; "auto" is torchrun's or Slurm's, whose world must be the placement's."""
    if not isinstance(asked, str):
        return asked
    for rank, world in LAUNCHERS:
        if rank in os.environ:
            said = os.environ[rank], os.environ.get(world, "")
            if not all(v.isdecimal() for v in said):
                raise FastckptError(
                    f"--rank auto: wanted numbers, got {rank}={said[0]!r}, {world}={said[1]!r}"
                )
            if int(said[1]) != placement.world:
                raise FastckptError(f"--rank auto: {world}={said[1]}, but {placement.world} ranks are served")
            return int(said[0])
    raise FastckptError(f"--rank auto: neither {' nor '.join(r for r, _ in LAUNCHERS)} is set; say --rank N")
