"""Models to time: random weights in every size, exported once for every state of the sources."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
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
    """The model of a preset, in ``out/latency``; made where these sources have not made it yet."""
    root = _ROOT / "out" / "latency" / f"{size}-{_digest()}"
    model = Prepared(root / "checkpoint", root / "bundle", root / "work")
    if not model.bundle.exists():
        torch.manual_seed(0)
        save_checkpoint(TitansModel(PRESETS[size]), model.checkpoint)
        export_bundle(model.checkpoint, model.bundle)
    return model


def _digest() -> str:
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted(folder.rglob("*.py")):
            if not _NO_PART & set(path.parts):
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
