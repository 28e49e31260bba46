"""XLNet: its layers have tokens before rows."""

from lxt.patchmap import PatchMap

__all__ = ["XLNET"]

XLNET = PatchMap(architectures=("xlnet",), tokens_first=True)
