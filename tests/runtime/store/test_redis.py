"""The store in Redis, against a server that these tests start themselves."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.store.contract import PAST, StoreContract
from titans_runtime.errors import EnvironmentProblem
from titans_runtime.store import open_store
from titans_runtime.store.redis import RedisStore

pytestmark = pytest.mark.suite("serve")


def start_redis(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A redis-server on loopback that writes every change to the disk before it answers."""
    binary = shutil.which("redis-server")
    assert binary, "this suite needs redis-server: apt-get install redis-server"
    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
    with (folder / "redis.log").open("ab") as log:
        process = subprocess.Popen(
            [binary, "--port", str(port), "--dir", str(folder), *options], stdout=log, stderr=log
        )
    import redis
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    client = redis.Redis(port=port, retry=Retry(ConstantBackoff(0.05), 200))
    client.ping()
    client.close()
    return process


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = start_redis(tmp_path_factory.mktemp("redis"), port)
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait()


class TestRedisStore(StoreContract):
    @pytest.fixture
    def store(self, server: str) -> Iterator[RedisStore]:
        store = RedisStore(server)
        store._client.flushdb()
        yield store
        store.close()

    @pytest.fixture
    def again(self, server: str) -> Iterator[RedisStore]:
        store = RedisStore(server)
        yield store
        store.close()

    def damage(self, store: RedisStore, name: str) -> None:
        store._client.hset(store._key(name), "header", b"{")

    def test_one_owners_listing_does_not_look_at_all_keys(
        self, store: RedisStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("anna/one", "bob/one"):
            store.put(name, b"x", expected=None)
        monkeypatch.setattr(type(store._client), "scan_iter", None)
        assert [entry.name for entry in store.list("anna/")] == ["anna/one"]

    def test_what_was_put_before_there_were_sets_is_listed(self, store: RedisStore, server: str) -> None:
        store.put("anna/one", b"x", expected=None)
        store._client.delete("titans:index:anna", "titans:indexed")
        again = RedisStore(server)
        assert [entry.name for entry in again.list("anna/")] == ["anna/one"]
        again.close()

    def test_the_name_of_what_has_expired_goes(self, store: RedisStore) -> None:
        store.put("anna/gone", b"x", expected=None, expires=PAST)
        store.put("anna/kept", b"x", expected=None)
        assert sorted(store.names("anna/")) == ["anna/gone", "anna/kept"]
        assert store.sweep() == 1
        assert list(store.names("anna/")) == ["anna/kept"]

    def test_a_name_stays_whose_memory_comes_back_meanwhile(
        self, store: RedisStore, again: RedisStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.put("anna/one", b"x", expected=None, expires=PAST)
        exists = store._client.exists

        def late(key: str) -> int:
            found = exists(key)
            again.put("anna/one", b"y", expected=None)
            return int(found)

        monkeypatch.setattr(store._client, "exists", late)
        assert store.sweep() == 0
        assert list(store.names("anna/")) == ["anna/one"]


def test_no_server_is_one_line(port: int) -> None:
    with pytest.raises(EnvironmentProblem, match=r"^redis://\*\*\*@127\.0\.0\.1:1/0: ") as caught:
        open_store("redis://user:secret@127.0.0.1:1/0")
    assert "secret" not in str(caught.value)


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """SIGKILL right after the answer; the next server has it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = start_redis(tmp_path, port)
    store = RedisStore(f"redis://127.0.0.1:{port}/0")
    entry = store.put("a", b"precious", expected=None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start_redis(tmp_path, port)
    try:
        store.close()
        store = RedisStore(f"redis://127.0.0.1:{port}/0")
        found = store.get("a")
        store.close()
        assert found is not None
        assert (found.entry, found.content) == (entry, b"precious")
    finally:
        process.terminate()
        process.wait()
