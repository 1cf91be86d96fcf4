"""What a body may be: the forms of a prompt, and that a hostile one has few errors however large it is."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from titans_runtime.serving.schema import CompletionRequest, NewEditedMemory

MANY = 2000
FEW = 5
"""Errors of one field, over all forms that it may have."""
_NAMES = {f"x{number}": 1 for number in range(MANY)}
_BAD: tuple[Any, ...] = (
    [None] * MANY,
    [[None] * MANY] * 2,
    [[None]] * MANY,
    [1] * MANY + [None],
    ["1"] * MANY + [None],
    ["x"] * MANY + [{}],
    [[]] * MANY + [None],
    [{}] * MANY,
    _NAMES,
)


def errors_of(model: type[CompletionRequest | NewEditedMemory], body: Any) -> list[tuple[Any, ...]]:  # noqa: ANN401 - JSON
    """Where each error of a body lies."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        return [one["loc"] for one in error.errors()]
    return []


@pytest.mark.parametrize("field", list(CompletionRequest.model_fields))
def test_no_field_has_an_error_for_each_element(field: str) -> None:
    for bad in _BAD:
        assert 0 < len(errors_of(CompletionRequest, {field: bad})) <= FEW


@pytest.mark.parametrize("inner", [{"edit": bad} for bad in _BAD] + [_NAMES])
def test_nor_has_what_lies_deeper(inner: Any) -> None:  # noqa: ANN401 - JSON
    for model in (CompletionRequest, NewEditedMemory):
        assert 0 < len(errors_of(model, {"editing": inner})) <= FEW
    assert 0 < len(errors_of(CompletionRequest, {"stream_options": inner})) <= FEW


def test_of_unknown_fields_the_first_is_named() -> None:
    for model in (CompletionRequest, NewEditedMemory):
        assert errors_of(model, _NAMES) == [("x0",)]


@pytest.mark.parametrize(
    "prompt", ["", "text", [], [1, 2], ["one", "two"], [[1, 2], [3]], [[], [1]], ["1"], [["1"]], [True]]
)
def test_forms_of_a_prompt(prompt: Any) -> None:  # noqa: ANN401 - JSON
    found = CompletionRequest.model_validate({"prompt": prompt}).prompt
    assert found == ([[1]] if prompt == [["1"]] else prompt)


@pytest.mark.parametrize(
    ("prompt", "where"),
    [
        (1, ("str",)),
        ({}, ("str",)),
        ([None], ("list[int]", 0)),
        ([1, "a"], ("list[int]", 1)),
        (["a", 1], ("list[str]", 1)),
        ([[1], 1], ("list[list[int]]", 1)),
        ([[1], [1, None]], ("list[list[int]]", 1, 1)),
    ],
)
def test_the_error_is_of_the_form_that_was_meant(prompt: Any, where: tuple[Any, ...]) -> None:  # noqa: ANN401 - JSON
    assert errors_of(CompletionRequest, {"prompt": prompt}) == [("prompt", *where)]


def test_the_document_shows_all_forms_of_a_prompt() -> None:
    forms = CompletionRequest.model_json_schema()["properties"]["prompt"]["anyOf"]
    integers = {"type": "array", "items": {"type": "integer"}}
    texts = {"type": "array", "items": {"type": "string"}}
    assert forms == [{"type": "string"}, integers, texts, {"type": "array", "items": integers}]
