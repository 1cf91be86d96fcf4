"""State dicts of the library's own models, made once for a file of tests."""

from __future__ import annotations

import pytest

from tests.titans_export.importers.cases import MEMORY_BASE
from tests.titans_export.importers.importing import TRANSFORMER_ARGUMENTS, Tensors
from tests.titans_export.importers.library import MEMORY, TRANSFORMER, library_model


@pytest.fixture(scope="module")
def memory() -> Tensors:
    return library_model(MEMORY, MEMORY_BASE).state_dict()


@pytest.fixture(scope="module")
def transformer() -> Tensors:
    return library_model(TRANSFORMER, TRANSFORMER_ARGUMENTS).state_dict()
