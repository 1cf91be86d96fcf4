"""Sessions whose readout memory must not help as much as the real one: where does its gain come from?"""

from __future__ import annotations

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.readout import Keys
from titans_runtime.session import Session


class _OtherKeys(Session):
    """Edits and reads its readout memory by other keys than the model's."""

    def _run_model(self, ids: Array, logits: Array, keys: Keys | None) -> None:
        """Replace the keys, and the readout memory's part of the logits."""
        super()._run_model(ids, logits, keys)
        if keys is None:
            return
        logits -= self._read(keys)
        keys.dense[:], keys.rows[:] = self.replace(keys)
        logits += self._read(keys)

    def _read(self, keys: Keys) -> Array:
        memory = self._buffers.readout[0]
        scale = self.model.manifest.model["readout_context_scale"]
        read: Array = keys.dense @ memory[: keys.dense.shape[1]]
        for rows in keys.rows.T:
            read += np.float32(scale) * memory[rows]
        return read

    def replace(self, keys: Keys) -> Keys:
        """Keys in place of ``keys``."""
        raise NotImplementedError


class ShuffledKeys(_OtherKeys):
    """The key of a random earlier position: the same keys, bound to the wrong places."""

    _earlier: Keys | None = None

    def replace(self, keys: Keys) -> Keys:
        """Draw from the segment before: the own segment's keys know tokens that are still to come."""
        earlier = self._earlier or constant_keys(keys)
        self._earlier = Keys(keys.dense.copy(), keys.rows.copy())
        draw = np.random.default_rng(self.position).integers(0, len(earlier.dense), len(keys.dense))
        return Keys(earlier.dense[draw], earlier.rows[draw])


class BiasOnly(_OtherKeys):
    """One key for every position: only token frequencies can be learnt."""

    def replace(self, keys: Keys) -> Keys:
        """See :func:`constant_keys`."""
        return constant_keys(keys)


def constant_keys(keys: Keys) -> Keys:
    """Keys of the length of real ones, all the same: the first unit vector, and each context's first row."""
    dense, rows = np.zeros_like(keys.dense), np.empty_like(keys.rows)
    dense[:, 0] = 1.0
    rows[:] = dense.shape[1] + np.arange(rows.shape[1])
    return Keys(dense, rows)
