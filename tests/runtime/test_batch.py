"""Sessions in a batch are what they are alone: scores, memories, positions, failures."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_runtime as tr
from tests.runtime.streams import assert_same_snapshot, relative_error
from titans_runtime.editor import Editor

EDITORS = [None, Editor(step=0.5, chunk=3), Editor(step=0.7, chunk=4, optimizer="adagrad")]


def _sessions(model: tr.Model) -> list[tr.Session]:
    """Streams at different positions, with different edit strengths and editors."""
    sessions = []
    for index, editor in enumerate(EDITORS):
        session = model.session(edit=index / 2, editor=editor)
        if index:
            session.append(bytes(range(40, 40 + 7 * index)))
        sessions.append(session)
    return sessions


def _assert_close(actual: tr.Session, expected: tr.Session) -> None:
    assert actual.position == expected.position
    one, other = actual.snapshot().arrays, expected.snapshot().arrays
    assert one.keys() == other.keys()
    for name, array in other.items():
        scale = max(float(np.abs(array).max(initial=0)), 1e-3)
        assert float(np.abs(one[name] - array).max(initial=0)) <= 1e-4 * scale, name


texts = st.lists(st.binary(min_size=1, max_size=20), min_size=3, max_size=3)


@settings(max_examples=25)
@given(st.lists(texts, min_size=1, max_size=4))
def test_rows_equal_single_sessions(model: tr.Model, calls: list[list[bytes]]) -> None:
    """Any number of tokens for each, several calls, editors with their own periods."""
    alone, together = _sessions(model), _sessions(model)
    with model.batch(together) as batch:
        for call in calls:
            for logits, session, text in zip(batch.append(call), alone, call, strict=True):
                assert relative_error(logits, session.append(text)) <= 1e-5
    for session, single in zip(together, alone, strict=True):
        _assert_close(session, single)


def test_long_calls_are_cut_like_single_ones(model: tr.Model) -> None:
    alone, together = _sessions(model), _sessions(model)
    text = [
        bytes(np.random.default_rng(row).integers(0, 256, 600 + 300 * row).astype(np.uint8))
        for row in range(3)
    ]
    with model.batch(together) as batch:
        for logits, session, one in zip(batch.append(text), alone, text, strict=True):
            assert relative_error(logits, session.append(one)) <= 1e-4


def test_sessions_go_on_by_themselves_afterwards(model: tr.Model) -> None:
    sessions = _sessions(model)
    with model.batch(sessions) as batch:
        batch.append([b"abc", b"de", b"f"])
    twins = [session.fork() for session in sessions]
    for session, twin in zip(sessions, twins, strict=True):
        assert np.array_equal(session.append(b"more text"), twin.append(b"more text"))
        assert_same_snapshot(session.snapshot(), twin.snapshot())


def test_a_batch_opens_again_with_others(model: tr.Model) -> None:
    first, second, third = _sessions(model)
    for members in ([first, second], [third, first], [second]):
        with model.batch(members) as batch:
            batch.append([b"x"] * len(members))
    assert [session.position for session in (first, second, third)] == [2, 9, 15]


@pytest.mark.parametrize("tokens", [[b"ab", b"cd", [256]], [b"ab", b"", b"cd"], [b"ab", b"cd", [0.5]]])
def test_bad_tokens_of_one_change_none(model: tr.Model, tokens: list[object]) -> None:
    sessions = _sessions(model)
    before = [session.snapshot() for session in sessions]
    with model.batch(sessions) as batch, pytest.raises(tr.TokenError):
        batch.append(tokens)  # type: ignore[arg-type]
    for session, mark in zip(sessions, before, strict=True):
        assert_same_snapshot(session.snapshot(), mark)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (5, 3, 9), (600, 700, 800)])
def test_a_failure_of_one_is_undone_for_all(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    sessions, before = _sessions(model), []
    text = [b"z" * length for length in lengths]
    with model.batch(sessions) as batch:
        monkeypatch.setattr("titans_runtime.readout._LARGEST_UPDATE", 1e-6)
        failed = False
        while not failed:  # until a period of the editors ends
            before = [session._snapshot() for session in sessions]
            try:
                batch.append(text)
            except tr.NumericsError:
                failed = True
        monkeypatch.undo()
        for session, mark in zip(sessions, before, strict=True):
            assert_same_snapshot(session._snapshot(), mark)
        batch.append(text)


@pytest.mark.parametrize("first", [(1, 1, 1), (2, 1, 4), (1, 3, 2)])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 2, 3), (3, 1, 1), (600, 513, 1100)])
def test_rows_that_ran_alone_are_undone_too(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, first: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    """A ragged call leaves rows in different sets of arrays; the next must not overwrite what it undoes."""
    sessions = _sessions(model)
    with model.batch(sessions) as batch:
        batch.append([b"a" * length for length in first])
        before = [session._snapshot() for session in sessions]

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(sessions[2], "_conclude", fail)
        with pytest.raises(KeyboardInterrupt):
            batch.append([b"b" * length for length in lengths])
        for session, mark in zip(sessions, before, strict=True):
            assert_same_snapshot(session._snapshot(), mark)


def test_sessions_join_and_leave_between_calls(model: tr.Model) -> None:
    """Whoever is there goes on as if alone, on whichever row it comes to stand."""
    alone, together = _sessions(model), _sessions(model)
    single = dict(zip(together, alone, strict=True))
    first, second, third = together
    with model.batch([first], room=3) as batch:
        for joins, leaves, text in (
            ([second], [], b"ab"),
            ([third], [], b"c"),
            ([], [first], b"d"),
            ([first], [third], b"efg"),
            ([], [first, second], b""),
            ([third], [], b"h"),
        ):
            for session in leaves:
                batch.leave(session)
                session.append(b"by itself")
                single[session].append(b"by itself")
            for session in joins:
                batch.join(session)
            for _ in text:
                tokens = [text[:1] for _ in batch.sessions]
                for session, logits in zip(batch.sessions, batch.append(tokens), strict=True):
                    assert relative_error(logits, single[session].append(text[:1])) <= 1e-5
        assert batch.sessions == (third,)
        assert batch.append([b"i"])
        single[third].append(b"i")
    for session in together:
        _assert_close(session, single[session])


def test_a_row_may_see_tokens_without_learning(model: tr.Model) -> None:
    sessions = [model.session(editor=Editor(step=0.5, chunk=2)) for _ in range(2)]
    with model.batch(sessions) as batch:
        for token in (b"a", b"b", b"c", b"d", b"e", b"f"):
            batch.append([token, token], teach=[True, False])
        with pytest.raises(tr.UsageError, match="teach has 1 values"):
            batch.append([b"a", b"b"], teach=[True])
        with pytest.raises(tr.UsageError, match="of one token"):
            batch.append([b"ab", b"b"], teach=[True, False])
    taught, plain = (session.snapshot().arrays["state.readout"] for session in sessions)
    initial = model.initial["readout"]
    assert not np.array_equal(taught, initial)
    assert np.array_equal(plain, initial)


def test_who_may_join_and_leave(model: tr.Model, tiny_bundle: str) -> None:
    first, second = model.session(), model.session()
    with model.batch([], room=1) as batch:
        assert batch.append([]) == []
        batch.join(first)
        with pytest.raises(tr.UsageError, match="is full, with 1 sessions"):
            batch.join(second)
        with pytest.raises(tr.UsageError, match="does not hold"):
            batch.leave(second)
        batch.leave(first)
        with second._exclusive.held(), pytest.raises(tr.UsageError, match="in use"):
            batch.join(second)
        with pytest.raises(tr.UsageError, match="another model"):
            batch.join(tr.load(tiny_bundle, threads=1).session())
        assert (batch.sessions, batch.room) == ((), 1)
    for call in (batch.join, batch.leave):
        with pytest.raises(tr.UsageError, match="is not open"):
            call(first)
    for room in (0, 1, True, 2.0):
        with pytest.raises(tr.UsageError, match="room is"):
            model.batch([first, second], room)  # type: ignore[arg-type]


def test_its_sessions_belong_to_the_batch(model: tr.Model) -> None:
    session, other = model.session(), model.session()
    with model.batch([session]) as batch:
        with pytest.raises(tr.UsageError, match="in use by another thread or a batch"):
            session.append(b"a")
        with pytest.raises(tr.UsageError, match="in use"), model.batch([other, session]):
            pass
        other.append(b"a")
        with pytest.raises(tr.UsageError, match="is open already"), batch:
            pass
    session.append(b"a")
    with pytest.raises(tr.UsageError, match="batch: is not open"):
        batch.append([b"a"])


def test_a_session_of_another_thread_is_refused_and_the_others_stay_free(model: tr.Model) -> None:
    session, other = model.session(), model.session()
    with session._exclusive.held():
        caught: list[BaseException] = []

        def take() -> None:
            try:
                with model.batch([other, session]):
                    pass
            except tr.UsageError as error:
                caught.append(error)

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert caught
    other.append(b"a")


@pytest.mark.parametrize(
    ("tokens", "teach", "kind", "message"),
    [
        (5, None, tr.UsageError, "batch: tokens are 5; give a sequence of tokens for every session"),
        ([5, 6], None, tr.TokenError, "tokens have 0 axes"),
        ([5, 6], [False, False], tr.TokenError, "tokens have 0 axes"),
        ([b"a", None], None, tr.TokenError, "tokens have 0 axes"),
        ([b"a", b"b"], "ab", tr.UsageError, "batch: teach holds 'a'; give True or False for every session"),
        ([b"a", b"b"], [True, 2], tr.UsageError, "batch: teach holds 2; give True or False"),
        ([b"a", b"b"], True, tr.UsageError, "batch: teach is True; give True or False for every session"),
    ],
)
def test_what_no_batch_can_take_is_refused_and_changes_nothing(
    model: tr.Model, tokens: object, teach: object, kind: type[Exception], message: str
) -> None:
    sessions = _sessions(model)[:2]
    marks = [session.snapshot() for session in sessions]
    with model.batch(sessions) as batch, pytest.raises(kind, match=f"^{message}"):
        batch.append(tokens, teach)  # type: ignore[arg-type]
    for session, mark in zip(sessions, marks, strict=True):
        assert_same_snapshot(session.snapshot(), mark)


def test_what_is_no_batch(model: tr.Model, tiny_bundle: str) -> None:
    session = model.session()
    stranger = tr.load(tiny_bundle, threads=1).session()
    for sessions, message in (
        ([], "no sessions"),
        ([session, session], "given twice"),
        ([session, stranger], "another model"),
    ):
        with pytest.raises(tr.UsageError, match=message):
            model.batch(sessions)
    with (
        model.batch([session]) as batch,
        pytest.raises(tr.UsageError, match="2 token sequences for 1 sessions"),
    ):
        batch.append([b"a", b"b"])
