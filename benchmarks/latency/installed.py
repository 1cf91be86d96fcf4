"""What must be installed to run a model: this runtime, against PyTorch.

    .venv/bin/python -m benchmarks.latency.installed

Installs both into folders of their own, with the pinned versions, and adds up their files.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.command import conclude
from benchmarks.latency.plots import bars
from benchmarks.latency.results import publish
from titans_runtime.bench.machine import describe, own_versions
from titans_runtime.progress import progress_bar

_ROOT = Path(__file__).parents[2]
_SIDES = {
    "ours": [f"{_ROOT / 'runtime'}[cpu]"],
    "torch": ["torch", "numpy", "safetensors"],  # what the model's code imports, itself left out
}


def main() -> None:
    """Install, add up, publish."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            name: _installed(Path(folder, name), packages)
            for name, packages in progress_bar(_SIDES.items(), "installing", "side")
        }
    ratio = sizes["torch"][""] / sizes["ours"][""]
    row = {"quantity": "installed", "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio, "rounds": 1}
    content = {
        "command": "python -m benchmarks.latency.installed",
        "machine": describe(),
        "versions": own_versions(),
        "rows": [row | {name: sizes[name][""] for name in sizes}],
        "absent": [],
        "largest": {name: _largest(sizes[name]) for name in sizes},
    }
    lines = ["| | installed | the largest parts |", "|---|---|---|"]
    lines += [
        f"| {name} | {sizes[name][''] / 1e6:.0f} MB "
        f"| {', '.join(f'{part} {size / 1e6:.0f} MB' for part, size in _largest(sizes[name]).items())} |"
        for name in sizes
    ]
    lines += ["", f"PyTorch / ours: **{ratio:.2f}**"]
    picture = bars(["installed size"], content["rows"], "PyTorch / ours", content["command"])
    publish("installed", content, "\n".join(lines) + "\n", picture)


def _installed(folder: Path, packages: list[str]) -> dict[str, int]:
    """Bytes of every part of what pip puts into ``folder``, and under ``""`` of all."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",
    ]
    command += ["-c", str(_ROOT / "constraints.txt"), "--target", str(folder), *packages]
    subprocess.run(command, check=True, stdout=sys.stderr)
    sizes: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            part, size = path.relative_to(folder).parts[0], path.stat().st_size
            for name in (part, ""):
                sizes[name] = sizes.get(name, 0) + size
    return sizes


def _largest(sizes: dict[str, int]) -> dict[str, int]:
    parts = sorted((size, part) for part, size in sizes.items() if part)[-4:]
    return {part: size for size, part in reversed(parts)}


if __name__ == "__main__":
    conclude(main)
