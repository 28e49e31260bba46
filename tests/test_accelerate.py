"""Models that accelerate dispatches, offloads or hooks, before patching and after it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import build, checkpointed
from relevances import relevance, under_each
from torch import nn
from transformers.models.llama import modeling_llama

import lxt
from lxt.accelerate_hooks import computing_device, loading_hooks

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules  # noqa: E402

RULES = ("attnlrp", "cp")


@pytest.fixture(scope="module")
def expected():
    return under_each(RULES)


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def hook(model, folder):
    for module in list(model.modules()):
        add_hook_to_module(module, Counting())


def offload_to_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


ON_CPU_AND_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
}


def dispatch(model, folder):
    device_map = ON_CPU_AND_DISK | {"lm_head": "disk"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


PLACEMENTS = {"hooks": hook, "cpu_offload": offload_to_cpu, "disk_offload": offload_to_disk, "dispatch_model": dispatch}
over_placements = pytest.mark.parametrize("place", PLACEMENTS.values(), ids=PLACEMENTS)


@over_placements
@pytest.mark.parametrize("rules", RULES)
def test_placed_before_patching(place, rules, expected, tmp_path):
    model = build("llama")
    place(model, tmp_path)
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    with lxt.monkey_patch(model, rules):
        assert torch.equal(relevance(model), expected[rules])
    assert forwards == {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    assert torch.equal(relevance(model), expected[None])


@over_placements
@pytest.mark.parametrize("rules", RULES)
def test_placed_after_patching(place, rules, expected, tmp_path):
    model = build("llama")
    with lxt.monkey_patch(model, rules):
        place(model, tmp_path)
        assert torch.equal(relevance(model), expected[rules])
    assert torch.equal(relevance(model), expected[None])


@over_placements
@pytest.mark.parametrize("placed_first", [True, False])
@pytest.mark.parametrize("hooks_leave_first", [True, False])
def test_either_may_leave_first(place, placed_first, hooks_leave_first, expected, tmp_path):
    model = build("llama")
    if placed_first:
        place(model, tmp_path)
    handle = lxt.monkey_patch(model, "cp")
    if not placed_first:
        place(model, tmp_path)
    assert torch.equal(relevance(model), expected["cp"])
    if hooks_leave_first:
        remove_hook_from_submodules(model)
        assert torch.equal(relevance(model), expected["cp"])
        handle.remove()
    else:
        handle.remove()
        assert torch.equal(relevance(model), expected[None])
        remove_hook_from_submodules(model)
    assert torch.equal(relevance(model), expected[None])
    with lxt.monkey_patch(model, "attnlrp"):
        assert torch.equal(relevance(model), expected["attnlrp"])
    assert torch.equal(relevance(model), expected[None])


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, id=name) for name, place in PLACEMENTS.items()],
)
def test_under_a_module_patch(place, expected, tmp_path):
    model = build("llama")
    place(model, tmp_path)
    with lxt.monkey_patch(modeling_llama, "cp"):
        assert torch.equal(relevance(model), expected["cp"])
        assert torch.equal(relevance(model), expected["cp"])
    assert torch.equal(relevance(model), expected[None])


@pytest.mark.parametrize("patch_first", [True, False])
def test_loaded_with_a_device_map(patch_first, expected, tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    device_map = ON_CPU_AND_DISK | {"lm_head": "cpu"}

    def load():
        return modeling_llama.LlamaForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload"), dtype=torch.float64
        )

    model = None if patch_first else load()
    with lxt.monkey_patch(modeling_llama, "cp"):
        model = model or load()
        assert next(model.model.layers[1].parameters()).is_meta
        assert torch.equal(relevance(model), expected["cp"])
    assert torch.equal(relevance(model), expected[None])


def test_switching_rules_on_a_dispatched_model(expected, tmp_path):
    model = build("llama")
    dispatch(model, tmp_path)
    lxt.monkey_patch(model, "attnlrp")
    assert torch.equal(relevance(model), expected["attnlrp"])
    handle = lxt.monkey_patch(model, "cp")
    assert torch.equal(relevance(model), expected["cp"])
    handle.remove()
    assert torch.equal(relevance(model), expected[None])


@pytest.mark.parametrize("place", [offload_to_cpu, offload_to_disk])
def test_with_checkpointing(place, expected, tmp_path):
    model = build("llama").train()
    checkpointed(model, {"use_reentrant": False})
    place(model, tmp_path)
    with lxt.monkey_patch(model):
        assert torch.equal(relevance(model), expected["attnlrp"])


def test_hooks_run_once_and_only_their_own():
    model = build("llama")
    counting = Counting()
    add_hook_to_module(model.model.layers[0].mlp, counting)
    with lxt.monkey_patch(model):
        relevance(model)
    assert counting.calls == 1
    remove_hook_from_module(model.model.layers[0].mlp)
    assert "forward" not in model.model.layers[0].mlp.__dict__ or (
        model.model.layers[0].mlp.__dict__["forward"].__func__ is type(model.model.layers[0].mlp).forward
    )


def test_where_accelerate_has_a_module_compute():
    module = nn.Linear(2, 2)
    assert computing_device(module) == torch.device("cpu")
    assert loading_hooks(module) == []
    silent, loading = SimpleNamespace(), SimpleNamespace(offload=True, execution_device="meta")
    module._hf_hook = SimpleNamespace(hooks=(silent, loading))
    assert computing_device(module) == torch.device("meta")
    assert loading_hooks(module) == [loading]
