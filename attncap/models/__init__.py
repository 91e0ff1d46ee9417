"""The networks: encoder and decoder."""

from attncap.models.decoder import Decoder
from attncap.models.encoder import Encoder

__all__ = ["Decoder", "Encoder"]
