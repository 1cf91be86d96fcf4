"""The HTTP server: what it answers, to whom, and what it keeps."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

import titans_runtime as tr
from tests.runtime.serving.conftest import ANNA, BOB
from titans_runtime.serving.app import create_app
from titans_runtime.serving.service import Service
from titans_runtime.serving.settings import Settings


def complete(client: TestClient, **asked: Any) -> Any:  # noqa: ANN401 - JSON
    answer = client.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: TestClient, **asked: Any) -> list[Any]:  # noqa: ANN401 - JSON
    answer = client.post("/v1/completions", json=asked | {"stream": True})
    assert answer.status_code == 200, answer.text
    *lines, end = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert end == "[DONE]" or "error" in json.loads(end)
    return [json.loads(line) for line in lines] + ([] if end == "[DONE]" else [json.loads(end)])


def problem(answer: Any, status: int) -> str:  # noqa: ANN401
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def test_a_completion_is_what_a_session_generates(client: TestClient, model: tr.Model) -> None:
    session = model.session()
    session.append(b"abc")
    expected = text_of(list(session.generate(12, 0.7, seed=5)))
    found = complete(client, prompt="abc", max_tokens=12, temperature=0.7, seed=5)
    choice = found["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "length")
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert found["memory"] is None
    parts = events(client, prompt="abc", max_tokens=12, temperature=0.7, seed=5)
    assert "".join(part["choices"][0]["text"] for part in parts) == expected
    assert [part["choices"][0]["finish_reason"] for part in parts][-1] == "length"
    ids = complete(client, prompt=[97, 98, 99], max_tokens=12, temperature=0.7, seed=5)
    assert ids["choices"][0]["text"] == expected


def test_several_prompts_are_several_choices(client: TestClient) -> None:
    asked = {"max_tokens": 6, "temperature": 0, "echo": True}
    alone = [complete(client, prompt=text, **asked)["choices"][0]["text"] for text in ("one", "another")]
    together = complete(client, prompt=["one", "another"], **asked)["choices"]
    assert [(choice["index"], choice["text"]) for choice in together] == list(enumerate(alone))
    parts = [c for part in events(client, prompt=["one", "another"], **asked) for c in part["choices"]]
    for index, text in enumerate(alone):
        assert "".join(choice["text"] for choice in parts if choice["index"] == index) == text


def test_scoring_by_echo_and_logprobs(client: TestClient, model: tr.Model) -> None:
    """What evaluation harnesses ask for: the prompt's log-probabilities, and nothing drawn."""
    text = "a memory that learns " * 20
    logits = model.session().append(text.encode()).astype(np.float64)
    table = logits - logits.max(1, keepdims=True)
    table -= np.log(np.exp(table).sum(1, keepdims=True))
    ids = list(text.encode())
    expected = table[np.arange(len(ids) - 1), ids[1:]]
    for found in (
        complete(client, prompt=text, max_tokens=0, echo=True, logprobs=2)["choices"],
        [
            c
            for part in events(client, prompt=text, max_tokens=0, echo=True, logprobs=2)
            for c in part["choices"]
        ],
    ):
        own = [p for choice in found if choice["logprobs"] for p in choice["logprobs"]["token_logprobs"]]
        assert own[0] is None
        assert np.abs(np.array(own[1:]) - expected).max() <= 1e-4
        assert "".join(choice["text"] for choice in found) == text
        top = [p for choice in found for p in choice["logprobs"]["top_logprobs"] or []]
        assert len(top[1]) == 2
        assert max(top[1].values()) == pytest.approx(table[0].max(), abs=1e-4)


def test_a_memory_learns_across_requests(client: TestClient, model: tr.Model, service: Service) -> None:
    created = client.post("/v1/memories", json={"id": "m"})
    assert created.status_code == 201
    assert (created.json()["position"], created.json()["saved"]) == (0, True)
    single = model.session()
    for text in ("first text", " and a second"):
        found = complete(client, prompt=text, max_tokens=4, temperature=0, memory="m")
        single.append(text.encode())
        assert found["choices"][0]["text"] == text_of(list(single.generate(4, 0)))
        assert found["memory"]["saved"]
        assert found["memory"]["position"] == single.position
    content = client.get("/v1/memories/m/export").content
    path = Path(service.settings.store).parent / "exported.memory"
    path.write_bytes(content)
    exported = model.load_session(path).snapshot()
    for name, array in single.snapshot().arrays.items():
        assert np.abs(exported.arrays[name] - array).max(initial=0) <= 1e-5 * max(
            np.abs(array).max(initial=0), 1
        )


def test_fork_compare_reset_delete(client: TestClient) -> None:
    client.post("/v1/memories", json={"id": "one"})
    complete(client, prompt="some text to learn from", memory="one", max_tokens=0)
    assert client.post("/v1/memories/one/fork", json={"id": "two"}).status_code == 201
    same = client.get("/v1/memories/one/compare/two").json()["data"]
    assert all(tensor["distance"] == 0 for tensor in same)
    complete(client, prompt="which the twin alone sees", memory="two", max_tokens=0)
    other = client.get("/v1/memories/one/compare/two").json()["data"]
    assert any(tensor["distance"] > 0 for tensor in other)
    assert client.post("/v1/memories/two/reset").json()["position"] == 0
    assert [m["id"] for m in client.get("/v1/memories").json()["data"]] == ["one", "two"]
    assert client.delete("/v1/memories/two").json() == {"id": "two", "object": "memory", "deleted": True}
    assert "there is none" in problem(client.delete("/v1/memories/two"), 404)
    assert "there is none" in problem(
        client.post("/v1/completions", json={"prompt": "a", "memory": "two"}), 404
    )
    generated = client.post("/v1/memories").json()["id"]
    assert generated.startswith("mem-")


def test_editing_is_chosen_when_a_memory_is_created(client: TestClient) -> None:
    editing = {"edit": 0.25, "editor": "readout:step=0.5,chunk=3"}
    made = client.post("/v1/memories", json={"id": "m", "editing": editing}).json()
    assert set(made["edit"]) == {0.25}
    assert made["editor"]["chunk"] == 3
    plain = client.post("/v1/memories", json={"id": "p", "editing": {"edit": 0, "editor": "none"}}).json()
    assert plain["editor"] is None
    asked = {"prompt": "a", "memory": "m", "editing": {"edit": 0}}
    assert "has its own" in problem(client.post("/v1/completions", json=asked), 400)
    bad = {"editing": {"editor": "readout:step=x"}}
    assert "must be a number" in problem(client.post("/v1/memories", json=bad), 400)


def test_what_is_not_saved_stays_here_until_it_is(
    client: TestClient, service: Service, settings: Settings
) -> None:
    client.post("/v1/memories", json={"id": "m"})
    found = complete(client, prompt="abc", max_tokens=0, memory="m", save=False)["memory"]
    assert (found["saved"], found["position"]) == (False, 3)
    complete(client, prompt="def", max_tokens=0, memory="m", save=False)
    assert service._store.entry("local/m").about["position"] == 0  # type: ignore[union-attr]
    assert client.get("/v1/memories").json()["data"][0]["position"] == 6
    assert client.post("/v1/memories/m/save").json()["saved"]
    assert service._store.entry("local/m").about["position"] == 6  # type: ignore[union-attr]
    complete(client, prompt="ghi", max_tokens=0, memory="m", save=False)
    service.close()
    again = Service(settings)
    assert again.memories.describe("local", "m").position == 9
    again.close()


def test_owners_do_not_see_each_other(
    settings: Settings, tokens: Path, model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titans_runtime.serving.service.load", lambda *_, **__: model)
    settings = dataclasses.replace(settings, tokens=str(tokens), max_memories=2)
    with TestClient(create_app(settings)) as client:
        anna, bob = ({"Authorization": f"Bearer {token}"} for token in (ANNA, BOB))
        for wrong in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Basic {ANNA}"}):
            for method, path in (("GET", "/v1/models"), ("GET", "/v1/memories"), ("POST", "/v1/memories")):
                assert "token" in problem(client.request(method, path, headers=wrong), 401)
        assert client.post("/v1/memories", json={"id": "m"}, headers=anna).status_code == 201
        for path in ("/v1/memories/m", "/v1/memories/m/export", "/v1/memories/m/compare/m"):
            assert client.get(path, headers=anna).status_code == 200
            problem(client.get(path, headers=bob), 404)
        asked = {"prompt": "a", "memory": "m"}
        problem(client.post("/v1/completions", json=asked, headers=bob), 404)
        problem(client.delete("/v1/memories/m", headers=bob), 404)
        assert client.post("/v1/memories", json={"id": "m"}, headers=bob).status_code == 201
        assert client.post("/v1/memories", headers=bob).status_code == 201
        assert "the most" in problem(client.post("/v1/memories", headers=bob), 403)
        assert len(client.get("/v1/memories", headers=anna).json()["data"]) == 1
        assert client.get("/healthz").status_code == 200


def test_limits(client: TestClient, settings: Settings) -> None:
    assert "too large" in problem(client.post("/v1/completions", content=b"x" * 100_001), 413)
    parts = (b"x" * 10_000 for _ in range(11))
    assert "too large" in problem(client.post("/v1/completions", content=parts), 413)
    asked = {"prompt": "a", "max_tokens": settings.max_tokens + 1}
    assert "the limit here is 4096" in problem(client.post("/v1/completions", json=asked), 400)
    assert "16" in problem(client.post("/v1/completions", json={"prompt": ["a"] * 17}), 400)


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"prompt": ""}, 400),
        ({}, 400),
        ({"prompt": [256]}, 400),
        ({"prompt": [-1]}, 400),
        ({"prompt": [10**30]}, 400),
        ({"prompt": "a", "temperature": -1}, 422),
        ({"prompt": "a", "n": 2}, 422),
        ({"prompt": "a", "unknown": 1}, 422),
        ({"prompt": "a", "stop": ["a", ""]}, 400),
        ({"prompt": "a", "stop": ["a"] * 5}, 400),
        ({"prompt": "a", "memory": "../m"}, 422),
        ({"prompt": "a", "model": "another"}, 404),
        ({"prompt": ["a", "b"], "memory": "m"}, 400),
        ({"prompt": "a", "editing": {"edit": 2}}, 400),
        ({"prompt": "a", "editing": {"editor": "nothing:step=1"}}, 400),
    ],
)
def test_bad_requests(client: TestClient, asked: dict[str, Any], status: int) -> None:
    for extra in ({}, {"stream": True}):
        answer = client.post("/v1/completions", json=asked | extra)
        assert problem(answer, status)
        assert "Traceback" not in answer.text


def test_a_stop_text_ends_it_and_is_no_part_of_it(client: TestClient) -> None:
    """The memory has read it all the same: it was drawn."""
    asked: dict[str, Any] = {"prompt": [1], "max_tokens": 40, "temperature": 0}
    whole = complete(client, **asked)["choices"][0]["text"]
    place = next(n for n in range(3, len(whole) - 3) if whole[n : n + 3].isascii())
    asked["stop"] = [whole[place : place + 3], "never drawn"]
    end = whole.index(asked["stop"][0])
    found = complete(client, **asked, logprobs=1)
    choice = found["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[:end], "stop")
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"])
    assert len(choice["logprobs"]["tokens"]) == found["usage"]["completion_tokens"] - 3
    client.post("/v1/memories", json={"id": "m"})
    parts = events(client, **asked, memory="m")
    assert "".join(part["choices"][0]["text"] for part in parts) == whole[:end]
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert parts[-1]["memory"]["position"] == 1 + found["usage"]["completion_tokens"]


def test_null_is_the_default(client: TestClient) -> None:
    """As OpenAI's document has it, and as its clients send it."""
    names = (
        *("max_tokens", "temperature", "top_p", "n", "best_of", "stop", "stream", "echo", "logprobs", "user"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "suffix", "seed", "memory", "save", "learn"),
    )
    found = complete(client, prompt="abc", **dict.fromkeys(names))
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
    problem(client.post("/v1/completions", json={"prompt": "abc", "unknown": None}), 422)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_not_read_in_time_is_not_asked_again_by_itself(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Clients ask again after 408, 409, 429 and 5xx, and would read in vain once more."""
    client.post("/v1/memories", json={"id": "m"})
    now = iter(range(10**6))
    monkeypatch.setattr(service.scheduler, "clock", lambda: float(next(now)))
    asked = {"prompt": "abc" * 2000, "memory": "m", "timeout": 3, "stream": stream}
    answer = client.post("/v1/completions", json=asked)
    text = answer.text if answer.status_code == 200 else problem(answer, 400)
    assert "of 6000 tokens were read when the time was up" in text
    assert '"429"' not in text
    assert "retry-after" not in answer.headers
    assert client.get("/v1/memories/m").json()["position"] == 0


def test_a_memory_in_use_is_refused(client: TestClient, service: Service) -> None:
    client.post("/v1/memories", json={"id": "m"})
    with service.memories.in_hand("local", "m"):
        asked = {"prompt": "a", "memory": "m"}
        assert "is in use" in problem(client.post("/v1/completions", json=asked), 409)
        assert "is in use" in problem(client.delete("/v1/memories/m"), 409)
    complete(client, **asked)


def test_another_server_was_first(client: TestClient, settings: Settings, service: Service) -> None:
    """Both have read the same version: the second to save is told, and the first one's memory stands."""
    client.post("/v1/memories", json={"id": "m"})
    other = Service(settings)
    key = other.memories.take("local", "m")
    session = other.memories.session(key)
    session.append(b"elsewhere")
    complete(client, prompt="here", memory="m", max_tokens=0)
    with pytest.raises(tr.ConflictError, match="changed by someone else"):
        other.memories.commit(key, session, save=True)
    other.memories.release(key)
    assert other.memories.describe("local", "m").position == 4
    other.memories.reset("local", "m")
    other.close()
    assert complete(client, prompt="b", memory="m", max_tokens=0)["memory"]["position"] == 1


def test_an_error_on_the_way_ends_a_stream_with_it(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.post("/v1/memories", json={"id": "m"})

    def fail(*_: object) -> None:
        raise tr.NumericsError("a value is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(tr.Session, "_conclude", fail)
        found = events(client, prompt="abc", memory="m")
        assert found[-1]["error"]["message"] == "a value is not finite"
        problem(client.post("/v1/completions", json={"prompt": "abc", "memory": "m"}), 422)
    assert client.get("/v1/memories/m").json()["position"] == 0
    complete(client, prompt="abc", memory="m")


def test_a_caller_that_hangs_up_changes_nothing(url: str, service: Service) -> None:
    import httpx2 as httpx

    httpx.post(f"{url}/v1/memories", json={"id": "m"})
    asked = {"prompt": "abc", "memory": "m", "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer:
        next(answer.iter_lines())
    free = threading.Event()
    while not free.is_set():  # until the server has noticed
        if httpx.get(f"{url}/v1/memories/m").status_code == 200:
            free.set()
    assert httpx.get(f"{url}/v1/memories/m").json()["position"] == 0
    assert service.scheduler.counters.finished == {"cancelled": 1}


def test_closing_ends_streams_and_keeps_their_memories(
    url: str, service: Service, settings: Settings
) -> None:
    import httpx2 as httpx

    object.__setattr__(service.settings, "drain", 0.0)
    httpx.post(f"{url}/v1/memories", json={"id": "m"})
    asked = {"prompt": "abc", "memory": "m", "max_tokens": 4000, "stream": True}
    drawn = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            part = json.loads(line.removeprefix("data: "))
            drawn += part["choices"][0]["text"]
            if not service.is_closing:
                threading.Thread(target=service.drain).start()
    assert part["choices"][0]["finish_reason"] == "closed"
    assert part["memory"]["saved"]
    assert 3 <= part["memory"]["position"] < 4003
    assert httpx.get(f"{url}/healthz").status_code == 503
    assert "closing" in problem(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}), 503)


def test_the_openai_client_talks_to_it(url: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id
        client.post("/memories", body={"id": "m"}, cast_to=object)
        asked: dict[str, Any] = {"model": name, "prompt": "abc", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**asked)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 8
        with client.completions.create(**asked, stream=True, extra_body={"memory": "m"}) as stream:
            parts = list(stream)
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        assert parts[-1].model_extra["memory"]["position"] == 11  # type: ignore[index]
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.completions.create(model="another", prompt="a")
        with pytest.raises(openai.BadRequestError, match="the limit here"):
            client.completions.create(model=name, prompt="a", max_tokens=10**6)


def test_figures(client: TestClient) -> None:
    complete(client, prompt="abc", max_tokens=5)
    problem(client.post("/v1/completions", json={"prompt": ""}), 400)
    text = client.get("/metrics").text
    for line in (
        "titans_tokens_read_total 3.0",
        "titans_tokens_drawn_total 5.0",
        'titans_http_requests_total{path="/v1/completions",status="200"} 1.0',
        'titans_http_requests_total{path="/v1/completions",status="400"} 1.0',
        "titans_requests_running 0.0",
        "titans_first_token_seconds_count 1.0",
    ):
        assert line in text.splitlines()


def test_a_wrong_method_is_told_the_right_ones(client: TestClient) -> None:
    for path, allowed in (
        ("/v1/memories", "GET, POST"),
        ("/v1/memories/m", "DELETE, GET"),
        ("/healthz", "GET"),
    ):
        answer = client.put(path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed


def test_the_document_asks_for_a_token_only_where_the_server_does(settings: Settings, tokens: Path) -> None:
    for given, asks in ((None, False), (str(tokens), True)):
        document = create_app(dataclasses.replace(settings, tokens=given)).openapi()
        assert ("security" in document["paths"]["/v1/models"]["get"]) is asks
