"""Editing the readout memory along a stream, one gradient period after the other.

A period is ``chunk`` positions. All are scored with the readout memory as it stood when the period
began. Once the target of its last position is known, which is the next period's first token, the
memory takes one gradient step; only then is the next period scored. So every prediction is made
before the memory sees its target.
"""

from __future__ import annotations

import math
import time

import numpy as np

from titans_runtime.backends import Array, Arrays, Backend
from titans_runtime.editor import Editor, EditReport
from titans_runtime.errors import NumericsError

UNKNOWN = -1
"""Target of a position whose next token has not come, or must not be learnt from."""


class ReadoutEditor:
    """The pending period of one session, bound to the gradient graph and to the memory itself."""

    def __init__(self, editor: Editor, backend: Backend, readout: Array, key_dim: int) -> None:
        """Bind the graph to buffers for one period.

        Args:
            editor: step size and period.
            backend: holds the graph ``gradient.readout``.
            readout: ``(1, Dr, V)`` float32, edited in place.
            key_dim: ``Dr``.
        """
        chunk, vocab = editor.chunk, readout.shape[2]
        self.editor = editor
        self.count = 0
        self._readout = readout
        self._targets = np.full((1, chunk), UNKNOWN, np.int64)
        self._keys = np.zeros((1, chunk, key_dim), np.float32)
        self._base = np.zeros((1, chunk, vocab), np.float32)
        self._logits = np.empty((1, chunk, vocab), np.float32)
        self._loss = np.empty((1, chunk), np.float32)
        self._gradient = np.empty(readout.shape, np.float32)
        self._call = backend.graph(editor.graph).bind(
            {
                "input_ids": self._targets,
                "past.readout": readout,
                "readout_key": self._keys,
                "base_logits": self._base,
            },
            {"logits": self._logits, "loss": self._loss, "grad.readout": self._gradient},
        )

    def will_learn(self, tokens: int) -> bool:
        """Whether ``tokens`` more complete a period."""
        return self.count + tokens > self.editor.chunk

    def advance(self, ids: Array, keys: Array, logits: Array, teach: bool, report: EditReport) -> None:
        """Score and learn from a segment that the model has just run.

        Args:
            ids: ``(T,)`` int64, the segment's tokens.
            keys: ``(T, Dr)``, the readout key of each position.
            logits: ``(T, V)``, computed with the memory as it stood at the segment's start;
                rows that the memory has moved on from are rewritten.
            teach: whether ``ids`` are to be learnt from (the model's own samples are not).
            report: receives what was learnt.

        Raises:
            NumericsError: a gradient is not finite; the caller restores the memory.
        """
        moved = False
        base = logits
        if self.will_learn(len(ids)):  # some rows need the logits without the memory's part
            base = logits - keys @ self._readout[0]
        start = 0
        while start < len(ids):
            moved |= self._close_period(ids[start], teach, report)
            first, end = self.count, min(start + self.editor.chunk - self.count, len(ids))
            rows = slice(start, end)
            part = base[rows] if base is not logits else logits[rows] - keys[rows] @ self._readout[0]
            self._append(ids[rows], keys[rows], part, teach)
            if end < len(ids) and self._close_period(ids[end], teach, report):
                if moved:  # the gradient graph has scored these rows on its way
                    logits[rows] = self._logits[0, first : first + end - start]
                moved = True
            elif moved:
                logits[rows] = part + keys[rows] @ self._readout[0]
            start = end

    def finish(self, report: EditReport) -> None:
        """Learn from the pending positions whose targets are known, ending their period early."""
        if self.count > 1:
            self._learn(report, keep_last=True)

    def export(self) -> Arrays:
        """Copies of the pending positions, by name, for a snapshot."""
        return {
            "pending.readout_key": self._keys[0, : self.count].copy(),
            "pending.base_logits": self._base[0, : self.count].copy(),
            "pending.targets": self._targets[0, : self.count].copy(),
        }

    def restore(self, arrays: Arrays) -> None:
        """Take up pending positions of a snapshot of the same period."""
        self.count = len(arrays["pending.targets"])
        self._keys[0, : self.count] = arrays["pending.readout_key"]
        self._base[0, : self.count] = arrays["pending.base_logits"]
        self._targets[0, : self.count] = arrays["pending.targets"]

    def _append(self, ids: Array, keys: Array, base: Array, teach: bool) -> None:
        rows = slice(self.count, self.count + len(ids))
        self._keys[0, rows] = keys
        self._base[0, rows] = base
        self._targets[0, rows] = UNKNOWN
        if teach:
            self._targets[0, self.count : self.count + len(ids) - 1] = ids[1:]
        self.count += len(ids)

    def _close_period(self, following: int, teach: bool, report: EditReport) -> bool:
        """Note the token that followed the last pending position; learn if that completes a period."""
        if self.count == 0:
            return False
        self._targets[0, self.count - 1] = following if teach else UNKNOWN
        if self.count < self.editor.chunk:
            return False
        self._learn(report)
        return True

    def _learn(self, report: EditReport, keep_last: bool = False) -> None:
        """One gradient step on the pending period, which is empty afterwards."""
        began = time.perf_counter()
        known = self._targets[0, : self.count] != UNKNOWN
        self._targets[0, self.count :] = UNKNOWN  # rows that a shorter period does not use
        if known.any():
            self._call.run()
            gradient = self._gradient.reshape(-1)
            norm = math.sqrt(float(np.dot(gradient, gradient)))
            if not math.isfinite(norm):
                raise NumericsError(
                    "the readout memory's gradient is not finite; the session is as it was before the call"
                )
            gradient *= np.float32(self.editor.step)
            memory = self._readout.reshape(-1)
            np.subtract(memory, gradient, out=memory)
            report.updates += 1
            report.gradient_norm.append(norm)
            report.surprise.extend(self._loss[0, : self.count][known].tolist())
        else:
            report.skipped += 1
        if keep_last:
            last = self.count - 1
            for buffer in (self._keys, self._base, self._targets):
                buffer[0, 0] = buffer[0, last]
        self.count = int(keep_last)
        report.seconds += time.perf_counter() - began
