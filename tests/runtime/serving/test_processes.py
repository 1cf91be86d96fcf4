"""The server as a process: killed under load, stopped, and started where it cannot."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.serving.processes import Served
from titans_runtime.cli import main

PEOPLE, ROUNDS = 6, 4
EACH = 13
"""Tokens of one request: a prompt of 10, and 3 that are drawn."""


def asked(person: int, number: int) -> dict[str, object]:
    prompt = f"{person:03d} {number:03d} xy"
    return {"prompt": prompt, "memory": f"m{person}", "max_tokens": 3, "temperature": 0}


def replayed(model: tr.Model, person: int, requests: int) -> tr.Session:
    session = model.session()
    for number in range(requests):
        session.append(str(asked(person, number)["prompt"]).encode())
        list(session.generate(3, 0))
    return session


def assert_same_memory(model: tr.Model, content: bytes, expected: tr.Session, folder: Path) -> None:
    path = folder / "exported.memory"
    path.write_bytes(content)
    found, wanted = model.load_session(path).snapshot(), expected.snapshot()
    assert found.position == wanted.position
    for name, array in wanted.arrays.items():
        scale = max(float(np.abs(array).max(initial=0)), 1e-3)
        assert float(np.abs(found.arrays[name] - array).max(initial=0)) <= 1e-4 * scale, name


def under_load(url: str, enough: Callable[[], None]) -> list[int]:
    """People who ask one thing after the other until the server is gone; the last position each was told."""
    told = [0] * PEOPLE
    all_served = threading.Barrier(PEOPLE + 1)

    def ask(person: int) -> None:
        number = 0
        with httpx.Client(base_url=url, timeout=60) as client:
            try:
                while True:
                    answer = client.post("/v1/completions", json=asked(person, number)).json()
                    assert answer["memory"]["saved"]
                    told[person] = answer["memory"]["position"]
                    number += 1
                    if number == ROUNDS:
                        all_served.wait()
            except httpx.TransportError:
                pass

    threads = [threading.Thread(target=ask, args=(person,)) for person in range(PEOPLE)]
    for thread in threads:
        thread.start()
    all_served.wait()
    enough()
    for thread in threads:
        thread.join()
    return told


@pytest.mark.suite("serve")
@pytest.mark.parametrize("attempt", range(3))
def test_killed_under_load_it_loses_nothing_it_acknowledged(
    tiny_bundle: Path, model: tr.Model, tmp_path: Path, attempt: int
) -> None:
    server = Served(tiny_bundle, tmp_path)
    for person in range(PEOPLE):
        httpx.post(f"{server.url}/v1/memories", json={"id": f"m{person}"})
    told = under_load(server.url, server.process.kill)
    assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
    again = Served(tiny_bundle, tmp_path)
    for person in range(PEOPLE):
        position = httpx.get(f"{again.url}/v1/memories/m{person}").json()["position"]
        # The last request may have been saved, and its answer lost.
        assert position in (told[person], told[person] + EACH)
        content = httpx.get(f"{again.url}/v1/memories/m{person}/export").content
        assert_same_memory(model, content, replayed(model, person, position // EACH), tmp_path)
    again.end(signal.SIGTERM)


@pytest.mark.suite("serve")
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_saves_every_memory(tiny_bundle: Path, tmp_path: Path, sig: int) -> None:
    server = Served(tiny_bundle, tmp_path)
    for person in range(PEOPLE):
        httpx.post(f"{server.url}/v1/memories", json={"id": f"m{person}"})
        found = httpx.post(f"{server.url}/v1/completions", json=asked(person, 0) | {"save": False}).json()
        assert not found["memory"]["saved"]
    code, said = server.end(sig)
    assert code == 0, said
    assert f"saved {PEOPLE} memories" in said
    assert "Traceback" not in said
    again = Served(tiny_bundle, tmp_path)
    positions = {one["position"] for one in httpx.get(f"{again.url}/v1/memories").json()["data"]}
    assert positions == {EACH}
    again.end(signal.SIGTERM)


@pytest.mark.suite("serve")
def test_a_stream_under_way_ends_and_is_kept_when_the_server_is_stopped(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    server = Served(tiny_bundle, tmp_path, "--drain", "0.2", "--max-tokens", "100000")
    httpx.post(f"{server.url}/v1/memories", json={"id": "m0"})
    body = asked(0, 0) | {"stream": True, "max_tokens": 100_000}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"closed"' in rest[-2]
    assert '"saved":true' in rest[-2]
    assert server.end(signal.SIGTERM)[0] == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "give --tokens FILE"),
        (["--tokens", "nowhere"], 3, "cannot be read"),
        (["--slots", "0"], 2, "--slots is 0"),
        (["--drain", "nan"], 2, "--drain is nan"),
        (["--host", "203.0.113.1", "--tokens", "t"], 4, "cannot be listened on"),
        (["--store", "nonsense://x"], 4, "nonsense"),
    ],
)
def test_what_cannot_be_served(
    tiny_bundle: Path,
    options: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", str(tiny_bundle), "--port", "0", *options]) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 2


def test_a_port_that_is_taken(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tiny_bundle), "--port", port]) == 4
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("anna", "expected 'OWNER TOKEN'"),
        ("anna short", "16 is the least"),
        ("an/na long-enough-token-1", "an owner is"),
        ("anna sha256:1234567890123456", "malformed"),
        ("# nobody", "holds no token"),
    ],
)
def test_bad_token_files(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(line + "\n")
    assert main(["serve", str(tiny_bundle), "--port", "0", "--tokens", str(path)]) == 3
    assert message in capsys.readouterr().err


@pytest.mark.suite("serve")
def test_a_second_ctrl_c_shortens_the_drain_and_loses_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    server = Served(tiny_bundle, tmp_path, "--drain", "600", "--max-tokens", "100000")
    for name in ("m0", "m1"):
        httpx.post(f"{server.url}/v1/memories", json={"id": name})
    httpx.post(f"{server.url}/v1/completions", json=asked(1, 0) | {"save": False})
    body = asked(0, 0) | {"stream": True, "max_tokens": 100_000}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        assert server.process.stderr is not None
        assert "closing" in server.process.stderr.readline()
        server.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"closed"' in rest[-2]
    code, said = server.end(signal.SIGINT)
    assert (code, "saved 1 memories" in said, "Traceback" in said) == (0, True, False), said
    again = Served(tiny_bundle, tmp_path)
    assert httpx.get(f"{again.url}/v1/memories/m1").json()["position"] == EACH
    assert httpx.get(f"{again.url}/v1/memories/m0").json()["position"] >= EACH - 3
    again.end(signal.SIGTERM)


@pytest.mark.suite("serve")
def test_two_ctrl_c_at_once_save_every_memory(tiny_bundle: Path, tmp_path: Path) -> None:
    server = Served(tiny_bundle, tmp_path)
    httpx.post(f"{server.url}/v1/memories", json={"id": "m0"})
    httpx.post(f"{server.url}/v1/completions", json=asked(0, 0) | {"save": False})
    server.process.send_signal(signal.SIGINT)
    assert server.process.stderr is not None
    assert "closing" in server.process.stderr.readline()
    code, said = server.end(signal.SIGINT)
    assert (code, said) == (0, "titans: saved 1 memories\n")


@pytest.mark.suite("serve")
def test_a_memory_that_cannot_be_saved_at_the_end_is_a_failure(tiny_bundle: Path, tmp_path: Path) -> None:
    server = Served(tiny_bundle, tmp_path)
    httpx.post(f"{server.url}/v1/memories", json={"id": "m0"})
    httpx.post(f"{server.url}/v1/completions", json=asked(0, 0) | {"save": False})
    folder = tmp_path / "memories" / "local"
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("")
    code, said = server.end(signal.SIGTERM)
    assert code == 1
    assert "not saved: local/m0" in said
    assert "Traceback" not in said
