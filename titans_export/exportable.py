"""What the pipeline asks of a model, whatever it was trained with; and which model a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from titans_converters.onnx.lowering import linear_attention_node
from titans_converters.onnx.trace import memory_node, recurrence_node
from titans_converters.program import Program, RecurrenceProgram
from titans_export.config import ModelConfig
from titans_export.goldens import Watch, make_goldens
from titans_export.memory_layer import Rules, State, StateEntry
from titans_export.model import TitansModel, state_schema
from titans_export.programs import model_program, readout_gradient_program
from titans_export.recurrence_programs import recurrence_programs
from titans_export.training.checkpoint import CONFIG_FILE, load_checkpoint
from titans_runtime.errors import UsageError
from titans_runtime.json_reader import parse_object


@dataclass(frozen=True)
class Facts:
    """What the manifest says of a model.

    Attributes:
        model: the architecture, as in the checkpoint's ``config.json``.
        tokenizer: ``bytes``, ``ids`` or ``vectors``.
        vocab_size: token ids; 0 for vectors.
        edit_layers: columns of the input ``edit``.
    """

    model: dict[str, Any]
    tokenizer: str
    vocab_size: int
    edit_layers: int


class Exportable(Protocol):
    """A model as the pipeline sees it. ``Rules`` and the like are its own business."""

    @property
    def module(self) -> nn.Module:
        """The model, in evaluation mode: its matrices are what ``--weights`` rounds."""
        ...

    def facts(self) -> Facts:
        """What the manifest says of it."""
        ...

    def state(self) -> dict[str, StateEntry]:
        """Every state entry by name, in the order graphs and files keep."""
        ...

    def learned_state(self) -> dict[str, Tensor]:
        """Entries of the initial state that are not zero, without their batch axis."""
        ...

    def matrices(self) -> list[nn.Parameter]:
        """What may be quantised: matrices that multiply activations, those of gates excepted."""
        ...

    def programs(self, scan: str = "plugin", quantised: bool = False) -> list[Program]:
        """``model`` first, with operators in place of its memory; then its gradients.

        Args:
            scan: one of :data:`titans_converters.onnx.lowering.SCANS`.
            quantised: whether :meth:`matrices` were rounded, and must have products of their own.

        Raises:
            UsageError: this model's memory has no such form; the message says why.
        """
        ...

    def recurrences(self) -> list[RecurrenceProgram]:
        """What the operators in ``programs`` stand for."""
        ...

    def goldens(self, watch: Watch = lambda _: None) -> dict[str, npt.NDArray[np.generic]]:
        """Inputs and outputs expected of them, from a reference that is not what is exported.

        Args:
            watch: is told how many more tokens the reference has seen.
        """
        ...


class OwnModel:
    """A model of this project."""

    def __init__(self, model: TitansModel) -> None:
        """``model``: in evaluation mode."""
        self.model = model

    @property
    def module(self) -> nn.Module:
        """See :class:`Exportable`, here and below."""
        return self.model

    def facts(self) -> Facts:
        """Bytes, for now: the vocabulary that its training reads."""
        config = self.model.config
        return Facts(config.to_dict(), "bytes", config.vocab_size, config.layers)

    def state(self) -> dict[str, StateEntry]:
        """The schema that follows from the config."""
        return state_schema(self.model.config)

    def learned_state(self) -> State:
        """Memories, where they are learned."""
        return self.model.learned_state()

    def matrices(self) -> list[nn.Parameter]:
        """Projections, feed-forward layers and the head."""
        return [
            parameter
            for name, parameter in self.model.named_parameters()
            if name.endswith(("in_projection.weight", "out_projection.weight", "up.weight", "down.weight"))
            or name == "head.weight"
        ]

    def programs(self, scan: str = "plugin", quantised: bool = False) -> list[Program]:
        """The model, and the gradient of its readout memory."""
        config = self.model.config
        exact = memory_node
        if scan == "native":
            _refuse_native(config)
            exact = linear_attention_node
        rules = Rules(exact=exact, recurrence=recurrence_node)
        return [model_program(self.model, rules, quantised), readout_gradient_program(config)]

    def recurrences(self) -> list[RecurrenceProgram]:
        """One for each kind of memory."""
        return recurrence_programs(self.model)

    def goldens(self, watch: Watch = lambda _: None) -> dict[str, npt.NDArray[np.generic]]:
        """By the token loop in float64."""
        return make_goldens(self.model, watch=watch)


def _refuse_native(config: ModelConfig) -> None:
    """LinearAttention is a matrix with per-token gradients and nothing else."""
    for found, what in (
        (config.architecture == "mac", "a memory read within segments"),
        (config.memory_depth > 0, "an MLP as memory"),
        (config.period > 1, "a gradient period"),
        (config.momentum, "momentum"),
    ):
        if found:
            raise UsageError(
                f"--scan native: this model has {what}, which LinearAttention cannot express; "
                "choose plugin or scan"
            )


def load_exportable(checkpoint: Path) -> Exportable:
    """The model of a checkpoint.

    Raises:
        DataError: a file is missing or damaged, or the weights do not fit the config.
    """
    config = _config(checkpoint)
    if "library" not in config:
        return OwnModel(load_checkpoint(checkpoint))
    from titans_export.importers.titans_pytorch.checkpoint import load_imported

    return load_imported(checkpoint, config)


def _config(checkpoint: Path) -> dict[str, Any]:
    """``config.json``, as far as it can be read: what is wrong with it is said by who reads it."""
    try:
        return parse_object((checkpoint / CONFIG_FILE).read_bytes(), CONFIG_FILE)
    except (OSError, ValueError):
        return {}
