"""Steering what attention and the MLP add to the stream, and the outputs of modules, equals the change made by hand."""

import copy
import threading

import pytest
import torch
from models import EXAMPLES
from small import PROMPTS, assert_close, llama
from steered import ENDS, IDS, built, columns_of, logits, projection

import lxt
from lxt.attributor import Attributor
from lxt.steering import Ablate, Add, Scale, Set, activations

# float32: the change is made at an output here and within weights there, two layers from the logits.
ROUNDING = 2e-5
BEHIND = {"head": "post_attention_layernorm", "neuron": "post_feedforward_layernorm"}
KINDS = {"head": "attn_out", "neuron": "mlp_out"}


def scaled(model, name, layer, kind, factor):
    """The weights from which attention, or the MLP, adds so many times as much; in Gemma that is a norm."""
    if name == "gemma3":
        norm = model.model.layers[layer].get_submodule(BEHIND[kind])
        norm.weight.data = (1 + norm.weight.data) * factor - 1
        return
    end = projection(model, name, layer, kind)
    end.weight.data *= factor
    if getattr(end, "bias", None) is not None:
        end.bias.data *= factor


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_scaled_where_it_is_added(name, kind):
    model = built(name)
    explainer, edited = Attributor(model), copy.deepcopy(model)
    scaled(edited, name, 1, kind, -2.5)
    plain, expected = logits(model, IDS), logits(edited, IDS)
    between = [] if name == "gpt_neox" else ["residual_mid"]  # where there is something between the two
    latents = ("residual", KINDS[kind], *between)
    by_weights = Attributor(edited).attribute(IDS, target=2, latents=latents)
    read = activations(Attributor(edited), [IDS], [KINDS[kind]])
    with explainer.steer({(KINDS[kind], 1): Scale(-2.5)}):
        assert_close(logits(model, IDS), expected, ROUNDING)
        out = explainer.attribute(IDS, target=2, latents=latents)
        assert out.check().ok
        found = activations(explainer, [IDS], [KINDS[kind]])
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    assert torch.equal(logits(model, IDS), plain)
    assert_close(out.relevance, by_weights.relevance, 1e-4)
    for latent in latents:
        assert_close(out.latents[latent], by_weights.latents[latent], 1e-4)
    assert_close(found[KINDS[kind], 1], read[KINDS[kind], 1], 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_means_of_what_attention_adds(name):
    model = built(name)
    explainer = Attributor(model)
    reference = activations(explainer, PROMPTS, ["attn_out", ("mlp_out", 0)])
    mean = reference["attn_out", 1].mean(0)
    with explainer.steer({("attn_out", 1): Ablate("mean", reference)}):
        ablated = logits(model, IDS)
        found = activations(explainer, PROMPTS, [("attn_out", 1)])
    assert_close(found["attn_out", 1], mean.expand(15, -1), 1e-6)
    with explainer.steer({("attn_out", 1): mean}):
        assert_close(logits(model, IDS), ablated, 1e-6)


@pytest.mark.parametrize("how", ["layer", "nested"])
def test_checkpointed_layers_are_steered_when_they_run_again(how):
    model = built("gemma3")
    changes = {("attn_out", 0): Scale(3), ("mlp_out", 1): Add(torch.ones(32), positions=-1)}
    with Attributor(model).steer(changes):
        expected = Attributor(model).attribute(PROMPTS, target=2, latents=("attn_out", "mlp_out", "residual_mid"))
        out = Attributor(model, checkpoint=how).attribute(PROMPTS, target=2, latents=tuple(expected.latents))
    assert torch.equal(out.relevance, expected.relevance)
    for latent in expected.latents:
        assert torch.equal(out.latents[latent].tensor, expected.latents[latent].tensor)


def test_nested_changes_behind_a_norm_come_in_order():
    """A norm that got what another block had changed would take the scale back out."""
    model = built("gemma3")
    explainer = Attributor(model)
    with explainer.steer({("attn_out", 1): Scale(6)}):
        expected = logits(model, IDS)
    with explainer.steer({("attn_out", 1): Scale(2)}), explainer.steer({("attn_out", 1): Scale(3)}):
        assert_close(logits(model, IDS), expected, 1e-6)
        inside = activations(explainer, [IDS], [("attn_out", 1)])
    plain = activations(explainer, [IDS], [("attn_out", 1)])
    assert_close(inside["attn_out", 1], 6 * plain["attn_out", 1], 1e-5)
    with explainer.steer({("attn_out", 1): 5.0}), explainer.steer({("attn_out", 1): Scale(3)}):
        nested = logits(model, IDS)
    with explainer.steer({("attn_out", 1): 15.0}):
        assert torch.equal(logits(model, IDS), nested)


class Halves:
    """A feature for each number and its sign."""

    def encode(self, x):
        return torch.cat([x.relu(), (-x).relu()], -1)

    def decode(self, features):
        return features[..., :32] - features[..., 32:]


def by_hooks(model, changes):
    """What the model says when these modules' outputs are changed."""
    handles = [
        model.get_submodule(f"model.layers.1.{path}").register_forward_hook(lambda module, args, output, f=f: f(output))
        for path, f in changes.items()
    ]
    found = logits(model, IDS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("module", ["self_attn", "self_attn.o_proj"])
@pytest.mark.parametrize("first", ["attn_out", "path"])
def test_a_module_in_front_of_the_norm_is_changed_before_what_is_added(module, first):
    """Also by a hook that runs after the one that changes what is added, on the same module or around it."""
    model = built("gemma3")
    vector, path = torch.linspace(-1, 1, 32), f"model.layers.1.{module}"
    changes = {("attn_out", 1): Scale(2), path: Add(vector)}
    if first == "path":
        changes = dict(reversed(changes.items()))
    expected = by_hooks(model, {"self_attn.o_proj": lambda x: x + vector, BEHIND["head"]: lambda x: 2 * x})
    with Attributor(model).steer(changes):
        assert_close(logits(model, IDS), expected, 1e-6)
        with torch.inference_mode():
            assert_close(logits(model, IDS), expected, 1e-6)
    expected = by_hooks(model, {BEHIND["head"]: vector.expand_as})
    with Attributor(model).steer(changes | {("attn_out", 1): Set(vector)}):
        assert_close(logits(model, IDS), expected, 1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_module_in_front_is_read_where_what_is_added_is_steered(name):
    explainer = Attributor(built(name))
    path = "model.layers.1.self_attn.o_proj"
    features = lxt.Features(Halves(), at=path, top=None)
    latents = ("attn_out", "mlp_out", "residual_mid", "model.layers.1.self_attn", path, features)
    plain = explainer.attribute(IDS, target=2, latents=latents)
    for how in ("off", "layer", "nested"):
        with explainer.steer({("attn_out", 1): Scale(1), path: Scale(1), ("mlp_out", 1): Scale(1)}):
            out = Attributor(explainer.model, checkpoint=how).attribute(IDS, target=2, latents=latents)
        for latent in (*latents[:-1], "sae"):
            assert_close(out.latents[latent].tensor, plain.latents[latent].tensor, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_is_added_is_read_where_the_module_around_is_steered(name):
    """Its hook runs between attention's last projection and the norm behind it."""
    explainer = Attributor(built(name))
    latents = ("attn_out", "mlp_out", "residual_mid")
    plain = explainer.attribute(IDS, target=2, latents=latents)
    read = activations(explainer, [IDS], ["attn_out"])
    with explainer.steer({"model.layers.1.self_attn": Scale(1), "model.layers.1.mlp": Scale(1)}):
        out = explainer.attribute(IDS, target=2, latents=latents)
        found = activations(explainer, [IDS], ["attn_out"])
    assert_close(found["attn_out", 1], read["attn_out", 1], 1e-6)
    for latent in latents:
        assert_close(out.latents[latent].tensor, plain.latents[latent].tensor, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_inference_mode_changes_nothing(name):
    """Its tensors don't count what is written into them."""
    model = built(name)
    changes = {("attn_out", 0): [Scale(3), Add(1.0, positions=2)], ("mlp_out", 1): Scale(-2)}
    with Attributor(model).steer(changes):
        expected = logits(model, IDS)
        with torch.inference_mode():
            assert torch.equal(logits(model, IDS), expected)
            with Attributor(model).steer(changes):
                nested = logits(model, IDS)
        with Attributor(model).steer(changes):
            assert torch.equal(logits(model, IDS), nested)


def test_threads_between_attention_and_its_norm_do_not_meet():
    model = built("gemma3")
    expected, found = {}, {}
    for factor in (2, -3):
        with Attributor(model).steer({("attn_out", 1): Scale(factor)}):
            expected[factor] = logits(model, IDS)
    barrier = threading.Barrier(2, timeout=60)

    def run(factor):
        with Attributor(model).steer({("attn_out", 1): Scale(factor)}):
            barrier.wait()  # both steer
            found[factor] = logits(model, IDS)
            barrier.wait()

    norm = model.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: barrier.wait() * 0 or None, prepend=True)
    threads = [threading.Thread(target=run, args=(factor,)) for factor in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for factor, steered in expected.items():
        assert torch.equal(found[factor], steered)


def test_what_experts_add_together():
    model = EXAMPLES["qwen3_moe"].build("eager").eval()
    edited = copy.deepcopy(model)
    edited.model.layers[0].mlp.experts.down_proj.data *= 0
    with Attributor(model).steer({"blocks.0.hook_mlp_out": 0.0}):
        assert_close(logits(model, IDS), logits(edited, IDS), ROUNDING)


def test_the_output_of_a_module_by_its_path():
    model = llama()
    explainer, edited = Attributor(model), copy.deepcopy(model)
    path = "model.layers.1.self_attn.q_proj"
    columns_of(edited.get_submodule(path))[:] *= 2
    reference = activations(explainer, PROMPTS, [path, "head"])
    handles = []
    kept = []
    handles.append(model.get_submodule(path).register_forward_hook(lambda module, args, output: kept.append(output[0])))
    for prompt in PROMPTS:
        logits(model, prompt)
    handles[0].remove()
    assert_close(reference[path], torch.cat(kept), 1e-5)
    with explainer.steer({path: Scale(2), ("mlp_out", 0): 0.0}):
        steered = logits(model, IDS)
    with Attributor(edited).steer({"model.layers.0.mlp": Set(0.0)}):
        assert_close(logits(edited, IDS), steered, ROUNDING)
    with explainer.steer({path: Ablate("mean", reference)}):
        assert not torch.allclose(logits(model, IDS), steered)
    assert repr(explainer.steer({path: 0.0})) == f"<Steering of LlamaForCausalLM: '{path}'>"
    assert repr(reference) == f"Activations('{path}', ('head', 0), ('head', 1), ('head', 2); 15 tokens of 3 prompts)"
    assert repr(activations(explainer, PROMPTS[:1], ["head", "residual"])) == (
        "Activations(('head', 0), ('head', 1), ('head', 2), ('residual', 0), and 2 more; 5 tokens of 1 prompts)"
    )


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_a_steered_activation_function_stays_the_gate(rules):
    bare = lxt.PatchMap(layers=("LlamaDecoderLayer",))  # no fused MLP: the mode meets the product itself
    explainer = Attributor(llama(), rules=rules, patch_map=bare)
    plain = explainer.attribute(IDS, target=42)
    with explainer.steer({"model.layers.1.mlp.act_fn": Scale(1.0)}):
        assert_close(explainer.attribute(IDS, target=42).relevance, plain.relevance, 1e-6)
