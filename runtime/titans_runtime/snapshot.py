"""The state of one stream at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from titans_runtime.backends import Arrays
from titans_runtime.manifest import Manifest

PREFIX = "memories."
"""Of everything that an editor of the layers' memories adds to a snapshot."""

ENERGY = "editor.energy"
"""Name of the optimizer's sums in a snapshot, ``(Dr,)`` float32."""


@dataclass(frozen=True)
class Snapshot:
    """A session's whole state at one moment; restoring it continues bit for bit.

    Attributes:
        bundle: identity of the bundle that it belongs to.
        position: tokens seen.
        edit: edit strength per layer.
        editor: specification of the session's editor, or None.
        arrays: copies, by name: ``state.<name>``, ``pending.<name>`` and, once a token was seen,
            ``last_logits``.
    """

    bundle: str
    position: int
    edit: tuple[float, ...]
    editor: dict[str, Any] | None
    arrays: Arrays = field(repr=False)


def with_memories_of(snapshot: Snapshot, learnt: Snapshot, manifest: Manifest) -> Snapshot:
    """A snapshot with the memories of another one, and with what its editors' optimizers have summed up."""
    taken = {f"state.{entry.name}" for entry in manifest.state if entry.role == "memory"} | {ENERGY}
    pending = ("sequence", "targets", "taught", "anchor")
    for name in learnt.arrays:
        kind = name.removeprefix(PREFIX).partition(".")[0]
        if name.startswith(PREFIX) and kind not in pending:
            taken.add(name)
    own = {
        name: array
        for name, array in snapshot.arrays.items()
        if not name.startswith(("pending.", PREFIX)) and name != ENERGY
    }
    arrays = own | {name: learnt.arrays[name] for name in taken if name in learnt.arrays}
    return Snapshot(snapshot.bundle, snapshot.position, snapshot.edit, snapshot.editor, arrays)
