"""How tokens read: every token as the piece of text that it stands for, special ones marked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["display"]


def display(ids: Sequence[int], tokenizer: Any = None, config: Any = None) -> tuple[list[str], list[bool]]:
    """How each token reads, and whether it is special.

    Leading spaces are kept, and bytes that are no whole character show as <0xF0>, so that the strings one after the
    other read like the text. Without a tokenizer the ids themselves are shown.
    """
    if tokenizer is None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        marked = {value for name in names if isinstance(value := getattr(config, name, None), int)}
        return [str(token) for token in ids], [token in marked for token in ids]
    added = tokenizer.added_tokens_decoder
    marked = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
    found = tokenizer.convert_ids_to_tokens(list(ids))
    pieces, plain = [], []
    for token, piece in zip(ids, found, strict=True):
        pieces.append(f"<id {token}>" if piece is None else str(piece))  # a vocabulary padded beyond its tokenizer
        plain.append(piece is not None and token not in added and token not in marked)
    if tokenizer.convert_tokens_to_string(["Ġ"]) == " ":
        shown = [_from_bytes(p) if ordinary else p for p, ordinary in zip(pieces, plain, strict=True)]
    elif any("▁" in piece for piece in pieces):
        shown = [p.replace("▁", " ") if ordinary else p for p, ordinary in zip(pieces, plain, strict=True)]
        start = plain.index(True) if True in plain else 0
        if tokenizer.convert_tokens_to_string([pieces[start], pieces[start]])[:1] != " ":
            shown[start] = shown[start].removeprefix(" ")  # the decoder takes it as its own mark, not as text
    else:
        shown = [_in_context(i, pieces, tokenizer) if plain[i] else pieces[i] for i in range(len(pieces))]
    return shown, [token in marked for token in ids]


def _in_context(index: int, pieces: Sequence[str], tokenizer: Any) -> str:
    """What the token adds to the decoded text of the one before: "##self" → "self", "cat" → " cat"."""
    alone = tokenizer.convert_tokens_to_string([pieces[index]])
    if index == 0:
        return alone
    before = tokenizer.convert_tokens_to_string([pieces[index - 1]])
    both = tokenizer.convert_tokens_to_string([pieces[index - 1], pieces[index]])
    return both[len(before) :] if both.startswith(before) else alone


@cache
def _byte_of() -> dict[str, int]:
    """The characters by which byte-level vocabularies write the 256 bytes (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _from_bytes(piece: str) -> str:
    table = _byte_of()
    if not all(character in table for character in piece):
        return piece
    rest, text = bytes(table[character] for character in piece), ""
    while rest:
        try:
            return text + rest.decode()
        except UnicodeDecodeError as error:
            bad = rest[error.start : error.end]
            text += rest[: error.start].decode() + "".join(f"<0x{byte:02X}>" for byte in bad)
            rest = rest[error.end :]
    return text
