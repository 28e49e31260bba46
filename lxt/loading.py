"""Fetch a model and its tokenizer by name, never running code that comes with them."""

from __future__ import annotations

import re
import warnings
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lxt.inputs import task
from lxt.pixels import sees

if TYPE_CHECKING:
    from lxt.placement import Budget

__all__ = ["budget_of", "device_of", "dtype_of", "model_of", "processor_of", "tokenizer_of"]


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name.

    Raises:
        ValueError: there is none, or it isn't floating point.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: float32, bfloat16, float16, float64, or a torch.dtype")
    return found


def device_of(device: str | torch.device | None) -> torch.device | None:
    """The device of that name, None for a GPU if there is one and else where the model is.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda") if torch.cuda.is_available() else None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"there is no device {str(device)!r} here ({reason}); use 'cpu', or leave device out"
        ) from None


def budget_of(
    memory: str | int | None,
    gpu_memory: str | int | None,
    offload_folder: str | Path | None,
    device: torch.device | None,
) -> Budget | None:
    """What the arguments of `load` say about memory; None where they say nothing.

    Args:
        memory: of the CPU, for the whole process; None is what can still be had.
        gpu_memory: of the GPU; None is what can still be had there, if it computes.
        offload_folder: says nothing by itself.
        device: what computes; None is the CPU.

    Raises:
        ValueError: no amount of memory, or arguments that don't go together.
    """
    from lxt.memory import available, parse_bytes, resident
    from lxt.placement import Budget

    if memory is None and gpu_memory is None:
        if offload_folder is not None:
            raise ValueError(
                "offload_folder is for weights that leave the memory, and nothing says how much there is: give memory= "
                "(such as '4GiB') as well, or leave it out"
            )
        return None
    computes = torch.device("cpu") if device is None else device
    if gpu_memory is not None and computes.type == "cpu":
        raise ValueError(f"gpu_memory={gpu_memory!r}, but no GPU computes here; leave it out, or give device='cuda'")
    on_cpu = available(torch.device("cpu")) + resident() if memory is None else parse_bytes(memory)
    if computes.type == "cpu":
        return Budget(on_cpu)
    return Budget(on_cpu, available(computes) if gpu_memory is None else parse_bytes(gpu_memory), computes)


def model_of(
    name: str, dtype: torch.dtype | None, budget: Budget | None = None, offload_folder: str | Path | None = None
) -> Any:
    """The pretrained model of that name, with the head that its configuration names.

    Args:
        name: a folder, or a name on the hub.
        dtype: None is the checkpoint's own.
        budget: the memory that it may take; None is all that it wants, and leaves it where it is loaded.
        offload_folder: where weights may be written that can't be read where they lie.

    Raises:
        ValueError: there is none, or its head is none that can be explained.
    """
    import transformers

    heads = {
        "ForCausalLM": transformers.AutoModelForCausalLM,
        "LMHeadModel": transformers.AutoModelForCausalLM,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "ForTokenClassification": transformers.AutoModelForTokenClassification,
        "ForQuestionAnswering": transformers.AutoModelForQuestionAnswering,
        "ForImageClassification": transformers.AutoModelForImageClassification,
        "ForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
    }
    config = _fetched(transformers.AutoConfig, name, "model")
    architecture = (getattr(config, "architectures", None) or ["ForCausalLM"])[0]
    name_of_head = architecture.removesuffix("WithTeacher")  # distilled image classifiers: DeiT, LeViT
    suffix = next((suffix for suffix in heads if name_of_head.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(
            f"{name!r} is a {architecture}, which has no head that attribute() can explain; heads it can: "
            f"{', '.join(heads)}. Load it yourself with such a class and pass the instance"
        )
    auto = heads[suffix]
    if suffix == "ForConditionalGeneration" and not config.is_encoder_decoder:
        auto = transformers.AutoModelForImageTextToText
    options = {} if dtype is None else {"dtype": dtype}
    fetch = partial(_fetched, auto, name, "model", **options)
    if budget is None:
        return fetch()
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name!r} is quantised, and its weights can't be read from disk piece by piece; load it yourself, with "
            "from_pretrained(device_map=...), and pass the instances: lxt.load(model, tokenizer)"
        )
    from lxt.placement import load_placed
    from lxt.stored import stored_weights

    with torch.device("meta"):
        empty = auto.from_config(config, trust_remote_code=False, **options)
    empty.tie_weights()
    try:
        stored = stored_weights(str(Path(name).expanduser()) if _looks_local(name) else name, empty)
    except (OSError, ValueError, KeyError) as error:  # a header or an index that isn't one, a shard that isn't there
        raise ValueError(_refusal(name, "model", error)) from error
    model, placement = load_placed(fetch, empty, stored, budget, offload_folder)
    if placement.offloaded:
        warnings.warn(f"{name} doesn't fit as a whole: {placement}", stacklevel=3)
    return model


def tokenizer_of(name: str | Path) -> Any:
    """The pretrained tokenizer of that name.

    Raises:
        ValueError: there is none.
    """
    import transformers

    return _fetched(transformers.AutoTokenizer, str(name), "tokenizer")


def processor_of(name: str | Path, model: Any) -> Any:
    """What prepares this model's inputs: its tokenizer, its processor if it reads and sees, or its image processor.

    A processor that can't be made here, for want of torchvision for instance, still leaves text, or pixel values, to
    explain: then a warning says why.

    Raises:
        ValueError: there is no tokenizer, and the model reads.
    """
    import transformers

    if not sees(model):
        return tokenizer_of(name)
    reads = task(model) != "image"
    try:
        if reads:
            return _fetched(transformers.AutoProcessor, str(name), "processor")
        return _fetched(transformers.AutoImageProcessor, str(name), "image processor")
    except ValueError as error:
        left = "text" if reads else "pixel_values"
        warnings.warn(f"images can't be prepared, only {left} can be explained: {error}", stacklevel=3)
        return tokenizer_of(name) if reads else None


def _fetched(auto: Any, name: str, what: str, **options: Any) -> Any:
    """`auto.from_pretrained`, with one clear error when there is nothing of that name."""
    looks_local = _looks_local(name)
    if looks_local and not Path(name).expanduser().is_dir():
        raise ValueError(f'no {what} at {name!r}: there is no such folder; give a folder, a name on the hub, or "tiny"')
    try:
        path = str(Path(name).expanduser()) if looks_local else name
        if not Path(path).is_dir():
            _reach_hub(path)
        return auto.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # safetensors, json and tokenizers have classes of their own
        raise ValueError(_refusal(name, what, error)) from error


def _reach_hub(name: str) -> None:
    """Ask the hub once for a model of which nothing is in the cache: from_pretrained would go on asking for 23 s.

    Raises:
        Exception: what the network says; none where the hub answers, whatever it answers.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    if folder.is_dir() or is_offline_mode():
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        return


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _refusal(name: str, what: str, error: Exception) -> str:
    """What is wrong, and the next step."""
    import transformers

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 3 if lines and lines[0].endswith(":") else 1]).rstrip(".:;")
    reason = f"{type(error).__name__}: {text}" if isinstance(error, (AttributeError, KeyError, TypeError)) else text
    start = f"cannot load the {what} {name!r}: "
    if "trust_remote_code" in str(error):
        return (
            f"{start}it comes with code of its own, which lxt never runs. Read that code; if you trust it, load the "
            f"{what} yourself with trust_remote_code=True and pass the instances: lxt.load(model, tokenizer)"
        )
    if "does not recognize this architecture" in str(error):
        kind = re.search(r"model type `(.*?)`", str(error))
        return (
            f"{start}the type {kind[1] if kind else '?'!r} of its config.json isn't in transformers "
            f"{transformers.__version__}. Install a version that has it (pip install -U transformers), or make the "
            "model yourself and pass the instances: lxt.load(model, tokenizer)"
        )
    if Path(name).expanduser().is_dir():
        return (
            f"{start}the folder's files don't make one ({reason or type(error).__name__}). Check its config.json and "
            "that it is complete, or make the model yourself and pass the instances: lxt.load(model, tokenizer)"
        )
    near = 'did you mean "tiny"? It' if get_close_matches(name, ["tiny"]) else "it"
    return (
        f'{start}{near} is neither "tiny" nor a folder here, and the hub gave none ({reason or type(error).__name__}); '
        "check the name and the network"
    )
