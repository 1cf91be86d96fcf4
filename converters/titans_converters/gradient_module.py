"""The gradient of a loss, by autograd, in words that TorchScript knows too.

TorchScript reads annotations of attributes, which must not be strings: nothing from ``__future__`` here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_converters.gradients import NORM_EPS
from titans_converters.twins import GradientTwin, Taught


def prediction_losses(logits: Tensor, target_ids: Tensor) -> Tensor:
    """``-log p(target)``, summed over the tokens of a row: ``(B,)``. A target below 0 counts nothing."""
    ids = torch.arange(logits.size(-1), device=logits.device)
    one_hot = (target_ids.unsqueeze(-1) == ids).to(logits.dtype)
    return -(torch.log_softmax(logits, -1) * one_hot).sum((1, 2))


def association_losses(
    key: Tensor, value: Tensor, weights: list[Tensor], deep: bool, eps: float = NORM_EPS
) -> Tensor:
    """``½ ‖f_M(k) - v‖²``, summed over heads and tokens of a row: ``(B,)``."""
    answer = key @ weights[0]
    for weight in weights[1:]:
        answer = F.gelu(answer) @ weight
    if deep:
        answer = key + F.layer_norm(answer, [answer.size(-1)], eps=eps)
    error = answer - value
    return 0.5 * (error * error).sum((1, 2, 3))


class _Recording:
    """What ``torch.enable_grad`` is in Python: TorchScript knows only its opposite."""

    def __init__(self) -> None:
        self.before = False

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(True)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:  # noqa: ANN401 - as TorchScript wants it
        torch.set_grad_enabled(self.before)


class Gradient(nn.Module):
    """The gradient of a loss with respect to memories, by autograd; in and out as the twin has them.

    Plain enough to be scripted. Gathers ``[loss, loss of every layer, gates of every layer, gradients]``.
    """

    missing: dict[int, tuple[bool, list[int]]]
    lessons: list[tuple[int, bool, list[int]]]
    gates: list[tuple[int, bool]]

    def __init__(self, twin: GradientTwin, model: nn.Module, layers: Sequence[Taught]) -> None:
        """``model``: lists to lists, as :func:`revealing` has it."""
        super().__init__()
        self.model, self.through = model, twin.name == "gradient.prediction"
        inputs = twin.inputs
        self.given = [inputs.index(name) if name in inputs else -1 for name in twin.model.inputs]
        self.memories = [inputs.index(f"past.{memory}") for memory in twin.memories]
        self.targets = inputs.index("target_ids") if self.through else -1
        self.missing = {
            place: (twin.dtype(name) == torch.int64, list(tensor.shape[1:]))
            for place, (name, tensor) in enumerate(twin.model.inputs.items())
            if name not in inputs
        }
        self.lessons = [
            (layer.start, layer.deep, [twin.memories.index(memory) for memory in layer.memories])
            for layer in layers
        ]
        gathered = ["loss"] if self.through else ["loss", *(f"loss.{layer.name}" for layer in layers)]
        self.gates = []  # where among the model's results, and whether it is a logarithm
        aliases: dict[str, int] = {}
        for layer in layers:
            for index, gate in enumerate(layer.gates):
                self.gates.append((layer.start + 2 + index, gate.startswith("log_")))
                name = gate.removeprefix("log_")
                aliases |= {f"gate.{memory}.{name}": len(gathered) for memory in layer.memories}
                gathered.append(f"gate.{layer.name}.{name}")
        gathered += [f"grad.{memory}" for memory in twin.memories]
        places = {name: place for place, name in enumerate(gathered)} | aliases
        self.order = [places[name] for name in twin.outputs]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs and outputs in the twin's order."""
        leaves = [inputs[i].clone() for i in self.memories]
        # A frozen script drops ``detach``: what no gradient is to flow through has to come before recording.
        results = self.run(inputs) if not self.through else leaves
        with _Recording():
            for leaf in leaves:
                leaf.requires_grad_()
            if self.through:
                known = [tensor for tensor in inputs]  # noqa: C416 - TorchScript has no list()
                for index, place in enumerate(self.memories):
                    known[place] = leaves[index]
                results = self.run(known)
                losses = [prediction_losses(results[0], inputs[self.targets])]
            else:
                losses = [
                    association_losses(results[start], results[start + 1], [leaves[i] for i in places], deep)
                    for start, deep, places in self.lessons
                ]
            gradients = self.gradients(torch.stack(losses).sum(), leaves)
        with torch.no_grad():  # and copies, for the same reason
            gathered = [torch.stack(losses).sum(0)]
            if not self.through:
                gathered += [loss.clone() for loss in losses]
            for index, logarithmic in self.gates:
                gathered.append(results[index].exp() if logarithmic else results[index].clone())
        gathered += gradients
        return [gathered[i] for i in self.order]

    def gradients(self, loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        """Zero where the loss does not depend on a leaf."""
        found = [torch.zeros_like(leaf) for leaf in leaves]
        if loss.requires_grad:
            for place, one in enumerate(torch.autograd.grad([loss], leaves, allow_unused=True)):
                gradient: Tensor | None = one
                if gradient is not None:
                    found[place] = gradient
        return found

    def run(self, known: list[Tensor]) -> list[Tensor]:
        """The model; zeros where the loss does not need an input."""
        full: list[Tensor] = []
        for place, index in enumerate(self.given):
            if index >= 0:
                full.append(known[index])
            else:
                whole, shape = self.missing[place]
                zeros = torch.zeros([known[0].size(0)] + shape)  # noqa: RUF005 - TorchScript has no stars
                full.append(zeros.to(torch.int64) if whole else zeros)
        results: list[Tensor] = self.model(full)
        return results
