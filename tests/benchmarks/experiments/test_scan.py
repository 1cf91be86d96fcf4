"""SCAN: its counts, and commands whose actions were worked out by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.experiments.tasks.scan import SCAN, WORDS, encoded, split
from benchmarks.experiments.tasks.scan_grammar import commands, interpret
from benchmarks.experiments.tasks.task import IGNORED, examples

SHORT = {"L": "I_TURN_LEFT", "R": "I_TURN_RIGHT", "w": "I_WALK", "l": "I_LOOK", "r": "I_RUN", "j": "I_JUMP"}


@pytest.mark.parametrize(
    ("command", "actions"),
    [
        ("walk", "w"),
        ("jump thrice", "jjj"),
        ("turn left", "L"),
        ("turn right thrice", "RRR"),
        ("look left", "Ll"),
        ("run right twice", "RrRr"),
        ("turn opposite left", "LL"),
        ("jump opposite right", "RRj"),
        ("turn around right", "RRRR"),
        ("jump around left", "LjLjLjLj"),
        ("jump around left twice", "LjLjLjLj" * 2),
        ("walk opposite left thrice", "LLwLLwLLw"),
        ("walk and jump", "wj"),
        ("walk after jump", "jw"),
        ("look twice and turn opposite right", "llRR"),
        ("walk and turn left after run opposite right thrice", None),
        ("turn left after run opposite right thrice", "RRrRRrRRrL"),
        ("jump opposite left after walk around left", "LwLwLwLwLLj"),
    ],
)
def test_known_commands(command: str, actions: str | None) -> None:
    if actions is None:  # two conjunctions: the grammar has one at most
        with pytest.raises(ValueError, match="no phrase"):
            interpret(command)
        assert command not in commands()
        return
    assert interpret(command) == tuple(SHORT[letter] for letter in actions)
    assert command in commands()


def test_counts_are_the_published_ones() -> None:
    everything = commands()
    assert len(everything) == len(set(everything)) == 20_910
    assert max(len(command.split()) for command in everything) == 9
    assert max(len(interpret(command)) for command in everything) == 48
    assert [len(part) for part in split("length")] == [16_990, 3_920]
    assert [len(part) for part in split("addprim_jump")] == [14_670, 7_706]
    assert [len(part) for part in split("simple")] == [16_728, 4_182]


def test_splits_are_what_they_say() -> None:
    train, test = split("simple")
    assert sorted(train + test) == sorted(commands())
    train, test = split("length")
    assert max(len(interpret(command)) for command in train) == 22
    assert min(len(interpret(command)) for command in test) == 24
    train, test = split("addprim_jump")
    assert Counter(train)["jump"] == 1_467
    assert {command for command in train if "jump" in command} == {"jump"}
    assert all("jump" in command.split() for command in test)
    assert "jump" not in test


def test_encoded_pairs_read_back() -> None:
    batch = encoded(["jump around left twice", "walk"])
    for tokens, targets, command in zip(*batch, ["jump around left twice", "walk"], strict=True):
        words = [WORDS[token] for token in tokens]
        border = words.index("|")
        assert words[:border] == command.split()
        asked = [WORDS[target] for target in targets if target != IGNORED]
        assert asked == [*interpret(command), "<end>"]
        assert (targets[:border] == IGNORED).all()
        assert list(tokens[border + 1 : border + len(asked)]) == list(
            targets[border : border + len(asked) - 1]
        )


def test_questions_come_from_the_test_side_and_development_from_training() -> None:
    for task in SCAN:
        name = task.name.removeprefix("scan-")
        train, test = map(set, split(name))
        for source, tests in ((test, task.tests), (train, task.development)):
            for tokens in examples(tests[0], 0).tokens[:32]:
                words = [WORDS[token] for token in tokens]
                assert " ".join(words[: words.index("|")]) in source
    assert np.array_equal(examples(SCAN[0].tests[0], 0).tokens, examples(SCAN[0].tests[0], 0).tokens)
