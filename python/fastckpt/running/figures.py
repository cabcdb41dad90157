"""What an output tells of its quantised matrices: how large they were and are, and how far their values lie
from the dense ones (docs/formats.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from ..checkpoint import JSON
from ..computed.prequantised import Matrix, owner
from ..planning.copies import NOTHING, nbytes
from ..planning.plans import Plan
from ..quantisation.quantised_targets import flat
from ..quantisation.rounding import Error
from ..quantisation.schemes import Scheme

Made = Mapping[tuple[int, Matrix], Error]
"""(output file, matrix) -> the error of what that file holds of it."""

Figures = dict[str, JSON]


def of(planned: Plan, errors: Mapping[int, Error], made: Made) -> dict[int, dict[str, Figures]]:
    """Rank -> name -> figures, in the plan's order. `errors`: by the plan's tensor, whose name is told;
    `made`: of matrices that were quantised before the layout, by their own name."""
    figures: dict[int, dict[str, Figures]] = {rank: {} for rank in planned.ranks}
    for i, q in planned.quantised.items():
        if i in errors:
            tensor = planned.tensors[i]
            dense = flat(q.shape)[0] * flat(q.shape)[1] * q.dtype.itemsize
            size = tensor.nbytes + planned.tensors[q.scales].nbytes
            figures[tensor.rank][tensor.name] = _figures(q.scheme, q.name, dense, size, errors[i])
    if made:
        ranks = dict(zip(planned.tensors.file.tolist(), planned.tensors.made.ranks, strict=True))
        by_rank: dict[tuple[int, Matrix], Error] = {}
        for (file, matrix), error in made.items():
            key = ranks[file], matrix
            by_rank[key] = by_rank.get(key, Error()) + error
        for key, size in _sizes(planned).items():
            rank, matrix = key
            if (found := by_rank.get(key)) is not None:
                dense = found.values * matrix.dtype.itemsize
                figures[rank][matrix.name] = _figures(matrix.scheme, matrix.name, dense, size, found)
    return {rank: mine for rank, mine in figures.items() if mine}


def texts(planned: Plan, errors: Mapping[int, Error], made: Made) -> list[tuple[int, str, bytes]]:
    """A file of figures for each rank that has some: (rank, path, bytes)."""
    return [
        (rank, f"quantisation-rank-{rank}.json", (json.dumps(mine, indent=1) + "\n").encode())
        for rank, mine in of(planned, errors, made).items()
    ]


def _sizes(planned: Plan) -> dict[tuple[int, Matrix], int]:
    """(rank, matrix) -> the bytes the rank has of it, scales and zero points too; in the plan's order."""
    matrices: dict[Matrix, int] = {}
    number = np.full(len(planned.extents), -1)
    for i, extent in enumerate(planned.extents):
        if (part := owner(extent)) is not None:
            number[i] = matrices.setdefault(part.matrix, len(matrices))
    ranks, known = np.array(planned.tensors.made.ranks), list(matrices)
    sizes: dict[tuple[int, Matrix], int] = {}
    for first, chunk in planned.chunks():
        real = chunk.rows["src_buffer"] != NOTHING
        rows, tensor = chunk.rows[real], chunk.tensor[real]
        which = number[rows["src_buffer"]]
        for rank, k, size in zip(
            ranks[first + tensor].tolist(), which.tolist(), nbytes(rows, "src").tolist(), strict=True
        ):
            if k >= 0:
                sizes[rank, known[k]] = sizes.get((rank, known[k]), 0) + size
    return sizes


def _figures(scheme: Scheme, dense: str, before: int, after: int, error: Error) -> Figures:
    return {
        "scheme": scheme.name,
        "dense": dense,
        "dense_bytes": before,
        "bytes": after,
        "max_error": _figure(error.biggest),
        "rms_error": _figure(error.rms),
        "snr_db": _figure(error.snr),
        "cosine": _figure(error.cosine),
    }


def _figure(value: float | None) -> float | None:
    """Six digits; None for what JSON cannot say."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
