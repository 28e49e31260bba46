"""The command line: `lxt attribute`, `lxt check`, `lxt label`, `lxt models`, `lxt coverage`.

Whatever goes wrong ends in one line on stderr and a non-zero exit; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lxt

if TYPE_CHECKING:
    from lxt.attribution import Attribution
    from lxt.latents import Keep
    from lxt.targets import Target

__all__ = ["app", "main"]

app = typer.Typer(
    name="lxt",
    help="Explain what a transformer model predicts: which tokens mattered, and by how much.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Text = Annotated[str, typer.Argument(help="the text whose continuation is explained", show_default=False)]
ModelArgument = Annotated[str, typer.Argument(help="a model's name on the hub, its folder, or `tiny`")]
Model = Annotated[str, typer.Option("--model", "-m", help="a model's name on the hub, its folder, or `tiny`")]
Kind = Annotated[str | None, typer.Option(help="logit, logprob, prob or centered; default: logit, logprob of several")]
Rules = Annotated[str, typer.Option("--rules", "-r", help="attnlrp, cp or gradient")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", "-t", help="the token to explain, with its space (' dogs'); repeatable; default: the predicted one"
    ),
]
Likeliest = Annotated[
    int | None, typer.Option("--top", min=1, help="in place of targets: explain so many of the likeliest tokens")
]
Foil = Annotated[str | None, typer.Option("--contrast", "-c", help="explain the target against this token")]
Latents = Annotated[
    list[str] | None,
    typer.Option(
        "--latents",
        "-l",
        help="relevance inside the model: residual, head, neuron, ..., blocks.5.attn.hook_z, or a module's path; "
        "neuron:20 keeps the 20 largest of each token; repeatable",
    ),
]
Device = Annotated[str | None, typer.Option(help="where to compute, such as cuda; default: where it fits")]
Dtype = Annotated[str | None, typer.Option(help="the precision to load in: float32, bfloat16, ...")]
Memory = Annotated[
    str | None, typer.Option(help="what the process may take, such as 4GiB; weights beyond that stay on disk")
]
GpuMemory = Annotated[str | None, typer.Option(help="the same of the GPU; default: what it has left")]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(
        file_okay=False, help="where weights may be written that can't be read as they lie", show_default=False
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


_LARGEST = 10  # lines that are printed of each latent
_EXPLORED = ("residual", "head", "neuron:20")
_SUFFIXES = {
    "--html": (".html", ".htm"),
    "--explore": (".html", ".htm"),
    "--plot": (".png", ".pdf", ".svg"),
    "--pdf": (".pdf",),
    "--save": (".safetensors",),
}


def _file(help: str) -> Any:
    return typer.Option(dir_okay=False, help=help, show_default=False)


@app.command()
def attribute(
    text: Text,
    model: Model = "tiny",
    target: Targets = None,
    top: Likeliest = None,
    contrast: Foil = None,
    kind: Kind = None,
    rules: Rules = "attnlrp",
    latents: Latents = None,
    html: Annotated[Path | None, _file("write an HTML page that needs no network")] = None,
    explore: Annotated[Path | None, _file("write the page to explore layers, heads and neurons in, offline")] = None,
    labels: Annotated[
        Path | None, typer.Option(file_okay=False, help="for --explore: what `lxt label` wrote", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        _file("write the picture layers x tokens (needs residual among --latents, if given): .png, .svg, .pdf"),
    ] = None,
    pdf: Annotated[Path | None, _file("write the coloured text as PDF, by LaTeX where there is one")] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="write this file; - prints it instead of the picture")
    ] = None,
    save: Annotated[Path | None, _file("write what lxt.Attribution.load reads: .safetensors")] = None,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    offload_folder: OffloadFolder = None,
    debug: Debug = False,
) -> None:
    """Explain one prediction or several, in the terminal and in the files asked for."""
    # A picture of layers x tokens needs the relevance after every layer.
    wanted = _latents(latents or (_EXPLORED if explore else ("residual",) if plot else ()))
    _refuse_unwritable([html, explore, plot, pdf, save, json_])
    _refuse_other_kinds({"--html": html, "--explore": explore, "--plot": plot, "--pdf": pdf, "--save": save})
    what = _targets(target, top, kind, contrast)
    if labels is not None and explore is None:
        raise ValueError("--labels are shown by --explore; give it the page to write, such as --explore page.html")
    named = None if labels is None else lxt.neurons.load(labels)
    room = {"memory": memory, "gpu_memory": gpu_memory, "offload_folder": offload_folder}
    out = _explained(text, model, rules, device, dtype, what, wanted, room)
    as_json = json.dumps(out.to_dict(latents=bool(latents)))
    if json_ == Path("-"):
        print(as_json)
    else:
        out.show()
        if latents:
            _print_largest(out)

    def to_json(path: Path) -> None:
        from lxt.show.files import write

        write(path, f"{as_json}\n".encode())

    def to_explorer(path: Path) -> None:
        out.explore(path, labels=named)

    files = [(html, out.to_html), (explore, to_explorer), (plot, out.plot), (pdf, out.to_pdf), (save, out.save)]
    for path, write in (*files, (json_, to_json)):
        if path is not None and path != Path("-"):
            write(path)
            _say(f"written: {path}")


@app.command()
def check(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help="the text to try it on")] = "The capital of France is",
    rules: Rules = "attnlrp",
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Whether a model is explained as it should: same logits, every operation has its rule, the auditor agrees."""
    report = _explained(text, model, rules, device, dtype).check()
    print(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def label(
    model: ModelArgument,
    corpus: Annotated[str, typer.Option(help="a text, jsonl or parquet file, a folder of them, or a hub dataset")],
    out: Annotated[Path, typer.Option(file_okay=False, help="the results folder, where a run goes on")],
    latent: Annotated[str, typer.Option(help="neuron or head")] = "neuron",
    layers: Annotated[str | None, typer.Option(help="such as 3,7 or 0-5; default: all")] = None,
    by: Annotated[str, typer.Option(help="relevance or activation: which contexts give the names")] = "relevance",
    top: Annotated[int, typer.Option(min=1, help="contexts of each neuron")] = 20,
    target: Annotated[list[str] | None, typer.Option(help="explain this token's predictions only; repeatable")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens in a window; default: context, 512 at most")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="full windows that run at once; more where shorter")] = 8,
    block_size: Annotated[int, typer.Option(min=1, help="windows of a block, the most that a killed run repeats")] = 64,
    column: Annotated[str, typer.Option(help="the field or column of jsonl and parquet with the text")] = "text",
    unit: Annotated[str, typer.Option(help="what a document is in text files: line, paragraph or file")] = "line",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="count rows that can't be read, and go on")] = False,
    ray: Annotated[str | None, typer.Option(help="compute on Ray: local, auto (this cluster) or an address")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="how many on Ray; default: what there is room for")] = None,
    rules: Rules = "attnlrp",
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    offload_folder: OffloadFolder = None,
    debug: Debug = False,
) -> None:
    """Find the places of a corpus where each neuron matters most, and name the neurons by them."""
    from lxt.composites import resolve
    from lxt.neurons.command import labelled, numbers, reader, where

    # before anything is downloaded
    composite, wanted, compute = resolve(rules), numbers(layers), where(ray, workers)
    with _silent_libraries(model):
        room = {"memory": memory, "gpu_memory": gpu_memory, "offload_folder": offload_folder}
        explainer = lxt.load(model, rules=composite, device=device, dtype=dtype, **room)
        documents = reader(corpus, column, unit, skip_bad)
        labelled(explainer, documents, latent, wanted, by, top, out, target, length, batch_size, block_size, compute)


@app.command()
def models(debug: Debug = False) -> None:
    """The bundled model, and the architectures that lxt has a map of."""
    from lxt.patches import MAPS

    known = {name: patch_map for patch_map in MAPS for name in patch_map.architectures}
    print("tiny: the bundled model; no download")
    print("Architectures with a map (config.model_type), and what runs fused there:")
    for name, patch_map in sorted(known.items()):
        print(f"  {name:<17}{', '.join(patch_map.forwards) or '(all by the operator mode)'}")
    print("Any other model runs under the operator mode alone; `lxt check MODEL` says how well.")


@app.command()
def coverage(
    task: Annotated[list[str] | None, typer.Option(help="causal, masked, image, ...; repeatable; default: all")] = None,
    type_: Annotated[list[str] | None, typer.Option("--type", help="config.model_type; repeatable")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="one or two types for each mechanism")] = False,
    list_: Annotated[bool, typer.Option("--list", help="print what would be tried, and stop")] = False,
    records: Annotated[Path, _file("where records go, and where a run goes on; default: out/coverage.jsonl")] = Path(
        "out/coverage.jsonl"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="start over, without the records of before")] = False,
    report: Annotated[Path | None, _file("write the table (.md) here, and its numbers beside it (.json)")] = None,
    workers: Annotated[int, typer.Option(min=1, help="how many at a time")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="the time limit of each")] = 120,
    memory: Annotated[float, typer.Option(min=0.1, help="the memory limit of each, in GiB")] = 3,
    debug: Debug = False,
) -> None:
    """Build every architecture of transformers tiny, and prove its relevance: docs/architectures.md has the result."""
    from lxt.coverage.command import cover, selected
    from lxt.coverage.reasons import REASONS
    from lxt.coverage.runner import Limits

    with _silent_libraries("tiny"):
        subjects = selected(task or (), type_ or (), sample)
    if list_:
        print("\n".join(subject.key for subject in subjects))
        return
    if fresh:
        records.unlink(missing_ok=True)
    found = cover(subjects, records, report, workers, Limits(seconds, int(memory * 2**30)))
    if not all(record.proven or record.key in REASONS for record in found):
        raise typer.Exit(1)  # something is unproven that has no known reason


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        print(f"lxt {lxt.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `arguments` (default: those of the process) and leave with its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where, **more: _say(f"warning: {message}")
            sys.exit(app(arguments, prog_name="lxt", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        # Errors in the arguments know how to format themselves and which status they want.
        message = error.format_message() if hasattr(error, "format_message") else str(error)  # type: ignore[attr-defined]
        _say(" ".join((message or type(error).__name__).split()))
        sys.exit(getattr(error, "exit_code", 1))


def _refuse_unwritable(paths: Sequence[Path | None]) -> None:
    """Before anything is computed: a folder that can be written to, or made, for each file."""
    for path in paths:
        if path is None or path == Path("-") or path.exists():
            continue
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OSError(f"cannot write {path}: {folder} is not a folder that you may write to; choose another place")


def _explained(
    text: str,
    model: str,
    rules: str,
    device: str | None,
    dtype: str | None,
    targets: Sequence[Target] = (),
    latents: Sequence[Keep] = (),
    room: Mapping[str, Any] | None = None,
) -> Attribution:
    from lxt.composites import resolve

    composite = resolve(rules)  # before anything is downloaded
    with _silent_libraries(model):
        explainer = lxt.load(model, rules=composite, device=device, dtype=dtype, **(room or {}))
        if len(targets) > 1:
            return explainer.attribute_targets(text, targets, latents=latents)
        return explainer.attribute(text, target=targets[0] if targets else None, latents=latents)


def _print_largest(out: Attribution) -> None:
    """Of each latent the strongest entries, explanation by explanation."""
    from lxt.show.words import shorten

    encoding = sys.stdout.encoding or "utf-8"
    for one, explained in zip(out, out.explained, strict=True):
        what = f" for {shorten(explained.label, 80)}" if len(out) > 1 else ""
        for name, latent in one.latents.items():
            largest = f"\n{name}, the largest{what}:\n{latent.top(_LARGEST)}"
            print(largest.encode(encoding, "backslashreplace").decode(encoding))


def _latents(names: Sequence[str]) -> Sequence[Keep]:
    """What `neuron:20` and the like ask for; refused before a model is loaded."""
    from lxt.latents import Keep, wanted

    asked = []
    for one in names:
        name, colon, top = one.rpartition(":")
        if colon and not top.isdecimal():
            raise ValueError(f"{one!r}: what follows the colon is how many to keep of each token, such as neuron:20")
        asked.append(Keep(name, top=int(top)) if colon else one)
    return wanted(asked)


def _targets(tokens: list[str] | None, top: int | None, kind: str | None, contrast: str | None) -> list[Target]:
    # kind is checked by Target, at run time like all that is typed at a terminal
    if tokens and top is not None:
        raise ValueError("--target says what is explained, and so does --top; give one of them")
    options: dict[str, Any] = {"kind": kind, "contrast": contrast}
    if top is not None:
        return [lxt.Target(rank=rank, **options) for rank in range(top)]
    return [lxt.Target(token, **options) for token in tokens or [None]]


def _refuse_other_kinds(paths: Mapping[str, Path | None]) -> None:
    """Before anything is computed: names that promise another kind of file than what is written there."""
    from lxt.show.files import check_suffix

    for option, path in paths.items():
        if path is not None:
            check_suffix(path, _SUFFIXES[option], option)
    plot = paths["--plot"]
    if plot is not None and not plot.suffix:  # which says the format, and is refused only when it is written
        raise ValueError(f"--plot writes .png, .pdf or .svg: give {str(plot)!r} one of these suffixes")


@contextmanager
def _silent_libraries(model: str) -> Iterator[None]:
    # What goes wrong is said once, by main. Progress bars stay where somebody sees them and waits.
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    before = hub.get_verbosity(), transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    hub.set_verbosity_error()
    transformers.set_verbosity_error()
    if model == "tiny" or not sys.stderr.isatty():
        transformers.disable_progress_bar()
    try:
        yield
    finally:
        hub.set_verbosity(before[0])
        transformers.set_verbosity(before[1])
        if before[2]:
            transformers.enable_progress_bar()


def _say(line: str) -> None:
    print(f"lxt: {line}", file=sys.stderr)
