"""What latents keep alive: with `top`, nothing as large as layers × tokens × neurons, and no activation at all."""

from __future__ import annotations

import gc

import pytest
import torch
from small import llama
from torch.multiprocessing.reductions import StorageWeakRef

from lxt import Keep
from lxt.attributor import Attributor
from lxt.latents import Sink, adding

IDS = list(range(3, 43))
TOP, LAYERS = 5, 6


def size(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.fixture
def written(monkeypatch):
    """[(latent, whether what was written before is still there, bytes in the sink after it)]."""
    found, refs = [], []

    def write(self, site, owner, value, write=Sink.write):
        found.append((site.latent, sum(not ref.expired() for ref in refs)))
        refs.append(StorageWeakRef(value.untyped_storage()))
        write(self, site, owner, value)
        found[-1] += (size(part for parts in self.values.values() for part in parts),)

    monkeypatch.setattr(Sink, "write", write)
    return found


@pytest.mark.parametrize("checkpoint", ["off", "layer"])
def test_of_the_largest_only_they_are_kept(written, checkpoint):
    model = llama(num_hidden_layers=LAYERS)
    neurons = model.config.intermediate_size
    explainer = Attributor(model, checkpoint=checkpoint)
    out = explainer.attribute(IDS, latents=(Keep("neuron", top=TOP), Keep("head", top=1)))
    assert [name for name, _, _ in written].count("neuron") == LAYERS
    assert all(alive == 0 for _, alive, _ in written)  # [token, neuron] of the layer above has gone
    each = len(IDS) * (TOP * (4 + 4) + 4) + len(IDS) * (1 * (4 + 4) + 4)  # value and number of each, and the rest
    assert written[-1][2] == LAYERS * each
    assert LAYERS * each < LAYERS * len(IDS) * neurons * 4 / 2
    kept = out.latents["neuron"]
    assert size((kept.values, kept.indices, kept.rest)) < LAYERS * each


def test_of_all_they_are_all_kept(written):
    """The control: it is what the other test says that there is not."""
    model = llama(num_hidden_layers=LAYERS)
    Attributor(model).attribute(IDS, latents="neuron")
    assert [alive for _, alive, _ in written] == list(range(LAYERS))
    assert written[-1][2] == LAYERS * len(IDS) * model.config.intermediate_size * 4


def test_the_rest_and_the_largest_are_all():
    model = llama()
    whole = Attributor(model).attribute(IDS, latents="neuron").latents["neuron"].tensor
    kept = Attributor(model).attribute(IDS, latents=Keep("neuron", top=TOP)).latents["neuron"]
    values = whole.gather(-1, kept.indices.long())
    assert torch.equal(kept.values, values)
    assert torch.equal(values.abs().amin(-1), whole.abs().topk(TOP, -1).values[..., -1])
    torch.testing.assert_close(kept.values.sum(-1) + kept.rest, whole.sum(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpoint", ["off", "layer", "nested"])
def test_readings_of_branches_go_with_the_graph(monkeypatch, checkpoint):
    refs = []

    def write(site, sink, owner, shape, c_x, x, write=adding._write):
        refs.append(StorageWeakRef(x.untyped_storage()))
        write(site, sink, owner, shape, c_x, x)

    monkeypatch.setattr(adding, "_write", write)
    explainer = Attributor(llama(), checkpoint=checkpoint)
    out = explainer.attribute(IDS, latents=("attn_out", "residual_mid", "mlp_out"))
    gc.collect()
    assert len(refs) == 9
    assert all(ref.expired() for ref in refs)
    assert out.latents["residual_mid"].shape == (3, 1, len(IDS))


def test_no_activation_outlives_its_layer_under_checkpoints(monkeypatch):
    """What a recomputation made is gone when the next layer is recomputed."""
    alive, refs = [], []

    def write(site, sink, owner, shape, c_x, x, write=adding._write):
        alive.append((site.layer, {layer for layer, ref in refs if not ref.expired()}))
        refs.append((site.layer, StorageWeakRef(x.untyped_storage())))
        write(site, sink, owner, shape, c_x, x)

    monkeypatch.setattr(adding, "_write", write)
    Attributor(llama(), checkpoint="layer").attribute(IDS, latents=("attn_out", "residual_mid", "mlp_out"))
    for layer, others in alive:
        assert all(other <= layer + 1 for other in others)
    assert not any(2 in others for layer, others in alive if layer == 0)


def test_a_forecast_knows_what_is_kept():
    explainer = Attributor(llama())
    for latents, numbers in (("residual_mid", 3), (("attn_out", "mlp_out", "residual_pre"), 9), ("model.norm", 1)):
        forecast = explainer.forecast(IDS, latents=latents)
        assert forecast.devices["cpu"].latents == numbers * len(IDS) * 4
