"""Drawing a token: what may be drawn, and how often."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.runtime.streams import Array
from titans_runtime import UsageError
from titans_runtime.sampling import Sampling

VOCAB = 6
logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB).map(
    lambda row: np.array(row, np.float32)
)
seeds = st.integers(0, 2**32 - 1)


def _draws(sampling: Sampling, logits: Array, seed: int, count: int = 30) -> list[int]:
    generator = np.random.default_rng(seed)
    return [sampling.draw(logits, generator) for _ in range(count)]


def _softmax(logits: Array, temperature: float = 1.0) -> Array:
    scaled = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return scaled / scaled.sum()


@given(logits=logit_rows, seed=seeds)
def test_temperature_zero_takes_the_most_likely_token(logits: Array, seed: int) -> None:
    assert set(_draws(Sampling(temperature=0), logits, seed)) == {int(logits.argmax())}


@given(logits=logit_rows, seed=seeds)
def test_one_of_one_is_greedy(logits: Array, seed: int) -> None:
    assert set(_draws(Sampling(top_k=1), logits, seed)) == {int(logits.argmax())}


@given(logits=logit_rows, seed=seeds, k=st.integers(1, VOCAB + 3))
def test_top_k_draws_from_the_k_most_likely(logits: Array, seed: int, k: int) -> None:
    kept = sorted(logits, reverse=True)[:k]
    assert all(logits[token] >= kept[-1] for token in _draws(Sampling(top_k=k), logits, seed))


@given(logits=logit_rows, seed=seeds, p=st.floats(0.05, 0.99), temperature=st.floats(0.2, 3))
def test_top_p_draws_from_the_fewest_that_reach_p(
    logits: Array, seed: int, p: float, temperature: float
) -> None:
    probability = _softmax(logits, temperature)
    for token in set(_draws(Sampling(temperature, top_p=p), logits, seed)):
        before = probability[probability > probability[token]].sum()
        assert before < p + 1e-9, "the tokens before it reach p without it"


@given(logits=logit_rows, seed=seeds, temperature=st.sampled_from([5e-324, 1e-310, 1e-30]))
@example(logits=np.array([0, 0, 1.4e-45], np.float32), seed=0, temperature=1e-30)  # no nearer than they are
def test_a_tiny_temperature_is_greedy_not_an_overflow(logits: Array, seed: int, temperature: float) -> None:
    """``exp(-746)`` is 0 in float64: no token is drawn that lies 746 temperatures or more below the best."""
    below = float(logits.max()) - logits.astype(np.float64)
    possible = np.flatnonzero(below < 746 * temperature)
    assert set(_draws(Sampling(temperature), logits, seed, 5)) <= set(possible.tolist())


@given(logits=logit_rows, seed=seeds)
def test_a_seed_gives_the_same_draws(logits: Array, seed: int) -> None:
    assert _draws(Sampling(0.7), logits, seed) == _draws(Sampling(0.7), logits, seed)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, 0.5, -3.0], np.float32)
    count = 20_000
    frequency = np.bincount(_draws(Sampling(temperature), logits, 0, count), minlength=VOCAB) / count
    probability = _softmax(logits, temperature)
    deviation = np.sqrt(probability * (1 - probability) / count)
    assert (np.abs(frequency - probability) < 5 * deviation).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_values_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)
