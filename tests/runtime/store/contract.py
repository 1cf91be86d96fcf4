"""What every store must do, as one class of tests: each store's file derives from it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titans_runtime.errors import ConflictError, StateError, UsageError
from titans_runtime.store import MemoryStore, Stored

PAST, FUTURE = 1.0, 4_000_000_000.0

# One test body for several classes, each example on the fixture's one store, which it empties first.
_SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]

_steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "stale", "delete", "new"]),
        st.sampled_from(["a", "b/x", "b/y"]),
        st.binary(max_size=40),
    ),
    max_size=25,
)


class StoreContract:
    """Derive, and give a fixture ``store``; ``again`` opens the same one a second time."""

    def damage(self, store: Any, name: str) -> None:  # noqa: ANN401 - each store's own
        """Overwrite the beginning of a memory."""
        raise NotImplementedError

    def test_what_is_put_is_got(self, store: MemoryStore) -> None:
        entry = store.put("user/seven", b"content", expected=None, about={"position": 7})
        assert store.get("user/seven") == Stored(entry, b"content")
        assert store.entry("user/seven") == entry
        assert (entry.size, entry.expires, entry.about) == (7, None, {"position": 7})

    def test_absent(self, store: MemoryStore) -> None:
        assert store.get("nobody") is None
        assert store.entry("nobody") is None
        assert store.delete("nobody") is False
        assert list(store.list()) == []

    def test_empty_and_large_contents(self, store: MemoryStore) -> None:
        large = bytes(range(256)) * 20_000
        for name, content in (("empty", b""), ("large", large)):
            store.put(name, content, expected=None)
            found = store.get(name)
            assert found is not None
            assert found.content == content

    def test_put_compares_the_version(self, store: MemoryStore) -> None:
        first = store.put("a", b"1", expected=None)
        second = store.put("a", b"2", expected=first.version)
        assert second.version != first.version
        for expected, message in ((None, "exists already"), (first.version, "was changed by someone else")):
            with pytest.raises(ConflictError, match=message):
                store.put("a", b"3", expected=expected)
        with pytest.raises(ConflictError, match="is gone"):
            store.put("b", b"3", expected=first.version)
        found = store.get("a")
        assert found == Stored(second, b"2")
        assert store.get("b") is None

    def test_delete_compares_where_asked(self, store: MemoryStore) -> None:
        first = store.put("a", b"1", expected=None)
        second = store.put("a", b"2", expected=first.version)
        with pytest.raises(ConflictError):
            store.delete("a", expected=first.version)
        assert store.delete("a", expected=second.version) is True
        assert store.get("a") is None
        with pytest.raises(ConflictError):
            store.delete("a", expected=second.version)

    def test_a_version_never_returns(self, store: MemoryStore) -> None:
        first = store.put("a", b"1", expected=None)
        store.delete("a")
        again = store.put("a", b"1", expected=None)
        assert again.version != first.version
        with pytest.raises(ConflictError):
            store.put("a", b"2", expected=first.version)

    def test_lists_by_prefix(self, store: MemoryStore) -> None:
        for name in ("anna/one", "anna/two", "annabel/one", "bob"):
            store.put(name, b"x", expected=None, about={"of": name})
        assert sorted(entry.name for entry in store.list()) == ["anna/one", "anna/two", "annabel/one", "bob"]
        found = list(store.list("anna/"))
        assert sorted(entry.name for entry in found) == ["anna/one", "anna/two"]
        assert all(entry.about == {"of": entry.name} and entry.size == 1 for entry in found)

    def test_what_has_expired_is_absent(self, store: MemoryStore) -> None:
        gone = store.put("gone", b"1", expected=None, expires=PAST)
        kept = store.put("kept", b"2", expected=None, expires=FUTURE)
        assert store.get("gone") is None
        assert store.entry("gone") is None
        assert store.delete("gone") is False
        assert [entry.name for entry in store.list()] == ["kept"]
        with pytest.raises(ConflictError):
            store.put("gone", b"3", expected=gone.version)
        store.put("gone", b"3", expected=None)
        found = store.entry("kept")
        assert found is not None
        assert found.expires == kept.expires == FUTURE

    def test_a_put_takes_an_expiry_away(self, store: MemoryStore) -> None:
        first = store.put("a", b"1", expected=None, expires=FUTURE)
        store.put("a", b"2", expected=first.version)
        found = store.entry("a")
        assert found is not None
        assert found.expires is None

    def test_sweep_removes_only_what_has_expired(self, store: MemoryStore) -> None:
        store.put("gone", b"1", expected=None, expires=PAST)
        store.put("kept", b"2", expected=None)
        store.sweep()
        assert store.sweep() == 0
        assert [entry.name for entry in store.list()] == ["kept"]

    def test_a_sweep_ends_when_it_is_told_to(self, store: MemoryStore) -> None:
        store.put("gone/a", b"1", expected=None, expires=PAST)
        assert store.sweep(lambda: True) == 0

    def test_names_are_those_of_the_entries(self, store: MemoryStore) -> None:
        for name in ("anna/one", "anna/deep/two", "annabel/one", "bob"):
            store.put(name, b"x", expected=None)
        assert sorted(store.names("anna/")) == ["anna/deep/two", "anna/one"]
        assert list(store.names("anna/o")) == ["anna/one"]
        assert list(store.names("nobody/")) == []
        assert sorted(store.names()) == ["anna/deep/two", "anna/one", "annabel/one", "bob"]
        store.delete("anna/one")
        store.put("anna/gone", b"x", expected=None, expires=PAST)
        store.sweep()
        assert [entry.name for entry in store.list("anna/")] == ["anna/deep/two"]

    def test_what_is_damaged_is_marked_and_can_be_deleted(self, store: MemoryStore) -> None:
        for name in ("anna/bad", "anna/good"):
            version = store.put(name, b"x", expected=None).version
        self.damage(store, "anna/bad")
        for call in (
            lambda: store.get("anna/bad"),
            lambda: store.entry("anna/bad"),
            lambda: store.put("anna/bad", b"y", expected=None),
            lambda: store.put("anna/bad", b"y", expected=version),
            lambda: store.delete("anna/bad", expected=version),
        ):
            with pytest.raises(StateError, match="restore it from a copy"):
                call()
        assert store.sweep() == 0
        assert {entry.name: entry.damaged for entry in store.list("anna/")} == {
            "anna/bad": True,
            "anna/good": False,
        }
        assert store.delete("anna/bad") is True
        assert store.delete("anna/bad") is False
        assert [entry.name for entry in store.list()] == ["anna/good"]
        store.put("anna/bad", b"new", expected=None)

    @pytest.mark.parametrize(
        "name", ["", "/", "a/", "/a", "a//b", "..", "a/../b", "a.b", "ä", "a\n", "a" * 65, "a/b/c/d/e", "a*"]
    )
    def test_bad_names(self, store: MemoryStore, name: str) -> None:
        for call in (
            lambda: store.get(name),
            lambda: store.entry(name),
            lambda: store.delete(name),
            lambda: store.put(name, b"", expected=None),
        ):
            with pytest.raises(UsageError, match="memory name"):
                call()

    def test_about_is_short_plain_json(self, store: MemoryStore) -> None:
        for about in ({"long": "x" * 5000}, {"set": {1}}, {"nan": float("nan")}):
            with pytest.raises(UsageError, match="about"):
                store.put("a", b"", expected=None, about=about)
        assert store.entry("a") is None

    def test_the_same_store_opened_twice(self, store: MemoryStore, again: MemoryStore) -> None:
        first = store.put("a", b"1", expected=None)
        second = again.put("a", b"2", expected=first.version)
        with pytest.raises(ConflictError):
            store.put("a", b"3", expected=first.version)
        assert store.get("a") == Stored(second, b"2")

    def test_of_many_writers_one_wins_each_time(self, store: MemoryStore, again: MemoryStore) -> None:
        """Every put that was acknowledged is built on the one before it: none is lost."""
        store.put("counter", b"0", expected=None)
        wanted, errors = 8, []

        def count(own: MemoryStore) -> None:
            done = 0
            try:
                while done < wanted:
                    found = own.get("counter")
                    assert found is not None
                    try:
                        own.put("counter", b"%d" % (int(found.content) + 1), expected=found.entry.version)
                        done += 1
                    except ConflictError:
                        pass
            except BaseException as error:  # noqa: BLE001 - to be seen in the main thread
                errors.append(error)

        threads = [threading.Thread(target=count, args=(own,)) for own in (store, again, store, again)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        found = store.get("counter")
        assert found is not None
        assert found.content == b"%d" % (4 * wanted)

    @settings(max_examples=20, suppress_health_check=_SHARED)
    @given(_steps)
    def test_is_a_dictionary(self, store: MemoryStore, steps: list[tuple[str, str, bytes]]) -> None:
        """Any sequence of calls answers as a dictionary with versions does."""
        for entry in list(store.list()):
            store.delete(entry.name)
        known: dict[str, tuple[str, bytes]] = {}
        seen = ["0" * 32]
        for action, name, content in steps:
            version = known[name][0] if name in known else None
            if action == "put":
                known[name] = (store.put(name, content, expected=version).version, content)
                seen.append(known[name][0])
            elif action == "delete":
                assert store.delete(name) is (known.pop(name, None) is not None)
            else:
                expected = None if action == "new" else next((v for v in seen if v != version), None)
                if expected != version:
                    with pytest.raises(ConflictError):
                        store.put(name, content, expected=expected)
        assert {entry.name: entry.version for entry in store.list()} == {n: v for n, (v, _) in known.items()}
        for name, (version, content) in known.items():
            found = store.get(name)
            assert found is not None
            assert (found.entry.version, found.content) == (version, content)
