"""What every rule is given and gives."""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, helper

Gradients = list[str | None]
"""Of a node's outputs, or of its inputs: names of values, None where nothing depends on one."""


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def only(gradients: Gradients) -> str:
    """The gradient of the first output, of a node that has no other that counts.

    Raises:
        ValueError: another counts.
    """
    gradient, *others = gradients
    if gradient is None or any(others):
        raise ValueError("gradient: an operator is differentiated by its first output alone")
    return gradient
