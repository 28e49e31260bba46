"""Attribution: what `attribute` returns. Data, views of it, and a file that loads without the model.

Relevance is in units of the explained value: an entry says how much of it a token brings, and a row's sum is
compared with the value itself (`conservation`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from lxt import resultfile
from lxt.imagerelevance import ImageRelevance, from_tensors, stacked, to_tensors
from lxt.latents import LatentRelevance, Latents, Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lxt.neurons import Neurons

__all__ = ["Attribution", "Explained", "Prediction"]

_ROWS_SHOWN = 20  # more rows than that scroll away what the reader asked for


@dataclass(frozen=True)
class Explained:
    """What one row explains.

    Attributes:
        label: ready to print, e.g. `' dogs'` or `' dogs' − ' cats'`.
        kind: `logit`, `logprob`, `prob`, `centered` or `custom`.
        value: the explained number, target minus contrast.
        position: the explained position among the row's own tokens; None where there is no single one.
        prefix: the relevance that went to the decoder's own tokens, in encoder-decoders; None elsewhere.
        positions: all explained positions among the row's own tokens, where there are any.
        rank: how many tokens (or classes) the model finds more probable; None where not one token is explained.
        probability: of the explained token, likewise.
    """

    label: str
    kind: str
    value: float
    position: int | None = None
    prefix: float | None = None
    positions: tuple[int, ...] = ()
    rank: int | None = None
    probability: float | None = None

    def __post_init__(self) -> None:
        alone = () if self.position is None else (self.position,)
        object.__setattr__(self, "positions", tuple(self.positions) or alone)  # a list, where it was read from a file


@dataclass(frozen=True)
class Prediction:
    """What the model predicts at the explained position."""

    token: str
    id: int
    logit: float
    probability: float


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Relevance of every token, with what is needed to read it.

    Attributes:
        tokens: [batch][token] as displayed, leading spaces kept; rows are padded on the left with "".
        token_ids: [batch, token], or None when the input had no ids.
        relevance: [batch, token], in units of the explained value; 0 at padding.
        mask: [batch, token], True at real tokens.
        special: [batch, token], True at special tokens.
        explained: one per row.
        predictions: one per row, or none at all.
        model: the model's name.
        rules: the composite's name.
        latents: relevance inside the model by name, read-only and read when it is asked for: `residual` [layer, batch,
            token], `head` [layer, batch, token, head], `neuron` [layer, batch, token, neuron], ...
        versions: package -> version of what computed it.
        images: relevance on each image that the model saw. The tokens of an image classifier are its patches.
        checker: not stored: how `check()` reports on the run.

    Raises:
        ValueError: parts that don't fit each other, or numbers that aren't finite.
    """

    tokens: list[list[str]]
    token_ids: Tensor | None
    relevance: Tensor
    mask: Tensor
    special: Tensor
    explained: list[Explained]
    predictions: list[Prediction]
    model: str
    rules: str
    latents: Mapping[str, LatentRelevance] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    images: tuple[ImageRelevance, ...] = ()

    checker: ClassVar[Callable[[], Any] | None] = None  # not a field: set by `with_checker`, absent after `load`

    def __post_init__(self) -> None:
        put = object.__setattr__
        relevance = self.relevance.detach().cpu()
        put(self, "relevance", relevance if relevance.dtype == torch.float64 else relevance.float())
        put(self, "mask", self.mask.detach().cpu().bool())
        put(self, "special", self.special.detach().cpu().bool())
        if self.token_ids is not None:
            put(self, "token_ids", self.token_ids.detach().cpu().long())
        self._check_shapes()
        self._check_numbers()
        put(self, "latents", Latents.of(self.latents, Tokens(self.tokens, self.mask, self.special)))

    def _check_shapes(self) -> None:
        shape = tuple(self.relevance.shape)
        if len(shape) != 2:
            raise ValueError(f"relevance must be [batch, token], got shape {shape}")
        batch, length = shape
        for name in ("mask", "special", "token_ids"):
            part = getattr(self, name)
            if part is not None and tuple(part.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(part.shape)}, but relevance has {shape}; they must be equal")
        lengths = sorted({len(row) for row in self.tokens})
        if len(self.tokens) != batch or (batch and lengths != [length]):
            raise ValueError(
                f"tokens are {len(self.tokens)} rows of {lengths} tokens, but relevance is {list(shape)}; "
                'pad shorter rows on the left with ""'
            )
        if len(self.explained) != batch or len(self.predictions) not in (0, batch):
            raise ValueError(
                f"{batch} rows need {batch} explained and {batch} (or no) predictions, "
                f"got {len(self.explained)} and {len(self.predictions)}"
            )

    def _check_numbers(self) -> None:
        bad = ~torch.isfinite(self.relevance)
        if bad.any():
            row, place = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"relevance holds {int(bad.sum())} numbers that aren't finite, first at row {row}, token {place} "
                f"({self.tokens[row][place]!r}); look for inf or NaN in the weights or embeddings, or use a wider dtype"
            )
        stray = (self.relevance != 0) & ~self.mask
        if stray.any():
            row, place = (int(i) for i in stray.nonzero()[0])
            raise ValueError(
                f"relevance at padding must be 0: row {row}, place {place} has {self.relevance[row, place]}"
            )
        for row, explained in enumerate(self.explained):
            if not math.isfinite(explained.value):
                raise ValueError(f"the explained value of row {row} is {explained.value}; it must be a finite number")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "checker"}  # it holds the model

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Attribution]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Attribution:
        """One row as an Attribution of its own, without padding."""
        if isinstance(row, bool) or not hasattr(row, "__index__"):
            raise TypeError(f"a row is chosen by its number, got {row!r}; for several: [out[i] for i in rows]")
        index = int(row) + (len(self) if row < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError(f"row {row} of {len(self)}; allowed: 0 to {len(self) - 1}")
        keep = self.mask[index]
        one = replace(
            self,
            tokens=[[token for token, real in zip(self.tokens[index], keep.tolist(), strict=True) if real]],
            token_ids=None if self.token_ids is None else self.token_ids[index : index + 1, keep],
            relevance=self.relevance[index : index + 1, keep],
            mask=self.mask[index : index + 1, keep],
            special=self.special[index : index + 1, keep],
            explained=self.explained[index : index + 1],
            predictions=self.predictions[index : index + 1],
            latents=cast(Latents, self.latents).of_row(index),
            images=tuple(replace(image, row=0) for image in self.images if image.row == index),
        )
        return one if self.checker is None else one.with_checker(self.checker)

    @property
    def pixels(self) -> Tensor:
        """[batch, height, width], where each row has one image and all have one size."""
        return stacked(self.images, "pixels", len(self))

    @property
    def patches(self) -> Tensor:
        """[batch, rows, columns], likewise."""
        return stacked(self.images, "patches", len(self))

    @property
    def total(self) -> Tensor:
        """[batch]: the sum of each row's relevance, in float64."""
        return self.relevance.double().sum(-1)

    @property
    def conservation(self) -> Tensor:
        """[batch]: total relevance, the decoder prefix's included, over explained value; NaN where the value is 0."""
        values = torch.tensor([explained.value for explained in self.explained], dtype=torch.float64)
        prefix = torch.tensor([explained.prefix or 0.0 for explained in self.explained], dtype=torch.float64)
        return torch.where(values == 0, torch.nan, (self.total + prefix) / values)

    def with_checker(self, checker: Callable[[], Any]) -> Attribution:
        """Attach how `check()` reports on the run that this came from; returns the same object."""
        object.__setattr__(self, "checker", checker)
        return self

    def check(self) -> Any:
        """The report on this run: conservation and where it leaked, forward equality, unknown operations.

        For one row of a batch the report is that of the whole batch.

        Raises:
            RuntimeError: the model is not at hand, as after `load`.
        """
        if self.checker is None:
            raise RuntimeError(
                "this Attribution doesn't know its model any more (it was loaded from a file, built by hand, or is one "
                "step of attribute_steps), so there is nothing to check it against; call check() on what "
                "Attributor.attribute returned"
            )
        return self.checker()

    def __repr__(self) -> str:
        from lxt.show.words import amount, shorten

        rows, length = self.relevance.shape
        what = f"{length} tokens" if rows == 1 else f"{rows} rows of up to {length} tokens"
        if rows == 1:
            explained = self.explained[0]
            what += f", {shorten(explained.label)} {explained.kind} {amount(explained.value, 4)}"
        latents = f", latents={list(self.latents)}" if self.latents else ""
        latents += f", {len(self.images)} image{'s' if len(self.images) > 1 else ''}" if self.images else ""
        return f"Attribution({what}, model={self.model!r}, rules={self.rules!r}{latents})"

    def _repr_html_(self) -> str:
        if self.images:
            from lxt.show.imagehtml import fragment
        else:
            from lxt.show.html import fragment

        return fragment(self, limit=_ROWS_SHOWN)

    def show(self, special: bool = True, scale_special: bool = False, top: int = 8) -> None:
        """Show the tokens (and images) in colour, in the terminal or in the notebook that runs this.

        Args:
            special: print special tokens (dimmed); False leaves them out.
            scale_special: colour special tokens too. By default they aren't, since a first token that
                collects much relevance would leave the others pale.
            top: how many tokens the ranked list names.
        """
        if self.images:
            from lxt.show.imageterminal import show
        else:
            from lxt.show.terminal import show

        show(self, special=special, scale_special=scale_special, top=top, limit=_ROWS_SHOWN)

    def to_html(self, path: str | os.PathLike[str], special: bool = True, scale_special: bool = False) -> None:
        """Write one self-contained page: no network, light and dark; options as in `show`."""
        from lxt.show.files import check_suffix, write

        check_suffix(path, (".html", ".htm"), "to_html")
        if self.images:
            from lxt.show.imagehtml import page
        else:
            from lxt.show.html import page

        write(path, page(self, special=special, scale_special=scale_special).encode())

    def explore(
        self, path: str | os.PathLike[str], labels: Neurons | Mapping[tuple[int, int], str] | None = None
    ) -> None:
        """Write the explorer, one offline page below 2 MB: from a prediction to its tokens, layers, heads and neurons.

        Args:
            path: where; it shows what was kept, as by `latents=("residual", "head", lxt.Keep("neuron", top=20))`.
            labels: what `lxt.neurons.load(folder)` gives, for the contexts that neurons or heads stand for; or as in
                `plot_neurons`.
        """
        from lxt.show.explorer import page
        from lxt.show.files import check_suffix, write

        check_suffix(path, (".html", ".htm"), "explore")
        write(path, page(self, labels).encode())

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        normalise: Literal["absolute", "layer"] = "absolute",
        special: bool = True,
        scale_special: bool = False,
    ) -> Figure:
        """Layers × tokens where the residual latents are there, otherwise one bar per token; images with their maps.

        Args:
            path: where to write it, as .png, .pdf or .svg; None only returns the figure.
            normalise: `absolute` gives all layers one scale, `layer` gives each its own.
            special: draw special tokens; False leaves them out.
            scale_special: colour special tokens too.
        """
        from lxt.show.figure import picture, written
        from lxt.show.imagefigure import picture as with_images

        if self.images:
            figure = with_images(self, special=special, scale_special=scale_special)
        else:
            figure = picture(self, normalise=normalise, special=special, scale_special=scale_special)
        return written(figure, path)

    def plot_heads(
        self,
        path: str | os.PathLike[str] | None = None,
        token: int | None = None,
        special: bool = True,
        top: int = 8,
        latent: str = "head",
    ) -> Figure:
        """Layers × heads, and the strongest heads by name; needs the latent `head`, or what `latent` says.

        Args:
            path: as in `plot`.
            token: the heads' relevance at this token of the row's own, from 0; None is their sum over all tokens.
            special: count special tokens in that sum.
            top: how many heads to name.
            latent: another one with few parts in a layer: `query`, `key`, `value`, `expert` or `router`.
        """
        from lxt.show.figure import written
        from lxt.show.heads import picture

        return written(picture(self, token, special, top, latent), path)

    def plot_neurons(
        self,
        path: str | os.PathLike[str] | None = None,
        token: int | None = None,
        special: bool = True,
        top: int = 5,
        labels: Neurons | Mapping[tuple[int, int], str] | None = None,
        layer: int | Sequence[int] | None = None,
    ) -> Figure:
        """The strongest neurons of each layer; needs the latent `neuron`, of one row.

        Args:
            path: as in `plot`.
            token: as in `plot_heads`.
            special: as in `plot_heads`.
            top: how many neurons of each layer.
            labels: what they stand for: what `lxt.neurons.load` gives, or (layer, neuron) -> label.
            layer: the number of a layer, or several; None is all.
        """
        from lxt.show.figure import written
        from lxt.show.topneurons import picture

        return written(picture(self, token, special, top, labels, layer), path)

    def plot_attention(
        self,
        path: str | os.PathLike[str] | None = None,
        head: tuple[int, int] | None = None,
        top: int = 6,
        special: bool = True,
        scale_special: bool = False,
    ) -> Figure:
        """Attention weighted by relevance: what heads carry from key to query; needs the latent `flow`, of one row.

        Args:
            path: as in `plot`.
            head: (layer, head), both from 0; None draws the `top` heads that carry most, side by side.
            top: how many heads.
            special: as in `plot`.
            scale_special: colour and count special tokens too.
        """
        from lxt.show.carriedmaps import picture
        from lxt.show.figure import written

        return written(picture(self, head, top, special, scale_special), path)

    def to_pdf(self, path: str | os.PathLike[str], special: bool = True, scale_special: bool = False) -> None:
        """Write the coloured text as PDF: typeset by LaTeX where there is one, otherwise by matplotlib.

        Images make it the picture of `plot`.
        """
        from lxt.show.figure import save
        from lxt.show.files import check_suffix
        from lxt.show.imagefigure import picture
        from lxt.show.latex import attribution_pdf

        check_suffix(path, (".pdf",), "to_pdf")
        if self.images:
            save(picture(self, special=special, scale_special=scale_special), path)
            return
        attribution_pdf(self, path, special=special, scale_special=scale_special)

    def to_dict(self, latents: bool = False) -> dict[str, Any]:
        """Everything as plain lists and numbers, row by row without padding; ready for `json.dumps`.

        Args:
            latents: include the latents, [layer][token] and so on, and the numbers of their layers; they can be large.
                Where the largest were kept, their values, the parts that these are of, and the sum of the rest.
        """
        rows = []
        for row, one in enumerate(self):
            ratio = float(one.conservation[0])
            rows.append(
                {
                    "tokens": one.tokens[0],
                    "token_ids": None if one.token_ids is None else one.token_ids[0].tolist(),
                    "relevance": one.relevance[0].tolist(),
                    "special": one.special[0].tolist(),
                    "explained": asdict(self.explained[row]),
                    "prediction": asdict(self.predictions[row]) if self.predictions else None,
                    "total": float(one.total[0]),
                    "conservation": None if math.isnan(ratio) else ratio,
                    **({"latents": {name: _listed(x) for name, x in one.latents.items()}} if latents else {}),
                }
            )
        layers = {"layers": {name: list(x.layers) for name, x in self.latents.items()}} if latents else {}
        return {"model": self.model, "rules": self.rules, "versions": dict(self.versions), **layers, "rows": rows}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, which `load` reads without the model.

        Raises:
            ValueError: the path ends in a suffix other than .safetensors.
            OSError: it can't be written.
        """
        tensors = {"relevance": self.relevance, "mask": self.mask, "special": self.special}
        tensors |= {} if self.token_ids is None else {"token_ids": self.token_ids}
        about = {
            "tokens": self.tokens,
            "explained": [asdict(explained) for explained in self.explained],
            "predictions": [asdict(prediction) for prediction in self.predictions],
            "model": self.model,
            "rules": self.rules,
            "images": [image.row for image in self.images],
            "versions": dict(self.versions),
        }
        resultfile.write_result(path, tensors | to_tensors(self.images), self.latents, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read what `save` wrote; latents stay in the file until they are asked for.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is not ours, is damaged, or is from a newer lxt.
        """
        tensors, about, hint = resultfile.read(path)
        try:
            mask, special = tensors["mask"].bool(), tensors["special"].bool()
            kept = resultfile.sources(path, about["latents"])
            return cls(
                tokens=about["tokens"],
                token_ids=tensors.get("token_ids"),
                relevance=tensors["relevance"],
                mask=mask,
                special=special,
                explained=[Explained(**entry) for entry in about["explained"]],
                predictions=[Prediction(**entry) for entry in about["predictions"]],
                model=about["model"],
                rules=about["rules"],
                latents=Latents(kept, Tokens(about["tokens"], mask, special)),
                versions=about["versions"],
                images=from_tensors(tensors, about.get("images", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(hint % f"part of it is missing ({error!r})") from error


def _listed(latent: LatentRelevance) -> Any:
    """One row's latent as lists, [layer][token] and so on."""
    values = latent.values[:, 0].tolist()
    if latent.indices is None or latent.rest is None:
        return values
    return {"values": values, "indices": latent.indices[:, 0].tolist(), "rest": latent.rest[:, 0].tolist()}
