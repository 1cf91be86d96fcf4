"""Many streams at once on one model: continuous batching, and the HTTP server above it."""

from __future__ import annotations

from titans_runtime.serving.request import Finished, Piece, Request, Stream
from titans_runtime.serving.scheduler import Scheduler

__all__ = ["Finished", "Piece", "Request", "Scheduler", "Stream"]
