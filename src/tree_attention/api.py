"""The public names, which `tree_attention` loads at the first use of one of them."""

from .decode import tree_decode
from .energy import attention_energy, attention_from_energy
from .errors import InputError, RanksDisagree, TreeAttentionError, Unavailable, Unsupported
from .layout import Layout
from .local import attend
from .partial import Partial, merge
from .reduce import SharedMemoryLink, SymmetricLink, TwoLevel, tree_reduce

__all__ = [
    "InputError",
    "Layout",
    "Partial",
    "RanksDisagree",
    "SharedMemoryLink",
    "SymmetricLink",
    "TreeAttentionError",
    "TwoLevel",
    "Unavailable",
    "Unsupported",
    "attend",
    "attention_energy",
    "attention_from_energy",
    "merge",
    "tree_decode",
    "tree_reduce",
]
