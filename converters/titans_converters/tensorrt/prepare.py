"""A bundle's graph as TensorRT's parser wants it. ONNX Runtime's copy stays as it is.

TensorRT checks the shapes of both branches of an ``If``, whichever will run. The body of a memory operator
has one for ``T = 1``, in which a token's gate would have to broadcast against the memory for any ``T``. So:

1. Every tensor with an axis of tokens is cut to its first token where the one-token branch begins.
2. The branch's output is expanded to ``T`` tokens where it ends.

3. Tiles that hold no token are not left out: how many there are follows from data, and TensorRT cannot build
   a loop over so many. Such a tile changes nothing.

For ``T = 1`` the first two are the identity, so results do not change.
"""

from __future__ import annotations

import onnx
from onnx import helper

from titans_converters import memory_op
from titans_converters.onnx.recurrence import KEPT

_TOKEN_AXIS = 2
_RECURRENT_TOKENS = "token_"  # prefix of such inputs in the bodies of recurrences
_EXACT_TOKENS = memory_op.INPUTS[:6]


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` whose function bodies TensorRT accepts for any number of tokens."""
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    for function in prepared.functions:
        if function.domain == memory_op.DOMAIN:
            for node in function.node:
                if node.op_type == "If":
                    _widen_one_token_branch(function, node)
                    _keep_empty_tiles(node)
    return prepared


def _widen_one_token_branch(function: onnx.FunctionProto, choice: onnx.NodeProto) -> None:
    branch = _branch(choice, "then_branch")
    tokens = [name for name in function.input if name in _EXACT_TOKENS or name.startswith(_RECURRENT_TOKENS)]
    used = {name for node in branch.node for name in node.input}
    first = {name: f"{name}.first" for name in tokens if name in used}
    for node in branch.node:
        for index, name in enumerate(node.input):
            node.input[index] = first.get(name, name)
    output = branch.output[0]
    narrow, query = f"{output.name}.first", tokens[0]
    for node in branch.node:
        for index, name in enumerate(node.output):
            node.output[index] = narrow if name == output.name else name
        for index, name in enumerate(node.input):
            node.input[index] = narrow if name == output.name else name
    nodes = [
        helper.make_node("Constant", [], ["first.start"], value_ints=[0]),
        helper.make_node("Constant", [], ["first.end"], value_ints=[1]),
        helper.make_node("Constant", [], ["first.axis"], value_ints=[_TOKEN_AXIS]),
        *(
            helper.make_node("Slice", [name, "first.start", "first.end", "first.axis"], [short])
            for name, short in first.items()
        ),
        *branch.node,
        # Ones but for the axis of tokens: broadcasting leaves the other axes alone.
        helper.make_node("Shape", [query], ["first.tokens"], start=_TOKEN_AXIS, end=_TOKEN_AXIS + 1),
        helper.make_node("Constant", [], ["first.one"], value_ints=[1]),
        helper.make_node("Concat", ["first.tokens", "first.one"], ["first.shape"], axis=0),
        helper.make_node("Expand", [narrow, "first.shape"], [output.name]),
    ]
    del branch.node[:]
    branch.node.extend(nodes)


def _keep_empty_tiles(choice: onnx.NodeProto) -> None:
    branch = _branch(choice, "else_branch")
    for node in branch.node:
        if node.op_type == "Slice" and node.output[0].startswith(KEPT):
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output))


def _branch(choice: onnx.NodeProto, name: str) -> onnx.GraphProto:
    branch: onnx.GraphProto
    (branch,) = (attribute.g for attribute in choice.attribute if attribute.name == name)
    return branch
