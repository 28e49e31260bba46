"""Upstream's helpers for a quick PDF: `pdf_heatmap` and `clean_tokens`, under their old names and signatures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["clean_tokens", "pdf_heatmap"]


def pdf_heatmap(
    words: Sequence[str],
    relevances: ArrayLike,
    cmap: str = "bwr",
    path: str | os.PathLike[str] = "heatmap.pdf",
    delete_aux_files: bool = True,
    backend: str = "xelatex",
) -> None:
    """Write words on coloured backgrounds as PDF, by LaTeX where it is installed, otherwise by matplotlib.

    Args:
        words: a leading space starts a new word; escaped by `clean_tokens` or as they are. They are text: a LaTeX
            command in a word is printed, not run.
        relevances: one number in [-1, 1] per word; a list, an array or a tensor.
        cmap: name of a matplotlib colormap.
        path: of the PDF; folders are created.
        delete_aux_files: False leaves LaTeX's source and log beside the PDF.
        backend: `xelatex` or `pdflatex`.

    Raises:
        ValueError: lengths that differ, relevances out of range, an unknown colormap or backend.
    """
    import matplotlib
    import torch

    from lxt.show.latex import BACKENDS, text_pdf, unescape
    from lxt.show.pages import Block
    from lxt.show.words import shorten

    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    if cmap not in matplotlib.colormaps:
        raise ValueError(f"unknown colormap {cmap!r}; allowed are matplotlib's, e.g. 'bwr' or 'RdBu_r'")
    numbers = torch.as_tensor(relevances).detach().double().cpu()
    if numbers.ndim != 1 or len(words) != len(numbers):
        raise ValueError(f"{len(words)} words need as many relevances in one row, got shape {tuple(numbers.shape)}")
    if not bool((numbers.abs() <= 1 + 1e-6).all()):  # what rounding leaves of x / x.abs().max()
        low, high = float(numbers.min()), float(numbers.max())
        raise ValueError(
            f"relevances must be in [-1, 1], got {low:.4g} to {high:.4g}; divide by relevances.abs().max()"
        )
    shades = matplotlib.colormaps[cmap]((numbers.clamp(-1, 1).numpy() + 1) / 2)
    backgrounds = [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue, _ in shades.tolist()]
    shown = [shorten(unescape(word), 200) for word in words]
    text_pdf([Block(list(zip(shown, backgrounds, strict=True)))], path, backend, delete_aux_files)


def clean_tokens(words: Sequence[str]) -> list[str]:
    r"""Words from a tokenizer's pieces, with spaces where its marks were and LaTeX's special characters escaped.

    >>> clean_tokens(["▁cats", "▁&", "▁dogs"])
    [' cats', ' \\&', ' dogs']

    Raises:
        ValueError: no piece carries one of the known marks `▁`, `Ġ`, `##`.
    """
    from lxt.show.latex import escape

    words = list(words)
    if any("▁" in word for word in words):
        words = [word.replace("▁", " ") for word in words]
    elif any("Ġ" in word for word in words):
        words = [word.replace("Ġ", " ") for word in words]
    elif any(word.startswith("##") for word in words):
        words = [word[2:] if word.startswith("##") else f" {word}" for word in words]
        words[0] = words[0].strip()
    else:
        raise ValueError(
            f"no known word marks in {words[:5]!r}; known are '▁', 'Ġ' and '##': pass raw tokenizer pieces"
        )
    return [escape(word) for word in words]
