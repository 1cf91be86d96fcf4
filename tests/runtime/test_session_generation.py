"""Drawing tokens from a session."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.streams import (
    Array,
    assert_same_snapshot,
)
from titans_runtime.editor import Editor


def _prompted(model: tr.Model, editor: Editor | None = None) -> tr.Session:
    session = model.session(0.5, editor)
    session.append(b"Once upon")
    return session


def test_a_seed_gives_the_same_text(model: tr.Model) -> None:
    texts = [bytes(_prompted(model).generate(20, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_without_a_seed_texts_differ(model: tr.Model) -> None:
    assert bytes(_prompted(model).generate(30)) != bytes(_prompted(model).generate(30))


def test_temperature_zero_follows_the_most_likely_token(model: tr.Model) -> None:
    session, twin = _prompted(model), _prompted(model)
    for token in session.generate(10, temperature=0):
        assert token == int(twin.last_logits.argmax())
        twin.append([token])
    assert_same_snapshot(session.snapshot(), twin.snapshot())


@pytest.mark.parametrize("taken", [0, 1, 3, 8])
@pytest.mark.parametrize("learn", [False, True])
def test_the_session_has_seen_exactly_what_was_yielded(model: tr.Model, taken: int, learn: bool) -> None:
    session, twin = _prompted(model, Editor(chunk=2)), _prompted(model, Editor(chunk=2))
    tokens = session.generate(8, seed=5, learn=learn)
    seen = list(itertools.islice(tokens, taken))
    tokens.close()
    assert session.position == len(b"Once upon") + taken
    assert list(twin.generate(taken, seed=5, learn=learn)) == seen
    assert_same_snapshot(session.snapshot(), twin.snapshot())


def test_learning_from_samples_is_appending_them(model: tr.Model) -> None:
    session, twin = _prompted(model, Editor(chunk=2)), _prompted(model, Editor(chunk=2))
    for token in session.generate(8, seed=5, learn=True):
        twin.append([token])
    assert_same_snapshot(session.snapshot(), twin.snapshot())


def test_samples_teach_the_readout_memory_only_where_they_shall(model: tr.Model) -> None:
    def readout(session: tr.Session) -> Array:
        return session.snapshot().arrays["state.readout"]

    session = model.session(0.5, Editor(chunk=4))
    session.append(b"12345678")  # the period is full, its last target unknown
    session.append(b"9")
    before = readout(session)
    fork = session.fork()
    list(session.generate(3, seed=0))
    assert np.array_equal(readout(session), before), "a period that has not ended"
    list(fork.generate(12, seed=0, learn=True))
    assert not np.array_equal(readout(fork), before)


def test_samples_alone_never_change_the_readout_memory(model: tr.Model) -> None:
    session = model.session(0.5, Editor(chunk=1))
    session.append(b"prompt")
    before = session.snapshot().arrays["state.readout"]
    list(session.generate(12, seed=0))
    assert np.array_equal(session.snapshot().arrays["state.readout"], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be an integer"),
        ({"max_new_tokens": 1, "seed": -1}, "seed is -1; it must be an integer, 0 or more"),
        ({"max_new_tokens": 1, "seed": 1.5}, "seed is 1.5; it must be an integer, 0 or more"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature is -1.0"),
        ({"max_new_tokens": 1, "top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_generation_refuses_values_before_the_first_token(
    model: tr.Model, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(tr.UsageError, match=message):
        _prompted(model).generate(**settings)


def test_a_prompt_is_appended_first(model: tr.Model) -> None:
    session, twin = model.session(), model.session()
    tokens = session.generate(6, seed=2, prompt=b"Once")
    assert session.position == 4, "at once, not with the first draw"
    twin.append(b"Once")
    assert list(tokens) == list(twin.generate(6, seed=2))
    assert_same_snapshot(session.snapshot(), twin.snapshot())


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"seed": -1}, {"prompt": b""}, {"prompt": [256]}]
)
def test_a_prompt_is_not_appended_where_anything_is_refused(
    model: tr.Model, settings: dict[str, object]
) -> None:
    session = model.session()
    with pytest.raises(tr.TitansError):
        session.generate(1, **({"prompt": b"Once"} | settings))
    assert session.position == 0


def test_an_editor_must_be_an_editor(model: tr.Model) -> None:
    with pytest.raises(tr.UsageError, match="editor is 'readout'; give an Editor"):
        model.session(editor="readout")


def test_generation_needs_a_token_first(model: tr.Model) -> None:
    with pytest.raises(tr.UsageError, match="seen no token yet; give a prompt"):
        model.session().generate(1)
