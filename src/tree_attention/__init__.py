"""Exact attention over a KV cache that is spread across ranks."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: importing torch takes seconds, and `tree-attention plan` runs without."""
    private = name.startswith("_") and name != "__all__"
    if not private and find_spec(f"{__name__}.{name}") is None:  # `import` finds modules by itself
        api = import_module(f"{__name__}.api")
        if name in ("__all__", *api.__all__):
            globals()[name] = value = getattr(api, name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
