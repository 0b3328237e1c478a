"""Calls that ranks do not make alike, ranks that fail alone, and other rows: every rank raises, and can go on."""

import json
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from architectures import tiny
from test_session import TEXT, tokenizer
from tree_attention import hf
from tree_attention.hf import Session, TreeCache, prefill
from tree_attention.testing import record_traffic

LAYERS, MOST_S = 2, 30
HOW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def text(tokens, seed=1, rows=1):
    return torch.randint(3, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def model():
    return tiny("llama", "tree_attention", LAYERS)


def attempt(action):
    """The result of an action, or its error as (type, text); and whether it came in time."""
    start = time.monotonic()
    try:
        result = action()
    except (Exception, KeyboardInterrupt) as error:
        result = type(error).__name__, str(error)
    return result, time.monotonic() - start < MOST_S


def expected(ids, **how):
    return tiny("llama", "eager", LAYERS).generate(ids, **HOW | how)


# Each: (model, cache, rank) -> None, the call of one rank; and what the error names.
DIFFERENT = {
    "prompts": (lambda m, c, r: m.generate(text(40, r), cache=c, **HOW), "input_ids"),
    "prompts without a cache": (lambda m, c, r: m.generate(text(40, r), **HOW), "input_ids"),
    "lengths": (lambda m, c, r: m.generate(text(40 + r), cache=c, **HOW), "input_ids"),
    "lengths without a cache": (lambda m, c, r: m.generate(text(40 + r), **HOW), "input_ids"),
    "prefilled lengths": (lambda m, c, r: prefill(m, text(100 + 50 * r), c), "input_ids"),
    "chunks": (lambda m, c, r: prefill(m, text(100), c, chunk_tokens=32 + 32 * r), "chunk_tokens"),
    "masks": (lambda m, c, r: m.generate(text(40), attention_mask=mask(r), cache=c, **HOW), "attention_mask"),
    "options": (lambda m, c, r: m.generate(text(40), cache=c, top_k=9 + r, **HOW), "top_k"),
    "budgets": (lambda m, c, r: m.generate(text(40), cache=c, **HOW | {"max_new_tokens": 5 + r}), "max_"),
    "autocast": (lambda m, c, r: with_autocast(r, lambda: m.generate(text(40), cache=c, **HOW)), "autocast"),
    "a cache on one rank": (lambda m, c, r: m.generate(text(40), cache=[c, None][r], **HOW), "cache"),
    "functions": (lambda m, c, r: [prefill, no_prefill][r](m, text(100), c), "call"),
    "adapters": (lambda m, c, r: adapted(model(), r).generate(text(40), cache=c, **HOW), "adapters must"),
    "a token of one rank": (
        lambda m, c, r: m.generate(text(40) + 900 * r, cache=c, **HOW),
        "rank 1: InputError",
    ),
    "a fault of one rank": (
        lambda m, c, r: m.generate(text(40), cache=c, **HOW | of_one(r)),
        "rank 1: ValueErr",
    ),
}


def adapted(its_model, rank):
    """With a LoRA layer as PEFT makes it, merged into the weights on one rank only."""
    its_model.peft_config, layer = {"a": None}, its_model.model.layers[0]
    layer.active_adapters, layer.scaling, layer.merged_adapters = ["a"], {"a": 0.5}, ["a"][rank:]
    return its_model


def mask(rank):
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, : 3 * rank] = 0
    return mask


def with_autocast(enabled, call):
    with torch.autocast("cpu", enabled=bool(enabled)):
        call()


def no_prefill(model, ids, cache):
    model.generate(ids, cache=cache, **HOW)


def of_one(rank):
    return {"bogus": 1} if rank else {}


def differently(group, way):
    its_model = model()
    cache = TreeCache(its_model.config, group)
    found = attempt(lambda: DIFFERENT[way][0](its_model, cache, min(group.rank(), 1)))
    return *found, cache.get_seq_length(), its_model.generate(text(40), cache=cache, **HOW)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (i % 4 > 0)) for i, way in enumerate(DIFFERENT)]
)
def test_ranks_that_do_not_do_the_same_all_raise(pool, way):
    ranks = 4 if "cache" in way else 2  # the automatic cache spans all ranks
    for (name, said), in_time, held, after in pool.run(differently, way, ranks=ranks):
        assert (name, in_time, held) == ("RanksDisagree", True, 0), said
        assert DIFFERENT[way][1] in said
        assert torch.equal(after, expected(text(40)))


# Each: (model, cache, ids, fail) -> None; `fail` raises on the last rank when it is called for the third time.
FAILING = {
    "progress": lambda m, c, ids, fail: prefill(m, ids, c, chunk_tokens=64, on_progress=lambda _: fail()),
    "streamer": lambda m, c, ids, fail: m.generate(ids, cache=c, streamer=Streamer(fail), **HOW),
    "criteria": lambda m, c, ids, fail: m.generate(ids, cache=c, stopping_criteria=[Criteria(fail)], **HOW),
    "layer": lambda m, c, ids, fail: in_a_layer(m, fail, lambda: m.generate(ids, cache=c, **HOW)),
    "layer of prefill": lambda m, c, ids, fail: in_a_layer(m, fail, lambda: prefill(m, ids, c, chunk_tokens=64)),
    "no cache": lambda m, c, ids, fail: in_a_layer(m, fail, lambda: m.generate(ids, **HOW)),
}


class Streamer(TextStreamer):
    def __init__(self, act):
        self.act = act

    def put(self, value):
        self.act()

    def end(self):
        pass


class Criteria(StoppingCriteria):
    def __init__(self, act):
        self.act = act

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), bool(self.act()))


def in_a_layer(model, act, call):
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: act())
    try:
        return call()
    finally:
        hook.remove()


def raise_at(turn, is_mine, error):
    def act():
        turns.append(None)
        if is_mine and len(turns) == turn:
            raise error

    turns = []
    return act


def failing(group, way, static, error):
    its_model, ids, rank = model(), text(300), group.rank()
    others = dist.group.WORLD if "no cache" in way else group
    fails = 0 if way == "criteria" else others.size() - 1  # criteria are asked on the first rank
    cache = TreeCache(its_model.config, group, max_tokens=400 if static else None)
    found = attempt(lambda: FAILING[way](its_model, cache, ids, raise_at(3, rank == fails, error)))
    used = None if "no cache" in way else attempt(lambda: its_model.generate(ids, cache=cache, **HOW))
    cache.reset()
    prefill(its_model, ids, cache, chunk_tokens=64)
    after = its_model.generate(ids, cache=cache, **HOW)
    fresh = its_model.generate(ids, cache=TreeCache(its_model.config, group), **HOW)
    dist.barrier(group)  # the caller's group is as it was
    return fails, found, used, after, fresh


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("way", "error"),
    [
        ("progress", ValueError("no room")),
        ("streamer", BrokenPipeError("nobody reads")),
        pytest.param("criteria", ZeroDivisionError("by zero"), marks=pytest.mark.slow),
        ("layer", KeyboardInterrupt()),
        pytest.param("layer of prefill", MemoryError("out of memory"), marks=pytest.mark.slow),
        pytest.param("no cache", MemoryError("out of memory"), marks=pytest.mark.slow),
    ],
)
def test_one_rank_fails_and_every_rank_raises_and_can_go_on(pool, way, error, static):
    ranks = 4 if way == "no cache" else 3 if static else 2
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    for rank, (fails, found, used, after, fresh) in enumerate(pool.run(failing, way, static, error, ranks=ranks)):
        (name, message), in_time = found
        assert in_time
        assert name == (type(error).__name__ if rank == fails else "TreeAttentionError"), message
        assert rank == fails or f"rank {fails} failed in" in message
        assert said in f"{name}: {message}"
        if used is not None:
            assert used[0][0] == "InputError"
            assert f"this TreeCache is unusable, because rank {fails} failed in" in used[0][1]
        assert torch.equal(after, expected(text(300)))
        assert torch.equal(fresh, after)


def all_fail(group):
    its_model, ids = model(), text(300)
    cache = TreeCache(its_model.config, group)
    found = attempt(lambda: prefill(its_model, ids, cache, chunk_tokens=64, on_progress=raise_twice([])))
    return found, its_model.generate(ids, cache=cache, **HOW)


def raise_twice(seen):
    def act(tokens):
        seen.append(tokens)
        if len(seen) == 2:
            raise ValueError("enough")

    return act


def test_a_failure_of_all_ranks_costs_nothing(pool):
    for found, after in pool.run(all_fail, ranks=2):
        assert found == (("ValueError", "enough"), True)
        assert torch.equal(after, expected(text(300)))


def member(rank, queue, meeting, is_killed):
    """Rank 1 dies in a layer of its second call, if it is to. Rank 2 looks so seldom that rank 0 has long ended."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3, timeout=timedelta(minutes=2))
    its_model = model()
    its_model.generate(text(300), **HOW)
    if rank == 2:
        time.sleep = lambda _, sleep=time.sleep: sleep(0.5)
    die = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if is_killed and rank == 1 else (lambda: None)
    calls = iter([lambda: None, lambda: None, die])
    found = attempt(
        lambda: in_a_layer(
            its_model, lambda: next(calls, lambda: None)(), lambda: its_model.generate(text(300), **HOW).tolist()
        )
    )
    dist.destroy_process_group()
    queue.put(found)


@pytest.mark.slow
@pytest.mark.parametrize(("store", "is_killed"), [("file", True), ("tcp", True), ("tcp", False)])
def test_a_killed_rank_is_noticed(store, is_killed, tmp_path):
    """Also without the store, which rank 0 may take along. It stays until the others need it no more."""
    context = multiprocessing.get_context("forkserver")  # RankPool's, which has loaded what it needs
    queue, meeting = context.Queue(), f"file://{tmp_path}/meeting" if store == "file" else "tcp://127.0.0.1:29655"
    ranks = [context.Process(target=member, args=(rank, queue, meeting, is_killed)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    ended = [queue.get(timeout=100) for _ in range(3 - is_killed)]
    for rank in ranks:
        rank.join(20)
        rank.kill()
    died = "rank 1 has ended without an error, it may have been killed: start all ranks again"
    due = ("TreeAttentionError", died) if is_killed else expected(text(300)).tolist()
    assert ended == [(due, True)] * len(ended)


def session_of_a_failing_rank(group):
    """Fail alone in `read`, in `ask` and before `ask`; return what was said, and the answer to a last question."""
    session, rank = Session.open(model(), tokenizer(), group), group.rank()
    fail = raise_at(2, rank == 1, ValueError("no room"))
    found = [attempt(lambda: session.read(TEXT, chunk_tokens=64, on_progress=lambda _: fail()))]
    session.read(TEXT)
    fail_later = raise_at(3, rank == 0, BrokenPipeError("nobody reads"))
    found.append(attempt(lambda: ask(session, "What?", on_token=lambda _: fail_later())))
    found.append(attempt(lambda: ask(session, "What?"[rank:])))
    found.append(attempt(lambda: session.read("x" * (rank + 1))))
    return found, ask(session, "What?")


def ask(session, prompt, **how):
    return "".join(session.ask(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, **how))


def test_a_session_goes_on_as_it_was_before(pool):
    whole = Session.open(model(), tokenizer())
    whole.read(TEXT)
    answer = ask(whole, "What?")
    for rank, (found, said) in enumerate(pool.run(session_of_a_failing_rank, ranks=2)):
        own, told = ("BrokenPipeError", "nobody reads"), "rank 0 failed in ask: BrokenPipeError: nobody reads"
        assert all(in_time for _, in_time in found)
        assert found[0][0][1] == ("no room" if rank == 1 else "rank 1 failed in read: ValueError: no room")
        assert found[1][0] == (("TreeAttentionError", told) if rank else own)
        assert [error for (error, _), _ in found[2:]] == ["RanksDisagree"] * 2
        assert said == answer


def stopping(group):
    """Each rank's own criterion would stop it at another token."""
    tokens = iter(range(100))
    criteria = StoppingCriteriaList([Criteria(lambda: next(tokens) == 3 + 2 * group.rank())])
    its_model = model()
    cache = TreeCache(its_model.config, group)
    how = HOW | {"max_new_tokens": 20}
    return attempt(lambda: its_model.generate(text(40), cache=cache, stopping_criteria=criteria, **how))


def test_criteria_are_asked_on_the_first_rank(pool):
    for result, in_time in pool.run(stopping, ranks=3):
        assert in_time
        assert torch.equal(result, expected(text(40), max_new_tokens=4))


ROWS = {
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "batch": {},
}


def other_rows(group, way, static):
    its_model, ids = model(), text(100)
    cache = TreeCache(its_model.config, group, max_tokens=120 if static else None)
    prefill(its_model, ids, cache)
    asked = text(100, rows=2) if way == "batch" else ids
    found = attempt(lambda: its_model.generate(asked, cache=cache, **HOW | ROWS[way]))
    after = its_model.generate(ids, cache=cache, **HOW)
    cache.crop(100 - cache.get_seq_length() - 1)
    cache.batch_repeat_interleave(3)
    return *found, after, its_model.generate(ids, cache=cache, **HOW | {"num_beams": 3})


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("way", ROWS)
def test_other_rows_than_the_cache_has_are_refused(pool, way, static):
    for (name, said), in_time, after, beams in pool.run(other_rows, way, static, ranks=2):
        assert (name, in_time) == ("InputError", True), said
        assert "holds 1 rows" in said
        assert "cache.batch_repeat_interleave(n)" in said
        assert torch.equal(after, expected(text(100)))
        assert torch.equal(beams, expected(text(100), num_beams=3))


def votes_and_traffic(group, tokens):
    its_model = model()
    cache = TreeCache(its_model.config, group)
    its_model.generate(text(40), cache=cache, **HOW)
    ids = text(60)
    with record_traffic() as calls:
        its_model.generate(ids, cache=cache, **HOW | {"max_new_tokens": tokens})
    times = []
    for _ in range(50):
        dist.barrier(group)
        start = time.perf_counter()
        with hf.calls.Call("timed", its_model, cache) as call:
            call.described |= {"input_ids": ids, **hf.generation._options(its_model.generation_config)}
            call.start()
        times.append(time.perf_counter() - start)
    return len(calls), sorted(times)[25]


def test_a_call_costs_no_collective(pool):
    few, many = (pool.run(votes_and_traffic, tokens, ranks=2) for tokens in (2, 12))
    assert [count for count, _ in few + many] == [0] * 4  # partials pass through shared memory, votes through the store
    assert min(median for _, median in few) < 0.01, json.dumps([few, many])
