"""The state tensors of one stream, in two alternating sets."""

from __future__ import annotations

import numpy as np

from titans_runtime.backends import Array, Arrays
from titans_runtime.manifest import Manifest

_READOUT = "readout"


class StateBuffers:
    """The state as it stands, and where the next state goes.

    Graphs read one set and write the other; then the two swap. One buffer for past and present would
    let a graph overwrite what it still reads. The readout memory, which its editor changes between
    runs, alternates by itself. So a call that fails finds the state before it untouched: nothing is
    copied, but where a call runs the model more than once.
    """

    def __init__(self, manifest: Manifest, initial: Arrays) -> None:
        """Allocate both sets, filled with ``initial``, one row of every entry."""
        outputs = {tensor.name for tensor in manifest.graphs["model"].outputs}
        first: Arrays = {}
        self._kept: Arrays = {}  # entries that nothing changes
        self._readouts: tuple[Array, ...] = ()
        for entry in manifest.state:
            array = initial[entry.name].copy()
            if f"present.{entry.name}" in outputs:
                first[entry.name] = array
            elif entry.name == _READOUT:
                self._readouts = (array, array.copy())
            else:
                self._kept[entry.name] = array
        self._sets = (first, {name: array.copy() for name, array in first.items()})
        self.sides = (0, 0)
        self._held = (0, 0)
        self._copies: Arrays | None = None

    @property
    def past(self) -> Arrays:
        """Every entry as it stands."""
        readout = {_READOUT: self.readout} if self._readouts else {}
        return self._sets[self.sides[0]] | readout | self._kept

    @property
    def spare(self) -> Arrays:
        """Where the model writes: the entries that it changes."""
        return self._sets[1 - self.sides[0]]

    @property
    def readout(self) -> Array:
        """The readout memory as it stands, ``(1, Dr, V)``."""
        return self._readouts[self.sides[1]]

    def swap(self) -> None:
        """Take what the model has written as the state."""
        self.sides = (1 - self.sides[0], self.sides[1])

    def edit_readout(self) -> Array:
        """The readout memory's next version, for its editor to write at once.

        The version that :meth:`hold` saw is left alone; later ones are overwritten in place.
        """
        if self.sides[1] == self._held[1]:
            self.sides = (self.sides[0], 1 - self.sides[1])
        return self.readout

    def hold(self, runs: int) -> None:
        """Remember the state as it stands; the model will run ``runs`` times on it."""
        self._held = self.sides
        # The second run writes where the first one has read.
        self._copies = {name: array.copy() for name, array in self.past.items()} if runs > 1 else None

    def rewind(self) -> None:
        """Return to the state that :meth:`hold` saw."""
        self.sides = self._held
        if self._copies is not None:
            for name, array in self._sets[self.sides[0]].items():
                np.copyto(array, self._copies[name])

    def restore(self, arrays: Arrays) -> None:
        """Take ``state.<name>`` of a snapshot as the state; the one before it stays whole."""
        for name, array in (self.spare | self._kept).items():
            np.copyto(array, arrays[f"state.{name}"])
        if self._readouts:
            np.copyto(self._readouts[1 - self.sides[1]], arrays[f"state.{_READOUT}"])
        self.sides = (1 - self.sides[0], 1 - self.sides[1])
