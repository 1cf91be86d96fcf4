"""Latency of the exported model against PyTorch eager on the same weights, side by side.

Machines are shared and noisy, so no time stands alone: both sides run alternately in one process
with the same number of threads, and what is reported is the ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from titans_export.model import TitansModel
from titans_runtime.backends import Array
from titans_runtime.errors import CheckFailed
from titans_runtime.session import Model

_TOLERANCE = 1e-4  # of the largest logit: both sides must compute the same before they are timed


@dataclass(frozen=True)
class LatencyRow:
    """One comparison.

    Attributes:
        what: for example ``decode, editing off``.
        tokens: tokens of one timed run.
        eager: seconds a token, median over the rounds.
        ours: likewise.
        ratios: eager / ours, round by round.
    """

    what: str
    tokens: int
    eager: float
    ours: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of ``ratios``."""
        return statistics.median(self.ratios)


def compare_with_eager(
    eager: TitansModel,
    ours: Model,
    prefill: int = 512,
    decode: int = 64,
    rounds: int = 7,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda rounds: rounds,
) -> list[LatencyRow]:
    """Time prefill and decode, fused editing off and on, at batch 1.

    Args:
        eager: the PyTorch model.
        ours: the exported model, loaded with as many threads as PyTorch uses.
        prefill: tokens of one prefill.
        decode: tokens of one timed decode run.
        rounds: alternations, 5 at least to mean something.
        progress: wraps the rounds.

    Raises:
        CheckFailed: the two sides do not compute the same.
    """
    ids = np.random.default_rng(0).integers(0, ours.vocab_size, prefill)
    subjects: dict[str, tuple[int, Callable[[], float], Callable[[], float]]] = {}
    for name, strength in (("editing off", 0.0), ("editing on", 1.0)):
        _check_equal(eager, ours, ids, strength)
        subjects[f"prefill {prefill}, {name}"] = (
            prefill,
            partial(_eager_prefill, eager, ids, strength),
            partial(_our_prefill, ours, ids, strength),
        )
        subjects[f"decode, {name}"] = (
            decode,
            partial(_eager_decode, eager, ids[:decode], strength),
            partial(_our_decode, ours, ids[:decode], strength),
        )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}
    for round_ in progress(range(rounds + 1)):
        for name, (_, run_eager, run_ours) in subjects.items():
            pair = (run_eager(), run_ours())
            if round_:  # the first round warms up
                times[name].append(pair)
    return [_row(name, subjects[name][0], pairs) for name, pairs in times.items()]


def _row(what: str, tokens: int, pairs: list[tuple[float, float]]) -> LatencyRow:
    eager, ours = (statistics.median(side) / tokens for side in zip(*pairs, strict=True))
    return LatencyRow(what, tokens, eager, ours, tuple(a / b for a, b in pairs))


@torch.inference_mode()
def _check_equal(eager: TitansModel, ours: Model, ids: Array, strength: float) -> None:
    expected = eager(torch.from_numpy(ids)[None], _strength(eager, strength), eager.initial_state(1))
    actual = ours.session(edit=strength, editor=None).append(ids)
    scale = float(expected.logits.abs().max())
    error = float(np.abs(actual - expected.logits[0].numpy()).max())
    if not error <= _TOLERANCE * scale:
        raise CheckFailed(
            f"eager and exported logits differ by {error:.2e} of {scale:.2e}; nothing was timed"
        )


@torch.inference_mode()
def _eager_prefill(model: TitansModel, ids: Array, strength: float) -> float:
    state = model.initial_state(1)
    edit, tokens = _strength(model, strength), torch.from_numpy(ids)[None]
    began = time.perf_counter()
    model(tokens, edit, state)
    return time.perf_counter() - began


@torch.inference_mode()
def _eager_decode(model: TitansModel, ids: Array, strength: float) -> float:
    state = model.initial_state(1)
    edit, tokens = _strength(model, strength), torch.from_numpy(ids)[None]
    began = time.perf_counter()
    for t in range(len(ids)):
        state |= model(tokens[:, t : t + 1], edit, state).state
    return time.perf_counter() - began


def _our_prefill(model: Model, ids: Array, strength: float) -> float:
    session = model.session(edit=strength, editor=None)
    began = time.perf_counter()
    session.append(ids)
    return time.perf_counter() - began


def _our_decode(model: Model, ids: Array, strength: float) -> float:
    session = model.session(edit=strength, editor=None)
    tokens = [[int(token)] for token in ids]
    began = time.perf_counter()
    for token in tokens:
        session.append(token)
    return time.perf_counter() - began


def _strength(model: TitansModel, strength: float) -> torch.Tensor:
    return torch.full((1, model.config.layers), strength)
