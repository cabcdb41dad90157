"""What to do about names that no recipe knows: those of a wrapper, of a larger module, of another model.

Law: this is for messages alone. Which names may go is for the user to say, by `rename`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
"""What wrappers of torch put into names, wherever in a model they are."""


def wrapped(names: Collection[str]) -> str:
    """Which of WRAPPERS is in the names, and how it is taken out; "" where none is."""
    for part, who in WRAPPERS.items():
        if count := sum(part in name for name in names):
            return (
                f"{count} of {len(names)} names hold {part!r}, which {who} puts there; "
                f"rename= (--rename '{re.escape(part)}=') takes it out"
            )
    return ""


def adapted(names: Collection[str]) -> str:
    """Which of the names is an adapter's, and how it is merged; "" where none is."""
    found = next((n for n in names if ".lora_" in n), None)
    if found is None:
        return ""
    if f"{found.partition('.lora_')[0]}.base_layer.weight" in names:
        return f"{found} is an adapter's; adapter= (--adapter DIR) merges it, with its adapter_config.json"
    return (
        f"{found} is an adapter's, whose base is not here; open the base, and name the adapter's directory "
        "by adapter= (--adapter DIR)"
    )


def within(names: Collection[str], anchor: str) -> str:
    """What the names begin with before `anchor`, the name of one tensor that every model has, and how that is
    removed; "" where none ends like it."""
    found = sorted({n.removesuffix(anchor) for n in names if n.endswith(f".{anchor}")})
    if len(found) > 1:
        return (
            f"there is a model under each of {', '.join(found)}; rename= leaves one out (--rename "
            f"'^{re.escape(found[1])}.*=') and removes the prefix of another (--strip-prefix {found[0]})"
        )
    for prefix in found:
        count = sum(n.startswith(prefix) for n in names)
        some = "every name starts" if count == len(names) else f"{count} of {len(names)} names start"
        return f"{some} with {prefix!r}; rename= (--strip-prefix {prefix}) removes it"
    return ""


def beside(unused: Collection[str], used: Collection[str]) -> str:
    """How names of which the model has none alike are left out; "" where one may be a weight of its own."""
    for name in unused:
        whole = name.partition(".")[0]
        if not any(n.startswith(whole) for n in used):
            return (
                "; if it is no part of what is to be served, rename= "
                f"(--rename '^{re.escape(whole)}.*=') leaves it out"
            )
    return ""
