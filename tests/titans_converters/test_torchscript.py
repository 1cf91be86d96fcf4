"""TorchScript: any batch, any number of tokens, every memory."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.end_to_end.family import MEMORIES
from titans_converters.torchscript import GRAPH_FILE, archive
from titans_export.config import PRESETS
from titans_export.exportable import OwnModel
from titans_export.model import TitansModel

# One of each operator; every member of the family is exported and verified in a suite of its own.
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
