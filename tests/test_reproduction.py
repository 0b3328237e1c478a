"""What docs/reproduction.md rests on is what the code computes, and says of each figure where it comes from."""

import copy
import json
from pathlib import Path

import pytest

import reproduction
import reproduction_ranks
from reproduction_claims import CONFIRMED, CORRECTED, NOT, UNTESTED, claims
from reproduction_page import page
from reproduction_simulated import MEASURED

COMMITTED = Path(reproduction.__file__).parent / "results" / "reproduction.jsonl"
PAGE = Path(reproduction.__file__).parents[1] / "docs" / "reproduction.md"
COMPUTED = ("figure 3", "exchange", "fit", "volume", "traffic", "overlap", "hosts", "end to end", "whole model")


@pytest.mark.slow
def test_the_committed_records_are_what_the_code_computes(tmp_path, monkeypatch):
    """But for bytes on the wire, which take long and need root: without them the page has gaps."""
    monkeypatch.setattr(reproduction_ranks, "wire", list)
    options = {"--docs": tmp_path, "--records": tmp_path / "records.jsonl", "--samples": 2, "--memory-keys": 16_000}
    reproduction.main([str(word) for option in options.items() for word in option])
    found, committed = read(tmp_path / "records.jsonl"), read(COMMITTED)
    for section in COMPUTED:
        assert len(found[section]) == len(committed[section])
        for row, known in zip(found[section], committed[section], strict=True):
            assert row.keys() == known.keys()
            for name, value in row.items():
                plain = isinstance(value, str | dict)
                assert value == (known[name] if plain else pytest.approx(known[name], rel=1e-3)), section
    for row, known in zip(found["memory"], committed["memory"], strict=True):  # of fewer keys
        assert row["extra_bytes"] / row["kv_bytes"] == pytest.approx(known["extra_bytes"] / known["kv_bytes"], abs=0.01)
    assert (tmp_path / "figures" / "figure3.svg").exists()
    assert "(not counted) times its formula" in (tmp_path / "reproduction.md").read_text()


def read(path):
    sections = {"gpu peak": [], "wire": []}
    for row in map(json.loads, path.read_text().splitlines()):
        sections.setdefault(row.pop("section"), []).append(row)
    return sections


def test_the_committed_page_is_that_of_the_committed_records():
    assert page(read(COMMITTED)) + "\n" == PAGE.read_text()


def test_every_point_says_where_it_comes_from_and_formulas_hold():
    committed = read(COMMITTED)
    assert {row["how"] for row in committed["figure 3"]} == {"simulated", "measured"}
    assert {row["gpus"] for row in committed["figure 3"] if row["how"] == "measured"} == {2}
    measured = {row["graph_s"] for row in map(json.loads, MEASURED.read_text().splitlines())}
    assert {row["seconds"] for row in committed["figure 3"] if row["how"] == "measured"} <= measured
    for row in committed["volume"]:
        assert row["elements"] == pytest.approx(row["formula"], rel=1e-12)
    for row in committed["traffic"]:
        assert row["handed_bytes"] == pytest.approx(row["handed_formula_bytes"], rel=1e-12)
        assert row["moved_bytes"] == pytest.approx(row["simulated_bytes"], rel=1e-12)


def spoilt(section, where, **changes):
    """The committed figures, with those rows of a section changed."""
    found = copy.deepcopy(read(COMMITTED))
    for row in found[section]:
        if all(row.get(name) == value for name, value in where.items()):
            row.update(changes)
    return found


@pytest.mark.parametrize(
    ("section", "where", "changes", "claim", "verdict"),
    [
        ("error", {"what": "tree"}, {"error": 0.1}, "exact attention", NOT),
        ("error", {"what": "ring"}, {"same_bits": False}, "exact attention", NOT),
        ("algebra", {}, {"energy_error": 1e-3}, "gradient of an energy", NOT),
        ("algebra", {}, {"tree_error": 1e-3}, "associative", NOT),
        ("fit", {"what": "tree"}, {"worst_residual": 0.3}, "Theorem 1", NOT),
        ("traffic", {"what": "all_gather"}, {"calls": {"allgather_base": 2}}, "three all-reduces", NOT),
        ("traffic", {"what": "ring"}, {"handed_bytes": 5.0}, "equations 10 to 14", NOT),
        ("wire", {"what": "ring"}, {"wire_bytes": 5.0}, "equations 10 to 14", NOT),
        ("memory", {"what": "ring"}, {"extra_bytes": 7}, "equations 8 and 9", NOT),
        ("memory", {"what": "ring"}, {"extra_bytes": 7}, "half the peak", NOT),
        ("memory", {"what": "ring"}, {"extra_bytes": 7}, "figure 4", NOT),
        ("ratio", {}, {"ring": 8.0, "all_reduce": 1.0}, "close to 8 x", CONFIRMED),
        ("figure 3", {"what": "ring", "gpus": 128}, {"seconds": 1e-6}, "faster than a ring", NOT),
        ("overlap", {}, {"read_s": 1e-5}, "6.3", NOT),
        ("end to end", {"tokens": 32768}, {"paper_ring_s": 0.6}, "grows with the length", NOT),
    ],
)
def test_figures_decide_the_verdicts(section, where, changes, claim, verdict):
    (found,) = [its for text, its, _ in claims(spoilt(section, where, **changes)) if claim in text]
    assert found == verdict


def test_the_verdicts():
    verdicts = [verdict for _, verdict, _ in claims(read(COMMITTED))]
    assert {name: verdicts.count(name) for name in (CONFIRMED, CORRECTED, NOT, UNTESTED)} == {
        CONFIRMED: 6, CORRECTED: 6, NOT: 2, UNTESTED: 2,
    }  # fmt: skip
