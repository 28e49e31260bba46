"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory and the width of loads.

    python tests/bench/kernels.py [--targets 80 90 100] [--json FILE] [--only NAME ...]

Each case calls the kernel's public function, and its backward, on small CPU tensors. What it would launch is compiled
instead, specialised as Triton specialises for these arguments (sizes and strides that 16 divides, arguments of 1).
Says nothing about speed. Fails if a kernel spills registers or needs more shared memory than GPUs of that target have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lxt.triton_kernels import (
    add_layer_norm,
    add_rms_norm,
    gated_product,
    identity,
    layer_norm,
    relevance,
    rms_norm,
    rotary,
    value_attention,
)

MODULES = (add_layer_norm, gated_product, identity, layer_norm, relevance, rms_norm, rotary, value_attention)
OPTIONS = ("enable_fp_fusion", "num_stages")  # of the compiler, among a kernel's constants
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Bytes of shared memory per program. sm_80 is compiled for 8.6 and 8.9 too, which have the least.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target.

    Attributes:
        registers: per thread.
        stack: bytes per thread in local memory, where spilled registers go.
        shared: bytes per program.
        load: the widest load from memory, in 32-bit words.
    """

    case: str
    kernel: str
    target: int
    registers: int
    stack: int
    shared: int
    load: int


def cases() -> dict[str, Callable[[], Any]]:
    """What is compiled: the shapes of Llama-like, Phi-3-like and GPT-2-like models."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found: dict[str, Callable[[], Any]] = {}
    for form, dtype in (("silu", bf16), ("gelu", bf16), ("gelu", fp32), ("tanh", bf16), ("mish", bf16)):
        found[f"identity {form} {short(dtype)}"] = lambda form=form, dtype=dtype: backward(
            lambda x: identity.identity(x, F.silu, form), numbers(4, 4096, dtype)
        )
    for form, dtype in (("silu", bf16), ("silu", fp32), ("gelu_tanh", bf16), ("gelu", bf16)):
        found[f"gated_product {form} {short(dtype)}"] = lambda form=form, dtype=dtype: backward(
            lambda g, u: gated_product.gated_product(g, u, F.silu, form, False, False),
            numbers(4, 14336, dtype),
            numbers(4, 14336, dtype),
        )
    found["gated_product silu bf16, halves of one tensor"] = lambda: backward(halves, numbers(4, 16384, bf16))
    for style, hidden, exact in (
        ("llama", 4096, True),
        ("llama", 4096, False),
        ("gemma", 2304, False),
        ("t5", 512, False),
        ("llama", 128, False),
    ):
        name = f"rms_norm {style} bf16 {hidden}{'' if exact else ' fast'}"
        found[name] = lambda style=style, hidden=hidden, exact=exact: backward(
            lambda x: rms_norm.rms_norm(x, torch.ones(hidden, dtype=bf16), 1e-6, style, exact),  # type: ignore[arg-type]
            numbers(64, hidden, bf16),
        )
    for hidden, dtype in ((768, bf16), (5120, bf16), (768, fp32)):
        found[f"layer_norm {short(dtype)} {hidden}"] = lambda hidden=hidden, dtype=dtype: backward(
            lambda x: layer_norm.layer_norm(x, (hidden,), torch.ones(hidden, dtype=dtype)), numbers(4, hidden, dtype)
        )
    for style, hidden, dtype, exact in (
        ("llama", 4096, bf16, True),
        ("llama", 4096, bf16, False),
        ("llama", 4096, fp32, False),
        ("gemma", 2304, bf16, False),
        ("t5", 512, bf16, False),
    ):
        name = f"add_rms_norm {style} {short(dtype)} {hidden}{'' if exact else ' fast'}"
        found[name] = lambda style=style, hidden=hidden, dtype=dtype, exact=exact: both(
            lambda x, r: add_rms_norm.add_rms_norm(x, r, torch.ones(hidden, dtype=dtype), 1e-6, style, exact),  # type: ignore[arg-type]
            numbers(64, hidden, dtype),
        )
    for hidden, dtype in ((768, bf16), (5120, bf16), (768, fp32)):
        found[f"add_layer_norm {short(dtype)} {hidden} fast"] = lambda hidden=hidden, dtype=dtype: both(
            lambda x, r: add_layer_norm.add_layer_norm(
                x, r, (hidden,), torch.ones(hidden, dtype=dtype), torch.ones(hidden, dtype=dtype), exact=False
            ),
            numbers(4, hidden, dtype),
        )
    for groups in (None, 32):
        found[f"relevance bf16 {'per token' if groups is None else 'per head of 128'}"] = lambda groups=groups: (
            relevance.relevance(numbers(16, 4096, bf16), numbers(16, 4096, bf16), groups)
        )
    for width in (64, 128):
        found[f"rotary bf16 {width}"] = lambda width=width: backward(
            lambda x: rotary.rotary(x, numbers(1, 16, width, bf16), numbers(1, 16, width, bf16), 0.25),
            numbers(1, 16, 4, width, bf16).transpose(1, 2),
        )
    for dtype, widths in ((bf16, (64, 80, 128, 192, 256)), (fp32, (64, 128, 256))):
        for width in widths:
            found[f"value_attention {short(dtype)} {width}"] = lambda width=width, dtype=dtype: attention(width, dtype)
    masks = {"bool": torch.ones(1, 1, 16, 16, dtype=torch.bool), "sum": torch.zeros(1, 1, 16, 16, dtype=bf16)}
    found["value_attention bf16 128, mask"] = lambda: attention(128, bf16, masks["bool"])
    found["value_attention bf16 128, additive mask"] = lambda: attention(128, bf16, masks["sum"])
    found["value_attention bf16 128, window"] = lambda: attention(128, bf16, window=8)
    # Arguments of 1 are compiled in as constants, where other code runs in the compiler; those of 2^31 have 64 bits.
    found["one: identity"] = lambda: backward(lambda x: identity.identity(x, F.silu, "silu"), numbers(1, bf16))
    found["one: gated_product"] = lambda: backward(
        lambda g, u: gated_product.gated_product(g, u, F.silu, "silu", False, False),
        numbers(1, 1, bf16),
        numbers(1, 1, bf16),
    )
    found["one: rms_norm"] = lambda: backward(
        lambda x: rms_norm.rms_norm(x, torch.ones(1), 1e-6, "t5", False), numbers(1, 1, bf16)
    )
    found["one: layer_norm"] = lambda: backward(lambda x: layer_norm.layer_norm(x, (1,)), numbers(1, 1, bf16))
    found["one: add_rms_norm"] = lambda: both(
        lambda x, r: add_rms_norm.add_rms_norm(x, r, torch.ones(1), 1e-6, "t5", False), numbers(1, 1, bf16)
    )
    found["one: add_layer_norm"] = lambda: both(
        lambda x, r: add_layer_norm.add_layer_norm(x, r, (1,), exact=False), numbers(1, 1, bf16)
    )
    found["one: relevance"] = lambda: relevance.relevance(numbers(1, 1, bf16), numbers(1, 1, bf16), 1)
    found["one: rotary"] = lambda: backward(
        lambda x: rotary.rotary(x, numbers(1, 1, 2, bf16), numbers(1, 1, 2, bf16)), numbers(1, 1, 1, 2, bf16)
    )
    found["one: value_attention, query"] = lambda: attention(64, bf16, queries=1)
    found["one: value_attention, key"] = lambda: attention(64, bf16, keys=1)
    found["one: value_attention, head"] = lambda: attention(64, bf16, heads=1)
    found["one: value_attention, all, window"] = lambda: attention(1, bf16, window=1, queries=1, keys=1, heads=1)
    found["one: value_attention, window"] = lambda: attention(64, bf16, window=1)
    found["far: rms_norm"] = lambda: backward(
        lambda x: rms_norm.rms_norm(x, torch.ones(64, dtype=bf16), 1e-6, "llama", False), far_apart(64)
    )
    found["far: add_rms_norm"] = lambda: both(
        lambda x, r: add_rms_norm.add_rms_norm(x, r, torch.ones(64, dtype=bf16), 1e-6, "llama", False), far_apart(64)
    )
    found["far: add_layer_norm"] = lambda: both(
        lambda x, r: add_layer_norm.add_layer_norm(x, r, (64,), exact=False), far_apart(64)
    )
    found["far: rotary"] = lambda: backward(
        lambda x: rotary.rotary(x, numbers(1, 2, 64, bf16), numbers(1, 2, 64, bf16)), far_apart(64)[None, None]
    )
    found["many: relevance"] = lambda: relevance.relevance(  # of 2^31 rows, all one in memory
        numbers(1, 64, bf16).expand(2**31, 64), numbers(1, 64, bf16).expand(2**31, 64)
    )
    found["far: relevance"] = lambda: relevance.relevance(far_apart(64), far_apart(64))
    found["far: value_attention"] = lambda: attention(64, bf16, queries=2, keys=2, heads=1, far=True)
    return found


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def numbers(*shape_and_dtype: Any) -> Tensor:
    *shape, dtype = shape_and_dtype
    return torch.ones(shape, dtype=dtype)


def backward(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    leaves = [x.requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(torch.ones_like(y))


def both(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor) -> None:
    """The backward of both outputs of a residual connection with its norm."""
    outputs = function(x.requires_grad_(), x.detach().requires_grad_())
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def halves(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gated_product.gated_product(gate, up, F.silu, "silu")


def attention(
    width: int,
    dtype: torch.dtype,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    queries: int = 16,
    keys: int = 16,
    heads: int = 8,
    far: bool = False,
) -> None:
    """Causal without a mask; four query heads share one of keys and values; [batch, token, head, d_head] in memory."""
    group = 4 if heads > 1 else 1
    query = numbers(1, queries, group * heads, width, dtype).transpose(1, 2)
    key, value = (numbers(1, keys, heads, width, dtype).transpose(1, 2) for _ in range(2))
    if far:
        key = far_apart(width)[None, None]
    out = value_attention.value_attention(
        query, key, value.requires_grad_(), attn_mask, attn_mask is None, enable_gqa=True, window=window
    )
    out.backward(torch.ones(1, queries, group * heads, width, dtype=dtype).transpose(1, 2))


def far_apart(columns: int) -> Tensor:
    """Two rows 2^31 numbers apart; the memory between them is never touched."""
    return torch.empty(2**31 + columns, dtype=torch.bfloat16).as_strided((2, columns), (2**31, 1)).fill_(1)


def launches(case: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any], int]]:
    """The kernels that a case would start: (kernel, arguments, constants, warps)."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any], int]] = []

    def record(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any], warps: int = 4) -> None:
        found.append((kernel, tuple(arguments), constants, warps))

    for module in MODULES:
        setattr(module, "launch", record)  # noqa: B010  pyright knows no such attribute of a module
    case()
    return found


def source(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """The kernel specialised as a launch with these arguments specialises it."""
    signature: dict[str, str] = {}
    known: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[place] if place < len(arguments) else constants[name]
        if place >= len(arguments) or (isinstance(value, int) and value == 1):
            signature[name], known[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            divides = True  # torch aligns what it allocates
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divides = value % 16 == 0
        else:
            signature[name], divides = "fp32", False
        if divides:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)


def compiled(name: str, case: Callable[[], Any], targets: list[int]) -> Iterator[Compiled]:
    for kernel, arguments, constants, warps in launches(case):
        options = {"num_warps": warps} | {key: constants[key] for key in OPTIONS if key in constants}
        for target in targets:
            built = triton.compile(
                source(kernel, arguments, constants), target=GPUTarget("cuda", target, 32), options=options
            )
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"])
                file.flush()
                usage = subprocess.run(
                    [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
                ).stdout
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
            yield Compiled(
                case=name,
                kernel=kernel.__name__ + (" back" if constants.get("BACK") else ""),
                target=target,
                registers=used["REG"],
                stack=used["STACK"] + used["LOCAL"],
                shared=built.metadata.shared,
                load=widest_load(built.asm["ptx"]),
            )


def widest_load(ptx: str) -> int:
    """In 32-bit words; cp.async, which loads ahead into shared memory, counts its bytes."""
    words = [
        int(vector or 1) * int(bits) / 32 for vector, bits in re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    ]
    words += [
        int(size, 0) / 4 for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)[,;\s]", ptx)
    ]
    return int(max(words, default=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--json", type=Path, help="where the numbers go, too")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name holds one of these")
    options = parser.parse_args()
    chosen = {name: case for name, case in cases().items() if any(part in name for part in options.only)}
    if not chosen:
        parser.error(f"no case holds {' or '.join(map(repr, options.only))}; there are {', '.join(cases())}")
    print(
        f"triton {triton.__version__}; registers per thread / bytes spilled / bytes of shared memory / words per load"
    )
    print("| case | kernel | " + " | ".join(f"sm_{target}" for target in options.targets) + " |")
    print("|---|---|" + "---|" * len(options.targets))
    found: list[Compiled] = []
    for name, case in chosen.items():
        rows: dict[str, list[Compiled]] = {}
        for result in compiled(name, case, options.targets):
            rows.setdefault(result.kernel, []).append(result)
            found.append(result)
        for kernel, results in rows.items():
            cells = (f"{x.registers} / {x.stack} / {x.shared} / {x.load}" for x in results)
            print(f"| {name} | {kernel} | " + " | ".join(cells) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in found], indent=1) + "\n")
    bad = [x for x in found if x.stack or x.shared > SHARED[x.target]]
    if bad:
        sys.exit("spills, or too much shared memory: " + "; ".join(f"{x.case} {x.kernel} sm_{x.target}" for x in bad))


if __name__ == "__main__":
    main()
