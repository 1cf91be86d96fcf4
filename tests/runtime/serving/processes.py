"""`titans serve` as a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


class Served:
    """A server on a free port of loopback."""

    def __init__(self, bundle: Path, folder: Path, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "titans_runtime",
            "serve",
            str(bundle),
            "--port",
            "0",
            "--threads",
            "1",
        ]
        command += ["--threads", "1", "--store", str(folder / "memories"), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.first = self.process.stderr.readline()
        found = re.search(r"http://\S+:\d+", self.first)
        assert found, self.first + self.process.stderr.read()
        self.url = found[0]

    def end(self, sig: int) -> tuple[int, str]:
        """Send a signal; the exit code, and what was said after the first line."""
        self.process.send_signal(sig)
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        self.process.stderr.close()
        return self.process.wait(), said
