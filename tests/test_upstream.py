"""Programs written for lxt 2.1 run unchanged: its import paths, its calls, and its relevance."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models import HIDDEN, TOKENS, build, skip_unless_it_runs
from torch import nn
from torch.nn import functional as F
from transformers.models.bert import modeling_bert
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

import lxt
from lxt.composites import ATTN_LRP, CP_LRP
from lxt.efficient import models as upstream
from lxt.efficient import monkey_patch, monkey_patch_zennit
from lxt.efficient.rules import divide_gradient, identity_rule_implicit, stop_gradient

MODULES = {
    "llama": (modeling_llama, modeling_llama.LlamaForCausalLM),
    "qwen2": (modeling_qwen2, modeling_qwen2.Qwen2ForCausalLM),
    "qwen3": (modeling_qwen3, modeling_qwen3.Qwen3ForCausalLM),
    "qwen3_moe": (modeling_qwen3_moe, modeling_qwen3_moe.Qwen3MoeForCausalLM),
    "gemma3": (modeling_gemma3, modeling_gemma3.Gemma3ForCausalLM),
    "gpt2": (modeling_gpt2, modeling_gpt2.GPT2LMHeadModel),
}
IDS = torch.tensor([[1, 17, 4, 42, 9, 33, 5]])


def program(name, path, *, patch_map=None, checkpointing=False, hooks=False):
    """The quickstart: patch the module, load, freeze, embed, forward, one backward, gradient * input."""
    module, cls = MODULES[name]
    handle = monkey_patch(module, patch_map, verbose=True)
    try:
        model = cls.from_pretrained(path)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable()
        for param in model.parameters():
            param.requires_grad = False
        layers = model.transformer.h if name == "gpt2" else model.model.layers

        def hook_hidden_activation(module, input, output):
            module.output = output[0] if isinstance(output, tuple) else output
            if module.output.requires_grad:
                module.output.retain_grad()

        for layer in layers if hooks else ():
            layer.register_forward_hook(hook_hidden_activation)
        input_embeds = model.get_input_embeddings()(IDS)
        output_logits = model(inputs_embeds=input_embeds.requires_grad_(), use_cache=False).logits
        max_logits, _ = torch.max(output_logits[0, -1, :], dim=-1)
        max_logits.backward()
        relevance = (input_embeds.grad * input_embeds).float().sum(-1).detach().cpu()
        trace = [(layer.output * layer.output.grad).float().sum(-1).detach().cpu() for layer in layers if hooks]
        return relevance, trace
    finally:
        handle.remove()


def by_instance(name, path, rules="attnlrp"):
    """The same relevance through lxt's own entry, on a model instance."""
    model = MODULES[name][1].from_pretrained(path)
    with lxt.monkey_patch(model, rules=rules):
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].max().backward()
    return (embeddings.grad * embeddings).sum(-1).detach()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function name -> folder of the saved tiny model."""
    folders = {}

    def save(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            build(name, dtype=torch.float32).save_pretrained(folders[name])
        if name == "qwen3_moe":
            skip_unless_it_runs(lambda: MODULES[name][1].from_pretrained(folders[name])(IDS))
        return folders[name]

    return save


@pytest.mark.parametrize("name", MODULES)
def test_quickstart_equals_the_instance_patch(name, saved, capsys):
    relevance, _ = program(name, saved(name))
    assert relevance.shape == IDS.shape
    assert torch.equal(relevance, by_instance(name, saved(name)))
    assert "ForCausalLM" in capsys.readouterr().out or name == "gpt2"


@pytest.mark.parametrize("name", MODULES)
def test_cp_map_in_second_position(name, saved):
    relevance, _ = program(name, saved(name), patch_map=getattr(upstream, name).cp_LRP)
    assert torch.equal(relevance, by_instance(name, saved(name), "cp"))
    assert not torch.allclose(relevance, by_instance(name, saved(name), "attnlrp"), rtol=0.01)


@pytest.mark.parametrize("name", MODULES)
def test_latent_hooks_and_checkpointing_in_train_mode(name, saved):
    plain, plain_trace = program(name, saved(name), hooks=True)
    checkpointed, trace = program(name, saved(name), checkpointing=True, hooks=True)
    assert torch.equal(plain, checkpointed)
    assert len(trace) == 2
    for ours, reference in zip(trace, plain_trace, strict=True):
        assert torch.equal(ours, reference)


def test_residual_relevance_is_conserved_under_cp(saved):
    # No biases in Llama, so every layer's trace sums to the logit; float32 sums of 224 terms over two layers.
    relevance, trace = program("llama", saved("llama"), patch_map=upstream.llama.cp_LRP, hooks=True)
    model = MODULES["llama"][1].from_pretrained(saved("llama"))
    with torch.no_grad():
        logit = model(IDS).logits[0, -1].max()
    scale = relevance.abs().sum()
    for layer in (relevance, *trace):
        assert abs(layer.sum() - logit) < 100 * torch.finfo(torch.float32).eps * scale


def test_loading_before_patching_is_the_same(saved):
    model = MODULES["llama"][1].from_pretrained(saved("llama"))
    with monkey_patch(modeling_llama):
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits[0, -1].max().backward()
    relevance, _ = program("llama", saved("llama"))
    assert torch.equal((embeddings.grad * embeddings).sum(-1), relevance)


def test_contrast_by_an_initial_gradient(saved):
    with monkey_patch(modeling_gpt2):
        model = MODULES["gpt2"][1].from_pretrained(saved("gpt2"), attn_implementation="eager")
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        mask = torch.ones_like(logits[0, -1]) * -1 / logits.size(-1)
        mask[logits[0, -1].argmax()] = 1
        logits[0, -1].backward(mask, retain_graph=True)
        by_mask, embeddings.grad = embeddings.grad, None
        (logits[0, -1] * mask).sum().backward()
    assert torch.equal(by_mask, embeddings.grad)


def test_contrast_of_two_logits_is_the_difference_of_their_relevance(saved):
    with monkey_patch(modeling_qwen2):
        model = MODULES["qwen2"][1].from_pretrained(saved("qwen2"))
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits[0, -1]
        both, first, second = (
            torch.autograd.grad(target, embeddings, retain_graph=True)[0]
            for target in (logits[3] - logits[8], logits[3], logits[8])
        )
    torch.testing.assert_close(
        both, first - second, rtol=0, atol=50 * torch.finfo(torch.float32).eps * first.abs().max()
    )


def test_bert_classifier(tmp_path):
    build("bert", dtype=torch.float32).save_pretrained(tmp_path)
    with monkey_patch(modeling_bert, verbose=True):
        model = modeling_bert.BertForSequenceClassification.from_pretrained(tmp_path)
        for param in model.parameters():
            param.requires_grad = False
        inputs_embeds = model.bert.get_input_embeddings()(IDS)
        logits = model(inputs_embeds=inputs_embeds.requires_grad_(True)).logits
        max_logits, max_indices = torch.max(logits, dim=-1)
        assert model.config.id2label[max_indices.item()].startswith("LABEL_")
        max_logits.backward()
    relevance = (inputs_embeds * inputs_embeds.grad).float().sum(-1).detach().cpu()[0]
    with lxt.monkey_patch(model):
        again = inputs_embeds.detach().requires_grad_()
        model(inputs_embeds=again).logits[0, max_indices.item()].backward()
    assert relevance.shape == (TOKENS,)
    assert torch.equal(relevance, (again * again.grad).sum(-1).detach()[0])


@pytest.mark.parametrize("name", [*MODULES, "bert"])
def test_maps_carry_their_rules(name):
    family = getattr(upstream, name)
    module = modeling_bert if name == "bert" else MODULES[name][0]
    assert family.attnLRP.rules == ATTN_LRP
    assert family.cp_LRP.rules == CP_LRP
    assert upstream.get_default_map(module) is family.attnLRP
    with monkey_patch(module, patch_map=family.cp_LRP) as handle:
        assert handle.rules == CP_LRP
    with lxt.monkey_patch(module, rules="cp", patch_map=family.cp_LRP) as handle:
        assert handle.rules == CP_LRP
    with pytest.raises(ValueError, match=r"made for the rules 'attnlrp', but rules='cp'"):
        lxt.monkey_patch(module, rules="cp", patch_map=family.attnLRP)


def test_what_upstream_has_no_map_for():
    with pytest.raises(ValueError, match=r"no patch map of upstream's for 'torch'.*llama.*lxt.monkey_patch"):
        upstream.get_default_map(torch)
    with pytest.raises(TypeError, match=r"patch_map must be an lxt\.PatchMap, got dict"):
        monkey_patch(modeling_llama, {})
    with pytest.raises(NotImplementedError, match=r"rules=lxt.Composite\(linear=lxt.Gamma\(0.25\)\)"):
        monkey_patch_zennit(verbose=True)


def test_edited_model_equals_the_patched_one():
    # The three rules in a hand-written gated MLP, against the operator mode on the same MLP written plainly.
    torch.manual_seed(0)
    gate, up, down = nn.Linear(HIDDEN, 40), nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList((gate, up, down))  # what is not a module's own counts as an activation

        def forward(self, x):
            x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6)
            return down(F.silu(gate(x)) * up(x))

    def edited(x):
        x = (x - x.mean(-1, keepdim=True)) / stop_gradient(torch.sqrt(x.var(-1, keepdim=True) + 1e-6))
        return down(divide_gradient(identity_rule_implicit(F.silu, gate(x)) * up(x), 2))

    x = torch.randn(3, HIDDEN, requires_grad=True)
    model = Plain()
    with lxt.monkey_patch(model):
        y = model(x)
    assert torch.equal(y, edited(x))
    (patched,) = torch.autograd.grad(y[0, 3], x)
    (by_hand,) = torch.autograd.grad(edited(x)[0, 3], x)
    torch.testing.assert_close(by_hand, patched, rtol=1e-5, atol=1e-6 * patched.abs().max().item())


def _smooth(x):
    return x * torch.atan(x + 1)


FUNCTIONS = {
    "silu": (F.silu, 0.5),
    "gelu": (F.gelu, 0.5),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), 0.5),
    "tanh": (torch.tanh, 1.0),
    "relu": (F.relu, None),
    "SiLU": (nn.SiLU(), 0.5),
    "GELU": (nn.GELU(), 0.5),
    "ReLU": (nn.ReLU(inplace=True), None),
    "SiLU in place": (nn.SiLU(inplace=True), 0.5),
    "leaky": (partial(F.leaky_relu, negative_slope=0.2), None),
    "prelu": (nn.PReLU(), None),
    "lambda": (lambda x: x * torch.sigmoid(1.5 * x), 0.5),
    "smooth": (_smooth, torch.pi / 4),
    "cube": (lambda x: x**3, 0.0),
}
TINY = (0.0, -0.0, 1e-10, -1e-10, 1e-40, -1e-40, 6e-8, -6e-8, 1e-45, -1e-45, 5e-324, -5e-324)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_identity_rule_near_zero(name, dtype):
    function, limit = FUNCTIONS[name]
    function = nn.PReLU(dtype=dtype) if name == "prelu" else function
    x = torch.tensor(TINY, dtype=torch.float64).to(dtype).requires_grad_()
    before = x.detach().clone()
    y = identity_rule_implicit(function, x)
    assert torch.equal(y, function(x.detach().clone()))
    y.sum().backward()
    assert torch.equal(x, before), "the input was written to"
    assert torch.isfinite(x.grad).all()
    if limit is not None:  # the largest |x| is 6e-8, which moves f(x) / x by less than that
        torch.testing.assert_close(
            x.grad.double(), torch.full_like(x.grad.double(), limit), rtol=0, atol=1e-7 + torch.finfo(dtype).eps
        )
    else:  # piecewise linear: the slope of the side, at 0 that of either
        slope = {"leaky": 0.2, "prelu": 0.25}.get(name, 0.0)
        inside = before != 0
        expected = torch.where(before > 0, 1.0, torch.tensor(slope, dtype=dtype))
        torch.testing.assert_close(x.grad[inside], expected[inside].to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_identity_rule_keeps_relevance(name):
    function, _ = FUNCTIONS[name]
    x = torch.linspace(-6, 6, 200, dtype=torch.float64, requires_grad=True)
    function = nn.PReLU(dtype=torch.float64) if name == "prelu" else function
    y = identity_rule_implicit(function, x)
    y.sum().backward()
    torch.testing.assert_close(x * x.grad, function(x.detach().clone()), rtol=1e-13, atol=1e-15)


def test_identity_rule_refuses_a_gate():
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"f\(0\) = 0, got 'sigmoid' with f\(0\) = 0.5.*stop_gradient"):
        identity_rule_implicit(torch.sigmoid, x)


def test_a_users_gelu_is_not_torchs():
    def gelu(x):
        return 2 * x

    x = torch.tensor([3.0], requires_grad=True)
    identity_rule_implicit(gelu, x).backward()
    assert x.grad.item() == 2


def test_divide_and_stop():
    x = torch.randn(5, requires_grad=True)
    assert torch.equal(divide_gradient(x), x)
    assert torch.equal(torch.autograd.grad(divide_gradient(x).sum(), x)[0], torch.full((5,), 0.5))
    assert torch.equal(torch.autograd.grad(divide_gradient(x, 4).sum(), x)[0], torch.full((5,), 0.25))
    assert not stop_gradient(x).requires_grad
    with pytest.raises(ValueError, match="other than 0"):
        divide_gradient(x, 0)
