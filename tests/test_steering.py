"""Steering equals the same change made by hand: in the weights, in a bias, or in hooks that know their one position."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, checkpointed
from small import HEADS, LAYERS, PROMPTS, a_tokenizer, assert_close, llama, t5
from steered import ENDS, IDS, SOME, built, columns_of, failing, logits, padded, projection
from torch import nn

import lxt
from lxt.attributor import Attributor
from lxt.steering import Ablate, Add, Scale, Set, activations

# float32: the change is made before a projection here and within its weights there, two layers from the logits.
ROUNDING = 2e-5


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


@pytest.mark.parametrize("name", ENDS)
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
            failing(model, model.model.layers[1])
        again = logits(model, IDS)
    with steering:
        assert torch.equal(logits(model, IDS), again)
    assert torch.equal(logits(model, IDS), plain)


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
    read = activations(explainer, PROMPTS, ["residual", ("attn_out", 1)])
    with torch.no_grad():
        states = model.encoder(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states
    assert_close(read["residual", 0][: len(PROMPTS[0])], states[1][0], 1e-5)
    with explainer.steer({("attn_out", 1): Ablate("mean", read)}):
        assert explainer.attribute(PROMPTS[0], target=4).check().ok
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
