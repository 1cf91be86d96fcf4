"""JSON from files that may be damaged or hostile: bounded size and depth, no key given twice."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 32


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: UTF-8 text.
        where: names the source in messages.

    Raises:
        ValueError: too large, nested too deep, malformed, a key given twice, or no object.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where}: {len(data)} bytes of JSON; the limit is {MAX_BYTES}")
    if _depth(data) > MAX_DEPTH:
        raise ValueError(f"{where}: JSON nested deeper than {MAX_DEPTH}")
    try:
        content = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except ValueError as error:
        raise ValueError(f"{where}: no valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object")
    return content


def canonical(content: object) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"key given twice: {name!r}")
        content[name] = value
    return content


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _depth(data: bytes) -> int:
    """Deepest nesting, counted before parsing: the parser itself recurses."""
    depth = deepest = 0
    in_string = escaped = False
    for byte in data:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest
