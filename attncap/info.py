"""`python -m attncap.info` is the same as `attncap info`."""

import sys

from attncap.cli.info import run

if __name__ == "__main__":
    run("python -m attncap.info", sys.argv[1:])
