"""The three independent answers agree: the operator mode, the auditor's graph hooks, the papers' equations."""

from __future__ import annotations

import pytest
import torch
from equations import Float64, gpt2_relevance, llama_relevance
from models import EXAMPLES, TOKENS, build, inputs_of
from torch import Tensor, nn

import lxt
from lxt.audit import audit
from lxt.composites import Composite
from lxt.patches import patch_map_for
from lxt.patchmap import PatchMap

VALUE_ONLY = lxt.ATTN_LRP.but(attention="value_only")
CONSERVING = {"cp": lxt.CP_LRP, "attnlrp, softmax stopped": VALUE_ONLY}
COMPOSITES = CONSERVING | {
    "attnlrp": lxt.ATTN_LRP,
    "gradient": lxt.GRADIENT,
    "router stopped": lxt.ATTN_LRP.but(router="stop"),
    "qkv": lxt.ATTN_LRP.but(qkv=(0.5, 0.5, 1.0)),
    "relp": lxt.ATTN_LRP.but(attention="gradient"),
    "activation gradient": lxt.ATTN_LRP.but(activation="gradient"),
}
MODELS = [
    (name, attention) for name in EXAMPLES for attention in ("eager", "sdpa") if (name, attention) != ("gemma2", "sdpa")
]
TOLERANCE = 1e-9  # float64 throughout; measured differences are below 1e-14 of the largest relevance

over_models = pytest.mark.parametrize(("name", "attention"), MODELS)
over_composites = pytest.mark.parametrize("rules", COMPOSITES.values(), ids=COMPOSITES.keys())


def relevance(
    name: str, model: nn.Module, rules: Composite, patch_map: PatchMap | None = None
) -> tuple[dict[str, Tensor], float]:
    inputs = inputs_of(name)
    with Float64(), lxt.monkey_patch(model, rules, patch_map):
        logits = model(**inputs).logits
    value = EXAMPLES[name].logit(logits)
    value.backward()
    return {key: (x * x.grad).detach() for key, x in inputs.items()}, value.item()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(x.abs().max().item() for x in expected.values())
    for key, x in expected.items():
        torch.testing.assert_close(found[key], x, rtol=0, atol=TOLERANCE * largest)


@over_models
@pytest.mark.parametrize("rules", CONSERVING.values(), ids=CONSERVING.keys())
def test_relevance_sums_to_the_logit_at_the_input_and_at_every_layer(
    name: str, attention: str, rules: Composite
) -> None:
    model = build(name, attention, zero_biases=True)
    classes = patch_map_for(model).layers
    streams: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        streams.append(output if isinstance(output, Tensor) else output[0])
        streams[-1].retain_grad()

    hooks = [module.register_forward_hook(keep) for module in model.modules() if type(module).__name__ in classes]
    found, value = relevance(name, model, rules)
    for hook in hooks:
        hook.remove()

    assert sum(x.sum().item() for x in found.values()) == pytest.approx(value, rel=TOLERANCE)
    per_layer = [(x * x.grad).sum().item() for x in streams]
    assert len(per_layer) == len(hooks) >= 2
    # An encoder-decoder's streams run beside each other: its decoder layers only see a part each.
    sums = per_layer if name != "t5" else [per_layer[-1]]
    for total in sums:
        assert total == pytest.approx(value, rel=TOLERANCE)


@over_models
def test_nothing_conserves_unpatched(name: str, attention: str) -> None:
    model = build(name, attention, zero_biases=True)
    found, value = relevance(name, model, lxt.GRADIENT)
    assert abs(sum(x.sum().item() for x in found.values()) / value - 1) > 0.05


@over_models
@over_composites
def test_the_auditor_agrees(name: str, attention: str, rules: Composite) -> None:
    model = build(name, attention)
    found, value = relevance(name, model, rules)
    inputs = {key: x.detach() for key, x in inputs_of(name).items()}
    with Float64():
        checked = audit(model, inputs, lambda output: EXAMPLES[name].logit(output.logits), rules, wrt=tuple(inputs))
    assert checked.unknown == ()
    assert checked.value.item() == pytest.approx(value, rel=1e-12)
    assert_close(found, checked.relevance)


@over_models
@over_composites
def test_fused_forwards_change_nothing(name: str, attention: str, rules: Composite) -> None:
    if rules.norm == "gradient" or rules.activation == "gradient":
        pytest.skip("the mode alone can't tell which operations make up a norm or an activation")
    model = build(name, attention)
    fused, _ = relevance(name, model, rules)
    mode_alone, _ = relevance(name, model, rules, PatchMap())
    assert_close(mode_alone, fused)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "equations"), [("llama", llama_relevance), ("gpt2", gpt2_relevance)])
@pytest.mark.parametrize(
    "rules",
    [lxt.ATTN_LRP, lxt.CP_LRP, VALUE_ONLY, COMPOSITES["qkv"], lxt.ATTN_LRP.but(softmax_temperature=2.0)],
    ids=["attnlrp", "cp", "attnlrp, softmax stopped", "qkv", "temperature"],
)
def test_the_papers_equations_agree(name: str, equations, attention: str, rules: Composite) -> None:
    model = build(name, attention)
    found, value = relevance(name, model, rules)
    embeds = inputs_of(name)["inputs_embeds"].detach()[0].numpy()
    expected = equations(model.state_dict(), model.config, embeds, TOKENS - 1, 5, rules)
    assert value == pytest.approx(expected.logit, rel=1e-12)
    assert_close(found, {"inputs_embeds": torch.from_numpy(expected.input)[None]})


def test_attnlrp_and_cp_differ_where_the_theory_says() -> None:
    """Without attention's softmax path the two differ by the gate alone; GPT-2 has none."""
    llama, gpt2 = build("llama", zero_biases=True), build("gpt2", zero_biases=True)
    with_gate, _ = relevance("llama", llama, VALUE_ONLY)
    without, _ = relevance("llama", llama, lxt.CP_LRP)
    assert (with_gate["inputs_embeds"] - without["inputs_embeds"]).abs().max() > 1e-2
    assert_close(relevance("gpt2", gpt2, lxt.CP_LRP)[0], relevance("gpt2", gpt2, VALUE_ONLY)[0])
