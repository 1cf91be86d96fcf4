"""The page of all results is what the files beside it say."""

from __future__ import annotations

import pytest

from benchmarks.latency.results import RESULTS
from benchmarks.latency.summary import Line, measured, page


def test_the_page_shows_its_results() -> None:
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page(measured())


def test_every_kind_of_result_is_there() -> None:
    wheres = {line.what.partition(":")[0].partition(",")[0] for line in measured()}
    assert wheres >= {
        "decode", "prefill", "open editor", "NeuralMemory", "peak memory", "start to first token",
        "16 sessions one by one / in a batch", "installed size",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "at_least", "mark"), [(2.0, True, "✓"), (1.9, True, "✗"), (2.0, False, "✓"), (2.1, False, "✗")]
)
def test_a_limit_is_met_on_its_own_side(ratio: float, at_least: bool, mark: str) -> None:
    line = Line("what", "where", ratio, 1.0, 3.0, 2.0, at_least, "command")
    assert f"{mark} **{ratio:.2f}** (1.00-3.00)" in line.markdown()


def test_a_ratio_that_rounds_do_not_tell_from_nothing_meets_no_limit() -> None:
    line = Line("what", "where", 13.6, -249.1, 49.3, 2.0, True, "command")
    assert not line.reached
    assert "? **13.60**" in line.markdown()
