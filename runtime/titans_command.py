"""Where the command ``titans`` begins: Ctrl-C is one line from here on, while its packages load, too."""

from __future__ import annotations

import sys

_INTERRUPTED = 130


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from titans_runtime.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("titans: interrupted", file=sys.stderr)  # noqa: T201 - a command's error
        return _INTERRUPTED
