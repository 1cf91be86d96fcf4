"""The plugin before TensorRT's own validators and creator, on a machine without a GPU.

`make suite NAME=tensorrt-cpu`, after ``pip install --no-deps -r`` the `requirements.txt` beside this file.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.titans_converters.tensorrt.nvidia import full_bindings, run_json
from titans_converters import memory_op

Seen = dict[str, Any]

pytestmark = pytest.mark.suite("tensorrt-cpu")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What the bindings said."""
    environment = full_bindings(tmp_path_factory.mktemp("tensorrt"))
    return run_json("tests.titans_converters.tensorrt.plugin_process", environment=environment)


def test_it_registers_with_the_operators_names(seen: Seen) -> None:
    assert tuple(seen["inputs"]) == memory_op.INPUTS
    assert tuple(seen["attributes"]) == tuple(seen["fields"]) == memory_op.ATTRIBUTES


def test_a_nodes_attributes_create_it_ahead_of_time(seen: Seen) -> None:
    assert seen["plugin"] == "_TemplateAOTPlugin"
    assert seen["plugin_attributes"] == memory_op.node_attributes(32)


def test_outputs_have_types_and_shapes(seen: Seen) -> None:
    assert seen["output_types"] == ["FLOAT"] * 3
    assert seen["output_shapes"] == [["B", 2, "T", 16], ["B", 2, 16, 16], ["B", 2, 16, 16]]


def test_tuning_offers_float32_in_rows_with_every_block(seen: Seen) -> None:
    assert seen["types"] == [["FLOAT"] * 12]
    assert seen["layouts"] == [["LINEAR"] * 12]
    assert seen["tactics"] == [[16]]


def test_the_launch_is_a_formula_of_the_shapes(seen: Seen) -> None:
    assert seen["kernel"] == "neural_memory_kernel"
    assert seen["entry"]
    assert (seen["launch"]["grid_x"], seen["launch"]["grid_y"]) == ("B * 2", 1)
    assert seen["launch"]["block_x"] == 256
    assert 0 < seen["launch"]["shared_mem"] <= 48 * 1024
    assert seen["extra_is_integer"]
    assert [value for _, value in seen["extra"]] == ["T"]
