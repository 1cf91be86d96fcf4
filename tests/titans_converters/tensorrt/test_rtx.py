"""Every architecture's graph through NVIDIA's own parser and builder, on a machine without a GPU.

TensorRT-RTX: its parser, its shape checks and its builder, here through the function bodies, since a plugin
would need a GPU to be tuned. `make suite NAME=tensorrt-rtx`, after ``pip install --no-deps -r`` the
`requirements.txt` beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.titans_converters.tensorrt.nvidia import rtx, run_json
from tests.titans_export.importers.cases import MEMORY_BASE, TRANSFORMER_BASE
from tests.titans_export.importers.library import imported, library_model
from titans_converters import memory_op
from titans_converters.onnx.trace import memory_node, recurrence_node, to_proto, trace
from titans_converters.program import Program
from titans_converters.tensorrt.check import IMPORTED, check
from titans_converters.tensorrt.prepare import prepare
from titans_export.config import PRESETS, overridden
from titans_export.importers.titans_pytorch.checkpoint import MEMORY, TRANSFORMER
from titans_export.importers.titans_pytorch.exportable import ImportedModel
from titans_export.importers.titans_pytorch.options import TransformerOptions
from titans_export.importers.titans_pytorch.transformer import TransformerModel
from titans_export.model import Rules, TitansModel
from titans_export.programs import model_program
from titans_export.recurrence_programs import recurrence_programs

pytestmark = pytest.mark.suite("tensorrt-rtx")

DEEP = ["memory_depth=2", "learned_memory=true", "period=8"]
VARIANTS = {
    f"{architecture}{suffix}": [f"architecture={architecture}", *changes]
    for architecture in ("lmm", "mac", "mag", "mal")
    for suffix, changes in (("", []), ("-period", ["period=4"]), ("-deep", DEEP))
} | {"lmm-no-momentum": ["momentum=false"]}
SHORT, USUAL, LONG = (1, 1), (2, 64), (4, 512)


def _graph(variant: str) -> tuple[Program, onnx.ModelProto]:
    torch.manual_seed(0)
    model = TitansModel(overridden(PRESETS["tiny"], VARIANTS[variant])).eval()
    program = model_program(model, Rules(exact=memory_node, recurrence=recurrence_node))
    return program, to_proto(trace(program, recurrence_programs(model)))


def _shape(program: Program, name: str, batch: int, tokens: int) -> list[int]:
    free = {"batch": batch, "tokens": tokens}
    return [free[axis] if isinstance(axis, str) else axis for axis in program.input_axes[name]]


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, feeds)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_is_parsed_and_built_for_any_batch_and_tokens(variant: str, tmp_path: Path) -> None:
    _assert_built(*_graph(variant), tmp_path)


IMPORTS = {
    "memory-in-turn": (MEMORY, MEMORY_BASE | {"batch_size": 8}, "vectors"),
    "memory-together": (MEMORY, MEMORY_BASE | {"chunk_size": 16}, "vectors"),
    "transformer": (TRANSFORMER, TRANSFORMER_BASE | {"sliding_window_attn": True}, "ids"),
    "transformer-chunks": (
        TRANSFORMER,
        TRANSFORMER_BASE | {"segment_len": 32, "neural_memory_segment_len": 16},
        "ids",
    ),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_what_is_imported_is_built(name: str, tmp_path: Path) -> None:
    kind, arguments, tokenizer = IMPORTS[name]
    if kind == MEMORY:
        model = imported(arguments, library_model(MEMORY, arguments).state_dict())
    else:
        torch.manual_seed(0)
        model = TransformerModel(TransformerOptions.read(dict(arguments)))
    exportable = ImportedModel(model.eval(), {"tokenizer": tokenizer})
    program = exportable.programs()[0]
    _assert_built(program, to_proto(trace(program, exportable.recurrences())), tmp_path)


def _assert_built(program: Program, model: onnx.ModelProto, tmp_path: Path) -> None:
    """One profile, from one token of one stream to 512 tokens of four; results as before in ONNX Runtime."""
    prepared = prepare(model)
    assert check(prepared).passed
    generator = np.random.default_rng(0)
    for tokens in (1, 21):
        feeds = {
            name: generator.normal(size=_shape(program, name, 2, tokens)).astype(np.float32) * 0.1
            if tensor.dtype == torch.float32
            else np.full(_shape(program, name, 2, tokens), 3, str(tensor.dtype).removeprefix("torch."))
            for name, tensor in program.inputs.items()
        }
        for expected, actual in zip(_run(model, feeds), _run(prepared, feeds), strict=True):
            assert np.allclose(actual, expected, rtol=1e-5, atol=1e-5)
    profile = {
        name: [_shape(program, name, *sizes) for sizes in (SHORT, USUAL, LONG)] for name in program.inputs
    }
    graph, shapes = tmp_path / "model.onnx", tmp_path / "profile.json"
    graph.write_bytes(prepared.SerializeToString())
    shapes.write_text(json.dumps(profile))
    built = run_json(
        "tests.titans_converters.tensorrt.rtx_process", graph, shapes, environment=rtx(tmp_path / "lib")
    )
    print(program.name, built)
    assert built["messages"] == []
    assert built["engine_bytes"] > 0


def test_as_exported_the_one_token_branch_fits_no_other_profile(tmp_path: Path) -> None:
    """Why `prepare` is there. Should this fail, it may go."""
    program, model = _graph("lmm")
    profile = {
        name: [_shape(program, name, *sizes) for sizes in (SHORT, USUAL, LONG)] for name in program.inputs
    }
    graph, shapes = tmp_path / "model.onnx", tmp_path / "profile.json"
    graph.write_bytes(model.SerializeToString())
    shapes.write_text(json.dumps(profile))
    built = run_json(
        "tests.titans_converters.tensorrt.rtx_process", graph, shapes, environment=rtx(tmp_path / "lib")
    )
    assert built["engine_bytes"] == 0
    assert "dimensions not compatible" in str(built["messages"])


def test_the_checker_knows_what_the_parser_imports(tmp_path: Path) -> None:
    found = run_json("tests.titans_converters.tensorrt.rtx_process", environment=rtx(tmp_path / "lib"))
    assert set(found["supported"]) == IMPORTED
    assert memory_op.NAME not in IMPORTED
