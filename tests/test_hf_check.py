"""`check_model` and the comparison of `generate --verify`: exact, refused, a tie, or where logits depart."""

import json
from unittest import mock

import pytest
import torch

from architectures import tiny
from command import call
from tree_attention import InputError
from tree_attention.cli.generate import _verdict, _verify
from tree_attention.cli.options import GenerateOptions
from tree_attention.hf import check_model
from tree_attention.hf import layers as hf_layers
from tree_attention.hf.check import Departure

WAYS = [(reading, writing) for reading in ("whole", "chunked", "prefill") for writing in ("growing", "static")]


def checked(group, name, dtype=torch.float32):
    return check_model(tiny(name, "tree_attention", layers=2).to(dtype), group=group, tokens=60)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_are_right_are_exact(pool, name, dtype):
    first, second = pool.run(checked, name, dtype, ranks=2)
    assert first == second
    assert [(way.reading, way.writing) for way in first] == WAYS
    for way in first:
        if name == "qwen3_next" and way.reading == "prefill":
            assert str(way).startswith("refused: context-parallel prefill cannot feed LinearAttentionLayer")
        else:
            assert way.is_exact, way
            assert str(way).startswith("exact: logits differ by ")


def test_one_process_checks_the_ways():
    assert all(way.is_exact for way in checked(None, "llama"))


def with_a_fault(group, name, dtype):
    """One rank stores other values in the steps of a growing cache."""
    update = hf_layers.ShardedLayer.update

    def wrong(self, keys, values, *arguments, **kwargs):
        if self.ranks.rank == 1 and self.ranks.max_tokens is None and keys.shape[2] == 1:
            values = 4 * values
        return update(self, keys, values, *arguments, **kwargs)

    with mock.patch.object(hf_layers.ShardedLayer, "update", wrong):
        return checked(group, name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_is_found_in_the_way_that_has_it(pool, dtype):
    first, second = pool.run(with_a_fault, "llama", dtype, ranks=2)
    assert first == second
    assert {way.writing for way in first if not way.is_exact} == {"growing"}
    assert {way.writing for way in first if way.is_exact} == {"static"}
    assert all(str(way).startswith("departs at token ") for way in first if not way.is_exact)


def test_what_check_model_refuses():
    with pytest.raises(InputError, match="model must be loaded with attn_implementation='tree_attention', got 'eager'"):
        check_model(tiny("llama", "eager", layers=2))
    model = tiny("llama", "tree_attention", layers=2)
    with pytest.raises(InputError, match="the text must have at least 16 tokens, got 15"):
        check_model(model, text=torch.arange(3, 18))
    with pytest.raises(InputError, match="text must be token ids without a tokenizer"):
        check_model(model, text="Hello")
    assert all(way.is_exact for way in check_model(model, text=torch.arange(3, 33)))


def verified(model, change=lambda logits: logits, new=10):
    """`_verify` of a text whose logits are those of the model, changed."""
    ids = torch.randint(3, 256, (1, 40), generator=torch.Generator().manual_seed(2))
    how = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **how)
    ours = change(torch.cat(out.logits))
    return _verify(GenerateOptions(), model, ids, out.sequences[0, 40:].tolist(), ours)


def closer(gap):
    """At token 3 the logit beside the best one is above it by `gap` of the largest."""

    def change(logits):
        first = int(logits[3].argmax())
        logits[3, first ^ 1] = logits[3, first] + gap * logits.abs().max()
        return logits

    return change


def test_verify_tells_a_tie_from_a_fault():
    model = tiny("llama", "tree_attention", layers=2)
    for new in (1, 10):
        found = verified(model, new=new)
        assert (found["exact"], found["identical"], found["ties"]) == (True, True, [])
        assert _verdict(found).startswith("writes the same tokens; logits differ by up to ")
    found = verified(model, closer(0.3))
    assert (found["exact"], found["identical"], found["first_difference"]) == (False, False, 3)
    assert _verdict(found).startswith("differs from token 3 on: logits by up to ")


def test_verify_calls_a_near_tie_in_16_bits_a_tie():
    model = tiny("llama", "tree_attention", layers=2).bfloat16()
    head = model.lm_head.weight
    with torch.no_grad():
        head[1::2] = head[::2]  # each token has a twin with the same logit
    found = verified(model, closer(0.002))
    assert (found["exact"], found["identical"], found["first_difference"]) == (True, False, None)
    assert found["ties"][0]["token"] == 3
    assert found["ties"][0]["gap"] <= found["rounding"]
    text = _verdict(found)
    assert text.startswith("has the same logits, and a rounding tie at token 3: its two best logits differ by ")
    assert "less than bfloat16 rounds them by" in text
    assert not verified(model, closer(0.3))["exact"]


def test_a_departure_counts_what_is_not_a_number():
    stock = torch.randn(4, 8)
    ours = stock.clone()
    ours[2, 5] = float("nan")
    assert Departure.of(ours, stock, stock, torch.float32).token == 2


def test_the_command_checks_a_model(capfd, monkeypatch, folder):
    code, _, err = call(capfd, monkeypatch, "verify", "--model", folder / "absent")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.slow
def test_the_command_says_exact_and_ends_with_0(folder):
    from command import run

    ended = run("verify", "--model", folder, "--nproc", 2, "--json")
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert (figures["ranks"], len(figures["ways"])) == (2, 6)
    assert all(way["exact"] for way in figures["ways"])
    assert ended.stderr.count("exact: logits differ by ") == 6
