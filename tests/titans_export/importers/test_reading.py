"""What is read of a file: which entry, which tensors, and what is said of other files."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from tests.titans_export.importers.cases import MEMORY_BASE
from tests.titans_export.importers.importing import (
    TRANSFORMER_ARGUMENTS,
    Tensors,
    error_line,
    import_file,
    weights_of,
)
from tests.titans_export.importers.library import MEMORY, TRANSFORMER
from titans_export.importers.titans_pytorch.reading import finite, read_file
from titans_runtime.cli import main
from titans_runtime.errors import DataError


def _ema(memory: Tensors) -> dict[str, object]:
    """Like a copy of averages: counters beside the model, keys prefixed."""
    prefixed = {f"ema_model.{name}": tensor for name, tensor in memory.items()}
    return {"step": torch.zeros(1).long(), **prefixed}


def _lightning(memory: Tensors) -> dict[str, object]:
    prefixed = {f"model.{name}": tensor for name, tensor in memory.items()}
    moments = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    return {"epoch": 3, "hparams": {"dim": 16}, "optimizer": moments, "state_dict": prefixed}


def _training(memory: Tensors) -> dict[str, object]:
    return {"epoch": 3, "optimizer": {"lr": 0.1}, "net.best": {"model": memory}}


@pytest.mark.parametrize(
    ("make", "entry"),
    [
        (lambda memory: {"model": memory, "optimizer": {"lr": 0.1}}, "model"),
        (lambda memory: {"optimizer": {"a": torch.zeros(2)}, "model": memory}, "model"),
        (_ema, "ema_model"),
        (_lightning, "state_dict.model"),
        (_training, "net.best.model"),
    ],
)
def test_the_state_dict_may_be_one_entry_of_several(
    memory: Tensors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Tensors], dict[str, object]],
    entry: str,
) -> None:
    several = make(memory)
    code, out = import_file(tmp_path, several, MEMORY_BASE)
    assert code == 3
    hint = "; save model.state_dict(), or name what holds it: --entry "
    assert error_line(capsys).endswith(hint + entry)
    assert not out.exists()
    code, out = import_file(tmp_path, several, MEMORY_BASE, "--entry", entry)
    assert code == 0
    assert torch.equal(weights_of(out)["memory.to_keys.weight"], memory["to_keys.weight"].t())


def test_entries_that_are_not_there_are_told_by_a_few_that_are(
    memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = import_file(tmp_path, {"model": memory, "epoch": 3}, MEMORY_BASE, "--entry", "ema")
    assert code == 2
    assert error_line(capsys).endswith("model.pt holds model, epoch")
    many = {f"{name}\n": 0 for name in range(10_000)} | {"model": memory}
    for entry in ("ema", "model.ema", "0"):
        assert import_file(tmp_path, many, MEMORY_BASE, "--entry", entry)[0] == 2
        line = error_line(capsys)
        assert f"--entry {entry}: " in line
        assert line.endswith(r"holds '0\n', '1\n', '2\n', '3\n', '4\n', …")


def test_what_holds_no_model_suggests_no_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = import_file(tmp_path, {"epoch": 3, "optimizer": {"lr": 0.1}}, MEMORY_BASE)
    assert code == 3
    assert error_line(capsys).endswith("model.pt: 'epoch' is no tensor; save model.state_dict()")


def test_half_precision_becomes_float32(memory: Tensors, tmp_path: Path) -> None:
    code, out = import_file(tmp_path, {name: t.bfloat16() for name, t in memory.items()}, MEMORY_BASE)
    assert code == 0
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Tensor.to_sparse, "to_keys.weight is a sparse or nested tensor; save a dense one"),
        (lambda tensor: tensor.to("meta"), "to_keys.weight has a shape but no numbers (device meta)"),
        (
            lambda tensor: tensor.to(torch.float8_e4m3fn),
            "to_keys.weight is of type torch.float8_e4m3fn; expected floating-point numbers, of float32,",
        ),
        (lambda tensor: tensor.double() * 1e300, "to_keys.weight holds values too large for float32"),
    ],
)
def test_tensors_of_other_forms_are_named(
    memory: Tensors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Tensor], Tensor],
    message: str,
) -> None:
    code, out = import_file(
        tmp_path, memory | {"to_keys.weight": change(memory["to_keys.weight"])}, MEMORY_BASE
    )
    assert code == 3
    assert message in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("written", ["torch", "safetensors"])
def test_the_kind_of_a_file_is_told_by_its_content(memory: Tensors, tmp_path: Path, written: str) -> None:
    file = tmp_path / ("model.safetensors" if written == "torch" else "model.bin")
    contiguous = {name: tensor.clone() for name, tensor in memory.items()}
    torch.save(contiguous, file) if written == "torch" else save_file(contiguous, file)
    file.with_suffix(".json").write_text(json.dumps(MEMORY_BASE), encoding="utf-8")
    assert main(["import", "titans-pytorch", str(file), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (np.float64(0.5), "multiarray.scalar"),
    ],
)
def test_a_class_that_is_not_read_is_named(
    memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: object, name: str
) -> None:
    code, _ = import_file(tmp_path, {"model": memory, "more": more}, MEMORY_BASE, "--entry", "model")
    assert code == 3
    assert f"{name}, which is more than tensors); save model.state_dict() with" in error_line(capsys)


@pytest.mark.parametrize("key", ["x\x1b[31m\n", "y" * 100_000])
def test_keys_in_messages_stay_short_and_on_their_line(
    memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    tensor = torch.zeros(1)
    for content in (
        memory | {key: tensor},
        memory | {key: tensor.long()},
        memory | {key: tensor.to_sparse()},
        memory | {key: 1},
        {key: tensor},
    ):
        assert import_file(tmp_path, content, MEMORY_BASE)[0] == 3
        captured = capsys.readouterr().err
        assert captured.count("\n") == 1
        assert len(captured) < 1000
        assert "\x1b" not in captured


def _scripted() -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    return stream.getvalue()


def _cut(size: int) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(300, 2)}, stream)
    return stream.getvalue()[:size]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_scripted, "a TorchScript archive"),
        (lambda: bytes(100_000), "of PyTorch's old .tar format, or damaged"),
        (lambda: b"not a checkpoint", "damaged, or it holds more than tensors"),
        (lambda: b"", "damaged or truncated"),
        (lambda: b"PK\x03\x04broken", "damaged or truncated"),
        (lambda: _cut(10), "damaged or truncated"),
        (lambda: _cut(-10), "damaged or truncated"),
    ],
    ids=["TorchScript", "zeros", "a text", "empty", "a zip", "its beginning", "without its end"],
)
def test_no_file_of_tensors_is_named_as_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Callable[[], bytes], reason: str
) -> None:
    """And never with torch's advice, which is to run what the file holds."""
    file, config = tmp_path / "model.pt", tmp_path / "model.json"
    file.write_bytes(content())
    config.write_text(json.dumps(MEMORY_BASE), encoding="utf-8")
    assert main(["import", "titans-pytorch", str(file), "--out", str(tmp_path / "out")]) == 3
    assert f"no file of tensors ({reason}); save model.state_dict()" in error_line(capsys)


def test_a_file_that_holds_more_is_not_to_be_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_file(tmp_path, {"x": _Code()}, MEMORY_BASE)
    line = error_line(capsys)
    assert "(it holds eval, which is more than tensors)" in line
    assert "weights_only" not in line


@pytest.mark.parametrize("kind", [MEMORY, TRANSFORMER])
def test_names_that_save_model_leaves_out_are_those_it_notes(kind: str, tmp_path: Path) -> None:
    """With one head the initial memory is a view of the template's weights: of the two, one is stored."""
    base: dict[str, Any] = TRANSFORMER_ARGUMENTS | {"neural_memory_kwargs": {}}
    arguments = base if kind == TRANSFORMER else {"dim": 16, "chunk_size": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import titans_pytorch
    model = getattr(titans_pytorch, kind)(**arguments)
    file = tmp_path / "model.safetensors"
    save_model(model, str(file))
    assert not any("memory_model_parameters" in name for name in load_file(file))
    file.with_suffix(".json").write_text(json.dumps(arguments), encoding="utf-8")
    out = tmp_path / "checkpoint"
    assert main(["import", "titans-pytorch", str(file), "--out", str(out)]) == 0
    stem, theirs = ("layers.0.4.", "layers.0.memory.") if kind == TRANSFORMER else ("", "memory.")
    for index in range(3):
        expected = model.state_dict()[f"{stem}memory_model_parameters.{index}"]
        assert torch.equal(weights_of(out)[f"{theirs}memory_model_parameters.{index}"], expected)


class _Code:
    """What a file must not run when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (eval, ("1 + 1",))


@given(seed=st.integers(0, 2**32), zipped=st.booleans(), changes=st.integers(1, 8))
def test_a_file_with_other_bytes_is_read_or_refused(seed: int, zipped: bool, changes: int) -> None:
    """A damaged pickle makes `torch.load` raise anything: IndexError, struct.error, AssertionError, …"""
    choice, stream = random.Random(seed), io.BytesIO()
    torch.save({"a": torch.ones(3, 2), "b": torch.zeros(4)}, stream, _use_new_zipfile_serialization=zipped)
    content = bytearray(stream.getvalue())
    for _ in range(changes):
        place = choice.randrange(len(content) // 2)
        content[place : place + choice.randrange(3)] = choice.randbytes(choice.randrange(3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            for name, tensor in read_file(path, None).items():
                assert torch.isfinite(finite(name, tensor)).all()
