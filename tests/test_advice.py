"""What an error tells a user to give is there to be given: every `--flag` and every `name=` of a message."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
from pathlib import Path

import fastckpt
from fastckpt.doors import arguments
from fastckpt.layouts import LAYOUTS, layout

PACKAGE = Path(next(iter(fastckpt.__path__)))
CALLS = ("consolidate", "load_into", "open", "open_shards", "partitioned", "plan", "prepare", "reshard",
         "verify", "verify_tensors", "CheckpointManager", "Placement", "Quant")  # fmt: skip
OTHERS = {"--inplace", "--universal-checkpoint", "--ckpt-format"}
"""Flags of other programs: setup.py's, Megatron-DeepSpeed's, Megatron-LM's."""


def raised():
    """(where, text) of every piece of text in a `raise`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield f"{path.name}:{node.lineno}", part.value


def messages():
    """(where, text) of every message that a `raise` makes, with {} for what is put into it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            held = [*ast.walk(node)] if isinstance(node, ast.Raise) else []
            formatted = [part for part in held if isinstance(part, ast.JoinedStr)]
            within = {id(part) for whole in formatted for part in ast.walk(whole)}
            for whole in formatted:
                text = (str(v.value) if isinstance(v, ast.Constant) else "{}" for v in whole.values)
                yield f"{path.name}:{node.lineno}", "".join(text)
            for part in held:
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in within:
                    yield f"{path.name}:{node.lineno}", part.value


def flags(parser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for chosen in action.choices.values():
                yield from flags(chosen)


def arguments_of(name):
    found = getattr(fastckpt, name)
    made = [found, *(f for _, f in inspect.getmembers(found, inspect.isfunction))]
    return {p for f in made for p in inspect.signature(f).parameters}


def test_flags():
    known = OTHERS.union(flags(arguments.parser()))
    said = [(at, f, text) for at, text in raised() for f in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)]
    assert len(said) > 20
    assert not [one for one in said if one[1] not in known]


def test_arguments():
    known = {f.name for name in LAYOUTS for f in dataclasses.fields(layout(name))}
    known.update(*map(arguments_of, CALLS))
    said = [(at, a, text) for at, text in raised() for a in re.findall(r"(?<![\w.])([a-z_]+)=(?![= ])", text)]
    assert len(said) > 20
    assert not [one for one in said if one[1] not in known]


def test_what_the_command_line_has_too():
    """Such an argument is named for both, as in `pad=True (-L pad=true)`."""
    options = {f.name for name in LAYOUTS for f in dataclasses.fields(layout(name))}
    verbs = {"also", "config", "recipe", "tp_plan", "rename", "adapter", "quant", "allow_nonfinite"}
    said = [
        (at, a, text) for at, text in messages() for a in re.findall(r"(?<![\w.])([a-z_]+)=(?![={])", text)
    ]
    assert sum(name in verbs | options for _, name, _ in said) > 20
    assert not [one for one in said if one[1] in options and f"-L {one[1]}=" not in one[2]]
    assert not [one for one in said if one[1] in verbs and f"--{one[1].replace('_', '-')}" not in one[2]]
