"""Is this attribution right? What `Attribution.check()` runs and reports.

1. The bare model runs: its logits must be those that were explained.
2. The model runs again with a ledger: what sums to the explained value, and where the rest went.
3. The auditor computes the relevance by a second mechanism: it must be the same.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lxt.composites import Composite
from lxt.ledger import Ledger
from lxt.mode import UnknownOperation
from lxt.patches import patch_map_for
from lxt.patching import patch_model, rules_of
from lxt.patchmap import PatchMap
from lxt.requesting import Request

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["CheckReport", "Leak", "check"]

# How far two right computations of a relevance may lie apart, relative to the largest one, by the model's dtype:
# several times what tests/test_checking.py sees. Norms of transformers compute in float32 in a float64 model, too.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_ROWS_SHOWN = 12  # a longer table isn't read


class Explains(Protocol):
    """What can run a request again: an Attributor, or what explains images."""

    @property
    def model(self) -> Any:
        """The model, not patched."""
        ...

    @property
    def rules(self) -> Composite:
        """The composite."""
        ...

    @property
    def patch_map(self) -> PatchMap | None:
        """In place of the architecture's own."""
        ...

    def results(self, request: Any, patch: Callable[[], AbstractContextManager[Any]] | None = None) -> Iterator[Any]:
        """Results with `values` and `logits`, batch by batch."""
        ...

    def audited(self, request: Any) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """The relevance of each batch by the auditor."""
        ...


@dataclass(frozen=True)
class Leak:
    """Relevance that some operations kept.

    Attributes:
        kind: bias, softmax, constant (learned positions, masks, prompts of parameters), bias and epsilon, or the
            decoder's own tokens, which are no part of the source.
        amount: in the unit of the explained value.
        modules: path -> amount, the largest first.
    """

    kind: str
    amount: float
    modules: dict[str, float]


@dataclass(frozen=True)
class CheckReport:
    """The report on an attribution; `print` it, or look at `ok`.

    Attributes:
        value: the explained value, summed over the batch.
        total: the sum of all relevance of the input.
        rows: of each row of the result, its explained value and the sum of its relevance; none where there are images,
            which conserve together.
        leaks: where the difference went, the largest first.
        rest: what no leak explains: rounding, or the target's own function where it is not linear in the logits.
        forward_difference: the largest difference between the bare model's logits and the explained ones.
        forward_scale: the largest logit, which the difference is relative to.
        audit_difference: the largest difference to the auditor's relevance, relative to the largest relevance.
        audit_note: why the auditor could not judge, else "".
        unknown: operations without a rule.
        dtype: the model's.
    """

    value: float
    total: float
    rows: tuple[tuple[float, float], ...]
    leaks: tuple[Leak, ...]
    rest: float
    forward_difference: float
    forward_scale: float
    audit_difference: float | None
    audit_note: str
    unknown: tuple[str, ...]
    dtype: torch.dtype

    @property
    def forward_equal(self) -> bool:
        """Whether patching left the logits as they were, to two units in the last place of the largest."""
        return self.forward_difference <= 2 * torch.finfo(self.dtype).eps * self.forward_scale

    @property
    def ok(self) -> bool:
        """Whether the logits are unchanged, every operation has its rule, and the auditor, if it could, agrees."""
        agreed = self.audit_difference is None or self.audit_difference <= TOLERANCE.get(self.dtype, 1e-3)
        return self.forward_equal and not self.unknown and agreed

    def _verdict(self) -> str:
        audited = "" if self.audit_difference is not None else ", but not audited"
        return f"passed{audited}" if self.ok else "FAILED"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(self.__rich__())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self)}

    def __rich__(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"check: {self._verdict()}", show_header=False, title_justify="left")
        if len(self.rows) > 1:  # they may explain different things: their sum says little
            for number, (value, total) in enumerate(self.rows[:_ROWS_SHOWN]):
                table.add_row(f"conservation of row {number}", _conserved(total, value))
            if len(self.rows) > _ROWS_SHOWN:
                table.add_row("", f"and {len(self.rows) - _ROWS_SHOWN} rows more, in .rows")
        table.add_row("conservation" if len(self.rows) < 2 else "  all rows", _conserved(self.total, self.value))
        rounding = 32 * torch.finfo(self.dtype).eps * max(abs(self.value), abs(self.total))
        shown = [leak for leak in self.leaks if abs(leak.amount) > rounding]
        for leak in shown:
            most = list(leak.modules.items())[:3]
            where = ", ".join(f"{path or 'the model itself'} {amount:+.3g}" for path, amount in most)
            table.add_row(f"  kept by {leak.kind}", Text(f"{leak.amount:+.4g}   most in {where}"))
        table.add_row("  rest", f"{self.value - self.total - sum(leak.amount for leak in shown):+.2g}")
        same = "unchanged" if self.forward_equal else "CHANGED"
        table.add_row("logits", f"{same} (largest difference {self.forward_difference:.2g})")
        if self.audit_difference is None:
            table.add_row("auditor", Text(f"could not judge: {self.audit_note}"))
        else:
            table.add_row("auditor", f"differs by {self.audit_difference:.1e} of the largest relevance")
        table.add_row("operations without a rule", Text(", ".join(self.unknown) or "none"))
        return table


def _conserved(total: float, value: float) -> str:
    share = f" ({total / value:.1%})" if value else ""
    return f"Σ relevance {total:.4g} of {value:.4g}{share}"


def check(attributor: Explains, request: Any, relevance: Sequence[Tensor]) -> CheckReport:
    """Run a request again, in the three ways above; `Attribution.check()` calls it.

    Args:
        attributor: the model, its tokenizer and rules.
        request: what was explained.
        relevance: what came out, [batch, token] for each of the request's groups.

    Raises:
        ValueError: the model is patched by somebody else, so that it can't be run bare.
    """
    request = replace(request, latents=())
    model, rules = attributor.model, attributor.rules
    if rules_of(model) is not None:
        raise ValueError("check() runs the model without rules, but it is patched: remove the handle first")
    value, prefix, difference, scale = 0.0, 0.0, 0.0, 0.0
    values: list[float] = []
    for patched, bare in zip(attributor.results(request), attributor.results(request, nullcontext), strict=True):
        value += float(patched.values.double().sum())
        values += patched.values.tolist()
        prefix += 0.0 if patched.prefix is None else float(patched.prefix.double().sum())
        difference = max(difference, float((patched.logits - bare.logits).abs().max()))
        scale = max(scale, float(bare.logits.abs().max()))

    ledger = Ledger.of(model)
    patch_map = attributor.patch_map if attributor.patch_map is not None else patch_map_for(model)
    in_the_open = replace(patch_map, forwards={}, rules=None)  # fused forwards hide operations from the ledger
    unknown: tuple[str, ...] = ()
    try:
        for _ in attributor.results(request, partial(patch_model, model, rules, in_the_open, ledger.mode)):
            pass
    except UnknownOperation as error:
        unknown = (error.operation,)

    total = float(sum(part.double().sum() for part in relevance))
    leaks = _leaks(ledger)
    if prefix:
        leaks = (Leak("the decoder's own tokens", prefix, {"the decoder's embeddings": prefix}), *leaks)
    distance, note = _audit(attributor, request, relevance)
    return CheckReport(
        value=value,
        total=total,
        rows=_rows(request, values, relevance),
        leaks=leaks,
        rest=value - total - sum(leak.amount for leak in leaks),
        forward_difference=difference,
        forward_scale=scale,
        audit_difference=distance,
        audit_note=note,
        unknown=unknown,
        dtype=next(model.parameters()).dtype,
    )


def _rows(request: Any, values: Sequence[float], relevance: Sequence[Tensor]) -> tuple[tuple[float, float], ...]:
    """Value and total of each row, in the order of the result."""
    if not isinstance(request, Request):
        return ()
    totals = [float(row.double().sum()) for part in relevance for row in part]
    places = [place for group in request.groups for i in group for place in request.places[i]]
    return tuple((value, total) for _, value, total in sorted(zip(places, values, totals, strict=True)))


def _leaks(ledger: Ledger) -> tuple[Leak, ...]:
    by_kind: dict[str, dict[str, float]] = {}
    for (kind, path), amount in ledger.entries.items():
        by_kind.setdefault(kind, {})[path] = amount
    leaks = []
    for kind, amounts in by_kind.items():
        ordered = dict(sorted(amounts.items(), key=lambda item: -abs(item[1])))
        leaks.append(Leak(kind, sum(amounts.values()), ordered))
    return tuple(sorted(leaks, key=lambda leak: -abs(leak.amount)))


def _audit(attributor: Explains, request: Any, relevance: Sequence[Tensor]) -> tuple[float | None, str]:
    """The largest difference to the auditor's relevance, or None and why there is none."""
    try:
        audited = list(attributor.audited(request))
    except ValueError as error:
        return None, str(error).splitlines()[0]
    unknown = sorted({name for _, names in audited for name in names})
    if unknown:
        return None, f"no rule in the auditor for {', '.join(unknown)}"
    largest = max(float(part.abs().max()) for part in relevance) or 1.0
    return max(_distance(a, b) for a, (b, _) in zip(relevance, audited, strict=True)) / largest, ""


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
