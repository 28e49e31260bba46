"""The explorer in headless Chromium: from a prediction to contexts, by pointer and by keys, silent and offline."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
import torch
from browser import Opened, chromium, opened
from explored import HOSTILE, SENTENCE, attribution, labels

from lxt.attribution import Attribution
from lxt.show import colors
from lxt.show.words import shorten, signed

STEP = 1 / 65534 + 2**-22


@pytest.fixture(scope="module")
def out() -> Attribution:
    return attribution(rows=3, flow=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, out: Attribution) -> Path:
    """The pages: small.html, bare.html (no latents), heads.html (labelled), hostile.html, right.html, large.html."""
    folder = tmp_path_factory.mktemp("pages")
    out.explore(folder / "small.html", labels=labels(text=" cats"))
    attribution(latents=False).explore(folder / "bare.html")
    attribution().explore(folder / "heads.html", labels=labels(count=4, latent="head"))
    attribution(HOSTILE, flow=True, model="<b>model</b>").explore(
        folder / "hostile.html", labels=labels(model="<b>model</b>", text="</bdi><script>alert(3)</script>")
    )
    attribution(["שלום", " עולם", " abc"]).explore(folder / "right.html")
    tokens = ["<s>", *[f" word{i % 40}" for i in range(199)]]
    attribution(tokens, layers=32, heads=32, neurons=20, top=20, flow=True).explore(folder / "large.html")
    return folder


Open = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Any, folder: Path) -> Iterator[Open]:
    """Opens a page by its name; afterwards it must have been silent and asked for nothing."""
    with ExitStack() as stack:
        pages: list[Opened] = []

        def one(name: str, address: str = "", **options: Any) -> Opened:
            pages.append(stack.enter_context(opened(browser, folder / name, address, **options)))
            return pages[-1]

        yield one
        for page in pages:
            assert page.said == []
            assert page.violations() == []
            assert [address for address in page.asked if not address.startswith("blob:")] == page.asked[:1]
            assert page.asked[0].startswith("file://")


def cell(one: Opened, view: str, row: int, column: int) -> dict[str, float]:
    """Where a cell of a map is, on its canvas."""
    place = """([view, row, column]) => {
        const { left, top, wide, high, rows, up } = views[view].cells;
        return { x: left + (column + 0.5) * wide, y: top + ((up ? rows - 1 - row : row) + 0.5) * high };
    }"""
    return one.page.evaluate(place, [view, row, column])


def click_cell(one: Opened, view: str, row: int, column: int) -> None:
    one.page.click(f"#{view} canvas", position=cell(one, view, row, column))


def address(one: Opened) -> str:
    return one.page.evaluate("location.hash")


def number(text: str) -> float:
    """The first number with a sign in a text."""
    found = re.search(r"[+−]\d[\d.]*(e[+−]?\d+)?|(?<!\S)0(?!\S)", text)
    assert found is not None, text
    return float(found[0].replace("−", "-"))


# ---- the flow


def test_clicks_lead_from_a_prediction_to_the_contexts_of_a_neuron(open_page: Open, out: Attribution) -> None:
    one = open_page("small.html")
    page = one.page
    assert page.inner_text("h1") == "What speaks for ' Mary'?"
    assert "probability 80.0 %" in page.inner_text("#facts")
    assert page.locator("#rows [role=option]").count() == 3

    page.click("#rows [role=option] >> nth=1")
    assert page.inner_text("h1") == "What speaks for ' him'?"
    assert page.title() == "' him' explained"

    page.click("#tokens [role=option] >> nth=4")  # " John"
    head = out.latents["head"].values[:, 1]
    assert "token 4 ‘␣John’" in page.inner_text("#heads .caption >> nth=0")
    click_cell(one, "layers", 2 + 1, 4)  # the embeddings come first
    assert page.evaluate("[state.layer, state.token]") == [2, 4]
    click_cell(one, "heads", 1, 3)
    assert "L1H3" in page.inner_text("#heads h3")
    assert number(page.inner_text("#heads h3").removeprefix("L1H3")) == pytest.approx(
        float(head[1, :, 3].sum()), rel=5e-3
    )
    assert "From token to token: L1H3" in page.inner_text("#maps h2")

    click_cell(one, "maps", 4, 2)
    assert page.evaluate("[state.token, state.key]") == [4, 2]
    carried = page.evaluate("views.maps.view.say(4, 2)")
    assert carried.startswith("‘␣Mary’ → ‘␣John’: ")
    assert number(carried) == pytest.approx(float(out.latents["flow"].values[1, 1, 3, 4, 2]), rel=5e-3)

    neuron = out.latents["neuron"]
    best = int(neuron.indices[1, 1, 4, 0])
    assert page.inner_text("#neurons [role=option] >> nth=0").split()[1] == f"L1N{best}"
    second = int(neuron.indices[1, 1, 4, 1])
    page.click("#neurons [role=option] >> nth=1")
    assert page.inner_text("#neurons h3 >> nth=0") == f"L1N{second}"
    assert f"label 1:{second}" in page.inner_text("#neurons")
    assert page.inner_text("#neurons .contexts li >> nth=0").split("\n")[-1] == "I have cats at home"
    assert page.inner_text("#neurons mark >> nth=0") == "cats"
    assert address(one) == f"#row=1&token=4&layer=1&head=3&neuron={second}&key=2"

    page.click("#trail .clear")
    assert "all tokens" in page.inner_text("#heads .caption >> nth=0")


def test_keys_alone_do_the_same(open_page: Open, out: Attribution) -> None:
    one = open_page("small.html")
    page, press = one.page, one.page.keyboard.press

    def tab_to(selector: str) -> None:
        for _ in range(40):
            press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outline")
                assert "solid" in outline, outline  # the focus is seen
                assert "3px" in outline, outline
                return
        raise AssertionError(f"Tab never reaches {selector}")

    tab_to("#rows [role=option]")
    press("ArrowDown")
    press("Enter")
    assert page.evaluate("state.row") == 1
    tab_to("#tokens [role=option]")
    for key in ("End", "ArrowLeft", "Home", "ArrowRight", "ArrowRight"):
        press(key)
    assert page.evaluate("document.activeElement.textContent") == "Mary"
    assert signed(float(out.relevance[1, 2])) in page.inner_text("#tip")
    press("Enter")
    assert page.evaluate("state.token") == 2
    tab_to("#layers [role=grid]")
    for key in ("PageUp", "ArrowDown", "End", "ArrowLeft", "Home", "ArrowRight", "ArrowRight", " "):
        press(key)
    assert page.evaluate("[state.layer, state.token]") == [1, 2]
    spoken = page.inner_text("#layers [role=gridcell]")
    assert spoken.startswith("L1 · token 2 ‘␣Mary’")
    assert number(spoken[20:]) == pytest.approx(float(out.latents["residual"].values[1, 1, 2]), rel=5e-3)
    active = page.get_attribute("#layers [role=grid]", "aria-activedescendant")
    assert page.get_attribute("#layers [role=gridcell]", "id") == active
    tab_to("#heads [role=grid]")
    for key in ("Home", "ArrowRight", "ArrowUp", "Enter"):
        press(key)
    assert page.evaluate("[state.layer, state.head]") == [2, 1]
    tab_to("#neurons [role=option]")
    press("ArrowDown")
    press("Enter")
    chosen = int(out.latents["neuron"].indices[2, 1, 2, 1])
    assert page.evaluate("state.neuron") == chosen
    assert f"label 2:{chosen}" in page.inner_text("#neurons")
    for left in ("head", "layer", "token"):
        press("Escape")
        assert left in address(one)
    press("Escape")
    assert address(one) == "#row=1"


def test_everything_that_acts_has_a_role_and_a_name(open_page: Open) -> None:
    page = open_page("small.html").page
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, select, input, [tabindex]")]
        .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length))
        .map((one) => one.outerHTML)""")
    assert nameless == []
    lists = page.locator('[role="listbox"]')
    for place in range(lists.count()):
        box = lists.nth(place)
        assert box.get_attribute("aria-label")
        assert box.locator('[tabindex="0"]').count() <= 1


def test_addresses_lead_there_and_back(open_page: Open) -> None:
    one = open_page("small.html", "row=2&token=5&layer=1&head=2")
    page = one.page
    assert page.inner_text("h1") == "What speaks for ' her'?"
    assert "L1H2" in page.inner_text("#heads h3")
    page.click("#tokens [role=option] >> nth=3")
    assert "token=3" in address(one)
    page.go_back()
    assert page.evaluate("state.token") == 5
    for wrong in (
        "row=99&token=-1&layer=x&head=1e3&unknown=1",
        "%",
        "layer=99999&head=7&neuron=123",
        "stream=__proto__",
    ):
        page.evaluate("(hash) => { location.hash = hash; }", wrong)
        page.wait_for_function("(hash) => location.hash.slice(1) === hash", arg=wrong)
        assert page.evaluate("state.row") == 0
        assert "What speaks for" in page.inner_text("h1")


# ---- numbers and exports


def test_numbers_shown_are_those_of_the_attribution(open_page: Open, out: Attribution) -> None:
    page = open_page("small.html", "row=1").page
    shown = page.evaluate("""() => ({
        tokens: views.tokens.view.tokens.map((_, token) => views.tokens.view.say(token)),
        heads: [0, 1, 2].map((layer) => [0, 1, 2, 3].map((head) => views.heads.view.say(layer, head))),
        layers: views.layers.view.rows.map((_, line) =>
            views.layers.view.columns.map((_, token) => views.layers.view.say(line, token))),
    })""")
    for text, value in zip(shown["tokens"], out.relevance[1].tolist(), strict=True):
        assert f": {signed(value)} logit" in text
    sums = out.latents["head"].values[:, 1].double().sum(1)
    for layer, head in np.ndindex(3, 4):
        assert signed(float(sums[layer, head])) in shown["heads"][layer][head]
    inner = torch.cat([out.relevance[1][None], out.latents["residual"].values[:, 1]])
    for line, token in np.ndindex(*inner.shape):
        room = 0.005 * float(inner[line].abs().max())  # three digits of the map's largest number
        assert abs(number(shown["layers"][line][token].split("’")[-1]) - float(inner[line, token])) <= room


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_files_hold_the_numbers(open_page: Open, out: Attribution, tmp_path: Path) -> None:
    one = open_page("small.html", "row=2&layer=1&head=2")

    def close(found: list[float], true: torch.Tensor, largest: torch.Tensor) -> None:
        room = float(largest.abs().max()) * STEP + 1e-6
        assert np.abs(np.array(found).reshape(true.shape) - true.double().numpy()).max() <= room

    tokens = rows_of(one.saved('#tokens [data-form="csv"]', tmp_path))
    assert [row["text"] for row in tokens] == SENTENCE
    close([float(row["relevance"]) for row in tokens], out.relevance[2], out.relevance[2])
    layers = rows_of(one.saved('#layers [data-form="csv"]', tmp_path))
    assert [row["layer"] for row in layers[:: len(SENTENCE)]] == ["embed", "L0", "L1", "L2"]
    inner = out.latents["residual"].values[:, 2]
    close([float(row["relevance"]) for row in layers[len(SENTENCE) :]], inner, inner)
    heads = rows_of(one.saved('#heads .columns > :first-child [data-form="csv"]', tmp_path))
    true = out.latents["head"].values[:, 2]
    close([float(row["relevance"]) for row in heads], true.double().sum(1), true)
    assert {(row["token"], row["text"]) for row in heads} == {("", "all tokens")}
    head = rows_of(one.saved('#heads .columns > :last-child [data-form="csv"]', tmp_path))
    close([float(row["relevance"]) for row in head], true[1, :, 2], true[1, :, 2])
    flow = rows_of(one.saved('#maps [data-form="csv"]', tmp_path))
    true = out.latents["flow"].values[1, 2, 2]
    close([float(row["relevance"]) for row in flow], true, true)
    assert [row["key_text"] for row in flow[: len(SENTENCE)]] == SENTENCE
    neurons = rows_of(one.saved('#neurons .columns > :first-child [data-form="csv"]', tmp_path))
    sums = out.latents["neuron"].by_part()[1, 2]
    for row in neurons:
        assert float(row["relevance"]) == pytest.approx(float(sums[int(row["neuron"])]), rel=1e-5)
        assert row["label"] == f"label 1:{row['neuron']}"
    one.page.click("#tokens .token >> nth=6")
    at_token = rows_of(one.saved('#neurons .columns > :first-child [data-form="csv"]', tmp_path))
    kept = out.latents["neuron"]
    assert [int(row["neuron"]) for row in at_token] == kept.indices[1, 2, 6].tolist()
    assert {(row["token"], row["text"]) for row in at_token} == {("6", SENTENCE[6])}
    close([float(row["relevance"]) for row in at_token], kept.values[1, 2, 6], kept.values[1, 2])


def test_pictures_are_valid_and_show_the_colours(open_page: Open, out: Attribution, tmp_path: Path) -> None:
    one = open_page("small.html", "row=1")
    heads = "#heads .columns > :first-child"
    drawn = {}  # each is saved once: Chromium holds back what is more than ten files of one page
    for place in ("#tokens", "#layers", "#maps", heads, "#neurons .columns > :first-child"):
        png = one.saved(f'{place} [data-form="png"]', tmp_path)
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        picture = matplotlib.image.imread(png)
        assert min(picture.shape[:2]) > 100
        assert picture[..., 3].min() == 1
        assert len(np.unique((255 * picture[..., :3]).astype(np.uint32) @ (1, 256, 65536))) > 20
        svg = drawn[place] = ElementTree.parse(one.saved(f'{place} [data-form="svg"]', tmp_path)).getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        words = " ".join(text.text or "" for text in svg.iter("{http://www.w3.org/2000/svg}text"))
        assert "for ' him'" in words
        assert "logit" in words
    fills = {rect.get("fill") for rect in drawn[heads].iter("{http://www.w3.org/2000/svg}rect")}
    sums = out.latents["head"].values[:, 1].double().sum(1)
    for value in sums.flatten().tolist():
        share = round(64 * value / float(sums.abs().max())) / 64
        assert share == 0 or colors.css(colors.diverging(share, colors.LIGHT)) in fills


# ---- looks


def test_dark_is_what_the_system_asks_for_and_can_be_switched(open_page: Open, out: Attribution) -> None:
    one = open_page("small.html", color_scheme="dark")
    page = one.page

    def looks() -> tuple[str, str]:
        strongest = int(out.relevance[0, 1:].abs().argmax()) + 1  # the special token has no colour
        color = "([place]) => getComputedStyle(document.querySelectorAll('#tokens .token')[place]).backgroundColor"
        return page.evaluate("getComputedStyle(document.body).backgroundColor"), page.evaluate(color, [strongest])

    sign = 1 if float(out.relevance[0, 1:][out.relevance[0, 1:].abs().argmax()]) > 0 else -1
    for theme in (colors.DARK, colors.LIGHT, colors.DARK):
        assert looks() == tuple(f"rgb{color}" for color in (theme[0], colors.diverging(sign, theme)))
        page.click("#theme")


@pytest.mark.parametrize("name", ["small.html", "large.html", "hostile.html", "bare.html"])
def test_a_narrow_window_needs_no_sideways_scrolling(open_page: Open, name: str) -> None:
    page = open_page(name, viewport={"width": 400, "height": 800}, has_touch=True).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.tap("#tokens .token >> nth=1")
    assert page.evaluate("state.token") == 1


def test_a_large_page_opens_and_answers(open_page: Open) -> None:
    one = open_page("large.html", "layer=7")
    page = one.page
    assert "flow of L7H" in page.inner_text("#maps")
    page.click("#maps button >> nth=3")  # the head that it names
    assert "From token to token: L" in page.inner_text("#maps h2")
    click_cell(one, "heads", 20, 11)
    assert "L20H11" in page.inner_text("#heads h3")
    assert "To stay below 2 MB this page holds query × key maps of" in page.inner_text("#footer")


def test_what_was_not_kept_says_how_to_get_it(open_page: Open) -> None:
    page = open_page("bare.html").page
    for place, advice in (
        ("#layers", 'latents="residual"'),
        ("#heads", 'Where the model has attention heads, ask for it: latents=("residual", "head")'),
        ("#neurons", 'Where each layer has one MLP (a mixture of experts has "expert" instead), ask for it: latents=('),
    ):
        assert advice in page.inner_text(place)
        assert not page.is_visible(f"{place} canvas")
        assert not page.is_visible(f'{place} [data-form="csv"] >> nth=0')


def test_both_sides_of_a_map_name_the_same_tokens_with_room_between_them(open_page: Open) -> None:
    page = open_page("large.html").page
    named = """() => {
        const view = panes.maps.view;
        const { marks, cells } = view.scene(themeOf(data.palette));
        const words = marks.filter((mark) => mark.text !== undefined);
        const places = (some, place) => some.map(place).sort((one, other) => one - other);
        return [
            places(words.filter((mark) => !mark.turn), ({ y }) => Math.round((y - 4 - cells.top) / cells.high - 0.5)),
            places(words.filter((mark) => mark.turn), ({ x }) => Math.round((x - 3 - cells.left) / cells.wide - 0.5)),
            cells.high,
        ];
    }"""
    page.evaluate("choose(headsOf(rowAt(0).maps.get('flow'))[0])")
    rows, columns, high = page.evaluate(named)
    assert rows == columns
    assert len(rows) > 20
    assert min(np.diff(rows)) * high >= 14  # px, of letters of 11
    page.evaluate("choose({ token: 100, key: 50 })")
    rows, columns, high = page.evaluate(named)
    assert 100 in rows
    assert 50 in columns
    assert min(np.diff(rows)) * high >= 14


def test_tokens_of_one_text_are_named_with_their_places(open_page: Open) -> None:
    page = open_page("small.html").page  # " John" is there twice
    assert page.evaluate("rowAt(0).labels.slice(3, 6)") == ["␣and", "␣John (4)", "␣went"]
    page.click("#tokens .token >> nth=10")
    assert "␣John (10)" in page.inner_text("#trail")


def test_heads_that_were_labelled_have_their_contexts(open_page: Open) -> None:
    page = open_page("heads.html", "layer=2&head=1").page
    assert "label 2:1" in page.inner_text("#heads")
    assert " cats" in page.text_content("#heads .contexts li >> nth=0")
    assert "No corpus was read for it" in page.inner_text("#neurons")


# ---- hostile text, and the policy


def test_hostile_tokens_are_text(open_page: Open, tmp_path: Path) -> None:
    one = open_page("hostile.html", "layer=1&head=1")
    page = one.page
    shown = page.eval_on_selector_all("#tokens .token", "(all) => all.map((one) => one.textContent)")
    wanted = [shorten(token, 60) if token else "∅" for token in HOSTILE]
    assert shown == [text.lstrip(" ") or text for text in wanted]
    assert page.locator("main script, main img, main b, main iframe").count() == 0
    assert "<b>model</b>" in page.inner_text("#about")
    assert "</bdi><script>alert(3)</script>" in page.inner_text("#neurons .contexts li >> nth=0")
    for place in range(len(HOSTILE)):
        page.hover(f"#tokens .token >> nth={place}")
    saved = rows_of(one.saved('#tokens [data-form="csv"]', tmp_path))
    # As they are, but for what a spreadsheet would take for formulas, half a character, and what is far too long.
    changed = {"=1+1": "'=1+1", "-->": "'-->", "\ud83d": "\ufffd", "x" * 5000: shorten("x" * 5000, 60)}
    assert [row["text"] for row in saved] == [changed.get(text, text) for text in HOSTILE]
    formulas = ("=1+1", "+1", "-1", "@a", "\t=1+1", "\r\n-1")
    for text in (*formulas, "=", "+", "−1", "a=1", "\t\t", "\r\n"):  # a sign alone is no formula
        assert page.evaluate("fieldOf", text) == (f'"\'{text}"' if text in formulas else f'"{text}"')
    svg = ElementTree.parse(one.saved('#layers [data-form="svg"]', tmp_path)).getroot()
    assert svg.find(".//{http://www.w3.org/2000/svg}script") is None
    one.saved('#tokens [data-form="png"]', tmp_path)


def test_a_saved_text_goes_from_right_to_left_where_it_is_written_so(open_page: Open, tmp_path: Path) -> None:
    page = open_page("right.html").page
    marks = page.evaluate("textScene(views.tokens.view, themeOf(data.palette)).marks.filter((mark) => mark.text)")
    assert [mark["text"] for mark in marks] == ["שלום", "עולם", "abc"]
    assert [mark["anchor"] for mark in marks] == ["end"] * 3
    assert marks[0]["x"] > marks[1]["x"] > marks[2]["x"]


def test_the_policy_stops_what_gets_in_all_the_same(browser: Any, folder: Path) -> None:
    with opened(browser, folder / "small.html") as one:
        one.page.evaluate("""async () => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const box = document.createElement("div");
            box.innerHTML = '<img src="https://example.org/x.png" onerror="window.ran = true"><style>p{}</style>';
            document.body.append(box);
            await fetch("https://example.org/").catch(() => null);
        }""")
        one.page.wait_for_timeout(100)
        assert one.page.evaluate("window.ran") is None
        assert {"script-src-elem", "img-src", "connect-src", "style-src-elem"} <= set(one.violations())
