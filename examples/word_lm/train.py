"""An LSTM word language model: trained, saved through the CheckpointManager, quantised to int8, compared.

    python train.py --out run [--smoke]

does what PyTorch's tutorial "Dynamic Quantization on an LSTM Word Language Model" does, on text that is
already here, and checks what it claims: the float model's perplexity is below half of the uniform one, the
losses differ by at most 0.005, and every quantised tensor is torch.ao's, byte for byte. Exit code 1 where
one of these does not hold. Started again, it resumes its training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import fastckpt
import torch
from fastckpt.quant import load_dynamic
from text import Corpus, batchify, get_batch, write_text
from torch import Tensor, nn

Hidden = tuple[Tensor, Tensor]
QUANT = fastckpt.Quant(fastckpt.SCHEMES["int8-dynamic"], include=("decoder.weight",))


@dataclass(frozen=True)
class Size:
    """How large, and how long. `bptt`: words that gradients reach back."""

    ninp: int = 512
    nhid: int = 256
    nlayers: int = 5
    dropout: float = 0.2
    batch: int = 20
    bptt: int = 25
    epochs: int = 12
    words: int = 1000


SMOKE = Size(ninp=48, nhid=32, epochs=2, batch=8, words=60)


class LSTMModel(nn.Module):
    """Container module with an encoder, a recurrent module, and a decoder."""

    def __init__(self, ntoken: int, ninp: int, nhid: int, nlayers: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        for name, parameter in self.rnn.named_parameters():
            for k, gate in enumerate(parameter.detach().chunk(4)):
                # five layers learn no order of words for long where gates start as nn.LSTM's do
                if "bias" in name:
                    nn.init.constant_(gate, 0.5 if k == 1 else 0.0)  # of two biases: remember at first
                elif "_hh_" in name:
                    nn.init.orthogonal_(gate)
                else:
                    nn.init.xavier_uniform_(gate)
        self.nhid, self.nlayers = nhid, nlayers

    def forward(self, words: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Scores [rows, columns, ntoken] of what follows each word, and the state after the last row."""
        output, hidden = self.rnn(self.drop(self.encoder(words)), hidden)
        return self.decoder(self.drop(output)), hidden

    def init_hidden(self, columns: int) -> Hidden:
        """The state before any word."""
        return (torch.zeros(self.nlayers, columns, self.nhid), torch.zeros(self.nlayers, columns, self.nhid))


def repackage_hidden(hidden: Hidden) -> Hidden:
    """The state without its history, so that gradients end here."""
    return (hidden[0].detach(), hidden[1].detach())


def evaluate(model: nn.Module, words: Tensor, bptt: int) -> float:
    """The mean loss of a word, in nats."""
    model.eval()
    total, hidden = 0.0, model.init_hidden(words.shape[1])
    with torch.no_grad():
        for start in range(0, len(words) - 1, bptt):
            data, targets = get_batch(words, start, bptt)
            output, hidden = model(data, hidden)
            total += len(data) * nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten()).item()
    return total / (len(words) - 1)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, words: Tensor, bptt: int) -> None:
    """One walk over the text, the state handed on from batch to batch."""
    model.train()
    hidden = model.init_hidden(words.shape[1])
    for start in range(0, len(words) - 1, bptt):
        data, targets = get_batch(words, start, bptt)
        output, hidden = model(data, repackage_hidden(hidden))
        loss = nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()


def train(model: LSTMModel, corpus: Corpus, size: Size, root: Path) -> list[float]:
    """Train, or go on training, and fill the model with its best epoch; the loss on valid.txt by epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.25, patience=0)
    state: dict[str, object] = {
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "random": torch.get_rng_state(),
        "losses": [],
    }  # fmt: skip
    words, valid = batchify(corpus.train, size.batch), batchify(corpus.valid, size.batch)
    losses: list[float] = []
    with fastckpt.CheckpointManager(root, max_to_keep=1, keep_best=1, best_metric="loss") as manager:
        if manager.resume_step() is not None:
            manager.restore(template=state)
            losses = list(state["losses"])
            torch.set_rng_state(state["random"])
            print(f"resumed after epoch {manager.restored}")
        for epoch in range(len(losses) + 1, size.epochs + 1):
            began = time.perf_counter()
            train_epoch(model, optimizer, words, size.bptt)
            losses.append(evaluate(model, valid, size.bptt))
            scheduler.step(losses[-1])
            took = time.perf_counter() - began
            print(f"epoch {epoch}: valid perplexity {math.exp(losses[-1]):.1f}, {took:.1f} s", flush=True)
            state.update(losses=losses, random=torch.get_rng_state())
            manager.save(epoch, state, {"loss": losses[-1]})
        manager.restore(manager.best(), template={"model": model}, allow_missing=True)
    return losses


def generate(model: LSTMModel, corpus: Corpus, path: Path, count: int, temperature: float) -> None:
    """Write words that the model says one after another, twenty a line."""
    model.eval()
    word, hidden = torch.randint(len(corpus.dictionary), (1, 1)), model.init_hidden(1)
    said = []
    with torch.no_grad():
        for _ in range(count):
            output, hidden = model(word, hidden)
            weights = output.flatten().div(temperature).softmax(0)
            word = torch.multinomial(weights, 1).view(1, 1)
            said.append(corpus.dictionary.idx2word[int(word)])
    lines = [" ".join(said[k : k + 20]) for k in range(0, count, 20)]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def timed(model: nn.Module, words: Tensor, bptt: int) -> tuple[float, float]:
    """Loss and seconds of an evaluation on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    loss = evaluate(model, words, bptt)
    took = time.perf_counter() - began
    torch.set_num_threads(threads)
    return loss, took


def differing(model: nn.Module, quantised: nn.Module, path: Path) -> list[str]:
    """The quantised tensors that are not torch.ao's to the byte: in the file, or in the loaded modules."""
    kinds = {nn.LSTM, nn.Linear}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        wanted = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    theirs = {f"rnn.{n}": t for n, t in wanted.rnn.get_weight().items()}
    theirs["decoder.weight"] = wanted.decoder.weight()
    ours = {f"rnn.{n}": t for n, t in quantised.rnn.get_weight().items()}
    ours["decoder.weight"] = quantised.decoder.weight()
    stored = fastckpt.reshard(path, layout="same", rank=0)
    held = {n.removesuffix("_zero_point") for n in stored if n.endswith("_zero_point")}
    wrong = [f"{n}: in one of them only" for n in set(theirs) ^ held]
    for name in sorted(held & set(theirs)):
        want = theirs[name]
        numbers = (want.q_scale(), want.q_zero_point())
        same = all(torch.equal(t, want.int_repr()) for t in (stored[name], ours[name].int_repr()))
        same &= (float(stored[f"{name}_scale"]), int(stored[f"{name}_zero_point"])) == numbers
        if not same or (ours[name].q_scale(), ours[name].q_zero_point()) != numbers:
            wrong.append(name)
    return wrong


def megabytes(directory: Path) -> float:
    """What the files of a directory take, in 10^6 bytes."""
    return sum(f.stat().st_size for f in directory.iterdir()) / 1e6


def main(out: Path, size: Size, smoke: bool, temperature: float) -> int:
    """All of it; 1 where a claim does not hold."""
    torch.manual_seed(1111)
    write_text(out / "text", smoke=smoke)
    corpus = Corpus(out / "text")
    ntoken = len(corpus.dictionary)
    print(f"{len(corpus.train)} words to train on, {ntoken} different ones")
    model = LSTMModel(ntoken, size.ninp, size.nhid, size.nlayers, size.dropout)
    losses = train(model, corpus, size, out / "checkpoints")
    generate(model, corpus, out / "out.txt", size.words, temperature)
    print(f"{size.words} words at temperature {temperature} are in {out / 'out.txt'}")

    fastckpt.reshard(model.state_dict(), layout="same", out=out / "float", overwrite=True)
    fastckpt.reshard(model.state_dict(), layout="same", quant=QUANT, out=out / "int8", overwrite=True)
    blank = LSTMModel(ntoken, size.ninp, size.nhid, size.nlayers, size.dropout)
    quantised = load_dynamic(blank, out / "int8")
    wrong = differing(model.eval(), quantised.eval(), out / "int8")
    print(model, quantised, sep="\n")

    test = batchify(corpus.test, 1)
    results = {
        name: {"MB": megabytes(out / name), "loss": loss, "seconds": seconds}
        for name, module in (("float", model), ("int8", quantised))
        for loss, seconds in [timed(module, test, size.bptt)]
    }
    for name, r in results.items():
        said = f"loss {r['loss']:.4f}, perplexity {math.exp(r['loss']):.2f}"
        print(f"{name:5}: {r['MB']:.2f} MB, {said}, {r['seconds']:.2f} s on one thread")
    (out / "result.json").write_text(json.dumps({"ntoken": ntoken, "valid": losses, **results}, indent=1))
    (out / "result.svg").write_text(picture([math.exp(v) for v in losses], ntoken, results))

    reached = math.exp(results["float"]["loss"])
    apart = abs(results["float"]["loss"] - results["int8"]["loss"])
    claims = {
        f"perplexity {reached:.1f} < {ntoken / 2:g}, half of the uniform one": reached < ntoken / 2,
        f"the losses differ by {apart:.5f} <= 0.005": apart <= 0.005,
        f"quantised tensors that are not torch.ao's: {', '.join(wrong) or 'none'}": not wrong,
    }
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    return 0 if all(claims.values()) else 1


def picture(perplexities: list[float], ntoken: int, results: dict[str, dict[str, float]]) -> str:
    """Perplexity by epoch, and what int8 takes beside float."""
    width, height, top = 760, 300, max(perplexities)

    def x(epoch: int) -> float:
        return 50 + 370 * (epoch - 1) / max(1, len(perplexities) - 1)

    def y(value: float) -> float:
        return height - 40 - (height - 90) * value / top

    points = " ".join(f"{x(k):.1f},{y(v):.1f}" for k, v in enumerate(perplexities, 1))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="50" y="24">perplexity on valid.txt by epoch (uniform: {ntoken})</text>',
        f'<polyline points="{points}" fill="none" stroke="#2060b0" stroke-width="2"/>',
        f'<line x1="50" x2="420" y1="{height - 40}" y2="{height - 40}" stroke="black"/>',
        f'<text x="50" y="{height - 20}">1</text><text x="410" y="{height - 20}">{len(perplexities)}</text>',
        f'<text x="8" y="{y(top):.0f}">{top:.0f}</text>',
        f'<text x="380" y="{y(perplexities[-1]) - 8:.0f}">{perplexities[-1]:.1f}</text>',
    ]
    for row, (key, unit) in enumerate((("MB", "MB"), ("seconds", "s, one thread"), ("loss", "nats a word"))):
        most = max(r[key] for r in results.values())
        for k, (name, colour) in enumerate((("float", "#a8c8f0"), ("int8", "#c03020"))):
            value, at = results[name][key], 60 + row * 70 + k * 24
            lines.append(f'<text x="460" y="{at + 13}">{name}</text>')
            lines.append(
                f'<rect x="500" y="{at}" width="{120 * value / most:.1f}" height="18" fill="{colour}"/>'
            )
            lines.append(f'<text x="630" y="{at + 13}">{value:.4g} {unit}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An LSTM word language model, quantised to int8.")
    parser.add_argument("--out", type=Path, required=True, help="where everything goes")
    parser.add_argument("--smoke", action="store_true", help="a few seconds' worth")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the generated words (default: 1)")
    given = parser.parse_args()
    sys.exit(main(given.out, SMOKE if given.smoke else Size(), given.smoke, given.temperature))
