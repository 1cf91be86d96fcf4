"""A session's editing as one thing: the editor of the readout memory, that of the layers' memories, or both.

Also what happens where one editor hands over to another, for one call or for good.
"""

from __future__ import annotations

from dataclasses import dataclass

from titans_runtime.backends import Array, Arrays, Backend
from titans_runtime.buffers import StateBuffers
from titans_runtime.editor import Editor
from titans_runtime.errors import UsageError
from titans_runtime.memories import MemoriesEditor, MemoriesMark
from titans_runtime.readout import Keys, PendingMark, ReadoutEditor
from titans_runtime.report import EditReport


@dataclass(frozen=True)
class EditingMark:
    """What :meth:`Editing.rewind` returns to."""

    readout: PendingMark | None
    memories: MemoriesMark | None
    left: tuple[int, Arrays] | None


class Editing:
    """What one session learns by the open way, and how far it has come."""

    def __init__(self, editor: Editor | None, backend: Backend, buffers: StateBuffers, edit: Array) -> None:
        """Open the editors that ``editor`` names.

        Args:
            editor: or None for no editing.
            backend: holds the bundle's graphs.
            buffers: the session's state.
            edit: ``(1, layers)``, strength of the fused rule.

        Raises:
            UsageError: it is no editor, or the bundle has not what it edits.
        """
        if editor is not None and not isinstance(editor, Editor):
            raise UsageError(f"editor is {editor!r}; give an Editor, as in Editor.parse('readout:step=1')")
        self.editor = editor
        self.readout: ReadoutEditor | None = None
        self.memories: MemoriesEditor | None = None
        # Where this edits no readout memory: what an editor lent for a call has left to the next one.
        self._left: tuple[int, Arrays] | None = None
        parts = editor.parts if editor is not None else ()
        beside = any(part.is_readout for part in parts)
        for part in parts:
            if not part.is_readout:
                self.memories = MemoriesEditor(part, backend, buffers, edit, beside_readout=beside)
            elif "readout" not in buffers.past or part.graph not in backend.manifest.graphs:
                raise UsageError(f"the bundle has no readout memory to edit by {part}; give editor=None")
            else:
                self.readout = ReadoutEditor(part, backend, buffers)

    def begin(self) -> None:
        """A call begins: each editor has its whole budget."""
        for one in (self.readout, self.memories):
            if one:
                one.spent = 0.0

    def most(self, position: int, tokens: int) -> int:
        """Tokens, of ``tokens`` from ``position`` on, that the model may run on before memories change."""
        return tokens if self.memories is None else min(tokens, self.memories.room(position))

    def will_learn(self, position: int, tokens: int) -> bool:
        """Whether ``tokens`` more from ``position`` on complete a period."""
        return any(one.will_learn(position, tokens) for one in (self.readout, self.memories) if one)

    def arrive(self, token: Array, position: int, teach: bool, report: EditReport) -> None:
        """Before the model runs on the token at ``position``: learn from the periods that it completes."""
        if self.readout:
            self.readout.arrive(int(token), position, teach, report)
        if self.memories:
            self.memories.arrive(token, position, teach, report)

    def learn(
        self, tokens: Array, keys: Keys | None, scores: Array, position: int, teach: bool, report: EditReport
    ) -> None:
        """After the model has run: learn, or keep what is still to be learnt from."""
        if self.readout and keys is not None:
            if len(tokens) <= self.readout.room(position):
                self.readout.hold(tokens, keys, scores, teach)
            else:
                self.readout.stream(tokens, keys, scores, position, report)
        if self.memories:
            self.memories.hold(tokens, teach)

    def hand_over(self, token: Array, position: int, report: EditReport) -> None:
        """End all periods early: another editor takes over with ``token``."""
        if self.readout:
            self.readout.hand_over(int(token), position, report)
        if self.memories:
            self.memories.hand_over(token, position, report)

    def finish(self, position: int, report: EditReport) -> Arrays | None:
        """Learn from all pending positions whose targets are known.

        Returns:
            The readout memory's last position, whose target is still to come.
        """
        if self.memories:
            self.memories.finish(position, report)
        return self.readout.finish(position, report) if self.readout else None

    def leave(self, position: int, pending: Arrays) -> None:
        """Take over the position before ``position``, whose target is still to come, from a lent editor.

        It goes to this editing's own editor of the readout memory, or waits for the next one that is lent.
        """
        if self.readout:
            self.readout.restore(pending)
        else:
            self._left = (position, pending)

    def left(self, position: int) -> Arrays:
        """What waits for the next editor of the readout memory, as long as the stream stands where it did."""
        if self._left is None or self._left[0] != position:
            return {}
        return {name: array.copy() for name, array in self._left[1].items()}

    def arrays(self, position: int) -> Arrays:
        """Copies of all that continuing from ``position`` needs, by name, for a snapshot."""
        found = self.left(position)
        if self.readout:
            found |= self.readout.accumulated()
            found |= self.readout.export() if self.readout.count else {}
        return found | (self.memories.arrays() if self.memories else {})

    def take_up(self, arrays: Arrays, position: int) -> None:
        """Continue from a snapshot that was taken at ``position``."""
        self._left = None
        if self.readout:
            self.readout.take_up(arrays)
        elif left := {name: array for name, array in arrays.items() if name.startswith("pending.")}:
            self._left = (position, left)
        if self.memories:
            self.memories.take_up(arrays)

    def mark(self, learns: bool) -> EditingMark:
        """What :meth:`rewind` returns to. ``learns``: whether periods may end before that."""
        return EditingMark(
            self.readout.mark(learns) if self.readout else None,
            self.memories.mark() if self.memories else None,
            self._left,
        )

    def rewind(self, mark: EditingMark) -> None:
        """Undo everything since the mark, but for the state itself, which is the caller's."""
        self._left = mark.left
        if self.readout and mark.readout:
            self.readout.rewind(mark.readout)
        if self.memories and mark.memories:
            self.memories.rewind(mark.memories)
