"""SCAN as a stream: the words of a command, a separator, its actions, an end.

Splits as in Lake and Baroni 2018 (arXiv 1711.00350): ``simple`` (experiment 1), ``length`` (2) and
``addprim_jump`` (3).
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from benchmarks.experiments.tasks.scan_grammar import PRIMITIVES, TURNS, commands, interpret
from benchmarks.experiments.tasks.task import IGNORED, Batch, Ids, Task, Test

WORDS = (
    *PRIMITIVES, "turn", *TURNS, "opposite", "around", "twice", "thrice", "and", "after",
    *PRIMITIVES.values(), *TURNS.values(), "|", "<end>",
)  # fmt: skip
"""Token ids are places in it."""
SPLITS = ("simple", "length", "addprim_jump")
SHORT = 22
"""Actions at most of a command in training, for the split ``length``."""
_JUMP_TIMES = 1467
_SPLIT_SEED = 0
_ID = {word: index for index, word in enumerate(WORDS)}


@cache
def split(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Commands to train on and to test on; those to train on may repeat."""
    everything = commands()
    if name == "simple":
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(everything))
        border = len(everything) * 8 // 10
        return tuple(everything[i] for i in order[:border]), tuple(everything[i] for i in order[border:])
    if name == "length":
        long = {command for command in everything if len(interpret(command)) > SHORT}
        return tuple(c for c in everything if c not in long), tuple(c for c in everything if c in long)
    with_jump = [command for command in everything if "jump" in command.split()]
    without = [command for command in everything if "jump" not in command.split()]
    return (
        tuple(without) + ("jump",) * _JUMP_TIMES,
        tuple(command for command in with_jump if command != "jump"),
    )


def encoded(chosen: list[str]) -> Batch:
    """Commands with their actions, which are asked for with their end; short ones are padded after it."""
    rows = [_row(command) for command in chosen]
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = np.full((len(rows), longest), _ID["<end>"])
    targets = np.full((len(rows), longest), IGNORED)
    for place, (row, asked) in enumerate(rows):
        tokens[place, : len(row)], targets[place, : len(row)] = row, asked
    return Batch(tokens, targets)


@cache
def _row(command: str) -> tuple[Ids, Ids]:
    """``w₁ … wₙ | a₁ … aₘ`` and its targets ``… a₁ … aₘ <end>``."""
    words = [_ID[word] for word in (*command.split(), "|")]
    actions = [_ID[action] for action in interpret(command)]
    tokens = np.array(words + actions)
    targets = np.array([IGNORED] * (len(words) - 1) + actions + [_ID["<end>"]])
    return tokens, targets


def _draw(generator: np.random.Generator, reach: float, count: int, name: str) -> Batch:  # noqa: ARG001
    train = split(name)[0]  # no curriculum: the commands are what they are
    return encoded([train[i] for i in generator.integers(0, len(train), count)])


def _questions(generator: np.random.Generator, count: int, name: str, development: bool) -> Batch:
    train, test = split(name)
    source = train if development else test
    return encoded([source[i] for i in generator.choice(len(source), count, replace=False)])


def _task(name: str) -> Task:
    return Task(
        f"scan-{name}",
        vocab_size=len(WORDS),
        chance=1 / (len(PRIMITIVES) + len(TURNS) + 1),
        answers=range(_ID["I_WALK"], len(WORDS)),
        draw=partial(_draw, name=name),
        tests=(
            Test("split", name, SPLITS.index(name), 512, partial(_questions, name=name, development=False)),
        ),
        development=(Test("split", name, 0, 64, partial(_questions, name=name, development=True)),),
        steps=500,
        measure="exact",
    )


SCAN = tuple(_task(name) for name in SPLITS)
