"""Whose pages may talk to a server that asks for no token: its own, by names that only this machine has.

Any page that a person opens can send requests to their loopback address (CSRF), and one whose name is made to
point there can read the answers as well (DNS rebinding). A browser says in ``Host`` by which name it asks,
and in ``Origin`` whose page does.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from titans_runtime.serving.guard import App, Receive, Send, refuse
from titans_runtime.serving.settings import is_loopback

_READS: Final = ("GET", "HEAD", "OPTIONS")
_SHOWN: Final = 100
"""Characters of a header that an error repeats."""


class OwnNames:
    """Refuses requests under a foreign ``Host``, and from a foreign ``Origin`` all but reads."""

    def __init__(self, app: App, hosts: Sequence[str]) -> None:
        """``hosts``: names that ``app`` goes by besides those of this machine, in lower case."""
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await refuse(send, 403, problem)

    def _problem(self, scope: MutableMapping[str, Any]) -> str | None:
        """What is wrong with a request, or None. Without ``Host``, which every browser sends, nothing is."""
        headers = [(name, value.decode("latin-1").lower()) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == b"host"]
        for host in hosts:
            if not self._is_own(host):
                return _refused("Host", host)
        if scope["method"] in _READS:
            return None
        for origin in (value for name, value in headers if name == b"origin"):
            netloc = origin.partition("://")[2]
            if netloc not in hosts and _name_of(netloc) not in self._hosts:
                return _refused("Origin", origin)
        return None

    def _is_own(self, host: str) -> bool:
        name = _name_of(host)
        return is_loopback(name) or name in self._hosts


def _name_of(netloc: str) -> str:
    """The name of ``name:port``, in lower case; nothing where it has none."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _refused(header: str, value: str) -> str:
    return (
        f"{header} {value[:_SHOWN]!r}: a server without --tokens answers only to this machine's own names "
        "and to its own page; start it with --tokens FILE, or with --allow-host NAME for this name"
    )
