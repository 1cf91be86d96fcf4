"""Sessions whose readout memory must not help as much as the real one: where does its gain come from?"""

from __future__ import annotations

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.session import Session


class _OtherKeys(Session):
    """Edits and reads its readout memory by other keys than the model's."""

    def _run_model(self, ids: Array, logits: Array) -> Array:
        """Replace the keys, and the readout memory's part of the logits."""
        keys = super()._run_model(ids, logits)
        replaced = self.replace(keys)
        logits += (replaced - keys) @ self._buffers.readout[0]
        return replaced

    def replace(self, keys: Array) -> Array:
        """Keys ``(T, Dr)`` in place of ``keys``."""
        raise NotImplementedError


class ShuffledKeys(_OtherKeys):
    """The key of a random earlier position: the same keys, bound to the wrong places."""

    _earlier: Array | None = None

    def replace(self, keys: Array) -> Array:
        """Draw from the segment before: the own segment's keys know tokens that are still to come."""
        earlier = np.zeros_like(keys) if self._earlier is None else self._earlier
        self._earlier = keys.copy()
        draw = np.random.default_rng(self.position).integers(0, len(earlier), len(keys))
        return earlier[draw]


class BiasOnly(_OtherKeys):
    """One key for every position: only token frequencies can be learnt."""

    def replace(self, keys: Array) -> Array:
        """The first unit vector, throughout."""
        constant = np.zeros_like(keys)
        constant[:, 0] = 1.0
        return constant
