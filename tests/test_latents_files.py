"""Results with latents: files read on demand, real models, the command line."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from equations import Float64
from kinds import all_kinds, assert_same, random
from models import build
from safetensors.torch import save_file
from small import PROMPTS, llama

import lxt
from lxt.attribution import Attribution
from lxt.attributor import Attributor
from lxt.latents import Keep


def test_everything_comes_back_from_a_file(tmp_path) -> None:
    out = all_kinds()
    out.save(tmp_path / "x.safetensors")
    loaded = Attribution.load(tmp_path / "x.safetensors")
    assert list(loaded.latents) == list(out.latents)
    for name in out.latents:
        assert_same(out.latents[name], loaded.latents[name])
        assert loaded.latents[name].tokens.texts == out.tokens
        assert_same(out[1].latents[name], Attribution.load(tmp_path / "x.safetensors")[1].latents[name])
    told = json.loads(json.dumps(loaded.to_dict(latents=True)))
    assert told["layers"]["neuron"] == [0, 2, 5]
    assert set(told["rows"][1]["latents"]["expert"]) == {"values", "indices", "rest"}
    assert set(out.to_dict()) == {"model", "rules", "versions", "rows"}


def test_loading_reads_no_latent(tmp_path, monkeypatch) -> None:
    from lxt import resultfile

    out = all_kinds()
    out.save(tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    read = []
    original = resultfile._File.tensor
    monkeypatch.setattr(resultfile._File, "tensor", lambda self, name: (read.append(name), original(self, name))[1])
    loaded = Attribution.load("x.safetensors")
    row = loaded[1]
    monkeypatch.chdir("/")  # the file stays the one that was loaded
    assert "pattern" in loaded.latents
    assert len(row.latents) == len(out.latents)
    assert read == []
    assert torch.equal(row.latents["residual"], out[1].latents["residual"])
    loaded.latents["residual"]
    assert read == ["latents.residual"]
    whole = pickle.loads(pickle.dumps(loaded))
    os.remove(tmp_path / "x.safetensors")
    assert_same(whole.latents["flow"], out.latents["flow"])


@pytest.mark.parametrize(("change", "message"), [("gone", "is gone; .*load the file again"), ("anew", "written anew")])
def test_a_file_that_changed_is_not_read(tmp_path, change: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    all_kinds().save(path)
    loaded = Attribution.load(path)
    loaded.latents["residual"]
    path.unlink()
    if change == "anew":
        all_kinds().save(path)
    with pytest.raises(FileNotFoundError if change == "gone" else OSError, match=message):
        loaded.latents["neuron"]
    assert_same(replace(loaded, model="other").latents["residual"], loaded.latents["residual"])  # has been read


def test_writing_into_a_file_leaves_what_was_loaded(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    out = all_kinds()
    out.save(path)
    loaded = Attribution.load(path)
    path.write_bytes(b"")
    assert torch.equal(loaded.relevance, out.relevance)
    assert torch.equal(loaded.mask, out.mask)
    with pytest.raises(OSError, match="written anew"):
        loaded.latents["residual"]


def test_a_result_can_be_saved_over_the_file_it_came_from(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    out = all_kinds()
    out.save(path)
    loaded = Attribution.load(path)
    loaded.save(path)
    assert_same(Attribution.load(path).latents["pattern"], out.latents["pattern"])
    assert_same(loaded.latents["pattern"], out.latents["pattern"])


def test_a_file_of_the_first_format_is_read(tmp_path) -> None:
    residual, head = random(3, 1, 2), random(3, 1, 2, 4)
    about = {
        "format": 1,
        "tokens": [["<s>", " a"]],
        "explained": [{"label": "' b'", "kind": "logit", "value": 1.0, "position": 1, "prefix": None}],
        "predictions": [{"token": " b", "id": 7, "logit": 1.0, "probability": 0.5}],
        "model": "tiny",
        "rules": "attnlrp",
        "latents": ["residual", "head"],
        "images": [],
        "versions": {"lxt": "3.0.0"},
    }
    tensors = {"relevance": random(1, 2), "mask": torch.ones(1, 2).bool(), "special": torch.zeros(1, 2).bool()}
    tensors |= {"latents.residual": residual, "latents.head": head}
    save_file(tensors, tmp_path / "x", metadata={"lxt.attribution": json.dumps(about)})
    loaded = Attribution.load(tmp_path / "x")
    assert torch.equal(loaded.latents["head"], head)
    assert torch.equal(loaded.latents["residual"], residual)
    assert loaded.latents["head"].layers == (0, 1, 2)


def test_a_latent_of_numbers_that_are_not_finite_is_refused_when_it_is_read(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    out = all_kinds()
    out.latents["residual"].values[0, 0, 1] = torch.nan
    out.save(path)
    loaded = Attribution.load(path)
    with pytest.raises(ValueError, match="holds numbers that aren't finite"):
        loaded.latents["residual"]


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("save", "x.pt", r"save writes .safetensors, and not '.pt'"),
        ("save", "x.jpg", "another suffix"),
        ("to_html", "x.pdf", "to_html writes .html"),
        ("to_pdf", "x.png", "to_pdf writes .pdf"),
        ("plot", "x.safetensors", "png"),
    ],
)
def test_a_name_that_promises_another_kind_of_file_is_refused(tmp_path, method: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(all_kinds()[0], method)(tmp_path / path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_heads_and_neurons_sum_to_what_their_layer_adds(name: str) -> None:
    # Without biases projections (and norms behind them) lose nothing: float64 over sums of 40 neurons. Norms within
    # a layer don't come between what is compared, but transformers computes them in float32 without Float64.
    latents = ("residual", "head", "neuron", "attn_out", "mlp_out")
    with Float64():
        out = Attributor(build(name, "eager", zero_biases=True), rules="cp").attribute(PROMPTS, latents=latents)
    assert all(out.latents[latent].layers == (0, 1) for latent in latents)
    for part, whole in (("head", "attn_out"), ("neuron", "mlp_out")):
        expected = out.latents[whole]
        torch.testing.assert_close(out.latents[part].by_token(), expected.tensor, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(out.latents[part].by_part().sum(-1), expected.by_layer(), rtol=1e-9, atol=1e-12)
    values = torch.tensor([explained.value for explained in out.explained], dtype=torch.float64)
    torch.testing.assert_close(out.latents["residual"].by_layer(), values.expand(2, 3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["head", "neuron"])
def test_the_largest_of_a_model_with_the_rest_are_all(name: str) -> None:
    explainer = Attributor(llama().double())
    whole = explainer.attribute(PROMPTS, latents=name).latents[name]
    out = explainer.attribute(PROMPTS, latents=Keep(name, top=2), batch_size=1)
    latent = out.latents[name]
    assert latent.parts == whole.shape[-1]
    torch.testing.assert_close(latent.by_token(), whole.by_token(), rtol=1e-9, atol=1e-12)
    assert [entry.label for entry in latent.top(2)] == [entry.label for entry in whole.top(2)]
    assert_same(out[1].latents[name], explainer.attribute(PROMPTS[1], latents=Keep(name, top=2)).latents[name])


def test_check_reports_row_by_row() -> None:
    out = Attributor(llama()).attribute_targets(PROMPTS, [7, 9], batch_size=1)
    report = out.check()
    assert [total for _, total in report.rows] == pytest.approx(out.total.tolist())
    assert [value for value, _ in report.rows] == pytest.approx([one.value for one in out.explained])
    assert "conservation of row 5" in str(report)
    single = Attributor(llama()).attribute(PROMPTS[0]).check()
    assert len(single.rows) == 1
    assert "row" not in str(single).split("logits")[0]


def test_the_command_line_ranks_latents_and_explains_several_targets(run, tmp_path) -> None:
    flags = ["-t", " dogs", "-t", " cats", "-l", "head", "-l", "neuron:3", "--save", tmp_path / "x.safetensors"]
    status, out, err = run("attribute", "My cats love to play with my", *flags)
    assert status == 0, err
    saved = Attribution.load(tmp_path / "x.safetensors")
    assert [one.label for one in saved.explained] == ["' dogs'", "' cats'"]
    assert saved.latents["neuron"].values.shape[-1] == 3
    for row, label in enumerate(["' dogs'", "' cats'"]):
        for name in ("head", "neuron"):
            assert f"{name}, the largest for {label}:\n{saved[row].latents[name].top(10)}\n" in out
    assert out.index("neuron, the largest for ' dogs'") < out.index("head, the largest for ' cats'")
    status, out, err = run("attribute", "My cats love to play with my", "--top", 2, "--json", "-")
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert rows[0]["explained"]["label"] == repr(rows[0]["prediction"]["token"])
    assert rows[0]["explained"]["value"] > rows[1]["explained"]["value"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-l", "nuron"], "did you mean 'neuron'"),
        (["-l", "neuron:many"], "neuron:20"),
        (["-l", "neuron:0"], ">= 1"),
        (["-t", " a", "--top", "2"], "give one of them"),
        (["--save", "x.pt"], "--save writes .safetensors"),
        (["--plot", "x.html"], "--plot writes .png"),
    ],
)
def test_the_command_line_refuses_before_the_model_loads(run, monkeypatch, flags: list[str], message: str) -> None:
    monkeypatch.setattr(lxt, "load", lambda *args, **options: pytest.fail("loaded"))
    status, _, err = run("attribute", "My cats", *flags)
    assert status not in (0, None)
    assert message in err
    assert err.count("\n") == 1
