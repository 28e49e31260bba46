"""Which versions a result depends on."""

from __future__ import annotations

from importlib import metadata

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Package -> version of what a result depends on."""
    found = {}
    for package in ("lxt", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
