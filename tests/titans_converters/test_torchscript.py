"""TorchScript: any batch, any number of tokens, every memory; and a process that has PyTorch alone."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.end_to_end.family import MEMORIES
from titans_converters.torchscript import GRAPH_FILE, archive
from titans_export.config import PRESETS
from titans_export.exportable import OwnModel
from titans_export.model import TitansModel
from titans_runtime.backends import Array, Graph
from titans_runtime.backends.choose import open_backend
from titans_runtime.bundle import open_bundle
from titans_runtime.manifest import GraphSpec

# One of each operator; that every member of the family is exported and verified is a suite of its own.
MEMBERS = [("lmm", "matrix"), ("mac", "MLP of depth 2, period 4")]
TOKENS = (1, 2, 31, 32, 33, 97)


@pytest.fixture(scope="module", params=MEMBERS, ids=lambda member: member[0])
def converted(request: pytest.FixtureRequest) -> tuple[TitansModel, bytes]:
    architecture, memory = request.param
    torch.manual_seed(0)
    model = TitansModel(replace(PRESETS["tiny"], architecture=architecture, **MEMORIES[memory])).eval()
    exportable = OwnModel(model)
    return model, archive(exportable.programs()[0], exportable.recurrences())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_any_batch_and_any_number_of_tokens(converted: tuple[TitansModel, bytes]) -> None:
    model, content = converted
    script = torch.jit.load(io.BytesIO(content))
    draw = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        for tokens in TOKENS:
            state = model.initial_state(batch)
            if "position" in state:
                state["position"] = torch.arange(batch) + 5
            ids = torch.randint(model.config.vocab_size, (batch, tokens), generator=draw)
            edit = torch.rand(batch, model.config.layers, generator=draw)
            expected = model(ids, edit, state)
            logits, _, rows, *present = script(ids, edit, *state.values())
            torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(rows, expected.readout_rows)
            for name, found in zip((n for n in state if n in expected.state), present, strict=True):
                torch.testing.assert_close(found, expected.state[name], rtol=1e-4, atol=1e-5)


def test_the_file_names_its_tensors_and_no_source(converted: tuple[TitansModel, bytes]) -> None:
    model, content = converted
    with zipfile.ZipFile(io.BytesIO(content)) as records:
        graph = json.loads(records.read(f"model/extra/{GRAPH_FILE}"))
        assert not [name for name in records.namelist() if name.endswith(".debug_pkl")]
    assert [tensor["name"] for tensor in graph["inputs"][:2]] == ["input_ids", "edit"]
    assert graph["outputs"][0] == {
        "name": "logits",
        "dtype": "float32",
        "shape": ["batch", "tokens", model.config.vocab_size],
    }
    assert str(Path.cwd()).encode() not in content


# What a stranger runs: torch and the standard library, and no way to the project's packages.
STRANGER = """
import json, struct, sys
import torch

for package in ("titans_runtime", "titans_converters", "titans_export"):
    sys.modules[package] = None  # an import of it fails
bundle = sys.argv[1]
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
    extra = {"graph.json": ""}
    module = torch.jit.load(f"{bundle}/{graph['formats']['torchscript']}", _extra_files=extra)
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


def test_a_process_without_the_project_replays_the_goldens(twin_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", STRANGER, str(twin_bundle)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((twin_bundle / "titans.json").read_text(encoding="utf-8"))["graphs"]
    names = [name for name, graph in written.items() if "formats" in graph]
    assert names == ["model", "gradient.readout", "gradient.prediction", "gradient.association"]
    goldens = sum(
        any(f".{name}." in golden for name in names) and ".output." in golden
        for golden in _golden_names(twin_bundle)
    )
    assert int(done.stdout) == goldens > 0


def test_gradients_are_those_of_the_onnx_graphs(twin_bundle: Path) -> None:
    """As they are run, frozen: at random states and inputs, any number of tokens, targets unknown in part."""
    bundle = open_bundle(twin_bundle)
    backends = [open_backend(name, bundle, threads=1) for name in ("onnxruntime", "torchscript")]
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


@pytest.mark.suite("family")
@pytest.mark.parametrize("architecture", ["lmm", "mal", "mag", "mac"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_member_is_exported_and_verified(architecture: str, memory: str, tmp_path: Path) -> None:
    from titans_export.pipeline import export_bundle
    from titans_export.training.checkpoint import save_checkpoint

    torch.manual_seed(1)
    model = TitansModel(replace(PRESETS["tiny"], architecture=architecture, **MEMORIES[memory]))
    save_checkpoint(model, tmp_path / "checkpoint")
    report = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", formats=["torchscript"])
    assert report.passed
