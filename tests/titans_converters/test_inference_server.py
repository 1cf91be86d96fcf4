"""A model repository for the Triton Inference Server: read by the server's own protocol buffer, and run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format

import titans_runtime as tr
from titans_converters.inference_server import _give_axes, model_config, write_repository
from titans_runtime.bundle import open_bundle

ConfigType = Callable[[], Any]
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


@pytest.fixture(scope="module")
def config_type() -> ConfigType:
    """``inference.ModelConfig``, without the client around it, which would need gRPC."""
    spec = importlib.util.find_spec("tritonclient")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    found = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    config: ConfigType = module.ModelConfig
    return config


@pytest.fixture
def repository(tiny_bundle: Path, tmp_path: Path) -> Path:
    return write_repository(open_bundle(tiny_bundle), tmp_path / "repository")


def test_the_server_reads_every_tensor_and_state(
    config_type: ConfigType, repository: Path, tiny_bundle: Path
) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    config = text_format.Parse((repository / "config.pbtxt").read_text(), config_type())
    assert config.name == repository.name
    assert config.max_batch_size == 8
    assert {one.name for one in config.input} == {"input_ids", "edit"}
    assert {one.name: list(one.dims) for one in config.output}["logits"] == [-1, manifest.vocab_size]
    states = {one.input_name: one for one in config.sequence_batching.state}
    assert len(states) == len(manifest.state)
    for entry in manifest.state:
        state = states[f"past.{entry.name}"]
        (initial,) = state.initial_state
        assert state.output_name == f"present.{entry.name}"
        assert list(state.dims) == list(initial.dims) == list(entry.row_shape)
        name = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[state.data_type].name
        assert name == TYPES[entry.dtype]
        assert initial.zero_data


def test_a_learned_memory_is_a_file_of_its_own(
    config_type: ConfigType, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(tiny_bundle)
    entry = bundle.manifest.state[0]
    text = model_config(bundle, "m", 4, 16).replace("zero_data: true", f'data_file: "{entry.name}"', 1)
    object.__setattr__(entry, "initial", "initial.safetensors")
    assert model_config(bundle, "m", 4, 16) == text
    rows = {one.name: np.full((1, *one.row_shape), 0.5, np.float32) for one in bundle.manifest.state}
    monkeypatch.setattr("titans_converters.inference_server.initial_state", lambda _: rows)
    written = write_repository(bundle, tmp_path / "repository")
    data = np.fromfile(written / "initial_state" / entry.name, np.float32)
    assert np.array_equal(data.reshape(entry.row_shape), rows[entry.name][0])


def test_a_server_that_carries_the_state_computes_what_a_session_does(
    repository: Path, tiny_bundle: Path
) -> None:
    """The server's part, by hand: every output ``present.x`` becomes the next call's input ``past.x``."""
    graph = onnxruntime.InferenceSession(repository / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    bundle = open_bundle(tiny_bundle)
    state = {f"past.{one.name}": np.zeros((1, *one.row_shape), one.dtype) for one in bundle.manifest.state}
    names = [one.name for one in graph.get_outputs()]
    assert set(state) == {name.replace("present.", "past.") for name in names if name.startswith("present.")}
    session = tr.load(tiny_bundle).session(edit=1.0, editor=None)
    edit = np.ones((1, bundle.manifest.edit_layers), np.float32)
    for tokens in (b"some text", b"a", b"nd more"):
        ids = np.frombuffer(tokens, np.uint8).astype(np.int64)[None]
        results = dict(zip(names, graph.run(None, {"input_ids": ids, "edit": edit, **state}), strict=True))
        assert np.allclose(results["logits"][0], session.append(tokens), atol=1e-5)
        state = {name: results[name.replace("past.", "present.")] for name in state}


def test_a_state_of_one_number_has_an_axis_for_the_server() -> None:
    graph = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["": 23]>
        g (int64[B] past_position, int64[B, T] ids) => (int64[B, T] where, int64[B] present_position) {
            one = Constant <value_ints = [1]> ()
            column = Unsqueeze (past_position, one)
            where = Add (ids, column)
            present_position = Add (past_position, one)
        }
        """
    )
    for tensors in (tensors for node in graph.graph.node for tensors in (node.input, node.output)):
        for index, name in enumerate(tensors):
            tensors[index] = name.replace("_position", ".position")  # the language knows no dots
    for value in (*graph.graph.input, *graph.graph.output):
        value.name = value.name.replace("_position", ".position")
    _give_axes(graph, ["position"])
    onnx.checker.check_model(graph)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.arange(6).reshape(2, 3)
    position = np.array([[5], [7]])
    where, present = session.run(None, {"past.position": position, "ids": ids})
    assert np.array_equal(where, ids + position)
    assert np.array_equal(present, position + 1)


def test_a_model_of_the_same_name_is_replaced_and_nothing_else(repository: Path, tiny_bundle: Path) -> None:
    (repository.parent / "other").mkdir()
    (repository / "old").write_text("old")
    assert write_repository(open_bundle(tiny_bundle), repository.parent) == repository
    assert not (repository / "old").exists()
    assert (repository.parent / "other").is_dir()
    (repository / "config.pbtxt").unlink()
    with pytest.raises(tr.UsageError, match="is no model of a repository"):
        write_repository(open_bundle(tiny_bundle), repository.parent)
