"""The laws of every task, for any seed and size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.experiments.tasks import EXPERIMENTS
from benchmarks.experiments.tasks.copying import SEPARATOR, strings
from benchmarks.experiments.tasks.digits import (
    CLASSES,
    LABEL,
    PATCHES,
    SHOTS,
    Images,
    codebook,
    episodes,
    patches,
    quantised,
    tokenised,
)
from benchmarks.experiments.tasks.induction import SPECIAL, TRAINING_ASKED, VOCABULARY, heads
from benchmarks.experiments.tasks.recall import KEYS, QUERIES, bindings
from benchmarks.experiments.tasks.selective import MARKER, NOISE, REMEMBERED, scattered
from benchmarks.experiments.tasks.task import IGNORED, Task, drawn_length, examples

SEEDS = st.integers(0, 2**31)
GENERATED = [task for tasks in EXPERIMENTS.values() for task in tasks if task.name != "digits"]


@pytest.mark.parametrize("task", GENERATED, ids=lambda task: task.name)
def test_batches_follow_from_the_seed_and_fit_the_vocabulary(task: Task) -> None:
    first, again, other = (task.training_batch(seed, 5, 10) for seed in (1, 1, 2))
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.targets, again.targets)
    assert not np.array_equal(first.tokens, other.tokens)
    for number, test in enumerate(task.tests):
        batch = examples(test, number)
        assert batch.tokens.shape == batch.targets.shape
        assert len(batch.tokens) == test.examples
        assert 0 <= batch.tokens.min() <= batch.tokens.max() < task.vocab_size <= 256
        assert (batch.targets != IGNORED).any(axis=1).all()


@given(SEEDS, st.integers(1, 40))
def test_a_copied_string_is_the_string(seed: int, length: int) -> None:
    for tokens, targets in zip(*strings(np.random.default_rng(seed), 3, length), strict=True):
        assert tokens[length] == SEPARATOR
        assert list(targets[length:]) == list(tokens[:length])
        assert list(tokens[length + 1 :]) == list(tokens[: length - 1])
        assert (targets[:length] == IGNORED).all()


@given(SEEDS, st.integers(REMEMBERED, 60))
def test_markers_are_answered_by_the_data_in_order(seed: int, length: int) -> None:
    for tokens, targets in zip(*scattered(np.random.default_rng(seed), 3, length), strict=True):
        data = tokens[:length][tokens[:length] != NOISE]
        assert len(data) == REMEMBERED
        assert (tokens[length:] == MARKER).all()
        assert list(targets[length:]) == list(data)
        assert (targets[:length] == IGNORED).all()


@given(SEEDS, st.integers(3, 80), st.integers(1, 4))
def test_an_induction_head_has_one_answer(seed: int, length: int, asked: int) -> None:
    for tokens, targets in zip(*heads(np.random.default_rng(seed), 4, length, asked), strict=True):
        first, *later = np.flatnonzero(tokens == SPECIAL)
        assert later[-1] == length - 1
        assert len(later) == min(asked, (length - 1) // 2)
        answer = tokens[first + 1]
        assert 1 <= answer < VOCABULARY
        assert all(tokens[place + 1] == answer for place in later[:-1])
        assert list(np.flatnonzero(targets != IGNORED)) == later
        assert (targets[later] == answer).all()


@given(SEEDS, st.integers(1, KEYS), st.integers(1, 5), st.sampled_from([0, 7]))
def test_a_key_is_answered_by_its_last_value(seed: int, pairs: int, times: int, repeat: int) -> None:
    batch = bindings(np.random.default_rng(seed), 2, pairs, times, repeat)
    for tokens, targets in zip(*batch, strict=True):
        written = 2 * pairs * times
        known = dict(zip(tokens[:written:2], tokens[1:written:2], strict=True))
        assert len(known) == pairs
        asked = np.flatnonzero(targets != IGNORED)
        assert list(asked) == list(range(written, len(tokens), 2))
        assert [known[tokens[place]] for place in asked] == list(targets[asked]) == list(tokens[asked + 1])
        assert len(asked) == (repeat or min(pairs, QUERIES))
        if not repeat:
            assert len(set(tokens[asked])) == len(asked)


@given(SEEDS, st.floats(0, 1))
def test_lengths_stay_within_the_curriculum(seed: int, reach: float) -> None:
    length = drawn_length(np.random.default_rng(seed), 8, 256, reach)
    assert 8 <= length <= round(8 * 32**reach) + 1
    assert length <= 256


def test_the_curriculum_begins_short_and_ends_long() -> None:
    (task,) = EXPERIMENTS["induction"]
    lengths = [task.training_batch(0, step, 100).tokens.shape[1] for step in range(100)]
    assert set(lengths[:20]) == {min(lengths)}
    assert max(lengths) > 200


@pytest.mark.parametrize(
    ("name", "whole", "asked"),
    [("induction", 0.8, 2), ("induction-long", 0.5, 1), ("induction-fresh", 0.7, 1)],
)
def test_the_end_of_an_induction_heads_training(name: str, whole: float, asked: int) -> None:
    """Whole sequences from where the curriculum says, each asked as often as its task says."""
    (task,) = EXPERIMENTS[name]
    steps = round(100 * whole)
    for step in (steps, 99):
        batch = task.training_batch(0, step, 100)
        assert batch.tokens.shape == (task.batch, 256)
        assert ((batch.targets != IGNORED).sum(axis=1) == asked).all()
    before = task.training_batch(0, steps - 5, 100).targets
    assert ((before != IGNORED).sum(axis=1) == TRAINING_ASKED).all()


def pictures() -> Images:
    """Noise with a label each: ten classes, forty images each."""
    generator = np.random.default_rng(0)
    return tokenised(generator.integers(0, 17, (400, 8, 8)).astype(float), np.arange(400) % 10)


def test_patches_keep_their_pixels() -> None:
    image = np.arange(64.0).reshape(1, 8, 8)
    assert patches(image)[0, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27]
    assert patches(image)[0, 3, 0] == 36
    assert sorted(patches(image).ravel()) == list(range(64))


def test_a_codebook_of_separate_clusters_finds_them() -> None:
    centres = np.array([[0.0, 0, 0, 0], [9, 9, 9, 9], [0, 9, 0, 9]])
    points = np.repeat(centres, 20, axis=0) + np.random.default_rng(0).normal(0, 0.1, (60, 4))
    found = codebook(points, 3)
    assert np.abs(found[quantised(centres, found)] - centres).max() < 0.2


@given(SEEDS, st.booleans())
def test_an_episode_binds_labels_anew_and_repeats_no_image(seed: int, held_out: bool) -> None:
    images = pictures()
    batch = episodes(np.random.default_rng(seed), 2, images, (7, 8, 9), held_out)
    side = images.tokens[(images.held_out == held_out) & (images.labels >= 7)]
    known = {tuple(row) for row in side}
    for tokens, targets in zip(*batch, strict=True):
        blocks = tokens.reshape(CLASSES * SHOTS + 1, PATCHES + 1)
        shown = {tuple(block[:PATCHES]) for block in blocks}
        assert shown <= known
        assert len(shown) == len(blocks)
        assert all(LABEL <= label < LABEL + 10 for label in blocks[:, -1])
        assert len(set(blocks[:, -1])) == CLASSES
        asked = np.flatnonzero(targets != IGNORED)
        assert list(targets[asked]) == [blocks[-1, -1]]
        assert all((blocks[:-1, -1] == label).sum() == SHOTS for label in set(blocks[:-1, -1]))
        assert targets[asked] in blocks[:-1, -1]


def test_a_training_begins_with_the_same_image_again_and_again() -> None:
    batch = episodes(np.random.default_rng(0), 4, pictures(), (0, 1, 2), held_out=False, same=1.0)
    for tokens in batch.tokens:
        shown = {tuple(block) for block in tokens.reshape(-1, PATCHES + 1)}
        assert len(shown) == CLASSES


def test_training_asks_for_every_label_that_was_shown_before() -> None:
    batch = episodes(
        np.random.default_rng(0), 4, pictures(), (0, 1, 2), held_out=False, from_place=1, asked=3
    )
    for tokens, targets in zip(*batch, strict=True):
        labels = tokens.reshape(-1, PATCHES + 1)[:, -1]
        asked = targets.reshape(-1, PATCHES + 1)[:, PATCHES - 1]
        for place, (label, target) in enumerate(zip(labels, asked, strict=True)):
            assert target == (label if label in labels[:place] else IGNORED)
