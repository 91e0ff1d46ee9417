"""`python -m attncap.train` is the same as `attncap train`."""

import sys

from attncap.cli.train import run

if __name__ == "__main__":
    run("python -m attncap.train", sys.argv[1:])
