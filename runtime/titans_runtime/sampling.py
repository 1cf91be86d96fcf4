"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to draw a token.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the ``k`` most likely tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches ``p``; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value lies outside its range.
        """
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise UsageError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def draw(self, logits: Array, generator: np.random.Generator) -> int:
        """One token id for ``logits (vocab,)`` float32."""
        if self.temperature == 0:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose probability is 0
            scaled = (logits.astype(np.float64) - float(logits.max())) / self.temperature
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        probability = np.exp(scaled[order])
        probability /= probability.sum()
        if self.top_p < 1:
            kept = int(np.searchsorted(probability.cumsum(), self.top_p)) + 1
            order, probability = order[:kept], probability[:kept] / probability[:kept].sum()
        return int(generator.choice(order, p=probability))


def seeded(seed: int | None) -> np.random.Generator:
    """What draws; with a seed, the same again.

    Raises:
        UsageError: the seed is no integer, or below 0.
    """
    if seed is not None:
        whole: object = seed
        if not isinstance(whole, int | np.integer) or seed < 0:
            raise UsageError(f"seed is {seed!r}; it must be an integer, 0 or more")
    return np.random.default_rng(seed)
