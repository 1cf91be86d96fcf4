"""The committed tables of objectives are those of the results beside them."""

from __future__ import annotations

from benchmarks.editing.objectives import BOTH, RESULTS, all_measured, page


def test_the_page_shows_its_results() -> None:
    assert (RESULTS / "objectives.md").read_text(encoding="utf-8") == page(all_measured())


def test_every_model_has_every_objective_on_every_text() -> None:
    measured = all_measured()
    assert {result["trained_with_edit"] for result in measured.values()} == {0.0, 1.0}
    assert len(measured) == 7
    for result in measured.values():
        assert len(result["texts"]) == 4
        for rows in result["texts"].values():
            assert rows.keys() == {"xz", "off", "readout", "fused", "association", "prediction", BOTH}
