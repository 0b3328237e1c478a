"""`Lookup`: guesses are what followed the last three tokens, and their number follows how many were right."""

import pytest
import torch

from tree_attention.hf.lookup import GUESSES, NGRAM, PAUSES, Lookup

ALPHABET, TOKENS = 4, 300


def told(text):
    """What a guess must be, by a search through the whole text."""
    tail = text[-NGRAM:]
    ends = [end for end in range(NGRAM, len(text)) if text[end - NGRAM : end] == tail]
    if len(text) < NGRAM or not ends:
        return []
    begin = ends[-1]
    return [(text + text[begin:] * GUESSES[1])[begin + i] for i in range(GUESSES[1])]


@pytest.mark.parametrize("read", [0, 1, 2, 3, 4, 100, TOKENS])
def test_guesses_are_what_followed_the_last_tokens(read):
    text = torch.randint(ALPHABET, (TOKENS,), generator=torch.Generator().manual_seed(read)).tolist()
    lookup, guessed = Lookup(torch.tensor(text[:read], dtype=torch.long)), 0
    for n in range(read, TOKENS + 1):
        due = told(text[:n])
        assert lookup.guess(100) == due
        assert lookup.guess(GUESSES[1] - 1) == []
        guessed += bool(due)
        if n < TOKENS:
            lookup.add(text[n])
    assert guessed > 100 or read == TOKENS


def test_large_token_numbers_are_told_apart():
    ids = torch.tensor([2**20, 1, 2, 7, 2**20 - 1, 1, 2, 9, 2**20, 1, 2])
    assert Lookup(ids).guess(3) == [7, 2**20 - 1, 1]


def test_the_number_of_guesses_follows_how_many_are_right():
    lookup = Lookup(torch.arange(50).repeat(2))
    for size in (*GUESSES[1:], GUESSES[-1]):
        assert len(lookup.guess(100)) == size
        lookup.learn(size, size)
    assert len(lookup.guess(GUESSES[-1] - 1)) == GUESSES[-2]
    for size in (*GUESSES[:0:-1], GUESSES[1]):
        assert len(lookup.guess(100)) == size
        lookup.learn(size, 1 if size > GUESSES[1] else size // 2 + 1)


def test_after_wrong_guesses_there_are_none_for_a_while():
    lookup = Lookup(torch.arange(3).repeat(40))
    for pause in (PAUSES[0], 2 * PAUSES[0], 4 * PAUSES[0]):
        guessed = lookup.guess(100)
        assert guessed
        lookup.learn(len(guessed), 0)
        for _ in range(pause):
            assert lookup.guess(100) == []
            lookup.add(len(lookup) % 3)
    guessed = lookup.guess(100)
    lookup.learn(len(guessed), len(guessed))
    lookup.learn(len(lookup.guess(100)), 1)
    lookup.learn(len(lookup.guess(100)), 0)
    for _ in range(PAUSES[0]):
        assert lookup.guess(100) == []
        lookup.add(len(lookup) % 3)
    assert lookup.guess(100)
