"""From features to words."""
