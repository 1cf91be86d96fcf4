"""The pages that are committed are what the command writes of the results beside them."""

from __future__ import annotations

import json

import pytest

from benchmarks.experiments.__main__ import RESULTS, document
from benchmarks.experiments.tasks import EXPERIMENTS


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_a_page_shows_its_results(name: str) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    tasks = EXPERIMENTS[name]
    steps = {task.name: task.steps for task in tasks}
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["steps"] == steps[row["task"]]]
    command = f"python -m benchmarks.experiments {name}"
    text = document(name, tasks, rows, steps, command, f"{name}.png")
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == text
