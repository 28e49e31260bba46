"""Upstream's helpers: the PDF is written with and without TeX, and words come out as they went in."""

from __future__ import annotations

import pytest
import torch

from lxt.utils import clean_tokens, pdf_heatmap


@pytest.fixture
def no_tex(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_failing_tex_falls_back_and_says_so(tmp_path, monkeypatch) -> None:
    (tmp_path / "xelatex").write_text("#!/bin/sh\necho '! LaTeX Error: File `xcolor.sty` not found.'; exit 1\n")
    (tmp_path / "xelatex").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"xelatex failed \(! LaTeX Error: File `xcolor"):
        pdf_heatmap(["a", " b"], [0.5, -1.0], path=tmp_path / "x.pdf", delete_aux_files=False)
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF-1")
    assert (tmp_path / "x.tex").exists()


@pytest.mark.usefixtures("no_tex")
@pytest.mark.parametrize(
    "relevances", [[0.1, -1.0, 1.0], torch.tensor([0.1, -1.0, 1.0], requires_grad=True).bfloat16()]
)
@pytest.mark.parametrize("backend", ["xelatex", "pdflatex"])
def test_pdf_heatmap_writes_where_asked(relevances, backend: str, tmp_path) -> None:
    pdf_heatmap(["I", " like", " {50%}"], relevances, path=str(tmp_path / "new" / "x.pdf"), backend=backend)
    assert (tmp_path / "new" / "x.pdf").read_bytes().startswith(b"%PDF")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.pdf"]


def test_matplotlib_prints_cleaned_words_without_their_backslashes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    drawn = []
    monkeypatch.setattr("lxt.show.latex.text_pages", lambda blocks: drawn.extend(blocks[0].words) or b"")
    pdf_heatmap(clean_tokens(["▁a_b", "▁50%", "\\{", "▁$"]), [0.0] * 4, path=tmp_path / "x.pdf")
    assert [word for word, _ in drawn] == [" a_b", " 50%", "\\{", " $"]
    assert drawn[0][1] == (255, 254, 254)  # the middle of bwr


@pytest.mark.parametrize(
    ("words", "relevances", "options", "message"),
    [
        (["a"], [0.1, 0.2], {}, "1 words need as many relevances"),
        (["a", "b"], [[0.1, 0.2]], {}, "in one row"),
        (["a", "b"], [0.1, 1.5], {}, r"must be in \[-1, 1\], got 0\.1 to 1\.5"),
        (["a"], [float("nan")], {}, r"must be in \[-1, 1\]"),
        (["a"], [0.1], {"cmap": "nope"}, "unknown colormap 'nope'"),
        (["a"], [0.1], {"backend": "word"}, "allowed: xelatex, pdflatex"),
    ],
)
def test_pdf_heatmap_refuses(words, relevances, options: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        pdf_heatmap(words, relevances, path=tmp_path / "x.pdf", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "cleaned"),
    [
        (["▁I", "▁like", "d"], [" I", " like", "d"]),
        (["I", "Ġlike", "Ġ50%", "Ġa_b&{c}#$"], ["I", " like", r" 50\%", r" a\_b\&\{c\}\#\$"]),
        (["play", "##ing", "it", "C#"], ["play", "ing", " it", r" C\#"]),
        (["▁a\\b"], [r" a\textbackslash{}b"]),
    ],
)
def test_clean_tokens(words: list[str], cleaned: list[str]) -> None:
    given = list(words)
    assert clean_tokens(words) == cleaned
    assert words == given


def test_clean_tokens_names_unknown_marks() -> None:
    with pytest.raises(ValueError, match="known are '▁', 'Ġ' and '##'"):
        clean_tokens(["a", "b"])
