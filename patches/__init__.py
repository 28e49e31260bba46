"""Patch maps: what lxt knows about each architecture beyond what the operator mode finds out by itself."""

if __name__ != "lxt.patches":
    raise ImportError("these are lxt's patch maps: import them as lxt.patches")
