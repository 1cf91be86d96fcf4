"""Results files: a record as JSON, its table as Markdown, its rows as CSV, its picture as PNG."""

from __future__ import annotations

from pathlib import Path

from titans_runtime.bench.report import Record, footer, to_csv, to_json
from titans_runtime.files import write_atomically

RESULTS = Path(__file__).parents[1] / "results" / "latency"


def publish(name: str, content: Record, table: str, picture: bytes) -> None:
    """Write the four files, and print the table."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = table + footer(content)
    for suffix, data in (
        ("json", to_json(content).encode()),
        ("csv", to_csv(content).encode()),
        ("md", text.encode()),
        ("png", picture),
    ):
        write_atomically(RESULTS / f"{name}.{suffix}", data)
    print(text)
