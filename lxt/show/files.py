"""Writing a result to disk so that a failure loses nothing: the file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_suffix", "write"]


def write(path: str | os.PathLike[str], content: bytes) -> Path:
    """Put `content` at `path`, creating its folder; what was there stays until the new file is complete.

    Raises:
        OSError: the kind that came (PermissionError, IsADirectoryError, ...), naming the path and the next step.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))  # a link keeps pointing where it did
    part = target.parent / f".lxt-{secrets.token_hex(6)}.part"
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():  # a pipe or a device is written to, never replaced
            target.write_bytes(content)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        advice = f"cannot write the file ({reason}); give the path of a file in a folder that you may write to"
        raise OSError(error.errno, advice, str(target)) from error
    return target


def check_suffix(path: str | os.PathLike[str], allowed: Sequence[str], what: str) -> None:
    """Refuse a name that promises another kind of file; one without a suffix promises none.

    Args:
        path: where the file is to be.
        allowed: suffixes, such as .html.
        what: what writes there, for the message.

    Raises:
        ValueError: the name ends in another suffix.
    """
    target = Path(os.path.expanduser(path))
    special = target.exists() and not target.is_file()  # a pipe, a device, or a folder, which is refused later
    if not special and target.suffix and target.suffix.lower() not in allowed:
        kinds = ", ".join(allowed)
        raise ValueError(f"{what} writes {kinds}, and not {target.suffix!r}: give {str(path)!r} another suffix")
