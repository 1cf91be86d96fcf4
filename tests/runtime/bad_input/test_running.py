"""What goes wrong while a session runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.bad_input.support import Titans
from tests.runtime.command import TEXT
from tests.runtime.streams import assert_same_snapshot
from titans_runtime.readout import ReadoutEditor


def _failing(what: str) -> Callable[..., None]:
    """A `ReadoutEditor._learn` in whose second call, after its update, something happens."""
    learn, calls = ReadoutEditor._learn, iter(range(100))

    def failing(self: ReadoutEditor, *arguments: object, **settings: object) -> None:
        if next(calls) == 1 and what == "not finite":
            self._scored[...] = np.nan
        learn(self, *arguments, **settings)
        if what == "Ctrl-C" and next(calls) > 1:
            signal.raise_signal(signal.SIGINT)

    return failing


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python has it by default: a process that is started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("Ctrl-C", 130, "titans: interrupted\n"),
        (
            "not finite",
            1,
            (
                "titans: text: in the call that began at byte 0: the readout memory's gradient "
                "is not finite; the session is as it was before the call\n"
            ),
        ),
    ],
)
def test_an_edit_that_fails_leaves_the_memory_file(
    model: tr.Model,
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    titans: Titans,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    code: int,
    message: str,
) -> None:
    path = tmp_path / "memory"
    session = model.session(0.5, tr.Editor(step=0.5, chunk=4))
    session.append(TEXT)
    session.save(path)
    before, snapshot = path.read_bytes(), session.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(ReadoutEditor, "_learn", _failing(what))
        assert titans("run", tiny_bundle, text, "--state-in", path, "--state-out", path) == (code, message)
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(ReadoutEditor, "_learn", _failing(what))
        with pytest.raises(KeyboardInterrupt if what == "Ctrl-C" else tr.NumericsError):
            session.append(TEXT)
    assert_same_snapshot(session.snapshot(), snapshot)


def test_a_byte_beyond_the_vocabulary(bundle_of_few_tokens: Path, tmp_path: Path, titans: Titans) -> None:
    message = "token 200 at index 1; ids run from 0 to 99"
    model = tr.load(bundle_of_few_tokens, threads=1)
    session = model.session()
    with pytest.raises(tr.TokenError, match=message):
        session.append(b"\x01\xc8")
    assert session.position == 0
    (tmp_path / "text").write_bytes(b"\x01\xc8")
    state = ("--state-out", tmp_path / "memory")
    error = (3, f"titans: {message}\n")
    state = ("--no-edit", *state)
    assert titans("run", bundle_of_few_tokens, tmp_path / "text", *state) == error
    assert titans("generate", bundle_of_few_tokens, "--prompt", "\x01\udcc8", *state) == error
    assert not (tmp_path / "memory").exists()


@pytest.fixture(scope="module")
def bundle_of_few_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from titans_export.config import PRESETS, overridden
    from titans_export.model import TitansModel
    from titans_export.pipeline import export_bundle
    from titans_export.training.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("few")
    torch.manual_seed(0)
    save_checkpoint(TitansModel(overridden(PRESETS["tiny"], ["vocab_size=100"])), folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"
