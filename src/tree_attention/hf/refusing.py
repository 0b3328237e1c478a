"""`Refusing`: a stand-in for a tensor or a number, which a model may pass on but not compute with. `LengthInChunk`."""

from typing import Any

from ..errors import Unsupported
from .models import INSTEAD


class Refusing:
    """Whatever a model does with it raises the class's `error`."""

    @classmethod
    def error(cls, what: str) -> Exception:
        """The exception to raise. If it is an AttributeError, too, libraries that look for tensors find none."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Python's own lookups (copy, pickle) fail as usual
            raise AttributeError(name)
        raise self.error(name)

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> Any:
        """torch calls this instead of any function that is given such an object, tensor operators included."""
        raise cls.error(getattr(function, "__name__", "a torch function"))

    def __eq__(self, other: object) -> bool:
        return self is other if other is None or isinstance(other, Refusing) else self._refuse()

    __hash__ = object.__hash__

    def _refuse(self, *_: Any) -> Any:
        raise self.error("an operator")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __or__ = __invert__ = __neg__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __len__ = __iter__ = __setitem__ = _refuse
    __bool__ = __float__ = __int__ = __index__ = _refuse


class LengthInChunk(Refusing):
    """The cache's length in `parallel_chunk`. Models may ask for it, and not use it because they have position ids."""

    @classmethod
    def error(cls, what: str) -> Unsupported:
        return Unsupported(
            f"the model computes with the cache's length ({what}), but in context-parallel prefill each rank is fed "
            f"positions of its own: {INSTEAD}"
        )
