"""For cpu.py: memory, as what the backward needs is counted, and as a process's peak.

    python tests/bench/footprint.py '{"method": "cp", "tokens": 1024, ...}'     (cpu.py starts it for each case)

Saved for backward: every tensor that autograd saves, and every tensor that an autograd function keeps as an attribute,
counted by storage, each storage once and whole, without parameters. One layer more gives what a layer saves.

Peak: `ru_maxrss` of a process of its own after one run, less what it was just before. Before comes a run on 8 tokens,
so that code and buffers of the libraries are there; the model is made in its dtype, so that making it leaves no peak.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import methods
import torch
from subjects import Shape, build, embeddings
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import lxt

__all__ = ["peak_mib", "saved_bytes", "saved_kib_per_token_and_layer"]

METHODS = {
    "plain": methods.plain,
    "plain forward": methods.forward,
    "attnlrp": partial(methods.patched, rules="attnlrp"),
    "cp": partial(methods.patched, rules="cp"),
    "attnlrp, attribute()": partial(methods.attribute, rules="attnlrp"),
    "cp, attribute()": partial(methods.attribute, rules="cp"),
}


def saved_kib_per_token_and_layer(shape: Shape, dtype: torch.dtype, tokens: int, rules: str | None) -> float:
    """KiB that a layer saves for each token; `rules` None is the plain model."""
    counts = [
        saved_bytes(build(replace(shape, layers=layers), dtype), tokens, rules)
        for layers in (shape.layers, shape.layers + 1)
    ]
    return (counts[1] - counts[0]) / tokens / 1024


def saved_bytes(model: Any, tokens: int, rules: str | None) -> int:
    """Bytes that the model's forward keeps for its backward, without the parameters."""
    storages: dict[int, tuple[int, Any]] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address comes twice
        return tensor

    embeds = embeddings(model, tokens).requires_grad_()
    patch: AbstractContextManager[Any] = lxt.monkey_patch(model.model, rules) if rules else nullcontext()
    with patch, saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    for node in _nodes(hidden.grad_fn):
        for kept in getattr(node, "__dict__", {}).values():
            for tensor in kept if isinstance(kept, (tuple, list)) else (kept,):
                if isinstance(tensor, Tensor):
                    count(tensor)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for address, (size, _) in storages.items() if address not in weights)


def _nodes(root: Any) -> Iterator[Any]:
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def peak_mib(shape: Shape, dtype: torch.dtype, tokens: int, method: str, checkpointing: bool = False) -> float:
    """MiB that one run adds to a fresh process's peak.

    Raises:
        RuntimeError: the process failed; the last line of what it said.
    """
    case = {
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "method": method,
        "checkpointing": checkpointing,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run([sys.executable, __file__, json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])["MiB"]


def main(case: dict[str, Any]) -> None:
    """In the child."""
    torch.set_num_threads(case["threads"])
    model = build(Shape(**case["shape"]), getattr(torch, case["dtype"]))
    with methods.checkpointed(model) if case["checkpointing"] else nullcontext():
        _run(case["method"], model, 8)
        before = _peak()
        _run(case["method"], model, case["tokens"])
        print(json.dumps({"MiB": _peak() - before}))


def _run(method: str, model: Any, tokens: int) -> None:
    with METHODS[method](model, embeddings(model, tokens)) as run:
        run()


def _peak() -> float:
    """MiB; macOS counts in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # else transformers takes kernels.py here for a package
    main(json.loads(sys.argv[1]))
