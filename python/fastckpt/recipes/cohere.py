"""Cohere's Command: attention and the feed-forward block read one norm, side by side; embedding and head are
one."""

from __future__ import annotations

from .decoder import Kind, Said
from .decoder import families as kinds

COHERE = Kind("cohere", qk_norm=Said("use_qk_norm"), own_norms=True, parallel=True, tied=True)
COHERE2 = Kind("cohere2", parallel=True, tied=True)

FAMILIES = kinds(COHERE, COHERE2)
