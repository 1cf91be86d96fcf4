"""A session: one stream and one memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from titans_runtime.backends import Array, Arrays
from titans_runtime.buffers import StateBuffers
from titans_runtime.editing import Editing
from titans_runtime.editor import Editor
from titans_runtime.errors import NumericsError, StateError, UsageError
from titans_runtime.exclusive import Exclusive
from titans_runtime.forward import SEGMENT, Forward
from titans_runtime.readout import Keys
from titans_runtime.report import EditLog, EditReport, Lesson
from titans_runtime.sampling import Sampling, seeded
from titans_runtime.snapshot import Snapshot, with_memories_of
from titans_runtime.state import save_snapshot
from titans_runtime.tokens import Tokens, checked_input

if TYPE_CHECKING:
    from titans_runtime.model import Model


class Session:
    """One stream of tokens and the memory that it leaves behind.

    A call either succeeds or leaves the session as it was, whatever interrupts it. Two threads on
    one session are refused, never mixed.
    """

    def __init__(self, model: Model, edit: tuple[float, ...], editor: Editor | None) -> None:
        """Use :meth:`titans_runtime.model.Model.session`."""
        self.model = model
        self._strength = edit
        self.position = 0
        self.last_edit: EditReport | None = None
        self._log: EditLog | None = None
        self._logged: list[Lesson] = []  # what the call at hand has added to the log
        self._edit = np.array([edit], np.float32).reshape(1, -1)
        self._buffers = StateBuffers(model.manifest, model.initial, model.backend.residence)
        self._last_logits: Array | None = None
        self._editing = self._open_editor(editor)
        self._exclusive = Exclusive()
        self._forward = Forward(model.graph, model.manifest, self._buffers, self._edit)

    @property
    def edit(self) -> tuple[float, ...]:
        """Strength of the fused rule, per layer."""
        return self._strength

    @property
    def editor(self) -> Editor | None:
        """What the session learns by the open way."""
        return self._editing.editor

    @property
    def log(self) -> EditLog | None:
        """Receives every lesson of the calls to come, or None.

        Raises:
            UsageError: on assignment of what is no log.
        """
        return self._log

    @log.setter
    def log(self, log: EditLog | None) -> None:
        if log is not None and not isinstance(log, EditLog):
            raise UsageError(f"log is {log!r}; give an EditLog(), or None")
        self._log = log

    def append(self, tokens: Tokens) -> Array:
        """See tokens, and score the token after each of them.

        Args:
            tokens: ids in ``0 … vocab_size - 1``: a sequence, an integer array of rank 1, or bytes. For
                a model of vectors, ``(T, width)``.

        Returns:
            Logits ``(T, vocab)`` float32. Every row was computed before the memory saw its target. For
            a model of vectors, its answers ``(T, width)``.

        Raises:
            TokenError: the tokens are empty, of a wrong type, or out of range.
            NumericsError: a value is not finite.
            UsageError: another thread is using the session.
        """
        ids = checked_input(tokens, self.model.manifest)
        with self._exclusive.held(), self._transaction(len(ids)):
            return self._advance(ids, teach=True)

    def observe(
        self, tokens: Tokens, editor: Editor | None = None, watch: Callable[[int], object] | None = None
    ) -> EditReport:
        """See tokens and learn from them.

        Args:
            tokens: as for :meth:`append`.
            editor: for this call, in place of the session's own.
            watch: told, part by part, how many tokens have been seen, as a progress bar wants it.

        Returns:
            What was learnt.

        Raises:
            UsageError: neither the call nor the session has an editor.
            TokenError: the tokens are empty, of a wrong type, or out of range.
            NumericsError: a value is not finite.
        """
        ids, chosen = checked_input(tokens, self.model.manifest), self._chosen(editor, "observe")
        _check_watch(watch)
        with self._exclusive.held(), self._transaction(len(ids), hands_over=chosen != self.editor):
            own, report = self._lend(chosen, ids)
            self._advance(ids, True, report, watch, None if own is self._editing else own)
        return report

    def prepare(
        self,
        context: Tokens,
        passes: int = 1,
        editor: Editor | None = None,
        watch: Callable[[int], object] | None = None,
    ) -> list[EditReport]:
        """Learn from a context in several passes, before the first answer.

        Every pass begins where the first one did, but with the memories, and the optimizer's sums, that
        the pass before it has left, and learns from the whole context: its last period ends with it.
        Afterwards the session stands behind the context, which it has seen once as far as its position
        is concerned. Succeeds as a whole, or leaves the session as it was.

        Args:
            context: as for :meth:`append`.
            passes: 1 or more.
            editor: for these passes, in place of the session's own.
            watch: as for :meth:`observe`; in all, it is told of ``passes`` times the context's tokens.

        Returns:
            What each pass learnt.

        Raises:
            UsageError: neither the call nor the session has an editor, or ``passes`` is out of range.
            TokenError: the tokens are empty, of a wrong type, or out of range.
            NumericsError: a value is not finite.
        """
        if type(passes) is not int or passes < 1:
            raise UsageError(f"passes is {passes!r}; it must be an integer, 1 or more")
        ids, chosen = checked_input(context, self.model.manifest), self._chosen(editor, "prepare")
        _check_watch(watch)
        with self._exclusive.held(), self._transaction(len(ids), hands_over=True):
            own, report = self._lend(chosen, ids)
            before, reports = self._snapshot(), [report]
            for _ in range(passes - 1):
                self._advance(ids, True, reports[-1], watch, back_to=self._editing)
                self._restore(with_memories_of(before, self._snapshot(), self.model.manifest))
                reports.append(self._report(ids))
            self._advance(ids, True, reports[-1], watch, back_to=own)
        return reports

    def generate(
        self,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        learn: bool = False,
        prompt: Tokens | None = None,
    ) -> Iterator[int]:
        """Draw tokens one by one and append each before it is yielded.

        The session has seen the prompt and exactly what was yielded, wherever the caller stops.

        Args:
            max_new_tokens: tokens at most.
            temperature: see :class:`titans_runtime.sampling.Sampling`.
            top_k: likewise.
            top_p: likewise.
            seed: of the draws; None draws afresh.
            learn: whether the model's own samples teach its memory.
            prompt: tokens to append first, as :meth:`append` does, at once.

        Raises:
            UsageError: nothing was appended yet, a value is out of range, or the model has no vocabulary.
            TokenError: the prompt is empty, of a wrong type, or out of range.
        """
        if type(max_new_tokens) is not int or max_new_tokens < 0:
            raise UsageError(f"max_new_tokens is {max_new_tokens!r}; it must be an integer, 0 or more")
        if not self.model.vocab_size:
            raise UsageError("generate: the model takes vectors; it has no tokens to draw")
        sampling, generator = Sampling(temperature, top_k, top_p), seeded(seed)
        if prompt is not None:
            self.append(prompt)
        if self._last_logits is None:
            raise UsageError("generate: the session has seen no token yet; give a prompt")
        return self._generate(max_new_tokens, sampling, generator, learn)

    @property
    def last_logits(self) -> Array | None:
        """Logits ``(vocab,)`` for the token to come, or None before the first token."""
        return None if self._last_logits is None else self._last_logits.copy()

    def snapshot(self) -> Snapshot:
        """A copy of the whole state."""
        with self._exclusive.held():
            return self._snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back, or over, to a snapshot; the session continues from it bit for bit.

        A log is a record of what happened, and keeps what was learnt on the way left.

        Raises:
            UsageError: it is no snapshot.
            StateError: the snapshot belongs to another bundle.
        """
        if not isinstance(snapshot, Snapshot):
            raise UsageError(f"restore: {snapshot!r} is no snapshot; give what session.snapshot() returned")
        with self._exclusive.held(), self._transaction(0, hands_over=True):
            if snapshot.bundle != self.model.manifest.identity:
                raise StateError(
                    f"snapshot of bundle {snapshot.bundle[:12]}…, session of "
                    f"{self.model.manifest.identity[:12]}…; restore it in a session of its own bundle"
                )
            self._restore(snapshot)

    def fork(self) -> Session:
        """A second session that continues from here on its own."""
        snapshot = self.snapshot()
        twin = Session(self.model, self.edit, self.editor)
        twin.restore(snapshot)
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a memory file, atomically.

        Raises:
            StateError: the memory holds values that are not finite.
            EnvironmentProblem: the file cannot be written; an older one is untouched.
        """
        save_snapshot(self.snapshot(), Path(path))

    # --- one call, inside the lock and the transaction

    def _advance(
        self,
        ids: Array,
        teach: bool,
        report: EditReport | None = None,
        watch: Callable[[int], object] | None = None,
        back_to: Editing | None = None,
    ) -> Array:
        """See tokens, and learn from them.

        Args:
            ids: the tokens.
            teach: whether they are to be learnt from.
            report: receives what is learnt; default is one of the session's own editor.
            watch: told of the parts.
            back_to: ends the last period with the call, and lets this editing go on.

        Returns:
            Their logits.
        """
        report, began = report or self._report(ids), self.position
        logits = np.empty((len(ids), self.model.manifest.width), np.float32)
        self._run_segments(ids, logits, teach, report, watch)
        if back_to is not None:
            self._take_back(back_to, report)
        self._conclude(logits, began, report)
        return logits

    def _conclude(self, logits: Array, began: int, report: EditReport) -> None:
        """Check what a call has scored and remembered from position ``began`` on, and note it."""
        broken = self._buffers.fault()
        if not np.isfinite(logits).all():
            bad = int(np.argmin(np.isfinite(logits).all(axis=1)))
            also = f", and the state {broken}" if broken else ""
            raise NumericsError(
                f"logits after token {began + bad} are not finite{also}; "
                "the session is as it was before the call"
            )
        if broken:
            raise NumericsError(
                f"the state {broken} after token {began + len(logits) - 1}; "
                "the session is as it was before the call"
            )
        self._last_logits = logits[-1].copy()
        self.last_edit = report if report.objective else None
        if self._log is not None:
            self._logged += report.lessons
            self._log.add(report)

    def _report(self, ids: Array) -> EditReport:
        """For what is learnt from a call's tokens by the editor at hand."""
        return EditReport(tokens=len(ids), objective=self.editor.objective if self.editor else "")

    def _most(self, tokens: int) -> int:
        """Tokens, of ``tokens``, that the model may run on at once."""
        return self._editing.most(self.position, min(tokens, SEGMENT))

    def _run_segments(
        self,
        ids: Array,
        logits: Array,
        teach: bool,
        report: EditReport,
        watch: Callable[[int], object] | None = None,
    ) -> None:
        start = 0
        while start < len(ids):
            part = slice(start, start + self._most(len(ids) - start))
            self._run_segment(ids[part], logits[part], teach, report)
            if watch is not None:
                watch(min(part.stop, len(ids)) - start)
            start = part.stop

    def _run_segment(self, ids: Array, logits: Array, teach: bool, report: EditReport) -> None:
        self._arrive(ids[0], teach, report)
        keys = self._forward.keys(len(ids)) if self._editing.readout else None  # nobody else reads them
        self._run_model(ids, logits, keys)
        self._buffers.swap()
        self._learn(ids, logits, keys, teach, report)

    def _arrive(self, token: Array, teach: bool, report: EditReport) -> None:
        """Before the model runs: learn from the periods that ``token`` completes."""
        self._editing.arrive(token, self.position, teach, report)

    def _learn(self, ids: Array, logits: Array, keys: Keys | None, teach: bool, report: EditReport) -> None:
        """After the model has run: learn, or keep what is still to be learnt from."""
        self._editing.learn(ids, keys, logits, self.position, teach, report)
        self.position += len(ids)

    def _run_model(self, ids: Array, logits: Array, keys: Keys | None) -> None:
        self._forward.run(ids, logits, keys)

    def _take_over(self, sets: tuple[Arrays, Arrays], kept: Arrays) -> None:
        """Go on in other arrays; see :meth:`StateBuffers.move`."""
        self._buffers.move(sets, kept)
        self._forward.unbind()

    def _generate(
        self, count: int, sampling: Sampling, generator: np.random.Generator, learn: bool
    ) -> Iterator[int]:
        for _ in range(count):
            with self._exclusive.held(), self._transaction(1):
                assert self._last_logits is not None
                token = sampling.draw(self._last_logits, generator)
                self._advance(np.array([token], np.int64), teach=learn)
            yield token

    # --- editor, snapshot, guards

    def _open_editor(self, editor: Editor | None) -> Editing:
        return Editing(editor, self.model.backend, self._buffers, self._edit)

    def _chosen(self, editor: Editor | None, call: str) -> Editor | None:
        """The editor of a call that must have one."""
        if editor is None and self.editor is None:
            raise UsageError(f"{call}: the session has no editor; give one, as in {call}(tokens, Editor())")
        return self.editor if editor is None else editor

    def _lend(self, editor: Editor | None, ids: Array) -> tuple[Editing, EditReport]:
        """Let ``editor`` edit the call that sees ``ids``.

        A period ends early where one editor hands over to another.

        Returns:
            The session's own editing, and the call's report, with what that has learnt to hand over.
        """
        own = self._editing
        if editor == own.editor:
            return own, self._report(ids)
        left = own.left(self.position)
        self._editing = other = self._open_editor(editor)
        report = self._report(ids)
        own.hand_over(ids[0], self.position, report)
        if other.readout and left:
            other.readout.restore(left)
        return own, report

    def _take_back(self, own: Editing, report: EditReport) -> None:
        """End the last period; what is to come is ``own``'s.

        The last position, whose target is still to come, goes with it. To editors of the layers' memories
        it is lost.
        """
        pending = self._editing.finish(self.position, report)
        if pending is not None:
            own.leave(self.position, pending)
        self._editing = own

    def _snapshot(self) -> Snapshot:
        arrays: Arrays = {f"state.{name}": array.copy() for name, array in self._buffers.read().items()}
        arrays |= self._editing.arrays(self.position)
        if self._last_logits is not None:
            arrays["last_logits"] = self._last_logits.copy()
        editor = self.editor.to_dict() if self.editor else None
        return Snapshot(self.model.manifest.identity, self.position, self.edit, editor, arrays)

    def _restore(self, snapshot: Snapshot) -> None:
        self._buffers.restore(snapshot.arrays)
        self.position = snapshot.position
        self._strength = snapshot.edit
        self._edit[0] = snapshot.edit
        last = snapshot.arrays.get("last_logits")
        self._last_logits = None if last is None else last.copy()
        editor = Editor.from_dict(snapshot.editor) if snapshot.editor else None
        if editor != self.editor:
            self._editing = self._open_editor(editor)
        self._editing.take_up(snapshot.arrays, snapshot.position)

    @contextlib.contextmanager
    def _transaction(self, tokens: int, hands_over: bool = False, runs: int | None = None) -> Iterator[None]:
        """Undo a call that does not reach its end, Ctrl-C included.

        Args:
            tokens: that the call is given.
            hands_over: whether another editor may end the pending period.
            runs: of the model, where they do not follow from the tokens.
        """
        position, last, edit = self.position, self._last_logits, self.edit
        editing, reported = self._editing, self.last_edit
        self._logged = []
        editing.begin()
        runs = -(-tokens // SEGMENT) if runs is None else runs
        # Whoever edits the layers' memories writes over the state: it is kept, as for several runs.
        rewrites = editing.memories is not None or hands_over
        self._buffers.hold(runs=2 if rewrites else runs)
        pending = editing.mark(hands_over or editing.will_learn(position, tokens))
        try:
            yield
        except BaseException:
            self._buffers.rewind()
            self.position, self._last_logits, self._strength = position, last, edit
            self._edit[0] = edit
            self._editing = editing
            editing.rewind(pending)
            self.last_edit = reported
            if self._log is not None:
                self._log.take_back(self._logged)
            raise


def _check_watch(watch: object) -> None:
    if watch is not None and not callable(watch):
        raise UsageError(f"watch is {watch!r}; give a function of the number of tokens seen, or None")
