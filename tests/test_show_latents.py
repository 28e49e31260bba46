"""Pictures of heads, neurons and attention: the numbers that they draw, what they say, and what they refuse."""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import LAYERS, made
from matplotlib.figure import Figure
from matplotlib.text import Text

from lxt.attribution import Explained
from lxt.latents import LatentRelevance
from lxt.show.figure import token_axis
from lxt.show.parts import carried, parts_of, weights_of

HARD = ["<script>alert(1)</script>", "\"'", "مرحبا", "\x00", "x" * 5000, "😀", "日本語", "$x_1$", "\\frac{1}{2}", "\n"]


def kept_only(latent: LatentRelevance, top: int) -> LatentRelevance:
    """The largest of each token, as `Keep(name, top=...)` leaves them."""
    values = latent.values
    indices = values.abs().topk(top, -1).indices
    largest = values.gather(-1, indices)
    rest = values.sum(-1) - largest.sum(-1)
    return LatentRelevance(latent.name, largest, latent.layers, indices.int(), rest, values.shape[-1])


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))  # type: ignore[attr-defined]


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


# ---- numbers


def test_parts_are_sums_over_the_rows_own_tokens() -> None:
    out = made(padded=2, rows=2)
    values = out.latents["head"].values[:, 1].double()
    torch.testing.assert_close(parts_of(out, "head", 1, None, True).scores, values.sum(1))
    torch.testing.assert_close(parts_of(out, "head", 1, None, False).scores, values[:, 3:].sum(1))
    torch.testing.assert_close(parts_of(out, "head", 1, 1, True).scores, values[:, 3])
    torch.testing.assert_close(parts_of(out, "head", 1, -1, True).scores, values[:, -1])


def test_parts_of_what_was_kept_sparse() -> None:
    out = made(padded=1)
    whole = out.latents["neuron"]
    sparse = replace(out, latents={"neuron": kept_only(whole, 4)})
    expected = torch.zeros(len(LAYERS), 30, dtype=torch.float64)
    for layer in range(len(LAYERS)):
        for token in range(1, 5):
            values = whole.values[layer, 0, token].double()
            for neuron in values.abs().argsort(descending=True)[:4].tolist():
                expected[layer, neuron] += values[neuron]
    found = parts_of(sparse, "neuron", 0, None, True)
    torch.testing.assert_close(found.scores, expected)
    totals = whole.values[:, 0].double().sum((1, 2))
    torch.testing.assert_close(found.totals, totals, rtol=1e-5, atol=1e-5)  # nothing is lost; the rest is in float32
    assert found.most == 4


def test_flow_leaves_out_special_tokens_and_padding() -> None:
    keep = torch.tensor([False, False, False, True, True, True])
    both_ways = torch.randn(3, 1, 4, 6, 6, generator=torch.Generator().manual_seed(3))
    flow = LatentRelevance("flow", both_ways, LAYERS)
    values = flow.values[:, 0].double()[:, :, 3:, 3:]
    torch.testing.assert_close(weights_of(flow, 0, keep), values.sum((-2, -1)))
    torch.testing.assert_close(carried(flow, 0, 1, 2, keep), values[1, 2])
    padded = LatentRelevance(  # slots of padding, which are 0, name the first key of a row cut out of a batch
        "flow",
        torch.tensor([2.0, 0, 0]).expand(1, 1, 1, 2, 3),
        (0,),
        torch.zeros(1, 1, 1, 2, 3),
        torch.zeros(1, 1, 1, 2),
    )
    assert carried(padded, 0, 0, 0, torch.ones(2, dtype=torch.bool)).tolist() == [[2, 0], [2, 0]]
    sparse = kept_only(flow, 6)  # of all keys: the same numbers in another order
    # what is left of each query isn't quite 0: a difference of float32 sums
    torch.testing.assert_close(weights_of(sparse, 0, keep), values.sum((-2, -1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(carried(sparse, 0, 1, 2, keep), values[1, 2])


# ---- heads


def test_heads_are_a_map_with_layers_from_the_bottom() -> None:
    out = made()
    figure = out.plot_heads(top=3)
    axes, beside, bar = figure.axes
    scores = parts_of(out, "head", 0, None, True).scores.numpy()
    np.testing.assert_array_equal(axes.images[0].get_array(), scores)
    assert axes.images[0].origin == "lower"
    assert axes.images[0].norm.vmax == -axes.images[0].norm.vmin == np.abs(scores).max()  # white is 0
    assert ticks(axes.yaxis) == ["L2", "L5", "L6"]
    assert ticks(axes.xaxis) == ["H0", "H1", "H2", "H3"]
    order = np.argsort(-np.abs(scores), axis=None)[:3]
    names = [f"L{LAYERS[i // 4]}H{i % 4}" for i in order]
    assert [label.split()[-1] for label in ticks(beside.yaxis)] == names
    assert [text.get_text() for text in axes.texts] == names  # in the cells
    assert bar.get_ylabel() == "relevance (logit)"
    assert "sum over all 4 tokens" in words(figure)


def test_rows_of_heads_share_one_scale() -> None:
    out = made(rows=3)
    figure = out.plot_heads()
    ends = {axes.images[0].norm.vmax for axes in figure.axes if axes.images}
    assert ends == {float(out.latents["head"].values.double().sum(2).abs().max())}
    assert "choice 3, probability 25.0 %" in words(figure)


def test_heads_at_one_token() -> None:
    assert "at token 3 ␣dogs" in words(made().plot_heads(token=-1))


def test_a_large_map_numbers_the_strongest() -> None:
    values = torch.randn(32, 1, 4, 32, generator=torch.Generator().manual_seed(1))
    out = replace(made(), latents={"head": LatentRelevance("head", values, range(32))})
    axes, beside, _ = out.plot_heads(top=5).axes
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4", "5"]
    assert len(ticks(beside.yaxis)) == 5
    assert len(axes.patches) == 5  # an outline around each


def test_maps_of_other_parts_name_them() -> None:
    out = made()
    values = out.latents["head"].values
    experts = replace(out, latents={"expert": LatentRelevance("expert", values, LAYERS)})
    figure = experts.plot_heads(latent="expert", top=2)
    assert ticks(figure.axes[0].xaxis) == ["E0", "E1", "E2", "E3"]
    assert "Which experts speak for" in words(figure)
    assert all(re.fullmatch(r"\d  L\dE\d", name) for name in ticks(figure.axes[1].yaxis))
    keys = replace(out, latents={"key": kept_only(LatentRelevance("key", values, LAYERS), 2)})
    figure = keys.plot_heads(latent="key")
    assert "key of each head: sum over all 4 tokens" in words(figure)
    assert "of the 2 largest at each token, which were kept" in words(figure)
    with pytest.raises(ValueError, match=r"holds 256 parts of a layer, and 'neuron' has 300; .*\.top\(\)"):
        replace(out, latents={"neuron": torch.zeros(1, 1, 4, 300)}).plot_heads(latent="neuron")


# ---- neurons


def test_neurons_are_grouped_by_layer_with_labels() -> None:
    out = made()
    scores = parts_of(out, "neuron", 0, None, True).scores
    best = [int(scores[layer].abs().argmax()) for layer in range(3)]
    figure = out.plot_neurons(top=2, labels={(LAYERS[1], best[1]): "names of\n$animals$"})
    shown = [label for axes in figure.axes for label in ticks(axes.yaxis)]
    assert len(shown) == 6
    assert [label.split("N")[-1] for label in shown[::2]] == [str(i) for i in best]
    assert shown[2] == f"names of⏎$animals$  N{best[1]}"
    heads = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [text for text in heads if text in ("L2", "L5", "L6")] == ["L2", "L5", "L6"]
    columns = out.plot_neurons(top=6).axes
    assert len(columns) == 2
    assert len({axes.get_xlim() for axes in columns}) == 1  # one scale


def test_neurons_take_what_labelling_found() -> None:
    class Found:
        layers = (5,)
        latent = "neuron"
        manifest = {"settings": {"model_name": "tiny"}}  # noqa: RUF012

        def count(self, layer: int) -> int:
            return 20

        def __getitem__(self, key: tuple[int, int]) -> SimpleNamespace:
            assert key[0] == 5
            assert key[1] < 20
            return SimpleNamespace(label=f"label {key[1]}")

    shown = [label for axes in made().plot_neurons(top=30, labels=Found()).axes for label in ticks(axes.yaxis)]  # type: ignore[arg-type]
    assert sum("label" in label for label in shown) == 20
    assert "label 7  N7" in shown


def test_labels_are_checked_before_anything_is_drawn() -> None:
    out = replace(made(), latents={})  # which the picture would complain of next
    heads = SimpleNamespace(latent="head", manifest={"settings": {"model_name": "tiny"}})
    for labels, error, message in (
        (heads, ValueError, "labels= are of heads, and plot_neurons shows those of neurons"),
        ("out/neurons", TypeError, r"what lxt\.neurons\.load\('out/neurons'\) gives"),
        ({"L2N17": "cats"}, TypeError, r"maps \(layer, neuron\), such as \(2, 17\).*got 'L2N17'"),
        (["cats"], TypeError, "or a dict, got list"),
    ):
        with pytest.raises(error, match=message):
            out.plot_neurons(labels=labels)  # type: ignore[arg-type]
    other = SimpleNamespace(latent="neuron", layers=(), manifest={"settings": {"model_name": "other"}})
    with pytest.warns(UserWarning, match="labels are of 'other' and the explanation is of 'tiny'"):
        made().plot_neurons(labels=other)  # type: ignore[arg-type]


def test_a_sparse_sum_says_so() -> None:
    out = made()
    sparse = replace(out, latents={"neuron": kept_only(out.latents["neuron"], 4)})
    assert "of the 4 largest at each token, which were kept" in words(sparse.plot_neurons())
    assert "largest" not in words(out.plot_neurons())
    sparse = replace(out, latents={"flow": kept_only(out.latents["flow"], 2)})
    assert "the 2 largest keys of each query are shown; totals count the others" in words(sparse.plot_attention())
    assert "largest" not in words(out.plot_attention())


# ---- attention


def test_one_heads_attention_has_queries_as_rows() -> None:
    out = made(padded=1)
    figure = out.plot_attention(head=(5, 2))
    axes, bar = figure.axes
    drawn = np.asarray(axes.images[0].get_array().filled(np.nan))  # type: ignore[union-attr]
    expected = out.latents["flow"].values[1, 0, 2, 1:, 1:].double().numpy().copy()
    expected[0] = expected[:, 0] = np.nan  # the special token
    np.testing.assert_array_equal(drawn, expected)
    assert ticks(axes.xaxis) == ticks(axes.yaxis) == ["<s>", "␣cats", "␣love", "␣dogs"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("from: key", "to: query")
    assert axes.images[0].origin == "upper"
    assert "L5H2" in words(figure)
    assert "logit" in bar.get_ylabel()


def test_the_strongest_heads_share_one_scale() -> None:
    out = made()
    panels = [axes for axes in out.plot_attention(top=5).axes if axes.images]
    keep = torch.tensor([False, True, True, True])
    totals = weights_of(out.latents["flow"], 0, keep).flatten()
    order = totals.abs().argsort(descending=True)[:5].tolist()
    assert [axes.get_title(loc="left").split()[0] for axes in panels] == [f"L{LAYERS[i // 4]}H{i % 4}" for i in order]
    assert len({axes.images[0].norm.vmax for axes in panels}) == 1


def test_heads_of_which_the_largest_keys_were_kept_have_their_whole_totals() -> None:
    out = made([" I", " love", " cats", " and", " dogs"], heads=2)
    flow = torch.zeros(len(LAYERS), 1, 2, 5, 5)
    flow[0, 0, 0, 4] = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    flow[1, 0, 1, 4] = torch.tensor([2.0, 0.0, -1.0, 0.0, 0.0])
    whole = LatentRelevance("flow", flow, LAYERS)
    sparse = replace(out, latents={"flow": kept_only(whole, 1)})
    titles = [
        [axes.get_title(loc="left") for axes in one.plot_attention(top=2).axes if axes.images]
        for one in (replace(out, latents={"flow": whole}), sparse)
    ]
    assert titles[0] == titles[1] == ["L2H0  +5.00", "L5H1  +1.00"]
    assert "in all +5.00" in words(sparse.plot_attention(head=(2, 0)))
    totals = weights_of(sparse.latents["flow"], 0, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(totals, sparse.latents["flow"].by_part()[:, 0].double())


def test_scale_special_colours_and_counts_special_tokens() -> None:
    out = made()
    flow = out.latents["flow"].values[0, 0, 1].double()
    figure = out.plot_attention(head=(2, 1), scale_special=True)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), flow.numpy())
    assert "special" not in words(figure)


def test_long_texts_are_summed_into_cells() -> None:
    length = 250
    flow = torch.randn(1, 1, 1, length, length, generator=torch.Generator().manual_seed(2)).tril()
    out = replace(made([f" t{i}" for i in range(length)]), latents={"flow": LatentRelevance("flow", flow, (0,))})
    figure = out.plot_attention(head=(0, 0))
    cells = np.asarray(figure.axes[0].images[0].get_array())
    assert cells.shape == (84, 84)
    assert cells[3, 1] == pytest.approx(float(flow[0, 0, 0, 9:12, 3:6].double().sum()))
    assert cells.sum() == pytest.approx(float(flow.double().sum()), rel=1e-9)
    assert "each cell sums 3 × 3 neighbouring tokens" in words(figure)


# ---- all of them


def test_pictures_draw_hard_text_quietly_and_say_what_a_box_is(tmp_path, caplog) -> None:
    out = made(["<s>", *HARD, "🫨", "\U000e0000\ufffe", "𪘀"])
    out = replace(out, model="$m$", explained=[Explained("'$x_1$ " + "y" * 90 + "'", "prob", 0.1)])
    labels = {(layer, i): text for layer in LAYERS for i, text in enumerate(HARD)}
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        drawn = [
            out.plot(tmp_path / "trace.png"),
            out.plot_heads(tmp_path / "heads.svg", token=1),
            out.plot_neurons(tmp_path / "neurons.pdf", top=12, labels=labels),
            out.plot_attention(tmp_path / "attention.svg", top=2),
            out.plot_attention(tmp_path / "head.pdf", head=(5, 0)),
        ]
    assert caplog.text == ""
    assert len(list(tmp_path.iterdir())) == 5
    for figure in drawn:
        shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]  # type: ignore[attr-defined]
        assert not any(text.get_parse_math() for text in shown if "$" in text.get_text())
        assert not any("\x00" in text.get_text() for text in shown)
    for axis in (drawn[0].axes[0].xaxis, drawn[3].axes[0].yaxis, drawn[4].axes[0].xaxis):
        names = ticks(axis)
        assert {"<script>…script>", "␀", "xxxxxxxx…xxxxxxx", "$x_1$", "⏎"} <= set(names)


def test_a_character_that_no_font_has_is_explained(monkeypatch) -> None:
    monkeypatch.setattr("lxt.show.figure._characters", lambda: frozenset(map(ord, "logit relvanc(␣)+−.")))
    assert "□ stands for a character that no installed font has" in words(made(["a", "日本"]).plot())
    monkeypatch.undo()
    assert "□" not in words(made().plot())


def test_what_was_not_kept_is_named_with_how_to_keep_it() -> None:
    bare = replace(made(), latents={"residual": made().latents["residual"]})
    kept = "and of the latents residual were kept; "
    for draw, name in ((bare.plot_heads, "head"), (bare.plot_neurons, "neuron"), (bare.plot_attention, "flow")):
        with pytest.raises(ValueError, match=rf"{name!r}, {kept}.*latents=\({name!r},"):
            draw()


def test_pictures_refuse_what_they_cannot_draw(tmp_path) -> None:
    out = made()
    with pytest.raises(ValueError, match=r"got 2; choose one: out\[i\]\.plot_neurons"):
        made(rows=2).plot_neurons()
    with pytest.raises(ValueError, match=r"got 2; choose one: out\[i\]\.plot_attention"):
        made(rows=2).plot_attention()
    with pytest.raises(ValueError, match=r"got 13; draw one: out\[i\]\.plot_heads"):
        made(rows=13).plot_heads()
    with pytest.raises(IndexError, match="token 4 of 4; allowed: -4 to 3"):
        out.plot_heads(token=4)
    with pytest.raises(TypeError, match="token must be a number"):
        out.plot_neurons(token=" dogs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not kept for layer 3; it was for 2, 5, 6"):
        out.plot_attention(head=(3, 0))
    with pytest.raises(ValueError, match="no head 4; allowed: 0 to 3"):
        out.plot_attention(head=(5, 4))
    with pytest.raises(ValueError, match=r"as \(5, 1\), got 7"):
        out.plot_attention(head=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"end the name in \.png"):
        out.plot_heads(tmp_path / "x.jpx")
    for draw in (out.plot_heads, out.plot_neurons, out.plot_attention):
        with pytest.raises(ValueError, match="top must be a whole number >= 1, got 0"):
            draw(top=0)


@pytest.mark.parametrize("layers", [60, 80])
def test_neurons_of_many_layers_are_drawn_as_the_refusal_says(layers: int) -> None:
    numbers = range(0, 2 * layers, 2)
    many = LatentRelevance("neuron", torch.randn(layers, 1, 4, 30), numbers)
    out = replace(made(), latents={"neuron": many})
    with pytest.raises(ValueError, match=r"show .*some layers: layer=\(0, 2, ") as error:
        out.plot_neurons()
    fewer = re.search(r"top=(\d+)", str(error.value))
    assert (fewer is None) == (layers > 70)  # one neuron of each takes three lines
    if fewer is not None:
        out.plot_neurons(top=int(fewer[1]))
    listed = re.search(r"layer=\(([\d, ]+)\)", str(error.value))
    assert listed is not None
    figure = out.plot_neurons(layer=[int(number) for number in listed[1].split(", ")])
    heads = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [text for text in heads if text.startswith("L")] == [f"L{number}" for number in range(0, 60, 2)]
    shown = [label for axes in out.plot_neurons(layer=6, top=1).axes for label in ticks(axes.yaxis)]
    assert shown == [f"N{int(many.values[3, 0].sum(0).abs().argmax())}"]
    with pytest.raises(IndexError, match="'neuron' has no layer 3"):
        out.plot_neurons(layer=3)


def test_zero_relevance_is_drawn(tmp_path) -> None:
    out = made()
    zero = replace(
        out,
        relevance=torch.zeros_like(out.relevance),
        latents={name: latent.mapped(torch.zeros_like) for name, latent in out.latents.items()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("plot", "plot_heads", "plot_neurons", "plot_attention"):
            getattr(zero, name)(tmp_path / f"{name}.png")


def test_labels_without_room_give_way_to_the_strongest() -> None:
    axes = Figure().add_subplot()
    strengths = np.array([1, 3, 9, 8, 1, 0, 4, 7, 0, 0])
    named = token_axis(axes, "x", [f"t{i}" for i in range(10)], strengths, 0.07)  # inches: a name takes two cells
    assert ticks(axes.xaxis) == ["t0", "t2", "t4", "t7", "t9"]  # t3 and t6 are stronger, but beside the strongest
    assert named == 5


# ---- what rows know


def test_the_example_draws_its_pictures(tmp_path, capsys) -> None:
    path = Path(__file__).resolve().parent.parent / "examples" / "inside.py"
    scope = {"__name__": "example"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    scope["main"](str(tmp_path))  # type: ignore[operator]
    assert "from ' dogs' to ' my'" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "attention.png",
        "heads.png",
        "layers.png",
        "neurons.png",
    ]
