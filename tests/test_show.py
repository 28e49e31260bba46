"""The views: they say which words mattered, survive any token, and let nothing that a token contains act."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lxt.attribution import Attribution, Explained, Prediction
from lxt.latents import LatentRelevance
from lxt.show import colors, terminal
from lxt.show.rows import rows
from lxt.show.words import amount, direction, listed, percent, shorten, visible

WORDS = ["<s>", "I", " have", " 5", " cats", " and", " 3", " dogs", ".", " My", " cats", " love"]
SCORES = [40.0, 0.1, 0.02, 0.3, -2.2, 0.0, 0.9, 5.1, -0.00123, 0.2, 1.9, 0.4]
HOSTILE = [
    *("<s>", "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "\n", "\r\n", "\t", "\x00\x1b[31m\x9b"),
    *("\u202eevil", "\u2066", "\u200b", "x" * 10_000, "\u0301" * 10_000, "\n" * 10_000, "\x00" * 30, "مرحبا", " שלום"),
    *(" 😀", "👨‍👩‍👧", "\ud83d", "日本語", "नमस्ते", "$x_1^2$", "\\textbf{x}", "\\input{/etc/passwd}", "", "   "),
    *("&amp;", "\U000e0041", "\ufffe", "\ufeff", "\u200d", "[bold]hi[/bold]", "[/]", "]]>", "--><!--", "\u2028"),
]
NEVER_SHOWN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def attribution(
    tokens: list[str], scores: list[float] | None = None, layers: int = 0, label: str = "' dogs'", rows: int = 1
) -> Attribution:
    random = torch.Generator().manual_seed(0)
    length = len(tokens)
    relevance = torch.randn(length, generator=random) if scores is None else torch.tensor(scores)
    special = torch.zeros(rows, length, dtype=torch.bool)
    special[:, 0] = tokens[0] == "<s>"
    return Attribution(
        tokens=[list(tokens)] * rows,
        token_ids=None,
        relevance=relevance.expand(rows, -1),
        mask=torch.ones(rows, length, dtype=torch.bool),
        special=special,
        explained=[Explained(label, "logit", 14.02, length - 1)] * rows,
        predictions=[Prediction(label, 7, 14.02, 0.971)] * rows,
        model="tiny",
        rules="attnlrp",
        latents={"residual": torch.randn(layers, rows, length, generator=random)} if layers else {},
        versions={"lxt": "3"},
    )


def printed(out: Attribution, width: int = 80, color: str | None = None, **options: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=color, force_terminal=color is not None, highlight=False)  # type: ignore[arg-type]
    terminal.render(out, console, **options)  # type: ignore[arg-type]
    return file.getvalue()


# ---- words and numbers


@pytest.mark.parametrize("token", HOSTILE)
def test_what_is_shown_is_short_and_harmless(token: str) -> None:
    for text in (visible(token[:100]), shorten(token), listed(token), listed(token, 12, note=False)):
        assert not NEVER_SHOWN.search(text)
        assert len(text) <= 150 or text == visible(token[:100])
        text.encode()


def test_long_tokens_name_their_length() -> None:
    assert shorten("a" * 10_000, 8) == "aaaa…aaa (10,000 characters)"


def test_ordinary_text_is_left_alone() -> None:
    for text in (" dogs", "naïve", "日本語", "👨‍👩‍👧", "مرحبا", "नमस्ते", "$x$ & <b>", "e\u0301"):
        assert shorten(text) == text


def test_reading_direction() -> None:
    assert direction(["مرحبا", " بالعالم", " ok"]) == "rtl"
    assert direction(["hello", " שלום", " world"]) == "ltr"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (14.02, "14.0"),
        (-0.00123, "−0.00123"),
        (1.234e-9, "1.23e−09"),
        (-12345.6, "−12346"),
        (1e30, "1.00e+30"),
    ],
)
def test_numbers_keep_significant_digits(value: float, text: str) -> None:
    assert amount(value) == text


def test_percentages_do_not_round_to_certainty() -> None:
    assert [percent(p) for p in (1.0, 0.99999, 0.5, 1e-7)] == ["100 %", ">99.9 %", "50.0 %", "1.00e−05 %"]


# ---- colours


@pytest.mark.parametrize("theme", [colors.LIGHT, colors.DARK])
@pytest.mark.parametrize("sign", [1, -1])
def test_stronger_scores_are_further_from_the_page(theme: colors.Theme, sign: int) -> None:
    distances = [
        abs(colors.luminance(colors.diverging(sign * i / 20, theme)) - colors.luminance(theme[0])) for i in range(21)
    ]
    assert distances == sorted(distances)
    assert len(set(distances)) == 21
    red, _, blue = colors.diverging(0.6 * sign, theme)
    assert (red > blue) == (sign > 0)


@pytest.mark.parametrize("paint", [colors.terminal, colors.diverging, lambda f: colors.diverging(f, colors.DARK)])
def test_text_on_any_colour_is_readable(paint) -> None:
    for i in range(-100, 101):
        background = paint(i / 100)
        assert colors.contrast(colors.ink(background), background) >= 4.5


def test_terminal_colours_work_on_black_and_on_white() -> None:
    for page in ((0, 0, 0), (255, 255, 255)):
        for sign in (1, -1):
            assert colors.contrast(colors.weak(sign), page) >= 4
            assert all(colors.contrast(colors.terminal(sign * i / 10), page) >= 3 for i in range(11))


def test_scores_beyond_the_scale_are_clipped() -> None:
    assert colors.diverging(7.0) == colors.diverging(1.0)
    assert colors.diverging(0.0) == (255, 255, 255)


# ---- rows


def test_special_tokens_do_not_set_the_scale_unless_asked() -> None:
    out = attribution(WORDS, SCORES)
    plain, scaled = next(rows(out)), next(rows(out, scale_special=True))
    assert plain.scale == pytest.approx(5.1)
    assert plain.fractions[0] == 0
    assert plain.fractions[7] == 1
    assert scaled.scale == 40
    assert scaled.ranked(1) == [0]
    assert [plain.tokens[i] for i in plain.ranked(3)] == [" dogs", " cats", " cats"]
    assert next(rows(out, special=False)).tokens == WORDS[1:]
    assert next(rows(out, special=False)).places[0] == 1


def test_a_row_of_special_tokens_only_is_still_shown() -> None:
    row = next(rows(attribution(["<s>"], [2.0]), special=False))
    assert row.tokens == ["<s>"]
    assert row.fractions == [1.0]


def test_the_embeddings_are_the_lowest_layer_once() -> None:
    out = attribution(WORDS, SCORES, layers=3)
    row = next(rows(out))
    assert row.layer_names == ["embed", "L0", "L1", "L2"]
    assert row.layers is not None
    assert row.layers[0].tolist() == out.relevance[0].double().tolist()
    kept = LatentRelevance("residual", out.latents["residual"].values[1:], (4, 9))
    assert next(rows(replace(out, latents={"residual": kept}))).layer_names == ["embed", "L4", "L9"]


# ---- terminal


def test_terminal_without_colour_holds_scores_and_marks() -> None:
    text = printed(attribution(WORDS, SCORES))
    assert "\x1b" not in text
    assert "«+dogs»" in text
    assert "<s>I have 5 «−cats» and 3" in text
    assert re.search(r"\+5\.10\s+␣dogs\s+█{24}", text)
    assert re.search(r"−2\.20\s+␣cats \(4\)\s+█+", text)  # there are two
    assert "Σ relevance 46.72 of logit 14.02 (333 %; check() says why)" in text
    assert "' dogs'" in text
    assert "97.1 %" in text
    assert "tiny · attnlrp" in text


def test_no_color_is_obeyed_in_a_terminal(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(attribution(WORDS, SCORES), color="truecolor")
    assert not re.search(r"\x1b\[[0-9;]*(38|48);", text)
    assert "+5.10" in text
    assert "«" in text


def test_terminal_colours_the_strongest_token_most() -> None:
    text = printed(attribution(WORDS, SCORES), color="truecolor")
    end = ";".join(map(str, colors.terminal(1.0)))
    assert re.search(rf"\x1b\[1;[0-9;]*48;2;{end}mdogs\x1b", text)
    assert "lowers −5.10" in text


@pytest.mark.parametrize("color", [None, "standard", "256", "truecolor"])
@pytest.mark.parametrize("width", [20, 80])
def test_terminal_survives_hostile_tokens(color: str | None, width: int) -> None:
    text = printed(attribution(HOSTILE, layers=2, label="' \x1b[2J\u202e'"), width, color)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert not NEVER_SHOWN.search(bare)
    assert bare.count("\n") < 120
    assert "[bold]hi[/bold]" in bare.replace("\n", "")


def test_terminal_wraps_and_limits_rows() -> None:
    lines = printed(attribution([f" word{i}" for i in range(3000)]), width=60).splitlines()
    assert max(map(len, lines)) <= 60
    text = printed(attribution(WORDS, SCORES, rows=30), limit=3)
    assert text.count("Σ relevance") == 3
    assert "27 more rows" in text


def test_terminal_writes_in_the_encoding_it_has() -> None:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding="ascii")
    terminal.render(attribution(HOSTILE), Console(file=file, width=80))
    file.flush()
    assert b"sum of relevance" in buffer.getvalue()
    assert b"####" in buffer.getvalue()


def test_show_prints(capsys) -> None:
    attribution(WORDS, SCORES).show(special=False, top=2)
    text = capsys.readouterr().out
    assert "<s>" not in text
    assert text.count("█ ") + text.count("█\n") == 2


# ---- html


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def html(out: Attribution, path, **options: bool) -> str:
    out.to_html(path / "page.html", **options)
    return (path / "page.html").read_text(encoding="utf-8")


def test_html_shows_scores_ranking_and_layers(tmp_path) -> None:
    source = html(attribution(WORDS, SCORES, layers=4), tmp_path)
    page = Page(source)
    tokens = page.of_class("t")
    assert len(tokens) == len(WORDS)
    assert tokens[7]["title"] == "+5.10 · token 7"
    assert tokens[7]["tabindex"] == "0"
    assert "p20" in (tokens[7]["class"] or "")
    assert "special token" in (tokens[0]["title"] or "")
    assert "Σ relevance 46.72 of logit 14.02 (333 %; check() says why)" in page.text
    assert sum(tag == "rect" for tag, _ in page.tags) == 5 * len(WORDS) + 10
    assert "prefers-color-scheme:dark" in source


@pytest.mark.parametrize("label", ["' dogs'", "</title><script>alert(2)</script>", "\"><b onclick='x'>"])
def test_html_lets_no_token_act(label: str, tmp_path) -> None:
    out = attribution(HOSTILE, layers=3, label=label)
    hostile = Attribution(**{**vars(out), "model": "<script>m</script>", "versions": {"<i>": "</style>"}})
    for source in (html(hostile, tmp_path), hostile._repr_html_()):
        page = Page(source)
        known = set(
            "html head meta title style body header main section h2 h3 small bdi div span p i svg g rect".split()
        )
        known |= set("text table tr td th details summary footer nav ol li a".split())
        assert {tag for tag, _ in page.tags} <= known
        for _, attrs in page.tags:
            assert not any(name.startswith("on") or name in ("src", "srcdoc", "action") for name in attrs)
            assert (attrs.get("href") or "#").startswith("#")
        assert "<script>alert(1)</script>" in page.text
        assert not NEVER_SHOWN.search(source)
        assert "10,000 characters" in source


def test_html_policy_allows_its_own_sheet_and_nothing_else(tmp_path) -> None:
    source = html(attribution(HOSTILE, layers=2), tmp_path)
    [sheet] = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    [policy] = [attrs["content"] for tag, attrs in Page(source).tags if attrs.get("http-equiv")]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "://" not in source
    assert "url(" not in sheet
    assert "@import" not in sheet
    assert not any("style" in attrs for _, attrs in Page(source).tags)


def test_html_stays_small(tmp_path) -> None:
    assert len(html(attribution([f" token{i}" for i in range(200)], layers=32), tmp_path).encode()) < 2_000_000
    assert len(html(attribution(HOSTILE * 100, layers=80), tmp_path).encode()) < 5_000_000


def test_html_sums_columns_of_long_texts(tmp_path) -> None:
    page = Page(html(attribution([f" token{i}" for i in range(4000)], layers=79), tmp_path))
    assert "Each column sums 14 neighbouring tokens" in page.text


def test_html_batches_are_sections_and_rtl_runs_right_to_left(tmp_path) -> None:
    page = Page(html(attribution(["مرحبا", " بالعالم"], rows=3), tmp_path))
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == ["row0", "row1", "row2"]
    assert [attrs["dir"] for attrs in page.of_class("text")] == ["rtl"] * 3


def test_notebook_fragment_limits_rows() -> None:
    assert attribution(WORDS, SCORES, rows=30)._repr_html_().count("<section") == 20


def test_a_notebook_gets_the_fragment_and_no_text(monkeypatch, capsys) -> None:
    shown: list[str] = []
    stand_in = SimpleNamespace(HTML=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=stand_in))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    attribution(WORDS, SCORES).show()
    assert shown[0].count("<section") == 1
    assert capsys.readouterr().out == ""


# ---- figure


@pytest.mark.parametrize("normalise", ["absolute", "layer"])
def test_figure_has_the_embeddings_at_the_bottom(normalise, tmp_path) -> None:
    out = attribution(WORDS, SCORES, layers=3)
    made = out.plot(tmp_path / "x.png", normalise=normalise)
    axes, bar = made.axes
    assert axes.images[0].origin == "lower"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embed", "L0", "L1", "L2"]
    assert [label.get_text() for label in axes.get_xticklabels()][7] == "␣dogs"
    assert ("logit" in bar.get_ylabel()) == (normalise == "absolute")
    assert axes.images[0].norm.vmax == pytest.approx(5.1 if normalise == "absolute" else 1.0)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_figure_without_latents_is_one_bar_per_token() -> None:
    [axes] = attribution(WORDS, SCORES).plot().axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(SCORES)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_figure_draws_hostile_tokens_quietly(layers: int, kind: str, tmp_path, caplog) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        attribution([*HOSTILE, "\U0002fa1d", "🫨"], layers=layers, label="' $x_1$'").plot(tmp_path / f"x.{kind}")
    assert caplog.text == ""
    assert (tmp_path / f"x.{kind}").stat().st_size > 1000


def test_figure_leaves_pyplot_alone() -> None:
    code = (
        "import sys; sys.argv=['x']; import lxt.show.figure, lxt.show.latex, lxt.show.terminal, lxt.show.html\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_figure_refuses_what_it_cannot_draw(tmp_path) -> None:
    out = attribution(WORDS, SCORES)
    with pytest.raises(ValueError, match=r"allowed: 'absolute' \(one scale\), 'layer'"):
        out.plot(normalise="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"end the name in \.png"):
        out.plot(tmp_path / "x.xyz")
    with pytest.raises(ValueError, match=r"draw one: out\[i\]\.plot"):
        attribution(WORDS, SCORES, rows=13).plot()


def test_long_texts_are_summed_into_columns() -> None:
    [axes, _] = attribution([f" t{i}" for i in range(1000)], layers=2).plot().axes
    assert axes.images[0].get_array().shape == (3, 200)  # type: ignore[union-attr]
    assert "sums 5 neighbouring tokens" in axes.get_xlabel()


def test_all_zero_relevance_is_drawn_everywhere(tmp_path) -> None:
    out = attribution(["a", "b"], [0.0, 0.0], layers=2)
    zero = Attribution(**{**vars(out), "latents": {"residual": torch.zeros(2, 1, 2)}})
    zero.plot(tmp_path / "x.png", normalise="layer")
    zero.plot(tmp_path / "x.png")
    assert "no token has any relevance" in printed(zero)
    assert "No token has any relevance" in html(zero, tmp_path)
    zero.to_pdf(tmp_path / "x.pdf")


# ---- pdf


@pytest.fixture
def no_tex(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def pretend_tex(folder, monkeypatch, script: str) -> None:
    """Put a program named xelatex first on PATH."""
    folder.mkdir()
    (folder / "xelatex").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "xelatex").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.usefixtures("no_tex")
@pytest.mark.parametrize("tokens", [WORDS, HOSTILE, [f" word{i}" for i in range(2000)]])
def test_pdf_without_tex(tokens: list[str], tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribution(tokens, rows=2).to_pdf(tmp_path / "deep" / "x.pdf")
    assert (tmp_path / "deep" / "x.pdf").read_bytes().startswith(b"%PDF")


def test_pdf_by_tex_escapes_every_word(tmp_path, monkeypatch) -> None:
    pretend_tex(tmp_path / "bin", monkeypatch, f"cp text.tex {tmp_path}/seen.tex; printf '%%PDF-fake' > text.pdf")
    attribution(["a_b", " 50%", " \\input{x}", " $y^2$", " #~"]).to_pdf(tmp_path / "x.pdf")
    seen = (tmp_path / "seen.tex").read_text()
    for word in (r"a\_b", r"50\%", r"\textbackslash{}input\{x\}", r"\$y\textasciicircum{}2\$", r"\#\textasciitilde{}"):
        assert word in seen
    assert (tmp_path / "x.pdf").read_bytes() == b"%PDF-fake"


def test_letters_that_tex_lacks_are_left_to_matplotlib(tmp_path, monkeypatch) -> None:
    pretend_tex(tmp_path / "bin", monkeypatch, f"touch {tmp_path}/called; exit 1")
    attribution(["日本", " ok"]).to_pdf(tmp_path / "x.pdf")
    assert not (tmp_path / "called").exists()
