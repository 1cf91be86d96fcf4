"""Continuous batching against one request after the other: tokens per second and latency, 1 to 64 sessions.

All requests of a round arrive at once, each with a session, a memory and a prompt of its own. *One by one* is
what a server without a scheduler does: whole requests, in the order in which they came. Both ways take turns,
on the same model in one process, and what they draw is compared.

    python -m benchmarks.serving.run BUNDLE
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import titans_runtime as tr
from benchmarks.command import conclude
from benchmarks.serving.plot import plot
from titans_runtime.bench.machine import describe, own_versions
from titans_runtime.files import write_atomically
from titans_runtime.progress import progress_bar
from titans_runtime.sampling import Sampling
from titans_runtime.serving import Piece, Request, Scheduler

RESULTS = Path(__file__).parents[1] / "results" / "serving"
TEXT = Path(__file__).parents[1] / "data" / "alternatives.log"
SESSIONS = (1, 2, 4, 8, 16, 32, 64)
Drawn = tuple[dict[str, float], list[list[int]]]


def main() -> None:
    """Measure, and write numbers, page and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", default="nano", help="of the model, for the results")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens drawn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    model = tr.load(args.bundle, threads=args.threads)
    rows = []
    for count in progress_bar(SESSIONS, "sessions"):
        rows.append(measure(model, count, args.prompt, args.new, args.rounds))
        print(json.dumps(rows[-1]))
    gaps = long_document(model, args.prompt)
    report = {
        "command": f"python -m benchmarks.serving.run BUNDLE --name {args.name} --prompt {args.prompt} "
        f"--new {args.new} --rounds {args.rounds}",
        "options": {name: value for name, value in vars(args).items() if name != "bundle"},
        "machine": describe() | own_versions(),
        "state_bytes": model.manifest.state_bytes,
        "rows": rows,
        "beside_a_long_document": gaps,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / f"batching-{args.name}.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(RESULTS / f"batching-{args.name}.png", plot(report))
    write_atomically(RESULTS / f"batching-{args.name}.md", table(report).encode())


def measure(model: tr.Model, count: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Both ways, in turns; the first round of each warms up."""
    found: dict[str, list[dict[str, float]]] = {"batched": [], "one by one": []}
    for number in range(rounds + 1):
        batched, ours = batched_round(model, prompts(count, prompt), new)
        single, theirs = single_round(model, prompts(count, prompt), new)
        differing = sum(a != b for a, b in zip(ours, theirs, strict=True))
        assert differing == 0, f"{differing} of {count} requests drew other tokens"
        if number:
            found["batched"].append(batched)
            found["one by one"].append(single)
    ratios = [
        a["tokens_per_second"] / b["tokens_per_second"]
        for a, b in zip(found["batched"], found["one by one"], strict=True)
    ]
    row: dict[str, Any] = {"sessions": count, "ratio": float(np.median(ratios))}
    row |= {"ratio_low": min(ratios), "ratio_high": max(ratios)}
    for way, results in found.items():
        row[way] = {name: float(np.median([one[name] for one in results])) for name in results[0]}
    return row


def batched_round(model: tr.Model, texts: list[bytes], new: int) -> Drawn:
    """All requests through one scheduler."""
    scheduler = Scheduler(model, slots=len(texts), waiting_of_one=len(texts))
    sessions = [model.session() for _ in texts]
    times: list[list[float]] = [[] for _ in texts]
    drawn: list[list[int]] = [[] for _ in texts]
    began = time.perf_counter()
    for row, (session, text) in enumerate(zip(sessions, texts, strict=True)):

        def deliver(event: object, row: int = row) -> None:
            if isinstance(event, Piece) and event.drawn:
                times[row].append(time.perf_counter() - began)
                drawn[row].append(int(event.tokens[0]))

        scheduler.submit(Request(session, text, new, Sampling(0.7), seed=row), deliver)
    while scheduler.step():
        pass
    took = time.perf_counter() - began
    scheduler.close()
    return figures(times, took), drawn


def single_round(model: tr.Model, texts: list[bytes], new: int) -> Drawn:
    """One whole request after the other."""
    sessions = [model.session() for _ in texts]
    times: list[list[float]] = []
    drawn: list[list[int]] = []
    began = time.perf_counter()
    for row, (session, text) in enumerate(zip(sessions, texts, strict=True)):
        own: list[float] = []
        tokens: list[int] = []
        session.append(text)
        for token in session.generate(new, 0.7, seed=row):
            own.append(time.perf_counter() - began)
            tokens.append(token)
        times.append(own)
        drawn.append(tokens)
    return figures(times, time.perf_counter() - began), drawn


def long_document(model: tr.Model, prompt: int, tokens: int = 8192) -> dict[str, float]:
    """Longest gap, in milliseconds, between two tokens of 8 writers while a long document is read."""
    gaps = {}
    for name, segment in (("in segments of 128", 128), ("whole", tokens)):
        scheduler = Scheduler(model, slots=9, segment=segment)
        last: dict[int, float] = {}
        longest = 0.0

        def deliver(event: object, row: int, last: dict[int, float] = last) -> None:
            nonlocal longest
            now = time.perf_counter()
            if isinstance(event, Piece) and event.drawn:
                longest = max(longest, now - last.get(row, now))
                last[row] = now

        for row, text in enumerate(prompts(8, prompt)):
            request = Request(model.session(), text, 150)
            scheduler.submit(request, lambda event, row=row: deliver(event, row))
        for _ in range(10):
            scheduler.step()
        document = (TEXT.read_bytes() * 100)[:tokens]
        scheduler.submit(Request(model.session(), document), lambda _: None)
        while scheduler.step():
            pass
        scheduler.close()
        gaps[name] = 1000 * longest
    return gaps


def prompts(count: int, length: int) -> list[bytes]:
    """Different ones."""
    text = TEXT.read_bytes()
    return [text[37 * row : 37 * row + length] for row in range(count)]


def figures(times: list[list[float]], took: float) -> dict[str, float]:
    """Throughput and latencies of a round, in seconds."""
    first = [own[0] for own in times]
    whole = [own[-1] for own in times]
    return {
        "tokens_per_second": sum(len(own) for own in times) / took,
        "first_p50": float(np.percentile(first, 50)),
        "first_p99": float(np.percentile(first, 99)),
        "whole_p50": float(np.percentile(whole, 50)),
        "whole_p99": float(np.percentile(whole, 99)),
    }


def table(report: dict[str, Any]) -> str:
    """The results as a page."""
    options, machine = report["options"], report["machine"]
    how = (
        f"Prompts of {options['prompt']} tokens, {options['new']} drawn, editing as the bundle recommends; "
        f"all requests arrive at once. {options['threads']} thread, {machine['processor']}; medians of "
        f"{options['rounds']} rounds, both ways in turns in one process. What both drew was equal."
    )
    lines = [
        f"# Continuous batching against one request after the other: size `{options['name']}`",
        "",
        how,
        "",
    ]
    lines += [f"![Tokens per second and latency](batching-{options['name']}.png)", ""]
    heads = ["sessions", "tokens/s, batched", "one by one", "ratio (range)"]
    heads += ["first token p50 / p99, ms", "one by one", "whole answer p50 / p99, ms", "one by one"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in report["rows"]:
        ours, theirs = row["batched"], row["one by one"]
        cells = [str(row["sessions"])]
        cells += [f"{way['tokens_per_second']:,.0f}" for way in (ours, theirs)]
        cells += [f"**{row['ratio']:.2f}** ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"]
        for name in ("first", "whole"):
            for way in (ours, theirs):
                cells.append(f"{1000 * way[f'{name}_p50']:,.0f} / {1000 * way[f'{name}_p99']:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    gaps = report["beside_a_long_document"]
    lines += [
        "",
        "While 8 sessions write and a document of 8,192 tokens is read, the longest gap between two is "
        + ", ".join(f"{gap:,.0f} ms where it is read {name}" for name, gap in gaps.items())
        + ".",
        "",
        f"To reproduce: `{report['command']}`, with a bundle of that size.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    conclude(main)
