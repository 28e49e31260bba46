"""torch.compile: right whatever was compiled and whenever; in one graph is tests/test_onegraph.py."""

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from models import build, checkpointed, inputs_of
from relevances import relevance, state
from torch import nn

import lxt
from lxt.compiling import call_eagerly

CASES = [(name, backend) for name in ("llama", "qwen3", "gemma3") for backend in ("eager", "aot_eager")]
CASES += [("llama", "inductor")]


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def close(compiled, eager) -> bool:
    """Equal but for the order of sums, and so in float32 to a few units of the largest."""
    return bool((compiled - eager).abs().max() <= 4e-6 * eager.abs().max())


def small(name="llama") -> nn.Module:
    return build(name, dtype=torch.float32)


def under(rules, name="llama"):
    model = small(name)
    with lxt.monkey_patch(model, rules):
        return relevance(model, name)


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_patched_model_may_be_compiled(name, backend, rules):
    model, expected = small(name), under(rules, name)
    with lxt.monkey_patch(model, rules):
        compiled = torch.compile(model, backend=backend)
        for _ in range(3):
            assert close(relevance(compiled, name), expected)
    assert not close(relevance(compiled, name), expected)


def by_wrapping(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def layers_in_place(model, backend):
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def layers_by_wrapping(model, backend):
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = torch.compile(layer, backend=backend)
    return model


def linears_in_place(model, backend):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.compile(backend=backend)
    return model


def linears_by_wrapping(model, backend):
    for layer in model.model.layers:
        layer.mlp.down_proj = torch.compile(layer.mlp.down_proj, backend=backend)
    return model


WAYS = [by_wrapping, in_place, layers_in_place, layers_by_wrapping, linears_in_place, linears_by_wrapping]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compile", WAYS)
def test_a_compiled_model_may_be_patched(compile, backend):
    expected, unpatched = under("attnlrp"), relevance(small())
    model = small()
    compiled = compile(model, backend)
    assert torch.allclose(relevance(compiled), unpatched, rtol=1e-4, atol=1e-5)  # compiled before it is patched
    for target in {model, compiled}:
        before = state(target)
        with lxt.monkey_patch(target):
            assert close(relevance(compiled), expected)
            assert close(relevance(model), expected)
            with torch.no_grad():
                assert close(compiled(**inputs_of("llama", torch.float32))[0], logits_of_a_small_one())
        assert state(target) == before
        assert torch.allclose(relevance(compiled), unpatched, rtol=1e-4, atol=1e-5)


def logits_of_a_small_one():
    with torch.no_grad():
        return small()(**inputs_of("llama", torch.float32))[0]


@pytest.mark.filterwarnings("ignore:.*recompile_limit")
def test_more_models_than_the_compiler_takes_variants_of_one_function():
    expected = under("attnlrp")
    for _ in range(torch._dynamo.config.recompile_limit + 3):
        model = small()
        with lxt.monkey_patch(model):
            assert close(relevance(torch.compile(model, backend="aot_eager")), expected)


def test_a_compiled_model_under_a_module_patch():
    expected, model = under("attnlrp"), small()
    compiled = torch.compile(model, backend="aot_eager")
    with lxt.monkey_patch(modeling_llama):
        assert torch.equal(relevance(compiled), expected)
    assert not torch.equal(relevance(compiled), expected)


def test_a_compiled_function_around_the_model():
    expected, model = under("attnlrp"), small()
    function = torch.compile(lambda inputs: model(**inputs).logits[0, -1, 5] * 1.0, backend="aot_eager")
    inputs = inputs_of("llama", torch.float32)
    with lxt.monkey_patch(model):
        (gradient,) = torch.autograd.grad(function(inputs), inputs["inputs_embeds"])
    assert close((inputs["inputs_embeds"] * gradient).detach().flatten(), expected)


def test_checkpointed_compiled_layers():
    expected = under("attnlrp")
    model = checkpointed(layers_in_place(small(), "aot_eager").train())
    with lxt.monkey_patch(model):
        assert torch.equal(relevance(model), expected)


def test_an_attributor_takes_a_compiled_model():
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = lxt.load(small()).attribute(ids)
    out = lxt.load(torch.compile(small(), backend="aot_eager")).attribute(ids)
    assert torch.equal(out.relevance, expected.relevance)
    assert out.check().ok


def test_what_is_called_eagerly_is_not_traced():
    traced = []

    def function(x):
        traced.append(torch.compiler.is_compiling())
        return x + 1

    torch.compile(lambda x: call_eagerly(function, x * 2) * 3, backend="eager")(torch.ones(2))
    assert traced == [False]


def gated(output, x):
    return torch.nn.functional.silu(x) * output.tanh()


def with_hooks(function) -> nn.Module:
    model = small()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: function(output, inputs[0]))
    return model


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_inside_the_model_is_refused_with_a_way_out(backend, called_before):
    model, plain = with_hooks(torch.compile(gated, backend=backend)), with_hooks(gated)
    if called_before:
        relevance(model)
    with lxt.monkey_patch(plain):
        expected = relevance(plain)
    with lxt.monkey_patch(model):
        with pytest.raises(ValueError, match=r'set_stance\("force_eager"\)'):
            relevance(model)
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(relevance(model), expected)
