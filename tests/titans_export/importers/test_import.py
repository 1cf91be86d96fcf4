"""``titans import titans-pytorch``: the files that it reads, and those that it refuses."""

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
from tests.titans_export.importers.library import MEMORY, TRANSFORMER, library_model
from titans_export.config import ModelConfig
from titans_export.exportable import load_exportable
from titans_export.importers.titans_pytorch.reading import finite, read_file
from titans_runtime.cli import main
from titans_runtime.errors import DataError

pytest.importorskip("titans_pytorch")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_memory_is_imported_from_either_kind_of_file(
    memory: Tensors, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = import_file(tmp_path, memory, MEMORY_BASE, suffix=suffix)
    assert code == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert printed.err.startswith("NeuralMemory: 19 tensors, all accounted for; ")
    model = load_exportable(out)
    assert model.facts().tokenizer == "vectors"
    assert torch.equal(model.module.state_dict()["memory.to_queries.weight"], memory["to_queries.weight"].t())
    assert json.loads((out / "editing.json").read_text()) == {"edit": 1.0, "editor": None}


def test_a_transformer_is_imported(transformer: Tensors, tmp_path: Path) -> None:
    code, out = import_file(tmp_path, transformer, TRANSFORMER_ARGUMENTS | {"class": TRANSFORMER})
    assert code == 0
    facts = load_exportable(out).facts()
    assert (facts.tokenizer, facts.vocab_size, facts.edit_layers) == ("ids", 32, 2)


def test_the_tokenizer_is_what_the_user_says(tmp_path: Path) -> None:
    arguments = TRANSFORMER_ARGUMENTS | {"num_tokens": 256}
    tensors = library_model(TRANSFORMER, arguments).state_dict()
    code, out = import_file(tmp_path, tensors, arguments, "--tokenizer", "bytes")
    assert code == 0
    assert load_exportable(out).facts().tokenizer == "bytes"


@pytest.mark.parametrize("tokens", [32, 257])
def test_bytes_are_all_tokens(
    transformer: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: int
) -> None:
    """With fewer, ordinary text has bytes that the model has no embedding for."""
    arguments = TRANSFORMER_ARGUMENTS | {"num_tokens": tokens}
    code, out = import_file(tmp_path, transformer, arguments, "--tokenizer", "bytes")
    assert code == 2
    expected = f"titans: --tokenizer is 'bytes', of which there are 256; num_tokens is {tokens}"
    assert error_line(capsys) == expected
    assert not out.exists()


def test_a_memory_has_no_bytes(memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_file(tmp_path, memory, MEMORY_BASE, "--tokenizer", "bytes")[0] == 2
    assert error_line(capsys) == "titans: --tokenizer is 'bytes'; a NeuralMemory takes vectors"


def test_prefixes_of_wrappers_are_taken_off(memory: Tensors, tmp_path: Path) -> None:
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in memory.items()}
    code, out = import_file(tmp_path, wrapped, MEMORY_BASE)
    assert code == 0
    assert torch.equal(weights_of(out)["memory.to_keys.weight"], memory["to_keys.weight"].t())


def test_a_compiled_submodule_leaves_its_mark_within_keys(transformer: Tensors, tmp_path: Path) -> None:
    compiled = {name.replace(".5.", ".5._orig_mod."): tensor for name, tensor in transformer.items()}
    assert compiled.keys() != transformer.keys()
    code, _ = import_file(tmp_path, compiled, TRANSFORMER_ARGUMENTS)
    assert code == 0


def test_keys_that_unwrapping_makes_one_are_both_kept(
    memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = import_file(tmp_path, memory | {"_orig_mod.to_keys.weight": torch.ones(1)}, MEMORY_BASE)
    assert code == 3
    assert "_orig_mod.to_keys.weight belongs to no option" in error_line(capsys)


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


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def _with(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (_without("to_keys.weight"), {}, "to_keys.weight is missing from the checkpoint"),
        (_with("to_keys.bias", torch.zeros(16)), {}, "to_keys.bias belongs to no option that"),
        (
            _with("to_keys.weight", torch.zeros(8, 16)),
            {},
            "to_keys.weight has shape (8, 16); the constructor",
        ),
        (
            _with("to_keys.weight", torch.full((16, 16), torch.nan)),
            {},
            "to_keys.weight holds values that are not",
        ),
        (_with("to_keys.weight", torch.zeros(16, 16).long()), {}, "to_keys.weight is of type torch.int64"),
        (lambda tensors: tensors, {"momentum": False}, "to_momentum.0.bias belongs to no option that"),
        (lambda tensors: tensors, {"qk_rmsnorm": True}, "q_norm.gamma is missing"),
        (lambda tensors: tensors, {"activation": "SiLU"}, "to_queries.0.weight is missing"),
        (lambda tensors: {"a": torch.zeros(1)}, {}, "the keys are neither those of NeuralMemory nor of"),
        (lambda tensors: {}, {}, "holds no state dict; save model.state_dict()"),
    ],
)
def test_no_key_is_left_unused_and_none_is_missing(
    memory: Tensors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Tensors], Tensors],
    arguments: dict[str, Any],
    message: str,
) -> None:
    code, out = import_file(tmp_path, change(memory), MEMORY_BASE | arguments)
    assert code == 3
    assert message in error_line(capsys)
    assert not out.exists()


def test_sizes_are_held_against_the_file_before_memory_is_spent(
    transformer: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model that these arguments ask for takes more than a petabyte."""
    large = TRANSFORMER_ARGUMENTS | {"dim": 2**16, "depth": 50, "heads": 4096, "dim_head": 2**16}
    code, out = import_file(tmp_path, transformer, large)
    assert code == 3
    assert "token_emb.weight has shape (32, 16); the constructor arguments ask for (32, 65536)" in error_line(
        capsys
    )
    assert not out.exists()


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
        tmp_path, _with("to_keys.weight", change(memory["to_keys.weight"]))(memory), MEMORY_BASE
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


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_place_of_the_folder_is_a_line(
    memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    file = tmp_path / "taken"
    file.write_text("mine", encoding="utf-8")
    code, _ = import_file(tmp_path, memory, MEMORY_BASE, "--force", "--out", str(file / below))
    assert code == 2
    assert error_line(capsys) == f"titans: --out {file / below}: {file} is a file; name a folder"
    assert file.read_text(encoding="utf-8") == "mine"


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
        (lambda: b"", "damaged or truncated"),
        (lambda: _cut(10), "damaged or truncated"),
        (lambda: _cut(-10), "damaged or truncated"),
    ],
    ids=["TorchScript", "zeros", "empty", "its beginning", "without its end"],
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


@pytest.mark.parametrize("source", ["weights", "config"])
def test_what_is_imported_is_not_overwritten(
    memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    """An import writes config.json and weights.safetensors, which the user's files may be called, too."""
    folder = tmp_path / "mine"
    folder.mkdir()
    file = (folder if source == "weights" else tmp_path) / "weights.safetensors"
    config = folder / "config.json"
    save_file({name: tensor.clone() for name, tensor in memory.items()}, file)
    config.write_text(json.dumps(MEMORY_BASE), encoding="utf-8")
    before = file.read_bytes(), config.read_bytes()
    out = folder / ".." / "mine"
    code = main(["import", "titans-pytorch", str(file), "--config", str(config), "--out", str(out)])
    assert code == 2
    assert "which is imported and might be overwritten; name another" in error_line(capsys)
    assert (file.read_bytes(), config.read_bytes()) == before
    assert len(list(folder.iterdir())) == (2 if source == "weights" else 1)


def test_a_checkpoint_is_replaced_by_force_alone(
    memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = import_file(tmp_path, memory, MEMORY_BASE)
    assert code == 0
    (out / "training.json").write_text("{}", encoding="utf-8")
    assert import_file(tmp_path, memory, MEMORY_BASE)[0] == 2
    assert f"--out {out}: holds a checkpoint already (config.json); " in error_line(capsys)
    assert (out / "training.json").exists()
    assert import_file(tmp_path, memory, MEMORY_BASE, "--force")[0] == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "weights.safetensors", "editing.json"}


class _Code:
    """What a file must not run when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (eval, ("1 + 1",))


def test_a_file_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = import_file(tmp_path, {"x": _Code()}, MEMORY_BASE)
    assert code == 3
    assert "no file of tensors" in error_line(capsys)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_a_damaged_file_is_a_line(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(content)
    assert main(["import", "titans-pytorch", str(file), "--out", str(tmp_path / "out")]) == 3
    assert error_line(capsys)


def test_a_checkpoint_of_another_kind_is_damaged_data(memory: Tensors, tmp_path: Path) -> None:
    _, out = import_file(tmp_path, memory, MEMORY_BASE)
    with pytest.raises(DataError):
        ModelConfig.load(out / "config.json")
    config = json.loads((out / "config.json").read_text())
    for broken in (
        {"library": "torch"},
        {"class": "Transformer"},
        {"options": {"dim": 16}},
        {"tokenizer": "bytes"},
    ):
        (out / "config.json").write_text(json.dumps(config | broken))
        with pytest.raises(DataError, match=r"config\.json"):
            load_exportable(out)


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


def test_the_weights_of_another_import_are_refused(memory: Tensors, tmp_path: Path) -> None:
    """A process that is killed between the files of a checkpoint leaves those of two."""
    _, out = import_file(tmp_path, memory, MEMORY_BASE)
    weights = (out / "weights.safetensors").read_bytes()
    import_file(tmp_path, memory, MEMORY_BASE | {"default_step_transform_max_lr": 0.5}, "--force")
    load_exportable(out)
    (out / "weights.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match=r"was saved with another config\.json than the one beside it; "):
        load_exportable(out)
