"""load(): by name, folder or instance; what is missing is named."""

import copy

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from small import a_tokenizer, bert, gpt2, llama
from transformers import (
    BertForSequenceClassification,
)

import lxt
from lxt.opening import load


@pytest.fixture(scope="module")
def tokenizer():
    return a_tokenizer()


def test_load_an_instance_keeps_it(tokenizer):
    model = llama()
    explainer = load(model, tokenizer, rules="cp")
    assert explainer.model is model
    assert explainer.rules is lxt.CP_LRP
    assert load(copy.deepcopy(model), dtype="float64").model.dtype == torch.float64


def test_load_a_folder_with_its_head(tmp_path, tokenizer):
    for model in (llama(), bert(BertForSequenceClassification), gpt2()):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        explainer = load(folder, device="cpu", dtype=torch.bfloat16)
        assert type(explainer.model) is type(model)
        assert explainer.model.dtype == torch.bfloat16
        assert not explainer.model.training
        assert explainer.attribute("My cats").relevance.shape[0] == 1


def test_load_names_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no model at '/no/such/folder': there is no such folder"):
        load("/no/such/folder")
    with pytest.raises(ValueError, match="cannot load the model"):
        load(tmp_path)
    with pytest.raises(ValueError, match="unknown dtype 'float31'; allowed: float32"):
        load(llama(), dtype="float31")
    with pytest.raises(ValueError, match="unknown rules 'lrp'"):
        load("/no/such/folder", rules="lrp")
    with pytest.raises(TypeError, match="a name, a folder or a model instance, got int"):
        load(3)
    llama().model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="is a LlamaModel, which has no head"):
        load(tmp_path / "headless")

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect\nto anything")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"cannot load the model 'nobody/nothing': .* connect\); check the name"):
        load("nobody/nothing")


def test_the_hub_is_asked_once_for_what_is_not_in_the_cache(tmp_path, monkeypatch):
    # from_pretrained by itself asks six times, 23 seconds in all.
    asked, fetched = [], []

    def unreachable(url, **options):
        asked.append(url)
        raise ConnectionError("no network")

    def fetch(name, **options):
        fetched.append(name)
        raise OSError("no such model")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fetch)
    with pytest.raises(ValueError, match=r"'tinyy': did you mean \"tiny\"\? It is neither .* \(no network\)"):
        load("tinyy")
    assert (len(asked), fetched) == (1, [])

    def answers(url, **options):
        # Its __init__ wants a response, which is of another package in each version.
        raise HfHubHTTPError.__new__(HfHubHTTPError)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answers)
    with pytest.raises(ValueError, match="no such model"):
        load("nobody/nothing")
    assert fetched == ["nobody/nothing"]  # which knows what the answer means
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    (tmp_path / "models--nobody--something").mkdir()
    with pytest.raises(ValueError, match="no such model"):
        load("nobody/something")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no such model"):
        load("tinyy")
    assert len(asked) == 1


def test_checkpoints_are_chosen_when_loading():
    assert load(llama(), checkpoint="nested").checkpoint == "nested"
    assert load("tiny", checkpoint="layer", memory="64GiB").checkpoint == "layer"
    assert load("tiny", memory="64GiB").checkpoint == "auto"
    with pytest.raises(ValueError, match="unknown checkpoint 'some'; allowed: off, layer, nested, auto"):
        load("/no/such/folder", checkpoint="some")
