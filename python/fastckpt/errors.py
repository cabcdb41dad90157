"""Every error fastckpt raises on purpose: what, got, wanted, where.

A class says which room refused and carries the exit code of the command line.
Messages are raised deep with the local fact; the spine adds target and file once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FastckptError(Exception):
    """The root of every error raised on purpose; `exit_code` is the command line's."""

    exit_code = 2


def expect(argument: str, value: object, *kinds: type) -> None:
    """Refuse an argument that is of none of these kinds with a FastckptError that names it.

    A bool is no int here, and no string is a list."""
    fits = isinstance(value, kinds)
    if isinstance(value, bool) and bool not in kinds:
        fits = False
    if isinstance(value, (str, bytes)) and not {str, bytes} & {*kinds}:
        fits = False
    if not fits:
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise FastckptError(f"{argument}: wanted {wanted}, got {type(value).__name__} {value!r:.80}")


def near(name: str, among: Iterable[str]) -> str:
    """What a message adds where `name` is not among those there are: the names that are spelled alike."""
    import difflib  # for messages alone

    found = difflib.get_close_matches(name, among, 3)
    return f"; near: {', '.join(found)}" if found else ""


class SourceError(FastckptError):
    """A file of the checkpoint is broken, unsafe, missing or contradicts another."""

    exit_code = 3


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts `where` before the message of a SourceError that is raised within."""
    try:
        yield
    except SourceError as e:
        raise SourceError(f"{where}: {e}") from None


class ViewError(FastckptError):
    """An op of the view algebra does not fit its operand."""


class RecipeError(FastckptError):
    """Names, shapes or config do not fit the model family."""


class LayoutError(FastckptError):
    """A serving layout cannot cut this model for this placement."""


class WriteError(FastckptError):
    """Output could not be made real: no space, no permission, not ours, I/O, no room for the run itself."""

    exit_code = 4


class DeviceError(FastckptError):
    """A device or a compiled part that was asked for is not there."""

    exit_code = 4


class ManagerError(FastckptError):
    """The training side's checkpoint manager cannot do what was asked."""

    exit_code = 4
