"""Which provider runs what: recorded, reported, and refused where work was left to the CPU in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import titans_runtime as tr
from titans_runtime.backends import placement
from titans_runtime.backends.placement import CPU, check_placement
from titans_runtime.cli import main

CUDA = "CUDAExecutionProvider"


def test_every_loaded_graph_says_who_runs_its_nodes(model: tr.Model) -> None:
    model.backend.graph("gradient.readout")
    found = model.backend.placements
    assert found.keys() >= {"model", "gradient.readout"}
    assert found["model"].keys() == {CPU}
    assert found["model"][CPU]["MatMul"] > 0


def test_verify_reports_it(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle)]) == 0
    assert f"nodes on {CPU}" in capsys.readouterr().out
    assert main(["verify", str(tiny_bundle), "--json"]) == 0
    assert CPU in json.loads(capsys.readouterr().out)["placements"]["model"]


def test_work_left_to_the_cpu_is_refused_and_named() -> None:
    found = {CUDA: {"MatMul": 5}, CPU: {"Shape": 2, "Erf": 1, "MatMul": 3}}
    with pytest.raises(
        tr.EnvironmentProblem, match=r"left operators of model to the CPU: Erf \(1\), MatMul \(3\)"
    ):
        check_placement(found, [CUDA], "model")
    check_placement(found, [CUDA, CPU], "model")


def test_sizes_and_indices_may_be_the_cpus() -> None:
    check_placement({CUDA: {"MatMul": 5, "Erf": 1}, CPU: {"Shape": 2, "Gather": 1}}, [CUDA], "model")


@pytest.mark.parametrize("wanted", [[CUDA], [CUDA, CPU]])
def test_a_provider_that_runs_nothing_is_refused(wanted: list[str]) -> None:
    with pytest.raises(tr.EnvironmentProblem, match=f"{CUDA} runs no node of model, only {CPU}"):
        check_placement({CPU: {"Shape": 2}}, wanted, "model")


def test_an_onnxruntime_that_cannot_say_is_trusted_with_the_cpu_only() -> None:
    assert placement.read_placement(object()) is None
    check_placement(None, [CPU], "model")
    with pytest.raises(tr.EnvironmentProblem, match="cannot say which provider runs what"):
        check_placement(None, [CUDA], "model")
