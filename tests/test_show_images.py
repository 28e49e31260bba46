"""The views of images: what they state, that they write what they should, and nothing that loads or runs."""

from __future__ import annotations

import io
import re

import pytest
import torch
from PIL import Image
from rich.console import Console

import lxt
from lxt.attribution import Explained, Prediction
from lxt.imagerelevance import ImageRelevance
from lxt.show.images import as_text, seen
from lxt.show.imageterminal import render


def an_attribution(rows: int = 2, text: bool = False, side: int = 32, name: str = "tabby cat") -> lxt.Attribution:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(rows, 4, 4, generator=generator)
    patches[:, 1, 2] = 9.0  # the strongest
    length = 7 if text else 16
    relevance = torch.randn(rows, length, generator=generator) if text else patches.flatten(1)
    words = ["what", *["<image>"] * 4, " is", " this"]
    return lxt.Attribution(
        tokens=[words if text else [f"{i // 4},{i % 4}" for i in range(16)]] * rows,
        token_ids=torch.arange(length).expand(rows, -1) if text else None,
        relevance=relevance,
        mask=torch.ones(rows, length, dtype=torch.bool),
        special=torch.zeros(rows, length, dtype=torch.bool),
        explained=[Explained(repr(name), "logit", 3.0)] * rows,
        predictions=[Prediction(name, 0, 3.0, 0.5)] * rows,
        model="a model",
        rules="attnlrp",
        images=tuple(
            ImageRelevance(
                row,
                torch.randn(side, side, generator=generator),
                patches[row],
                torch.randint(0, 255, (side, side, 3), generator=generator, dtype=torch.uint8),
            )
            for row in range(rows)
        ),
    )


def printed(attribution: lxt.Attribution, width: int = 90, **options: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, **{"color_system": None, **options})  # type: ignore[arg-type]
    render(attribution, console)
    return file.getvalue()


def test_the_terminal_names_the_strongest_patch():
    text = printed(an_attribution(1))
    assert "What speaks for 'tabby cat'?" in text
    assert "4 × 4 patches" in text
    assert "strongest: row 2, column 3 +9.00" in text


def test_the_terminal_colours_a_field():
    text = printed(an_attribution(1), color_system="truecolor", force_terminal=True)
    assert text.count("\x1b[48;2;") >= 16
    assert "\x1b[48;2;200;24;38m" in text  # the full red of the strongest


def test_fine_maps_are_summed_into_fields():
    out = an_attribution(1)
    fine = ImageRelevance(0, torch.ones(100, 90), torch.ones(100, 90))
    text = printed(lxt.Attribution(**{**vars_of(out), "images": (fine,)}))
    assert "in fields of 4 × 4" in text
    assert "row 1, column 1 +16.0" in text


def vars_of(attribution: lxt.Attribution) -> dict:
    return {name: value for name, value in vars(attribution).items() if name != "checker"}


def test_runs_of_image_tokens_become_one_word():
    out = an_attribution(text=True)
    text = as_text(out)
    assert text.tokens[0] == ["what", "<image> × 4", " is", " this"]
    torch.testing.assert_close(text.relevance[:, 1], out.relevance[:, 1:5].sum(1))
    torch.testing.assert_close(text.total, out.total)
    assert "<image> × 4" in printed(out)
    assert as_text(an_attribution()) is not None


def test_one_glaring_pixel_does_not_leave_the_others_pale():
    out = an_attribution(1)
    pixels = torch.ones(64, 64)
    pixels[0, 0] = 1000.0
    (one,) = seen(lxt.Attribution(**{**vars_of(out), "images": (ImageRelevance(0, pixels),)}))
    (found,) = one.maps(one.images[0])
    assert found.scale == 1.0
    assert found.fractions.max() == 1.0


@pytest.mark.parametrize("text", [False, True], ids=["classifier", "text"])
@pytest.mark.parametrize("end", ["png", "pdf", "svg"])
def test_pictures_are_drawn(tmp_path, text, end):
    path = tmp_path / f"out.{end}"
    an_attribution(text=text).plot(path)
    assert path.stat().st_size > 10_000
    if end == "png":
        with Image.open(path) as drawn:
            colours = drawn.convert("RGB").resize((100, 100)).getcolors(10_000)
        assert colours is not None
        assert any(r > 150 and g < 90 and b < 100 for _, (r, g, b) in colours)  # the strongest patch, in red


def test_the_pdf_is_the_picture(tmp_path):
    an_attribution().to_pdf(tmp_path / "out.pdf")
    assert (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("text", [False, True], ids=["classifier", "text"])
def test_the_page_needs_nothing_from_outside(tmp_path, text):
    path = tmp_path / "out.html"
    an_attribution(text=text, name="<b>cat</b>").to_html(path)
    page = path.read_text(encoding="utf-8")
    assert "img-src data:" in page
    assert "<script" not in page
    assert "<b>cat" not in page
    assert not re.findall(r'(?:href|src)="(?!data:image/png;base64,|#)', page)
    assert page.count("<image ") == 2 * 3  # the picture, in grey under its patches, and its pixels
    assert "row 2, column 3: +9.00" in page
    assert ("&lt;image&gt; × 4" in page) is text


def test_a_page_of_text_alone_shows_no_images(tmp_path):
    lxt.load("tiny").attribute("My cats love").to_html(tmp_path / "out.html")
    assert "img-src" not in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_a_notebook_gets_the_same():
    cell = an_attribution(25)._repr_html_()
    assert "5 more rows" in cell
    assert cell.count("<section") == 20


def test_too_many_images_for_a_figure_are_said():
    with pytest.raises(ValueError, match=r"up to 12 images, got 13; draw one row: out\[i\]"):
        an_attribution(13).plot()


def test_parts_that_are_not_there_are_left_out():
    out = an_attribution(1)
    bare = ImageRelevance(0, torch.randn(8, 8))
    for view in (bare, ImageRelevance(0, None)):
        one = lxt.Attribution(**{**vars_of(out), "images": (view,)})
        one.plot()
        one._repr_html_()
        printed(one)
