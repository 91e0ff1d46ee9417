"""The space that cached features take, apart from the cache so that knowing it does not take torch."""


def feature_bytes(images: int, cells: int, channels: int) -> int:
    """In half precision."""
    return images * cells * channels * 2


def size_in_words(images: int, cells: int, channels: int) -> str:
    size = feature_bytes(images, cells, channels) / 2**20
    return f"{size:,.0f} MiB = {images:,} images x {cells} cells x {channels} channels x 2 bytes"
