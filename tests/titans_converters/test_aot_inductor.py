"""One graph compiled for real; whole bundles, which take minutes, have a suite of their own."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from titans_converters.aot_inductor import GRAPH_KEY, check_compiler, package
from titans_converters.program import Axes, Program
from titans_runtime.backends.aot_inductor import check_processor
from titans_runtime.errors import EnvironmentProblem


class Attention(torch.nn.Module):
    """Results that are views, which the next call must be able to take."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x, x.transpose(1, 2)


@pytest.fixture(scope="module")
def program() -> Program:
    inputs: dict[str, Axes] = {"x": ("batch", "tokens", 4)}
    outputs: dict[str, Axes] = {"y": ("batch", "tokens", 4), "turned": ("batch", 4, "tokens")}
    repeated = torch.zeros(1, 37, 4).expand(11, 37, 4)  # as a learned memory is: nothing follows for the code
    return Program("attention", Attention().eval(), {"x": repeated}, inputs, outputs)


def test_a_compiled_graph_takes_any_batch_and_any_number_of_tokens(program: Program, tmp_path: Path) -> None:
    content = package(program)
    with zipfile.ZipFile(io.BytesIO(content)) as records:
        names = records.namelist()
        assert not [name for name in names if name.endswith(".cpp")]
        notes = json.loads(records.read(next(name for name in names if name.endswith("metadata.json"))))
    assert [entry["name"] for entry in json.loads(notes[GRAPH_KEY])["outputs"]] == ["y", "turned"]
    for folder in (Path.cwd(), Path(torch.__file__).parent, tempfile.gettempdir()):
        assert str(folder).encode() not in content
    check_processor(content, torch.cpu.get_capabilities())

    file = tmp_path / "attention.pt2"
    file.write_bytes(content)
    model = torch._inductor.aoti_load_package(str(file))
    for batch, tokens in ((1, 1), (3, 1), (1, 2), (2, 65)):
        x = torch.randn(batch, tokens, 4)
        for found, expected in zip(model(x), program.module(x), strict=True):
            torch.testing.assert_close(found, expected)
            assert found.is_contiguous()


def test_without_a_compiler_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(EnvironmentProblem, match=r"install g\+\+, or name one in CXX$"):
        check_compiler()
