"""Byte corpora: files split by name into training, development and held-out, streamed in segments."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titans_runtime.errors import DataError

STDLIB = "stdlib"
"""The name that ``--data`` gives to the sources of the running Python's standard library."""

# Test suites are often left out of a Python installation, and tables of code points are not text.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}
_SPLIT_SHARES = 24  # one file in 24 is held out, another is for development


@dataclass(frozen=True)
class Source:
    """One file: its name relative to the corpus, and its bytes."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Corpus:
    """Files by split. A file's split follows from its name alone, so it never changes."""

    train: list[Source]
    development: list[Source]
    held_out: list[Source]


def load_corpus(paths: Sequence[str]) -> Corpus:
    """Read every file under ``paths``; ``stdlib`` stands for the standard library's sources.

    Raises:
        DataError: a path is missing, or a split would be empty.
    """
    sources = [source for path in paths for source in _sources(path)]
    splits: dict[str, list[Source]] = {"train": [], "development": [], "held_out": []}
    for source in sources:
        splits[split_of(source.name)].append(source)
    for split, files in splits.items():
        if not any(len(source.data) > 1 for source in files):  # one byte leaves nothing to predict
            raise DataError(
                f"--data {' '.join(paths)}: no text for the {split} split among {len(sources)} files; "
                "give a folder with a few dozen files or more"
            )
    return Corpus(**splits)


def split_of(name: str) -> str:
    """``train``, ``development`` or ``held_out``, by the hash of the file's name."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _SPLIT_SHARES
    return {0: "held_out", 1: "development"}.get(share, "train")


def stdlib_folder() -> Path:
    """Where the running Python keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(path: str) -> Iterator[Source]:
    root = stdlib_folder() if path == STDLIB else Path(path)
    if root.is_file():
        yield Source(root.name, root.read_bytes())
        return
    if not root.is_dir():
        raise DataError(f"--data {path}: no such file or folder")
    for file in sorted(root.rglob("*.py" if path == STDLIB else "*")):
        relative = file.relative_to(root)
        if path == STDLIB and _STDLIB_SKIPPED & set(relative.parts):
            continue
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield Source(relative.as_posix(), file.read_bytes())


class SegmentStream:
    """``batch`` readers that walk through the shuffled corpus side by side, segment by segment.

    What step ``n`` yields depends only on the seed and ``n``: a resumed training sees what an
    uninterrupted one would have seen.
    """

    def __init__(self, sources: Sequence[Source], batch: int, segment: int, seed: int) -> None:
        """``segment``: tokens that each reader yields a step."""
        self.sources, self.batch, self.segment, self.seed = sources, batch, segment, seed
        total = sum(len(source.data) for source in sources)
        self.steps_per_epoch = (total // batch - 1) // segment
        if self.steps_per_epoch < 1:
            raise DataError(
                f"{total} bytes of training text do not fill one step of {batch} x {segment} bytes; "
                "give more text or a smaller --batch or --segment"
            )
        self._epoch = -1
        self._rows: npt.NDArray[np.uint8] = np.empty((0, 0), np.uint8)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``step``: two ``(batch, segment)`` int64 tensors."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._load_epoch(epoch)
        start = position * self.segment
        window = torch.from_numpy(self._rows[:, start : start + self.segment + 1].astype(np.int64))
        return window[:, :-1], window[:, 1:]

    def _load_epoch(self, epoch: int) -> None:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sources))
        text = np.frombuffer(b"".join(self.sources[i].data for i in order), np.uint8)
        length = len(text) // self.batch
        self._rows = text[: length * self.batch].reshape(self.batch, length)
        self._epoch = epoch
