"""The model that scripts/smollm2.py makes: its weights, its tokenizer, and that only a whole folder counts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tree_attention.hf import Session

SCRIPT = Path(__file__).parents[1] / "scripts" / "smollm2.py"


def load_script():
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


smollm2 = load_script()


@pytest.fixture(scope="module")
def folder():
    return smollm2.fetch()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.model
def test_knows_the_capital_of_france(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer).startswith(" Paris")


def talk(group, folder, static, save):
    """40 tokens about a page of the language reference; the session is saved after 20."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="tree_attention")
    session = Session.open(model.eval(), tokenizer, group, max_tokens=1000 if static else None)
    session.read(smollm2.topics["assert"])
    list(session.ask("What is this about?", max_new_tokens=20, do_sample=False, eos_token_id=None))
    if save:
        session.save(save)
    list(session.ask("Go on.", max_new_tokens=20, do_sample=False, eos_token_id=None))
    return session.tokens[0].tolist()


def go_on(group, folder, save):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="tree_attention")
    session = Session.load(save, model.eval(), tokenizer, group)
    list(session.ask("Go on.", max_new_tokens=10, do_sample=False, eos_token_id=None))
    return session.tokens[0].tolist()


@pytest.mark.model
def test_static_is_dynamic_is_one_process_and_a_save_goes_on(pool, folder, tmp_path):
    expected = talk(None, folder, False, None)
    assert pool.run(talk, folder, False, None, ranks=2) == [expected] * 2
    assert pool.run(talk, folder, True, str(tmp_path / "save"), ranks=2) == [expected] * 2
    assert pool.run(go_on, folder, str(tmp_path / "save"), ranks=3) == [expected[:-10]] * 3


@pytest.mark.model
def test_rotary_frequencies_are_of_base_100000(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = 1e5 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.model
@pytest.mark.parametrize("text", ["In 1818, 3.14 x 10", "a\n\n\tb\r\n  c ", "naïve “Straße” … 5 € 日本語 Ω 🙂"])
def test_tokenizer_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.model
def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234").input_ids) == ["1", "2", "3", "4"]


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(path, folder):
        write(folder, ["config.json"])
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_download", lambda scratch: scratch)
    monkeypatch.setattr(smollm2, "_convert", interrupted)
    for _ in range(2):  # the second call must not take the first one's remains for the model
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch(tmp_path)
        assert not list(tmp_path.iterdir())


def test_the_first_of_two_fetches_at_once_stays(monkeypatch, tmp_path):
    def overtaken(path, folder):
        write(tmp_path / smollm2.FOLDER, smollm2.FILES, "first")
        write(folder, smollm2.FILES, "second")

    monkeypatch.setattr(smollm2, "_download", lambda scratch: scratch)
    monkeypatch.setattr(smollm2, "_convert", overtaken)
    assert smollm2.fetch(tmp_path) == tmp_path / smollm2.FOLDER
    assert {file.read_text() for file in (tmp_path / smollm2.FOLDER).iterdir()} == {"first"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_lacks_a_file_is_refused(tmp_path):
    write(tmp_path / smollm2.FOLDER, smollm2.FILES[:1])
    with pytest.raises(FileNotFoundError, match=r"lacks .*model\.safetensors"):
        smollm2.fetch(tmp_path)


def write(folder, names, content=""):
    folder.mkdir()
    for name in names:
        (folder / name).write_text(content)
