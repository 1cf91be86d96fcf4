"""The tables of docs/experiments.md say what the results beside them say, as exactly as they put it."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import pytest

from benchmarks.experiments.__main__ import RESULTS, ROOT

CONTESTANTS = {
    "Titans, trained with λ = 0": "titans-ssm",
    "Titans, trained with λ = 1": "titans-lmm",
    "Titans, no retention, two taps, writes scaled at random in training, λ = 1": "titans-scaled",
    "Mamba, writes scaled likewise": "mamba-scaled",
    "*untrained* weights": "titans-untrained",
    "Titans MAC": "titans-mac",
    "Mamba": "mamba",
    "LSTM": "lstm",
    "S4D": "s4d",
    "Transformer": "transformer",
    "Transformer, rotary": "transformer",
}
WAYS = {
    "λ > 0": "fused",
    "λ > 0, its strength chosen": "fused",
    "readout edited": "readout",
    "prediction edited": "prediction",
    "run with λ = 0": "off",
}
LETTERS = ("16", "32", "64", "128", "256", "512", "1,024")
LONG = ("1,024", "2,048", "4,096", "8,192", "16,384", "32,768")
BOUND = "bindings of each of 16 keys"
TABLES = {
    "mqar": [*(f"pairs/{n}" for n in (8, 16, 32, 64)), *(f"{BOUND}/{n}" for n in (2, 4, 8, 16))],
    "copy": [f"letters/{n}" for n in LETTERS],
    "selective": [f"length/{n}" for n in LETTERS],
    "induction-fresh": [f"length/{n}" for n in ("256", "512", "1,024", "2,048", "4,096")],
    "induction": [f"length/{n}" for n in LONG],
    "induction-long": [f"length/{n}" for n in LONG],
    "digits": ["digits/known", "digits/novel"],
    "scan": [f"split/{split}" for split in ("simple", "length", "addprim_jump")],
}
SEEDS = 3

Rows = list[dict[str, Any]]


def told(name: str) -> list[tuple[str, list[str]]]:
    """Label and cells of every row of the first table after the link to a result's page."""
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    link = f"(../benchmarks/results/experiments/{name}.md)"
    lines = page[page.index(link) :].splitlines()
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            break
    return [(row[0], row[1:]) for row in table[2:]]


def spread_out(rows: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Rows of several contestants, ``A · B``, as a row each."""
    found = []
    for label, cells in rows:
        parts = [cell.split(" · ") for cell in cells]
        found += [(own, [part[i] for part in parts]) for i, own in enumerate(label.split(" · "))]
    return found


def measured(rows: Rows, contestant: str, way: str, key: str) -> list[float]:
    """Shares of answers; of commands of SCAN, whole ones."""
    right = "exact" if key.startswith("split/") else "token"
    own = [row for row in rows if (row["contestant"], row["way"]) == (contestant, way)]
    return [100 * row["scores"][key][right] for row in own if key in row["scores"]]


def check(cell: str, shares: list[float], where: str) -> None:
    found = re.fullmatch(r"([\d.]+)(?: \((\d+)(?:\.\d)?-(\d+)(?:\.\d)?\))?", cell.replace("*", ""))
    assert found, f"{where}: {cell}"
    digits = len(found[1].partition(".")[2])
    assert abs(float(found[1]) - statistics.mean(shares)) <= 0.51 * 10**-digits, f"{where}: {shares}"
    if found[2]:
        ends = (min(shares), max(shares))
        for said, end in zip((found[2], found[3]), ends, strict=True):
            assert abs(int(said) - end) <= 1, f"{where}: {shares}"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_was_measured(name: str) -> None:
    rows: Rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    contestant, seen = "", 0
    for label, cells in spread_out(told(name)):
        plain = label.removesuffix(", three seeds")
        model, _, what = plain.partition(", readout") if plain.startswith("*untr") else (plain, "", "")
        if "no model" in plain:
            continue
        way = "as trained"
        if plain.startswith("the same weights, "):
            way = WAYS[plain.removeprefix("the same weights, ")]
        else:
            contestant, way = CONTESTANTS[model], "readout" if what else way
        for key, cell in zip(TABLES[name], cells, strict=True):
            shares = measured(rows, contestant, way, key)
            asked = f"{name}, {label}, {key}: asked of {len(shares)} seeds"
            if cell == "–":
                assert len(shares) < SEEDS, asked
                continue
            assert len(shares) == SEEDS, asked
            check(cell, shares, f"{name}, {label}, {key}")
            seen += 1
    assert seen >= 2 * len(TABLES[name])
