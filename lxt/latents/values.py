"""What a latent's relevance is: a tensor that knows what its dimensions count, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_iter

from lxt.latents import ranking, sums, table
from lxt.latents.names import KINDS

if TYPE_CHECKING:
    from pandas import DataFrame

    from lxt.latents.ranking import Order, Ranking

__all__ = ["LatentRelevance", "Tokens", "joined"]

# What may be asked of one that holds the largest only: nothing that takes its slots for parts.
_OF_ITSELF = (
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.element_size, Tensor.is_floating_point),
    *(Tensor.__hash__, Tensor.__format__),
)
_GETTER = "__get__"  # the name of what reads shape, dtype and the other properties


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens that latents are read at.

    Attributes:
        texts: [batch][token], "" at padding.
        mask: [batch, token], True at real tokens.
        special: [batch, token], True at special tokens.
    """

    texts: list[list[str]]
    mask: Tensor
    special: Tensor

    def of_row(self, row: int) -> Tokens:
        """Those of one row, without padding."""
        keep = self.mask[row]
        texts = [text for text, real in zip(self.texts[row], keep.tolist(), strict=True) if real]
        return Tokens([texts], self.mask[row : row + 1, keep], self.special[row : row + 1, keep])


class LatentRelevance(Tensor):
    """The relevance of one latent, in units of the explained value: the tensor `values`, with what it is.

    What torch computes from it is a plain tensor. Where only the largest parts of each token were kept
    (`Keep(name, top=20)`) it computes nothing: a slot holds another part at each token. `values` with `indices`, the
    sums, `top` and `to_dense` are there for that.

    Attributes:
        name: of the latent.
        values: [layer, batch, token] or [layer, batch, token, part]; pattern and flow are [layer, batch, head, query,
            key]. 0 at padding.
        layers: the number of each layer in `values`, counted from 0.
        indices: as `values`, which part (or key) each value is of, where only the largest were kept; None where all
            were.
        rest: `values` without its last dimension: the sum over what was not kept; None where all was.
        parts: how many parts there are, where only the largest were kept.
        tokens: what it was read at; None as long as the result isn't put together.
    """

    name: str = ""
    values: Tensor  # type: ignore[assignment]  # Tensor.values and .indices are for torch's sparse layouts
    layers: tuple[int, ...]
    indices: Tensor | None  # type: ignore[assignment]
    rest: Tensor | None
    parts: int | None
    tokens: Tokens | None

    def __new__(cls, name: str, values: Tensor, *more: Any, **others: Any) -> LatentRelevance:
        """Nothing is copied."""
        return Tensor._make_subclass(cls, _plain(values))  # type: ignore[attr-defined]

    def __init__(
        self,
        name: str,
        values: Tensor,
        layers: Sequence[int],
        indices: Tensor | None = None,
        rest: Tensor | None = None,
        parts: int | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        self.name, self.values, self.layers = name, _plain(values), tuple(layers)
        self.indices, self.rest, self.parts, self.tokens = indices, rest, parts, tokens

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _OF_ITSELF and getattr(func, "__name__", "") != _GETTER:
                for one in tree_iter((args, kwargs)):
                    if isinstance(one, LatentRelevance) and one.indices is not None:
                        one._refuse(getattr(func, "__name__", "this"))
            return func(*args, **(kwargs or {}))

    def _refuse(self, what: str) -> NoReturn:
        # What isn't a kind and has parts to choose from is of Features.
        again = f"({self.name!r},)" if self.name in KINDS else f"(lxt.Features(..., name={self.name!r}, top=None),)"
        raise ValueError(  # operators would swallow a TypeError
            f"{what} of {self.name!r} has no meaning slot by slot: only the largest {self.values.shape[-1]} of each "
            "token were kept, other ones at each token. Take .values with .indices and .rest, the sums by_layer(), "
            f"by_token() and by_part(), top(), or to_dense(); or keep all: latents={again}"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return LatentRelevance, self._fields()

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentRelevance:
        copy = self.mapped(Tensor.clone)
        memo[id(self)] = copy
        return copy

    def _fields(self) -> tuple[Any, ...]:
        return self.name, self.values, self.layers, self.indices, self.rest, self.parts, self.tokens

    def __repr__(self, *, tensor_contents: object = None) -> str:
        *_, last = self.layers or ("none",)
        which = f"{self.layers[0]} to {last}" if len(self.layers) > 1 else str(last)
        kept = "" if self.indices is None else f", the largest {self.values.shape[-1]} of {self.parts or 'all'}"
        shape, dtype = list(self.values.shape), str(self.values.dtype).removeprefix("torch.")
        return f"LatentRelevance({self.name!r}, layer {which}, {shape}{kept}, {dtype})"

    @property
    def tensor(self) -> Tensor:
        """The plain tensor of all parts.

        Raises:
            ValueError: only the largest were kept.
        """
        return self._refuse("the tensor") if self.indices is not None else self.values

    @property
    def token_dims(self) -> tuple[int, ...]:
        """Which dimensions of `values` are tokens; the last one counts slots where only the largest were kept."""
        if self.values.dim() < 5:
            return (2,)
        return (3, 4) if self.indices is None else (3,)

    def replaced(self, **changes: Any) -> LatentRelevance:
        """The same with other fields."""
        fields = ("name", "values", "layers", "indices", "rest", "parts", "tokens")
        return LatentRelevance(**dict(zip(fields, self._fields(), strict=True)) | changes)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> LatentRelevance:
        """The same with each of its tensors changed."""
        indices = None if self.indices is None else change(self.indices)
        rest = None if self.rest is None else change(self.rest)
        return self.replaced(values=change(self.values), indices=indices, rest=rest)

    def of_row(self, row: int, keep: Tensor) -> LatentRelevance:
        """One row, at the tokens where `keep`, [token], is True; no copy where those are the last ones.

        The indices of keys count from the first token that is left.
        """
        first = int(keep.int().argmax()) if keep.any() else len(keep)
        where: slice | Tensor = slice(first, None) if bool(keep[first:].all()) else keep.nonzero()[:, 0]

        def cut(tensor: Tensor, dims: Sequence[int]) -> Tensor:
            one = tensor[:, row : row + 1]
            for dim in dims:
                one = one[(slice(None),) * dim + (where,)]
            return one

        dims, last = self.token_dims, self.values.dim() - 1
        indices = None if self.indices is None else cut(self.indices, dims)
        if indices is not None and last == 4:
            own = keep.cumsum(0) - 1
            indices = own.clamp(min=0)[indices.long()].to(indices.dtype)
        rest = None if self.rest is None else cut(self.rest, [dim for dim in dims if dim < last])
        parts = int(keep.sum()) if last == 4 and self.parts is not None else self.parts
        tokens = None if self.tokens is None else self.tokens.of_row(row)
        return self.replaced(values=cut(self.values, dims), indices=indices, rest=rest, parts=parts, tokens=tokens)

    def layer(self, number: int) -> LatentRelevance:
        """One layer by its own number, [1, batch, token, ...].

        Raises:
            IndexError: it wasn't kept.
        """
        place = self._place(number)
        return self.mapped(lambda tensor: tensor[place : place + 1]).replaced(layers=(number,))

    def chosen(self, layer: int | Sequence[int]) -> LatentRelevance:
        """Some layers by their own numbers, in their order.

        Raises:
            IndexError: one wasn't kept.
        """
        places = sorted({self._place(number) for number in (layer if isinstance(layer, Iterable) else (layer,))})
        return self.mapped(lambda tensor: tensor[places]).replaced(layers=[self.layers[place] for place in places])

    def _place(self, number: int) -> int:
        if number not in self.layers:
            raise IndexError(f"{self.name!r} has no layer {number!r}; kept are {_listed(self.layers)}")
        return self.layers.index(number)

    def by_layer(self) -> Tensor:
        """[layer, batch]: the sum over tokens and parts, those included that were not kept."""
        return sums.by_layer(self)

    def by_token(self, of: Literal["query", "key"] = "query") -> Tensor:
        """[layer, batch, token]: the sum over parts, those included that were not kept.

        Args:
            of: pattern and flow have two tokens: that which looks, or that which is looked at.
        """
        return sums.by_token(self, of)

    def by_part(self) -> Tensor:
        """[layer, batch, part], such as the map of layers and heads: the sum over tokens; of what was kept.

        Raises:
            ValueError: the latent has no parts.
        """
        return sums.by_part(self)

    def to_dense(self) -> Tensor:  # type: ignore[override]  # Tensor.to_dense, of our own sparse form
        """All parts as one plain tensor, as large as layers × tokens × parts; 0 where they were not kept."""
        return sums.dense(self)

    def top(
        self,
        k: int = 10,
        row: int | None = None,
        by: Order = "absolute",
        layer: int | Sequence[int] | None = None,
        token: int | Sequence[int] | None = None,
        special: bool = False,
    ) -> Ranking:
        """The entries of most relevance, strongest first.

        >>> out.latents["head"].top(2)  # doctest: +SKIP
        L5H1   token " Mary"  +1.83
        L11H0  token " gave"  -0.742

        Args:
            k: how many, of each row. Where only the largest of each token were kept, out of those.
            row: of the batch; None is each.
            by: `absolute`, `positive` or `negative`.
            layer: the number of a layer, or several; None is all.
            token: the place of a token among its row's own, or several; negative from the end. None is all. The query,
                in pattern and flow.
            special: rank special tokens too.

        Raises:
            ValueError: an unknown order, or k below 1.
            IndexError: no such row, layer or token.
            TypeError: a token that isn't given by its place.
        """
        return ranking.ranked(self, k, row, by, layer, token, special)

    def to_dataframe(self, zeros: bool = False) -> DataFrame:
        """One line per entry: row, layer, token, token_text, part and relevance; see `lxt.latents.table`.

        Args:
            zeros: with the entries that are exactly 0; padding never is.

        Raises:
            ModuleNotFoundError: pandas isn't installed.
        """
        return table.frame(self, zeros)


def _plain(values: Tensor) -> Tensor:
    return (values.values if isinstance(values, LatentRelevance) else values).detach()


def _listed(layers: Sequence[int]) -> str:
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers)) or "none"


def joined(parts: Sequence[LatentRelevance], order: Tensor, length: int | None = None) -> LatentRelevance:
    """The rows of all parts, in the order that is asked for.

    Args:
        parts: of one latent.
        order: [row], which of all the parts' rows comes where.
        length: how many tokens the rows get, by padding on the left; None leaves them.
    """
    first = parts[0]
    same = length is None or length == first.values.shape[first.token_dims[0]]
    if len(parts) == 1 and same and order.tolist() == list(range(len(order))) and first.values.shape[1] == len(order):
        return first  # the common case, without a copy: latents may fill the memory

    def one(tensors: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
        return torch.cat([_padded(tensor, dims, length) for tensor in tensors], 1).index_select(1, order)

    dims, keys = first.token_dims, first.values.dim() == 5
    indices = rest = None
    if first.indices is not None and first.rest is not None:
        # which key counts from the first token of the padded row
        own = [part.indices for part in parts if part.indices is not None]
        if keys and length is not None:
            shifts = [length - part.values.shape[3] for part in parts]
            own = [each + shift for each, shift in zip(own, shifts, strict=True)]
        indices = one(own, dims)
        rest = one([part.rest for part in parts if part.rest is not None], dims)
    values = one([part.values for part in parts], dims)
    counted = length if keys and first.parts is not None and length is not None else first.parts
    return first.replaced(values=values, indices=indices, rest=rest, parts=counted)


def _padded(tensor: Tensor, dims: Sequence[int], length: int | None) -> Tensor:
    if length is None:
        return tensor
    left = [0, 0] * tensor.dim()
    for dim in dims:
        left[2 * (tensor.dim() - 1 - dim)] = length - tensor.shape[dim]
    return pad(tensor, left)
