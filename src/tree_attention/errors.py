"""The exceptions of this library."""


class TreeAttentionError(Exception):
    """Base class of every error that this library raises on purpose."""


class InputError(TreeAttentionError, ValueError):
    """An argument is invalid. Raised before any communication."""


class RanksDisagree(TreeAttentionError, RuntimeError):
    """The ranks of a group were called with different arguments. Raised on every rank."""


class Unavailable(TreeAttentionError, RuntimeError):
    """This machine or this input does not support a backend, an algorithm or a link that was requested by name."""


class Unsupported(TreeAttentionError, NotImplementedError):
    """The library does not implement this use. The message says what to do instead."""
