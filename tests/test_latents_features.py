"""Features of sparse autoencoders and transcoders: with their error and bias they are the relevance of their place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from equations import Float64
from models import build
from small import HEADS, PROMPTS, gpt2, llama, opt
from torch import nn

import lxt
from lxt import checkpointing
from lxt.attributor import Attributor

HIDDEN, FEATURES, LAYER, TARGET = 32, 50, 1, 42


class ReLU(nn.Module):
    """An autoencoder, or a transcoder, at random weights; what SAELens calls standard."""

    def __init__(self, inputs=HIDDEN, features=FEATURES, outputs=HIDDEN, threshold=0.0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def random(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3)

        self.W_enc, self.b_enc = random(inputs, features), random(features)
        self.W_dec, self.b_dec = random(features, outputs), random(outputs)
        self.threshold = threshold

    def encode(self, x):
        before = x @ self.W_enc + self.b_enc
        return before * (before > self.threshold)

    def decode(self, features):
        return features @ self.W_dec + self.b_dec


class Exact(nn.Module):
    """Features are the coordinates in another orthonormal basis, so that nothing is lost."""

    def __init__(self, hidden=HIDDEN):
        super().__init__()
        matrix = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.basis = nn.Parameter(torch.linalg.qr(matrix)[0])

    def encode(self, x):
        return x @ self.basis

    def decode(self, features):
        return features @ self.basis.T


class Normed(ReLU):
    """One that divides by the size of x and multiplies by it in the end, in between two calls, as SAELens' may."""

    def encode(self, x):
        self.size = x.norm(dim=-1, keepdim=True)
        return super().encode(x / self.size)

    def decode(self, features):
        decoded = super().decode(features) * self.size
        del self.size
        return decoded


def attribute(model, *latents, rules="attnlrp", inputs=PROMPTS[0], **options):
    with Float64():
        return Attributor(model, rules=rules, **options).attribute(inputs, target=TARGET, latents=latents)


def caught(model, module, rules="attnlrp"):
    """Input, output and the output's gradient of one module, by hooks and retain_grad."""
    seen = []

    def keep(module, args, output):
        output.retain_grad()
        seen[:] = args[0], output

    handle = module.register_forward_hook(keep)
    attribute(model, "residual", rules=rules)
    handle.remove()
    return seen[0].detach(), seen[1].detach(), seen[1].grad


@pytest.mark.parametrize("rules", ["attnlrp", "cp", "gradient"])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_features_have_the_relevance_of_their_equation(rules, threshold):
    model, sae = llama().double(), ReLU(threshold=threshold)
    out = attribute(model, lxt.Features(sae, at="residual", layer=LAYER, top=None), rules=rules)
    _, x, c = caught(model, model.model.layers[LAYER], rules)
    expected, error, bias = torch.zeros(5, FEATURES, dtype=torch.float64), [], []
    for token in range(5):
        decoded = sae.b_dec.detach().clone()
        for feature in range(FEATURES):
            f = (x[0, token] @ sae.W_enc[:, feature] + sae.b_enc[feature]).item()
            f = f if f > threshold else 0.0
            expected[token, feature] = f * (sae.W_dec[feature] @ c[0, token])
            decoded += f * sae.W_dec[feature].detach()
        error.append((x[0, token] - decoded) @ c[0, token])
        bias.append(sae.b_dec @ c[0, token])
    found = out.latents["sae"]
    assert found.layers == (LAYER,)
    assert found.values.shape == (1, 1, 5, FEATURES)
    close = {"rtol": 1e-9, "atol": 1e-13}
    torch.testing.assert_close(found.values[0, 0], expected.detach(), **close)
    torch.testing.assert_close(out.latents["sae.error"].values[0, 0], torch.stack(error).detach(), **close)
    torch.testing.assert_close(out.latents["sae.bias"].values[0, 0], torch.stack(bias).detach(), **close)


@pytest.mark.parametrize("at", ["residual", "head", "neuron", "blocks.1.hook_resid_post"])
def test_with_error_and_bias_they_are_the_relevance_of_the_place(at):
    model = llama().double()
    kind = "residual" if at.startswith("blocks") else at
    sae = ReLU(48, FEATURES, 48) if at == "neuron" else ReLU()
    layer = None if at.startswith("blocks") else LAYER
    out = attribute(model, kind, lxt.Features(sae, at=at, layer=layer), inputs=PROMPTS)
    whole = out.latents[kind].values[LAYER]
    whole = whole if whole.dim() == 2 else whole.sum(-1)
    found = out.latents["sae"]
    assert found.values.shape == (1, 3, 7, 20)  # the largest 20 and the sum of the rest
    total = found.values.sum(-1) + found.rest + out.latents["sae.error"].values + out.latents["sae.bias"].values
    torch.testing.assert_close(total[0], whole, rtol=1e-9, atol=1e-13)


def test_an_exact_one_has_no_error():
    model = llama().double()
    out = attribute(model, "residual", lxt.Features(Exact(), at="residual", layer=LAYER, top=None))
    scale = out.latents["residual"].values.abs().max()
    assert out.latents["sae.error"].values.abs().max() < 1e-13 * scale
    assert out.latents["sae.bias"].values.abs().max() < 1e-13 * scale
    total = out.latents["sae"].values.sum(-1)[0]
    torch.testing.assert_close(total, out.latents["residual"].values[LAYER], rtol=1e-10, atol=1e-13)


def test_under_cp_they_add_up_to_the_logit():
    model = llama().double()
    out = attribute(model, lxt.Features(ReLU(), at="residual", layer=LAYER, top=None), rules="cp")
    total = sum(out.latents[name].values.sum() for name in ("sae", "sae.error", "sae.bias"))
    assert float(total) == pytest.approx(out.explained[0].value, rel=1e-9)


def test_what_was_kept_in_between_two_calls_is_there():
    model = llama().double()
    out = attribute(model, "residual", lxt.Features(Normed(), at="residual", layer=LAYER, top=None))
    total = sum(out.latents[name].values for name in ("sae.error", "sae.bias")) + out.latents["sae"].values.sum(-1)
    torch.testing.assert_close(total[0], out.latents["residual"].values[LAYER], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("norm_behind", [False, True])
def test_a_transcoder_reads_what_the_mlp_reads(norm_behind):
    model = (build("gemma2", "eager") if norm_behind else llama()).double()
    layer = model.model.layers[LAYER]
    sae = ReLU()
    out = attribute(model, "mlp_out", lxt.Features(sae, at="mlp", layer=LAYER, top=None))
    x, _, _ = caught(model, layer.mlp)
    _, y, c = caught(model, layer.post_feedforward_layernorm if norm_behind else layer.mlp)
    features = (x[0] @ sae.W_enc + sae.b_enc).relu()
    close = {"rtol": 1e-9, "atol": 1e-13}
    torch.testing.assert_close(out.latents["sae"].values[0, 0], (features * (c[0] @ sae.W_dec.T)).detach(), **close)
    error = ((y[0] - sae.decode(features)) * c[0]).sum(-1).detach()
    torch.testing.assert_close(out.latents["sae.error"].values[0, 0], error, **close)
    total = sum(out.latents[name].values for name in ("sae.error", "sae.bias")) + out.latents["sae"].values.sum(-1)
    torch.testing.assert_close(total[0], out.latents["mlp_out"].values[LAYER], **close)


def test_what_is_read_and_what_is_written_may_be_anywhere():
    model, sae = llama().double(), ReLU()
    path = f"model.layers.{LAYER}.mlp"
    expected = attribute(model, lxt.Features(sae, at="mlp", layer=LAYER))
    for options in ({"at": path, "reads": path}, {"at": "mlp_out", "layer": LAYER, "reads": path}):
        found = attribute(model, lxt.Features(sae, **options))
        for name in ("sae", "sae.error", "sae.bias"):
            assert torch.equal(found.latents[name].values, expected.latents[name].values)
    sae.cfg = SimpleNamespace(
        metadata=SimpleNamespace(
            hook_name=f"blocks.{LAYER}.ln2.hook_normalized", hook_name_out=f"blocks.{LAYER}.hook_mlp_out"
        )
    )
    found = attribute(model, lxt.Features(sae))
    assert torch.equal(found.latents["sae"].values, expected.latents["sae"].values)
    with pytest.raises(ValueError, match=r"runs after LlamaMLP.*were they exchanged"):
        attribute(model, lxt.Features(sae, at=path, reads="model.layers.2.mlp"))


def test_sums_that_are_written_into_the_mlps_output_leave_it_alone():
    torch.manual_seed(0)
    model = tf.FalconForCausalLM(
        tf.FalconConfig(
            vocab_size=300,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            parallel_attn=True,
            initializer_range=0.2,
        )
    ).eval()
    sae = Exact().float()
    out = Attributor(model).attribute(PROMPTS[0], latents=lxt.Features(sae, at="mlp_out", layer=0, top=None))
    assert out.latents["sae.error"].values.abs().max() < 1e-5 * out.latents["sae"].values.abs().max()
    whole = Attributor(model).attribute(PROMPTS[0], latents="mlp_out").latents["mlp_out"].values[0]
    assert (out.latents["sae"].values.sum(-1)[0] - whole).abs().max() < 1e-5 * whole.abs().max()


def test_an_mlp_that_is_no_module_has_to_be_told():
    with pytest.raises(ValueError, match=r"is no module of its own; give at='mlp_out' and reads="):
        attribute(opt().double(), lxt.Features(ReLU(), at="mlp", layer=LAYER))


def test_all_else_stays_as_it_was():
    model = llama()
    with_features = Attributor(model).attribute(
        PROMPTS, latents=("residual", "neuron", lxt.Features(ReLU(), at="residual", layer=LAYER))
    )
    without = Attributor(model).attribute(PROMPTS, latents=("residual", "neuron"))
    assert torch.equal(with_features.relevance, without.relevance)
    assert [one.value for one in with_features.explained] == [one.value for one in without.explained]
    for name in ("residual", "neuron"):
        assert torch.equal(with_features.latents[name].values, without.latents[name].values)


@pytest.mark.parametrize("checkpoint", ["layer", "nested"])
def test_checkpoints_give_the_same(checkpoint):
    model = llama(num_hidden_layers=5)
    features = (
        lxt.Features(ReLU(), at="residual", layer=1, name="low"),
        lxt.Features(ReLU(48, FEATURES, 48), at="neuron", layer=2, name="high"),
    )
    found, expected = (
        Attributor(model, checkpoint=how).attribute(PROMPTS, latents=features) for how in (checkpoint, "off")
    )
    for name in ("low", "low.error", "high", "high.bias"):
        assert torch.equal(found.latents[name].values, expected.latents[name].values)
        assert expected.latents[name].values.abs().max() > 0


def test_several_targets():
    model, features = llama().double(), lxt.Features(ReLU(), at="residual", layer=LAYER, top=None)
    with Float64():
        both = Attributor(model).attribute_targets(PROMPTS[0], [TARGET, 7], latents=features)
    alone = attribute(model, features)
    for name in features.names:
        torch.testing.assert_close(both.latents[name].values[:, :1], alone.latents[name].values, rtol=1e-9, atol=1e-13)


# Sums over 32 dimensions and 50 features: a model in bfloat16 has them in float32, one in float64 in its own.
@pytest.mark.parametrize(("dtype", "result", "close"), [("bfloat16", "float32", 1e-5), ("float64", "float64", 1e-12)])
def test_it_runs_in_its_own_precision(dtype, result, close):
    model, sae = llama().to(getattr(torch, dtype)), ReLU(dtype=torch.float32)
    out = attribute(model, "residual", lxt.Features(sae, at="residual", layer=LAYER))
    assert out.latents["sae"].values.dtype == getattr(torch, result)
    total = out.latents["sae"].values.sum(-1) + out.latents["sae"].rest
    total = total + out.latents["sae.error"].values + out.latents["sae.bias"].values
    scale = out.latents["residual"].values.abs().max()
    assert (total[0] - out.latents["residual"].values[LAYER]).abs().max() < close * scale


def test_one_that_wants_heads_apart_gets_them():
    class Heads(ReLU):
        """As SAELens' for hook_z."""

        hook_z_reshaping_mode = True

        def encode(self, x):
            assert x.shape[-2:] == (HEADS, HIDDEN // HEADS)
            return super().encode(x.flatten(-2))

        def decode(self, features):
            return super().decode(features).unflatten(-1, (HEADS, -1))

    model = llama().double()
    apart, flat = (attribute(model, lxt.Features(sae, at="head", layer=LAYER, top=None)) for sae in (Heads(), ReLU()))
    for name in ("sae", "sae.error", "sae.bias"):
        torch.testing.assert_close(apart.latents[name].values, flat.latents[name].values, rtol=1e-9, atol=1e-13)


def test_checkpoints_keep_no_more_for_it(monkeypatch):
    kept = []

    class Counted(checkpointing.Segment):
        def __init__(self, *args):
            kept[-1] += 1
            super().__init__(*args)

    monkeypatch.setattr(checkpointing, "Segment", Counted)
    explainer = Attributor(llama(num_hidden_layers=9), checkpoint="nested")
    for more in ((), (lxt.Features(ReLU(dtype=torch.float32), at="residual", layer=1),)):
        kept.append(0)
        explainer.attribute(PROMPTS[0], latents=("head", *more))
    assert kept[0] == kept[1] > 0


def test_the_place_may_be_the_objects_own():
    model, sae = llama(), ReLU()
    sae.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name="blocks.2.hook_resid_post"))
    out = Attributor(model).attribute(PROMPTS[0], latents=lxt.Features(sae))
    assert out.latents["sae"].layers == (2,)
    sae.cfg = SimpleNamespace(hook_name="blocks.0.hook_resid_post", metadata=None)
    assert Attributor(model).attribute(PROMPTS[0], latents=lxt.Features(sae)).latents["sae"].layers == (0,)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), None, SimpleNamespace(encode=len)])
def test_what_cannot_encode_and_decode_is_refused(wrong):
    with pytest.raises(TypeError, match=r"needs an object with encode\(x\) and decode\(features\).*got "):
        lxt.Features(wrong, at="residual", layer=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "head"}, "must be a text that is no latent's"),
        ({"name": ""}, "must be a text that is no latent's"),
        ({"top": 0}, "top must be a whole number >= 1"),
        ({"layer": -1}, "counted from 0"),
        ({"at": None}, "needs at=.*its cfg has no hook_name"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        lxt.Features(ReLU(), **{"at": "residual", "layer": 0} | options)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lxt.Features(ReLU(), at="residual"), "in 3 layers; give layer="),
        (lxt.Features(ReLU(), at="residual", layer=9), "layers 0 to 2"),
        (lxt.Features(ReLU(), at="resid", layer=1), "unknown latent 'resid'; did you mean 'residual'"),
        (lxt.Features(ReLU(16, 8, 16), at="residual", layer=1), r"ReLU fails on what 'residual' has, \(1, 5, 32\)"),
        (
            lxt.Features(ReLU(32, 8, 16), at="residual", layer=1),
            r"into \(1, 5, 16\), but what 'residual' has is \(1, 5",
        ),
        (lxt.Features(ReLU(), at="query", layer=1), "is no module's input or output"),
        (lxt.Features(ReLU(), at="residual_mid", layer=1), "is no module's input or output"),
        (lxt.Features(ReLU(), at="embed"), "is no module's input or output"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Attributor(llama().double()).attribute(PROMPTS[0], latents=features)


def test_a_decoder_without_a_gradient_is_refused():
    sae = ReLU()
    sae.decode = torch.no_grad()(sae.decode)
    with pytest.raises(ValueError, match="decode gives no gradient"):
        Attributor(llama().double()).attribute(PROMPTS[0], latents=lxt.Features(sae, at="residual", layer=0))


def test_two_of_one_name_are_refused():
    one, other = (lxt.Features(ReLU(), at="residual", layer=layer) for layer in (0, 1))
    with pytest.raises(ValueError, match="'sae' is asked for twice, as two of Features; give each a name="):
        Attributor(llama()).attribute(PROMPTS[0], latents=(one, other))


def test_they_are_stored_with_the_rest(tmp_path):
    out = Attributor(gpt2()).attribute(PROMPTS, latents=lxt.Features(ReLU(dtype=torch.float32), at="residual", layer=1))
    out.save(tmp_path / "out.safetensors")
    again = lxt.Attribution.load(tmp_path / "out.safetensors")
    for name in ("sae", "sae.error", "sae.bias"):
        assert torch.equal(again.latents[name].values, out.latents[name].values)
    assert torch.equal(again.latents["sae"].indices, out.latents["sae"].indices)
