"""For the kernels' tests: where they run, inputs in awkward layouts, and a rule beside its twin.

On a GPU the kernels run on it; elsewhere conftest.py has Triton interpret them, on CPU tensors. The interpreter stores
bfloat16 by cutting digits off, where GPUs and torch round to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = [
    "DEVICE",
    "DTYPES",
    "INTERPRETED",
    "LAYOUTS",
    "assert_close",
    "coefficients",
    "far_apart",
    "poisoned",
    "step",
]

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def strided(x: Tensor) -> Tensor:
    """The same numbers, every second element of a transposed buffer whose rest is NaN."""
    buffer = torch.full((*x.shape[:-2], x.shape[-1], 2 * x.shape[-2]), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer.transpose(-1, -2)[..., ::2, :]
    view.copy_(x)
    return view


def half(x: Tensor) -> Tensor:
    """The same numbers as the first half of rows twice as long, as of a fused gate_up projection; the rest is NaN."""
    view = torch.cat((x, torch.full_like(x, torch.nan)), dim=-1)[..., : x.shape[-1]]
    assert not view.numel() or x.shape[0] == 1 or not view.is_contiguous()
    return view


def transposed(x: Tensor) -> Tensor:
    """The same numbers, the first two dimensions the other way round in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def far_apart(columns: int) -> Tensor:
    """4 rows of ones, whose stride fits 32 bits and the last row's place does not; what lies between is not touched."""
    gap = 2**30 + 16
    whole = torch.empty(3 * gap + columns, dtype=torch.float16, device=DEVICE)
    return whole.as_strided((4, columns), (gap, 1)).copy_(torch.ones(4, columns))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "strided": strided,
    "transposed": transposed,
    "half": half,
    "empty": lambda x: x[:0],
}


def step(dtype: torch.dtype) -> float:
    """The largest relative error of one result stored in `dtype`."""
    cut = INTERPRETED and dtype == torch.bfloat16
    return torch.finfo(dtype).eps * (1 if cut else 0.5)


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float = 0.0) -> None:
    """Each number by itself; `atol` relative to the largest, for sums that cancel."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = expected.double().abs().max().item() if atol and expected.numel() else 0.0
    limits = torch.finfo(expected.dtype)  # below the smallest normal number a rounding is not relative, or goes to 0
    least = 8 * limits.smallest_normal * (limits.eps if expected.dtype == torch.float16 else 1)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=max(atol * scale, least))


@contextmanager
def poisoned() -> Iterator[None]:
    """Meanwhile torch.empty holds NaN, so that a number that a kernel doesn't write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def coefficients(
    function: Callable[..., Tensor], *inputs: Tensor, c_y: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """The output, c of each input, and the c_y sent in (random if not given); the backward is run twice.

    Layouts are those of `inputs`, and c_y is not changed by it.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    with poisoned():
        y = function(*leaves)
        if c_y is None:
            c_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        kept = c_y.clone()
        once = torch.autograd.grad(y, leaves, c_y, retain_graph=True, allow_unused=True)
        twice = torch.autograd.grad(y, leaves, c_y, allow_unused=True)
    for a, b in zip(once, twice, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert torch.equal(c_y, kept)
    return y.detach(), list(once), c_y
