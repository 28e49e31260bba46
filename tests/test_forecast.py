"""What a forecast says is what happens: counted against the real pass's saved tensors, and measured in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import EXAMPLES, build
from small import LAYERS, PROMPTS, VOCABULARY, a_tokenizer, bert, gpt2, llama, t5
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

import lxt
from lxt.attributor import Attributor
from lxt.forecast import Forecast, Usage

BENCH = Path(__file__).parent / "bench" / "forecast.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured through /proc")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("checkpoint", ["off", "nested"])
@pytest.mark.parametrize("tokens", [512, 2048])
def test_within_15_percent_of_the_measured_peak(name, checkpoint, tokens):
    argv = ["--one", f"{name}:{tokens}:{checkpoint}", "--layers", "8" if tokens == 512 else "4"]
    done = subprocess.run([sys.executable, str(BENCH), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.85 * found["measured"] < found["forecast"] < 1.15 * found["measured"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured through /proc")
def test_a_trace_takes_its_own_size_and_no_more():
    # The neurons' relevance of 8 layers is half of the peak: a copy of it, or of its finiteness, would show.
    argv = ["--one", "llama:1024:layer", "--rules", "cp", "--latents", "residual", "neuron"]
    done = subprocess.run([sys.executable, str(BENCH), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.85 * found["measured"] < found["forecast"] < 1.15 * found["measured"]


def saved_by(model, tokens):
    """Bytes of the tensors that a plain patched forward saves, each storage once, the weights apart."""
    storages = {}
    mine = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in mine:
            storages[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    embeds = torch.randn(1, tokens, 32, requires_grad=True)
    with lxt.monkey_patch(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = model(inputs_embeds=embeds, use_cache=False).logits
    del logits
    return sum(size for size, _ in storages.values())


def test_activations_are_those_that_autograd_saves():
    # Two more layers are two more layers' activations: what the head, the last layer and the inputs add cancels.
    models = [llama(num_hidden_layers=layers) for layers in (3, 5)]
    foreseen = [Attributor(m).forecast(list(range(48))).devices["cpu"].activations for m in models]
    saved = [saved_by(m, 48) for m in models]
    assert foreseen[1] - foreseen[0] == pytest.approx(saved[1] - saved[0], rel=0.02)


def test_nothing_runs_and_nothing_changes():
    model = llama()
    expected = Attributor(model).attribute(PROMPTS)
    forwards = {name: module.__dict__.copy() for name, module in model.named_modules()}
    forecast = Attributor(model).forecast(PROMPTS, latents=("residual", "head", "neuron"))
    assert {name: module.__dict__.copy() for name, module in model.named_modules()} == forwards
    assert torch.equal(Attributor(model).attribute(PROMPTS).relevance, expected.relevance)
    assert (forecast.prompts, forecast.tokens, forecast.checkpoint) == (3, 7, "off")
    usage = forecast.devices["cpu"]
    assert usage.weights == sum(p.numel() * 4 for p in (*model.parameters(), *model.buffers()))
    assert usage.latents == LAYERS * 3 * 7 * (1 + 4 + 48) * 4
    assert usage.peak == usage.weights + usage.needed
    assert forecast.fits


def test_it_grows_with_tokens_and_shrinks_with_checkpoints():
    model = llama(num_hidden_layers=12, max_position_embeddings=10**6)

    def needed(tokens, how):
        usage = Attributor(model, checkpoint=how).forecast([1] * tokens).devices["cpu"]
        return usage.needed - usage.process

    assert needed(8192, "off") == pytest.approx(8 * needed(1024, "off"), rel=0.05)
    assert needed(8192, "nested") < needed(8192, "layer") < needed(8192, "off")


@pytest.mark.parametrize("make", [gpt2, t5, lambda: bert(BertForMaskedLM), lambda: bert(BertForSequenceClassification)])
def test_other_kinds_of_models(make):
    model = make()
    ids = [5, 6, 7, 2] if "Masked" in type(model).__name__ else [5, 6, 7, 8]
    explainer = Attributor(model, a_tokenizer())
    explainer.attribute(ids)
    assert explainer.forecast(ids).devices["cpu"].needed > 0


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("vit", "t5")])
def test_all_architectures_of_the_tests(name):
    model = build(name, "eager" if name == "gemma2" else "sdpa", torch.float32)
    assert Attributor(model).forecast([1, 2, 3, 4]).flops > 0


def test_weights_on_the_meta_device_before_they_are_placed():
    # A model that isn't there yet can't be explained, but what it takes can be said: for whoever places its weights.
    from lxt.forecast import forecast_pass
    from lxt.patches import patch_map_for

    model = llama()
    expected = Attributor(model).forecast([1] * 40).devices["cpu"]
    empty = llama().to("meta")

    def patch():
        return lxt.monkey_patch(empty)

    found = forecast_pass(empty, patch_map_for(empty), patch, 1, 40)
    assert found.devices["cpu"].needed == expected.needed
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_the_table(capsys):
    forecast = Attributor(llama()).forecast(PROMPTS[0])
    forecast.show()
    shown = capsys.readouterr().out
    for word in (
        "weights",
        "activations",
        "checkpoints",
        "logits",
        "latents",
        "working",
        "process",
        "peak",
        "5 tokens",
        "FLOP",
    ):
        assert word in shown
        assert word in str(forecast)
    assert isinstance(forecast, Forecast)
    assert VOCABULARY * 4 == forecast.devices["cpu"].logits


def test_the_table_says_what_is_too_little():
    usages = {"cpu": Usage(working=2**30, free=2**31), "cuda:0": Usage(working=2**31, free=2**30)}
    said = " ".join(str(Forecast(usages, 1, 5, "off", (), 10**12, 1.0)).split())
    assert "does not fit: 1.0 GiB too little on cuda:0" in said
    usages["cuda:0"] = usages["cpu"]
    assert "fit" not in str(Forecast(usages, 1, 5, "off", (), 10**12, 1.0))


def test_a_state_that_a_model_keeps_is_not_a_forecasts():
    model = recurrent_gemma()
    explainer = Attributor(model)
    explainer.forecast([1, 2, 3, 4])
    assert model.model.layers[0].temporal_block.rg_lru.recurrent_states is None
    explainer.attribute([1, 2, 3, 4])
    state = model.model.layers[0].temporal_block.rg_lru.recurrent_states
    assert state is not None
    explainer.forecast([1, 2, 3, 4])
    assert model.model.layers[0].temporal_block.rg_lru.recurrent_states is state


def recurrent_gemma():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "lru_width": 32, "intermediate_size": 96}
    config = RecurrentGemmaConfig(
        vocab_size=60, num_hidden_layers=3, num_attention_heads=4, attention_window_size=16, **sizes
    )
    return RecurrentGemmaForCausalLM(config).eval()


def test_what_depends_on_numbers_is_said():
    class Deciding(type(llama())):
        def forward(self, inputs_embeds, **options):
            if inputs_embeds.sum() > 0:
                inputs_embeds = inputs_embeds * 1
            return super().forward(inputs_embeds=inputs_embeds, **options)

    model = llama(cls=Deciding)
    with pytest.raises(ValueError, match="what Deciding takes can't be forecast: without numbers it stops"):
        Attributor(model).forecast(PROMPTS[0])
    assert Attributor(model).attribute(PROMPTS[0]) is not None
    with pytest.raises(ValueError, match="text alone"):
        Attributor(build("vit")).forecast(torch.zeros(1, 3, 16, 16))
