"""A process that kills itself at an exact step of its work, forked from one that has all prepared.

A step is a line of ``titans_runtime/files.py``, half of a write, or an operation on a name below one folder
(open, rename, remove, …), as Python's audit events report it. So the n-th step is the same in every run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from titans_runtime import files

_NAMES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.listdir", "os.scandir"}
Work = Callable[[], object]


def killed_at_every_step(work: Work, folder: Path, prepare: Work, every: int = 1) -> Iterator[int]:
    """Yield the number of each step that a process was killed at, after it was.

    Args:
        work: to run.
        folder: operations on names in it are steps.
        prepare: runs before each process, to set up the folder.
        every: kill at each ``every``-th step only.
    """
    for step in range(1, 100_000, every):
        prepare()
        if not killed_at(step, work, folder):
            return
        yield step


def killed_at(step: int, work: Work, folder: Path) -> bool:
    """Whether the work had so many steps, and its process was killed at that one."""
    child = forked(lambda: (_count_to(step, folder), work()))
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed; see its traceback"
    return os.WIFSIGNALED(status)


def forked(work: Work) -> int:
    """The id of a new process that does the work and ends, with exit code 0 if it did it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads that do not follow do nothing here
        child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
    os._exit(code)


def _count_to(last: int, folder: Path) -> None:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _NAMES and str(folder) in str(arguments[0]):
            step()

    def lines(frame: FrameType, event: str, argument: object) -> Any:  # noqa: ANN401 - sys.settrace's own type
        if event == "line":
            step()
        return lines

    def calls(frame: FrameType, event: str, argument: object) -> Any:  # noqa: ANN401
        return lines if frame.f_code.co_filename == files.__file__ else None

    fdopen = os.fdopen
    os.fdopen = lambda *arguments: _HalfAndHalf(fdopen(*arguments), step)  # type: ignore[assignment,return-value]
    sys.addaudithook(audit)
    sys.settrace(calls)


class _HalfAndHalf:
    """A file that is written in two halves, with a step between them."""

    def __init__(self, file: Any, step: Callable[[], None]) -> None:  # noqa: ANN401
        self._file, self._step = file, step

    def __enter__(self) -> _HalfAndHalf:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._file, name)

    def write(self, content: bytes) -> None:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._step()
        self._file.write(content[half:])
