"""monkey_patch: rules switch, leave, survive exceptions, and what can't be patched is refused."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from models import EXAMPLES, HIDDEN, TOKENS, build, checkpointed, inputs_of
from relevances import relevance, state, under_each
from torch import nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

import lxt
from lxt.composites import ATTN_LRP, CP_LRP, Gamma
from lxt.patches import patch_map_for

RULES = ("attnlrp", "cp", "gradient")


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def expected():
    values = under_each(RULES)
    pairs = [(a, b) for a in values for b in values if a is not b and {a, b} != {None, "gradient"}]
    assert all(not torch.allclose(values[a], values[b], rtol=0.01) for a, b in pairs)
    return values


@pytest.mark.parametrize("name", EXAMPLES)
def test_removal_restores_everything(name):
    model = build(name, "eager").train()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    before, signature = state(model), inspect.signature(model.forward)
    with lxt.monkey_patch(model):
        assert inspect.signature(model.forward) == signature
        relevance(model, name)
        assert state(model) != before
    assert state(model) == before
    assert inspect.signature(model.forward) == signature


def test_training_flags_and_requires_grad_are_the_users_while_patched(llama):
    llama.train()
    frozen = next(llama.parameters()).requires_grad_(False)
    with lxt.monkey_patch(llama):
        relevance(llama)
        assert all(module.training for module in llama.modules())
        assert [p is not frozen for p in llama.parameters()] == [p.requires_grad for p in llama.parameters()]


def test_switching_then_removing(llama, expected):
    before = state(llama)
    first = lxt.monkey_patch(llama, "attnlrp")
    assert torch.equal(relevance(llama), expected["attnlrp"])
    second = lxt.monkey_patch(llama, "cp")
    assert torch.equal(relevance(llama), expected["cp"])
    assert (first.active, second.active) == (False, True)
    first.remove()  # of a patch that was replaced: nothing happens to the one in force
    assert torch.equal(relevance(llama), expected["cp"])
    second.remove()
    second.remove()
    assert torch.equal(relevance(llama), expected[None])
    assert state(llama) == before
    assert not second.active
    assert "removed" in repr(second)


def test_switching_a_module_then_removing(expected):
    forwards = {
        name: cls.forward
        for name, cls in vars(modeling_llama).items()
        if isinstance(cls, type) and hasattr(cls, "forward")
    }
    model = build("llama")
    before = state(model)
    first = lxt.monkey_patch(modeling_llama, "attnlrp")
    assert torch.equal(relevance(model), expected["attnlrp"])
    second = lxt.monkey_patch(modeling_llama, "cp")
    assert torch.equal(relevance(model), expected["cp"])
    assert torch.equal(relevance(build("llama")), expected["cp"])
    first.remove()
    assert torch.equal(relevance(model), expected["cp"])
    second.remove()
    second.remove()
    assert torch.equal(relevance(model), expected[None])
    assert state(model) == before
    assert forwards == {name: getattr(modeling_llama, name).forward for name in forwards}


@pytest.mark.parametrize("first_out", ["instance", "module"])
@pytest.mark.parametrize("called_before", [False, True])
def test_an_instance_patch_over_a_module_patch(llama, expected, first_out, called_before):
    before = state(llama)
    handles = {"module": lxt.monkey_patch(modeling_llama, "attnlrp")}
    if called_before:
        assert torch.equal(relevance(llama), expected["attnlrp"])
    handles["instance"] = lxt.monkey_patch(llama, "cp")
    assert torch.equal(relevance(llama), expected["cp"])
    assert torch.equal(relevance(build("llama")), expected["attnlrp"])
    handles.pop(first_out).remove()
    assert torch.equal(relevance(llama), expected["cp" if first_out == "module" else "attnlrp"])
    handles.popitem()[1].remove()
    assert torch.equal(relevance(llama), expected[None])
    assert state(llama) == before


@pytest.mark.parametrize("first_out", ["instance", "module"])
def test_a_module_patch_over_an_instance_patch(llama, expected, first_out):
    before = state(llama)
    handles = {"instance": lxt.monkey_patch(llama, "cp"), "module": lxt.monkey_patch(modeling_llama, "attnlrp")}
    assert torch.equal(relevance(llama), expected["cp"])
    handles.pop(first_out).remove()
    assert torch.equal(relevance(llama), expected["cp" if first_out == "module" else "attnlrp"])
    handles.popitem()[1].remove()
    assert torch.equal(relevance(llama), expected[None])
    assert state(llama) == before


def test_a_part_of_a_patched_model_is_refused_and_the_reverse(llama):
    with (
        lxt.monkey_patch(llama),
        pytest.raises(ValueError, match="shares modules with a patched LlamaForCausalLM: remove"),
    ):
        lxt.monkey_patch(llama.model)
    with (
        lxt.monkey_patch(llama.model),
        pytest.raises(ValueError, match="shares modules with a patched LlamaModel: remove"),
    ):
        lxt.monkey_patch(llama)
    with lxt.monkey_patch(llama.model.layers[1]), pytest.raises(ValueError, match="patched LlamaDecoderLayer: remove"):
        lxt.monkey_patch(llama)
    lxt.monkey_patch(llama).remove()  # nothing of the refused ones is left


def test_rules_apply_once_when_the_base_model_is_called_by_itself(llama, expected):
    def through_base(model):
        inputs = inputs_of("llama")
        logits = model.lm_head(model.model(**inputs).last_hidden_state)
        (gradient,) = torch.autograd.grad(EXAMPLES["llama"].logit(logits), inputs["inputs_embeds"])
        return (gradient * inputs["inputs_embeds"]).detach().flatten()

    with lxt.monkey_patch(llama):
        assert torch.equal(through_base(llama), expected["attnlrp"])
        layer, x = llama.model.layers[0], inputs_of("llama")["inputs_embeds"]
        rotary = llama.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        in_layer = torch.autograd.grad(layer(x, position_embeddings=rotary)[0, -1, 3], x)[0]
    alone = build("llama").model.layers[0].requires_grad_(False)
    with lxt.monkey_patch(alone, patch_map=patch_map_for(llama)):
        assert torch.equal(torch.autograd.grad(alone(x, position_embeddings=rotary)[0, -1, 3], x)[0], in_layer)
    before = state(llama)
    with lxt.monkey_patch(modeling_llama):
        assert torch.equal(through_base(llama), expected["attnlrp"])
        assert torch.equal(relevance(llama), expected["attnlrp"])
        assert torch.equal(through_base(llama), expected["attnlrp"])
    assert state(llama) == before


class Stop(BaseException):
    """As KeyboardInterrupt: not an Exception."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_an_exception_inside_forward(llama, expected, error):
    before = state(llama)

    def fail(*_):
        raise error

    with lxt.monkey_patch(llama):
        hook = llama.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(error):
            relevance(llama)
        hook.remove()
        assert all(parameter.requires_grad for parameter in llama.parameters())
        assert not torch.overrides._get_current_function_mode_stack()
        assert torch.equal(relevance(llama), expected["attnlrp"])
    assert torch.equal(relevance(llama), expected[None])
    assert state(llama) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_exception_inside_backward(llama, expected, error, checkpointing):
    if checkpointing:
        llama.train()
        checkpointed(llama)
    before = state(llama)
    calls = []

    def fail(*_):
        calls.append(1)
        if not checkpointing or len(calls) > 1:  # the second forward of the layer is the recomputation
            raise error

    def fail_in_backward(module, args, output):
        output.register_hook(fail)

    with lxt.monkey_patch(llama):
        layer = llama.model.layers[0].mlp
        hook = layer.register_forward_pre_hook(fail) if checkpointing else layer.register_forward_hook(fail_in_backward)
        with pytest.raises(error):
            relevance(llama)
        hook.remove()
        assert not torch.overrides._get_current_function_mode_stack()
        assert torch.equal(relevance(llama), expected["attnlrp"])
    assert state(llama)[0] == before[0]
    assert torch.equal(relevance(llama), expected[None])


def test_an_exception_leaves_the_with_block_clean(llama, expected):
    before = state(llama)
    with pytest.raises(KeyboardInterrupt), lxt.monkey_patch(llama, "cp"):
        raise KeyboardInterrupt
    assert state(llama) == before
    assert torch.equal(relevance(llama), expected[None])


def test_an_exception_while_patching(llama, expected):
    def broken(module, composite):
        raise RuntimeError("broken factory")

    before = state(llama)
    patch_map = patch_map_for(llama)
    later = {"LlamaMLP": broken}  # after embeddings and norms of the first layer were patched
    with pytest.raises(RuntimeError, match="broken factory"):
        lxt.monkey_patch(llama, patch_map=replace(patch_map, forwards={**patch_map.forwards, **later}))
    assert state(llama) == before
    assert torch.equal(relevance(llama), expected[None])
    with lxt.monkey_patch(llama):
        assert torch.equal(relevance(llama), expected["attnlrp"])


def test_an_operation_without_a_rule_is_named_and_leaves_the_model_clean(llama, expected):
    before = state(llama)

    def hook(module, args, output):
        return torch.erfinv(output / (1 + output.detach().abs().max()))

    with lxt.monkey_patch(llama):
        handle = llama.model.norm.register_forward_hook(hook)
        with pytest.raises(
            lxt.UnknownOperation, match=r"(?s)no rule for 'erfinv'.*lxt.declare\(\"erfinv\", \"linear\"\)"
        ):
            relevance(llama)
        handle.remove()
        assert torch.equal(relevance(llama), expected["attnlrp"])
    assert state(llama) == before


def test_full_backward_hooks(llama, expected):
    seen = []
    with lxt.monkey_patch(llama):
        hook = llama.model.layers[0].mlp.register_full_backward_hook(
            lambda module, into, out: seen.append(out[0].shape)
        )
        assert torch.equal(relevance(llama), expected["attnlrp"])
        hook.remove()
    assert seen == [(1, TOKENS, HIDDEN)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("meta-llama/Llama-3.2-1B",), TypeError, r"got str: pass the loaded model, not its name"),
        ((torch,), TypeError, r"module 'torch' defines no model class; pass a modeling module or a model"),
        ((nn.Linear,), TypeError, r"takes a model .* got type"),
        ((nn.Linear(2, 2), "lrp"), ValueError, r"unknown rules 'lrp'; allowed: attnlrp, cp, gradient"),
        ((nn.Linear(2, 2), None), TypeError, r"rules must be a preset's name or an lxt.Composite, got NoneType"),
        ((nn.Linear(2, 2), Gamma()), TypeError, r"or an lxt.Composite, got Gamma"),
        ((nn.Linear(2, 2), "cp", {}), TypeError, r"patch_map must be an lxt.PatchMap, got dict; see lxt.patches"),
        (
            (nn.Linear(2, 2), "cp", lxt.PatchMap(operations={"foo": "bar"})),
            ValueError,
            r"operation 'foo' is declared 'bar'; allowed: linear, identity, product, constant",
        ),
    ],
    ids=lambda value: "",
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        lxt.monkey_patch(*arguments)


def test_weights_on_meta():
    with torch.device("meta"):
        model = modeling_llama.LlamaForCausalLM(build("llama").config)
    before = state(model)
    with pytest.raises(
        ValueError, match=r"parameter 'model.embed_tokens.weight' is on the meta device.*from_pretrained"
    ):
        lxt.monkey_patch(model)
    assert state(model) == before


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_attention_that_is_not_looked_up_where_the_rule_can_reach_it(name):
    model = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    model.config._attn_implementation_internal = name  # set_attn_implementation wants the package installed
    before = state(model)
    with pytest.raises(
        ValueError, match=rf"{name!r} has no rule in BloomForCausalLM: call\s+model.set_attn_implementation"
    ):
        lxt.monkey_patch(model)
    assert state(model) == before


def test_paged_attention(llama):
    llama.config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(ValueError, match=r"'paged\|sdpa' has no rule in LlamaForCausalLM: call"):
        lxt.monkey_patch(llama)


def test_attention_changed_after_patching(llama):
    with lxt.monkey_patch(llama):
        sdpa = relevance(llama)
        llama.set_attn_implementation("eager")
        torch.testing.assert_close(relevance(llama), sdpa, rtol=0, atol=1e-5 * sdpa.abs().max().item())


def test_hub_kernels(llama):
    llama._use_kernels = True
    with pytest.raises(
        ValueError, match="the model runs hub kernels, which have no rules; load it with use_kernels=False"
    ):
        lxt.monkey_patch(llama)


def test_composites_and_presets_are_the_same(llama, expected):
    with lxt.monkey_patch(llama, ATTN_LRP) as handle:
        assert handle.rules is ATTN_LRP
        assert torch.equal(relevance(llama), expected["attnlrp"])
    with lxt.monkey_patch(llama, CP_LRP.but(name="mine")) as handle:
        assert "LlamaForCausalLM under 'mine': " in repr(handle)
        assert torch.equal(relevance(llama), expected["cp"])


def test_verbose_says_what_is_patched(llama, capsys):
    with lxt.monkey_patch(llama, verbose=True) as handle:
        patched = handle.describe()
    assert capsys.readouterr().out == f"{patched}\n"
    assert patched.startswith("LlamaForCausalLM under 'attnlrp': ")
    assert all(part in patched for part in ("5 × LlamaRMSNorm", "2 × LlamaMLP"))
    lxt.monkey_patch(modeling_qwen2, "cp", verbose=True).remove()
    assert "transformers.models.qwen2.modeling_qwen2 under 'cp': " in capsys.readouterr().out


@pytest.mark.parametrize(
    "failing", [{"rules": "no such rules"}, {"patch_map": lxt.PatchMap(operations={"foo": "bar"})}]
)
def test_a_switch_that_fails_leaves_no_half(llama, expected, failing):
    first = lxt.monkey_patch(llama, "cp")
    with pytest.raises(ValueError, match=r"no such rules|foo"):
        lxt.monkey_patch(llama, **failing)
    assert torch.equal(relevance(llama), expected["cp" if first.active else None])
    first.remove()
    assert torch.equal(relevance(llama), expected[None])


def test_a_wrong_declaration_for_a_module_fails_at_once():
    forward = modeling_llama.LlamaForCausalLM.forward
    with pytest.raises(ValueError, match="operation 'foo' is declared 'bar'"):
        lxt.monkey_patch(modeling_llama, patch_map=lxt.PatchMap(operations={"foo": "bar"})).remove()
    assert modeling_llama.LlamaForCausalLM.forward is forward
