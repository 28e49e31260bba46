"""The proof of one subject: five comparisons, and a record of what came out.

1. The patched model's logits are those of the bare one.
2. Relevance over all sources sums to the explained logit: under CP-LRP, and under AttnLRP with the softmax stopped.
3. The auditor, which walks the bare model's autograd graph, finds the same relevance: under both, and under AttnLRP.
4. With gradient checkpointing the relevance is the same.
5. As a control, gradient × input of the bare model: where it sums to the logit, the model is linear already.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lxt.audit import audit
from lxt.composites import ATTN_LRP, CP_LRP, Composite
from lxt.coverage.arguments import arguments
from lxt.coverage.build import built
from lxt.coverage.precision import Float64
from lxt.coverage.sizes import tiny_of
from lxt.coverage.sources import Explained, has_embedding
from lxt.coverage.subjects import Subject
from lxt.mode import UnknownOperation
from lxt.patching import monkey_patch

__all__ = ["SAME_LOGITS", "SAME_RELEVANCE", "Record", "largest", "prove", "versions"]

SAME_LOGITS = 1e-9  # relative to the largest logit; in float64, where torch may take another kernel under the patch
SAME_RELEVANCE = 1e-6  # relative to the explained logit, or to the largest relevance
_MASKED = 1e30
CONSERVING = {"cp": CP_LRP, "attnlrp, softmax stopped": ATTN_LRP.but(attention="value_only")}
AUDITED = CONSERVING | {"attnlrp": ATTN_LRP}


@dataclass
class Record:
    """What was found about a subject; numbers are relative differences.

    Attributes:
        stage: how far it came: "build", "run", "patch", "audit" or "done".
        error: what stopped it there.
        logits: of the patched model to the bare one's.
        conservation: composite -> sum of relevance to the explained logit.
        audit: composite -> relevance to the auditor's.
        unknown: operations without a rule, and nodes unknown to the auditor.
        checkpointing: relevance with checkpointing to that without; None where the model has none or fails with it.
        control: sum of the bare model's gradient × input to the logit.
        parameters: how many the tiny model has.
        sources: how many tensors relevance ended at.
        reach: the share of tokens, pixels or samples with relevance, in the input that has the least.
        seconds: everything together.
        versions: of torch and transformers.
    """

    task: str
    type: str
    architecture: str
    stage: str = "build"
    error: str = ""
    logits: float | None = None
    conservation: dict[str, float] = field(default_factory=dict)
    audit: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    checkpointing: float | None = None
    control: float | None = None
    parameters: int = 0
    sources: int = 0
    reach: float = 0.0
    seconds: float = 0.0
    versions: str = ""

    @property
    def proven(self) -> bool:
        """Whether logits, conservation and auditor are all within their tolerance."""
        return self.stage == "done" and not self.unknown and not self.reasons()

    @property
    def key(self) -> str:
        """As Subject.key."""
        return f"{self.task}/{self.type}"

    def reasons(self) -> list[str]:
        """Why it isn't proven."""
        found = [f"{self.stage}: {self.error}"] if self.stage != "done" else []
        found += [f"no rule for {name}" for name in self.unknown]
        if self.logits is not None and not self.logits <= SAME_LOGITS:
            found.append(f"logits differ by {self.logits:.1e}")
        for what, numbers in (
            ("Σ relevance differs from the logit", self.conservation),
            ("the auditor differs", self.audit),
        ):
            worst = largest(numbers)
            if worst is not None and not numbers[worst] <= SAME_RELEVANCE:
                found.append(f"{what} by {numbers[worst]:.1e} ({worst})")
        if self.checkpointing is not None and not self.checkpointing <= SAME_RELEVANCE:
            found.append(f"checkpointing changes relevance by {self.checkpointing:.1e}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"proven": self.proven}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """What `to_dict` gave; names that are no fields are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def largest(numbers: Mapping[str, float]) -> str | None:
    """The name of the largest number, NaN being above all; None where there is none."""
    return max(numbers, key=lambda name: _order(numbers[name]), default=None)


def _order(number: float) -> float:
    return number if number == number else float("inf")


def versions() -> str:
    """What the records of a run belong to: "torch 2.13.0, transformers 5.23.0"."""
    return ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "transformers"))


def prove(subject: Subject) -> Record:
    """Everything about one subject; never raises for what the subject does."""
    record = Record(subject.task, subject.type, subject.architecture, versions=versions())
    start = time.perf_counter()
    try:
        _prove(subject, record)
    except UnknownOperation as error:
        record.unknown, record.error = [error.operation], _first_line(error)
    except Exception as error:  # whatever a model raises is the finding
        record.error = f"{type(error).__name__}: {_first_line(error)}"
    record.seconds = round(time.perf_counter() - start, 2)
    return record


def _prove(subject: Subject, record: Record) -> None:
    model = built(subject)
    record.parameters = sum(parameter.numel() for parameter in model.parameters())
    record.stage = "run"
    explained = Explained(model, arguments(subject, model), tiny_of(subject.type, subject.task).sources)
    with Float64():
        sources = explained.sources()
        record.sources = len(sources)
        bare, index, relevance = _relevance(explained, sources)
        value = float(bare[index])
        record.control = _relative(sum(float(part.sum()) for part in relevance.values()), value)
        record.stage = "patch"
        found: dict[str, dict[str, Tensor]] = {}
        for name, rules in AUDITED.items():
            with monkey_patch(model, rules):
                logits, _, found[name] = _relevance(explained, sources, index)
            record.logits = max(record.logits or 0.0, _distance({"": logits}, {"": bare}))
            if name in CONSERVING:
                record.conservation[name] = _relative(sum(float(part.sum()) for part in found[name].values()), value)
        inputs = {name: part for name, part in found["cp"].items() if name not in explained.tokens}
        record.reach = _reach(inputs)
        record.stage = "audit"
        for name, rules in AUDITED.items():
            _audit(explained, sources, index, name, rules, found[name], record)
        record.stage = "checkpointing"
        _checkpoint(model, explained, sources, index, found["attnlrp"], record)
    record.stage = "done"


def _relevance(
    explained: Explained, sources: dict[str, Tensor], index: tuple[int, ...] | None = None
) -> tuple[Tensor, tuple[int, ...], dict[str, Tensor]]:
    """The logits, which of them is explained, and source × gradient."""
    leaves = {name: value.clone().requires_grad_() for name, value in sources.items()}
    with torch.enable_grad():
        logits = explained(**leaves)
        index = _explained_logit(logits) if index is None else index
        gradients = torch.autograd.grad(logits[index], list(leaves.values()), materialize_grads=True, allow_unused=True)
    relevance = {name: sources[name] * gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return logits.detach(), index, relevance


def _explained_logit(logits: Tensor) -> tuple[int, ...]:
    """The largest in size at the last position of the first row: far from 0, so that relative errors mean something."""
    last = (0, *[-1] * (logits.dim() - 2)) if logits.dim() > 1 else ()
    sizes = logits[last].abs()
    # what a model puts in place of the logits of tokens that it must not say is a constant
    return (*last, int(sizes.where(sizes < _MASKED, 0).argmax()))


def _audit(
    explained: Explained,
    sources: dict[str, Tensor],
    index: tuple[int, ...],
    name: str,
    rules: Composite,
    found: dict[str, Tensor],
    record: Record,
) -> None:
    audited = audit(explained, sources, lambda logits: logits[index], rules, wrt=tuple(sources))
    record.unknown += [node for node in audited.unknown if node not in record.unknown]
    record.audit[name] = _distance(found, audited.relevance)


def _checkpoint(
    model: Any,
    explained: Explained,
    sources: dict[str, Tensor],
    index: tuple[int, ...],
    found: dict[str, Tensor],
    record: Record,
) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    try:
        with _checkpointing(model), monkey_patch(model, ATTN_LRP):
            _, _, again = _relevance(explained, sources, index)
    except Exception:
        if _can_checkpoint(model, explained, sources):
            raise
        return
    record.checkpointing = _distance(again, found)


def _can_checkpoint(model: Any, explained: Explained, sources: dict[str, Tensor]) -> bool:
    """Whether the bare model runs with checkpointing: some read a cache, which that leaves out."""
    with _checkpointing(model):
        try:
            explained(**sources)
        except Exception:
            return False
    return True


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Every layer that can is checkpointed, without train mode for what is in it."""
    # torch leaves a function mode behind when it recomputes in a backward, so Float64 has to come along
    from transformers.modeling_layers import GradientCheckpointingLayer

    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), Float64())}
    # transformers renamed the calls in 5.2x
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable, disable = (
        (model.activation_checkpointing_enable, model.activation_checkpointing_disable)
        if renamed
        else (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable)
    )
    enable(options)
    model.disable_input_require_grads()  # the sources do already
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    # the hooks that make embeddings sources are gone when a layer that has one is recomputed
    layers = [layer for layer in layers if not (isinstance(layer, GradientCheckpointingLayer) and has_embedding(layer))]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        disable()


def _reach(relevance: dict[str, Tensor]) -> float:
    """The share of tokens, pixels and samples with relevance, in the input where it is smallest.

    Parameters that stand for tokens are left out: a table of positions has rows that a short input doesn't use.
    """
    shares = []
    for part in relevance.values():
        received = part != 0 if part.dim() < 3 else (part != 0).any(-1)
        shares.append(float(received.double().mean()))
    return round(min(shares), 3)


def _relative(total: float, value: float) -> float:
    return abs(total - value) / abs(value) if value else float("nan")


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest number expected."""
    largest = max(float(part.abs().max()) for part in expected.values() if part.numel())
    worst = [float((found[name] - part).abs().max()) for name, part in expected.items() if part.numel()]
    if not largest:
        return float("nan")  # no relevance at all proves nothing
    return max(worst, key=_order) / largest


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
