"""Bundles in PyTorch's formats: what every format must do, each in its own way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.family import MEMORIES
from titans_runtime.backends import Array, Graph
from titans_runtime.backends.choose import open_backend
from titans_runtime.bundle import open_bundle
from titans_runtime.manifest import GraphSpec

FORMATS = ["torchscript", pytest.param("aoti", marks=pytest.mark.suite("aoti"))]


@pytest.fixture(params=FORMATS)
def twins(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A format, and a bundle that has every graph in it."""
    fixtures = {"torchscript": "twin_bundle", "aoti": "compiled_bundle"}
    return request.param, request.getfixturevalue(fixtures[request.param])


# What a stranger runs: torch and the standard library, and no way to the project's packages.
STRANGER = """
import json, struct, sys
import torch, torch._inductor

for package in ("titans_runtime", "titans_converters", "titans_export"):
    sys.modules[package] = None  # an import of it fails
bundle, kind = sys.argv[1:]
manifest = json.load(open(f"{bundle}/titans.json"))
content = open(f"{bundle}/goldens.safetensors", "rb").read()
(length,) = struct.unpack("<Q", content[:8])
header = json.loads(content[8 : 8 + length])
kinds = {"F32": torch.float32, "I64": torch.int64}
goldens = {}
for name, entry in header.items():
    if name != "__metadata__":
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        data = torch.frombuffer(bytearray(content[begin:end]), dtype=kinds[entry["dtype"]])
        goldens[name] = data.reshape(entry["shape"])
checked = 0
for name, graph in manifest["graphs"].items():
    if "formats" not in graph:
        continue
    extra, file = {"graph.json": ""}, f"{bundle}/{graph['formats'][kind]}"
    if kind == "torchscript":
        module = torch.jit.load(file, _extra_files=extra)
    else:
        module = torch._inductor.aoti_load_package(file)
        extra = module.get_metadata()
    spec = json.loads(extra["graph.json"])
    assert spec["inputs"] == graph["inputs"] and spec["outputs"] == graph["outputs"]
    cases = sorted({key.split(".")[0] for key in goldens if key.split(".", 1)[1].startswith(name + ".")})
    for case in cases:
        call, state = 0, {}
        while f"{case}.{name}.{call}.input.input_ids" in goldens:
            prefix = f"{case}.{name}.{call}."
            mark = prefix + "input."
            given = {k.removeprefix(mark): v for k, v in goldens.items() if k.startswith(mark)}
            batch = given["input_ids"].shape[0]
            for entry in manifest["state"]:
                shape = [batch, *entry["shape"][1:]]
                dtype = getattr(torch, entry["dtype"])
                state.setdefault("past." + entry["name"], torch.full(shape, entry["initial"], dtype=dtype))
            state |= given
            results = module(*[state[tensor["name"]] for tensor in spec["inputs"]])
            for tensor, found in zip(spec["outputs"], results, strict=True):
                if tensor["name"].startswith("present."):
                    state[tensor["name"].replace("present.", "past.", 1)] = found
                expected = goldens.get(f"{prefix}output.{tensor['name']}")
                if expected is not None:
                    limit = 1e-4 + 1e-4 * float(expected.abs().max())
                    assert float((found - expected).abs().max()) <= limit, prefix + tensor["name"]
                    checked += 1
            call += 1
print(checked)
"""


def test_a_process_without_the_project_replays_the_goldens(twins: tuple[str, Path], tmp_path: Path) -> None:
    kind, bundle = twins
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, str(bundle), kind]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((bundle / "titans.json").read_text(encoding="utf-8"))["graphs"]
    names = [name for name, graph in written.items() if "formats" in graph]
    assert names == ["model", "gradient.readout", "gradient.prediction", "gradient.association"]
    goldens = sum(
        any(f".{name}." in golden for name in names) and ".output." in golden
        for golden in _golden_names(bundle)
    )
    assert int(done.stdout) == goldens > 0


def test_gradients_are_those_of_the_onnx_graphs(twins: tuple[str, Path]) -> None:
    """As they are run: at random states and inputs, any number of tokens, targets unknown in part."""
    kind, bundle = twins[0], open_bundle(twins[1])
    backends = [open_backend(name, bundle, threads=1) for name in ("onnxruntime", kind)]
    draw = np.random.default_rng(0)
    for name in ("gradient.prediction", "gradient.association"):
        spec = backends[0].manifest.graphs[name]
        for batch, tokens in ((1, 1), (1, 2), (2, 9), (3, 70)):
            axes = {"batch": batch, "tokens": tokens}
            given = {}
            for tensor in spec.inputs:
                shape = [axes.get(str(axis), axis) for axis in tensor.shape]
                given[tensor.name] = (
                    draw.integers(-1 if tensor.name == "target_ids" else 0, 256, shape)
                    if tensor.dtype == "int64"
                    else (0.3 * draw.random(shape)).astype(np.float32)
                )
            before = {key: value.copy() for key, value in given.items()}
            expected, found = (_outputs(backend.graph(name), spec, given, axes) for backend in backends)
            for key, array in expected.items():
                scale = max(float(np.abs(array).max()), 1e-3)
                assert float(np.abs(found[key] - array).max()) <= 1e-5 * scale, (name, batch, tokens, key)
            assert all(np.array_equal(given[key], before[key]) for key in given)


def _outputs(
    graph: Graph, spec: GraphSpec, given: dict[str, Array], axes: dict[str, int]
) -> dict[str, Array]:
    outputs = {
        tensor.name: np.zeros([axes.get(str(axis), axis) for axis in tensor.shape], np.float32)
        for tensor in spec.outputs
    }
    graph.bind(given, outputs).run()
    return outputs


def _golden_names(bundle: Path) -> list[str]:
    content = (bundle / "goldens.safetensors").read_bytes()
    return list(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("torchscript", marks=pytest.mark.suite("family")),
        pytest.param("aoti", marks=pytest.mark.suite("aoti")),
    ],
)
@pytest.mark.parametrize("architecture", ["lmm", "mal", "mag", "mac"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_member_is_exported_and_verified(
    kind: str, architecture: str, memory: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    import torch

    from titans_export.config import PRESETS
    from titans_export.model import TitansModel
    from titans_export.pipeline import export_bundle
    from titans_export.training.checkpoint import save_checkpoint

    torch.manual_seed(1)
    model = TitansModel(replace(PRESETS["tiny"], architecture=architecture, **MEMORIES[memory]))
    save_checkpoint(model, tmp_path / "checkpoint")
    report = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", formats=[kind])
    assert report.passed


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("torchscript", marks=pytest.mark.suite("titans-pytorch")),
        pytest.param("aoti", marks=pytest.mark.suite("aoti")),
    ],
)
@pytest.mark.parametrize("imported", ["NeuralMemory", "MemoryAsContextTransformer"])
def test_imported_models(kind: str, imported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory alone, whose tokens are vectors; a transformer, with tokens apart where segments end."""
    import torch
    from torch import nn

    from tests.titans_export.importers.cases import MEMORY_BASE, TRANSFORMER_BASE
    from titans_export.importers.titans_pytorch import stream
    from titans_export.importers.titans_pytorch.checkpoint import LIBRARY, save_imported
    from titans_export.importers.titans_pytorch.neural_memory import NeuralMemoryModel
    from titans_export.importers.titans_pytorch.options import MemoryOptions, TransformerOptions, to_dict
    from titans_export.importers.titans_pytorch.transformer import TransformerModel
    from titans_export.pipeline import export_bundle

    monkeypatch.setattr(stream, "LEAST_TOGETHER", 1)  # as with chunks of a usual size
    model = (
        NeuralMemoryModel(MemoryOptions.read(dict(MEMORY_BASE)))
        if imported == "NeuralMemory"
        else TransformerModel(TransformerOptions.read(dict(TRANSFORMER_BASE)))
    ).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = "vectors" if imported == "NeuralMemory" else "ids"
    config = {"library": LIBRARY, "class": imported, "tokenizer": tokens, "options": to_dict(model.options)}
    save_imported(model, config, tmp_path / "checkpoint")
    report = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", formats=[kind])
    assert report.passed
    graphs = open_bundle(tmp_path / "bundle").manifest.graphs
    assert all(kind in graph.formats for graph in graphs.values())
