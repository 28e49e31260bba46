"""The bundled model: a small trained Llama with its own tokenizer, for demonstrations and tests without a download."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder of the bundled model, for `from_pretrained`.

    Raises:
        FileNotFoundError: the weights are not installed (or the package is inside a zip file).
    """
    folder = Path(str(resources.files(__name__)))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model.safetensors in {folder}; reinstall lxt from a wheel or an unpacked checkout, "
            "or train the model with examples/train_tiny.py"
        )
    return folder
