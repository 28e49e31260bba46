"""Adapters: the rules see through peft's wrappers, and an adapter has the relevance that its merged weights have."""

import copy

import pytest
import torch
from models import build
from small import assert_close, bert, by_hand, llama
from torch import nn
from transformers import BertForSequenceClassification

import lxt

IDS = [0, 5, 6, 7, 8, 40, 41, 42]
VALUE_ONLY = lxt.ATTN_LRP.but(attention="value_only")
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]
MERGEABLE = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": LINEARS, "lora_dropout": 0.3}),
    "lora on embeddings": ("LoraConfig", {"r": 4, "target_modules": [*LINEARS, "embed_tokens"]}),
    "lora and a head": ("LoraConfig", {"r": 4, "target_modules": LINEARS, "modules_to_save": ["lm_head"]}),
    "dora": ("LoraConfig", {"r": 4, "target_modules": LINEARS, "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", {"r": 4, "target_modules": LINEARS}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": LINEARS}),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
}


def score(logits):
    return logits[0, -1, 7]


def adapted(config, model=None, **options) -> nn.Module:
    """The small llama under an adapter, all of whose weights are random and trainable."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = peft.get_peft_model(model or llama(), getattr(peft, config)(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def value(model):
    with torch.no_grad():
        return float(score(model(input_ids=torch.tensor([IDS])).logits))


@pytest.mark.parametrize("name", MERGEABLE)
def test_an_adapter_is_what_its_merged_weights_are(name):
    config, options = MERGEABLE[name]
    model = adapted(config, **options)
    merged = copy.deepcopy(model).merge_and_unload()
    for rules in ("attnlrp", "cp"):
        found = by_hand(model, IDS, score, rules)
        assert_close(found, by_hand(merged, IDS, score, rules), 1e-5)  # merging rounds the weights anew
        assert (found - by_hand(llama(), IDS, score, rules)).norm() > 0.01 * found.norm()
    for rules in ("cp", VALUE_ONLY):
        assert float(by_hand(model, IDS, score, rules).sum()) == pytest.approx(value(model), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_mode_drops_nothing():
    model = adapted(*MERGEABLE["lora"][:1], **MERGEABLE["lora"][1])
    expected = by_hand(model, IDS, score)
    assert torch.equal(by_hand(model.train(), IDS, score), expected)
    assert model.training


def test_the_wrapper_the_model_inside_and_the_adapter_switched_off():
    model = adapted(*MERGEABLE["lora"][:1], **MERGEABLE["lora"][1])
    expected = by_hand(model, IDS, score)
    assert torch.equal(by_hand(model.base_model.model, IDS, score), expected)
    with model.disable_adapter():
        assert torch.equal(by_hand(model, IDS, score), by_hand(llama(), IDS, score))
    out = lxt.load(model).attribute([IDS], target=7, latents=("residual", "neuron"))
    assert_close(out.relevance[0], expected, 1e-5)
    assert out.check().ok


def test_several_adapters_are_one_sum():
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = adapted("LoraConfig", r=4, target_modules=LINEARS)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    assert_close(by_hand(model, IDS, score, "cp"), by_hand(merged, IDS, score, "cp"), 1e-5)


def test_adapted_norms_behind_the_blocks_of_an_encoder():
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = bert(BertForSequenceClassification, num_labels=4)
    model = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["LayerNorm"])).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    merged = copy.deepcopy(model).merge_and_unload()
    for rules in ("attnlrp", "cp"):
        found = by_hand(model, IDS, lambda logits: logits[0, 1], rules)
        assert_close(found, by_hand(merged, IDS, lambda logits: logits[0, 1], rules), 1e-5)


def test_an_adapter_on_the_experts_of_a_mixture():
    model = adapted(
        "LoraConfig",
        build("qwen3_moe", dtype=torch.float32),
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(by_hand(model, IDS, score), by_hand(merged, IDS, score), 1e-5)


def test_an_adapter_on_four_bits():
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    base = llama()
    for layer in base.model.layers:
        shape = layer.self_attn.q_proj.in_features, layer.self_attn.q_proj.out_features
        quantised = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        weight = layer.self_attn.q_proj.weight.data.clone()
        quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        layer.self_attn.q_proj = quantised.to("cpu")
    model = adapted("LoraConfig", base, r=4, target_modules=LINEARS)
    embeds = base.get_input_embeddings()(torch.tensor([IDS])).detach().requires_grad_()
    expected = float(score(model(inputs_embeds=embeds).logits))
    assert float(by_hand(model, IDS, score, "cp").sum()) == pytest.approx(expected, rel=1e-4)


def test_virtual_tokens_take_a_share_and_are_left_to_monkey_patch():
    model = adapted("PromptTuningConfig", num_virtual_tokens=3)
    found = by_hand(model, IDS, score, "cp")
    prompt = model.get_prompt(1).detach()
    tokens = model.get_input_embeddings()(torch.tensor([IDS])).detach()
    embeds = torch.cat([prompt, tokens], 1).requires_grad_()
    base = llama()
    with lxt.monkey_patch(base, "cp"):
        score(base(inputs_embeds=embeds).logits).backward()
    assert_close(found, (embeds.grad * embeds.detach()).sum(-1)[0, 3:], 1e-5)
    with pytest.raises(ValueError, match=r"virtual tokens before the prompt \(PROMPT_TUNING\).*monkey_patch"):
        lxt.load(model).attribute([IDS])


def test_a_prefix_is_constant_keys_and_values():
    model = adapted("PrefixTuningConfig", num_virtual_tokens=3)
    out = lxt.load(model).attribute([IDS], target=7)
    assert_close(out.relevance[0], by_hand(model, IDS, score), 1e-5)


class LowRank(nn.Module):
    """LoRA as its paper has it, without peft: W x + B A x."""

    def __init__(self, linear):
        super().__init__()
        self.linear, out, into = linear, *linear.weight.shape
        self.a, self.b = nn.Linear(into, 3, bias=False), nn.Linear(3, out, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(x) + 0.5 * self.b(self.a(self.dropout(x)))


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_low_rank_without_peft(rules):
    torch.manual_seed(3)
    model, merged = llama(), llama()
    for layer, other in zip(model.model.layers, merged.model.layers, strict=True):
        layer.mlp.up_proj = low_rank = LowRank(layer.mlp.up_proj)
        other.mlp.up_proj.weight.data += 0.5 * (low_rank.b.weight @ low_rank.a.weight).detach()
    found = by_hand(model.train(), IDS, score, rules)
    assert_close(found, by_hand(merged, IDS, score, rules), 1e-5)
    if rules == "cp":
        assert float(found.sum()) == pytest.approx(value(merged), rel=1e-4)
