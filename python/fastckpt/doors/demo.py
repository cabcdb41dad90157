"""`fastckpt demo`: a small ZeRO-3 checkpoint through every command, with the figures of this machine.

The checkpoint is a llama of random weights over three ranks, so that no parameter divides evenly, written
as DeepSpeed lays it out (docs/formats.md) without torch or deepspeed. What comes out is held against the
weights that went in by code that shares nothing with the road.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import JSON
from ..errors import WriteError

Floats = NDArray[np.float32]

RANKS = 3
TAG = "global_step7"
SHOWN = 16
"""Lines of a command's output that are shown."""


def demo(nbytes: int, keep: str | None, *, as_json: bool = False) -> int:
    """Write a checkpoint of about `nbytes` of weights, run every command on it, each in a process of its own,
    and compare. Returns 0 where all is equal, else 1.

    Works in `keep`, which must be new or empty and stays, or in a temporary directory. Raises WriteError."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="fastckpt-demo-") as folder:
            return _demo(nbytes, folder, as_json)
    try:
        os.makedirs(keep, exist_ok=True)
        if os.listdir(keep):
            raise WriteError(f"{keep}: not empty; name a new directory")
    except OSError as e:
        raise WriteError(f"{keep or repr(keep)}: {e.strerror}") from None
    return _demo(nbytes, keep, as_json)


def _demo(nbytes: int, folder: str, as_json: bool) -> int:
    source, vllm, hf, whole = (os.path.join(folder, n) for n in ("checkpoint", "vllm", "hf", "whole"))
    model = Llama.of(nbytes)
    try:
        model.write(source)
    except OSError as e:
        shutil.rmtree(source, ignore_errors=True)  # a part of it, which would be in the next one's way
        raise WriteError(f"{e.filename or source}: {e.strerror}") from None
    commands = (
        ["inspect", source],
        ["plan", source, "--tp", "4", "--rank", "3", "--layout", "vllm", "--dtype", "bfloat16"],
        ["reshard", source, vllm, "--tp", "4", "--layout", "vllm", "--dtype", "bfloat16"],
        ["reshard", source, hf, "--tp", "2"],
        ["consolidate", source, whole, "--safe-serialization"],
        ["verify", vllm],
        ["verify", hf],
        ["verify", whole],
        ["diff", source, whole],
    )
    steps: list[JSON] = []
    wrong: list[str] = []
    for command in commands:
        began = time.perf_counter()
        code, output = run(command)
        seconds = time.perf_counter() - began
        shown = " ".join(["fastckpt", *command])
        steps.append({"command": shown, "code": code, "seconds": seconds})
        wrong += [f"exit {code}: {shown}"] if code else []
        if not as_json:
            lines = output.splitlines()
            more = [f"... {len(lines) - SHOWN} more lines"] if len(lines) > SHOWN else []
            print(
                "\n".join(["", f"$ {shown}", *lines[:SHOWN], *more, f"[exit {code}, {seconds:.2f} s]"]),
                flush=True,
            )
    wrong = wrong or model.wrong(whole, vllm)
    if as_json:
        found: JSON = {"equal": not wrong, "bytes": model.nbytes, "wrong": [*wrong], "steps": steps}
        print(json.dumps(found, indent=2))
    elif wrong:
        print("\n" + "\n".join(f"differs: {w}" for w in wrong))
    else:
        print(f"\nall equal: every bit of {model.nbytes} bytes of weights")
    return 1 if wrong else 0


def run(command: Sequence[str]) -> tuple[int, str]:
    """One command line in a process of its own: its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "fastckpt", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


# ---- the model ----


@dataclass(frozen=True, slots=True)
class Llama:
    """The sizes of a llama; its weights follow from them."""

    hidden: int
    intermediate: int
    vocab: int
    layers: int
    heads: int = 16
    kv_heads: int = 8

    @staticmethod
    def of(nbytes: int) -> Llama:
        """A llama of about `nbytes` of fp32 weights."""
        width = 512 if nbytes >= 32_000_000 else 128
        one = Llama(width, width * 43 // 16, width * 8 - 24, 1)
        layer = sum(4 * int(np.prod(s)) for n, s in one.shapes().items() if ".0." in n)
        return Llama(one.hidden, one.intermediate, one.vocab, max(1, 1 + (nbytes - one.nbytes) // layer))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter, in the order of the module."""
        d, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, d)}
        for i in range(self.layers):
            for name, shape in (
                ("self_attn.q_proj", (d, d)),
                ("self_attn.k_proj", (kv, d)),
                ("self_attn.v_proj", (kv, d)),
                ("self_attn.o_proj", (d, d)),
                ("mlp.gate_proj", (self.intermediate, d)),
                ("mlp.up_proj", (self.intermediate, d)),
                ("mlp.down_proj", (d, self.intermediate)),
                ("input_layernorm", (d,)),
                ("post_attention_layernorm", (d,)),
            ):
                out[f"model.layers.{i}.{name}.weight"] = shape
        return out | {"model.norm.weight": (d,), "lm_head.weight": (self.vocab, d)}

    @property
    def nbytes(self) -> int:
        """Bytes of the fp32 weights."""
        return sum(4 * int(np.prod(s)) for s in self.shapes().values())

    def config(self) -> dict[str, JSON]:
        """The config.json that goes with it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def weights(self) -> Iterator[tuple[str, Floats]]:
        """Every parameter with its values, the same at each call."""
        for seed, (name, shape) in enumerate(self.shapes().items()):
            yield name, np.random.default_rng(seed).standard_normal(shape, np.float32)

    def write(self, folder: str) -> None:
        """A ZeRO-3 checkpoint: each rank holds ceil(numel / ranks) elements of every parameter."""
        os.makedirs(os.path.join(folder, TAG))
        flats: list[list[Floats]] = [[] for _ in range(RANKS)]
        for _, values in self.weights():
            part = -(-values.size // RANKS)
            padded = np.full(part * RANKS, np.nan, np.float32)  # what no reader may use
            padded[: values.size] = values.reshape(-1)
            for rank in range(RANKS):
                flats[rank].append(padded[rank * part : (rank + 1) * part])
        empty = np.empty(0, np.float32)
        for rank in range(RANKS):
            _save(
                os.path.join(folder, TAG, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"),
                {
                    "module": dict.fromkeys(self.shapes(), empty),
                    "buffer_names": [],
                    "param_shapes": [self.shapes()],
                    "frozen_param_shapes": {},
                    "frozen_param_fragments": {},
                    "shared_params": {},
                    "global_steps": 7,
                    "dp_world_size": RANKS,
                    "mp_world_size": 1,
                    "ds_version": "0.19.8",
                },
            )
            _save(
                os.path.join(folder, TAG, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"),
                {
                    "optimizer_state_dict": {
                        "zero_stage": 3,
                        "partition_count": RANKS,
                        "fp32_flat_groups": [np.concatenate(flats[rank])],
                    },
                    "ds_version": "0.19.8",
                },
            )
        for name, text in (("config.json", json.dumps(self.config(), indent=2)), ("latest", TAG)):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                f.write(text)

    def wrong(self, whole: str, vllm: str) -> list[str]:
        """What differs from the weights: every tensor of the consolidated files, and the fused q, k, v of the
        four bfloat16 ranks."""
        out = []
        made = _read(whole)
        fused = [_read(vllm, f"model-rank-{rank}-") for rank in range(4)]
        parts: dict[str, list[list[NDArray[np.uint16]]]] = {}
        for name, values in self.weights():
            if made.pop(name, None) != values.tobytes():
                out.append(f"{whole}: {name}")
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                key = name[: -len("q_proj.weight")] + "qkv_proj.weight"
                parts.setdefault(key, []).append(np.split(_bfloat16(values), 4))
        out += [f"{whole}: {name} is too much" for name in made]
        for key, (q, k, v) in parts.items():
            for rank in range(4):
                want = q[rank].tobytes() + k[rank].tobytes() + v[rank].tobytes()
                if fused[rank].get(key) != want:
                    out.append(f"{vllm}: {key} of rank {rank}")
        return out


def _bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; the values are finite."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _read(folder: str, prefix: str = "") -> dict[str, bytes]:
    """The tensors' bytes of the safetensors files in a directory whose names begin with `prefix`."""
    out = {}
    for file in sorted(os.listdir(folder)):
        if file.startswith(prefix) and file.endswith(".safetensors"):
            with open(os.path.join(folder, file), "rb") as f:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
                data = f.read()
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                out[name] = data[start:stop]
    return out


# ---- torch files ----

Value = int | str | Sequence["Value"] | Mapping[str, "Value"] | Floats


def _save(path: str, tree: Mapping[str, Value]) -> None:
    """What torch.save writes for plain values and fp32 tensors: a zip of a pickle and of storages."""
    storages: list[Floats] = []
    pickle = b"\x80\x02" + b"".join(_pickled(tree, storages)) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for key, values in enumerate(storages):
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", "3\n")


def _pickled(value: Value, storages: list[Floats]) -> Iterator[bytes]:
    """The opcodes of protocol 2 that build `value` (pickletools names them); arrays join `storages`."""
    if isinstance(value, int):
        yield b"J" + struct.pack("<i", value)
    elif isinstance(value, str):
        yield b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    elif isinstance(value, np.ndarray):
        yield b"ctorch._utils\n_rebuild_tensor_v2\n((" + b"".join(_pickled("storage", storages))
        yield b"ctorch\nFloatStorage\n"
        yield from (op for v in (str(len(storages)), "cpu", value.size) for op in _pickled(v, storages))
        storages.append(value)
        yield b"tQ" + b"".join(op for v in (0, value.shape, (1,)) for op in _pickled(v, storages))
        yield b"\x89ccollections\nOrderedDict\n)RtR"
    elif isinstance(value, Mapping):
        yield b"}("
        for key, held in value.items():
            yield from _pickled(key, storages)
            yield from _pickled(held, storages)
        yield b"u"
    elif isinstance(value, tuple):
        yield b"(" + b"".join(op for v in value for op in _pickled(v, storages)) + b"t"
    else:
        yield b"](" + b"".join(op for v in value for op in _pickled(v, storages)) + b"e"
