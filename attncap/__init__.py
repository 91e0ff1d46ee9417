"""Image captioning with soft attention, accelerated by its own kernels."""

from importlib.metadata import version

from attncap import ops
from attncap.captioner import Caption, Captioner
from attncap.errors import CallError, UserError

__version__ = version("attncap")
__all__ = ["CallError", "Caption", "Captioner", "UserError", "ops"]
