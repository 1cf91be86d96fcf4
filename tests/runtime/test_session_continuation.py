"""A copy of a session, in any form, continues bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.streams import (
    EDITORS,
    LONG,
    assert_same_snapshot,
    change_manifest,
    continuation,
)
from titans_runtime.editor import Editor


def _restored(session: tr.Session, path: Path) -> tr.Session:
    twin = session.model.session(0.0, None)
    twin.append(b"somewhere else")
    twin.restore(session.snapshot())
    return twin


def _rewound(session: tr.Session, path: Path) -> tr.Session:
    twin = session.fork()
    before = twin.snapshot()
    twin.append(LONG)
    twin.restore(before)
    return twin


def _saved(session: tr.Session, path: Path) -> tr.Session:
    session.save(path)
    return session.model.load_session(path)


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("length", [1, 4, 6, 23])
@pytest.mark.parametrize(
    "copy", [tr.Session.fork, _restored, _rewound, _saved], ids=["fork", "restore", "rewind", "file"]
)
def test_a_copy_continues_bit_for_bit(
    model: tr.Model,
    tmp_path: Path,
    editor: Editor | None,
    length: int,
    copy: Callable[..., tr.Session],
) -> None:
    session = model.session(0.5, editor)
    session.append(LONG[:length])
    twin = copy(session) if copy is tr.Session.fork else copy(session, tmp_path / "memory")
    assert_same_snapshot(twin.snapshot(), session.snapshot())
    assert continuation(twin) == continuation(session)
    assert_same_snapshot(twin.snapshot(), session.snapshot())


def test_a_memory_file_continues_bit_for_bit_in_another_process(
    model: tr.Model, tiny_bundle: Path, tmp_path: Path
) -> None:
    session = model.session(0.5, Editor(step=0.5, chunk=4))
    session.append(LONG[:10])
    session.save(tmp_path / "memory")
    program = (
        "import sys, titans_runtime as tr\n"
        "session = tr.load(sys.argv[1], threads=1).load_session(sys.argv[2])\n"
        "sys.stdout.buffer.write(session.append(b'continued elsewhere').tobytes())\n"
        "sys.stdout.buffer.write(bytes(session.generate(5, seed=1)))\n"
    )
    command = [sys.executable, "-c", program, str(tiny_bundle), str(tmp_path / "memory")]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    expected = session.append(b"continued elsewhere").tobytes() + bytes(session.generate(5, seed=1))
    assert output == expected


def test_a_fork_does_not_influence_its_parent(model: tr.Model) -> None:
    session = model.session()
    session.append(LONG[:10])
    before = session.snapshot()
    twin = session.fork()
    twin.append(LONG)
    list(twin.generate(5, learn=True))
    assert_same_snapshot(session.snapshot(), before)


def test_a_snapshot_is_a_copy(model: tr.Model) -> None:
    session = model.session()
    session.append(LONG[:10])
    before = session.snapshot()
    copies = {name: array.copy() for name, array in before.arrays.items()}
    session.append(LONG)
    for name, array in before.arrays.items():
        assert np.array_equal(array, copies[name])


def test_a_snapshot_of_another_bundle_is_refused(model: tr.Model, bundle_copy: Path) -> None:
    other = change_manifest(bundle_copy, lambda content: content["model"].update(layers=3))
    snapshot = tr.load(bundle_copy, threads=1).session().snapshot()
    session = model.session()
    with pytest.raises(tr.StateError, match=f"{other[:12]}….*{model.manifest.identity[:12]}…"):
        session.restore(snapshot)
