"""All of it, one command after another, and what must be so at the end.

    python tour.py --out run [--smoke] [--twice]

Pictures are drawn; two ranks train the DiscreteVAE and then DALLE under DeepSpeed ZeRO-3; in the middle the
second rank is killed (SIGKILL), both are started again by the same command, and resume. The newest commit
becomes the standard single file, which draws the same picture without DeepSpeed and without fastckpt. With
--twice DALLE is trained once more, undisturbed: its file must have the same weights. Exit code 1 where
that is not so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
BARE = "import runpy, sys; sys.modules.update(deepspeed=None, fastckpt=None); del sys.argv[0]; "
BARE += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"


def python(*arguments: object, fails: bool = False) -> None:
    """Run Python, saying how. Raises CalledProcessError where it fails, or does not though it should."""
    said = [str(a) for a in arguments]
    print("$ python", *(repr(a) if " " in a else a for a in said), flush=True)
    began = time.perf_counter()
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # DeepSpeed and torch say much on stderr; it is shown where something went wrong
    done = subprocess.run([sys.executable, *said], env=env, stderr=subprocess.PIPE, text=True, check=False)
    if bool(done.returncode) != fails:
        print(done.stderr, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, done.args)
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)


def newest(root: Path) -> Path:
    """The newest commit."""
    return max(root.glob("checkpoints/step-*"))


def single_file(run: Path) -> Path:
    """The standard file of a run's newest DALLE."""
    kept = [a for name in ("hparams", "vae_params", "epoch") for a in ("--client-state", name)]
    out = run / "single"
    python("-m", "fastckpt", "consolidate", newest(run / "dalle"), out, "--weights-key", "weights", *kept)
    return out / "pytorch_model.bin"


def main(out: Path, smoke: bool, twice: bool) -> int:
    """Every step of it; 1 where something is not as it must be."""
    size = ["--smoke"] * smoke
    data, run, other = out / "data", out / "run", out / "undisturbed"
    python(HERE / "birds.py", "--out", data, *(["--count", 40, "--size", 16] if smoke else []))
    python(*RANKS, HERE / "train.py", "vae", "--deepspeed", "--data", data, "--out", run, *size)
    dalle = [HERE / "train.py", "dalle", "--deepspeed", "--data", data, *size]
    python(*RANKS, *dalle, "--out", run, "--die-at", 13 if smoke else 200, fails=True)
    python(*RANKS, *dalle, "--out", run)
    file = single_file(run)
    python("-c", BARE, HERE / "generate.py", file, "--out", run / "standard.png")
    pictures = [p.read_bytes() for p in (run / "dalle/final.png", run / "standard.png")]
    claims = {"the single file, by torch alone, draws the same picture": pictures[0] == pictures[1]}
    if twice:
        other.mkdir()
        (other / "vae").symlink_to((run / "vae").resolve())
        python(*RANKS, *dalle, "--out", other)
        files = [torch.load(f, weights_only=True) for f in (file, single_file(other))]
        one, two = (f["weights"] for f in files)
        same = list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)
        claims["killed and resumed, it has the weights of the undisturbed run, bit for bit"] = same
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, kill, resume, consolidate, generate.")
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    parser.add_argument("--smoke", action="store_true", help="small models, a few steps")
    parser.add_argument("--twice", action="store_true", help="train once more undisturbed, and compare")
    given = parser.parse_args()
    sys.exit(main(given.out, given.smoke, given.twice))
