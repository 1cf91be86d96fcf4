"""The editing that a checkpoint recommends, in a file beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from titans_runtime.editor import OBJECTIVES, Editor
from titans_runtime.errors import DataError, UsageError
from titans_runtime.json_reader import parse_object

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
        edit, editor = float(content["edit"]), content["editor"]
        for part in Editor.from_dict(editor).parts if editor is not None else ():
            if part.objective not in OBJECTIVES:
                raise UsageError(f"editor objective {part.objective!r}; known: {', '.join(OBJECTIVES)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected the fields edit and editor ({error!r})") from None
    except UsageError as error:
        raise DataError(f"{path}: {error}") from None
    if not 0 <= edit <= 1:
        raise DataError(f"{path}: edit is {edit}; it must lie between 0 and 1")
    return {"edit": edit, "editor": editor}
