"""What the sweep found, as the table of docs/models.md and as the sets that the library carries."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
CARRIED = ROOT / "src" / "tree_attention" / "hf" / "model_types.py"
MARKS = "<!-- sweep -->\n", "<!-- end of sweep -->\n"
# A part of the message, and what the table says.
REASONS = {
    "a state along the sequence": "exact, but `prefill` refuses: linear attention or convolution",
    "attn_temperature_tuning": "exact, but `prefill` refuses: positions counted from the cache's length",
    "computes with the cache's length": "exact, but `prefill` refuses: positions counted from the cache's length",
    "needs position_ids": "exact, but `prefill` refuses: no position ids",
    "computes attention itself": "refused: attention that transformers does not dispatch",
    "has layers of the kind": "refused: selected or compressed keys",
    "has a cache of its own": "refused: a cache of its own (`generate` without one runs as stock)",
    "looks at its attention mask": "refused: looks at its mask",
    "adds a bias to its scores": "refused: adds a bias to its scores",
    "keeps its state in its layers": "refused: keeps its state in its layers",
}
ORDER = ["exact", *dict.fromkeys(REASONS.values()), "not tried: needs more than text, or has no small form"]


def write(files: list[Path]) -> None:
    lines = _lines(files)
    PAGE.write_text(_with_table(PAGE.read_text(encoding="utf-8"), table(lines)), encoding="utf-8")
    CARRIED.write_text(carried(lines), encoding="utf-8")


def table(lines: list[dict[str, Any]]) -> str:
    rows: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        rows[_result(line)].append(line["model_type"])
    counted = [f"| {row} | {len(rows[row])} | {', '.join(sorted(rows[row]))} |" for row in ORDER if rows[row]]
    return "\n".join(["| result | | model types |", "|---|---|---|", *counted]) + "\n"


def carried(lines: list[dict[str, Any]]) -> str:
    """The source of model_types.py."""
    known = {line["text"] for line in lines if line["verdict"] in ("exact", "no prefill", "refused")}
    words, text = sorted(known), ""
    for word in words:
        last = text.rpartition("\n")[2]
        text += f"\n    {word}" if not text or len(f"{last} {word}") > 116 else f" {word}"
    return (
        '"""The model types that benchmarks/sweep.py has compared with stock attention; it writes this file."""\n\n'
        f'_TYPES = """{text}\n"""\nKNOWN = frozenset(_TYPES.split())\n'
    )


def _result(line: dict[str, Any]) -> str:
    if line["verdict"] in ("exact", "FAIL"):
        return line["verdict"]
    if line["verdict"] == "stock":
        return ORDER[-1]
    return next(says for part, says in REASONS.items() if part in line["why"])


def _lines(files: list[Path]) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for file in files for line in file.read_text().splitlines() if line.startswith("{")]
    return list({line["model_type"]: line for line in parsed if "model_type" in line}.values())


def _with_table(page: str, rows: str) -> str:
    start, stop = MARKS
    return re.sub(f"{re.escape(start)}.*?{re.escape(stop)}", lambda _: f"{start}\n{rows}\n{stop}", page, flags=re.S)
