"""Tracing: one memory node a layer, free axes, nothing of the exporting machine; and the files with one copy
of the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.titans_export.memory_inputs import relative_error
from titans_converters import memory_op
from titans_converters.onnx.files import write_models
from titans_converters.onnx.function import OPSET
from titans_converters.onnx.trace import memory_node, to_proto, trace
from titans_converters.program import Program
from titans_export.config import PRESETS
from titans_export.model import Rules, TitansModel, initial_state
from titans_export.programs import model_program, readout_gradient_program
from titans_export.training.checkpoint import load_checkpoint
from titans_runtime.bundle import WEIGHTS_NAME

CONFIG = PRESETS["tiny"]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> TitansModel:
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def program(model: TitansModel) -> Program:
    return model_program(model, Rules(exact=memory_node))


@pytest.fixture(scope="module")
def traced(program: Program) -> ir.Model:
    return trace(program)


@pytest.fixture(scope="module")
def session(traced: ir.Model) -> ort.InferenceSession:
    return _session(to_proto(traced).SerializeToString())


def _session(model: str | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _inputs(batch: int, tokens: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = initial_state(CONFIG, batch)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            state[name] = torch.randint(CONFIG.vocab_size, tensor.shape, generator=generator)
    return {
        "input_ids": torch.randint(CONFIG.vocab_size, (batch, tokens), generator=generator),
        "edit": torch.rand(batch, CONFIG.layers, generator=generator),
        **{f"past.{name}": tensor for name, tensor in state.items()},
    }


def test_one_memory_node_a_layer(traced: ir.Model) -> None:
    nodes = [node for node in to_proto(traced).graph.node if node.domain == memory_op.DOMAIN]
    assert len(nodes) == CONFIG.layers
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        expected = memory_op.node_attributes(CONFIG.tile)
        assert attributes == {k: v.encode() if isinstance(v, str) else v for k, v in expected.items()}
        assert node.op_type == memory_op.NAME
        assert len(node.input) == len(memory_op.INPUTS)
        assert all(node.input)  # every input is required
        assert len(node.output) == len(memory_op.OUTPUTS)


def test_the_body_travels_with_the_graph(traced: ir.Model) -> None:
    proto = to_proto(traced)
    assert [(f.domain, f.name) for f in proto.functions] == [(memory_op.DOMAIN, memory_op.NAME)]
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    assert opsets == {"": OPSET, memory_op.DOMAIN: memory_op.VERSION}


@pytest.mark.parametrize("momentum", [True, False])
def test_the_body_is_built_for_memories_with_or_without_momentum(momentum: bool) -> None:
    model = TitansModel(dataclasses.replace(CONFIG, momentum=momentum))
    (body,) = trace(model_program(model, Rules(exact=memory_node))).functions.values()
    read = {value.name for node in body.all_nodes() for value in node.inputs if value is not None}
    own = {"log_momentum", "past_momentum"}
    assert own & read == (own if momentum else set())


def test_a_program_without_memory_has_no_body() -> None:
    proto = to_proto(trace(readout_gradient_program(CONFIG)))
    assert not proto.functions
    assert {entry.domain for entry in proto.opset_import} == {""}


def test_names_and_axes_are_the_programs(traced: ir.Model, program: Program) -> None:
    graph = to_proto(traced).graph
    for values, axes in ((graph.input, program.input_axes), (graph.output, program.output_axes)):
        assert {value.name: _axes(value) for value in values} == axes
        assert [value.name for value in values] == list(axes)


def _axes(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)


@given(batch=st.integers(1, 3), tokens=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=30)
def test_axes_are_free(
    session: ort.InferenceSession, program: Program, model: TitansModel, batch: int, tokens: int, seed: int
) -> None:
    inputs = _inputs(batch, tokens, seed)
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        state = {n.removeprefix("past."): t for n, t in inputs.items() if n.startswith("past.")}
        expected = model(inputs["input_ids"], inputs["edit"], state)
    wanted = {
        "logits": expected.logits,
        "readout_key": expected.readout_key,
        "readout_rows": expected.readout_rows,
    }
    wanted |= {f"present.{name}": tensor for name, tensor in expected.state.items()}
    assert len(outputs) == len(program.output_axes) == len(wanted)
    for name, actual in zip(program.output_axes, outputs, strict=True):
        assert actual.shape == tuple(wanted[name].shape), name
        if actual.dtype == np.int64:
            assert np.array_equal(actual, wanted[name].numpy()), name
        else:
            assert relative_error(torch.from_numpy(actual), wanted[name].double()) <= 1e-4, name


def test_nothing_of_the_exporting_machine_remains(traced: ir.Model, tmp_path: Path) -> None:
    write_models({"model": traced}, tmp_path)
    content = (tmp_path / "model.onnx").read_bytes()
    for trace_of_a_path in (b".py", b"site-packages", b"stack_trace", str(Path.home()).encode() + b"/"):
        assert trace_of_a_path not in content, trace_of_a_path


class _FixedOutput(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.reshape(3, 37, 4) * 2,)


class _FixedInput(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + torch.arange(37)[None, :, None],)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_FixedOutput(), "program bad: y has its axis batch fixed at 3"),
        (_FixedInput(), "program bad: x has its axis tokens fixed at 37"),
    ],
)
def test_a_module_that_fixes_an_axis_is_refused(module: nn.Module, message: str) -> None:
    axes = ("batch", "tokens", 4)
    program = Program("bad", module, {"x": torch.zeros(3, 37, 4)}, {"x": axes}, {"y": axes})
    with pytest.raises(ValueError, match=message):
        trace(program)


class _TwoTiles(nn.Module):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output, memory, momentum = memory_node(*inputs, tile=8)
        return memory_node(inputs[0], inputs[1], output, *inputs[3:7], memory, momentum, tile=16)


def test_two_tiles_in_one_graph_are_refused() -> None:
    """The body is built for one tile: a second one would silently be computed with the first's."""
    axes = {"q": ("batch", 2, "tokens", 4), "g": ("batch", 2, "tokens"), "m": ("batch", 2, 4, 4)}
    kinds = dict(zip(memory_op.INPUTS, "qqqggg", strict=False)) | {"past_memory": "m", "past_momentum": "m"}
    sizes = {"batch": 3, "tokens": 37}
    input_axes = {name: axes[kinds[name]] if name in kinds else ("batch",) for name in memory_op.INPUTS}
    inputs = {
        name: torch.zeros([sizes.get(axis, axis) for axis in shape]) for name, shape in input_axes.items()
    }
    outputs = dict(zip(memory_op.OUTPUTS, (axes["q"], axes["m"], axes["m"]), strict=True))
    with pytest.raises(ValueError, match=r"different tiles \[8, 16\]"):
        trace(Program("two", _TwoTiles(), inputs, input_axes, outputs))


def test_a_program_checks_its_axes() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="name different tensors"):
        Program("bad", nn.Identity(), {"x": x}, {"y": ("batch", 3)}, {})
    with pytest.raises(ValueError, match="x has 2 axes"):
        Program("bad", nn.Identity(), {"x": x}, {"x": ("batch",)}, {})


class _Product(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x @ self.weight,)


@pytest.fixture(scope="module")
def two_graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Two graphs that share a weight of an odd size, and one with a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(48, width, generator=generator) for width in (33, 40))
    weights = {"first": shared, "second": shared.clone(), "third": own}
    folder = tmp_path_factory.mktemp("graphs")
    models = {
        name: trace(
            Program(
                name,
                _Product(weight),
                {"x": torch.zeros(3, 48)},
                {"x": ("batch", 48)},
                {"y": ("batch", weight.shape[1])},
            )
        )
        for name, weight in weights.items()
    }
    assert write_models(models, folder) == [WEIGHTS_NAME, "first.onnx", "second.onnx", "third.onnx"]
    return folder, weights


def _external(path: Path) -> dict[str, str]:
    proto = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    assert not tensor.raw_data
    return {entry.key: entry.value for entry in tensor.external_data}


def test_equal_weights_are_stored_once_and_aligned(two_graphs: tuple[Path, dict[str, Tensor]]) -> None:
    folder, weights = two_graphs
    first, second, third = (_external(folder / f"{name}.onnx") for name in weights)
    assert first == second
    assert {entry["location"] for entry in (first, third)} == {WEIGHTS_NAME}
    assert [int(entry["offset"]) % 4096 for entry in (first, third)] == [0, 0]
    content = (folder / WEIGHTS_NAME).read_bytes()
    assert len(content) == int(third["offset"]) + int(third["length"])
    for entry, weight in ((first, weights["first"]), (third, weights["third"])):
        start = int(entry["offset"])
        assert content[start : start + int(entry["length"])] == weight.numpy().tobytes()


def test_files_run_with_their_external_weights(two_graphs: tuple[Path, dict[str, Tensor]]) -> None:
    folder, weights = two_graphs
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    for name, weight in weights.items():
        (y,) = _session(str(folder / f"{name}.onnx")).run(None, {"x": x.numpy()})
        assert relative_error(torch.from_numpy(y), (x @ weight).double()) <= 1e-5


def test_only_small_tensors_stay_in_the_graph(
    traced: ir.Model, session: ort.InferenceSession, tmp_path: Path
) -> None:
    """Graph optimizers must see shapes and scalars; a page of weights has no business there."""
    write_models({"model": traced}, tmp_path)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        size = int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        assert (tensor.data_location == onnx.TensorProto.EXTERNAL) == (size >= 1024), tensor.name
    inputs = {name: tensor.numpy() for name, tensor in _inputs(2, 9, 0).items()}
    from_file = _session(str(tmp_path / "model.onnx")).run(None, inputs)
    for actual, expected in zip(from_file, session.run(None, inputs), strict=True):
        assert np.array_equal(actual, expected)
