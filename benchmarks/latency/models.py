"""Models to time: random weights in every size, exported once for every state of the sources."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from titans_export.config import PRESETS
from titans_export.model import TitansModel
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import save_checkpoint

_ROOT = Path(__file__).parents[2]
_SOURCES = (_ROOT / "titans_export", _ROOT / "converters" / "titans_converters")
_NO_PART = {"peers", "demo", "training", "__pycache__"}  # of what a model computes


@dataclass(frozen=True)
class Prepared:
    """Folders of one model."""

    checkpoint: Path
    bundle: Path
    work: Path


def prepared(size: str) -> Prepared:
    """The model of a preset; made where these sources have not made it yet."""
    root = cached(size, partial(_make, size))
    return Prepared(root / "checkpoint", root / "bundle", root / "work")


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A folder below ``out/latency`` for this state of the sources, filled by ``make`` at the first call."""
    root = _ROOT / "out" / "latency" / f"{name}-{_digest()}"
    if not (root / "bundle").exists():
        shutil.rmtree(root, ignore_errors=True)
        make(root)
    return root


def _make(size: str, folder: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(TitansModel(PRESETS[size]), folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")


def _digest() -> str:
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted(folder.rglob("*.py")):
            if not _NO_PART & set(path.parts):
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
