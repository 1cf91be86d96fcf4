"""Memories in Redis: a hash a memory, replaced under WATCH, which expires by itself.

Beside them is a set of names for each owner, the first part of a name: a listing asks for that, and not for
every key of the database. A name whose memory has expired stays in it until a sweep.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from titans_runtime.errors import ConflictError, EnvironmentProblem, StateError
from titans_runtime.optional import optional_import
from titans_runtime.store.protocol import (
    Entry,
    Stopped,
    Stored,
    check_expected,
    checked_name,
    damaged_entry,
    is_name,
    never,
)
from titans_runtime.store.put import Puts
from titans_runtime.store.record import entry_of, header_of

_PREFIX: Final = "titans:memory:"
_INDEX: Final = "titans:index:"
_INDEXED: Final = "titans:indexed"
"""Key that is there once the sets of names are complete."""


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
            self._index_all()

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
            with self._reached(), self._client.pipeline() as pipe:
                pipe.delete(key)
                pipe.srem(_index_of(name), name)
                return bool(pipe.execute()[0])
        with self._watched(name, expected) as pipe:
            pipe.delete(key)
            pipe.srem(_index_of(name), name)
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :class:`MemoryStore`."""
        for name in self.names(prefix):
            try:
                entry = self.entry(name)
            except StateError:
                entry = damaged_entry(name)
            if entry is not None:
                yield entry

    def names(self, prefix: str = "") -> Iterator[str]:
        """See :class:`MemoryStore`. One owner's names are one set; without an owner it is all keys."""
        if "/" not in prefix:
            yield from self._scanned(prefix)
            return
        with self._reached():
            found = self._client.smembers(_index_of(prefix))
        yield from (name for name in sorted(map(bytes.decode, found)) if name.startswith(prefix))

    def sweep(self, stopped: Stopped = never) -> int:
        """See :class:`MemoryStore`. The server removes memories by itself; their names go here."""
        removed = 0
        with self._reached():
            for index in self._client.scan_iter(f"{_INDEX}*", count=1000):
                for name in self._client.sscan_iter(index, count=1000):
                    if stopped():
                        return removed
                    removed += self._drop_name(index, name.decode())
        return removed

    def close(self) -> None:
        """See :class:`MemoryStore`."""
        self._client.close()

    def _replace(self, entry: Entry, content: bytes, expected: str | None) -> None:
        key, header = self._key(entry.name), header_of(entry)
        with self._watched(entry.name, expected) as pipe:
            pipe.hset(key, mapping={"header": header, "content": content})
            pipe.sadd(_index_of(entry.name), entry.name)
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

    def _scanned(self, prefix: str) -> Sequence[str]:
        with self._reached():
            keys = [key.decode() for key in self._client.scan_iter(f"{_PREFIX}{prefix}*", count=1000)]
        names = (key.removeprefix(_PREFIX) for key in dict.fromkeys(keys))  # a scan may name one twice
        return [name for name in names if is_name(name)]

    def _index_all(self) -> None:
        """Enter, once a database, what was put before there were sets of names."""
        if self._client.exists(_INDEXED):
            return
        for name in self._scanned(""):
            self._client.sadd(_index_of(name), name)
        self._client.set(_INDEXED, 1)

    def _drop_name(self, index: bytes, name: str) -> bool:
        """Take a name out of its set, if its memory is gone and does not come back meanwhile."""
        key = _PREFIX + name
        if self._client.exists(key):
            return False
        with self._client.pipeline() as pipe, contextlib.suppress(self._redis.WatchError):
            pipe.watch(key)
            if pipe.exists(key):
                return False
            pipe.multi()
            pipe.srem(index, name)
            return bool(pipe.execute()[0])
        return False

    @staticmethod
    def _key(name: str) -> str:
        return _PREFIX + checked_name(name)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (self._redis.RedisError, ValueError, OSError) as error:
            raise EnvironmentProblem(f"{self._shown}: {error}") from None


def _index_of(name: str) -> str:
    """The set that holds a name, by its first part."""
    return _INDEX + name.partition("/")[0]
