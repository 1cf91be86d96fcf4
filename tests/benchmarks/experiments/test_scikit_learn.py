"""The digits themselves, which scikit-learn brings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.experiments.tasks.digits import CODES, DIGITS, KNOWN, NOVEL, Images, scikit_learn_digits
from benchmarks.experiments.tasks.task import IGNORED, examples


@pytest.mark.suite("experiments")
def test_training_has_no_image_of_a_test_and_no_novel_digit() -> None:
    images = scikit_learn_digits()
    assert images.tokens.shape == (1797, 4)
    assert images.tokens.max() < CODES
    seen = DIGITS.training_batch(0, 0, 10).tokens.reshape(-1, 5)[:, :4]
    assert {tuple(block) for block in seen} <= _rows(images, np.isin(images.labels, KNOWN) & ~images.held_out)
    for number, test in enumerate(DIGITS.tests):
        batch = examples(test, number)
        own = np.isin(images.labels, KNOWN if test.label == "known" else NOVEL) & images.held_out
        assert {tuple(block) for block in batch.tokens.reshape(-1, 5)[:, :4]} <= _rows(images, own)
        assert ((batch.targets != IGNORED).sum(axis=1) == 1).all()


def _rows(images: Images, chosen: npt.NDArray[np.bool_]) -> set[tuple[int, ...]]:
    return {tuple(row) for row in images.tokens[chosen].tolist()}
