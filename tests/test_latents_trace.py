"""The trace program of lxt 2.1's documentation gives what latents=("residual",) gives."""

from __future__ import annotations

import pytest
import torch
from small import assert_close, llama
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from lxt.attributor import Attributor
from lxt.efficient import monkey_patch

IDS = [1, 17, 4, 42, 9, 33, 5]


def trace(path, checkpointing):
    """Its steps: patch the module, load, freeze, checkpoint, hook each layer, embed, forward, one backward."""
    handle = monkey_patch(modeling_llama, verbose=False)
    try:
        model = LlamaForCausalLM.from_pretrained(path)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable()
        for parameter in model.parameters():
            parameter.requires_grad = False

        def keep(module, args, output):
            module.output = output[0] if isinstance(output, tuple) else output
            if module.output.requires_grad:
                module.output.retain_grad()

        for layer in model.model.layers:
            layer.register_forward_hook(keep)
        embeds = model.get_input_embeddings()(torch.tensor([IDS])).requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False).logits
        logits[0, -1].max().backward()
        traced = [(layer.output * layer.output.grad).float().sum(-1)[0] for layer in model.model.layers]
        return torch.stack(traced).detach(), (embeds * embeds.grad).float().sum(-1)[0].detach()
    finally:
        handle.remove()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_documented_trace_program(tmp_path, checkpointing):
    llama().save_pretrained(tmp_path)
    traced, relevance = trace(tmp_path, checkpointing)
    out = Attributor(LlamaForCausalLM.from_pretrained(tmp_path)).attribute([IDS], latents=("residual", "embed"))
    assert_close(out.latents["residual"][:, 0], traced)
    assert_close(out.latents["embed"][0, 0], relevance)
    assert (traced[0] - traced[-1]).abs().max() > 1e-3  # layers differ, or this would test nothing
