"""The command line, as one runs it whose command must fail."""

from __future__ import annotations

import pytest

from tests.runtime import command
from tests.runtime.bad_input.support import Titans


@pytest.fixture
def titans(titans: command.Titans) -> Titans:
    """Runs a command that must fail; returns its code and its error."""

    def call(*arguments: object) -> tuple[int, str]:
        outcome = titans(*arguments)
        assert outcome.code != 0
        assert outcome.out == ""
        assert 1 <= len(outcome.err.splitlines()) <= 2
        assert "Traceback" not in outcome.err
        return outcome.code, outcome.err

    return call
