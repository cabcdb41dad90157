"""CheckpointManager: saves a running job's state as commits, restores it with proof, keeps what policy says.

Law: what `save` reported stands on every node, whole; what `restore` gave was checked byte for byte. Every
method that says "collective" is called by all ranks, in the same order.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType

from ..checkpoint import JSON
from ..dtypes import DType
from ..errors import ManagerError, WriteError, expect
from ..layouts import Layout
from ..placement import Placement, grid_of
from ..planning.request import Serving
from ..quantisation.schemes import Quant
from ..running.runs import Progress, Report
from ..sources.training import rank_directory
from . import policies, publishing, saving
from .background import Background
from .commits import Commit, ready
from .coordination import Group, by_some, join, together
from .loading import Asked
from .metadata import SAVE, MetadataHandler
from .opened import Opened, open_step
from .pieces import Snapshots
from .policies import Keep, Moment, When
from .remote import store_at
from .reporting import CheckpointWarning, Reporter, Timing
from .resuming import Resuming
from .retention import Retention
from .saving import Disk
from .sigterm import Sigterm
from .state_tree import flatten


class CheckpointManager:
    """Commits of a training job below one directory.

    `root`: a path or file:// URL, the same on all ranks; `shared=False`: each node has a disk of its own
    there. Any other URL is an object store that fsspec knows ("s3://bucket/run"): commits are made in
    `scratch`, a local directory that all ranks share (default: in the user's cache), and carried there.
    Ranks find each other through torch.distributed where it is initialised, else `rank` of `world` (or
    torchrun's variables) meet on the file system; `node` names this rank's node (default: the host).

    What to save: every `save_interval` steps, at `save_on_steps`, after `save_seconds`, or what `save_when`
    says. What to keep: the last `max_to_keep`, multiples of `keep_period`, commits `keep_seconds` apart,
    the `keep_best` best by `best_metric` ("min" or "max" is best), what `keep` names; all where none is
    given; the newest always. `metadata`: who else is told. `path_prefix` stands before each step's name and
    replaces `root`, as caffe2's; `step_prefix` and `step_digits` spell steps. `async_save`: `save` returns
    when the state is in host memory; one save in flight, its error comes with the next call, or as a warning
    where none comes.
    `save_on_signal`: SIGTERM makes the next `save` happen whatever the policy, then `preempted` is true.
    `durable` waits for the disk; `timeout` is how long a rank waits for the others, in seconds.

    Making one is collective. Raises ManagerError."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        rank: int | None = None,
        world: int | None = None,
        node: str | None = None,
        shared: bool = True,
        save_interval: int = 1,
        save_on_steps: Collection[int] = (),
        save_seconds: float | None = None,
        save_when: When | None = None,
        max_to_keep: int | None = None,
        keep_period: int | None = None,
        keep_seconds: float | None = None,
        keep_best: int | None = None,
        best_metric: str | None = None,
        best_mode: str = "min",
        keep_without_metric: bool = False,
        keep: Keep | None = None,
        metadata: MetadataHandler | None = None,
        path_prefix: str | None = None,
        path_type: str = "local",
        step_prefix: str = "step-",
        step_digits: int = 8,
        scratch: str | os.PathLike[str] | None = None,
        async_save: bool = False,
        save_on_signal: bool = False,
        durable: bool = True,
        timeout: float = 1800.0,
    ) -> None:
        self._when = policies.when_asked(save_interval, save_on_steps, save_seconds, save_when)
        keep_what = policies.keep_asked(
            max_to_keep, keep_period, keep_seconds, keep,
            keep_best=keep_best, best_metric=best_metric, best_mode=best_mode, without=keep_without_metric,
        )  # fmt: skip
        self._best = (best_metric, best_mode)
        expect("shared", shared, bool)
        expect("async_save", async_save, bool)
        expect("save_on_signal", save_on_signal, bool)
        expect("root", root, str, os.PathLike)
        expect("path_prefix", path_prefix, str, type(None))
        expect("node", node, str, type(None))
        expect("metadata", metadata, MetadataHandler, type(None))
        self._store = store_at(
            os.fspath(root) if path_prefix is None else path_prefix,
            path_type=path_type, named=path_prefix is not None, prefix=step_prefix, digits=step_digits,
            scratch=scratch, shared=shared, durable=durable,
        )  # fmt: skip
        self._async = async_save
        self._sigterm = Sigterm()
        self._preempted = False
        self._snapshots = Snapshots()
        self._last_save = -math.inf
        self._closed = False
        self._anew()
        self._group, self._behind = join(self._store.root, rank, world, timeout)
        try:
            self._disk = Disk.of(self._group, None if shared else node or socket.gethostname())
            if metadata is not None:
                nodes = [f"rank {r}" for r in range(self._group.world)]
                metadata.set_params(
                    root=self._store.root, nodes=nodes, path_prefix=path_prefix, path_type=path_type
                )
            self._retention = Retention(self._store, self._disk, keep_what)
            with suppress(WriteError):  # a root that cannot be reached now may be when something is saved
                self._retention.newest = self.latest()
            self._reporter = Reporter(self._group.rank, self.path, metadata)
            self._resuming = Resuming(self._store, self._group, self._disk, self._retention, self._reporter)
            if save_on_signal:
                self._sigterm.listen()
        except BaseException:  # a group has threads and sockets of its own
            self._group.close()
            self._behind.close()
            raise

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _anew(self) -> None:
        """Nothing under way in this process."""
        self._process, self._lock, self._background = os.getpid(), threading.RLock(), Background()

    @property
    def _turn(self) -> threading.RLock:
        """Whose turn it is: one thread at a time saves, restores or cleans up."""
        if self._process != os.getpid():  # a fork: the threads and what they do stayed with the parent
            self._anew()
        return self._lock

    # ---- who ----

    @property
    def root(self) -> str:
        """The directory of the commits."""
        return self._store.root

    @property
    def rank(self) -> int:
        """This rank."""
        return self._group.rank

    @property
    def world(self) -> int:
        """How many ranks save together."""
        return self._group.world

    @property
    def group(self) -> Group:
        """The ranks, for callers that have to agree on something themselves."""
        return self._group

    @property
    def preempted(self) -> bool:
        """Whether a rank got SIGTERM and all ranks know of it; the last `save` was done then."""
        return self._preempted

    @property
    def in_flight(self) -> bool:
        """Whether a save goes on in the background, or ended there and nobody asked yet how."""
        return self._background.in_flight

    @property
    def restored(self) -> int | None:
        """The step that was restored last, whole; None: none was."""
        return self._resuming.step

    # ---- saving ----

    def save(
        self,
        step: int,
        state: object,
        metrics: Mapping[str, float] | None = None,
        *,
        client_state: Mapping[str, object] | None = None,
        force: bool = False,
        overwrite: bool = False,
    ) -> bool:
        """Commit `state` as `step` where the policy (or `force`, or SIGTERM) says so; whether it did.

        `state`: a dict of tensors, plain values, modules, optimizers, schedulers (whatever has state_dict
        and load_state_dict), nested as you like; or one of these; or a DeepSpeed engine, which then writes
        its own files into the commit with `client_state`. `metrics` are kept with the commit. `overwrite`
        replaces a commit of this step. With `async_save` true says that the save began. Skipped, with a
        warning, where the checkpoints cannot be reached. Collective.

        Raises ManagerError or WriteError on every rank; then the commits that stood still stand."""
        expect("step", step, int)
        expect("metrics", metrics, Mapping, type(None))
        with self._turn:
            self._require_open()
            return self._save(step, state, metrics or {}, client_state or {}, force, overwrite)

    def _save(
        self,
        step: int,
        state: object,
        metrics: Mapping[str, float],
        client_state: Mapping[str, object],
        force: bool,
        overwrite: bool,
    ) -> bool:
        token = self._voted(step, force)
        if token is None:
            return False
        self.wait()
        if not self._reachable(step):
            return False

        stands = self.exists(step) and step not in self._retention.broken
        if self._retention.newest is not None and step < self._retention.newest and not stands:
            warnings.warn(
                f"step {step} is older than step {self._retention.newest}, which a resume would take; "
                "rewind() sets newer commits aside",
                CheckpointWarning,
                stacklevel=3,
            )
        prepared: list[saving.Request] = []

        def prepare() -> JSON:
            if stands:
                self._require_replaceable(step, overwrite)
            prepared.append(self._request(step, token, state, metrics, client_state, aside=not stands))
            return None

        together(self._group, f"save of step {step}", prepare, at=token)
        (request,) = prepared
        self._last_save = time.monotonic()
        if self._async and not request.engines and not self._preempted:
            self._background.start(partial(self._finish, self._behind, request))
        else:
            self._finish(self._group, request)
        return True

    def _require_replaceable(self, step: int, overwrite: bool) -> None:
        """Raises ManagerError where a step that stands is not to be replaced, or cannot be."""
        if not self._store.local:
            raise ManagerError(f"step {step} stands, and an object store replaces nothing in one step")
        if not overwrite:
            raise ManagerError(
                f"{self._store.path(step)}: step {step} is committed already; overwrite=True replaces it"
            )

    def _request(
        self,
        step: int,
        token: str,
        state: object,
        metrics: Mapping[str, float],
        client_state: Mapping[str, object],
        *,
        aside: bool,
    ) -> saving.Request:
        """What this rank saves, taken out of the state: training may go on."""
        flat = flatten(state)
        self._resuming.compare(step, set(flat.tensors))
        if client_state and not flat.engines:
            raise ManagerError("client_state goes with a DeepSpeed engine; put the values into the state")
        taken = self._snapshots.take(flat.tensors, copy=self._async)
        return saving.Request(
            step, token, flat.tree, taken, flat.engines, client_state, _finite(step, metrics), aside=aside
        )

    def _voted(self, step: int, force: bool) -> str | None:
        """The token of this save where the policy, `force` or a rank's SIGTERM asks for it; else None."""

        def vote() -> JSON:
            since, told = time.monotonic() - self._last_save, self._sigterm.heard
            moment = Moment(step, self._retention.newest, since, told, self._background.busy)
            want = self._group.rank == 0 and (force or self._when(moment))
            return [want, told, secrets.token_hex(8)]

        said = together(self._group, f"save of step {step}", vote)
        votes = [v for v in said if isinstance(v, list)]
        self._preempted = self._preempted or any(v[1] is True for v in votes)
        wanted, _, token = votes[0]
        return str(token) if wanted or self._preempted else None

    def _finish(self, group: Group, request: saving.Request) -> None:
        """Commit, tell, and clean: in this order."""
        try:
            took = saving.save(self._store, group, self._disk, request)
        finally:
            self._snapshots.give_back(request.taken)
        self._retention.broken.discard(request.step)
        self._retention.newest = request.step
        self._reporter.done(SAVE, request.step, took)
        self._retention.clean(group)

    def wait(self) -> None:
        """Wait for the save in flight, if any; its error is raised here. Collective in effect."""
        with self._turn:
            self._background.wait()

    def _reachable(self, step: int) -> bool:
        """Whether every rank can reach its checkpoints now; says so where not."""
        said = together(self._group, f"reach for step {step}", self.accessible)
        lacking = [r for r, ok in enumerate(said) if ok is not True]
        if lacking:
            warnings.warn(
                f"step {step} is not saved: ranks {lacking[:8]} cannot reach checkpoints in {self.root}",
                CheckpointWarning,
                stacklevel=3,
            )
        return not lacking

    def accessible(self, step: int | None = None) -> bool:
        """Whether checkpoints can be written here now, or that step be read. Of this node alone."""
        if not self._reporter.accessible(step):
            return False
        if step is None:
            return ready(self.root)
        with suppress(WriteError):
            return self._store.commit(step) is not None
        return False

    # ---- restoring ----

    def restore(
        self,
        step: int | None = None,
        names: Sequence[str] | None = None,
        allow_missing: bool = False,
        *,
        template: object = None,
    ) -> object:
        """The state of a step (default: the newest valid one), or only the tensors `names` of it.

        Every byte is checked against its digest. Without `step`, a broken commit is passed over, loudly,
        for the valid one before it. `template`: objects of the state's shape; its modules, optimizers and
        the like are loaded, its tensors filled on their device and in their dtype, its dicts completed, and
        it is what is returned (for a DeepSpeed engine: the client state). With `names` only their bytes are
        read and the result is a dict by name. `allow_missing`: what one side lacks is left alone. Collective.

        Raises ManagerError where there is nothing, or nothing that fits; SourceError where `step` is broken.
        In both cases the template is as it was, unless its own load_state_dict refused it halfway."""
        expect("step", step, int, type(None))
        expect("names", names, Sequence, type(None))
        asked = Asked(None if names is None else tuple(names), allow_missing, template)
        with self._turn:
            self._require_open()
            self.wait()
            return self._resuming.restore(step, asked)

    # ---- what there is ----

    def steps(self) -> list[int]:
        """The steps that stand whole on this disk, ascending."""
        return [c.step for c in self._store.commits()]

    def listed(self) -> list[int]:
        """The steps that have a commit record here, whole or broken, ascending."""
        return self._store.steps()

    def commits(self) -> list[Commit]:
        """What stands whole on this disk, with its metrics and sizes, oldest first."""
        return self._store.commits()

    def latest(self) -> int | None:
        """The newest step that stands whole on this disk."""
        listed = reversed(self._store.steps())  # the records of older ones stay unread
        return next((step for step in listed if self._store.commit(step) is not None), None)

    def best(self, metric: str | None = None, mode: str | None = None) -> int | None:
        """The best step by a metric (default: the manager's); None where no commit has it."""
        name = metric or self._best[0]
        if name is None:
            raise ManagerError("best: by which metric?")
        found = policies.ranking(name, mode or self._best[1])(self._store.commits())
        return found[0].step if found else None

    def exists(self, step: int) -> bool:
        """Whether every rank sees a step whole, and of the same save. Collective: `steps` is what this one
        sees."""

        def key() -> JSON:
            found = self._store.commit(step)
            return None if found is None else found.key

        with self._turn:
            self._require_open()
            said = together(self._group, f"look for step {step}", key)
        return said[0] is not None and all(s == said[0] for s in said)

    def names(self, step: int) -> list[str]:
        """The names of a step's tensors, as this rank saved them. Raises SourceError, ManagerError."""
        self._store.bring(step)
        manifest = self._store.manifest(step)
        return open_step(self._store.path(step), manifest, self._group.rank, self._group.world).names

    def path(self, step: int, node: int | None = None) -> str:
        """Where a step lies, or the part of one rank in it."""
        path = self._store.path(step)
        return path if node is None else os.path.join(path, rank_directory(node))

    def bring(self, step: int, *, again: bool = False) -> str:
        """Where a step lies on this machine: brought there from an object store, not yet proven; `again`:
        also where a sound copy is here. Raises SourceError where it does not stand, WriteError."""
        self._store.bring(step, again=again)
        return self._store.path(step)

    def forget(self, step: int) -> None:
        """Remove the copy of a step that `bring` made; where commits lie on this machine's disks, nothing.
        Raises WriteError."""
        self._store.forget(step)

    def resume_step(self, user_step: int | None = None) -> int | None:
        """The step to resume from: the user's, else the newest that stands on every node; None: none.

        The metadata handler is asked first; an answer that does not stand is passed over with a warning.
        Raises ManagerError where the user's step does not stand. Collective."""
        with self._turn:
            self._require_open()
            self.wait()
            return self._resuming.resume_step(user_step)

    def stats(self) -> tuple[Timing, ...]:
        """What each save, load and partial load of this process took, on every rank."""
        return tuple(self._reporter.stats)

    def open(self, step: int, rank: int) -> Opened:
        """A step as one of the ranks that saved it sees it. Raises SourceError, ManagerError."""
        self._store.bring(step)
        manifest = self._store.manifest(step)
        world = manifest.record.placement.get("ranks", 1)
        if not 0 <= rank < world:
            raise ManagerError(f"{self.path(step)}: was saved by {world} ranks, there is no rank {rank}")
        return open_step(self._store.path(step), manifest, rank, world)

    # ---- housekeeping ----

    def gc(self, *, aside: bool = False) -> list[int]:
        """Remove what no policy keeps and what dead saves left; `aside`: also what was set aside.

        The steps that went. Collective."""
        with self._turn:
            self._require_open()
            self.wait()
            return self._retention.gc(self._group, aside=aside)

    def surplus(self) -> list[int]:
        """The steps that no policy keeps, which the next cleaning removes. Of this disk alone: where nodes
        have disks of their own, none, as it does not show what stands on all of them."""
        return self._retention.surplus()

    def rewind(self, step: int) -> list[int]:
        """Set commits newer than `step` aside, so that it is the newest; the steps that went. Collective.

        They keep their bytes under hidden names until `gc(aside=True)`."""
        with self._turn:
            self._require_open()
            self.wait()
            return self._retention.rewind(self._group, step)

    def close(self) -> None:
        """Wait for the save in flight and let go of everything; its error is raised here.

        What is collective or writes raises ManagerError from here on; what only looks at commits goes on."""
        with self._turn:
            self._closed = True
            try:
                self.wait()
            finally:
                self._background.end()
                self._store.release()
                self._group.close()
                self._behind.close()
                self._sigterm.unheard()

    def _require_open(self) -> None:
        """Raises ManagerError after `close`."""
        if self._closed:
            raise ManagerError(f"{self.root}: this manager is closed; make another one")

    # ---- to the servers ----

    def publish(
        self,
        step: int,
        tp: int = 1,
        layout: str | Layout = "hf",
        *,
        to: str | os.PathLike[str],
        part: str | None = None,
        placement: Placement | None = None,
        config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
        recipe: str | None = None,
        tp_plan: Mapping[str, str] | None = None,
        vocab_size: int | None = None,
        dtype: str | DType | None = None,
        quant: str | Quant | None = None,
        adapter: str | os.PathLike[str] | None = None,
        apart: bool = False,
        max_shard_size: str | int | None = "5GB",
        allow_nonfinite: bool = False,
        keep: int | None = None,
        memory: str | int | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Report | None:
        """Reshard the model of a committed step into a directory of its own below `to`, and move the link
        `to/current` there in one step. `part`: the state's key that is the model (default: its only module
        or engine). `keep`: versions that stay, the one that is current always; the others are arguments of
        `reshard`. One rank works, the report is its own. Collective. Raises what `reshard` raises; the link
        is as it was then."""
        self._require_open()
        self.wait()
        serving: Serving = {
            "placement": grid_of(tp, placement), "layout": layout, "config": config, "recipe": recipe,
            "tp_plan": tp_plan, "vocab_size": vocab_size, "dtype": dtype, "quant": quant, "adapter": adapter,
            "apart": apart, "max_shard_size": max_shard_size,
        }  # fmt: skip

        def work() -> Report | None:
            source = publishing.model_of(self.open(step, 0), part)
            return publishing.publish(
                source, self._store.name(step), to, serving, allow_nonfinite=allow_nonfinite, keep=keep,
                memory=memory, threads=threads, progress=progress,
            )  # fmt: skip

        return by_some(self._group, f"publish of step {step}", self._group.rank == 0, work)


def _finite(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics that can be compared and written; others are left out, with a warning."""
    numbers = {}
    for name, value in metrics.items():
        expect("metrics: a name", name, str)
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise ManagerError(f"metric {name}: wanted a number, got {value!r:.80}") from None
    for name in [k for k, v in numbers.items() if not math.isfinite(v)]:
        said = f"step {step}: metric {name} is {numbers.pop(name)} and left out"
        warnings.warn(said, CheckpointWarning, stacklevel=7)  # the caller of `save`
    return numbers
