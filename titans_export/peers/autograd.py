"""``autograd``: what the open editor does, by PyTorch's autograd. For prefills, with ``--editor``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_export.model import State, TitansModel, state_schema
from titans_export.training.checkpoint import load_checkpoint
from titans_runtime.backends import Array
from titans_runtime.bench.peers import Job
from titans_runtime.editor import Editor
from titans_runtime.errors import EnvironmentProblem

_READOUT = "readout"


class AutogradRunner:
    """Chunks that are scored, learnt from, and where layers' memories have moved run again."""

    is_model = True

    def __init__(self, model: TitansModel, editor: Editor) -> None:
        """``editor``: plain gradient descent on ``readout`` or ``prediction``."""
        self._model, self._editor = model, editor
        schema = state_schema(model.config)
        memories = [name for name, entry in schema.items() if entry.role == "memory"]
        self._rerun = editor.objective == "prediction"
        self._edited = [name for name in memories if (name != _READOUT) == self._rerun]
        self.versions: Mapping[str, str] = {"torch": torch.__version__}
        self._edit = torch.empty(0)
        self._state: State = {}

    def start(self, batch: int, edit: float) -> None:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        self._edit = torch.full((batch, self._model.config.layers), edit)
        self._state = {name: x.detach().clone() for name, x in self._model.initial_state(batch).items()}

    def append(self, ids: Array) -> Array:
        """Take a whole stream; a chunk is learnt from when the token after it is there."""
        tokens, chunk = torch.from_numpy(ids), self._editor.chunk
        parts = []
        for start in range(0, tokens.shape[1], chunk):
            part, targets = tokens[:, start : start + chunk], tokens[:, start + 1 : start + 1 + chunk]
            learns = targets.shape[1] == chunk
            logits, present = self._learn(part, targets) if learns else self._run(part)
            parts.append(logits)
            self._state |= present
        array: Array = torch.cat(parts, dim=1).numpy()
        return array

    def close(self) -> None:
        """Let go of the state."""
        self._state = {}

    @torch.no_grad()
    def _run(self, part: Tensor) -> tuple[Tensor, State]:
        output = self._model(part, self._edit, self._state)
        return output.logits, output.state

    def _learn(self, part: Tensor, targets: Tensor) -> tuple[Tensor, State]:
        """Logits as they were before, and the state after."""
        variables = [self._state[name].requires_grad_() for name in self._edited]
        output = self._model(part, self._edit, self._state)
        loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, variables)
        for name, variable, gradient in zip(self._edited, variables, gradients, strict=True):
            self._state[name] = variable.detach() - self._editor.step * gradient
        if self._rerun:
            return output.logits.detach(), self._run(part)[1]
        return output.logits.detach(), {name: x.detach() for name, x in output.state.items()}


def load(job: Job) -> AutogradRunner:
    """The checkpoint's model under the job's editor.

    Raises:
        EnvironmentProblem: there is no editor, or one that this does not do.
    """
    editor = job.editor
    if job.checkpoint is None or editor is None:
        raise EnvironmentProblem(
            "does what an editor does, on the PyTorch model; give --editor and --checkpoint"
        )
    if editor.objective not in ("readout", "prediction") or editor.optimizer != "sgd":
        raise EnvironmentProblem("has plain gradient descent on readout and prediction only")
    torch.set_num_threads(job.threads)
    model = load_checkpoint(job.checkpoint)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return AutogradRunner(model, editor)
