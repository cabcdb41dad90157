"""Train the DiscreteVAE or DALLE on captioned pictures of birds, alone or by ranks of DeepSpeed ZeRO-3.

    python birds.py --out data
    torchrun --standalone --nproc-per-node 2 train.py vae --deepspeed --data data --out run
    torchrun --standalone --nproc-per-node 2 train.py dalle --deepspeed --data data --out run

Without torchrun and --deepspeed the same on one process. Started again, it resumes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import birds
import fastckpt
import torch
from data import BirdDataset, Tokenizer, as_picture
from fastckpt.manager.uploaders import LocalDirectory, Uploader
from generate import CAPTIONS, drawn
from model import DALLE, DiscreteVAE
from pictures import sheet, write
from torch import Tensor
from tracker import Shown
from training import Alone, Deep, Run, Training


@dataclass(frozen=True)
class Size:
    """How large the models are, and how long they train; `batch` is of one rank."""

    vae: dict[str, int]
    hparams: dict[str, object]
    batch: int
    vae_epochs: int
    epochs: int
    save_every: int
    show_every: int


TOKENIZER = Tokenizer(birds.WORDS)
FULL = Size(
    vae={"image_size": 32, "num_tokens": 96, "codebook_dim": 48, "num_layers": 2, "hidden_dim": 64},
    hparams={
        "dim": 128, "depth": 3, "heads": 4, "dim_head": 32, "text_seq_len": 16, "reversible": True,
        "num_text_tokens": TOKENIZER.vocab_size, "loss_img_weight": 7,
    },
    batch=16, vae_epochs=40, epochs=24, save_every=150, show_every=100,
)  # fmt: skip
SMOKE = Size(
    vae={"image_size": 16, "num_tokens": 16, "codebook_dim": 8, "num_layers": 2, "hidden_dim": 8},
    hparams={
        "dim": 24, "depth": 1, "heads": 2, "dim_head": 18, "text_seq_len": 12, "reversible": True,
        "num_text_tokens": TOKENIZER.vocab_size, "loss_img_weight": 7,
    },
    batch=4, vae_epochs=1, epochs=3, save_every=2, show_every=5,
)  # fmt: skip
HELP = (
    "no weights are here; make the standard single file of a DeepSpeed checkpoint with `fastckpt consolidate "
    "CHECKPOINT OUT --weights-key weights --client-state hparams --client-state vae_params`"
)


def train_vae(args: argparse.Namespace, size: Size) -> None:
    """The DiscreteVAE, its temperature falling from 1 to 0.5."""
    dataset = BirdDataset(args.data, TOKENIZER, 1, size.vae["image_size"])
    told = {"vae_params": size.vae}
    trainer = (Deep if args.deepspeed else Alone)(DiscreteVAE(**size.vae), 4e-3, size.batch, told)

    def arguments(batch: list[Tensor], step: int) -> tuple[object, ...]:
        return batch[1], max(0.5, 0.997**step)

    def show(weights: dict[str, Tensor], batch: list[Tensor], step: int) -> Shown:
        vae = DiscreteVAE(**size.vae)
        vae.load_state_dict(weights)
        back = vae.decode(vae.get_codebook_indices(batch[1][:4]))
        rows = [[as_picture(t) for t in ts] for ts in (batch[1][:4], back)]
        return Shown(sheet(rows, scale=2), "above: pictures; below: what the VAE makes of them")

    Training(trainer, told, Run(
        args.out / "vae", dataset, size.vae_epochs, size.batch, size.save_every, size.show_every, arguments,
        show,
    )).go()  # fmt: skip


def load_vae(root: Path) -> tuple[DiscreteVAE, dict[str, int]]:
    """The trained DiscreteVAE and its parameters, from the newest commit; a partitioned one is joined."""
    with fastckpt.CheckpointManager(root, rank=0, world=1) as manager:
        step = manager.latest()
        if step is None:
            raise FileNotFoundError(f"{root}: no VAE is trained yet")
        commit = fastckpt.open(manager.path(step))
        told = commit.saved.client_state or manager.restore(step)  # DeepSpeed's, or the state itself
        params = told["vae_params"]
        return fastckpt.load_into(DiscreteVAE(**params), commit), params


def train_dalle(args: argparse.Namespace, size: Size) -> None:
    """DALLE over the frozen DiscreteVAE."""
    vae, vae_params = load_vae(args.out / "vae/checkpoints")
    torch.manual_seed(2)
    dalle = DALLE(vae=vae, **size.hparams)
    told = {"hparams": size.hparams, "vae_params": vae_params}
    trainer = (Deep if args.deepspeed else Alone)(dalle, 1e-3, size.batch, told)
    dataset = BirdDataset(args.data, TOKENIZER, size.hparams["text_seq_len"], vae_params["image_size"])

    def plain(weights: dict[str, Tensor]) -> DALLE:
        copy = DALLE(vae=DiscreteVAE(**vae_params), **size.hparams)
        copy.load_state_dict(weights)
        return copy

    def show(weights: dict[str, Tensor], batch: list[Tensor], step: int) -> Shown:
        text = batch[0][:1]
        image = plain(weights).generate_images(text, filter_thres=0.9, seed=step)
        return Shown(as_picture(image[0]), TOKENIZER.decode(text[0].tolist()))

    artifacts = Uploader(LocalDirectory(args.out / "artifacts"))
    Training(trainer, told, Run(
        args.out / "dalle", dataset, size.epochs, size.batch, size.save_every, size.show_every,
        lambda batch, step: tuple(batch), show, HELP if args.deepspeed else "", artifacts=artifacts,
        die_at=args.die_at, fail_at=args.fail_at,
    )).go()  # fmt: skip
    weights = trainer.weights()
    if trainer.rank == 0:
        write(args.out / "dalle/final.png", drawn(plain(weights), CAPTIONS))


def main(asked: Sequence[str] | None = None) -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Train on captioned pictures of birds.")
    parser.add_argument("model", choices=("vae", "dalle"))
    parser.add_argument("--data", type=Path, required=True, help="what birds.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints, log and pictures go")
    parser.add_argument("--deepspeed", action="store_true", help="ZeRO-3, by the ranks that torchrun starts")
    parser.add_argument("--smoke", action="store_true", help="a few seconds' worth")
    parser.add_argument("--die-at", type=int, metavar="STEP", help="rehearse: SIGKILL to the last rank")
    parser.add_argument("--fail-at", type=int, metavar="STEP", help="rehearse: an error on the last rank")
    args = parser.parse_args(asked)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    (train_vae if args.model == "vae" else train_dalle)(args, SMOKE if args.smoke else FULL)
    if args.deepspeed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
