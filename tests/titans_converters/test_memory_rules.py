"""What is noted of sizes when a memory's function has been inlined."""

from __future__ import annotations

from onnx import GraphProto, TensorProto, helper

from titans_converters.memory_rules import note_sizes


def _loop(node: str, noted: str) -> GraphProto:
    """A graph of one loop, whose body computes ``node`` and says how large ``noted`` is."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["before"], ["after"]),
            helper.make_node("Neg", ["slice"], [node]),
            helper.make_node("Identity", [node], ["scanned"]),
        ],
        "body",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("before", "slice")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("after", "scanned")],
        value_info=[helper.make_tensor_value_info(noted, TensorProto.FLOAT, [4])],
    )
    loop = helper.make_node("Scan", ["start", "rows"], ["end", "all"], body=body, num_scan_inputs=1)
    return helper.make_graph([loop], "model", [], [])


def _noted(graph: GraphProto) -> list[str]:
    (body,) = (attribute.g for attribute in graph.node[0].attribute if attribute.name == "body")
    return [info.name for info in body.value_info]


def test_sizes_within_a_loop_follow_the_names_that_inlining_gives() -> None:
    graph = _loop("x__3", "x")
    note_sizes(graph)
    assert _noted(graph) == ["x__3"]


def test_other_sizes_within_a_loop_stay() -> None:
    for node, noted in (("x", "x"), ("x__3", "x__3"), ("x__3", "y"), ("x__3y", "x")):
        graph = _loop(node, noted)
        note_sizes(graph)
        assert _noted(graph) == [noted]
