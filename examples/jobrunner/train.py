"""Two ranks train with JobRunner; one is killed in the middle of a save; the job is started again.

    python train.py --out runs [--smoke]

trains twice: undisturbed, and with rank 1 killed (SIGKILL, halfway through writing its part of a commit) and
both ranks started again by the same command. It then compares the final weights bit for bit, and draws the
loss of both as OUT/result.svg. Exit code 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORLD = 2


# ---- what each rank runs ----


def train(root: Path, meet: Path, epochs: int, batches: int, kill_in: int) -> None:
    """One rank: a small network learns which of three arms of a spiral a point lies on."""
    import torch
    import torch.distributed as dist
    from fastckpt.manager.job import Context, Job, epoch_limiter, task
    from fastckpt.manager.manager import CheckpointManager
    from fastckpt.manager.runner import JobRunner
    from safetensors.torch import save_file

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        arm = torch.randint(3, (128,))
        t = torch.rand(128) * 3
        angle = 2 * t + arm * 2.0944 + torch.randn(128) * 0.1
        return torch.stack([t * angle.cos(), t * angle.sin()], 1), arm

    state: dict[str, object] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "losses": []}
    with Job(state=state) as job:
        epoch_limiter(epochs)

        with job.init_group:

            @task
            def same_start(context: Context) -> None:
                for parameter in model.parameters():
                    dist.broadcast(parameter.data, 0)
                context.state["random"] = torch.get_rng_state()  # each rank draws points of its own

        @task
        def epoch(context: Context) -> None:
            torch.set_rng_state(context.state["random"])  # type: ignore[arg-type]
            total = 0.0
            for _ in range(batches):
                points, arms = batch()
                loss = torch.nn.functional.cross_entropy(model(points), arms)
                optimizer.zero_grad()
                loss.backward()
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= WORLD  # type: ignore[operator]
                optimizer.step()
                total += loss.item()
            scheduler.step()
            context.state["random"] = torch.get_rng_state()
            context.state["losses"] = [*context.state["losses"], total / batches]  # type: ignore[misc]
            context.metrics["loss"] = total / batches
            if context.epoch == kill_in:
                die_while_writing()

        with job.exit_group:

            @task
            def keep_weights(context: Context) -> None:
                if context.rank == 0:
                    save_file(model.state_dict(), root.parent / f"{root.name}.safetensors")
                    (root.parent / f"{root.name}.json").write_text(json.dumps(context.state["losses"]))

    with CheckpointManager(root, max_to_keep=3, timeout=30) as manager:
        last = JobRunner(job, manager).train()
        print(f"rank {rank}: resumed from {manager.restored}, trained to epoch {last}", flush=True)
    dist.destroy_process_group()


def die_while_writing() -> None:
    """From now on, the first write of a tensor file is cut in half by SIGKILL."""
    write = os.pwrite

    def half(fd: int, data: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".tmp") and len(data) > 4096:
            write(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(fd, data, offset)

    os.pwrite = half


# ---- what starts the ranks, as torchrun would ----


def launch(root: Path, args: argparse.Namespace, kill_in: int) -> list[int]:
    """Run all ranks to their end; when one dies, stop the others. Their exit codes."""
    meet = root.parent / f".meet-{root.name}-{time.time_ns()}"
    ranks = []
    for rank in range(WORLD):
        command = [
            sys.executable,
            __file__,
            "--out",
            str(args.out),
            "--rank-of",
            str(root),
            "--meet",
            str(meet),
        ]
        command += ["--smoke"] * args.smoke + ["--kill-in", str(kill_in if rank == 1 else 0)]
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=env))
    while any(r.poll() is None for r in ranks):
        if any(r.poll() not in (None, 0) for r in ranks):
            for r in ranks:
                r.kill()
        time.sleep(0.05)
    meet.unlink(missing_ok=True)
    return [r.returncode for r in ranks]


def main(args: argparse.Namespace) -> int:
    """Both trainings, the comparison and the picture."""
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    epochs, _ = size(args)
    kill_in = epochs // 2 + 1
    if any(launch(out / "undisturbed", args, 0)):
        print("the undisturbed run failed")
        return 1
    codes = launch(out / "killed", args, kill_in)
    committed = sorted(e.name for e in (out / "killed").glob("step-*"))
    if codes[1] != -signal.SIGKILL or int(committed[-1].removeprefix("step-")) != kill_in - 1:
        print(f"rank 1 was not killed in the save of epoch {kill_in}: exit codes {codes}, {committed}")
        return 1
    print(f"rank 1 was killed while it saved epoch {kill_in}; {committed[-1]} stands; starting again")
    if any(launch(out / "killed", args, 0)):
        print("the resumed run failed")
        return 1
    names = ("undisturbed", "killed")
    weights = [(out / f"{n}.safetensors").read_bytes() for n in names]
    losses = [json.loads((out / f"{n}.json").read_text()) for n in names]
    same = weights[0] == weights[1] and losses[0] == losses[1]
    (out / "result.svg").write_text(picture(losses, kill_in, same))
    print(f"final weights are {'the same, bit for bit' if same else 'DIFFERENT'}: {out / 'result.svg'}")
    return 0 if same else 1


def picture(losses: list[list[float]], kill_in: int, same: bool) -> str:
    """The loss of both runs by epoch: a broad line, and the other one on it."""
    width, height, top = 640, 320, max(map(max, losses))

    def x(epoch: float) -> float:
        return 50 + (width - 70) * (epoch - 1) / max(1, len(losses[0]) - 1)

    def y(loss: float) -> float:
        return height - 40 - (height - 80) * loss / top

    def line(values: list[float], colour: str, thick: int) -> str:
        points = " ".join(f"{x(k):.1f},{y(v):.1f}" for k, v in enumerate(values, 1))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{thick}"/>'

    said = "the same weights, bit for bit" if same else "DIFFERENT weights"
    said = f"undisturbed (broad) and killed in the save of epoch {kill_in}, resumed (thin): {said}"
    box = f'width="{width}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif">',
            f'<rect {box} fill="white"/>',
            f'<text x="50" y="24" font-size="12">{said}</text>',
            line(losses[0], "#a8c8f0", 7),
            line(losses[1], "#c03020", 2),
            f'<line x1="{x(kill_in):.1f}" x2="{x(kill_in):.1f}" y1="40" y2="{height - 40}" stroke="#888" '
            'stroke-dasharray="4"/>',
            f'<text x="{x(kill_in) + 6:.1f}" y="54" font-size="12">SIGKILL</text>',
            f'<line x1="50" x2="{width - 20}" y1="{height - 40}" y2="{height - 40}" stroke="black"/>',
            f'<text x="50" y="{height - 20}" font-size="12">epoch 1</text>',
            f'<text x="{width - 70}" y="{height - 20}" font-size="12">epoch {len(losses[0])}</text>',
            f'<text x="8" y="{y(top):.1f}" font-size="12">{top:.2f}</text>',
            f'<text x="8" y="{y(losses[0][-1]):.1f}" font-size="12">{losses[0][-1]:.2f}</text>',
            "</svg>",
            "",
        ]
    )


def size(args: argparse.Namespace) -> tuple[int, int]:
    """Epochs, and batches of each."""
    return (4, 3) if args.smoke else (24, 40)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two ranks, one killed in a save, resumed.")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go; give a new directory")
    parser.add_argument("--smoke", action="store_true", help="a few seconds' worth")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--meet", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-in", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of is None:
        sys.exit(main(given))
    train(given.rank_of, given.meet, *size(given), given.kill_in)
