"""Bits per byte of a model on whole files, streamed from the zero state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_export.model import TitansModel
from titans_export.training.data import Source

_SEGMENT = 1024


def _no_progress(segments: Iterable[int]) -> Iterable[int]:
    return segments


@torch.no_grad()
def bits_per_byte(
    model: TitansModel,
    sources: Sequence[Source],
    edit: float,
    limit: int | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = _no_progress,
) -> float:
    """Mean ``-log2 p`` over every byte but each file's first, files side by side as batch rows.

    Args:
        model: the model, its readout memory empty.
        sources: files; each is a row, streamed from the zero state.
        edit: strength ``λ`` for every layer.
        limit: bytes of each file at most.
        progress: wraps the segments, to draw a bar.
    """
    texts = sorted((source.data[:limit] for source in sources if len(source.data) > 1), key=len, reverse=True)
    ids, lengths = _padded(texts)
    state = model.initial_state(len(ids))
    strength = torch.full((len(ids), model.config.layers), edit)
    nats = 0.0
    for start in progress(range(0, ids.shape[1] - 1, _SEGMENT)):
        rows = int((lengths > start + 1).sum())  # the longest first: a row that has ended is dropped
        inputs = ids[:rows, start : min(start + _SEGMENT, ids.shape[1] - 1)]
        targets = ids[:rows, start + 1 : start + 1 + inputs.shape[1]]
        state = {name: tensor[:rows] for name, tensor in state.items()}
        features, present = model.features(inputs, strength[:rows], state)
        loss = F.cross_entropy(model.head(features).transpose(1, 2), targets, reduction="none")
        position = torch.arange(start + 1, start + 1 + inputs.shape[1])
        nats += float((loss * (position < lengths[:rows, None])).sum(dtype=torch.float64))
        state |= present
    return nats / math.log(2) / float((lengths - 1).sum())


def _padded(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(text) for text in texts])
    ids = np.zeros((len(texts), int(lengths.max())), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return torch.from_numpy(ids), lengths
