"""`python -m attncap.evaluate` is the same as `attncap evaluate`."""

import sys

from attncap.cli.evaluate import run

if __name__ == "__main__":
    run("python -m attncap.evaluate", sys.argv[1:])
