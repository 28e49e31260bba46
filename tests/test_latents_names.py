"""What latents are asked for by: kinds, TransformerLens's names, paths of modules; and what is refused."""

from __future__ import annotations

import pytest
import torch
from models import EXAMPLES
from small import LAYERS, PROMPTS, by_hand, gpt2, llama

import lxt
from lxt import Keep
from lxt.attributor import Attributor
from lxt.latents import KINDS, alias, wanted

IDS = PROMPTS[0]
NAMES = {
    "hook_embed": ("embed", None),
    "blocks.0.hook_resid_pre": ("residual_pre", 0),
    "blocks.5.hook_resid_mid": ("residual_mid", 5),
    "blocks.5.hook_resid_post": ("residual", 5),
    "blocks.5.hook_attn_out": ("attn_out", 5),
    "blocks.5.hook_mlp_out": ("mlp_out", 5),
    "blocks.12.attn.hook_z": ("head", 12),
    "blocks.5.mlp.hook_post": ("neuron", 5),
    "blocks.5.attn.hook_q": ("query", 5),
    "blocks.5.attn.hook_rot_q": ("query", 5),
    "blocks.5.attn.hook_rot_k": ("key", 5),
    "blocks.5.attn.hook_v": ("value", 5),
    "blocks.5.attn.hook_pattern": ("pattern", 5),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_transformer_lens(name):
    assert alias(name) == NAMES[name]
    kind, layer = NAMES[name]
    assert wanted(name) == (Keep(kind, layers=None if layer is None else (layer,)),)


@pytest.mark.parametrize("name", ["head", "blocks.5", "blocks.5.attn", "blocks.-1.hook_resid_pre", "blocks.5.hook_z"])
def test_other_names_are_no_aliases(name):
    assert alias(name) is None


def test_each_kind_is_asked_for_once():
    asked = wanted(["blocks.2.attn.hook_z", "residual_post", Keep("head", layers=(0, 2)), "blocks.0.hook_resid_post"])
    assert asked == (Keep("head", layers=(0, 2)), Keep("residual"))
    assert Keep("neuron", 5, range(2, 0, -1)).layers == (1, 2)
    assert Keep("neuron", layers=1) == Keep("neuron", layers=(1,))
    assert wanted("head") == wanted(["head", "head"]) == (Keep("head"),)


def test_an_alias_gives_what_its_kind_gives():
    explainer = Attributor(gpt2())
    out = explainer.attribute(IDS, latents=["blocks.2.attn.hook_z", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"])
    whole = explainer.attribute(IDS, latents=("head", "neuron"))
    assert list(out.latents) == ["head", "neuron"]
    assert out.latents["head"].layers == (0, 2)
    assert torch.equal(out.latents["head"].tensor, whole.latents["head"].tensor[[0, 2]])
    assert torch.equal(out.latents["neuron"].tensor, whole.latents["neuron"].tensor[[1]])


def test_the_path_of_a_module_is_its_output():
    model = llama()
    paths = ("model.layers.1.mlp", "model.layers.1.self_attn.q_proj", "model.norm")
    out = Attributor(model).attribute(IDS, target=42, latents=paths)
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    by_hand(model, IDS, lambda logits: logits[0, -1, 42])
    for handle in handles:
        handle.remove()
    for path in paths:
        expected = (outputs[path].grad * outputs[path]).sum(-1).detach()
        assert out.latents[path].shape == (1, 1, len(IDS))
        torch.testing.assert_close(out.latents[path][0], expected, rtol=1e-5, atol=1e-6)


def test_a_tap_on_an_activation_function_leaves_its_mark():
    """CP stops the gate's branch, which it knows by what the activation function gave."""
    bare = lxt.PatchMap(layers=("LlamaDecoderLayer",))  # no fused MLP: the mode meets the product itself
    path = "model.layers.1.mlp.act_fn"
    explainer = Attributor(llama(), patch_map=bare)
    plain = explainer.attribute(IDS, target=42)
    assert torch.equal(explainer.attribute(IDS, target=42, latents=path).relevance, plain.relevance)
    with pytest.raises(ValueError, match=f"no relevance came to '{path}'"):
        Attributor(llama(), rules="cp", patch_map=bare).attribute(IDS, target=42, latents=path)


def router_model():
    torch.manual_seed(0)
    return EXAMPLES["qwen3_moe"].build("eager").eval()


BAD = {
    "unknown": (
        "heads",
        ValueError,
        "unknown latent 'heads'; did you mean 'head'.* Allowed: embed, residual, .*hook_z",
    ),
    "nothing near": ("xyz", ValueError, r"'xyz' is neither a latent nor a module of LlamaForCausalLM\. Allowed: "),
    "no name at all": ("", ValueError, r"unknown latent ''\. Allowed: "),
    "as typed": ("neuron:20", ValueError, r"here it is lxt\.Keep\('neuron', top=20\)"),
    "top of nothing": (Keep("mlpout", top=3), ValueError, "unknown latent 'mlpout'; did you mean 'mlp_out'"),
    "the table": ("model.embed_tokens", ValueError, "is the table of embeddings, .* 'embed' has their relevance"),
    "no layer": (
        "hook_z",
        ValueError,
        r"did you mean 'blocks\.5\.attn\.hook_z' \(with the layer's number\), or 'head'",
    ),
    "no part": ("blocks.1.hook_z", ValueError, r"did you mean 'blocks\.1\.attn\.hook_z'\?"),
    "scores": ("blocks.1.attn.hook_attn_scores", ValueError, r"explainer\.attribute_attention\(prompt, layer, head\)"),
    "result": ("blocks.1.attn.hook_result", ValueError, "ask for 'head'"),
    "pre": ("blocks.1.mlp.hook_pre_linear", ValueError, "ask for 'neuron'"),
    "other hook": ("blocks.1.ln1.hook_normalized", ValueError, "that there are: hook_embed, .*hook_resid_post"),
    "no path": (
        "model.layers.1.mlpp",
        ValueError,
        "neither a latent nor a module .* did you mean 'model.layers.1.mlp'",
    ),
    "no hook": ("blocks.1.attn.hook_zz", ValueError, r"did you mean 'blocks\.1\.attn\.hook_z'\?"),
    "layer": (Keep("head", layers=(1, 3)), ValueError, "wanted of layer 3, and the model has the layers 0 to 2"),
    "layer of an alias": ("blocks.7.attn.hook_z", ValueError, "wanted of layer 7, and the model has the layers 0 to 2"),
    "two tops": (["neuron", Keep("neuron", top=2)], ValueError, "'neuron' is asked for twice"),
    "top of a token": (Keep("residual", top=2), ValueError, "'residual' is one number for each token"),
    "top of a path": (Keep("model.norm", top=2), ValueError, "'model.norm' is one number for each token"),
    "layer of a path": (Keep("model.norm", layers=(0,)), ValueError, "'model.norm' is in no layer"),
    "layer of embed": (Keep("embed", layers=(0,)), ValueError, "'embed' is in no layer"),
    "two layers": (Keep("blocks.1.attn.hook_z", layers=(2,)), ValueError, "names its layer"),
    "no name": ([3], TypeError, "named by a string"),
    "no list": (3, TypeError, "latents must be names"),
    "experts": ("expert", ValueError, "without experts"),
}


@pytest.mark.parametrize(("latents", "error", "message"), BAD.values(), ids=BAD)
def test_what_there_is_none_of_is_refused_before_any_forward(latents, error, message):
    model = llama()
    ran = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: ran.append(module))
    for ask in (Attributor(model).attribute, Attributor(model, memory="64GiB").attribute):
        with pytest.raises(error, match=message):
            ask(IDS, latents=latents)
    assert not ran


@pytest.mark.parametrize(
    ("build", "path", "message"),
    [
        (llama, "lm_head", r"'lm_head' in layer 0 \(Linear\) has the shape \(1, 300\)"),
        (llama, "model", "LlamaModel gives BaseModelOutputWithPast, and neither a tensor"),
        (gpt2, "transformer.wte", "is the table of embeddings"),
        (router_model, "model.layers.1.mlp.gate", r"TopKRouter ran, and nothing .* \('router' is the relevance of"),
    ],
)
def test_modules_without_relevance_by_token_are_told_from_names_that_there_are_none_of(build, path, message):
    with pytest.raises(ValueError, match=message):
        Attributor(build()).attribute(IDS, target=42, latents=path)


def test_nothing_is_forecast_for_a_latent_that_there_is_none_of(monkeypatch):
    monkeypatch.setattr("lxt.planning.surely_fits", lambda *_: False)
    monkeypatch.setattr("lxt.planning.forecast_pass", lambda *_, **__: pytest.fail("a forecast"))
    with pytest.raises(ValueError, match="wanted of layer 9"):
        Attributor(llama(), memory="64GiB").attribute(IDS, latents=Keep("head", layers=(9,)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("neuron", 0), ValueError, "top must be a whole number >= 1, or None for all, got 0"),
        (("neuron", 2.0), TypeError, "top must be a whole number"),
        (("neuron", True), TypeError, "top must be a whole number"),
        (("neuron", None, ()), TypeError, "layers must be whole numbers"),
        (("neuron", None, (1.0,)), TypeError, "layers must be whole numbers"),
        (("neuron", None, "3"), TypeError, r"layers must be whole numbers such as \(3, 7\)"),
        (("neuron", None, True), TypeError, r"layers must be whole numbers such as \(3, 7\)"),
        (("neuron", None, -1), ValueError, "layers are counted from 0, and none from the end; got -1"),
        (("neuron", None, (-1,)), ValueError, "layers are counted from 0, and none from the end; got -1"),
        ((7,), TypeError, "named by a string, got 7"),
    ],
)
def test_what_keep_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Keep(*arguments)


def test_every_kind_has_its_line():
    assert all(kind.meaning and kind.name == name for name, kind in KINDS.items())
    hooks = [kind.hook for kind in KINDS.values() if kind.hook]
    assert len(set(hooks)) == len(hooks)


def test_steering_by_names_of_transformer_lens():
    model = llama()
    explainer = Attributor(model)
    ids = torch.tensor([IDS])
    with explainer.steer({("head", 1): 0.0}), torch.no_grad():
        expected = model(ids).logits
    with explainer.steer({"blocks.1.attn.hook_z": 0.0}), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    vector = torch.ones(32)
    with explainer.steer({"blocks.1.hook_resid_pre": lxt.steering.Add(vector)}), torch.no_grad():
        found = model(ids).logits
    with explainer.steer({("residual", 0): lxt.steering.Add(vector)}), torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits)
    reference = lxt.steering.activations(explainer, [IDS], ["blocks.1.attn.hook_z"])
    assert torch.equal(reference["blocks.1.attn.hook_z"], reference["head", 1])
    for key in ("hook_embed", "head"):
        with pytest.raises(TypeError, match=r"or as 'blocks\.5\.attn\.hook_z'"):
            explainer.steer({key: 0.0})
    with pytest.raises(ValueError, match=r"'value' can be read but not steered. Steered can be residual, residual_pre"):
        explainer.steer({"blocks.1.attn.hook_v": 0.0})
    with pytest.raises(ValueError, match="the model has the layers 0 to 2, and 9 is none"):
        explainer.steer({"blocks.9.attn.hook_z": 0.0})


@pytest.mark.parametrize(
    ("latents", "narrow"),
    [
        (("residual", "embed", "residual_pre"), True),
        (Keep("head", layers=(0, 1)), True),
        (("model.layers.1.mlp", "model.norm"), True),
        ("head", False),
        ("residual_mid", False),
        ("model.layers.2.mlp", False),
    ],
)
def test_the_last_layer_runs_in_full_only_where_it_is_read(latents, narrow, monkeypatch):
    """Where it is narrow, its heads at other tokens were never computed."""
    model = llama()
    lengths = []
    act = type(model.model.layers[-1].mlp)
    forward = act.forward
    monkeypatch.setattr(act, "forward", lambda self, x: lengths.append(x.shape[1]) or forward(self, x))
    bare = lxt.PatchMap(layers=("LlamaDecoderLayer",))
    Attributor(model, patch_map=bare).attribute(IDS, latents=latents)
    assert lengths == [5] * (LAYERS - 1) + [1 if narrow else 5]
