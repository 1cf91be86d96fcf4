"""Answers of a trained contestant: in PyTorch, and of Titans through its exported bundle, too."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import titans_runtime as tr
from benchmarks.experiments.contestants import CONTESTANTS
from benchmarks.experiments.contestants.network import SEGMENT, Network
from benchmarks.experiments.contestants.titans import Titans, strengths
from benchmarks.experiments.tasks.task import IGNORED, Batch, Ids, Task, Test, examples
from titans_export.peers.autograd import AutogradRunner
from titans_export.pipeline import export_bundle
from titans_runtime.progress import progress_bar

_TOKENS = 131_072
"""Of a call in PyTorch, over all rows."""
_AT_ONCE = 8_192
"""The same where streams go segment by segment: what is computed of so many fits in cache."""
_MEMORIES = 2**20
"""Numbers in the readout memories of a call: every row has its own, and all should stay in cache."""
_STRENGTHS = (0.03, 0.1, 0.3, 1.0)
_STEPS = {"readout": (0.3, 1.0, 3.0, 10.0), "prediction": (0.001, 0.01, 0.1, 1.0)}
_CHUNK = {"readout": 8, "prediction": 16}
_LONGEST = {"prediction": 200, "readout": 5_000}
"""Tokens of the longest examples that are edited so, in PyTorch by autograd: longer ones would take hours."""
_TIE = 1e-5
"""Of the logits' range: answers closer than this are tied, and rounding decides which is named."""
_DEVELOPMENT = 10_000
"""Numbers of development tests begin here."""


@dataclass(frozen=True)
class Way:
    """How a Titans model is run.

    Attributes:
        name: ``as trained``, ``off``, ``fused``, ``readout`` or ``prediction``.
        edit: ``λ`` of every layer.
        editor: of the open way.
    """

    name: str
    edit: tuple[float, ...]
    editor: tr.Editor | None = None

    @property
    def setting(self) -> str:
        """In words."""
        fused = "λ = " + " and ".join(f"{value:g}" for value in dict.fromkeys(self.edit))
        if len(set(self.edit)) > 1:
            fused = f"λ = ({', '.join(f'{value:g}' for value in self.edit)})"
        if self.editor is None:
            return fused
        return f"{fused}, {self.editor.objective}:step={self.editor.step:g},chunk={self.editor.chunk}"

    def takes(self, batch: Batch) -> bool:
        """Whether examples of this length are run so."""
        longest = _LONGEST.get(self.editor.objective) if self.editor else None
        return longest is None or batch.tokens.shape[1] <= longest


def evaluated(
    task: Task, contestant: str, network: Network, checkpoint: Path, bundle: Path
) -> list[dict[str, Any]]:
    """Scores of every way to run ``network``, ``{"way", "setting", "scores"}``.

    Args:
        task: its tests are asked; its development examples choose how to edit.
        contestant: says which ways there are.
        network: trained.
        checkpoint: of Titans, to export.
        bundle: where the export goes.
    """
    tests = [(test, examples(test, number)) for number, test in enumerate(task.tests)]
    if not isinstance(network, Titans):
        scores = _scores(task, tests, lambda batch: scored(batch, answers(network, batch)))
        return [{"way": "as trained", "setting": "", "scores": scores}]
    ways = [Way("as trained", network.edit)]
    names = [name for name in CONTESTANTS[contestant].ways if name in task.ways]
    export_bundle(checkpoint, bundle)
    model = tr.load(bundle, threads=torch.get_num_threads())
    ways += chosen_ways(task, network, model, names)
    rows = []
    for way in ways:
        suited = progress_bar([one for one in tests if way.takes(one[1])], f"{contestant}, {way.name}")
        scores = _scores(task, suited, partial(_score_of_both, network, model, way))
        rows.append({"way": way.name, "setting": way.setting, "scores": scores})
    return rows


def _scores(
    task: Task, tests: Iterable[tuple[Test, Batch]], ask: Callable[[Batch], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Of every test that a row is asked."""
    scores = {}
    for test, batch in tests:
        scores[key(test)] = ask(batch)
        if ended(task, test, scores[key(test)]):
            break
    return scores


def _score_of_both(network: Titans, model: tr.Model, way: Way, batch: Batch) -> dict[str, Any]:
    """PyTorch's score, and how many examples the export answers alike."""
    own = titans_answers(network, way, batch)
    theirs = runtime_answers(model, way, batch, own)
    return scored(batch, own) | {"agree": int((own == theirs).all(axis=1).sum())}


def ended(task: Task, test: Test, score: dict[str, Any]) -> bool:
    """Whether a row that answered ``test`` so is asked no longer one: see ``ends`` of :class:`Task`.

    Guessing is what lies within two standard deviations of chance, one answer an example.
    """
    if test.size != task.ends:
        return False
    deviation = math.sqrt(task.chance * (1 - task.chance) / score["examples"])
    return bool(score["token"] <= task.chance + 2 * deviation)


def key(test: Test) -> str:
    """A test's name in results."""
    return f"{test.group}/{test.label}"


def scored(batch: Batch, own: Ids) -> dict[str, Any]:
    """Shares of answers, and of examples with all their answers, that are right."""
    asked = batch.targets != IGNORED
    right = own == batch.targets
    return {
        "token": round(float(right[asked].mean()), 5),
        "exact": round(float((right | ~asked).all(axis=1).mean()), 5),
        "examples": len(right),
    }


def chosen_ways(task: Task, network: Titans, model: tr.Model, names: Sequence[str]) -> list[Way]:
    """The best setting of every way to edit, by development examples alone; the first of equals.

    Steps of an open editor that overshoot let rounding grow until PyTorch and the export answer differently:
    settings that both answer alike go before all others.
    """
    batches = [examples(test, _DEVELOPMENT + number) for number, test in enumerate(task.development)]
    layers, own = len(network.edit), network.edit
    candidates = {"fused": [Way("fused", edit) for edit in strengths(layers, _STRENGTHS)]}
    candidates["off"] = [Way("off", (0.0,) * layers)]
    for objective, steps in _STEPS.items():
        editors = [tr.Editor(objective=objective, step=step, chunk=_CHUNK[objective]) for step in steps]
        candidates[objective] = [Way(objective, own, editor) for editor in editors]
    best = []
    for ways in (candidates[name] for name in names):
        marks = {}
        for way in progress_bar(ways, f"choosing {ways[0].name}"):
            suited = [batch for batch in batches if way.takes(batch)]
            own = [titans_answers(network, way, batch) for batch in suited]
            alike = way.editor is None or all(
                np.array_equal(found, runtime_answers(model, way, batch, found))
                for found, batch in zip(own, suited, strict=True)
            )
            right = [scored(batch, found)["token"] for found, batch in zip(own, suited, strict=True)]
            marks[way] = (alike, np.mean(right))
        best.append(max(ways, key=lambda way: marks[way]))
    return best


def answers(network: Network, batch: Batch) -> Ids:
    """What the network answers where it is asked, ``(B, T)``; ``IGNORED`` elsewhere, and if not finite."""
    found = np.full(batch.targets.shape, IGNORED)
    tokens = batch.tokens.shape[1]
    most = _AT_ONCE // min(SEGMENT, tokens) if network.initial_state(1) else _TOKENS // tokens
    for rows in _calls(len(found), most):
        asked = torch.from_numpy(batch.targets[rows]) != IGNORED
        with torch.no_grad():
            features = network.features(torch.from_numpy(batch.tokens[rows]))
            best = network.head(features[asked]).argmax(-1)
        finite = torch.isfinite(features).flatten(1).all(1)
        found[rows][asked.numpy()] = best.numpy()
        found[rows][~finite.numpy()] = IGNORED
    return found


def titans_answers(network: Titans, way: Way, batch: Batch) -> Ids:
    """:func:`answers` of a Titans model run as ``way`` says; by autograd where it is edited openly."""
    if way.editor is None:
        with _strength(network, way.edit):
            return answers(network, batch)
    found = np.full(batch.targets.shape, IGNORED)
    runner = AutogradRunner(network.model.requires_grad_(False), way.editor)
    memory = network.model.config.readout_height * network.model.config.vocab_size
    for rows in _calls(len(found), min(_MEMORIES // memory, _TOKENS // batch.tokens.shape[1])):
        asked = batch.targets[rows] != IGNORED
        last = int(asked.any(axis=0).nonzero()[0][-1])
        runner.start(len(asked), way.edit[0])
        logits = runner.append(batch.tokens[rows][:, : last + 1])
        finite = np.isfinite(logits).all(axis=(1, 2))
        best = np.where(finite[:, None], logits.argmax(-1), IGNORED)
        found[rows][:, : last + 1] = np.where(asked[:, : last + 1], best, IGNORED)
    runner.close()
    return found


def runtime_answers(model: tr.Model, way: Way, batch: Batch, own: Ids) -> Ids:
    """:func:`answers` of the bundle, every example a session of its own; of tied ones, PyTorch's ``own``."""
    found = np.full(batch.targets.shape, IGNORED)
    for row, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True)):
        asked = np.flatnonzero(targets != IGNORED)
        session = model.session(edit=way.edit, editor=way.editor)
        with contextlib.suppress(tr.NumericsError):  # no answer, then
            logits = session.append(tokens[: asked[-1] + 1])
            found[row, asked] = best_answers(logits[asked], own[row, asked])
    return found


def best_answers(logits: npt.NDArray[np.float32], own: Ids) -> Ids:
    """The best of ``logits (N, V)``, and ``own (N,)`` where that is an answer as good to within rounding.

    Where all are as good, nothing is known, and no answer is taken for another.
    """
    best = logits.argmax(axis=-1)
    behind = logits.max(axis=-1) - np.take_along_axis(logits, own[:, None], axis=-1)[:, 0]
    tied = (own != IGNORED) & (behind < _TIE * np.ptp(logits, axis=-1))
    return np.where(tied, own, best)


@contextlib.contextmanager
def _strength(network: Titans, edit: tuple[float, ...]) -> Any:  # noqa: ANN401 - an iterator
    before, network.edit = network.edit, edit
    try:
        yield
    finally:
        network.edit = before


def _calls(count: int, most: int) -> list[slice]:
    """Rows of every call."""
    step = max(1, most)
    return [slice(start, start + step) for start in range(0, count, step)]


__all__ = [
    "Way",
    "answers",
    "best_answers",
    "chosen_ways",
    "ended",
    "evaluated",
    "key",
    "runtime_answers",
    "scored",
    "titans_answers",
]
