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
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.experiments import report
from benchmarks.experiments.contestants import CONTESTANTS, slowest_first
from benchmarks.experiments.tasks import EXPERIMENTS
from benchmarks.experiments.tasks.task import Task
from benchmarks.experiments.trainings import Wanted, rows_of
from titans_runtime.errors import TitansError, UsageError
from titans_runtime.files import write_atomically

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
    if min(args.seeds) < 0:
        raise UsageError(f"--seeds {min(args.seeds)}: must be 0 or more")
    torch.set_num_threads(args.threads)
    tasks = EXPERIMENTS[args.task]
    steps = {task.name: args.steps or task.steps for task in tasks}
    path, command = args.results / f"{args.task}.json", f"python -m benchmarks.experiments {args.task}"
    if steps != {task.name: task.steps for task in tasks}:  # another budget has files of its own
        path, command = args.results / f"{args.task}-{args.steps}.json", f"{command} --steps {args.steps}"
    if not args.table:
        args.results.mkdir(parents=True, exist_ok=True)
        wanted = [
            Wanted(task, contestant, seed, steps[task.name], args.out)
            for seed in dict.fromkeys(args.seeds)  # a whole table with one seed comes first
            for task in tasks
            for contestant in dict.fromkeys(args.contestants or slowest_first(task.name))
        ]
        missing = [one for one in wanted if not one.done(_read(path))]
        with contextlib.closing(rows_of(missing, args.jobs, args.threads)) as found:
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


if __name__ == "__main__":
    raise SystemExit(main())
