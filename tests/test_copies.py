"""Copies, saved files and the memory of patched models."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import build
from relevances import relevance
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

import lxt
from lxt.patches import patch_map_for


def hooked(model):
    hooks = pytest.importorskip("accelerate.hooks")
    for module in list(model.modules()):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    return model


@pytest.mark.parametrize(
    "prepare", [pytest.param(lambda model: model, id="plain"), pytest.param(hooked, id="accelerate")]
)
def test_a_copy_runs_its_own_weights(prepare):
    model = prepare(build("llama"))
    unpatched = relevance(model)
    handle = lxt.monkey_patch(model, "cp")
    patched = relevance(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(relevance(model), patched)
    assert not relevance(twin).any(), "the copy's forward ran the original's modules"
    handle.remove()
    assert torch.equal(relevance(model), unpatched)
    assert not relevance(twin).any()


def test_a_copy_of_a_fused_module_runs_its_own_weights():
    llama = build("llama")
    mlp, x = llama.model.layers[0].mlp, torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    with lxt.monkey_patch(mlp, patch_map=patch_map_for(llama)):
        twin = copy.deepcopy(mlp)
        with torch.no_grad():
            twin.down_proj.weight.zero_()
        assert not twin(x).any()


@pytest.mark.parametrize("patched_as", ["model", "module"])
def test_a_copy_of_a_patched_model_is_not_patched(patched_as):
    # Half a patch would be worse: the rules without constant parameters, for instance.
    model = build("llama")
    unpatched = relevance(model)
    with lxt.monkey_patch(model if patched_as == "model" else modeling_llama, "cp"):
        cp = relevance(model)
        twin = copy.deepcopy(model)
        # A module patch takes the copy as it takes any other model.
        assert torch.equal(relevance(twin), unpatched if patched_as == "model" else cp)
    assert torch.equal(relevance(twin), unpatched)


def test_deepcopy_can_be_patched_by_itself():
    model = build("llama")
    unpatched = relevance(model)
    with lxt.monkey_patch(model, "cp"):
        cp = relevance(model)
        twin = copy.deepcopy(model)
        with lxt.monkey_patch(twin, "attnlrp"):
            attnlrp = relevance(twin)
            assert torch.equal(relevance(model), cp)
        assert torch.equal(relevance(model), cp)
    assert torch.equal(relevance(model), unpatched)
    with lxt.monkey_patch(model, "attnlrp"):
        assert torch.equal(relevance(model), attnlrp)


def test_state_dict_and_save_pretrained(tmp_path):
    model = build("llama")
    keys = list(model.state_dict())
    with lxt.monkey_patch(model):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        model.load_state_dict(model.state_dict())
    loaded = modeling_llama.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(relevance(loaded), relevance(model))


def test_a_pickled_model_comes_back_unpatched():
    model = build("llama")
    unpatched = relevance(model)
    with lxt.monkey_patch(model, "cp"):
        loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(relevance(loaded), unpatched)


@pytest.mark.parametrize("target", ["model", "module"])
@pytest.mark.parametrize("called", [True, False])
def test_a_dropped_model_is_freed(target, called):
    model = build("llama")
    handle = lxt.monkey_patch(model if target == "model" else modeling_llama)
    if called:
        relevance(model)
    references = [weakref.ref(model), weakref.ref(model.model.layers[0].mlp), weakref.ref(model.lm_head.weight)]
    if target == "model":
        del handle
    del model
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    if target == "module":
        handle.remove()


def test_a_patch_outlives_its_handle():
    model = build("llama")
    with lxt.monkey_patch(model, "cp"):
        expected = relevance(model)
    lxt.monkey_patch(model, "cp")
    gc.collect()
    assert torch.equal(relevance(model), expected)
    lxt.monkey_patch(modeling_qwen2, "cp")
    gc.collect()
    with lxt.monkey_patch(modeling_qwen2, "attnlrp") as handle:
        assert handle.active
    other = build("qwen2")
    plain = relevance(other, "qwen2")
    with lxt.monkey_patch(other, "gradient"):
        torch.testing.assert_close(relevance(other, "qwen2"), plain, rtol=1e-5, atol=1e-6)
