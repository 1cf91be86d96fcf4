"""The associative loss of an imported model's memories, ``½ ‖f_M(k) - v‖²``, with its gradient written out.

Keys and values are those of a forward pass, and are not differentiated. The long-term tokens that a
transformer puts between its segments are no tokens of the input, and do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_export.importers.titans_pytorch.core import StoredCore
from titans_export.importers.titans_pytorch.keys import LibraryModel
from titans_export.importers.titans_pytorch.memory import LibraryMemory
from titans_export.importers.titans_pytorch.neural_memory import NeuralMemoryModel
from titans_export.importers.titans_pytorch.stream import Tensors
from titans_export.recurrence import Recurrence, run_core


class Association(nn.Module):
    """``(what the model sees, edit, past) → (loss, each memory's part, gradients, steps)``, in flat order.

    Attributes:
        past: names of the state entries that it is given; without a recurrence, the memories alone.
    """

    def __init__(self, model: LibraryModel, recurrence: Recurrence = run_core) -> None:
        """``recurrence``: what stands for a transformer's."""
        super().__init__()
        self.model, self.recurrence = model, recurrence
        self.weights = {
            prefix: [f"{prefix}memory.{i}" for i in range(len(memory.network.shapes()))]
            for prefix, memory in model.memories.items()
        }
        alone = isinstance(model, NeuralMemoryModel)
        self.past = [name for own in self.weights.values() for name in own] if alone else list(model.state())

    @property
    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Axes by name, in the order of :meth:`forward`'s results."""
        schema = self.model.state()
        batch: tuple[int | str, ...] = ("batch",)
        parts = {f"loss.{prefix}memory": batch for prefix in self.weights}
        own = [name for names in self.weights.values() for name in names]
        gradients = {f"grad.{name}": (*batch, *schema[name].shape) for name in own}
        heads = {name: schema[name].shape[0] for name in own}
        steps = {f"gate.{name}.step": (*batch, heads[name], "tokens") for name in own}
        return {"loss": batch, **parts, **gradients, **steps}

    def forward(self, *inputs: Tensor) -> Tensors:
        """Ids ``(B, T)`` or vectors; edit, for a transformer; then ``past``."""
        sequence, *rest = inputs
        stored = self._stored(sequence, tuple(rest))
        past = dict(zip(self.past, rest[-len(self.past) :], strict=True))
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        steps: list[Tensor] = []
        for memory, own, names in zip(
            self.model.memories.values(), stored, self.weights.values(), strict=True
        ):
            loss, gradient, step = self._of(memory, own, tuple(past[name] for name in names))
            losses.append(loss)
            gradients += gradient
            steps += [step] * len(names)
        return torch.stack(losses).sum(0), *losses, *gradients, *steps

    def _stored(self, sequence: Tensor, rest: Tensors) -> list[Tensor]:
        """What every memory stores of the tokens, ``(B, T, …)`` each."""
        model = self.model
        if isinstance(model, NeuralMemoryModel):
            return [model.stored(sequence)]
        edit, *past = rest
        x, weights = model.before(sequence)[:, None], dict(model.named_parameters())
        core = StoredCore(model, tuple(weights))
        together, _ = self.recurrence(core, past[0], (x,), tuple(past), (edit, *weights.values()))
        return list(together.squeeze(1).split(model.stored_widths, dim=-1))

    @staticmethod
    def _of(memory: LibraryMemory, stored: Tensor, weights: Tensors) -> tuple[Tensor, Tensors, Tensor]:
        """Loss ``(B)``, gradients, and the step that the library takes on them, ``(B, H, T)``.

        Its loss is ``θ mean_d (f - v)²``, whose gradient is that of this one times ``2 θ / d``; a token that
        writes several times has the mean of its steps.
        """
        key, value, step = memory.taught(stored)
        answer, backward = memory.network.forward(weights, key)
        error = answer - value
        loss = 0.5 * (error * error).sum((1, 2, 3))
        per_token = step.unflatten(-1, (stored.shape[1], -1)).mean(-1)
        return loss, backward(error)[1], per_token * (2.0 / key.shape[-1])
