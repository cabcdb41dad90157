"""Plain values out of a parsed pickle: one of another kind is a SourceError that says where it stands."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SourceError
from .torchfile import type_name


def mapping(value: object, where: str) -> dict[object, object]:
    """The value, which must be a dict."""
    if not isinstance(value, dict):
        raise SourceError(f"{where}: wanted a dict, got {type_name(value)}")
    return value


def listing(value: object, where: str) -> Sequence[object]:
    """The value, which must be a list or a tuple."""
    if not isinstance(value, (list, tuple)):
        raise SourceError(f"{where}: wanted a list, got {type_name(value)}")
    return value


def integers(value: object, where: str, bits: int = 62) -> tuple[int, ...]:
    """The value, which must be a list or a tuple of numbers in [0, 2^bits)."""
    for n in (listed := listing(value, where)):
        if type(n) is not int or not 0 <= n < 1 << bits:
            shown = n if isinstance(n, int) and n.bit_length() < 128 else ""
            raise SourceError(f"{where}: wanted whole numbers below 2^{bits}, got {type_name(n)} {shown}")
    return tuple(listed)  # type: ignore[arg-type]  # as was just seen
