"""What these tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILES = ("weights.bin", "model.onnx", "gradient.readout.onnx", "goldens.safetensors")
Titans = Callable[..., tuple[int, str]]
Harm = Callable[[Path], str]
"""Damages what lies at the path, and returns the message that is then expected, without the path itself."""


def content_of(folder: Path) -> dict[str, str]:
    """What lies in a folder, to see that nothing was changed."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Trap:
    """Unpickling it is found out."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("something was unpickled",))
