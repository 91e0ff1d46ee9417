"""The networks: encoder and decoder."""

from attncap.models.decoder import IMPLEMENTATIONS, Decoder
from attncap.models.encoder import Encoder

__all__ = ["IMPLEMENTATIONS", "Decoder", "Encoder"]
