"""`DecodeLoop`: the tokens of transformers' own loop, also if steps run ahead and the last one is taken back."""

import pytest
import torch

from architectures import tiny
from test_session import tokenizer
from tree_attention import Unsupported
from tree_attention.hf import Session, TreeCache
from tree_attention.hf.decode_loop import DecodeLoop

PROMPT, NEW = 40, 24  # tokens; windows have 12
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 50, "top_p": 0.95, "min_p": 0.002},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "outputs": {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "output_scores": True},
}


class Recorder:
    """A streamer that also notes how many tokens the cache holds when it gets one."""

    def __init__(self, cache):
        self.cache, self.tokens, self.held, self.has_ended = cache, [], [], False

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()
        self.held.append(self.cache.get_seq_length() - len(self.tokens))

    def end(self):
        self.has_ended = True


def write(group, name, way, max_tokens, runs_ahead):
    """Two turns: the ids, the cache's length, what was recorded, and how far the cache was ahead of each token."""
    model, written = tiny(name, "tree_attention"), []
    cache = TreeCache(model.config, group, max_tokens=max_tokens, block_tokens=4)
    ids = torch.randint(3, 256, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    for turn in range(2):
        recorder = Recorder(cache)
        loop = {"custom_generate": DecodeLoop(recorder, runs_ahead=runs_ahead)}
        own = {"streamer": recorder} if runs_ahead is None else loop
        how = WAYS[way] | own | {"max_new_tokens": NEW, "pad_token_id": 0, "cache": cache}
        result = model.generate(ids, eos_token_id=ENDS[turn], **how)
        ids = getattr(result, "sequences", result)
        recorded = [torch.cat(getattr(result, kind, None) or [torch.zeros(1)]) for kind in ("scores", "logits")]
        assert recorder.tokens == ids[0].tolist()
        assert recorder.has_ended
        written.append((ids, cache.get_seq_length(), recorded, recorder.held[1:]))
        ids = torch.cat([ids, torch.full((1, 3), 7 + turn)], 1)
    return written


ENDS = list(range(3, 256, 12)), []  # the first turn is ended by a token, the second by the limit


CASES = [*(("llama", way) for way in WAYS), ("gemma3_text", "sampling"), ("qwen3_next", "greedy")]


@pytest.mark.parametrize("max_tokens", [None, 128])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_tokens_are_those_of_generate(name, way, max_tokens, pool):
    due = pool.run(write, name, way, max_tokens, None, ranks=2)
    assert due[0][0][0].shape[1] < PROMPT + NEW, "the first turn did not end early"
    for runs_ahead in (False, True):
        for ours, theirs in zip(pool.run(write, name, way, max_tokens, runs_ahead, ranks=2), due, strict=True):
            for (ids, length, recorded, _), (due_ids, _, due_recorded, _) in zip(ours, theirs, strict=True):
                assert torch.equal(ids, due_ids)
                assert length == ids.shape[1] - 1
                assert all(map(torch.equal, recorded, due_recorded))


@pytest.mark.parametrize(("name", "can"), [("llama", True), ("gemma3_text", True), ("qwen3_next", False)])
def test_steps_run_ahead_where_they_can_be_taken_back(name, can, pool):
    """Before a token is read it has been fed, unless it is the last one that the limit allows.

    A window can take a token back once a step has turned it into a ring: not before the second token.
    """
    for _, (_, _, _, ahead) in pool.run(write, name, "greedy", 128, True, ranks=2):
        assert ahead[1:] == [0 if can else -1] * (NEW - 2) + [-1]


def test_beam_search_is_refused():
    session = Session.open(tiny("llama", "tree_attention"), tokenizer())
    with pytest.raises(Unsupported, match="not by beam_search: use"):
        session.ask("What?", num_beams=2).close()
