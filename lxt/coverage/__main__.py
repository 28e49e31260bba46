"""`python -m lxt.coverage` is `lxt coverage`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["coverage"]
    runpy.run_module("lxt", run_name="__main__")  # the command line lies above this package and can't be imported here
