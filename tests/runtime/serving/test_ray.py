"""Two replicas on Ray Serve, one of which is killed in the middle of many streams."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

import titans_runtime as tr
from tests.runtime.serving.test_processes import assert_same_memory
from titans_runtime.errors import UsageError

pytestmark = [pytest.mark.suite("ray"), pytest.mark.filterwarnings("ignore")]

PEOPLE, ROUNDS, NEW = 6, 8, 40


@pytest.fixture(scope="module")
def url(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray
    from ray import serve

    from titans_runtime.serving.ray_serve import application

    store = tmp_path_factory.mktemp("ray") / "memories"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": 18412})
    settings = {"bundle": str(tiny_bundle), "store": str(store), "threads": "1", "replicas": 2}
    serve.run(application(settings))
    yield "http://127.0.0.1:18412"
    serve.shutdown()
    ray.shutdown()


def prompt(person: int, number: int) -> str:
    return f"{person:03d} {number:03d} says "


def replay(model: tr.Model, person: int) -> tuple[tr.Session, list[str]]:
    session, texts = model.session(), []
    for number in range(ROUNDS):
        session.append(prompt(person, number).encode())
        texts.append(bytes(session.generate(NEW, 0)).decode("utf-8", "replace"))
    return session, texts


class Person:
    """Asks one thing after the other, and asks again where an answer broke off."""

    def __init__(self, url: str, number: int) -> None:
        self.client, self.number = httpx.Client(base_url=url, timeout=120), number
        self.texts: list[str] = []
        self.broken = 0

    @property
    def name(self) -> str:
        return f"person{self.number}"

    def ask(self, streaming: threading.Event) -> None:
        before = 0
        for number in range(ROUNDS):
            text = None
            while text is None:
                text = self._once(prompt(self.number, number), streaming)
                if text is None:
                    self.broken += 1
                    # Not one token of the broken request is in the memory.
                    assert self._position() == before
            self.texts.append(text)
            before += len(prompt(self.number, number)) + NEW
            assert self._position() == before

    def _once(self, text: str, streaming: threading.Event) -> str | None:
        asked = {"prompt": text, "memory": self.name, "max_tokens": NEW, "temperature": 0, "stream": True}
        drawn, done = "", False
        try:
            with self.client.stream("POST", "/v1/completions", json=asked) as answer:
                if answer.status_code != 200:
                    return None
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        streaming.set()
                        part = json.loads(line[6:])
                        assert "error" not in part
                        drawn += part["choices"][0]["text"]
                    done = done or line == "data: [DONE]"
        except httpx.TransportError:
            return None
        return drawn if done else None

    def _position(self) -> int:
        while True:
            try:
                answer = self.client.get(f"/v1/memories/{self.name}")
                if answer.status_code == 200:
                    return int(answer.json()["position"])
            except httpx.TransportError:
                pass


def replicas(url: str) -> set[int]:
    """Processes of both replicas, once both have answered."""
    found: set[int] = set()
    while len(found) < 2:
        found.add(httpx.get(f"{url}/healthz", timeout=60).json()["process"])
    return found


def test_a_replica_is_killed_and_every_session_goes_on(url: str, model: tr.Model, tmp_path: Path) -> None:
    people = [Person(url, number) for number in range(PEOPLE)]
    for person in people:
        assert person.client.post("/v1/memories", json={"id": person.name}).status_code == 201
    victim = min(replicas(url))
    streaming = [threading.Event() for _ in people]
    errors: list[BaseException] = []

    def run(person: Person, event: threading.Event) -> None:
        try:
            person.ask(event)
        except BaseException as error:  # noqa: BLE001 - to be seen in the main thread
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(person, event))
        for person, event in zip(people, streaming, strict=True)
    ]
    for thread in threads:
        thread.start()
    for event in streaming:
        event.wait()
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert not errors
    assert sum(person.broken for person in people) > 0, "nothing was under way on the replica that was killed"
    for person in people:
        session, texts = replay(model, person.number)
        assert person.texts == texts
        content = person.client.get(f"/v1/memories/{person.name}/export").content
        assert_same_memory(model, content, session, tmp_path)
    assert victim not in replicas(url)  # Serve has started another one


def test_settings_are_checked_before_anything_starts(tiny_bundle: Path) -> None:
    from titans_runtime.serving.ray_serve import application

    for args, message in (
        ({}, "'bundle' is missing"),
        ({"bundle": "b", "slotss": 1}, "'slotss' is unknown"),
        ({"bundle": "b", "slots": "many"}, "slots is 'many'"),
        ({"bundle": "b", "replicas": "few"}, "replicas is 'few'"),
    ):
        with pytest.raises(UsageError, match=message):
            application(args)
