"""From features to words: `beam_search.beam_search` is the search, `SearchConfig` its settings.

Importing this package does not import torch.
"""

from attncap.search.config import SearchConfig

__all__ = ["SearchConfig"]
