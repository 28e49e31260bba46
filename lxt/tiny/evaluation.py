"""How well a model does the planted tasks."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from lxt.tiny.planted import TASKS, Planted, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEMO", "accuracy", "probabilities", "repeated_ids", "report"]

DEMO = "I have 5 cats and 3 dogs. My cats love to play with my"


def probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Planted], batch_size: int = 50
) -> tuple[list[float], list[bool]]:
    """The probability of each example's answer, and whether it is the most likely next token."""
    import torch

    found: list[float] = []
    right: list[bool] = []
    pad = tokenizer.pad_token_id
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            rows = [tokenizer.encode(example.prompt) for example in part]
            answers = torch.tensor([_single(tokenizer, example.answer) for example in part])
            last = torch.tensor([len(row) - 1 for row in rows])
            width = max(len(row) for row in rows)
            # Padding on the right: a causal model needs neither mask nor positions for it.
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
            logits = model(input_ids=ids, use_cache=False).logits[torch.arange(len(part)), last].float()
            found += logits.softmax(-1).gather(1, answers[:, None])[:, 0].tolist()
            right += (logits.argmax(-1) == answers).tolist()
    return found, right


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Planted]) -> float:
    """The share of examples whose answer is the most likely next token."""
    right = probabilities(model, tokenizer, examples)[1]
    return sum(right) / len(right)


def repeated_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> float:
    """Next-token accuracy in the second half of random token ids that are repeated once, its first token excluded."""
    import torch

    rng = Random(seed)
    special = set(tokenizer.all_special_ids)
    pool = [i for i in range(len(tokenizer)) if i not in special]
    right = 0.0
    with torch.inference_mode():
        for _ in range(count):
            length = rng.randint(8, 32)
            first = [rng.choice(pool) for _ in range(length)]
            ids = torch.tensor([[tokenizer.bos_token_id, *first, *first]])
            predicted = model(input_ids=ids, use_cache=False).logits[0].argmax(-1)
            right += (predicted[length + 1 : -1] == ids[0, length + 2 :]).double().mean().item()
    return right / count


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 500) -> dict[str, float]:
    """Accuracy and mean probability per task on held-out words, and the demonstration sentence."""
    figures: dict[str, float] = {}
    for task in TASKS:
        found, right = probabilities(model, tokenizer, generate(task, "held_out", count, seed=1))
        figures[task] = sum(right) / count
        figures[f"{task} probability"] = round(sum(found) / count, 4)
    figures["repeated ids"] = round(repeated_ids(model, tokenizer, count), 4)
    figures["demo probability"] = round(probabilities(model, tokenizer, [demo()])[0][0], 4)
    return figures


def demo() -> Planted:
    """The sentence of the demonstration, with its planted cause."""

    def span(word: str, start: int = 0) -> tuple[int, int]:
        at = DEMO.index(word, start)
        return at, at + len(word)

    return Planted("pets", DEMO, " dogs", " cats", span("dogs"), (span("cats"), span("cats", 20)))


def _single(tokenizer: PreTrainedTokenizerBase, answer: str) -> int:
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the answer {answer!r} is {len(ids)} tokens; the planted tasks are for the bundled tokenizer")
    return ids[0]
