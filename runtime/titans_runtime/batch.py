"""Several sessions in one call: streams at any position, each with its own memory and edit strength."""

# ruff: noqa: SLF001 - a batch does what its sessions do, side by side: it is their friend
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from titans_runtime.backends import Array, Arrays, Call
from titans_runtime.errors import UsageError
from titans_runtime.readout import Keys
from titans_runtime.report import EditReport
from titans_runtime.session import SEGMENT, empty_sequence
from titans_runtime.tokens import Tokens, checked_input

if TYPE_CHECKING:
    from titans_runtime.model import Model
    from titans_runtime.session import Session


class Batch:
    """Sessions whose states stand side by side, so that the model reads its weights once for all of them.

    While the batch is open its sessions belong to it. Each is left with its own memory, as if it had run
    alone. A call succeeds for all of them, or leaves all as they were.

        with model.batch([first, second]) as batch:
            logits = batch.append([b"some", b"tokens"])
    """

    def __init__(self, model: Model, sessions: Sequence[Session]) -> None:
        """Use :meth:`titans_runtime.model.Model.batch`."""
        if not sessions:
            raise UsageError("batch: no sessions; give one or more")
        if len({id(session) for session in sessions}) != len(sessions):
            raise UsageError("batch: a session is given twice; fork it for a second stream")
        if any(session.model is not model for session in sessions):
            raise UsageError("batch: a session belongs to another model; batch those of one model")
        self._model, self._sessions = model, tuple(sessions)
        self._locks = contextlib.ExitStack()
        self._sets: tuple[Arrays, Arrays] = ({}, {})
        self._kept: Arrays = {}
        self._edit = np.empty(0, np.float32)
        self._calls: dict[int, tuple[Call, Array, Array, list[Keys]]] = {}
        self._open = False

    def __enter__(self) -> Self:
        """Take the sessions.

        Raises:
            UsageError: one is in use, or the batch is open already.
        """
        if self._open:
            raise UsageError("batch: is open already")
        with contextlib.ExitStack() as locks:
            for session in self._sessions:
                locks.enter_context(session._exclusive())
            first, count = self._sessions[0]._buffers, len(self._sessions)
            self._sets = (_stacked(first.spare, count), _stacked(first.spare, count))
            self._kept = _stacked(first.fixed, count)
            self._edit = np.concatenate([session._edit for session in self._sessions])
            for row, session in enumerate(self._sessions):
                sets = (_row(self._sets[0], row), _row(self._sets[1], row))
                session._take_over(sets, _row(self._kept, row))
            self._locks = locks.pop_all()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give every session arrays of its own again."""
        self._open = False
        self._calls.clear()
        for session in self._sessions:
            buffers = session._buffers
            session._take_over(
                (_stacked(buffers.spare, 1), _stacked(buffers.spare, 1)), _stacked(buffers.fixed, 1)
            )
        self._sets, self._kept = ({}, {}), {}
        self._locks.close()

    def append(self, tokens: Sequence[Tokens]) -> list[Array]:
        """See tokens, and score the token after each of them: :meth:`Session.append` for every session.

        Args:
            tokens: for every session its own, in the order of the sessions. They may differ in number:
                what some have more than the shortest runs by itself.

        Returns:
            For every session its logits ``(T, vocab)`` float32.

        Raises:
            UsageError: the batch is not open, or there are not as many token sequences as sessions.
            TokenError: tokens of one are empty, of a wrong type, or out of range.
            NumericsError: a value is not finite.
        """
        if not self._open:
            raise UsageError("batch: is not open; use it in a with statement")
        if len(tokens) != len(self._sessions):
            raise UsageError(f"batch: {len(tokens)} token sequences for {len(self._sessions)} sessions")
        ids = [checked_input(one, self._model.manifest) for one in tokens]
        shared = min(len(one) for one in ids)
        self._align()
        with contextlib.ExitStack() as transactions:
            rewritten = any(session._editing.memories for session in self._sessions)
            for session, one in zip(self._sessions, ids, strict=True):
                runs = 2 if rewritten else _segments(shared) + _segments(len(one) - shared)
                transactions.enter_context(session._transaction(len(one), runs=runs))
            return self._advance(ids, shared)

    def _advance(self, ids: list[Array], shared: int) -> list[Array]:
        logits = [np.empty((len(one), self._model.manifest.width), np.float32) for one in ids]
        reports = [EditReport(tokens=len(one)) for one in ids]
        began = [session.position for session in self._sessions]
        start = 0
        while start < shared:
            part = slice(start, start + min(session._most(shared - start) for session in self._sessions))
            self._run_segment([one[part] for one in ids], [one[part] for one in logits], reports)
            start = part.stop
        for session, one, scored, report in zip(self._sessions, ids, logits, reports, strict=True):
            session._run_segments(one[shared:], scored[shared:], teach=True, report=report)
        for session, scored, position, report in zip(self._sessions, logits, began, reports, strict=True):
            session._conclude(scored, position, report)
        return logits

    def _run_segment(self, ids: list[Array], logits: list[Array], reports: list[EditReport]) -> None:
        """One call of the model for all rows; every session edits its own memory before and after."""
        for session, one, report in zip(self._sessions, ids, reports, strict=True):
            session._arrive(one[0], teach=True, report=report)
        side = self._sessions[0]._buffers.side  # of all: they were aligned, and have run together since
        call, inputs, outputs, keys = self._call(side, len(ids[0]))
        np.stack(ids, out=inputs)
        call.run()
        for row, (session, one, report) in enumerate(zip(self._sessions, ids, reports, strict=True)):
            logits[row][:] = outputs[row]
            session._buffers.swap()
            session._learn(one, logits[row], keys[row] if keys else None, teach=True, report=report)

    def _align(self) -> None:
        """Let all rows stand in the same set of arrays: some may have run alone.

        Before the call begins, since it overwrites what a call returns to when it fails.
        """
        side = self._sessions[0]._buffers.side
        for session in self._sessions:
            if session._buffers.side != side:
                session._buffers.cross_over()

    def _call(self, side: int, tokens: int) -> tuple[Call, Array, Array, list[Keys]]:
        """The call, its tokens, logits and every row's keys. That of one token is kept."""
        if tokens == 1 and side in self._calls:
            return self._calls[side]
        count, model = len(self._sessions), self._model
        ids = empty_sequence(model.manifest, count, tokens)
        logits = np.empty((count, tokens, model.manifest.width), np.float32)
        outputs: Arrays = {model.manifest.scores.name: logits}
        keys: list[Keys] = []
        if any(session._editing.readout for session in self._sessions):
            width, contexts = self._sessions[0]._key_shape
            dense = np.empty((count, tokens, width), np.float32)
            rows = np.empty((count, tokens, contexts), np.int64)
            outputs |= {"readout_key": dense, "readout_rows": rows}
            keys = [Keys(dense[row], rows[row]) for row in range(count)]
        past, spare = self._sets[side] | self._kept, self._sets[1 - side]
        call = model.graph.bind(
            {
                model.manifest.sequence.name: ids,
                "edit": self._edit,
                **{f"past.{name}": array for name, array in past.items()},
            },
            outputs | {f"present.{name}": array for name, array in spare.items()},
        )
        if tokens == 1:
            self._calls[side] = (call, ids, logits, keys)
        return call, ids, logits, keys


def _segments(tokens: int) -> int:
    return -(-tokens // SEGMENT)


def _stacked(arrays: Arrays, count: int) -> Arrays:
    """Room for ``count`` rows of every array."""
    return {name: np.empty((count, *array.shape[1:]), array.dtype) for name, array in arrays.items()}


def _row(arrays: Arrays, row: int) -> Arrays:
    """One row of every array, as a view."""
    return {name: array[row : row + 1] for name, array in arrays.items()}
