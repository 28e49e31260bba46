"""Blocks computed by Ray Data: the corpus is read by one task, blocks by a pool of actors, on one machine or many.

    one read task:  blocks, pickled  →  actors: Scorer, as in one process  →  here: written and folded, in any order

A block depends on nothing else, so Ray may compute it again wherever it likes when a worker or a node is lost; what
comes twice is the same. A worker begins its next block when its last one is on disk here. So whatever is killed, a
worker, a node or this process, what has to be computed again is at most the one block that each worker has at hand.
Workers use as many threads as this process does, since the last bits of a matrix product depend on it.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lxt.neurons.running import Compute
from lxt.neurons.tally import Tally
from lxt.neurons.windows import Block, Reading

__all__ = ["on_ray"]

_COUNTS = -1  # in place of a block's number: the row says what was read


def on_ray(address: str = "local", workers: int | None = None) -> Compute:
    """For `label(..., compute=on_ray("auto"))`.

    Args:
        address: "local" starts Ray on this machine, "auto" finds the cluster that this machine belongs to, and
            "ray://host:port" or "host:port" another. All nodes need lxt and, where the corpus is a file, that file.
        workers: how many; None is as many as the cluster has GPUs (if the model is on one), or else has CPUs for.

    Raises:
        ImportError: Ray isn't installed.
    """
    try:
        import ray  # type: ignore[import-not-found]
        import ray.data  # type: ignore[import-not-found]
        import ray.util.scheduling_strategies  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError("computing on Ray needs it installed: pip install 'lxt[ray]'") from None
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(f"workers must be a whole number >= 1 or None, got {workers!r}")

    def compute(function: Callable[[Block], Tally], reading: Reading) -> Iterator[tuple[int, Tally]]:
        from safetensors.torch import load

        started = not ray.is_initialized()
        if started:
            ray.init(address=address, log_to_driver=False)
        try:
            here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            )  # a node that is lost must not take it along
            written = ray.remote(num_cpus=0)(_Written).options(scheduling_strategy=here).remote()
            for row in _rows(ray, function, reading, workers, written):
                if row["number"] == _COUNTS:
                    reading.counts = pickle.loads(row["tally"])
                else:
                    yield row["number"], Tally.of(load(row["tally"]))
                    written.add.remote(row["number"])  # it is: the next one was asked for
        finally:
            if started:
                ray.shutdown()

    return compute


def _rows(ray: Any, function: Any, reading: Reading, workers: int | None, written: Any) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    on_gpu = next(function.explainer.model.parameters()).is_cuda
    has = ray.cluster_resources()
    count = workers or max(int(has.get("GPU", 0) if on_gpu else has.get("CPU", 1) // threads), 1)
    share = {"num_gpus": 1.0, "num_cpus": 0.0} if on_gpu else {"num_cpus": min(threads, has.get("CPU", 1) / count)}
    source = ray.data.from_items([{"start": 0}])
    source.context.target_max_block_size = 1  # each row a block of Ray's: it goes to a worker as soon as it is read
    source.context.enable_progress_bars = False

    def read(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for block in reading:
            yield {"number": [block.number], "block": [pickle.dumps(block)]}
        yield {"number": [_COUNTS], "block": [pickle.dumps(reading.counts)]}

    shared = ray.put(function)  # held here until the end: workers that start anew fetch it again

    # A task that asks for nothing is not fused with the workers, and finds a place when these take all there is.
    rows = source.map_batches(read, batch_size=1, num_cpus=0).map_batches(
        _Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        fn_constructor_args=(shared, threads, written),
        **share,
    )
    for batch in rows.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
        yield {"number": int(batch["number"][0]), "tally": bytes(batch["tally"][0])}


class _Written:
    """An actor beside the process that writes: which blocks are on disk."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.changed = asyncio.Condition()

    async def add(self, number: int) -> None:
        """Let those go on who wait for that block."""
        async with self.changed:
            self.numbers.add(number)
            self.changed.notify_all()

    async def wait_for(self, number: int) -> None:
        """Until that block is on disk."""
        async with self.changed:
            await self.changed.wait_for(lambda: number in self.numbers)


class _Worker:
    """An actor that computes blocks."""

    def __init__(self, function: Any, threads: int, written: Any) -> None:
        import ray  # type: ignore[import-not-found]

        torch.set_num_threads(threads)
        self.function: Callable[[Block], Tally] = ray.get(function)  # type: ignore[assignment]
        self.written = written
        self.last: int | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import ray  # type: ignore[import-not-found]
        from safetensors.torch import save

        number, block = int(batch["number"][0]), bytes(batch["block"][0])
        if number == _COUNTS:
            return {"number": [number], "tally": [block]}
        if self.last is not None:
            ray.get(self.written.wait_for.remote(self.last))
        tally = self.function(pickle.loads(block))
        self.last = number
        return {"number": [number], "tally": [save(tally.tensors())]}
