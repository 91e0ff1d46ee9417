"""From features to words."""

from attncap.search.beam_search import Hypothesis, SearchConfig, beam_search

__all__ = ["Hypothesis", "SearchConfig", "beam_search"]
