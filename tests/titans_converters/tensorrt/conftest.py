"""One interpreting process for all tests that need it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.titans_converters.tensorrt.interpreter import RunKernel, interpreter


@pytest.fixture(scope="session")
def run_kernel() -> Iterator[RunKernel]:
    with interpreter() as run:
        yield run
