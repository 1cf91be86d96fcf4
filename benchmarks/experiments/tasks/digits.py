"""Images and labels in one stream: handwritten digits as patch tokens, each followed by its label.

Labels are permuted anew for every sequence, so that no weight can know them; digits 7, 8 and 9 are in no
training sequence. A model that answers for those has bound a new class to a new label while it ran. A test
asks once: of three that are asked for in turn, the labels already given would betray the last.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.experiments.tasks.task import IGNORED, Batch, Ids, Task, Test
from titans_runtime.errors import EnvironmentProblem

KNOWN, NOVEL = (0, 1, 2, 3, 4, 5, 6), (7, 8, 9)
"""Digits of training, and those held out from it."""
CLASSES = 3
"""Digits of a sequence."""
SHOTS = 4
"""Labelled images of each; then one more image is asked for, in training one more of each."""
SIDE = 4
PATCHES = 4
CODES = 48
"""Patch tokens: the four quarters of an image, 4 × 4 pixels each, quantised.

Between digits of three classes, the share of equal tokens finds the right one of four images each in 88 %
(training's classes) and 73 % (held-out classes); the distance of their centres in 95 % and 85 %.
"""
LABEL = CODES
_LABELS = 10
_ROUNDS = 12


class Images(NamedTuple):
    """``tokens (N, 4)``, a patch each; ``labels (N,)``; ``held_out (N,)``: images for tests alone."""

    tokens: Ids
    labels: Ids
    held_out: npt.NDArray[np.bool_]


def patches(images: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``(N, 8, 8) → (N, 4, 16)``, row by row."""
    rows = 8 // SIDE
    cut = images.reshape(len(images), rows, SIDE, rows, SIDE)
    return cut.transpose(0, 1, 3, 2, 4).reshape(len(images), PATCHES, SIDE**2)


def codebook(points: npt.NDArray[np.float64], size: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Centres by k-means; an empty one keeps its place."""
    generator = np.random.default_rng(seed)
    unique = np.unique(points, axis=0)
    centres = unique[generator.choice(len(unique), size, replace=False)]
    for _ in range(_ROUNDS):
        nearest = quantised(points, centres)
        for index in range(size):
            if (own := points[nearest == index]).size:
                centres[index] = own.mean(axis=0)
    return centres


def quantised(points: npt.NDArray[np.float64], centres: npt.NDArray[np.float64]) -> Ids:
    """The nearest centre of each of ``points (…, size)``."""
    distance = -2 * points @ centres.T + (centres**2).sum(-1)
    nearest: Ids = distance.argmin(-1)
    return nearest


def tokenised(images: npt.NDArray[np.float64], labels: Ids) -> Images:
    """Patch tokens; the codebook knows training images only."""
    cut = patches(images)
    held_out = np.random.default_rng(0).random(len(images)) < 0.25
    seen = cut[np.isin(labels, KNOWN) & ~held_out].reshape(-1, SIDE**2)
    return Images(quantised(cut, codebook(seen, CODES)), labels, held_out)


@cache
def scikit_learn_digits() -> Images:
    """The 1,797 images of 8 × 8 pixels that scikit-learn brings.

    Raises:
        EnvironmentProblem: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise EnvironmentProblem(
            "scikit-learn is not installed; pip install 'titans-export[experiments]'"
        ) from None
    content = load_digits()
    return tokenised(content.images, content.target.astype(np.int64))


def episodes(
    generator: np.random.Generator,
    count: int,
    images: Images,
    digits: tuple[int, ...],
    held_out: bool,
    from_place: int = CLASSES * SHOTS,
    same: float = 0.0,
    asked: int = 1,
) -> Batch:
    """``p₁ … p₄ label`` for 4 images of each of 3 digits, then for one more of ``asked`` of them.

    No image stands in a sequence twice, unless ``same``, a probability, puts a digit's first image in the
    place of its others: then there is less to see, and the binding alone to learn. Labels are three of ten
    tokens, drawn anew for every sequence. With ``from_place`` below 12, the labels of the images from there
    on are asked for as well, once their digit has been shown.
    """
    rows = [_episode(generator, images, digits, held_out, from_place, same, asked) for _ in range(count)]
    return Batch(np.stack([row.tokens for row in rows]), np.stack([row.targets for row in rows]))


def _episode(
    generator: np.random.Generator,
    images: Images,
    digits: tuple[int, ...],
    held_out: bool,
    from_place: int,
    same: float,
    asked: int,
) -> Batch:
    chosen = generator.permutation(digits)[:CLASSES]
    names = LABEL + generator.permutation(_LABELS)[:CLASSES]
    shown, questions = [], []
    for digit, name in zip(chosen, names, strict=True):
        own = np.flatnonzero((images.labels == digit) & (images.held_out == held_out))
        picked = generator.choice(own, SHOTS + 1, replace=False)
        picked = np.where(generator.random(SHOTS + 1) < same, picked[0], picked)
        shown += [(index, name) for index in picked[1:]]
        questions.append((picked[0], name))
    order = [
        *(shown[i] for i in generator.permutation(len(shown))),
        *(questions[i] for i in generator.permutation(CLASSES)[:asked]),
    ]
    tokens = np.concatenate([[*images.tokens[index], name] for index, name in order])
    targets = np.full(tokens.shape, IGNORED)
    for place in range(from_place, len(order)):
        label = order[place][1]
        if any(name == label for _, name in order[:place]):
            targets[place * (PATCHES + 1) + PATCHES - 1] = label
    return Batch(tokens, targets)


def _draw(generator: np.random.Generator, reach: float, count: int) -> Batch:
    images = scikit_learn_digits()
    return episodes(
        generator, count, images, KNOWN, held_out=False, from_place=1, same=1.0 - reach, asked=CLASSES
    )


def _questions(generator: np.random.Generator, count: int, digits: tuple[int, ...], held_out: bool) -> Batch:
    return episodes(generator, count, scikit_learn_digits(), digits, held_out)


def _test(label: str, size: int, digits: tuple[int, ...], held_out: bool, count: int) -> Test:
    return Test("digits", label, size, count, partial(_questions, digits=digits, held_out=held_out))


DIGITS = Task(
    "digits",
    vocab_size=CODES + _LABELS,
    chance=1 / CLASSES,
    answers=range(LABEL, LABEL + _LABELS),
    draw=_draw,
    tests=(_test("known", 0, KNOWN, True, 512), _test("novel", 1, NOVEL, True, 512)),
    development=(_test("known", 0, KNOWN, False, 128),),
    steps=1000,
    batch=32,
    ways=("off", "fused", "readout"),
)
