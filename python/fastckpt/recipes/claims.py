"""How a recipe claims the names of a checkpoint: every name exists, has the right size, and none is left
over.

Law: a claim looks only at shapes, and is checked at once; it returns a function that builds the view. Errors
name the tensor, what was got, what was wanted, and the config key that says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from ..checkpoint import JSON, Checkpoint
from ..dtypes import DType
from ..errors import RecipeError, near
from ..roles import Beside, Embedding, Linear, Norm, Parameter
from ..views import View
from . import strangers
from .imagining import MOST, Imagined
from .quantised import Elements, Form, Quantised, StoredBeside

LARGEST = 1 << 53
"""No size or factor that a config says is larger."""


LEAVES = (".weight", ".bias")
"""What the tensors of a plain module are called below it."""

_SCORES = ("score.weight", "classifier.weight", "value_head.weight", "v_head.summary.weight")
"""What a reward model, a classifier or a critic has in place of the output layer."""

BYTES = ("int8", "float8_e4m3fn")
"""The dtypes of a quantised matrix whose values are bytes; engines hold no fp8 but e4m3fn."""

ELEMENTS: Mapping[Elements, tuple[str, ...]] = {
    "floats": ("float32", "bfloat16", "float16"),
    "exponents": ("uint8",),
    "integers": ("int32", "int64"),
}
"""The dtypes of what stands beside one: scales, those that are powers of two, and zero points that are packed
or the groups of inputs."""


class Dim(NamedTuple):
    """One axis of a tensor: its size, and the config keys it comes from (for errors)."""

    size: int
    key: str

    def times(self, n: int) -> Dim:
        """The axis of `n` such parts."""
        return Dim(n * self.size, f"{n} * {self.key}")


def integer(config: Mapping[str, JSON], key: str, default: int | None = None, *, least: int = 1) -> int:
    """The integer `config[key]`, `least` or more; `default` where missing or null. Raises RecipeError."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise RecipeError(f"config: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        wanted = "a positive integer" if least == 1 else f"an integer from {least} on"
        raise RecipeError(f"config: {key} must be {wanted}, got {value!r}")
    return value


def number(config: Mapping[str, JSON], key: str, default: float, *, least: float) -> float:
    """The number `config[key]`, `least` or more; `default` where missing or null. Raises RecipeError."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LARGEST:
        raise RecipeError(f"config: {key} must be a number from {least:g} on, got {value!r}")
    return float(value)


def each_layer(config: Mapping[str, JSON], key: str, count: int, known: Sequence[str]) -> Sequence[str]:
    """What `config[key]` calls each of `count` layers, all among `known`. Raises RecipeError."""
    said = config.get(key)
    if not isinstance(said, list | str) or len(said) != count or any(kind not in known for kind in said):
        raise RecipeError(f"config: {key} must be {count} of {' and '.join(known)}, got {said!r}")
    return [str(kind) for kind in said]


def flag(config: Mapping[str, JSON], key: str, default: bool) -> bool:
    """The boolean `config[key]`; `default` where it is missing or null. Raises RecipeError."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RecipeError(f"config: {key} must be true or false, got {value!r}")
    return value


def section(config: Mapping[str, JSON], key: str, *, optional: bool = False) -> dict[str, JSON]:
    """The object `config[key]`; an empty one for an `optional` one that is missing or null. Raises
    RecipeError."""
    value = config.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"config: {key} must be an object, got {value!r}")
    return value


def dim(config: Mapping[str, JSON], key: str, *older: str, default: int | None = None) -> Dim:
    """The size under `key`, or under the first `older` name of it that has a value. Raises as `integer`."""
    said = next((k for k in (key, *older) if config.get(k) is not None), key)
    return Dim(integer(config, said, default), said)


def layer_index(layer: str) -> int:
    """The number of a layer by its name."""
    return int(layer.rpartition(".")[2])


def absent() -> None:
    """Builds an optional role that is not there."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention's `q` query heads and `kv` key and value heads, of `dim` features each.

    Raises RecipeError where the query heads do not share the kv heads evenly."""

    q: int
    kv: int
    dim: int

    def __post_init__(self) -> None:
        if self.q % self.kv:
            raise RecipeError(f"config: {self.q} attention heads do not share {self.kv} kv heads evenly")

    @staticmethod
    def of(hidden: Dim, q: Dim, kv: int | None = None) -> Heads:
        """Heads that divide the hidden size, with as many kv heads unless told. Raises RecipeError."""
        if hidden.size % q.size:
            raise RecipeError(f"config: {hidden.key} {hidden.size} is no multiple of {q.key} {q.size}")
        return Heads(q.size, kv or q.size, hidden.size // q.size)


class Claims:
    """The names of one checkpoint, claimed one by one.

    `anchor`: a name that every checkpoint of the family has ("": there is none); where all names have one
    prefix more, the error says how to strip it. `optional`: a prefix that a checkpoint's names may lack
    (GPT-2's base model has no `transformer.`), or have `instead` of. `form`: how its quantised matrices are
    stored. Raises RecipeError."""

    def __init__(
        self,
        ckpt: Checkpoint,
        anchor: str,
        optional: str = "",
        *,
        instead: str = "",
        form: Quantised | None = None,
    ) -> None:
        self.ckpt = ckpt
        self.form = form
        spelled = any(name.endswith(anchor) for name in (*ckpt.entries, *ckpt.aliases))
        self._omitted = "" if spelled or self.imagined is not None else optional
        self._instead = instead if self._omitted else ""
        self._claimed: set[str] = set()
        self._any_quantised = False
        if anchor and self._stored(anchor) not in ckpt:
            self._refuse_wrapped(self._stored(anchor))

    @property
    def block(self) -> int:
        """How many neighbouring outputs, or inputs, of a quantised matrix share a scale."""
        return math.lcm(*(max(u, 1) for kind in self.form.beside for u in kind.unit)) if self.form else 1

    def _stored(self, name: str) -> str:
        return self._instead + name.removeprefix(self._omitted) if name.startswith(self._omitted) else name

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self.ckpt

    def has_matrix(self, name: str) -> bool:
        """Whether the module of that name has a weight, dense or quantised."""
        return f"{name}.weight" in self or (self.form is not None and f"{name}.{self.form.leaf}" in self)

    @property
    def imagined(self) -> Imagined | None:
        """The entries of a checkpoint that has whatever it is asked for, None for a real one's."""
        return self.ckpt.entries if isinstance(self.ckpt.entries, Imagined) else None

    @property
    def most(self) -> int:
        """How many tensors there can be at most: a config may say anything."""
        return len(self.ckpt) if self.imagined is None else MOST

    def layers(self, config: Mapping[str, JSON], key: str = "num_hidden_layers") -> int:
        """How many layers the config says. Raises RecipeError where the checkpoint cannot have so many."""
        count = integer(config, key)
        if count > self.most:
            raise RecipeError(f"config: {key} {count}, and the checkpoint has {self.most} tensors")
        return count

    def missing(self, name: str) -> bool:
        """Whether a tensor that must be there is not."""
        return name not in self and self.imagined is None

    def shape(self, name: str, *dims: Dim) -> tuple[int, ...]:
        """The stored shape of a tensor that must be there; `dims`: its shape where it is imagined."""
        stored = self._stored(name)
        if self.imagined is not None:
            self.imagined.want(stored, tuple(d.size for d in dims))
        if stored not in self.ckpt:
            if why := strangers.wrapped(self._names):
                raise RecipeError(f"{self.ckpt.path}: {why}")
            known = next((f" ({note})" for note in self.ckpt.unread if note.startswith(f"{stored}: ")), "")
            more = known + near(stored, self.ckpt)
            if not self._claimed:
                more += (
                    "; names of another program's own get the hub's by rename= (--rename), or are read by a "
                    "recipe= (--recipe) of yours"
                )
            raise RecipeError(f"{self.ckpt.path}: the model needs {stored}, which is not there{more}")
        found = self.ckpt.entries[self.ckpt.aliases.get(stored, stored)].shape
        if 0 in found and dims and all(d.size for d in dims):
            raise RecipeError(
                f"{stored} holds no element, as a save at ZeRO-3 that gathers no weights leaves it; open the "
                "ZeRO checkpoint itself"
            )
        return found

    def length(self, name: str, *dims: Dim) -> int:
        """The rows of a tensor that must be there; `dims` as in `shape`. Raises RecipeError for a scalar."""
        if not (found := self.shape(name, *dims)):
            raise RecipeError(f"{self._stored(name)} is a scalar, wanted {len(dims)} axes")
        return found[0]

    def tensor(self, name: str, *dims: Dim) -> Callable[[], View]:
        """Claims a tensor of that shape; the result builds its view."""
        got, want = self.shape(name, *dims), tuple(d.size for d in dims)
        stored = self._stored(name)
        if got != want:
            keys = ", ".join(d.key for d in dims)
            raise RecipeError(f"{stored}: got shape {got}, wanted {want} = ({keys})")
        self._claimed.add(self.ckpt.aliases.get(stored, stored))
        return lambda: self.ckpt[stored]

    def floats(self, name: str, *dims: Dim) -> Callable[[], View]:
        """Claims a tensor of that shape that is used as it is: integers mean nothing without a scale."""
        build, dtype = self.tensor(name, *dims), self._dtype(name)
        if dtype.kind != "float":
            raise RecipeError(
                f"{self._stored(name)}: got {dtype}, wanted floats; how it is quantised, if it is, config's "
                "quantization_config must say"
            )
        return build

    def parameter(
        self, name: str, *dims: Dim, kept: bool = False, stored: str | None = None
    ) -> Callable[[], Parameter]:
        """Claims one tensor of that shape, which is stored as `stored`, if given; `kept`: it keeps its dtype,
        whatever the others are cast to."""
        view = self.tensor(stored or name, *dims)
        return lambda: Parameter(name, view().as_stored() if kept else view())

    def carried(self, patterns: Sequence[str], *, bias: bool) -> list[Callable[[], Parameter]]:
        """Claims the weight, of any shape, and the bias of every module that matches one of `patterns`;
        `bias`: all of them have one."""
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.ckpt if name.endswith(LEAVES))
        out = []
        for module in (m for m in modules if any(fnmatchcase(m, p) for p in patterns)):
            weight = [Dim(size, f"{module}.weight's") for size in self.shape(f"{module}.weight")]
            out.append(self.parameter(f"{module}.weight", *weight))
            if bias or f"{module}.bias" in self:
                out.append(self.parameter(f"{module}.bias", *weight[:1]))
        return out

    def linear(
        self,
        name: str,
        out: Dim,
        into: Dim,
        *,
        bias: bool = False,
        transposed: bool = False,
        stored: str | None = None,
    ) -> Callable[[], Linear]:
        """Claims the matrix [out, into] of the hub's module `name` (which is stored as the module `stored`,
        if given), its bias, and the tensors beside a quantised one."""
        at = stored or name
        form = self.form
        if form is not None and self._is_quantised(at, form):
            build = self._quantised(name, at, out, into, form)
            self._any_quantised = True
        else:
            build = self._plain(name, at, out, into, transposed)
        offset = self.floats(f"{at}.bias", out) if bias else absent
        return lambda: replace(build(), bias=offset())

    def norm(self, name: str, *dims: Dim, bias: bool = False, plus_one: bool = False) -> Callable[[], Norm]:
        """Claims a norm's weight of that shape, and its bias where it has one."""
        weight = self.floats(f"{name}.weight", *dims)
        offset = self.floats(f"{name}.bias", *dims) if bias else absent
        return lambda: Norm(name, weight(), offset(), plus_one)

    def rows(self, name: str, count: int, width: Dim) -> Callable[[], Embedding]:
        """Claims the first `count` vectors of a table. Raises RecipeError where it has fewer."""
        stored = Dim(self.length(f"{name}.weight", Dim(count, "rows"), width), "rows")
        if stored.size < count:
            raise RecipeError(f"{name}.weight has {stored.size} rows, the vocabulary {count}")
        weight = self.floats(f"{name}.weight", stored, width)
        return lambda: Embedding(name, weight().narrow(0, 0, count))

    def table(self, name: str, rows: Dim, width: Dim) -> Callable[[], Embedding]:
        """Claims a table of vectors."""
        weight = self.floats(f"{name}.weight", rows, width)
        return lambda: Embedding(name, weight())

    def _dtype(self, name: str) -> DType:
        stored = self._stored(name)
        return self.ckpt.entries[self.ckpt.aliases.get(stored, stored)].dtype

    def _plain(self, name: str, at: str, out: Dim, into: Dim, transposed: bool) -> Callable[[], Linear]:
        weight = self.floats(f"{at}.weight", *((into, out) if transposed else (out, into)))
        dtype = self._dtype(f"{at}.weight")
        if self.form is not None and dtype.itemsize == 1:
            raise RecipeError(f"{at}.weight is {dtype}, and has no {self.form.beside[0].leaf} beside it")
        return lambda: Linear(name, weight().T if transposed else weight(), transposed=transposed)

    def _is_quantised(self, at: str, form: Quantised) -> bool:
        return f"{at}.{form.leaf}" in self and all(
            f"{at}.{kind.leaf}" in self for kind in form.beside if kind.needed
        )

    def _quantised(self, name: str, at: str, out: Dim, into: Dim, form: Quantised) -> Callable[[], Linear]:
        """A quantised matrix. Raises RecipeError where a dtype was asked for that its bytes cannot become."""
        leaf, dtype = self._stored(f"{at}.{form.leaf}"), self._dtype(f"{at}.{form.leaf}")
        wanted = {(1, 1): BYTES, (1, 2): ("uint8",)}.get(form.packed, ("int32",))
        if dtype.name not in wanted:
            raise RecipeError(
                f"{leaf} is quantised, so it must be {' or '.join(wanted)}, got {dtype}; ask for no dtype"
            )
        rows, columns = (_over(d, u) for d, u in zip((out, into), form.packed, strict=True))
        weight = self.tensor(f"{at}.{form.leaf}", *((columns, rows) if form.transposed else (rows, columns)))
        beside = [self._beside(at, out, into, kind) for kind in form.beside if f"{at}.{kind.leaf}" in self]
        if form.shape and f"{at}.{form.shape}" in self:
            self.tensor(f"{at}.{form.shape}", Dim(2, "outputs and inputs"))
        whole = (out.size, into.size) if form.shape else None

        def build() -> Linear:
            view = weight().T if form.transposed else weight()
            made = tuple(b() for b in beside)
            return Linear(
                name,
                view,
                transposed=form.transposed,
                beside=made,
                leaf=form.leaf,
                packed=form.packed,
                whole=whole,
            )

        return build

    def _beside(self, at: str, out: Dim, into: Dim, kind: StoredBeside) -> Callable[[], Beside]:
        name = f"{at}.{kind.leaf}"
        rows, columns = (_over(d, u, up=True) for d, u in zip((out, into), kind.unit, strict=True))
        whole = Dim(rows.size * columns.size, f"{rows.key} * {columns.key}")
        dims: Mapping[Form, tuple[Dim, ...]] = {
            "matrix": (rows, columns), "transposed": (columns, rows), "vector": (whole,), "scalar": ()
        }  # fmt: skip
        got, dtype, wanted = len(self.shape(name)), self._dtype(name), ELEMENTS[kind.elements]
        if dtype.name not in wanted:
            raise RecipeError(
                f"{self._stored(name)}: got {dtype}, wanted {kind.elements} ({' or '.join(wanted)})"
            )
        form = next((f for f in kind.forms if len(dims[f]) == got), kind.forms[0])
        stored = self.tensor(name, *dims[form])

        def build() -> Beside:
            view = stored().as_stored()
            view = view.T if form == "transposed" else view.reshape((rows.size, columns.size))
            return Beside(kind.leaf, view, kind.unit, form)

        return build

    def close(self, ignored: Sequence[str] = ()) -> tuple[str, ...]:
        """Ends the claims. Returns the unclaimed names, which must all match a pattern of `ignored`.

        Raises RecipeError naming those that do not."""
        left = [name for name in self.ckpt.entries if name not in self._claimed]
        unused = [name for name in left if not any(fnmatchcase(name, pattern) for pattern in ignored)]
        if unused:
            more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            raise RecipeError(
                f"{self.ckpt.path}: the model has no place for {', '.join(unused[:5])}{more}; "
                f"ignored are only: {', '.join(ignored) or 'none'}{strangers.beside(unused, self._claimed)}"
            )
        if self.form is not None and not self._any_quantised and self.imagined is None:
            raise self.called_quantised()
        return tuple(left)

    def called_quantised(self) -> RecipeError:
        """What there is to say of dense weights that the config calls quantised."""
        return RecipeError(
            f"{self.ckpt.path}: config says quantization_config, and no matrix is quantised; engines "
            "would look for scales: name a config without it, config= (--config)"
        )

    @property
    def _names(self) -> list[str]:
        return [*self.ckpt.entries, *self.ckpt.aliases]

    def _refuse_wrapped(self, anchor: str) -> None:
        names = self._names
        if why := strangers.adapted(names) or strangers.wrapped(names) or strangers.within(names, anchor):
            raise RecipeError(f"{self.ckpt.path}: {why}")


def vocabulary(
    claims: Claims,
    config: Mapping[str, JSON],
    vocab_size: int | None,
    *,
    embedding: str,
    hidden: Dim,
    tied_default: bool,
    head: str | None = "lm_head",
    head_bias: str = "",
    trained_head: str | None = None,
    key: str = "vocab_size",
) -> tuple[int, Embedding, Linear, bool]:
    """Claims the token embedding and `head`: (effective vocabulary, embedding, lm_head, tied).

    `head` None: the model has none, and the embedding stands for it. `head_bias`: the name of the head's
    bias, where it has one; `trained_head`: another name the head may be stored under; `key`: config's key for
    the rows. Raises RecipeError where the stored rows are another number, unless `vocab_size` says how many
    of them count.

    The config says whether the pair is tied. Where it does and the checkpoint holds two tensors, that is a
    RecipeError: transformers 5 unties a pair that differs. Files with the same bytes twice do not come here,
    since opening them found the pair to be one (sources/ties.py)."""
    want = integer(config, key) if vocab_size is None else vocab_size

    def rows(name: str, *more: Dim) -> View:
        stored = claims.length(name, Dim(want, key), *more)
        if vocab_size is None and stored != want:
            raise RecipeError(
                f"{name} has {stored} rows, config's {key} is {want}; vocab_size= (--vocab-size) says which "
                "to serve"
            )
        if not 0 < want <= stored:
            raise RecipeError(f"{name} has {stored} rows, vocab_size= asks for {want}")
        return claims.floats(name, Dim(stored, "rows"), *more)().narrow(0, 0, want)

    table = Embedding(embedding, rows(f"{embedding}.weight", hidden))
    if head is None:
        return want, table, Linear(embedding, table.weight), True
    stored = f"{head}.weight"
    if trained_head is not None and claims.missing(stored):
        stored = f"{trained_head}.weight"
    bias = rows(head_bias) if head_bias else None
    if not flag(config, "tie_word_embeddings", tied_default):
        if claims.missing(stored):
            scores = next(
                (f"; {n} is: layout 'same' has such a model whole" for n in _SCORES if n in claims), ""
            )
            raise RecipeError(
                f"{claims.ckpt.path}: {head}.weight is not there and config's tie_word_embeddings is "
                f"false{scores}"
            )
        return want, table, Linear(head, rows(stored, hidden), bias, bias_name=head_bias), False
    if stored in claims and not _same_bytes(rows(stored, hidden), table.weight):
        raise RecipeError(
            f"config says tie_word_embeddings, yet {embedding}.weight and {stored} are two tensors; set it "
            f"to false in the config to serve both as they are, or leave {stored} out: rename= (--rename "
            f"'^{re.escape(stored)}$=')"
        )
    return want, table, Linear(head, table.weight, bias, bias_name=head_bias), True


def _over(dim: Dim, unit: int, *, up: bool = False) -> Dim:
    """How many units of size `unit` an axis has (0: one unit); `up`: the last may be short. Raises
    RecipeError."""
    if unit == 1:
        return dim
    if not up and dim.size % unit:
        raise RecipeError(f"{dim.key} {dim.size} is no multiple of the {unit} values that are packed as one")
    return Dim(-(-dim.size // unit) if unit else 1, f"{dim.key} / {unit}" if unit else "1")


def _same_bytes(a: View, b: View) -> bool:
    return a.dtype is b.dtype and a.extents is b.extents and np.array_equal(a.rows, b.rows)
