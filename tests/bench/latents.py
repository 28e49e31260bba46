"""Which latents each architecture of the coverage table has, and whether they are in the right place.

    python tests/bench/latents.py [--types llama gpt2 ...] [--tasks causal masked ...] [--json PATH]

Every architecture that reads text is built tiny, in float64, with random weights and zero biases, and explained under
CP-LRP. A latent counts where it is found and
  head        sums, token by token, to what attention adds to the residual stream, and is the very tensor that a product
              of attention weights with values gave, with as many heads (`watched`, which knows nothing of modules);
              "gated" is what a factor or a norm changes in between
  neuron      sums, token by token, to what the MLP adds
  attn_out    together with what enters the layer is residual_mid, number by number
  mlp_out     together with residual_mid is what leaves the layer, number by number, or enters the layer's last norm
  residual, residual_pre, residual_mid    sum to the explained logit in every layer, where all of it comes from tokens
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lxt.latents.adding
from lxt import monkey_patch
from lxt.coverage.arguments import arguments
from lxt.coverage.build import built
from lxt.coverage.precision import Float64
from lxt.coverage.sizes import tiny_of
from lxt.coverage.sources import Explained
from lxt.coverage.subjects import Subject, all_subjects
from lxt.latents import Keep, Site, capture, hooked, sites
from lxt.patches import patch_map_for

KINDS = ("residual_pre", "residual", "residual_mid", "attn_out", "mlp_out", "head", "neuron")
TASKS = ("causal", "masked", "sequence", "seq2seq", "image-text", "token", "question")
CLOSE = 1e-9  # float64, relative to the largest number
SAME = {"rtol": 1e-9, "atol": 1e-12}


class Weighed(TorchFunctionMode):
    """Remembers what attention weights gave with values, whoever multiplied them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention" or (
            name in ("matmul", "__matmul__", "bmm", "einsum")
            and any(_are_weights(x) for x in args if isinstance(x, Tensor))
        ):
            self.found.append(result.detach())
        return result


def _are_weights(x: Tensor) -> bool:
    sums = x.detach().sum(-1)
    return x.dim() > 2 and bool((x >= 0).all()) and bool(((sums - 1).abs() < 1e-6).logical_or(sums < 1 - 1e-3).all())


def examined(subject: Subject) -> dict[str, str]:
    """By latent: "" where it is right, else what is wrong or missing."""
    model = built(subject)
    given = arguments(subject, model)
    explained = Explained(model, given, tiny_of(subject.type, subject.task).sources)
    ids = given["input_ids"]
    patch_map = patch_map_for(model)
    report: dict[str, str] = {}
    values: dict[tuple[str, int], Tensor] = {}
    relevance: dict[str, dict[int, Tensor]] = {}
    weighed = Weighed()
    value = None
    for kind in KINDS:  # one by one, since one that is missing is an error
        try:
            places = sites(model, patch_map, [Keep(kind)])
        except ValueError as error:
            having = str(error).partition("layers=(")[2].partition(")")[0]
            if not having:
                report[kind] = str(error)
                continue
            keep = Keep(kind, layers=tuple(int(number) for number in having.split(",") if number.strip()))
            places = sites(model, patch_map, [keep])
            report[f"{kind} of some layers"] = having
        try:
            with Float64(), ExitStack() as stack:
                weighed.found.clear()
                stack.enter_context(weighed)
                stack.enter_context(recording(places, values))
                sink = stack.enter_context(capture(places, *ids.shape))
                leaves = {name: part.clone().requires_grad_() for name, part in explained.sources().items()}
                with monkey_patch(model, "cp"):
                    logits = explained(**leaves)
                flat = logits[(0, *[-1] * (logits.dim() - 2))]
                chosen = flat.abs().where(flat.abs() < 1e30, 0).argmax()
                torch.autograd.grad(flat[chosen], list(leaves.values()), allow_unused=True)
                value = float(flat[chosen])
            found = sink.stacked(kind, torch.ones(ids.shape, dtype=torch.bool))
        except Exception as error:
            report[kind] = f"{type(error).__name__}: {error}"
            continue
        tensor = found.values
        relevance[kind] = dict(zip(found.layers, tensor, strict=True))
        if kind == "head":
            report[kind] = right_heads(places, values, weighed.found)
        else:
            report[kind] = ""
    compare(report, relevance, values, value)
    return report


@contextmanager
def recording(places: list[Site], values: dict[tuple[str, int], Tensor]):
    """Meanwhile activations at the places are remembered."""

    def keep(site: Site, x: Tensor) -> Tensor:
        values[site.latent, site.layer] = x.detach().clone()
        return x

    write = lxt.latents.adding._write

    def also(site: Site, sink: Any, owner: Any, shape: Any, c_x: Tensor, x: Tensor) -> None:
        if owner.live:
            values[site.latent, site.layer] = x.detach().clone()
        write(site, sink, owner, shape, c_x, x)

    with ExitStack() as stack:
        for site in places:
            if site.end != "branch":
                stack.enter_context(hooked(site, lambda x, site=site: keep(site, x)))
        lxt.latents.adding._write = also
        try:
            yield
        finally:
            lxt.latents.adding._write = write


def right_heads(places: list[Site], values: dict[tuple[str, int], Tensor], weighed: list[Tensor]) -> str:
    """Whether what enters the projections is what attention gave, head by head."""
    states = set()
    for site in places:
        x = values["head", site.layer]
        kinds = set()
        for one in weighed:
            given = (
                one
                if one.dim() == 4
                else one.unflatten(0, (-1, site.heads))
                if one.dim() == 3 and len(one) % site.heads == 0
                else None
            )
            if given is None or given.numel() != x.numel():
                continue
            if given.shape[1] == site.heads and torch.allclose(
                given.transpose(1, 2).flatten(2), x.reshape(*given.shape[:1], given.shape[2], -1), **SAME
            ):
                kinds.add("same")
            elif given.shape[1] == site.heads:
                kinds.add("gated")
        states.add("same" if "same" in kinds else "gated" if kinds else "unseen")
    return "" if states <= {"same"} else " ".join(sorted(states))


def compare(report: dict, relevance: dict, values: dict, value: float | None) -> None:
    """Adds what doesn't fit together."""

    def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)

    for parts, whole in (("head", "attn_out"), ("neuron", "mlp_out")):
        if parts in relevance and whole in relevance:
            both = relevance[parts].keys() & relevance[whole].keys()
            off = worst([(relevance[parts][n].sum(-1), relevance[whole][n]) for n in both])
            if off > CLOSE:
                report[parts] = f"{report[parts]} sum off by {off:.1e}".strip()
    for kind in ("residual", "residual_pre", "residual_mid"):
        if kind in relevance and value is not None:
            off = max(abs(float(one.sum()) - value) / abs(value) for one in relevance[kind].values())
            if off > CLOSE:
                report[kind] = f"Σ off by {off:.1e}"
    for first, second, whole in (("residual_pre", "attn_out", "residual_mid"), ("residual_mid", "mlp_out", "residual")):
        layers = [n for kind, n in values if kind == whole]
        parts = [tuple(values.get((kind, n)) for kind in (first, second, whole)) for n in layers]
        parts = [tuple(x.reshape(-1) for x in three) for three in parts if all(x is not None for x in three)]
        off = worst([(a + b, c) for a, b, c in parts if len(a) == len(b) == len(c)]) if parts else 0.0
        if parts and off > CLOSE:
            report[f"{first} + {second}"] = f"not {whole}: off by {off:.1e}"
        elif parts:
            report[f"{first} + {second}"] = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--part", default="0/1", help="k/n: the k-th of n parts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    part, parts = map(int, options.part.split("/"))
    subjects = [s for s in all_subjects() if s.task in options.tasks and (not options.types or s.type in options.types)]
    counts: Counter[str] = Counter()
    for subject in subjects[part::parts]:
        try:
            report = examined(subject)
        except Exception as error:
            report = {"build": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        counts.update(kind for kind, wrong in report.items() if not wrong)
        wrong = {kind: text for kind, text in report.items() if text}
        print(subject.key, *(f"\n    {kind}: {text[:200]}" for kind, text in wrong.items()), flush=True)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps({"key": subject.key, **report}) + "\n")
    print(f"of {len(subjects[part::parts])}: " + ", ".join(f"{kind} {number}" for kind, number in counts.most_common()))


if __name__ == "__main__":
    main()
