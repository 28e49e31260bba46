"""For cpu.py: memory, as what the backward needs is counted, and as a process's peak.

    python tests/bench/footprint.py '{"method": "cp", "tokens": 1024, ...}'     (cpu.py starts it for each case)

Saved for backward: every tensor that autograd saves, and every tensor that an autograd function keeps as an attribute,
counted by storage, each storage once and whole, without parameters. One layer more gives what a layer saves.

Peak: the largest resident memory of a process of its own during one run, less what was resident just before. The peak
is Linux's VmHWM, started anew before the run: `ru_maxrss` begins with what the parent process had. A run on 8 tokens
comes before, so that code and buffers of the libraries are there.
"""

from __future__ import annotations

import json
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
    """MiB that one run adds to a fresh process, at its peak. Linux only.

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
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        _run(case["method"], model, case["tokens"])
        print(json.dumps({"MiB": _resident("VmHWM") - before}))


def _run(method: str, model: Any, tokens: int) -> None:
    with METHODS[method](model, embeddings(model, tokens)) as run:
        run()


def _resident(name: str) -> float:
    """MiB, by its name in Linux's /proc."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # else transformers takes kernels.py here for a package
    main(json.loads(sys.argv[1]))
