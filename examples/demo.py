"""What `make demo` runs: the bundled model explains why it says what it says.

1. Load the bundled model, "tiny".
2. Explain its prediction, with the relevance after every layer.
3. Show it in the terminal, as a picture (layers x tokens) and as an HTML page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.utils import logging

import lxt

TEXT = "I have 5 cats and 3 dogs. My cats love to play with my"


def main(folder: str = "out") -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)

    logging.disable_progress_bar()  # the weights are there in a blink
    explainer = lxt.load("tiny")
    attribution = explainer.attribute(TEXT, latents=("residual",))

    attribution.show()
    attribution.plot(out / "demo.png")
    attribution.to_html(out / "demo.html")
    print(f"\nwritten: {out / 'demo.png'} (relevance of each token after each layer), {out / 'demo.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
