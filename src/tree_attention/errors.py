"""The exceptions of this library.

TreeAttentionError
├── InputError (ValueError)              an argument is invalid
├── RanksDisagree (RuntimeError)         the ranks of a group were called with different arguments
├── Unavailable (RuntimeError)           this machine or this input does not support the requested backend or algorithm
└── Unsupported (NotImplementedError)    the library does not implement this use; the message names an alternative
"""


class TreeAttentionError(Exception):
    """Base class of every error that this library raises on purpose."""


class InputError(TreeAttentionError, ValueError):
    """An argument is invalid. Raised before any communication."""


class RanksDisagree(TreeAttentionError, RuntimeError):
    """The ranks of a group were called with different arguments. Raised on every rank."""


class Unavailable(TreeAttentionError, RuntimeError):
    """A backend or algorithm was requested by name and cannot run here."""


class Unsupported(TreeAttentionError, NotImplementedError):
    """The library does not implement this use. The message says what to do instead."""
