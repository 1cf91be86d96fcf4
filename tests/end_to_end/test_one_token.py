"""What decoding costs, as far as a graph says it: the memory's operators, and products with weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import onnx

MOST_OPERATORS = 12
"""Of the memory's one-token branch, constants and changes of shape aside."""
SHAPES = {"Constant", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Identity"}


def _one_token_branches(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    for function in model.functions:
        for node in function.node:
            for attribute in node.attribute:
                if attribute.name == "then_branch":
                    yield attribute.g


def _loops(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node if node.op_type in ("Loop", "Scan", "If")]


def test_a_memorys_token_is_about_ten_operators_and_no_loop(tiny_bundle: Path) -> None:
    branches = list(_one_token_branches(onnx.load(tiny_bundle / "model.onnx", load_external_data=False)))
    assert branches
    for branch in branches:
        operators = [node.op_type for node in branch.node if node.op_type not in SHAPES]
        assert len(operators) <= MOST_OPERATORS, operators
        assert not _loops(branch)


def test_a_layer_has_five_products_with_weights(tiny_bundle: Path) -> None:
    """Query, key and value; all gates; the way out; and the two of the feed-forward layer."""
    manifest = json.loads((tiny_bundle / "titans.json").read_text())
    graph = onnx.load(tiny_bundle / "model.onnx", load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert 0 < len(products) <= 5 * len(_layers(manifest)) + 2  # and the head, and the readout key


def _layers(manifest: dict[str, list[dict[str, str]]]) -> set[str]:
    return {entry["name"].split(".")[1] for entry in manifest["state"] if entry["name"].startswith("layers.")}
