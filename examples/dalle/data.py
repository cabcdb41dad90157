"""Pairs of caption and picture from two folders, and the tokenizer of captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pictures
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Tokenizer:
    """Words by number; 0 is padding, so words count from 1, and the last number stands for any other word."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._number = {word: k for k, word in enumerate(words, 1)}

    @property
    def vocab_size(self) -> int:
        """How many numbers there are."""
        return len(self.words) + 2

    def tokenize(self, text: str, length: int) -> Tensor:
        """The numbers of a text's first `length` words, padded with 0: [length]. A longer text is cut."""
        unknown = len(self.words) + 1
        numbers = [self._number.get(word, unknown) for word in text.lower().split()][:length]
        return torch.tensor(numbers + [0] * (length - len(numbers)))

    def decode(self, numbers: Sequence[int]) -> str:
        """The words of numbers, without padding."""
        return " ".join(self.words[n - 1] if n <= len(self.words) else "?" for n in numbers if n)


def as_tensor(picture: pictures.Picture) -> Tensor:
    """[3, height, width] in 0 to 1."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255


def as_picture(tensor: Tensor) -> pictures.Picture:
    """The picture of a tensor [3, height, width]; what lies outside of 0 to 1 is clamped."""
    return tensor.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()


class BirdDataset(Dataset[tuple[Tensor, Tensor]]):
    """(tokens [text_len], picture [3, size, size]) of images/NAME.png and text/NAME.txt.

    Which caption, and how the picture is cropped (to 0.75 to 1 of its area), depends on `seed`, epoch and
    index alone, so that a resumed run sees what an undisturbed one would. An item that cannot be read is said
    and replaced by the next. Raises ValueError where no pair is found."""

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, text_len: int, size: int, seed: int = 0
    ) -> None:
        images = {p.stem: p for p in sorted((directory / "images").glob("*.png"))}
        texts = {p.stem: p for p in sorted((directory / "text").glob("*.txt"))}
        self.pairs = [(images[stem], texts[stem]) for stem in images if stem in texts]
        if not self.pairs:
            raise ValueError(f"{directory}: no picture of images/ has captions of its name in text/")
        self.tokenizer, self.text_len, self.size, self.seed = tokenizer, text_len, size, seed
        self.epoch = 0
        self._said: set[str] = set()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)) % 2**63)
        for step in range(len(self)):
            image, text = self.pairs[(index + step) % len(self)]
            captions = [line for line in text.read_text("utf-8").splitlines() if line.strip()]
            if not captions:
                self._skip(f"{text}: holds no caption")
                continue
            try:
                picture = as_tensor(pictures.read(image))
            except (OSError, pictures.BrokenPicture) as e:
                self._skip(str(e))
                continue
            caption = captions[int(torch.randint(len(captions), (), generator=rng))]
            return self.tokenizer.tokenize(caption, self.text_len), self._cropped(picture, rng)
        raise ValueError("no pair at all can be read")

    def _cropped(self, picture: Tensor, rng: torch.Generator) -> Tensor:
        edge = min(picture.shape[1:])
        side = round(edge * (0.75 + 0.25 * float(torch.rand((), generator=rng))) ** 0.5)
        top, left = (int(torch.randint(n - side + 1, (), generator=rng)) for n in picture.shape[1:])
        cut = picture[None, :, top : top + side, left : left + side]
        return torch.nn.functional.interpolate(cut, self.size, mode="bilinear", antialias=True)[0]

    def _skip(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            print(f"skipped: {why}", flush=True)
