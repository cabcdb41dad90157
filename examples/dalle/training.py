"""One training loop with its checkpoints, and the two ways to take a step: torch alone, or DeepSpeed ZeRO-3.

The number of a commit is the number of steps done, so that it says where a resumed run goes on: the epoch,
and the batch in it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from data import BirdDataset
from fastckpt import CheckpointManager
from fastckpt.errors import FastckptError
from fastckpt.manager.uploaders import Uploader
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, DistributedSampler
from tracker import Shown, Tracker

CLIP = 0.5


class Trainer(Protocol):
    """A model being trained by `world` ranks. `state`: what a checkpoint needs of it."""

    rank: int
    world: int
    optimizer: torch.optim.Optimizer
    state: dict[str, object]
    client_state: Mapping[str, object] | None

    def step(self, *batch: object) -> float:
        """Train on a batch; the loss, averaged over the ranks."""

    def weights(self) -> dict[str, Tensor]:
        """The whole model, on every rank. All ranks call it."""

    def all_well(self, here: bool) -> bool:
        """Whether all is well on every rank. All ranks call it."""


def groups(model: nn.Module) -> list[dict[str, object]]:
    """What is trained, in two groups: biases and norms of the transformer do not decay."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            still = "transformer" in name and ("bias" in name or "norm" in name)
            (no_decay if still else decay).append(parameter)
    found = [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
    return [g for g in found if g["params"]]


class Alone:
    """One process and torch alone: model and optimizer are saved as they are, and `told` beside them."""

    rank, world, client_state = 0, 1, None

    def __init__(self, model: nn.Module, lr: float, batch: int, told: Mapping[str, object]) -> None:
        self.model, self.optimizer = model, torch.optim.AdamW(groups(model), lr=lr)
        self.state: dict[str, object] = {"model": model, "optimizer": self.optimizer, **told}

    def step(self, *batch: object) -> float:
        self.optimizer.zero_grad()
        loss = self.model(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        return {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def all_well(self, here: bool) -> bool:
        return here


class Deep:
    """DeepSpeed ZeRO-3 on gloo ranks, the optimizer offloaded to the CPU; its own files go into the commit,
    with `told` as their client state."""

    def __init__(self, model: nn.Module, lr: float, batch: int, told: Mapping[str, object]) -> None:
        import deepspeed

        # gloo does without it; it is compiled first and leaves 64 MiB a rank in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._gathered = deepspeed.zero.GatheredParameters
        self.optimizer = torch.optim.AdamW(groups(model), lr=lr)
        config = {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_clipping": CLIP,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.state: dict[str, object] = {"model": self.engine}
        self.client_state = dict(told)

    def step(self, *batch: object) -> float:
        loss = self.engine(*batch)
        self.engine.backward(loss)
        self.engine.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        return loss.item() / self.world

    def weights(self) -> dict[str, Tensor]:
        with self._gathered(list(self.engine.module.parameters())):
            return {n: p.detach().clone() for n, p in self.engine.module.named_parameters()}

    def all_well(self, here: bool) -> bool:
        well = torch.tensor(int(here))
        dist.all_reduce(well, dist.ReduceOp.MIN)
        return bool(well)


@dataclass(frozen=True)
class Run:
    """What a training is. `arguments`: of a batch of the loader and the number of the step, what the model is
    called with. `show`: of weights, a batch and the step, a picture and its caption. `help_text`: what stands
    for the weights in the auxiliary file. `die_at`, `fail_at`: the step in which the last rank is killed, or
    fails."""

    root: Path
    dataset: BirdDataset
    epochs: int
    batch: int
    save_every: int
    show_every: int
    arguments: Callable[[list[Tensor], int], tuple[object, ...]]
    show: Callable[[dict[str, Tensor], list[Tensor], int], Shown]
    help_text: str = ""
    keep: int = 3
    artifacts: Uploader | None = None
    die_at: int | None = None
    fail_at: int | None = None


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Say that something failed which only tells of the training: the ranks go on together."""
    try:
        yield
    except (FastckptError, OSError, RuntimeError, ValueError, TypeError) as e:
        print(f"{what} failed, training goes on: {type(e).__name__}: {e}", flush=True)


class Training:
    """The loop. Saves before the first step, every `save_every` steps, every epoch, and after an error."""

    def __init__(self, trainer: Trainer, told: Mapping[str, object], run: Run) -> None:
        self.trainer, self.told, self.run = trainer, told, run
        self.sampler: DistributedSampler[BirdDataset] = DistributedSampler(
            run.dataset, trainer.world, trainer.rank, shuffle=True, drop_last=True
        )
        self.loader = DataLoader(run.dataset, run.batch, sampler=self.sampler, drop_last=True)
        self.scheduler = ReduceLROnPlateau(trainer.optimizer, factor=0.5, patience=1, cooldown=1, min_lr=1e-6)
        self.state: dict[str, object] = {**trainer.state, "scheduler": self.scheduler, "losses": []}
        self.manager = CheckpointManager(run.root / "checkpoints", max_to_keep=run.keep)
        self.tracker: Tracker | None = None
        self.step = 0
        self.began = (0.0, 0)  # when, and at which step, the counting of samples a second began

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // len(self.loader)

    def go(self) -> None:
        """Train to the last epoch, from the newest commit on where there is one."""
        with self.manager:
            self.resume()
            self.save()
            try:
                while self.epoch < self.run.epochs:
                    self.one_epoch()
            except (RuntimeError, OSError, ValueError, KeyboardInterrupt) as e:
                print(f"rank {self.trainer.rank}: saving step {self.step} after an error: {e}", flush=True)
                self.save()  # where another rank is lost this fails too, and what stood stands
                raise
        if self.run.artifacts is not None:
            with reported("the last artifact"):
                self.run.artifacts.close()

    def resume(self) -> None:
        """The newest commit, if any; the tracker and the auxiliary file on the first rank."""
        if self.manager.resume_step() is not None:
            self.manager.restore(template=self.state)
            self.step = self.manager.restored or 0
        error: Exception | None = None
        if self.trainer.rank == 0:
            if self.step:
                print(f"resumed at step {self.step}", flush=True)
            try:
                self.tracker = Tracker(self.run.root, after=self.step)
                if self.run.help_text:
                    held = {**self.told, "epoch": self.epoch, "weights": self.run.help_text}
                    write_aux(self.run.root / "aux.pt", held)
            except (OSError, RuntimeError, ValueError, KeyError) as e:
                error = e
        if not self.trainer.all_well(error is None):  # nothing is trained yet: misconfiguration shows early
            raise error or RuntimeError("the first rank cannot tell of the training")

    def save(self) -> None:
        """Commit where the job stands, unless it stands there already."""
        if self.trainer.rank == 0 and self.run.artifacts is not None:
            with reported("an artifact"):
                self.run.artifacts.wait()  # a commit is not cleaned away while it is carried
        client_state = None
        if self.trainer.client_state is None:
            self.state["epoch"] = self.epoch
        else:
            client_state = {**self.trainer.client_state, "epoch": self.epoch}
        if not self.manager.exists(self.step):
            self.manager.save(self.step, self.state, client_state=client_state)

    def one_epoch(self) -> None:
        """What is left of an epoch."""
        epoch, start = self.epoch, self.step % len(self.loader)
        self.sampler.set_epoch(epoch)
        self.run.dataset.epoch = epoch
        self.began = (time.perf_counter(), self.step)
        batches = islice(self.loader, start, None)
        for _ in range(start, len(self.loader)):
            batch, error = self.fetch(batches)
            if not self.trainer.all_well(error is None):  # all stop here, before the next collective call
                raise error or RuntimeError("another rank could not go on")
            torch.manual_seed(self.step * self.trainer.world + self.trainer.rank)
            loss = self.trainer.step(*self.run.arguments(batch, self.step))
            self.step += 1
            losses = self.state["losses"] = [*self.state["losses"], loss]
            self.tell(epoch, batch, loss)
            if self.step % len(self.loader) == 0:
                self.scheduler.step(sum(losses) / len(losses))
                self.state["losses"] = []
                self.save()
                if self.trainer.rank == 0 and self.run.artifacts is not None:
                    self.run.artifacts.start(self.manager.path(self.step), f"epoch-{epoch:04}")
            elif self.step % self.run.save_every == 0:
                self.save()

    def fetch(self, batches: Iterator[list[Tensor]]) -> tuple[list[Tensor], Exception | None]:
        """The next batch, or why there is none. The rehearsed misfortunes happen here."""
        last = self.trainer.rank == self.trainer.world - 1
        if last and self.step == self.run.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            if last and self.step == self.run.fail_at:
                raise OSError("the disk of the pictures is gone (rehearsed)")
            return next(batches), None
        except (OSError, ValueError) as e:
            return [], e

    def tell(self, epoch: int, batch: list[Tensor], loss: float) -> None:
        """The loss and the samples a second, every ten steps; every `show_every` a picture."""
        said: dict[str, object] = {}
        if self.step % 10 == 0:
            began, done = self.began
            seconds, self.began = time.perf_counter() - began, (time.perf_counter(), self.step)
            rate = (self.step - done) * self.run.batch * self.trainer.world / seconds
            said |= {"loss": loss, "samples_per_second": rate}
        weights = None
        if self.step % self.run.show_every == 0:
            weights = self.trainer.weights()  # all ranks
        if self.tracker is None:
            return
        with reported(f"telling of step {self.step}"):
            if weights is not None:
                said["image"] = self.run.show(weights, batch, self.step)
            if said:
                self.tracker.log({"step": self.step, "epoch": epoch, **said})


def write_aux(path: Path, values: Mapping[str, object]) -> None:
    """A file beside DeepSpeed's that the standard loader opens: everything but the weights."""
    part = path.with_suffix(".part")
    torch.save(dict(values), part)
    part.replace(path)
