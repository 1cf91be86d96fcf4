"""One command ``titans``, called in this process: what a test of it is given and gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

TEXT = b"The command line scores this text, byte by byte, and learns as it goes along." * 2
Titans = Callable[..., "Outcome"]


class Outcome:
    """Exit code and output of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)
