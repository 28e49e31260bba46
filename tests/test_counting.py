"""Steering finds the tokens it means: with caches, padding, beams, recurrent states and checkpoints."""

import gc

import pytest
import torch
from models import checkpointed
from small import LAYERS, PROMPTS, assert_close, gpt2, llama
from steered import IDS, SOME, failing, logits, padded
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

import lxt
from lxt.attributor import Attributor
from lxt.steering import Add, Scale, Set


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


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=LAYERS, state_size=8, initializer_range=0.2)
    ).eval()


def rwkv():
    torch.manual_seed(0)
    return RwkvForCausalLM(RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=LAYERS)).eval()


@pytest.mark.parametrize("build", [mamba, rwkv])
def test_recurrent_states_count_on(build):
    model = build()
    ids, options = torch.tensor([PROMPTS[0]]), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    changes = [Add(3 * torch.randn(32), positions=[2, 7]), Scale(0.3, positions=slice(-1, None))]
    plain = torch.stack(model.generate(ids, **options).logits)
    with Attributor(model, patch_map=lxt.PatchMap()).steer({("residual", 1): changes}):
        state = torch.stack(model.generate(ids, **options).logits)
        whole = torch.stack(model.generate(ids, **options, use_cache=False).logits)
    assert_close(state, whole, 1e-4)
    assert (state - plain).norm() > 0.01 * plain.norm()
    state = model(ids, use_cache=True)
    state = {name: state[name] for name in ("cache_params", "state") if name in state}
    with (
        pytest.raises(ValueError, match="doesn't say how many tokens it has read; steer the forward that reads"),
        Attributor(model).steer({("residual", 1): 0.0}),
    ):
        model(torch.tensor([[4]]), use_cache=True, **state)


def test_masks_in_other_forms_are_counted_by_the_outer_model():
    model = llama()
    ids, mask = padded(PROMPTS)
    seen = []

    def as_four(module, args, kwargs):  # what models that make their masks further out hand on
        seen.append(kwargs["attention_mask"])
        length = seen[-1].shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & seen[-1][:, None, None, :].bool()
        allowed = allowed | torch.eye(length, dtype=torch.bool)
        return args, kwargs | {"attention_mask": allowed, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    with Attributor(model).steer(SOME):
        expected = logits(model, ids.tolist(), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    handle = model.model.register_forward_pre_hook(as_four, with_kwargs=True)
    with Attributor(model).steer(SOME | {("residual", 1): Set(1.0, positions=0), ("residual", 0): Scale(2.0)}):
        other = logits(model, ids.tolist(), attention_mask=mask)
    with Attributor(model).steer(SOME):
        found = logits(model, ids.tolist(), attention_mask=mask)
    handle.remove()
    assert seen
    for row, real in enumerate(mask.bool()):
        assert_close(found[row][real], expected[row][real], 1e-5)
        assert not torch.allclose(other[row][real], expected[row][real])


def test_padding_is_left_alone():
    model = llama()
    ids, mask = padded(PROMPTS)
    outputs = {}

    def keep(name):
        return lambda module, args, output: outputs.__setitem__(name, output)

    handle = model.model.layers[1].register_forward_hook(keep("before"))
    with Attributor(model).steer({("residual", 1): 0.0}):
        after = model.model.layers[1].register_forward_hook(keep("after"))
        logits(model, ids.tolist(), attention_mask=mask)
    handle.remove()
    after.remove()
    assert torch.equal(outputs["after"][mask == 0], outputs["before"][mask == 0])
    assert not outputs["after"][mask == 1].any()


def test_a_layer_by_itself_reads_its_own_tokens():
    model = gpt2()
    x = torch.randn(2, 4, 32)

    def first(output):
        return output if isinstance(output, torch.Tensor) else output[0]

    plain = first(model.transformer.h[1](x))
    with Attributor(model).steer({("residual", 1): Set(0.5, positions=-1)}):
        with pytest.raises(KeyError):  # a forward that failed is forgotten
            failing(model, model.transformer.h[1])
        found = first(model.transformer.h[1](x))
    assert torch.equal(found[:, :3], plain[:, :3])
    assert (found[:, 3] == 0.5).all()


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
