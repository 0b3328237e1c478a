"""What can go wrong.

TreeAttentionError
├── InputError (ValueError)         an argument is not what it must be
├── RanksDisagree (RuntimeError)    ranks of one group were called with different things
├── Unavailable (RuntimeError)      a backend or algorithm that this machine, or this input, does not allow
└── Unsupported (NotImplementedError)   a use that the library does not have; the text says what to do instead
"""


class TreeAttentionError(Exception):
    """Base of every error this library raises on purpose."""


class InputError(TreeAttentionError, ValueError):
    """An argument is not what it must be; raised before any communication."""


class RanksDisagree(TreeAttentionError, RuntimeError):
    """The ranks of a group were called with different things; raised on all of them alike."""


class Unavailable(TreeAttentionError, RuntimeError):
    """A backend or algorithm was asked for by name and cannot run here."""


class Unsupported(TreeAttentionError, NotImplementedError):
    """A use that the library does not have; the text says what to do instead."""
