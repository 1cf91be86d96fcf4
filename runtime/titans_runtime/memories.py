"""Editing the memories of a model's layers along a stream, through an exported gradient graph.

Period ``n`` is the positions ``n·chunk … (n+1)·chunk - 1`` of the stream. The model runs on them as ever,
and scores them with the memory as it was. Once the target of the last one is known, the editor goes
back to the state before the period, takes its steps on the gradient of the whole period, and lets the
model run over the period again. So every prediction is made before the memory sees its target.

Nothing here knows an architecture: a gradient graph is used by the names of its tensors alone.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from titans_runtime.backends import DTYPES, Array, Arrays, Backend
from titans_runtime.buffers import StateBuffers
from titans_runtime.editor import Editor, chosen_memories, decays
from titans_runtime.errors import NumericsError
from titans_runtime.magnitude import NOT_FINITE, fault
from titans_runtime.manifest import GraphSpec, TensorSpec
from titans_runtime.optimizers import OPTIMIZERS, Gates, Step
from titans_runtime.report import EditReport, Lesson
from titans_runtime.snapshot import PREFIX

_READOUT = "readout"
UNKNOWN = -1
"""Target of a position whose next token has not come, or must not be learnt from."""


@dataclass(frozen=True)
class _Progress:
    """What the optimizer keeps of each memory; replaced as a whole, never changed."""

    moments: dict[str, Arrays]
    count: int = 0


@dataclass(frozen=True)
class MemoriesMark:
    """Everything that :meth:`MemoriesEditor.rewind` returns to."""

    count: int
    sequence: Array
    targets: Array
    taught: Array
    anchor: Arrays
    progress: _Progress


class MemoriesEditor:
    """The pending period of one session, and the optimizer's progress."""

    def __init__(
        self, editor: Editor, backend: Backend, buffers: StateBuffers, edit: Array, *, beside_readout: bool
    ) -> None:
        """Find the graph and the memories.

        Args:
            editor: objective, optimizer and policy.
            backend: holds the gradient graph and ``model``.
            buffers: the session's state.
            edit: ``(1, layers)``, the session's strength of the fused rule, read at every step.
            beside_readout: whether another editor changes the readout memory meanwhile.

        Raises:
            UsageError: the bundle has no such graph, or no memory fits the editor's patterns.
        """
        manifest = backend.manifest
        self.editor = editor
        self._manifest, self._buffers, self._edit = manifest, buffers, edit
        self._backend = backend
        self._memories = chosen_memories(editor, manifest)
        self._spec = manifest.graphs[editor.graph]
        self._optimizer = OPTIMIZERS[editor.optimizer](size=editor.step, **decays(editor))
        self._progress = _Progress(self._no_moments())
        spec = manifest.sequence
        width = [axis for axis in spec.shape if isinstance(axis, int)]
        self.count = 0
        self.spent = 0.0  # seconds of editing in the call at hand
        if editor.budget:
            backend.graph(editor.graph)  # loaded when first used, otherwise: within somebody's budget
        self._sequence = np.zeros((editor.chunk, *width), DTYPES[spec.dtype])
        self._targets = np.full(editor.chunk, UNKNOWN, np.int64)
        self._taught = np.zeros(editor.chunk, bool)
        self._anchor: Arrays = {}  # what the model, or another editor, changes, as the period began
        # By the period's end the other editor has learnt its targets: a loss with that memory would be of
        # what is known already.
        reads = any(tensor.name == f"past.{_READOUT}" for tensor in self._spec.inputs)
        self._beside = (_READOUT,) if beside_readout and reads else ()

    # --- along the stream

    def room(self, position: int) -> int:
        """Positions from ``position`` to the end of its period."""
        return self.editor.chunk - position % self.editor.chunk

    def will_learn(self, position: int, tokens: int) -> bool:
        """Whether ``tokens`` more from ``position`` on complete a period."""
        ended = self.count > 0 and position % self.editor.chunk == 0
        return ended or tokens > self.room(position)

    def arrive(self, token: Array, position: int, teach: bool, report: EditReport) -> None:
        """Note the token that comes at ``position``; learn if that completes a period.

        Args:
            token: id of the target of the last pending position, or a vector, which is none.
            position: where it stands in the stream.
            teach: whether it is to be learnt from.
            report: receives what was learnt.

        Raises:
            NumericsError: a step is not finite, and the editor does not take it back by itself.
        """
        if self.count:
            if teach and token.ndim == 0:
                self._targets[self.count - 1] = token
            if position % self.editor.chunk == 0:
                self._learn(position, report)
        if self.count == 0:
            fixed = self._buffers.fixed
            self._anchor = self._buffers.copies() | {name: fixed[name].copy() for name in self._beside}

    def hold(self, tokens: Array, teach: bool) -> None:
        """Keep positions that the model has run on; they do not reach beyond the period."""
        rows = slice(self.count, self.count + len(tokens))
        self._sequence[rows] = tokens
        self._taught[rows] = teach
        self._targets[rows] = UNKNOWN
        if teach and tokens.ndim == 1:
            self._targets[self.count : self.count + len(tokens) - 1] = tokens[1:]
        self.count += len(tokens)

    def hand_over(self, token: Array, position: int, report: EditReport) -> None:
        """Learn from all pending positions, whose last target is ``token``: another editor takes over."""
        if self.count:
            if token.ndim == 0:
                self._targets[self.count - 1] = token
            self._learn(position, report)

    def finish(self, position: int, report: EditReport) -> None:
        """Learn from the pending positions, as far as their targets are known."""
        if self.count:
            self._learn(position, report)

    # --- snapshots

    def arrays(self) -> Arrays:
        """Copies of all that continuing needs, by name."""
        found: Arrays = {f"{PREFIX}steps": np.array([self._progress.count], np.int64)}
        for memory, moments in self._progress.moments.items():
            found |= {f"{PREFIX}{kind}.{memory}": array.copy() for kind, array in moments.items()}
        if self.count:
            found[f"{PREFIX}sequence"] = self._sequence[: self.count].copy()
            found[f"{PREFIX}targets"] = self._targets[: self.count].copy()
            found[f"{PREFIX}taught"] = self._taught[: self.count].astype(np.int64)
            found |= {f"{PREFIX}anchor.{name}": array.copy() for name, array in self._anchor.items()}
        return found

    def take_up(self, arrays: Arrays) -> None:
        """Continue from a snapshot; without what an editor has left, from the beginning."""
        self.count = 0
        moments = {
            memory: {
                kind: arrays.get(f"{PREFIX}{kind}.{memory}", zero).copy() for kind, zero in kinds.items()
            }
            for memory, kinds in self._no_moments().items()
        }
        steps = arrays.get(f"{PREFIX}steps")
        self._progress = _Progress(moments, 0 if steps is None else int(steps[0]))
        sequence = arrays.get(f"{PREFIX}sequence")
        if sequence is None:
            return
        self.count = len(sequence)
        self._sequence[: self.count] = sequence
        self._targets[: self.count] = arrays[f"{PREFIX}targets"]
        self._taught[: self.count] = arrays[f"{PREFIX}taught"]
        changed = (*self._buffers.present, *self._beside)
        self._anchor = {name: arrays[f"{PREFIX}anchor.{name}"].copy() for name in changed}

    def mark(self) -> MemoriesMark:
        """What :meth:`rewind` returns to."""
        return MemoriesMark(
            self.count,
            self._sequence.copy(),
            self._targets.copy(),
            self._taught.copy(),
            self._anchor,
            self._progress,
        )

    def rewind(self, mark: MemoriesMark) -> None:
        """Undo everything since the mark, but for the state itself, which is the caller's."""
        self.count, self._anchor, self._progress = mark.count, mark.anchor, mark.progress
        self._sequence[:], self._targets[:], self._taught[:] = mark.sequence, mark.targets, mark.taught

    # --- one period

    def _learn(self, position: int, report: EditReport) -> None:
        """Take the period's steps, if the policy lets it, and note what became of them."""
        began = time.perf_counter()
        count, self.count = self.count, 0
        lesson = Lesson(self.editor.objective, position - count, count)
        targets = self._targets[:count].copy()
        lesson.learnt = (
            int((targets >= 0).sum()) if self._predicts else int(self._taught[:count].all()) * count
        )
        lesson.refused = self._refusal_before(lesson)
        if not lesson.refused:
            self._take_steps(lesson, self._sequence[:count], targets, began)
        if not lesson.steps:
            lesson.learnt = 0
        lesson.seconds = time.perf_counter() - began
        self.spent += lesson.seconds
        report.add(lesson)

    @property
    def _predicts(self) -> bool:
        """Whether the loss is of predictions: then a position teaches once its target is known."""
        return any(tensor.name == "target_ids" for tensor in self._spec.inputs)

    def _refusal_before(self, lesson: Lesson) -> str:
        if not lesson.learnt:
            return "no text to learn from"
        if 0 < self.editor.budget <= 1000 * self.spent:
            return "time budget spent"
        return ""

    def _take_steps(self, lesson: Lesson, sequence: Array, targets: Array, began: float) -> None:
        """Change the anchor's memories step by step, then let the model run over the period again."""
        editor = self.editor
        values = {name: self._anchor[name] for name in self._memories}
        found = self._evaluate(values, sequence, targets)
        lesson.loss = float(found["loss"][0]) / lesson.learnt
        lesson.parts = {
            name.removeprefix("loss."): float(array[0]) / lesson.learnt
            for name, array in found.items()
            if name.startswith("loss.")
        }
        if lesson.loss < editor.threshold:
            lesson.refused = "not surprising enough"
            return
        for number in range(editor.steps):
            if number and 0 < editor.budget <= 1000 * (self.spent + time.perf_counter() - began):
                lesson.refused = "time budget spent"
                break
            after, progress, norms = self._step(values, found, first=number == 0)
            what, bad = _fault(after, progress, norms)
            if bad and not editor.rollback:
                raise NumericsError(
                    f"after a step of {editor.objective} {what} is {bad}; "
                    "the session is as it was before the call"
                )
            loss = math.nan
            if not bad and (editor.rollback or number + 1 < editor.steps):
                found = self._evaluate(after, sequence, targets)
                loss = float(found["loss"][0]) / lesson.learnt
            lesson.refused = self._refusal_after(lesson, loss, bad)
            if lesson.refused:
                break
            values, self._progress, lesson.norms = after, progress, norms
            lesson.steps += 1
            if editor.rollback or number + 1 < editor.steps:
                lesson.loss_after = loss
        if lesson.steps:
            self._write(values, sequence)

    def _refusal_after(self, lesson: Lesson, loss: float, bad: str) -> str:
        """Why a step that has led to ``loss`` is taken back; the steps before it are kept."""
        if bad or not self.editor.rollback:
            return bad
        if not math.isfinite(loss):
            return NOT_FINITE
        return "loss rose" if loss > (lesson.loss_after if lesson.steps else lesson.loss) else ""

    def _step(self, values: Arrays, found: Arrays, first: bool) -> tuple[Arrays, _Progress, dict[str, float]]:
        """Memories after one step on the gradients in ``found``, the optimizer's progress, and norms.

        ``first``: whether it is the period's first step.
        """
        gradients = {name: found[f"grad.{name}"] for name in self._memories}
        norms = {name: _norm(gradient) for name, gradient in gradients.items()}
        whole, clip = math.hypot(*norms.values()), self.editor.clip
        after, moments = {}, {}
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and refused
            if 0 < clip < whole:
                gradients = {name: _scaled(gradient, clip / whole) for name, gradient in gradients.items()}
            for name, gradient in gradients.items():
                kept = self._moments(name, first)
                given = Step(gradient, kept, self._progress.count, self._gates(name, found))
                after[name], moments[name] = self._optimizer.step(values[name], given)
        return after, replace(self._progress, moments=moments, count=self._progress.count + 1), norms

    def _moments(self, memory: str, first: bool) -> Arrays:
        """The optimizer's moments. Where it takes the model's place, a period begins with the model's own."""
        moments, own = self._progress.moments[memory], self._own_momentum(memory)
        return moments | {"momentum": self._anchor[own]} if first and own else moments

    def _own_momentum(self, memory: str) -> str:
        """Name of the model's momentum that the optimizer goes on with; empty where it keeps its own."""
        head, _, tail = memory.rpartition("memory")
        own = f"{head}momentum{tail}"
        shared = self.editor.replace and getattr(self._optimizer, "shares_momentum", False)
        return own if shared and own in self._anchor else ""

    def _gates(self, memory: str, found: Arrays) -> Gates:
        return Gates(*(found.get(f"gate.{memory}.{name}") for name in ("retention", "momentum", "step")))

    def _evaluate(self, values: Arrays, sequence: Array, targets: Array) -> Arrays:
        """The gradient graph at the state before the period, with ``values`` as its memories."""
        past = self._buffers.fixed | self._anchor | values
        given = {
            self._manifest.sequence.name: sequence[None],
            "target_ids": targets[None],
            "edit": self._edit,
        }
        given |= {f"past.{name}": array for name, array in past.items()}
        return _run(self._backend, self.editor.graph, self._spec, given, len(sequence))

    def _write(self, values: Arrays, sequence: Array) -> None:
        """Let the state after the period follow from the edited state before it."""
        if self.editor.replace:
            names = {name: self._own_momentum(name) for name in values}
            own = {own: self._progress.moments[name]["momentum"] for name, own in names.items() if own}
            self._buffers.overwrite(values | own)
            return
        spec = self._manifest.graphs["model"]
        past = self._buffers.fixed | self._anchor | values
        given = {self._manifest.sequence.name: sequence[None], "edit": self._edit}
        given |= {f"past.{name}": array for name, array in past.items()}
        present = {f"present.{name}": array for name, array in self._buffers.present.items()}
        inputs = {tensor.name: np.ascontiguousarray(given[tensor.name]) for tensor in spec.inputs}
        scores = self._manifest.scores
        outputs = {scores.name: _room(scores, len(sequence))} | present
        self._backend.graph("model").bind(inputs, outputs).run()

    def _no_moments(self) -> dict[str, Arrays]:
        shapes = {entry.name: (1, *entry.row_shape) for entry in self._manifest.state}
        return {
            memory: {kind: np.zeros(shapes[memory], np.float32) for kind in self._optimizer.moments}
            for memory in self._memories
        }


def _run(backend: Backend, name: str, spec: GraphSpec, given: Arrays, tokens: int) -> Arrays:
    inputs = {tensor.name: np.ascontiguousarray(given[tensor.name]) for tensor in spec.inputs}
    outputs = {tensor.name: _room(tensor, tokens) for tensor in spec.outputs}
    backend.graph(name).bind(inputs, outputs).run()
    return outputs


def _room(tensor: TensorSpec, tokens: int) -> Array:
    """Room for one row of an output."""
    free = {"batch": 1, "tokens": tokens}
    shape = [free[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
    return np.empty(shape, DTYPES[tensor.dtype])


def _fault(after: Arrays, progress: _Progress, norms: dict[str, float]) -> tuple[str, str]:
    """What of a step must not be kept, and why; two empty texts where all may.

    A memory can be finite where gradient and moments are not: what is divided by infinity is zero, in this
    step and in all later ones.
    """
    if bad := next(filter(None, map(fault, after.values())), ""):
        return "a memory", bad
    for moments in progress.moments.values():
        for kind, array in moments.items():
            if not np.isfinite(array).all():
                return f"the optimizer's {kind}", NOT_FINITE
    return ("", "") if math.isfinite(math.hypot(*norms.values())) else ("the gradient", NOT_FINITE)


def _norm(array: Array) -> float:
    """Euclidean norm. In float64: in float32 the squares of numbers beyond 1e19 are infinite."""
    flat = array.reshape(-1).astype(np.float64)
    return math.sqrt(float(np.dot(flat, flat)))


def _scaled(gradient: Array, factor: float) -> Array:
    """In float64, too: a factor that brings the largest gradients down is zero in float32."""
    scaled: Array = (gradient * np.float64(factor)).astype(gradient.dtype)
    return scaled
