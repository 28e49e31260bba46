"""Attribution: it refuses what doesn't fit, strips padding, and comes back from its file bit by bit."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from lxt.attribution import Attribution, Explained, Prediction

HOSTILE = ["\x00\x1b[31m", "\u202eevil", "x" * 10_000, "\ud83d", "👨‍👩‍👧", "مرحبا", "<b>&\"'", "", "\n"]


def parts(tokens: list[list[str]], seed: int = 0, latents: bool = True) -> dict:
    """Constructor arguments for rows padded on the left to the longest."""
    random = torch.Generator().manual_seed(seed)
    batch, length = len(tokens), max(map(len, tokens))
    mask = torch.tensor([[i >= length - len(row) for i in range(length)] for row in tokens])
    special = torch.zeros(batch, length, dtype=torch.bool)
    special[:, 0] = True

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "tokens": [[""] * (length - len(row)) + list(row) for row in tokens],
        "token_ids": torch.randint(0, 2**40, (batch, length), generator=random),
        "relevance": draw(batch, length) * mask,
        "mask": mask,
        "special": special & mask,
        "explained": [Explained(f"' word{i}'", "logit", 14.0 + i, len(row) - 1) for i, row in enumerate(tokens)],
        "predictions": [Prediction(" word", 7, 14.0, 0.97) for _ in tokens],
        "model": "tiny",
        "rules": "attnlrp",
        "latents": {
            "residual": draw(3, batch, length),
            "head": draw(3, batch, length, 2).bfloat16(),
            "neuron": draw(3, batch, length, 5).double(),
        }
        if latents
        else {},
        "versions": {"lxt": "3.0.0"},
    }


@pytest.fixture
def batch() -> Attribution:
    return Attribution(**parts([["<s>", " a", " b"], ["<s>", *HOSTILE]]))


def assert_same(one: Attribution, other: Attribution) -> None:
    for name in ("tokens", "explained", "predictions", "model", "rules", "versions"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("token_ids", "relevance", "mask", "special"):
        assert torch.equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert list(one.latents) == list(other.latents)
    for name, latent in one.latents.items():
        assert latent.dtype == other.latents[name].dtype
        assert torch.equal(latent, other.latents[name])


def test_a_row_stands_alone_without_padding(batch: Attribution) -> None:
    row = batch[0]
    assert len(batch) == 2
    assert len(row) == 1
    assert row.tokens == [["<s>", " a", " b"]]
    assert torch.equal(row.relevance[0], batch.relevance[0, -3:])
    assert torch.equal(row.token_ids[0], batch.token_ids[0, -3:])  # type: ignore[index]
    assert row.mask.all()
    assert {name: tuple(latent.shape) for name, latent in row.latents.items()} == {
        "residual": (3, 1, 3),
        "head": (3, 1, 3, 2),
        "neuron": (3, 1, 3, 5),
    }
    assert torch.equal(row.latents["head"][:, 0], batch.latents["head"][:, 0, -3:])
    assert row.tokens[0][row.explained[0].position or 0] == " b"
    assert_same(batch[-1], batch[1])
    assert [len(one.tokens[0]) for one in batch] == [3, 10]


@pytest.mark.parametrize("row", [2, -3])
def test_rows_outside_are_named(batch: Attribution, row: int) -> None:
    with pytest.raises(IndexError, match="allowed: 0 to 1"):
        batch[row]


def test_only_numbers_choose_rows(batch: Attribution) -> None:
    with pytest.raises(TypeError, match="chosen by its number"):
        batch["0"]  # type: ignore[index]


def test_total_and_conservation(batch: Attribution) -> None:
    total = batch.relevance.double().sum(-1)
    assert torch.equal(batch.total, total)
    assert torch.equal(batch.conservation, total / torch.tensor([14.0, 15.0], dtype=torch.float64))


def test_conservation_of_a_zero_value_is_undefined_not_infinite() -> None:
    made = parts([["a", "b"]])
    made["explained"] = [Explained("x", "logit", 0.0)]
    one = Attribution(**made)
    assert one.conservation.isnan().all()
    assert one.to_dict()["rows"][0]["conservation"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevance": torch.zeros(3)}, r"must be \[batch, token\]"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, "mask has shape"),
        ({"special": torch.ones(1, 10, dtype=torch.bool)}, "special has shape"),
        ({"token_ids": torch.zeros(2, 3)}, "token_ids has shape"),
        ({"tokens": [["a"], ["b"]]}, "pad shorter rows on the left"),
        ({"explained": []}, "2 rows need 2 explained"),
        ({"predictions": [Prediction("a", 1, 1.0, 1.0)]}, "2 rows need 2 explained"),
        ({"latents": {"residual": torch.zeros(3, 10)}}, "latents"),
        ({"latents": {"head": torch.zeros(3, 2, 10)}}, "must be .*'head'"),
        ({"latents": {"residual": torch.full((3, 2, 10), torch.nan)}}, "aren't finite"),
        ({"explained": [Explained("a", "logit", float("inf"))] * 2}, "must be a finite number"),
        ({"relevance": torch.ones(2, 10)}, "at padding must be 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attribution(**parts([["<s>", " a", " b"], ["<s>", *HOSTILE]]) | change)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_relevance_that_is_not_finite_is_refused_and_located(bad: float) -> None:
    made = parts([["a", " b", " c"]])
    made["relevance"][0, 1] = bad
    with pytest.raises(ValueError, match=r"row 0, token 1 \(' b'\)"):
        Attribution(**made)


def test_relevance_leaves_graph_and_half_precision() -> None:
    made = parts([["a", "b"]])
    made["relevance"] = made["relevance"].bfloat16().requires_grad_()
    one = Attribution(**made)
    assert one.relevance.dtype == torch.float32
    assert not one.relevance.requires_grad


def test_save_and_load_are_exact(batch: Attribution, tmp_path) -> None:
    path = tmp_path / "new folder" / "x.safetensors"
    batch.save(path)
    loaded = Attribution.load(path)
    assert_same(batch, loaded)
    assert os.listdir(path.parent) == ["x.safetensors"]
    loaded.save(path)
    assert_same(batch, Attribution.load(path))


def test_save_without_ids_predictions_and_latents(tmp_path) -> None:
    one = Attribution(**parts([["a"]], latents=False) | {"token_ids": None, "predictions": []})
    one.save(tmp_path / "x")
    loaded = Attribution.load(tmp_path / "x")
    assert loaded.token_ids is None
    assert loaded.predictions == []
    assert loaded.latents == {}


def test_save_takes_tensors_that_share_memory(tmp_path) -> None:
    made = parts([["a", "b"]])
    shared = torch.ones(3, 1, 2, 2)
    made["latents"] = {"residual": shared[..., 0], "head": shared}
    one = Attribution(**made)
    one.save(tmp_path / "x")
    assert_same(one, Attribution.load(tmp_path / "x"))


def test_a_failed_save_keeps_the_file_that_was_there(batch: Attribution, tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    batch.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write the file \(No space left"):
        batch[0].save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_unwritable_paths_are_named(batch: Attribution, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError, match="cannot write the file"):
        batch.save(tmp_path)
    with pytest.raises(OSError, match=r"cannot write the file .*file/below"):
        batch.save(tmp_path / "file" / "below")


def test_a_refused_folder_is_a_permission_error(batch: Attribution, tmp_path, monkeypatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(PermissionError, match="in a folder that you may write to"):
        batch.save(tmp_path / "x")


def test_a_pipe_is_written_to_and_not_replaced(batch: Attribution, tmp_path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    batch.to_html(pipe)
    reader.join(10)
    assert b"<!doctype html>" in got[0]
    assert pipe.is_fifo()


def test_a_link_keeps_pointing_where_it_did(batch: Attribution, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    batch.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(batch, Attribution.load(tmp_path / "real"))


def test_load_says_what_a_file_is_not(batch: Attribution, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give the path that Attribution\.save wrote"):
        Attribution.load(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        Attribution.load(tmp_path)
    for content in (b"", b"hello", b"\x93NUMPY" * 40):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match="is not a file of lxt: safetensors can't read it"):
            Attribution.load(tmp_path / "other")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is safetensors, but holds weight"):
        Attribution.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ('{"format": 99}', "so update lxt"),
        ("{", "metadata is damaged"),
        ("[]", "metadata is damaged"),
        ('{"format": "1"}', "metadata is damaged"),
        ('{"format": 1}', "part of it is missing"),
    ],
)
def test_load_refuses_damaged_metadata(about: str, message: str, tmp_path) -> None:
    save_file({"relevance": torch.zeros(1, 1)}, tmp_path / "x", metadata={"lxt.attribution": about})
    with pytest.raises(ValueError, match=message):
        Attribution.load(tmp_path / "x")


def test_a_cut_file_is_refused(batch: Attribution, tmp_path) -> None:
    batch.save(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="is not a file of lxt"):
        Attribution.load(tmp_path / "x")


def test_to_dict_is_strict_json_without_padding(batch: Attribution) -> None:
    told = json.loads(json.dumps(batch.to_dict(latents=True), allow_nan=False))
    assert [len(row["tokens"]) for row in told["rows"]] == [3, 10]
    assert told["rows"][1]["tokens"][1:] == HOSTILE
    assert told["rows"][0]["relevance"] == batch[0].relevance[0].tolist()
    explained = {"label": "' word0'", "kind": "logit", "value": 14.0, "position": 2, "prefix": None}
    explained |= {"positions": [2], "rank": None, "probability": None}
    assert told["rows"][0]["explained"] == explained
    assert told["rows"][0]["latents"]["residual"] == batch[0].latents["residual"][:, 0].tolist()
    assert "latents" not in batch.to_dict()["rows"][0]


def test_check_asks_the_run_and_teaches_after_load(batch: Attribution, tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"call check\(\) on what Attributor\.attribute returned"):
        batch.check()
    assert batch.with_checker(lambda: "report") is batch
    assert batch.check() == "report"
    assert batch[0].check() == "report"
    batch.save(tmp_path / "x")
    with pytest.raises(RuntimeError, match="loaded from a file"):
        Attribution.load(tmp_path / "x").check()


def test_repr_is_one_short_safe_line(batch: Attribution) -> None:
    made = parts([["a"] * 500])
    made["explained"] = [Explained("\x1b[31m" + "x" * 5000, "logit", 1.5)]
    for shown in (repr(batch), repr(Attribution(**made))):
        assert len(shown) < 250
        assert shown.isprintable()
