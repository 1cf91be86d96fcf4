"""Editing the readout memory along a stream, one gradient period after the other.

Period ``n`` is the positions ``n·chunk … (n+1)·chunk - 1`` of the stream. All are scored with the
readout memory ``R`` as it stood when the period began. Once the target of its last position is known,
which is the next period's first token, the memory takes one gradient step; only then is the next
period scored. So every prediction is made before the memory sees its target.

The loss depends on ``R`` through the logits alone. So a segment is scored once, with the memory as it
stands, and the gradient graph is given those logits as base and the *change* of the memory since then
as its memory. A key has a dense part and a few one-hot parts, so a period changes the first rows of the
memory and those few that its positions pick; NumPy adds to these and touches no others.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from titans_runtime.backends import Array, Arrays, Backend
from titans_runtime.buffers import StateBuffers
from titans_runtime.editor import Editor
from titans_runtime.errors import NumericsError
from titans_runtime.report import EditReport, Lesson
from titans_runtime.snapshot import ENERGY

UNKNOWN = -1
"""Target of a position whose next token has not come, or must not be learnt from."""

_READOUT = "readout"
_LARGEST_UPDATE = 1e30
"""Norm of an update beyond which sums of updates might leave float32."""


class Keys(NamedTuple):
    """Readout keys: ``dense (T, d)`` float32, and ``rows (T, contexts)`` int64 that they pick besides."""

    dense: Array
    rows: Array

    @classmethod
    def empty(cls, tokens: int, width: int, contexts: int) -> Keys:
        """Room for keys."""
        return cls(np.zeros((tokens, width), np.float32), np.zeros((tokens, contexts), np.int64))

    def part(self, positions: slice) -> Keys:
        """Those of ``positions``, as views."""
        return Keys(self.dense[positions], self.rows[positions])


@dataclass(frozen=True)
class PendingMark:
    """Pending positions at one moment. ``arrays`` is None where a call can only add to them.

    ``energy`` is what the optimizer had summed up.
    """

    count: int
    arrays: Arrays | None
    energy: Array


class ReadoutEditor:
    """The pending period of one session, bound to the gradient graph."""

    def __init__(self, editor: Editor, backend: Backend, buffers: StateBuffers) -> None:
        """Bind the graph to buffers for one period.

        Args:
            editor: step size and period.
            backend: holds the graph ``gradient.readout``.
            buffers: hold the readout memory, ``(1, Dr, V)`` float32.
        """
        chunk, (_, height, vocab) = editor.chunk, buffers.readout.shape
        self.editor = editor
        self.count = 0
        self.spent = 0.0  # seconds of editing in the call at hand
        self._buffers = buffers
        self._graph = backend.graph(editor.graph)
        width, contexts = _key_shape(backend, editor.graph)
        self._first = np.arange(width)  # the rows that the dense part reads
        self._energy = np.zeros(height, np.float32)  # Σ ‖gradient‖² of each row, for adagrad
        self._change = np.zeros(buffers.readout.shape, np.float32)  # zero, but for the time of `stream`
        self._changed: list[Array] = []  # its rows that are not zero
        self._targets = np.full((1, chunk), UNKNOWN, np.int64)
        self._keys = Keys.empty(chunk, width, contexts)
        self._scored = np.zeros((1, chunk, vocab), np.float32)
        self._logits = np.empty((1, chunk, vocab), np.float32)
        self._loss = np.empty((1, chunk), np.float32)
        self._gradient = np.empty((1, width, vocab), np.float32)
        self._parts = np.empty((1, chunk, vocab), np.float32)
        self._call = self._graph.bind(
            {
                "input_ids": self._targets,
                "past.readout": self._change,
                "readout_key": self._keys.dense[None],
                "readout_rows": self._keys.rows[None],
                "base_logits": self._scored,
            },
            {
                "logits": self._logits,
                "loss": self._loss,
                "grad.readout": self._gradient,
                "grad.readout_rows": self._parts,
            },
        )

    def room(self, position: int) -> int:
        """Positions from ``position`` to the end of its period."""
        return self.editor.chunk - position % self.editor.chunk

    def will_learn(self, position: int, tokens: int) -> bool:
        """Whether ``tokens`` more from ``position`` on complete a period."""
        ended = self.count > 0 and position % self.editor.chunk == 0
        return ended or tokens > self.room(position)

    def arrive(self, token: int, position: int, teach: bool, report: EditReport) -> None:
        """Note the token that comes at ``position``; learn if that completes a period.

        Args:
            token: target of the last pending position.
            position: where it stands in the stream.
            teach: whether it is to be learnt from (the model's own samples are not).
            report: receives what was learnt.

        Raises:
            NumericsError: the gradient is not finite; the caller restores the memory.
        """
        if self.count == 0:
            return
        self._targets[0, self.count - 1] = token if teach else UNKNOWN
        if position % self.editor.chunk == 0:
            self._learn(position, report)

    def hold(self, ids: Array, keys: Keys, logits: Array, teach: bool = True) -> None:
        """Keep positions of the current period until their targets are known.

        Args:
            ids: ``(T,)`` int64.
            keys: their readout keys.
            logits: ``(T, V)`` as they were scored.
            teach: whether ``ids`` are to be learnt from.
        """
        rows = slice(self.count, self.count + len(ids))
        self._keys.dense[rows], self._keys.rows[rows] = keys
        self._scored[0, rows] = logits
        self._targets[0, rows] = UNKNOWN
        if teach:
            self._targets[0, self.count : self.count + len(ids) - 1] = ids[1:]
        self.count += len(ids)

    def stream(self, ids: Array, keys: Keys, logits: Array, position: int, report: EditReport) -> None:
        """Learn from a segment that reaches beyond the current period.

        Args:
            ids: ``(T,)`` int64, the tokens from ``position`` on; all are learnt from.
            keys: their readout keys.
            logits: ``(T, V)``, scored with the memory as it stands; rows of later periods are
                rewritten with the memory of their period.
            position: of the first token; nothing is due from before.
            report: receives what was learnt.

        Raises:
            NumericsError: a gradient is not finite; the caller restores the memory.
        """
        chunk, start = self.editor.chunk, self.room(position)
        self.hold(ids[:start], keys.part(slice(start)), logits[:start])
        self._targets[0, self.count - 1] = ids[start]
        self._learn(position + start, report, streaming=True)
        while start + chunk < len(ids):
            rows = slice(start, start + chunk)
            self.hold(ids[rows], keys.part(rows), logits[rows])
            self._targets[0, -1] = ids[start + chunk]
            self._learn(position + start + chunk, report, streaming=True)
            logits[rows] = self._logits[0]
            start += chunk
        rest = keys.part(slice(start, None))
        self._score(rest, logits[start:])
        self.hold(ids[start:], rest, logits[start:])
        if self._changed:
            self._settle()

    def hand_over(self, token: int, position: int, report: EditReport) -> None:
        """Learn from all pending positions, whose last target is ``token``: another editor takes over."""
        if self.count:
            self._targets[0, self.count - 1] = token
            self._learn(position, report)

    def finish(self, position: int, report: EditReport) -> Arrays:
        """Learn from the pending positions whose targets are known.

        Returns:
            The last position, whose target is still to come, for :meth:`restore`.
        """
        pending = self.export()
        if self.count > 1:
            self._learn(position, report)
        self.count = 0
        return {name: array[-1:] for name, array in pending.items()}

    def export(self) -> Arrays:
        """Copies of the pending positions, by name, for a snapshot."""
        return {
            "pending.readout_key": self._keys.dense[: self.count].copy(),
            "pending.readout_rows": self._keys.rows[: self.count].copy(),
            "pending.logits": self._scored[0, : self.count].copy(),
            "pending.targets": self._targets[0, : self.count].copy(),
        }

    def restore(self, arrays: Arrays) -> None:
        """Take up pending positions of the current period."""
        self.count = len(arrays["pending.targets"])
        self._keys.dense[: self.count] = arrays["pending.readout_key"]
        self._keys.rows[: self.count] = arrays["pending.readout_rows"]
        self._scored[0, : self.count] = arrays["pending.logits"]
        self._targets[0, : self.count] = arrays["pending.targets"]

    def accumulated(self) -> Arrays:
        """A copy of what the optimizer has summed up, by name, for a snapshot."""
        return {ENERGY: self._energy.copy()} if self.editor.optimizer == "adagrad" else {}

    def take_up(self, arrays: Arrays) -> None:
        """Continue from a snapshot: the optimizer's sums, and the pending positions if there are any."""
        self._energy[:] = arrays.get(ENERGY, 0.0)
        self.count = 0
        if "pending.targets" in arrays:
            self.restore(arrays)

    def mark(self, learns: bool) -> PendingMark:
        """What :meth:`rewind` returns to. ``learns``: whether periods may end before that."""
        return PendingMark(self.count, self.export() if learns else None, self._energy.copy())

    def rewind(self, mark: PendingMark) -> None:
        """Undo everything since the mark, but for the memory itself, which is the caller's."""
        self._forget_change()
        self._energy[:] = mark.energy
        if mark.arrays is not None:
            self.restore(mark.arrays)
        self.count = mark.count
        if self.count:
            self._targets[0, self.count - 1] = UNKNOWN

    def _learn(self, position: int, report: EditReport, streaming: bool = False) -> None:
        """Steps on the pending positions, which end before ``position`` and of which none is left."""
        began = time.perf_counter()
        count, self.count = self.count, 0
        lesson = Lesson(self.editor.objective, position - count, count)
        known = self._targets[0, :count] != UNKNOWN
        if known.any():
            self._clear(count)
            self._call.run()
            self._take_steps(known, lesson, report, began)
        else:
            lesson.refused = "no text to learn from"
        if not streaming and lesson.steps:
            self._settle()
        lesson.seconds = time.perf_counter() - began
        self.spent += lesson.seconds
        report.add(lesson)

    def _take_steps(self, known: Array, lesson: Lesson, report: EditReport, began: float) -> None:
        """Change the memory step by step, as far as the policy lets it. The call has been run."""
        editor = self.editor
        surprise = self._loss[0, : len(known)][known]
        lesson.loss = float(surprise.mean())
        if lesson.loss < editor.threshold:
            lesson.refused = "not surprising enough"
        elif 0 < editor.budget <= 1000 * self.spent:
            lesson.refused = "time budget spent"
        if lesson.refused:
            return
        rows, picks = self._picked(known)
        measures = editor.rollback or editor.steps > 1
        scored = self._logits.copy() if measures else self._logits
        for number in range(editor.steps):
            if number and 0 < editor.budget <= 1000 * (self.spent + time.perf_counter() - began):
                lesson.refused = "time budget spent"
            else:
                lesson.refused = self._attempt(rows, picks, known, lesson, last=number + 1 == editor.steps)
            if lesson.refused:
                break
        if measures:
            self._logits[:] = scored
        if lesson.steps:
            lesson.learnt = len(surprise)
            report.surprise.extend(surprise.tolist())

    def _attempt(self, rows: Array, picks: Array, known: Array, lesson: Lesson, last: bool) -> str:
        """One step, measured where another follows or it may be taken back; or why none was kept."""
        before = (self._change[0, rows], self._energy[rows], lesson.norms) if self.editor.rollback else None
        if reason := self._step(rows, picks, known, lesson, forgets=lesson.steps == 0):
            return reason
        if before is not None or not last:
            self._call.run()
            reached = lesson.loss_after if lesson.steps else lesson.loss
            after = float(self._loss[0, : len(known)][known].mean())
            if before is not None and not after <= reached:
                self._change[0, rows], self._energy[rows], lesson.norms = before
                return "loss rose" if math.isfinite(after) else "not finite"
            lesson.loss_after = after
        lesson.steps += 1
        return ""

    def _step(self, rows: Array, picks: Array, known: Array, lesson: Lesson, forgets: bool) -> str:
        """One step on the gradient that the call has left; or why there is none.

        ``forgets``: whether the rows that one-hot parts pick lose their share first.
        """
        parts = picks @ self._parts[0, : len(known)][known]
        gradient = np.concatenate([self._gradient[0], parts])
        energy = np.einsum("ij,ij->i", gradient, gradient)
        norm = math.sqrt(float(energy.sum()))
        if not norm * self.editor.step < _LARGEST_UPDATE:
            reason = "too large" if math.isfinite(norm) else "not finite"
            if self.editor.rollback:
                return reason
            raise NumericsError(
                f"the readout memory's gradient is {reason}; the session is as it was before the call"
            )
        if 0 < self.editor.clip < norm:
            shorter = np.float32(self.editor.clip / norm)
            gradient *= shorter
            energy *= shorter * shorter
        lesson.norms = {_READOUT: norm}
        self._changed.append(rows)
        if forgets and self.editor.retention is not None:
            self._forget(rows[len(self._first) :])
        self._change[0, rows] -= self._update(rows, gradient, energy)
        return ""

    def _forget(self, rows: Array) -> None:
        """Let rows of the memory fade, of which each is named once."""
        lost = np.float32(1 - (self.editor.retention or 0.0))
        self._change[0, rows] -= lost * (self._buffers.readout[0, rows] + self._change[0, rows])

    def _settle(self) -> None:
        """Let what has changed be part of the memory."""
        rows = np.unique(np.concatenate(self._changed)) if len(self._changed) > 1 else self._changed[0]
        self._buffers.edit_readout(rows)[rows] += self._change[0, rows]
        self._forget_change()

    def _picked(self, known: Array) -> tuple[Array, Array]:
        """Rows of the memory that the pending positions change, and which position picks which of them."""
        picked = self._keys.rows[: len(known)][known]
        rows, place = np.unique(picked, return_inverse=True)
        position = np.repeat(np.arange(len(picked)), picked.shape[1])
        picks = np.zeros((len(rows), len(picked)), np.float32)
        np.add.at(picks, (place.reshape(-1), position), 1.0)
        return np.concatenate([self._first, rows]), picks

    def _update(self, rows: Array, gradient: Array, energy: Array) -> Array:
        """The gradient turned into what is subtracted, in place."""
        step = np.float32(self.editor.step)
        if self.editor.optimizer == "adagrad":
            self._energy[rows] += energy
            gradient *= (step / np.sqrt(1 + self._energy[rows]))[:, None]
        else:
            gradient *= step
        return gradient

    def _forget_change(self) -> None:
        for rows in self._changed:
            self._change[0, rows] = 0
        self._changed.clear()

    def _clear(self, count: int) -> None:
        """Empty the rows that a shorter period does not use: what a failed call left may not be finite."""
        if count < self.editor.chunk:
            self._targets[0, count:] = UNKNOWN
            self._keys.dense[count:] = 0
            self._keys.rows[count:] = 0
            self._scored[0, count:] = 0

    def _score(self, keys: Keys, logits: Array) -> None:
        """Rewrite ``logits (T, V)`` with the memory as it has become."""
        tokens = len(logits)
        self._graph.bind(
            {
                "input_ids": np.full((1, tokens), UNKNOWN, np.int64),
                "past.readout": self._change,
                "readout_key": keys.dense[None],
                "readout_rows": keys.rows[None],
                "base_logits": logits[None].copy(),
            },
            {
                "logits": logits[None],
                "loss": np.empty((1, tokens), np.float32),
                "grad.readout": self._gradient,
                "grad.readout_rows": np.empty((1, *logits.shape), np.float32),
            },
        ).run()


def _key_shape(backend: Backend, graph: str) -> tuple[int, int]:
    """Width of a key's dense part, and rows that it picks besides."""
    inputs = {tensor.name: tensor.shape for tensor in backend.manifest.graphs[graph].inputs}
    return int(inputs["readout_key"][-1]), int(inputs["readout_rows"][-1])
