"""A benchmark's end: what a user of the command sees."""

from __future__ import annotations

import pytest

from benchmarks.command import conclude
from titans_runtime.errors import BundleError, UsageError


def _raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(("result", "code"), [(None, None), (0, 0), (1, 1)])
def test_what_a_command_returns_is_its_exit_code(result: int | None, code: int | None) -> None:
    with pytest.raises(SystemExit) as left:
        conclude(lambda: result)
    assert left.value.code == code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("2 rounds; at least 5"), 2, "error: 2 rounds; at least 5\n"),
        (BundleError("out/x: no bundle"), 3, "error: out/x: no bundle\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_a_mistake_is_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        conclude(lambda: _raising(error))
    assert left.value.code == code
    assert capsys.readouterr() == ("", said)


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        conclude(lambda: _raising(ZeroDivisionError()))
