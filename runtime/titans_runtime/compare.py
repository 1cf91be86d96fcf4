"""Two memories side by side: which tensors differ, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titans_runtime.errors import StateError, UsageError
from titans_runtime.session import Session
from titans_runtime.snapshot import Snapshot


@dataclass(frozen=True)
class Difference:
    """One tensor of two snapshots.

    Attributes:
        name: of the tensor.
        norms: of both; 0 where one has it not.
        distance: norm of their difference.
        changed: share of its numbers that differ.
    """

    name: str
    norms: tuple[float, float]
    distance: float
    changed: float

    @property
    def relative(self) -> float:
        """Distance relative to the larger norm; 0 where both are zero."""
        largest = max(self.norms)
        return self.distance / largest if largest else 0.0


def compare(one: Snapshot | Session, other: Snapshot | Session) -> list[Difference]:
    """Every tensor of two snapshots of one bundle, by name; of a session, those of its snapshot now.

    A tensor of which the snapshots hold different lengths, as pending positions are, is compared as if
    the shorter were followed by zeros.

    Raises:
        StateError: the snapshots belong to different bundles.
        UsageError: something else was given.
    """
    one, other = _snapshot(one), _snapshot(other)
    if one.bundle != other.bundle:
        raise StateError(
            f"memories of two bundles, {one.bundle[:12]}… and {other.bundle[:12]}…; compare those of one"
        )
    return [_difference(name, one, other) for name in sorted(one.arrays.keys() | other.arrays.keys())]


def _snapshot(given: object) -> Snapshot:
    if isinstance(given, Session):
        return given.snapshot()
    if not isinstance(given, Snapshot):
        raise UsageError(f"compare takes sessions and snapshots, not a {type(given).__name__}")
    return given


def _difference(name: str, one: Snapshot, other: Snapshot) -> Difference:
    empty = np.zeros(0)
    first, second = (
        np.asarray(snapshot.arrays.get(name, empty), np.float64).reshape(-1) for snapshot in (one, other)
    )
    size = max(len(first), len(second))
    first, second = (np.pad(array, (0, size - len(array))) for array in (first, second))
    norms = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    changed = float((first != second).mean()) if size else 0.0
    return Difference(name, norms, float(np.linalg.norm(first - second)), changed)
