"""How errors look from outside: one short line, whatever was sent."""

from __future__ import annotations

from fastapi.testclient import TestClient

from titans_runtime.serving.settings import Settings


def test_a_body_of_nothing_but_errors_is_answered_with_one(client: TestClient, settings: Settings) -> None:
    start, end = b'{"prompt":[', b"null]}"
    body = start + b"null," * ((settings.max_body - len(start) - len(end)) // 5) + end
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "body.prompt.list[int].0: Input should be a valid integer"


def test_the_error_shown_is_of_the_form_that_was_meant(client: TestClient) -> None:
    for asked, where in (({"stop": ["a", 1]}, "body.stop.list[str].1"), ({"stop": 1}, "body.stop.str")):
        answer = client.post("/v1/completions", json={"prompt": "a"} | asked)
        assert answer.json()["error"]["message"] == f"{where}: Input should be a valid string"


def test_a_long_name_is_not_sent_back_whole(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"x" * 50_000: 1})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == f"body.{'x' * 100}"
