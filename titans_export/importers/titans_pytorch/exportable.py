"""An imported model as the pipeline sees it."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from titans_converters.onnx.sinkhorn import sinkhorn_node
from titans_converters.onnx.trace import recurrence_node
from titans_converters.program import Axes, Program, RecurrenceProgram
from titans_export.exportable import Facts
from titans_export.importers.titans_pytorch.core import Streamed
from titans_export.importers.titans_pytorch.goldens import make_goldens
from titans_export.importers.titans_pytorch.keys import LibraryModel
from titans_export.importers.titans_pytorch.residual import HyperConnection
from titans_export.importers.titans_pytorch.transformer import TransformerModel
from titans_export.memory_layer import Rules, StateEntry
from titans_export.recurrence import Core, Tensors
from titans_export.recurrence_programs import recurrence_program
from titans_runtime.errors import UsageError

# Example sizes for tracing: unlike each other and unlike any fixed size of a sensible model.
_BATCH, _TOKENS = 11, 37


class _Sequence(NamedTuple):
    """The input that has an axis of tokens."""

    name: str
    example: Tensor
    axes: Axes


class _Call(nn.Module):
    """A model with all of its inputs in one list: what a converter takes."""

    def __init__(self, model: Streamed) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensors:
        sequence, edit, *past = inputs
        outputs: Tensors = self.model(sequence, edit, *past)
        return outputs


class ImportedModel:
    """See :class:`titans_export.exportable.Exportable`."""

    def __init__(self, model: LibraryModel, config: dict[str, Any]) -> None:
        """``config``: the checkpoint's ``config.json``."""
        self.model, self.config = model.eval(), config

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.model

    def facts(self) -> Facts:
        """A vocabulary, or vectors."""
        model = self.model
        vocabulary = model.options.num_tokens if isinstance(model, TransformerModel) else 0
        return Facts(self.config, self.config["tokenizer"], vocabulary, model.edit_layers)

    def state(self) -> dict[str, StateEntry]:
        """The schema that follows from the options."""
        return self.model.state()

    def learned_state(self) -> dict[str, Tensor]:
        """The memories, and what their gradients are taken at."""
        return self.model.learned_state()

    def matrices(self) -> list[nn.Parameter]:
        """None: all products stand within the recurrence."""
        return []

    def programs(self, scan: str = "plugin", quantised: bool = False) -> list[Program]:
        """The model."""
        del quantised
        if scan == "native":
            raise UsageError(
                "--scan native: an imported model's memory is an MLP with gradients by the chunk, which "
                "LinearAttention cannot express; choose plugin or scan"
            )
        streamed = Streamed(self.model, Rules(recurrence=recurrence_node))
        schema = self.state()
        sequence, scores = self._sequence(), self._scores()
        past_axes: dict[str, Axes] = {f"past.{key}": ("batch", *entry.shape) for key, entry in schema.items()}
        return [
            Program(
                name="model",
                module=_Call(streamed),
                inputs={
                    sequence.name: sequence.example,
                    "edit": torch.zeros(_BATCH, self.model.edit_layers),
                    **dict(zip(past_axes, streamed.initial_state(_BATCH), strict=True)),
                },
                input_axes={
                    sequence.name: sequence.axes,
                    "edit": ("batch", self.model.edit_layers),
                    **past_axes,
                },
                output_axes={
                    scores[0]: ("batch", "tokens", scores[1]),
                    **{f"present.{key}": ("batch", *entry.shape) for key, entry in schema.items()},
                },
                output_dtypes={f"present.{key}": entry.dtype for key, entry in schema.items()},
            )
        ]

    def recurrences(self) -> list[RecurrenceProgram]:
        """One: the whole model, a tile at a time."""
        found: list[RecurrenceProgram] = []

        def watch(
            core: Core, position: Tensor, tokens: Tensors, carry: Tensors, shared: Tensors
        ) -> tuple[Tensor, Tensors]:
            del position
            found.append(recurrence_program(core, tokens, carry, shared))
            return tokens[0], carry

        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, HyperConnection):
                module.sinkhorn = sinkhorn_node
        streamed = Streamed(model, Rules(recurrence=watch))
        example = self._sequence().example[:1, :1]
        with torch.no_grad():
            streamed(example, torch.zeros(1, self.model.edit_layers), *streamed.initial_state(1))
        return found

    def _sequence(self) -> _Sequence:
        if isinstance(self.model, TransformerModel):
            ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
            return _Sequence("input_ids", ids, ("batch", "tokens"))
        width = self.model.width
        return _Sequence("inputs", torch.zeros(_BATCH, _TOKENS, width), ("batch", "tokens", width))

    def _scores(self) -> tuple[str, int]:
        """Name and width of the output."""
        if isinstance(self.model, TransformerModel):
            return "logits", self.model.options.num_tokens
        return "outputs", self.model.options.dim

    def goldens(self) -> dict[str, npt.NDArray[np.generic]]:
        """By the token loop in float64."""
        return make_goldens(self.model)
