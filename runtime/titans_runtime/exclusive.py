"""One call at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from titans_runtime.errors import UsageError


class Exclusive:
    """Refuses a second call while a first one is under way, in whatever thread.

    No lock: Ctrl-C between its ``acquire`` and whatever notes it would leave it taken for good. Here
    ``finally`` sees whose it is, and calls nothing that Ctrl-C could interrupt.
    """

    def __init__(self) -> None:
        """Free."""
        self._holder: dict[str, object] = {}

    @property
    def is_held(self) -> bool:
        """Whether a call is under way."""
        return bool(self._holder)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for one call.

        Raises:
            UsageError: another call is under way.
        """
        call, holder = object(), self._holder
        try:
            if holder.setdefault("call", call) is not call:
                raise UsageError(
                    "the session is in use by another thread or a batch; give each stream a session of "
                    "its own"
                )
            yield
        finally:
            if "call" in holder and holder["call"] is call:
                del holder["call"]
