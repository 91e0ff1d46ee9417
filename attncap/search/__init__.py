"""From features to words."""

from attncap.search.beam_search import Hypothesis, beam_search
from attncap.search.search_config import SearchConfig

__all__ = ["Hypothesis", "SearchConfig", "beam_search"]
