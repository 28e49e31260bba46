"""Models that can't be loaded or explained: one clear error each, with the next step, and nothing changed by trying."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import build, inputs_of
from relevances import relevance, state
from small import a_tokenizer, llama

import lxt

CUSTOM = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder)
    a_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A good model's files, to spoil; with code that leaves a trace when it is run."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    return tmp_path


def spoil(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match="cannot load the model") as error:
        lxt.load(folder, device="cpu")
    assert not (folder / "was_run").exists()
    return str(error.value)


def test_a_type_that_transformers_does_not_have(folder):
    spoil(folder, model_type="llama_of_tomorrow", architectures=["TomorrowForCausalLM"])
    said = refusal(folder)
    assert "the type 'llama_of_tomorrow' of its config.json isn't in transformers" in said
    assert "pip install -U transformers" in said
    assert "lxt.load(model, tokenizer)" in said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_attention_heads": 5, "head_dim": None}, r"32\) is not a multiple of the number of attention heads \(5"),
        ({"hidden_size": "big"}, "'hidden_size' expected int, got str"),
        ({"hidden_act": "swoosh"}, "swoosh"),
        ({"hidden_size": 64}, "mismatched_sizes"),
    ],
)
def test_a_configuration_that_cannot_be_built(folder, changes, reason):
    spoil(folder, **changes)
    said = refusal(folder)
    assert "\n" not in said
    assert "the folder's files don't make one" in said
    assert "Check its config.json" in said
    with pytest.raises(ValueError, match=reason):
        lxt.load(folder)


def test_a_configuration_that_cannot_be_read(folder):
    (folder / "config.json").write_text('{"model_type": ')
    assert "is not a valid JSON file" in refusal(folder)


def test_a_folder_that_lacks_its_weights(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert "no file named model.safetensors" in refusal(folder)


def test_a_model_with_code_of_its_own_is_not_run(folder):
    spoil(folder, model_type="mine", auto_map=CUSTOM)
    said = refusal(folder)
    assert "comes with code of its own, which lxt never runs" in said
    assert "load the model yourself with trust_remote_code=True and pass the instances" in said


def test_a_type_that_transformers_has_is_never_taken_from_a_models_own_code(folder):
    spoil(folder, auto_map=CUSTOM)
    explainer = lxt.load(folder, device="cpu")
    assert type(explainer.model).__module__.startswith("transformers.")
    assert not (folder / "was_run").exists()


def _with_an_unknown_operation(module, args, output):
    return torch.erfinv(output / (1 + output.detach().abs().max()))


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_an_operation_without_a_rule_leaves_the_model_as_it_was(rules):
    model = build("llama")
    expected = relevance(model)
    handle = model.model.layers[1].mlp.register_forward_hook(_with_an_unknown_operation)
    before = state(model)
    with (
        lxt.monkey_patch(model, rules),
        pytest.raises(lxt.UnknownOperation, match=r"'erfinv' in LlamaMLP"),
    ):
        model(**inputs_of("llama"))
    assert state(model) == before
    handle.remove()
    assert torch.equal(relevance(model), expected)


def test_an_operation_without_a_rule_leaves_an_attributors_model_as_it_was():
    model = llama()
    explainer = lxt.load(model, a_tokenizer(), device="cpu")
    expected = explainer.attribute("My cats").relevance
    handle = model.model.layers[1].mlp.register_forward_hook(_with_an_unknown_operation)
    before = state(model)
    with pytest.raises(lxt.UnknownOperation, match=r'lxt.declare\("erfinv", "linear"\)'):
        explainer.attribute("My cats")
    assert state(model) == before
    handle.remove()
    assert torch.equal(explainer.attribute("My cats").relevance, expected)
