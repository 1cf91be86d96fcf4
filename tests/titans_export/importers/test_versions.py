"""Versions of titans-pytorch: what is told from keys, stated, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.titans_export.importers.cases import MEMORY_BASE
from tests.titans_export.importers.importing import (
    TRANSFORMER_ARGUMENTS,
    Tensors,
    error_line,
    import_file,
    weights_of,
)
from tests.titans_export.importers.library import MEMORY, TRANSFORMER, Arguments, library_model

pytest.importorskip("titans_pytorch")


LOOKAHEAD = "note: store_with_lookahead_value was true by default in 0.5.2 alone: taken as false; "
COMBINED = MEMORY_BASE | {"momentum_order": 2, "learned_momentum_combine": True}


@pytest.mark.parametrize(("version", "lookahead"), [("0.5.1", False), ("0.5.2", True), ("0.5.5", False)])
def test_a_version_brings_its_own_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str, lookahead: bool
) -> None:
    """0.5.2 alone stored with the values of later tokens unless told otherwise."""
    stated = {"version": version}
    for kind, base in ((MEMORY, MEMORY_BASE), (TRANSFORMER, TRANSFORMER_ARGUMENTS)):
        config = _imported(tmp_path / kind, kind, base, stated)
        assert (config["version"], config["assumed"]) == (version, {})
        memory = config["options"] if kind == MEMORY else config["options"]["memory"]
        assert memory["store_with_lookahead_value"] == lookahead
    config = _imported(
        tmp_path / "given", MEMORY, MEMORY_BASE, stated | {"store_with_lookahead_value": not lookahead}
    )
    assert config["options"]["store_with_lookahead_value"] == (not lookahead)
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "base", "told"),
    [(MEMORY, MEMORY_BASE, None), (TRANSFORMER, TRANSFORMER_ARGUMENTS, ">=0.5")],
)
def test_what_no_version_tells_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, base: Arguments, told: str | None
) -> None:
    """The same keys come from 0.5.2, whose default was another."""
    config = _imported(tmp_path / "silent", kind, base, {})
    assert (config["version"], config["assumed"]) == (told, {"store_with_lookahead_value": False})
    notes = capsys.readouterr().err.splitlines()[1:]
    assert [note.startswith(LOOKAHEAD) for note in notes] == [True]
    given: Arguments = {"store_with_lookahead_value": False}
    if kind == TRANSFORMER:
        given = {"neural_memory_kwargs": base["neural_memory_kwargs"] | given}
    assert _imported(tmp_path / "given", kind, base, given)["assumed"] == {}
    assert "note:" not in capsys.readouterr().err


def test_a_transformer_without_memories_has_nothing_to_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = TRANSFORMER_ARGUMENTS | {"neural_memory_layers": []}
    assert _imported(tmp_path / "none", TRANSFORMER, none, {})["assumed"] == {}
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("version", ["0.3.25", "0.4.0", "0.4.25"])
def test_a_memory_may_be_older_than_a_transformer(tmp_path: Path, version: str) -> None:
    """The class is the same since 0.3.25; before, combined momenta were others."""
    config = _imported(tmp_path / "memory", MEMORY, COMBINED, {"version": version})
    assert (config["version"], config["assumed"]) == (version, {})


def test_combined_momenta_of_no_version_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _imported(tmp_path / "memory", MEMORY, COMBINED, {"store_with_lookahead_value": False})
    assert config["assumed"] == {"version": ">=0.3.25"}
    notes = capsys.readouterr().err.splitlines()[1:]
    assert len(notes) == 1
    assert notes[0].startswith("note: learned_momentum_combine was computed otherwise before 0.3.25")


@pytest.mark.parametrize("stated", ["0.3.12", "0.3.16", "0.4.0", None])
def test_hyper_connections_of_one_matrix_need_their_version(
    transformer: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], stated: str | None
) -> None:
    """0.3.11 stores the same keys and shapes, and computes otherwise."""
    flat = {name: t[0] if name.endswith("dynamic_alpha_fn") else t for name, t in transformer.items()}
    code, out = import_file(tmp_path, flat, TRANSFORMER_ARGUMENTS | {"hyper_connections": stated})
    if stated in ("0.3.12", "0.3.16"):
        assert code == 0
        assert json.loads((out / "config.json").read_text())["hyper_connections"] == stated
        weights = weights_of(out)
        import_file(tmp_path, transformer, TRANSFORMER_ARGUMENTS, "--force")
        assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(out).items())
    else:
        assert code == 2
        line = error_line(capsys)
        assert "hyper-connections before 0.4, and 0.3.11 computes otherwise; give " in line
        assert line.endswith("if it is one of 0.3.12, 0.3.14, 0.3.15, 0.3.16")


def test_an_older_library_is_named(
    transformer: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = {name: t for name, t in transformer.items() if not name.endswith("residual_scale")}
    code, _ = import_file(tmp_path, older, TRANSFORMER_ARGUMENTS)
    assert code == 3
    assert "hyper-connections of titans-pytorch before 0.5" in error_line(capsys)


def _imported(folder: Path, kind: str, base: Arguments, stated: Arguments) -> Arguments:
    """The config of the library's model of ``base``, imported with what the JSON states beside it."""
    folder.mkdir()
    code, out = import_file(folder, library_model(kind, base).state_dict(), base | stated)
    assert code == 0
    config: Arguments = json.loads((out / "config.json").read_text())
    return config
