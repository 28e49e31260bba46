"""Which tokens make two sentences alike: relevance of both sentences to the cosine of their embeddings.

1. Each sentence runs by itself under the rules, and its hidden states are pooled: u and v.
2. The cosine u·v / (|u| |v|) follows the same rules: the norms are constants like a LayerNorm's 1/σ, and the product of
   two activations gives half to each factor. So the coefficient of u is v / (2 |u| |v|), and each sentence explains
   half of the cosine.
3. One backward through each sentence gives its tokens' relevance.

`pairs=True` asks for more: how much of the cosine lies between token i of one sentence and token j of the other. The
dot product is Σ_d u_d v_d; the relevance of every u_d and v_d goes back by itself, A[i, d] and B[j, d], and the pair
gets Σ_d A[i, d] B[j, d] / (|u| |v|) (BiLRP: Eberle et al. 2020, arXiv 2003.05134), at the cost of a backward per
dimension.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lxt.attribution import Attribution, Explained
from lxt.attributor import lock_of, versions
from lxt.coefficients import wide
from lxt.composites import Composite, resolve
from lxt.inputs import Model, context, offender
from lxt.patching import monkey_patch, rules_of
from lxt.preconditions import refuse_missing_weights
from lxt.tokens import display

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Pooling", "Similarity", "similarity"]

Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True, eq=False, repr=False)
class Similarity:
    """Two sentences, the cosine of their embeddings, and what each token contributes to it.

    Attributes:
        texts: the two sentences.
        tokens: of each sentence, as displayed.
        special: which of them are special tokens.
        relevance: [token] for each sentence, in units of the cosine; each sums towards half of it.
        value: the cosine.
        pairs: [token of the first, token of the second], sums towards the cosine; None if it wasn't asked for.
        model: the model's name.
        rules: the composite's name.
        pooling: how hidden states became one embedding.
        versions: package -> version of what computed it.
    """

    texts: tuple[str, str]
    tokens: tuple[list[str], list[str]]
    special: tuple[list[bool], list[bool]]
    relevance: tuple[Tensor, Tensor]
    value: float
    pairs: Tensor | None
    model: str
    rules: str
    pooling: Pooling
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The relevance of all tokens of both sentences."""
        return float(sum(side.double().sum() for side in self.relevance))

    @property
    def conservation(self) -> float:
        """Total relevance over the cosine; NaN where that is 0."""
        return self.total / self.value if self.value else float("nan")

    @property
    def attribution(self) -> Attribution:
        """Both sentences as rows of an Attribution, each explaining its half of the cosine."""
        width = max(map(len, self.tokens))
        left = [width - len(tokens) for tokens in self.tokens]
        return Attribution(
            tokens=[[""] * space + tokens for space, tokens in zip(left, self.tokens, strict=True)],
            token_ids=None,
            relevance=torch.stack(
                [torch.cat([side.new_zeros(space), side]) for space, side in zip(left, self.relevance, strict=True)]
            ),
            mask=torch.tensor([[False] * space + [True] * (width - space) for space in left]),
            special=torch.tensor([[False] * space + marks for space, marks in zip(left, self.special, strict=True)]),
            explained=[
                Explained(f"likeness to {other!r}", "half cosine", self.value / 2) for other in self.texts[::-1]
            ],
            predictions=[],
            model=self.model,
            rules=self.rules,
            versions=self.versions,
        )

    def __repr__(self) -> str:
        lengths = " and ".join(str(len(tokens)) for tokens in self.tokens)
        return f"Similarity(cosine {self.value:.4f}, {lengths} tokens, model={self.model!r}, rules={self.rules!r})"

    def _repr_html_(self) -> str:
        from lxt.show.similarity import fragment

        return fragment(self)

    def show(self, scale_special: bool = False, top: int = 6) -> None:
        """Show both sentences in colour, on one scale, in the terminal or the notebook that runs this.

        Args:
            scale_special: colour special tokens too.
            top: how many tokens of each sentence, and how many pairs, are ranked.
        """
        from lxt.show.similarity import show

        show(self, scale_special, top)

    def to_html(self, path: str | os.PathLike[str], scale_special: bool = False) -> None:
        """Write one self-contained page that needs no network."""
        from lxt.show.files import check_suffix, write
        from lxt.show.similarity import page

        check_suffix(path, (".html", ".htm"), "to_html")
        write(path, page(self, scale_special).encode())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The pairs as a heat map, or a bar for each token where there are none.

        Args:
            path: where to write it, as .png, .pdf or .svg; None only returns the figure.
        """
        from lxt.show.figure import written
        from lxt.show.similarity import picture

        return written(picture(self), path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers, ready for `json.dumps`."""
        sides = zip(self.texts, self.tokens, self.special, self.relevance, strict=True)
        return {
            "cosine": self.value,
            "total": self.total,
            "sentences": [
                {"text": text, "tokens": tokens, "special": special, "relevance": relevance.tolist()}
                for text, tokens, special, relevance in sides
            ],
            "pairs": None if self.pairs is None else self.pairs.tolist(),
            "model": self.model,
            "rules": self.rules,
            "pooling": self.pooling,
            "versions": dict(self.versions),
        }


def similarity(
    model: nn.Module,
    tokenizer: Any,
    a: str,
    b: str,
    rules: str | Composite = "attnlrp",
    pooling: Pooling = "mean",
    pairs: bool = False,
) -> Similarity:
    """Relevance of each token of two sentences to the cosine of their embeddings.

    >>> out = lxt.similarity(model, tokenizer, "A cat sleeps.", "The kitten naps.")  # doctest: +SKIP
    >>> out.value, out.relevance  # doctest: +SKIP

    Args:
        model: an encoder that returns hidden states, as of `transformers.AutoModel`; it is not changed.
        tokenizer: its tokenizer.
        a: one sentence.
        b: the other.
        rules: a preset's name, or a Composite.
        pooling: `mean` over all tokens, special ones included, as sentence-transformers has it; `cls`, the first
            token; `last`, the last one.
        pairs: also compute how much each pair of tokens contributes, by a backward for each dimension.

    Raises:
        ValueError: unknown rules or pooling, an empty or too long sentence, a model without hidden states, an
            embedding that is zero or not finite.
        TypeError: not sentences.
    """
    composite = resolve(rules)
    if pooling not in get_args(Pooling):
        raise ValueError(f"unknown pooling {pooling!r}; allowed: {', '.join(get_args(Pooling))}")
    _refuse_unsuitable(model)
    refuse_missing_weights(model)
    ids = _ids(a, "a", model, tokenizer), _ids(b, "b", model, tokenizer)
    with lock_of(model), torch.inference_mode(False), torch.enable_grad():
        sides = [_embedded(model, side, composite, pooling) for side in ids]
        (_, u), (_, v) = sides
        score, norms = _cosine(u, v, composite)
        gradients = torch.autograd.grad(score, [leaf for leaf, _ in sides], retain_graph=pairs)
        both = [_by_dimension(leaf, pooled) for leaf, pooled in sides] if pairs else None
    names = [display(side, tokenizer, model.config) for side in ids]
    first, second = (_relevance(leaf, gradient) for (leaf, _), gradient in zip(sides, gradients, strict=True))
    return Similarity(
        texts=(a, b),
        tokens=(names[0][0], names[1][0]),
        special=(names[0][1], names[1][1]),
        relevance=(first, second),
        value=float((u.detach() @ v.detach()) / norms),
        pairs=None if both is None else (both[0] @ both[1].T / norms).cpu(),
        model=_name(model),
        rules=composite.name,
        pooling=pooling,
        versions=versions(),
    )


def _refuse_unsuitable(model: Model) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"similarity needs a transformers model instance, got {type(model).__name__}: load it first")
    if "decoder_input_ids" in signature(type(model).forward).parameters:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; pass its encoder: model.get_encoder()")
    if "inputs_embeds" not in signature(type(model).forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no inputs_embeds, which similarity() starts from; pass the text encoder"
        )


def _ids(text: str, name: str, model: Model, tokenizer: Any) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(
            f"{name} must be a sentence, got {type(text).__name__}; for several pairs call similarity() each"
        )
    if not text.strip():
        raise ValueError(f"the sentence {name} is empty; give at least one word")
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    limit, size = context(model), model.get_input_embeddings().weight.shape[0]
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"the sentence {name} has {len(ids)} tokens, and {type(model).__name__} takes {limit}: shorten it"
        )
    if not all(0 <= token < size for token in ids):
        raise ValueError(
            f"the sentence {name} has the token id {max(ids)}, and {type(model).__name__} knows 0 to {size - 1}; is it "
            "another model's tokenizer?"
        )
    return ids


def _embedded(model: Model, ids: Sequence[int], composite: Composite, pooling: str) -> tuple[Tensor, Tensor]:
    """The sentence's token embeddings, [1, token, hidden], a leaf; and its own embedding, [hidden]."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        leaf = embedding(torch.tensor([ids], device=embedding.weight.device))
    leaf = leaf.detach().requires_grad_()
    theirs = rules_of(model)
    if theirs is not None and theirs != composite:
        raise ValueError(f"the model is already patched with the rules {theirs.name!r}; remove that patch first")
    if theirs is not None:
        output = model(inputs_embeds=leaf, attention_mask=leaf.new_ones(1, len(ids)).long())
    else:
        with monkey_patch(model, composite):
            output = model(inputs_embeds=leaf, attention_mask=leaf.new_ones(1, len(ids)).long())
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(
            f"{type(model).__name__} returns no last_hidden_state to pool; pass the encoder without its head, such as "
            "model.base_model"
        )
    if not hidden.isfinite().all():
        raise ValueError(f"the hidden states of {type(model).__name__} are not finite: {offender(model)}")
    hidden = hidden[0].to(wide(hidden.dtype))
    return leaf, hidden.mean(0) if pooling == "mean" else hidden[0 if pooling == "cls" else -1]


def _cosine(u: Tensor, v: Tensor, composite: Composite) -> tuple[Tensor, Tensor]:
    """A scalar whose gradient is the coefficient of u and of v, and |u| |v|."""
    norms = u.norm() * v.norm()
    if not norms > 0:
        raise ValueError("an embedding is zero, so that the cosine is not defined; is the model trained?")
    share = 1.0 if composite.product == "gradient" else 0.5
    score = share * (u @ v.detach() + u.detach() @ v) / norms.detach()
    if composite.norm == "gradient":
        score = score + (u @ v).detach() / norms
    return score, norms.detach()


def _by_dimension(leaf: Tensor, pooled: Tensor) -> Tensor:
    """[token, dimension]: the relevance of each token to each dimension of the embedding."""
    columns = [_relevance(leaf, torch.autograd.grad(entry, leaf, retain_graph=True)[0]) for entry in pooled.unbind()]
    return torch.stack(columns, dim=1)


def _relevance(leaf: Tensor, gradient: Tensor) -> Tensor:
    dtype = wide(leaf.dtype)
    return (leaf.detach().to(dtype) * gradient.to(dtype)).sum(-1)[0].cpu()


def _name(model: Model) -> str:
    path = getattr(model.config, "name_or_path", "").replace(os.sep, "/")
    return "/".join(path.split("/")[-2:]) or type(model).__name__
