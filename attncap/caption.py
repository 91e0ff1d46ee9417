"""`python -m attncap.caption` is the same as `attncap caption`."""

import sys

from attncap.cli.caption import run

if __name__ == "__main__":
    run("python -m attncap.caption", sys.argv[1:])
