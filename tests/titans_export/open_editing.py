"""Open editing by the float64 token loop: what a session with an editor must answer.

Plain gradient descent with autograd's gradients, period by period: the model runs over a period from the
state before it, the memories of that state take one step, and the model runs over the period again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.runtime.streams import Array
from titans_export.goldens import _token_loop_rule
from titans_export.gradients import association, editable, prediction
from titans_export.memory.reference import reference_recurrence
from titans_export.memory_layer import State
from titans_export.model import Rules, TitansModel
from titans_export.training.checkpoint import load_checkpoint

Gradients = Callable[[Tensor, Tensor, State], dict[str, Tensor]]


def token_loop(checkpoint: Path, dtype: torch.dtype = torch.float64) -> TitansModel:
    """The model of a checkpoint with the oracle's rules."""
    model = load_checkpoint(checkpoint)
    reference = TitansModel(model.config, Rules(_token_loop_rule, reference_recurrence))
    reference.load_state_dict(model.state_dict())
    return reference.to(dtype).eval().requires_grad_(False)


class OpenOracle:
    """A stream that learns: ``objective`` with steps of ``step`` on periods of ``chunk`` tokens."""

    def __init__(self, model: TitansModel, objective: str, step: float, chunk: int, edit: float) -> None:
        """``model``: see :func:`token_loop`."""
        self.model, self.objective, self.step, self.chunk = model, objective, step, chunk
        self.edit = torch.full((1, model.config.layers), edit, dtype=model.head.weight.dtype)
        self.state = model.initial_state(1)
        self.largest = 0.0
        """Norm of the largest memory that a step has left."""

    def run(self, text: bytes) -> Array:
        """Logits of a whole stream."""
        ids = torch.tensor([list(text)])
        logits = []
        for start in range(0, ids.shape[1], self.chunk):
            period, target = ids[:, start : start + self.chunk], ids[:, start + 1 : start + 1 + self.chunk]
            scores, after = self._forward(period, self.state)
            logits.append(scores)
            if target.shape[1] == self.chunk:
                after = self._learnt(period, target, after)
            self.state = after
        return torch.cat(logits, dim=1)[0].numpy()

    def _learnt(self, period: Tensor, target: Tensor, after: State) -> State:
        """The state after the period, had its memories begun where the step moves them."""
        found = self._gradients(period, target)
        moved = {name: self.state[name] - self.step * gradient for name, gradient in found.items()}
        self.largest = max(self.largest, *(float(memory.norm()) for memory in moved.values()))
        if "readout" in moved:
            return after | moved
        return self._forward(period, self.state | moved)[1]

    def _gradients(self, period: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.objective == "association":
            found = association(self.model, period, self.edit, self.state)
        elif self.objective == "prediction":
            found = prediction(self.model, period, target, self.edit, self.state)
        else:
            return {"readout": self._readout_gradient(period, target)}
        return {name: found[f"grad.{name}"] for name in editable(self.model)}

    def _readout_gradient(self, period: Tensor, target: Tensor) -> Tensor:
        leaf = self.state["readout"].clone().requires_grad_()
        with torch.enable_grad():
            logits = self.model(period, self.edit, self.state | {"readout": leaf}).logits
            loss = torch.nn.functional.cross_entropy(logits[0], target[0], reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]

    @torch.no_grad()
    def _forward(self, period: Tensor, state: State) -> tuple[Tensor, State]:
        output = self.model(period, self.edit, state)
        return output.logits, state | output.state
