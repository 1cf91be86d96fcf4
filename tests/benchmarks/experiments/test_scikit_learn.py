"""The digits themselves, which scikit-learn brings."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.experiments.tasks.digits import CODES, DIGITS, KNOWN, NOVEL, scikit_learn_digits
from benchmarks.experiments.tasks.task import IGNORED, examples


@pytest.mark.suite("experiments")
def test_training_has_no_image_of_a_test_and_no_novel_digit() -> None:
    images = scikit_learn_digits()
    assert images.tokens.shape == (1797, 4)
    assert images.tokens.max() < CODES
    rows = {tuple(row): label for row, label in zip(images.tokens, images.labels, strict=True)}
    blocks = DIGITS.training_batch(0, 0, 10).tokens.reshape(-1, 5)[:, :4]
    assert {rows[tuple(block)] for block in blocks} <= set(KNOWN)
    held_out = {tuple(row) for row in images.tokens[images.held_out]}
    for number, test in enumerate(DIGITS.tests):
        batch = examples(test, number)
        blocks = batch.tokens.reshape(-1, 5)[:, :4]
        assert {tuple(block) for block in blocks} <= held_out
        expected = set(KNOWN if test.label == "known" else NOVEL)
        assert {images.labels[np.flatnonzero((images.tokens == b).all(1))[0]] for b in blocks} <= expected
        assert ((batch.targets != IGNORED).sum(axis=1) == 3).all()
