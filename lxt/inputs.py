"""From what the user gives to what the model eats: text, chats, token ids or embeddings → embeddings, masks, positions.

1. `read` turns any accepted input into rows: one prompt each, as token ids (or embeddings), tokenised exactly once.
2. `batches` says which rows may share a forward: models that take explicit positions are padded on the left, all
   others get rows of equal length, so that nothing needs padding and a batch gives what single calls give.
3. `prepare` embeds such rows by *calling* the embedding module, which keeps scaled embeddings right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import groupby
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lxt.accelerate_hooks import computing_device
from lxt.tokens import display

__all__ = [
    "Model",
    "Prepared",
    "Row",
    "batches",
    "check",
    "context",
    "offender",
    "pads_left",
    "prepare",
    "read",
    "task",
]

Model = Any
"""A transformers model: torch's types don't know what `config` and its other attributes are."""

ACCEPTED = (
    "a string, a list of strings, chat messages (dicts with 'role' and 'content') or a list of such chats, token ids "
    "(ints, lists of ints, an int64 tensor [token] or [batch, token]), or embeddings (a float tensor "
    "[batch, token, hidden] or [token, hidden]), or what the tokenizer returns for any of these or for pairs of texts"
)


@dataclass(frozen=True)
class Row:
    """One prompt. `ids` follow `embeds` where both are there (a target's tokens after given embeddings).

    `types` say of each of the ids which sentence of a pair it belongs to; none at all is the model's default.
    """

    ids: tuple[int, ...] = ()
    embeds: Tensor | None = None
    decoder: tuple[int, ...] = ()
    types: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids) + (0 if self.embeds is None else len(self.embeds))

    def extended(self, ids: Sequence[int]) -> Row:
        """The prompt followed by more tokens, appended as ids: nothing is tokenised a second time."""
        return replace(self, ids=(*self.ids, *ids), types=(*self.types, *[*self.types[-1:]] * len(ids)))


@dataclass(frozen=True)
class Prepared:
    """A padded batch that the model can run on.

    Attributes:
        embeds: [batch, token, hidden], detached; rows are aligned to the right.
        attention_mask: [batch, token], 1 where there is a token.
        position_ids: [batch, token], or None where the model had better count for itself.
        decoder_ids: [batch, step] for encoder-decoders, else None.
        token_ids: [batch, token] on the CPU, 0 at padding; None when embeddings were given.
        labels: [batch][token], "" at padding.
        mask: [batch, token], True where there is a token; on the CPU.
        special: [batch, token], True at BOS, separators and their kin; on the CPU.
        decoder_embeds: [batch, step, hidden], detached; None where the decoder's tokens are no input that is explained.
        reads_source: the decoder's tokens are the source's, one place to the right, as in classifiers.
        token_types: [batch, token], 0 at padding; None where no prompt has any.
    """

    embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    decoder_ids: Tensor | None
    token_ids: Tensor | None
    labels: list[list[str]]
    mask: Tensor
    special: Tensor
    decoder_embeds: Tensor | None = None
    reads_source: bool = False
    token_types: Tensor | None = None

    def arguments(self, model: Model) -> dict[str, Any]:
        """The keyword arguments of the forward, apart from `inputs_embeds`."""
        by_ids = self.decoder_embeds is not None and self.token_ids is not None  # see lxt.encdec
        given = {
            "input_ids": self.token_ids.to(self.embeds.device) if by_ids and self.token_ids is not None else None,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "token_type_ids": self.token_types,
            "decoder_input_ids": None if self.reads_source else self.decoder_ids,
            "use_cache": False,
        }
        taken = signature(type(model).forward).parameters
        return {name: value for name, value in given.items() if value is not None and name in taken}


def task(model: Model) -> str:
    """What the model's head does: "causal", "masked", "sequence", "token", "image" (classifiers), "question" or
    "seq2seq".

    Raises:
        ValueError: the model has no head that can be explained.
    """
    suffixes = {
        "ForSequenceClassification": "sequence",
        "ForTokenClassification": "token",
        "ForMaskedLM": "masked",
        "ForQuestionAnswering": "question",
        "ForMultipleChoice": "",
        "ForPreTraining": "",
    }
    by_image = any("ForImageClassification" in cls.__name__ for cls in type(model).__mro__)
    if by_image and "input_ids" not in signature(type(model).forward).parameters:
        return "image"
    if "inputs_embeds" not in signature(type(model).forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no inputs_embeds, which attribute() starts from; use "
            "lxt.monkey_patch(model) and a backward of your own"
        )
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise ValueError(
            f"{type(model).__name__} reads token ids in every layer, so explaining its embeddings would explain "
            "another forward; use lxt.monkey_patch(model) and a backward of your own"
        )
    for cls in type(model).__mro__:
        for suffix, kind in suffixes.items():
            if cls.__name__.endswith(suffix) and kind:
                return kind
            if cls.__name__.endswith(suffix):
                _no_head(model)
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        _no_head(model)
    return "seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal"


def _no_head(model: Model) -> NoReturn:
    raise ValueError(
        f"{type(model).__name__} has no head whose outputs attribute() can explain; it takes language models (causal, "
        "masked, encoder-decoder), sequence or token classifiers and question answering: load the model with "
        "such a class, or use lxt.monkey_patch(model) and your own backward"
    )


def read(inputs: object, model: Model, tokenizer: Any = None) -> list[Row]:
    """The prompts as rows, checked against the model's vocabulary, width and context.

    Raises:
        TypeError: not a kind of input that is accepted.
        ValueError: empty, too long, out of the vocabulary, not finite, or of the wrong shape.
    """
    if isinstance(inputs, str):
        rows = [_text(inputs, tokenizer)]
    elif isinstance(inputs, Tensor):
        rows = _tensor(inputs, model)
        _refuse_padding(rows, model, tokenizer)
    elif isinstance(inputs, (list, tuple)) and inputs:
        if all(isinstance(item, Mapping) for item in inputs):
            rows = [_chat(inputs, tokenizer)]
        elif all(isinstance(item, Integral) and not isinstance(item, bool) for item in inputs):
            rows = [_ids(inputs)]
        else:
            rows = [_row(item, model, tokenizer) for item in inputs]
    elif isinstance(inputs, (list, tuple)):
        raise ValueError(f"inputs is an empty {type(inputs).__name__}; give at least one prompt: {ACCEPTED}")
    elif isinstance(inputs, Mapping) and "input_ids" in inputs:
        rows = _encoded(inputs)
    else:
        raise TypeError(f"inputs must be {ACCEPTED}; got {type(inputs).__name__}")
    if not rows:
        raise ValueError("inputs hold no prompt: their first dimension is 0; give at least one")
    check(rows, model)
    return rows


def _row(item: object, model: Model, tokenizer: Any) -> Row:
    if isinstance(item, str):
        return _text(item, tokenizer)
    if isinstance(item, Tensor):
        rows = _tensor(item, model)
        if len(rows) == 1:
            return rows[0]
    if isinstance(item, (list, tuple)):
        if not item:
            raise ValueError("a prompt is an empty list; every prompt needs at least one token")
        if all(isinstance(part, Mapping) for part in item):
            return _chat(item, tokenizer)
        if all(isinstance(part, Integral) and not isinstance(part, bool) for part in item):
            return _ids(item)
    raise TypeError(f"a list of inputs must hold prompts of one kind ({ACCEPTED}); it holds a {type(item).__name__}")


def _text(text: str, tokenizer: Any) -> Row:
    if not text:
        raise ValueError("the text is empty; give at least one character to explain")
    _need(tokenizer, "text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start]
        raise ValueError(
            f"the text isn't valid Unicode: character {error.start} is the lone surrogate {broken!r}; decode its bytes "
            "again, or leave it out"
        ) from None
    encoded = tokenizer(text, verbose=False)  # `check` says it when it is too long
    if not encoded["input_ids"]:
        raise ValueError(f"the text {text!r} has no tokens in this tokenizer; give text that it can represent")
    return _encoded(encoded)[0]


def _encoded(inputs: Mapping[str, Any]) -> list[Row]:
    """What a tokenizer returns, such as a pair of texts with its token types; without its padding."""
    parts = {}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        given = inputs.get(name)
        values = given.tolist() if isinstance(given, Tensor) else given
        if values is not None:
            parts[name] = (
                values
                if isinstance(values, (list, tuple)) and values and isinstance(values[0], (list, tuple))
                else [values]
            )
    ids = parts["input_ids"]
    masks = parts.get("attention_mask") or [[1] * len(row) for row in ids]
    types = parts.get("token_type_ids") or [[0] * len(row) for row in ids]
    rows = []
    for row, mask, kinds in zip(ids, masks, types, strict=True):
        kept = [(int(token), int(kind)) for token, real, kind in zip(row, mask, kinds, strict=True) if real]
        kinds = tuple(kind for _, kind in kept)
        rows.append(Row(tuple(token for token, _ in kept), types=kinds if any(kinds) else ()))
    return rows


def _chat(messages: Sequence[Any], tokenizer: Any) -> Row:
    from jinja2 import TemplateError  # comes with torch; loaded only where there is a chat

    _need(tokenizer, "chat messages")
    for message in messages:
        if not {"role", "content"} <= set(message):
            raise ValueError(f"a chat message needs 'role' and 'content', got the keys {sorted(map(str, message))}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so chat messages cannot become a prompt; pass the text itself, or "
            "set tokenizer.chat_template"
        )
    # The template writes the special tokens itself; tokenising its output once, without adding any, keeps one BOS.
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    try:
        ids = tokenizer.apply_chat_template(list(messages), **options)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}; change their roles") from error
    if not ids:
        raise ValueError("the chat template turned the messages into an empty prompt; give a message with content")
    return _ids(ids)


def _need(tokenizer: Any, what: str) -> None:
    if tokenizer is None:
        raise ValueError(f"{what} needs a tokenizer: lxt.load(model, tokenizer); without one, pass token ids")


def _ids(ids: Sequence[Any]) -> Row:
    return Row(tuple(int(token) for token in ids))


def _tensor(tensor: Tensor, model: Model) -> list[Row]:
    if tensor.is_floating_point():
        if tensor.dim() not in (2, 3):
            raise ValueError(
                f"embeddings must be [batch, token, hidden] or [token, hidden], got the shape {tuple(tensor.shape)}"
            )
        return [Row(embeds=row) for row in (tensor if tensor.dim() == 3 else tensor[None]).detach()]
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"a tensor of {tensor.dtype} is neither token ids nor embeddings; inputs are {ACCEPTED}")
    if tensor.dim() not in (1, 2):
        raise ValueError(
            f"integers are token ids and must be [token] or [batch, token], got {tensor.dtype} of the shape "
            f"{tuple(tensor.shape)}; embeddings must be floating point"
        )
    return [_ids(row) for row in (tensor if tensor.dim() == 2 else tensor[None]).tolist()]


def _refuse_padding(rows: Sequence[Row], model: Model, tokenizer: Any) -> None:
    """Rows of unlike lengths are padded to be one tensor, and without their mask the padding would be read as text."""
    config = model.config.get_text_config()
    known = getattr(tokenizer, "pad_token_id", None)
    pad = known if isinstance(known, int) else config.pad_token_id
    ends = {getattr(x, name, None) for x in (tokenizer, config) for name in ("bos_token_id", "eos_token_id")}
    fewest = 1 if pad == known and pad not in ends else 2  # one may be meant, as a text's beginning or end
    for index, row in enumerate(rows if len(rows) > 1 and pad is not None else ()):
        for ids, where in ((row.ids, "begins"), (row.ids[::-1], "ends")):
            count = next((i for i, token in enumerate(ids) if token != pad), 0)
            if count >= fewest:
                raise ValueError(
                    f"prompt {index} {where} with {count} times the padding token {pad}, which would be read as text; "
                    "pass what the tokenizer returned with its attention_mask, or a list of token ids for each prompt"
                )


def check(rows: Sequence[Row], model: Model, suffix: str = "") -> None:
    """Refuse what the model cannot run on: no tokens, unknown ids, a wrong width, more tokens than the context.

    Raises:
        ValueError: says which of these it was, and in which prompt.
    """
    shape, limit = _embedding(model).weight.shape, context(model)
    for index, row in enumerate(rows):
        _check_row(row, model, (f"prompt {index}" if len(rows) > 1 else "the prompt") + suffix, shape, limit)


def _check_row(row: Row, model: Model, name: str, shape: torch.Size, limit: int | None) -> None:
    size, width = shape
    if not len(row):
        raise ValueError(f"{name} has no tokens; give at least one")
    wrong = [token for token in (*row.ids, *row.decoder) if not 0 <= token < size]
    if wrong:
        raise ValueError(
            f"{name} holds the token id {wrong[0]}, and the vocabulary of {type(model).__name__} has ids 0 to "
            f"{size - 1}; is it another model's tokenizer?"
        )
    if row.embeds is not None and row.embeds.shape[-1] != width:
        raise ValueError(
            f"{name} has embeddings of shape {tuple(row.embeds.shape)}, and {type(model).__name__} takes "
            f"[token, {width}]; get them from model.get_input_embeddings()(ids)"
        )
    if row.embeds is not None and not row.embeds.isfinite().all():
        first = int((~row.embeds.isfinite()).any(-1).nonzero()[0])
        raise ValueError(f"{name} has NaN or inf in its embeddings, first at token {first}; give finite numbers")
    if row.ids and task(model) == "sequence" and row.ids[-1] == model.config.get_text_config().pad_token_id:
        raise ValueError(
            f"{name} ends in the padding token {row.ids[-1]}: {type(model).__name__} looks for the last token that "
            "isn't one, and would read another position; leave it off"
        )
    if limit is not None and len(row) > limit:
        raise ValueError(
            f"{name} has {len(row)} tokens, and the context of {type(model).__name__} is {limit}; shorten it, or "
            "choose a model with a longer context"
        )


def context(model: Model) -> int | None:
    """How many tokens the model was made for, None where its configuration does not say."""
    config = model.config.get_text_config()
    limit = next((getattr(config, n) for n in ("max_position_embeddings", "max_seq_len") if hasattr(config, n)), None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # RoBERTa and its kin count positions from padding_idx + 1, in a table that holds those rows too.
    return limit - (config.pad_token_id or 0) - 1 if _offset_positions(model) else limit


def batches(rows: Sequence[Row], model: Model, batch_size: int | None = None, square: bool = True) -> list[list[int]]:
    """Which rows run together: lists of row indices, at most `batch_size` long.

    Args:
        rows: what is to run.
        model: decides which can run together.
        batch_size: None is no limit.
        square: whether as many rows as tokens may, whose activations don't show which dimension is which.
    """
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number >= 1 or None, got {batch_size!r}")
    limit = batch_size or len(rows)
    if task(model) == "sequence" and model.config.get_text_config().pad_token_id is None:
        limit = 1  # transformers' causal classifiers refuse more rows when no padding token is defined
    order = range(len(rows)) if limit >= len(rows) else sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = [list(order)]
    if not pads_left(model):
        by_length = sorted(order, key=lambda i: len(rows[i]))
        groups = [list(group) for _, group in groupby(by_length, key=lambda i: len(rows[i]))]
    parts = [group[start : start + limit] for group in groups for start in range(0, len(group), limit)]
    return parts if square else [half for part in parts for half in _oblong(part, [len(row) for row in rows])]


def _oblong(group: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """The group, in two where it has as many rows as tokens: the shortest row apart."""
    longest = max(lengths[i] for i in group)
    if len(group) != longest or longest == 1:
        return [group]
    shortest = min(group, key=lambda i: lengths[i])
    return [[i for i in group if i != shortest], [shortest]]


def pads_left(model: Model) -> bool:
    """Whether padding on the left with explicit positions leaves the other tokens' numbers alone.

    So it is for causal attention with positions 0, 1, 2 …; not where positions have an offset (RoBERTa), depend on
    the longest row (dynamic RoPE), or where tokens mix by convolution or recurrence.
    """
    if "position_ids" not in signature(type(model).forward).parameters or task(model) in ("seq2seq", "question"):
        return False
    config = model.config.get_text_config()
    flags = {m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)}
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        flags == {True}
        and kinds <= {"full_attention", "sliding_attention"}
        and not any(isinstance(module, nn.Conv1d) for module in model.modules())
        and not any(word in str(getattr(config, "rope_parameters", "")) for word in ("dynamic", "longrope"))
        and not _offset_positions(model)
    )


def _offset_positions(model: Model) -> bool:
    return any(hasattr(module, "create_position_ids_from_inputs_embeds") for module in model.modules())


def prepare(rows: Sequence[Row], model: Model, tokenizer: Any = None) -> Prepared:
    """The rows as one batch, on the device and in the dtype of the model's embeddings.

    Raises:
        ValueError: an embedding is not finite; the parameter to blame is named.
    """
    embedding, width = _embedding(model), max(len(row) for row in rows)
    device = _device(embedding)
    parts = []
    for row in rows:
        ids = torch.tensor([0] * (width - len(row)) + list(row.ids), dtype=torch.long, device=device)
        with torch.no_grad():
            looked_up = embedding(ids[None])[0]
        if row.embeds is not None:
            pad, rest = width - len(row), len(row) - len(row.ids)
            given = row.embeds.to(looked_up)
            looked_up = torch.cat([looked_up[:pad], given, looked_up[pad:]]) if rest else looked_up
        parts.append(looked_up)
    embeds = torch.stack(parts).detach()
    if not embeds.isfinite().all():
        raise ValueError(f"the model's embeddings are not finite: {offender(model)}; load the weights again")
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    labels, special, token_ids = [], [], []
    for row in rows:
        names, marks = display(row.ids, tokenizer, model.config)
        given = 0 if row.embeds is None else len(row.embeds)
        left = [""] * (width - len(row)) + [str(position) for position in range(given)]
        labels.append(left + names)
        special.append([False] * len(left) + marks)
        token_ids.append([0] * len(left) + list(row.ids))
    steps = max(len(row.decoder) for row in rows)
    decoder = [[*row.decoder, *[row.decoder[-1]] * (steps - len(row.decoder))] for row in rows] if steps else None
    positions = (mask.cumsum(-1) - 1).clamp(min=0).to(device) if pads_left(model) else None
    return Prepared(
        embeds=embeds,
        attention_mask=mask.long().to(device),
        position_ids=positions,
        decoder_ids=torch.tensor(decoder, device=device) if decoder else None,
        token_ids=torch.tensor(token_ids) if all(row.embeds is None for row in rows) else None,
        labels=labels,
        mask=mask,
        special=torch.tensor(special),
        token_types=_types(rows, width, device),
    )


def _types(rows: Sequence[Row], width: int, device: torch.device) -> Tensor | None:
    if not any(row.types for row in rows):
        return None
    return torch.tensor([[0] * (width - len(row.types)) + list(row.types) for row in rows], device=device)


def _embedding(model: Model) -> Any:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None or getattr(embedding, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no input embeddings over tokens, which attribute() starts from")
    return embedding


def _device(embedding: Any) -> torch.device:
    if embedding.weight.device.type != "meta":
        return embedding.weight.device
    return computing_device(embedding)


def offender(model: Model) -> str:
    """Names the first parameter or buffer that holds NaN or inf, for error messages."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.device.type != "meta" and value.is_floating_point() and not value.isfinite().all():
            return f"the weight {name} holds NaN or inf"
    return "every weight is finite, so the numbers overflow on the way (try dtype='bfloat16' or 'float32')"
