"""Replaying goldens: a faithful bundle passes, a deviation is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import titans_runtime as tr
from tests.runtime.streams import Array, change_manifest
from titans_runtime.verify import Check

GOLDENS = "goldens.safetensors"


def _change_goldens(folder: Path, change: Callable[[dict[str, Array]], object]) -> None:
    goldens = load_file(folder / GOLDENS)
    change(goldens)
    save_file(goldens, folder / GOLDENS)
    change_manifest(folder, lambda content: None, rehash=True)


def test_a_bundle_passes_and_every_output_was_checked(tiny_bundle: Path) -> None:
    report = tr.verify(tiny_bundle, threads=1)
    assert report.passed
    report.raise_if_failed()
    outputs = [name for name in load_file(tiny_bundle / GOLDENS) if ".output." in name]
    assert len(report.checks) == len(outputs) > 0
    assert {check.name for check in report.checks} == {name.replace(".output.", ".") for name in outputs}
    assert report.lines()[-1] == f"PASSED: {len(outputs)} outputs"


def test_without_tolerance_a_deviation_fails_and_is_named(tiny_bundle: Path) -> None:
    report = tr.verify(tiny_bundle, {"": 0.0}, 0.0, threads=1)
    failed = [check for check in report.checks if not check.passed]
    assert failed
    assert report.lines()[-1] == f"FAILED: {len(failed)} of {len(report.checks)} outputs"
    with pytest.raises(tr.CheckFailed, match=f"verification failed: {failed[0].name} is off by"):
        report.raise_if_failed()


def test_a_tolerance_holds_for_the_output_that_it_names(tiny_bundle: Path) -> None:
    report = tr.verify(tiny_bundle, {"": 1.0, "logits": 2.0, "present.layers.0.memory": 3.0}, 0.0, threads=1)
    limits = {"logits": 2.0, "present.layers.0.memory": 3.0, "present.context": 0.0}
    limits["model.0.readout_rows"] = 0.0
    for check in report.checks:
        tensor = next((name for name in limits if check.name.endswith(f".{name}")), "")
        assert check.limit == limits.get(tensor, 1.0), check.name


def test_a_tolerance_for_an_unknown_output_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(tr.UsageError, match=r"atol for 'logit': no such output; the bundle has gate\."):
        tr.verify(tiny_bundle, {"logit": 1.0})


@pytest.mark.parametrize("kind", ["model.0.output.logits", "gradient.readout.0.output.grad.readout"])
@pytest.mark.parametrize("value", [0.1, np.nan])
def test_an_altered_golden_fails_and_is_named(bundle_copy: Path, kind: str, value: float) -> None:
    name = next(name for name in sorted(load_file(bundle_copy / GOLDENS)) if name.endswith(kind))

    def change(goldens: dict[str, Array]) -> None:
        goldens[name].reshape(-1)[7] += value

    _change_goldens(bundle_copy, change)
    report = tr.verify(bundle_copy, threads=1)
    failed = [check.name for check in report.checks if not check.passed]
    assert failed == [name.replace(".output.", ".")]


def test_an_altered_integer_golden_fails_by_one(bundle_copy: Path) -> None:
    name = next(name for name in load_file(bundle_copy / GOLDENS) if name.endswith("output.present.context"))

    def change(goldens: dict[str, Array]) -> None:
        goldens[name][0, -1] += 1

    _change_goldens(bundle_copy, change)
    report = tr.verify(bundle_copy, {"": 100.0}, threads=1)
    assert [(check.error, check.limit) for check in report.checks if not check.passed] == [(1.0, 0.0)]


def test_a_golden_of_another_shape_fails(bundle_copy: Path) -> None:
    name = next(name for name in load_file(bundle_copy / GOLDENS) if name.endswith("output.logits"))
    _change_goldens(bundle_copy, lambda goldens: goldens.update({name: goldens[name][:, :-1].copy()}))
    failed = [check for check in tr.verify(bundle_copy, threads=1).checks if not check.passed]
    assert [check.error for check in failed] == [np.inf]


def _rename(old: str, new: str) -> Callable[[dict[str, Array]], None]:
    def change(goldens: dict[str, Array]) -> None:
        for name in list(goldens):
            if old in name:
                goldens[name.replace(old, new)] = goldens.pop(name)

    return change


def _flat_ids(goldens: dict[str, Array]) -> None:
    goldens.update({name: ids.reshape(-1) for name, ids in goldens.items() if name.endswith("input_ids")})


def _wide_past(goldens: dict[str, Array]) -> None:
    name = next(name for name in goldens if name.endswith("input.readout_key"))
    goldens[name] = np.zeros((1, 2, 3), np.float32)


@pytest.mark.parametrize(
    "change",
    [
        dict.clear,
        _rename(".model.", ".other."),
        _rename(".output.logits", ".output.other"),
        _rename(".output.", ".result."),
        _flat_ids,
        _wide_past,
        lambda goldens: goldens.update(name=np.zeros(1)),
    ],
    ids=["none", "graph", "output", "no output", "flat ids", "input shape", "name"],
)
def test_goldens_that_do_not_fit_are_a_damaged_bundle(
    bundle_copy: Path, change: Callable[[dict[str, Array]], object]
) -> None:
    _change_goldens(bundle_copy, change)
    with pytest.raises(tr.BundleError, match=GOLDENS):
        tr.verify(bundle_copy, threads=1)


def test_goldens_that_are_no_safetensors_are_a_damaged_bundle(bundle_copy: Path) -> None:
    (bundle_copy / GOLDENS).write_bytes(b"no tensors")
    change_manifest(bundle_copy, lambda content: None, rehash=True)
    with pytest.raises(tr.BundleError, match=r"goldens\.safetensors: damaged"):
        tr.verify(bundle_copy, threads=1)


def test_a_check_passes_at_its_limit_and_never_with_nan() -> None:
    assert Check("name", 0.5, 0.5).passed
    assert not Check("name", 0.6, 0.5).passed
    assert not Check("name", float("nan"), 0.5).passed
    assert not Check("name", 0.5, float("nan")).passed
