"""English text that every Python carries (its language reference, as `help()` shows it), as a corpus.

The files are like those of wikitext-2: words and marks apart, rare words `<unk>`, one paragraph a line.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch

EOS, UNKNOWN = "<eos>", "<unk>"
PARTS = ("train", "valid", "test")


def write_text(directory: Path, *, rare: int = 3, smoke: bool = False) -> None:
    """Write train.txt, valid.txt and test.txt: eight, one and one of ten paragraphs.

    A word seen less than `rare` times in train.txt becomes `<unk>`, in all three."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [re.findall(r"\w+|[^\w\s]", p) for p in whole.split("\n\n")]
    paragraphs = [p for p in paragraphs if len(p) > 3][: 400 if smoke else None]
    parts = {
        "train": [p for k, p in enumerate(paragraphs) if k % 10 < 8],
        "valid": paragraphs[8::10],
        "test": paragraphs[9::10],
    }
    seen = Counter(word for p in parts["train"] for word in p)
    directory.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        kept = (" ".join(w if seen[w] >= rare else UNKNOWN for w in line) for line in lines)
        (directory / f"{name}.txt").write_text("\n".join(kept) + "\n", "utf-8")


class Dictionary:
    """Words by number and numbers by word."""

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []

    def add_word(self, word: str) -> int:
        """The number of a word, a new one for a new word."""
        if word not in self.word2idx:
            self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        return self.word2idx[word]

    def __len__(self) -> int:
        return len(self.idx2word)


class Corpus:
    """The three files as tensors of word numbers; a line ends with `<eos>`."""

    def __init__(self, directory: Path) -> None:
        self.dictionary = Dictionary()
        self.train, self.valid, self.test = (self._tokenize(directory / f"{part}.txt") for part in PARTS)

    def _tokenize(self, path: Path) -> torch.Tensor:
        lines = path.read_text("utf-8").splitlines()
        words = (word for line in lines for word in [*line.split(), EOS])
        return torch.tensor([self.dictionary.add_word(word) for word in words])


def batchify(words: torch.Tensor, columns: int) -> torch.Tensor:
    """One long row of words as [length, columns]; what does not fill a column is cut off."""
    length = len(words) // columns
    return words[: length * columns].view(columns, length).t().contiguous()


def get_batch(words: torch.Tensor, start: int, bptt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most `bptt` rows from `start` on, and the rows that follow each of them."""
    length = min(bptt, len(words) - 1 - start)
    return words[start : start + length], words[start + 1 : start + 1 + length]
