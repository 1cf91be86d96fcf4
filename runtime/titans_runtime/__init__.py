"""Run and edit exported Titans models on NumPy and ONNX Runtime alone.

import titans_runtime as tr

model = tr.load("bundle/")
session = model.session()
logits = session.append(b"import ")
"""

from __future__ import annotations

from titans_runtime.compare import Difference, compare
from titans_runtime.editor import Editor
from titans_runtime.errors import (
    BundleError,
    CheckFailed,
    ConflictError,
    DataError,
    EnvironmentProblem,
    NumericsError,
    OverloadError,
    StateError,
    TitansError,
    TokenError,
    UsageError,
)
from titans_runtime.model import Model, load
from titans_runtime.report import EditLog, EditReport, Lesson
from titans_runtime.scoring import Score, score
from titans_runtime.session import Session
from titans_runtime.snapshot import Snapshot
from titans_runtime.verify import VerificationReport, verify

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "CheckFailed",
    "ConflictError",
    "DataError",
    "Difference",
    "EditLog",
    "EditReport",
    "Editor",
    "EnvironmentProblem",
    "Lesson",
    "Model",
    "NumericsError",
    "OverloadError",
    "Score",
    "Session",
    "Snapshot",
    "StateError",
    "TitansError",
    "TokenError",
    "UsageError",
    "VerificationReport",
    "compare",
    "load",
    "score",
    "verify",
]
