"""JSON objects as plain values, from files that anyone may have written.

Law: one that may be meant two ways, such as one with a key twice, is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from .checkpoint import JSON
from .errors import SourceError
from .paths import content


def read_json(path: str, limit: int = 64 << 20) -> dict[str, JSON]:
    """The JSON object in a file of at most `limit` bytes. Raises SourceError, as `parse_json` does."""
    data = content(path, limit + 1)
    if len(data) > limit:
        raise SourceError(f"{path}: more than {limit} bytes of JSON")
    return parse_json(data, path)


def parse_json(data: bytes, where: str) -> dict[str, JSON]:
    """The JSON object in `data`. Raises SourceError for anything else and for a doubled key."""
    try:
        out = json.loads(data, object_pairs_hook=unique)
    except SourceError as e:
        raise SourceError(f"{where}: {e}") from None
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{where}: no JSON: {e}") from None
    return json_object(out, where)


def unique(pairs: Sequence[tuple[str, JSON]]) -> dict[str, JSON]:
    """The object of these pairs. Raises SourceError for a key that stands twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        most = Counter(key for key, _ in pairs).most_common(1)
        raise SourceError(f"JSON key {most[0][0]!r} stands twice")
    return out


def json_object(value: JSON, where: str) -> dict[str, JSON]:
    """The value, which must be a JSON object. Raises SourceError."""
    if not isinstance(value, dict):
        raise SourceError(f"{where}: wanted a JSON object, got {type(value).__name__}")
    return value
