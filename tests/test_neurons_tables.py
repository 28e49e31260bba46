"""The parquet tables hold what the results hold, row for row, and are whole or not there."""

import json

import pytest
import torch
from small import a_tokenizer, llama

import lxt
from lxt.neurons import tables
from lxt.neurons.measuring import KINDS, SIGNS
from lxt.neurons.running import label

TEXTS = [f"My cats love to play with my {number} dogs and cats" for number in range(12)]
OPTIONS = {"layers": [0, 2], "top": 4, "length": 24, "block_size": 5}


@pytest.fixture(scope="module")
def explainer():
    return lxt.load(llama(), a_tokenizer())


@pytest.mark.parametrize("latent", ["neuron", "head"])
def test_every_context_and_every_statistic_is_a_row(explainer, tmp_path, monkeypatch, latent):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(tables, "_ROWS", 3)  # several files for each layer
    found = label(explainer, TEXTS, latent, out=tmp_path, **OPTIONS)
    assert len(list((tmp_path / "contexts").iterdir())) == 2 * -(-found.count(0) // 3)
    rows = parquet.read_table(tmp_path / "contexts").to_pylist()
    expected = []
    for one in found:
        for kind in KINDS:
            for sign in SIGNS:
                for rank, context in enumerate(one.contexts[kind, sign], 1):
                    place = {"layer": one.layer, latent: one.number, "kind": kind, "sign": sign, "rank": rank}
                    said = {"score": context.score, "document": context.document, "token": context.token}
                    expected.append(place | said | {"peak": context.peak, "text": context.text})
    assert [{key: row[key] for key in expected[0]} for row in rows] == expected
    windows = {window.number: window for window in found.tally.windows}
    for row in rows:
        window = windows[row["window"]]
        assert found.pieces[window.ids[row["position"]]] == row["peak"]
        assert window.document == row["document"]

    rows = parquet.read_table(tmp_path / "neurons").to_pylist()
    assert [(row["layer"], row[latent]) for row in rows] == [(one.layer, one.number) for one in found]
    for row, one in zip(rows, found, strict=True):
        assert (row["label"], row["auroc"]) == (one.label, one.auroc)
        assert list(zip(row["words"], row["z"], strict=True)) == list(one.words)
        assert row["tokens"] == found.tally.tokens
        for kind in KINDS:
            assert row[f"{kind}_mean"] == pytest.approx(one.mean[kind], rel=1e-12)
            assert row[f"{kind}_deviation"] == pytest.approx(one.deviation[kind], rel=1e-9)
            assert row[f"{kind}_above_zero"] == round(one.above_zero[kind] * found.tally.tokens)
            for sign, name in (("positive", "max"), ("negative", "min")):
                best = one.contexts[kind, sign]
                assert row[f"{kind}_{name}"] == (best[0].score if best else 0)


def test_pandas_reads_a_folder(explainer, tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    found = label(explainer, TEXTS, out=tmp_path, **OPTIONS)
    contexts, neurons = (pandas.read_parquet(tmp_path / name) for name in ("contexts", "neurons"))
    best = contexts.query("layer == 2 and kind == 'relevance' and sign == 'positive' and rank == 1")
    assert best["score"].max() == pytest.approx(found.best(2, 1)[0].contexts["relevance", "positive"][0].score)
    assert len(neurons) == 2 * found.count(0)


def test_without_pyarrow_the_manifest_says_that_there_are_none(explainer, tmp_path, monkeypatch):
    monkeypatch.setattr("lxt.neurons.results.available", lambda: False)
    found = label(explainer, TEXTS, out=tmp_path, **OPTIONS)
    assert json.loads((tmp_path / "manifest.json").read_bytes())["saved"]["tables"] is False
    assert not (tmp_path / "contexts").exists()
    monkeypatch.setattr(tables, "available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'lxt\[corpus\]'"):
        next(tables.tables(found))
    monkeypatch.undo()
    if tables.available():  # installed since: the same command writes them
        label(explainer, TEXTS, out=tmp_path, **OPTIONS)
        assert (tmp_path / "contexts").is_dir()


def test_heads_are_labelled_by_the_sum_and_the_length_of_their_numbers(explainer, tmp_path):
    """Against `attribute` with every head kept, one prediction at a time, for the head's relevance at each token."""
    text = TEXTS[3]
    found = label(explainer, [text], "head", layers=[1], top=1, length=40, out=tmp_path)
    ids = explainer.tokenizer(text)["input_ids"]
    total = torch.zeros(len(ids), 4)
    for place in range(len(ids) - 1):
        out = explainer.attribute(ids[: place + 1], target=ids[place + 1], latents=("head",))
        total[: place + 1] += out.latents["head"].values[1, 0]
    kept = {}
    module = explainer.model.model.layers[1].self_attn.o_proj
    hook = module.register_forward_pre_hook(lambda module, args: kept.update(x=args[0][0]))
    with torch.no_grad():
        explainer.model(torch.tensor([ids]))
    hook.remove()
    length = kept["x"].unflatten(-1, (4, -1)).norm(dim=-1)
    for kind, values in (("relevance", total), ("activation", length)):
        best = values[1:].max(0)  # the first token is special
        top = found.tally.tops[1, kind, "positive"]
        # float32 sums over 20 predictions in another order
        torch.testing.assert_close(top.score[:, 0], best.values.clamp(min=0), rtol=1e-4, atol=1e-5)
        assert torch.equal(top.position[:, 0].long(), torch.where(best.values > 0, best.indices + 1, 0))
    assert found.count(1) == 4
    assert str(found[1, 3]).startswith("L1H3")
    assert not found[1, 3].contexts["activation", "negative"]
    assert lxt.neurons.load(tmp_path)[1, 3] == found[1, 3]
