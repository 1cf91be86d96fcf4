"""An imported model as a recurrence: a tile is a chunk, or a segment; all go through the model at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from titans_export.importers.titans_pytorch.keys import LibraryModel
from titans_export.importers.titans_pytorch.transformer import TransformerModel
from titans_export.loops import Loop
from titans_export.memory_layer import Rules
from titans_export.recurrence import Tensors


@dataclass(frozen=True)
class LibraryCore:
    """Tokens: what the model sees, ``(B, 1, T, width)``. Shared: edit ``(B, layers)``, then its weights."""

    model: LibraryModel
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the operator."""
        return self.model.operator

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.model.tile

    @property
    def apart(self) -> tuple[int, ...]:
        """Places whose tokens are more than ``one`` does."""
        return self.model.apart

    def one(self, tokens: Tensors, place: Tensor, carry: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
        """See :class:`titans_export.recurrence.AnyCore`."""
        del place  # the state knows
        edit, *weights = shared
        y, present = self._call("one", weights, tokens[0].squeeze(1), edit, carry)
        return y[:, None], present

    def together(
        self, tokens: Tensors, live: Tensor, carry: Tensors, shared: Tensors, loop: Loop
    ) -> tuple[Tensor, Tensors]:
        """See :class:`titans_export.recurrence.TogetherCore`."""
        edit, *weights = shared
        y, present = self._call("together", weights, tokens[0].squeeze(2), live, edit, carry, loop)
        return y[:, :, None], present

    def _call(
        self, method: str, weights: list[Tensor], *arguments: Tensor | Tensors | Loop
    ) -> tuple[Tensor, Tensors]:
        tensors = {f"model.{name}": weight for name, weight in zip(self.names, weights, strict=True)}
        result: tuple[Tensor, Tensors] = functional_call(_Method(self.model, method), tensors, arguments)
        return result


@dataclass(frozen=True)
class StoredCore(LibraryCore):
    """The same recurrence, put out what the memories store of every token: for gradients of association."""

    model: TransformerModel

    @property
    def name(self) -> str:
        """Of the operator."""
        return f"{self.model.operator}Stored"

    def one(self, tokens: Tensors, place: Tensor, carry: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
        """See :class:`titans_export.recurrence.AnyCore`."""
        del place  # the state knows
        edit, *weights = shared
        y, present = self._call("one_stored", weights, tokens[0].squeeze(1), edit, carry)
        return y[:, None], present

    def together(
        self, tokens: Tensors, live: Tensor, carry: Tensors, shared: Tensors, loop: Loop
    ) -> tuple[Tensor, Tensors]:
        """See :class:`titans_export.recurrence.TogetherCore`."""
        edit, *weights = shared
        y, present = self._call("together_stored", weights, tokens[0].squeeze(2), live, edit, carry, loop)
        return y[:, :, None], present


class _Method(nn.Module):
    """One of a module's methods as ``forward``."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *arguments: Tensor | Tensors | Loop) -> tuple[Tensor, Tensors]:
        result: tuple[Tensor, Tensors] = getattr(self.model, self.method)(*arguments)
        return result


class Streamed(nn.Module):
    """An imported model as a function ``(what it sees, edit, past) → (what it answers, present)``."""

    def __init__(self, model: LibraryModel, rules: Rules = Rules()) -> None:  # noqa: B008 - immutable
        """``rules``: what stands for the recurrence."""
        super().__init__()
        self.model, self.rules = model, rules
        self.names = list(model.state())

    def forward(self, sequence: Tensor, edit: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """``sequence``: ids ``(B, T)`` or vectors ``(B, T, width)``; ``past`` in the schema's order."""
        x = self.model.before(sequence)[:, None]
        weights = dict(self.model.named_parameters())
        core = LibraryCore(self.model, tuple(weights))
        y, present = self.rules.recurrence(core, past[0], (x,), past, (edit, *weights.values()))
        return self.model.after(y.squeeze(1)), *present

    def initial_state(self, batch: int) -> Tensors:
        """The state before the first token, in the dtype of the weights."""
        dtype = next(self.model.parameters()).dtype
        learned = self.model.learned_state()
        state = []
        for name, entry in self.model.state().items():
            if name in learned:
                state.append(learned[name].expand(batch, *entry.shape))
            else:
                kind = dtype if entry.dtype == torch.float32 else entry.dtype
                state.append(torch.zeros(batch, *entry.shape, dtype=kind))
        return tuple(state)
