"""`python -m attncap.data` is the same as `attncap data`."""

import sys

from attncap.cli.data import run

if __name__ == "__main__":
    run("python -m attncap.data", sys.argv[1:])
