"""The part of the demo that runs without PyTorch, started as a script in a process of its own.

Reads a job as JSON from stdin, prints the result as JSON. Imports of torch and onnx are made to
fail first: that the model runs and learns here proves that it needs neither.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

FORBIDDEN = ("torch", "onnx", "onnxscript", "titans_export", "titans_converters")


class _Forbid(MetaPathFinder):
    """Makes the import of a forbidden package an error, even where it is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        del path, target
        if fullname.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{fullname} must not be imported here")
        return None


def main() -> None:
    """Run the job on stdin."""
    sys.meta_path.insert(0, _Forbid())
    job: dict[str, Any] = json.load(sys.stdin)
    result = {"stream": _stream, "resume": _resume}[job["task"]](job)
    loaded = sorted(name for name in FORBIDDEN if name in sys.modules)
    print(json.dumps(result | {"forbidden_modules_loaded": loaded}))


def _stream(job: dict[str, Any]) -> dict[str, Any]:
    """Score every text with editing off and on; save the memory in the middle of the last one."""
    import numpy as np

    import titans_runtime as tr
    from titans_runtime.forward import SEGMENT
    from titans_runtime.progress import progress_bar

    model = tr.load(job["bundle"], threads=job["threads"])
    scores: dict[str, dict[str, float]] = {}
    bits: dict[str, Any] = {}
    for index, text in enumerate(job["texts"]):
        content = _read(text)
        for side in ("off", "on"):
            session = model.session(edit=0.0, editor=None) if side == "off" else model.session()
            starts = progress_bar(
                range(0, len(content), SEGMENT), f"{text['name']}, editing {side}", "B", SEGMENT
            )
            score = tr.score(session, content, starts)
            bits[f"{index}.{side}"] = score.bits
            scores[f"{index}.{side}"] = {
                "bits_per_byte": score.bits_per_token,
                "tokens_per_second": score.tokens_per_second,
            }
    session = model.session()
    tr.score(session, _read(job["texts"][-1])[: job["cut"]])
    session.save(job["memory"])
    np.savez(job["bits"], **bits)
    return {"scores": scores}


def _resume(job: dict[str, Any]) -> dict[str, Any]:
    """Continue the last text from the saved memory."""
    import numpy as np

    import titans_runtime as tr

    session = tr.load(job["bundle"], threads=job["threads"]).load_session(job["memory"])
    start = session.position
    score = tr.score(session, _read(job["texts"][-1])[start:])
    np.savez(job["bits"], resumed=score.bits)
    return {"position": start, "bits_per_byte": score.bits_per_token}


def _read(text: dict[str, Any]) -> bytes:
    return Path(text["path"]).read_bytes()[: text["limit"]]


if __name__ == "__main__":
    main()
