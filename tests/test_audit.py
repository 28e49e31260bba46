"""The auditor on whole models, and its promises to the caller.

The models compute norms, softmax and routers in float32 whatever their own dtype, and a norm rounded to float32 leaks
1e-8 of relevance. To ask for 1e-9, `exact` makes float32 mean float64 while a model runs; the arithmetic that is
audited then is float64 throughout, and what remains is rounding: 1e-9 is about 1e7 units of the last place, far above
what a few hundred operations accumulate (1e-14 as measured) and far below any rule's effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import skipping_what_transformers_lacks
from torch import Tensor, nn

from lxt.audit import Audit, audit, conservation
from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT, Gamma

VALUE_ONLY = ATTN_LRP.but(attention="value_only", name="value only")
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GEMMA2 = {"sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_VIT = {"image_size": 8, "patch_size": 4, "num_labels": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bert": ("BertForSequenceClassification", _COMMON),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5 v1.1": ("T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "vit": ("ViTForImageClassification", {k: v for k, v in _COMMON.items() if k.endswith(("size", "layers"))} | _VIT),
    "gemma2": ("Gemma2ForCausalLM", _GROUPED | _GEMMA2),
    "gpt_neox": ("GPTNeoXForCausalLM", _COMMON),
    "opt": ("OPTForCausalLM", _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi3": ("Phi3ForCausalLM", {k: v for k, v in _GROUPED.items() if k != "head_dim"}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _GROUPED | _MOE),
}
CASES = [(name, kernel) for name in MODELS for kernel in ("eager", "sdpa") if (name, kernel) != ("gemma2", "sdpa")]
_ADDED = ("bias", "wpe", "position_embed", "embed_positions", "cls_token", "token_type")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def build(name: str, kernel: str) -> nn.Module:
    torch.manual_seed(0)
    class_name, settings = MODELS[name]
    model_class = getattr(transformers, class_name)
    if name == "vit":
        settings = {"num_attention_heads": 4, **{k: v for k, v in settings.items() if k != "vocab_size"}}
    config = model_class.config_class(**settings)
    config._attn_implementation = kernel
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    with skipping_what_transformers_lacks():
        model = model_class(config).double().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(part in path for part in _ADDED) and "relative" not in path:
                parameter.zero_()  # what is added, and not multiplied with an activation, would take relevance
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.3)  # initial weights are too small for nonlinearities to matter
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def given(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if name == "vit":
        return {"pixel_values": random(1, 3, 8, 8)}
    inputs = {"inputs_embeds": random(1, 7, 32)}
    return inputs | {"decoder_inputs_embeds": random(1, 3, 32)} if name.startswith("t5") else inputs


def best(output: Any) -> Tensor:
    return output.logits[0, -1].max() if output.logits.dim() == 3 else output.logits[0].max()


def run(name: str, kernel: str, rules: Any) -> Audit:
    inputs = given(name)
    return audit(build(name, kernel), inputs, best, rules, wrt=tuple(inputs))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("rules", [CP_LRP, VALUE_ONLY], ids=lambda rules: rules.name)
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_conserves_with_softmax_constant(name: str, kernel: str, rules: Any) -> None:
    found = run(name, kernel, rules)
    assert found.unknown == ()
    assert conservation(found.total, found.value) < 1e-9


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_the_gradient_composite_is_the_gradient(name: str, kernel: str) -> None:
    found, inputs = run(name, kernel, "gradient"), given(name)
    # torch picks its matrix kernels by whether the weights require grad, so the comparison freezes them too
    model = build(name, kernel).requires_grad_(False)
    leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
    value = best(model(**leaves))
    assert torch.equal(found.value, value)
    for key, gradient in zip(leaves, torch.autograd.grad(value, tuple(leaves.values())), strict=True):
        assert torch.equal(found.relevance[key], inputs[key] * gradient)
    assert conservation(found.total, found.value) > 1e-2  # the control: unpatched, relevance is not conserved


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("rules", [ATTN_LRP, CP_LRP, ATTN_LRP.but(qkv=(0.5, 0.5, 1.0))], ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma2"])
def test_eager_and_sdpa_agree(name: str, rules: Any) -> None:
    eager, fused = run(name, "eager", rules), run(name, "sdpa", rules)
    for key, relevance in eager.relevance.items():
        assert (relevance - fused.relevance[key]).norm() < 1e-9 * relevance.norm()


@pytest.mark.usefixtures("exact")
def test_attention_agrees_where_the_queries_are_constants() -> None:
    found = {}
    for kernel in ("eager", "sdpa"):
        found[kernel] = audit(build("t5", kernel), given("t5"), best, "attnlrp", wrt="inputs_embeds").relevance
    eager, fused = (relevance["inputs_embeds"] for relevance in found.values())
    assert (eager - fused).norm() < 1e-9 * eager.norm()


@pytest.mark.usefixtures("exact")
def test_composites_differ_where_they_should() -> None:
    attnlrp, cp, value_only = (run("qwen3_moe", "eager", rules) for rules in (ATTN_LRP, CP_LRP, VALUE_ONLY))
    assert conservation(attnlrp.total, attnlrp.value) > 1e-2  # what goes through the softmax isn't conserved
    for one, other in ((attnlrp, cp), (attnlrp, value_only), (cp, value_only)):
        difference = one.relevance["inputs_embeds"] - other.relevance["inputs_embeds"]
        assert difference.norm() > 1e-2 * one.relevance["inputs_embeds"].norm()
    # 2 layers, 2 products an attention; the 5 routed experts' gates and 5 routing weights are shared, or stopped
    assert attnlrp.nodes["attention"] == 4
    assert attnlrp.nodes["softmax"] == 4
    assert attnlrp.nodes["identity"] * 2 == attnlrp.nodes["uniform"]
    assert cp.nodes["gate"] > value_only.nodes["gate"] > attnlrp.nodes["gate"]


class Small(nn.Module):
    """Enough of a model to see what is done to it."""

    def __init__(self, operation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.dropout = nn.Dropout(0.9)
        self.operation = operation
        self.seen: list[tuple[bool, bool]] = []
        self.graph: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.linear.weight.requires_grad, self.dropout.training))
        hidden = self.dropout(self.linear(x))
        output = self.frozen(self.operation(hidden))
        self.graph = (x, output)
        return output


def state(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()] + [module.training for module in model.modules()]


def test_the_model_is_left_as_it_was() -> None:
    model = Small().train()
    model.frozen.eval()
    before, x = state(model), torch.randn(1, 3)
    audit(model, {"x": x}, torch.sum, wrt="x")
    assert model.seen == [(False, False)]
    assert state(model) == before
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():  # a caller's context doesn't matter
        assert audit(model, {"x": x}, torch.sum, wrt="x").relevance["x"].shape == x.shape
    x, output = model.graph  # a hook that stays would keep the graph alive, and still be there
    (gradient,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(model.eval()(x).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_the_model_is_left_as_it_was_after_an_exception() -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("inside the forward")

    model = Small(broken).train()
    before = state(model)
    with pytest.raises(RuntimeError, match="inside the forward"):
        audit(model, {"x": torch.randn(1, 3)}, torch.sum, wrt="x")
    assert state(model) == before
    model = Small().train()
    with pytest.raises(ValueError, match="one number"):
        audit(model, {"x": torch.randn(1, 3)}, lambda output: output, wrt="x")
    assert state(model) == before


class Cube(torch.autograd.Function):
    """An operation whose backward torch doesn't know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize(
    ("operation", "name"), [(Cube.apply, "CubeBackward"), (torch.lgamma, "LgammaBackward0"), (torch.sinc, "Sinc")]
)
def test_unknown_operations_are_reported_and_differentiated(operation: Callable, name: str) -> None:
    model = Small(operation).double()
    x = torch.rand(1, 3, dtype=torch.float64, requires_grad=True)
    found = audit(model, {"x": x}, torch.sum, wrt="x")
    assert [reported.startswith(name) for reported in found.unknown] == [True]
    assert found.nodes["unknown"] == 1
    (gradient,) = torch.autograd.grad(model.eval()(x).sum(), x)
    torch.testing.assert_close(found.relevance["x"], x.detach() * gradient)


def test_what_the_target_computes_is_not_the_model() -> None:
    model, x = nn.Linear(3, 4).double(), torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    found = audit(model, {"input": x}, lambda logits: logits.log_softmax(-1)[0, 1], CP_LRP, wrt="input")
    (gradient,) = torch.autograd.grad(model(x).log_softmax(-1)[0, 1], x)
    torch.testing.assert_close(found.relevance["input"], x.detach() * gradient)
    assert set(found.nodes) == {"linear"}


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize("wrap", [Output, lambda logits: {"logits": (logits,)}, lambda logits: [logits]])
def test_the_model_is_found_behind_its_output(wrap: Callable) -> None:
    model = nn.Sequential(nn.Tanh(), nn.Module())
    model[1].forward = wrap
    values: list[Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, output: values.append(output))
    found = audit(model, {"input": torch.tensor([2.0])}, lambda output: values[-1].sum(), wrt="input")
    assert found.nodes["identity"] == 1
    model[1].forward = lambda logits: SimpleNamespace(logits=logits)
    with pytest.raises(ValueError, match="a SimpleNamespace"):
        audit(model, {"input": torch.tensor([2.0])}, lambda output: output.logits.sum(), wrt="input")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"wrt": "inputs_embeds"}, ValueError, "not among the inputs; they are: x"),
        ({"wrt": ()}, ValueError, "not among the inputs"),
        ({"target": lambda output: output}, ValueError, r"got shape \(1, 3\)"),
        ({"target": lambda output: output.detach().sum()}, ValueError, "a constant"),
        ({"target": lambda output: 1.0}, ValueError, "got float"),
        ({"rules": "lrp"}, ValueError, "allowed: attnlrp"),
        ({"rules": ATTN_LRP.but(linear=Gamma(0.25))}, ValueError, r"Epsilon\(0\) only"),
        ({"rules": ATTN_LRP.but(convolution=Gamma(0.25))}, ValueError, r"only, got Gamma\(gamma=0.25\)"),
        ({"inputs": {"x": torch.ones(1, 3, dtype=torch.long)}}, TypeError, "torch.int64"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual: dict[str, Any] = {"inputs": {"x": torch.randn(1, 3)}, "target": torch.sum, "wrt": "x"}
    with pytest.raises(error, match=message):
        audit(Small(), **(usual | arguments))


@pytest.mark.usefixtures("exact")
def test_a_temperature_needs_the_softmax_in_the_graph() -> None:
    rules = ATTN_LRP.but(softmax_temperature=2.0)
    assert run("llama", "eager", rules).nodes["softmax"] == 2
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        run("gpt2", "sdpa", rules)  # not llama: an older torch writes out attention of grouped heads


def test_an_audit_adds_up() -> None:
    found = audit(Small(), {"x": torch.randn(1, 3)}, torch.sum, GRADIENT, wrt="x")
    assert found.total == found.relevance["x"].sum()
    assert found.rules is GRADIENT
    assert conservation(3.0, 2.0) == 0.5
    assert conservation(0.25, 0.0) == 0.25
