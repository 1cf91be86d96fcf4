"""What is known of a memory node's values once its function is inlined, that no single operator tells.

Which rules stand in place of its operators', which sizes are the same, and which values are laid out alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

from onnx import GraphProto, NodeProto, TensorProto, helper

from titans_converters.onnx.autodiff import Rule, Tape, Types, subgraphs
from titans_converters.onnx.function import ALIKE, INVERSE, INVERTED, PLACES, SIZES, TILED

_INLINED_INVERSE = re.compile(rf"{INVERSE}((?:__\d+)?)")
"""A function's values are numbered when it is inlined."""

_NUMBER = re.compile(r"__\d+$")


def known(nodes: Iterable[NodeProto]) -> Iterator[tuple[str, Rule]]:
    """Rules that know what the memory's function computes, in place of those of its operators.

    One for every ``X = (I + N)⁻¹``: ``dX = -X dN X``. One for all that is laid out in tiles: places of no
    token get no gradient, since their step is 0 and nobody reads there, so that a gather leads back.
    """
    for suffix in _instances(nodes):
        yield INVERSE + suffix, functools.partial(_inverse_rule, INVERTED + suffix)
        for name, rows in TILED.items():
            yield name + suffix, functools.partial(_untiled, rows + suffix, PLACES + suffix)


def note_sizes(graph: GraphProto) -> None:
    """Which sizes are the same within one memory node, so that no gradient looks for them while it runs."""
    _rename_sizes(graph)
    for suffix in _instances(graph.node):
        _note_sizes(graph, suffix)


def note_alike(nodes: Iterable[NodeProto], types: Types) -> None:
    """Which values of one memory node are as large as another."""
    for suffix in _instances(nodes):
        for part, other in ALIKE.items():
            types.alias(part + suffix, other + suffix)


def _instances(nodes: Iterable[NodeProto]) -> list[str]:
    """What the names of one memory node's values end with once it is inlined, for each that edits.

    All that the rules are told of must be there: a graph of somebody's own may have a value of one such name.
    """
    names = {name for node in nodes for name in node.output}
    found = (match[1] for match in map(_INLINED_INVERSE.fullmatch, names) if match)
    return sorted(
        suffix for suffix in found if {name + suffix for name in (INVERTED, PLACES, *TILED)} <= names
    )


def _rename_sizes(graph: GraphProto, loop: bool = False) -> None:
    """The names of values in what a loop's body says of sizes: inlining numbers those of nodes alone."""
    if loop:
        own = {name for node in graph.node for name in node.output}
        inlined = {_NUMBER.sub("", name): name for name in own}
        for info in graph.value_info:
            if info.name not in own:
                info.name = inlined.get(info.name, info.name)
    for node in graph.node:
        for inner in subgraphs(node):
            _rename_sizes(inner, loop=node.op_type == "Scan")


def _note_sizes(graph: GraphProto, suffix: str) -> None:
    for node in graph.node:
        for name in node.output:
            sizes = SIZES.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
            if sizes:
                axes = [f"{size}{suffix}" if isinstance(size, str) else size for size in sizes]
                graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, axes))
        for inner in subgraphs(node):
            _note_sizes(inner, suffix)


def _inverse_rule(
    inverted: str, tape: Tape, node: NodeProto, gradients: list[str | None]
) -> list[str | None]:
    (gradient,) = gradients
    if gradient is not None and tape.wants(inverted):
        transposed = tape.transposed(node.output[0], 5)
        whole = tape.op("MatMul", tape.op("MatMul", transposed, gradient), transposed)
        tape.add_gradient(inverted, tape.op("Neg", whole))
    return [None]


def _untiled(
    rows: str,
    places: str,
    tape: Tape,
    node: NodeProto,  # noqa: ARG001 - a rule's
    gradients: list[str | None],
) -> list[str | None]:
    (gradient,) = gradients
    if gradient is None:
        return [None, None]
    tokens = tape.op("Gather", tape.op("Reshape", gradient, rows), places, axis=0)
    return [tape.op("Reshape", tokens, rows), None]
