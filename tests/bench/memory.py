"""A model larger than the memory, attributed inside a memory cgroup: time against the floor, and the control.

    python tests/bench/memory.py --folder /somewhere [--shape 8b] [--layers N] [--limit 2GiB] [--tokens 64] [--cpus 2]

Writes a checkpoint of random bfloat16 weights into the folder, in 5 GB shards, and deletes it at the end. Then, each in
a process of its own inside the cgroup:

 rates     what the disk gives (one pass over a shard that isn't in the page cache) and what bfloat16 matmuls give at
           the model's shapes, forward and backward
 placed    lxt.load(folder, memory=limit).attribute(..., latents="residual")
 control   the same model by a plain from_pretrained, mapped lazily, and attribute() without checkpointing
 slice     the first four layers: placed in the cgroup, and in memory outside; equal to the last bit or not

The floor is (bytes that must be read / disk rate) + (FLOPs / matmul rate), added: each layer once for the forward and,
but for the last one, once more for the backward; the output projection once; and three matmuls for each weight (the
forward, again for the backward, and the backward). Overlapping reads with computing can go below it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from memory_cgroup import NoCgroup, Run, run_limited
from memory_checkpoint import first_layers, forget, llama_shapes, write
from safetensors.torch import load_file

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "1b": LLAMA
    | {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
SLICE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for the checkpoint")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--limit", type=float, default=2.0, help="of the cgroup, in GiB")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--skip", nargs="*", default=[], choices=["control", "slice"])
    options = parser.parse_args()
    config = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    model = options.folder / f"lxt-bench-{options.shape}"
    part = options.folder / f"lxt-bench-{options.shape}-{SLICE}"
    try:
        size = write(model, config)
        print(f"{options.shape}: {config['num_hidden_layers']} layers, {size / 1e9:.2f} GB of weights")
        compare(options, config, model)
        if "slice" not in options.skip:
            first_layers(part, model, SLICE)
            compare_slice(options, part)
    except NoCgroup as error:
        sys.exit(f"skipped: {error}")
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(options.folder / "offload", ignore_errors=True)


def compare(options: argparse.Namespace, config: dict[str, Any], model: Path) -> None:
    rates = report(limited("rates", options, model))
    placed = limited("placed", options, model)
    read, flops = needs(config, options.tokens)
    floor = read / rates["disk"] + flops / rates["matmul"]
    print(
        f"floor: {read / 1e9:.1f} GB at {rates['disk'] / 1e9:.2f} GB/s + {flops / 1e12:.2f} TFLOP at "
        f"{rates['matmul'] / 1e9:.0f} GFLOP/s = {read / rates['disk']:.1f} + {flops / rates['matmul']:.1f} s"
    )
    tell("placed", placed, floor)
    if "control" not in options.skip:
        tell("control", limited("control", options, model), floor)


def tell(name: str, run: Run, floor: float) -> None:
    if run.status != 0:
        how = "killed by the kernel" if run.status == -9 else f"ended with status {run.status}"
        print(f"{name}: {how} after {run.seconds:.1f} s; anonymous memory {run.anonymous / 2**30:.2f} GiB")
        return
    found = report(run)
    times = ", ".join(f"{seconds:.1f} s ({seconds / floor:.2f} × the floor)" for seconds in found["seconds"])
    print(
        f"{name}: attribute {times}; load {found['load']:.1f} s; "
        f"anonymous memory {run.anonymous / 2**30:.2f} GiB at most; read {found['read'] / 1e9:.1f} GB in the first; "
        f"{found['placement']}"
    )


def compare_slice(options: argparse.Namespace, part: Path) -> None:
    run = limited("placed", options, part, save=part / "placed.st")
    if run.status != 0:
        print(f"slice: ended with status {run.status}")
        return
    subprocess.run(worker("control", options, part, part / "plain.st"), check=True, stdout=subprocess.DEVNULL)
    placed, plain = load_file(part / "placed.st"), load_file(part / "plain.st")
    equal = {name: torch.equal(placed[name], plain[name]) for name in plain}
    furthest = max(float((placed[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in plain)
    print(f"slice of {SLICE} layers: equal to the last bit {equal}; furthest apart {furthest:.1e} of the largest")


def limited(name: str, options: argparse.Namespace, model: Path, save: Path | None = None) -> Run:
    for file in model.glob("*.safetensors"):
        forget(file)
    return run_limited(worker(name, options, model, save), int(options.limit * 2**30), options.cpus)


def worker(name: str, options: argparse.Namespace, model: Path, save: Path | None = None) -> list[str]:
    script = Path(__file__).with_name("memory_workers.py")
    command = [sys.executable, str(script), name, str(model), f"--tokens={options.tokens}", f"--limit={options.limit}"]
    return command + ([] if save is None else [f"--save={save}"])


def report(run: Run) -> dict[str, Any]:
    if run.status != 0:
        sys.exit(f"a worker ended with status {run.status}: {run.output}")
    return json.loads(run.output.splitlines()[-1])


def needs(config: dict[str, Any], tokens: int) -> tuple[int, float]:
    """Bytes to read and FLOPs for one attribution of a dense model."""
    shapes = llama_shapes(config)
    layers = sum(math.prod(shape) for name, shape in shapes.items() if ".layers." in name)
    last = layers // config["num_hidden_layers"]
    head = config["vocab_size"] * config["hidden_size"]
    return 2 * (2 * layers - last + head), 2.0 * tokens * (3 * layers - last) + 4.0 * head


if __name__ == "__main__":
    main()
