"""Threads: two models, two composites, or one model twice, give what they give one after the other."""

from __future__ import annotations

import threading

import torch
from models import build, checkpointed, inputs_of
from relevances import relevance
from transformers.models.llama import modeling_llama

import lxt


def in_threads(*functions):
    """The results of the functions, run at the same time; a barrier makes them start together."""
    barrier, results = threading.Barrier(len(functions)), [None] * len(functions)

    def work(index, function):
        barrier.wait()
        try:
            results[index] = function()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


ROUNDS = 20


def repeated(function):
    return lambda: [function() for _ in range(ROUNDS)]


def test_two_threads_two_models_two_composites():
    first, second, plain = build("llama"), build("gpt2"), build("llama")
    unpatched = relevance(plain)
    with lxt.monkey_patch(first, "cp"), lxt.monkey_patch(second, "attnlrp"):
        serial = relevance(first), relevance(second, "gpt2"), unpatched
        parallel = in_threads(
            repeated(lambda: relevance(first)),
            repeated(lambda: relevance(second, "gpt2")),
            repeated(lambda: relevance(plain)),
        )
    for results, expected in zip(parallel, serial, strict=True):
        assert all(torch.equal(result, expected) for result in results)


def test_two_threads_one_model():
    model = build("llama")
    with lxt.monkey_patch(model):
        serial = relevance(model)
        for results in in_threads(*[repeated(lambda: relevance(model))] * 2):
            assert all(torch.equal(result, serial) for result in results)
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_two_threads_one_checkpointed_model():
    model = build("llama").train()
    checkpointed(model, {"use_reentrant": False})
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    with lxt.monkey_patch(model):
        serial = relevance(model)
        for results in in_threads(*[repeated(lambda: relevance(model))] * 2):
            assert all(torch.equal(result, serial) for result in results)
    assert functions == [layer._gradient_checkpointing_func for layer in model.model.layers]


def test_two_threads_under_a_module_patch():
    models = [build("llama") for _ in range(2)]
    with lxt.monkey_patch(modeling_llama, "cp"):
        parallel = in_threads(*[repeated(lambda model=model: relevance(model)) for model in models])
        expected = relevance(build("llama"))
    for results in parallel:
        assert all(torch.equal(result, expected) for result in results)


def test_patching_and_removing_in_two_threads():
    models = {"cp": build("llama"), "attnlrp": build("llama")}
    serial = {}
    for rules, model in models.items():
        with lxt.monkey_patch(model, rules):
            serial[rules] = relevance(model)

    def work(rules):
        with lxt.monkey_patch(models[rules], rules):
            return relevance(models[rules])

    for rules, results in zip(
        models, in_threads(*[repeated(lambda rules=rules: work(rules)) for rules in models]), strict=True
    ):
        assert all(torch.equal(result, serial[rules]) for result in results)


def test_backward_in_another_thread_than_forward():
    model = build("llama").train()
    with lxt.monkey_patch(model):
        serial = relevance(model)
        checkpointed(model, {"use_reentrant": False})
        x = inputs_of("llama")["inputs_embeds"]
        logit = model(inputs_embeds=x, use_cache=False).logits[0, -1, 5]
        in_threads(logit.backward)
    assert torch.equal((x * x.grad).detach().flatten(), serial)
