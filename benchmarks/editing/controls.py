"""Readout editors that must not help as much as the real one: they show where its gain comes from."""

from __future__ import annotations

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.editor import Editor, EditReport
from titans_runtime.readout import ReadoutEditor
from titans_runtime.session import Model, Session


class _OtherKeys(ReadoutEditor):
    """Edits with other keys than the model's."""

    def advance(self, ids: Array, keys: Array, logits: Array, teach: bool, report: EditReport) -> None:
        """Replace the keys, and the logits that the model has computed with its own."""
        replaced = self.replace(keys)
        logits += (replaced - keys) @ self._readout[0]
        super().advance(ids, replaced, logits, teach, report)

    def replace(self, keys: Array) -> Array:
        """Keys ``(T, Dr)`` in place of ``keys``."""
        raise NotImplementedError


class ShuffledKeys(_OtherKeys):
    """The key of a random earlier position: the same keys, bound to the wrong places."""

    def __init__(self, *args: object) -> None:
        """See :class:`ReadoutEditor`."""
        super().__init__(*args)  # type: ignore[arg-type]
        self._earlier: Array | None = None
        self._generator = np.random.default_rng(0)

    def replace(self, keys: Array) -> Array:
        """Draw from the segment before: the own segment's keys know tokens that are still to come."""
        earlier = np.zeros_like(keys) if self._earlier is None else self._earlier
        self._earlier = keys.copy()
        return earlier[self._generator.integers(0, len(earlier), len(keys))]


class BiasOnly(_OtherKeys):
    """One key for every position: only token frequencies can be learnt."""

    def replace(self, keys: Array) -> Array:
        """The first unit vector, throughout."""
        constant = np.zeros_like(keys)
        constant[:, 0] = 1.0
        return constant


def controlled_session(model: Model, editor: Editor, control: type[_OtherKeys]) -> Session:
    """A session that edits with ``control`` in place of the real readout editor."""
    session = model.session(edit=0.0, editor=editor)
    readout = session._buffers.past["readout"]  # noqa: SLF001 - a control is no public feature
    session._readout = control(editor, model.backend, readout, readout.shape[1])  # noqa: SLF001
    return session
