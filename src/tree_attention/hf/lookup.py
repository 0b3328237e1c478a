"""`Lookup`: guesses the next tokens of a text from what followed its last tokens earlier in the text."""

import numpy as np
import torch
from torch import Tensor

NGRAM = 3  # tokens that must agree
GUESSES = (0, 3, 7, 15)  # numbers of tokens to guess: steps of few sizes, since GPUs capture each size
PAUSES = (16, 256)  # tokens without a guess after guesses were wrong: at first, and at most


class Lookup:
    """An index of the text, and how many tokens to guess.

    The number grows while guesses are right, and shrinks while they are not. After several wrong ones there is a pause,
    so that a text without repetitions loses little.

    ids: int64 `[n]`, the text so far.
    """

    def __init__(self, ids: Tensor) -> None:
        keys = _keys(ids)[:-1]  # of the n-grams that end at NGRAM - 1 ... n - 2; the last one is followed by nothing
        keys, order = keys.sort(stable=True)
        self._keys, self._order, self._read = keys.cpu().numpy(), order.cpu().numpy(), ids.cpu().numpy()
        self._new: list[int] = []
        self._last_end: dict[int, int] = {}  # n-gram that was added -> index of its last token
        self._size, self._pause, self._next_pause = 1, 0, PAUSES[0]  # index into GUESSES; tokens until the next guess

    def __len__(self) -> int:
        return len(self._read) + len(self._new)

    def _token(self, index: int) -> int:
        return int(self._read[index]) if index < len(self._read) else self._new[index - len(self._read)]

    def _key(self) -> int:
        """The key of the last n-gram."""
        a, b, c = (self._token(len(self) - i) for i in (3, 2, 1))
        return (a << 42) + (b << 21) + c

    def add(self, token: int) -> None:
        """Append a token to the text."""
        if len(self) >= NGRAM:
            self._last_end[self._key()] = len(self) - 1
        self._new.append(token)
        self._pause = max(self._pause - 1, 0)

    def guess(self, room: int) -> list[int]:
        """Return what followed the last tokens when they last occurred, at most `room` tokens; empty for no guess."""
        count = max(size for size in GUESSES[: self._size + 1] if size <= max(room, 0))
        if not count or self._pause or len(self) < NGRAM:
            return []
        key = self._key()
        end = self._last_end.get(key)
        if end is None:
            place = int(np.searchsorted(self._keys, key, "right")) - 1
            if place < 0 or self._keys[place] != key:
                return []
            end = int(self._order[place]) + NGRAM - 1
        period = len(self) - 1 - end  # past the end of the text, repeat
        return [self._token(end + 1 + i % period) for i in range(count)]

    def learn(self, guessed: int, right: int) -> None:
        """Adapt the number of guesses, after `right` of `guessed` were right."""
        if right == guessed:
            self._size, self._next_pause = min(self._size + 1, len(GUESSES) - 1), PAUSES[0]
        elif right == 0 and self._size == 1:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, PAUSES[1])
        elif right < guessed // 2:
            self._size = max(self._size - 1, 1)


def _keys(ids: Tensor) -> Tensor:
    """Return a number for each n-gram of ids `[n]`, equal only for equal ones while ids are below 2^21: `[n - 2]`."""
    if len(ids) < NGRAM:
        return torch.empty(0, dtype=torch.long)
    return (ids[:-2] << 42) + (ids[1:-1] << 21) + ids[2:]
