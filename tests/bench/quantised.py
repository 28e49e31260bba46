"""How far quantised weights move the relevance of the bundled model.

    python tests/bench/quantised.py

For each library that is installed, against the same model in bfloat16 and for the token that this one predicts: the
cosine between the tokens' relevances, mean and lowest over the prompts; the cosine of each token's relevance over the
hidden dimension, median and tenth percentile over all tokens; and how often the most relevant token is the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lxt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from quantisers import WEIGHTS_ONLY, bitsandbytes_8bit

PROMPTS = [
    "I have 5 cats and 3 dogs. My cats love to play with my",
    "One day, a little girl named Lily found a",
    "Tom had a red ball. He liked to throw the",
    "The sun was hot, so Ben went to the pond to",
    "Mom said it was time for bed. Sam put on his",
    "The dog saw a big cat and began to",
    "Lily was sad because her toy was",
    "They played in the park all day. Then they went",
]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    plain = lxt.load("tiny", dtype="bfloat16")
    ids = [plain.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = [_relevance(plain.model, prompt, None) for prompt in ids]
    print(
        "| weights | cosine of the prompt (mean, lowest) | of each token (median, 10 %) | same top token | not finite |"
    )
    print("|---|---|---|---|---|")
    for name, (quantise, _) in (WEIGHTS_ONLY | {"bitsandbytes 8": (bitsandbytes_8bit, 8)}).items():
        try:
            model = quantise(lxt.load("tiny", dtype="bfloat16").model)
        except pytest.skip.Exception:
            print(f"| {name} | not installed | | | |")
            continue
        found = [_relevance(model, prompt, target) for prompt, (_, target) in zip(ids, expected, strict=True)]
        pairs = [(got, want) for (got, _), (want, _) in zip(found, expected, strict=True)]
        whole = torch.stack([F.cosine_similarity(got.sum(-1), want.sum(-1), dim=0) for got, want in pairs])
        each = torch.cat([F.cosine_similarity(got, want, dim=-1) for got, want in pairs])
        top = sum(bool(got.sum(-1).argmax() == want.sum(-1).argmax()) for got, want in pairs)
        broken = sum(int((~got.isfinite()).sum()) for got, _ in pairs)
        print(
            f"| {name} | {whole.mean():.4f}, {whole.min():.4f} | {each.median():.4f}, {each.quantile(0.1):.4f} | "
            f"{top} of {len(pairs)} | {broken} |"
        )


def _relevance(model: nn.Module, ids: list[int], target: int | None) -> tuple[Tensor, int]:
    """Embedding × gradient, [token, hidden], and the token that it explains."""
    embeds = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    with lxt.monkey_patch(model):
        logits = model(inputs_embeds=embeds).logits[0, -1]
        chosen = int(logits.argmax()) if target is None else target
        logits[chosen].backward()
    return (embeds.detach() * embeds.grad)[0].float(), chosen


if __name__ == "__main__":
    main()
