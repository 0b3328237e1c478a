"""The commands in README and the pages are real, and README's and the guides' run in the order in which they stand."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from command import call, run, run_as_ranks
from test_docs import DOCS, ROOT, as_file
from tree_attention.cli.app import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS]
PLANNING = ROOT / "docs" / "planning.md"
OURS = "tree-attention"


def commands(page):
    """The words after `tree-attention` of each command in the blocks of a page, in order."""
    blocks = re.findall(r"^(```+)(\w*)\n(.*?)^\1$", page.read_text(encoding="utf-8"), re.S | re.M)
    shown = [block for _, language, block in blocks if language in ("", "bash", "console")]
    lines = [re.sub(r"(\\|\|)\n\s*", r"\1 ", block).replace("\\ ", "") for block in shown]
    found = re.findall(rf"^(?:\$ )?(?:printf .*\| *|torchrun .* )?{OURS} (\w.*)", "\n".join(lines), re.M)
    return [shlex.split(words, comments=True) for words in found]


def parse(words):
    """Raise UsageError of click unless the command takes these options."""
    command, context = typer.main.get_command(app), None
    while hasattr(command, "commands"):
        context = command.context_class(command, parent=context)
        name, command, words = command.resolve_command(context, words)
    command.make_context(name, [*words], parent=context).close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_real(page):
    for words in commands(page):
        parse(words)


def test_a_command_that_is_not_real_is_found():
    assert sum(len(commands(page)) for page in PAGES) >= 15
    with pytest.raises(Exception, match="No such option: --modell"):
        parse(["generate", "--modell", "x"])


def test_recorded_plans_are_what_plan_prints(capfd, monkeypatch):
    recorded = re.findall(rf"^```\n\$ {OURS} (plan .*?)\n(.*?)^```", PLANNING.read_text("utf-8"), re.S | re.M)
    assert len(recorded) == 3
    for words, text in recorded:
        code, out, err = call(capfd, monkeypatch, *shlex.split(words))
        assert (code, err) == (0, "")
        assert [line.rstrip() for line in out.splitlines()] == text.splitlines()


@pytest.mark.slow
def test_readmes_commands_run_one_after_the_other(folder, monkeypatch):
    """With a small model in place of the demo's."""
    monkeypatch.chdir(ROOT)
    found = commands(ROOT / "README.md")
    assert [words[0] for words in found] == ["generate", "chat", "plan", "info", "verify"]
    for words in found:
        ended = run(*(str(folder) if word == "$model" else word for word in words), lines="What is this?\n")
        assert ended.returncode == 0, (words, ended.stderr)
        assert ended.stdout + ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", ["scaling", "tensor-parallelism"])
def test_programs_of_the_pages_run(page, folder, tmp_path):
    text = Path(ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
    if page == "scaling":
        assert run_as_ranks(as_file(program, tmp_path)) == "((0, 1),)\n"
        return
    started = """
import torch
import torch.distributed as dist
from transformers import BatchEncoding
from tree_attention.hf import TreeCache, prefill

dist.init_process_group("gloo")
inputs = BatchEncoding({"input_ids": torch.arange(3, 43)[None]})
"""
    for written, here in (('"cuda", (2, 4)', '"cpu", (2, 2)'), ("(name,", f"({str(folder)!r},")):
        assert written in program
        program = program.replace(written, here)
    program = f"{started}{program}\nprint(out.shape[1] > 40)\ndist.destroy_process_group()\n"
    assert run_as_ranks(as_file(program, tmp_path), ranks=4) == "True\n" * 4
