"""Latents are where they should be, in architectures of every form; and those that aren't there are named.

The oracles know nothing of how places are found: sums under CP-LRP, activations that add up, and what the product of
attention weights with values gave.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lxt import Keep, Target
from lxt.attributor import Attributor
from lxt.coverage.build import built
from lxt.coverage.precision import Float64
from lxt.coverage.subjects import all_subjects
from lxt.latents import adding, hooked, residual_layers, sites, streams
from lxt.patches import patch_map_for

IDS = [9, 17, 4, 42, 29, 33, 5]
SEQUENTIAL = (
    "causal/llama", "causal/gpt2", "causal/opt", "causal/bloom", "causal/mpt", "causal/gpt_neo", "causal/olmo2",
    "causal/gemma3_text", "causal/glm4", "causal/exaone4", "causal/starcoder2", "causal/nanochat",
)  # fmt: skip
POST_NORM = ("masked/bert", "masked/distilbert", "masked/modernbert", "causal/bert", "causal/bart", "causal/openai-gpt")
PARALLEL = ("causal/falcon", "causal/gpt_neox", "causal/gptj", "causal/cohere", "causal/phi")
KINDS = ("residual", "residual_pre", "attn_out", "mlp_out", "head", "neuron")
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums in another order


TARGET = Target(5, position=-1)  # masked language models have to be told


def model_of(key):
    return built(next(subject for subject in all_subjects() if subject.key == key))


class Weighed(TorchFunctionMode):
    """What attention weights gave with values, [batch, token, head * d_head]."""

    def __init__(self):
        super().__init__()
        self.found, self.heads = [], set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        weights = args[0] if name in ("matmul", "__matmul__", "bmm") else None
        if name == "scaled_dot_product_attention" or (weights is not None and self._are_weights(weights)):
            four = result if result.dim() == 4 else result[None]  # BLOOM's bmm: [batch * head, query, d_head]
            self.found.append(four.detach().transpose(1, 2).flatten(2))
            self.heads.add(four.shape[1])
        return result

    @staticmethod
    def _are_weights(x):
        return x.dim() > 2 and bool((x >= 0).all()) and torch.allclose(x.sum(-1), torch.ones_like(x.sum(-1)))


@pytest.mark.parametrize("key", [*SEQUENTIAL, *POST_NORM, *PARALLEL])
def test_places(key, monkeypatch):
    model = model_of(key)
    kinds = KINDS if key in PARALLEL else (*KINDS, "residual_mid")
    values, weighed = {}, Weighed()

    def keep(site, x):
        values[site.latent, site.layer] = x.detach().clone()
        return x

    def write(site, sink, owner, shape, c_x, x, write=adding._write):
        if owner.live:
            keep(site, x)
        write(site, sink, owner, shape, c_x, x)

    monkeypatch.setattr(adding, "_write", write)
    patch_map = patch_map_for(model)
    with ExitStack() as stack:
        for site in sites(model, patch_map, [Keep(kind) for kind in kinds]):
            if site.end != "branch":
                stack.enter_context(hooked(site, partial(keep, site)))
        stack.enter_context(Float64())
        stack.enter_context(weighed)
        out = Attributor(model, rules="cp").attribute([IDS], TARGET, latents=kinds)
    relevance = {kind: out.latents[kind].tensor for kind in kinds}
    layers = range(len(residual_layers(model, patch_map)))
    for kind in kinds:
        assert out.latents[kind].layers == tuple(layers)
    torch.testing.assert_close(relevance["head"].sum(-1), relevance["attn_out"], **CLOSE)
    torch.testing.assert_close(relevance["neuron"].sum(-1), relevance["mlp_out"], **CLOSE)
    value = torch.full((len(layers), 1), out.explained[0].value, dtype=torch.float64)
    for kind in ("residual", "residual_pre", "residual_mid"):
        if kind in kinds:
            torch.testing.assert_close(relevance[kind].sum(-1), value, **CLOSE)
    for layer in layers:
        one = {kind: values[kind, layer].reshape(1, len(IDS), -1) for kind in kinds}
        assert any(given.shape == one["head"].shape and torch.allclose(given, one["head"]) for given in weighed.found)
        if key in SEQUENTIAL or key in POST_NORM:
            torch.testing.assert_close(one["residual_pre"] + one["attn_out"], one["residual_mid"], **CLOSE)
        if key in SEQUENTIAL or key == "masked/modernbert":
            torch.testing.assert_close(one["residual_mid"] + one["mlp_out"], one["residual"], **CLOSE)
        if key in PARALLEL:
            torch.testing.assert_close(one["residual_pre"] + one["attn_out"] + one["mlp_out"], one["residual"], **CLOSE)
    assert weighed.heads == {relevance["head"].shape[-1]}


@pytest.mark.parametrize("rules", ["attnlrp", "gradient"])
@pytest.mark.parametrize("key", ["causal/llama", "causal/falcon", "causal/bloom", "masked/bert", "causal/gemma3_text"])
def test_sums_hold_under_other_rules(key, rules):
    with Float64():
        out = Attributor(model_of(key), rules=rules).attribute([IDS], TARGET, latents=("head", "attn_out"))
        neurons = Attributor(model_of(key), rules=rules).attribute([IDS], TARGET, latents=("neuron", "mlp_out"))
    same = torch.allclose(out.latents["head"].sum(-1), out.latents["attn_out"].tensor, **CLOSE)
    assert same == (key != "causal/gemma3_text" or rules != "gradient")  # a norm lies between, with its gradient
    same = torch.allclose(neurons.latents["neuron"].sum(-1), neurons.latents["mlp_out"].tensor, **CLOSE)
    assert same == (key != "causal/gemma3_text" or rules != "gradient")


def test_parts_that_are_no_attention_are_no_part_of_a_head():
    """Half of what ConvBERT projects comes from convolutions, as many dimensions each."""
    model = model_of("masked/convbert")
    attention = model.convbert.encoder.layer[0].attention.self
    out = Attributor(model, rules="cp").attribute([IDS], TARGET, latents=("head", "attn_out"))
    assert attention.num_attention_heads == 2
    assert out.latents["head"].shape[-1] == 4
    with Float64(), hooked(sites(model, patch_map_for(model), [Keep("head")])[0], lambda x: found.append(x) or x):
        found = []
        Attributor(model, rules="cp").attribute([IDS], TARGET)
    assert found[0].shape[-1] == 4 * attention.attention_head_size


@pytest.mark.parametrize("checkpoint", ["layer", "nested"])
@pytest.mark.parametrize("key", ["causal/llama", "masked/bert", "causal/gemma3_text", "causal/falcon"])
def test_checkpoints_change_nothing(key, checkpoint):
    model = model_of(key)
    kinds = KINDS if key in PARALLEL else (*KINDS, "residual_mid")
    with Float64():
        expected = Attributor(model).attribute([IDS, IDS[:4]], [TARGET, TARGET], latents=kinds)
    # Float64 can't be entered again by a recomputation, so that this compares what float32 norms leave of float64
    plain = Attributor(model).attribute([IDS, IDS[:4]], [TARGET, TARGET], latents=kinds)
    again = Attributor(model, checkpoint=checkpoint).attribute([IDS, IDS[:4]], [TARGET, TARGET], latents=kinds)
    for kind in kinds:
        assert torch.equal(again.latents[kind].tensor, plain.latents[kind].tensor)
        torch.testing.assert_close(plain.latents[kind].tensor, expected.latents[kind].tensor, rtol=1e-4, atol=1e-6)


def test_several_targets_of_one_graph():
    explainer = Attributor(model_of("causal/llama"))
    several = explainer.attribute_targets([IDS], [5, 6], latents=("residual_mid", "attn_out"))
    for row, target in enumerate((5, 6)):
        one = explainer.attribute([IDS], target, latents=("residual_mid", "attn_out"))
        for kind in one.latents:
            torch.testing.assert_close(several.latents[kind].tensor[:, row], one.latents[kind].tensor[:, 0])


def test_taps_leave_the_relevance_alone():
    model = model_of("causal/gemma3_text")
    plain = Attributor(model).attribute([IDS], TARGET)
    for kind in ("attn_out", "mlp_out", "residual_mid", "residual_pre"):
        tapped = Attributor(model).attribute(
            [IDS], TARGET, latents=Keep(kind, layers=(0,))
        )  # the last layer stays narrow
        torch.testing.assert_close(tapped.relevance, plain.relevance, rtol=1e-6, atol=1e-9)


MISSING = {
    "mamba": ("causal/mamba", "head", r"layer 0 of MambaForCausalLM \(MambaBlock\): it has no attention\. That layer"),
    "experts": ("causal/qwen3_moe", "neuron", "no single down projection: each of its experts.* Ask for 'expert'"),
    "parameters": ("causal/xlnet", "head", "has no output projection that is a module"),
    "adds by itself": ("causal/xlnet", "attn_out", "adds to the residual stream by itself"),
    "hybrid": ("causal/granitemoehybrid", "head", r"it has no attention.* that have one: layers=\(1,\), as in Keep\("),
    "two of each": ("causal/longcat_flash", "head", r"several attentions: self_attn\.0, self_attn\.1"),
    "several MLPs": ("masked/mobilebert", "neuron", r"several MLPs: .*output\.dense, ffn\.0\.output\.dense"),
    "parallel": ("causal/gptj", "residual_mid", "no relevance came to 'residual_mid' in layer 0: .*the same stream"),
    "shared": ("masked/albert", "residual", "runs more than once in a forward"),
    "no list": ("masked/xlm", "residual", "XLMWithLMHeadModel has no list of layers"),
    "other tokens": ("masked/funnel", "residual", r"has the shape \(1, .* where the prompt's is \(1, 7\)"),
    "decoder": ("seq2seq/t5", "decoder.block.0", "is in the decoder, .*which reads other tokens"),
    "behind the decoder": ("seq2seq/t5", "lm_head", "is in the decoder, or behind it"),
    "layer within": ("causal/zamba", Keep("attn_out", layers=(1,)), "lie in a ZambaAttentionDecoderLayer"),
}


@pytest.mark.parametrize(("key", "latent", "message"), MISSING.values(), ids=MISSING)
def test_what_is_not_there_is_named(key, latent, message):
    explainer = Attributor(model_of(key))
    with pytest.raises(ValueError, match=message):
        explainer.attribute([IDS], None if key.startswith("seq2seq") else TARGET, latents=latent)


def test_tokens_before_rows_are_read_row_by_row():
    explainer = Attributor(model_of("causal/xlnet"), rules="cp")
    rows = [IDS[:3], IDS[1:4]]
    with pytest.raises(ValueError, match="one row at a time; give batch_size=1"):
        explainer.attribute(rows, [TARGET, TARGET], latents="residual")
    both = explainer.attribute(rows, [TARGET, TARGET], latents="residual", batch_size=1)
    for number, row in enumerate(rows):
        one = explainer.attribute([row], TARGET, latents="residual")
        torch.testing.assert_close(both.latents["residual"].tensor[:, number], one.latents["residual"].tensor[:, 0])


def test_the_dense_layers_of_a_mixture_are_steered():
    model = model_of("causal/deepseek_v3")  # experts from layer 1 on
    explainer = Attributor(model)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        plain = model(ids).logits
        with explainer.steer({("neuron", 0): 0.0, "blocks.1.attn.hook_z": 0.0}):
            assert not torch.allclose(model(ids).logits, plain)
    with pytest.raises(ValueError, match=r"'neuron' is not known for layer 1 .*layers=\(0,\)"):
        explainer.steer({("neuron", 1, 3): 0.0})


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("causal/git", "git.encoder.layer"),
        ("causal/got_ocr2", "model.language_model.layers"),
        ("causal/moss_transcribe_diarize", "model.language_model.layers"),
        ("image-text/idefics", "model.layers"),
        ("causal/jamba", "model.layers"),
        ("causal/zamba", "model.layers"),
        ("causal/olmo_hybrid", "model.layers"),
        ("image-text/mllama", "model.language_model.layers"),
    ],
)
def test_the_residual_stream_is_that_of_the_text(key, path):
    """Vision and sound have lists of layers too, and a stream may have layers of several classes."""
    model = model_of(key)
    layers = residual_layers(model, patch_map_for(model))
    assert layers == list(model.get_submodule(path))
    assert streams(model, patch_map_for(model))[0] == layers


@pytest.mark.parametrize("key", ["causal/jamba", "causal/olmo_hybrid"])
def test_layers_of_several_classes_are_checkpointed(key):
    model = model_of(key)
    plain = Attributor(model).attribute([IDS], TARGET, latents="residual")
    again = Attributor(model, checkpoint="layer").attribute([IDS], TARGET, latents="residual")
    torch.testing.assert_close(again.relevance, plain.relevance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again.latents["residual"].tensor, plain.latents["residual"].tensor, **CLOSE)


def test_an_encoder_decoder_is_read_in_its_encoder():
    model = model_of("seq2seq/t5")
    out = Attributor(model).attribute([IDS], target=Target([5, 6]), latents=("embed", "residual", "head", "neuron"))
    assert out.latents["residual"].shape == (2, 1, len(IDS))
    torch.testing.assert_close(out.latents["embed"][0], out.relevance)
    assert residual_layers(model, patch_map_for(model)) == list(model.encoder.block)


def test_embed_is_the_relevance_of_a_decoder():
    explainer = Attributor(model_of("causal/llama"))
    out = explainer.attribute([IDS, IDS[:3]], latents="embed")
    assert torch.equal(out.latents["embed"][0], out.relevance)
