"""Steering equals the same change made by hand: in the weights, in a bias, or in hooks that know their one position."""

import copy
import gc
import threading
from pathlib import Path

import pytest
import torch
from models import EXAMPLES, VOCABULARY, checkpointed
from small import HEADS, LAYERS, PROMPTS, a_tokenizer, assert_close, gpt2, llama, t5
from torch import nn

import lxt
from lxt.attributor import Attributor
from lxt.steering import Ablate, Add, Scale, Set, activations

# By hand, and not from the patch maps: where heads and neurons end.
ENDS = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "bert": ("bert.encoder.layer", "attention.output.dense", "output.dense"),
}
# float32: the change is made before a projection here and within its weights there, two layers from the logits.
ROUNDING = 2e-5


def built(name):
    torch.manual_seed(0)
    return EXAMPLES[name].build("eager").eval()


def projection(model, name, layer, kind):
    layers, head, neuron = ENDS[name]
    return model.get_submodule(f"{layers}.{layer}.{head if kind == 'head' else neuron}")


def columns_of(module):
    """The weights by which each number of the input goes on, [input, output], to be written to."""
    return module.weight.data if hasattr(module, "nx") else module.weight.data.T


def logits(model, ids, **arguments):
    with torch.no_grad():
        return model(torch.as_tensor(ids).view(len(ids) if isinstance(ids[0], list) else 1, -1), **arguments).logits


IDS = [1, 5, 6, 7, 8, 9, 3]


@pytest.mark.parametrize("name", ENDS)
def test_ablated_heads_and_changed_neurons_are_edited_weights(name):
    model = built(name)
    explainer, edited = Attributor(model), copy.deepcopy(model)
    wide = columns_of(projection(edited, name, 1, "head"))
    size = len(wide) // 4
    wide[2 * size : 3 * size] = 0
    neurons = projection(edited, name, 0, "neuron")
    columns_of(neurons)[11] *= -2.5
    with torch.no_grad():
        at = torch.zeros(len(columns_of(neurons)))
        at[7], offset = 3.0, 3.0 * columns_of(neurons)[7]
        neurons.bias = nn.Parameter(offset if neurons.bias is None else neurons.bias + offset)
        columns_of(neurons)[7] = 0
    changes = {("head", 1, 2): 0.0, ("neuron", 0, 11): Scale(-2.5), ("neuron", 0, 7): 3.0}
    plain, expected = logits(model, IDS), logits(edited, IDS)
    with explainer.steer(changes):
        steered = logits(model, IDS)
    assert_close(steered, expected, ROUNDING)
    assert (steered - plain).norm() > 1e-3 * plain.norm()
    assert torch.equal(logits(model, IDS), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_vector_added_to_the_residual_is_a_bias(name):
    model = built(name)
    explainer, edited = Attributor(model), copy.deepcopy(model)
    vector = torch.randn(32)
    end = projection(edited, name, 0, "neuron")
    end.bias = nn.Parameter(vector.clone() if end.bias is None else end.bias.data + vector)
    with explainer.steer({("residual", 0): Add(vector)}):
        steered = logits(model, IDS)
    assert_close(steered, logits(edited, IDS), ROUNDING)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_the_explained_model_is_the_steered_one(name):
    model = built(name)
    edited = copy.deepcopy(model)
    wide = columns_of(projection(edited, name, 0, "head"))
    wide[: len(wide) // 4] = 0
    columns_of(projection(edited, name, 1, "neuron"))[3] *= 4
    latents = ("residual", "head", "neuron")
    expected = Attributor(edited).attribute(IDS, target=2, latents=latents)
    explainer = Attributor(model)
    plain = explainer.attribute(IDS, target=2)
    with explainer.steer({("head", 0, 0): 0.0, ("neuron", 1, 3): Scale(4)}):
        out = explainer.attribute(IDS, target=2, latents=latents)
        assert out.check().ok
    assert_close(out.relevance, expected.relevance, 1e-4)
    assert not torch.allclose(out.relevance, plain.relevance, rtol=1e-2)
    for latent in ("residual", "neuron"):
        assert_close(out.latents[latent], expected.latents[latent], 1e-4)
    assert not out.latents["head"][0, :, :, 0].any()  # what is zero has no relevance; the weights' edit leaves it some
    assert_close(out.latents["head"][1], expected.latents["head"][1], 1e-4)
    assert torch.equal(explainer.attribute(IDS, target=2).relevance, plain.relevance)


def test_one_position_is_changed_as_by_a_hook_that_knows_it():
    model = llama()
    vector = torch.randn(32)

    def at_two(module, args, output):
        output = output.clone()
        output[:, 2] = 0.5 * output[:, 2] + vector
        output[:, 4:, 9] = 1.25
        return output

    handle = model.model.layers[1].register_forward_hook(at_two)
    expected = logits(model, IDS)
    handle.remove()
    changes = [Scale(0.5, positions=2), Add(vector, positions=[2])]
    with Attributor(model).steer(
        {("residual", 1): changes, ("residual", 1, 9): Set(1.25, positions=slice(4, None))}
    ) as steering:
        assert torch.equal(logits(model, IDS), expected)
    assert "('residual', 1, 9)" in repr(steering)


POSITIONS = {
    "all": None,
    "of the prompt": [0, 3],
    "generated": [8],
    "from one on": slice(4, None),
    "a span": slice(2, 7),
    "from the prompt's end": -2,
    "from its end on": slice(-1, None),
    "up to its end": slice(None, -1),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_generation_is_the_same_with_a_cache_and_without(build, positions):
    model = build()
    ids, options = torch.tensor([PROMPTS[0]]), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **options)
    changes = {
        ("residual", 0): Add(2 * torch.randn(32), positions=positions),
        ("head", 1, 2): Set(1.5, positions=positions),
        ("neuron", 2, (3, 30)): Set(4.0, positions=positions),
    }
    with Attributor(model).steer(changes):
        cached = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
        whole = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(whole.logits), 1e-4)
    assert torch.equal(model.generate(ids, **options), plain)
    expected = by_loop(model, PROMPTS[0], changes, positions, len(PROMPTS[0]), 8)
    assert_close(torch.stack(cached.logits)[:, 0], expected, 1e-4)


def by_loop(model, ids, changes, positions, prompt, steps):
    """Greedy decoding without a cache, with plain hooks that write where Python counts: [step, vocabulary]."""
    ids, found = list(ids), []
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    llamas = hasattr(model, "model")

    def meant():
        every = list(range(prompt + steps + 1))
        if positions is None:
            picked = every
        elif isinstance(positions, slice):
            start, stop = (p + prompt if p is not None and p < 0 else p for p in (positions.start, positions.stop))
            picked = every[start:stop]
        else:
            picked = [p + prompt if p < 0 else p for p in ([positions] if isinstance(positions, int) else positions)]
        return [p for p in picked if p < len(ids)]

    def residual(module, args, output):
        output = output.clone()
        output[:, meant()] += changes[("residual", 0)].value
        return output

    def head(module, args):
        x = args[0].clone()
        x[:, meant(), 16:24] = 1.5
        return (x,)

    def neuron(module, args):
        x = args[0].clone()
        for n in (3, 30):
            x[:, meant(), n] = 4.0
        return (x,)

    handles = [
        layers[0].register_forward_hook(residual),
        (layers[1].self_attn.o_proj if llamas else layers[1].attn.c_proj).register_forward_pre_hook(head),
        (layers[2].mlp.down_proj if llamas else layers[2].mlp.c_proj).register_forward_pre_hook(neuron),
    ]
    for _ in range(steps):
        with torch.no_grad():
            last = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        found.append(last)
        ids.append(int(last.argmax()))
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def padded(prompts, side="left"):
    width = max(map(len, prompts))
    blank = [[0] * (width - len(ids)) for ids in prompts]
    pairs = list(zip(blank, prompts, strict=True))
    ids = [b + p if side == "left" else p + b for b, p in pairs]
    mask = [[0] * len(b) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * len(b) for b, p in pairs]
    return torch.tensor(ids), torch.tensor(mask)


SOME = {
    ("residual", 1): Add(torch.linspace(-2, 2, 32), positions=[1, 6]),
    ("neuron", 0, 5): Set(3.0, positions=-1),
    ("head", 2, 3): Ablate(positions=slice(2, None)),
}


@pytest.mark.parametrize("build", [llama, gpt2])
def test_batches_with_padding_equal_single_prompts(build):
    model = build()
    ids, mask = padded(PROMPTS)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with Attributor(model).steer(SOME):
        together = model.generate(ids, attention_mask=mask, **options)[:, -6:]
        alone = [model.generate(torch.tensor([p]), **options)[0, -6:] for p in PROMPTS]
    assert torch.equal(together, torch.stack(alone))


def test_attributions_of_a_batch_equal_those_of_its_prompts():
    explainer = Attributor(llama())
    with explainer.steer(SOME):
        out = explainer.attribute(PROMPTS, target=42, latents="residual")
        alone = [explainer.attribute(p, target=42, latents="residual") for p in PROMPTS[::2]]
    for row, one in zip((0, 2), alone, strict=True):
        assert_close(out.relevance[row][out.mask[row]], one.relevance[0], 1e-5)
        assert_close(out.latents["residual"][:, row, out.mask[row]], one.latents["residual"][:, 0], 1e-5)


def test_padding_on_the_right_and_beams_are_counted():
    model = llama()
    ids, mask = padded(PROMPTS, "right")
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with Attributor(model).steer(SOME):
        with torch.no_grad():
            right = model(ids, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            assert_close(right[row, : len(prompt)], logits(model, prompt)[0], 1e-5)
        prompt = torch.tensor([PROMPTS[0]])
        assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, **beams, use_cache=False))


def test_positions_count_on_over_a_cache_of_ones_own():
    model = llama()
    with Attributor(model).steer({("residual", 0): Add(torch.ones(32), positions=[2, 5])}):
        expected = logits(model, IDS)
        first = model(torch.tensor([IDS[:4]]), use_cache=True)
        second = model(torch.tensor([IDS[4:]]), past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], 1).detach(), expected, 1e-5)


def test_static_caches_are_counted():
    model = llama()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, mask = padded(PROMPTS)
    with Attributor(model).steer(SOME):
        expected = model.generate(ids, attention_mask=mask, **options)
        static = model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(static, expected)


@pytest.mark.parametrize("how", ["layer", "nested"])
def test_checkpointed_layers_are_steered_when_they_run_again(how):
    model = llama()
    latents = ("residual", "head", "neuron")
    with Attributor(model).steer(SOME):
        expected = Attributor(model).attribute(PROMPTS, target=42, latents=latents)
        out = Attributor(model, checkpoint=how).attribute(PROMPTS, target=42, latents=latents)
        checkpointed(model)
        own = Attributor(model).attribute(PROMPTS, target=42, latents=latents)
    for found in (out, own):
        assert torch.equal(found.relevance, expected.relevance)
        for latent in latents:
            assert torch.equal(found.latents[latent], expected.latents[latent])


def test_a_checkpoint_of_one_forward_is_not_taken_for_another():
    model = llama()
    checkpointed(model)
    model.train()
    embeds = torch.randn(1, 6, 32)
    left, none = torch.tensor([[0, 0, 1, 1, 1, 1]]), torch.ones(1, 6, dtype=torch.long)
    change = {("neuron", 1, 5): Set(9.0, positions=0)}

    def run(mask):
        x = embeds.clone().requires_grad_()
        return x, model(inputs_embeds=x, attention_mask=mask).logits[0, -1, 3]

    with Attributor(model).steer(change):
        x, score = run(left)
        (expected,) = torch.autograd.grad(score, x)
        del score
        gc.collect()
        other, _ = run(none)  # its graph is gone before the next backward
        del _
        x, score = run(left)
        assert torch.equal(torch.autograd.grad(score, x)[0], expected)
        (x, score), (other, third) = run(left), run(none)
        with pytest.raises(RuntimeError, match="could belong to several forwards"):
            score.backward()
        del third, other


def test_under_monkey_patch():
    model = llama()
    with Attributor(model).steer(SOME), lxt.monkey_patch(model):
        embeds = model.get_input_embeddings()(torch.tensor([PROMPTS[2]])).detach().requires_grad_()
        model(inputs_embeds=embeds).logits[0, -1, 42].backward()
        expected = Attributor(model).attribute(PROMPTS[2], target=42)
    assert_close((embeds.grad * embeds).sum(-1).detach(), expected.relevance, 1e-6)
    with lxt.monkey_patch(model), Attributor(model).steer(SOME):
        assert torch.equal(Attributor(model).attribute(PROMPTS[2], target=42).relevance, expected.relevance)


def test_other_threads_are_not_steered():
    model = llama()
    plain, found = logits(model, IDS), {}
    inside, done = threading.Event(), threading.Event()

    def theirs():
        inside.wait()
        found["plain"] = logits(model, IDS)
        with Attributor(model).steer({("residual", 0): Scale(-1)}):
            found["own"] = logits(model, IDS)
        found["relevance"] = Attributor(model).attribute(IDS, target=3).relevance
        done.set()

    thread = threading.Thread(target=theirs)
    thread.start()
    with Attributor(model).steer({("residual", 0): 0.0}):
        mine = logits(model, IDS)
        inside.set()
        done.wait()
        assert torch.equal(logits(model, IDS), mine)
    thread.join()
    assert torch.equal(found["plain"], plain)
    assert torch.equal(found["relevance"], Attributor(model).attribute(IDS, target=3).relevance)
    with Attributor(model).steer({("residual", 0): Scale(-1)}):
        assert torch.equal(logits(model, IDS), found["own"])
    assert not torch.equal(mine, plain)


def test_compiled_models_are_steered_and_not_so_afterwards():
    model = llama()
    compiled = torch.compile(model, backend="eager")
    plain = logits(compiled, IDS)
    with Attributor(compiled).steer({("residual", 0): 0.0}):
        steered = logits(compiled, IDS)
        assert torch.equal(steered, logits(model, IDS))
        again = torch.compile(model, backend="eager")
        assert torch.equal(steered, logits(again, IDS))
    assert torch.equal(logits(compiled, IDS), plain)
    assert torch.equal(logits(again, IDS), plain)
    assert not torch.equal(steered, plain)


def test_everything_is_undone_also_after_an_error():
    model = llama()
    hooks = [(m, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    plain = logits(model, IDS)
    steering = Attributor(model).steer({("residual", 0): 0.0})

    def fail(module, args, output):
        raise KeyError("mine")

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="mine"), steering:
        logits(model, IDS)
    handle.remove()
    assert torch.equal(logits(model, IDS), plain)
    assert [(m, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    with steering:  # once more
        assert not torch.equal(logits(model, IDS), plain)
        with pytest.raises(RuntimeError, match="already in force"), steering:
            pass
        with pytest.raises(KeyError):  # a forward that fails leaves the count of the next alone
            failing(model)
        again = logits(model, IDS)
    with steering:
        assert torch.equal(logits(model, IDS), again)
    assert torch.equal(logits(model, IDS), plain)


def failing(model):
    def fail(module, args, output):
        raise KeyError("mine")

    handle = model.model.layers[1].register_forward_hook(fail)
    try:
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    finally:
        handle.remove()


def test_nested_blocks_change_in_order():
    model = llama()
    explainer = Attributor(model)
    with explainer.steer({("neuron", 0, 1): 2.0}), explainer.steer({("neuron", 0, 1): Scale(3)}):
        nested = logits(model, IDS)
    with explainer.steer({("neuron", 0, 1): 6.0}):
        assert torch.equal(logits(model, IDS), nested)
    with explainer.steer({("neuron", 0, 1): [Scale(3), Set(2.0)]}):
        assert not torch.equal(logits(model, IDS), nested)


def test_means_and_draws_come_from_the_reference():
    model = llama()
    explainer = Attributor(model)
    read = {}

    def keep(module, args):
        read.setdefault("rows", []).append(args[0][0].detach())

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(keep)
    for prompt in PROMPTS:
        logits(model, prompt)
    handle.remove()
    rows = torch.cat(read["rows"])
    reference = activations(explainer, PROMPTS, [("head", 1), "residual", ("neuron", 0, 7)])
    assert reference.lengths == (5, 3, 7)
    torch.testing.assert_close(reference["head", 1], rows, rtol=1e-5, atol=1e-6)
    assert torch.equal(reference["head", 1, 3], reference["head", 1][:, 24:])
    assert reference["residual", LAYERS - 1].shape == (15, 32)
    assert reference["neuron", 0, 7].shape == (15, 1)

    def mean(module, args):
        x = args[0].clone()
        x[..., 8:16] = rows[:, 8:16].mean(0)
        return (x,)

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(mean)
    expected = logits(model, IDS)
    handle.remove()
    with explainer.steer({("head", 1, 1): Ablate("mean", reference)}):
        assert_close(logits(model, IDS), expected, 1e-5)

    seen = []
    handle = model.model.layers[1].self_attn.o_proj
    draw = Ablate("resample", reference, seed=1)
    with explainer.steer({("head", 1, 1): draw, ("head", 1, 2): draw}):
        handle = handle.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        logits(model, IDS)
        handle.remove()
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        ids = torch.tensor([PROMPTS[0]])
        assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))
    which = [(reference["head", 1][:, 8:24] == drawn).all(-1).nonzero().item() for drawn in seen[0][:, 8:24]]
    assert len(set(which)) > 2  # one token of the reference for each position, the same one in both heads
    with explainer.steer({("head", 1, 1): Ablate("resample", reference, seed=2)}):
        assert not torch.allclose(logits(model, IDS), expected)


def test_steered_activations_can_be_read():
    explainer = Attributor(llama())
    with explainer.steer({("neuron", 1, 4): 7.0}):
        found = activations(explainer, PROMPTS, [("neuron", 1, 4)], batch_size=2)
    assert torch.equal(found["neuron", 1, 4], torch.full((15, 1), 7.0))


def test_the_encoder_of_an_encoder_decoder_is_steered():
    model = t5()
    explainer = Attributor(model)
    ids, mask = padded(PROMPTS, "right")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with explainer.steer({("residual", 1): Add(5 * torch.randn(32), positions=[1])}):
        together = model.generate(ids, attention_mask=mask, **options, output_logits=True, return_dict_in_generate=True)
        alone = model.generate(torch.tensor([PROMPTS[1]]), **options, output_logits=True, return_dict_in_generate=True)
        assert explainer.attribute(PROMPTS[0], target=4).check().ok
    plain = model.generate(ids, attention_mask=mask, **options, output_logits=True, return_dict_in_generate=True)
    assert_close(torch.stack(together.logits)[:, 1], torch.stack(alone.logits)[:, 0], 1e-4)
    assert not torch.allclose(torch.stack(together.logits), torch.stack(plain.logits), rtol=1e-2)


def test_low_precision_and_double_are_steered_in_their_own_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = llama().to(dtype)
        with Attributor(model).steer({("residual", 1): torch.ones(32), ("head", 0, 1): 0.0}):
            assert logits(model, IDS).dtype == dtype


def test_a_vector_changed_afterwards_changes_nothing():
    model, vector = llama(), torch.ones(32, requires_grad=True)
    steering = Attributor(model).steer({("residual", 1): Add(vector)})
    with steering:
        before = logits(model, IDS)
    with torch.no_grad():
        vector.mul_(2)
    with steering:
        assert torch.equal(logits(model, IDS), before)
        assert Attributor(model).attribute(IDS, target=3).relevance.isfinite().all()


VECTOR = torch.ones(32)
BAD = {
    "unknown latent": ({("neurons", 0, 1): 1.0}, ValueError, "unknown latent 'neurons'; .*did you mean 'neuron'"),
    "no key": ({"neuron": 1.0}, TypeError, r"\('residual', 6\)"),
    "no layer": ({("neuron",): 1.0}, TypeError, "named by"),
    "layer": ({("neuron", 3, 1): 1.0}, ValueError, "the model has the layers 0 to 2, and 3 is none"),
    "negative layer": ({("residual", -1): VECTOR}, ValueError, "layers 0 to 2, and -1 is none"),
    "head": ({("head", 0, 4): 0.0}, ValueError, r"\('head', 0, 4\): layer 0 has the heads 0 to 3, and 4 is none"),
    "neuron": ({("neuron", 1, (2, 48)): 0.0}, ValueError, "layer 1 has the neurons 0 to 47, and 48 is none"),
    "dimension": ({("residual", 1, 32): 0.0}, ValueError, "has the dimensions 0 to 31, and 32 is none"),
    "twice": ({("neuron", 1, (2, 2)): 0.0}, ValueError, "names no neuron, or one twice"),
    "not whole": ({("neuron", 1, 2.0): 0.0}, TypeError, "whole numbers"),
    "vector": ({("residual", 0): torch.ones(31)}, ValueError, r"\('residual', 0\) has 32 numbers, and .* 31"),
    "head's vector": ({("head", 0, 1): Add(VECTOR)}, ValueError, r"\('head', 0, 1\) has 8 numbers, and .* 32"),
    "matrix": ({("residual", 0): torch.ones(2, 32)}, ValueError, r"got the shape \(2, 32\)"),
    "nan": ({("neuron", 0, 1): float("nan")}, ValueError, "can't be steered by nan"),
    "inf": ({("residual", 0): VECTOR / 0}, ValueError, "NaN or inf"),
    "too large": ({("neuron", 0, 1): 1e39}, ValueError, "torch.float32, which can't hold 1e\\+39"),
    "no value": ({("neuron", 0, 1): "3"}, TypeError, "Set, Add, Scale or Ablate .* got str"),
    "flag": ({("neuron", 0, 1): True}, TypeError, "got bool"),
    "empty": ({}, TypeError, r"\{\('neuron', 7, 1234\): 3.0\}"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused_before_anything_runs(changes, error, message):
    with pytest.raises(error, match=message):
        Attributor(llama()).steer(changes)


def test_bad_interventions_are_refused():
    model = llama()
    explainer = Attributor(model)
    with pytest.raises(ValueError, match="take no step"):
        Add(1.0, positions=slice(0, 4, 2))
    with pytest.raises(ValueError, match="hold no token"):
        Add(1.0, positions=[])
    with pytest.raises(ValueError, match="hold no token"):
        Add(1.0, positions=slice(4, 4))
    with pytest.raises(TypeError, match="positions must be"):
        Add(1.0, positions="last")
    with pytest.raises(ValueError, match="Ablate to 'median' is unknown; allowed: zero, mean, resample"):
        Ablate("median")
    with pytest.raises(TypeError, match=r"needs reference=lxt\.steering\.activations"):
        Ablate("mean")
    reference = activations(explainer, PROMPTS, [("head", 1, 0)])
    with pytest.raises(ValueError, match="takes no reference"):
        Ablate("zero", reference)
    with pytest.raises(ValueError, match=r"the reference has no \('head', 1, 2\); it has \('head', 1, 0\)"):
        explainer.steer({("head", 1, 2): Ablate("mean", reference)})
    with pytest.raises(TypeError, match="latents must be a list"):
        activations(explainer, PROMPTS, "head")
    other = activations(Attributor(built("gemma3")), [IDS], [("neuron", 0)])
    with pytest.raises(ValueError, match="has 48 numbers, and the vector for it 40"):
        explainer.steer({("neuron", 0): Ablate("mean", other)})


def test_positions_that_no_row_has_are_refused():
    model = llama()
    explainer = Attributor(model)
    with (
        pytest.raises(ValueError, match=r"\('residual', 0\) was to be steered at position 7, .* longest row had 7"),
        explainer.steer({("residual", 0): Add(VECTOR, positions=7)}),
    ):
        logits(model, IDS)
    with (
        pytest.raises(ValueError, match="position -8 is before the beginning of a prompt of 7 tokens"),
        explainer.steer({("residual", 0): Add(VECTOR, positions=-8)}),
    ):
        logits(model, IDS)
    past = model(torch.tensor([IDS]), use_cache=True).past_key_values
    with (
        pytest.raises(ValueError, match="which the model read before it was steered"),
        explainer.steer({("residual", 0): Add(VECTOR, positions=-1)}),
    ):
        model(torch.tensor([[3]]), past_key_values=past)
    with explainer.steer({("residual", 0): Add(VECTOR, positions=70)}):
        pass  # nothing ran


def test_what_an_architecture_lacks_is_named():
    with pytest.raises(ValueError, match=r"'neuron' is not known for layer 0 of Qwen3MoeForCausalLM"):
        Attributor(built("qwen3_moe")).steer({("neuron", 0, 1): 0.0})
    with pytest.raises(ValueError, match=r"'head' is not known .* give the Attributor a PatchMap with the head path"):
        Attributor(llama(), patch_map=lxt.PatchMap()).steer({("head", 0, 1): 0.0})


def test_text_can_be_the_reference():
    explainer = Attributor(llama(), a_tokenizer())
    found = activations(explainer, ["I have 5 cats", "My"], [("head", 0, 1)])
    assert len(found["head", 0, 1]) == sum(found.lengths)
    assert found["head", 0, 1].shape[1] == 32 // HEADS
    assert VOCABULARY < 300  # the other models' ids are in this one's vocabulary


def test_the_example_flips_the_answer_and_random_neurons_do_not(capsys):
    path = Path(__file__).resolve().parent.parent / "examples" / "steer_neuron.py"
    scope = {"__name__": "example"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    found = scope["main"]()
    assert "control" in capsys.readouterr().out
    assert found["flipped"] == 5  # every prompt, of years that the neuron was not found in
    assert (found["before"] > 0.95).all()
    assert (found["after"] < 0.4).all()
    assert min(found["control"]) > 0.9
