"""SCAN's commands and what they mean: Lake and Baroni 2018 (arXiv 1711.00350), supplement.

C → S and S | S after S | S          V → D opposite-form | D around-form | D | U
S → V twice | V thrice | V           D → U left | U right | turn left | turn right
                                     U → walk | look | run | jump
"""

from __future__ import annotations

from itertools import product

PRIMITIVES = {"walk": "I_WALK", "look": "I_LOOK", "run": "I_RUN", "jump": "I_JUMP"}
TURNS = {"left": "I_TURN_LEFT", "right": "I_TURN_RIGHT"}
_TIMES = {"twice": 2, "thrice": 3}

Actions = tuple[str, ...]


def interpret(command: str) -> Actions:
    """The actions of a command.

    Raises:
        ValueError: the grammar has no such command.
    """
    words = command.split()
    if "and" in words:
        place = words.index("and")
        return _repeated(words[:place]) + _repeated(words[place + 1 :])
    if "after" in words:
        place = words.index("after")
        return _repeated(words[place + 1 :]) + _repeated(words[:place])
    return _repeated(words)


def _repeated(words: list[str]) -> Actions:
    """``S``."""
    if words and words[-1] in _TIMES:
        return _phrase(words[:-1]) * _TIMES[words[-1]]
    return _phrase(words)


def _phrase(words: list[str]) -> Actions:
    """``V``."""
    match words:
        case [verb, ("opposite" | "around") as manner, side] if side in TURNS:
            act = _act(verb)
            if manner == "opposite":
                return (TURNS[side], TURNS[side], *act)
            return (TURNS[side], *act) * 4
        case [verb, side] if side in TURNS:
            return (TURNS[side], *_act(verb))
        case [verb] if verb in PRIMITIVES:
            return (PRIMITIVES[verb],)
    raise ValueError(f"SCAN has no phrase {' '.join(words)!r}")


def _act(verb: str) -> Actions:
    """What is done beside turning; ``turn`` itself does nothing else."""
    if verb == "turn":
        return ()
    if verb in PRIMITIVES:
        return (PRIMITIVES[verb],)
    raise ValueError(f"SCAN has no verb {verb!r}")


def commands() -> list[str]:
    """All 20,910, in a fixed order."""
    verbs = [*PRIMITIVES, "turn"]
    phrases = list(PRIMITIVES)
    phrases += [f"{verb} {side}" for verb, side in product(verbs, TURNS)]
    phrases += [
        f"{verb} {manner} {side}" for verb, manner, side in product(verbs, ("opposite", "around"), TURNS)
    ]
    sentences = [f"{phrase}{times}" for phrase, times in product(phrases, ("", " twice", " thrice"))]
    joined = [
        f"{first} {word} {second}" for first, word, second in product(sentences, ("and", "after"), sentences)
    ]
    return sentences + joined
