"""A model: a loaded bundle, shared and immutable, from which sessions come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from titans_runtime.backends.choose import check_threads, open_backend
from titans_runtime.bundle import Bundle, initial_state, open_bundle
from titans_runtime.editor import Editor
from titans_runtime.errors import StateError, UsageError
from titans_runtime.manifest import Manifest
from titans_runtime.session import Session
from titans_runtime.snapshot import Snapshot
from titans_runtime.state import load_snapshot

if TYPE_CHECKING:
    from titans_runtime.batch import Batch


class _Recommended:
    """Marks an argument that was not given: edit as the manifest recommends."""

    def __repr__(self) -> str:
        return "as the manifest recommends"


RECOMMENDED: Final = _Recommended()


def load(
    path: str | os.PathLike[str],
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    backend: str = "onnxruntime",
) -> Model:
    """Open a bundle, verify its files and load its model.

    Args:
        path: bundle folder.
        providers: ONNX Runtime execution providers by preference; default is the CPU's. One that is
            not available is an error, never a silent fallback.
        threads: threads within an operator; default is the backend's choice. Those of PyTorch are the
            process's.
        backend: ``onnxruntime``; ``torchscript`` or ``aoti``, which import torch, for a bundle exported in
            that format; or ``tensorrt``, which runs an engine that ``titans engine`` has built.

    Raises:
        BundleError: a file is missing, altered or of an unknown format, or the bundle lacks the backend's.
        EnvironmentProblem: the backend, a provider, a device or an engine is missing.
        UsageError: ``threads`` is not 1 to 1024, ``providers`` is no list, or the backend is unknown.
    """
    check_threads(threads)
    return Model(open_bundle(Path(path)), providers, threads, backend)


class Model:
    """A loaded bundle. Threads may share it; each stream needs a session of its own."""

    def __init__(
        self,
        bundle: Bundle,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        backend: str = "onnxruntime",
    ) -> None:
        """See :func:`load`."""
        self.bundle = bundle
        self.backend = open_backend(backend, bundle, providers, threads)
        self.graph = self.backend.graph("model")
        self.initial = initial_state(bundle)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def vocab_size(self) -> int:
        """Number of token ids; 0 for a model of vectors."""
        return self.manifest.vocab_size

    def session(
        self,
        edit: float | Sequence[float] | _Recommended = RECOMMENDED,
        editor: Editor | _Recommended | None = RECOMMENDED,
    ) -> Session:
        """A new stream with an empty memory.

        Args:
            edit: strength of the fused rule, one number in 0..1 or one per layer; default as the
                manifest recommends.
            editor: what the session learns by the open way; None for nothing; default as the
                manifest recommends.

        Raises:
            UsageError: ``edit`` is out of range or has the wrong length.
        """
        recommended = self.manifest.recommended
        strength = recommended["edit"] if isinstance(edit, _Recommended) else edit
        if isinstance(editor, _Recommended):
            editor = Editor.from_dict(recommended["editor"]) if recommended["editor"] else None
        return Session(self, checked_edit(strength, self.manifest.edit_layers), editor)

    def batch(self, sessions: Sequence[Session], room: int | None = None) -> Batch:
        """Run several sessions in one call; see :class:`titans_runtime.batch.Batch`.

        Args:
            sessions: of this model.
            room: for how many, where others will join; default is for these alone.

        Raises:
            UsageError: there is none, one is given twice, one belongs to another model, or there is no
                room for all.
        """
        from titans_runtime.batch import Batch

        return Batch(self, sessions, room)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """Continue a stream from a memory file.

        Raises:
            StateError: the file is damaged or belongs to another bundle.
        """
        return self.continued(load_snapshot(Path(path), self.manifest), str(path))

    def continued(self, snapshot: Snapshot, where: str = "snapshot") -> Session:
        """A new session that continues from a snapshot.

        Args:
            snapshot: of this bundle.
            where: names it in messages.

        Raises:
            StateError: it belongs to another bundle, or its editor is none of this one.
        """
        try:
            editor = Editor.from_dict(snapshot.editor) if snapshot.editor else None
        except (UsageError, TypeError) as error:
            raise StateError(f"{where}: {error}") from None
        session = Session(self, snapshot.edit, editor)
        session.restore(snapshot)
        return session


def checked_edit(edit: float | Sequence[float], layers: int) -> tuple[float, ...]:
    """Edit strength per layer from one number or one per layer.

    Raises:
        UsageError: a value lies outside 0..1, or the length is not the model's number of layers.
    """
    try:
        values = (
            [float(x) for x in edit] if isinstance(edit, Sequence | np.ndarray) else [float(edit)] * layers
        )
    except (TypeError, ValueError):
        raise UsageError(f"edit is {edit!r}; it must be a number from 0 to 1, or one per layer") from None
    if len(values) != layers:
        raise UsageError(f"edit has {len(values)} values; the model has {layers} layers")
    for value in values:
        if not 0 <= value <= 1:
            raise UsageError(f"edit is {value}; it must lie between 0 and 1")
    return tuple(values)
