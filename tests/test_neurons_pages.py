"""The pages of neurons in a browser: nothing fails, loads or runs that should not, and all of it works by keyboard."""

import re

import pytest
from browser import chromium, opened
from small import a_tokenizer, llama

import lxt
from lxt.neurons.running import label

HOSTILE = "<script>document.title = 'broken in'</script><img src=x onerror=alert(1)>\"' &amp; \u202egnp.exe \x00 \u2066"
TEXTS = [
    "My cats love to play with my dogs and 5 cats",
    HOSTILE,
    f"cats {HOSTILE} dogs",
    "I have 3 dogs and 5 cats. My dogs love to play",
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("pages") / "<b>\u202egnp.txt"
    corpus.write_text("\n".join(TEXTS * 5))
    out = corpus.parent / "out"
    label(lxt.load(llama(), a_tokenizer()), corpus, layers=[0, 2], out=out, length=64, top=8)
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_every_page_loads_and_fits(browser, folder, scheme, width):
    size = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    for path in sorted(folder.glob("*.html")):
        with opened(browser, path, **size) as one:
            assert one.said == one.violations() == []
            assert one.asked == [path.resolve().as_uri()]
            one.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
            assert one.page.evaluate("document.documentElement.scrollWidth") <= width
            dark = (
                one.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != "rgb(255, 255, 255)"
            )
            assert dark == (scheme == "dark")
            assert one.page.title() != "broken in"
            assert one.page.locator("img, script:not(body > script:last-child)").count() == 0


def test_hostile_text_reads_as_text(browser, folder):
    with opened(browser, folder / "layer-000-000000.html") as one:
        said = one.page.locator("body").evaluate(
            "(body) => [...body.querySelectorAll('bdi')].map((one) => one.textContent).join('\\n')"
        )
    for shown in (
        "<script>",
        "onerror=",
        "&amp;",
        "<b>⟨U+202E⟩gnp.txt:2",
        "␀",
    ):  # a context is some twenty of these tokens
        assert shown in said
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", said)


def columns(one, number):
    return one.page.eval_on_selector_all(
        "tbody.sorted tr", f"(rows) => rows.filter((row) => !row.hidden).map((row) => row.cells[{number}].textContent)"
    )


def test_the_index_sorts_by_each_column(browser, folder):
    found = lxt.neurons.load(folder)
    with opened(browser, folder / "index.html") as one:
        first = columns(one, 4)
        for place, name in enumerate(("layer", "neuron", "name", "AUROC", "highest relevance (logits)", "above 0")):
            button = one.page.get_by_role("button", name=name, exact=True)
            for way in ("descending", "ascending"):
                button.click()
                header = one.page.locator("th").nth(place)
                assert header.get_attribute("aria-sort") == way
                values = [value for value in columns(one, place) if value]
                numbers = [float(value.strip("%")) for value in values] if name != "name" else values
                if name == "name":
                    numbers = one.page.evaluate("(v) => v.map((x, i) => i && v[i - 1].localeCompare(x))", values)
                    assert all(sign <= 0 if way == "ascending" else sign >= 0 for sign in numbers[1:])
                else:
                    assert numbers == sorted(numbers, reverse=way == "descending")
        assert one.page.locator("th[aria-sort]").count() == 1
        assert sorted(columns(one, 4)) == sorted(first)
        assert one.said == []
    best = found.best(0, 1)[0].contexts["relevance", "positive"][0].score
    assert first[0] == f"{best:+.4g}"


def test_it_works_by_keyboard(browser, folder):
    with opened(browser, folder / "index.html") as one:
        keys, active = one.page.keyboard, "document.activeElement"
        total = len(columns(one, 0))
        keys.press("/")
        keys.type("cats")
        shown = columns(one, 2)
        assert 0 < len(shown) < total
        assert one.page.get_by_role("status").text_content() == f"{len(shown)} shown"
        keys.press("ArrowDown")
        keys.press("ArrowDown")
        keys.press("ArrowUp")
        wanted = one.page.evaluate(f"{active}.getAttribute('href')")
        assert re.fullmatch(r"layer-00[02]-000000\.html#n\d+", wanted)
        keys.press("Enter")
        one.page.wait_for_url(f"**/{wanted}")
        number = wanted.partition("#n")[2]
        assert one.page.evaluate(f"{active}.id") == f"n{number}"
        assert one.page.locator("details[open]").count() == 1
        keys.press("ArrowDown")
        keys.press("Enter")
        assert one.page.locator("details[open]").count() == 2
        keys.press("/")
        keys.type("no such word")
        assert one.page.locator("details:visible").count() == 0
        keys.press("Escape")
        assert one.page.locator("details:visible").count() == 48
        assert one.said == one.violations() == []


def test_neurons_with_like_names_are_linked(browser, folder):
    found = lxt.neurons.load(folder)
    key = next(key for key in sorted(found.names) if found.alike(*key))
    words = {token for token, _ in found.name(*key).words}
    for other in found.alike(*key):
        assert other != key
        assert words & {token for token, _ in found.name(*other).words}
    layer, number = found.alike(*key)[0]
    with opened(browser, folder / f"layer-{key[0]:03d}-000000.html", f"n{key[1]}") as one:
        one.page.get_by_role("link", name=f"L{layer}N{number}", exact=True).locator("visible=true").first.click()
        one.page.wait_for_url(f"**/layer-{layer:03d}-000000.html#n{number}")
        assert one.page.locator(f"details[open] > summary#n{number}").count() == 1
        assert one.said == []


def test_without_scripts_everything_is_there(browser, folder):
    with opened(browser, folder / "index.html", java_script_enabled=False) as one:
        assert one.page.locator("tbody.sorted tr").count() == 80
        assert one.page.locator("th button").count() == 0
