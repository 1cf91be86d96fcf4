"""The README's examples run, its commands exist, its links lead somewhere, its figures are the results'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT
from titans_runtime.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example(nano_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "out" / "demo").mkdir(parents=True)
    (tmp_path / "out" / "demo" / "bundle").symlink_to(nano_bundle, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["text"]) == 40  # type: ignore[arg-type]
    assert (tmp_path / "user-7.memory").exists()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^    titans (\w+)", README, re.MULTILINE))))
def test_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"titans {command}" in capsys.readouterr().out


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_tables_are_the_committed_results() -> None:
    results = (ROOT / "benchmarks" / "results" / "editing.md").read_text(encoding="utf-8")
    for row in results.splitlines():
        if row.startswith("|"):
            assert row in README


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_exist(target: str) -> None:
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
