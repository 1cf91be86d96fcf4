"""The editing that a checkpoint recommends, in a file beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from titans_runtime.editor import OBJECTIVES, Editor, check_fits
from titans_runtime.errors import DataError, UsageError
from titans_runtime.json_reader import parse_object
from titans_runtime.manifest import Manifest

EDITING_FILE = "editing.json"


def read_editing(checkpoint: Path) -> dict[str, Any]:
    """The editing that the checkpoint recommends: ``{"edit", "editor"}``; none where it says nothing.

    Raises:
        DataError: ``editing.json`` is damaged.
    """
    path = checkpoint / EDITING_FILE
    if not path.exists():
        return {"edit": 0.0, "editor": None}
    try:
        content = parse_object(path.read_bytes(), path.name)
        edit, editor = content["edit"], content["editor"]
        for part in Editor.from_dict(editor).parts if editor is not None else ():
            if part.objective not in OBJECTIVES:
                raise UsageError(f"editor objective {part.objective!r}; known: {', '.join(OBJECTIVES)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected the fields edit and editor ({error!r})") from None
    except UsageError as error:
        raise DataError(f"{path}: {error}") from None
    if type(edit) not in (int, float) or not 0 <= edit <= 1:
        raise DataError(f"{path}: edit is {edit!r}; it must be a number from 0 to 1")
    return {"edit": float(edit), "editor": editor}


def check_editing(checkpoint: Path, editing: dict[str, Any], manifest: Manifest) -> None:
    """Refuse to recommend an editor that no session of the bundle could open.

    Args:
        checkpoint: whose ``editing.json`` recommends it.
        editing: of :func:`read_editing`.
        manifest: of the finished bundle.

    Raises:
        DataError: a graph is missing, no memory has such a name, or an optimizer cannot step one.
    """
    try:
        if editing["editor"] is not None:
            check_fits(Editor.from_dict(editing["editor"]), manifest)
    except UsageError as error:
        problem = str(error).removeprefix("editor ")
        raise DataError(f"{checkpoint / EDITING_FILE}: editor: {problem}") from None
