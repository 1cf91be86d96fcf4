"""The model in PyTorch eager: what ``eager`` and ``eager-loop`` time, and what other backends build on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from titans_export.memory import token_loop
from titans_export.memory.reference import reference_recurrence
from titans_export.model import Rules, State, TitansModel
from titans_export.training.checkpoint import load_checkpoint
from titans_runtime.backends import Array
from titans_runtime.bench.peers import Job
from titans_runtime.forward import SEGMENT

Step = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]
"""Tokens ``(B, T)``, edit strength ``(B, layers)`` and past state → logits and present state."""


class TorchRunner:
    """Streams through a function of the model's state; long inputs in segments, as in the runtime."""

    is_model = True

    def __init__(self, model: TitansModel, step: Step, versions: Mapping[str, str] | None = None) -> None:
        """``step``: runs ``model``, whatever has been made of it."""
        self._model, self._step = model, step
        self.versions: Mapping[str, str] = {"torch": torch.__version__, **(versions or {})}
        self._edit = torch.empty(0)
        self._state: State = {}

    @torch.inference_mode()
    def start(self, batch: int, edit: float) -> None:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        self._edit = torch.full((batch, self._model.config.layers), edit)
        # Real memory for every row: a learned memory is one row, expanded.
        self._state = {name: x.contiguous() for name, x in self._model.initial_state(batch).items()}

    @torch.inference_mode()
    def append(self, ids: Array) -> Array:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        parts = []
        for part in torch.from_numpy(ids).split(SEGMENT, dim=1):
            logits, present = self._step(part, self._edit, self._state)
            self._state |= present
            parts.append(logits)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        array: Array = whole.numpy()
        return array

    def close(self) -> None:
        """Let go of the model and what was made of it."""
        del self._step, self._model
        self._state = {}


def open_model(job: Job) -> TitansModel:
    """The checkpoint's model, with as many threads for PyTorch as the job has.

    Raises:
        EnvironmentProblem: no checkpoint was given, or an editor was.
        DataError: the checkpoint is damaged.
    """
    folder = job.needed_checkpoint()
    torch.set_num_threads(job.threads)
    return load_checkpoint(folder)


def step_of(model: TitansModel) -> Step:
    """``model`` as it is."""

    def step(ids: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        output = model(ids, edit, state)
        return output.logits, output.state

    return step


def with_rules(model: TitansModel, rules: Rules) -> TitansModel:
    """The same weights with other functions for the memory."""
    copy = TitansModel(model.config, rules)
    copy.load_state_dict(model.state_dict(), assign=True)
    return copy.eval()


def load(job: Job) -> TorchRunner:
    """The tile form: what training runs."""
    model = open_model(job)
    return TorchRunner(model, step_of(model))


def load_loop(job: Job) -> TorchRunner:
    """One token after the other, as the rule is written."""

    def exact(*tensors: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        del tile
        return token_loop(*tensors)

    model = with_rules(open_model(job), Rules(exact=exact, recurrence=reference_recurrence))
    return TorchRunner(model, step_of(model))
