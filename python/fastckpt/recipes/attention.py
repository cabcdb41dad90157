"""Attention as most families store it: q, k and v apart or as one matrix, o, and what else a family has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..checkpoint import JSON
from ..mixers import Attention
from ..roles import Linear, Norm, Parameter
from .claims import Claims, Dim, Heads, absent, dim, integer, layer_index
from .fused import attention_of, fused_attention
from .kind import Claim, Kind, Own, SelfAttention, has


@dataclass(frozen=True, slots=True)
class Attending:
    """The attention of a model's layers: `claim` claims that of one; `heads` are those of most layers, `keys`
    and `others` as in Sizes."""

    claim: Claim
    heads: Heads
    keys: tuple[str, str, str] | None = ("num_attention_heads", "num_key_value_heads", "head_dim")
    others: tuple[tuple[int, int], ...] = ()


def heads_of(config: Mapping[str, JSON]) -> Heads:
    """The heads a config says. Raises RecipeError."""
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    return Heads(heads, kv_heads, integer(config, "head_dim", integer(config, "hidden_size") // heads))


def unlike(own: Heads, usual: Heads) -> tuple[int, int] | None:
    """How many query and kv heads a layer has, None where its heads are as usual."""
    return (own.q, own.kv) if own != usual else None


def others(own: Iterable[Heads], usual: Heads) -> tuple[tuple[int, int], ...]:
    """Those numbers of all layers whose heads are not as usual, each once."""
    return tuple(dict.fromkeys(filter(None, (unlike(heads, usual) for heads in own))))


def attention(kind: Kind, claims: Claims, config: Mapping[str, JSON]) -> Attending:
    """The attention of a kind, layer by layer. Raises RecipeError."""
    stored, heads = kind.attention, heads_of(config)
    alike = Own(heads, sinks=bool(stored.sinks))
    own = stored.own(config, claims.layers(config)) if stored.own is not None else ()

    def claim(layer: str) -> Callable[[], Attention]:
        number = layer_index(layer) if own else 0
        mine, at = own[number] if number < len(own) else alike, f"{layer}.{stored.at}"
        rows = _Rows.of(mine)
        build = _matrices(stored, claims, config, at, mine.heads, rows)
        q_norm, k_norm = _norms(kind, claims, config, at, mine.heads, rows)
        gate = _output_gate(stored, claims, config, at, mine.heads, rows)
        sinks = _sinks(stored, claims, at, mine.heads) if mine.sinks else absent
        return lambda: replace(
            build(),
            q_norm=q_norm(),
            k_norm=k_norm(),
            sinks=sinks(),
            output_gate=gate(),
            whole_norms=stored.qk_norm.whole,
            own_norms=stored.qk_norm.own,
            rotated=stored.qk_norm.rotated,
            heads=unlike(mine.heads, heads),
        )

    return Attending(claim, heads, others=others((each.heads for each in own), heads))


class _Rows(NamedTuple):
    """What q, k and v make of a token, and what o reads."""

    q: Dim
    k: Dim
    v: Dim
    o: Dim

    @staticmethod
    def of(own: Own) -> _Rows:
        heads, values = own.heads, own.values
        q = Dim(heads.q * heads.dim, "num_attention_heads * head_dim")
        k = Dim(heads.kv * heads.dim, "num_key_value_heads * head_dim")
        if not values:
            return _Rows(q, k, k, q)
        v = Dim(heads.kv * values, "num_key_value_heads * v_head_dim")
        return _Rows(q, k, v, Dim(heads.q * values, "num_attention_heads * v_head_dim"))


def _matrices(
    stored: SelfAttention, claims: Claims, config: Mapping[str, JSON], at: str, heads: Heads, rows: _Rows
) -> Callable[[], Attention]:
    hidden, bias = dim(config, "hidden_size"), has(config, stored.qkv_bias)
    o = claims.linear(f"{at}.{stored.o}", hidden, rows.o, bias=has(config, stored.o_bias))
    if stored.fused:
        all_rows = Dim(rows.q.size + 2 * rows.k.size, f"{rows.q.key} + 2 * {rows.k.key}")
        whole = claims.linear(f"{at}.qkv_proj", all_rows, hidden, bias=bias)
        return fused_attention(whole, o, heads)
    q = claims.linear(f"{at}.q_proj", rows.q.times(2) if stored.gated else rows.q, hidden, bias=bias)
    k = claims.linear(f"{at}.k_proj", rows.k, hidden, bias=bias)
    v = claims.linear(f"{at}.v_proj", rows.v, hidden, bias=bias)
    return attention_of(q, k, v, o, gated=heads.q if stored.gated else 0)


def _norms(
    kind: Kind, claims: Claims, config: Mapping[str, JSON], at: str, heads: Heads, rows: _Rows
) -> tuple[Callable[[], Norm | None], Callable[[], Norm | None]]:
    """Claims the norms of q and k."""
    stored = kind.attention.qk_norm
    if not has(config, stored.there):
        return absent, absent

    def norm(name: str, count: int, all_heads: Dim) -> Callable[[], Norm]:
        over = (all_heads,) if stored.whole else (Dim(heads.dim, "head_dim"),)
        each = (Dim(count, "heads"),) if stored.own else ()
        return claims.norm(f"{at}.{name}", *each, *over, plus_one=kind.norms.plus_one)

    return norm(stored.q, heads.q, rows.q), norm(stored.k, heads.kv, rows.k)


def _output_gate(
    stored: SelfAttention, claims: Claims, config: Mapping[str, JSON], at: str, heads: Heads, rows: _Rows
) -> Callable[[], Linear | None]:
    if not stored.output_gate:
        return absent
    each_head = stored.head_gates and config.get("gating", True) in (True, "per-head")
    gates = Dim(heads.q, "num_attention_heads") if each_head else rows.q
    return claims.linear(f"{at}.{stored.output_gate}", gates, dim(config, "hidden_size"))


def _sinks(stored: SelfAttention, claims: Claims, at: str, heads: Heads) -> Callable[[], Parameter]:
    trained, each = f"{at}.{stored.trained_sinks}", Dim(heads.q, "num_attention_heads")
    in_training = bool(stored.trained_sinks) and trained in claims
    return claims.parameter(f"{at}.{stored.sinks}", each, stored=trained if in_training else None)
