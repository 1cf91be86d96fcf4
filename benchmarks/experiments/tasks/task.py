"""What a task is: batches of tokens with their answers, made from a seed and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IGNORED = -1
"""Target of a position that is not scored."""
TEST_SEED = 20_250_104
"""Of every test, whatever seed a model was trained with: all answer the same questions."""

Ids = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Examples of one length: ``tokens (B, T)``, and what follows each, ``targets (B, T)`` or ``IGNORED``."""

    tokens: Ids
    targets: Ids


Make = Callable[[np.random.Generator, int], Batch]
"""From a generator and a number of examples to these."""


@dataclass(frozen=True)
class Test:
    """Questions of one kind and size.

    Attributes:
        group: what is varied, a panel of the plot: ``length``, ``pairs``, …
        label: the column's heading.
        size: where it stands on the axis.
        examples: how many are asked.
        make: makes them.
    """

    __test__ = False  # no class of pytest's

    group: str
    label: str
    size: int
    examples: int
    make: Make


@dataclass(frozen=True)
class Task:
    """One training set and what it is tested on.

    Attributes:
        name: as in files.
        vocab_size: token ids.
        chance: accuracy of a scored token by guessing among the answers that can occur.
        answers: token ids that can be answers.
        draw: a training batch, from a generator, how far the curriculum has come (0 to 1) and its rows.
        tests: asked after training.
        development: asked to choose how to edit; no example of it is in ``tests``.
        steps: of training, unless another number is asked for.
        batch: rows of a training batch.
        carry: probability that a training row begins with the state that the row before it left, where a
            network has one; without gradients through it, and no answer depends on anything before it.
        curriculum: shares of a training where longer examples begin, and where all lengths are reached.
        ends: of tests that grow: the size at which a row that answers no more than guessing would is asked
            no longer one; None to ask all of them.
        ways: to edit Titans models at test time that are asked about; each costs as much time as the test.
        measure: what is plotted: ``token``, single answers, or ``exact``, examples with all answers right.
    """

    name: str
    vocab_size: int
    chance: float
    answers: range
    draw: Callable[[np.random.Generator, float, int], Batch]
    tests: tuple[Test, ...]
    development: tuple[Test, ...]
    steps: int
    batch: int = 64
    carry: float = 0.0
    curriculum: tuple[float, float] = (0.3, 0.7)
    ends: int | None = None
    ways: tuple[str, ...] = ("off", "fused", "readout", "prediction")
    measure: str = "token"

    def training_batch(self, seed: int, step: int, steps: int) -> Batch:
        """The batch of ``step``: the shortest examples to begin with, then longer ones."""
        begin, end = self.curriculum
        reach = min(1.0, max(0.0, (step / steps - begin) / (end - begin)))
        return self.draw(np.random.default_rng([seed, step]), reach, self.batch)


def examples(test: Test, number: int) -> Batch:
    """A test's questions; ``number`` tells the tests of one task apart."""
    return test.make(np.random.default_rng([TEST_SEED, number]), test.examples)


def drawn_length(generator: np.random.Generator, least: int, most: int, reach: float) -> int:
    """A length from ``least`` up to where the curriculum has come, each doubling as likely as the other."""
    highest = least * (most / least) ** reach
    return min(most, round(least * (highest / least) ** generator.random()))
