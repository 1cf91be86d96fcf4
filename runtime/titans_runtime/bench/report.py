"""A measurement as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from titans_runtime.bench.machine import describe, own_versions
from titans_runtime.bench.measure import Absent, Measurement, Row
from titans_runtime.bench.options import REFERENCE

Record = dict[str, Any]
_COLUMNS = (
    "kind", "tokens", "batch", "edit", "threads", "backend", "seconds_per_token", "tokens_per_second",
    "ratio", "ratio_low", "ratio_high", "rounds", "logits_error",
)  # fmt: skip
_HEADER = (
    f"| what | threads | batch | edit | backend | µs a token | tokens/s | backend / {REFERENCE} (range) "
    "| logits differ by |"
)


def record(measurement: Measurement, command: str) -> Record:
    """Everything, as plain JSON types: the rows, what is absent and why, machine, versions and command."""
    return {
        "command": command,
        "machine": describe(),
        "versions": own_versions() | measurement.versions,
        "rows": [_row(row) for row in measurement.rows],
        "absent": [_absent(one) for one in measurement.absent],
    }


def _row(row: Row) -> Record:
    case = row.case
    return {
        "kind": case.kind,
        "tokens": case.tokens,
        "batch": case.batch,
        "edit": case.edit,
        "threads": row.threads,
        "backend": row.backend,
        "seconds_per_token": row.seconds_per_token,
        "tokens_per_second": 1 / row.seconds_per_token,
        "ratio": row.ratio,
        "ratio_low": min(row.ratios),
        "ratio_high": max(row.ratios),
        "rounds": len(row.ratios),
        "logits_error": row.error,
        "ratios": list(row.ratios),
        "seconds": list(row.seconds),
    }


def _absent(one: Absent) -> Record:
    return {
        "backend": one.backend,
        "threads": one.threads,
        "state": "refused" if one.refused else "missing",
        "reason": one.reason,
    }


def to_json(content: Record) -> str:
    """Indented JSON."""
    return json.dumps(content, indent=2) + "\n"


def to_csv(content: Record) -> str:
    """A row a backend and case, without what is absent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(content["rows"])
    return text.getvalue()


def to_markdown(content: Record) -> str:
    """Tables of what was timed and of what is absent, with machine, versions and command."""
    return tables(content) + footer(content)


def tables(content: Record) -> str:
    """What was timed and what is absent, in Markdown."""
    lines = [_HEADER, "|---" * _HEADER.count(" | ") + "|---|"]
    lines += [_line(row) for row in content["rows"]]
    absent = content["absent"]
    if absent:
        lines += ["", "| absent | threads | | reason |", "|---|---|---|---|"]
        lines += [
            f"| {a['backend']} | {a['threads']} | {a['state']} | {_cell(a['reason'])} |" for a in absent
        ]
    return "\n".join(lines) + "\n"


def footer(content: Record) -> str:
    """Machine, versions and command, in Markdown."""
    machine, versions = content["machine"], content["versions"]
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"\n{machine['processor']}, {machine['cores']} cores, {machine['system']}; {numbers}\n"
        f"\n    {content['command']}\n"
    )


def _line(row: Record) -> str:
    error = "" if row["logits_error"] is None else f"{row['logits_error']:.1g}"
    case = f"{row['kind']} {row['tokens']}"
    return (
        f"| {case} | {row['threads']} | {row['batch']} | {row['edit']:g} | {row['backend']} "
        f"| {row['seconds_per_token'] * 1e6:.0f} | {row['tokens_per_second']:.0f} "
        f"| **{row['ratio']:.2f}** ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}) | {error} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
