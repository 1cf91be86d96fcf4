"""What TensorRT makes of a graph, node by node, said without TensorRT.

Its parser decides in this order, and in silence:

1. A node that names a registered plugin (``plugin_namespace``, ``plugin_version``) becomes the plugin.
2. Otherwise a node whose operator has a body in the file, a local function, becomes the nodes of that body.
3. Otherwise a standard operator that the parser imports becomes layers.
4. Anything else is refused.

A body counts as importable if all its nodes are. A plugin that its kernel cannot serve is no plugin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx

from titans_converters import memory_op
from titans_converters.tensorrt.aot import KernelSizes
from titans_runtime.errors import CheckFailed, UsageError

HIGHEST_OPSET: Final = 25
PLUGINS: Final = frozenset({(memory_op.NAME, str(memory_op.VERSION), memory_op.DOMAIN)})
"""Operator, version and namespace of what `plugin.py` registers."""

IMPORTED: Final = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    BlackmanWindow Cast CastLike CausalConvWithState Ceil Celu Clip Concat Constant ConstantOfShape
    Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf
    Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow
    HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM
    LayerNormalization LeakyRelu Less LessOrEqual LinearAttention Log LogSoftmax Loop LpNormalization
    LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
    NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RMSNormalization RNN RandomNormal
    RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT Scan Scatter ScatterElements ScatterND
    Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split
    Sqrt Squeeze Sub Sum Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905 - a list of 157 names in quotes says no more
)
"""Standard operators that the parser of TensorRT-RTX 1.7.1 says it imports; a test asks it."""

_REFUSED_TYPES = {onnx.TensorProto.DOUBLE: "float64", onnx.TensorProto.STRING: "strings"}

PLUGIN, BUILTIN, FUNCTION, NOTHING = "plugin", "builtin", "function body", "not at all"


@dataclass(frozen=True)
class Fate:
    """What becomes of one node: plugin, builtin, function body or not at all, and then why."""

    node: str
    operator: str
    becomes: str
    reason: str = ""

    def line(self) -> str:
        """The node as a line for people."""
        mark = "✗" if self.becomes == NOTHING else "✓"
        return f"{mark} {self.node} ({self.operator}): {self.becomes}{self.reason and ', ' + self.reason}"


@dataclass(frozen=True)
class Report:
    """All nodes of a graph, and what is wrong with the file as a whole."""

    fates: tuple[Fate, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether TensorRT would take the whole graph."""
        return not self.problems and all(fate.becomes != NOTHING for fate in self.fates)

    def lines(self) -> list[str]:
        """Problems, every node that is not builtin, and how many become what."""
        counts = Counter(fate.becomes for fate in self.fates)
        summary = ", ".join(f"{counts[kind]} {kind}" for kind in (PLUGIN, FUNCTION, BUILTIN, NOTHING))
        return [
            *(f"✗ {problem}" for problem in self.problems),
            *(fate.line() for fate in self.fates if fate.becomes != BUILTIN),
            f"{'PASSED' if self.passed else 'FAILED'}: {len(self.fates)} nodes: {summary}",
        ]

    def raise_if_failed(self) -> None:
        """Turn a refused graph into an error.

        Raises:
            CheckFailed: lists what TensorRT would not take.
        """
        if not self.passed:
            refused = [fate.line() for fate in self.fates if fate.becomes == NOTHING]
            raise CheckFailed("TensorRT would not take: " + "; ".join([*self.problems, *refused]))


def check(model: onnx.ModelProto, plugins: Iterable[tuple[str, str, str]] = PLUGINS) -> Report:
    """Say of every node what TensorRT's parser would make of it.

    Args:
        model: a bundle's graph; weights need not be loaded.
        plugins: what would be registered.
    """
    checker = _Checker(model, frozenset(plugins))
    fates = tuple(
        checker.fate(node, f"{node.name or node.op_type}#{index}")
        for index, node in enumerate(model.graph.node)
    )
    return Report(fates, tuple(checker.problems()))


class _Checker:
    def __init__(self, model: onnx.ModelProto, plugins: frozenset[tuple[str, str, str]]) -> None:
        self.model, self.plugins = model, plugins
        self.functions = {(one.domain, one.name): one for one in model.functions}
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
        }
        self._bodies: dict[tuple[str, str], str] = {}

    def problems(self) -> list[str]:
        found = [
            f"opset {entry.version}: the parser knows {HIGHEST_OPSET} and older; export with a lower opset"
            for entry in self.model.opset_import
            if not entry.domain and entry.version > HIGHEST_OPSET
        ]
        found += [
            f"function {name}: hides the standard operator of that name; rename it"
            for _, name in self.functions
            if name in IMPORTED
        ]
        graph = self.model.graph
        typed = [(one.name, one.type.tensor_type.elem_type) for one in (*graph.input, *graph.output)]
        typed += [(one.name, one.data_type) for one in graph.initializer]
        return found + [
            f"{name}: {_REFUSED_TYPES[type_]}, which TensorRT has not"
            for name, type_ in typed
            if type_ in _REFUSED_TYPES
        ]

    def fate(self, node: onnx.NodeProto, name: str) -> Fate:
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        not_plugin = self._why_no_plugin(node)
        if not_plugin is None:
            return Fate(name, operator, PLUGIN)
        if (node.domain, node.op_type) in self.functions:
            reason = self._refused_body(node)
            return Fate(name, operator, NOTHING if reason else FUNCTION, reason or not_plugin)
        reason = self._refused_builtin(node)
        return Fate(name, operator, NOTHING if reason else BUILTIN, reason)

    def _why_no_plugin(self, node: onnx.NodeProto) -> str | None:
        values = _attributes(node)
        namespace = values.get("plugin_namespace", "")
        key = (node.op_type, values.get("plugin_version", "1"), namespace)
        if not namespace:
            return "names no plugin" if node.domain == memory_op.DOMAIN else ""
        if key not in self.plugins:
            return "its plugin is not registered"
        memory = self.shapes.get(node.input[memory_op.INPUTS.index("past_memory")], [])
        if len(memory) == len("BHKV") and all(memory[1:]):
            try:
                KernelSizes(memory[1], memory[2], memory[3], block=16)
            except UsageError as error:
                return str(error)
        return None

    def _refused_body(self, node: onnx.NodeProto) -> str:
        """Why a function's body cannot be imported, or nothing."""
        key = (node.domain, node.op_type)
        function = self.functions[key]
        if "" in node.input or len(node.input) != len(function.input):
            return f"{len(node.input)} inputs, its body has {len(function.input)}; all must be given"
        if key not in self._bodies:
            self._bodies[key] = ""  # a body within itself is refused elsewhere
            reasons = {
                f"{fate.operator} in its body{fate.reason and ': ' + fate.reason}"
                for index, inner in enumerate(function.node)
                if (fate := self.fate(inner, f"{inner.op_type}#{index}")).becomes == NOTHING
            }
            self._bodies[key] = "; ".join(sorted(reasons))
        return self._bodies[key]

    def _refused_builtin(self, node: onnx.NodeProto) -> str:
        if node.domain not in ("", "ai.onnx"):
            return f"domain {node.domain} is unknown to TensorRT and has no body here"
        if node.op_type not in IMPORTED:
            return "not imported by the parser"
        if node.op_type == "Cast" and _attributes(node).get("to", "") in {str(one) for one in _REFUSED_TYPES}:
            return "casts to a type that TensorRT has not"
        inner = [
            fate
            for graph in _subgraphs(node)
            for index, one in enumerate(graph.node)
            if (fate := self.fate(one, f"{one.op_type}#{index}")).becomes == NOTHING
        ]
        return "; ".join(f"{fate.operator} within: {fate.reason}" for fate in inner)


def _attributes(node: onnx.NodeProto) -> Mapping[str, str]:
    """String and integer attributes, as text."""
    found = {}
    for one in node.attribute:
        if one.type == onnx.AttributeProto.STRING:
            found[one.name] = one.s.decode()
        elif one.type == onnx.AttributeProto.INT:
            found[one.name] = str(one.i)
    return found


def _subgraphs(node: onnx.NodeProto) -> Sequence[onnx.GraphProto]:
    return [one.g for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
