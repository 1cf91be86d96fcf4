"""Models of titans-pytorch with random weights, and what becomes of them here."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from titans_export.importers.titans_pytorch.core import Streamed
from titans_export.importers.titans_pytorch.keys import (
    MEMORY,
    TRANSFORMER,
    LibraryModel,
    build_model,
    load,
    recognised,
)
from titans_export.importers.titans_pytorch.options import MemoryOptions, TransformerOptions

Arguments = dict[str, Any]


def library_model(kind: str, arguments: Arguments, seed: int = 0) -> nn.Module:
    """The library's own model, every persistent parameter moved away from what it begins with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what the library imports scripts a function
        import titans_pytorch

    torch.manual_seed(seed)
    given = dict(arguments)
    name = "model" if kind == MEMORY else "neural_memory_model"
    if isinstance(given.get(name), dict):
        spec = dict(given[name])
        memory = given if kind == MEMORY else given.get("neural_memory_kwargs", {})
        dim = memory.get("dim_head", given["dim"])
        given[name] = getattr(titans_pytorch.memory_models, spec.pop("class"))(dim=dim, **spec)
    if isinstance(given.get("activation"), str):
        given["activation"] = getattr(nn, given["activation"])()
    model: nn.Module = getattr(titans_pytorch, kind)(**given)
    for key, parameter in model.named_parameters():
        if "rotary" not in key:
            # A copy first: the library's initial memory is one head's weights, seen once for every head.
            parameter.data = parameter.data.clone() + 0.1 * torch.randn(parameter.shape)
    return model.eval()


def imported(arguments: Arguments, tensors: dict[str, Tensor]) -> LibraryModel:
    """What the import makes of a state dict, in its dtype."""
    kind = recognised(tensors)
    read = MemoryOptions.read if kind == MEMORY else TransformerOptions.read
    model = build_model(kind, read(dict(arguments)))
    model = model.to(next(iter(tensors.values())).dtype)
    load(model, tensors)
    return model.eval()


def pair(kind: str, arguments: Arguments, seed: int = 0) -> tuple[nn.Module, LibraryModel]:
    """The library's model and ours, in float64."""
    theirs = library_model(kind, arguments, seed).double()
    return theirs, imported(arguments, theirs.state_dict())


@torch.no_grad()
def parallel(theirs: nn.Module, sequence: Tensor) -> Tensor:
    """The library's answer to a whole sequence; three views side by side become its three inputs."""
    if hasattr(theirs, "to_logits"):
        logits: Tensor = theirs(sequence)
        return logits
    views = torch.stack(sequence.chunk(3, dim=-1)) if theirs.qkv_receives_diff_views else sequence
    answers: Tensor = theirs(views)[0]
    return answers


@torch.no_grad()
def streamed(model: LibraryModel, sequence: Tensor, lengths: list[int], edit: Tensor | None = None) -> Tensor:
    """Ours, cut into calls of ``lengths`` tokens, the last one of what is left."""
    stream = Streamed(model)
    batch = len(sequence)
    dtype = next(model.parameters()).dtype
    strength = torch.ones(batch, model.edit_layers, dtype=dtype) if edit is None else edit
    state, outputs, start = stream.initial_state(batch), [], 0
    for length in [*lengths, sequence.shape[1]]:
        part = sequence[:, start : start + length]
        if part.shape[1]:
            answer, *state = stream(part, strength, *state)
            outputs.append(answer)
        start += length
    return torch.cat(outputs, dim=1)


def sequence_for(model: LibraryModel, batch: int, tokens: int, seed: int = 1) -> Tensor:
    """Ids, or vectors in the dtype of the weights."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.options, "num_tokens"):
        return torch.randint(model.options.num_tokens, (batch, tokens), generator=generator)
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, tokens, model.width, generator=generator, dtype=dtype)


__all__ = [
    "MEMORY",
    "TRANSFORMER",
    "imported",
    "library_model",
    "pair",
    "parallel",
    "sequence_for",
    "streamed",
]
