"""Goldens: inputs and expected outputs that travel inside the bundle.

The expected outputs come from the token loop in float64, not from the form that is exported: a
mistake in the fast form cannot agree with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titans_export.config import ModelConfig
from titans_export.gradients import association, prediction
from titans_export.memory import token_loop
from titans_export.memory.output import MemoryOutput
from titans_export.memory.readout import readout_gradient
from titans_export.memory.reference import reference_recurrence
from titans_export.model import Rules, State, TitansModel

Arrays = dict[str, npt.NDArray[np.generic]]
Watch = Callable[[int], object]


@dataclass(frozen=True)
class _Case:
    """One stream, cut into calls.

    Attributes:
        name: first part of the tensors' names.
        lengths: tokens of each call.
        edit: ``(B, layers)``.
        repeated: one token over and over, which makes all keys of a tile equal.
        readout: begin with a filled readout memory.
        staggered: begin with rows at different positions of their streams.
    """

    name: str
    lengths: tuple[int, ...]
    edit: Tensor
    repeated: bool = False
    readout: bool = False
    staggered: bool = False


def make_goldens(model: TitansModel, seed: int = 0, watch: Watch = lambda _: None) -> Arrays:
    """Run the reference on a few streams, cut at several places, editing off, on and mixed.

    Args:
        model: in any dtype; the reference's own copy is in float64.
        seed: of the streams.
        watch: is told how many more tokens have been seen, stream by stream.

    Returns:
        Tensors named ``<case>.<graph>.<call>.<input|output>.<tensor>``.
    """
    reference = TitansModel(model.config, Rules(_token_loop_rule, reference_recurrence))
    reference.load_state_dict(model.state_dict())
    reference = reference.double().eval()
    generator = torch.Generator().manual_seed(seed)
    arrays: Arrays = {}
    for case in _cases(model.config, generator):
        arrays |= _run_model(reference, case, generator)
        watch(len(case.edit) * sum(case.lengths))
    arrays |= _run_readout_gradient(model.config, generator)
    return arrays | _run_gradients(reference, generator)


def _token_loop_rule(*inputs: Tensor, tile: int) -> MemoryOutput:
    del tile  # the oracle knows no tiles
    return token_loop(*inputs)


def _cases(config: ModelConfig, generator: torch.Generator) -> list[_Case]:
    tile, layers = _longest_unit(config), config.layers
    mixed = torch.rand(2, layers, generator=generator)
    return [
        _Case("edit_off", (7, 1, 2 * tile + 1, 1), torch.zeros(1, layers)),
        _Case("edit_on", (tile, 1, tile - 1, 2), torch.ones(1, layers), readout=True),
        _Case("mixed_batch", (3, 1, tile + 2), mixed, staggered=True),
        _Case("repeated_token", (2 * tile, 1), torch.ones(1, layers), repeated=True),
    ]


@torch.no_grad()
def _run_model(model: TitansModel, case: _Case, generator: torch.Generator) -> Arrays:
    config, batch = model.config, len(case.edit)
    state = model.initial_state(batch)
    arrays: Arrays = {}
    if case.readout:
        readout = 0.1 * torch.randn(state["readout"].shape, generator=generator)
        state["readout"] = readout.double()
        arrays[f"{case.name}.model.0.input.past.readout"] = readout.numpy()
    if case.staggered:
        state |= _staggered_state(model, case.edit, generator)
        for name, tensor in state.items():
            arrays[f"{case.name}.model.0.input.past.{name}"] = _single(tensor)
            state[name] = tensor.float().double() if tensor.is_floating_point() else tensor
    for call, length in enumerate(case.lengths):
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
        if case.repeated:
            ids = torch.full_like(ids, config.vocab_size // 2)
        output = model(ids, case.edit.double(), state)
        prefix = f"{case.name}.model.{call}"
        arrays[f"{prefix}.input.input_ids"] = ids.numpy()
        arrays[f"{prefix}.input.edit"] = case.edit.numpy()
        arrays[f"{prefix}.output.logits"] = _single(output.logits)
        if call == 0:
            arrays[f"{prefix}.output.readout_key"] = _single(output.readout_key)
            arrays[f"{prefix}.output.readout_rows"] = _single(output.readout_rows)
        if call == len(case.lengths) - 1:
            arrays |= _present(prefix, output.state)
        state |= output.state
    return arrays


def _longest_unit(config: ModelConfig) -> int:
    """Tokens after which the model's innermost loop begins anew: calls must cross its end."""
    if config.architecture == "mac":
        return config.segment
    return config.tile if config.memory_form.exact else config.period


def _staggered_state(model: TitansModel, edit: Tensor, generator: torch.Generator) -> State:
    """State of rows that have seen 1, 2, … tokens more than half a unit."""
    rows = []
    for row in range(len(edit)):
        tokens = _longest_unit(model.config) // 2 + 1 + row
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
        rows.append(model(ids, edit[row : row + 1].double(), model.initial_state(1)).state)
    return {name: torch.cat([state[name] for state in rows]) for name in rows[0]}


def _present(prefix: str, state: State) -> Arrays:
    return {f"{prefix}.output.present.{name}": _single(tensor) for name, tensor in state.items()}


def _run_readout_gradient(config: ModelConfig, generator: torch.Generator) -> Arrays:
    """The gradient by autograd of the stated loss, on a ragged batch: one target is unknown."""
    batch, tokens, vocab = 2, 4, config.vocab_size
    targets = torch.randint(vocab, (batch, tokens), generator=generator)
    targets[0, -1] = -1
    height, contexts = config.readout_height, config.readout_hashes
    key = torch.randn(batch, tokens, config.d_model, generator=generator)
    rows = torch.randint(config.d_model, height, (batch, tokens, contexts), generator=generator)
    rows[:, -1] = rows[:, 0]  # two positions in one context
    base = torch.randn(batch, tokens, vocab, generator=generator)
    readout = 0.1 * torch.randn(batch, height, vocab, generator=generator)
    variable = readout.double().requires_grad_()
    scale = config.readout_context_scale
    logits, loss, _, part = readout_gradient(targets, variable, key.double(), rows, base.double(), scale)
    (gradient,) = torch.autograd.grad(loss.sum(), variable)
    return {
        "readout.gradient.readout.0.input.input_ids": targets.numpy(),
        "readout.gradient.readout.0.input.past.readout": readout.numpy(),
        "readout.gradient.readout.0.input.readout_key": key.numpy(),
        "readout.gradient.readout.0.input.readout_rows": rows.numpy(),
        "readout.gradient.readout.0.input.base_logits": base.numpy(),
        "readout.gradient.readout.0.output.logits": _single(logits),
        "readout.gradient.readout.0.output.loss": _single(loss),
        "readout.gradient.readout.0.output.grad.readout": _single(gradient[:, : config.d_model]),
        "readout.gradient.readout.0.output.grad.readout_rows": _single(part),
    }


def _single(tensor: Tensor) -> npt.NDArray[np.generic]:
    """The tensor as the graph gives it: float32 or integer, and contiguous, which files need."""
    tensor = tensor.detach()
    array: npt.NDArray[np.generic] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return np.ascontiguousarray(array)


def _run_gradients(model: TitansModel, generator: torch.Generator) -> Arrays:
    """What the gradient graphs must give, by autograd in float64, on rows in the middle of their units."""
    config = model.config
    edit = torch.rand(2, config.layers, generator=generator)
    state = _staggered_state(model, edit, generator)
    state = {
        name: tensor.float().double() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    tokens = _longest_unit(config) + 2
    ids = torch.randint(config.vocab_size, (2, tokens), generator=generator)
    targets = torch.randint(-1, config.vocab_size, (2, tokens), generator=generator)
    inputs = {"input_ids": ids.numpy(), "target_ids": targets.numpy(), "edit": edit.numpy()}
    inputs |= {f"past.{name}": _single(tensor) for name, tensor in state.items() if name != "readout"}
    state |= {"readout": torch.zeros(2, config.readout_height, config.vocab_size, dtype=torch.float64)}
    arrays: Arrays = {}
    for objective, found in (
        ("prediction", prediction(model, ids, targets, edit.double(), state)),
        ("association", association(model, ids, edit.double(), state)),
    ):
        prefix = f"gradient.gradient.{objective}.0"
        arrays |= {f"{prefix}.input.{name}": array for name, array in inputs.items()}
        arrays |= {f"{prefix}.output.{name}": _single(tensor) for name, tensor in found.items()}
    return arrays
