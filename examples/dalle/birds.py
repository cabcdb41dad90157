"""Bird-like pictures with captions, drawn from nothing: images/NAME.png and text/NAME.txt, matched by stem.

Each text file holds several captions, one a line, as CUB-200's do. Among the good ones lie a picture that is
cut off, a caption file that is empty, a picture without captions and captions without a picture, and one
caption that is far too long.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pictures

COLOURS = {
    "red": (200, 40, 40), "blue": (50, 80, 200), "yellow": (230, 200, 40), "green": (50, 150, 60),
    "brown": (130, 80, 40), "white": (240, 240, 240), "black": (30, 30, 30), "orange": (240, 140, 30),
}  # fmt: skip
PLACES = {"sky": (190, 220, 250), "grass": (170, 220, 150), "sand": (240, 225, 180)}
CAPTIONS = (
    "a {body} bird with a {wing} wing",
    "this bird is {body} and has a {wing} wing",
    "a {size} {body} bird before the {place}",
    "the {size} bird has a {beak} beak",
    "a {body} bird with {wing} wings looks {way}",
)
WORDS = sorted(
    {word for caption in CAPTIONS for word in caption.split() if "{" not in word}
    | {*COLOURS, *PLACES, "small", "large", "left", "right"}
)
"""Every word that a caption may have: the tokenizer's vocabulary."""


def draw(rng: random.Random, size: int) -> tuple[pictures.Picture, list[str]]:
    """One bird, `size` pixels wide and high, and its captions."""
    body, wing = rng.sample(sorted(COLOURS), 2)
    beak = rng.choice(["orange", "black", "yellow"])
    place, way, large = rng.choice(sorted(PLACES)), rng.choice(["left", "right"]), rng.random() < 0.5
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1  # -1 to 1
    x, y = (x - rng.uniform(-0.15, 0.15)) * (-1 if way == "left" else 1), y - rng.uniform(-0.1, 0.2)
    scale = 1.0 if large else 0.7
    x, y = x / scale, y / scale
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = PLACES[place]
    shapes = (
        (COLOURS[body], (x < -0.3) & (x > -0.85) & (abs(y - 0.12 - (x + 0.3) * 0.3) < 0.12)),  # tail
        ((90, 70, 50), (abs(abs(x + 0.02) - 0.12) < 0.05) & (y > 0.3) & (y < 0.72)),  # legs
        (COLOURS[body], (x / 0.55) ** 2 + (y / 0.38) ** 2 < 1),
        (COLOURS[body], ((x - 0.45) / 0.26) ** 2 + ((y + 0.38) / 0.26) ** 2 < 1),  # head
        (COLOURS[wing], ((x + 0.12) / 0.36) ** 2 + ((y + 0.02) / 0.2) ** 2 < 1),
        (COLOURS[beak], (x > 0.66) & (x < 0.95) & (abs(y + 0.36) < (0.95 - x) * 0.4)),
        ((0, 0, 0), ((x - 0.52) / 0.06) ** 2 + ((y + 0.44) / 0.06) ** 2 < 1),  # eye
    )
    for colour, where in shapes:
        picture[where] = colour
    names = {"body": body, "wing": wing, "beak": beak, "place": place, "way": way,
             "size": "large" if large else "small"}  # fmt: skip
    return picture, [caption.format(**names) for caption in CAPTIONS]


def write(directory: Path, count: int, size: int, seed: int = 7) -> None:
    """Write `count` good pairs and the bad ones. The same arguments write the same bytes."""
    rng = random.Random(seed)
    images, texts = directory / "images", directory / "text"
    images.mkdir(parents=True, exist_ok=True)
    texts.mkdir(exist_ok=True)
    for k in range(count):
        picture, captions = draw(rng, size)
        if k == 0:
            captions = [" ".join(captions * 10)]  # far too long
        pictures.write(images / f"bird-{k:05d}.png", picture)
        (texts / f"bird-{k:05d}.txt").write_text("\n".join(captions) + "\n")
    whole = (images / "bird-00001.png").read_bytes()
    (images / "cut-off.png").write_bytes(whole[: len(whole) // 2])
    (texts / "cut-off.txt").write_text("a red bird with a blue wing\n")
    (images / "empty.png").write_bytes(whole)
    (texts / "empty.txt").write_text("\n\n")
    (images / "no-captions.png").write_bytes(whole)
    (texts / "no-picture.txt").write_text("a red bird with a blue wing\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw pictures of birds, with captions.")
    parser.add_argument("--out", type=Path, required=True, help="gets images/ and text/")
    parser.add_argument("--count", type=int, default=600, help="of pairs (default: 600)")
    parser.add_argument("--size", type=int, default=32, help="pixels wide and high (default: 32)")
    given = parser.parse_args()
    write(given.out, given.count, given.size)
