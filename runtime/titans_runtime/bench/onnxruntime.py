"""The bundle in this runtime, as a backend to be timed: sessions in a batch, or one by one."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.batch import Batch
from titans_runtime.bench.peers import Job
from titans_runtime.model import load as load_model
from titans_runtime.session import Session


@dataclass(frozen=True)
class Way:
    """How the runtime runs a bundle: arguments of :func:`titans_runtime.load`, and the module to report."""

    providers: tuple[str, ...] | None = None
    backend: str = "onnxruntime"
    module: str = "onnxruntime"


class OnnxRuntimeRunner:
    """Sessions of the bundle's model; more than one stand in a batch."""

    is_model = True

    def __init__(self, job: Job, batched: bool, way: Way = Way()) -> None:
        """Load the bundle."""
        self._model = load_model(job.bundle, way.providers, job.threads, way.backend)
        self._way = way
        self._editor, self._batched = job.editor, batched
        self._sessions: list[Session] = []
        self._batch: Batch | None = None
        self._open = contextlib.ExitStack()

    @property
    def versions(self) -> Mapping[str, str]:
        """Of what runs the graph."""
        return {self._way.module: importlib.import_module(self._way.module).__version__}

    def start(self, batch: int, edit: float) -> None:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        self._open.close()
        self._sessions = [self._model.session(edit=edit, editor=self._editor) for _ in range(batch)]
        together = self._batched and batch > 1
        self._batch = self._open.enter_context(self._model.batch(self._sessions)) if together else None

    def append(self, ids: Array) -> Array:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        if self._batch is not None:
            return np.stack(self._batch.append(list(ids)))
        if len(self._sessions) == 1:
            return self._sessions[0].append(ids[0])[None]
        return np.stack([session.append(row) for session, row in zip(self._sessions, ids, strict=True)])

    def close(self) -> None:
        """Leave the batch."""
        self._open.close()
        self._sessions = []


def load(job: Job) -> OnnxRuntimeRunner:
    """The reference: what ``titans run`` runs."""
    return OnnxRuntimeRunner(job, batched=True)


def load_singles(job: Job) -> OnnxRuntimeRunner:
    """Each stream by itself: what batching is measured against."""
    return OnnxRuntimeRunner(job, batched=False)
