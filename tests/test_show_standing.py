"""What views say of an explanation beside its numbers: the token's rank, its probability, the explained positions."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from drawn import TEXT, made
from rich.console import Console

import lxt
from lxt.attribution import Attribution
from lxt.show import terminal
from lxt.show.rows import rows


def test_several_rows_of_one_unit_share_the_scale_of_the_text_picture() -> None:
    out = replace(made(rows=2), relevance=torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.1, 0.2, 0.3]]))
    panels = [axes for axes in out.plot().axes if axes.images]
    assert [axes.images[0].norm.vmax for axes in panels] == [3.0, 3.0]
    mixed = replace(out, explained=[out.explained[0], replace(out.explained[1], kind="prob")])
    panels = [axes for axes in mixed.plot().axes if axes.images]
    assert [axes.images[0].norm.vmax for axes in panels] == pytest.approx([3.0, 0.3])


def test_a_runner_up_has_its_rank_and_probability() -> None:
    first, second = rows(made(rows=2))
    assert first.predicted == "'0'  logit 3.000, probability 50.0 %"
    assert second.predicted == "'0'  logit 3.000, probability 50.0 %; explained is choice 2, probability 50.0 %"


def test_explained_positions_are_marked() -> None:
    out = made()
    assert next(rows(out)).places_asked is None  # the last token is where one looks first
    several = replace(out, explained=[replace(out.explained[0], positions=(1, 3))])
    row = next(rows(several, special=False))
    assert [row.tokens[i] for i in row.asked] == [" cats", " dogs"]
    assert row.places_asked == "explained at token 1 ␣cats, token 3 ␣dogs"
    axes = several.plot().axes[0]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "v"] == [1, 3]
    source = several._repr_html_()
    assert source.count('class="t at') + source.count(' at" ') == 2
    assert "explained at token 1" in source
    file = io.StringIO()
    terminal.render(several, Console(file=file, color_system="truecolor", force_terminal=True, width=80))
    marked = re.findall(r"\x1b\[([0-9;]+)m(\w+)", file.getvalue())
    assert {word for style, word in marked if "4" in style.split(";")} == {"cats", "dogs"}
    assert "explained at token 1 ␣cats, token 3 ␣dogs" in file.getvalue()


def test_the_bundled_model_knows_ranks_and_positions() -> None:
    explainer = lxt.load("tiny")
    out = explainer.attribute_targets(TEXT, top=3, latents=("head",))
    logits = explainer.model(torch.tensor([explainer.tokenizer(TEXT)["input_ids"]])).logits[0, -1].detach()
    best = logits.softmax(-1).topk(3)
    assert [one.rank for one in out.explained] == [0, 1, 2]
    assert [one.probability for one in out.explained] == pytest.approx(best.values.tolist(), rel=1e-4)
    several = explainer.attribute(TEXT, target=" dogs.")
    length = len(several.tokens[0])
    assert several.explained[0].positions == (length - 2, length - 1)
    assert several.explained[0].rank is None


def test_ranks_and_positions_are_stored(tmp_path) -> None:
    out = made()
    out = replace(out, explained=[replace(out.explained[0], positions=(1, 3))])
    out.save(tmp_path / "x.safetensors")
    assert Attribution.load(tmp_path / "x.safetensors").explained == out.explained
