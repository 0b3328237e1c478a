"""The public names; `tree_attention` imports this module when one of them is first used."""

from .decode import tree_decode
from .energy import attention_energy, attention_from_energy
from .errors import InputError, RanksDisagree, TreeAttentionError, Unavailable, Unsupported
from .layout import Layout
from .local import attend
from .partial import Partial, merge
from .reduce import AssumedRanks, SharedMemoryLink, SymmetricLink, TwoLevel, tree_reduce
from .route import Route, explain

__all__ = ["AssumedRanks", "InputError", "Layout", "Partial", "RanksDisagree", "Route", "SharedMemoryLink"]
__all__ += ["SymmetricLink", "TreeAttentionError", "TwoLevel", "Unavailable", "Unsupported"]
__all__ += ["attend", "attention_energy", "attention_from_energy", "explain", "merge", "tree_decode", "tree_reduce"]
