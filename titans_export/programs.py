"""The programs of a model: what a converter turns into the graphs of a bundle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_converters.program import Axes, Program
from titans_export.config import ModelConfig
from titans_export.memory.readout import readout_gradient
from titans_export.model import Rules, TitansModel, initial_state, state_schema

# Example sizes for tracing: unlike each other and unlike any fixed size of a sensible model.
_BATCH, _TOKENS = 11, 37


def model_program(model: TitansModel, rules: Rules, gates_apart: bool = False) -> Program:
    """The program ``model``, with ``rules`` in place of the reference ones.

    ``gates_apart``: see :meth:`titans_export.memory_layer.MemoryLayer.group_products`.
    """
    config = model.config
    copy = TitansModel(config, rules)
    copy.load_state_dict(model.state_dict())
    copy.group_products(gates_apart)
    state = initial_state(config, _BATCH)
    axes = state_axes(config)
    present_dtypes = {f"present.{name}": entry.dtype for name, entry in state_schema(config).items()}
    present = {f"present.{name}": shape for name, shape in axes.items() if name != "readout"}
    return Program(
        name="model",
        module=_ModelCall(copy.eval()),
        inputs={
            "input_ids": torch.zeros(_BATCH, _TOKENS, dtype=torch.int64),
            "edit": torch.zeros(_BATCH, config.layers),
            **{f"past.{name}": tensor for name, tensor in state.items()},
        },
        input_axes={
            "input_ids": ("batch", "tokens"),
            "edit": ("batch", config.layers),
            **{f"past.{name}": shape for name, shape in axes.items()},
        },
        output_axes={
            "logits": ("batch", "tokens", config.vocab_size),
            "readout_key": ("batch", "tokens", config.d_model),
            "readout_rows": ("batch", "tokens", config.readout_hashes),
            **present,
        },
        output_dtypes={"readout_rows": torch.int64} | present_dtypes,
    )


def readout_gradient_program(config: ModelConfig) -> Program:
    """The program ``gradient.readout``."""
    height, width, vocab = config.readout_height, config.d_model, config.vocab_size
    contexts = config.readout_hashes
    return Program(
        name="gradient.readout",
        module=_ReadoutGradient(config.readout_context_scale),
        inputs={
            "input_ids": torch.zeros(_BATCH, _TOKENS, dtype=torch.int64),
            "past.readout": torch.zeros(_BATCH, height, vocab),
            "readout_key": torch.zeros(_BATCH, _TOKENS, width),
            "readout_rows": torch.zeros(_BATCH, _TOKENS, contexts, dtype=torch.int64),
            "base_logits": torch.zeros(_BATCH, _TOKENS, vocab),
        },
        input_axes={
            "input_ids": ("batch", "tokens"),
            "past.readout": ("batch", height, vocab),
            "readout_key": ("batch", "tokens", width),
            "readout_rows": ("batch", "tokens", contexts),
            "base_logits": ("batch", "tokens", vocab),
        },
        output_axes={
            "logits": ("batch", "tokens", vocab),
            "loss": ("batch", "tokens"),
            "grad.readout": ("batch", width, vocab),
            "grad.readout_rows": ("batch", "tokens", vocab),
        },
    )


def state_axes(config: ModelConfig) -> dict[str, Axes]:
    """Axes of every state entry, the batch first."""
    return {name: ("batch", *entry.shape) for name, entry in state_schema(config).items()}


class _ModelCall(nn.Module):
    """The model with its state as a flat list of tensors."""

    def __init__(self, model: TitansModel) -> None:
        super().__init__()
        self.model = model
        self.names = list(state_schema(model.config))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, edit, *state = inputs
        output = self.model(input_ids, edit, dict(zip(self.names, state, strict=True)))
        present = (output.state[name] for name in self.names if name in output.state)
        return output.logits, output.readout_key, output.readout_rows, *present


class _ReadoutGradient(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, input_ids: Tensor, readout: Tensor, key: Tensor, rows: Tensor, base_logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return readout_gradient(input_ids, readout, key, rows, base_logits, self.scale)
