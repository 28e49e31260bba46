"""The file of a result: safetensors whose metadata says what the tensors are, and whose latents are read on demand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lxt.latents import LatentRelevance
from lxt.latents.kept import Source
from lxt.show.files import check_suffix, write

__all__ = ["SUFFIXES", "read", "sources", "write_result"]

FORMAT = 2  # version of the file; raise it when a reader of the old one would misread the new one
SUFFIXES = (".safetensors",)
_KEY = "lxt.attribution"
_PARTS = ("values", "indices", "rest")


@dataclass(frozen=True)
class _File:
    """A file as it was when it was opened: what is read later must be of the same one."""

    path: str
    stamp: tuple[int, int, int]

    @classmethod
    def at(cls, path: str) -> _File:
        return cls(path, _stamp(path))

    def tensor(self, name: str) -> Tensor:
        """One tensor of the file, mapped: its pages come when they are touched, and go when memory is short.

        Raises:
            FileNotFoundError: it is gone.
            OSError: it is another one now, or damaged.
        """
        hint = "latents are read when they are asked for: load the file again, or ask before it changes"
        try:
            now = _stamp(self.path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path!r}, which was loaded, is gone; {hint}") from None
        if now != self.stamp:
            raise OSError(f"{self.path!r} was written anew since it was loaded; {hint}")
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{self.path!r} can't be read any more ({error}); {hint}") from error


def _stamp(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def write_result(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    latents: Mapping[str, LatentRelevance],
    about: Mapping[str, Any],
) -> None:
    """Write tensors, latents and what else there is to say, ready for JSON.

    Raises:
        ValueError: a suffix of another kind of file.
        OSError: it can't be written.
    """
    check_suffix(path, SUFFIXES, "save")
    entries, everything = [], dict(tensors)
    for name, latent in latents.items():
        everything |= {
            key: tensor
            for key, tensor in zip(_keys(name), (latent.values, latent.indices, latent.rest), strict=True)
            if tensor is not None
        }
        entry = {"name": name, "layers": list(latent.layers)}
        entries.append(entry if latent.indices is None else entry | {"largest": True, "parts": latent.parts})
    # clone: safetensors refuses tensors that share memory; ASCII JSON: keeps lone surrogates, which aren't UTF-8
    content = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in everything.items()}
    said = {"format": FORMAT, **about, "latents": entries}
    write(path, save(content, metadata={_KEY: json.dumps(said)}))


def _keys(name: str) -> tuple[str, str, str]:
    return f"latents.{name}", f"latent_indices.{name}", f"latent_rest.{name}"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors but those of latents, what else there is, and how to say that the file isn't one of ours.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is not ours, is damaged, or is from a newer lxt.
    """
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file at {str(path)!r}; give the path that Attribution.save wrote")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the file that Attribution.save wrote")
    hint = f"{str(path)!r} is not a file of lxt: %s; allowed are files that Attribution.save wrote"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if _KEY not in metadata:
                raise ValueError(hint % f"it is safetensors, but holds {', '.join(names[:5]) or 'nothing'}")
            about = json.loads(metadata[_KEY])
            if about["format"] > FORMAT:
                raise ValueError(hint % f"its format is {about['format']} and this lxt reads {FORMAT}, so update lxt")
            # clone: what safetensors gives is mapped, and would change with the file
            tensors = {name: file.get_tensor(name).clone() for name in names if not name.startswith("latent")}
            if "latents" in about:
                shapes = {name: file.get_slice(name).get_shape() for name in names if name.startswith("latents.")}
                about["latents"] = [_entry(one, shapes) for one in about["latents"]]
    except SafetensorError as error:
        raise ValueError(hint % f"safetensors can't read it ({error})") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(hint % f"its metadata is damaged ({error!r})") from error
    return tensors, about, hint


def _entry(entry: str | Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What the file says of a latent; format 1 gave names alone, of latents with all layers."""
    if isinstance(entry, str):
        return {"name": entry, "layers": list(range(shapes[_keys(entry)[0]][0]))}
    shapes[_keys(entry["name"])[0]]  # a KeyError, where it isn't there
    return dict(entry)


def sources(path: str | os.PathLike[str], entries: Sequence[Mapping[str, Any]]) -> dict[str, Source]:
    """What reads each of a file's latents when it is asked for."""
    file = _File.at(str(Path(os.path.expanduser(path)).resolve()))
    return {entry["name"]: partial(_latent, file, entry) for entry in entries}


def _latent(file: _File, entry: Mapping[str, Any]) -> LatentRelevance:
    values, indices, rest = _keys(entry["name"])
    latent = LatentRelevance(entry["name"], file.tensor(values), entry["layers"], parts=entry.get("parts"))
    if not entry.get("largest"):
        return latent
    return latent.replaced(indices=file.tensor(indices), rest=file.tensor(rest))
