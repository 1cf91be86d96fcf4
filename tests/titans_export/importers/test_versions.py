"""Versions of titans-pytorch: what is told from keys, stated, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.titans_export.importers.cases import MEMORY_BASE
from tests.titans_export.importers.importing import (
    TRANSFORMER_ARGUMENTS,
    Tensors,
    error_line,
    import_file,
)
from tests.titans_export.importers.library import MEMORY, TRANSFORMER, library_model

pytest.importorskip("titans_pytorch")


@pytest.mark.parametrize(
    ("version", "lookahead"), [(None, False), ("0.5.1", False), ("0.5.2", True), ("0.5.5", False)]
)
def test_a_version_brings_its_own_defaults(tmp_path: Path, version: str | None, lookahead: bool) -> None:
    """0.5.2 alone stored with the values of later tokens unless told otherwise."""
    stated = {} if version is None else {"version": version}
    for kind, base in ((MEMORY, MEMORY_BASE), (TRANSFORMER, TRANSFORMER_ARGUMENTS)):
        folder = tmp_path / kind
        folder.mkdir()
        code, out = import_file(folder, library_model(kind, base).state_dict(), base | stated)
        assert code == 0
        config = json.loads((out / "config.json").read_text())
        assert config["version"] == (version or {MEMORY: None, TRANSFORMER: ">=0.5"}[kind])
        memory = config["options"] if kind == MEMORY else config["options"]["memory"]
        assert memory["store_with_lookahead_value"] == lookahead
    given = MEMORY_BASE | stated | {"store_with_lookahead_value": not lookahead}
    _, out = import_file(tmp_path, library_model(MEMORY, MEMORY_BASE).state_dict(), given)
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["store_with_lookahead_value"] == (not lookahead)


def test_an_older_library_is_named(
    transformer: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = {name: t for name, t in transformer.items() if not name.endswith("residual_scale")}
    code, _ = import_file(tmp_path, older, TRANSFORMER_ARGUMENTS)
    assert code == 3
    assert "hyper-connections of titans-pytorch before 0.5" in error_line(capsys)
