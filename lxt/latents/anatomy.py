"""The parts of a layer: its attention, its MLP, and the last linear map of each.

They are found by structure, and by the words that transformers' modeling code has for them:
1. Attention is a module whose class says so, and that doesn't attend to another sequence.
2. Its output projection is the first linear map in it that is called as one.
3. The MLP's down projection is called as one and lies neither in attention nor in experts, adapters or norms.
4. The MLP is the module around it that holds its other linear maps too; or the one around experts.

The paths of a patch map come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lxt.patchmap import PatchMap

__all__ = ["Anatomy", "NotThere", "heads_of", "norms"]

_ELSEWHERE = ("cross", "encoder_attn", "encdec")
_OUTPUTS = (
    "o_proj", "out_proj", "c_proj", "o_a_proj", "dense", "o", "Wo", "out_lin", "post_proj", "attention_out", "output",
)  # fmt: skip
_DOWNS = (
    "down_proj", "fc2", "c_proj", "dense_4h_to_h", "wo", "Wo", "w2", "fc_out", "lin2", "linear_2", "dense2", "w_out",
    "layer_2", "proj_down", "ffn_output", "output.dense", "feed_forward.output", "feed_forward.value", "ffn.2",
)  # fmt: skip
_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_NO_MLP = ("expert", "router", "gate", "moe", "adapter", "norm", "mamba", "bottleneck")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
_HEAD_WIDTHS = ("v_head_dim", "head_dim", "attention_head_size")


class NotThere(ValueError):
    """A layer has no such part, or several; says what it has."""


class Anatomy:
    """The parts of one layer, found when they are asked for; None where it has none, NotThere where it has several."""

    def __init__(self, layer: nn.Module, patch_map: PatchMap) -> None:
        self.layer, self.patch_map = layer, patch_map

    @cached_property
    def attention(self) -> nn.Module | None:
        """The module around attention."""
        path = self._path
        return None if path is None else self.layer.get_submodule(path)

    @cached_property
    def output(self) -> nn.Module | None:
        """The attention's output projection."""
        known = self._at(self.patch_map.head)
        if known is not None or self.attention is None:
            return known
        return next((part for path, part in _linear(self.attention) if _called(path, _OUTPUTS)), None)

    @cached_property
    def down(self) -> nn.Module | None:
        """The MLP's down projection; experts have one each, stacked."""
        known = self._at(self.patch_map.neuron)
        if known is not None:
            return known
        attentions = _attentions(self.layer)
        found = {
            path: part
            for path, part in _linear(self.layer)
            if _called(path, _DOWNS) and not _is_in(path, attentions) and not _has(path.rpartition(".")[0], _NO_MLP)
        }
        if len(found) > 1:
            raise NotThere(f"it has several MLPs: {', '.join(found)}")
        return next(iter(found.values()), None)

    @cached_property
    def mlp(self) -> nn.Module | None:
        """The module around the MLP, or around experts."""
        if self.down is not None:
            for path in _above(next(path for path, part in self.layer.named_modules() if part is self.down)):
                around = self.layer.get_submodule(path)
                if len([name for name, _ in _linear(around) if not _has(name, _NO_MLP) or "gate" in name]) > 1:
                    return around
            return None
        named = [name for name, _ in self.layer.named_children() if name in _MLPS]
        holders = [path.rpartition(".")[0] for path, _ in self.layer.named_modules() if path.endswith("experts")]
        attentions = _attentions(self.layer)
        outside = [path for path in (*named, *holders) if path and not _is_in(path, attentions)]
        return self.layer.get_submodule(outside[0]) if outside else None

    @cached_property
    def has_experts(self) -> bool:
        """Whether there are experts, which have a down projection each."""
        return any(path.endswith("experts") for path, _ in self.layer.named_modules())

    @cached_property
    def within(self) -> nn.Module | None:
        """The layer inside the layer that attention is in, as where Zamba's shared one is added as a whole."""
        around = [] if self._path is None else [self.layer.get_submodule(path) for path in _above(self._path)]
        return next((part for part in around if type(part).__name__.endswith("DecoderLayer")), None)

    @cached_property
    def _path(self) -> str | None:
        found = [path for path in _attentions(self.layer) if not _has(_words(self.layer, path), _ELSEWHERE)]
        if len(found) > 1:
            raise NotThere(f"it has several attentions: {', '.join(found)}")
        return found[0] if found else None

    def _at(self, path: str | None) -> nn.Module | None:
        try:
            return self.layer.get_submodule(path) if path else None
        except AttributeError:
            raise NotThere(f"at {path!r}, which its patch map names, there is none") from None


def heads_of(attention: nn.Module | None, output: nn.Module, model: Any) -> int:
    """How many heads share the input of the output projection.

    Raises:
        NotThere: neither the module nor the configuration says.
    """
    width = getattr(output, "in_features", getattr(output, "nx", None))  # nx: GPT-2's Conv1D
    parts = [] if attention is None else list(attention.modules())
    count, size = (next(_known(parts, names), None) for names in (_HEAD_COUNTS, _HEAD_WIDTHS))
    if count is not None and size is not None and width and width % size == 0 and count * size != width:
        return width // size  # some of them are no attention's, as ConvBERT's convolutions
    if count is None and size is not None and width:
        count = width // size
    if count is None:
        count = next(_known([model.config.get_text_config()], _HEAD_COUNTS), None)
    if count is not None and (width is None or width % count == 0):
        return count
    raise NotThere(f"neither its modules nor the configuration of {type(model).__name__} say how many heads there are")


def norms(layer: nn.Module) -> list[nn.Module]:
    """The layer's norms, those inside attention and MLP among them."""
    return [part for part in layer.modules() if "norm" in type(part).__name__.lower() and part is not layer]


def _attentions(layer: nn.Module) -> list[str]:
    """The paths of what attends, the outermost modules."""
    found: list[str] = []
    for path, part in layer.named_modules():
        if path and not _is_in(path, found) and type(part).__name__.endswith(("Attention", "MLA")):
            found.append(path)
    return found


def _linear(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear maps, also quantised and adapted ones, by path; not the parts of one."""
    outer: list[str] = []
    for path, part in module.named_modules():
        weight = getattr(part, "weight", None)
        matrix = isinstance(weight, Tensor) and weight.dim() > 1 and not isinstance(part, nn.Embedding)
        if path and not _is_in(path, outer) and (matrix or hasattr(part, "in_features")):
            outer.append(path)
            yield path, part


def _above(path: str) -> Iterator[str]:
    """The paths around one, the innermost first."""
    while path := path.rpartition(".")[0]:
        yield path


def _called(path: str, names: tuple[str, ...]) -> bool:
    path = path.removesuffix(".linear")
    return any(path == name or path.endswith(f".{name}") for name in names)


def _has(path: str, words: tuple[str, ...]) -> bool:
    return any(word in path.lower() for word in words)


def _words(layer: nn.Module, path: str) -> str:
    return f"{path} {type(layer.get_submodule(path)).__name__}".lower()


def _is_in(path: str, others: list[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in others)


def _known(parts: Sequence[object], names: tuple[str, ...]) -> Iterator[int]:
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                yield value
