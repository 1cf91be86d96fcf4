"""One task, one command: train every contestant, ask all of them, write a table and a plot.

    .venv/bin/python -m benchmarks.experiments mqar

Trainings are kept in out/experiments and go on where they were stopped; what has results is not done
again. Results go to benchmarks/results/experiments/TASK.json, .md and .png; ``--table`` only writes the
table and the plot of what is finished, and says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from benchmarks.experiments.contestants import CONTESTANTS, entrants
from benchmarks.experiments.contestants.network import parameters
from benchmarks.experiments.evaluate import evaluated
from benchmarks.experiments.tasks import EXPERIMENTS
from benchmarks.experiments.tasks.task import Task
from benchmarks.experiments.train import CHECKPOINT, Recipe, Training
from titans_runtime.errors import TitansError, UsageError
from titans_runtime.files import write_atomically
from titans_runtime.progress import progress_counter

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
WORK = ROOT / "out" / "experiments"
SEEDS = (0, 1, 2)


def main() -> int:
    """Run what is asked for; a user's mistake is one line and an exit code."""
    args = _parser().parse_args()
    try:
        run(args)
    except TitansError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("experiments: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=list(CONTESTANTS),
        help="default is all of this task",
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="of training; default is the task's own number"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each in a process")
    parser.add_argument("--table", action="store_true", help="only write what was measured")
    parser.add_argument("--out", type=Path, default=WORK, help="folder of the trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return parser


def run(args: argparse.Namespace) -> None:
    """Train and ask what has no results yet, then write the table and the plot."""
    for name in ("steps", "threads", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be 1 or more")
    torch.set_num_threads(args.threads)
    tasks = EXPERIMENTS[args.task]
    steps = {task.name: args.steps or task.steps for task in tasks}
    path, command = args.results / f"{args.task}.json", f"python -m benchmarks.experiments {args.task}"
    if steps != {task.name: task.steps for task in tasks}:  # another budget has files of its own
        path, command = args.results / f"{args.task}-{args.steps}.json", f"{command} --steps {args.steps}"
    if not args.table:
        args.results.mkdir(parents=True, exist_ok=True)
        wanted = [
            _Wanted(task, contestant, seed, steps[task.name], args.out)
            for seed in args.seeds  # a whole table with one seed comes first
            for task in tasks
            for contestant in args.contestants or entrants(task.name)
        ]
        missing = [one for one in wanted if not one.done(_read(path))]
        with contextlib.closing(_rows(missing, args.jobs, args.threads)) as found:
            for own in found:
                rows = _read(path) + own  # others may have been finished by another process
                write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())
    rows = [row for row in _read(path) if row["steps"] == steps[row["task"]]]
    if not rows:
        raise UsageError(f"{path}: no results after so many steps; run without --table")
    content = document(args.task, tasks, rows, steps, command, f"{path.stem}.png")
    write_atomically(path.with_suffix(".md"), content.encode())
    write_atomically(path.with_suffix(".png"), report.plot(command, tasks, rows))
    print(content)


class _Wanted(NamedTuple):
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


def _rows(wanted: Sequence[_Wanted], jobs: int, threads: int) -> Iterator[report.Rows]:
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


def _measured(wanted: _Wanted) -> report.Rows:
    return measured(*wanted)


def document(
    name: str, tasks: Sequence[Task], rows: report.Rows, steps: dict[str, int], command: str, picture: str
) -> str:
    """The page of an experiment, in Markdown."""
    text = report.table(name, tasks, rows, SEEDS, steps)
    content = f"`{command}`\n\n![{name}]({picture})\n\n{text}\n"
    chosen = report.settings(rows)
    if chosen:
        content += "\nChosen on development examples:\n\n" + "\n".join(f"* {line}" for line in chosen) + "\n"
    return content


def _read(path: Path) -> report.Rows:
    rows: report.Rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return rows


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


if __name__ == "__main__":
    raise SystemExit(main())
