"""Checkpointing of layers is exact and keeps what it says; amounts of memory; what happens when it runs out."""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import replace

import pytest
import torch
from models import build
from small import PROMPTS, gpt2, llama, t5
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint  # noqa: F401  loads what its first call would

import lxt
from lxt import checkpointing, fitting, planning
from lxt.attributor import Attributor
from lxt.checkpointing import Segment, checkpointed, segment_length
from lxt.latents import residual_layers
from lxt.memory import available, format_bytes, parse_bytes, resident
from lxt.patches import patch_map_for

LATENTS = ("residual", "head", "neuron")
ELEVEN = {"num_hidden_layers": 11}


def equal(a, b):
    assert torch.equal(a.relevance, b.relevance)
    assert a.latents.keys() == b.latents.keys()
    assert all(torch.equal(a.latents[name], b.latents[name]) for name in a.latents)


@pytest.mark.parametrize("checkpoint", ["layer", "nested"])
@pytest.mark.parametrize("rules", ["attnlrp", "cp", "gradient"])
@pytest.mark.parametrize("latents", [(), ("residual",), LATENTS], ids=["none", "residual", "all"])
def test_checkpointing_is_exact(checkpoint, rules, latents):
    model = llama(**ELEVEN)
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    expected = Attributor(model, rules=rules).attribute(PROMPTS, latents=latents)
    out = Attributor(model, rules=rules, checkpoint=checkpoint).attribute(PROMPTS, latents=latents)
    equal(out, expected)
    assert forwards == {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    assert not model.training


@pytest.mark.parametrize(("checkpoint", "times"), [("layer", 0), ("nested", 6)])
def test_the_random_numbers_state_is_kept_where_a_layer_may_run_for_its_output(checkpoint, times, monkeypatch):
    taken = []
    monkeypatch.setattr(checkpointing, "get_device_states", lambda x: taken.append(1) or ([], []))
    Attributor(llama(**ELEVEN), checkpoint=checkpoint).attribute(PROMPTS[0])
    assert len(taken) == times  # of eleven layers in segments of four, the last of them left alone: 3 + 3


@pytest.mark.parametrize("checkpoint", ["layer", "nested"])
def test_other_architectures_and_several_targets(checkpoint):
    for model in (gpt2(), t5()):
        expected = Attributor(model).attribute(PROMPTS[0])
        assert torch.equal(Attributor(model, checkpoint=checkpoint).attribute(PROMPTS[0]).relevance, expected.relevance)
    model = llama(**ELEVEN)
    expected = Attributor(model).attribute_targets(PROMPTS[0], [5, 6, 7], latents=LATENTS)
    equal(Attributor(model, checkpoint=checkpoint).attribute_targets(PROMPTS[0], [5, 6, 7], latents=LATENTS), expected)


@pytest.mark.parametrize(("checkpoint", "runs"), [("off", 11), ("layer", 11 + 10), ("nested", 11 + 10 + 6)])
def test_how_often_layers_run(checkpoint, runs):
    # Of eleven layers in segments of four, the last layer runs once; the first three of two segments once more.
    model, count = llama(**ELEVEN), []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: count.append(1))
    Attributor(model, checkpoint=checkpoint).attribute(PROMPTS[0], latents=("head",))
    assert segment_length(11) == 4
    assert len(count) == runs


def kept(model, checkpoint, latents=()):
    """How many hidden states are alive after the forward."""
    explainer = Attributor(model, checkpoint=checkpoint)
    usage = explainer.forecast(list(range(64)), latents=latents).devices["cpu"]
    return (usage.activations + usage.checkpoints) / (64 * 32 * 4)


def test_nested_keeps_square_root_and_taps_keep_nothing():
    layers = 17
    model = llama(num_hidden_layers=layers, max_position_embeddings=128)
    assert segment_length(layers) == 5
    for how, states in (("nested", 5), ("layer", layers)):
        bare, tapped = kept(model, how), kept(model, how, ("residual",))
        assert states <= bare < states + 1  # of which the last layer's, which keeps all, are few: it is narrow
        assert bare <= tapped < bare + 3  # the last layer has a tap, and runs in full
    assert kept(model, "off") > 5 * layers


def test_a_state_that_changes_between_layers_is_kept():
    model = llama(**ELEVEN)
    handle = model.model.layers[5].register_forward_hook(lambda module, args, output: output * 2)
    expected = Attributor(model).attribute(PROMPTS)
    equal(Attributor(model, checkpoint="nested").attribute(PROMPTS), expected)
    handle.remove()


def test_a_kept_state_that_changes_in_place_is_an_error():
    state = torch.ones(3)
    segment = Segment(state, offload=False)
    assert torch.equal(segment.read(0), state)
    state.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        segment.read(0)


def test_under_a_users_own_patch_and_after_an_error():
    model = build("llama")
    layers = residual_layers(model, patch_map_for(model))
    with pytest.raises(RuntimeError, match="inside"), checkpointed([layers], "nested"):
        raise RuntimeError("inside")
    assert all("forward" not in layer.__dict__ for layer in layers)
    model = llama()
    expected = Attributor(model, rules="cp").attribute(PROMPTS)
    with lxt.monkey_patch(model, "cp"):
        equal(Attributor(model, rules="cp", checkpoint="layer").attribute(PROMPTS), expected)


def test_accelerate_offload(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = Attributor(llama(**ELEVEN)).attribute(PROMPTS, latents=LATENTS)
    model = llama(**ELEVEN)
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    for checkpoint in ("layer", "nested"):
        explainer = Attributor(model, checkpoint=checkpoint)
        equal(explainer.attribute(PROMPTS, latents=LATENTS), expected)
        assert explainer.forecast(PROMPTS).devices["cpu"].weights > 0
        assert next(model.parameters()).is_meta


def test_check_runs_checkpointed():
    model = llama(**ELEVEN)
    assert Attributor(model, checkpoint="nested").attribute(PROMPTS).check() is not None


def test_no_layers_and_unknown_choices():
    class Bare(nn.Module):
        pass

    from lxt.latents import streams

    with pytest.raises(ValueError, match="no list of layers that could be checkpointed; use checkpoint='off'"):
        streams(Bare(), lxt.PatchMap())
    with pytest.raises(ValueError, match="unknown checkpoint 'some'; allowed: off, layer, nested, auto"):
        Attributor(llama(), checkpoint="some")


def test_amounts():
    assert [parse_bytes(x) for x in ("4GiB", "500 MB", "2G", "1.5k", 77)] == [2**32, 5 * 10**8, 2 * 10**9, 1500, 77]
    for wrong in ("x", 0, True, "-1G", "4 Gx", None, 1.5):
        with pytest.raises(ValueError, match="not an amount of memory"):
            parse_bytes(wrong)
    assert [format_bytes(x) for x in (10, 2**20, 3.25 * 2**30, 300 * 2**20)] == [
        "10 B",
        "1.0 MiB",
        "3.2 GiB",
        "300 MiB",
    ]
    assert 0 < available(torch.device("cpu"))
    assert resident() > 2**20


def free_for(monkeypatch, amount):
    monkeypatch.setattr(planning, "available", lambda device: amount)
    monkeypatch.setattr(planning, "give_back_freed", lambda: None)
    monkeypatch.setattr(fitting, "give_back_freed", lambda: None)


def needed(model, prompts, checkpoint, **options):
    return Attributor(model, checkpoint=checkpoint).forecast(prompts, **options).devices["cpu"].needed


LONG = [list(range(60)) for _ in range(4)]


def test_what_cannot_fit_is_refused_with_what_would(monkeypatch):
    model = llama(**ELEVEN)
    off, layer = (needed(model, LONG, how) for how in ("off", "layer"))
    free_for(monkeypatch, (off + layer) // 2)
    with pytest.raises(
        MemoryError, match=r"4 prompts of 60 tokens would take .* too little.* These would fit: .*layer"
    ):
        Attributor(model).attribute(LONG)
    with pytest.raises(MemoryError, match="batch_size=1"):
        Attributor(model).attribute(LONG)
    free_for(monkeypatch, 1000)
    with pytest.raises(MemoryError, match=r"Shorten the prompt.*less, but not enough"):
        Attributor(model).attribute(LONG[0])


def test_a_budget_chooses_and_says_so(monkeypatch):
    model = llama(**ELEVEN)
    expected = Attributor(model).attribute(LONG, latents="residual")
    off, layer = (needed(model, LONG, how, latents="residual") for how in ("off", "layer"))
    free_for(monkeypatch, (off + layer) // 2)
    with pytest.warns(UserWarning, match="to fit the memory: checkpoint='layer'; takes about"):
        equal(Attributor(model, memory="64GiB").attribute(LONG, latents="residual"), expected)
    usage = Attributor(model, checkpoint="nested").forecast(LONG, latents="residual").devices["cpu"]
    free_for(monkeypatch, usage.process + (usage.needed - usage.process) // 2)
    with pytest.warns(UserWarning, match="batch_size="):
        out = Attributor(model, memory="64GiB").attribute(LONG, latents="residual")
    torch.testing.assert_close(out.relevance, expected.relevance, rtol=1e-4, atol=1e-6)  # other batches, other sums
    monkeypatch.undo()
    with pytest.raises(MemoryError, match=r"within memory=1\.0 MiB"):
        Attributor(model, memory="1MiB").attribute(LONG)


def test_each_choice_is_said_once(monkeypatch):
    chosen = iter(["layer", "layer", "nested", "layer"])

    def fitted(request, *_):
        how = next(chosen)
        return replace(request, checkpoint=how), f"checkpoint={how!r}; takes about {time.perf_counter()}"

    monkeypatch.setattr(planning, "fitted", fitted)
    monkeypatch.setattr(planning, "surely_fits", lambda *_: False)
    explainer = Attributor(llama(), memory="64GiB")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            explainer.attribute(PROMPTS[0])
    assert [str(one.message).partition(";")[0] for one in said] == ["checkpoint='layer'", "checkpoint='nested'"]
    assert {one.filename for one in said} == {__file__}


def test_a_larger_budget_is_named_where_there_is_one(monkeypatch):
    model = llama()
    with pytest.raises(MemoryError, match=r"These would fit: memory='\d+MiB'") as error:
        Attributor(model, memory="1MiB", checkpoint="nested").attribute(PROMPTS[0])
    enough = parse_bytes(re.search(r"memory='(.*?)'", str(error.value))[1])
    Attributor(model, memory=enough + 2**24).attribute(PROMPTS[0])  # and what this process took meanwhile
    monkeypatch.setattr(fitting, "available", lambda device: 0)
    with pytest.raises(MemoryError, match="Shorten the prompt") as error:
        Attributor(model, memory="1MiB", checkpoint="nested").attribute(PROMPTS[0])
    assert "memory='" not in str(error.value)


def failing(times, real):
    """The pass, but memory runs out in the first ones."""

    def run(*args):
        if times:
            raise times.pop()
        return real(*args)

    return run


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: you tried")]


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "python", "cpu"])
def test_memory_that_runs_out_is_caught_once(monkeypatch, error):
    from lxt import attributor

    model, real = llama(**ELEVEN), attributor.run
    expected = Attributor(model).attribute(LONG)
    monkeypatch.setattr(attributor, "run", failing([error], real))
    with pytest.warns(UserWarning, match="with 4 prompts at once: trying again with 2"):
        out = Attributor(model).attribute(LONG)
    torch.testing.assert_close(out.relevance, expected.relevance, rtol=1e-4, atol=1e-6)
    expected = Attributor(model).attribute(LONG[0])
    monkeypatch.setattr(attributor, "run", failing([error], real))
    with pytest.warns(UserWarning, match="checkpoint='off': trying again with 'layer'"):
        equal(Attributor(model).attribute(LONG[0]), expected)
    monkeypatch.setattr(attributor, "run", failing([error, error], real))
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(MemoryError, match="ran out again, with 2 at once"),
    ):
        Attributor(model).attribute(LONG)
    monkeypatch.setattr(attributor, "run", failing([RuntimeError("something else")], real))
    with pytest.raises(RuntimeError, match="something else"):
        Attributor(model).attribute(LONG)
