"""Ways to run a bundle's graphs. The session knows only this interface."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from titans_runtime.backends.placement import Placement
    from titans_runtime.manifest import Manifest

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int64": np.int64}
"""NumPy types of the manifest's dtype names."""


class Residence(Protocol):
    """Where bound arrays really are. Told before the host reads them, and when it has written them."""

    def fetch(self, arrays: Iterable[Array]) -> None:
        """Let arrays, or views of them, hold what graphs have written last.

        Also before the host writes a part of an array.
        """

    def changed(self, arrays: Iterable[Array]) -> None:
        """The host has written arrays, or views of them, or will before the next run."""


class _OnHost:
    """Arrays that graphs read and write in place."""

    def fetch(self, arrays: Iterable[Array]) -> None:
        """Nothing to do."""

    def changed(self, arrays: Iterable[Array]) -> None:
        """Nothing to do."""


ON_HOST: Residence = _OnHost()


class Call(Protocol):
    """A graph bound to buffers: runs as often as wanted, reads and writes them in place."""

    def run(self) -> None:
        """Run once. The output buffers hold the results when it returns; present state after a fetch."""


class Graph(Protocol):
    """A loaded graph, shared by threads."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """Bind every input and output to a C-contiguous array of its dtype and final shape.

        An output must not share memory with an input: the graph may read after it has written.
        """


class Backend(Protocol):
    """Loads graphs of one bundle."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of its graphs."""

    @property
    def residence(self) -> Residence:
        """Where bound arrays are: for who reads or writes state between runs."""

    @property
    def placements(self) -> Mapping[str, Placement | None]:
        """For every loaded graph what runs which of its nodes; None where that is not known."""

    def graph(self, name: str) -> Graph:
        """The graph of that name, loaded once."""
