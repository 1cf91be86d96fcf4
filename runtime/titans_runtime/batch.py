"""Several sessions in one call: streams at any position, each with its own memory and edit strength."""

# ruff: noqa: SLF001 - a batch does what its sessions do, side by side: it is their friend
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from titans_runtime.backends import ON_HOST, Array, Arrays, Call
from titans_runtime.buffers import StateBuffers
from titans_runtime.errors import UsageError
from titans_runtime.forward import SEGMENT, empty_sequence
from titans_runtime.readout import Keys
from titans_runtime.report import EditReport
from titans_runtime.tokens import Tokens, checked_input

if TYPE_CHECKING:
    from titans_runtime.model import Model
    from titans_runtime.session import Session


class Batch:
    """Sessions whose states stand side by side, so that the model reads its weights once for all of them.

    While the batch is open its sessions belong to it. Each is left with its own memory, as if it had run
    alone. A call succeeds for all of them, or leaves all as they were. Between calls sessions may join,
    as long as there is room, and leave.

        with model.batch([first, second]) as batch:
            logits = batch.append([b"some", b"tokens"])
    """

    def __init__(self, model: Model, sessions: Sequence[Session], room: int | None = None) -> None:
        """Use :meth:`titans_runtime.model.Model.batch`."""
        if not sessions and room is None:
            raise UsageError("batch: no sessions; give one or more, or room for those that join")
        if room is not None and not (type(room) is int and room >= max(len(sessions), 1)):
            raise UsageError(
                f"batch: room is {room!r}; it must be an integer, {max(len(sessions), 1)} or more"
            )
        if len({id(session) for session in sessions}) != len(sessions):
            raise UsageError("batch: a session is given twice; fork it for a second stream")
        self._model = model
        for session in sessions:
            self._check_model(session)
        self._sessions = list(sessions)
        self._room = len(sessions) if room is None else room
        self._locks: dict[int, contextlib.ExitStack] = {}
        self._sets: tuple[Arrays, Arrays] = ({}, {})
        self._kept: Arrays = {}
        self._edit = np.empty((0, 0), np.float32)
        self._calls: dict[tuple[int, int, bool], tuple[Call, Array, Array, list[Keys]]] = {}
        self._open = False

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions, in the order of tokens and logits; it changes when one leaves."""
        return tuple(self._sessions)

    @property
    def room(self) -> int:
        """How many sessions the batch holds at most."""
        return self._room

    def __enter__(self) -> Self:
        """Take the sessions.

        Raises:
            UsageError: one is in use, or the batch is open already.
        """
        if self._open:
            raise UsageError("batch: is open already")
        sessions = self._sessions
        with contextlib.ExitStack() as taken:
            locks = {id(session): taken.enter_context(contextlib.ExitStack()) for session in sessions}
            for session in sessions:
                locks[id(session)].enter_context(session._exclusive.held())
            buffers = StateBuffers(self._model.manifest, self._model.initial)
            self._sets = (_stacked(buffers.spare, self._room), _stacked(buffers.spare, self._room))
            self._kept = _stacked(buffers.fixed, self._room)
            self._edit = np.zeros((self._room, self._model.manifest.edit_layers), np.float32)
            self._locks = locks
            taken.pop_all()
        self._open, self._sessions = True, []
        for session in sessions:
            self._seat(session)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give every session arrays of its own again."""
        sessions = list(self._sessions)
        for session in reversed(sessions):  # so that none has to move first
            self.leave(session)
        self._open = False
        self._sessions = sessions
        self._calls.clear()
        self._sets, self._kept = ({}, {}), {}

    def join(self, session: Session) -> None:
        """Take one session more, between calls.

        Raises:
            UsageError: the batch is not open or full, or the session is in use or of another model.
        """
        self._check_open()
        self._check_model(session)
        if len(self._sessions) == self._room:
            raise UsageError(f"batch: is full, with {self._room} sessions; let one leave first")
        lock = contextlib.ExitStack()
        lock.enter_context(session._exclusive.held())
        self._locks[id(session)] = lock
        self._seat(session)

    def leave(self, session: Session) -> None:
        """Let a session go, between calls; the last one in the order takes its place.

        Raises:
            UsageError: the batch is not open, or does not hold the session.
        """
        self._check_open()
        if session not in self._sessions:
            raise UsageError("batch: does not hold this session")
        row, last = self._sessions.index(session), self._sessions.pop()
        buffers = session._buffers
        session._take_over(
            (_stacked(buffers.spare, 1), _stacked(buffers.spare, 1)), _stacked(buffers.fixed, 1)
        )
        if last is not session:
            self._sessions[row] = last
            self._place(last, row)
        self._locks.pop(id(session)).close()

    def _seat(self, session: Session) -> None:
        """Give a session the next row."""
        self._place(session, len(self._sessions))
        self._sessions.append(session)

    def _place(self, session: Session, row: int) -> None:
        self._edit[row] = session._edit[0]
        sets = (_row(self._sets[0], row), _row(self._sets[1], row))
        session._take_over(sets, _row(self._kept, row))

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("batch: is not open; use it in a with statement")

    def _check_model(self, session: Session) -> None:
        if session.model is not self._model:
            raise UsageError("batch: a session belongs to another model; batch those of one model")

    def append(self, tokens: Sequence[Tokens], teach: Sequence[bool] | None = None) -> list[Array]:
        """See tokens, and score the token after each of them: :meth:`Session.append` for every session.

        Args:
            tokens: for every session its own, in the order of the sessions. They may differ in number:
                what some have more than the shortest runs by itself.
            teach: for every session, whether it learns from its token, where each is given one; default
                is that all do.

        Returns:
            For every session its logits ``(T, vocab)`` float32.

        Raises:
            UsageError: the batch is not open, there are not as many token sequences as sessions, or not as
                many values of ``teach``, true or false each.
            TokenError: tokens of one are empty, of a wrong type, or out of range.
            NumericsError: a value is not finite.
        """
        self._check_open()
        if not isinstance(tokens, Sequence | np.ndarray):
            raise UsageError(f"batch: tokens are {tokens!r}; give a sequence of tokens for every session")
        if len(tokens) != len(self._sessions):
            raise UsageError(f"batch: {len(tokens)} token sequences for {len(self._sessions)} sessions")
        teach = [True] * len(tokens) if teach is None else _checked_teach(teach, len(tokens))
        ids = [checked_input(one, self._model.manifest) for one in tokens]
        if not all(teach) and any(len(one) != 1 for one in ids):
            raise UsageError("batch: teach is for calls of one token a session; leave it out")
        if not ids:
            return []
        shared = min(len(one) for one in ids)
        self._align()
        with contextlib.ExitStack() as transactions:
            rewritten = any(session._editing.memories for session in self._sessions)
            for session, one in zip(self._sessions, ids, strict=True):
                runs = 2 if rewritten else _segments(shared) + _segments(len(one) - shared)
                transactions.enter_context(session._transaction(len(one), runs=runs))
            return self._advance(ids, shared, teach)

    def _advance(self, ids: list[Array], shared: int, teach: Sequence[bool]) -> list[Array]:
        logits = [np.empty((len(one), self._model.manifest.width), np.float32) for one in ids]
        reports = [session._report(one) for session, one in zip(self._sessions, ids, strict=True)]
        began = [session.position for session in self._sessions]
        start = 0
        while start < shared:
            part = slice(start, start + min(session._most(shared - start) for session in self._sessions))
            self._run_segment([one[part] for one in ids], [one[part] for one in logits], teach, reports)
            start = part.stop
        for row, session in enumerate(self._sessions):
            session._run_segments(ids[row][shared:], logits[row][shared:], teach[row], reports[row])
        for session, scored, position, report in zip(self._sessions, logits, began, reports, strict=True):
            session._conclude(scored, position, report)
        return logits

    def _run_segment(
        self, ids: list[Array], logits: list[Array], teach: Sequence[bool], reports: list[EditReport]
    ) -> None:
        """One call of the model for all rows; every session edits its own memory before and after."""
        for row, session in enumerate(self._sessions):
            session._arrive(ids[row][0], teach[row], reports[row])
        side = self._sessions[0]._buffers.side  # of all: they were aligned, and have run together since
        call, inputs, outputs, keys = self._call(side, len(ids[0]))
        np.stack(ids, out=inputs[: len(ids)])
        call.run()
        for row, session in enumerate(self._sessions):
            logits[row][:] = outputs[row]
            session._buffers.swap()
            session._learn(ids[row], logits[row], keys[row] if keys else None, teach[row], reports[row])

    def _align(self) -> None:
        """Let all rows stand in the set of arrays where most do: some may have run alone, or joined.

        Before the call begins, since it overwrites what a call returns to when it fails.
        """
        side = round(sum(session._buffers.side for session in self._sessions) / len(self._sessions))
        for session in self._sessions:
            if session._buffers.side != side:
                session._buffers.cross_over()

    def _call(self, side: int, tokens: int) -> tuple[Call, Array, Array, list[Keys]]:
        """The call, its tokens, logits and every row's keys. Those of one token are kept."""
        model = self._model
        # Arrays that have twins on a device are bound whole, vacant rows and all.
        on_host = model.backend.residence is ON_HOST
        count = len(self._sessions) if on_host else self._room
        with_keys = any(session._editing.readout for session in self._sessions)
        which = (count, side, with_keys)
        if tokens == 1 and which in self._calls:
            return self._calls[which]
        ids = empty_sequence(model.manifest, count, tokens)
        logits = np.empty((count, tokens, model.manifest.width), np.float32)
        outputs: Arrays = {model.manifest.scores.name: logits}
        keys: list[Keys] = []
        if with_keys:
            width, contexts = self._sessions[0]._forward.key_shape
            dense = np.empty((count, tokens, width), np.float32)
            hashed = np.empty((count, tokens, contexts), np.int64)
            outputs |= {"readout_key": dense, "readout_rows": hashed}
            keys = [Keys(dense[row], hashed[row]) for row in range(count)]
        past, spare = self._sets[side] | self._kept, self._sets[1 - side]
        if count < self._room:
            past, spare = _rows(past, slice(count)), _rows(spare, slice(count))
        call = model.graph.bind(
            {
                model.manifest.sequence.name: ids,
                "edit": self._edit[:count],
                **{f"past.{name}": array for name, array in past.items()},
            },
            outputs | {f"present.{name}": array for name, array in spare.items()},
        )
        if tokens == 1:
            self._calls[which] = (call, ids, logits, keys)
        return call, ids, logits, keys


def _checked_teach(teach: object, sessions: int) -> list[bool]:
    """For every session whether it learns.

    Raises:
        UsageError: they are not as many as sessions, or one is neither true nor false.
    """
    if not isinstance(teach, Sequence | np.ndarray):
        raise UsageError(f"batch: teach is {teach!r}; give True or False for every session")
    if len(teach) != sessions:
        raise UsageError(f"batch: teach has {len(teach)} values for {sessions} sessions")
    for one in teach:
        if not isinstance(one, bool | np.bool):
            raise UsageError(f"batch: teach holds {one!r}; give True or False for every session")
    return [bool(one) for one in teach]


def _segments(tokens: int) -> int:
    return -(-tokens // SEGMENT)


def _stacked(arrays: Arrays, count: int) -> Arrays:
    """Room for ``count`` rows of every array."""
    return {name: np.empty((count, *array.shape[1:]), array.dtype) for name, array in arrays.items()}


def _row(arrays: Arrays, row: int) -> Arrays:
    """One row of every array, as a view."""
    return _rows(arrays, slice(row, row + 1))


def _rows(arrays: Arrays, rows: slice) -> Arrays:
    """Rows of every array, as views."""
    return {name: array[rows] for name, array in arrays.items()}
