"""A memory as one sequence of bytes: a header of JSON in front of the content.

The magic line, the length of the header as 8 bytes, little endian, the header, the content.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

from titans_runtime.errors import StateError, UsageError
from titans_runtime.json_reader import canonical, parse_object
from titans_runtime.store.protocol import MAX_ABOUT, Entry

_MAGIC: Final = b"titans-memory-1\n"
_PREFIX: Final = len(_MAGIC) + 8
_TYPES: Final = {"name": str, "version": str, "size": int, "expires": float | int | None, "about": dict}
HEAD: Final = _PREFIX + MAX_ABOUT + 1024
"""Bytes that hold any header."""


def header_of(entry: Entry) -> bytes:
    """What a record says of itself.

    Raises:
        UsageError: ``about`` is no plain JSON, or too long.
    """
    try:
        about = canonical(dict(entry.about))
    except (TypeError, ValueError) as error:
        raise UsageError(f"memory {entry.name}: about is no plain JSON ({error})") from None
    if len(about) > MAX_ABOUT:
        raise UsageError(f"memory {entry.name}: about has {len(about)} bytes; the limit is {MAX_ABOUT}")
    return canonical(
        {
            "name": entry.name,
            "version": entry.version,
            "size": entry.size,
            "expires": entry.expires,
            "about": dict(entry.about),
        }
    )


def pack(entry: Entry, content: bytes) -> bytes:
    """The record of a memory."""
    header = header_of(entry)
    return _MAGIC + struct.pack("<Q", len(header)) + header + content


def unpack_head(head: bytes, where: str) -> tuple[Entry, int]:
    """The entry at the beginning of a record, and where its content begins.

    Raises:
        StateError: this is no record, or a damaged one.
    """
    try:
        if head[: len(_MAGIC)] != _MAGIC:
            raise ValueError
        (length,) = struct.unpack("<Q", head[len(_MAGIC) : _PREFIX])
        return entry_of(head[_PREFIX : _PREFIX + length], where), _PREFIX + length
    except (struct.error, ValueError):
        raise StateError(f"{where}: no memory of a store, or damaged; restore it from a copy") from None


def entry_of(header: bytes, where: str) -> Entry:
    """What :func:`header_of` has written.

    Raises:
        StateError: it is damaged.
    """
    try:
        content: Mapping[str, Any] = parse_object(header, where)
        for name, kind in _TYPES.items():
            if not isinstance(content[name], kind):
                raise TypeError
        return Entry(**content)
    except (ValueError, TypeError, KeyError):
        raise StateError(f"{where}: the header is damaged; restore it from a copy") from None


def unpack(record: bytes, where: str) -> tuple[Entry, bytes]:
    """The entry and the content of a record.

    Raises:
        StateError: this is no record, or a damaged or truncated one.
    """
    entry, start = unpack_head(record, where)
    if len(record) - start != entry.size:
        raise StateError(
            f"{where}: {len(record) - start} bytes of content, {entry.size} announced; restore it from a copy"
        )
    return entry, record[start:]
