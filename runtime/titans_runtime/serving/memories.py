"""The memories of a server: in a store, some of them also in RAM, each in one request's hands at a time."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_runtime.compare import compare
from titans_runtime.errors import ConflictError, DataError, UsageError
from titans_runtime.session import Session
from titans_runtime.snapshot import Snapshot
from titans_runtime.state import snapshot_bytes, snapshot_from_bytes
from titans_runtime.store import Entry, MemoryStore
from titans_runtime.store.protocol import checked_name

if TYPE_CHECKING:
    from titans_runtime.model import Model


class NoSuchMemory(DataError):
    """There is none of this name, or it is not this owner's."""


class TooMany(DataError):
    """An owner has as many memories as one may have."""


@dataclass(frozen=True)
class Held:
    """A memory as this server knows it.

    Attributes:
        snapshot: its state.
        entry: as it stands in the store.
        saved: whether the two are the same.
    """

    snapshot: Snapshot
    entry: Entry
    saved: bool = True


@dataclass(frozen=True)
class Description:
    """A memory, but for its state."""

    id: str
    version: str
    position: int
    saved: bool
    bytes: int
    created: int
    expires: float | None
    edit: list[float]
    editor: dict[str, Any] | None
    damaged: bool = False


class Memories:
    """Every method may be called from any thread, and works on files or the network: not in an event loop."""

    def __init__(
        self,
        model: Model,
        store: MemoryStore,
        most: int,
        hot: int,
        expire: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start with what the store holds.

        Args:
            model: of all memories.
            store: where they are kept.
            most: memories of one owner.
            hot: memories that stay in RAM, besides those that are not saved yet.
            expire: seconds after its last save when a memory is gone; 0 for never.
            clock: for that.
        """
        self._model, self._store, self._most, self._hot_size = model, store, most, hot
        self._expire, self._clock = expire, clock
        self._hot: OrderedDict[str, Held] = OrderedDict()  # the one that was used last at the end
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    # --- one memory in hand

    @contextlib.contextmanager
    def in_hand(self, owner: str, name: str) -> Iterator[str]:
        """Nobody else of this server touches a memory meanwhile; gives its key in the store.

        Raises:
            ConflictError: it is in use.
        """
        key = self.take(owner, name)
        try:
            yield key
        finally:
            self.release(key)

    def take(self, owner: str, name: str) -> str:
        """The same for callers that span threads; they :meth:`release` the key.

        Raises:
            ConflictError: it is in use.
        """
        key = f"{owner}/{_checked_id(name)}"
        with self._lock:
            if key in self._busy:
                raise ConflictError(f"memory {name}: is in use by another request; wait for its end")
            self._busy.add(key)
        return key

    def release(self, key: str) -> None:
        """Let others have it."""
        with self._lock:
            self._busy.discard(key)

    def held(self, key: str) -> Held:
        """A memory as it stands, from RAM where the store has not moved on.

        Raises:
            NoSuchMemory: there is none.
            ConflictError: another server has written it, and this one holds changes that are not saved.
            StateError: it is damaged, or belongs to another bundle.
        """
        entry = self._store.entry(key)
        if entry is None:
            self._forget(key)
            raise NoSuchMemory(f"memory {_id(key)}: there is none of this name; create it first")
        held = self._hot.get(key)
        if held is not None and held.entry.version == entry.version:
            return held
        self._forget(key)
        if held is not None and not held.saved:
            raise ConflictError(
                f"memory {_id(key)}: another server has saved it since; what was not saved here is dropped"
            )
        stored = self._store.get(key)
        if stored is None:
            raise NoSuchMemory(f"memory {_id(key)}: there is none of this name; create it first")
        snapshot = snapshot_from_bytes(stored.content, Path(f"memory {_id(key)}"), self._model.manifest)
        return self._keep(key, Held(snapshot, stored.entry))

    def session(self, key: str) -> Session:
        """A session that continues from a memory; the memory itself changes with :meth:`commit` only."""
        return self._model.continued(self.held(key).snapshot, f"memory {_id(key)}")

    def commit(self, key: str, session: Session, save: bool) -> Description:
        """Let a memory go on to where a session stands.

        Args:
            key: of a memory in hand.
            session: that :meth:`session` gave.
            save: into the store; otherwise the change stays in RAM until it is saved, which it is when
                there are many of that kind, too.

        Raises:
            ConflictError: another server has written the memory since it was read.
        """
        before = self._hot[key]
        held = Held(session.snapshot(), before.entry, saved=False)
        unsaved = sum(not one.saved for one in list(self._hot.values()))
        if save or unsaved >= self._hot_size:
            return self._save(key, held)
        return self._described(key, self._keep(key, held))

    # --- what callers ask for

    def create(self, owner: str, name: str | None, session: Session) -> Description:
        """A new memory that stands where a session stands.

        Raises:
            ConflictError: there is one of this name.
            TooMany: the owner has too many.
        """
        name = name if name is not None else f"mem-{secrets.token_hex(8)}"
        with self.in_hand(owner, name) as key:
            self._check_room(f"{owner}/")
            about = {"created": int(self._clock())}
            empty = Entry(key, "", 0, None, about)
            return self._save(key, Held(session.snapshot(), empty, saved=False), expected=None)

    def fork(self, owner: str, name: str, new: str | None) -> Description:
        """A second memory that stands where the first one does, unsaved changes included."""
        with self.in_hand(owner, name) as key:
            session = self.session(key)
        return self.create(owner, new, session)

    def reset(self, owner: str, name: str) -> Description:
        """Let a memory be as it was when it was new; it keeps its editing."""
        with self.in_hand(owner, name) as key:
            held = self.held(key)
            old = self._model.continued(held.snapshot)
            new = self._model.session(old.edit, old.editor).snapshot()
            return self._save(key, replace(held, snapshot=new, saved=False))

    def save(self, owner: str, name: str) -> Description:
        """Save what is not saved."""
        with self.in_hand(owner, name) as key:
            held = self.held(key)
            return self._described(key, held) if held.saved else self._save(key, held)

    def describe(self, owner: str, name: str) -> Description:
        """What one is."""
        with self.in_hand(owner, name) as key:
            return self._described(key, self.held(key))

    def list(self, owner: str) -> Sequence[Description]:
        """What each is, by name."""
        entries = sorted(self._store.list(f"{owner}/"), key=lambda entry: entry.name)
        return [self._described_entry(entry) for entry in entries]

    def compare(self, owner: str, name: str, other: str) -> Sequence[dict[str, Any]]:
        """Every tensor of two memories side by side."""
        snapshots = []
        for one in (name, other):
            with self.in_hand(owner, one) as key:
                snapshots.append(self.held(key).snapshot)
        return [asdict(item) | {"relative": item.relative} for item in compare(*snapshots)]

    def export(self, owner: str, name: str) -> bytes:
        """The content of a memory file, unsaved changes included."""
        with self.in_hand(owner, name) as key:
            return snapshot_bytes(self.held(key).snapshot)

    def delete(self, owner: str, name: str) -> None:
        """Remove one, a damaged one too.

        Raises:
            NoSuchMemory: there is none.
        """
        with self.in_hand(owner, name) as key:
            found = self._store.delete(key)
            self._forget(key)  # only now: where the store fails, what is not saved is still here
            if not found:
                raise NoSuchMemory(f"memory {name}: there is none of this name")

    def save_all(self) -> tuple[int, Sequence[str]]:
        """Save what is not saved, for the end; how many were, and why others were not."""
        unsaved = [(key, held) for key, held in list(self._hot.items()) if not held.saved]
        problems = []
        for key, held in unsaved:
            try:
                self._save(key, held)
            except Exception as error:  # noqa: BLE001 - the others are to be saved all the same
                problems.append(f"{key}: {error}")
        return len(unsaved) - len(problems), problems

    # --- inside

    def _check_room(self, prefix: str) -> None:
        """Count names; only who has many of them has the entries read, of which some may have expired.

        Raises:
            TooMany: there is no room for another.
        """
        for every in (self._store.names, self._store.list):
            count = sum(1 for _ in every(prefix))
            if count < self._most:
                return
        raise TooMany(f"{count} memories, the most that one owner may have; delete one first")

    def _save(self, key: str, held: Held, expected: str | None = "") -> Description:
        expected = held.entry.version if expected == "" else expected
        snapshot = held.snapshot
        about = dict(held.entry.about) | {"position": snapshot.position, "bundle": snapshot.bundle[:16]}
        about |= {"edit": list(snapshot.edit), "editor": snapshot.editor}
        expires = self._clock() + self._expire if self._expire else None
        content = snapshot_bytes(snapshot)
        try:
            entry = self._store.put(key, content, expected=expected, about=about, expires=expires)
        except ConflictError:
            if expected is not None:
                self._forget(key)
            raise
        return self._described(key, self._keep(key, Held(snapshot, entry)))

    def _keep(self, key: str, held: Held) -> Held:
        with self._lock:
            self._hot[key] = held
            self._hot.move_to_end(key)
            clean = [name for name, one in self._hot.items() if one.saved and name not in self._busy]
            for name in clean[: max(len(self._hot) - max(self._hot_size, 1), 0)]:
                del self._hot[name]
        return held

    def _forget(self, key: str) -> None:
        with self._lock:
            self._hot.pop(key, None)

    def _described(self, key: str, held: Held) -> Description:
        snapshot, entry = held.snapshot, held.entry
        return Description(
            id=_id(key),
            version=entry.version,
            position=snapshot.position,
            saved=held.saved,
            bytes=entry.size,
            created=int(entry.about.get("created", 0)),
            expires=entry.expires,
            edit=list(snapshot.edit),
            editor=snapshot.editor,
        )

    def _described_entry(self, entry: Entry) -> Description:
        held = self._hot.get(entry.name)
        if held is not None and held.entry.version == entry.version:
            return self._described(entry.name, held)
        about = entry.about
        return Description(
            id=_id(entry.name),
            version=entry.version,
            position=int(about.get("position", 0)),
            saved=not entry.damaged,
            bytes=entry.size,
            created=int(about.get("created", 0)),
            expires=entry.expires,
            edit=list(about.get("edit", [])),
            editor=about.get("editor"),
            damaged=entry.damaged,
        )


def _checked_id(name: str) -> str:
    if "/" in checked_name(name):
        raise UsageError(f"memory name {name!r}: give 1 to 64 letters, digits, - or _")
    return name


def _id(key: str) -> str:
    return key.partition("/")[2]
