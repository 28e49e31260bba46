"""For cpu.py: other packages' methods, as cases where the package is installed.

They lie apart in `.venv/apart-bench` and `.venv/apart-upstream`, where `.ci/venv bench` puts them without what they
declare to need: that would bring another build of torch. UPSTREAM_LXT names another folder that holds upstream's lxt.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import methods
from gpu_upstream import patched_by_upstream
from subjects import shared_copy
from torch import Tensor

__all__ = ["STEPS", "NotInstalled", "captum", "inseq", "upstream"]

APART = Path(sys.prefix) / "apart-bench"
UPSTREAM = Path(sys.prefix) / "apart-upstream"
STEPS = 50  # of integrated gradients, captum's default

Run = Callable[[], object]
Explained = Callable[[], Any]


class NotInstalled(Exception):
    """Says which package, and how `make bench` gets it."""


def upstream(model: Any, embeds: Tensor, rules: str) -> Explained:
    """A case: the baseline's program on a copy of the model, with the same weights, patched by upstream's lxt 2.1.

    Raises:
        NotInstalled: upstream's package isn't there, or can't be imported.
    """
    path = os.environ.get("UPSTREAM_LXT") or str(UPSTREAM)
    try:
        other = patched_by_upstream(shared_copy(model), rules, path)
    except ImportError as error:
        raise NotInstalled(f"not installed: {_first_line(error, path)}") from error
    return partial(methods.plain, other, embeds)


def captum(model: Any, embeds: Tensor, steps: int = STEPS) -> Explained:
    """A case: Captum's integrated gradients of the last position's largest logit, from embeddings of zeros.

    Raises:
        NotInstalled: no captum.
    """
    attr = _apart("captum.attr")
    model_token = int(_last_logits(model, embeds).argmax())

    def explained(x: Tensor) -> Tensor:
        return _last_logits(model, x)[:, model_token]

    @contextmanager
    def case() -> Iterator[Run]:
        method = attr.IntegratedGradients(explained)
        # a few interpolated inputs at a time: all of them at once take `steps` times the memory and no less time
        yield partial(method.attribute, embeds.detach().clone(), n_steps=steps, internal_batch_size=5)

    return case


def inseq(model: Any, tokens: int) -> Explained:
    """A case: Inseq's input_x_gradient for one token after `tokens` others, tokenisation included.

    Raises:
        NotInstalled: no inseq, or a package that it needs isn't there.
    """
    package = _apart("inseq")
    explainer = package.load_model(model, "input_x_gradient", tokenizer=_words(model.config.vocab_size))
    prompt = " ".join(f"w{2 + number % (model.config.vocab_size - 2)}" for number in range(tokens))

    @contextmanager
    def case() -> Iterator[Run]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum's, once for each call: that it switches requires_grad on
            yield partial(explainer.attribute, prompt, f"{prompt} w2", show_progress=False)

    return case


def _last_logits(model: Any, embeds: Tensor) -> Tensor:
    return model.lm_head(model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1])


def _apart(name: str) -> ModuleType:
    """Import from the environment, or from APART; last on the path, so that it hides nothing that is installed."""
    sys.path.append(str(APART))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalled(f"not installed: {_first_line(error, str(APART))}") from error
    finally:
        sys.path.remove(str(APART))


def _first_line(error: ImportError, path: str) -> str:
    """Without the folder: it names the machine it was measured on."""
    missing = isinstance(error, ModuleNotFoundError) and error.name
    return f"no module {error.name}" if missing else str(error).split("\n")[0].replace(path, Path(path).name)


def _words(size: int) -> Any:
    """A tokenizer whose tokens are w2, w3, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, size)}
    core = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="</s>"
    )
