"""Roles as the hub stores them: under its names, in its shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..dtypes import int64
from ..roles import Beside, Linear, Norm, Parameter
from ..stored import constant
from ..target import Target
from ..views import View


def stored(linear: Linear) -> Iterator[Target]:
    """A matrix as the hub stores it: transposed where the hub has it so, with its bias and what stands beside
    it, and with its own (cut) sizes where the hub keeps sizes."""
    return _tensors(replace(linear, whole=linear.whole and linear.shape))


def out_by_in(linear: Linear) -> Iterator[Target]:
    """A matrix as [out, in] whatever the hub stores (but a quantised one as it is), with its bias and what
    stands beside it, scalars as vectors of one, and with the hub's own sizes."""
    beside = tuple(replace(b, form="vector") if b.form == "scalar" else b for b in linear.beside)
    return _tensors(replace(linear, beside=beside) if beside else replace(linear, transposed=False))


def _tensors(linear: Linear) -> Iterator[Target]:
    yield Target(f"{linear.name}.{linear.leaf}", linear.weight.T if linear.transposed else linear.weight)
    yield from bias(linear)
    for b in linear.beside:
        yield Target(f"{linear.name}.{b.leaf}", in_form(b))
    if linear.whole is not None:
        yield Target(f"{linear.name}.weight_shape", constant(np.array(linear.whole, np.int64), int64))


def in_form(beside: Beside) -> View:
    """What stands beside a matrix, shaped as the hub has it."""
    match beside.form:
        case "matrix":
            return beside.view
        case "transposed":
            return beside.view.T
        case "vector":
            return beside.view.reshape((beside.view.numel,))
        case "scalar":
            return beside.view.reshape(())


def bias(linear: Linear) -> Iterator[Target]:
    """The bias of a matrix alone; nothing where it has none."""
    if linear.bias is not None:
        yield Target(linear.bias_name or f"{linear.name}.bias", linear.bias)


def norm(role: Norm | None) -> Iterator[Target]:
    """A norm under its hub name, whole; nothing for None."""
    if role is not None:
        yield Target(f"{role.name}.weight", role.weight)
        if role.bias is not None:
            yield Target(f"{role.name}.bias", role.bias)


def parameter(role: Parameter | None) -> Iterator[Target]:
    """A lone tensor under its hub name, whole; nothing for None."""
    if role is not None:
        yield Target(role.name, role.view if role.shape is None else role.view.reshape(role.shape))
