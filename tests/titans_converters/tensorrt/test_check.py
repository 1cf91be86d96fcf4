"""What TensorRT would make of a graph, node by node."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import titans_runtime as tr
from tests.titans_converters.test_function import _model
from titans_converters import memory_op
from titans_converters.tensorrt.check import BUILTIN, FUNCTION, NOTHING, PLUGIN, check


def _fates(model: onnx.ModelProto, plugins: bool = True) -> list[str]:
    report = check(model) if plugins else check(model, ())
    return [fate.becomes for fate in report.fates]


def _plain(*nodes: onnx.NodeProto, dtype: int = TensorProto.FLOAT, opset: int = 23) -> onnx.ModelProto:
    inputs, outputs = ([helper.make_tensor_value_info(name, dtype, ["n"])] for name in ("x", "y"))
    graph = helper.make_graph(nodes, "plain", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_an_exported_model_has_a_plugin_for_every_layer(tiny_bundle: Path) -> None:
    report = check(onnx.load(tiny_bundle / "model.onnx", load_external_data=False))
    assert report.passed, report.lines()
    becomes = [fate.becomes for fate in report.fates]
    assert becomes.count(PLUGIN) == 2
    assert set(becomes) == {PLUGIN, BUILTIN}
    assert report.lines()[-1].startswith("PASSED: ")


def test_without_the_plugin_the_body_is_taken_and_the_reason_named(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    report = check(model, plugins=())
    bodies = [fate for fate in report.fates if fate.becomes == FUNCTION]
    assert len(bodies) == 2
    assert {fate.reason for fate in bodies} == {"its plugin is not registered"}
    assert report.passed


@pytest.mark.parametrize("name", ["plugin_namespace", "plugin_version"])
def test_a_node_that_names_no_plugin_of_ours_is_its_body(name: str) -> None:
    model = _model(8)
    for attribute in model.graph.node[0].attribute:
        if attribute.name == name:
            attribute.s = b"" if name == "plugin_namespace" else b"2"
    assert _fates(model) == [FUNCTION]


def test_a_memory_too_wide_for_a_chip_is_its_body() -> None:
    model = _model(8)
    wide = helper.make_tensor_value_info("past_memory", TensorProto.FLOAT, ["B", 2, 256, 64])
    index = memory_op.INPUTS.index("past_memory")
    model.graph.input[index].CopyFrom(wide)
    (fate,) = check(model).fates
    assert fate.becomes == FUNCTION
    assert "keys of 1 to 128" in fate.reason


def test_a_body_with_a_strange_operator_is_not_taken() -> None:
    model = _model(8)
    choice = model.functions[0].node[-1]
    choice.attribute[0].g.node[0].op_type = "Bernoulli"
    (fate,) = check(model, ()).fates
    assert fate.becomes == NOTHING
    assert "Bernoulli" in fate.reason


def test_an_operator_without_plugin_and_body_is_not_taken() -> None:
    model = _model(8)
    del model.functions[:]
    report = check(model, ())
    assert [fate.becomes for fate in report.fates] == [NOTHING]
    with pytest.raises(tr.CheckFailed, match=r"titans::NeuralMemory.*has no body"):
        report.raise_if_failed()
    assert _fates(model) == [PLUGIN]


def test_standard_operators_that_the_parser_lacks_are_named() -> None:
    model = _plain(helper.make_node("Bernoulli", ["x"], ["y"], name="draw"))
    with pytest.raises(tr.CheckFailed, match=r"draw#0 \(Bernoulli\): not at all, not imported"):
        check(model).raise_if_failed()


def test_a_strange_operator_within_a_branch_is_found() -> None:
    branch = helper.make_graph([helper.make_node("Unique", ["x"], ["z"])], "branch", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    (fate,) = check(_plain(node)).fates
    assert fate.becomes == NOTHING
    assert "Unique" in fate.reason


@pytest.mark.parametrize(
    ("changes", "words"), [({"dtype": TensorProto.DOUBLE}, "float64"), ({"opset": 26}, "opset 26")]
)
def test_what_is_wrong_with_the_whole_file_is_said(changes: dict[str, int], words: str) -> None:
    report = check(_plain(helper.make_node("Identity", ["x"], ["y"]), **changes))
    assert not report.passed
    assert words in report.lines()[0]


def test_a_function_that_hides_a_builtin_is_refused() -> None:
    model = _model(8)
    model.functions[0].name = model.graph.node[0].op_type = "LinearAttention"
    assert "hides the standard operator" in check(model).problems[0]
