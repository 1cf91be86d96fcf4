"""Losses of a model's memories and their gradients by autograd: what exported gradient graphs must give."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_export.memory import MemoryOutput, neural_memory
from titans_export.memory.mlp import read
from titans_export.memory.segment import SegmentMemory
from titans_export.memory.tiles import TokenInputs
from titans_export.memory_layer import Rules, State
from titans_export.model import TitansModel, state_schema
from titans_export.recurrence import Core, Tensors, run_core


def editable(model: TitansModel) -> list[str]:
    """Memories of the layers; the readout memory has a gradient of its own."""
    return [
        name
        for name, entry in state_schema(model.config).items()
        if entry.role == "memory" and name != "readout"
    ]


def prediction(
    model: TitansModel, input_ids: Tensor, target_ids: Tensor, edit: Tensor, state: State
) -> dict[str, Tensor]:
    """Summed next-token loss of each row, through the whole network, and its gradients.

    Args:
        model: any; its rules are not used but for their fast forms, which can be differentiated.
        input_ids: ``(B, T)`` int64.
        target_ids: ``(B, T)`` int64; negative ones count nothing.
        edit: ``(B, layers)``.
        state: as it came in.

    Returns:
        ``loss (B,)`` and ``grad.<memory>``.
    """
    own = next(iter(model.blocks)).memory.rules  # type: ignore[union-attr]
    differentiable = model if own == Rules() else _with_rules(model, Rules())
    leaves = {name: state[name].detach().requires_grad_() for name in editable(model)}
    with torch.enable_grad():
        logits = differentiable(input_ids, edit, state | leaves).logits
        chosen = logits.log_softmax(-1).gather(-1, target_ids.clamp(min=0)[..., None])[..., 0]
        loss = -(chosen * (target_ids >= 0)).sum(-1)
    return {"loss": loss.detach()} | _gradients(loss, leaves)


def association(model: TitansModel, input_ids: Tensor, edit: Tensor, state: State) -> dict[str, Tensor]:
    """``½ ‖f_M(k) - v‖²`` of every layer, summed over heads and tokens, and its gradients.

    Keys and values are those of a forward pass, and are not differentiated.

    Returns:
        ``loss (B,)``, each layer's part of it, and ``grad.<memory>``.
    """
    taught = keys_and_values(model, input_ids, edit, state)
    depth = model.config.memory_depth
    leaves = {name: state[name].detach().requires_grad_() for name in editable(model)}
    names, each = list(leaves), max(depth, 1)
    parts = {}
    with torch.enable_grad():
        for layer, inputs in enumerate(taught):
            own = names[layer * each : (layer + 1) * each]
            error = read(tuple(leaves[name] for name in own), inputs.key, depth) - inputs.value
            parts[f"loss.{own[0].removesuffix('.0')}"] = 0.5 * error.square().sum((1, 2, 3))
        loss = torch.stack(list(parts.values())).sum(0)
    losses = {name: part.detach() for name, part in parts.items()}
    return {"loss": loss.detach()} | losses | _gradients(loss, leaves)


@torch.no_grad()
def keys_and_values(model: TitansModel, input_ids: Tensor, edit: Tensor, state: State) -> list[TokenInputs]:
    """What every layer's memory is taught in a forward pass."""
    taught: list[TokenInputs] = []

    def exact(
        query: Tensor, key: Tensor, value: Tensor, retention: Tensor, momentum: Tensor, step: Tensor,
        *rest: Tensor, tile: int,
    ) -> MemoryOutput:  # fmt: skip
        taught.append(TokenInputs(query, key, value, retention, step, momentum))
        return neural_memory(query, key, value, retention, momentum, step, *rest, tile=tile)

    def recurrence(
        core: Core, position: Tensor, tokens: Tensors, carry: Tensors, shared: Tensors
    ) -> tuple[Tensor, Tensors]:
        if not isinstance(core, SegmentMemory):
            taught.append(TokenInputs(*tokens))
            return run_core(core, position, tokens, carry, shared)
        outputs, inputs = [], []
        for t in range(tokens[0].shape[2]):
            token = tuple(x[:, :, t : t + 1] for x in tokens)
            y, carry, own = core.one_and_inputs(token, (position + t) % core.tile, carry, shared)
            outputs.append(y)
            inputs.append([x for x in own if x is not None])
        taught.append(TokenInputs(*(torch.cat(parts, dim=2) for parts in zip(*inputs, strict=True))))
        return torch.cat(outputs, dim=2), carry

    _with_rules(model, Rules(exact, recurrence))(input_ids, edit, state)
    return taught


def _with_rules(model: TitansModel, rules: Rules) -> TitansModel:
    copy = TitansModel(model.config, rules).to(model.embedding.weight.dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)


def _gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return {f"grad.{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
