"""What quantising cost: the figures an output keeps of each quantised tensor, for people and as a picture.

Law: nothing here is measured again; `quantisation-rank-R.json` (docs/formats.md) says it all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from ..checkpoint import JSON
from ..errors import SourceError
from ..paths import is_directory, listed
from ..plainjson import json_object, read_json
from .drawing import Canvas
from .text import columns, size

SHOWN = 20
"""Tensors that the text names: the worst."""

MOST, LEAST = 1e300, -1000.0
"""No figure is larger, and no signal so many decibels below the noise."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A quantised tensor: its `rank` and dense `name`, its scheme, bytes before and after, largest and RMS
    error, signal over noise in decibels and cosine; None where there is none."""

    rank: int
    name: str
    scheme: str
    dense_bytes: int
    nbytes: int
    max_error: float | None
    rms_error: float | None
    snr_db: float | None
    cosine: float | None

    @property
    def noise(self) -> float:
        """The RMS error as a share of the RMS value; 0 where nothing was lost."""
        return 0.0 if self.snr_db is None else float(10 ** (-self.snr_db / 20))

    def json(self) -> dict[str, JSON]:
        """All of it as JSON values."""
        return asdict(self)


def read(path: str) -> tuple[Loss, ...]:
    """The losses an output directory tells, rank by rank; none for anything else. Raises SourceError."""
    found: list[Loss] = []
    names = listed(path, "quantisation-rank-*.json") if is_directory(path) else []
    for file in sorted((os.path.join(path, name) for name in names), key=_rank):
        try:
            found += [_loss(_rank(file), json_object(t, file)) for t in read_json(file).values()]
        except (ValueError, KeyError, OverflowError) as e:
            raise SourceError(f"{file}: not the figures of an output: {e!r}") from None
    return tuple(found)


def _rank(file: str) -> int:
    stem = os.path.basename(file).removeprefix("quantisation-rank-").removesuffix(".json")
    return int(stem) if stem.isdecimal() else 0


def _loss(rank: int, record: Mapping[str, JSON]) -> Loss:
    def number(key: str, least: float = -MOST) -> float | None:
        value = record[key]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < MOST:
            raise ValueError(f"{key} is {value!r:.40}")
        return value

    before, after = number("dense_bytes"), number("bytes")
    if before is None or after is None:
        raise ValueError("bytes are missing")
    figures = number("max_error"), number("rms_error"), number("snr_db", LEAST), number("cosine")
    return Loss(rank, str(record["dense"]), str(record["scheme"]), int(before), int(after), *figures)


def text(losses: Sequence[Loss]) -> list[str]:
    """The losses as lines: the totals, then the worst tensors; nothing where there are none."""
    if not losses:
        return []
    before, after = sum(x.dense_bytes for x in losses), sum(x.nbytes for x in losses)
    schemes = ", ".join(sorted({x.scheme for x in losses}))
    worst = sorted(losses, key=lambda x: -x.noise)[:SHOWN]
    which = f"; the {SHOWN} with the most noise" if len(losses) > SHOWN else ""
    head = ("rank", "tensor", "before", "after", "largest error", "RMS error", "signal/noise", "cosine")
    rows = [
        (
            str(x.rank), x.name, size(x.dense_bytes), size(x.nbytes), _text(x.max_error), _text(x.rms_error),
            "-" if x.snr_db is None else f"{x.snr_db:.1f} dB", "-" if x.cosine is None else f"{x.cosine:.6f}",
        )
        for x in worst
    ]  # fmt: skip
    return [
        f"quantised to {schemes} ({len(losses)} tensors, {size(before)} -> {size(after)}{which})",
        *columns([head, *rows]),
    ]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


# ---- the picture ----

INKS = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
    (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
)  # fmt: skip
"""A colour for each role, in turn."""

BLACK, GREY = (40, 40, 40), (225, 225, 225)
WIDTH, HEIGHT, LEFT, TOP, BELOW = 900, 480, 70, 40, 60


def by_role(losses: Iterable[Loss]) -> dict[str, dict[int, float]]:
    """Role -> layer -> noise, the most of all ranks and experts. A role is the last module's name, a layer
    the first number in the tensor's."""
    out: dict[str, dict[int, float]] = {}
    for x in losses:
        module = x.name.removesuffix(".weight").rpartition(".")[2]
        found = re.search(r"(?:^|\.)([0-9]{1,9})(?:\.|$)", x.name)
        layer = int(found[1]) if found else 0
        layers = out.setdefault(module, {})
        layers[layer] = max(layers.get(layer, 0.0), x.noise)
    return out


def picture(losses: Sequence[Loss]) -> bytes:
    """A PNG: noise in percent over layers, a line a role. Raises SourceError where nothing is quantised."""
    if not losses:
        raise SourceError("plot: the output tells of no quantised tensor")
    roles = by_role(losses)
    layers = sorted({n for line in roles.values() for n in line})
    highest = max(v for line in roles.values() for v in line.values()) or 1.0
    step = _step(100 * highest / 5)
    top = step * (int(100 * highest / step) + 1)
    right = LEFT + WIDTH - 330
    canvas = Canvas(WIDTH, HEIGHT)
    bottom = HEIGHT - BELOW

    def across(layer: int) -> int:
        span = layers[-1] - layers[0]
        return LEFT + 10 + (round((layer - layers[0]) / span * (right - LEFT - 20)) if span else 0)

    def up(percent: float) -> int:
        return bottom - round(percent / top * (bottom - TOP))

    canvas.text(LEFT, 14, f"{losses[0].scheme}: RMS error in % of the RMS weight, by layer", BLACK)
    for k in range(round(top / step) + 1):
        canvas.line(LEFT, up(k * step), right, up(k * step), GREY)
        label = f"{k * step:.3g}"
        canvas.text(LEFT - 8 - 6 * len(label), up(k * step) - 3, label, BLACK)
    shown = layers[:: -(-len(layers) // 12)]
    for layer in shown:
        canvas.text(across(layer) - 3 * len(str(layer)), bottom + 10, str(layer), BLACK)
    canvas.text((LEFT + right) // 2 - 15, bottom + 30, "layer", BLACK)
    canvas.line(LEFT, TOP, LEFT, bottom, BLACK)
    canvas.line(LEFT, bottom, right, bottom, BLACK)
    for i, (role, line) in enumerate(sorted(roles.items())):
        ink = INKS[i % len(INKS)]
        points = [(across(n), up(100 * line[n])) for n in sorted(line)]
        for a, b in pairwise(points):
            canvas.line(*a, *b, ink)
        for x, y in points:
            canvas.dot(x, y, ink)
        if TOP + 16 * i < bottom:
            canvas.dot(right + 20, TOP + 16 * i + 3, ink)
            canvas.text(right + 30, TOP + 16 * i, role, BLACK)
    return canvas.png()


def _step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least so much."""
    power = 10.0 ** (len(str(int(1e9 * least))) - 10)
    return next(n * power for n in (1, 2, 5, 10, 20) if n * power >= least)
