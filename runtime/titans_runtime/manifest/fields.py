"""Typed access to the fields of a manifest: every message names the field."""

from __future__ import annotations

from typing import Any

from titans_runtime.errors import BundleError

_LARGEST = 3e38  # what float32 holds
_LARGEST_INTEGER = 2**63 - 1


class Fields:
    """The fields of one JSON object.

    Every method raises a ``BundleError`` that names the field where it is not what was asked for.
    """

    def __init__(self, content: object, where: str) -> None:
        """``where``: names the object in messages."""
        if not isinstance(content, dict):
            raise BundleError(f"titans.json: {where} must be an object")
        self._content: dict[str, Any] = content
        self._where = where
        self._read: set[str] = set()

    def take(self, name: str, kind: type) -> Any:  # noqa: ANN401 - parsed JSON
        """A field that must be there, of exactly this type."""
        self._read.add(name)
        if name not in self._content:
            raise BundleError(f"titans.json: {self._where}: field {name!r} is missing")
        value = self._content[name]
        if type(value) is not kind:
            raise BundleError(f"titans.json: {self._where}: {name} must be of type {kind.__name__}")
        return value

    def optional(self, name: str) -> Any:  # noqa: ANN401 - parsed JSON
        """A field that may be missing."""
        self._read.add(name)
        return self._content.get(name)

    def integer(self, name: str, least: int, most: int = _LARGEST_INTEGER) -> int:
        """An integer within bounds."""
        value: int = self.take(name, int)
        if value < least:
            raise BundleError(f"titans.json: {self._where}: {name} is {value}; at least {least}")
        if value > most:
            raise BundleError(f"titans.json: {self._where}: {name} is {value}; at most {most}")
        return value

    def string(self, name: str) -> str:
        """A text."""
        value: str = self.take(name, str)
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of a few texts."""
        value = self.string(name)
        if value not in choices:
            raise BundleError(f"titans.json: {self._where}: {name} is {value!r}; known: {', '.join(choices)}")
        return value

    def digest(self, name: str) -> str:
        """A SHA-256 in hexadecimal digits."""
        value = self.string(name)
        if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise BundleError(f"titans.json: {self._where}: {name} is no SHA-256")
        return value

    def number(self, name: str) -> float:
        """A number that float32 holds."""
        self._read.add(name)
        value: Any = self._content.get(name)
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise BundleError(
                f"titans.json: {self._where}: {name} must be a number of at most {_LARGEST:g} either way"
            )
        return float(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value: dict[str, Any] = self.take(name, dict)
        return value

    def array(self, name: str) -> list[Any]:
        """A list."""
        value: list[Any] = self.take(name, list)
        return value

    def end(self) -> None:
        """Refuse fields that nobody has read."""
        unknown = sorted(self._content.keys() - self._read)
        if unknown:
            raise BundleError(f"titans.json: {self._where}: unknown field {unknown[0]!r}")
