"""`python -m lxt`: the command line."""

from lxt.cli import main

if __name__ == "__main__":
    main()
