"""A program: a module with named inputs, outputs and free axes. Every converter takes one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

Axes = tuple[int | str, ...]
"""Sizes of a tensor's axes; a string names a free axis."""


@dataclass(frozen=True)
class Program:
    """A module whose ``forward`` takes tensors in the order of ``inputs`` and returns a tuple of tensors.

    Attributes:
        name: graph name in the bundle, ``model`` or ``gradient.<objective>``.
        module: in evaluation mode, without hidden state.
        inputs: example tensors by name. The sizes of free axes must differ from each other and from
            every fixed size, or tracing may take one for the other.
        input_axes: axes by input name.
        output_axes: axes by output name, in the order of ``forward``'s results.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    input_axes: dict[str, Axes]
    output_axes: dict[str, Axes]

    def __post_init__(self) -> None:
        """Check that examples and axes belong together."""
        if list(self.inputs) != list(self.input_axes):
            raise ValueError(f"program {self.name}: inputs and input_axes name different tensors")
        for name, tensor in self.inputs.items():
            if tensor.dim() != len(self.input_axes[name]):
                raise ValueError(f"program {self.name}: {name} has {tensor.dim()} axes in its example")
