"""What a server is told: plain values, so that replicas on other machines can be told the same."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from titans_runtime.errors import DataError, UsageError
from titans_runtime.serving.scheduler import SLOTS, WAITING
from titans_runtime.store.protocol import checked_name

_DIGEST = re.compile("[0-9a-f]{64}")
_HOST = re.compile("[a-z0-9._-]{1,253}")
ANYONE = "local"
"""Owner of everything where there are no tokens."""


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        bundle: folder.
        store: of the memories: a folder, or a URL.
        tokens: file of bearer tokens, one ``OWNER TOKEN`` a line; None lets anyone in.
        backend: see :func:`titans_runtime.load`.
        threads: likewise.
        slots: requests that run at once.
        waiting: requests that wait at most.
        max_body: bytes of a request.
        max_tokens: tokens that a request draws at most.
        max_seconds: that a request takes at most.
        max_memories: of one owner.
        hot: memories kept in RAM besides.
        expire: seconds after its last save when a memory is gone; 0 for never.
        drain: seconds that requests under way have when the server is stopped.
        allow_host: names, joined by commas, that a server without tokens goes by besides this machine's own.
    """

    bundle: str
    store: str = "memories"
    tokens: str | None = None
    backend: str = "onnxruntime"
    threads: int | None = None
    slots: int = SLOTS
    waiting: int = WAITING
    max_body: int = 4 * 2**20
    max_tokens: int = 4096
    max_seconds: float = 600.0
    max_memories: int = 1000
    hot: int = 64
    expire: float = 0.0
    drain: float = 20.0
    allow_host: str = ""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of range.
        """
        least = dict.fromkeys(("slots", "waiting", "max_body", "max_tokens", "max_memories"), 1) | {"hot": 0}
        for name, least_value in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < least_value:
                raise UsageError(f"{option(name)} is {value!r}; it must be an integer, {least_value} or more")
        for name in ("max_seconds", "expire", "drain"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1e12:
                raise UsageError(f"{option(name)} is {value!r}; it must be a number, 0 or more")
        names: Any = self.allow_host  # as a configuration file may have it
        if not isinstance(names, str) or not all(map(_is_host, self.hosts)):
            raise UsageError(
                f"--allow-host is {self.allow_host!r}; give names without scheme and port, joined by commas"
            )

    @property
    def hosts(self) -> tuple[str, ...]:
        """What ``allow_host`` names, in lower case."""
        return tuple(host.strip().lower() for host in self.allow_host.split(",")) if self.allow_host else ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Settings:
        """Read settings from plain JSON types.

        Raises:
            UsageError: a field is unknown or missing, or a value is out of range.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise UsageError(f"setting {unknown[0]!r} is unknown; known: {', '.join(sorted(known))}")
        if "bundle" not in content:
            raise UsageError("setting 'bundle' is missing; give the bundle's folder")
        return cls(**content)


def option(name: str) -> str:
    """A setting as the command line calls it."""
    return "--" + name.replace("_", "-")


def read_tokens(path: Path) -> dict[str, str]:
    """Owners by the SHA-256 of their tokens.

    A line is ``OWNER TOKEN``, or ``OWNER sha256:HEX`` for a token that the file is not to hold. Lines that
    begin with ``#`` are left out.

    Raises:
        DataError: the file cannot be read, a line is malformed, or a token is given twice.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    owners: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or line.startswith("#"):
            continue
        where = f"{path}: line {number}"
        if len(parts) != 2:
            raise DataError(f"{where}: expected 'OWNER TOKEN'")
        owner, token = parts
        try:
            if "/" in checked_name(owner):
                raise UsageError("")
        except UsageError:
            raise DataError(f"{where}: an owner is 1 to 64 letters, digits, - or _") from None
        if len(token) < 16:
            raise DataError(f"{where}: the token has {len(token)} characters; 16 is the least")
        key = token.removeprefix("sha256:").lower() if token.startswith("sha256:") else digest_of(token)
        if not _DIGEST.fullmatch(key) or key in owners:
            raise DataError(f"{where}: the token was given before, or its sha256: is malformed")
        owners[key] = owner
    if not owners:
        raise DataError(f"{path}: holds no token; give a line 'OWNER TOKEN'")
    return owners


def digest_of(token: str) -> str:
    """What tokens are looked up by: how long that takes says nothing of the token."""
    return hashlib.sha256(token.encode()).hexdigest()


def _is_host(name: str) -> bool:
    """Whether this is a name of a machine, or an address of one."""
    if ":" not in name:
        return _HOST.fullmatch(name) is not None
    try:
        return ipaddress.ip_address(name).version == 6
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
