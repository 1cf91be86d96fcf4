"""``titans import titans-pytorch``: the files that it reads, and those that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.titans_export.importers.cases import MEMORY_BASE
from tests.titans_export.importers.importing import (
    TRANSFORMER_ARGUMENTS,
    Tensors,
    error_line,
    import_file,
    weights_of,
)
from tests.titans_export.importers.library import TRANSFORMER, library_model
from titans_export.config import ModelConfig
from titans_export.exportable import load_exportable
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


def test_the_weights_of_another_import_are_refused(memory: Tensors, tmp_path: Path) -> None:
    """A process that is killed between the files of a checkpoint leaves those of two."""
    _, out = import_file(tmp_path, memory, MEMORY_BASE)
    weights = (out / "weights.safetensors").read_bytes()
    import_file(tmp_path, memory, MEMORY_BASE | {"default_step_transform_max_lr": 0.5}, "--force")
    load_exportable(out)
    (out / "weights.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match=r"was saved with another config\.json than the one beside it; "):
        load_exportable(out)
