"""Pictures for captions from the standard single file {weights, hparams, vae_params, epoch}, by torch alone.

    python generate.py dalle.pt --out birds.png

A file without weights (DeepSpeed's auxiliary file) says what to do instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import birds
import torch
from data import Tokenizer, as_picture
from model import DALLE, DiscreteVAE
from pictures import Picture, sheet, write

CAPTIONS = (
    "a red bird with a yellow wing",
    "this bird is blue and has a white wing",
    "a large green bird before the sand",
    "a small black bird before the sky",
    "a yellow bird with brown wings looks left",
    "a white bird with red wings looks right",
)
"""Whose pictures are drawn unless others are given."""


def load(path: Path) -> DALLE:
    """The model of a single file. Raises ValueError with the file's own help where it holds no weights."""
    held = torch.load(path, weights_only=True)
    if isinstance(held["weights"], str):
        raise ValueError(f"{path}: {held['weights']}")
    dalle = DALLE(vae=DiscreteVAE(**held["vae_params"]), **held["hparams"])
    dalle.load_state_dict(held["weights"])
    return dalle


def drawn(dalle: DALLE, captions: Sequence[str], seed: int = 3) -> Picture:
    """A picture for each caption, in rows of three."""
    tokenizer = Tokenizer(birds.WORDS)
    text = torch.stack([tokenizer.tokenize(c, dalle.text_seq_len) for c in captions])
    images = [as_picture(t) for t in dalle.generate_images(text, filter_thres=0.9, seed=seed)]
    return sheet([images[k : k + 3] for k in range(0, len(images), 3)], scale=4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pictures of birds from captions.")
    parser.add_argument("file", type=Path, help="what `fastckpt consolidate --weights-key weights` wrote")
    parser.add_argument("captions", nargs="*", default=CAPTIONS, help="a multiple of three, or fewer")
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        write(given.out, drawn(load(given.file), given.captions))
    except ValueError as e:
        sys.exit(str(e))
