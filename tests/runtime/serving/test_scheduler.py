"""Continuous batching: everyone gets what they would get alone, in a fair order, whoever comes and goes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_runtime as tr
from tests.runtime.streams import Array
from titans_runtime.editor import Editor
from titans_runtime.sampling import Sampling
from titans_runtime.serving import Finished, Piece, Request, Scheduler, Stream
from titans_runtime.serving.request import Opened

EDITORS = [None, Editor(step=0.5, chunk=3), Editor(step=0.7, chunk=4, optimizer="adagrad")]


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: bytes
    new: int
    edit: float
    editor: int
    seed: int
    temperature: float
    learn: bool


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 12),
        prompt=st.binary(min_size=1, max_size=30),
        new=st.integers(0, 8),
        edit=st.sampled_from([0.0, 0.5, 1.0]),
        editor=st.integers(0, len(EDITORS) - 1),
        seed=st.integers(0, 9),
        temperature=st.sampled_from([0.0, 0.8]),
        learn=st.booleans(),
    ),
    min_size=1,
    max_size=7,
)


def events(stream: Stream) -> tuple[list[Piece], Finished]:
    *pieces, end = stream
    assert isinstance(end, Finished)
    return [piece for piece in pieces if isinstance(piece, Piece)], end


def drawn(stream: Stream) -> list[int]:
    return [int(piece.tokens[0]) for piece in events(stream)[0] if piece.drawn]


def run_dry(scheduler: Scheduler) -> None:
    while scheduler.step():
        pass


def _alone(session: tr.Session, arrival: Arrival) -> tuple[Array, list[int]]:
    """Every token's scores, and the drawn tokens, of a session without a scheduler."""
    scores = [np.zeros((1, 256), np.float32), session.append(arrival.prompt)]
    tokens = []
    for token in session.generate(arrival.new, arrival.temperature, seed=arrival.seed, learn=arrival.learn):
        tokens.append(token)
        assert session.last_logits is not None
        scores.append(session.last_logits[None])
    return np.concatenate(scores)[:-1], tokens


@settings(max_examples=40)
@given(arrivals, st.integers(1, 4), st.integers(1, 9))
def test_everyone_gets_what_they_get_alone(
    model: tr.Model, plan: list[Arrival], slots: int, segment: int
) -> None:
    """Random arrivals, prompts, editors and strengths: scores, draws and memories to 1e-5."""
    scheduler = Scheduler(model, slots=slots, segment=segment)
    under_way: list[tuple[Arrival, tr.Session, Stream]] = []
    for step in range(13):
        for arrival in plan:
            if arrival.step == step:
                session = model.session(edit=arrival.edit, editor=EDITORS[arrival.editor])
                sampling = Sampling(arrival.temperature)
                request = Request(
                    session, arrival.prompt, arrival.new, sampling, arrival.seed, arrival.learn, scores=True
                )
                under_way.append((arrival, session, scheduler.submit(request)))
        scheduler.step()
    run_dry(scheduler)
    for arrival, session, stream in under_way:
        single = model.session(edit=arrival.edit, editor=EDITORS[arrival.editor])
        expected, tokens = _alone(single, arrival)
        pieces, end = events(stream)
        assert end == Finished("length", None, len(arrival.prompt), arrival.new)
        seen = [int(token) for piece in pieces for token in piece.tokens]
        assert seen == [*arrival.prompt, *tokens]
        scores = np.concatenate([piece.scores for piece in pieces if piece.scores is not None])
        assert scores.shape == expected.shape
        assert float(np.abs(scores - expected).max()) <= 1e-5 * max(float(np.abs(expected).max()), 1e-3)
        assert session.position == single.position
        one, other = session.snapshot().arrays, single.snapshot().arrays
        assert one.keys() == other.keys()
        for name, array in other.items():
            scale = max(float(np.abs(array).max(initial=0)), 1e-3)
            assert float(np.abs(one[name] - array).max(initial=0)) <= 1e-5 * scale, name
    scheduler.close()


def test_a_long_prompt_does_not_hold_up_the_others(model: tr.Model) -> None:
    """Writers draw a token in every step that a reader takes, and short prompts take their turn."""
    scheduler = Scheduler(model, segment=8)
    writer = scheduler.submit(Request(model.session(), b"ab", 30))
    scheduler.step()
    long = scheduler.submit(Request(model.session(), b"x" * 800))
    short = scheduler.submit(Request(model.session(), b"y" * 8, 1))
    for _ in range(8):
        scheduler.step()
    assert scheduler.counters.drawn == 8 + 1
    run_dry(scheduler)
    assert len(drawn(writer)) == 30
    assert len(drawn(short)) == 1
    pieces, end = events(long)
    assert (len(pieces), end.read) == (100, 800) or len(pieces) < 100  # alone in the end, it reads faster


def test_owners_take_turns(model: tr.Model) -> None:
    order: list[str] = []
    scheduler = Scheduler(model, slots=1)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        scheduler.submit(
            Request(model.session(), b"x", owner=name[0]),
            lambda event, name=name: order.append(name) if isinstance(event, Finished) else None,
        )
    run_dry(scheduler)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_the_queue_is_bounded_for_all_and_for_each(model: tr.Model) -> None:
    scheduler = Scheduler(model, slots=1, waiting=3, waiting_of_one=2)
    request = Request(model.session(), b"x", owner="a")
    scheduler.submit(request)
    scheduler.submit(request)
    with pytest.raises(tr.OverloadError, match="2 requests of yours wait already"):
        scheduler.submit(request)
    scheduler.submit(Request(model.session(), b"x", owner="b"))
    with pytest.raises(tr.OverloadError, match="3 requests wait already"):
        scheduler.submit(Request(model.session(), b"x", owner="c"))
    run_dry(scheduler)
    scheduler.submit(Request(model.session(), b"x", owner="c"))


def test_cancelling_at_the_door_while_reading_and_while_writing(model: tr.Model) -> None:
    scheduler = Scheduler(model, slots=2, segment=2)
    writing = scheduler.submit(Request(model.session(), b"ab", 99))
    reading = scheduler.submit(Request(model.session(), b"c" * 50, 99))
    waiting = scheduler.submit(Request(model.session(), b"d", 99))
    for _ in range(4):
        scheduler.step()
    for stream in (writing, reading, waiting):
        stream.cancel()
    assert not scheduler.step()
    ends = [events(stream)[1] for stream in (writing, reading, waiting)]
    assert [end.reason for end in ends] == ["cancelled"] * 3
    assert ends[0].drawn > 0
    assert 0 < ends[1].read < 50
    assert (ends[2].read, ends[2].drawn) == (0, 0)
    for stream, end in zip((writing, reading, waiting), ends, strict=True):
        assert stream.request.session.position == end.read + end.drawn
        stream.request.session.append(b"is free again")


def test_deadlines(model: tr.Model) -> None:
    now = [0.0]
    scheduler = Scheduler(model, slots=1, clock=lambda: now[0])
    first = scheduler.submit(Request(model.session(), b"a", 50, deadline=5.0))
    second = scheduler.submit(Request(model.session(), b"a", 50, deadline=4.0))
    third = scheduler.submit(Request(model.session(), b"a", 2, deadline=99.0))
    for now[0] in (1.0, 2.0, 3.0, 4.0, 5.0):
        scheduler.step()
    run_dry(scheduler)
    assert (events(first)[1].reason, events(second)[1].reason) == ("deadline", "deadline")
    assert events(third)[1] == Finished("length", None, 1, 2)


def test_only_what_has_a_slot_is_opened(model: tr.Model) -> None:
    """The others wait without a session: late, cancelled or refused, they have cost none."""
    opened: list[str] = []

    def opener(name: str) -> Callable[[], tr.Session]:
        return lambda: opened.append(name) or model.session()  # type: ignore[func-returns-value]

    now = [0.0]
    scheduler = Scheduler(model, slots=1, waiting=4, waiting_of_one=4, clock=lambda: now[0])
    first, late, cancelled, last = (
        scheduler.submit(Request(opener(name), b"abc", 2, deadline=deadline))
        for name, deadline in (("first", 9.0), ("late", 1.0), ("cancelled", 9.0), ("last", 9.0))
    )
    with pytest.raises(tr.OverloadError):
        scheduler.submit(Request(opener("refused"), b"abc"))
    scheduler.step()
    assert opened == ["first"]
    now[0] = 1.0
    cancelled.cancel()
    run_dry(scheduler)
    assert opened == ["first", "last"]
    opening, *_ = first
    assert isinstance(opening, Opened)
    assert opening.position == 0
    assert opening.session.position == 5
    assert [events(stream)[1].reason for stream in (late, cancelled, last)] == [
        "deadline",
        "cancelled",
        "length",
    ]


def test_one_that_cannot_be_opened_fails_by_itself(model: tr.Model, tiny_bundle: str) -> None:
    def fail() -> tr.Session:
        raise tr.ConflictError("elsewhere")

    scheduler = Scheduler(model, slots=1)
    wrong = [
        scheduler.submit(Request(opener, prompt, 2))
        for opener, prompt in (
            (fail, b"a"),
            (model.session, b""),
            (tr.load(tiny_bundle, threads=1).session, b"a"),
        )
    ]
    good = scheduler.submit(Request(model.session, b"a", 2))
    run_dry(scheduler)
    found = [str(events(stream)[1].error) for stream in wrong]
    assert ["elsewhere" in found[0], "no token yet" in found[1], "another model" in found[2]] == [True] * 3
    assert events(good)[1].reason == "length"


@pytest.mark.parametrize("how", ["length", "cancelled", "closed"])
def test_a_session_that_takes_long_to_open_holds_up_nobody(model: tr.Model, how: str) -> None:
    """And its stream does not end before the opening has: the memory would be another's too soon."""
    ends = {how, "length"} if how == "closed" else {how}  # it may be done before the closing has come
    begun, may_end = threading.Event(), threading.Event()
    ended = threading.Event()

    def slow() -> tr.Session:
        begun.set()
        may_end.wait()
        ended.set()
        return model.session()

    scheduler = Scheduler(model, slots=2).start()
    after: list[bool] = []
    done = threading.Event()

    def deliver(event: object) -> None:
        if isinstance(event, Finished):
            after.append(ended.is_set() and event.reason in ends)
            done.set()

    stream = scheduler.submit(Request(slow, b"a", 2), deliver)
    begun.wait()
    assert len(drawn(scheduler.submit(Request(model.session, b"abc", 9)))) == 9
    if how == "cancelled":
        stream.cancel()
    closing = threading.Thread(target=scheduler.close, args=(60.0 if how != "closed" else 0.0,))
    if how == "closed":
        closing.start()
    may_end.set()
    done.wait()
    assert after == [True]
    if how != "closed":
        closing.start()
    closing.join()


def test_stop_sequences(model: tr.Model) -> None:
    scheduler = Scheduler(model)
    whole = drawn_by(scheduler, Request(model.session(), b"abc", 20, seed=3))
    stop = tuple(whole[5:7])
    session = model.session()
    stream = scheduler.submit(Request(session, b"abc", 20, seed=3, stop=[(300,), stop]))
    run_dry(scheduler)
    tokens = drawn(stream)
    end = next(i for i in range(2, 21) if tuple(whole[i - 2 : i]) == stop)
    assert tokens == whole[:end]
    assert session.position == 3 + end


def drawn_by(scheduler: Scheduler, request: Request) -> list[int]:
    stream = scheduler.submit(request)
    run_dry(scheduler)
    return drawn(stream)


def test_going_on_without_a_prompt(model: tr.Model) -> None:
    session, single = model.session(), model.session()
    session.append(b"abc")
    single.append(b"abc")
    assert drawn_by(Scheduler(model), Request(session, b"", 5, seed=1)) == list(single.generate(5, seed=1))


def test_one_that_fails_does_not_harm_the_others(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(model)
    good, bad, late = (model.session(edit=0.0, editor=None) for _ in range(3))
    streams = [scheduler.submit(Request(session, b"abc", 6, seed=2)) for session in (good, bad)]
    scheduler.step()
    scheduler.step()
    scheduler.step()
    before = bad.position

    def fail(*_: object) -> None:
        raise tr.NumericsError("not finite")

    monkeypatch.setattr(bad, "_conclude", fail)
    monkeypatch.setattr(late, "_conclude", fail)
    streams.append(scheduler.submit(Request(late, b"abc", 6)))
    run_dry(scheduler)
    single = model.session(edit=0.0, editor=None)
    single.append(b"abc")
    assert drawn(streams[0]) == list(single.generate(6, seed=2))
    for stream in streams[1:]:
        end = events(stream)[1] if stream is streams[2] else [*stream][-1]
        assert isinstance(end, Finished)
        assert end.reason == "failed"
        assert isinstance(end.error, tr.NumericsError)
    assert bad.position == before


def test_what_is_not_ours_to_foresee_fails_one_request(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session()

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(session, "_conclude", fail)
    scheduler = Scheduler(model)
    stream = scheduler.submit(Request(session, b"abc", 6))
    run_dry(scheduler)
    end = events(stream)[1]
    assert isinstance(end.error, tr.EnvironmentProblem)
    assert str(end.error) == "MemoryError: no room"


def test_a_session_in_use_fails_by_itself(model: tr.Model) -> None:
    session = model.session()
    scheduler = Scheduler(model)
    streams = [scheduler.submit(Request(session, b"abc", 6)) for _ in range(2)]
    run_dry(scheduler)
    reasons = [events(stream)[1].reason for stream in streams]
    assert reasons == ["length", "failed"]


def test_many_threads_and_one_scheduler(model: tr.Model) -> None:
    scheduler = Scheduler(model, slots=3, waiting=100, waiting_of_one=100).start()
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        session = model.session(edit=number % 2, editor=EDITORS[number % 3])
        prompt = bytes([number]) * (1 + 7 * number)
        found[number] = drawn(scheduler.submit(Request(session, prompt, 5, seed=number)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.close(patience=60)
    for number, tokens in found.items():
        single = model.session(edit=number % 2, editor=EDITORS[number % 3])
        single.append(bytes([number]) * (1 + 7 * number))
        assert tokens == list(single.generate(5, seed=number))
    with pytest.raises(tr.OverloadError, match="is closed"):
        scheduler.submit(Request(model.session(), b"x"))


@pytest.mark.parametrize("threaded", [False, True])
def test_closing_with_patience_and_without(model: tr.Model, threaded: bool) -> None:
    for patience, reasons in ((60.0, {"length"}), (0.0, {"closed", "length"})):
        scheduler = Scheduler(model, slots=1)
        if threaded:
            scheduler.start()
        streams = [scheduler.submit(Request(model.session(), b"x", 20)) for _ in range(3)]
        scheduler.close(patience)
        ends = [events(stream)[1] for stream in streams]
        assert {end.reason for end in ends} <= reasons
        for stream, end in zip(streams, ends, strict=True):
            assert stream.request.session.position == end.read + end.drawn


def test_bad_requests(model: tr.Model, tiny_bundle: str) -> None:
    session = model.session()
    for wrong, message in (
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": [()]}, "stop"),
        ({"prompt": b""}, "no token yet"),
    ):
        with pytest.raises(tr.UsageError, match=message):
            Request(session, **({"prompt": b"a"} | wrong))  # type: ignore[arg-type]
    scheduler = Scheduler(model)
    with pytest.raises(tr.TokenError):
        scheduler.submit(Request(session, [256]))
    with pytest.raises(tr.UsageError, match="another model"):
        scheduler.submit(Request(tr.load(tiny_bundle, threads=1).session(), b"a"))
    for wrong in ({"slots": 0}, {"waiting": 1.5}, {"segment": -1}, {"waiting_of_one": 0}):
        with pytest.raises(tr.UsageError, match="must be an integer, 1 or more"):
            Scheduler(model, **wrong)  # type: ignore[arg-type]
