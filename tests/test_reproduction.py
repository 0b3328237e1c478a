"""What docs/reproduction.md rests on is what the code computes, and says of each figure where it comes from."""

import json
from pathlib import Path

import pytest

import reproduction

COMMITTED = Path(reproduction.__file__).parent / "results" / "reproduction.jsonl"


@pytest.mark.slow
def test_the_committed_records_are_what_the_code_computes(tmp_path):
    reproduction.main(["--docs", str(tmp_path), "--records", str(tmp_path / "records.jsonl"), "--samples", "2"])
    found, committed = (read(path) for path in (tmp_path / "records.jsonl", COMMITTED))
    for section in ("figure 3", "exchange", "fit", "volume"):
        assert len(found[section]) == len(committed[section])
        for row, known in zip(found[section], committed[section], strict=True):
            assert row.keys() == known.keys()
            for name, value in row.items():
                assert value == (known[name] if isinstance(value, str) else pytest.approx(known[name], rel=1e-3)), (
                    section
                )
    assert (tmp_path / "figures" / "figure3.svg").exists()
    assert "Nothing measured yet" in (tmp_path / "reproduction.md").read_text()


def read(path):
    sections = {}
    for row in map(json.loads, path.read_text().splitlines()):
        sections.setdefault(row.pop("section"), []).append(row)
    return sections


def test_every_point_says_where_it_comes_from_and_formulas_hold():
    committed = read(COMMITTED)
    assert {row["how"] for row in committed["figure 3"]} == {"simulated", "measured"}
    assert {row["gpus"] for row in committed["figure 3"] if row["how"] == "measured"} == {2}
    measured = {row["graph_s"] for row in map(json.loads, reproduction.MEASURED.read_text().splitlines())}
    assert {row["seconds"] for row in committed["figure 3"] if row["how"] == "measured"} <= measured
    for row in committed["volume"]:
        assert row["elements"] == pytest.approx(row["formula"], rel=1e-12)
