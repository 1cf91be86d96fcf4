"""The model with its state as a flat list of tensors: what tracers and compilers take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from titans_export.model import State, TitansModel, state_schema

Tensors = tuple[Tensor, ...]


class FlatModel(nn.Module):
    """Tokens, edit strength and every state entry in; logits and every entry that changes out."""

    def __init__(self, model: TitansModel) -> None:
        """``model`` in evaluation mode."""
        super().__init__()
        self.model = model
        self.taken = list(state_schema(model.config))
        self.given = [name for name in self.taken if name != "readout"]

    def forward(self, input_ids: Tensor, edit: Tensor, *state: Tensor) -> Tensors:
        """See :meth:`titans_export.model.TitansModel.forward`."""
        output = self.model(input_ids, edit, dict(zip(self.taken, state, strict=True)))
        return output.logits, *(output.state[name] for name in self.given)

    def flatten(self, ids: Tensor, edit: Tensor, state: State) -> Tensors:
        """Arguments of a call, in order."""
        return ids, edit, *(state[name] for name in self.taken)

    def unflatten(self, results: Tensors) -> tuple[Tensor, State]:
        """Logits and present state from what a call returns."""
        logits, *present = results
        return logits, dict(zip(self.given, present, strict=True))

    def step(self, call: Callable[..., Tensors]) -> Callable[[Tensor, Tensor, State], tuple[Tensor, State]]:
        """``call``, which runs this module in its own way, as a step of a stream."""

        def step(ids: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
            return self.unflatten(call(*self.flatten(ids, edit, state)))

        return step


class ByShape:
    """A form of the module that is made anew for every shape of the tokens."""

    def __init__(self, make: Callable[[Tensors], Callable[..., Tensors]]) -> None:
        """``make``: from the arguments of the first call of a shape."""
        self._make = make
        self._made: dict[torch.Size, Callable[..., Tensors]] = {}

    def __call__(self, *arguments: Tensor) -> Tensors:
        """Run the form for these arguments."""
        shape = arguments[0].shape
        if shape not in self._made:
            self._made[shape] = self._make(arguments)
        return self._made[shape](*arguments)
