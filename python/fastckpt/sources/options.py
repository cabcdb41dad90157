"""What a caller may ask of a source, and what every source does with it: rename tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import FastckptError, SourceError, expect

WEIGHTS = ("master", "module")
REPLICAS = ("equal", "first")


@dataclass(frozen=True, slots=True)
class Options:
    """How to open a checkpoint.

    `tag`: the ZeRO tag or the step of a run, None for the latest. `also`: further directories that hold
    the rest of the files. `rename`: (regex, replacement) pairs applied to every name, in order; a name of
    which nothing remains is left out. `weights`: "master" or "module" (the 16-bit copy of ZeRO-1/2).
    `exclude_frozen`: leave out parameters that the optimizer does not own. `check_crc`: compare the CRC32
    of every record that is used with the zip directory's. A format to which one of these means nothing
    refuses it. `replicas`: what is held more than once must be "equal", or the "first" copy is taken where
    they drifted apart, with a note. Raises FastckptError for a value that is none of these."""

    tag: str | None = None
    also: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    weights: str = "master"
    exclude_frozen: bool = False
    check_crc: bool = False
    replicas: str = "equal"

    def __post_init__(self) -> None:
        expect("tag", self.tag, str, type(None))
        expect("exclude_frozen", self.exclude_frozen, bool)
        expect("check_crc", self.check_crc, bool)
        for option, asked, known in (
            ("weights", self.weights, WEIGHTS),
            ("replicas", self.replicas, REPLICAS),
        ):
            if asked not in known:
                raise FastckptError(f"{option}: {asked!r} is none of {', '.join(known)}")
        for pair in self.rename:
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
                raise FastckptError(f"rename: wanted pairs (regex, replacement), got {pair!r:.80}")
        for pattern, replacement in self.rename:
            try:
                re.sub(pattern, replacement, "")
            except (re.error, IndexError) as e:
                raise FastckptError(f"rename: {pattern!r} -> {replacement!r}: {e}") from None

    def refuse_zero_only(self, where: str) -> None:
        """Raises SourceError for options that mean something only in ZeRO checkpoints."""
        if self.tag is not None:
            raise SourceError(f"{where}: tag {self.tag!r} was asked for, and this is no ZeRO checkpoint")
        if self.weights != "master":
            raise SourceError(
                f"{where}: weights={self.weights!r} was asked for, and this is no ZeRO checkpoint"
            )
        self.refuse_frozen(where)

    def refuse_frozen(self, where: str) -> None:
        """Raises SourceError for `exclude_frozen`: this format does not say what was frozen."""
        if self.exclude_frozen:
            raise SourceError(f"{where}: exclude_frozen was asked for, and only ZeRO says what was frozen")

    def refuse_also(self, where: str) -> None:
        """Raises SourceError for `also`: this holds all there is of it."""
        if self.also:
            raise SourceError(f"{where}: also={self.also[0]!r} was asked for, nothing of it lies elsewhere")

    def refuse_crc(self, where: str) -> None:
        """Raises SourceError for `check_crc`: this format holds no checksums."""
        if self.check_crc:
            raise SourceError(f"{where}: check_crc was asked for, and there are no checksums to compare")

    def name(self, old: str) -> str:
        """The name a tensor gets."""
        for pattern, replacement in self.rename:
            old = re.sub(pattern, replacement, old)
        return old

    def names(self, old: Iterable[str], where: str) -> dict[str, str]:
        """Old name -> new name, "" for one that is left out. Raises SourceError when two become one."""
        out: dict[str, str] = {}
        taken: dict[str, str] = {}
        for name in old:
            new = self.name(name) if self.rename else name
            if new and new in taken:
                raise SourceError(f"{where}: rename makes {new!r} of both {taken[new]!r} and {name!r}")
            out[name] = new
            taken[new] = name
        return out
