"""Goldens of an imported model: what its token loop answers in float64, and its gradients by autograd."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titans_export.goldens import Watch
from titans_export.importers.titans_pytorch.core import Streamed
from titans_export.importers.titans_pytorch.keys import LibraryModel
from titans_export.importers.titans_pytorch.reference import Loop, loop
from titans_export.importers.titans_pytorch.transformer import TransformerModel

Arrays = dict[str, npt.NDArray[np.generic]]

_LONGEST_BATCH = 256  # tokens between two moves of what gradients are taken at, if a golden is to see one


@dataclass(frozen=True)
class _Case:
    """One stream, cut into calls.

    Attributes:
        name: first part of the tensors' names.
        lengths: tokens of each call.
        edit: ``(B, memories)``.
        before: tokens that each row has seen before the first call; none begins with an empty memory.
    """

    name: str
    lengths: tuple[int, ...]
    edit: Tensor
    before: tuple[int, ...] = ()


def make_goldens(model: LibraryModel, seed: int = 0, watch: Watch = lambda _: None) -> Arrays:
    """Run the token loop on a few streams, cut at several places, editing off, on and mixed.

    Args:
        model: in any dtype; the loop's own copy is in float64.
        seed: of the streams.
        watch: is told how many more tokens have been seen.

    Returns:
        Tensors named ``<case>.<graph>.<call>.<input|output>.<tensor>``; a bundle may lack a gradient.
    """
    reference = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(seed)
    arrays: Arrays = {}
    for case in _cases(model, generator):
        arrays |= _run(reference, case, generator, watch)
    if associates(model):
        arrays |= _run_association(reference, generator, watch)
    if isinstance(reference, TransformerModel) and reference.memories:
        for name, tokens in (("short", max(model.tile // 2, 1)), ("long", model.tile + 1)):
            arrays |= _run_prediction(reference, name, tokens, generator, watch)
    return arrays


def associates(model: LibraryModel) -> bool:
    """Whether it has memories, and every token's key a value of its own to be held against."""
    memories = model.memories.values()
    return bool(memories) and not any(one.options.store_with_lookahead_value for one in memories)


def _run_association(model: LibraryModel, generator: torch.Generator, watch: Watch) -> Arrays:
    """What ``gradient.association`` must give, on rows in the middle of their chunks."""
    edit = torch.rand(2, model.edit_layers, generator=generator)
    rows = [loop(model, strength) for strength in edit.double()]
    for row, tokens in zip(rows, (model.tile // 2 + 1, model.tile + 1), strict=True):
        _see(row, _sequence(model, 1, tokens, generator)[0], watch)
    prefix = "association.gradient.association.0"
    arrays = _named(f"{prefix}.input.past.", _state(rows))
    sequence = _sequence(model, len(rows), model.tile + 1, generator)
    name = "input_ids" if isinstance(model, TransformerModel) else "inputs"
    arrays |= {f"{prefix}.input.{name}": sequence.numpy(), f"{prefix}.input.edit": edit.numpy()}
    found = [_association(row, own, watch) for row, own in zip(rows, sequence, strict=True)]
    return arrays | _named(
        f"{prefix}.output.", {key: torch.stack([one[key] for one in found]) for key in found[0]}
    )


def _association(row: Loop, sequence: Tensor, watch: Watch) -> dict[str, Tensor]:
    before = {prefix: [w.clone() for w in memory.memory] for prefix, memory in row.memories.items()}
    stored: dict[str, list[Tensor]] = {prefix: [] for prefix in before}
    for token in _doubled(sequence):
        row.see(token)
        watch(1)
        for prefix, memory in row.memories.items():
            stored[prefix].append(memory.last)
    found: dict[str, Tensor] = {}
    for prefix, memory in row.memories.items():
        loss, gradients, steps = memory.association(before[prefix], stored[prefix])
        found[f"loss.{prefix}memory"] = loss
        found |= {f"grad.{prefix}memory.{i}": gradient for i, gradient in enumerate(gradients)}
        found |= {f"gate.{prefix}memory.{i}.step": steps for i in range(len(gradients))}
    losses = [value for name, value in found.items() if name.startswith("loss.")]
    return {"loss": torch.stack(losses).sum()} | found


def _run_prediction(
    model: TransformerModel, case: str, tokens: int, generator: torch.Generator, watch: Watch
) -> Arrays:
    """What ``gradient.prediction`` must give, on rows in the middle of their segments.

    The token loop's memories are not made to be differentiated by, so this is autograd's gradient of the
    streaming form in float64; a mistake in a rule of derivatives cannot agree with it.
    """
    edit = torch.rand(2, model.edit_layers, generator=generator)
    rows = [loop(model, strength) for strength in edit.double()]
    for row, seen in zip(rows, (model.tile // 2 + 1, model.tile + 1), strict=True):
        _see(row, _sequence(model, 1, seen, generator)[0], watch)
    past = _state(rows)
    ids, targets = (_sequence(model, len(rows), tokens, generator) for _ in range(2))
    targets[0, 0] = -1
    prefix = f"prediction_{case}.gradient.prediction.0"
    arrays = _named(f"{prefix}.input.past.", past)
    arrays |= {f"{prefix}.input.input_ids": ids.numpy(), f"{prefix}.input.target_ids": targets.numpy()}
    arrays[f"{prefix}.input.edit"] = edit.numpy()
    return arrays | _named(f"{prefix}.output.", _prediction(model, ids, targets, edit, past))


def _prediction(
    model: TransformerModel, ids: Tensor, targets: Tensor, edit: Tensor, past: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The loss of the next tokens ``(B,)``, and its gradient by every memory."""
    schema = model.state()
    given = {
        name: past[name].float().double() if past[name].is_floating_point() else past[name] for name in schema
    }
    memories = [name for name, entry in schema.items() if entry.role == "memory"]
    for name in memories:
        given[name] = given[name].detach().requires_grad_()
    logits = Streamed(model)(ids, edit.double(), *given.values())[0].log_softmax(-1)
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    loss = -(chosen * (targets >= 0)).sum(-1)
    leaves = [given[name] for name in memories]
    found = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
    return {"loss": loss} | {f"grad.{name}": own for name, own in zip(memories, found, strict=True)}


def _cases(model: LibraryModel, generator: torch.Generator) -> list[_Case]:
    tile, memories = model.tile, model.edit_layers
    options = model.options.memory if isinstance(model, TransformerModel) else model.options
    batch = options.batch_size or 0
    long = tile + 2 + (batch if batch <= _LONGEST_BATCH else 0)
    mixed = torch.rand(2, memories, generator=generator)
    return [
        _Case("edit_on", (long, 1, max(tile - 1, 1), 2), torch.ones(1, memories)),
        _Case("edit_off", (3, 1, tile, 1), torch.zeros(1, memories)),
        _Case("mixed_batch", (2, 1, tile + 1), mixed, before=(tile // 2 + 1, tile + 1)),
    ]


def _run(model: LibraryModel, case: _Case, generator: torch.Generator, watch: Watch) -> Arrays:
    rows = [loop(model, edit) for edit in case.edit.double()]
    arrays: Arrays = {}
    if case.before:
        for row, tokens in zip(rows, case.before, strict=True):
            _see(row, _sequence(model, 1, tokens, generator)[0], watch)
        arrays |= _named(f"{case.name}.model.0.input.past.", _state(rows))
    name = "input_ids" if isinstance(model, TransformerModel) else "inputs"
    scores = "logits" if isinstance(model, TransformerModel) else "outputs"
    for call, length in enumerate(case.lengths):
        prefix = f"{case.name}.model.{call}"
        sequence = _sequence(model, len(rows), length, generator)
        arrays[f"{prefix}.input.{name}"] = sequence.numpy()
        arrays[f"{prefix}.input.edit"] = case.edit.numpy()
        answers = [_see(row, own, watch) for row, own in zip(rows, sequence, strict=True)]
        arrays[f"{prefix}.output.{scores}"] = torch.stack(answers).float().numpy()
    return arrays | _named(f"{prefix}.output.present.", _state(rows))


def _see(row: Loop, sequence: Tensor, watch: Watch) -> Tensor:
    answers = []
    for token in _doubled(sequence):
        answers.append(row.see(token))
        watch(1)
    return torch.stack(answers)


def _doubled(sequence: Tensor) -> Tensor:
    return sequence.double() if sequence.is_floating_point() else sequence


def _sequence(model: LibraryModel, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    if isinstance(model, TransformerModel):
        return torch.randint(model.options.num_tokens, (batch, tokens), generator=generator)
    return torch.randn(batch, tokens, model.width, generator=generator)


def _state(rows: list[Loop]) -> dict[str, Tensor]:
    states = [row.state() for row in rows]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def _named(prefix: str, state: dict[str, Tensor]) -> Arrays:
    return {
        prefix + name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        for name, tensor in state.items()
    }
