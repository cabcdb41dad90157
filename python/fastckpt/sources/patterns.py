"""Regular expressions that a checkpoint's files say, which may have been written to take for ever.

Law: one is compiled only where matching it against a name takes a time that is bounded: few repeats, none of
a group, and few groups.
"""

from __future__ import annotations

import re

from ..errors import SourceError

_ATOM = r"(?:[\w/:@#,;=~ -]|\\[^\w\s]|\\[dw]|\.|\[[\w.^-]+\])"
_PATTERN = re.compile(rf"\^?(?:{_ATOM}[+*]?|\((?:\?:)?|[|)](?![+*]))*\$?")
REPEATS, GROUPS, LENGTH = 2, 2, 4096
"""The most repeats, groups and characters of a pattern: one that fails is tried at every place of each
repeat, with every alternative of each group."""


def compiled(text: str, where: str, before: str = "", behind: str = "") -> re.Pattern[str]:
    """The pattern, between two of our own. Raises SourceError for one that is not read."""
    bare = re.sub(r"\\.", "", text)
    few = len(re.findall(r"[+*]", bare)) <= REPEATS and bare.count("(") <= GROUPS and len(text) <= LENGTH
    if _PATTERN.fullmatch(text) is None or not few:
        raise SourceError(
            f"{where}: pattern {text!r:.80} is not read: characters, `.`, `\\d`, `\\w`, `[..]`, at most "
            f"{GROUPS} groups and {REPEATS} repeats, none of a group, are"
        )
    try:
        return re.compile(before + text + behind)
    except re.error as e:
        raise SourceError(f"{where}: pattern {text!r:.80} is no regular expression: {e}") from None
