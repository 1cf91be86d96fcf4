"""An imported model as the pipeline sees it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from titans_converters.onnx.sinkhorn import sinkhorn_node
from titans_converters.onnx.trace import recurrence_node
from titans_converters.program import Axes, Program, RecurrenceProgram
from titans_export.exportable import Facts
from titans_export.goldens import Watch
from titans_export.importers.titans_pytorch.association import Association
from titans_export.importers.titans_pytorch.core import StoredCore, Streamed
from titans_export.importers.titans_pytorch.goldens import associates, make_goldens
from titans_export.importers.titans_pytorch.keys import LibraryModel
from titans_export.importers.titans_pytorch.neural_memory import NeuralMemoryModel
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
        """The model, and the gradient of its associative loss."""
        del quantised
        if scan == "native":
            raise UsageError(
                "--scan native: an imported model's memory is an MLP with gradients by the chunk, which "
                "LinearAttention cannot express; choose plugin or scan"
            )
        gradients = [self._association()] if associates(self.model) else []
        return [self._model(), *gradients]

    def _model(self) -> Program:
        node = partial(recurrence_node, width=_width_of_answers(self.model))
        streamed = Streamed(self.model, Rules(recurrence=node))
        schema = self.state()
        sequence, scores = self._sequence(), self._scores()
        past_axes: dict[str, Axes] = {f"past.{key}": ("batch", *entry.shape) for key, entry in schema.items()}
        return Program(
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

    def _association(self) -> Program:
        widths = [] if isinstance(self.model, NeuralMemoryModel) else self.model.stored_widths
        module = Association(self.model, partial(recurrence_node, width=sum(widths)))
        schema, sequence = self.state(), self._sequence()
        initial = Streamed(self.model).initial_state(_BATCH)
        past = dict(zip(schema, initial, strict=True))
        edit = {"edit": torch.zeros(_BATCH, self.model.edit_layers)} if widths else {}
        edit_axes: dict[str, Axes] = {"edit": ("batch", self.model.edit_layers)} if widths else {}
        return Program(
            name="gradient.association",
            module=module,
            inputs={
                sequence.name: sequence.example,
                **edit,
                **{f"past.{name}": past[name] for name in module.past},
            },
            input_axes={
                sequence.name: sequence.axes,
                **edit_axes,
                **{f"past.{name}": ("batch", *schema[name].shape) for name in module.past},
            },
            output_axes=module.outputs,
        )

    def recurrences(self) -> list[RecurrenceProgram]:
        """The whole model, a tile at a time; and for a transformer, what its memories store."""
        found: list[RecurrenceProgram] = []

        def watch(
            core: Core, position: Tensor, tokens: Tensors, carry: Tensors, shared: Tensors
        ) -> tuple[Tensor, Tensors]:
            del position
            answers = _width_of_answers(self.model)
            width = sum(core.model.stored_widths) if isinstance(core, StoredCore) else answers
            found.append(recurrence_program(core, tokens, carry, shared, width))
            like = tokens[0]
            return like.new_zeros(*like.shape[:-1], width or like.shape[-1]), carry

        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, HyperConnection):
                module.sinkhorn = sinkhorn_node
        example, edit = self._sequence().example[:1, :1], torch.zeros(1, self.model.edit_layers)
        streamed = Streamed(model, Rules(recurrence=watch))
        with torch.no_grad():
            streamed(example, edit, *streamed.initial_state(1))
            if isinstance(model, TransformerModel) and associates(self.model):
                Association(model, watch)(example, edit, *streamed.initial_state(1))
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

    def goldens(self, watch: Watch = lambda _: None) -> dict[str, npt.NDArray[np.generic]]:
        """By the token loop in float64."""
        return make_goldens(self.model, watch=watch)


def _width_of_answers(model: LibraryModel) -> int | None:
    """Of what the recurrence puts out; None where it is that of what goes in: three views have one answer."""
    return model.options.dim if isinstance(model, NeuralMemoryModel) else None
