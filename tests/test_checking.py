"""The ledger balances to the last digit, and check() finds what is wrong when something is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from equations import Float64, gpt2_relevance
from models import EXAMPLES, TOKENS, build, inputs_of

import lxt
from lxt.attributor import Attributor
from lxt.checking import TOLERANCE
from lxt.ledger import Ledger
from lxt.patches import patch_map_for
from lxt.patching import patch_model

MODELS = [
    (name, attention) for name in EXAMPLES for attention in ("eager", "sdpa") if (name, attention) != ("gemma2", "sdpa")
]


def booked(name: str, attention: str, rules: lxt.Composite) -> tuple[dict[str, float], float, float]:
    model = build(name, attention)
    ledger, inputs = Ledger.of(model), inputs_of(name)
    in_the_open = replace(patch_map_for(model), forwards={})
    with Float64(), patch_model(model, rules, in_the_open, ledger.mode):
        logits = model(**inputs).logits
    value = EXAMPLES[name].logit(logits)
    value.backward()
    kinds: dict[str, float] = {}
    for (kind, path), amount in ledger.entries.items():
        model.get_submodule(path)  # every path is one
        kinds[kind] = kinds.get(kind, 0.0) + amount
    return kinds, value.item(), sum((x * x.grad).sum().item() for x in inputs.values())


@pytest.mark.parametrize(("name", "attention"), MODELS)
@pytest.mark.parametrize("rules", [lxt.ATTN_LRP, lxt.CP_LRP], ids=lambda rules: rules.name)
def test_what_is_missing_is_booked_to_the_last_digit(name: str, attention: str, rules: lxt.Composite) -> None:
    kinds, value, total = booked(name, attention, rules)
    assert sum(kinds.values()) == pytest.approx(value - total, abs=1e-12 * max(1.0, abs(value)))
    if rules is lxt.CP_LRP:
        assert kinds.get("softmax", 0.0) == pytest.approx(0, abs=1e-12)
    else:
        assert abs(kinds["softmax"]) > 1e-4


def test_the_equations_book_the_same() -> None:
    kinds, _, _ = booked("gpt2", "eager", lxt.ATTN_LRP)
    model = build("gpt2", "eager")
    embeds = inputs_of("gpt2")["inputs_embeds"].detach()[0].numpy()
    leaks = gpt2_relevance(model.state_dict(), model.config, embeds, TOKENS - 1, 5, lxt.ATTN_LRP).leaks
    assert kinds["softmax"] == pytest.approx(leaks["softmax"], rel=1e-9)
    assert kinds["bias"] == pytest.approx(leaks["linear"] + leaks["norm"], rel=1e-9)
    assert kinds["constant"] == pytest.approx(leaks["position"], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_a_right_attribution_passes(name: str, dtype: torch.dtype) -> None:
    explainer = Attributor(build(name, dtype=dtype))
    report = explainer.attribute([[5, 9, 11, 30], [7, 8]]).check()
    assert report.ok
    assert report.forward_equal
    assert report.unknown == ()
    assert report.audit_note == ""
    assert report.audit_difference is not None
    assert report.audit_difference < TOLERANCE[dtype] / 2
    assert "passed" in str(report)


def test_a_wrong_rule_is_found() -> None:
    """The gate's mark lost: CP turns into the uniform rule, and conservation alone would not notice."""
    explainer = Attributor(build("llama"), rules="cp")
    attribution = explainer.attribute([5, 9, 11, 30])
    explainer.rules = lxt.CP_LRP.but(product="uniform", name="cp")
    wrong = explainer.attribute([5, 9, 11, 30])
    explainer.rules = lxt.CP_LRP
    assert attribution.check().ok
    report = wrong.check()
    assert not torch.allclose(wrong.relevance, attribution.relevance, rtol=1e-3)
    assert not report.ok
    assert "FAILED" in str(report)


def test_the_report_reads() -> None:
    text = str(Attributor(build("gpt2")).attribute([5, 9, 11, 30]).check())
    for word in ("conservation", "kept by softmax", "kept by bias", "kept by constant", "auditor", "none"):
        assert word in text
