"""From drawn tokens to texts: what is held back, what is dropped, and where each token stands."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from titans_runtime.serving.completions import Answer
from titans_runtime.serving.request import Piece
from titans_runtime.serving.schema import CompletionRequest, Logprobs
from titans_runtime.serving.writer import Writer

few = st.text("ab", max_size=12)
sizes = st.lists(st.integers(1, 3), min_size=12, max_size=12)


def drawn(token: int) -> Piece:
    return Piece(np.array([token]), drawn=True, scores=np.zeros((1, 256), np.float32))


def cut(pieces: list[Piece], by: list[int]) -> list[list[Piece]]:
    """As they come out of the queue: some at a time."""
    found = []
    for size in by:
        found.append(pieces[:size])
        pieces = pieces[size:]
    return [*found, pieces]


def stopped(text: str, stops: list[str]) -> tuple[str, str, bool]:
    """What is drawn of a text, what of it is the answer, and whether it was stopped."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end], text[: end - max(found)], True
    return text, text, False


@given(few, st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4), sizes, st.booleans())
def test_a_stop_text_never_shows(text: str, stops: list[str], by: list[int], scored: bool) -> None:
    """However the pieces come, no part goes out that would have to be taken back."""
    seen, expected, is_stopped = stopped(text, stops)
    writer = Writer(CompletionRequest(prompt="x", stop=stops, logprobs=0 if scored else None), is_new=False)
    parts = cut([drawn(ord(one)) for one in seen], by)
    shown, tokens = "", []
    for part in parts:
        new, logprobs = writer.write(part, None)
        shown += new
        tokens += logprobs.tokens if logprobs else []
        assert expected.startswith(shown)
    new, logprobs = writer.write([], "stop" if is_stopped else "length")
    assert shown + new == expected
    assert "".join(tokens + (logprobs.tokens if logprobs else [])) == (expected if scored else "")


@given(st.text(max_size=8), st.lists(st.integers(1, 5), min_size=6, max_size=6))
def test_a_token_stands_at_its_character(text: str, by: list[int]) -> None:
    content = text.encode("utf-8", "replace")
    text = content.decode()
    expected = [place for place, one in enumerate(text) for _ in one.encode()]
    writer = Writer(CompletionRequest(prompt="x", logprobs=0), is_new=False)
    answer = Answer()
    for part in cut([drawn(one) for one in content], by):
        answer.add(*writer.write(part, None), None)
    answer.add(*writer.write([], "length"), "length")
    choice = answer.choice(0)
    assert choice.text == text
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == expected


@given(st.lists(st.sampled_from(b"a\xc3\xa9\xf0\x9f\x98\x80\xff\xed\xa0"), max_size=10))
def test_bytes_that_are_no_text_have_a_place_too(content: list[int]) -> None:
    text = bytes(content).decode("utf-8", "replace")
    writer = Writer(CompletionRequest(prompt="x", logprobs=0), is_new=False)
    found, logprobs = writer.write([drawn(one) for one in content], "length")
    assert found == text
    assert logprobs is not None
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert set(logprobs.text_offset) == set(range(len(text)))
    for place, token in zip(logprobs.text_offset, content, strict=True):
        assert (text[place] == "a") == (token == ord("a"))


def test_a_long_answer_is_added_to_and_not_made_anew() -> None:
    """Its lists are those of the first part, whatever comes: the cost of a part is the part's."""
    answer = Answer()

    def part(n: int, top: bool) -> Logprobs:
        best: list[dict[str, float] | None] | None = [{"a": float(n)}] if top else None
        return Logprobs(tokens=[str(n)], token_logprobs=[float(n)], top_logprobs=best, text_offset=[n])

    first = part(0, top=True)
    lists = (first.tokens, first.token_logprobs, first.top_logprobs, first.text_offset)
    answer.add("0", first, None)
    answer.add("", None, None)
    for n in range(1, 5):
        answer.add(str(n), part(n, top=n != 3), "length" if n == 4 else None)
    choice = answer.choice(7)
    found = choice.logprobs
    assert found is not None
    assert (choice.text, choice.index, choice.finish_reason) == ("01234", 7, "length")
    assert (found.tokens, found.token_logprobs, found.text_offset) == (
        list("01234"),
        [0.0, 1.0, 2.0, 3.0, 4.0],
        [0, 1, 2, 3, 4],
    )
    assert found.top_logprobs == [{"a": 0.0}, {"a": 1.0}, {"a": 2.0}, {"a": 4.0}]
    same = (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)
    assert all(one is other for one, other in zip(same, lists, strict=True))
