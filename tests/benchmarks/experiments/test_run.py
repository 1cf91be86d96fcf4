"""Training, answers and tables, as the one command makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import __main__ as command
from benchmarks.experiments import evaluate, trainings
from benchmarks.experiments.contestants import CONTESTANTS, entrants, slowest_first
from benchmarks.experiments.contestants.titans import Titans
from benchmarks.experiments.evaluate import Way, answers, scored
from benchmarks.experiments.report import table
from benchmarks.experiments.tasks import EXPERIMENTS
from benchmarks.experiments.tasks.recall import MQAR
from benchmarks.experiments.tasks.task import IGNORED, Batch, Task, examples
from benchmarks.experiments.train import CHECKPOINT, STATE, Recipe, Training
from titans_export.peers.autograd import AutogradRunner
from titans_export.training.checkpoint import load_checkpoint
from titans_runtime import Editor
from titans_runtime.errors import DataError


def small() -> Task:
    """A task with a few short tests."""
    tests = tuple(replace(test, examples=5) for test in (MQAR.tests[0], MQAR.tests[1], MQAR.tests[6]))
    return replace(MQAR, tests=tests, development=(replace(MQAR.tests[0], examples=2),), batch=4)


@pytest.mark.parametrize("contestant", ["lstm", "titans-lmm", "titans-scaled", "transformer"])
def test_a_stopped_training_ends_as_an_unbroken_one(tmp_path: Path, contestant: str) -> None:
    recipe, task = Recipe(steps=6), replace(small(), carry=0.7)
    whole = Training(task, contestant, 3, recipe)
    for step in range(6):
        whole.advance(step)
    first = Training(task, contestant, 3, recipe)
    for step in range(3):
        first.advance(step)
    first.save(tmp_path / STATE)
    network = Training(task, contestant, 3, recipe).run(tmp_path)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_denormals_are_flushed_in_training_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    if not flushed:
        pytest.skip("this processor cannot flush denormals")
    seen, advance = [], Training.advance

    def watched(training: Training, step: int) -> None:
        seen.append(float(torch.full((4,), 2e-38).mul(0.1).sum()))
        advance(training, step)

    monkeypatch.setattr(Training, "advance", watched)
    Training(small(), "lstm", 0, Recipe(steps=2)).run(tmp_path)
    assert seen == [0.0, 0.0]
    assert float(torch.full((4,), 2e-38).mul(0.1).sum()) > 0


def test_some_rows_go_on_from_the_state_that_was_left() -> None:
    training = Training(replace(small(), batch=40, carry=0.5), "lstm", 0, Recipe(steps=4))
    training.advance(0)
    carried = (training.state["cell"] != 0).flatten(1).any(1)
    assert 10 < int(carried.sum()) < 30
    assert not training.state["cell"].requires_grad
    alone = Training(replace(small(), batch=40), "lstm", 0, Recipe(steps=4))
    alone.advance(0)
    assert not alone.state["cell"].any()
    assert alone.loss == training.loss
    for other in (training, alone):
        other.advance(1)
    assert alone.loss != training.loss


def test_noise_grows_through_a_training_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, shares = Training(small(), "titans-scaled", 0, Recipe(steps=4)), []
    monkeypatch.setattr(training.network, "set_noise", shares.append)
    training.run(tmp_path)
    assert shares == [0.0, 0.25, 0.5, 0.75, 0.0]


def test_who_is_trained_with_noise_is_asked_without(tmp_path: Path) -> None:
    """An open editor's lessons take gradients, as training does."""
    task = small()
    network = Training(task, "titans-scaled", 0, Recipe(steps=2)).run(tmp_path)
    assert isinstance(network, Titans)
    way = Way("readout", network.edit, Editor(objective="readout", step=3.0, chunk=8))
    runner = AutogradRunner(network.model, way.editor)
    logits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        runner.start(5, 1.0)
        logits.append(runner.append(examples(task.tests[1], 0).tokens))
    runner.close()
    assert np.array_equal(*logits)


def test_of_tied_answers_the_exports_is_pytorchs() -> None:
    logits = np.array([[4, 1, 4 - 2e-5], [4, 1, 4 - 2e-4], [-4, -1, -1], [0, 0, -1]], np.float32)
    own = np.array([2, 2, 2, IGNORED])
    assert evaluate.best_answers(logits, own).tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("logits", [[0, 0, 0], [7, 7, 7], [np.inf, 1, 2], [1, np.nan, 0]])
def test_who_knows_nothing_agrees_with_nobody(logits: list[float]) -> None:
    named = evaluate.best_answers(np.array([logits], np.float32), np.array([2]))
    assert named.tolist() != [2]


def test_choosing_prefers_steps_that_the_export_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that overshoot let rounding grow: the one that looks best must not be taken for it."""
    task = small()
    network = CONTESTANTS["titans-ssm"].build(task.vocab_size).eval()
    right = examples(task.development[0], evaluate._DEVELOPMENT).targets
    wrong = np.where(right == IGNORED, IGNORED, 0)
    monkeypatch.setattr(
        evaluate, "titans_answers", lambda _, way, __: right if way.editor.step > 1 else wrong
    )
    monkeypatch.setattr(evaluate, "runtime_answers", lambda *_: wrong)
    (way,) = evaluate.chosen_ways(task, network, None, ["readout"])
    assert way.editor is not None
    assert way.editor.step == 0.3
    monkeypatch.setattr(evaluate, "runtime_answers", lambda *_: right)
    (way,) = evaluate.chosen_ways(task, network, None, ["readout"])
    assert way.editor is not None
    assert way.editor.step == 3.0


def test_another_trainings_state_is_refused(tmp_path: Path) -> None:
    Training(small(), "lstm", 0, Recipe(steps=2)).run(tmp_path)
    with pytest.raises(DataError, match="another training"):
        Training(small(), "lstm", 1, Recipe(steps=2)).run(tmp_path)
    later = replace(small(), curriculum=(0.4, 0.9))  # a task's recipe of another day
    with pytest.raises(DataError, match="another training"):
        Training(later, "lstm", 0, Recipe(steps=2)).run(tmp_path)


def test_training_learns() -> None:
    training = Training(replace(small(), batch=16), "lstm", 0, Recipe(steps=40))
    losses = []
    for step in range(40):
        training.advance(step)
        losses.append(training.loss)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_scores_count_answers_and_examples() -> None:
    targets = np.array([[IGNORED, 1, 2], [IGNORED, 3, 4]])
    own = np.array([[IGNORED, 1, 2], [IGNORED, 3, 5]])
    assert scored(Batch(targets, targets), own) == {"token": 0.75, "exact": 0.5, "examples": 2}


def test_answers_do_not_depend_on_how_rows_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = CONTESTANTS["titans-ssm"].build(MQAR.vocab_size).eval()
    batch = examples(small().tests[1], 0)
    whole = answers(network, batch)
    for tokens in (1, 2 * batch.tokens.shape[1]):
        monkeypatch.setattr(evaluate, "_AT_ONCE", tokens)
        assert np.array_equal(answers(network, batch), whole)
    assert np.array_equal(whole == IGNORED, batch.targets == IGNORED)


@pytest.mark.parametrize("contestant", ["lstm", "titans-ssm"])
def test_who_guesses_is_asked_no_longer_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contestant: str
) -> None:
    tests = tuple(replace(test, examples=3) for test in MQAR.tests[:5:2])
    task = replace(small(), ways=(), ends=tests[1].size, tests=tests)

    monkeypatch.setattr(evaluate, "export_bundle", lambda *_: None)
    monkeypatch.setattr(evaluate.tr, "load", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "runtime_answers", lambda _, __, ___, own: own)

    def asked(right: bool) -> int:
        monkeypatch.setattr(
            evaluate, "answers", lambda _, batch: batch.targets if right else 0 * batch.targets
        )
        (row,) = trainings.measured(task, contestant, 0, 1, tmp_path)
        return len(row["scores"])

    assert (asked(right=True), asked(right=False)) == (3, 2)


@pytest.mark.parametrize(("right", "ends"), [(0, True), (9, True), (15, True), (17, False), (100, False)])
def test_guessing_is_two_deviations_above_chance_at_most(right: int, ends: bool) -> None:
    task = replace(small(), chance=0.1, ends=8)
    score = {"token": right / 100, "examples": 100}
    for size in (7, 8, 9):
        test = replace(task.tests[0], size=size)
        assert evaluate.ended(task, test, score) is (ends and size == 8)
        assert not evaluate.ended(replace(task, ends=None), test, score)


def test_long_examples_are_not_edited_by_prediction() -> None:
    way = Way("prediction", (0.0, 0.0), Editor(objective="prediction", step=0.1, chunk=8))
    assert way.takes(Batch(np.zeros((1, 150), int), np.zeros((1, 150), int)))
    assert not way.takes(Batch(np.zeros((1, 5_000), int), np.zeros((1, 5_000), int)))
    assert way.setting == "λ = 0, prediction:step=0.1,chunk=8"
    assert Way("fused", (1.0, 0.0)).setting == "λ = (1, 0)"


def test_trainings_side_by_side_find_what_they_find_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command itself: what a process of a pool is given must not lie in the module that is run."""
    arguments = ["selective", "--seeds", "5", "6", "--contestants", "lstm", "--steps", "1"]
    both = [sys.executable, "-m", "benchmarks.experiments", *arguments, "--jobs", "2"]
    root = Path(command.__file__).parents[2]
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "both")]
    done = subprocess.run([*both, *folders], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone = ["--out", str(tmp_path / "alone"), "--results", str(tmp_path / "one")]
    monkeypatch.setattr("sys.argv", ["experiments", *arguments, *alone])
    assert command.main() == 0
    found = [json.loads((tmp_path / name / "selective-1.json").read_text()) for name in ("both", "one")]
    assert sorted(found[0], key=lambda row: row["seed"]) == found[1]
    assert [row["seed"] for row in found[1]] == [5, 6]


def test_one_command_trains_asks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EXPERIMENTS, "mqar", (small(),))
    arguments = ["experiments", "mqar", "--seeds", "0", "--steps", "2"]
    arguments += ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", [*arguments, "--contestants", "s4d", "titans-ssm"])
    assert command.main() == 0
    rows = json.loads((tmp_path / "results" / "mqar-2.json").read_text())
    ways = [(row["contestant"], row["way"]) for row in rows]
    assert ways == [
        ("s4d", "as trained"),
        *(("titans-ssm", way) for way in ("as trained", "fused", "readout", "prediction")),
    ]
    for row in rows:
        for score in row["scores"].values():
            assert score["examples"] == 5
            if row["way"] in ("as trained", "fused", "readout") and row["contestant"] == "titans-ssm":
                assert score["agree"] == 5
    assert (tmp_path / "results" / "mqar-2.png").read_bytes().startswith(b"\x89PNG")
    written = capsys.readouterr().out
    assert "`python -m benchmarks.experiments mqar --steps 2`\n\n![mqar](mqar-2.png)" in written
    assert "Titans LMM, trained λ = 0, edited at test time (readout)" in written
    assert "mqar: transformer (seeds 0, 1, 2)" in written
    assert "No model: what followed the last 4, 2 or 1 tokens before | | 100.0 |" in written
    assert "s4d (seeds 1, 2)" in written

    # What has results is not done again.
    monkeypatch.setattr(trainings, "measured", pytest.fail)
    assert command.main() == 0

    for wrong in (["--jobs", "0"], ["--seeds", "3", "-1"]):
        monkeypatch.setattr("sys.argv", [*arguments, *wrong])
        assert command.main() == 2
        assert f"{wrong[0]} {wrong[-1]}: must be" in capsys.readouterr().err


def test_all_take_part_and_no_quick_one_goes_first() -> None:
    for task in ("induction", "mqar"):
        names = slowest_first(task)
        assert sorted(names) == sorted(entrants(task))
        assert set(names[-3:]) == {"transformer", "s4d", "lstm"}


def test_each_number_of_steps_has_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERIMENTS, "mqar", (replace(small(), steps=3),))
    arguments = ["experiments", "mqar", "--seeds", "0", "0", "--contestants", "lstm", "lstm"]
    arguments += ["--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    for steps in ([], ["--steps", "2"], ["--steps", "3"]):
        monkeypatch.setattr("sys.argv", [*arguments, *steps])
        assert command.main() == 0
    for name, steps in (("mqar", 3), ("mqar-2", 2)):
        (row,) = json.loads((tmp_path / f"{name}.json").read_text())
        assert row["steps"] == steps
        assert f"![mqar]({name}.png)" in (tmp_path / f"{name}.md").read_text()
    assert not (tmp_path / "mqar-3.json").exists()  # the task's own number, however it is said


def test_what_is_not_trained_keeps_its_weights(tmp_path: Path) -> None:
    rows = trainings.measured(replace(small(), ways=()), "titans-untrained", 4, 50, tmp_path)
    assert [(row["steps"], row["loss"], row["way"]) for row in rows] == [(50, None, "as trained")]
    torch.manual_seed(4)
    drawn = CONTESTANTS["titans-untrained"].build(MQAR.vocab_size)
    kept = load_checkpoint(tmp_path / "mqar" / "titans-untrained-4-50" / CHECKPOINT)
    assert torch.equal(kept.head.weight, drawn.head.weight)


def test_a_table_has_mean_and_spread() -> None:
    task = small()
    names = [f"{test.group}/{test.label}" for test in task.tests]
    rows = [
        {
            "task": "mqar",
            "contestant": "lstm",
            "way": "as trained",
            "setting": "",
            "seed": seed,
            "steps": 9,
            "parameters": 100_000,
            "scores": {name: {"token": share, "exact": 0.0, "examples": 4} for name in names},
        }
        for seed, share in enumerate((0.25, 0.75))
    ]
    text = table("mqar", (task,), rows, [0, 1, 2], {"mqar": 9})
    assert "| LSTM | 100 k | 50.0 (25.0-75.0) |" in text
    assert "mqar: lstm (seed 2)" in text
    assert "is asked no longer" not in text


def test_a_cell_says_if_not_every_seed_was_asked() -> None:
    """It shows those that do well."""
    task = replace(small(), ends=8)
    first, second, third = (f"{test.group}/{test.label}" for test in task.tests)
    row = {
        "task": "mqar",
        "contestant": "lstm",
        "way": "as trained",
        "setting": "",
        "steps": 9,
        "parameters": 1000,
    }
    score, better = ({"token": share, "exact": share, "examples": 4} for share in (0.5, 0.75))
    rows = [
        {**row, "seed": 0, "scores": {first: better, second: score, third: score}},
        {**row, "seed": 1, "scores": {first: score, second: score}},
    ]
    text = table("mqar", (task,), rows, [0, 1], {"mqar": 9})
    cells = text[text.index("| LSTM") :].splitlines()[0].split(" | ")
    assert cells[2:4] == ["62.5 (50.0-75.0)", "50.0"]
    other = text[text.rindex("| LSTM") :].splitlines()[0].split(" | ")
    assert other[2] == "50.0 (1 of 2)"
    assert "who answers no more of 8 than guessing would" in text
