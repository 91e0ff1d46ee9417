"""From features to words."""

from attncap.search.beam_search import Hypothesis, beam_search

__all__ = ["Hypothesis", "beam_search"]
