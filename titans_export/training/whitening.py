"""Mean and whitening of the readout key's features, measured on training text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from titans_export.model import TitansModel
from titans_export.training.data import SegmentStream, Source

_BATCH, _SEGMENT, _STEPS = 8, 1024, 32  # 262,144 positions: 1,000 for each feature of `nano`
_FLOOR = 1e-3  # of the mean variance, added to every direction: a dead feature must not blow up


@torch.no_grad()
def measure_whitening(model: TitansModel, sources: Sequence[Source], edit: float, seed: int) -> None:
    """Store ``μ`` and ``Σ^{-1/2}`` of the features on ``sources`` in ``model.readout_key``."""
    total = sum(len(source.data) for source in sources)
    segment = min(_SEGMENT, max(1, total // _BATCH - 1))
    stream = SegmentStream(sources, _BATCH, segment, seed)
    state = model.initial_state(_BATCH)
    strength = torch.full((_BATCH, model.config.layers), edit)
    count, mean = 0, torch.zeros(model.config.d_model, dtype=torch.float64)
    square = torch.zeros(model.config.d_model, model.config.d_model, dtype=torch.float64)
    for step in range(min(_STEPS, stream.steps_per_epoch)):
        features, present = model.features(stream.at(step)[0], strength, state)
        state |= present
        flat = features.double().flatten(0, 1)
        count += len(flat)
        mean += flat.sum(0)
        square += flat.T @ flat
    mean /= count
    covariance = square / count - torch.outer(mean, mean)
    variance, directions = np.linalg.eigh(covariance.numpy())
    scale = 1 / np.sqrt(np.maximum(variance, 0) + _FLOOR * variance.mean())
    whitening = (directions * scale) @ directions.T
    model.readout_key.mean.copy_(mean)
    model.readout_key.whitening.copy_(torch.from_numpy(whitening))
