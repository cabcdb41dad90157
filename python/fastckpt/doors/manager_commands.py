"""`fastckpt manager ls | verify | gc | restore | publish`: a job's commits from the command line.

Law: nothing heavy is imported before a command runs; each takes the root of the commits first.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from ..errors import FastckptError, ManagerError, SourceError
from . import run_options, serving_options
from .terminal import progress, show
from .text import columns, counted, size

if TYPE_CHECKING:
    from ..checkpoint import JSON
    from ..manager.commits import Commit
    from ..manager.manager import CheckpointManager
    from ..planning.plans import Plan
    from ..running.runs import Progress


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """Add `manager` with its own commands; `args.action` is the chosen one's name."""
    what = "list, verify, clean, restore and publish the commits of a training job"
    top: argparse.ArgumentParser = commands.add_parser(
        "manager", help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False
    )
    actions = top.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False
        )
        made.add_argument("root", metavar="ROOT", help="the manager's directory")
        made.add_argument("--step-prefix", default="step-", help="how steps are named (default: step-)")
        made.add_argument(
            "--step-digits", type=int, default=8, metavar="N", help="digits of a step's number (default: 8)"
        )
        run_options.add_printing(made)
        return made

    action("ls", "list the commits that stand, with sizes and metrics")

    _of_step(action("verify", "check commits against their digests; exit 1 where one is broken"), "all")

    gc = action("gc", "remove torn leftovers, and commits that no given policy keeps")
    gc.add_argument("--max-to-keep", type=int, metavar="N", help="keep the newest N")
    gc.add_argument("--keep-period", type=int, metavar="N", help="keep steps that N divides")
    gc.add_argument("--keep-best", type=int, metavar="N", help="keep the N best by --metric")
    gc.add_argument("--metric", metavar="NAME", help="what --keep-best compares")
    gc.add_argument("--mode", choices=("min", "max"), default="min", help="which is best (default: min)")
    gc.add_argument("--aside", action="store_true", help="also remove what was set aside")
    gc.add_argument("--dry-run", action="store_true", help="only say which commits would go")

    restore = action("restore", "write the tensors of a commit as safetensors")
    restore.add_argument("out", metavar="OUT", help="the output directory, new or empty")
    _of_step(restore, "the newest")
    restore.add_argument("--rank", type=int, default=0, metavar="R", help="whose state (default: 0)")
    restore.add_argument("--names", nargs="+", metavar="NAME", help="only these tensors")
    restore.add_argument("--overwrite", action="store_true", help="replace an existing output, in one step")
    restore.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    run_options.add_limits(restore)
    run_options.add_quiet(restore)

    publish = action("publish", "reshard a commit for servers and make it current, or go back to a version")
    publish.add_argument("--to", required=True, metavar="DIR", help="the directory of the versions")
    publish.add_argument(
        "--back", metavar="VERSION", help="make this version current again; nothing is written"
    )
    _add_making(publish)
    publish.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    run_options.add_quiet(publish)
    return top


def _add_making(p: argparse.ArgumentParser) -> None:
    """Add the options that say how a version is made."""
    _of_step(p, "the newest")
    p.add_argument(
        "--part", metavar="KEY", help="the state's key that is the model (default: its only module)"
    )
    p.add_argument("--keep", type=int, metavar="N", help="how many versions to keep")
    serving_options.add(p, config="none: a commit holds none")
    serving_options.add_recipe(p)
    p.add_argument("--allow-nonfinite", action="store_true", help="write NaN and infinity as they are")
    run_options.add_limits(p)


def _of_step(p: argparse.ArgumentParser, default: str) -> None:
    p.add_argument("--step", type=int, metavar="N", help=f"the step (default: {default})")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; its exit code. Raises FastckptError."""
    from ..manager.manager import CheckpointManager

    if "://" not in args.root and not os.path.exists(args.root):  # a manager would make it
        raise SourceError(f"{args.root or repr(args.root)}: no such directory")
    keep_best = getattr(args, "keep_best", None)
    with CheckpointManager(
        args.root,
        rank=0,
        world=1,
        step_prefix=args.step_prefix,
        step_digits=args.step_digits,
        max_to_keep=getattr(args, "max_to_keep", None),
        keep_period=getattr(args, "keep_period", None),
        keep_best=keep_best,
        best_metric=getattr(args, "metric", None),
        best_mode=getattr(args, "mode", "min"),
    ) as manager:
        return _ACTIONS[args.action](manager, args)


def _ls(manager: CheckpointManager, args: argparse.Namespace) -> int:
    commits = manager.commits()

    def text() -> str:
        rows = [["step", "made (UTC)", "size", "metrics"], *map(_row, commits)]
        table = columns(rows) if commits else []
        return "\n".join([*table, f"{counted(len(commits), 'commit')} in {manager.root}"])

    show(args, text, lambda: [
        {"step": c.step, "path": manager.path(c.step), "created": c.created, "bytes": c.nbytes,
         "metrics": dict(c.metrics), "key": c.key}
        for c in commits
    ])  # fmt: skip
    return 0


def _row(c: Commit) -> list[str]:
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(c.created))
    return [str(c.step), made, size(c.nbytes), " ".join(f"{k}={v:g}" for k, v in c.metrics.items())]


def _verify(manager: CheckpointManager, args: argparse.Namespace) -> int:
    from ..verification.outputs import verify

    steps = manager.listed() if args.step is None else [args.step]
    if not steps:
        raise _no_commits(manager)
    lines: list[str] = []
    shown: list[JSON] = []
    bad = 0
    for step in steps:
        nbytes, problems = 0, []
        try:
            with progress(as_json=args.json, quiet=args.quiet) as bar:
                each = None if bar is None else partial(_verifying, bar, step)
                report = verify(manager.bring(step, again=True), progress=each)
            nbytes, problems = report.bytes, [*report.problems]
            if step != steps[-1]:  # all of an object store's at once may be more than this disk holds
                manager.forget(step)
        except SourceError as e:
            if args.step is not None:
                raise
            problems = [str(e)]
        bad += bool(problems)
        lines += [f"step {step}: {p}" for p in problems]
        lines.append(f"step {step}: {'BROKEN' if problems else 'ok'}, {size(nbytes)} of tensors")
        shown.append({"step": step, "ok": not problems, "problems": [*problems]})
    lines.append(f"{counted(len(steps), 'commit')}, {bad} broken")
    show(args, lambda: "\n".join(lines), lambda: shown)
    return 1 if bad else 0


def _verifying(bar: Progress, step: int, done: int, total: int, phase: str) -> None:
    bar(done, total, f"{phase} {step}")


def _gc(manager: CheckpointManager, args: argparse.Namespace) -> int:
    from ..manager.commits import LOCK

    used = "://" in args.root or os.path.exists(os.path.join(args.root, LOCK))
    if not used and not manager.listed():  # what looks torn there may be another program's
        raise _no_commits(manager)
    gone = manager.surplus() if args.dry_run else manager.gc(aside=args.aside)
    said = "would go" if args.dry_run else "went"
    named = f"{counted(len(gone), 'commit')} {said}: {', '.join(map(str, gone)) or 'none'}"
    show(args, lambda: named, lambda: [*gone])
    return 0


def _restore(manager: CheckpointManager, args: argparse.Namespace) -> int:
    from ..road import plan, reshard
    from ..running.runs import require_place

    step = _step(manager, args)
    opened = manager.open(step, args.rank)
    names = args.names or opened.names
    opened.prove(names)
    state = opened.checkpoint({n: n for n in names}, own=True)
    if args.dry_run:
        planned = plan(state, layout="same")
        require_place(planned, args.out, None, overwrite=args.overwrite)
        return _show_plan(args, planned)
    with progress(as_json=args.json, quiet=args.quiet) as bar:  # NaN and all: as it was saved
        report = reshard(
            state, layout="same", out=args.out, overwrite=args.overwrite, allow_nonfinite=True,
            memory=args.memory, threads=args.threads, progress=bar,
        )  # fmt: skip
    tensors, nbytes = report.tensors, report.bytes_written
    show(
        args,
        lambda: f"step {step}: {counted(tensors, 'tensor')}, {size(nbytes)} in {args.out}",
        lambda: {"step": step, "out": args.out, "tensors": tensors, "bytes": nbytes},
    )
    return 0


def _publish(manager: CheckpointManager, args: argparse.Namespace) -> int:
    from ..manager import publishing

    if args.back is not None:
        if args.dry_run:
            raise FastckptError("--dry-run: --back moves a link alone, there is no plan to print")
        making = argparse.ArgumentParser()
        _add_making(making)
        dests = [dest for dest, value in vars(making.parse_args([])).items() if getattr(args, dest) != value]
        if given := ["-L" if dest == "layout_option" else f"--{dest.replace('_', '-')}" for dest in dests]:
            raise FastckptError(f"--back {args.back}: moves a link alone; leave out {', '.join(given)}")
    if args.dry_run:
        step = _step(manager, args)
        source = publishing.model_of(manager.open(step, 0), args.part)
        version = os.path.basename(manager.path(step))
        serving = serving_options.serving(args)
        return _show_plan(args, publishing.rehearsed(source, version, args.to, serving, keep=args.keep))
    if args.back is not None:
        publishing.point(args.to, args.back)
    else:
        with progress(as_json=args.json, quiet=args.quiet) as bar:
            manager.publish(
                _step(manager, args), to=args.to, part=args.part, allow_nonfinite=args.allow_nonfinite,
                keep=args.keep, memory=args.memory, threads=args.threads, progress=bar,
                **serving_options.serving(args),
            )  # fmt: skip
    now, there = publishing.current(args.to), publishing.versions(args.to)
    show(
        args, lambda: f"current: {now} of {', '.join(there)}", lambda: {"current": now, "versions": [*there]}
    )
    return 0


def _show_plan(args: argparse.Namespace, planned: Plan) -> int:
    from .plan_description import describe_plan

    found = describe_plan(planned, threads=args.threads, memory=args.memory)
    show(args, found.text, found.json)
    return 0


def _step(manager: CheckpointManager, args: argparse.Namespace) -> int:
    step: int | None = manager.latest() if args.step is None else args.step
    if step is None:
        raise _no_commits(manager)
    return step


def _no_commits(manager: CheckpointManager) -> ManagerError:
    return ManagerError(f"{manager.root}: holds no commits")


_ACTIONS = {"ls": _ls, "verify": _verify, "gc": _gc, "restore": _restore, "publish": _publish}
