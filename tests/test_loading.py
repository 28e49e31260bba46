"""load(): by name, folder or instance; what is missing is named."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lxt
from lxt.attributor import load

TEXT = "I have 5 cats and 3 dogs. My cats love to play with my"
VOCABULARY, HEADS, LAYERS = 300, 4, 3


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "[MASK]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT + " dogs"] * 4,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", mask_token="[MASK]")


def llama(cls=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that the layers do something
        **{"bos_token_id": 0, "eos_token_id": 1, **options},
    )
    return cls(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


def bert(cls, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        initializer_range=0.2,
        **options,
    )
    return cls(config).eval()


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
