"""Image captioning with soft attention and its own CPU and CUDA kernels.

`import attncap` imports neither torch nor torchvision, which take seconds to import: the names that need them are
loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from attncap.errors import CallError, UserError

if TYPE_CHECKING:
    from attncap import ops
    from attncap.captioner import Caption, Captioner, Ensemble
    from attncap.search.config import SearchConfig

    __version__: str

__all__ = ["CallError", "Caption", "Captioner", "Ensemble", "SearchConfig", "UserError", "__version__", "ops"]

_MODULES = {
    "Caption": "attncap.captioner",
    "Captioner": "attncap.captioner",
    "Ensemble": "attncap.captioner",
    "SearchConfig": "attncap.search.config",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name == "ops":
        value = importlib.import_module("attncap.ops")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("attncap")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
