"""`DecodeLoop` writes the tokens of transformers' own loop, also with guesses, and with steps that run ahead."""

import pytest
import torch

from architectures import tiny
from attention_cases import GPU
from test_session import tokenizer
from tree_attention import Unsupported
from tree_attention.hf import Session, TreeCache
from tree_attention.hf.decode_loop import DecodeLoop
from tree_attention.hf.lookup import Lookup

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


class Told(Lookup):
    """Guesses what the text will be, with a wrong token now and then."""

    due = ()

    def guess(self, room):
        at, count = len(self), (3, 7, 15)[len(self) % 3]
        right = [*self.due[at : at + count], *[5] * count][:count]
        wrong = at % 11
        return [] if count > room else [token + (i == wrong) for i, token in enumerate(right)]


def write(group, name, way, max_tokens, variant, due=(), device="cpu"):
    """Two turns: ids, the cache's length, recorded numbers, how far the cache was ahead of each token, and steps.

    variant: "generate" for transformers' loop, or (looks_up, runs_ahead). due: ids of each turn, to guess from.
    """
    model, written = tiny(name, "tree_attention").to(device), []
    cache = TreeCache(model.config, group, max_tokens=max_tokens, block_tokens=4)
    ids = torch.randint(3, 256, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    torch.manual_seed(5)
    for turn in range(2):
        Told.due = due[turn] if due else []
        recorder, loop = Recorder(cache), None
        if variant != "generate":
            loop = DecodeLoop(recorder, Told if variant[0] else None, runs_ahead=variant[1])
        own = {"custom_generate": loop} if loop else {"streamer": recorder}
        how = WAYS[way] | own | {"max_new_tokens": NEW, "pad_token_id": 0, "cache": cache}
        result = model.generate(ids, eos_token_id=ENDS[turn], **how)
        ids = getattr(result, "sequences", result)
        recorded = [torch.cat(getattr(result, kind, None) or [torch.zeros(1)]) for kind in ("scores", "logits")]
        assert recorder.tokens == ids[0].tolist()
        assert recorder.has_ended
        written.append((ids, cache.get_seq_length(), recorded, recorder.held[1:], loop.steps if loop else 0))
        ids = torch.cat([ids, torch.full((1, 3), 7 + turn, device=device)], 1)
    return written


ENDS = list(range(3, 256, 12)), []  # the first turn is ended by a token, the second by the limit
CASES = [*(("llama", way) for way in ("greedy", "sampling", "outputs")), ("gemma3_text", "sampling")]
SLOW_CASES = [("llama", "penalty"), ("qwen3_next", "greedy"), ("gpt_oss", "penalty"), ("deepseek_v3", "penalty")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in (*SLOW_CASES, ("llama4_text", "penalty"))]
VARIANTS = [(looks_up, runs_ahead) for looks_up in (False, True) for runs_ahead in (False, True)]


@pytest.mark.parametrize("max_tokens", [128, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_tokens_are_those_of_generate(name, way, max_tokens, pool):
    expected = pool.run(write, name, way, max_tokens, "generate", ranks=2)
    due = [ids[0].tolist() for ids, *_ in expected[0]]
    assert name != "llama" or len(due[0]) < PROMPT + NEW, "the first turn did not end early"
    can_take_back = name in ("llama", "deepseek_v3") or (name != "qwen3_next" and max_tokens is not None)
    for variant in VARIANTS:
        for ours, theirs in zip(pool.run(write, name, way, max_tokens, variant, due, ranks=2), expected, strict=True):
            for (ids, length, recorded, _, _), (due_ids, _, due_recorded, _, _) in zip(ours, theirs, strict=True):
                assert torch.equal(ids, due_ids)
                assert length == ids.shape[1] - 1
                for some, other in zip(recorded, due_recorded, strict=True):
                    torch.testing.assert_close(some, other, rtol=1e-5, atol=1e-5)
            assert (ours[1][4] < NEW - 4) == (variant[0] and can_take_back), (
                "guesses saved no step, or some that cannot"
            )


@pytest.mark.parametrize(("name", "can"), [("llama", True), ("gemma3_text", True), ("qwen3_next", False)])
def test_steps_run_ahead_where_they_can_be_taken_back(name, can, pool):
    """Before a token is read it has been fed, unless it is the last one that the limit allows.

    A window can take a token back once a step has turned it into a ring: not before the second token.
    """
    for _, (_, _, _, ahead, steps) in pool.run(write, name, "greedy", 128, (False, True), ranks=2):
        assert ahead[1:] == [0 if can else -1] * (NEW - 2) + [-1]
        assert steps == NEW


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(
    ("name", "way"), [("llama", "sampling"), ("gemma3_text", "greedy"), ("deepseek_v3", "penalty")]
)
def test_on_a_gpu(name, way, device):
    expected = write(None, name, way, 128, "generate", device=device)
    due = [ids[0].tolist() for ids, *_ in expected]
    for variant in VARIANTS:
        written = write(None, name, way, 128, variant, due, device=device)
        assert [ids[0].tolist() for ids, *_ in written] == due
        assert (written[1][4] < NEW - 4) == variant[0]
        assert (written[1][3][1:-1] == [0] * (NEW - 2)) == (variant == (False, True))


def test_beam_search_is_refused():
    session = Session.open(tiny("llama", "tree_attention"), tokenizer())
    with pytest.raises(Unsupported, match="not by beam_search: use"):
        session.ask("What?", num_beams=2).close()
