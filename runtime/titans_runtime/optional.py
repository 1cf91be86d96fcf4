"""Optional packages: imported where they are used, and named with their extra where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from titans_runtime.errors import EnvironmentProblem


def optional_import(module: str, extra: str) -> Any:  # noqa: ANN401 - a module
    """Import a package that an extra of titans-runtime brings.

    Raises:
        EnvironmentProblem: the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise EnvironmentProblem(
            f"{package} is not installed; pip install 'titans-runtime[{extra}]'"
        ) from None
