"""Why a head looked where it looked: an induction head of the bundled model, taken apart.

After "river bag cold lamp river bag" the bundled model says " cold". A head of layer 1 looks from the last " bag" at
" cold", the word that followed " bag" before. A head sees through its queries and keys only, so what made it look there
is in the score of these two, and relevance says where that comes from:

1. Find the head: the one that carries most relevance to the last token, and from where.
2. Explain its score, against the mean of those of all other tokens.
3. Follow the strongest earlier head on the key's side one step further: where did it look?
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.utils import logging

import lxt

TEXT = " river bag cold lamp river bag"


def main(folder: str = "out") -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # the weights are there in a blink
    explainer = lxt.load("tiny")

    flow = explainer.attribute(TEXT, latents="flow").latents["flow"].values[:, 0]  # [layer, head, query, key]
    layer, rest = divmod(int(flow[:, :, -1].argmax()), flow[0, :, -1].numel())
    head, key = divmod(rest, flow.shape[-1])

    score = explainer.attribute_attention(TEXT, layer, head, key=key)
    score.show()
    score.plot(out / "score.png")

    earlier = score.top(1, heads=True, side="key")[0]
    below, which = (int(number) for number in str(earlier.head)[1:].split("H"))
    looked = explainer.attribute_attention(TEXT, below, which, query=earlier.position)
    weight = float(looked.weights[looked.key_position])
    print(
        f"\nL{layer}H{head} finds {score.tokens[key]!r} since {earlier.head} wrote there what stood before: it looked "
        f"at {looked.tokens[looked.key_position]!r} with a weight of {weight:.1%}"
    )
    print(f"written: {out / 'score.png'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
