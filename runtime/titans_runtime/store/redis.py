"""Memories in Redis: a hash a memory, replaced under WATCH, which expires by itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Final

from titans_runtime.errors import ConflictError, EnvironmentProblem
from titans_runtime.optional import optional_import
from titans_runtime.store.protocol import Entry, Stored, check_expected, checked_name
from titans_runtime.store.put import Puts
from titans_runtime.store.record import entry_of, header_of

_PREFIX: Final = "titans:memory:"


class RedisStore(Puts):
    """Memories in one Redis database.

    What a put promises is what the server promises: with ``appendfsync always`` it survives a loss of power,
    with ``everysec``, all but the last second does.
    """

    def __init__(self, url: str, client: Any = None) -> None:  # noqa: ANN401 - of a package that may be missing
        """Connect.

        Args:
            url: ``redis://[user:password@]host:port/database``; ``rediss://`` and ``unix://`` likewise.
            client: in place of one for ``url``.

        Raises:
            EnvironmentProblem: the package is missing, or the server does not answer.
        """
        self._redis = optional_import("redis", "redis")
        self._shown = re.sub(r"//[^@/]*@", "//***@", url)
        with self._reached():
            self._client = client if client is not None else self._redis.Redis.from_url(url)
            self._client.ping()

    def get(self, name: str) -> Stored | None:
        """See :class:`MemoryStore`."""
        with self._reached():
            header, content = self._client.hmget(self._key(name), "header", "content")
        return None if header is None or content is None else Stored(entry_of(header, name), content)

    def entry(self, name: str) -> Entry | None:
        """See :class:`MemoryStore`."""
        with self._reached():
            header = self._client.hget(self._key(name), "header")
        return None if header is None else entry_of(header, name)

    def delete(self, name: str, expected: str | None = None) -> bool:
        """See :class:`MemoryStore`."""
        key = self._key(name)
        if expected is None:
            with self._reached():
                return bool(self._client.delete(key))
        with self._watched(name, expected) as pipe:
            pipe.delete(key)
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :class:`MemoryStore`."""
        with self._reached():
            keys = [key.decode() for key in self._client.scan_iter(f"{_PREFIX}{prefix}*", count=1000)]
        for key in dict.fromkeys(keys):  # a scan may name a key twice
            entry = self.entry(key.removeprefix(_PREFIX))
            if entry is not None:
                yield entry

    def sweep(self) -> int:
        """See :class:`MemoryStore`. The server does it by itself."""
        return 0

    def close(self) -> None:
        """See :class:`MemoryStore`."""
        self._client.close()

    def _replace(self, entry: Entry, content: bytes, expected: str | None) -> None:
        key, header = self._key(entry.name), header_of(entry)
        with self._watched(entry.name, expected) as pipe:
            pipe.hset(key, mapping={"header": header, "content": content})
            if entry.expires is None:
                pipe.persist(key)
            else:
                pipe.pexpireat(key, int(1000 * entry.expires))

    @contextlib.contextmanager
    def _watched(self, name: str, expected: str | None) -> Iterator[Any]:
        """A transaction on a memory that still has the expected version when it is carried out."""
        key = self._key(name)
        with self._reached(), self._client.pipeline() as pipe:
            pipe.watch(key)
            header = pipe.hget(key, "header")
            check_expected(name, entry_of(header, name).version if header else None, expected)
            pipe.multi()
            yield pipe
            try:
                pipe.execute()
            except self._redis.WatchError:
                raise ConflictError(
                    f"memory {name}: was changed by someone else since it was read; read it again"
                ) from None

    @staticmethod
    def _key(name: str) -> str:
        return _PREFIX + checked_name(name)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (self._redis.RedisError, ValueError, OSError) as error:
            raise EnvironmentProblem(f"{self._shown}: {error}") from None
