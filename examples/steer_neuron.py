"""A neuron that knows a word: found by relevance in some prompts, taken out in others.

1. In "The 1815 expedition stopped" the bundled model says " at", whatever the year. Relevance names the neuron that has
   most to do with it.
2. That neuron is set to zero while the model reads prompts with other years. It then says something else.
3. The control does the same to random neurons, one at a time.
"""

from __future__ import annotations

from random import Random

import torch
from transformers.utils import logging

import lxt

FOUND_IN = [f"The {year} expedition stopped" for year in (1815, 1871, 1945)]
TRIED_ON = [f"Here is a story. The {year} expedition stopped" for year in (1803, 1901, 1991, 2001, 2014)]
ANSWER = " at"
DRAWS = 100


def probabilities(explainer: lxt.Attributor, prompts: list[str]) -> torch.Tensor:
    """[prompt, vocabulary], of the next token."""
    with torch.no_grad():
        ids = [torch.tensor([explainer.tokenizer(prompt)["input_ids"]]) for prompt in prompts]
        return torch.stack([explainer.model(row).logits[0, -1].softmax(-1) for row in ids])


def main() -> dict[str, object]:
    logging.disable_progress_bar()  # the weights are there in a blink
    explainer = lxt.load("tiny")
    answer = explainer.tokenizer(ANSWER)["input_ids"][-1]

    found = explainer.attribute(FOUND_IN, target=ANSWER, latents="neuron")
    relevance = found.latents["neuron"].sum(2).mean(1)  # [layer, neuron], in logits
    layers, neurons = relevance.shape
    layer, neuron = divmod(int(relevance.argmax()), neurons)
    print(f"L{layer}N{neuron} has most to do with {ANSWER!r}: {relevance.max():+.2f} of the logit\n")

    before = probabilities(explainer, TRIED_ON)
    with explainer.steer({("neuron", layer, neuron): 0.0}):
        after = probabilities(explainer, TRIED_ON)
    for prompt, old, new in zip(TRIED_ON, before, after, strict=True):
        says = explainer.tokenizer.decode(new.argmax())
        print(f"{prompt} …  P({ANSWER!r}) {old[answer]:.3f} -> {new[answer]:.3f}, it says {says!r}")

    random, control = Random(0), []
    for _ in range(DRAWS):
        other = random.randrange(layers), random.randrange(neurons)
        if other != (layer, neuron):
            with explainer.steer({("neuron", *other): 0.0}):
                control.append(probabilities(explainer, TRIED_ON)[:, answer].mean().item())
    print(
        f"\nmean P({ANSWER!r}): {before[:, answer].mean():.3f} before, {after[:, answer].mean():.3f} without it;"
        f"\ncontrol, one of {len(control)} random neurons set to zero: {sum(control) / len(control):.3f} in the mean, "
        f"{min(control):.3f} at worst"
    )
    flipped = int((after.argmax(-1) != answer).sum())
    return {"flipped": flipped, "before": before[:, answer], "after": after[:, answer], "control": control}


if __name__ == "__main__":
    main()
