"""What one matrix or norm becomes for rtp-llm: whole, under the names of class W, not yet cut.

How a matrix is stored decides its form and its table: [in, out] by default and for packed int4; [out, in]
with the checkpoint's scales for int8 and fp8. What takes arithmetic on values (1 + gamma, reciprocals of
input scales, one scale in place of several) is computed when it is read. Source: rtp-llm's weights by scheme,
in model_loader/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ... import dtypes
from ...computed.finishes import agreed, largest, plus_one, reciprocal
from ...errors import LayoutError
from ...roles import Beside, Linear, Norm
from ...views import View
from ..cuts import joined
from ..hub_form import in_form
from .merge import flat, merge_fp8
from .weights import STATIC


class Whole(NamedTuple):
    """A whole weight: W's name, the tensor, how it is stored (a key of TABLES), bits of packed values.
    `finish`: applied to a rank's part; `also`: as in Target."""

    name: str
    view: View
    table: str = "default"
    bits: int = 4
    finish: Callable[[View], View] | None = None
    also: tuple[View, ...] = ()


def norm(name: str, role: Norm | None) -> Iterator[Whole]:
    """A norm's factor and, where it has one, its bias; nothing for None."""
    if role is None:
        return
    yield Whole(f"{name}_gamma", plus_one(role.weight) if role.plus_one else role.weight)
    if role.bias is not None:
        yield Whole(f"{name}_beta", role.bias)


def table_of(linear: Linear) -> str:
    """The table for a matrix as it is stored. Raises LayoutError for a form the engine does not have."""
    if not linear.beside or linear.packed != (1, 1):
        return "default"
    scale = linear.part("weight_scale") or linear.part("weight_scale_inv")
    kind = (linear.weight.dtype is dtypes.int8, scale.unit if scale else None)
    match kind:
        case True, (1, 0):
            return "int8"
        case False, (1, 0):
            return "fp8_channel"
        case False, (0, 0):
            return "fp8_tensor"
        case False, (128, 128):
            return "fp8_block"
    raise LayoutError(
        f"layout rtp_llm: {linear.name} is {linear.weight.dtype} with a scale for {kind[1]} outputs and "
        "inputs; wanted int8 by output, or fp8 by output, by matrix or by blocks of 128 x 128"
    )


def matrix(
    stem: str,
    linears: Sequence[Linear],
    parts: tuple[int | None, int],
    end: str = "",
    *,
    one_scale: bool = False,
) -> Iterator[Whole]:
    """The outputs of `linears` (several that read one input are joined) as `{stem}w{end}`, with scales, zeros
    and bias. `parts`: which axis of [out, in] is cut (None: by heads, or not at all) and by how many ranks;
    blocks and groups must divide too. `one_scale`: of fp8 with one scale a matrix, one for all of them."""
    linear = joined(linears[0].name, linears) if len(linears) > 1 else linears[0]
    if linear.leaf == "weight_packed":
        raise LayoutError(
            f"layout rtp_llm: {linear.name} is compressed-tensors' packed integers, which the engine reads "
            "of experts alone; quantised here, exclude it by a pattern, or take awq-group or gptq-group"
        )
    table, packed = table_of(linear), linear.packed != (1, 1)
    one_scale = one_scale and table == "fp8_tensor" and len(linears) > 1
    axis, count = parts
    if axis is not None:
        whole_blocks(linear, axis, count)
    bits = 32 // max(linear.packed) if packed else 4
    kernel = with_one_scale(linears) if one_scale else linear.weight
    yield Whole(f"{stem}w{end}", kernel.T if table == "default" else kernel, table, bits)
    for b in linear.beside:
        if b.leaf == "input_scale":
            each = vectors(linears, b.leaf)
            view = each[0] if end == "13" else flat(each)
            yield from inputs(stem + end, each, view, table, f"{linear.name}.{b.leaf}", one_scale=one_scale)
        elif b.leaf == "smoother" and len(linears) > 1:  # they read one input
            each = vectors(linears, b.leaf)
            shared = agreed(f"{linear.name}.{b.leaf}", each)
            yield Whole(beside_name(stem, end, linear, b), shared, table, also=tuple(each))
        elif name := beside_name(stem, end, linear, b):
            finish = _one_of(f"{linear.name}.{b.leaf}") if one_scale and b.leaf == "weight_scale" else None
            yield Whole(name, _beside(b, table), table, bits, finish)
    if linear.bias is not None:
        yield Whole(f"{stem}b{end}", linear.bias, table)


def beside_name(stem: str, end: str, linear: Linear, beside: Beside) -> str:
    """W's name for what stands beside a matrix; "" for an order that is none (g_idx without desc_act)."""
    match beside.leaf, stem + end:
        case (("weight_scale" | "weight_scale_inv" | "scales"), _):
            return f"{stem}s{end}"
        case "qzeros", _:
            return f"{stem}z{end}"
        case "g_idx", _:
            return ""
        case (("smoother" | "shift"), "attn_o_"):
            return f"attn_o_{beside.leaf}"
        case "smoother", "attn_qkv_":
            return "attn_i_smoother"
        case "smoother", "ffn_2":
            return "ffn_smoother"
    raise LayoutError(f"layout rtp_llm has no place for {linear.name}.{beside.leaf}")


def vectors(linears: Sequence[Linear], leaf: str) -> list[View]:
    """What each has beside it under that name, as float32 vectors."""
    found = (b.view for x in linears for b in x.beside if b.leaf == leaf)
    return [v.reshape((v.numel,)).cast(dtypes.float32) for v in found]


def inputs(
    matrix: str, scales: Sequence[View], view: View, table: str, name: str, *, one_scale: bool
) -> Iterator[Whole]:
    """`view`, the scale of a matrix's inputs, and its reciprocal. `scales`: that of each fused matrix; those
    of gate and up must agree, while q, k and v, and experts, each keep their own.

    Raises LayoutError where the engine has no such scale, since it quantises those inputs dynamically."""
    found = STATIC.get(table, {}).get(matrix)
    if found is None:
        raise LayoutError(f"layout rtp_llm has no name for {name}, beside {matrix}w stored as {table}")
    values, inverses = found
    for n in values:
        if matrix == "ffn_13":
            yield Whole(n, agreed(name, scales), table, also=tuple(scales))
        else:
            yield Whole(n, view, table, finish=_one_of(name) if one_scale else None)
    for n in inverses:
        if one_scale:
            yield Whole(n, view, table, finish=_one_of(name, inverse=True))
        else:
            yield Whole(n, reciprocal(name, view), table)


def with_one_scale(linears: Sequence[Linear]) -> View:
    """The matrices' outputs as if all had been quantised with the largest of their scales."""
    return merge_fp8([*(x.weight for x in linears), *vectors(linears, "weight_scale")], linears[0].name)


def _one_of(name: str, *, inverse: bool = False) -> Callable[[View], View]:
    """Makes the largest of a rank's scales, or 1 / that, as a scalar."""
    return lambda view: largest(name, view.reshape((1, view.numel)), inverse=inverse).reshape(())


def _beside(beside: Beside, table: str) -> View:
    """[in, out] beside packed values, a vector beside int8, one number a matrix, else [out, in] as it is."""
    if table == "default":
        return beside.view.T
    if beside.form == "vector" or table == "int8":
        return beside.view.reshape((beside.view.numel,))
    return in_form(beside) if table == "fp8_tensor" else beside.view


def whole_blocks(linear: Linear, axis: int, count: int, *, followed: bool = False) -> None:
    """Raises LayoutError where `count` ranks cut what shares a scale, or packed values; `followed`: another
    matrix begins where a part ends, so that one rank's must end with a block too."""
    size = linear.shape[axis]
    for unit in (linear.packed[axis], *(b.unit[axis] for b in linear.beside)):
        if unit > 1 and (count > 1 or followed) and size % (unit * count):
            raise LayoutError(
                f"layout rtp_llm: {linear.name} has {size} on axis {axis}, which tp {count} does not cut "
                f"into whole blocks of {unit}"
            )


def no_bias(*linears: Linear | None) -> None:
    """Raises LayoutError for a bias the engine has no name for."""
    for linear in linears:
        if linear is not None and linear.bias is not None:
            raise LayoutError(f"layout rtp_llm has no place for {linear.name}.bias")
