"""Models to time: random weights in every size, exported once for every state of the sources."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from titans_export.config import PRESETS
from titans_export.model import TitansModel
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import save_checkpoint

_ROOT = Path(__file__).parents[2]
_SOURCES = (_ROOT / "titans_export", _ROOT / "converters" / "titans_converters")
_NO_PART = {"peers", "demo", "training", "__pycache__"}  # of what a model computes


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "scan": {"scan": "scan"},
    "unrolled": {"scan": "unrolled"},
    "native": {"scan": "native"},
}
"""Ways to export a model: what ``export_bundle`` is given."""


@dataclass(frozen=True)
class Prepared:
    """Folders of one model."""

    checkpoint: Path
    bundle: Path
    work: Path


def prepared(size: str, variant: str = "float32") -> Prepared:
    """The model of a preset, exported in some way; made where these sources have not made it yet."""
    checkpoint = cached(size, partial(_initialise, size), "checkpoint")
    root = cached(f"{size}-{variant}", partial(_export, checkpoint, variant), variant)
    return Prepared(checkpoint / "checkpoint", root / variant, root / "work")


def cached(name: str, make: Callable[[Path], None], last: str) -> Path:
    """A folder below ``out/latency`` for this state of the sources.

    Args:
        name: of the folder.
        make: fills it, at the first call.
        last: what is there when it is complete.
    """
    root = _ROOT / "out" / "latency" / f"{name}-{_digest()}"
    if not (root / last).exists():
        shutil.rmtree(root, ignore_errors=True)
        make(root)
    return root


def _initialise(size: str, folder: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(TitansModel(PRESETS[size]), folder / "checkpoint")


def _export(checkpoint: Path, variant: str, folder: Path) -> None:
    export_bundle(checkpoint / "checkpoint", folder / variant, **VARIANTS[variant])


def _digest() -> str:
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted(folder.rglob("*.py")):
            if not _NO_PART & set(path.parts):
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
