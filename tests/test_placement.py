"""Models whose weights stay on disk: the same relevance, files used in place, nothing left behind."""

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small import PROMPTS, bert, gpt2, llama, opt, t5
from torch import nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lxt
from lxt import offloading, placement
from lxt.accelerate_hooks import loading_hooks
from lxt.loading import model_of
from lxt.memory import resident
from lxt.offloading import WeightReader, byte_ranges
from lxt.opening import load
from lxt.placement import Budget, blocks_of, plan
from lxt.scratch import Scratch
from lxt.stored import Stored, stored_weights

pytest.importorskip("accelerate")

GIB = 2**30


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


MODELS = {
    "llama": llama,
    "llama, tied": partial(llama, tie_word_embeddings=True),
    "gpt2": gpt2,
    "opt": opt,
    "bert": partial(bert, BertForSequenceClassification),
    "t5": t5,
}


def saved(model, folder, **options):
    """In shards of a few tensors each, as large models come."""
    model.save_pretrained(folder, max_shard_size="20KB", **options)
    return folder


def starved():
    """A budget that leaves no layer in memory."""
    return Budget(resident() + 2**26)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    """Embeddings and output projections of tiny models are placed as those of large ones."""
    monkeypatch.setattr(placement, "SMALL", 256)


@pytest.fixture
def folder(tmp_path):
    return saved(llama(), tmp_path / "llama")


@pytest.fixture
def files(folder):
    return set(folder.iterdir())


def both(name, folder, latents=("residual",), **options):
    """What a model in memory and a placed one give."""
    placed = model_of(str(folder), None, starved(), **options).eval()
    assert "disk" in placed.hf_device_map.values()
    plain = model_of(str(folder), None).eval()
    inputs = PROMPTS[:1] if name == "t5" else PROMPTS
    return [lxt.Attributor(model).attribute(inputs, latents=latents) for model in (plain, placed)]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_relevance_from_files_used_in_place(name, tmp_path):
    folder = saved(MODELS[name](), tmp_path / "model")
    before = sorted(folder.iterdir())
    plain, placed = both(name, folder)
    assert torch.equal(placed.relevance, plain.relevance)
    assert torch.equal(placed.latents["residual"], plain.latents["residual"])
    assert sorted(folder.iterdir()) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("rules", ["attnlrp", "cp", "gradient"])
def test_under_all_rules_and_checked(rules, folder):
    plain, placed = (model_of(str(folder), None, budget).eval() for budget in (None, starved()))
    plain, placed = (lxt.Attributor(model, rules=rules).attribute(PROMPTS) for model in (plain, placed))
    assert torch.equal(placed.relevance, plain.relevance)
    assert placed.check().ok


def test_one_file_and_another_precision(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    plain, placed = (
        lxt.Attributor(model_of(str(tmp_path), torch.float32, budget).eval()).attribute(PROMPTS)
        for budget in (None, starved())
    )
    assert placed.relevance.dtype == torch.float32
    assert torch.equal(placed.relevance, plain.relevance)


def test_weights_come_and_go(folder):
    model = model_of(str(folder), None, starved()).eval()
    offloaded = [p for part, place in model.hf_device_map.items() if place == "disk" for p in owned(model, part)]
    assert offloaded
    assert all(parameter.is_meta for parameter in model.get_submodule("model.layers").parameters())
    lxt.Attributor(model).attribute(PROMPTS[:1])
    layers = [layer for layer in model.model.layers if any(not p.is_meta for p in layer.parameters())]
    assert len(layers) <= 1  # a recomputation that stops early leaves the last one's there, until another is read


def owned(model, part):
    found = model.get_submodule(part) if part in dict(model.named_modules()) else model.get_parameter(part)
    return list(found.parameters()) if isinstance(found, nn.Module) else [found]


def test_strays_are_given_back_when_another_layer_begins(folder):
    model = model_of(str(folder), None, starved()).eval()
    first, second = model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.down_proj
    first._hf_hook.pre_forward(first)
    assert not first.weight.is_meta
    second._hf_hook.pre_forward(second)
    assert first.weight.is_meta
    assert not second.weight.is_meta


def test_only_the_tokens_rows_of_the_embedding_are_read(folder, monkeypatch):
    model = model_of(str(folder), None, starved()).eval()
    rows = []
    embedding = nn.functional.embedding
    monkeypatch.setattr(
        nn.functional, "embedding", lambda ids, weight, *a: rows.append(len(weight)) or embedding(ids, weight, *a)
    )
    table = model.get_input_embeddings()
    expected = llama().get_input_embeddings()(torch.tensor([[5, 9, 5], [7, 5, 0]]))
    rows.clear()
    assert torch.equal(table(torch.tensor([[5, 9, 5], [7, 5, 0]])), expected)
    assert rows == [4]
    assert table.weight.is_meta


def test_experts_are_stacked_in_a_folder_that_goes_with_the_model(tmp_path):
    folder, offload = saved(mixtral(), tmp_path / "model"), tmp_path / "offload"
    with pytest.raises(ValueError, match=r"stored in another form than the model has .* give an offload_folder"):
        model_of(str(folder), None, starved())
    plain, placed = both("mixtral", folder, offload_folder=offload)
    assert torch.equal(placed.relevance, plain.relevance)
    model = model_of(str(folder), None, starved(), offload).eval()
    reader = reader_of(model)
    stacked = {name for name, (_, shape) in byte_ranges(reader._weights.index).items() if len(shape) == 3}
    assert len(stacked) == 2 * 3
    ahead = {(file, start) for ranges in reader._ranges.values() for file, start, _ in ranges}
    assert ahead
    assert not ahead & {byte_ranges(reader._weights.index)[name][0][:2] for name in stacked}
    del plain, placed, model, reader
    gc.collect()
    assert list(offload.iterdir()) == []


def reader_of(model) -> WeightReader:
    return next(hook.weights_map.dataset for module in model.modules() for hook in loading_hooks(module))


def test_files_that_are_not_safetensors_are_written_once(tmp_path):
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    plain, placed = both("llama", folder, offload_folder=tmp_path / "offload")
    assert torch.equal(placed.relevance, plain.relevance)


def test_interrupted_it_stays_usable_and_unpatched(folder):
    explainer = lxt.Attributor(model_of(str(folder), None, starved()).eval())
    expected = explainer.attribute(PROMPTS).relevance
    model = explainer.model

    def interrupt(*_):
        raise KeyboardInterrupt

    for module in (model.get_input_embeddings(), model.model.layers[1].mlp.up_proj, model.lm_head):
        handle = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            explainer.attribute(PROMPTS)
        handle.remove()
        assert lxt.patching.rules_of(model) is None
        assert torch.equal(explainer.attribute(PROMPTS).relevance, expected)


def test_interrupted_inside_the_embedding_its_rows_are_gone(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    table = model_of(str(folder), None, starved()).eval().get_input_embeddings()
    monkeypatch.setattr(nn.functional, "embedding", interrupt)
    with pytest.raises(KeyboardInterrupt):
        table(torch.tensor([[5, 9]]))
    assert table.weight.is_meta
    assert table.weight.shape == (300, 32)


def test_a_padding_token_that_the_prompt_lacks(tmp_path):
    # torch wants it among the rows of the table.
    model = llama(pad_token_id=250)
    assert model.get_input_embeddings().padding_idx == 250
    plain, placed = both("llama", saved(model, tmp_path / "model"))
    assert torch.equal(placed.relevance, plain.relevance)


def test_a_deep_copy_reads_the_same_files(folder):
    model = model_of(str(folder), None, starved()).eval()
    expected = lxt.Attributor(model).attribute(PROMPTS).relevance
    copied = copy.deepcopy(model)
    assert torch.equal(lxt.Attributor(copied).attribute(PROMPTS).relevance, expected)
    served = {module for modules in reader_of(copied)._modules.values() for module in modules}
    assert served
    assert served <= set(copied.modules())  # it gives back what is left in its own
    del model
    gc.collect()
    assert torch.equal(lxt.Attributor(copied).attribute(PROMPTS).relevance, expected)


def test_a_deep_copy_keeps_the_folder_of_weights(tmp_path):
    scratch = Scratch(tmp_path, 0)
    copied = copy.deepcopy({"keep": scratch})
    del scratch
    assert len(list(tmp_path.iterdir())) == 1
    del copied
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def a_large_model(monkeypatch):
    """8 layers of 26 MiB each and 2 × 31 MiB of embeddings and output projection, without weights."""
    monkeypatch.setattr(placement, "SMALL", 2**20)
    monkeypatch.setattr(placement, "resident", lambda: 100 * 2**20)
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config)


def in_place(model):
    return Stored(dict.fromkeys(model.state_dict(), torch.bfloat16))


def test_layers_fill_what_the_memory_has_left(a_large_model):
    model = a_large_model
    layer = sum(p.numel() * 2 for p in model.model.layers[0].parameters())
    counts = []
    for layers in (0, 3, 8):
        # a quarter for activations, and room for the largest part that comes and goes
        room = layers * layer + model.lm_head.weight.numel() * 2 + 2**20
        found = plan(model, in_place(model), Budget((100 * 2**20 + room) * 4 // 3))
        counts.append(sum(found.device_map[block] == "cpu" for block in blocks_of(model)))
        assert found.device_map["model.embed_tokens"] == found.device_map["lm_head"] == "disk"
        assert found.written == 0
        assert found.on("cpu") + found.on("disk") == sum(p.numel() * 2 for p in model.parameters()) + buffers(model)
    assert counts == [0, 3, 8]
    everything = plan(model, in_place(model), Budget(2 * GIB))
    assert not everything.offloaded
    assert "8 of 8 layers) in memory" in str(everything)


def buffers(model):
    return sum(b.numel() * b.element_size() for b in model.buffers())


def test_a_gpu_is_filled_first(a_large_model):
    model = a_large_model
    layer = sum(p.numel() * 2 for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() * 2
    budget = Budget(
        (100 * 2**20 + 2 * layer + 2**20) * 4 // 3, (3 * layer + head + 2**20) * 4 // 3, torch.device("cuda", 0)
    )
    found = plan(model, in_place(model), budget)
    places = [found.device_map[block] for block in blocks_of(model)]
    assert places == [0] * 3 + ["cpu"] * 2 + ["disk"] * 3
    assert found.device_map["model.norm"] == found.device_map["model.rotary_emb"] == 0
    assert str(found).count("of 8 layers") == 3
    with pytest.raises(ValueError, match=r"gpu_memory=.* is too little: lm_head alone has .* give at least"):
        plan(model, in_place(model), Budget(budget.memory, head, budget.device))


def test_what_cannot_fit_is_refused_with_what_would(a_large_model):
    model = a_large_model
    with pytest.raises(ValueError, match=r"this process has .* before any weight is loaded; give at least"):
        plan(model, in_place(model), Budget(50 * 2**20))
    in_float32 = Stored(dict.fromkeys(model.state_dict(), torch.float32))
    with pytest.raises(ValueError, match=r"lm_head.weight is stored in another precision, .* or leave dtype out"):
        plan(model, in_float32, Budget(120 * 2**20))
    with pytest.raises(ValueError, match=r"weight is rewritten while loading, which takes"):
        plan(model, Stored(), Budget(140 * 2**20))


def test_what_the_files_hold(tmp_path, folder):
    def empty(model):
        with torch.device("meta"):
            found = type(model)._from_config(model.config)
        found.tie_weights()
        return found

    found = stored_weights(str(folder), empty(llama()))
    assert set(found.in_place) == set(llama().state_dict())
    assert set(found.in_place.values()) == {torch.float32}
    experts = saved(mixtral(), tmp_path / "mixtral")
    missing = set(mixtral().state_dict()) - set(stored_weights(str(experts), empty(mixtral())).in_place)
    assert {name.rpartition(".")[2] for name in missing} == {"gate_up_proj", "down_proj"}


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    folder = saved(mixtral(), tmp_path / "model")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"of weights have to be written to .* give an offload_folder on a larger disk"):
        model_of(str(folder), None, starved(), tmp_path / "offload")
    assert list((tmp_path / "offload").iterdir()) == []


def test_a_load_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = saved(mixtral(), tmp_path / "model")

    def fails(*args, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(offloading, "install", fails)
    with pytest.raises(RuntimeError):
        model_of(str(folder), None, starved(), tmp_path / "offload")
    assert list((tmp_path / "offload").iterdir()) == []


def test_by_load(folder, tmp_path):
    from small import a_tokenizer

    a_tokenizer().save_pretrained(folder)
    little = resident() + 2**26
    explainer = load(folder, memory=little)
    assert "disk" in explainer.model.hf_device_map.values()
    expected = load(folder).attribute("My cats").relevance
    assert torch.equal(explainer.attribute("My cats").relevance, expected)
    assert torch.equal(load(folder, memory="64GiB").attribute("My cats").relevance, expected)
    assert not hasattr(load(folder, memory="64GiB").model, "hf_device_map")


def test_load_says_what_does_not_go_together(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"offload_folder .* memory="):
        load(folder, offload_folder="somewhere")
    with pytest.raises(ValueError, match=r"a model instance .* by name"):
        load(llama(), memory="4GiB", offload_folder="somewhere")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"gpu_memory=.* no GPU"):
            load(folder, memory="4GiB", gpu_memory="1GiB")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(ImportError, match=r"pip install 'lxt\[large\]'"):
        load(folder, memory=resident() + 2**26)


def test_the_next_layer_is_asked_for_in_both_directions(folder, monkeypatch):
    reader = reader_of(model_of(str(folder), None, starved()).eval())
    asked = []
    monkeypatch.setattr(reader._page_cache, "read", asked.append)
    layers = [f"model.layers.{i}" for i in range(3)]
    ranges = {part: reader._ranges.get(number, ()) for number, part in enumerate(reader._parts)}
    assert [len(ranges[layer]) for layer in layers] == [9, 9, 9]
    assert "model.embed_tokens" not in ranges
    for layer in (*layers, *layers[-2::-1]):
        reader[f"{layer}.mlp.up_proj.weight"]
        reader[f"{layer}.mlp.down_proj.weight"]
    assert asked == [list(ranges[part]) for part in (layers[1], layers[2], "model.norm", layers[0])] + [[]]
    assert reader["lm_head.weight"].shape == (300, 32)
    assert asked[-1] == []


def test_reading_ahead_does_not_displace_what_is_in_use():
    ranges = [("a", 0, 10), ("a", 10, 10), ("b", 0, 10)]
    assert offloading._first(ranges, 15) == [("a", 0, 10), ("a", 10, 5)]
    assert offloading._first(ranges, 100) == ranges
    assert offloading._first(ranges, 0) == []


def test_reading_ahead_fills_the_page_cache_and_ends_with_the_model(tmp_path):
    import threading

    before = set(threading.enumerate())
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(2**22))
    ahead = offloading._PageCache()
    ahead.read([(str(file), 0, 2**22), (str(tmp_path / "gone"), 0, 8)])
    (thread,) = set(threading.enumerate()) - before
    del ahead
    deadline = time.monotonic() + 30
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not thread.is_alive()


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_projection_larger_than_the_page_cache_is_taken_in_pieces(rules, dtype, folder, monkeypatch):
    plain = lxt.Attributor(model_of(str(folder), dtype).eval(), rules=rules).attribute(PROMPTS, target=7)
    monkeypatch.setattr(offloading, "available", lambda _: 10_000)  # bytes
    model = model_of(str(folder), dtype, starved()).eval()
    calls = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, *b: calls.append(len(w)) or linear(x, w, *b))
    placed = lxt.Attributor(model, rules=rules).attribute(PROMPTS, target=7)
    assert calls.count(14 if dtype == torch.float32 else 29) >= 10  # of 300 rows, 1875 bytes at a time
    # The pieces' gradients are rounded one by one.
    close = 4 * torch.finfo(dtype).eps * plain.relevance.norm()
    assert (placed.relevance - plain.relevance).norm() <= close
