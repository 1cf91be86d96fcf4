"""The state tensors of one stream, in two alternating sets."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from titans_runtime.backends import ON_HOST, Array, Arrays, Residence
from titans_runtime.magnitude import fault
from titans_runtime.manifest import Manifest

_READOUT = "readout"


class StateBuffers:
    """The state as it stands, and where the next state goes.

    Graphs read one set and write the other; then the two swap. One buffer for past and present would
    let a graph overwrite what it still reads. So a call that fails finds the state before it untouched:
    nothing is copied, but where a call runs the model more than once. Of the readout memory, of which an
    editor changes a few rows between runs, those rows are put aside.

    A backend may keep twins of the arrays on a device: it is asked for them before they are read here,
    and told after they were written.
    """

    def __init__(self, manifest: Manifest, initial: Arrays, residence: Residence = ON_HOST) -> None:
        """Allocate both sets, filled with ``initial``, one row of every entry.

        Args:
            manifest: of the bundle.
            initial: one row of every entry.
            residence: of the backend that will run on the buffers.
        """
        self._residence = residence
        outputs = {tensor.name for tensor in manifest.graphs["model"].outputs}
        first: Arrays = {}
        self._kept: Arrays = {}  # entries that nothing changes
        self._readout: Array | None = None
        for entry in manifest.state:
            array = initial[entry.name].copy()
            if f"present.{entry.name}" in outputs:
                first[entry.name] = array
            elif entry.name == _READOUT:
                self._readout = array
            else:
                self._kept[entry.name] = array
        self._sets = (first, {name: array.copy() for name, array in first.items()})
        self.side = 0
        self._held = 0
        self._copies: Arrays | None = None
        self._put_aside: list[tuple[Array, Array]] = []  # rows of the readout memory, and what they were
        self._is_put_aside = np.zeros(0 if self._readout is None else self._readout.shape[1], bool)

    def move(self, sets: tuple[Arrays, Arrays], kept: Arrays) -> None:
        """Go on in other arrays: the state, as it stands, is copied into the first set and ``kept``.

        Args:
            sets: for the entries that the model changes, by name.
            kept: for all others, the readout memory among them.
        """
        self._copy((sets[0][name], array) for name, array in self.present.items())
        self._copy((kept[name], array) for name, array in self.fixed.items())
        self._sets, self.side, self._held = sets, 0, 0
        self._kept = {name: kept[name] for name in self._kept}
        if self._readout is not None:
            self._readout = kept[_READOUT]
        self.hold(runs=0)

    def cross_over(self) -> None:
        """Let the state stand in the other set."""
        self._copy((self.spare[name], array) for name, array in self.present.items())
        self.swap()

    @property
    def fixed(self) -> Arrays:
        """The entries that the model leaves alone."""
        return self._kept | ({} if self._readout is None else {_READOUT: self._readout})

    @property
    def past(self) -> Arrays:
        """Every entry as it stands, for graphs; to read them, see :meth:`read`."""
        return self.present | self.fixed

    def read(self) -> Arrays:
        """Every entry as it stands, for the host to read."""
        self._residence.fetch(self.present.values())
        return self.past

    @property
    def spare(self) -> Arrays:
        """Where the model writes: the entries that it changes."""
        return self._sets[1 - self.side]

    @property
    def readout(self) -> Array:
        """The readout memory, ``(1, Dr, V)``; change it through :meth:`edit_readout`."""
        assert self._readout is not None
        return self._readout

    def swap(self) -> None:
        """Take what the model has written as the state."""
        self.side = 1 - self.side

    def fault(self) -> str:
        """What is wrong with an entry that the model has written, after the entry's name, or nothing.

        State on a device is not brought here for this: it is looked at when it is saved.
        """
        if self._residence is not ON_HOST:
            return ""
        for name, array in self.present.items():
            if array.dtype.kind == "f" and (found := fault(array)):
                return f"{name} is {found}"
        return ""

    def edit_readout(self, rows: Array) -> Array:
        """The readout memory ``(Dr, V)``, for the caller to change ``rows``, each named once."""
        new = rows[~self._is_put_aside[rows]]
        if len(new):
            self._put_aside.append((new, self.readout[0, new]))
            self._is_put_aside[new] = True
        self._residence.changed([self.readout])
        memory: Array = self.readout[0]
        return memory

    def hold(self, runs: int) -> None:
        """Remember the state as it stands; the model will run ``runs`` times on it."""
        self._held = self.side
        # The second run writes where the first one has read.
        self._copies = self.copies() if runs > 1 else None
        for rows, _ in self._put_aside:
            self._is_put_aside[rows] = False
        self._put_aside.clear()

    def copies(self) -> Arrays:
        """Copies of the entries that the model changes, as they stand."""
        self._residence.fetch(self.present.values())
        return {name: array.copy() for name, array in self.present.items()}

    def rewind(self) -> None:
        """Return to the state that :meth:`hold` saw."""
        self.side = self._held
        copies = self._copies
        if copies is not None:
            self._copy((array, copies[name]) for name, array in self.present.items())
        for rows, content in self._put_aside:
            self.readout[0, rows] = content
        self._residence.changed([] if self._readout is None else [self._readout])

    def restore(self, arrays: Arrays) -> None:
        """Take ``state.<name>`` of a snapshot as the state; the one before it stays whole."""
        self._copy((array, arrays[f"state.{name}"]) for name, array in (self.spare | self._kept).items())
        if self._readout is not None:
            self.edit_readout(np.arange(self._readout.shape[1]))[:] = arrays[f"state.{_READOUT}"][0]
        self.side = 1 - self.side

    def overwrite(self, arrays: Arrays) -> None:
        """Take values for entries that the model changes, as they stand now."""
        self._copy((self.present[name], array) for name, array in arrays.items())

    def _copy(self, pairs: Iterable[tuple[Array, Array]]) -> None:
        """Copy each second array into the first."""
        for target, source in pairs:
            self._residence.fetch((target, source))
            np.copyto(target, source)
            self._residence.changed((target,))

    @property
    def present(self) -> Arrays:
        """The entries that the model changes, as they stand."""
        return self._sets[self.side]
