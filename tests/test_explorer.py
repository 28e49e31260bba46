"""The explorer's page: its numbers are the Attribution's, it stays below 2 MB, and nothing in it could act."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import HOSTILE, SENTENCE, attribution, data_of, floats, integers, labels, largest, numbers

import lxt
from lxt.attribution import Attribution
from lxt.cli import main
from lxt.imagerelevance import ImageRelevance
from lxt.latents.values import LatentRelevance
from lxt.show import explorer
from lxt.show.packing import packed
from lxt.show.words import listed, shorten

STEP = 1 / 65534  # half a step of 16 bits, of a series' largest number
FLOAT = 2**-22  # of 32-bit floats, twice rounded


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))


def close(found: np.ndarray, true: torch.Tensor, dim: int = -1) -> bool:
    """Within the precision that the page states, of the largest number of each series."""
    wanted = true.double().numpy()
    room = np.abs(wanted).max(dim, keepdims=True) * (STEP + FLOAT)
    return bool((np.abs(found - wanted) <= room).all())


# ---- numbers


def test_packed_numbers_are_right_to_half_a_step_and_unknown_is_not_zero() -> None:
    values = torch.randn(5, 300, dtype=torch.float64) * torch.tensor([1e-30, 1e-3, 1.0, 1e6, 0.0])[:, None]
    values[1, 3] = torch.nan
    found = numbers(packed(values))
    assert np.isnan(found[1, 3])
    assert close(np.nan_to_num(found), values.nan_to_num())
    assert (found[4] == 0).all()
    assert packed(torch.zeros(0, 7))["shape"] == [0, 7]
    assert packed(torch.zeros(2, 0))["shape"] == [2, 0]


def test_the_page_holds_the_numbers_of_the_attribution() -> None:
    out = attribution(rows=2, flow=True)
    data = data_of(explorer.page(out))
    assert [row["target"] for row in data["rows"]] == ["' Mary'", "' him'"]
    assert data["left"] == []
    for number, row in enumerate(data["rows"]):
        one = {name: latent.values[:, number] for name, latent in out.latents.items()}
        assert (floats(row["relevance"]) == out.relevance[number].numpy()).all()
        assert close(numbers(row["streams"]["residual"]["values"]), one["residual"])
        grid = row["grids"]["head"]
        assert np.allclose(floats(grid["sums"]), one["head"].double().sum(1).flatten(), rtol=FLOAT, atol=0)
        assert close(numbers(grid["values"]), one["head"].transpose(1, 2).flatten(0, 1))
        neuron = row["lists"]["neuron"]
        assert close(numbers(neuron["values"]), one["neuron"].flatten(1))
        assert (integers(neuron["indices"]) == out.latents["neuron"].indices[:, number].flatten().numpy()).all()
        assert close(numbers(neuron["rest"]), out.latents["neuron"].rest[:, number])
        flow = row["maps"]["flow"]
        rows, columns = torch.tril_indices(len(SENTENCE), len(SENTENCE))
        assert flow["causal"]
        assert close(numbers(flow["values"]), one["flow"].flatten(0, 1)[:, rows, columns])


def test_neurons_of_all_tokens_and_the_rest_make_up_the_layer() -> None:
    dense = attribution(neurons=300, top=None)
    sparse = attribution(neurons=300, top=30)
    for out in (dense, sparse):
        row = data_of(explorer.page(out))["rows"][0]["lists"]["neuron"]
        sums = floats(row["sums"]).reshape(3, row["width"])
        total = sums.sum(1) + floats(row["others"])
        assert np.allclose(total, dense.latents["neuron"].values[:, 0].double().sum((1, 2)), rtol=1e-4, atol=1e-4)
        at_token = numbers(row["values"]).reshape(3, len(SENTENCE), row["largest"]).sum(-1) + numbers(row["rest"])
        assert np.allclose(at_token, dense.latents["neuron"].values[:, 0].double().sum(-1), atol=2e-3)
    full = data_of(explorer.page(dense))["rows"][0]["lists"]["neuron"]
    best = dense.latents["neuron"].values[1, 0].sum(0)
    assert integers(full["best"])[full["width"]] == int(best.abs().argmax())
    assert full["complete"]
    assert not data_of(explorer.page(sparse))["rows"][0]["lists"]["neuron"]["complete"]


def test_a_layer_of_few_neurons_leaves_the_others_whole() -> None:
    out = attribution(neurons=300, top=20)
    neuron = out.latents["neuron"]
    values, indices, rest = neuron.values.clone(), neuron.indices.clone(), neuron.rest.clone()
    values[1], indices[1], rest[1] = 0, torch.arange(20), 0  # as where the rules send nothing there
    few = neuron.replaced(values=values, indices=indices, rest=rest)
    for latent in (few, few.replaced(parts=None)):
        row = data_of(explorer.page(replace(out, latents={"neuron": latent})))["rows"][0]["lists"]["neuron"]
        total = floats(row["sums"]).reshape(3, row["width"]).sum(1) + floats(row["others"])
        assert np.allclose(total, few.by_layer()[:, 0], rtol=1e-4)


def test_numbers_beyond_32_bits() -> None:
    out = attribution(flow=True)
    for scale in (1e300, 1e-300, 1e-42):
        latents = {name: latent.mapped(lambda x: x.double() * scale) for name, latent in out.latents.items()}  # noqa: B023
        far = replace(out, relevance=out.relevance.double() * scale, latents={"head": latents["head"]})
        row = data_of(explorer.page(far))["rows"][0]
        assert (floats(row["relevance"]) == far.relevance[0].numpy()).all()
        assert close(
            numbers(row["grids"]["head"]["values"]), latents["head"].values[:, 0].transpose(1, 2).flatten(0, 1)
        )


def test_a_slot_of_padding_does_not_hide_the_key_that_it_names() -> None:
    out = attribution(flow=True)
    whole = out.latents["flow"].values
    indices = torch.zeros(*whole.shape[:-1], 3, dtype=torch.int32)  # one key, and two slots of padding
    values = torch.cat([whole[..., :1], torch.zeros(*whole.shape[:-1], 2)], -1)
    kept = LatentRelevance("flow", values, range(3), indices, whole.sum(-1) - values.sum(-1), len(SENTENCE))
    flow = data_of(explorer.page(replace(out, latents={"flow": kept})))["rows"][0]["maps"]["flow"]
    _, columns = torch.tril_indices(len(SENTENCE), len(SENTENCE))
    found = numbers(flow["values"])
    assert close(found[:, columns == 0], whole[:, 0, :, :, 0].flatten(0, 1))
    assert np.isnan(found[:, columns > 0]).all()


def test_a_map_of_which_the_largest_were_kept_says_what_is_not_known() -> None:
    out = attribution(flow=True)
    kept = largest(out.latents["flow"], 3)
    sparse = Attribution(**{**vars(out), "latents": {"flow": kept}})
    flow = data_of(explorer.page(sparse))["rows"][0]["maps"]["flow"]
    length = len(SENTENCE)
    found = numbers(flow["values"])
    rows, columns = torch.tril_indices(length, length)
    true = out.latents["flow"].values[:, 0].flatten(0, 1)[:, rows, columns].double().numpy()
    known = ~np.isnan(found)
    assert flow["largest"] == 3
    assert known[:, torch.as_tensor(rows) >= 3].reshape(12, -1).sum() == 12 * 3 * (length - 3)
    assert np.abs(found - true)[known].max() < np.abs(true).max() * (STEP + FLOAT)


def test_rows_of_a_padded_batch_have_their_own_tokens() -> None:
    out = attribution(rows=2)
    mask = torch.ones(2, len(SENTENCE), dtype=torch.bool)
    mask[0, :4] = False
    relevance = out.relevance.masked_fill(~mask, 0)
    tokens = [["" if i < 4 else token for i, token in enumerate(SENTENCE)], SENTENCE]
    padded = Attribution(
        **{**vars(out), "mask": mask, "relevance": relevance, "tokens": tokens, "special": ~mask & False}
    )
    data = data_of(explorer.page(padded))
    assert [len(text["tokens"]) for text in data["texts"]] == [len(SENTENCE) - 4, len(SENTENCE)]
    assert close(numbers(data["rows"][0]["streams"]["residual"]["values"]), out.latents["residual"].values[:, 0, 4:])


# ---- size


def large(**options: object) -> Attribution:
    tokens = ["<s>", *[f" word{i % 40}" for i in range(199)]]
    return attribution(tokens, layers=32, heads=32, neurons=20, **options)  # type: ignore[arg-type]


def test_200_tokens_32_layers_32_heads_and_20_neurons_fit_with_every_number() -> None:
    page = explorer.page(large(top=20))
    assert len(page.encode()) < explorer.LIMIT == 2_000_000
    data = data_of(page)
    assert data["left"] == []
    assert data["rows"][0]["grids"]["head"]["kept"] is None
    assert data["rows"][0]["lists"]["neuron"]["largest"] == 20


def test_what_does_not_fit_is_left_out_in_order_and_said() -> None:
    out = large(top=20, rows=4)
    page = explorer.page(out)
    assert len(page.encode()) < explorer.LIMIT
    data = data_of(page)
    row = data["rows"][2]
    assert row["lists"]["neuron"]["largest"] == 5
    kept = row["grids"]["head"]["kept"]
    assert 0 < len(kept) < 1024
    assert f"{len(kept):,} of 1,024 heads" in data["left"][0]
    assert data["left"][1] == "of neurons the largest 5 at each token instead of 20"
    true = out.latents["head"].values[:, 2].transpose(1, 2).flatten(0, 1)
    assert np.allclose(floats(row["grids"]["head"]["sums"]), true.double().sum(-1), rtol=FLOAT, atol=0)
    assert close(numbers(row["grids"]["head"]["values"]), true[kept])
    weakest = true[kept].abs().sum(-1).min()
    others = [place for place in range(1024) if place not in set(kept)]
    assert true[others].abs().sum(-1).max() <= weakest


def test_many_rows_keep_what_they_can() -> None:
    page = explorer.page(large(top=20, rows=14))
    assert 0.6 * explorer.LIMIT < len(page.encode()) < explorer.LIMIT
    data = data_of(page)
    assert data["rows"][13]["lists"]["neuron"]["largest"] < 5
    assert len(data["texts"]) == 1


def test_maps_take_what_room_is_left() -> None:
    page = explorer.page(large(top=20, flow=True))
    assert 0.9 * explorer.LIMIT < len(page.encode()) < explorer.LIMIT
    data = data_of(page)
    kept = data["rows"][0]["maps"]["flow"]["kept"]
    assert 5 < len(kept) < 1024
    assert data["left"] == [f"query × key maps of {len(kept)} of 1,024 heads, those with the most relevance"]


def test_too_much_text_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"larger than 2 MB .* 1 rows of up to 40000 tokens.*out\[0\]\.explore"):
        explorer.page(attribution([f"{i:055}" for i in range(40_000)], latents=False))


# ---- safety


@pytest.fixture(scope="module")
def hostile() -> str:
    return explorer.page(attribution(HOSTILE, model="</title><script>alert(2)</script>", flow=True))


def test_no_token_becomes_markup(hostile: str) -> None:
    elements = Elements()
    elements.feed(hostile)
    scripts = [attributes for tag, attributes in elements.found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in elements.found if tag in ("img", "iframe", "link", "object", "base", "form")]
    text = data_of(hostile)["texts"][0]
    assert text["tokens"] == [shorten(token, 60) if token else "∅" for token in HOSTILE]
    assert text["names"] == [listed(token, 24) for token in HOSTILE]
    inside = hostile.partition('id="data">')[2].partition("</script>")[0]
    assert inside.isascii()
    assert not set("<>&") & set(inside)


def test_the_policy_names_the_script_and_the_style_and_nothing_else(hostile: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', hostile)
    assert policy is not None
    script = re.findall(r"<script>(.*?)</script>", hostile, re.S)
    sheet = re.findall(r"<style>(.*?)</style>", hostile, re.S)
    assert len(script) == len(sheet) == 1

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    wanted = f"default-src 'none'; script-src {digest(script[0])}; style-src {digest(sheet[0])}"
    assert policy[1] == f"{wanted}; base-uri 'none'; form-action 'none'"
    assert policy.start() < hostile.index("<style>")
    addresses = set(re.findall(r"https?://[^\s\"'`]+", script[0] + sheet[0]))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which is never asked for


def test_scripts_set_text_and_never_markup() -> None:
    for file in files("lxt.show").joinpath("page").iterdir():
        source = file.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)
        assert len(source.splitlines()) < 500


def test_tables_get_the_tokens_as_they_are() -> None:
    tokens = [" dogs", "a", "", "\n", "x" * 5000]
    [text] = data_of(explorer.page(attribution(tokens)))["texts"]
    exact = [text["exact"].get(str(place), shown) for place, shown in enumerate(text["tokens"])]
    assert exact[:4] == tokens[:4]
    assert exact[4] == shorten(tokens[4], 60)


# ---- labels


def test_the_most_relevant_neurons_come_with_their_contexts() -> None:
    data = data_of(explorer.page(attribution(), labels=labels(layers=(0, 2))))
    found = data["labels"]
    row = data["rows"][0]["lists"]["neuron"]
    shown = integers(row["indices"]).reshape(3, -1)
    assert {int(key.split(":")[1]) for key in found if key.startswith("2:")} == set(shown[2].tolist())
    assert not [key for key in found if key.startswith("1:")]
    one = found[f"0:{shown[0, 0]}"]
    assert (one["label"], one["auroc"]) == (f"label 0:{shown[0, 0]}", 0.875)
    assert [(group["kind"], len(group["shown"])) for group in one["contexts"]] == [
        ("positive relevance", 5),
        ("positive activation", 1),
        ("negative activation", 1),
    ]
    assert one["contexts"][0]["shown"][0] == [1.25, "I have", " cats", " at home", "story 1, token 7"]
    assert data["labelled"]["latent"] == "neuron"
    assert "layers 0, 2, from 1,234 tokens" in data["labelled"]["about"]


def test_labels_of_another_model_are_refused_or_warned_of() -> None:
    with pytest.raises(ValueError, match="labels= are of another model: layer 0 has 3 neurons"):
        explorer.page(attribution(), labels=labels(count=3))
    with pytest.warns(UserWarning, match="the labels are of 'other' and the explanation is of 'small'"):
        explorer.page(attribution(), labels=labels(model="other"))
    with pytest.raises(TypeError, match=r"lxt\.neurons\.load\('folder'\)"):
        explorer.page(attribution(), labels="folder")
    with pytest.raises(TypeError, match="labels= maps"):
        explorer.page(attribution(), labels={"L0N1": "cats"})


def test_labels_of_heads_name_heads() -> None:
    found = labels(layers=(0, 2), count=4, latent="head")
    data = data_of(explorer.page(attribution(), labels=found))
    assert data["labelled"]["latent"] == "head"
    assert data["labels"].keys() == {f"{layer}:{head}" for layer in (0, 2) for head in range(4)}
    with pytest.raises(ValueError, match=r"has 3 heads in them, and the explained model has a head 3"):
        explorer.page(attribution(), labels=labels(count=3, latent="head"))


def test_names_alone_are_labels_too() -> None:
    out = attribution()
    best = int(out.latents["neuron"].indices[1, 0, 3, 0])
    data = data_of(explorer.page(out, labels={(1, best): "</script> names", (2, 999): "elsewhere"}))
    assert data["labels"] == {f"1:{best}": {"label": "</script> names", "auroc": None, "contexts": []}}


# ---- how it is called


def test_explore_writes_the_page(tmp_path: Path) -> None:
    out = attribution()
    out.explore(tmp_path / "a" / "page.html")
    assert (tmp_path / "a" / "page.html").read_text("utf-8") == explorer.page(out)
    out.save(tmp_path / "x.safetensors")
    Attribution.load(tmp_path / "x.safetensors").explore(tmp_path / "b.html")
    assert data_of((tmp_path / "b.html").read_text("utf-8")) == data_of(explorer.page(out))
    with pytest.raises(ValueError, match="explore writes"):
        out.explore(tmp_path / "page.png")


def test_a_page_of_a_model_has_what_was_asked_for() -> None:
    out = lxt.load("tiny").attribute("My cats love to play with my", latents=("residual", "mlp_out", "head", "neuron"))
    row = data_of(explorer.page(out))["rows"][0]
    assert row["streams"]["residual"]["names"] == ["L0", "L1", "L2", "L3"]
    assert {"residual", "mlp_out"} == set(row["streams"])
    assert close(numbers(row["streams"]["mlp_out"]["values"]), out.latents["mlp_out"].values[:, 0])
    assert (row["grids"]["head"]["letter"], row["lists"]["neuron"]["letter"]) == ("H", "N")


def test_images_are_shown_elsewhere() -> None:
    image = ImageRelevance(0, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"to_html\(path\) draws them"):
        explorer.page(Attribution(**{**vars(attribution()), "images": (image,)}))


def test_other_latents_find_their_place() -> None:
    out = attribution()
    length = len(SENTENCE)
    found = {
        "embed": LatentRelevance("embed", out.relevance[None], (0,)),
        "model.norm": LatentRelevance("model.norm", torch.randn(1, 1, length), (0,)),
        "expert": LatentRelevance("expert", torch.randn(2, 1, length, 8), (0, 1)),
        "sae": largest(LatentRelevance("sae", torch.randn(1, 1, length, 400), (6,)), 5),
    }
    row = data_of(explorer.page(Attribution(**{**vars(out), "latents": found})))["rows"][0]
    assert list(row["streams"]) == ["model.norm"]
    assert row["streams"]["model.norm"]["names"] == ["model.norm"]
    assert row["grids"]["expert"]["letter"] == "E"
    assert (row["lists"]["sae"]["layers"], row["lists"]["sae"]["letter"]) == ([6], "F")


def test_the_example_names_the_neurons_that_it_shows(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parent.parent / "examples" / "explore.py"
    scope: dict = {"__name__": "example"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    scope["main"](tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text("utf-8"))
    assert data["rows"][0]["target"] == "' dogs'"
    assert len(data["rows"]) == 5
    assert {key.split(":")[0] for key in data["labels"]} == {"1", "2"}
    assert all(one["contexts"] for one in data["labels"].values())


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as exit:
        main(["attribute", "My cats love to play with my", "--explore", str(page)])
    assert exit.value.code == 0
    row = data_of(page.read_text("utf-8"))["rows"][0]
    assert (list(row["streams"]), list(row["grids"]), list(row["lists"])) == (["residual"], ["head"], ["neuron"])
    for arguments, message in (
        (["--labels", str(tmp_path)], "--labels are shown by --explore"),
        (["--labels", str(tmp_path), "--explore", str(page)], "holds no results of `lxt label`"),
        (["--explore", "page.pdf"], "another suffix"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["attribute", "My cats", *arguments])
        assert message in capsys.readouterr().err
