"""A conversation: the tokens of one process whatever is saved, loaded, forked or taken back; and damaged saves."""

import contextlib
import copy
import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from architectures import BLOCK, tiny
from tree_attention import InputError, TreeAttentionError, Unsupported
from tree_attention.hf import Session, load_tensor_parallel, save_folder
from tree_attention.hf import save as saving
from tree_attention.hf.chat_template import ChatTemplate
from tree_attention.hf.layers import ShardedLayer
from tree_attention.hf.tensor_parallel import AXES
from tree_attention.hf.window_layer import ReplicatedWindowLayer

TEXT = "".join(f"{i} times {i} is {i * i}. " for i in range(12))
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
NEW = 8


def tokenizer(template=None):
    """A token is a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template)


def opened(group, name, max_tokens=None):
    session = Session.open(tiny(name, "tree_attention"), tokenizer(), group, block_tokens=BLOCK, max_tokens=max_tokens)
    session.read(TEXT, chunk_tokens=64)
    return session


def ask(session, prompt):
    """The answer as tokens, which decoding could blur; drawn with a seed, so that a slightly wrong cache shows."""
    torch.manual_seed(session.tokens.shape[1])
    list(session.ask(prompt, max_new_tokens=NEW, do_sample=True, temperature=2.0, eos_token_id=None))
    return session.tokens[0, -NEW:].tolist()


def contents(session):
    """What this rank keeps of keys: (slots, numbers) of each layer; of a whole layer its last tokens."""
    ranks, found = session.cache.ranks, []
    for layer in session.cache.layers:
        if isinstance(layer, ShardedLayer):
            slots = ranks.slots(0, layer.length)
            found.append((slots, layer.keys[:, :, : layer.held].clone()))
        elif isinstance(layer, ReplicatedWindowLayer):
            layer.from_ring()
            found.append((None, layer.keys.clone()))
    return found


def test_chat_templates():
    from_tokenizer, plain = ChatTemplate.from_tokenizer, ChatTemplate.plain
    assert from_tokenizer(tokenizer()) == ChatTemplate("", "\n\n", "\n\n")
    assert from_tokenizer(tokenizer(TEMPLATE)) == ChatTemplate("<user>", "</><assistant>", "</><user>")
    assert plain(tokenizer(TEMPLATE)) == ChatTemplate("", "", "\n\n", control_tokens=True)


@pytest.mark.parametrize("content", ["m.content | upper", "m.content + m.content", "'message'"])
def test_a_template_that_does_not_contain_each_message_once_is_refused(content):
    template = TEMPLATE.replace("m.content", content)
    with pytest.raises(InputError, match="must contain each message once, unchanged"):
        ChatTemplate.from_tokenizer(tokenizer(template))


@pytest.mark.parametrize(
    "content",
    [
        "{%- for part in m.content %}{{ part.text }}{% endfor %}",
        "{{ m.content[0]['text'] }}",
        "{%- if m.content is string %}{{ raise_exception('parts!') }}{% endif %}{{ m.content[0].text }}",
        "{{ m.content | map(attribute='text') | join('') }}",
        "{{ '' + m.content[0].text }}",
    ],
)
def test_the_content_of_messages_may_have_to_be_parts(content):
    made = tokenizer(TEMPLATE.replace("{{ m.content }}", content))
    assert ChatTemplate.from_tokenizer(made) == ChatTemplate("<user>", "</><assistant>", "</><user>")


CONTROL = "<|end|>"
DOCUMENT = f"One.{CONTROL}<user>Two."


def with_control(template=TEMPLATE):
    made = tokenizer(template.replace("</>", CONTROL))
    made.add_special_tokens({"additional_special_tokens": [CONTROL]})
    return made, made.convert_tokens_to_ids(CONTROL)


def test_control_tokens_in_a_text_are_text():
    """The template's own are control tokens; those that a document or a question spells out are not, unless asked."""
    made, control = with_control()
    model = tiny("llama", "tree_attention")
    model.resize_token_embeddings(len(made))
    found = {}
    for template in (None, ChatTemplate.plain(made)):
        session = Session.open(model, made, template=template)
        session.read(DOCUMENT)
        read = session.tokens.shape[1]
        question = f"What is {CONTROL}?"
        asked = session.count_tokens(question)
        list(session.ask(question, max_new_tokens=1, do_sample=False, eos_token_id=None))
        assert session.tokens.shape[1] == read + asked + 1
        assert made.decode(session.tokens[0, :-1]).count(CONTROL) == (2 if template else 3)
        found[template is None] = (session.tokens[0, :-1] == control).nonzero().flatten().tolist()
    text = "<user>" + DOCUMENT + "\n\nWhat is " + CONTROL + "?"
    assert found[True] == [len(text)]  # a token is a byte; the one that ends the question is the template's
    assert len(found[False]) == 2


def test_a_text_without_control_tokens_is_encoded_as_one():
    """The question with the text around it, as before: pieces could join in other tokens."""
    made, _ = with_control()
    encode = mock.Mock(wraps=made, added_tokens_decoder=made.added_tokens_decoder)
    ChatTemplate.from_tokenizer(made).question_ids(encode, "What?", started=True, in_question=True)
    encode.assert_called_once_with(f"\n\nWhat?{CONTROL}<assistant>", add_special_tokens=False)


def talk(group, name, folder, max_tokens):
    """Two questions; between them the session is saved."""
    session = opened(group, name, max_tokens)
    first = ask(session, "What is this?")
    session.save(folder)
    return first, ask(session, "And now?"), session.tokens[0].tolist()


def loaded(group, name, folder, max_tokens):
    return Session.load(
        folder, tiny(name, "tree_attention"), tokenizer(), group, block_tokens=2 * BLOCK, max_tokens=max_tokens
    )


def loaded_contents(group, name, folder):
    return contents(loaded(group, name, folder, None))


def taken_up(group, name, folder, max_tokens):
    session = loaded(group, name, folder, max_tokens)
    return ask(session, "And now?"), session.tokens[0].tolist()


def one_folder(tmp_path, name="save"):
    return str(tmp_path / name)


def test_a_save_is_taken_up_on_another_number_of_ranks(pool, tmp_path):
    results = pool.run(talk, "llama", one_folder(tmp_path), None, ranks=2)
    assert results[0] == results[1]
    _, second, tokens = results[0]
    assert len(list(tmp_path.glob("save/*/layer-*-rank-*.safetensors"))) == 2 * 4
    for ranks in (1, 3):
        assert pool.run(taken_up, "llama", one_folder(tmp_path), None, ranks=ranks) == [(second, tokens)] * ranks


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_key_comes_to_its_rank(pool, tmp_path, name):
    pool.run(talk, name, one_folder(tmp_path), None, ranks=3)
    [whole] = pool.run(loaded_contents, name, one_folder(tmp_path), ranks=1)
    for ranks in (2, 3):
        for of_rank in pool.run(loaded_contents, name, one_folder(tmp_path), ranks=ranks):
            for (_, expected), (slots, found) in zip(whole, of_rank, strict=True):
                assert torch.equal(found, expected if slots is None else expected[:, :, slots])


def test_a_session_that_has_read_nothing_is_kept_too(tmp_path):
    model = tiny("llama", "tree_attention")
    Session.open(model, tokenizer()).save(tmp_path)
    session = Session.load(tmp_path, model, tokenizer())
    assert (session.tokens.shape, session.cache.get_seq_length()) == ((1, 0), 0)
    assert len(ask(session, "What?")) == NEW


def test_messages_are_framed():
    """A document and a question are one message; so are two documents, and what follows an answer is the next."""
    session = Session.open(tiny("llama", "tree_attention"), tokenizer(TEMPLATE), None)
    pieces = []

    def note(call, *arguments):
        start = session.tokens.shape[1]
        answer = NEW if call(*arguments) is not None else 0
        pieces.append(session.tokenizer.decode(session.tokens[0, start : session.tokens.shape[1] - answer]))

    note(session.read, "One. ")
    note(session.read, "Two.")
    note(ask, session, "What?")
    note(ask, session, "Who?")
    note(session.read, "Three.")
    note(ask, session, "When?")
    assert pieces == [
        "<user>One. ", "Two.", "\n\nWhat?</><assistant>", "</><user>Who?</><assistant>", "</><user>Three.",
        "\n\nWhen?</><assistant>",
    ]  # fmt: skip


def test_an_answer_ends_with_any_of_the_models_ends():
    """The token itself is not kept: the template ends an answer. Without ends all tokens are."""
    session = Session.open(tiny("llama", "tree_attention"), tokenizer(TEMPLATE), None)
    session.model.generation_config.eos_token_id = list(range(session.model.config.vocab_size))
    list(session.ask("What?"))
    assert session.tokenizer.decode(session.tokens[0]).endswith("What?</><assistant>")
    before = session.tokens.shape[1]
    list(session.ask("", max_new_tokens=1, eos_token_id=None))
    assert session.tokenizer.decode(session.tokens[0, before:-1]) == "</><user></><assistant>"


def test_an_answer_goes_by_a_generation_config():
    session = Session.open(tiny("llama", "tree_attention"), tokenizer(TEMPLATE), None)
    every = list(range(session.model.config.vocab_size))
    list(session.ask("What?", generation_config=GenerationConfig(max_new_tokens=4, eos_token_id=every)))
    assert session.tokenizer.decode(session.tokens[0]) == "<user>What?</><assistant>"
    for how, count in (({}, 4), ({"max_new_tokens": 3}, 3), ({"return_dict_in_generate": True}, 4)):
        before = session.tokens.shape[1] + len("</><user></><assistant>")
        list(session.ask("", generation_config=GenerationConfig(max_new_tokens=4), eos_token_id=None, **how))
        assert session.tokens.shape[1] == before + count
        assert session.cache.get_seq_length() == before + count - 1


def test_nothing_taken_back_changes_nothing():
    session = Session.open(tiny("llama", "tree_attention"), tokenizer(TEMPLATE), None)
    session.read("One.")
    session.rewind(0)
    list(session.ask("What?", max_new_tokens=1, eos_token_id=None))
    assert session.tokenizer.decode(session.tokens[0, :-1]) == "<user>One.\n\nWhat?</><assistant>"


@pytest.mark.slow
def test_linear_attention_is_read_in_chunks():
    session = Session.open(tiny("qwen3_next", "tree_attention"), tokenizer())
    seen = []
    session.read(TEXT, chunk_tokens=100, on_progress=seen.append)
    last = len(TEXT) - 1
    assert seen == [100, 200, last]
    assert session.cache.get_seq_length() == last
    assert ask(session, "What?") == ask(opened(None, "qwen3_next"), "What?")


def talk_in(model, folder, inference):
    """`inference`: in which calls inference mode is on."""
    with torch.inference_mode("read" in inference):
        session = Session.open(model, tokenizer())
        session.read(TEXT)
    with torch.inference_mode("ask" in inference):
        answers = [ask(session, "What?")]
    with torch.inference_mode("load" in inference):
        other = session.fork()
        session.save(folder)
        session = Session.load(folder, model, tokenizer())
    return [*answers, ask(other, "And now?"), ask(session, "And now?")]


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_inference_mode_may_be_on_or_off(tmp_path, name):
    model = tiny(name, "tree_attention")
    expected = talk_in(model, tmp_path, ())
    for inference in (("read",), ("ask",), ("load",), ("read", "ask", "load")):
        assert talk_in(model, tmp_path, inference) == expected


SAMPLED = {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0, "eos_token_id": None}


def stopped_early(group, how):
    """The first rank stops, the others read on; then a question at once."""
    session = opened(group, "llama")
    torch.manual_seed(0)
    answer = session.ask("What is this?", **SAMPLED)
    if group is not None and group.rank() == 0:
        if how == "dropped":
            del answer
        elif how == "closed unread":
            answer.close()
        else:
            next(answer)
        if how == "closed":
            answer.close()
        if "closed" in how:
            assert list(answer) == []
            assert session.tokens.shape[1] == session.cache.get_seq_length() + 1
    else:
        list(answer)
    list(session.ask("And now?", max_new_tokens=NEW, do_sample=False, eos_token_id=None))
    return session.tokens[0].tolist()


@pytest.mark.parametrize("how", ["closed", "left", "dropped", "closed unread"])
def test_who_stops_early_keeps_the_answer(pool, how):
    assert pool.run(stopped_early, how, ranks=2) == [stopped_early(None, how)] * 2


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("call", ["read", "save", "fork", "rewind"])
def test_an_answer_that_was_left_is_ended_first(tmp_path, call, begun):
    session, expected = opened(None, "llama"), opened(None, "llama")
    arguments = {"read": ["More."], "save": [tmp_path], "fork": [], "rewind": [3]}[call]
    torch.manual_seed(0)
    left = session.ask("What?", **SAMPLED)
    if begun:
        next(left)
    getattr(session, call)(*arguments)
    torch.manual_seed(0)
    list(expected.ask("What?", **SAMPLED))
    getattr(expected, call)(*arguments)
    assert torch.equal(session.tokens, expected.tokens)
    assert session.cache.get_seq_length() == expected.cache.get_seq_length()


def test_an_answer_raises_once_what_ended_it():
    """By whichever comes first, its last piece or the session's next call, and then goes on."""
    session = opened(None, "llama")
    before = session.tokens
    answer = session.ask("What?", temprature=1.0)
    with pytest.raises(ValueError, match="temprature"):
        session.rewind(0)
    assert list(answer) == []
    with pytest.raises(ValueError, match="temprature"):
        list(session.ask("What?", temprature=1.0))
    session.rewind(0)
    assert torch.equal(session.tokens, before)


def test_an_older_answer_does_not_wait_for_a_newer_one():
    session = opened(None, "llama")
    older = session.ask("What?", **SAMPLED)
    newer = session.ask("Who?", **SAMPLED)
    before = session.tokens.shape[1]
    list(older)
    older.close()
    assert session.tokens.shape[1] == before
    newer.close()
    assert session.tokens.shape[1] == before + len("\n\nWho?\n\n") + SAMPLED["max_new_tokens"]


def test_an_iterator_that_its_own_writer_collects_waits_for_nobody():
    """Python's garbage collection runs in whatever thread is at hand."""
    session = opened(None, "llama")
    answers, asked = [], threading.Event()

    def close(*_):
        assert asked.wait(60)
        if answers:
            assert threading.current_thread() is not threading.main_thread()
            answers.pop().close()

    hook = session.model.register_forward_pre_hook(close)
    answers.append(session.ask("What?", **SAMPLED))
    asked.set()
    session.read("More.")
    hook.remove()
    assert not answers
    assert session.tokenizer.decode(session.tokens[0]).endswith("More.")


class Stop(Exception):
    pass


def fails_at(model, forward):
    """In the third layer, in the forward pass of that number."""
    calls = []

    def fail(*_):
        calls.append(0)
        if len(calls) == forward:
            raise Stop

    return model.base_model.layers[2].register_forward_pre_hook(fail)


def stop(*_):
    raise Stop


FAILURES = [
    (lambda session: list(session.ask("x" * 40, temprature=1.0)), None),
    (lambda session: list(session.ask("x" * 40, num_beams=2)), None),
    (lambda session: list(session.ask("x" * 40, num_return_sequences=2, do_sample=True)), None),
    (lambda session: list(session.ask("x" * 40, max_new_tokens=0)), None),
    (lambda session: list(session.ask("x" * 40, max_new_tokens=NEW)), 1),
    (lambda session: list(session.ask("x" * 40, max_new_tokens=NEW)), 6),
    (lambda session: session.read("x" * 40, chunk_tokens=0), None),
    (lambda session: session.read("x" * 40, chunk_tokens=16, on_progress=stop), None),
    (lambda session: session.read("x" * 40, chunk_tokens=16), 2),
]


def failing(group, name, max_tokens, failures):
    """After each failure the session is as before."""
    session = opened(group, name, max_tokens)
    ask(session, "What is this?")
    session.read("Once more.")
    for call, forward in failures:
        before, held = session.tokens, contents(session)
        hook = None if forward is None else fails_at(session.model, forward)
        with pytest.raises((Stop, ValueError)):
            call(session)
        if hook is not None:
            hook.remove()
        assert torch.equal(session.tokens, before)
        for (slots, keys), (now, found) in zip(held, contents(session), strict=True):
            assert slots is None or torch.equal(slots, now)
            assert torch.equal(keys, found)
    return ask(session, "And now?")


STATEFUL = pytest.param("qwen3_next", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["llama", "gemma2", STATEFUL])
def test_what_fails_is_undone(name):
    assert failing(None, name, None, FAILURES) == failing(None, name, None, [])


def failing_on_ranks(group, name):
    return failing(group, name, 400, FAILURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "qwen3_next"])
def test_what_fails_on_all_ranks_is_undone(pool, name):
    """In a static cache, whose decode steps come after it."""
    assert pool.run(failing_on_ranks, name, ranks=2) == [failing(None, name, None, [])] * 2


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [None, 400])
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "qwen3_next"])
def test_saves_of_other_layers(pool, tmp_path, name, max_tokens):
    alone = talk(None, name, one_folder(tmp_path, "alone"), None)
    results = pool.run(talk, name, one_folder(tmp_path), max_tokens, ranks=3)
    assert results == [alone] * 3
    for folder in ("save", "alone"):
        for ranks in (1, 2, 4):
            found = pool.run(taken_up, name, one_folder(tmp_path, folder), max_tokens, ranks=ranks)
            assert found == [alone[1:]] * ranks


def briefly_asked(group, name):
    """A first question shorter than a block, and an answer that ends within it; then one that goes on."""
    session = Session.open(tiny(name, "tree_attention"), tokenizer(), group, block_tokens=16)
    list(session.ask("W", max_new_tokens=2, do_sample=False, eos_token_id=None))
    session.read("")
    return session.tokens[0].tolist(), ask(session, "What is this?")


@pytest.mark.parametrize("name", ["llama", "gemma2", STATEFUL])
def test_ranks_may_have_no_tokens(pool, name):
    assert pool.run(briefly_asked, name, ranks=3) == [briefly_asked(None, name)] * 3


def branches(group):
    """A fork, the original, and the original taken back, each asked the same."""
    session = opened(group, "llama")
    ask(session, "What is this?")
    length = session.tokens.shape[1]
    other = session.fork()
    answers = [ask(other, "And now?"), ask(session, "And now?")]
    session.rewind(session.tokens.shape[1] - length)
    answers.append(ask(session, "And now?"))
    session.rewind(session.tokens.shape[1])
    session.read(TEXT)
    again = ask(session, "What is this?")
    return answers, again, other.tokens[0].tolist(), session.tokens[0, :length].tolist()


def test_forks_and_steps_back(pool):
    results = pool.run(branches, ranks=2)
    assert results[0] == results[1]
    (fork, original, back), again, tokens, start = results[0]
    assert fork == original == back
    assert tokens[: len(start)] == start
    assert again == start[-NEW:]


def refusals(group, folder):
    """Texts of what cannot be done; and that the session goes on."""
    session = opened(group, "gemma2")
    texts, before = [], session.tokens.shape[1]
    for call in (
        lambda: session.rewind(9),
        lambda: session.rewind(10**6),
        lambda: session.rewind(-1),
        lambda: Session.load(folder, session.model, session.tokenizer, group),
        lambda: Session.load(Path(folder) / "absent", session.model, session.tokenizer, group),
    ):
        try:
            call()
        except (InputError, Unsupported) as error:
            texts.append(str(error).replace(folder, "FOLDER"))
    small = Session.open(session.model, session.tokenizer, group, max_tokens=100)
    small.read("x" * 60)
    try:
        small.ask("y", max_new_tokens=60)  # refused by the call, not by the first piece
    except InputError as error:
        texts.append(str(error))
    assert session.tokens.shape[1] == before
    return texts, len(ask(session, "And now?"))


def test_refusals(pool, tmp_path):
    pool.run(talk, "llama", one_folder(tmp_path), None, ranks=1)
    results = pool.run(refusals, one_folder(tmp_path), ranks=2)
    assert results[0] == results[1]
    texts, written = results[0]
    assert written == NEW
    assert texts[0] == "ReplicatedWindowLayer cannot forget tokens: load a save, or read again"
    assert texts[1].startswith("rewind takes 0 to ")
    assert texts[2].startswith("rewind takes 0 to ")
    assert texts[3].startswith("the save in FOLDER is of another model: model_type llama, not gemma2; weights ")
    assert texts[4] == "FOLDER/absent holds no save: there is no current.json"
    assert texts[5].startswith("this TreeCache has room for 100 tokens over all ranks, 124 are needed: ")


def loads(group, folder):
    try:
        return taken_up(group, "llama", folder, None)[0]
    except (InputError, TreeAttentionError) as error:
        return str(error).replace(folder, "FOLDER")


def loads_where_it_is_not(group, folder):
    return loads(group, folder if group.rank() == 0 else folder + "/elsewhere")


def test_a_folder_that_one_rank_does_not_see_is_refused_on_all(pool, tmp_path):
    pool.run(talk, "llama", one_folder(tmp_path), None, ranks=1)
    found = pool.run(loads_where_it_is_not, one_folder(tmp_path), ranks=2)
    assert found == [f"FOLDER{place} holds no save: there is no current.json" for place in ("/elsewhere", "")]


def loads_over_other_weights(group, folder):
    model = tiny("llama", "tree_attention")
    if group.rank() == 1:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
    try:
        Session.load(folder, model, tokenizer(), group)
    except InputError as error:
        return str(error).replace(folder, "FOLDER")


def test_what_one_rank_finds_wrong_is_refused_on_all(pool, tmp_path):
    pool.run(talk, "llama", one_folder(tmp_path), None, ranks=1)
    said, other = pool.run(loads_over_other_weights, one_folder(tmp_path), ranks=2)
    assert said == other
    assert said.startswith("the save in FOLDER is of another model: weights ")


def loads_with_little_memory(group, folder):
    error = torch.OutOfMemoryError("CUDA out of memory")
    with mock.patch.object(saving, "_fill", side_effect=error) if group.rank() == 1 else contextlib.nullcontext():
        return loads(group, folder)


def test_memory_that_one_rank_lacks_is_said_on_all(pool, tmp_path):
    pool.run(talk, "llama", one_folder(tmp_path), None, ranks=1)
    found = pool.run(loads_with_little_memory, one_folder(tmp_path), ranks=2)
    assert found == ["rank 1: OutOfMemoryError: CUDA out of memory"] * 2


def loads_split_where_it_is_not(group, name, folder):
    """The model over two ranks, the sequence over two; the last rank sees another folder."""
    model = load_tensor_parallel(name, init_device_mesh("cpu", (2, 2), mesh_dim_names=AXES))
    session = Session.open(model, tokenizer())
    session.read(TEXT)
    session.save(folder)
    try:
        Session.load(folder if group.rank() < 3 else folder + "/elsewhere", model, tokenizer())
    except InputError as error:
        return str(error).replace(folder, "FOLDER")


def test_ranks_of_both_axes_refuse_a_folder_together(pool, tmp_path):
    tiny("llama", "eager").save_pretrained(tmp_path / "model")
    found = pool.run(loads_split_where_it_is_not, str(tmp_path / "model"), one_folder(tmp_path))
    assert found == ["FOLDER/elsewhere holds no save: there is no current.json"] * 4


def rotated(model):
    """The same weights, other angles."""
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = 500000.0
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def tuned(model):
    """Other weights, but for the first numbers of each."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.view(-1)[8:] *= 0.5
    return other


def in_16_bits(model):
    return copy.deepcopy(model).bfloat16()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (rotated, r"rope_parameters \{.*10000.0.*\}, not \{.*500000.0.*\}$"),
        (tuned, r"weights \w+, not \w+$"),
        (in_16_bits, r"dtype float32, not bfloat16; weights \w+, not \w+$"),
    ],
)
def test_a_save_of_another_model_is_refused(tmp_path, change, difference):
    """The message says what is different, and nothing else."""
    model = tiny("llama", "tree_attention")
    Session.open(model, tokenizer()).save(tmp_path)
    with pytest.raises(InputError, match=f"is of another model: {difference}"):
        Session.load(tmp_path, change(model), tokenizer())


class Quantized(torch.nn.Module):
    """A product whose weights lie in buffers, as GPTQ's and AWQ's do, with an adapter beside it, as PEFT's LoRA."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("qweight", weight.detach().clone())
        self.register_buffer("inv_freq", torch.ones(4))
        self.down, self.up = (torch.nn.ParameterDict({name: torch.ones(1) for name in ("a", "b")}) for _ in range(2))
        self.scaling, self.active_adapters, self.disable_adapters = {"a": 0.5, "b": 0.5}, ["a"], False

    def forward(self, x):
        return x @ self.qweight.T


def quantized(model):
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.self_attn.k_proj = Quantized(layer.self_attn.k_proj.weight)
    return other


def change_each(**changes):
    """A function that returns a changed copy of the model."""

    def change(model):
        other = copy.deepcopy(model)
        for layer in other.model.layers:
            for name, value in changes.items():
                setattr(layer.self_attn.k_proj, name, value(getattr(layer.self_attn.k_proj, name)))
        return other

    return change


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (change_each(qweight=lambda weight: weight * 1.5), r"buffers \w+, not \w+$"),
        (change_each(active_adapters=lambda _: ["b"]), r"adapters \['a'\], not \['b'\]; adapter_layers \w+, not \w+$"),
        (change_each(active_adapters=lambda _: ["a", "b"]), r"adapters \['a'\], not \['a', 'b'\]; adapter_layers"),
        (change_each(disable_adapters=lambda _: True), r"adapters \['a'\], not \[\]; adapter_layers \w+, not \w+$"),
        (change_each(scaling=lambda _: {"a": 2.0, "b": 0.5}), r"adapter_layers \w+, not \w+$"),
        (change_each(inv_freq=lambda old: old * 2), None),
        (change_each(scaling=lambda _: {"a": 0.5, "b": 7.0}), None),  # not active
    ],
)
def test_a_save_under_other_buffers_or_adapters_is_refused(tmp_path, change, difference):
    model = quantized(tiny("llama", "tree_attention"))
    Session.open(model, tokenizer()).save(tmp_path)
    refused = contextlib.nullcontext()
    if difference is not None:
        refused = pytest.raises(InputError, match=f"is of another model: {difference}")
    with refused:
        Session.load(tmp_path, change(model), tokenizer())


class InParts(torch.Tensor):
    """A weight as torchao keeps it: numbers and a scale, without `flatten`."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].numbers, arguments[0].scale)
        raise NotImplementedError(function)


def test_a_weight_in_parts_is_compared_by_all_of_them():
    digests = []
    for numbers, scale in ((1, 1.0), (2, 1.0), (1, 2.0), (1, 1.0)):
        model = tiny("llama", "tree_attention")
        weight = InParts(torch.full((32, 64), numbers, dtype=torch.int8), torch.full((32, 1), scale))
        model.model.layers[1].self_attn.k_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        digests.append(saving.describe(model)["weights"])
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


def test_a_save_of_an_older_version_is_loaded(tmp_path):
    """It does not say of buffers and adapters."""
    model = tiny("llama", "tree_attention")
    Session.open(model, tokenizer()).save(tmp_path)
    document = json.loads((tmp_path / save_folder.CURRENT).read_text())
    for name in ("buffers", "adapters", "adapter_layers"):
        del document["manifest"]["about"]["model"][name]
    document["sha256"] = save_folder._digest(save_folder._as_json(document["manifest"]))
    (tmp_path / save_folder.CURRENT).write_text(json.dumps(document))
    Session.load(tmp_path, model, tokenizer())


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_next"])
def test_a_model_from_a_folder_is_the_same_model(tmp_path, name):
    model = tiny(name, "tree_attention")
    Session.open(model, tokenizer()).save(tmp_path / "save")
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="tree_attention")
    Session.load(tmp_path / "save", again, tokenizer())


DAMAGE = {
    "a byte": (r"layer-2-rank-1.safetensors is cut off or was changed since it was written", "shard"),
    "cut off": (r"layer-2-rank-1.safetensors is cut off or was changed since it was written", "shard"),
    "gone": (r"No such file or directory", "shard"),
    "manifest": (r"current.json was changed since it was written", "manifest"),
    "cut manifest": (r"current.json is damaged", "manifest"),
    "version": (r"is of version 1, this library reads 2", "manifest"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_found_on_every_rank(pool, tmp_path, how):
    pool.run(talk, "llama", one_folder(tmp_path), None, ranks=2)
    [shard] = tmp_path.glob("save/*/layer-2-rank-1.safetensors")
    manifest = tmp_path / "save" / "current.json"
    match how:
        case "a byte":
            data = bytearray(shard.read_bytes())
            data[-5] ^= 1
            shard.write_bytes(data)
        case "cut off":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "gone":
            shard.unlink()
        case "manifest":
            manifest.write_text(manifest.read_text().replace('"block": 4', '"block": 8'))
        case "cut manifest":
            manifest.write_text(manifest.read_text()[:-3])
        case "version":
            document = json.loads(manifest.read_text())
            document["manifest"]["version"] = 1
            document["sha256"] = save_folder._digest(save_folder._as_json(document["manifest"]))
            manifest.write_text(json.dumps(document))
    for said in pool.run(loads, one_folder(tmp_path), ranks=2):
        assert DAMAGE[how][0] in said


def test_a_save_deletes_nothing_but_saves(tmp_path):
    """What the user keeps in the folder stays, in a sub-folder that is named like ours too; a killed save goes."""
    session = Session.open(tiny("llama", "tree_attention"), tokenizer())
    session.save(tmp_path)
    [old] = tmp_path.glob("*/")
    kept = ["photos/a.jpg", "notes.txt", f"{'a' * 32}/layer-0.txt", f"{'b' * 32}/inner/layer-0.safetensors"]
    for name in [*kept, f"{'c' * 32}/layer-3-rank-1-tensor-0.safetensors", f"{'d' * 32}/layer-12.safetensors"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ("e" * 32)).symlink_to(tmp_path / "photos")
    session.save(tmp_path)
    assert all((tmp_path / name).exists() for name in kept)
    [new] = {path.name for path in tmp_path.iterdir()} - {
        "photos", "notes.txt", "a" * 32, "b" * 32, "e" * 32, save_folder.CURRENT, save_folder.LOCK,
    }  # fmt: skip
    assert new != old.name
    assert Session.load(tmp_path, session.model, session.tokenizer).tokens.shape == (1, 0)


def full_disk(group, folder, error):
    """The second save fails on the last rank, half way."""
    session = opened(group, "llama")
    session.save(folder)
    written = []
    write = saving.write_file

    def fails(file, data):
        written.append(file)
        if group.rank() == 1 and len(written) == 3:
            raise error
        return write(file, data)

    with mock.patch.object(saving, "write_file", fails):
        try:
            session.save(folder)
        except TreeAttentionError as raised:
            return str(raised).replace(folder, "FOLDER"), ask(session, "And now?")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, os.strerror(28)), "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_full_disk_or_memory_costs_nothing(pool, tmp_path, error, reason):
    """The last save stays, the half one is gone, every rank says so and goes on."""
    (said, answer), other = pool.run(full_disk, one_folder(tmp_path), error, ranks=2)
    assert (said, answer) == other
    assert said == f"not saved, rank 1 cannot write to FOLDER: {reason}; a save that was there before is as it was"
    assert len([path for path in (tmp_path / "save").iterdir() if path.is_dir()]) == 1
    assert pool.run(loads, one_folder(tmp_path), ranks=3) == [answer] * 3


def interrupted_at_the_manifest(group, folder):
    session = opened(group, "llama")
    session.save(folder)
    ask(session, "What is this?")
    with mock.patch.object(Path, "replace", side_effect=OSError(5, os.strerror(5))):
        try:
            session.save(folder)
        except TreeAttentionError as error:
            return str(error).replace(folder, "FOLDER")


def test_the_manifest_is_replaced_or_not(pool, tmp_path):
    expected = "not saved, rank 0 cannot write to FOLDER: Input/output error; a save that was there before is as it was"
    assert pool.run(interrupted_at_the_manifest, one_folder(tmp_path), ranks=2) == [expected] * 2
    assert isinstance(loads(None, one_folder(tmp_path)), list)


def save_for_ever(folder):
    session = opened(None, "llama")
    while True:
        session.save(folder)


@pytest.mark.slow
def test_kill_9_in_the_middle_leaves_a_save(tmp_path):
    """Killed at 12 moments; whatever was being written, the folder holds a whole save."""
    expected, forked = None, multiprocessing.get_context("forkserver")
    for moment in range(12):
        process = forked.Process(target=save_for_ever, args=(one_folder(tmp_path),))
        process.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "save" / "current.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.003 + 0.007 * moment)
        process.kill()
        process.join()
        found = loads(None, one_folder(tmp_path))
        expected = expected or found
        assert found == expected
        assert isinstance(found, list)
        if moment % 3 == 2:
            shutil.rmtree(tmp_path / "save")


def without_position_ids(group, static):
    """A decoder that counts positions from the cache's length: every rank reads all tokens, in chunks."""
    model, ids = decoder_of_bart("tree_attention"), torch.arange(100) % 90 + 3
    session = Session.open(model, tokenizer(), group, block_tokens=BLOCK, max_tokens=140 if static else None)
    with mock.patch("tree_attention.hf.session.STATE_CHUNK_TOKENS", 32):
        session.read(ids)
    list(session.ask("Why?", max_new_tokens=8, do_sample=False, eos_token_id=None, forced_eos_token_id=None))
    return session.tokens[0].tolist()


def decoder_of_bart(implementation):
    config = AutoConfig.for_model(
        "bart", vocab_size=256, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32,
        is_decoder=True, is_encoder_decoder=False, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(10)
    return model


def test_a_model_without_position_ids_is_read_too(pool):
    for static in (False, True):
        written, again = pool.run(without_position_ids, static, ranks=2)
        assert written == again
        ids = torch.tensor([written])[:, :-8]
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
        assert decoder_of_bart("eager").generate(ids, **how)[0].tolist() == written
