"""What a server is told: ranges, unknown settings, and the file of tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import titans_runtime as tr
from titans_runtime.errors import DataError
from titans_runtime.serving.service import Service
from titans_runtime.serving.settings import Settings, digest_of, is_loopback, read_tokens

TOKEN = "a-token-of-some-length"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": 0}, "--slots is 0; it must be an integer, 1 or more"),
        ({"max_body": 1.5}, "--max-body is 1.5; it must be an integer, 1 or more"),
        ({"hot": -1}, "--hot is -1; it must be an integer, 0 or more"),
        ({"hot": 0.5}, "--hot is 0.5; it must be an integer, 0 or more"),
        ({"drain": float("nan")}, "--drain is nan; it must be a number, 0 or more"),
        ({"expire": "1"}, "--expire is '1'; it must be a number, 0 or more"),
        ({"allow_host": "http://a"}, "--allow-host is 'http://a'; give names without scheme and port"),
        ({"allow_host": "a:80"}, "--allow-host is 'a:80'; give names"),
        ({"allow_host": "a,,b"}, "--allow-host is 'a,,b'; give names"),
        ({"allow_host": "*"}, "--allow-host is '*'; give names"),
        ({"allow_host": ["a"]}, "--allow-host is ['a']; give names"),
        ({"slot": 1}, "setting 'slot' is unknown; known: allow_host, backend, "),
    ],
)
def test_what_no_server_can_be_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(tr.UsageError) as caught:
        Settings.from_dict({"bundle": "b"} | given)
    assert str(caught.value).startswith(message)


def test_a_model_of_vectors_has_nothing_to_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(vocab_size=0)
    monkeypatch.setattr("titans_runtime.serving.service.load", lambda *_, **__: model)
    with pytest.raises(tr.UsageError, match="takes vectors, and a server completes tokens"):
        Service(Settings("b"))


def test_a_bundle_must_be_named() -> None:
    with pytest.raises(tr.UsageError, match="setting 'bundle' is missing"):
        Settings.from_dict({"slots": 2})


def test_settings_survive_plain_json() -> None:
    told = {"bundle": "b", "store": "redis://host/0", "hot": 0, "drain": 0.5}
    settings = Settings.from_dict(told)
    assert {name: getattr(settings, name) for name in told} == told


def test_names_that_are_allowed() -> None:
    assert Settings("b").hosts == ()
    assert Settings("b", allow_host="Titans.example, 2001:DB8::1").hosts == ("titans.example", "2001:db8::1")


def test_tokens_are_known_by_their_digests(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    other = digest_of("another-token-of-some-length")
    path.write_text(f"# people\n\nann {TOKEN}\nbob sha256:{other.upper()}\n", "utf-8")
    assert read_tokens(path) == {digest_of(TOKEN): "ann", other: "bob"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ann", "line 1: expected 'OWNER TOKEN'"),
        (f"ann {TOKEN} more", "line 1: expected 'OWNER TOKEN'"),
        (f"a/b {TOKEN}", "line 1: an owner is 1 to 64 letters, digits, - or _"),
        ("ann short", "line 1: the token has 5 characters; 16 is the least"),
        (f"ann sha256:{'z' * 64}", "line 1: the token was given before, or its sha256: is malformed"),
        (f"ann sha256:{'a' * 63}", "line 1: the token was given before, or its sha256: is malformed"),
        (f"ann {TOKEN}\nbob {TOKEN}", "line 2: the token was given before"),
        ("# nobody", "holds no token; give a line 'OWNER TOKEN'"),
    ],
)
def test_a_malformed_file_of_tokens(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(line + "\n", "utf-8")
    with pytest.raises(DataError) as caught:
        read_tokens(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert TOKEN not in str(caught.value)


def test_a_file_of_tokens_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_tokens(tmp_path / "tokens")


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) == own
