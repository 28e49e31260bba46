"""out.latents: a tensor where all was kept, sums that lose nothing, rankings that read."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from kinds import (
    LAYER,
    LENGTH,
    NEURONS,
    ROWS,
    all_kinds,
    assert_same,
    attribution,
    largest,
    masked,
    neurons,
    pattern,
    random,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lxt.latents import LatentRelevance, Latents, Tokens, joined


def test_it_is_the_tensor_that_it_holds() -> None:
    latent = neurons()
    plain = latent.values
    assert type(plain) is torch.Tensor
    assert latent.tensor is plain
    assert latent.data_ptr() == plain.data_ptr()  # nothing is copied
    assert (latent.shape, latent.dtype, len(latent)) == (plain.shape, plain.dtype, LAYER)
    assert torch.equal(latent, plain)
    computed = [latent + 1, 1 - latent, latent.sum(-1), latent[0], latent[0, :, 3], torch.stack([latent, latent])]
    computed += [*latent, latent.abs(), torch.einsum("lbtn->n", latent), plain * latent, latent.double()]
    assert {type(one) for one in computed} == {torch.Tensor}
    assert torch.equal(torch.cat([latent, plain]), torch.cat([plain, plain]))
    assert np.array_equal(np.asarray(latent), plain.numpy())
    assert latent.tolist() == plain.tolist()
    torch.testing.assert_close(latent, plain)
    torch.testing.assert_close(plain, latent)
    assert "[3, 2, 4, 50]" in f"{latent} {latent!r}"


@pytest.mark.parametrize("made", [neurons, lambda: largest(pattern(), 2)], ids=["all", "largest"])
def test_copies_are_whole(made) -> None:
    latent = made()
    for other in (pickle.loads(pickle.dumps(latent)), copy.deepcopy(latent), copy.copy(latent)):
        assert type(other) is LatentRelevance
        assert_same(latent, other)
        assert other.tokens.texts == latent.tokens.texts
    assert copy.deepcopy(latent).values.data_ptr() != latent.values.data_ptr()


def test_the_largest_alone_are_not_taken_for_all() -> None:
    latent = largest(neurons(), 3)
    assert latent.shape[-1] == 3
    assert "largest 3 of 50" in f"{latent}"
    assert len({latent, latent}) == 1
    for use in (
        lambda: latent.sum(2),
        lambda: latent[0],
        lambda: latent * 2,
        lambda: torch.stack([latent, latent]),
        lambda: np.asarray(latent),
        lambda: latent.tensor,
        lambda: list(latent),
    ):
        with pytest.raises(ValueError, match=r"only the largest 3 .* to_dense\(\).*latents=\('neuron',\)"):
            use()
    with pytest.raises(ValueError, match=r"latents=\(lxt\.Features\(\.\.\., name='tc', top=None\),\)"):
        latent.replaced(name="tc").sum()


@pytest.mark.parametrize("top", [1, 3, 50])
def test_sums_and_dense_of_the_largest(top: int) -> None:
    whole = neurons()
    latent = largest(whole, top)
    # float32 sums of 50 numbers of size 1
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(latent.by_layer(), whole.values.sum((2, 3)), **close)
    torch.testing.assert_close(latent.by_token(), whole.values.sum(-1), **close)
    kept = torch.zeros_like(whole.values).scatter(-1, latent.indices.long(), latent.values)
    assert torch.equal(latent.to_dense(), kept)
    torch.testing.assert_close(latent.by_part(), kept.sum(2), **close)
    assert torch.equal(whole.to_dense(), whole.values)


@pytest.mark.parametrize("top", [None, 2])
def test_sums_of_the_pattern(top: int | None) -> None:
    whole = pattern()
    latent = whole if top is None else largest(whole, top)
    torch.testing.assert_close(latent.by_layer(), whole.values.sum((2, 3, 4)))
    torch.testing.assert_close(latent.by_token(), whole.values.sum((2, 4)))
    torch.testing.assert_close(latent.by_part(), whole.values.sum((3, 4)))
    if top is None:
        torch.testing.assert_close(latent.by_token(of="key"), whole.values.sum((2, 3)))
        return
    assert latent.to_dense().shape == whole.values.shape
    with pytest.raises(ValueError, match="keep all"):
        latent.by_token(of="key")


def test_sums_that_there_are_none_of() -> None:
    with pytest.raises(ValueError, match="no parts"):
        LatentRelevance("residual", random(3, 2, 4), (0, 1, 2)).by_part()
    with pytest.raises(ValueError, match="allowed: 'query'"):
        pattern().by_token(of="values")


def test_layers_go_by_their_own_number() -> None:
    latent = largest(neurons(), 3)
    one = latent.layer(5)
    assert one.layers == (5,)
    assert torch.equal(one.values, latent.values[2:])
    assert torch.equal(one.rest, latent.rest[2:])
    with pytest.raises(IndexError, match="no layer 1; kept are 0, 2, 5"):
        latent.layer(1)


def test_a_ranking_reads() -> None:
    values = torch.zeros(2, 1, 4, 3)
    values[1, 0, 1, 1], values[0, 0, 3, 0], values[1, 0, 2, 2], values[0, 0, 0, 0] = 1.83, -12.0, 0.5, 99.0
    of = tokens().of_row(0)
    latent = LatentRelevance("head", values, (0, 11), tokens=of)
    assert repr(latent.top(4)).splitlines() == [
        'L0H0   token " milk"  -12.0',
        'L11H1  token " Mary"  +1.83',
        'L11H2  token " gave"  +0.500',
        "(special tokens are left out; top(special=True) ranks them too)",
    ]
    first, second = latent.top(2, by="positive", special=True)
    assert (first.layer, first.part, first.token, first.text, first.value) == (0, 0, 0, "<s>", 99.0)
    assert second.label == "L11H1"
    assert [entry.value for entry in latent.top(by="negative")] == [-12.0]
    assert [entry.label for entry in latent.top(layer=11)] == ["L11H1", "L11H2"]
    assert [entry.label for entry in latent.top(layer=(0,), token=0)] == ["L0H0"]  # asked for by its place
    assert [entry.label for entry in latent.top(token=(-1, 1))] == ["L0H0", "L11H1"]
    assert "no head has such relevance" in repr(latent.top(layer=0, token=1))


@pytest.mark.parametrize(
    ("latent", "label"),
    [
        (neurons(), "L5N1"),
        (neurons().replaced(name="expert"), "L5E1"),
        (neurons().replaced(name="router"), "L5E1"),
        (neurons().replaced(name="sae"), "L5F1"),
        (LatentRelevance("residual", torch.zeros(3, 2, 4), (0, 2, 5)), "L5"),
        (LatentRelevance("embed", torch.zeros(3, 2, 4), (0, 2, 5)), "embed"),
        (LatentRelevance("model.norm", torch.zeros(3, 2, 4), (0, 2, 5)), "model.norm"),
    ],
)
def test_labels(latent: LatentRelevance, label: str) -> None:
    values = torch.zeros_like(latent.values)
    values[(2, 1, 3, 1)[: values.dim()]] = 1.0
    (entry,) = latent.replaced(values=values, tokens=None).top()
    assert entry.label == label
    assert (entry.row, entry.token) == (1, 3)


@pytest.mark.parametrize("top", [None, 2])
def test_a_ranking_of_pairs_of_tokens(top: int | None) -> None:
    values = torch.zeros(1, 2, 2, 4, 4)
    values[0, 1, 1, 3, 2], values[0, 1, 0, 2, 1] = 0.3, 5.0  # the second looks at <s>
    latent = LatentRelevance("pattern", values, (5,), tokens=tokens())
    latent = latent if top is None else largest(latent, top)
    ranking = latent.top(3)
    assert repr(ranking).splitlines()[0] == 'L5H1  " gave" -> " milk"  +0.300'
    (entry,) = ranking
    assert (entry.row, entry.token, entry.source, entry.source_text) == (1, 2, 1, " gave")  # of the row's own
    assert [one.value for one in latent.top(special=True)] == pytest.approx([5.0, 0.3])


def test_rows_are_ranked_each_by_itself() -> None:
    latent = neurons()
    both = latent.top(4)
    assert [entry.row for entry in both] == [0] * 4 + [1] * 4
    assert "row 1  L" in repr(both)
    assert list(both[4:]) == list(latent.top(4, row=1)) == list(latent.top(4, row=-1))
    flat = latent.values[:, 1, 2:].abs().flatten().sort(descending=True).values[:4]
    assert [abs(entry.value) for entry in both[4:]] == flat.tolist()


def test_a_ranking_of_hostile_tokens_keeps_to_its_lines() -> None:
    texts = ["\n\x1b[31m", "\u202eevil", "x" * 10_000, '日本"\\']
    of = Tokens([texts], torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool))
    shown = repr(LatentRelevance("residual", torch.tensor([[[4.0, 3, 2, 1]]]), (0,), tokens=of).top())
    lines = shown.split("\n")
    assert len(lines) == 4
    assert all(line.isprintable() and len(line) < 60 for line in lines)
    assert r'"日本\"\\"' in lines[3]


def test_tokens_of_one_text_are_told_apart_by_their_places() -> None:
    texts = [["", " my", " bag", " my"], [" my", " her", " his", " its"]]
    of = Tokens(texts, torch.tensor([[False] + [True] * 3, [True] * 4]), torch.zeros(2, 4, dtype=torch.bool))
    values = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [4.0, 0.0, 0.0, 0.0]]])
    ranking = LatentRelevance("residual", values, (3,), tokens=of).top()
    assert repr(ranking).splitlines() == [
        'row 0  L3  token " my" (2)  +3.00',
        'row 0  L3  token " bag"     +2.00',
        'row 0  L3  token " my" (0)  +1.00',
        'row 1  L3  token " my"      +4.00',
    ]
    pairs = torch.zeros(1, 2, 1, 4, 4)
    pairs[0, 0, 0, 3, 1] = 1.0
    assert repr(LatentRelevance("flow", pairs, (3,), tokens=of).top()) == 'L3H0  " my" (0) -> " my" (2)  +1.00'
    with pytest.raises(TypeError, match=r"place of a token in its row.*got ' my'; ' my' is at 0, 2"):
        LatentRelevance("residual", values, (3,), tokens=of).top(token=" my")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"place of a token in its row.*got 1\.5$"):
        LatentRelevance("residual", values, (3,)).top(token=[1.5])  # type: ignore[list-item]


def test_a_ranking_refuses_what_there_is_none_of() -> None:
    latent = neurons()
    with pytest.raises(ValueError, match="unknown order 'size'; allowed: 'absolute'"):
        latent.top(by="size")
    with pytest.raises(ValueError, match="k must be a whole number >= 1, got 0"):
        latent.top(0)
    with pytest.raises(IndexError, match="row 2 of 2"):
        latent.top(row=2)
    with pytest.raises(IndexError, match="no layer 1"):
        latent.top(layer=1)
    with pytest.raises(IndexError, match="token 3 of 3 in row 1; allowed: -3 to 2"):
        latent.top(token=3)


class Sizes(TorchDispatchMode):
    """The largest tensor that anything makes, views of what is known apart."""

    largest = 0

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, out.numel() * out.element_size())
        return out


def test_reading_makes_no_copy_of_all_layers() -> None:
    values = random(40, 1, 6, 500)
    latent = LatentRelevance("neuron", values, range(40))
    layer = values.numel() * 8 // 40  # as float64, or the indices of all entries of one layer
    with Sizes(values) as sizes:
        latent.top(20)
        latent.by_layer(), latent.by_token(), latent.by_part()
        small = LatentRelevance(
            "neuron", values[..., :5], range(40), torch.zeros(40, 1, 6, 5).int(), values[..., 0], 500
        )
        small.top(20)
        small.by_layer(), small.by_token()
        row = Latents.of({"neuron": latent}, Tokens([["a"] * 6], torch.ones(1, 6).bool(), torch.zeros(1, 6).bool()))
        row.of_row(0)["neuron"]
    assert 0 < sizes.largest <= 40 * 500 * 8 + layer


def test_the_table_lists_every_entry() -> None:
    pytest.importorskip("pandas")
    latent = neurons()
    frame = latent.to_dataframe()
    assert list(frame.columns) == ["row", "layer", "token", "token_text", "part", "relevance"]
    assert len(frame) == LAYER * 7 * NEURONS  # 7 real tokens
    of = frame[(frame.row == 1) & (frame.layer == 5) & (frame.token == 2) & (frame.part == 7)]
    assert of.relevance.item() == latent.values[2, 1, 3, 7].item()
    assert of.token_text.item() == " milk"
    residual = LatentRelevance("residual", masked(random(1, 2, 4)), (3,), tokens=tokens()).to_dataframe()
    assert residual.part.isna().all()
    assert len(residual) == 7


def test_the_table_of_the_largest_sums_to_all() -> None:
    pytest.importorskip("pandas")
    whole = neurons()
    frame = largest(whole, 3).to_dataframe()
    sums = frame.groupby(["layer", "row"]).relevance.sum().to_numpy().reshape(LAYER, ROWS)
    np.testing.assert_allclose(sums, whole.values.sum((2, 3)).numpy(), rtol=1e-4, atol=1e-4)
    assert int(frame.part.isna().sum()) == LAYER * 7
    assert frame.token.is_monotonic_increasing is False  # row by row
    one = frame[(frame.row == 0) & (frame.layer == 0)]
    assert one.token.is_monotonic_increasing


@pytest.mark.parametrize("top", [None, 2])
def test_the_table_of_pairs(top: int | None) -> None:
    pytest.importorskip("pandas")
    whole = pattern()
    latent = whole if top is None else largest(whole, top)
    frame = latent.to_dataframe()
    sums = frame.groupby(["layer", "row", "part"]).relevance.sum().to_numpy().reshape(LAYER, ROWS, 2)
    np.testing.assert_allclose(sums, whole.values.sum((3, 4)).numpy(), rtol=1e-4, atol=1e-5)
    of = frame[(frame.row == 1) & (frame.layer == 2) & (frame.part == 1) & (frame.token == 2) & (frame.source == 2)]
    if top is None:
        assert of.relevance.item() == whole.values[2, 1, 1, 3, 3].item()
        assert (of.token_text.item(), of.source_text.item()) == (" milk", " milk")
        assert len(whole.to_dataframe(zeros=True)) == LAYER * 2 * (16 + 9)
    else:
        padding = latent.replaced(indices=torch.zeros_like(latent.indices))  # of row 1: slots that name no key
        frame = padding.replaced(values=torch.zeros_like(latent.values)).to_dataframe(zeros=True)
        assert not (frame[frame.row == 1].relevance == 0).any()


def test_tables_hold_any_token() -> None:
    pytest.importorskip("pandas")
    texts = ["\ud83d", "\x00", " a"]  # half a character
    of = Tokens([texts], torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool))
    for latent in (
        LatentRelevance("residual", torch.tensor([[[3.0, 2.0, 1.0]]]), (0,), tokens=of),
        LatentRelevance(
            "pattern", torch.eye(3).mul(torch.tensor([3.0, 2.0, 1.0])).view(1, 1, 1, 3, 3), (0,), tokens=of
        ),
    ):
        for frame in (latent.to_dataframe(), latent.top().to_dataframe()):
            assert frame.token_text.tolist() == texts
            assert frame.get("source_text", frame.token_text).tolist() == texts


def test_a_ranking_is_a_table_too() -> None:
    pytest.importorskip("pandas")
    ranking = pattern().top(3, row=0)
    frame = ranking.to_dataframe()
    assert frame.label.tolist() == [entry.label for entry in ranking]
    assert frame.source_text.tolist() == [entry.source_text for entry in ranking]


def test_without_pandas_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    for latent in (neurons(), neurons().top()):
        with pytest.raises(ModuleNotFoundError, match=r"lxt\[dataframe\]"):
            latent.to_dataframe()


def test_the_mapping_is_read_only_and_knows_its_names() -> None:
    latents = all_kinds().latents
    assert list(latents)[:2] == ["residual", "embed"]
    assert latents["neuron"] is latents["neuron"]
    assert latents.get("head") is None
    assert "head" not in latents
    with pytest.raises(TypeError):
        latents["residual"] = torch.zeros(3, 2, 4)
    assert latents["blocks.2.hook_resid_post"].layers == (2,)
    assert torch.equal(latents["blocks.5.mlp.hook_post"], latents["neuron"].values[2:])
    assert torch.equal(latents["residual_post"], latents["residual"])
    assert torch.equal(latents["hook_embed"], latents["embed"])
    assert "blocks.5.mlp.hook_post" in latents
    assert "blocks.1.mlp.hook_post" not in latents
    with pytest.raises(KeyError, match=r"kept were residual, embed.*latents=\['residual'.*'head'\]"):
        latents["head"]
    with pytest.raises(KeyError, match="did you mean 'neuron'"):
        latents["nuron"]
    with pytest.raises(KeyError, match=r"no layer 1; kept are 0, 2, 5\. If the model has that layer, ask for it"):
        latents["blocks.1.mlp.hook_post"]
    with pytest.raises(TypeError, match=r"of a row: out\[row\]"):
        latents[0]


@pytest.mark.parametrize("name", list(all_kinds().latents))
def test_a_row_is_cut_out_of_every_form(name: str) -> None:
    out = all_kinds()
    batch, row = out.latents[name], out[1].latents[name]
    keep = slice(1, None)
    whole = batch.to_dense() if batch.indices is not None else batch.values
    expected = whole[:, 1:, :, keep, keep] if whole.dim() == 5 else whole[:, 1:, keep]
    found = row.to_dense() if row.indices is not None else row.values
    assert torch.equal(found, expected)
    assert row.tokens.texts == [["<s>", " gave", " milk"]]
    assert [entry.value for entry in row.top(5)] == [entry.value for entry in batch.top(5, row=1)]
    assert [(entry.token, entry.source) for entry in row.top(5)] == [
        (entry.token, entry.source) for entry in batch.top(5, row=1)
    ]


@pytest.mark.parametrize("name", list(all_kinds().latents))
def test_rows_are_joined_again(name: str) -> None:
    out = all_kinds()
    rows = [out[i].latents[name] for i in (1, 0)]
    together, expected = joined(rows, torch.tensor([1, 0]), LENGTH), out.latents[name]
    assert (together.layers, together.parts) == (expected.layers, expected.parts)
    assert torch.equal(together.to_dense(), expected.to_dense())  # which part a 0 names doesn't matter
    assert torch.equal(together.by_token(), expected.by_token())


def test_a_row_makes_no_copy() -> None:
    out = all_kinds()
    storage = out.latents["neuron"].values.untyped_storage().data_ptr()
    assert out[1].latents["neuron"].values.untyped_storage().data_ptr() == storage


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ({"pattern": torch.zeros(3, 2, 4, 4)}, "must be .*'head', 4, 4"),
        ({"residual": torch.zeros(3, 2, 4, 1)}, "must be"),
        ({"expert": torch.zeros(3, 2, 4)}, "'expert'"),
        ({"residual": LatentRelevance("residual", torch.zeros(3, 2, 4), (0, 1))}, "3 layers, but 2 numbers"),
        ({"neuron": largest(neurons(), 3).replaced(rest=None)}, "both indices and rest"),
        ({"neuron": largest(neurons(), 3).replaced(rest=torch.zeros(3, 2, 3))}, r"must be \(3, 2, 4, 3\) and"),
        ({"neuron": largest(neurons(), 3).replaced(parts=3)}, "indices from 0 to .*; allowed are 0 to 2"),
        ({"neuron": largest(neurons(), 3).replaced(rest=torch.full((3, 2, 4), torch.inf))}, "aren't finite"),
    ],
)
def test_latents_that_do_not_fit_are_refused(latents: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribution(latents)
