"""A real model on real text: the spread cache neither loses what was read nor changes what is thought of it."""

import pytest
import torch
from transformers import AutoTokenizer

from quality import copy_losses, load, losses
from smollm2 import fetch, long_text

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def ids():
    tokenizer = AutoTokenizer.from_pretrained(fetch(), model_max_length=10**9)
    return tokenizer(long_text()[:40_000], return_tensors="pt").input_ids


def read(group, folder, ids, tokens, distance):
    model = load(folder)
    return losses(model, ids[:, : tokens + 1], group), copy_losses(model, ids, distance, group)


def test_perplexity_and_copy_do_not_depend_on_the_ranks(pool, ids):
    alone, copy = read(None, fetch(), ids, 600, 200)
    assert copy[0] > 2
    assert copy[1] < 0.5  # it found the passage again, by attention to what other ranks hold
    for loss, again in pool.run(read, fetch(), ids, 600, 200, ranks=3):
        assert loss.mean().exp() == pytest.approx(float(alone.mean().exp()), abs=1e-4)
        torch.testing.assert_close(loss, alone, atol=2e-4, rtol=0)
        assert again == pytest.approx(copy, abs=1e-4)
