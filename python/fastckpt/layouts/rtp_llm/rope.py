"""Rotary tables of latent attention, as rtp-llm keeps them: cosines and sines of every position.

Computed in float64 and rounded once; the engine's own are float32 throughout, and differ in the last bits.
Source: DeepSeek-V3's DeepseekV3RotaryEmbedding and DeepseekV3YarnRotaryEmbedding (YaRN, arXiv 2309.00071), of
which rtp-llm's models/rotary_embedding/deepseek_rotary_embedding.py keeps one half.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ... import dtypes
from ...model import Rope, Yarn
from ...stored import constant
from ...views import View

Floats = NDArray[np.float64]


def yarn_get_mscale(scale: float, mscale: float) -> float:
    """The factor on attention for a context `scale` times as long."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def cos_sin_cache(rope: Rope, positions: int) -> View:
    """[positions, (cos | sin)] of dim / 2 frequencies each, float32."""
    angles = np.outer(np.arange(positions, dtype=np.float64), _frequencies(rope))
    yarn, factor = rope.yarn, 1.0
    if yarn is not None:
        factor = yarn_get_mscale(yarn.factor, yarn.mscale) / yarn_get_mscale(yarn.factor, yarn.mscale_all_dim)
    table = np.concatenate([np.cos(angles) * factor, np.sin(angles) * factor], axis=1)
    return constant(table.astype(np.float32), dtypes.float32)


def _frequencies(rope: Rope) -> Floats:
    """[dim / 2], those of long waves slowed down by YaRN."""
    fast = rope.base ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.yarn is None:
        return fast
    low = max(math.floor(_turns_at(rope, rope.yarn, rope.yarn.beta_fast)), 0)
    high = min(math.ceil(_turns_at(rope, rope.yarn, rope.yarn.beta_slow)), rope.dim - 1)
    width = high - low or 0.001
    slowed = np.clip((np.arange(rope.dim // 2, dtype=np.float64) - low) / width, 0, 1)
    return fast / rope.yarn.factor * slowed + fast * (1 - slowed)


def _turns_at(rope: Rope, yarn: Yarn, turns: float) -> float:
    """The frequency that turns so often within the original context, as an index."""
    return rope.dim * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))
