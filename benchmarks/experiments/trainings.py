"""A contestant trained and asked, one after the other or several side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.experiments import report
from benchmarks.experiments.contestants import CONTESTANTS
from benchmarks.experiments.contestants.network import parameters
from benchmarks.experiments.evaluate import evaluated
from benchmarks.experiments.tasks.task import Task
from benchmarks.experiments.train import CHECKPOINT, Recipe, Training
from titans_runtime.progress import progress_counter


class Wanted(NamedTuple):
    """A training whose rows are asked for, and the folder of trainings."""

    task: Task
    contestant: str
    seed: int
    steps: int
    work: Path

    def done(self, rows: report.Rows) -> bool:
        """Whether its rows are there."""
        own = {"task": self.task.name, "contestant": self.contestant, "seed": self.seed, "steps": self.steps}
        return any(all(row[name] == value for name, value in own.items()) for row in rows)


def rows_of(wanted: Sequence[Wanted], jobs: int, threads: int) -> Iterator[report.Rows]:
    """The rows of every training as it is finished; with ``jobs`` above 1 that many go on side by side."""
    if jobs == 1:
        yield from (measured(*one) for one in wanted)
        return
    # Where this ends early, the pool is ended with it: trainings are kept every hundred steps.
    with (
        multiprocessing.get_context("spawn").Pool(jobs, _begin, (threads,)) as pool,
        progress_counter(len(wanted), "trainings", "training") as advance,
    ):
        for own in pool.imap_unordered(_measured, wanted):
            advance(1)
            yield own


def _begin(threads: int) -> None:
    """A process of its own: it leaves Ctrl-C to the one that began it, and the terminal to one bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(threads)


def _measured(wanted: Wanted) -> report.Rows:
    return measured(*wanted)


def measured(task: Task, contestant: str, seed: int, steps: int, work: Path) -> list[dict[str, Any]]:
    """Train one contestant and ask it, every way that it can be run: a row each."""
    name = f"{contestant}-{seed}" if steps == task.steps else f"{contestant}-{seed}-{steps}"
    folder = work / task.name / name
    began = time.perf_counter()
    training = Training(task, contestant, seed, Recipe(steps if CONTESTANTS[contestant].trained else 0))
    network = training.run(folder)
    trained = time.perf_counter()
    ways = evaluated(task, contestant, network, folder / CHECKPOINT, folder / "bundle")
    subject = {
        "task": task.name,
        "contestant": contestant,
        "seed": seed,
        "steps": steps,
        "parameters": parameters(training.network),
        "loss": round(training.loss, 5) if CONTESTANTS[contestant].trained else None,
    }
    for row in ways:
        first = next(iter(row["scores"].values()))
        print(f"{task.name}, {contestant}, seed {seed}, {row['way']}: {first}", file=sys.stderr, flush=True)
    print(
        f"  {trained - began:.0f} s of training, {time.perf_counter() - trained:.0f} of questions",
        file=sys.stderr,
    )
    return [subject | row for row in ways]
