"""The whole family, exported with float16 weights, verified, streamed and restored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.family import MEMBERS, check_member, export_member


@pytest.mark.parametrize("member", MEMBERS)
def test_exported_with_float16_weights(member: str, tmp_path: Path) -> None:
    check_member(export_member(member, "float16", tmp_path), "float16", tmp_path)
